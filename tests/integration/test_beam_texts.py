"""Beam search on the embedded model: the texts of transformers, blocks shared, and errors that hurt nobody else."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from folovllm import LLM, BeamSearchParams, SamplingParams
from folovllm.engine.beam_search import BeamSearch
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.grammar import sample

ASKED = "<|im_start|>user\nTell a tale about a fox.<|im_end|>\n<|im_start|>assistant\n"
TALE = (
    "Once upon a time, in the forest, there lived a little fox named Mira. Mira loved to sing. One morning in the "
    "forest, Mira found a red key under the bridge. Whose key was it? Mira forgot to sing. Then Mira met Pip the "
    'heron. "Why are you sad?" asked Mira. "I lost my red key," said the heron. Mira looked carefully and gave the key '
    "to Pip. Pip thanked Mira, and"
)
ANSWER = "<|im_end|>\n<|im_start|>user\nWhat did Mira love?<|im_end|>\n<|im_start|>assistant\n"
QUESTION = f"{ASKED}{TALE} they were friends ever after.{ANSWER}"
PROMPTS = ["Once upon a time", "从前，在", ASKED, QUESTION]
PENALTIES = (0.0, 0.5, 1.0, 2.0)
CASES = [
    *((prompt, max_tokens, (1.0,)) for prompt, max_tokens in zip(PROMPTS, (12, 25, 20))),
    *((prompt, max_tokens, PENALTIES) for prompt, max_tokens in ((QUESTION, 3), (QUESTION, 25), (TALE, 20))),
]
"""Prompts, ``max_tokens`` and length penalties. In the last two texts end by themselves, by either end token of the
checkpoint; in the first three all are equally long."""
WIDTHS = (2, 4, 8)
NEAR_TIE = 1e-4
"""Nats: what two correct sums in float32 may differ by."""


@pytest.fixture(scope="module")
def llm():
    return LLM(str(EMBEDDED_MODEL), device="cpu", enable_prefix_caching=True, block_size=4, max_logprobs=-1)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()


@torch.inference_mode()
def transformers_search(model, prompt_token_ids, params, ends):
    """Tokens and score of each text that transformers finds, the best first."""
    found = model.generate(
        torch.tensor([prompt_token_ids]),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        early_stopping=True,
        length_penalty=params.length_penalty,
        max_new_tokens=params.max_tokens,
        eos_token_id=ends,
        pad_token_id=0,
        do_sample=False,
        min_p=None,
        temperature=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for tokens in found.sequences.tolist():
        output = tokens[len(prompt_token_ids) :]
        end = next((i + 1 for i, token_id in enumerate(output) if token_id in ends), len(output))
        texts.append(prompt_token_ids + output[:end])
    return texts, found.sequences_scores.tolist()


def check_same(output, prompt_token_ids, params, expected):
    """All texts in the same order. The sums are float32's there and Python's here, and no two here are so near.

    Where lengths do not count, a score is a sum of dozens of numbers, each a millionth of itself off on both sides.
    """
    texts, scores = expected
    assert [sequence.tokens for sequence in output.sequences] == texts
    lengths = [len(sequence.tokens) - len(prompt_token_ids) for sequence in output.sequences]
    ours = [sequence.cum_logprob / n**params.length_penalty for sequence, n in zip(output.sequences, lengths)]
    assert ours == pytest.approx(scores, rel=5e-6, abs=NEAR_TIE)
    return sum(sequence.finish_reason == "stop" for sequence in output.sequences)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_texts_are_those_of_transformers(llm, model, width):
    num_stopped = 0
    for prompt, max_tokens, penalties in CASES:
        encoded = llm.get_tokenizer().encode(prompt)
        for penalty in penalties:
            params = BeamSearchParams(width, max_tokens, length_penalty=penalty)
            (output,) = llm.beam_search(prompt, params, use_tqdm=False)
            expected = transformers_search(model, encoded, params, llm.engine.eos_token_ids)
            num_stopped += check_same(output, encoded, params, expected)
    assert num_stopped > 4 * width


def test_with_end_tokens_wherever_a_text_may_end(llm, model, monkeypatch):
    """Up to 38 of them, likely and unlikely ones, with penalties below 0 and above 1."""
    rng, num_stopped = random.Random(3), 0
    for _ in range(40):
        token_ids = llm.get_tokenizer().encode(sample(rng).text)
        num_prompt = rng.randrange(1, 40)
        likely = rng.sample(token_ids[num_prompt:], rng.choice([1, 2, 4, 8]))
        ends = sorted({*likely, *rng.sample(range(1294), rng.choice([0, 3, 30]))})
        params = BeamSearchParams(
            rng.choice([2, 3, 5, 8]), rng.choice([1, 2, 5, 12]), length_penalty=rng.choice([-1.0, 0.0, 0.7, 3.0])
        )
        monkeypatch.setattr(llm.engine, "eos_token_ids", ends)
        (output,) = llm.beam_search([token_ids[:num_prompt]], params, use_tqdm=False)
        expected = transformers_search(model, token_ids[:num_prompt], params, ends)
        num_stopped += check_same(output, token_ids[:num_prompt], params, expected)
    assert num_stopped > 30


def test_many_prompts_at_once_are_each_alone(llm):
    params = BeamSearchParams(4, 12)
    prompts = [prompt for prompt, _, _ in CASES]
    alone = [llm.beam_search(prompt, params, use_tqdm=False)[0] for prompt in prompts]
    assert tokens_of(llm.beam_search(prompts, params, use_tqdm=False)) == tokens_of(alone)


def ask(llm, prompts, **kwargs):
    return llm.beam_search(prompts, BeamSearchParams(**{"beam_width": 4, "max_tokens": 12, **kwargs}), use_tqdm=False)


def tokens_of(outputs):
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


def nothing_left(llm):
    engine = llm.engine
    engine.check_integrity()
    pool = engine.cache.pool
    return not engine.output_processor.states and not engine.scheduler.requests and pool.num_free == pool.num_blocks


class TestScores:
    def test_a_beam_of_one_is_greedy(self, llm):
        greedy = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)
        for output, expected in zip(ask(llm, PROMPTS, beam_width=1, max_tokens=40), greedy):
            (sequence,) = output.sequences
            assert sequence.tokens == [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
            assert sequence.finish_reason == expected.outputs[0].finish_reason
            assert sequence.stop_reason == expected.outputs[0].stop_reason

    @torch.inference_mode()
    def test_sums_are_those_of_one_pass_over_the_whole_text(self, llm, model):
        for prompt, output in zip(PROMPTS, ask(llm, PROMPTS, max_tokens=30)):
            num_prompt = len(llm.get_tokenizer().encode(prompt))
            for sequence in output.sequences:
                logprobs = model(torch.tensor([sequence.tokens])).logits[0].log_softmax(dim=-1)
                chosen = logprobs[:-1].gather(1, torch.tensor(sequence.tokens[1:]).unsqueeze(1)).flatten()
                assert sequence.cum_logprob == pytest.approx(chosen[num_prompt - 1 :].sum().item(), abs=NEAR_TIE)
                assert len(sequence.logprobs) == len(sequence.tokens) - num_prompt
                for found, token_id, logprob in zip(
                    sequence.logprobs, sequence.tokens[num_prompt:], chosen[num_prompt - 1 :].tolist()
                ):
                    assert found[token_id].logprob == pytest.approx(logprob, abs=NEAR_TIE)
                    assert len(found) == 8 and all(entry.decoded_token is not None for entry in found.values())

    @torch.inference_mode()
    def test_two_tokens_are_the_likeliest_of_all_pairs(self, llm, model):
        """A beam of 64 drops only first tokens that are less likely already than the eight best pairs."""
        prompt, width = llm.get_tokenizer().encode("Once upon a time, in the"), 64
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
        both = torch.tensor([[*prompt, token_id] for token_id in range(len(first))])
        second = torch.cat([model(part).logits[:, -1].log_softmax(dim=-1) for part in both.split(200)])
        sums = first.unsqueeze(1) + second
        best, places = sums.flatten().topk(8)
        assert first.topk(width).values[-1] < best[-1]
        (output,) = ask(llm, [prompt], beam_width=width, max_tokens=2, ignore_eos=True)
        assert [sequence.tokens[-2:] for sequence in output.sequences[:8]] == [
            [*divmod(place, len(first))] for place in places.tolist()
        ]
        assert nothing_left(llm)

    def test_temperature_changes_nothing(self, llm):
        assert tokens_of(ask(llm, PROMPTS, temperature=5.0)) == tokens_of(ask(llm, PROMPTS))


class TestEnds:
    def test_the_end_token_is_a_token_and_no_text(self, llm):
        (output,) = ask(llm, PROMPTS[3])
        best = output.sequences[0]
        assert (best.tokens[-1], best.finish_reason, best.stop_reason) == (2, "stop", None)
        assert best.text.endswith("assistant\nMira loved to sing.")
        (output,) = ask(llm, PROMPTS[3], include_stop_str_in_output=True, skip_special_tokens=False)
        assert output.sequences[0].text == f"{PROMPTS[3]}Mira loved to sing.<|im_end|>"
        (output,) = ask(llm, PROMPTS[3], skip_special_tokens=False)
        assert output.sequences[0].text == f"{PROMPTS[3]}Mira loved to sing."

    def test_every_end_token_of_the_checkpoint_ends_a_text(self, llm):
        (output,) = ask(llm, TALE, max_tokens=20)
        best = output.sequences[0]
        assert (best.tokens[-1], best.finish_reason, best.stop_reason) == (0, "stop", 0)
        assert not {0, 2} & {*best.tokens[:-1]}

    def test_ignore_eos_goes_on(self, llm):
        (output,) = ask(llm, PROMPTS[3], ignore_eos=True, max_tokens=20)
        num_prompt = len(llm.get_tokenizer().encode(PROMPTS[3]))
        assert {len(sequence.tokens) for sequence in output.sequences} == {num_prompt + 20}
        assert {sequence.finish_reason for sequence in output.sequences} == {"length"}
        assert 2 in output.sequences[0].tokens[num_prompt:-1]

    def test_no_text_is_longer_than_the_model_takes(self):
        short = LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=20)
        outputs = ask(short, ["Once upon a time", [5] * 19], max_tokens=500)
        assert {len(sequence.tokens) for output in outputs for sequence in output.sequences} == {20}
        assert {sequence.finish_reason for output in outputs for sequence in output.sequences} == {"length"}


class TestBlocks:
    def test_texts_share_the_blocks_of_their_common_beginning(self, llm):
        """Each text computes what does not fill a block, and at least one token: the rest it finds in the cache."""
        llm.reset_prefix_cache()
        prompt, computed, shared = llm.get_tokenizer().encode(PROMPTS[2]), [], []

        def hook(scheduler_output, runner_output, stats):
            for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
                computed.append((seq.get_len() - 1, num_new))  # its length without the token of this very step

        def count_shared(scheduler_output):
            shared.append(sum(count > 1 for count in llm.engine.cache.pool.ref_counts))
            return run(scheduler_output)

        run, llm.engine.runner.run = llm.engine.runner.run, count_shared
        llm.engine.step_hooks.append(hook)
        try:
            ask(llm, [prompt], beam_width=4, max_tokens=10, ignore_eos=True)
        finally:
            llm.engine.step_hooks.pop()
            llm.engine.runner.run = run
        assert computed[0] == (len(prompt), len(prompt)) and len(computed) == 1 + 4 * 9
        assert [num_new for _, num_new in computed[1:]] == [(length - 1) % 4 + 1 for length, _ in computed[1:]]
        assert [length for length, _ in computed[1:]] == [len(prompt) + 1 + i // 4 for i in range(36)]
        full = (len(prompt) - 1) // 4
        assert shared[0] == 0 and min(shared[1:]) >= full and nothing_left(llm)

    def test_the_texts_are_the_same_without_sharing_in_little_memory_and_in_pieces(self, llm):
        expected = tokens_of(ask(llm, PROMPTS, max_tokens=6))
        for settings in (
            {"enable_prefix_caching": False},
            {"enable_prefix_caching": True, "num_blocks": 40, "max_num_seqs": 3},
            {"enable_chunked_prefill": True, "max_num_batched_tokens": 7, "enable_prefix_caching": True},
            {"num_blocks": 40, "enable_chunked_prefill": True, "max_num_batched_tokens": 24},
            {"batching": "static", "max_num_seqs": 5},
        ):
            other = LLM(str(EMBEDDED_MODEL), device="cpu", **{"block_size": 4, "max_model_len": 160, **settings})
            assert tokens_of(ask(other, PROMPTS, max_tokens=6)) == expected and nothing_left(other)

    def test_a_salt_keeps_blocks_apart(self, llm):
        llm.reset_prefix_cache()
        ask(llm, {"prompt": PROMPTS[2], "cache_salt": "a"}, max_tokens=3)
        cached = []
        llm.engine.step_hooks.append(lambda *step: cached.append(step[-1].num_cached_tokens))
        try:
            outputs = ask(llm, {"prompt": PROMPTS[2], "cache_salt": "b"}, max_tokens=3)
        finally:
            llm.engine.step_hooks.pop()
        assert cached[0] == 0 < cached[1] and len(cached) == 3
        assert tokens_of(outputs) == tokens_of(ask(llm, PROMPTS[2], max_tokens=3))


class TestCallers:
    def test_prompts_in_every_form(self, llm):
        encoded = llm.get_tokenizer().encode(PROMPTS[0])
        expected = tokens_of(ask(llm, [PROMPTS[0]]))
        for prompt in (PROMPTS[0], encoded, [encoded], [{"prompt": PROMPTS[0]}], {"prompt_token_ids": encoded}):
            assert tokens_of(ask(llm, prompt)) == expected
        assert ask(llm, []) == []

    def test_the_callers_lists_and_params_stay_his(self, llm):
        prompt, params = [5, 6, 7], BeamSearchParams(2, 10**6)
        short = LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=8)
        (output,) = short.beam_search([prompt], params, use_tqdm=False)
        output.sequences[0].tokens.append(1)
        assert prompt == [5, 6, 7] and params == BeamSearchParams(2, 10**6)

    @pytest.mark.parametrize(
        "prompt, kwargs, sentence",
        [
            ("a", {"beam_width": 648}, "beam_width must be at most half of the vocabulary of 1294 tokens, got 648"),
            ("", {}, "prompt must have at least one token"),
            ([5, 10**6], {}, "prompt has the token id 1000000"),
            ([5] * 64, {}, "prompt has 64 tokens, and max_model_len is 64"),
            ([5] * 30, {"max_tokens": 20}, "may grow to 50 tokens, 13 blocks, and the cache has 12"),
            ("a", {"beam_width": 11}, "a beam_width of 11 needs 22 log probabilities .* max_logprobs is 20: lower"),
            (b"bytes", {}, "prompt must be a list of token ids"),
        ],
    )
    def test_a_bad_prompt_is_one_sentence_and_computes_nothing(self, prompt, kwargs, sentence):
        small = LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=64, num_blocks=12, block_size=4)
        with pytest.raises(ValueError, match=sentence) as caught:
            ask(small, ["Once upon a time", prompt], **kwargs)
        assert "\n" not in str(caught.value) and not small.engine.steps and nothing_left(small)

    def test_params_that_were_changed_are_checked_again(self, llm):
        params = BeamSearchParams(2, 3)
        params.beam_width = 0
        with pytest.raises(ValueError, match="beam_width must be at least 1, got 0"):
            llm.beam_search("a", params)

    def test_other_params_are_refused(self, llm):
        with pytest.raises(ValueError, match="params must be BeamSearchParams, got SamplingParams"):
            llm.beam_search("a", SamplingParams())

    def test_other_threads_get_their_answers_meanwhile(self, llm):
        greedy = SamplingParams(temperature=0.0, max_tokens=30)
        expected = tokens_of(ask(llm, PROMPTS)), [o.outputs[0].text for o in llm.generate(PROMPTS, greedy, False)]
        found = []

        def search():
            found.append(tokens_of(ask(llm, PROMPTS)) == expected[0])

        def generate():
            found.append([o.outputs[0].text for o in llm.generate(PROMPTS, greedy, False)] == expected[1])

        threads = [threading.Thread(target=each) for each in (search, generate, search, generate)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 4 and nothing_left(llm)


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
    def test_an_error_in_a_step_leaves_no_request_behind(self, llm, monkeypatch, error):
        run, calls = llm.engine.runner.run, []

        def failing(scheduler_output):
            calls.append(1)
            if len(calls) == 5:
                raise error
            return run(scheduler_output)

        expected = tokens_of(ask(llm, PROMPTS))
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "run", failing)
            with pytest.raises(type(error)):
                ask(llm, PROMPTS)
        assert nothing_left(llm) and tokens_of(ask(llm, PROMPTS)) == expected

    def test_an_interrupt_between_two_steps_leaves_no_request_behind(self, llm):
        class Interrupted(BeamSearch):
            def step(self, logprobs):
                super().step(logprobs)
                if len(self.beams[0].tokens) == len(self.prompt_token_ids) + 3:
                    raise KeyboardInterrupt

        llm.beam_search_cls = Interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                ask(llm, PROMPTS)
        finally:
            del llm.beam_search_cls
        assert nothing_left(llm)

    def test_a_row_that_fails_ends_its_own_search_alone(self, llm, monkeypatch):
        run, bad = llm.engine.runner.run, llm.get_tokenizer().encode(PROMPTS[0])
        expected = tokens_of(ask(llm, PROMPTS))

        def failing(scheduler_output):
            output = run(scheduler_output)
            for i, (seq, _) in enumerate(scheduler_output.sampled):
                if seq.get_token_ids()[: len(bad)] == bad and seq.get_len() == len(bad) + 3:
                    output.errors[i] = "no number"
            return output

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "run", failing)
            outputs = ask(llm, PROMPTS)
        assert tokens_of(outputs)[1:] == expected[1:] and nothing_left(llm)
        sequences = outputs[0].sequences
        assert [(s.finish_reason, s.stop_reason) for s in sequences] == [("abort", "no number")] * 4
        assert {len(s.tokens) for s in sequences} == {len(bad) + 3} and all(s.text for s in sequences)


def test_a_progress_bar_counts_prompts(llm, capfd):
    llm.beam_search(PROMPTS[:2], BeamSearchParams(2, 2))
    assert "2/2" in capfd.readouterr().err
    llm.beam_search(PROMPTS[:2], BeamSearchParams(2, 2), use_tqdm=False)
    assert capfd.readouterr().err == ""
