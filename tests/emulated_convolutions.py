"""What the tests of the CUDA convolutions in the emulator share: how a kernel is called as it is.

The operators' native schemas take a tile and the number of splits of the sum, which the library
leaves to the launchers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import emulated_backend
import test_conv_bn_relu
import test_conv_dgrad
import test_conv_stats
import test_conv_wgrad
import torch
from convolutions import Tensors
from numerics import Case
from test_conv_bn_relu import Conv
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.cuda_convolutions import flat


class Arithmetic(NamedTuple):
    """A dtype, and whether float32 is multiplied in TF32."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def chunk(self) -> int:
        """Elements of 16 bytes."""
        return 16 // self.dtype.itemsize

    @property
    def step(self) -> int:
        """Channels, or pixels, in a step of the main loop."""
        return 64 // self.dtype.itemsize


ARITHMETICS = {
    "bfloat16": Arithmetic(torch.bfloat16),
    "float16": Arithmetic(torch.float16),
    "float32": Arithmetic(torch.float32),
    "tf32": Arithmetic(torch.float32, tf32=True),
}


class Tile(NamedTuple):
    """Elements of the result of a block, and of each of its warps."""

    m: int
    n: int
    warp_m: int
    warp_n: int

    @property
    def warps_m(self) -> int:
        return self.m // self.warp_m

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * (self.n // self.warp_n)


def tiles(dtype: torch.dtype, tf32: bool, small_warps: bool) -> tuple[Tile, ...]:
    """Those of csrc/cuda/conv_tiles.h. small_warps: with a prologue, or for conv_wgrad."""
    splits = dtype == torch.float32 and not tf32
    smaller = Tile(128, 64, 32 if splits else 64, 32), Tile(64, 64, 32, 32)
    if dtype == torch.float32:
        return smaller
    return Tile(128, 128, 64, 32 if small_warps else 64), *smaller


class Kind(NamedTuple):
    """An operator with what stands around its product."""

    operator: str
    variant: str

    def __str__(self) -> str:
        return f"{self.operator}-{self.variant}"


KINDS = [
    *(Kind("conv_bn_relu", variant) for variant in ("residual", "no residual", "no relu")),
    *(Kind("conv_bn_relu_", "residual"), Kind("conv_projection_relu", "projection")),
    *(Kind("conv_stats", variant) for variant in ("identity", "prologue")),
    *(Kind("conv_dgrad", variant) for variant in test_conv_dgrad.PARTS),
    *(Kind("conv_wgrad", variant) for variant in ("identity", "prologue")),
]
# Of y in conv_projection_relu, whose other arguments follow from those of the projection.
PROJECTED_CHANNELS = 40


def fuses(kind: Kind, conv: Conv, dtype: torch.dtype) -> bool:
    """Whether the kernel has a prologue, and not another kernel in front of it."""
    chunk = 16 // dtype.itemsize
    pointwise = conv.kernel == 1 and conv.padding == (0, 0) and conv.groups == 1
    if kind.operator == "conv_stats":
        return kind.variant == "prologue" and pointwise and conv.x[1] % chunk == 0
    if kind.operator == "conv_dgrad":
        has_norm = "coefficients" in test_conv_dgrad.PARTS[kind.variant]
        return has_norm and pointwise and conv.stride == (1, 1) and conv.kernels % chunk == 0
    return kind == Kind("conv_wgrad", "prologue") and conv.x[1] % chunk == 0


def tiles_of(kind: Kind, conv: Conv, dtype: torch.dtype, tf32: bool = False) -> tuple[Tile, ...]:
    return tiles(dtype, tf32, kind.operator == "conv_wgrad" or fuses(kind, conv, dtype))


def given(kind: Kind, conv: Conv, dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Random arguments, all in channels_last."""
    case = Case(emulated_backend.NAME, (), dtype, "channels_last")
    if kind.operator in ("conv_bn_relu", "conv_bn_relu_"):
        has_residual = kind.variant != "no residual"
        tensors = test_conv_bn_relu.tensors_of(case, conv, has_residual, seed)
    elif kind.operator == "conv_projection_relu":
        projection = test_conv_bn_relu.tensors_of(case, conv, False, seed)
        n, _, p, q = conv.out
        own = Conv((n, PROJECTED_CHANNELS, p, q), conv.kernels, 1, padding=(0, 0))
        last = test_conv_bn_relu.tensors_of(case, own, False, seed + 5)
        last["y"] = last.pop("x")
        projection = {k if k == "x" else f"projection_{k}": t for k, t in projection.items()}
        tensors = last | projection
    elif kind.operator == "conv_stats":
        tensors = test_conv_stats.tensors_of(case, conv, kind.variant == "prologue", seed)
    elif kind.operator == "conv_dgrad":
        tensors = test_conv_dgrad.tensors_of(case, conv, kind.variant, seed)
    else:
        tensors = test_conv_wgrad.tensors_of(case, conv, kind.variant == "prologue", seed)
    return {name: _channels_last(t) for name, t in tensors.items()}


def run(
    ops: Any,
    kind: Kind,
    conv: Conv,
    tensors: Tensors,
    tf32: bool,
    tile: int = -1,
    splits: int = 0,
    geometry: Sequence[int] | None = None,
) -> Tensors:
    """The operator's results by name. tile, splits, geometry: as in the native schemas."""
    get = tensors.get
    chosen = flat(conv.geometry) if geometry is None else geometry, tf32, tile, splits
    scales = get("scale"), get("shift")
    operator = getattr(ops, kind.operator)
    if kind.operator == "conv_bn_relu":
        relu = kind.variant != "no relu"
        out = operator(get("x"), get("weight"), *scales, get("residual"), relu, *chosen)
        return {"out": out}
    if kind.operator == "conv_bn_relu_":
        out = tensors["residual"].clone()
        operator(get("x"), get("weight"), *scales, out, True, *chosen)
        return {"out": out}
    if kind.operator == "conv_projection_relu":
        projection = (get(f"projection_{name}") for name in ("weight", "scale", "shift"))
        own = get("y"), get("weight"), *scales
        stride = conv.stride if geometry is None else geometry
        return {"out": operator(*own, get("x"), *projection, stride, *chosen[1:])}
    if kind.operator == "conv_stats":
        outputs = operator(get("x"), get("weight"), *scales, *chosen)
        return dict(zip(test_conv_stats.OUTPUTS, outputs, strict=True))
    if kind.operator == "conv_dgrad":
        optional = (get(name) for name in test_conv_dgrad.OPTIONAL)
        size = list(conv.x[2:])
        outputs = operator(get("grad_y"), get("weight"), size, *optional, None, *chosen)
        return dict(zip(test_conv_dgrad.OUTPUTS, outputs, strict=True))
    return {"grad_weight": operator(get("grad_y"), get("x"), get("weight"), *scales, None, *chosen)}


def eager(kind: Kind, conv: Conv, tensors: Tensors) -> Tensors:
    """The same chain in torch, in the dtype of the tensors."""
    if kind.operator in ("conv_bn_relu", "conv_bn_relu_"):
        arguments = (tensors[name] for name in ("x", "weight", "scale", "shift"))
        rest = tensors.get("residual"), kind.variant != "no relu", *conv.geometry
        return {"out": test_conv_bn_relu.eager(*arguments, *rest)}
    if kind.operator == "conv_projection_relu":
        projection = (tensors[f"projection_{name}"] for name in ("weight", "scale", "shift"))
        branch = test_conv_bn_relu.eager(tensors["x"], *projection, None, False, *conv.geometry)
        own = (tensors[name] for name in ("y", "weight", "scale", "shift"))
        own_geometry = (1, 1), (0, 0), (1, 1), 1
        return {"out": test_conv_bn_relu.eager(*own, branch, True, *own_geometry)}
    if kind.operator == "conv_stats":
        return test_conv_stats.named(test_conv_stats.eager, conv, **tensors)
    if kind.operator == "conv_dgrad":
        return test_conv_dgrad.eager(conv, **tensors)
    return test_conv_wgrad.named(test_conv_wgrad.eager, conv, **tensors)


@contextlib.contextmanager
def products_in_tf32(enabled: bool) -> Iterator[None]:
    """Convolutions of float32 round their operands, and those of their gradients, to TF32."""

    def convolution(x: Tensor, weight: Tensor, bias: None, *geometry: Any) -> Tensor:
        return _Tf32Convolution.apply(x, weight, geometry)

    with mock.patch.object(F, "conv2d", convolution) if enabled else contextlib.nullcontext():
        yield


def round_to_tf32(values: Tensor) -> Tensor:
    """The nearest numbers with 10 bits of fraction, ties away from zero."""
    dropped = (1 << 13) - 1
    return (values.view(torch.int32) + (1 << 12) & ~dropped).view(torch.float32)


class _Tf32Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Any) -> Tensor:
        x, weight = round_to_tf32(x), round_to_tf32(weight)
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        return torch.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(round_to_tf32(grads[0]), x, weight, None, stride, padding, dilation, False, (0, 0)),
            *(groups, (*ctx.needs_input_grad[:2], False)),
        )
        return grad_x, grad_weight, None


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)
