"""What one request asks for. Chapter 2 is about this module and `folovllm.sample.sampler`, which does what it says.

The fields are those of vLLM (``vllm/sampling_params.py``), those it has dropped since included; the chapter says
which. Every field is checked when the object is made, so a request that is accepted can be sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from folovllm.validation import check_bool, check_int, check_number, check_str, check_token_ids, require

MAX_LOGIT_BIAS = 100.0
"""Largest bias in either direction; e**100 is certainty."""


class SamplingType(IntEnum):
    """How a row of logits becomes a token: the likeliest, or one drawn at random."""

    GREEDY = 0
    RANDOM = 1


@dataclass(repr=False)
class SamplingParams:
    """How the tokens of one request are to be chosen, when they end, and what is reported about them."""

    n: int = 1
    """Answers to give back."""
    best_of: int | None = None
    """Answers to generate, of which the ``n`` likeliest are given back; None becomes ``n``."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token the output already has; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time the output has it; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Scales down (above 1) the logits of tokens that prompt or output have; in (0, 2]. Keskar et al. 2019."""
    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter, 0 greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities reach this sum; in (0, 1]. Holtzman et al. 2019."""
    top_k: int = -1
    """Keep the ``top_k`` likeliest tokens; -1 keeps all. Fan et al. 2018."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; in [0, 1]. Nguyen et al. 2024."""
    seed: int | None = None
    """Seed of the request's own random numbers; None (and -1): not repeatable by itself."""
    use_beam_search: bool = False
    """Not supported; see the error's sentence for what to use."""
    length_penalty: float = 1.0
    """Kept for beam search."""
    early_stopping: bool = False
    """Kept for beam search."""
    stop: str | list[str] | None = None
    """Texts that end the output; a str becomes a list of one, None an empty list."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the output; None becomes an empty list."""
    include_stop_str_in_output: bool = False
    """Whether the output keeps the stop text that ended it."""
    ignore_eos: bool = False
    """Whether to go on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens to generate for one answer; None: up to ``max_model_len``."""
    min_tokens: int = 0
    """Tokens to generate before anything may end the output."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report log probabilities for, beside the chosen one; None: none at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; in [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """The only tokens that may be chosen."""
    bad_words: list[str] | None = None
    """Words that must not appear in the output."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    spaces_between_special_tokens: bool = True
    """Whether special tokens are set apart by spaces in the text."""

    def __post_init__(self) -> None:
        self._check_beam_search()
        self._check_counts()
        self._check_probabilities()
        self._check_stops()
        self._check_token_choices()

    def _check_beam_search(self) -> None:
        if check_bool("use_beam_search", self.use_beam_search):
            raise NotImplementedError(
                "Beam search is not supported, got use_beam_search=True; "
                "use best_of with temperature > 0 to generate several answers and keep the likeliest"
            )
        self.length_penalty = check_number("length_penalty", self.length_penalty)
        check_bool("early_stopping", self.early_stopping)

    def _check_counts(self) -> None:
        self.n = check_int("n", self.n)
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        self.best_of = self.n if self.best_of is None else check_int("best_of", self.best_of)
        require(self.best_of >= self.n, f"best_of ({self.best_of}) must be >= n ({self.n})")
        if self.max_tokens is not None:
            self.max_tokens = check_int("max_tokens", self.max_tokens)
            require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        self.min_tokens = check_int("min_tokens", self.min_tokens)
        require(self.min_tokens >= 0, f"min_tokens must not be negative, got {self.min_tokens}")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens})",
        )
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                setattr(self, name, check_int(name, count))
                require(count >= 0, f"{name} must not be negative, got {count}")
        if self.seed is not None:
            self.seed = check_int("seed", self.seed)
            self.seed = None if self.seed == -1 else self.seed  # vLLM's other way to say "no seed"
            require(self.seed is None or self.seed >= 0, f"seed must be None, -1 or 0 and more, got {self.seed}")

    def _check_probabilities(self) -> None:
        self.temperature = check_number("temperature", self.temperature)
        require(self.temperature >= 0, f"temperature must be non-negative, got {self.temperature}")
        self.top_p = check_number("top_p", self.top_p)
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        self.top_k = check_int("top_k", self.top_k)
        require(self.top_k == -1 or self.top_k >= 1, f"top_k must be -1 (disabled) or >= 1, got {self.top_k}")
        self.min_p = check_number("min_p", self.min_p)
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = check_number(name, getattr(self, name))
            require(-2 <= penalty <= 2, f"{name} must be in [-2, 2], got {penalty}")
            setattr(self, name, penalty)
        self.repetition_penalty = check_number("repetition_penalty", self.repetition_penalty)
        require(
            0 < self.repetition_penalty <= 2, f"repetition_penalty must be in (0, 2], got {self.repetition_penalty}"
        )

    def _check_stops(self) -> None:
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop = _check_texts("stop", stop)
        stop_token_ids = [] if self.stop_token_ids is None else self.stop_token_ids
        self.stop_token_ids = check_token_ids("stop_token_ids", stop_token_ids)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            check_bool(name, getattr(self, name))

    def _check_token_choices(self) -> None:
        if self.logit_bias is not None:
            require(
                isinstance(self.logit_bias, dict),
                f"logit_bias must be a dict of token id to bias, got {self.logit_bias!r}",
            )
            token_ids = check_token_ids("logit_bias", list(self.logit_bias))
            biases = [check_number(f"logit_bias[{i}]", bias) for i, bias in zip(token_ids, self.logit_bias.values())]
            self.logit_bias = dict(zip(token_ids, biases))
            for token_id, bias in self.logit_bias.items():
                require(abs(bias) <= MAX_LOGIT_BIAS, f"logit_bias[{token_id}] must be in [-100, 100], got {bias}")
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check_token_ids("allowed_token_ids", self.allowed_token_ids)
            require(
                len(self.allowed_token_ids) > 0, "allowed_token_ids must name at least one token or be None, got []"
            )
        if self.bad_words is not None:
            self.bad_words = _check_texts("bad_words", self.bad_words)

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY at temperature 0, else RANDOM."""
        return SamplingType.GREEDY if self.temperature == 0 else SamplingType.RANDOM

    def __repr__(self) -> str:
        return (
            f"SamplingParams(n={self.n}, temperature={self.temperature}, top_p={self.top_p}, "
            f"top_k={self.top_k}, max_tokens={self.max_tokens})"
        )


def _check_texts(name: str, value: Any) -> list[str]:
    """A list of non-empty strings as a list of its own."""
    require(isinstance(value, (list, tuple)), f"{name} must be a list of strings, got {value!r}")
    return [check_str(f"{name}[{i}]", text) for i, text in enumerate(value)]
