"""What comes back to whoever asked."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass

import pytest

from folovllm import CompletionOutput, Request, RequestOutput, SamplingParams, SequenceStatus
from folovllm.logprobs import Logprob
from folovllm.outputs import RequestMetrics, SpecDecodingStats

EOS, STOP = 0, 50


class LetterTokenizer:
    """Token 1 is "a", 2 is "b", …; token 0 is the special token that ends a text."""

    eos_token_id = EOS
    all_special_ids = (EOS,)

    def decode(self, token_ids, skip_special_tokens=False, **kwargs):
        texts = ("<eos>" if token_id == EOS else chr(ord("a") + token_id - 1) for token_id in token_ids)
        return "".join(text for text in texts if not (skip_special_tokens and text == "<eos>"))


def make_request(outputs=((1, 2),), statuses=None, likelihoods=None, **params) -> Request:
    """A request whose sequences have generated ``outputs``."""
    request = Request("r", "some text", [7, 8], SamplingParams(best_of=len(outputs), **params))
    for i, (seq, output) in enumerate(zip(request.get_seqs(), outputs)):
        seq.data.output_token_ids = list(output)
        seq.data.cumulative_logprob = likelihoods[i] if likelihoods else None
        seq.status = statuses[i] if statuses else SequenceStatus.RUNNING
    return request


def output_of(request: Request) -> RequestOutput:
    return RequestOutput.from_request(request, LetterTokenizer())


class TestLogprob:
    def test_defaults(self):
        logprob = Logprob(-1.5)
        assert (logprob.logprob, logprob.rank, logprob.decoded_token) == (-1.5, None, None)


def test_of_the_likeliest_a_whole_answer_comes_before_one_that_was_aborted():
    ended, aborted = SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.FINISHED_ABORTED
    request = make_request([[1], [1, 2], [1, 2]], [aborted, ended, ended], [-0.1, -3.0, -2.0], n=2)
    assert [answer.index for answer in output_of(request).outputs] == [2, 1]


class TestMetrics:
    def test_a_snapshot_does_not_move(self):
        metrics = RequestMetrics(0.0, spec_decoding=SpecDecodingStats())
        kept = metrics.snapshot()
        metrics.spec_decoding.observe(3, 1)
        assert kept.spec_decoding == SpecDecodingStats()

    def test_accepted_guesses_are_counted_by_their_places(self):
        stats = SpecDecodingStats()
        stats.observe(2, 1)
        stats.observe(3, 3)
        assert stats.num_accepted_tokens_per_pos == [2, 1, 1]


class TestCompletionOutput:
    def test_fields_and_defaults(self):
        assert is_dataclass(CompletionOutput)
        assert {f.name: f.default for f in fields(CompletionOutput)} == {
            "index": MISSING,
            "text": MISSING,
            "token_ids": MISSING,
            "cumulative_logprob": None,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    @pytest.mark.parametrize("reason, finished", [(None, False), ("stop", True), ("length", True), ("abort", True)])
    def test_finished_when_there_is_a_reason(self, reason, finished):
        assert CompletionOutput(0, "", [], finish_reason=reason).finished() is finished

    @pytest.mark.parametrize(
        "status, reason",
        [
            (SequenceStatus.WAITING, None),
            (SequenceStatus.RUNNING, None),
            (SequenceStatus.SWAPPED, None),
            (SequenceStatus.FINISHED_STOPPED, "stop"),
            (SequenceStatus.FINISHED_LENGTH_CAPPED, "length"),
            (SequenceStatus.FINISHED_ABORTED, "abort"),
        ],
    )
    def test_the_reason_is_that_of_its_sequence(self, status, reason):
        (answer,) = output_of(make_request(statuses=[status])).outputs
        assert answer.finish_reason == reason
        assert answer.finished() is status.is_finished()

    @pytest.mark.parametrize("stop_reason", [None, STOP, "the end"])
    def test_the_stop_reason_is_that_of_its_sequence(self, stop_reason):
        request = make_request(statuses=[SequenceStatus.FINISHED_STOPPED])
        request.get_seqs()[0].stop_reason = stop_reason
        assert output_of(request).outputs[0].stop_reason == stop_reason

    def test_text_tokens_and_log_probability(self):
        (answer,) = output_of(make_request([[3, 1, 2]], likelihoods=[-4.5])).outputs
        assert (answer.index, answer.text, answer.token_ids) == (0, "cab", [3, 1, 2])
        assert answer.cumulative_logprob == -4.5

    def test_before_the_first_token(self):
        (answer,) = output_of(make_request([[]])).outputs
        assert (answer.text, answer.token_ids, answer.cumulative_logprob) == ("", [], None)

    def test_it_is_a_picture_that_does_not_move(self):
        request = make_request([[1]], likelihoods=[-1.0])
        (answer,) = output_of(request).outputs
        request.get_seqs()[0].add_token_id(2, -1.0)
        assert answer.token_ids == [1] and answer.cumulative_logprob == -1.0

    @pytest.mark.parametrize("asked, shown", [(None, None), (0, [{1: Logprob(-1.0, 1)}])])
    def test_log_probabilities_only_for_those_who_asked(self, asked, shown):
        request = make_request([[1]], likelihoods=[-1.0], **({} if asked is None else {"logprobs": asked}))
        request.get_seqs()[0].logprobs.append({1: Logprob(-1.0, 1)})
        assert output_of(request).outputs[0].logprobs == shown

    @pytest.mark.parametrize("skip", [True, False])
    def test_the_end_of_sequence_token_stays_in_token_ids_and_not_in_text(self, skip):
        request = make_request([[1, EOS]], statuses=[SequenceStatus.FINISHED_STOPPED], skip_special_tokens=skip)
        (answer,) = output_of(request).outputs
        assert answer.token_ids == [1, EOS]
        assert answer.text == "a"

    @pytest.mark.parametrize(
        "status, stop_reason, include, text",
        [
            (SequenceStatus.FINISHED_STOPPED, 2, False, "a"),  # as in vLLM, a stop token is no part of the text
            (SequenceStatus.FINISHED_STOPPED, 2, True, "ab"),
            (SequenceStatus.FINISHED_STOPPED, "b", True, "ab"),
            (SequenceStatus.FINISHED_LENGTH_CAPPED, None, False, "ab"),
            (SequenceStatus.FINISHED_ABORTED, None, False, "ab"),
            (SequenceStatus.RUNNING, None, False, "ab"),
        ],
    )
    def test_only_a_token_that_ended_the_answer_is_left_out_of_its_text(self, status, stop_reason, include, text):
        request = make_request([[1, 2]], statuses=[status], include_stop_str_in_output=include)
        request.get_seqs()[0].stop_reason = stop_reason
        (answer,) = output_of(request).outputs
        assert (answer.text, answer.token_ids) == (text, [1, 2])

    def test_a_special_token_on_the_way_is_shown_when_asked_for(self):
        request = make_request([[1, EOS, 2]], ignore_eos=True, skip_special_tokens=False)
        assert output_of(request).outputs[0].text == "a<eos>b"


class TestRequestOutput:
    def test_fields_and_defaults(self):
        assert is_dataclass(RequestOutput)
        assert {f.name: f.default for f in fields(RequestOutput)} == {
            "request_id": MISSING,
            "prompt": MISSING,
            "prompt_token_ids": MISSING,
            "outputs": MISSING,
            "finished": MISSING,
            "metrics": None,
            "prompt_logprobs": None,
        }

    @pytest.mark.parametrize("length", [0, 1, 49, 50])
    def test_repr_shows_a_prompt_of_up_to_50_characters(self, length):
        prompt = ("0123456789" * 6)[:length]
        assert repr(prompt) in repr(RequestOutput("r", prompt, [1], [], False))

    @pytest.mark.parametrize("length", [51, 60, 10_000])
    def test_repr_cuts_a_longer_prompt_at_50_characters(self, length):
        prompt = "x" * 50 + "y" * (length - 50)
        text = repr(RequestOutput("r", prompt, [1], [], False))
        assert "x" * 50 in text and "y" not in text

    def test_repr_shows_the_rest(self):
        text = repr(RequestOutput("r-17", None, [1], [CompletionOutput(0, "hello", [1])], True))
        assert all(part in text for part in ("RequestOutput", "r-17", "None", "hello", "True"))

    def test_from_request_takes_over_the_request(self):
        output = output_of(make_request())
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "some text", [7, 8])
        assert output.metrics is None

    @pytest.mark.parametrize(
        "n, likelihoods, kept",
        [
            (1, [-3.0, -1.0, -2.0], ["b"]),
            (2, [-3.0, -1.0, -2.0], ["b", "c"]),
            (3, [-3.0, -1.0, -2.0], ["a", "b", "c"]),  # all of them: no choice, so no order
            (2, [None, -9.0, None], ["b", "a"]),  # one that is known comes before those that are not
            (2, [-1.0, -1.0, -1.0], ["a", "b"]),  # among equals the first
            (1, [-1.0, 0.0, -2.0], ["b"]),
        ],
    )
    def test_the_n_best_by_cumulative_log_probability(self, n, likelihoods, kept):
        output = output_of(make_request([[1], [2], [3]], likelihoods=likelihoods, n=n))
        assert [answer.text for answer in output.outputs] == kept
        assert [answer.index for answer in output.outputs] == ["abc".index(answer.text) for answer in output.outputs]

    def test_an_ignored_sequence_is_never_among_the_answers(self):
        done, ignored = SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.FINISHED_IGNORED
        request = make_request([[1], [2]], statuses=[ignored, done], likelihoods=[-1.0, -1.0], n=1)
        output = output_of(request)
        assert output.finished
        assert [answer.text for answer in output.outputs] == ["b"]

    def test_finished_when_all_sequences_are(self):
        done, running = SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.RUNNING
        assert not output_of(make_request([[1], [2]], statuses=[done, running])).finished
        assert output_of(make_request([[1], [2]], statuses=[done, done])).finished

    def test_deltas_are_joined(self):
        first = RequestOutput("r", "p", [1], [CompletionOutput(0, "a", [1], -1.0, [{1: Logprob(-1.0, 1)}])], False)
        newer = [
            CompletionOutput(1, "x", [5], -0.5, [{5: Logprob(-0.5, 1)}], "length"),
            CompletionOutput(0, "b", [2], -3.0, [{2: Logprob(-2.0, 1)}], "stop", "b"),
        ]
        metrics = RequestMetrics(1.0, num_cached_tokens=4)
        first.add(RequestOutput("r", "p", [1], newer, True, metrics))
        joined, added = first.outputs
        assert (joined.text, joined.token_ids, joined.cumulative_logprob) == ("ab", [1, 2], -3.0)
        assert (joined.finish_reason, joined.stop_reason) == ("stop", "b") and len(joined.logprobs) == 2
        assert added is newer[0] and first.finished and first.num_cached_tokens == 4

    def test_joining_changes_no_list_of_whoever_made_the_first_delta(self):
        token_ids = [1]
        first = RequestOutput("r", "p", [1], [CompletionOutput(0, "a", token_ids)], False)
        first.add(RequestOutput("r", "p", [1], [CompletionOutput(0, "b", [2])], True))
        assert first.outputs[0].token_ids == [1, 2] and token_ids == [1]

    def test_without_an_engine_nobody_counts_cached_tokens(self):
        assert RequestOutput("r", "p", [1], [], True).num_cached_tokens is None
