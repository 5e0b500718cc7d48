"""The main interface: texts in, texts out. Chapter 8 shows it.

As in vLLM (``vllm/entrypoints/llm.py``, 0.33.0).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from tqdm.auto import tqdm

from folovllm.chat import Message, apply_chat_template, split_conversations
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.beam_search import BeamSearch, make_output, run_searches, start_search
from folovllm.engine.input_processor import Prompt
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.output_processor import OutputSink
from folovllm.outputs import BeamSearchOutput, RequestOutput
from folovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams, copy_params
from folovllm.utils import generate_request_id
from folovllm.validation import check_list, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_engine_config(model: str, **kwargs: Any) -> EngineConfig:
    """An `EngineConfig` from the fields of its three parts, by name, and ``speculative_config``.

    Raises:
        ValueError: if no part has such a field; the sentence names the nearest one.
    """
    parts = {kind: {f.name for f in fields(kind)} for kind in (ModelConfig, CacheConfig, SchedulerConfig)}
    known = sorted(set().union(*parts.values(), {"speculative_config"}) - {"model"})
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "device"], n=1, cutoff=0)[0]
            raise ValueError(f"LLM has no argument {name!r}; the nearest is {near!r}")
    made = {kind: {name: value for name, value in kwargs.items() if name in names} for kind, names in parts.items()}
    made[SchedulerConfig].pop("max_model_len", None)  # the model's; EngineConfig passes it on
    return EngineConfig(
        ModelConfig(model, **made[ModelConfig]),
        CacheConfig(**made[CacheConfig]),
        SchedulerConfig(**made[SchedulerConfig]),
        kwargs.get("speculative_config"),
    )


class LLM:
    """A model that answers. Any number of threads may ask it. A subclass may set ``beam_search_cls``.

    Args:
        model: name or path of a checkpoint.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.
        kwargs: any field of `ModelConfig`, `CacheConfig` and `SchedulerConfig`, and ``speculative_config``, a
            `SpeculativeConfig` or a dict of its fields.
    """

    beam_search_cls: type[BeamSearch] = BeamSearch
    """Which texts of a beam search go on."""

    def __init__(self, model: str, *, device: str | None = None, **kwargs: Any) -> None:
        self.engine = LLMEngine(make_engine_config(model, **kwargs), device)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | SequenceOf[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, all at once.

        Args:
            prompts: one, or a list of them.
            sampling_params: one for all, or one for each; None takes the checkpoint's own generation config.
            use_tqdm: whether to show a progress bar with tokens per second.
            priority: one for all, or one for each; lower is served first, with ``policy="priority"``.

        Returns:
            one `RequestOutput` for each prompt, in the order asked.

        Raises:
            ValueError: if the numbers of prompts and params differ, or a prompt cannot be served; then none is
                answered.
        """
        prompts = _as_list(prompts)
        all_params = _one_each("sampling_params", sampling_params, SamplingParams, len(prompts))
        priorities = _one_each("priority", 0 if priority is None else priority, int, len(prompts))
        with self._open_sink() as sink:
            request_ids = [
                self._add(sink, prompt, params, RequestOutputKind.FINAL_ONLY, each)
                for prompt, params, each in zip(prompts, all_params, priorities)
            ]
            finished = self._run(sink, len(request_ids), use_tqdm)
        return [finished[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several: `generate` on what the checkpoint's chat template makes of them.

        Args:
            messages: ``{"role": "user", "content": "…"}`` and so on, or a list of such conversations.
            sampling_params: as for `generate`.
            use_tqdm: as for `generate`.
            template: keywords of `folovllm.chat.apply_chat_template`: ``tools``, ``chat_template_kwargs``, ….

        Raises:
            ValueError: if a message or the template is malformed, and for what `generate` refuses.
        """
        texts = [self.apply_chat_template(conversation, **template) for conversation in split_conversations(messages)]
        prompts = [{"prompt": text, "add_special_tokens": False} for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(
        self, prompts: Prompt | SequenceOf[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """Looks for the likeliest texts that begin with each prompt, for all prompts at once.

        Each step is a request of one token per text that goes on. With ``enable_prefix_caching=True`` the texts share
        the blocks of their common beginning; without it each step computes all of every text.

        Args:
            prompts: one, or a list of them, as for `generate`.
            params: the same for all.
            use_tqdm: whether to show a progress bar.

        Returns:
            for each prompt, in the order asked, ``beam_width`` texts, the best first; after an error fewer perhaps, and
            the unfinished ones have "abort" as their ``finish_reason`` and the error as their ``stop_reason``.

        Raises:
            ValueError: if a prompt or the params cannot be served; nothing has been computed then.
        """
        searches = [start_search(self.engine, each, params, self.beam_search_cls) for each in _as_list(prompts)]
        progress = tqdm(total=len(searches), unit="prompt", disable=not use_tqdm, dynamic_ncols=True)
        with self._open_sink() as sink, progress:
            for _ in run_searches(self.engine, sink, searches):
                progress.update()
        return [make_output(self.engine, search) for search in searches]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[str, None, str | None]:
        """Answers one prompt, and yields the text as it comes, in complete characters.

        When the caller stops reading, this request ends, and no other. What the generator returns, which ``yield from``
        gives, is the ``finish_reason``.

        Raises:
            ValueError: if the prompt cannot be served, or what is asked for is more than one answer, or no text.
            RuntimeError: while it is read, if the request is ended by an error; the sentence names it.
        """
        params = copy_params(sampling_params, self.engine.default_params)
        params.check()
        require(
            params.n == params.best_of == 1,
            f"a stream is one answer, got n={params.n} and best_of={params.best_of}; use generate",
        )
        require(params.detokenize, "a stream is text, got detokenize=False; use generate")
        sink = OutputSink()
        self._add(sink, prompt, params, RequestOutputKind.DELTA)
        return self._pieces(sink)

    def apply_chat_template(self, messages: SequenceOf[Message], **template: Any) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        It contains the beginning-of-text token, if the model has one: for an answer use `chat`, which adds no second.
        """
        return apply_chat_template(self.engine.tokenizer, messages, **template)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of the params that a request without any gets: the checkpoint's recommendation."""
        return self.engine.default_params.clone()

    def reset_prefix_cache(self) -> bool:
        """Empties the prefix cache, if no block is in use; returns whether it did."""
        return self.engine.reset_prefix_cache()

    def _add(
        self,
        sink: OutputSink,
        prompt: Prompt,
        params: SamplingParams | None,
        kind: RequestOutputKind,
        priority: int = 0,
    ) -> str:
        """Adds a request whose outputs, of this kind, go to ``sink``; returns its id."""
        params = copy_params(params, self.engine.default_params)
        params.output_kind = kind
        request_id = generate_request_id()
        self.engine.add_request(request_id, prompt, params, priority=priority, sink=sink)
        return request_id

    @contextlib.contextmanager
    def _open_sink(self) -> Iterator[OutputSink]:
        """A sink whose requests end when the ``with`` block does, whatever the reason."""
        sink = OutputSink()
        try:
            yield sink
        finally:
            self.engine.close(sink)

    def _pieces(self, sink: OutputSink) -> Generator[str, None, str | None]:
        """The text of a sink's one request, as it comes; returns why it ended."""
        answer = None
        try:
            while sink.unfinished or sink:
                for output in self.engine.wait(sink):
                    answer = output.outputs[0]
                    if answer.text:
                        yield answer.text
                    if answer.finish_reason == "abort":
                        why = answer.stop_reason or "it was aborted, without a reason"
                        raise RuntimeError(f"the request was ended before its answer was complete: {why}")
            return None if answer is None else answer.finish_reason
        finally:
            self.engine.close(sink)

    def _run(self, sink: OutputSink, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Steps until the requests of a sink are finished."""
        finished: dict[str, RequestOutput] = {}
        tokens_in = tokens_out = 0
        with tqdm(total=num_requests, unit="request", disable=not use_tqdm, dynamic_ncols=True) as progress:
            while len(finished) < num_requests:
                for output in self.engine.wait(sink):
                    finished[output.request_id] = output
                    tokens_in += len(output.prompt_token_ids)
                    tokens_out += sum(len(answer.token_ids) for answer in output.outputs)
                    seconds = max(progress.format_dict["elapsed"], 1e-9)
                    progress.set_postfix_str(
                        f"in {tokens_in / seconds:,.0f}, out {tokens_out / seconds:,.0f} tokens/s", refresh=False
                    )
                    progress.update()
        return finished


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """One prompt or many as a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return [cast(Prompt, prompts)]
    many = check_list("prompts", prompts, "texts, token ids or dicts")
    if many and all(isinstance(each, Integral) and not isinstance(each, bool) for each in many):
        return [many]
    return many


def _one_each(name: str, values: Any, kind: type, count: int) -> list[Any]:
    """One value for all prompts, or None, or one for each, as a list of ``count``."""
    is_number = getattr(values, "ndim", None) == 0  # of NumPy's or torch's
    if values is None or is_number or isinstance(values, (kind, str, bytes, Mapping)):
        return [values] * count
    values = check_list(name, values, f"{kind.__name__}, or one for all, or None")
    require(len(values) == count, f"{name} must be one, or one for each of {count} prompts, got {len(values)}")
    return values
