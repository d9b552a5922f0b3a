"""A pretend CUDA graph: operations recorded with their tensors, and done again on those very tensors.

Like a CUDA graph it knows addresses and no Python: what `work` reads from attributes, decides or counts is fixed when
it is recorded. And like capturing, recording changes no tensor: what was written is put back.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.device_tensors import PretendTensor


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.before.append((value, value.clone()))
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found

    def put_back(self) -> None:
        for tensor, before in reversed(self.before):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _address(old) != _address(new):
                    old.copy_(new)


def _address(tensor: Tensor) -> int:
    return (tensor.inner if isinstance(tensor, PretendTensor) else tensor).data_ptr()


class PretendCapture:
    """A `Capture`; `made` and `replayed` count graphs and their launches.

    Args:
        fails_at: raise at this graph, as CUDA does where a kernel cannot be captured.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.made, self.replayed = fails_at, 0, 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.made += 1
        with _Tape() as tape:
            result = work()
        tape.put_back()
        if self.made == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, result
