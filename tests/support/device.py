"""A pretend GPU: real numbers on the CPU, under the rules that CUDA has for what may meet what.

`pretend_gpu()` makes `torch.device("cuda")` usable on a machine without one. A tensor there says that it is on
`cuda:0`; its numbers are a CPU tensor that only the kernels below see. What CUDA refuses is refused here too:

- tensors of two devices in one operation; permitted are copies, CPU tensors that index, and CPU scalars in arithmetic;
- `numpy()` and random numbers from a CPU generator;
- operations that exist on a CPU alone (oneDNN's), and those without a deterministic form, as stages run;
- `torch.mm(..., out_dtype=...)`, which a CPU has not, works for the types that CUDA takes.

Autocast converts by the lists of CUDA, which are not those of a CPU. What it cannot show: kernels that are wrong or
missing for a type or a shape, streams, memory, speed. How often the host waits for the device it counts (`Waits`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from support.device_tensors import GPU, UNDERNEATH, WAITED, Kernels, PretendTensor, Waits

MOVES = frozenset({"to", "cuda", "tensor", "as_tensor"})
# fmt: off
NARROW = frozenset((
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "einsum",
    "scaled_dot_product_attention",
))
WIDE = frozenset((
    "softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", "norm", "vector_norm", "exp", "expm1", "log", "log1p",
    "log2", "log10", "pow", "__pow__", "reciprocal", "rsqrt", "softplus", "layer_norm", "logsumexp", "cross_entropy",
    "nll_loss", "mse_loss", "binary_cross_entropy_with_logits",
))
# fmt: on
"""Under autocast on CUDA: in the narrow type, and in float32 (torch's "CUDA Op-Specific Behavior"); what we use."""


class _Move(torch.autograd.Function):
    """A CPU tensor to the pretend GPU, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = tensor.dtype
        with _disable_current_modes():
            return PretendTensor(tensor.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].cpu().to(ctx.dtype), None


def _move(name: str, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What makes a tensor on the GPU from one on the CPU, or from numbers; None where the call does something else."""
    if name in ("tensor", "as_tensor"):
        device = kwargs.pop("device", None)
        if device is None or torch.device(device).type != GPU.type:
            return None
        wants = kwargs.pop("requires_grad", False)
        made = getattr(torch, name)(*args, **kwargs)
        return made if isinstance(made, PretendTensor) else _Move.apply(made, made.dtype).requires_grad_(wants)
    if name not in ("to", "cuda") or isinstance(args[0], PretendTensor):
        return None
    if name == "cuda":
        return _Move.apply(args[0], args[0].dtype)
    if len(args) > 1 and isinstance(args[1], Tensor):
        device, dtype = args[1].device, args[1].dtype
    else:
        device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})
    if device is None or device.type != GPU.type:
        return None
    return _Move.apply(args[0], dtype or args[0].dtype)


class _Calls(TorchFunctionMode):
    """Sees calls before autograd: moves to the GPU, and autocast, for which C++ would look for a CUDA tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in MOVES and (moved := _move(name, args, dict(kwargs))) is not None:
            return moved
        if torch.is_autocast_enabled("cuda") and (name in NARROW or name in WIDE) and "dtype" not in kwargs:
            dtype = torch.get_autocast_dtype("cuda") if name in NARROW else torch.float32

            def cast(tensor: Tensor) -> Tensor:
                fits = tensor.is_floating_point() and tensor.dtype != torch.float64
                return tensor.to(dtype) if fits else tensor

            args, kwargs = tree_map_only(PretendTensor, cast, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _patched() -> Iterator[None]:
    """Where torch asks for a driver, or C++ for the device, the answers that a GPU gives."""
    by_device = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args: Any) -> dict[Any, Any]:
        found = by_device(*args)
        return {(GPU if device == UNDERNEATH else device, dtype): rest for (device, dtype), rest in found.items()}

    true = {name: mock.Mock(return_value=True) for name in ("is_available", "is_bf16_supported")}
    with (
        mock.patch.multiple(torch.cuda, _lazy_init=mock.Mock(), **true),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", mock.Mock(return_value=False)),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [Tensor, torch.nn.Parameter, PretendTensor]),
    ):
        yield


@contextmanager
def pretend_gpu() -> Iterator[Waits]:
    """Make `cuda` a pretend device for the block, with deterministic algorithms as in a stage; counts the waits."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    WAITED.clear()
    torch.use_deterministic_algorithms(True)
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied weights would come apart
    try:
        with _patched(), _Calls(), Kernels():
            yield WAITED
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
