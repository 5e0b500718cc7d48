"""How long a step takes: bytes over bandwidth, or arithmetic over its peak, and what is lost besides. Chapter 7.

Weights are read once per step, however many sequences it has, and every sequence reads keys and values of its own.
So a step takes::

    attention + max(weight bytes / bandwidth, FLOPs / peak) + all-reduces + host

which are two terms, never one maximum: a full batch can be limited by arithmetic in its matrix products and by the
bandwidth in its attention (Austin et al. 2025, "How to Scale Your Model", chapter 7). `Gpu` has data sheets only; what
of them is reached stands apart, in `Efficiency`, each factor with its source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from folovllm.model.quantization import NUM_BITS, read_quantization
from folovllm.validation import check_int, check_number, require

QUANTIZATION_GROUP = 128
"""Weights of fewer than 16 bits share a scale of 16 bits in groups of this size."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of networks that a token may be sent to."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: all that its cost depends on."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_model_len: int
    """The most tokens that the model was made for."""
    weight_bits: int = 16
    """Bits of a weight in the layers; embedding and head keep 16 where these are fewer."""

    @classmethod
    def from_config(cls, folder: str | Path) -> ModelShape:
        """The shape in a checkpoint's ``config.json``, with 4 bits per weight if its files have 4, else with 16.

        Raises:
            ValueError: if there is no such file, a size in it is missing or no positive integer, the model is a mixture
                of experts, or its weights are quantized in a way that the engine does not know.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as JSON ({error}); give the folder of a checkpoint") from None
        raw = raw if isinstance(raw, dict) else {}
        try:
            weight_bits = 16 if read_quantization(raw) is None else NUM_BITS
        except ValueError as error:
            raise ValueError(f"{path} is of weights for whose steps there is no formula: {error}") from None
        raw = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw

        def size(name: str, default: Any = None) -> int:
            value = check_int(f"{name} in {path}", default if raw.get(name) is None else raw[name])
            require(value > 0, f"{name} in {path} must be positive, got {value}")
            return value

        for name in EXPERTS:
            require(
                not raw.get(name) or size(name) == 1,
                f"{path} is of a mixture of experts ({name} is {raw.get(name)}), for whose steps there is no formula: "
                "take a dense model",
            )
        num_heads = size("num_attention_heads")
        return cls(
            name=Path(folder).resolve().name,
            num_layers=size("num_hidden_layers"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=size("num_key_value_heads", num_heads),
            head_dim=size("head_dim", size("hidden_size") // num_heads),
            vocab_size=size("vocab_size"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_model_len=size("max_position_embeddings", 2048),
            weight_bits=weight_bits,
        )

    @property
    def num_layer_params(self) -> int:
        """Weights in the matrices of all layers."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_head_params(self) -> int:
        """Weights in the head, which makes logits; the embedding has as many."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """Weights in all; the norms, which have some thousands each, are left out."""
        return self.num_layer_params + self.num_head_params * (1 if self.tie_word_embeddings else 2)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that one token keeps in the KV cache, whose numbers have 16 bits."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2

    @property
    def layer_bytes(self) -> float:
        """Bytes of the layers' weights, scales included."""
        scale_bits = 16 / QUANTIZATION_GROUP if self.weight_bits < 16 else 0
        return self.num_layer_params * (self.weight_bits + scale_bits) / 8

    @property
    def head_bytes(self) -> float:
        """Bytes of the head's weights."""
        return self.num_head_params * max(self.weight_bits, 16) / 8

    @property
    def num_bytes(self) -> float:
        """Bytes of all weights in memory, the input embedding included."""
        return self.layer_bytes + self.head_bytes * (1 if self.tie_word_embeddings else 2)

    def with_bits(self, weight_bits: int) -> ModelShape:
        """The same model with weights of so many bits; raises `ValueError` unless they are 1 to 16."""
        require(1 <= check_int("weight_bits", weight_bits) <= 16, f"weight_bits must be 1 to 16, got {weight_bits}")
        return replace(self, weight_bits=weight_bits)


@dataclass(frozen=True)
class Gpu:
    """What a card's data sheet says, per second and in bytes; nobody reaches it."""

    name: str
    flops: float
    """16-bit matrix arithmetic without sparsity, FLOPs per second."""
    bandwidth: float
    """Bytes per second between the card and its memory."""
    memory: float
    """Bytes."""
    link_bandwidth: float
    """Bytes per second to another card, one way."""
    host_bandwidth: float
    """Bytes per second to the CPU's memory, one way."""
    dollars_per_hour: float
    source: str
    """Where the numbers are from."""


@dataclass(frozen=True)
class Efficiency:
    """What of a data sheet is reached, and what a step costs besides.

    No factor was chosen by trying which value fits a card's measurements best. But ``weights`` and ``low_bits`` rest on
    gpt-fast's published figures, of which the second lies between two, so those figures are no test of either.
    """

    arithmetic: float = 0.65
    """Of the peak. The best matrix product reaches 0.80 on an H100 and 0.86 on an A100 (Bekman, "Machine Learning
    Engineering", table of achievable matmul FLOPS); a prefill has other shapes, and norms between them."""
    weights: float = 0.85
    """Of the bandwidth, where weights are read. gpt-fast reads Llama-2-7B at 1,397 of an A100's 2,039 GB/s, all gaps
    between its kernels included (its README); without these 1.5 ms it is 0.81."""
    low_bits: float = 0.80
    """What weights of fewer than 16 bits reach of that: by the same sum gpt-fast's kernels 0.84 with 8 bits and 0.74
    with 4, Marlin nearly all of it up to some 30 tokens per step (Frantar et al. 2024)."""
    kv: float = 0.70
    """Of the bandwidth, where keys and values are read through block tables: a sequence is a small piece of work."""
    attention_layer_s: float = 12e-6
    """The least that attention takes in one layer, in seconds: few tokens reach 5 to 60 % of the bandwidth."""
    link: float = 0.70
    """Of the bandwidth between cards."""
    all_reduce_s: float = 10e-6
    """What one sum over all cards takes at least, in seconds."""
    swap: float = 0.80
    """Of the bandwidth to the CPU's memory."""
    host_s: float = 1.5e-3
    """Seconds per step in which the card waits for Python: scheduling, preparing tensors, launching kernels."""
    reserved_bytes: float = 1.0e9
    """Memory that is neither weights, cache nor activations: CUDA's context and what is captured."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = check_number(each.name, getattr(self, each.name))
            is_share = not each.name.endswith(("_s", "_bytes"))
            require(
                0 < value <= 1 if is_share else value >= 0,
                f"{each.name} must be {'in (0, 1]' if is_share else '0 or more'}, got {value}",
            )

    @classmethod
    def data_sheet(cls) -> Efficiency:
        """All of the data sheet and nothing lost besides: a bound that nobody reaches."""
        return cls(1, 1, 1, 1, 0, 1, 0, 1, 0, 0)


@dataclass(frozen=True)
class StepCost:
    """The seconds of one step, by what they are spent on."""

    linear: float
    """Matrix products: reading weights or doing arithmetic, whichever takes longer."""
    attention: float
    comm: float = 0.0
    """Sums over several cards."""
    host: float = 0.0
    swap: float = 0.0
    """Moving blocks to the CPU's memory and back."""

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.linear + self.attention + self.comm + self.host + self.swap


class Cost(Protocol):
    """Says how long a step takes, and what the machine costs meanwhile."""

    @property
    def dollars_per_hour(self) -> float:
        """Of all cards that take part in a step; 0 if unknown."""
        ...

    def step(
        self, new_tokens: Sequence[int], past_tokens: Sequence[int], rows: int | None = None, swapped_tokens: int = 0
    ) -> StepCost:
        """The cost of a step.

        Args:
            new_tokens: computed, of each sequence.
            past_tokens: in the cache before, of each sequence.
            rows: of logits; None: one per sequence.
            swapped_tokens: whose keys and values are moved to the CPU's memory or back.
        """
        ...


@dataclass(frozen=True)
class Roofline:
    """The formula: what one step of a model takes on a card, or on several that share each layer."""

    shape: ModelShape
    gpu: Gpu
    efficiency: Efficiency = Efficiency()
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        size, num_kv_heads = check_int("tensor_parallel_size", self.tensor_parallel_size), self.shape.num_kv_heads
        require(
            size > 0 and num_kv_heads % size == 0,
            f"tensor_parallel_size must divide the model's {num_kv_heads} key heads, got {size}",
        )

    @property
    def dollars_per_hour(self) -> float:
        """The price of all cards."""
        return self.gpu.dollars_per_hour * self.tensor_parallel_size

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that each card reads per step; of an untied input embedding only rows are looked up."""
        return (self.shape.layer_bytes + self.shape.head_bytes) / self.tensor_parallel_size

    @property
    def ridge(self) -> float:
        """Tokens per step from which arithmetic takes longer than reading the weights."""
        return self._weight_seconds() / self._product_seconds(1, 1)

    def step(
        self, new_tokens: Sequence[int], past_tokens: Sequence[int], rows: int | None = None, swapped_tokens: int = 0
    ) -> StepCost:
        """The cost of a step.

        Args:
            new_tokens: computed, of each sequence.
            past_tokens: in the cache before, of each sequence.
            rows: of logits; None: one per sequence.
            swapped_tokens: whose keys and values are moved to the CPU's memory or back.
        """
        num_tokens = sum(new_tokens)
        rows = len(new_tokens) if rows is None else rows
        return StepCost(
            linear=max(self._weight_seconds(), self._product_seconds(num_tokens, rows)),
            attention=self._attention_seconds(new_tokens, past_tokens),
            comm=self._comm_seconds(num_tokens),
            host=self.efficiency.host_s,
            swap=self.swap_seconds(swapped_tokens),
        )

    def kv_bytes(self, num_tokens: int) -> float:
        """Bytes of the keys and values of so many tokens on each card."""
        return num_tokens * self.shape.kv_token_bytes / self.tensor_parallel_size

    def swap_seconds(self, num_tokens: int) -> float:
        """Seconds for moving the keys and values of so many tokens to the CPU's memory, or back."""
        return self.kv_bytes(num_tokens) / (self.gpu.host_bandwidth * self.efficiency.swap)

    def num_blocks(
        self, block_size: int = 16, gpu_memory_utilization: float = 0.9, max_num_batched_tokens: int = 2048
    ) -> int:
        """KV blocks for which there is room beside weights and activations; 0 if the weights alone do not fit.

        Args:
            block_size: tokens per block.
            gpu_memory_utilization: fraction of the memory that may be used.
            max_num_batched_tokens: tokens of the largest step, whose activations need room.
        """
        shape, size = self.shape, self.tensor_parallel_size
        width = shape.hidden_size + (shape.num_heads * shape.head_dim + 2 * shape.intermediate_size) / size
        activations = 2 * width * max_num_batched_tokens
        room = self.gpu.memory * gpu_memory_utilization - self.efficiency.reserved_bytes
        return max(0, int((room - shape.num_bytes / size - activations) // self.kv_bytes(block_size)))

    def _weight_seconds(self) -> float:
        shape, share = self.shape, self.efficiency.low_bits if self.shape.weight_bits < 16 else 1.0
        read = shape.layer_bytes / share + shape.head_bytes
        return read / (self.gpu.bandwidth * self.efficiency.weights * self.tensor_parallel_size)

    def _product_seconds(self, num_tokens: int, rows: int) -> float:
        """Matrix products: a multiplication and an addition for each weight and token."""
        flops = 2 * (self.shape.num_layer_params * num_tokens + self.shape.num_head_params * rows)
        return flops / (self.gpu.flops * self.efficiency.arithmetic * self.tensor_parallel_size)

    def _attention_seconds(self, new_tokens: Sequence[int], past_tokens: Sequence[int]) -> float:
        """For each sequence reading its keys and values or its arithmetic, whichever takes longer."""
        shape, gpu, efficiency, size = self.shape, self.gpu, self.efficiency, self.tensor_parallel_size
        read = shape.kv_token_bytes / (gpu.bandwidth * efficiency.kv * size)
        # Query times key and probability times value, two FLOPs for each number of each head.
        product = 4 * shape.num_layers * shape.num_heads * shape.head_dim / (gpu.flops * efficiency.arithmetic * size)
        seconds = 0.0
        for new, past in zip(new_tokens, past_tokens):
            if new * product > read:
                seconds += max((past + new) * read, new * (past + (new + 1) / 2) * product)
            else:
                seconds += (past + new) * read
        return max(seconds, shape.num_layers * efficiency.attention_layer_s)

    def _comm_seconds(self, num_tokens: int) -> float:
        """Two sums of the hidden states per layer, around a ring of cards."""
        size = self.tensor_parallel_size
        if size == 1:
            return 0.0
        sent = 2 * (size - 1) / size * num_tokens * self.shape.hidden_size * 2
        once = self.efficiency.all_reduce_s + sent / (self.gpu.link_bandwidth * self.efficiency.link)
        return 2 * self.shape.num_layers * once


@dataclass(frozen=True)
class TimedStep:
    """A step of a real engine: what it computed, of each sequence, and how long it took."""

    new_tokens: list[int]
    past_tokens: list[int]
    rows: int
    seconds: float


@dataclass(frozen=True)
class FittedCost:
    """A cost learned from steps that were timed: a constant, and seconds for each thing that a step is made of."""

    host: float
    token: float
    """Seconds per new token."""
    row: float
    """Seconds per row of logits."""
    read: float
    """Seconds per token whose key and value are read."""
    product: float
    """Seconds per pair of a new token and one that it attends to."""
    dollars_per_hour: float = 0.0

    @classmethod
    def fit(cls, steps: Iterable[TimedStep]) -> FittedCost:
        """The costs with the least squares of relative errors; none of them is negative.

        Raises:
            ValueError: if there are fewer steps than unknowns.
        """
        import numpy as np  # here: whoever fits nothing need not load it

        steps = list(steps)
        wanted = len(fields(cls)) - 1  # all but the price
        require(len(steps) >= wanted, f"steps must be at least {wanted}, got {len(steps)}")
        seconds = np.array([step.seconds for step in steps])
        parts = np.array([_parts(step.new_tokens, step.past_tokens, step.rows) for step in steps])
        scaled = parts / seconds[:, None]
        used = list(range(wanted))
        while True:  # a part that would have to be negative explains nothing: leave it out and fit the others again
            found = np.linalg.lstsq(scaled[:, used], np.ones(len(steps)), rcond=None)[0]
            if found.min() >= 0:
                break
            del used[int(found.argmin())]
        costs = dict(zip(used, found.tolist()))
        return cls(*(costs.get(i, 0.0) for i in range(wanted)))

    def step(
        self, new_tokens: Sequence[int], past_tokens: Sequence[int], rows: int | None = None, swapped_tokens: int = 0
    ) -> StepCost:
        """The cost of a step; arguments are those of `Roofline.step`. Swapping was not timed and costs nothing."""
        rows = len(new_tokens) if rows is None else rows
        _, num_tokens, _, num_read, num_pairs = _parts(new_tokens, past_tokens, rows)
        return StepCost(
            linear=self.token * num_tokens + self.row * rows,
            attention=self.read * num_read + self.product * num_pairs,
            host=self.host,
        )


def _parts(new_tokens: Sequence[int], past_tokens: Sequence[int], rows: int) -> tuple[int, int, int, int, float]:
    """What a step is made of: itself, tokens, rows of logits, tokens that are read, pairs of attention."""
    num_tokens = sum(new_tokens)
    pairs = sum(new * (past + (new + 1) / 2) for new, past in zip(new_tokens, past_tokens))
    return 1, num_tokens, rows, num_tokens + sum(past_tokens), pairs
