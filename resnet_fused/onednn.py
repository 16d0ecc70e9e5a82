"""Convolutions on CPUs through oneDNN's fused post-ops, with folded and prepacked weights.

The scale is folded into the weight, the result is packed into oneDNN's blocked layout for the shape
of x, and kept until one of the tensors it was made from changes or dies. A weight is packed when it
is seen for the second time with the same scale and shift: tensors that live for one call (traced
graphs) are never worth packing and take one plain convolution and one fused affine pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import native, reference
from resnet_fused.fingerprint import Snapshot
from resnet_fused.layout import convolution_shape, memory_format, to_format
from resnet_fused.packing import Convolution, Geometry, PackedBlock

SHAPES_KEPT = 4  # packings of one weight; oneDNN's best layout depends on the shape of x


class _Packed(NamedTuple):
    weight: Tensor
    shift: Tensor


class _Weights:
    """One folded weight, packed per shape of x."""

    def __init__(self, key: int, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self.snapshot = Snapshot(tensors, sampled=False, on_death=lambda _: _weights.pop(key, None))
        self.packed: dict[Any, _Packed] = {}


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
    # To grouped convolutions PyTorch adds in a second pass, which does not take bfloat16.
    if packed is None or (residual is not None and groups > 1):
        return _convolution_then_affine(x, weight, scale, shift, residual, relu, geometry)
    if residual is None:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, *packed, *geometry, "relu" if relu else "none", [], None
        )
    else:
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            *(x, residual, *packed, *geometry),
            *("add", 1.0, "relu" if relu else None, [], None),
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
    native_format = residual.is_contiguous(memory_format=torch.channels_last)
    if groups > 1 or not native_format or residual.is_contiguous():
        # There PyTorch adds in a second pass, which rounds again and does not take bfloat16.
        other = to_format(residual, memory_format(x))
        convolution = (stride, padding, dilation, groups)
        residual.copy_(conv_bn_relu(x, weight, scale, shift, other, relu, *convolution))
        return
    geometry = (tuple(padding), tuple(stride), tuple(dilation), groups)
    packed = _packed(x, weight, scale, shift, geometry)
    if packed is None:
        y = _convolution_then_affine(x, weight, scale, shift, residual, relu, geometry)
        residual.copy_(y)
    else:
        torch.ops.mkldnn._convolution_pointwise_.binary(
            *(residual, x, *packed, *geometry),
            *("add", 1.0, "relu" if relu else None, [], None),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad_out if out is None else native.launcher("add_relu_backward")(grad_out, out)
    return reference.conv_bn_relu_backward(
        grad, x, weight, scale, None, has_residual, stride, padding, dilation, groups
    )


def runs(dtype: torch.dtype, elements: int) -> bool:
    """Whether oneDNN convolves tensors of this dtype and number of elements on this CPU."""
    if not torch.backends.mkldnn.enabled or elements == 0:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_block(
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    convolutions: Sequence[Convolution],
    has_projection: bool,
) -> PackedBlock:
    """Pack a residual block for one shape of x. convolutions: in order, the projection last."""
    main = convolutions[:-1] if has_projection else convolutions
    packed, shape = [], x_shape
    for convolution in main:
        packed.append(_pack(shape, dtype, convolution))
        padding, stride, dilation, _ = convolution.geometry
        shape = convolution_shape(shape, convolution.weight.shape, stride, padding, dilation)
    if has_projection:
        packed.append(_pack(x_shape, dtype, convolutions[-1]))
    geometry = [
        number
        for padding, stride, dilation, groups in (c.geometry for c in convolutions)
        for number in (*padding, *stride, *dilation, groups)
    ]
    weights, shifts = [p.weight for p in packed], [p.shift for p in packed]
    return PackedBlock(weights, shifts, geometry, has_projection, shape)


def residual_blocks(x: Tensor, blocks: Sequence[PackedBlock]) -> Tensor:
    """Residual blocks one after the other, in inference.

    x: (N, C, H, W), channels_last, of the shape that the first block was packed for.
    """
    out: Tensor = native.launcher("residual_blocks")(
        x,
        [weight for block in blocks for weight in block.weights],
        [shift for block in blocks for shift in block.shifts],
        [number for block in blocks for number in block.geometry],
        [len(block.weights) - block.has_projection for block in blocks],
        [int(block.has_projection) for block in blocks],
    )
    return out


def _packed(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry
) -> _Packed | None:
    """Weight and shift as oneDNN wants them for x; None where it cannot run, or should not yet."""
    if not runs(x.dtype, x.numel()):
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
        if len(weights.packed) >= SHAPES_KEPT:
            oldest, *_ = weights.packed
            weights.packed.pop(oldest, None)  # another thread may have done so
        convolution = Convolution(weight, scale, shift, geometry)
        packed = weights.packed[use] = _pack(x.shape, x.dtype, convolution)
    return packed


def _pack(x_shape: Sequence[int], dtype: torch.dtype, convolution: Convolution) -> _Packed:
    weight, scale, shift, geometry = convolution
    with torch.inference_mode(False), torch.no_grad():
        folded = weight.float() * scale.float().view(-1, 1, 1, 1)
        folded = folded.to(dtype).contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *geometry, list(x_shape))
        return _Packed(packed, shift.to(dtype))


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
    out: Tensor = native.launcher("bn_relu")(*affine, residual, *no_residual_bn, relu, False)[0]
    return out
