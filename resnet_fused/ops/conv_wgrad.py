"""conv_wgrad: the gradient of a convolution's weight, with batch norm and ReLU in front."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format
from resnet_fused.ops import _checks, _convolution
from resnet_fused.ops._registration import call, define


def conv_wgrad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of sum(grad_y * conv2d(p(x), weight)) with respect to weight.

    p(x) = relu(x * scale + shift) as in `conv_stats`, which forms in registers what eager saves for
    the backward, or x itself without scale and shift. grad_y: (N, K, P, Q); x: (N, C, H, W);
    weight: (K, C / groups, R, S), whose values are not used; scale, shift: (C,), both or none.
    Returns a tensor like weight: its shape, dtype and strides. Equivalent to
    torch.nn.grad.conv2d_weight(p(x), weight.shape, grad_y, stride, padding, dilation, groups).
    Sums are in float32. A partner of backward passes; differentiable.

    Raises ValueError on mismatched shapes, channels or devices, on one of scale and shift without
    the other and on a geometry out of range; TypeError on unequal dtypes of grad_y and x and on
    tensors that are not floating point.
    """
    _checks.check_tensors("conv_wgrad", grad_y=grad_y, x=x, weight=weight)
    geometry = _convolution.pairs("conv_wgrad", stride, padding, dilation)
    return call(_conv_wgrad, grad_y, x, weight, scale, shift, *geometry, groups)


def _check(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    geometry: tuple[Any, ...],
) -> None:
    shape = _convolution.output_shape("conv_wgrad", x, weight, *geometry)
    meaning = "the shape of the convolution's output"
    _convolution.check_activation_like("conv_wgrad", "grad_y", grad_y, meaning, shape, "x", x)
    _convolution.check_prologue("conv_wgrad", scale, shift, x)


def _kernel(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *geometry: Any,
) -> Tensor:
    _check(grad_y, x, weight, scale, shift, geometry)
    format_ = memory_format(x)
    grad_weight = backends.choose("conv_wgrad", x)(
        grad_y.contiguous(memory_format=format_),
        x.contiguous(memory_format=format_),
        *(weight, scale, shift, *geometry),
    )
    return _convolution.with_strides_of(weight, grad_weight)


def _fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *geometry: Any,
) -> Tensor:
    _check(grad_y, x, weight, scale, shift, geometry)
    return torch.empty_like(weight)


def _differentiable(grad_y: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _convolution.with_strides_of(weight, reference.conv_wgrad(grad_y, x, weight, *rest))


_conv_wgrad = define(
    "conv_wgrad(Tensor grad_y, Tensor x, Tensor weight, Tensor? scale, Tensor? shift,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _kernel,
    _fake,
    _differentiable,
)
