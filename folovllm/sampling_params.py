"""What one request asks for. Chapter 2 is about this module and `folovllm.sample.sampler`, which does what it says.

The fields are those of vLLM (``vllm/sampling_params.py``), those it has dropped since included; the chapter says
which. Every field is checked when the object is made, and what depends on the vocabulary when a request is added
(`check_params`), so a request that is accepted can be sampled.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, cast

from folovllm.utils.encoding import encode_whole
from folovllm.validation import (
    check_bool,
    check_int,
    check_list,
    check_number,
    check_str,
    check_texts,
    check_token_ids,
    check_unicode,
    require,
    show,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGIT_BIAS = 100.0
"""Largest bias in either direction; e**100 is certainty."""

MAX_NUM_SEQUENCES = 16_384
"""Largest ``n`` and ``best_of`` (vLLM: ``VLLM_MAX_N_SEQUENCES``), so that one request cannot starve all others."""

MAX_STRUCTURE_CHARS = 2**20
"""Characters of a JSON schema, a regular expression, all choices together, or a grammar."""

MAX_LENGTH_PENALTY = 10.0
"""Largest exponent of a length in either direction, so that the power of any length is a finite number."""


class SamplingType(IntEnum):
    """How a row of logits becomes a token: the likeliest, or one drawn at random."""

    GREEDY = 0
    RANDOM = 1


class RequestOutputKind(Enum):
    """What each output of a request that is still running holds."""

    CUMULATIVE = 0
    """The whole answer so far."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """Nothing: the only output is the finished one."""


@dataclass(frozen=True, repr=False)
class StructuredOutputsParams:
    """What an answer must be, from its first character to its last; exactly one field is set.

    It cannot be changed once it is made, so requests may share it.

    Raises:
        ValueError: if no field is set or several are, or if the one that is cannot be what it should.
    """

    json: str | dict[str, Any] | type[Any] | None = None
    """JSON that fits this schema: a dict, its text, or a class with ``model_json_schema``, as pydantic's have.

    It becomes a text.
    """
    regex: str | None = None
    """A text that this regular expression matches as a whole; in Rust's syntax, which has no look-around."""
    choice: Sequence[str] | None = None
    """One of these texts. It becomes a tuple."""
    grammar: str | None = None
    """A text of this grammar, in llguidance's dialect of Lark, which begins at the rule ``start``."""
    json_object: bool | None = None
    """True: any JSON object."""

    def __post_init__(self) -> None:
        if self.json_object is not None and not check_bool("structured_outputs.json_object", self.json_object):
            object.__setattr__(self, "json_object", None)
        names = [name for name, value in vars(self).items() if value is not None]
        require(
            len(names) == 1,
            "structured_outputs must set exactly one of json, regex, choice, grammar and json_object, got "
            + (" and ".join(names) or "none"),
        )
        if self.json is not None:
            object.__setattr__(self, "json", _check_schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(_check_choices(self.choice)))
        for name in ("json", "regex", "grammar"):
            if (text := getattr(self, name)) is not None:
                _check_structure(name, text)

    def __repr__(self) -> str:
        (field,) = ((name, value) for name, value in vars(self).items() if value is not None)
        return f"StructuredOutputsParams({field[0]}={show(field[1])})"


def _check_structure(name: str, text: Any) -> None:
    """A text that a grammar can be made of."""
    name = f"structured_outputs.{name}"
    check_unicode(name, check_str(name, text))
    require(
        len(text) <= MAX_STRUCTURE_CHARS,
        f"{name} must have at most {MAX_STRUCTURE_CHARS} characters, got {len(text)}",
    )
    require("\0" not in text, f"{name} must have no NUL character, got one at character {text.find(chr(0))}")


def _check_schema(schema: Any) -> str:
    """A JSON schema as text; whether it can be followed is only known when it is compiled."""
    name = "structured_outputs.json"
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    require(isinstance(schema, (str, dict)), f"{name} must be a JSON schema as a dict or a text, got {show(schema)}")
    try:
        if isinstance(schema, dict):
            return json.dumps(schema, allow_nan=False)
        json.loads(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON ({error}), got {show(schema)}") from None
    return schema


def _check_choices(choice: Any) -> list[str]:
    """Texts, at least one of them, each once."""
    name = "structured_outputs.choice"
    texts = check_list(name, choice, "strings")
    for i, text in enumerate(texts):
        require(isinstance(text, str), f"{name}[{i}] must be a string, got {show(text)}")
        check_unicode(f"{name}[{i}]", text)
    require(len(texts) > 0, f"{name} must have at least one text, got []")
    num_chars = sum(map(len, texts))
    require(
        num_chars <= MAX_STRUCTURE_CHARS, f"{name} must have at most {MAX_STRUCTURE_CHARS} characters, got {num_chars}"
    )
    return list(dict.fromkeys(texts))


@dataclass(repr=False)
class SamplingParams:
    """How the tokens of one request are to be chosen, when they end, and what is reported about them."""

    n: int = 1
    """Answers to return; at most 16,384."""
    best_of: int | None = None
    """Answers to generate, of which the ``n`` likeliest are returned; None becomes ``n``."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token the output already has; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time the output has it; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Scales down (above 1) the logits of tokens that prompt or output have; above 0. Keskar et al. 2019."""
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
    """Refused: a search asks for many requests, so it is `folovllm.llm.LLM.beam_search`."""
    length_penalty: float = 1.0
    """Of a beam search; see `BeamSearchParams`."""
    early_stopping: bool = False
    """Of a beam search, which always stops early here."""
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
    """How many of the likeliest tokens to report log probabilities for, beside the chosen one.

    None reports none at all, -1 the whole vocabulary; an engine serves at most ``ModelConfig.max_logprobs``.
    """
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; in [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """The only tokens that may be chosen."""
    bad_words: list[str] | None = None
    """Words that must not appear in the output."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the answer must be: JSON of a schema, a text of a regular expression or a grammar, one of a few texts."""
    detokenize: bool = True
    """Whether tokens become text; without it stop strings cannot be found."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    spaces_between_special_tokens: bool = True
    """Whether special tokens are set apart by spaces in the text."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What the outputs contain while the request is running."""
    skip_reading_prefix_cache: bool | None = None
    """Whether cached blocks are left unread; None: if ``prompt_logprobs`` needs all of the prompt to be computed."""

    def __post_init__(self) -> None:
        self._derived: dict[str, Any] = {}
        self.check()

    def _derive(self, name: str, value: Any) -> None:
        """Fills in a field that was left out."""
        if getattr(self, name) is None:
            self._derived[name] = value
            setattr(self, name, value)

    def check(self) -> None:
        """Checks every field and brings it into its own type; again, if a field has been changed since.

        Raises:
            ValueError: names the first field that is wrong, its value and what is allowed.
            NotImplementedError: for ``use_beam_search``.
        """
        # What followed from another field follows it again, if that has been changed: ``params.n = 3`` is enough.
        derived, self._derived = self._derived, {}
        for name, value in derived.items():
            if getattr(self, name) == value:
                setattr(self, name, None)
        self._check_beam_search()
        self._check_counts()
        self._check_logprobs()
        self._check_probabilities()
        self._check_text()
        self._check_output_kind()
        self._check_token_choices()

    def clone(self) -> SamplingParams:
        """A copy whose lists are its own, so that changing one of the two never changes the other."""
        clone = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict)):
                setattr(clone, name, value.copy())
        return clone

    def _check_beam_search(self) -> None:
        if check_bool("use_beam_search", self.use_beam_search):
            raise NotImplementedError(
                "use_beam_search must be False, got True; "
                "a beam search is LLM.beam_search(prompts, BeamSearchParams(beam_width=..., max_tokens=...))"
            )
        self.length_penalty = check_number("length_penalty", self.length_penalty)
        check_bool("early_stopping", self.early_stopping)

    def _check_counts(self) -> None:
        self.n = check_int("n", self.n)
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        self._derive("best_of", self.n)
        self.best_of = check_int("best_of", self.best_of)
        for name, count in (("n", self.n), ("best_of", self.best_of)):
            require(count <= MAX_NUM_SEQUENCES, f"{name} must be at most {MAX_NUM_SEQUENCES}, got {count}")
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
        if self.seed is not None:
            self.seed = check_int("seed", self.seed)
            self.seed = None if self.seed == -1 else self.seed  # vLLM's other way to say "no seed"
            require(self.seed is None or self.seed >= 0, f"seed must be None, -1 or 0 and more, got {self.seed}")

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                count = check_int(name, count)
                require(count >= -1, f"{name} must be 0 or more, or -1 for the whole vocabulary, got {count}")
                setattr(self, name, count)
        self._derive("skip_reading_prefix_cache", self.prompt_logprobs is not None)
        check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)

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
        require(self.repetition_penalty > 0, f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def _check_text(self) -> None:
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop = check_texts("stop", stop)
        stop_token_ids = [] if self.stop_token_ids is None else self.stop_token_ids
        self.stop_token_ids = check_token_ids("stop_token_ids", stop_token_ids, ordered=False)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            check_bool(name, getattr(self, name))
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop strings are looked for in the text, got stop={show(self.stop)} with detokenize=False; "
                "set detokenize=True or use stop_token_ids"
            )

    def _check_output_kind(self) -> None:
        if not isinstance(self.output_kind, RequestOutputKind):
            kinds = ", ".join(map(str, RequestOutputKind))
            raise ValueError(f"output_kind must be one of {kinds}, got {show(self.output_kind)}")
        require(
            self.output_kind is not RequestOutputKind.DELTA or self.best_of == self.n,
            f"best_of ({self.best_of}) must equal n ({self.n}) to use output_kind=DELTA: "
            "which answers are kept is only known at the end",
        )

    def _check_token_choices(self) -> None:
        if self.logit_bias is not None:
            self.logit_bias = _check_logit_bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check_token_ids("allowed_token_ids", self.allowed_token_ids, ordered=False)
            require(
                len(self.allowed_token_ids) > 0, "allowed_token_ids must name at least one token or be None, got []"
            )
        if self.bad_words is not None:
            self.bad_words = check_texts("bad_words", self.bad_words)
        require(
            isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))),
            f"structured_outputs must be a StructuredOutputsParams or None, got {show(self.structured_outputs)}",
        )

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY at temperature 0, else RANDOM."""
        return SamplingType.GREEDY if self.temperature == 0 else SamplingType.RANDOM

    def __repr__(self) -> str:
        return (
            f"SamplingParams(n={self.n}, temperature={self.temperature}, top_p={self.top_p}, "
            f"top_k={self.top_k}, max_tokens={self.max_tokens})"
        )


@dataclass
class BeamSearchParams:
    """What one beam search asks for (vLLM: ``BeamSearchParams``). Chapter 17."""

    beam_width: int
    """Texts that are kept after each step, and texts to return; at most half of the vocabulary. Twice as many log
    probabilities are needed, or one more than these for each end token: see ``ModelConfig.max_logprobs``."""
    max_tokens: int
    """Most tokens to generate for one text."""
    ignore_eos: bool = False
    """Whether to go on after the end-of-sequence token."""
    temperature: float = 0.0
    """Of the requests that the search is made of, as in vLLM. It changes nothing: log probabilities are those before
    temperature, and a search draws no token."""
    length_penalty: float = 1.0
    """Exponent: a text's log probability is divided by its number of generated tokens to this power before texts that
    have ended are compared. 0 compares sums, 1 means per token, more favours longer texts; in [-10, 10]."""
    include_stop_str_in_output: bool = False
    """Whether the text contains the end-of-sequence token that ended it, if special tokens are shown at all."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""

    def __post_init__(self) -> None:
        self.beam_width = check_int("beam_width", self.beam_width)
        require(self.beam_width >= 1, f"beam_width must be at least 1, got {self.beam_width}")
        require(
            self.beam_width <= MAX_NUM_SEQUENCES,
            f"beam_width must be at most {MAX_NUM_SEQUENCES}, got {self.beam_width}",
        )
        self.max_tokens = check_int("max_tokens", self.max_tokens)
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        self.temperature = check_number("temperature", self.temperature)
        require(self.temperature >= 0, f"temperature must be non-negative, got {self.temperature}")
        self.length_penalty = check_number("length_penalty", self.length_penalty)
        require(
            abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            f"length_penalty must be in [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}], got {self.length_penalty}",
        )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            check_bool(name, getattr(self, name))


def _check_logit_bias(logit_bias: Any) -> dict[int, float]:
    """A mapping of token id to bias as a dict of its own; JSON clients send the ids as strings."""
    if not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias must be a dict of token id to bias, got {show(logit_bias)}")
    keys = [int(key) if _is_decimal(key) else key for key in logit_bias]
    token_ids = check_token_ids("logit_bias", keys)
    biases = [check_number(f"logit_bias[{i}]", bias) for i, bias in zip(token_ids, logit_bias.values())]
    for token_id, bias in zip(token_ids, biases):
        require(abs(bias) <= MAX_LOGIT_BIAS, f"logit_bias[{token_id}] must be in [-100, 100], got {bias}")
    if len(set(token_ids)) < len(token_ids):
        raise ValueError(f"logit_bias must name each token id once, got {show(logit_bias)}")
    return dict(zip(token_ids, biases))


def _is_decimal(key: Any) -> bool:
    """Whether a string is a number that fits into 64 bits, written with nothing but digits."""
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20


def tokenize_bad_word(word: str, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """The ways a word is written in tokens: at the start of a text, and after a space.

    Raises:
        ValueError: if there is no tokenizer, or if the word has no tokens in it.
    """
    require(tokenizer is not None, f"bad_words needs a tokenizer to find the tokens of {show(word)}, got None")
    bare = word.lstrip()
    spellings = {word, bare, " " + bare} if bare else {word}
    encoded = [encode_whole(cast("PreTrainedTokenizerBase", tokenizer), text) for text in sorted(spellings)]
    require(any(encoded), f"bad_words must be spelled in at least one token, got {show(word)}")
    return [token_ids for token_ids in encoded if token_ids]


def copy_params(params: SamplingParams | None, default: SamplingParams) -> SamplingParams:
    """A copy of a request's params, or of ``default`` if it has none, which nobody else can change.

    Raises:
        ValueError: if they are no `SamplingParams`.
    """
    params = default if params is None else params
    require(isinstance(params, SamplingParams), f"sampling_params must be a SamplingParams or None, got {show(params)}")
    return params.clone()


def check_params(
    params: SamplingParams,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_ids: Sequence[int] = (),
) -> None:
    """Checks params once more, and now against the model that is to serve them.

    Args:
        vocab_size: tokens that have a logit.
        tokenizer: needed for ``bad_words``.
        eos_token_ids: the tokens that end a text, which ``min_tokens`` holds back.

    Raises:
        ValueError: if a field names a token outside the vocabulary, if a bad word has no tokens in it, or if nothing
            is left that the first token could be; of one sentence that names the field.
    """
    params.check()
    stop_token_ids = cast("list[int]", params.stop_token_ids)
    for name, token_ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("stop_token_ids", stop_token_ids),
    ):
        largest = max(token_ids or [0])
        require(largest < vocab_size, f"{name} names token id {largest}, but the vocabulary has {vocab_size} tokens")
    banned = {
        token_ids[0]
        for word in params.bad_words or []
        for token_ids in tokenize_bad_word(word, tokenizer)
        if len(token_ids) == 1
    }
    if params.min_tokens > 0:
        banned.update(eos_token_ids, stop_token_ids)
    # Counting is enough where all are allowed, and spares a set of the whole vocabulary.
    allowed = params.allowed_token_ids
    num_banned = sum(token_id < vocab_size for token_id in banned)
    require(
        num_banned < vocab_size if allowed is None else not banned.issuperset(allowed),
        "no token is left to choose first: allowed_token_ids, bad_words and min_tokens "
        f"(which holds back {len({*eos_token_ids, *stop_token_ids})} end tokens) remove all",
    )
