"""From logits to a token. Chapter 2 is about this module.

One row of logits for each sequence, one `SamplingParams` for each row, greedy and random rows in one call. The
stages come in vLLM's order (``vllm/v1/sample/sampler.py``, 0.33.0): allowed tokens, bad words, min_tokens, bias,
penalties, then greedy rows take the largest logit, and the others go on: temperature, min-p, top-k, top-p, draw.
Every stage is a function of its own: logits in, new logits out, in which what it removed is ``-inf``.

The draw is ours: one uniform number per token, from the request's own generator, and the token at which the cumulative
distribution exceeds it. It can be drawn on paper, costs one random number per row, and gives the same token on any
device and in any batch. vLLM races exponential variables instead, which is faster on a GPU but hard to follow by hand.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from folovllm.logprobs import NUM_CONTEXT_TOKENS, Logprob, decode_token
from folovllm.sampling_params import SamplingParams, SamplingType, tokenize_bad_word

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
    """What the sampler knows about each row: every list has one entry per row (vLLM: ``v1/sample/metadata.py``)."""

    params: list[SamplingParams]
    prompt_token_ids: list[list[int]] = field(default_factory=list)
    """The repetition penalty looks at these; empty prompts when left out."""
    output_token_ids: list[list[int]] = field(default_factory=list)
    """What each row has generated so far. The lists are kept, not copied: append to them and sample again."""
    generators: list[random.Random] = field(default_factory=list)
    """Each row's own random numbers; made from ``params`` when left out."""

    def __post_init__(self) -> None:
        num_rows = len(self.params)
        self.prompt_token_ids = self.prompt_token_ids or [[] for _ in range(num_rows)]
        self.output_token_ids = self.output_token_ids or [[] for _ in range(num_rows)]
        self.generators = self.generators or [make_generator(params) for params in self.params]
        for name in ("prompt_token_ids", "output_token_ids", "generators"):
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


class _RowError(ValueError):
    """What is wrong with one row; ``reason`` continues a sentence that begins "row 3" or "the request"."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.reason = reason


def _per_row(values: Sequence[float], logits: Tensor) -> Tensor:
    """One float32 per row, as a column ``[num_rows, 1]`` beside the logits."""
    return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)


def _places(token_ids: Sequence[Sequence[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column indices ``[num_token_ids]`` of each row's token ids.

    Raises:
        ValueError: if a token id is outside the vocabulary.
    """
    vocab_size = logits.shape[-1]
    for row, ids in enumerate(token_ids):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            token_id = next(i for i in ids if not 0 <= i < vocab_size)
            raise _RowError(row, f"names token id {token_id}, but the vocabulary has {vocab_size} tokens")
    rows = [row for row, ids in enumerate(token_ids) for _ in ids]
    columns = [*itertools.chain.from_iterable(token_ids)]
    return torch.tensor(rows, dtype=torch.long, device=logits.device), torch.tensor(
        columns, dtype=torch.long, device=logits.device
    )


def apply_allowed_token_ids(logits: Tensor, allowed_token_ids: Sequence[Sequence[int] | None]) -> Tensor:
    """Keeps only the allowed tokens of each row; None allows all. ``[num_rows, vocab_size]`` in and out."""
    keep = torch.zeros_like(logits, dtype=torch.bool)
    keep[[row for row, allowed in enumerate(allowed_token_ids) if allowed is None]] = True
    keep[_places([allowed or [] for allowed in allowed_token_ids], logits)] = True
    return logits.masked_fill(~keep, -torch.inf)


def ban_tokens(logits: Tensor, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Removes the given tokens of each row. ``[num_rows, vocab_size]`` in and out."""
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[_places(token_ids, logits)] = True
    return logits.masked_fill(banned, -torch.inf)


def find_bad_word_ends(bad_words_token_ids: Sequence[Sequence[int]], output_token_ids: Sequence[int]) -> list[int]:
    """The tokens that would complete a bad word, given the output so far."""
    output = list(output_token_ids)
    return [
        word[-1]
        for word in bad_words_token_ids
        if 0 < len(word) <= len(output) + 1 and output[len(output) - len(word) + 1 :] == list(word[:-1])
    ]


def apply_logit_bias(logits: Tensor, logit_bias: Sequence[dict[int, float] | None]) -> Tensor:
    """Adds each row's biases to its logits. ``[num_rows, vocab_size]`` in and out."""
    biases = [bias or {} for bias in logit_bias]
    rows, columns = _places([list(bias) for bias in biases], logits)
    values = [value for bias in biases for value in bias.values()]
    added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits.index_put((rows, columns), added, accumulate=True)


def apply_penalties(
    logits: Tensor,
    prompt_token_ids: Sequence[Sequence[int]],
    output_token_ids: Sequence[Sequence[int]],
    repetition_penalties: Sequence[float],
    frequency_penalties: Sequence[float],
    presence_penalties: Sequence[float],
) -> Tensor:
    """Makes tokens that were used less likely. ``[num_rows, vocab_size]`` in and out.

    Repetition looks at prompt and output, and divides positive logits and multiplies negative ones (Keskar et al.
    2019). Frequency and presence look at the output alone and subtract, once for each use and once for any.
    """
    counts = torch.zeros_like(logits)
    rows, columns = _places(output_token_ids, logits)
    counts.index_put_((rows, columns), torch.ones_like(rows, dtype=logits.dtype), accumulate=True)
    used = counts > 0
    used_anywhere = used.clone()
    used_anywhere[_places(prompt_token_ids, logits)] = True

    repetition = _per_row(repetition_penalties, logits).clamp(_TINY, _HUGE)
    # Beyond the largest float a logit would be infinite: inf - inf is not a number, and -inf removes a token.
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition).clamp_(-_HUGE, _HUGE)
    logits = torch.where(used_anywhere.logical_and_(logits.abs() < torch.inf), scaled, logits)
    return logits - _per_row(frequency_penalties, logits) * counts - _per_row(presence_penalties, logits) * used


def apply_temperature(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Divides each row by its temperature, after moving its largest logit to 0. ``[num_rows, vocab_size]`` in and out.

    The move changes no probability, and keeps tiny temperatures from overflowing.
    """
    temperature = _per_row(temperatures, logits).clamp(_TINY, _HUGE)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def apply_min_p(logits: Tensor, min_p: Sequence[float]) -> Tensor:
    """Keeps tokens at least ``min_p`` times as likely as the likeliest. ``[num_rows, vocab_size]`` in and out."""
    # p >= min_p * p_max is logit >= logit_max + log(min_p): no softmax needed.
    threshold = logits.amax(dim=-1, keepdim=True) + _per_row(min_p, logits).log()
    return logits.masked_fill(logits < threshold, -torch.inf)


def apply_top_k(logits: Tensor, top_k: Sequence[int]) -> Tensor:
    """Keeps the ``top_k`` likeliest tokens and those as likely as the last of them; -1 keeps all.

    ``[num_rows, vocab_size]`` in and out.
    """
    vocab_size = logits.shape[-1]
    limits = [k if 0 < k < vocab_size else 0 for k in top_k]  # 0: nothing to remove
    if not any(limits):
        return logits
    k = torch.tensor(limits, dtype=torch.long, device=logits.device).unsqueeze(1)
    likeliest = logits.topk(max(limits), dim=-1).values
    threshold = likeliest.gather(1, (k - 1).clamp(min=0)).masked_fill(k == 0, -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def apply_top_p(logits: Tensor, top_p: Sequence[float]) -> Tensor:
    """Keeps the likeliest tokens until their probabilities reach ``top_p``, the one that reaches it included.

    Tokens exactly as likely as that one stay too, so what is kept does not depend on how a sort breaks ties.
    ``[num_rows, vocab_size]`` in and out.
    """
    p = _per_row(top_p, logits)
    everything = p >= 1
    goal = p.masked_fill(everything, 0)
    probs = logits.softmax(dim=-1)
    width, vocab_size = min(TOP_P_FIRST_TRY, logits.shape[-1]), logits.shape[-1]
    likeliest = probs.topk(width, dim=-1).values
    reached = likeliest.cumsum(dim=-1) >= goal
    if width < vocab_size and not reached[:, -1].all():
        likeliest = probs.sort(dim=-1, descending=True).values
        reached = likeliest.cumsum(dim=-1) >= goal
    first_reached = (~reached).sum(dim=-1, keepdim=True).clamp(max=likeliest.shape[-1] - 1)
    keep = (probs >= likeliest.gather(1, first_reached)) | everything
    return logits.masked_fill(~keep, -torch.inf)


def draw(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token where each row's cumulative distribution first exceeds its uniform number.

    Args:
        probs: ``[num_rows, vocab_size]``; rows need not sum to exactly 1.
        uniforms: one number in [0, 1) per row.

    Returns:
        token ids ``[num_rows]``; never one of probability 0.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    u = torch.tensor(uniforms, dtype=torch.float64, device=probs.device).unsqueeze(1)
    return torch.searchsorted(cumulative, u * total, right=True).squeeze(1)


def gather_logprobs(
    logprobs: Tensor,
    token_ids: Sequence[int],
    num_logprobs: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    contexts: Sequence[Sequence[int]] | None = None,
) -> list[dict[int, Logprob]]:
    """Per row, the log probabilities of its token and of the likeliest ones, in vLLM's format, its token first.

    It waits for the GPU twice, for any number of rows and whatever they ask for.

    Args:
        logprobs: ``[num_rows, vocab_size]``, raw.
        token_ids: the token of each row.
        num_logprobs: how many of the likeliest each row asks for; -1: the whole vocabulary.
        tokenizer: fills in ``decoded_token``.
        contexts: the tokens before each row's, for `decode_token`; nothing comes before when left out.
    """
    if not token_ids:
        return []
    chosen = torch.tensor(token_ids, dtype=torch.long, device=logprobs.device).unsqueeze(1)
    chosen_logprobs = logprobs.gather(1, chosen)
    # Row by row a CPU counts thirty times as fast as along a dimension.
    values, indices = [chosen_logprobs], [row.count_nonzero() for row in logprobs > chosen_logprobs]
    rows_by_limit = _group_by_limit(num_logprobs, logprobs.shape[-1])
    for limit, rows in rows_by_limit.items():
        likeliest = (logprobs if len(rows) == len(logprobs) else logprobs[rows]).topk(limit, dim=-1)
        values.append(likeliest.values)
        indices.append(likeliest.indices)

    # These two copies bring over everything from the device; it is split in the order it was joined.
    next_values, next_indices = (iter(torch.cat([x.flatten() for x in parts]).tolist()) for parts in (values, indices))
    found = [
        {token_id: Logprob(value, num_likelier + 1)}
        for token_id, value, num_likelier in zip(token_ids, next_values, next_indices)
    ]
    for limit, rows in rows_by_limit.items():
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
        scores = self.apply_constraints(logits, metadata)
        token_ids = self._choose(scores, metadata)
        return SamplerOutput(token_ids, self._logprobs(logits, token_ids, metadata))

    def sample(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Chooses one token for each row where that is possible; for the others ``errors`` has the reason.

        A row that cannot be sampled changes nothing for the others: same tokens, same random numbers.

        Args:
            logits: ``[num_rows, vocab_size]``, any float dtype.
            metadata: one entry a row.

        Raises:
            ValueError: if there is not one row of logits for each entry.
        """
        errors: dict[int, str] = {}
        _check_shape(logits, metadata)
        try:
            scores = self._constrain(logits, metadata)
        except ValueError:
            scores = self._constrain_one_by_one(logits, metadata, errors)
        for row, reason in _find_unusable_rows(scores):
            errors.setdefault(row, f"the request {reason}")
        if errors:
            scores = scores.index_fill(0, torch.tensor(list(errors), dtype=torch.long, device=scores.device), 0.0)
        token_ids = self._choose(scores, metadata)
        return SamplerOutput(token_ids, self._logprobs(logits, token_ids, metadata, errors), errors)

    def compute_probs(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        """The distribution each row's token is drawn from, ``[num_rows, vocab_size]``; one-hot for greedy rows."""
        scores = self.apply_constraints(logits, metadata)
        probs = truncate(scores, metadata.params).softmax(dim=-1)
        greedy = [row for row, p in enumerate(metadata.params) if p.sampling_type is SamplingType.GREEDY]
        probs[greedy] = torch.nn.functional.one_hot(scores[greedy].argmax(dim=-1), scores.shape[-1]).to(probs)
        return probs

    def apply_constraints(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        """The stages for greedy and random rows alike: allowed tokens, bad words, min_tokens, bias, penalties.

        ``[num_rows, vocab_size]`` in and out, float32. A stage that no row asks for is skipped.

        Raises:
            ValueError: as for a call of the sampler.
        """
        _check_shape(logits, metadata)
        scores = self._constrain(logits, metadata)
        for row, reason in _find_unusable_rows(scores):
            raise ValueError(f"row {row} {reason}")
        return scores

    def _constrain(self, logits: Tensor, metadata: SamplingMetadata) -> Tensor:
        """`apply_constraints` without a look at what is left."""
        params, outputs = metadata.params, metadata.output_token_ids
        logits = logits.float()
        if any(p.allowed_token_ids is not None for p in params):
            logits = apply_allowed_token_ids(logits, [p.allowed_token_ids for p in params])
        banned = [self._banned(p, output, logits.shape[-1]) for p, output in zip(params, outputs)]
        if any(banned):
            logits = ban_tokens(logits, banned)
        if any(p.logit_bias for p in params):
            logits = apply_logit_bias(logits, [p.logit_bias for p in params])
        penalized = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1, 0, 0) for p in params]
        if any(penalized):
            logits = apply_penalties(
                logits,
                [ids if p.repetition_penalty != 1 else [] for p, ids in zip(params, metadata.prompt_token_ids)],
                [ids if asked else [] for asked, ids in zip(penalized, outputs)],
                [p.repetition_penalty for p in params],
                [p.frequency_penalty for p in params],
                [p.presence_penalty for p in params],
            )
        return logits

    def _constrain_one_by_one(self, logits: Tensor, metadata: SamplingMetadata, errors: dict[int, str]) -> Tensor:
        """`_constrain` when it fails for some row: tells ``errors`` which rows, and leaves those as they are."""
        scores = []
        for row, params in enumerate(metadata.params):
            prompt, output = metadata.prompt_token_ids[row], metadata.output_token_ids[row]
            alone = SamplingMetadata([params], [prompt], [output], [metadata.generators[row]])
            scores.append(logits[row : row + 1].float())
            try:
                scores[row] = self._constrain(scores[row], alone)
            except _RowError as error:
                errors[row] = f"the request {error.reason}"
            except ValueError as error:
                errors[row] = str(error)
        return torch.cat(scores)

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

    def _choose(self, scores: Tensor, metadata: SamplingMetadata) -> list[int]:
        """The likeliest token of greedy rows, a drawn one for the others."""
        rows = [row for row, p in enumerate(metadata.params) if p.sampling_type is SamplingType.RANDOM]
        if not rows:
            return scores.argmax(dim=-1).tolist()
        random_scores = scores if len(rows) == len(scores) else scores[rows]
        probs = truncate(random_scores, [metadata.params[row] for row in rows]).softmax(dim=-1)
        drawn = draw(probs, [metadata.generators[row].random() for row in rows])
        if len(rows) == len(scores):
            return drawn.tolist()
        token_ids = scores.argmax(dim=-1)
        token_ids[rows] = drawn
        return token_ids.tolist()

    def _logprobs(
        self, logits: Tensor, token_ids: list[int], metadata: SamplingMetadata, errors: Container[int] = ()
    ) -> list[dict[int, Logprob] | None]:
        """The log probabilities that each row asks for, from the raw logits."""
        params = metadata.params
        rows = [
            row for row, p in enumerate(params) if (p.logprobs is not None or p.best_of != p.n) and row not in errors
        ]
        found: list[dict[int, Logprob] | None] = [None] * len(params)
        if rows:
            texts = [(metadata.prompt_token_ids[row], metadata.output_token_ids[row]) for row in rows]
            logprobs_of_rows = gather_logprobs(
                (logits if len(rows) == len(logits) else logits[rows]).float().log_softmax(dim=-1),
                [token_ids[row] for row in rows],
                [params[row].logprobs or 0 for row in rows],
                self.tokenizer,
                [[*prompt[-NUM_CONTEXT_TOKENS:], *output[-NUM_CONTEXT_TOKENS:]] for prompt, output in texts],
            )
            for row, logprobs in zip(rows, logprobs_of_rows):
                found[row] = logprobs
        return found


def _check_shape(logits: Tensor, metadata: SamplingMetadata) -> None:
    """One row of logits for each row of metadata."""
    num_rows = len(metadata.params)
    if logits.ndim != 2 or len(logits) != num_rows:
        raise ValueError(f"logits must be [{num_rows}, vocab_size], one row per SamplingParams, got {[*logits.shape]}")


def _find_unusable_rows(scores: Tensor) -> Iterator[tuple[int, str]]:
    """The rows that have no token left, or whose logits are not numbers, and why."""
    for row, largest in enumerate(scores.amax(dim=-1).tolist()):
        if largest == -torch.inf:
            yield (row, "has no token left: allowed_token_ids, bad_words and min_tokens remove all")
        elif not math.isfinite(largest):
            yield (row, f"has a logit of {largest}: the forward pass went wrong, or logit_bias did")


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The stages for random rows: temperature, min-p, top-k, top-p. ``[num_rows, vocab_size]`` in and out.

    A greedy row's temperature counts as 1 here.
    """
    logits = apply_temperature(logits, [p.temperature or 1.0 for p in params])
    if any(p.min_p > 0 for p in params):
        logits = apply_min_p(logits, [p.min_p for p in params])
    logits = apply_top_k(logits, [p.top_k for p in params])
    if any(p.top_p < 1 for p in params):
        logits = apply_top_p(logits, [p.top_p for p in params])
    return logits
