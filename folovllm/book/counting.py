"""Operations of torch, counted instead of timed: how many a step asks for, who asks, and what they copy. Chapter 14."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "resize_", "detach")
"""Operations that compute nothing besides those that make a view: on a GPU they launch no kernel."""

GATHERS = ("index", "index_select", "gather", "take")
"""Operations that bring numbers from many places together in a new one."""


@dataclass(frozen=True)
class Operation:
    """One operation that computes something."""

    name: str
    """As torch calls it, without ``aten.`` before it: ``mm``."""
    part: str
    """The function of the engine that asked for it, with its class: ``RMSNorm.__call__``."""
    num_bytes: int
    """Of its result."""


class OperationCounter(TorchDispatchMode):
    """Writes down every operation of torch while it is active: ``with OperationCounter() as counter: …``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs one operation, and writes it down if it computes something."""
        kwargs = kwargs or {}
        with self:  # without autograd some operations arrive whole that are made of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            made = result if isinstance(result, (tuple, list)) else [result]
            num_bytes = sum(part.nbytes for part in made if isinstance(part, Tensor))
            self.operations.append(Operation(name, _who_asks(), num_bytes))
        return result

    @property
    def by_part(self) -> Counter[str]:
        """How many operations each class of the engine asked for, or each function outside of a class."""
        return Counter(operation.part.split(".")[0] for operation in self.operations)

    @property
    def bytes_gathered(self) -> int:
        """Bytes of all copies that bring numbers from many places together."""
        return sum(operation.num_bytes for operation in self.operations if operation.name in GATHERS)


def _who_asks() -> str:
    """The innermost function of the engine, or of a notebook, that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        is_ours = (module.startswith("folovllm.") and module != __name__) or module == "__main__"
        if is_ours and not name.startswith("<"):  # a comprehension is part of a function
            owner = frame.f_locals.get("self")
            return name if owner is None else f"{type(owner).__name__}.{name}"
        frame = frame.f_back
    return "torch"
