"""The tensors of the pretend GPU (`device_support`), their operations, and what they refuse."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
UNDERNEATH = torch.device("meta", 7)
"""What torch's own C++ takes a pretend tensor for: a device without a driver, which nothing else is on."""

COPIES = frozenset({"copy_", "_to_copy"})
INDEXES = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"})
TAKES_CPU_SCALARS = frozenset({"where", "masked_fill", "masked_fill_", "fill", "fill_"})
"""Beside arithmetic, which torch marks by a tag of its own."""

NOT_DETERMINISTIC = frozenset(
    f"aten::{name}"
    for name in ("median.dim", "nanmedian.dim", "kthvalue", "histc", "put_", "put", "nll_loss2d_forward")
)
"""Refused by CUDA under `torch.use_deterministic_algorithms(True)`: its docstring, without `cumsum`, which has been
deterministic since torch had a scan for it (`inclusive_deterministic_scan`)."""

WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"})


class PretendTensor(Tensor):
    """A tensor on the pretend GPU; `inner` holds its numbers."""

    inner: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type, inner: Tensor) -> "PretendTensor":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(False):  # a view of a plain tensor is one, wherever it is taken
            made = Tensor._make_wrapper_subclass(cls, inner.size(), device=UNDERNEATH, **shape)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretendTensor":
        copied = PretendTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner})"

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_as_tensors(index), value)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is None or device.type == GPU.type:
            wanted = self.dtype if dtype is None else dtype
            return self if wanted == self.dtype and not kwargs.get("copy") else super().to(wanted, copy=True)
        return super().to(*args, **kwargs)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().detach().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


def _lists_as_tensors(index: Any) -> Any:
    """Lists in an index as CPU tensors: from a list, C++ would make a tensor without numbers."""
    if isinstance(index, tuple):
        return tuple(map(_lists_as_tensors, index))
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, list) else index


class Waits(Counter[str]):
    """How often the host waited for the device, by operation."""


WAITED = Waits()


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of ATen on tensors of both kinds, as CUDA would take it."""
    name = func._schema.name.partition("::")[2]
    if not _is_for_gpu(func, args, kwargs):
        return func(*args, **kwargs)
    if torch.is_inference_mode_enabled() and func._can_decompose():  # which autograd does elsewhere
        with Kernels():
            return func.decompose(*args, **kwargs)
    inner = {id(leaf.inner): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)}
    device = kwargs.get("device")
    home = device is not None and torch.device(device).type == "cpu"
    _count(name, args, home)
    plain_args, plain = tree_map_only(PretendTensor, lambda tensor: tensor.inner, (args, kwargs))
    if device is not None:
        plain["device"] = torch.device("cpu")
    found = STAND_INS.get(func, func)(*plain_args, **plain)
    if home:
        return found
    if name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    return tree_map_only(
        Tensor, lambda tensor: inner[id(tensor)] if id(tensor) in inner else PretendTensor(tensor), found
    )


def _is_for_gpu(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation runs on the pretend GPU.

    Raises:
        RuntimeError: CUDA would refuse it.
    """
    name, leaves = func._schema.name.partition("::")[2], tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    device = kwargs.get("device")
    if device is not None and torch.device(device) in (GPU, torch.device("cuda"), UNDERNEATH):
        on_gpu = on_gpu or [None]  # type: ignore[list-item]
    if not on_gpu:
        return False
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise AssertionError(f"{func}: C++ made a tensor without numbers; the pretend GPU has to make it")
    if func.namespace == "mkldnn" or "mkldnn" in name:
        raise RuntimeError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if func.name() in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name} CUDA does not have a deterministic implementation")
    _refuse_mixture(func, name, args, kwargs, tensors)
    return True


def _refuse_mixture(func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    if name in COPIES:
        return
    if name in INDEXES:
        indexed, values = args[0], args[2] if len(args) > 2 else None
        strange = [] if isinstance(indexed, PretendTensor) else [indexed]
        if values is not None and not isinstance(values, PretendTensor) and values.ndim:
            strange.append(values)
    else:
        strange = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
        if torch.Tag.pointwise in func.tags or name in TAKES_CPU_SCALARS:
            written = {id(args[0])} if name.endswith("_") else set()
            written |= {id(leaf) for leaf in tree_leaves(kwargs.get("out"))}
            strange = [tensor for tensor in strange if tensor.ndim or id(tensor) in written]
    if strange:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def _count(name: str, args: Any, home: bool) -> None:
    by_mask = name in INDEXES and any(
        isinstance(one, PretendTensor) and one.dtype == torch.bool for one in tree_leaves(args[1])
    )
    to_host = name == "copy_" and not isinstance(args[0], PretendTensor)
    if name in WAITS or (name == "_to_copy" and home) or by_mask or to_host:
        WAITED[name] += 1


def _wide_mm(one: Tensor, two: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.mm` with an output type, for the types that CUDA has it for."""
    if dtype != torch.float32 or one.dtype not in (torch.bfloat16, torch.float16) or two.dtype != one.dtype:
        raise RuntimeError(f"out_dtype {dtype} of mm for {one.dtype} and {two.dtype} is not supported on CUDA")
    return one.float() @ two.float()


STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _wide_mm,
    torch.ops.aten._fused_sdp_choice.default: lambda *_, **__: 0,  # attention by plain mathematics
    # A conjugate that is only noted would be lost: below autograd nothing reads the note.
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}


class Kernels(TorchDispatchMode):
    """Sees operations without a pretend tensor among their arguments too: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
