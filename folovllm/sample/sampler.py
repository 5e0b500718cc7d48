"""From logits to a token. Chapter 2 is about this module.

One row of logits for each sequence, one `SamplingParams` for each row, greedy and random rows in one call. The
stages come in vLLM's order (``vllm/v1/sample/sampler.py``, 0.33.0): grammar, allowed tokens, bad words, min_tokens,
bias, penalties, then greedy rows take the largest logit, and the others go on: temperature, min-p, top-k, top-p, draw.
Every stage is a function of its own: logits in, new logits out, in which what it removed is ``-inf``.

The draw is ours: one uniform number per token, from the request's own generator, and the token at which the cumulative
distribution exceeds it. It can be drawn on paper, costs one random number per row, and gives the same token on any
device and in any batch. vLLM races exponential variables instead, which is faster on a GPU but hard to follow by hand.

A GPU is given work ahead of time, and whoever asks it for a number waits until all of that is done. So what the rows
ask for goes there in one copy, where the stages take it from, and all that they find comes back in one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from folovllm.logprobs import NUM_CONTEXT_TOKENS, Logprob, decode_token
from folovllm.request import StructuredOutputGrammar
from folovllm.sampling_params import SamplingParams, SamplingType, tokenize_bad_word
from folovllm.utils.transfer import copy_to_device, copy_to_host

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOP_P_FIRST_TRY = 1024
"""Tokens sorted at first to find where top_p is reached; sorting the whole vocabulary is rarely needed and slow."""

PROMPT_LOGPROBS_SLICE = 2**24
"""Log probabilities of a prompt that are computed at a time: 64 MiB of float32."""

MAX_BAD_WORDS = 1024
"""Bad words whose tokens a sampler remembers: every caller may have others."""

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def make_generator(params: SamplingParams, index: int = 0) -> random.Random:
    """The random numbers of one sequence: sequence ``index`` of a seeded request has ``seed + index``.

    Without a seed the generator is seeded from Python's global one, which `folovllm.set_random_seed` sets.
    """
    return random.Random(random.getrandbits(64) if params.seed is None else params.seed + index)


@dataclass
class SamplingMetadata:
    """What the sampler knows about each row: every list has one entry per row (vLLM: ``v1/sample/metadata.py``).

    Whoever samples again for the same rows does it with the same object: what ``params`` and prompts ask for is worked
    out once, so they must stay as they are.
    """

    params: list[SamplingParams]
    prompt_token_ids: list[list[int]] = field(default_factory=list)
    """The repetition penalty looks at these; empty prompts when left out."""
    output_token_ids: list[list[int]] = field(default_factory=list)
    """What each row has generated so far. The lists are kept, not copied: append to them and sample again."""
    generators: list[random.Random] = field(default_factory=list)
    """Each row's own random numbers; made from ``params`` when left out."""
    grammars: list[StructuredOutputGrammar | None] = field(default_factory=list)
    """Where each row is in what it must be; None, and when left out: it may be anything."""
    guesses: list[list[int]] = field(default_factory=list)
    """For each sequence its guesses, where its row is followed by one for each of them; none when left out. All of them
    have the sequence's grammar, which is left where it is."""
    draw: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """Takes the place of `draw` for random rows: their probabilities, uniform numbers and row numbers (None: all) ->
    tokens."""
    _batch: _Batch | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_rows = len(self.params)
        self.prompt_token_ids = self.prompt_token_ids or [[] for _ in range(num_rows)]
        self.output_token_ids = self.output_token_ids or [[] for _ in range(num_rows)]
        self.generators = self.generators or [make_generator(params) for params in self.params]
        self.grammars = self.grammars or [None] * num_rows
        for name in ("prompt_token_ids", "output_token_ids", "generators", "grammars"):
            if (length := len(getattr(self, name))) != num_rows:
                raise ValueError(f"{name} must have one entry per row ({num_rows}), got {length}")


@dataclass
class SamplerOutput:
    """The chosen tokens, one per row."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    """For rows that asked for it (and those that best_of must rank): token id -> `Logprob`, the chosen token first."""
    errors: dict[int, str] = field(default_factory=dict)
    """From `Sampler.sample` alone: row -> why it has no token, one sentence; its ``token_ids`` entry means nothing."""
    not_finite: set[int] = field(default_factory=set)
    """Those of them with a logit that is NaN or infinite, which a weight, keys or values may be to blame for."""


class _RowError(ValueError):
    """What is wrong with one row; ``reason`` continues a sentence that begins "row 3" or "the request"."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.reason = reason


def _column(values: Sequence[float]) -> np.ndarray:
    """One float32 per row, ``[num_rows, 1]``; what is beyond the largest becomes the largest."""
    return np.minimum(np.array(values, np.float64), _HUGE).astype(np.float32)[:, None]


def _per_row(values: Sequence[float] | Tensor, logits: Tensor) -> Tensor:
    """One float32 per row, as a column ``[num_rows, 1]`` beside the logits, where a tensor already is."""
    return values if isinstance(values, Tensor) else copy_to_device([_column(values)], logits.device)[0]


def _find_places(token_ids: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Where each row's token ids are in the logits of all rows, put end to end: ``[num_token_ids]``.

    Raises:
        ValueError: if a token id is outside the vocabulary.
    """
    for row, ids in enumerate(token_ids):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            token_id = next(i for i in ids if not 0 <= i < vocab_size)
            raise _RowError(row, f"names token id {token_id}, but the vocabulary has {vocab_size} tokens")
    counts = [len(ids) for ids in token_ids]
    columns = np.fromiter(itertools.chain.from_iterable(token_ids), np.int64, sum(counts))
    return np.repeat(np.arange(len(counts), dtype=np.int64) * vocab_size, counts) + columns


def _places(token_ids: Sequence[Sequence[int]] | Tensor, logits: Tensor) -> Tensor:
    """`_find_places` beside the logits, where a tensor already is."""
    if isinstance(token_ids, Tensor):
        return token_ids
    return copy_to_device([_find_places(token_ids, logits.shape[-1])], logits.device)[0]


def apply_grammar_bitmask(logits: Tensor, bitmask: np.ndarray | Tensor, rows: Tensor | None = None) -> Tensor:
    """Keeps only the tokens whose bits are set. ``[num_rows, vocab_size]`` in and out.

    Args:
        logits: of all rows.
        bitmask: int32 ``[num_masked_rows, num_words]``; token ``i`` is bit ``i % 32`` of word ``i // 32``, and a token
            that it has no bit for is removed.
        rows: which rows are masked; None: all.
    """
    if not isinstance(bitmask, Tensor):
        (bitmask,) = copy_to_device([bitmask], logits.device)
    bits = 1 << torch.arange(32, dtype=torch.int32, device=logits.device)
    removed = (bitmask.unsqueeze(-1) & bits).eq(0).flatten(1)[:, : logits.shape[-1]]
    removed = torch.nn.functional.pad(removed, (0, logits.shape[-1] - removed.shape[-1]), value=True)
    if rows is None:
        return logits.masked_fill(removed, -torch.inf)
    return logits.index_copy(0, rows, logits.index_select(0, rows).masked_fill_(removed, -torch.inf))


def _find_allowed(allowed_token_ids: Sequence[Sequence[int] | None], vocab_size: int) -> list[np.ndarray]:
    """The rows that may choose some tokens only, and the places of those."""
    rows = [row for row, allowed in enumerate(allowed_token_ids) if allowed is not None]
    return [np.array(rows, np.int64), _find_places([allowed or [] for allowed in allowed_token_ids], vocab_size)]


def apply_allowed_token_ids(
    logits: Tensor, allowed_token_ids: Sequence[Sequence[int] | None] | tuple[Tensor, Tensor]
) -> Tensor:
    """Keeps only the allowed tokens of each row; None allows all. ``[num_rows, vocab_size]`` in and out."""
    if not isinstance(allowed_token_ids, tuple):
        found = copy_to_device(_find_allowed(allowed_token_ids, logits.shape[-1]), logits.device)
        return apply_allowed_token_ids(logits, (found[0], found[1]))
    rows, places = allowed_token_ids
    removed = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).index_fill_(0, rows, True)
    removed.view(-1).index_fill_(0, places, False)
    return logits.masked_fill(removed, -torch.inf)


def ban_tokens(logits: Tensor, token_ids: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Removes the given tokens of each row. ``[num_rows, vocab_size]`` in and out."""
    return logits.flatten().index_fill(0, _places(token_ids, logits), -torch.inf).view(logits.shape)


def find_bad_word_ends(bad_words_token_ids: Sequence[Sequence[int]], output_token_ids: Sequence[int]) -> list[int]:
    """The tokens that would complete a bad word, given the output so far."""
    output = list(output_token_ids)
    return [
        word[-1]
        for word in bad_words_token_ids
        if 0 < len(word) <= len(output) + 1 and output[len(output) - len(word) + 1 :] == list(word[:-1])
    ]


def _find_biases(logit_bias: Sequence[dict[int, float] | None], vocab_size: int) -> list[np.ndarray]:
    """The places of the tokens that have a bias, and the biases."""
    biases = [bias or {} for bias in logit_bias]
    values = [float(value) for bias in biases for value in bias.values()]
    return [_find_places([list(bias) for bias in biases], vocab_size), np.array(values, np.float64)]


def apply_logit_bias(logits: Tensor, logit_bias: Sequence[dict[int, float] | None] | tuple[Tensor, Tensor]) -> Tensor:
    """Adds each row's biases to its logits. ``[num_rows, vocab_size]`` in and out."""
    if not isinstance(logit_bias, tuple):
        found = copy_to_device(_find_biases(logit_bias, logits.shape[-1]), logits.device)
        return apply_logit_bias(logits, (found[0], found[1]))
    places, values = logit_bias
    return logits.flatten().index_add(0, places, values.to(logits.dtype)).view(logits.shape)


def apply_penalties(
    logits: Tensor,
    prompt_token_ids: Sequence[Sequence[int]] | Tensor,
    output_token_ids: Sequence[Sequence[int]] | Tensor,
    repetition_penalties: Sequence[float] | Tensor,
    frequency_penalties: Sequence[float] | Tensor,
    presence_penalties: Sequence[float] | Tensor,
) -> Tensor:
    """Makes tokens that were used less likely. ``[num_rows, vocab_size]`` in and out.

    Repetition looks at prompt and output, and divides positive logits and multiplies negative ones (Keskar et al.
    2019). Frequency and presence look at the output alone and subtract, once for each use and once for any.
    """
    counts = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    places = _places(output_token_ids, logits)
    counts.view(-1).index_add_(0, places, counts.new_ones(len(places)))
    used = counts > 0
    used_anywhere = used.clone()
    used_anywhere.view(-1).index_fill_(0, _places(prompt_token_ids, logits), True)

    repetition = _per_row(repetition_penalties, logits).clamp(_TINY, _HUGE)
    # Beyond the largest float a logit would be infinite: inf - inf is not a number, and -inf removes a token.
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition).clamp_(-_HUGE, _HUGE)
    logits = torch.where(used_anywhere.logical_and_(logits.abs() < torch.inf), scaled, logits)
    return logits - _per_row(frequency_penalties, logits) * counts - _per_row(presence_penalties, logits) * used


def apply_temperature(logits: Tensor, temperatures: Sequence[float] | Tensor) -> Tensor:
    """Divides each row by its temperature, after moving its largest logit to 0. ``[num_rows, vocab_size]`` in and out.

    The move changes no probability, and keeps tiny temperatures from overflowing.
    """
    temperature = _per_row(temperatures, logits).clamp(_TINY, _HUGE)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def apply_min_p(logits: Tensor, min_p: Sequence[float] | Tensor) -> Tensor:
    """Keeps tokens at least ``min_p`` times as likely as the likeliest. ``[num_rows, vocab_size]`` in and out."""
    # p >= min_p * p_max is logit >= logit_max + log(min_p): no softmax needed.
    threshold = logits.amax(dim=-1, keepdim=True) + _per_row(min_p, logits).log()
    return logits.masked_fill(logits < threshold, -torch.inf)


def _find_limits(top_k: Sequence[int], vocab_size: int) -> np.ndarray:
    """How many tokens to keep, ``[num_rows, 1]``; 0: all of them, nothing is to be removed."""
    return np.array([k if 0 < k < vocab_size else 0 for k in top_k], np.int64)[:, None]


def apply_top_k(logits: Tensor, top_k: Sequence[int] | Tensor, largest: int | None = None) -> Tensor:
    """Keeps the ``top_k`` likeliest tokens and those as likely as the last of them; -1 keeps all.

    ``[num_rows, vocab_size]`` in and out. ``top_k`` can be a tensor, with 0 for all, if ``largest`` is its largest.
    """
    if not isinstance(top_k, Tensor):
        limits = _find_limits(top_k, logits.shape[-1])
        return apply_top_k(logits, copy_to_device([limits], logits.device)[0], int(limits.max(initial=0)))
    if not largest:
        return logits
    likeliest = logits.topk(largest, dim=-1).values
    threshold = likeliest.gather(1, (top_k - 1).clamp(min=0)).masked_fill(top_k == 0, -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def apply_top_p(logits: Tensor, top_p: Sequence[float] | Tensor, num_left: int | None = None) -> Tensor:
    """Keeps the likeliest tokens until their probabilities reach ``top_p``, the one that reaches it included.

    Tokens exactly as likely as that one stay too, so what is kept does not depend on how a sort breaks ties.
    ``[num_rows, vocab_size]`` in and out. ``num_left`` is the most tokens that top-k has left to a row with a
    ``top_p``, not counting ties with the last; None: all. Where they are few, nobody waits for a first try's result.
    """
    p = _per_row(top_p, logits)
    everything = p >= 1
    goal = p.masked_fill(everything, 0)
    probs = logits.softmax(dim=-1)
    num_left = num_left or logits.shape[-1]
    likeliest = probs.topk(min(TOP_P_FIRST_TRY, num_left), dim=-1).values
    reached = likeliest.cumsum(dim=-1) >= goal
    if num_left > TOP_P_FIRST_TRY and not reached[:, -1].all():
        likeliest = probs.sort(dim=-1, descending=True).values
        reached = likeliest.cumsum(dim=-1) >= goal
    first_reached = (~reached).sum(dim=-1, keepdim=True).clamp(max=likeliest.shape[-1] - 1)
    keep = (probs >= likeliest.gather(1, first_reached)) | everything
    return logits.masked_fill(~keep, -torch.inf)


def find_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, and its logit: ``[num_rows]`` each."""
    return logits.argmax(dim=-1), logits.amax(dim=-1)


def draw(probs: Tensor, uniforms: Sequence[float] | Tensor) -> Tensor:
    """The token where each row's cumulative distribution first exceeds its uniform number.

    Args:
        probs: ``[num_rows, vocab_size]``; rows need not sum to exactly 1.
        uniforms: one number in [0, 1) per row; as a tensor, float64 ``[num_rows]``.

    Returns:
        token ids ``[num_rows]``; never one of probability 0. A row of NaN gives its last token.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not isinstance(uniforms, Tensor):
        (uniforms,) = copy_to_device([np.array(uniforms, np.float64)], probs.device)
    found = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * total, right=True)
    return found.squeeze(1).clamp_(max=probs.shape[-1] - 1)


def gather_logprobs(
    logprobs: Tensor,
    token_ids: Sequence[int],
    num_logprobs: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[dict[int, Logprob]]:
    """Per row, the log probabilities of its token and of the likeliest ones, in vLLM's format, its token first.

    It waits for the GPU once, for any number of rows and whatever they ask for.

    Args:
        logprobs: ``[num_rows, vocab_size]``, raw.
        token_ids: the token of each row.
        num_logprobs: how many of the likeliest each row asks for; -1: the whole vocabulary.
        tokenizer: fills in ``decoded_token``.
        contexts: the tokens before each row's, for `decode_token`; nothing comes before when left out.
    """
    if not token_ids:
        return []
    groups = _group_by_limit(num_logprobs, logprobs.shape[-1])
    chosen, *rows = copy_to_device([np.array(token_ids, np.int64), *_rows_of_groups(groups)], logprobs.device)
    values, indices = copy_to_host(_find_logprobs(logprobs, chosen, [*groups], rows))
    return _read_logprobs(values, indices, token_ids, groups, tokenizer, contexts)


def _rows_of_groups(groups: Mapping[int, Sequence[int]]) -> list[np.ndarray]:
    """The rows of each group; none are needed where one group has all of them."""
    return [np.array(rows, np.int64) for rows in groups.values()] if len(groups) > 1 else []


def _find_logprobs(
    logprobs: Tensor, chosen: Tensor, limits: Sequence[int], rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What `_read_logprobs` reads, still on the device.

    Returns:
        log probabilities: of the chosen token of each row, then of the likeliest ones of each group of rows;
        integers: how many tokens are likelier than the chosen one of each row, then the ids of the likeliest ones.
    """
    chosen_logprobs = logprobs.gather(1, chosen.unsqueeze(1))
    likelier = logprobs > chosen_logprobs
    # Row by row a CPU counts thirty times as fast as along a dimension.
    counts = [row.count_nonzero() for row in likelier] if likelier.device.type == "cpu" else [likelier.sum(dim=-1)]
    values, indices = [chosen_logprobs], counts
    for limit, group in itertools.zip_longest(limits, rows):
        likeliest = (logprobs if group is None else logprobs.index_select(0, group)).topk(limit, dim=-1)
        values.append(likeliest.values)
        indices.append(likeliest.indices)
    return torch.cat([x.flatten() for x in values]), torch.cat([x.flatten() for x in indices])


def _read_logprobs(
    values: Iterable[float],
    indices: Iterable[int],
    token_ids: Sequence[int],
    groups: Mapping[int, Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    contexts: Sequence[Sequence[int]] | None,
) -> list[dict[int, Logprob]]:
    """What `gather_logprobs` returns, from the numbers of `_find_logprobs`, in the order in which they were joined."""
    next_values, next_indices = iter(values), iter(indices)
    found = [
        {token_id: Logprob(value, num_likelier + 1)}
        for token_id, value, num_likelier in zip(token_ids, next_values, next_indices)
    ]
    for limit, rows in groups.items():
        for row in rows:
            _add_likeliest(found[row], itertools.islice(next_values, limit), itertools.islice(next_indices, limit))
    if tokenizer is not None:
        for row, logprobs_of_row in enumerate(found):
            for token_id, logprob in logprobs_of_row.items():
                logprob.decoded_token = decode_token(token_id, contexts[row] if contexts else (), tokenizer)
    return found


def _group_by_limit(num_logprobs: Sequence[int], vocab_size: int) -> dict[int, list[int]]:
    """The rows that ask for the same number of likeliest tokens, by that number."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, n in enumerate(num_logprobs):
        rows[vocab_size if n == -1 else min(n, vocab_size)].append(row)
    return rows


def _add_likeliest(found: dict[int, Logprob], values: Iterable[float], token_ids: Iterable[int]) -> None:
    """Adds tokens, the likeliest first; equally likely ones get the same rank."""
    rank, last = 0, None
    for place, (value, token_id) in enumerate(zip(values, token_ids), 1):
        if value != last:
            rank, last = place, value
        found.setdefault(token_id, Logprob(value, rank))


def compute_prompt_logprobs(
    logits: Tensor,
    prompt_token_ids: Sequence[int],
    num_logprobs: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context: Sequence[int] = (),
) -> list[dict[int, Logprob] | None]:
    """How likely the model found each token of the prompt; None for the first, which nothing predicts.

    Args:
        logits: ``[num_prompt_tokens, vocab_size]``, those of the prompt's own forward pass; the last may be left out.
        prompt_token_ids: the prompt, or the part of it that the logits belong to.
        num_logprobs: how many of the likeliest to report beside each; -1: the whole vocabulary.
        tokenizer: fills in ``decoded_token``.
        context: the tokens before ``prompt_token_ids`` if they are a part, for `decode_token`.
    """
    found: list[dict[int, Logprob] | None] = [None]
    before, targets = [*context[-NUM_CONTEXT_TOKENS:], *prompt_token_ids], prompt_token_ids[1:]
    num_rows = max(PROMPT_LOGPROBS_SLICE // logits.shape[-1], 1)
    for start in range(0, len(targets), num_rows):
        token_ids = targets[start : start + num_rows]
        # Where the targets start among all tokens.
        first = len(before) - len(targets) + start
        contexts = [before[max(i - NUM_CONTEXT_TOKENS, 0) : i] for i in range(first, first + len(token_ids))]
        logprobs = logits[start : start + len(token_ids)].log_softmax(dim=-1, dtype=torch.float32)
        found += gather_logprobs(logprobs, token_ids, [num_logprobs] * len(token_ids), tokenizer, contexts)
    return found


_COLUMNS = "temperature", "min_p", "top_k", "top_p"


@dataclass
class Truncation:
    """What rows ask `truncate` for: a number for each row, or a column of them beside the logits. None: no row asks."""

    temperature: Sequence[float] | Tensor
    min_p: Sequence[float] | Tensor | None
    top_k: Sequence[int] | Tensor | None
    """0 keeps all."""
    top_p: Sequence[float] | Tensor | None
    largest_k: int
    num_left: int | None
    """See `apply_top_p`."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Truncation:
        """As lists."""
        limits = _find_limits([p.top_k for p in params], vocab_size).ravel().tolist()
        limits_of_top_p = [limit for p, limit in zip(params, limits) if p.top_p < 1]
        return cls(
            temperature=[p.temperature or 1.0 for p in params],
            min_p=[p.min_p for p in params] if any(p.min_p > 0 for p in params) else None,
            top_k=limits if any(limits) else None,
            top_p=[p.top_p for p in params] if limits_of_top_p else None,
            largest_k=max(limits, default=0),
            num_left=max(limits_of_top_p, default=0) if all(limits_of_top_p) else None,
        )

    def arrays(self, vocab_size: int) -> dict[str, np.ndarray]:
        """The columns of what is asked for, by their names."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return {
            name: _find_limits(values, vocab_size) if name == "top_k" else _column(values)
            for name, values in columns.items()
            if values
        }


class _Batch:
    """What rows ask for, worked out once for as long as they are the same.

    Args:
        metadata: the rows.
        logits: theirs, of which only the width and the device matter.

    Raises:
        ValueError: if a row names a token outside the vocabulary.
    """

    def __init__(self, metadata: SamplingMetadata, logits: Tensor) -> None:
        self.params, self.vocab_size, self.device = metadata.params, logits.shape[-1], logits.device
        rows = list(enumerate(self.params))
        self.random_rows = [row for row, p in rows if p.sampling_type is SamplingType.RANDOM]
        self.watched_rows = [row for row, p in rows if p.bad_words or p.min_tokens]
        self.penalized_rows = [row for row, p in rows if _penalties(p) != (1, 0, 0)]
        structured_rows = [row for row, grammar in enumerate(metadata.grammars) if grammar is not None]
        self.masks = _find_masks(metadata)
        self.reported_rows = [row for row, p in rows if p.logprobs is not None or p.best_of != p.n]
        self.groups = _group_by_limit([self.params[row].logprobs or 0 for row in self.reported_rows], self.vocab_size)
        self.truncation = Truncation.of([self.params[row] for row in self.random_rows], self.vocab_size)
        self.arrays = self.truncation.arrays(self.vocab_size) | self._find_constraints(metadata.prompt_token_ids)
        for name, some in (
            ("random_rows", self.random_rows),
            ("reported_rows", self.reported_rows),
            ("structured_rows", structured_rows),
        ):
            if 0 < len(some) < len(rows):
                self.arrays[name] = np.array(some, np.int64)
        self.arrays |= {f"group {i}": found for i, found in enumerate(_rows_of_groups(self.groups))}
        self.kept: dict[str, Tensor] | None = None

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keeps what its ``arrays`` have become on the device."""
        self.kept = {name: tensors[name] for name in self.arrays}
        for name in self.kept.keys() & _COLUMNS:
            setattr(self.truncation, name, self.kept[name])
        return self.kept

    def _find_constraints(self, prompt_token_ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """What `_constrain` takes, but for that which changes from step to step."""
        params, vocab_size = self.params, self.vocab_size
        arrays: dict[str, np.ndarray] = {}
        if any(p.allowed_token_ids is not None for p in params):
            names = "restricted_rows", "allowed"
            arrays |= zip(names, _find_allowed([p.allowed_token_ids for p in params], vocab_size))
        if any(p.logit_bias for p in params):
            arrays |= zip(("biased", "bias"), _find_biases([p.logit_bias for p in params], vocab_size))
        if self.penalized_rows:
            prompts = [ids if p.repetition_penalty != 1 else [] for p, ids in zip(params, prompt_token_ids)]
            arrays["prompts"] = _find_places(prompts, vocab_size)
            arrays |= zip(("repetition", "frequency", "presence"), map(_column, zip(*map(_penalties, params))))
        return arrays


def _find_masks(metadata: SamplingMetadata) -> list[tuple[StructuredOutputGrammar, list[int]]]:
    """The grammar of each sequence that has one, with its guesses, in the order of the rows."""
    guesses = metadata.guesses or [[]] * len(metadata.params)
    first_rows = np.cumsum([0, *(1 + len(tokens) for tokens in guesses)])
    grammars = [metadata.grammars[row] for row in first_rows[:-1]]
    return [(grammar, tokens) for grammar, tokens in zip(grammars, guesses) if grammar is not None]


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    """Repetition, frequency and presence; (1, 0, 0) changes nothing."""
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty


class Sampler:
    """Chooses the next token of every row."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        """Makes a sampler for one model.

        Args:
            tokenizer: needed for ``bad_words`` and for the text in `Logprob`.
            eos_token_ids: the tokens that end a text, which ``min_tokens`` holds back; None: the tokenizer's.
        """
        self.tokenizer = tokenizer
        own_eos = None if tokenizer is None else tokenizer.eos_token_id
        self.eos_token_ids = list(eos_token_ids if eos_token_ids is not None else [] if own_eos is None else [own_eos])
        self._bad_words: dict[str, list[list[int]]] = {}

    def __call__(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Chooses one token per row.

        Args:
            logits: ``[num_rows, vocab_size]``, any float dtype.
            metadata: one entry a row.

        Raises:
            ValueError: if a row's params leave no token to choose, name one outside the vocabulary, or if the
                logits are not numbers.
        """
        _check_shape(logits, metadata)
        output = self._choose(logits, metadata, self._bring(logits, metadata))
        if output.errors:
            row, reason = next(iter(output.errors.items()))
            raise ValueError(f"row {row} {reason}")
        return output

    def sample(self, logits: Tensor, metadata: SamplingMetadata, likeliest: tuple[Tensor, ...] = ()) -> SamplerOutput:
        """Chooses one token for each row where that is possible; for the others ``errors`` has the reason.

        A row that cannot be sampled changes nothing for the others: same tokens, same random numbers.

        Args:
            logits: ``[num_rows, vocab_size]``, any float dtype.
            metadata: one entry a row.
            likeliest: what `find_likeliest` gives for these logits, if that is known already.

        Raises:
            ValueError: if there is not one row of logits for each entry.
        """
        _check_shape(logits, metadata)
        refused: dict[int, str] = {}
        try:
            tensors = self._bring(logits, metadata)
        except ValueError:
            refused = self._find_refused(logits, metadata)
            metadata = _without(metadata, refused)
            tensors = self._bring(logits, metadata)
        output = self._choose(logits, metadata, tensors, likeliest)
        output.errors = {row: f"the request {reason}" for row, reason in output.errors.items()} | refused
        return output

    def compute_probs(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        """The distribution each row's token is drawn from, ``[num_rows, vocab_size]``; one-hot for greedy rows."""
        scores = self.apply_constraints(logits, metadata)
        probs = truncate(scores, metadata.params).softmax(dim=-1)
        if greedy := [row for row, p in enumerate(metadata.params) if p.sampling_type is SamplingType.GREEDY]:
            (rows,) = copy_to_device([np.array(greedy, np.int64)], logits.device)
            likeliest = scores.index_select(0, rows).argmax(dim=-1)
            probs.index_copy_(0, rows, torch.nn.functional.one_hot(likeliest, scores.shape[-1]).to(probs))
        return probs

    def apply_constraints(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        """The stages for greedy and random rows alike: grammar, allowed tokens, bad words, min_tokens, bias, penalties.

        ``[num_rows, vocab_size]`` in and out, float32. A stage that no row asks for is skipped.

        Raises:
            ValueError: as for a call of the sampler.
        """
        _check_shape(logits, metadata)
        scores = _constrain(logits, self._bring(logits, metadata, may_draw=False))
        for row, reason in _find_unusable_rows(scores.amax(dim=-1).tolist()):
            raise ValueError(f"row {row} {reason}")
        return scores

    def _bring(self, logits: Tensor, metadata: SamplingMetadata, may_draw: bool = True) -> dict[str, Tensor]:
        """What this step's stages take, under their names, on the device of the logits, in one copy.

        What stays the same while the rows do is there already, unless they are new.

        Raises:
            ValueError: as for a call of the sampler; no random number has been drawn then.
        """
        batch = metadata._batch
        if batch is None or (batch.vocab_size, batch.device) != (logits.shape[-1], logits.device):
            batch = metadata._batch = _Batch(metadata, logits)
        arrays = self._find_changing(metadata, batch)
        if may_draw and batch.random_rows:
            arrays["uniforms"] = np.array([metadata.generators[row].random() for row in batch.random_rows])
        if batch.kept is None:
            arrays |= batch.arrays
        tensors = dict(zip(arrays, copy_to_device([*arrays.values()], logits.device)))
        return (batch.keep(tensors) if batch.kept is None else batch.kept) | tensors

    def _find_changing(self, metadata: SamplingMetadata, batch: _Batch) -> dict[str, np.ndarray]:
        """What `_constrain` takes and what depends on the outputs so far."""
        params, outputs = batch.params, metadata.output_token_ids
        arrays: dict[str, np.ndarray] = {}
        if batch.masks:
            # Here, since few requests need it, and it takes a tenth of a second to import.
            from folovllm.sample.structured_output import fill_bitmasks

            arrays["bitmask"] = fill_bitmasks(*zip(*batch.masks))
        if batch.watched_rows:
            banned: list[list[int]] = [[] for _ in params]
            for row in batch.watched_rows:
                banned[row] = self._banned(params[row], outputs[row], batch.vocab_size)
            if any(banned):
                arrays["banned"] = _find_places(banned, batch.vocab_size)
        if batch.penalized_rows:
            used: list[list[int]] = [[] for _ in params]
            for row in batch.penalized_rows:
                used[row] = outputs[row]
            arrays["outputs"] = _find_places(used, batch.vocab_size)
        return arrays

    def _find_refused(self, logits: Tensor, metadata: SamplingMetadata) -> dict[int, str]:
        """The rows whose params cannot be followed, and why."""
        refused = {}
        for row, (prompt, output) in enumerate(zip(metadata.prompt_token_ids, metadata.output_token_ids)):
            alone = SamplingMetadata(
                [metadata.params[row]], [prompt], [output], [metadata.generators[row]], [metadata.grammars[row]]
            )
            try:
                self._find_changing(alone, _Batch(alone, logits))
            except _RowError as error:
                refused[row] = f"the request {error.reason}"
            except ValueError as error:
                refused[row] = str(error)
        return refused

    def _banned(self, params: SamplingParams, output_token_ids: Sequence[int], vocab_size: int) -> list[int]:
        """The tokens that this row must not choose now."""
        banned: list[int] = []
        if params.bad_words:
            words = [token_ids for word in params.bad_words for token_ids in self._tokenize_bad_word(word)]
            banned += find_bad_word_ends(words, output_token_ids)
        if len(output_token_ids) < params.min_tokens:
            banned += self.eos_token_ids
        # A tokenizer may know more tokens than the model has logits for, and those need not be held back.
        banned = [token_id for token_id in banned if token_id < vocab_size]
        if len(output_token_ids) < params.min_tokens:
            banned += params.stop_token_ids or []
        return banned

    def _tokenize_bad_word(self, word: str) -> list[list[int]]:
        """`tokenize_bad_word`, once for each word."""
        if word not in self._bad_words:
            if len(self._bad_words) >= MAX_BAD_WORDS:
                self._bad_words.clear()
            self._bad_words[word] = tokenize_bad_word(word, self.tokenizer)
        return self._bad_words[word]

    def _choose(
        self,
        logits: Tensor,
        metadata: SamplingMetadata,
        tensors: Mapping[str, Tensor],
        likeliest: tuple[Tensor, ...] = (),
    ) -> SamplerOutput:
        """A token for each row, with the log probabilities that it asks for, from what `_bring` has brought.

        It waits for the device once. Its ``errors`` are reasons that continue a sentence, as in `_RowError`.
        """
        batch = metadata._batch
        assert batch is not None  # `_bring` has made it
        if not likeliest or batch.random_rows or _CONSTRAINTS & tensors.keys():
            likeliest = _pick(_constrain(logits, tensors), batch, tensors, metadata.draw)
        tokens, largest = likeliest
        report = _report(logits, tokens, batch, tensors) if batch.reported_rows else ()
        token_ids, largest_logits, *numbers = copy_to_host([tokens, largest, *report])
        errors = dict(_find_unusable_rows(largest_logits))
        logprobs: list[dict[int, Logprob] | None] = [None] * len(token_ids)
        if numbers:
            values, indices = numbers
            rows = batch.reported_rows
            texts = [(metadata.prompt_token_ids[row], metadata.output_token_ids[row]) for row in rows]
            contexts = [[*prompt[-NUM_CONTEXT_TOKENS:], *output[-NUM_CONTEXT_TOKENS:]] for prompt, output in texts]
            chosen = [token_ids[row] for row in rows]
            asked_for = _read_logprobs(values, indices, chosen, batch.groups, self.tokenizer, contexts)
            for row, logprobs_of_row in zip(rows, asked_for):
                logprobs[row] = None if row in errors else logprobs_of_row
        not_finite = {row for row, largest in enumerate(largest_logits) if math.isnan(largest) or largest == math.inf}
        return SamplerOutput(token_ids, logprobs, errors, not_finite)


_CONSTRAINTS = {"bitmask", "allowed", "banned", "bias", "outputs"}


def _constrain(logits: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The stages for greedy and random rows alike; one that no row asks for is skipped."""
    logits = logits.float()
    if "bitmask" in tensors:
        logits = apply_grammar_bitmask(logits, tensors["bitmask"], tensors.get("structured_rows"))
    if "allowed" in tensors:
        logits = apply_allowed_token_ids(logits, (tensors["restricted_rows"], tensors["allowed"]))
    if "banned" in tensors:
        logits = ban_tokens(logits, tensors["banned"])
    if "bias" in tensors:
        logits = apply_logit_bias(logits, (tensors["biased"], tensors["bias"]))
    if "outputs" in tensors:
        names = "prompts", "outputs", "repetition", "frequency", "presence"
        logits = apply_penalties(logits, *(tensors[name] for name in names))
    return logits


def _pick(
    scores: Tensor,
    batch: _Batch,
    tensors: Mapping[str, Tensor],
    draw_instead: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The likeliest token of greedy rows, a drawn one for the others, and the largest logit of each row."""
    if not batch.random_rows:
        return find_likeliest(scores)
    largest = scores.amax(dim=-1)
    rows = tensors.get("random_rows")  # none where all are
    random_scores = scores if rows is None else scores.index_select(0, rows)
    probs = truncate(random_scores, batch.truncation).softmax(dim=-1)
    uniforms = tensors["uniforms"]
    drawn = draw(probs, uniforms) if draw_instead is None else draw_instead(probs, uniforms, rows)
    return (drawn if rows is None else scores.argmax(dim=-1).index_copy_(0, rows, drawn)), largest


def _report(logits: Tensor, token_ids: Tensor, batch: _Batch, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What `_read_logprobs` reads of the rows that ask for log probabilities: the raw ones."""
    rows = tensors.get("reported_rows")  # none where all do
    if rows is not None:
        logits, token_ids = logits.index_select(0, rows), token_ids.index_select(0, rows)
    groups = [tensors[f"group {i}"] for i in range(len(batch.groups)) if len(batch.groups) > 1]
    return _find_logprobs(logits.float().log_softmax(dim=-1), token_ids, [*batch.groups], groups)


def _without(metadata: SamplingMetadata, rows: Iterable[int]) -> SamplingMetadata:
    """The same, but that these rows ask for nothing."""
    params, grammars = list(metadata.params), list(metadata.grammars)
    for row in rows:
        params[row], grammars[row] = SamplingParams(temperature=0), None
    return replace(metadata, params=params, grammars=grammars)


def _check_shape(logits: Tensor, metadata: SamplingMetadata) -> None:
    """One row of logits for each row of metadata."""
    num_rows = len(metadata.params)
    if logits.ndim != 2 or len(logits) != num_rows:
        raise ValueError(f"logits must be [{num_rows}, vocab_size], one row per SamplingParams, got {[*logits.shape]}")


NOT_FINITE = "a weight is no number, 16 bits have no room for one (dtype='float32' has), or logit_bias is too large"
"""Why a logit may not be finite."""


def _find_unusable_rows(largest_logits: Iterable[float]) -> Iterator[tuple[int, str]]:
    """The rows that have no token left, or whose logits are not numbers, and why."""
    for row, largest in enumerate(largest_logits):
        if largest == -torch.inf:
            yield (row, "has no token left: structured_outputs, allowed_token_ids, bad_words and min_tokens remove all")
        elif not math.isfinite(largest):
            yield (row, f"has a logit of {largest}: {NOT_FINITE}")


def truncate(logits: Tensor, params: Sequence[SamplingParams] | Truncation) -> Tensor:
    """The stages for random rows: temperature, min-p, top-k, top-p. ``[num_rows, vocab_size]`` in and out.

    A stage that no row asks for is skipped. A greedy row's temperature counts as 1 here.
    """
    asked = params if isinstance(params, Truncation) else Truncation.of(params, logits.shape[-1])
    logits = apply_temperature(logits, asked.temperature)
    if asked.min_p is not None:
        logits = apply_min_p(logits, asked.min_p)
    if asked.top_k is not None:
        logits = apply_top_k(logits, asked.top_k, asked.largest_k)
    if asked.top_p is not None:
        logits = apply_top_p(logits, asked.top_p, asked.num_left)
    return logits
