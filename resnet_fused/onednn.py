"""Convolutions on CPUs through oneDNN's fused post-ops, with folded and prepacked weights.

The scale is folded into the weight, the result is packed into oneDNN's blocked layout for the shape
of x, and kept until one of the tensors it was made from changes or dies. A weight is packed when it
is seen for the second time with the same scale and shift: tensors that live for one call (traced
graphs) are never worth packing and take one plain convolution and one fused affine pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import native, reference
from resnet_fused.fingerprint import Snapshot
from resnet_fused.layout import memory_format, to_format

_SHAPES_KEPT = 4  # packings of one weight; oneDNN's best layout depends on the shape of x

# padding, stride, dilation, groups: the order of oneDNN's operators
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class _Weights:
    """One folded weight, packed per shape of x."""

    def __init__(self, key: int, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self.snapshot = Snapshot(tensors, on_death=lambda _: _weights.pop(key, None))
        self.packed: dict[Any, tuple[Tensor, Tensor]] = {}


_weights: dict[int, _Weights] = {}  # by id of the weight


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the CPU backend cannot run convolutions on such tensors; None if it can."""
    return native.unsupported_on_cpu(device_type, dtype)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = (tuple(padding), tuple(stride), tuple(dilation), groups)
    packed = _packed(x, weight, scale, shift, geometry)
    if packed is None:
        return _convolution_then_affine(x, weight, scale, shift, residual, relu, geometry)
    if residual is None:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, *packed, *geometry, "relu" if relu else "none", [], None
        )
    else:
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, *packed, *geometry, "add", 1.0, "relu" if relu else None, [], None
        )
    return out.contiguous(memory_format=memory_format(x))


def conv_bn_relu_(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    geometry = (tuple(padding), tuple(stride), tuple(dilation), groups)
    packed = _packed(x, weight, scale, shift, geometry)
    if packed is None:
        y = _convolution_then_affine(x, weight, scale, shift, residual, relu, geometry)
        residual.copy_(y)
    else:
        torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, *packed, *geometry, "add", 1.0, "relu" if relu else None, [], None
        )


def conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad_out if out is None else native.launcher("add_relu_backward")(grad_out, out)
    return reference.conv_bn_relu_backward(
        grad, x, weight, scale, None, has_residual, stride, padding, dilation, groups
    )


def _packed(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor] | None:
    """(weight, shift) as oneDNN wants them for x, or None where it cannot run or should not yet."""
    if not _runs_in_onednn(x):
        return None
    tensors = (weight, scale, shift)
    key = id(weight)
    weights = _weights.get(key)
    if weights is None or not weights.snapshot.is_current(tensors):
        _weights[key] = _Weights(key, tensors)
        return None
    use = (x.shape, x.dtype, geometry)
    packed = weights.packed.get(use)
    if packed is None:
        if len(weights.packed) == _SHAPES_KEPT:
            del weights.packed[next(iter(weights.packed))]
        packed = weights.packed[use] = _pack(x, weight, scale, shift, geometry)
    return packed


def _runs_in_onednn(x: Tensor) -> bool:
    if not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if x.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return x.dtype == torch.float32


def _pack(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        folded = weight.float() * scale.float().view(-1, 1, 1, 1)
        folded = folded.to(x.dtype).contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *geometry, list(x.shape))
        return packed, shift.float()


def _convolution_then_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    geometry: Geometry,
) -> Tensor:
    padding, stride, dilation, groups = geometry
    y = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)
    format_ = memory_format(x)
    y, residual = y.contiguous(memory_format=format_), to_format(residual, format_)
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    affine = (y, scale, shift, mean, var, False, 0.0, 0.0)
    no_residual_bn = (False, None, None, None, None, False, 0.0, 0.0)
    out: Tensor = native.launcher("bn_relu")(*affine, residual, *no_residual_bn, relu)[0]
    return out
