"""The forward pass: tokens in, logits out, for Qwen3, Qwen2 and Llama. Chapter 6 is about this module.

The three are one network with three switches (a bias in the projections, a norm on queries and keys, a scaling of the
rotary frequencies), so they are one class. It computes a flat batch: the tokens of all sequences of a step in one row,
without padding. Only attention needs to know which token belongs to which sequence, and that is `folovllm.attention`'s
subject. Queries, keys and values are one matrix product, and so are the MLP's gate and up. As in vLLM
(``vllm/model_executor/models/qwen3.py``, ``llama.py``, 0.33.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.attention import KernelBackend
from folovllm.model import fused
from folovllm.model.checkpoint import (
    Checkpoint,
    ModelLoadError,
    check_room,
    check_shapes,
    iterate_weights,
    missing_weights,
)
from folovllm.model.layers import Linear, LinearBase, LinearMethod, Place, RMSNorm
from folovllm.model.quantized_layers import linear_method
from folovllm.utils import without_autocast

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
"""The model classes of a checkpoint's config that this module can run, and the ``model_type`` of each."""

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""Layer, queries ``[num_tokens, num_heads, head_dim]``, keys and then values ``[num_tokens, 2 * num_kv_heads,
head_dim]`` -> outputs ``[num_tokens, num_heads * head_dim]``."""


def _read_rope(hf_config: Any) -> dict[str, Any]:
    """``rope_parameters`` of a config, with its type.

    Raises:
        ModelLoadError: if this module does not have such a RoPE.
    """
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelLoadError(f"the engine has one RoPE for all layers, and the config has one for each of {[*rope]}")
    rope_type = rope.setdefault("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3"):
        raise ModelLoadError(f"the engine has no RoPE of type {rope_type!r}; it has default, linear and llama3")
    return rope


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, under the engine's own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    """``rope_type`` and its numbers; "default", "linear" and "llama3" are known."""
    qkv_bias: bool
    """Whether the projections to queries, keys and values have a bias (Qwen2)."""
    output_bias: bool
    """Whether attention's output projection has one."""
    qk_norm: bool
    """Whether each query and key head is normalized before it is rotated (Qwen3)."""
    tie_word_embeddings: bool

    @property
    def num_multiplied(self) -> int:
        """Weights that each token is multiplied by: those of all matrices, without norms, biases and the embedding."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        per_layer = self.hidden_size * (attention + 3 * self.intermediate_size)
        return self.num_layers * per_layer + self.vocab_size * self.hidden_size

    @classmethod
    def from_hf(cls, hf_config: Any) -> DecoderConfig:
        """Reads transformers' config of a checkpoint.

        Raises:
            ModelLoadError: if it names an architecture, an activation or a RoPE that this module does not have.
        """
        architecture = (hf_config.architectures or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise ModelLoadError(f"the engine has no architecture {architecture}; it has {', '.join(ARCHITECTURES)}")
        if hf_config.model_type != ARCHITECTURES[architecture]:
            raise ModelLoadError(
                f"the config's model_type {hf_config.model_type!r} does not belong to its architecture {architecture}; "
                "take it from the checkpoint again"
            )
        rope = _read_rope(hf_config)
        unknown = {
            "hidden_act": hf_config.hidden_act != "silu",
            "mlp_bias": getattr(hf_config, "mlp_bias", False),
            "use_sliding_window": getattr(hf_config, "use_sliding_window", False),
            "layer_types": set(getattr(hf_config, "layer_types", None) or ()) - {"full_attention"},
        }
        for name, is_unknown in unknown.items():
            if is_unknown:
                raise ModelLoadError(f"the engine cannot run {name}={getattr(hf_config, name)!r} of {architecture}")
        bias = architecture != "Qwen2ForCausalLM" and getattr(hf_config, "attention_bias", False)
        num_heads = hf_config.num_attention_heads
        return cls(
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            num_layers=hf_config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=hf_config.num_key_value_heads or num_heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
            rms_norm_eps=hf_config.rms_norm_eps,
            rope_theta=rope.get("rope_theta", 10_000.0),
            rope_scaling=rope,
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            output_bias=bias,
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=hf_config.tie_word_embeddings,
        )


def rotary_frequencies(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far each pair of a head's numbers turns from one position to the next, in radians: ``[head_dim / 2]``.

    Computed in ``dtype``. Su et al. 2021; with "llama3" the slow ones are slowed further, so that a model reads more
    than it was trained on.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device="cpu") / config.head_dim
    frequencies = config.rope_theta**-exponent
    rope = config.rope_scaling
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the trained context
        share = ((turns - low) / (high - low)).clamp(0, 1)  # 0: a slow one, 1: a fast one, which stays as it is
        return share * frequencies + (1 - share) * frequencies / rope["factor"]
    return frequencies


class DecoderLayer:
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int, method: LinearMethod) -> None:
        self.index, eps = index, config.rms_norm_eps
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, inner, at, empty = config.hidden_size, config.intermediate_size, f"model.layers.{index}", method.empty
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(empty(hidden), eps), RMSNorm(empty(hidden), eps)
        qkv = {f"{at}.self_attn.{name}_proj": size for name, size in zip("qkv", [q_size, kv_size, kv_size])}
        self.qkv_proj = method.create(qkv, hidden, config.qkv_bias)
        qk_shape = config.num_heads + config.num_kv_heads, config.head_dim
        self.qk_norm = RMSNorm(empty(*qk_shape), eps) if config.qk_norm else None
        self.o_proj = method.create({f"{at}.self_attn.o_proj": hidden}, q_size, config.output_bias)
        self.gate_up_proj = method.create({f"{at}.mlp.gate_proj": inner, f"{at}.mlp.up_proj": inner}, hidden)
        self.down_proj = method.create({f"{at}.mlp.down_proj": hidden}, inner)

    @property
    def linears(self) -> tuple[LinearBase, ...]:
        """Its products."""
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    @property
    def norms(self) -> list[RMSNorm]:
        """Its norms."""
        return [
            norm for norm in (self.input_layernorm, self.qk_norm, self.post_attention_layernorm) if norm is not None
        ]

    def process_weights_after_loading(self) -> None:
        """Prepares its weights for use."""
        for norm in self.norms:
            norm.process_weights_after_loading()
        for linear in self.linears:
            linear.process_weights_after_loading()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """``x`` and the result ``[num_tokens, hidden_size]``; ``cos``, ``sin`` ``[num_tokens, 1, head_dim]``.

        ``rows`` are the tokens whose result is wanted; None: all.
        """
        attended = self._attention(self.input_layernorm(x), cos, sin, attend)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = x + self.o_proj(attended)
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate).mul_(up))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        qkv: Tensor = self.qkv_proj(x).unflatten(1, (-1, self.head_dim))
        rotated = qkv[:, : self.num_heads + self.num_kv_heads]
        qk = rotated if self.qk_norm is None else self.qk_norm(rotated)
        # A pair is a number of the first half and one of the second; sin carries the sign of the first. `roll` would
        # swap them as well, but as torch compiles it each number is fetched by itself.
        first, second = qk.chunk(2, dim=-1)
        torch.addcmul(qk * cos, torch.cat([second, first], dim=-1), sin, out=rotated)
        return attend(self.index, qkv[:, : self.num_heads], qkv[:, self.num_heads :])


class Decoder:
    """A decoder-only transformer over flat batches.

    Args:
        config: its shape.
        num_positions: the longest sequence in tokens; the rotary tables have a row for each position.
        dtype: of weights and activations.
        device: where they are.
        method: what makes its products; None: products with weights of floats.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        method: LinearMethod | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        method = method or LinearMethod(dtype, self.device)
        self.embedding = method.empty(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, method) for i in range(config.num_layers)]
        self.norm = RMSNorm(method.empty(config.hidden_size), config.rms_norm_eps)
        self.head = method.create_head({"lm_head": config.vocab_size}, self.embedding, config.tie_word_embeddings)
        self._is_embedding = isinstance(self.head, Linear) and self.head.weight is self.embedding
        self._copies_embedding = self._is_embedding and method.packs_floats
        self._has_fused = False
        wide = torch.promote_types(dtype, torch.float32)
        positions = torch.arange(num_positions, dtype=wide, device="cpu")
        angles = torch.outer(positions, rotary_frequencies(config, wide))
        self.cos = angles.cos().repeat(1, 2).to(device, dtype).unsqueeze(1)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(device, dtype).unsqueeze(1)

    def __call__(self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """The last hidden state of every token, or of some.

        Of the others nobody reads what the last layer makes of them behind its attention, so that is not computed.

        Args:
            input_ids: ``[num_tokens]``, the new tokens of all sequences of the step, one after the other.
            positions: ``[num_tokens]``, the place of each in its own sequence.
            attend: attention over the cache.
            rows: the places of those in the batch, int64 ``[num_rows]``, at least one; None: every token.

        Returns:
            ``[num_rows, hidden_size]``.
        """
        if self._has_fused and isinstance(attend, KernelBackend):
            return self._run_fused(F.embedding(input_ids, self.embedding), positions, attend, rows)
        x, cos, sin = self.embed(input_ids, positions)
        for layer in self.layers[:-1]:
            x = layer(x, cos, sin, attend)
        return self.finish(x, cos, sin, attend, rows)

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first `DecoderLayer` is given: ``x``, ``cos`` and ``sin``."""
        return F.embedding(input_ids, self.embedding), self.cos[positions], self.sin[positions]

    def finish(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """What the last `DecoderLayer` and the last norm make of what the others have made."""
        return self.norm(self.layers[-1](x, cos, sin, attend, rows))

    def _run_fused(self, residual: Tensor, positions: Tensor, attend: KernelBackend, rows: Tensor | None) -> Tensor:
        """What all `DecoderLayer` and the last norm do, in fewer kernels: each norm adds what came before it first."""
        slot_mapping, x = attend.metadata.slot_mapping, None
        for layer in self.layers:
            norm, qk_weight = layer.input_layernorm, None if layer.qk_norm is None else layer.qk_norm.weight
            qkv = layer.qkv_proj(fused.add_rms_norm(residual, x, norm.weight, norm.eps))
            q = fused.rotate_and_write(
                qkv.view(len(qkv), -1, layer.head_dim), qk_weight, norm.eps,
                self.cos, self.sin, positions, attend.slots(layer.index), slot_mapping,
            )  # fmt: skip
            attended, norm = attend.read(layer.index, q), layer.post_attention_layernorm
            if rows is not None and layer is self.layers[-1]:
                residual, attended = residual[rows], attended[rows]
            x = layer.o_proj(attended)
            gate_up = layer.gate_up_proj(fused.add_rms_norm(residual, x, norm.weight, norm.eps))
            x = layer.down_proj(fused.silu_and_mul(gate_up))
        return fused.add_rms_norm(residual, x, self.norm.weight, self.norm.eps)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[num_rows, hidden_size]`` to ``[num_rows, vocab_size]``."""
        return self.head(hidden)

    def process_weights_after_loading(self) -> None:
        """Prepares all weights for use; see `folovllm.model.layers`. No weight can be loaded after it."""
        for layer in self.layers:
            layer.process_weights_after_loading()
        self.norm.process_weights_after_loading()
        self.head.process_weights_after_loading()  # copies a tied weight: the embedding needs it unpacked
        self._has_fused = fused.is_available(self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies a checkpoint's tensors, by their names in transformers, into the fused ones here.

        Raises:
            ModelLoadError: if one is unknown.
        """
        places = self._places()
        for name, tensor in weights:
            if name in places:
                places[name].copy_(tensor)
            else:
                self.leave_out(name, tensor)

    def leave_out(self, name: str, tensor: Tensor) -> None:
        """Refuses a tensor that the model has no place for, unless nothing is lost without it.

        Raises:
            ModelLoadError: if it is no tied head and no bias of zeros, which some quantizers give every module.
        """
        is_tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        if not is_tied and (not name.endswith(".bias") or tensor.any()):
            raise ModelLoadError(
                f"the checkpoint has a weight {name}, which the model that its config describes does not know; take "
                "config and weights from the same checkpoint"
            )

    @property
    def linears(self) -> list[LinearBase]:
        """All its products, the head last."""
        return [*(linear for layer in self.layers for linear in layer.linears), self.head]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as they are held, once they are loaded."""
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        is_shared = self._is_embedding and not self._copies_embedding
        return (
            self.embedding.nbytes
            + sum(norm.weight.nbytes for norm in norms)
            + sum(linear.num_bytes for linear in self.linears[: -1 if is_shared else None])
        )

    @property
    def num_bytes_to_load(self) -> int:
        """Bytes that are taken while the weights are loaded; afterwards `num_bytes` of them are."""
        linears = self.linears[: -1 if self._is_embedding else None]  # the copy of an embedding stays
        return self.num_bytes + max(linear.num_bytes_meanwhile for linear in linears)

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights, in however few bits they are held; tied ones are counted once."""
        in_floats = Decoder(self.config, 0, self.dtype, "meta")
        return sum(math.prod(shape) for shape in in_floats.weight_shapes().values())

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a checkpoint's tensors, by their names in transformers."""
        # One norm serves all heads of a layer; here each head has its copy.
        is_shared = re.compile(r"[qk]_norm\.weight$").search
        return {name: (*place.shape[1 if is_shared(name) else 0 :],) for name, place in self._places().items()}

    def _places(self) -> dict[str, Place]:
        """Where each tensor of a checkpoint goes, by its name there."""
        places: dict[str, Place] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
            **self.head.places(),
        }
        for i, layer in enumerate(self.layers):
            norms = {
                "input_layernorm": layer.input_layernorm.weight,
                "post_attention_layernorm": layer.post_attention_layernorm.weight,
            }
            if layer.qk_norm is not None:
                q_norm, k_norm = layer.qk_norm.weight.split([layer.num_heads, layer.num_kv_heads])
                norms |= {"self_attn.q_norm": q_norm, "self_attn.k_norm": k_norm}
            places |= {f"model.layers.{i}.{name}.weight": weight for name, weight in norms.items()}
            for linear in layer.linears:
                places |= linear.places()
        return places


@without_autocast()
def load_decoder(checkpoint: Checkpoint) -> Decoder:
    """The decoder of an opened checkpoint, with its weights, on its device.

    Raises:
        ModelLoadError: if the engine has no such architecture, or config and weights do not belong together.
    """
    empty, int8 = make_empty_decoder(checkpoint), "" if checkpoint.quantization else "quantization='int8', "
    num_positions, dtype, device = checkpoint.max_model_len, checkpoint.dtype, checkpoint.device
    check_room(
        f"the weights of {checkpoint.folder} and its rotary tables for {num_positions:,} positions",
        empty.num_bytes_to_load + 2 * num_positions * empty.config.head_dim * dtype.itemsize,
        device,
        f"choose a 16-bit dtype, {int8}a smaller model, or a lower max_model_len",
    )
    decoder = Decoder(empty.config, num_positions, dtype, device, linear_method(checkpoint, device))
    decoder.load_weights(iterate_weights(checkpoint))
    decoder.process_weights_after_loading()
    return decoder


def make_empty_decoder(checkpoint: Checkpoint) -> Decoder:
    """An opened checkpoint's decoder without its numbers, to which all its weights belong; none of them is read.

    Raises:
        ModelLoadError: if the engine has no such architecture, or config and weights do not belong together.
    """
    config, meta = DecoderConfig.from_hf(checkpoint.hf_config), torch.device("meta")  # nothing is allocated there
    decoder = Decoder(config, 0, checkpoint.dtype, meta, linear_method(checkpoint, meta))
    shapes = decoder.weight_shapes()
    check_shapes(checkpoint, shapes, sum(math.prod(shape) for shape in shapes.values()))
    if missing := sorted(shapes.keys() - checkpoint.headers.keys()):
        raise missing_weights(checkpoint.folder, missing)
    return decoder
