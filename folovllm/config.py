"""What the engine is told, before it sees a single request. Chapter 1 is about this module.

`ModelConfig` (which checkpoint, in which numbers), `CacheConfig` (the memory for keys and values), `SchedulerConfig`
(how much work one step may hold), if wanted a `SpeculativeConfig` (how tokens are guessed), and `EngineConfig` (all of
them together). Each checks its own fields when it is made, so a mistake is reported where it was typed. As in vLLM
(``vllm/config/``, 0.33.0), with one dataclass per subject; torch is imported only when a `torch.dtype` is asked for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, cast

from folovllm.utils.html import table
from folovllm.validation import check_bool, check_choice, check_class, check_int, check_number, check_str, require

if TYPE_CHECKING:
    import torch

DTYPES = {
    "auto": None,
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""What ``dtype`` may say, and the name of the `torch.dtype` it means (None: decided when the model is loaded)."""

DEFAULT_PROMPT_LOOKUP = 5
"""Tokens that are looked up where the config does not say, as in vLLM."""

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes."""


def _optional_positive(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    value = check_int(name, value)
    require(value > 0, f"{name} must be positive or None, got {value}")
    return value


@dataclass
class ModelConfig:
    """Which model to load, and how."""

    model: str
    """Name or path of a Hugging Face model."""
    tokenizer: str | None = None
    """Name or path of the tokenizer; None becomes ``model``."""
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    """"auto" takes the fast tokenizer, "slow" the one in Python where there is one."""
    trust_remote_code: bool = False
    """Whether code inside the checkpoint may run on this machine."""
    dtype: str | torch.dtype = "auto"
    """Number format of weights and activations: a name from `DTYPES` or a `torch.dtype`."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and output together; None: taken from the model when it is loaded."""
    seed: int = 0
    """Seed of every random number generator the engine uses."""
    max_logprobs: int = 20
    """Most log probabilities that a request may ask for at each position, since each takes some 200 bytes; -1: any
    number, the whole vocabulary included."""
    attention_backend: Literal["auto", "gather", "sdpa", "triton", "flash"] = "auto"
    """How attention reads the cache; "auto" takes the fastest that can serve on the device."""
    enforce_eager: bool | None = None
    """Whether every step calls its operations one by one. False: on CUDA decode steps are recorded as graphs at the
    start, for each of a few batch sizes; on a CPU all steps are compiled, each kind when it is first needed. None:
    recorded on CUDA, where the attention backend allows it, and eager elsewhere, since compiling takes its time."""
    quantization: Literal["int8", "gptq", "compressed-tensors"] | None = None
    """How weights are kept in fewer bits. None: as the checkpoint has them. "int8": rounded to 8 bits while they are
    loaded. The others read a checkpoint of that kind, with 4 bits, and refuse any other."""

    def __post_init__(self) -> None:
        self.model = check_str("model", self.model)
        self.tokenizer = self.model if self.tokenizer is None else check_str("tokenizer", self.tokenizer)
        check_choice("tokenizer_mode", self.tokenizer_mode, ("auto", "slow"))
        check_bool("trust_remote_code", self.trust_remote_code)
        self._dtype_name()
        self.max_model_len = _optional_positive("max_model_len", self.max_model_len)
        self.seed = check_int("seed", self.seed)
        require(0 <= self.seed <= MAX_SEED, f"seed must be in [0, {MAX_SEED}], got {self.seed}")
        self.max_logprobs = check_int("max_logprobs", self.max_logprobs)
        require(self.max_logprobs >= -1, f"max_logprobs must be 0 or more, or -1 for no limit, got {self.max_logprobs}")
        check_choice("attention_backend", self.attention_backend, ("auto", "gather", "sdpa", "triton", "flash"))
        if self.enforce_eager is not None:
            check_bool("enforce_eager", self.enforce_eager)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, ("int8", "gptq", "compressed-tensors"))

    def _dtype_name(self) -> str | None:
        """Name of the torch dtype that ``dtype`` means, without importing torch for it."""
        torch = sys.modules.get("torch")  # without torch imported, dtype cannot be a torch.dtype
        is_torch_dtype = torch is not None and isinstance(self.dtype, torch.dtype)
        name = str(self.dtype).removeprefix("torch.") if is_torch_dtype else self.dtype
        if not isinstance(name, str) or name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or such a torch.dtype, got {self.dtype!r}")
        return DTYPES[name]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The `torch.dtype` that ``dtype`` names, or None for "auto"."""
        name = self._dtype_name()
        if name is None:
            return None
        import torch

        return cast("torch.dtype", getattr(torch, name))

    def resolve_max_model_len(self, model_max_len: int) -> int:
        """Settles ``max_model_len`` once the checkpoint is known, and returns it.

        Args:
            model_max_len: the most tokens the checkpoint was made for.

        Raises:
            ValueError: if more was asked for than the model has.
        """
        if self.max_model_len is None:
            self.max_model_len = model_max_len
        require(
            self.max_model_len <= model_max_len,
            f"max_model_len must be at most the model's own {model_max_len} tokens, got {self.max_model_len}",
        )
        return self.max_model_len


@dataclass
class CacheConfig:
    """The memory for the keys and values of past tokens."""

    block_size: int = 16
    """Tokens in one KV block."""
    gpu_memory_utilization: float = 0.9
    """Fraction of the GPU's memory the engine may use in all: weights, activations and cache."""
    swap_space: float = 4.0
    """GiB of CPU memory for the blocks of preempted sequences."""
    enable_prefix_caching: bool = False
    """Whether requests with the same beginning share blocks."""
    num_blocks: int | None = None
    """KV blocks; None: as many as ``gpu_memory_utilization`` leaves room for on a GPU, at most 1 GiB on a CPU."""
    kv_cache_manager_cls: type | None = None
    """A class to use in place of `folovllm.core.kv_cache.KVCacheManager`."""

    def __post_init__(self) -> None:
        self.block_size = check_int("block_size", self.block_size)
        require(self.block_size > 0, f"block_size must be positive, got {self.block_size}")
        self.gpu_memory_utilization = check_number("gpu_memory_utilization", self.gpu_memory_utilization)
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}",
        )
        self.swap_space = check_number("swap_space", self.swap_space)
        require(self.swap_space >= 0, f"swap_space must not be negative, got {self.swap_space}")
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        self.num_blocks = _optional_positive("num_blocks", self.num_blocks)
        check_class("kv_cache_manager_cls", self.kv_cache_manager_cls)


@dataclass
class SchedulerConfig:
    """How much work one step of the engine may hold."""

    max_num_batched_tokens: int | None = None
    """Most tokens per step; None: the engine's default."""
    max_num_seqs: int = 256
    """Most sequences per step."""
    max_model_len: int | None = None
    """Longest sequence in tokens; filled in by `EngineConfig`."""
    enable_chunked_prefill: bool = False
    """Whether a long prompt may be spread over several steps."""
    policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of service: "fcfs" by arrival, "priority" by the lowest ``priority``, then by arrival."""
    batching: Literal["continuous", "static"] = "continuous"
    """"continuous" lets a waiting request in as soon as there is room, "static" when all others are done."""
    preemption_mode: Literal["recompute", "swap"] = "recompute"
    """What a preemption does with a sequence's blocks: frees them, to be recomputed, or keeps them in CPU memory."""
    scheduler_reserve_full_isl: bool = True
    """Whether a prompt that is read in chunks is admitted only when there are free blocks for the whole of it."""
    scheduler_cls: type | None = None
    """A class to use in place of `folovllm.core.scheduler.Scheduler`."""

    def __post_init__(self) -> None:
        self.max_num_batched_tokens = _optional_positive("max_num_batched_tokens", self.max_num_batched_tokens)
        self.max_num_seqs = check_int("max_num_seqs", self.max_num_seqs)
        require(self.max_num_seqs > 0, f"max_num_seqs must be positive, got {self.max_num_seqs}")
        self.max_model_len = _optional_positive("max_model_len", self.max_model_len)
        check_bool("enable_chunked_prefill", self.enable_chunked_prefill)
        check_choice("policy", self.policy, ("fcfs", "priority"))
        check_choice("batching", self.batching, ("continuous", "static"))
        check_choice("preemption_mode", self.preemption_mode, ("recompute", "swap"))
        check_bool("scheduler_reserve_full_isl", self.scheduler_reserve_full_isl)
        check_class("scheduler_cls", self.scheduler_cls)


@dataclass
class SpeculativeConfig:
    """How several tokens at once are guessed, to be checked in one pass. Chapter 16."""

    num_speculative_tokens: int
    """Most guesses for a sequence in one step, not counting tokens that its grammar leaves no choice of."""
    method: Literal["ngram", "draft_model"] | None = None
    """"ngram" looks the last tokens up in what the sequence has so far, "draft_model" asks a smaller model; None: the
    model, if one is named."""
    model: str | None = None
    """Name or path of the draft model, which must have the same tokenizer."""
    prompt_lookup_min: int | None = None
    """Fewest tokens that must be found again; None: as many as ``prompt_lookup_max``."""
    prompt_lookup_max: int | None = None
    """Most tokens that are looked up; None: as many as ``prompt_lookup_min``, and 5 if that is None, too."""

    def __post_init__(self) -> None:
        self.num_speculative_tokens = check_int("num_speculative_tokens", self.num_speculative_tokens)
        require(
            self.num_speculative_tokens > 0,
            f"num_speculative_tokens must be positive, got {self.num_speculative_tokens}",
        )
        if self.method is None and self.model is not None:
            self.method = "draft_model"
        check_choice("method", self.method, ("ngram", "draft_model"))
        if self.method == "draft_model":
            self.model = check_str("model", self.model)
        require(self.method != "ngram" or self.model is None, f"method 'ngram' uses no model, got model={self.model!r}")
        least = _optional_positive("prompt_lookup_min", self.prompt_lookup_min)
        most = _optional_positive("prompt_lookup_max", self.prompt_lookup_max)
        self.prompt_lookup_max = most or least or DEFAULT_PROMPT_LOOKUP
        self.prompt_lookup_min = least or self.prompt_lookup_max
        require(
            self.prompt_lookup_min <= self.prompt_lookup_max,
            f"prompt_lookup_min must be at most prompt_lookup_max, got {self.prompt_lookup_min} and "
            f"{self.prompt_lookup_max}",
        )

    @classmethod
    def of(cls, value: SpeculativeConfig | dict[str, Any] | None) -> SpeculativeConfig | None:
        """A config, as it is or as a dict of its fields.

        Raises:
            ValueError: if it is neither, or if the dict has a key that is no field, or not those that it needs.
        """
        if value is None or isinstance(value, SpeculativeConfig):
            return value
        require(isinstance(value, dict), f"speculative_config must be a SpeculativeConfig or a dict, got {value!r}")
        known = [f.name for f in fields(cls)]
        unknown = [str(key) for key in value if key not in known]
        require(not unknown, f"speculative_config has no field {', '.join(unknown)}: its fields are {', '.join(known)}")
        require(
            "num_speculative_tokens" in value, f"speculative_config must have num_speculative_tokens, got {value!r}"
        )
        return cls(**value)


@dataclass
class EngineConfig:
    """Everything the engine is told; only the model has no default."""

    model_config: ModelConfig
    # A factory, not a default object: two engines must never share one.
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative_config: SpeculativeConfig | None = None
    """How tokens are guessed; a dict of its fields becomes one. None: they are not."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("model_config", ModelConfig),
            ("cache_config", CacheConfig),
            ("scheduler_config", SchedulerConfig),
        ):
            value = getattr(self, name)
            require(isinstance(value, kind), f"{name} must be a {kind.__name__}, got {value!r}")
        self.speculative_config = SpeculativeConfig.of(self.speculative_config)
        self._agree_on_max_model_len()

    def _agree_on_max_model_len(self) -> None:
        """Copies ``max_model_len`` between model and scheduler, if only one of them has it."""
        model, scheduler = self.model_config, self.scheduler_config
        if scheduler.max_model_len is None:
            scheduler.max_model_len = model.max_model_len
        if model.max_model_len is None:
            model.max_model_len = scheduler.max_model_len
        require(
            model.max_model_len == scheduler.max_model_len,
            f"max_model_len must be the same for model and scheduler, got {model.max_model_len} and "
            f"{scheduler.max_model_len}; set it on the ModelConfig only",
        )

    def _repr_html_(self) -> str:
        """The settings as tables, one for each part, as a notebook shows them."""
        parts: list[Any] = [self.model_config, self.cache_config, self.scheduler_config, self.speculative_config]
        return "".join(
            table(type(part).__name__, ((f.name, repr(getattr(part, f.name))) for f in fields(part)))
            for part in parts
            if part is not None
        )

    def resolve_max_model_len(self, model_max_len: int) -> int:
        """Settles ``max_model_len`` for model and scheduler once the checkpoint is known, and returns it.

        Args:
            model_max_len: the most tokens the checkpoint was made for (``LoadReport.model_max_len``).

        Raises:
            ValueError: if more was asked for than the model has, or if the two disagree.
        """
        self.model_config.resolve_max_model_len(model_max_len)
        self._agree_on_max_model_len()
        return cast(int, self.model_config.max_model_len)
