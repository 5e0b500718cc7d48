"""The front door: texts in, texts out. Chapter 6 is about this module.

As in vLLM (``vllm/entrypoints/llm.py``, 0.33.0).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from typing import Any, cast

from tqdm import tqdm

from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.llm_engine import LLMEngine
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams
from folovllm.utils import generate_request_id, set_random_seed
from folovllm.validation import require

Prompt = str | SequenceOf[int] | dict[str, Any]
"""A text, token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""


def make_engine_config(model: str, **kwargs: Any) -> EngineConfig:
    """An `EngineConfig` from the fields of its three parts, by name.

    Raises:
        ValueError: if no part has such a field; the sentence names the nearest one.
    """
    parts = {kind: {f.name for f in fields(kind)} for kind in (ModelConfig, CacheConfig, SchedulerConfig)}
    known = sorted(set().union(*parts.values()) - {"model"})
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"LLM has no argument {name!r}; the nearest is {near!r}")
    made = {kind: {name: value for name, value in kwargs.items() if name in names} for kind, names in parts.items()}
    made[SchedulerConfig].pop("max_model_len", None)  # the model's, which EngineConfig hands on
    return EngineConfig(
        ModelConfig(model, **made[ModelConfig]),
        CacheConfig(**made[CacheConfig]),
        SchedulerConfig(**made[SchedulerConfig]),
    )


class LLM:
    """A model that answers.

    Args:
        model: name or path of a checkpoint.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.
        kwargs: any field of `ModelConfig`, `CacheConfig` and `SchedulerConfig`.
    """

    def __init__(self, model: str, *, device: str | None = None, **kwargs: Any) -> None:
        config = make_engine_config(model, **kwargs)
        set_random_seed(config.model_config.seed)
        self.engine = LLMEngine(config, device)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, all at once.

        Args:
            prompts: one, or a list of them.
            sampling_params: one for all, or one for each; None takes the checkpoint's own generation config.
            use_tqdm: whether to show requests done and tokens per second.

        Returns:
            one `RequestOutput` for each prompt, in the order asked.

        Raises:
            ValueError: if the numbers of prompts and params differ, or a prompt cannot be served. Nothing has been
                computed then.
        """
        prompts = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)  # type: ignore[list-item]
        require(
            len(sampling_params) == len(prompts),
            f"sampling_params must be one, or one for each of {len(prompts)} prompts, got {len(sampling_params)}",
        )
        request_ids: list[str] = []
        try:
            for prompt, params in zip(prompts, sampling_params):
                request_id = generate_request_id()
                self.engine.add_request(request_id, _text_or_token_ids(prompt), params, final_only=True)
                request_ids.append(request_id)
            finished = self._run(request_ids, use_tqdm)
        except BaseException:
            for request_id in request_ids:
                self.engine.abort_request(request_id)
            self.engine.take_late_outputs()
            raise
        return [finished[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or several: `generate` on what the checkpoint's chat template makes of them.

        A message is ``{"role": "user", "content": "…"}``.
        """
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        return self.generate([self.apply_chat_template(c) for c in conversations], sampling_params, use_tqdm)  # type: ignore[arg-type]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Answers one prompt, and yields the text as it comes, in complete characters."""
        request_id = generate_request_id()
        self.engine.add_request(request_id, _text_or_token_ids(prompt), sampling_params)
        shown = 0
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.request_id == request_id:
                        text = output.outputs[0].text
                        if len(text) > shown:
                            yield text[shown:]
                        shown = len(text)
        finally:
            self.engine.abort_request(request_id)
            self.engine.take_late_outputs()

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where the assistant's answer begins."""
        return str(self.engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _run(self, request_ids: list[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        """Steps until the requests are finished."""
        finished: dict[str, RequestOutput] = {}
        tokens_in = tokens_out = 0
        with tqdm(total=len(request_ids), unit="request", disable=not use_tqdm, dynamic_ncols=True) as progress:
            while len(finished) < len(request_ids):
                for output in self.engine.step():
                    if output.finished:
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
    if isinstance(prompts, (str, dict)) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast("SequenceOf[Prompt]", prompts))


def _text_or_token_ids(prompt: Prompt) -> str | SequenceOf[int]:
    if not isinstance(prompt, dict):
        return prompt
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key]
    raise ValueError(f"a prompt given as a dict needs 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
