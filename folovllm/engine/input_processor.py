"""From a prompt and params to a request, or an error of one sentence. Chapter 8.

All that can be checked before a step is checked here, so that one caller's mistake never reaches a shared batch.
As in vLLM (``v1/engine/input_processor.py``, 0.33.0).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from folovllm.config import EngineConfig
from folovllm.engine.encode import encode_text
from folovllm.engine.served_model import ServedModel
from folovllm.request import Request, StructuredOutputGrammar
from folovllm.sampling_params import SamplingParams, check_params, copy_params
from folovllm.utils import cdiv
from folovllm.validation import (
    check_bool,
    check_int,
    check_number,
    check_str,
    check_token_ids,
    check_unicode,
    require,
    show,
)

if TYPE_CHECKING:
    from folovllm.sample.structured_output import GuidanceBackend

Prompt = str | SequenceOf[int] | Mapping[str, Any]
"""A text, token ids, or a dict with ``"prompt"`` (the text) or ``"prompt_token_ids"`` or both, and, if wanted,
``"cache_salt"`` and ``"add_special_tokens"`` (whether the tokenizer may add its own to the text; by default it may)."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt", "add_special_tokens")
"""What a prompt that is a dict may hold."""


class InputProcessor:
    """Makes requests for one model.

    Args:
        config: with ``max_model_len`` and ``num_blocks`` filled in; its seed seeds the generator that gives requests
            without a seed one of their own.
        model: its tokenizer's end-of-sequence token leaves ``stop_reason`` at None.
    """

    def __init__(self, config: EngineConfig, model: ServedModel) -> None:
        self.config, self.tokenizer, self.vocab_size = config, model.tokenizer, model.vocab_size
        self.eos_token_ids, self.default_params = list(model.eos_token_ids), model.default_params
        self.eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
        self.max_model_len = cast(int, config.model_config.max_model_len)
        self._random = random.Random(config.model_config.seed)

    def process(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None, arrival_time: float, priority: int = 0
    ) -> Request:
        """A new request that can be served; none of its answers has been started.

        Raises:
            ValueError: if it could never be served.
        """
        check_unicode("request_id", check_str("request_id", request_id))
        text, token_ids, cache_salt = self._read_prompt(prompt)
        params = self._own_params(params)
        self._check_logprobs(params)
        self._check_room(request_id, len(token_ids), params)
        largest = max(token_ids)
        require(
            largest < self.vocab_size,
            f"prompt has the token id {largest}, but the vocabulary has {self.vocab_size} tokens",
        )
        request = Request(
            request_id,
            text,
            token_ids,
            params,
            check_number("arrival_time", arrival_time),
            priority=check_int("priority", priority),
            cache_salt=cache_salt,
            eos_token_id=self.eos_token_id,
            num_pending=cast(int, params.best_of),
            grammar=self._compile_grammar(params),
        )
        if params.seed is None:  # last, so that the seeds of others do not depend on what was refused
            params.seed = self._random.getrandbits(64)
        return request

    @cached_property
    def structured_output_backend(self) -> GuidanceBackend:
        """What compiles grammars; made when the first request asks for one.

        Raises:
            ValueError: if the tokens cannot be masked, for want of a tokenizer or of an end-of-sequence token.
        """
        # Here, since few requests need it, and it takes a tenth of a second to import.
        from folovllm.sample.structured_output import GuidanceBackend

        return GuidanceBackend(self.tokenizer, self.vocab_size, self.eos_token_ids)

    def _compile_grammar(self, params: SamplingParams) -> StructuredOutputGrammar | None:
        """What the answers must be, at its beginning; None if they may be anything."""
        if params.structured_outputs is None:
            return None
        return self.structured_output_backend.compile_grammar(params.structured_outputs)

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """The text (None for token ids alone), the token ids, and the cache salt."""
        given = self._check_keys(prompt) if isinstance(prompt, Mapping) else {}
        salt = given.get("cache_salt")
        salt = None if salt is None else check_unicode("cache_salt", check_str("cache_salt", salt))
        text = given.get("prompt") if given else prompt if isinstance(prompt, str) else None
        require(text is None or isinstance(text, str), f"a prompt's 'prompt' must be a text, got {show(text)}")
        if given.get("prompt_token_ids") is not None:  # a text beside them is taken as what they were made from
            check_unicode("prompt", text or "")
            token_ids = check_token_ids("prompt_token_ids", given["prompt_token_ids"])
        elif text is not None:
            add_special_tokens = check_bool("add_special_tokens", given.get("add_special_tokens", True))
            token_ids = self._encode(text, add_special_tokens)
        else:
            token_ids = check_token_ids("prompt", prompt)
        shown = token_ids if text is None else text
        require(len(token_ids) > 0, f"prompt must have at least one token, got {show(shown)}")
        return text, token_ids, salt

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(f"prompt must be token ids where there is no tokenizer, got {show(text)}")
        return encode_text(self.tokenizer, text, self.max_model_len, add_special_tokens)

    def _check_keys(self, prompt: Mapping[str, Any]) -> Mapping[str, Any]:
        """A prompt that is a dict, if it has a text or token ids, and nothing unknown."""
        unknown = [key for key in prompt if key not in PROMPT_KEYS]
        require(not unknown, f"a prompt that is a dict may have {', '.join(PROMPT_KEYS)}, got {show(unknown)}")
        require(
            prompt.get("prompt") is not None or prompt.get("prompt_token_ids") is not None,
            f"a prompt that is a dict needs 'prompt' or 'prompt_token_ids', got {show(prompt)}",
        )
        return prompt

    def _own_params(self, params: SamplingParams | None) -> SamplingParams:
        """A private copy, checked against the model, with the checkpoint's further end tokens as stop tokens."""
        params = copy_params(params, self.default_params)
        require(
            self.tokenizer is not None or not params.detokenize,
            "detokenize must be False where there is no tokenizer, got True",
        )
        check_params(params, self.vocab_size, self.tokenizer, self.eos_token_ids)
        if not params.ignore_eos:
            others = [i for i in self.eos_token_ids if i != self.eos_token_id]
            params.stop_token_ids = list(dict.fromkeys([*(params.stop_token_ids or []), *others]))
        return params

    def _check_logprobs(self, params: SamplingParams) -> None:
        """Refuses to keep more log probabilities than the engine's memory is meant for."""
        limit = self.config.model_config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            asked = self.vocab_size if count == -1 else count
            require(
                asked is None or limit == -1 or asked <= limit,
                f"{name} must be at most max_logprobs ({limit}), got {count}: raise max_logprobs (-1: no limit)",
            )

    def _check_room(self, request_id: str, num_prompt: int, params: SamplingParams) -> None:
        """Refuses what is too long for the model, or for the whole cache."""
        room = self.max_model_len - num_prompt
        require(
            room > 0,
            f"prompt has {num_prompt} tokens, and max_model_len is {self.max_model_len}: shorten it by at least "
            f"{1 - room}",
        )
        require(
            params.min_tokens <= room,
            f"min_tokens must fit behind the prompt, got {params.min_tokens} where {room} of max_model_len "
            f"({self.max_model_len}) are left",
        )
        longest = num_prompt + min(room, params.max_tokens or room)
        cache = self.config.cache_config
        # The last token is returned but never read by the model, so it needs no slot.
        num_blocks = cdiv(longest - 1, cache.block_size)
        require(
            num_blocks <= cast(int, cache.num_blocks),
            f"request {request_id!r} may grow to {longest} tokens, {num_blocks} blocks, and the cache has "
            f"{cache.num_blocks}: lower max_tokens or raise num_blocks",
        )
