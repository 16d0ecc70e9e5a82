"""conv_stats: a convolution that also measures its output, for the batch norm behind it.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015; sums of squares around the mean, not of the values, because the difference
of two large sums loses digits (Chan, Golub and LeVeque, "Algorithms for Computing the Sample
Variance", 1983).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format
from resnet_fused.ops import _checks, _convolution
from resnet_fused.ops._registration import as_node, autocast, call, define
from resnet_fused.ops.conv_dgrad import conv_dgrad
from resnet_fused.ops.conv_wgrad import conv_wgrad


def conv_stats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, m2): y = conv2d(p(x), weight), and per channel its mean and sum of (y - mean)^2.

    p(x) = relu(x * scale + shift), the batch norm and ReLU in front of the convolution, computed in
    float32 and rounded to the dtype of x, or x itself without scale and shift. x: (N, C, H, W);
    weight: (K, C / groups, R, S); scale, shift: (C,), both or none. y: (N, K, P, Q), in dtype and
    memory format of x; mean, m2: (K,), in float32 (float64 for float64), 0 where y is empty. The
    biased variance is m2 / (N * P * Q). Equivalent to F.conv2d, of input that is padded with zeros
    behind p, and torch.var_mean over N, P and Q. weight may be wider than x (float32 beside
    bfloat16); under autocast x is cast as conv2d casts it. Differentiable twice, through all three
    outputs.

    Raises ValueError on mismatched shapes, channels or devices, on one of scale and shift without
    the other, on groups that do not divide the channels and on stride, padding or dilation out of
    range; TypeError on tensors that are not floating point.
    """
    _checks.check_tensors("conv_stats", x=x, weight=weight)
    geometry = _convolution.pairs("conv_stats", stride, padding, dilation)
    return call(_conv_stats, x, weight, scale, shift, *geometry, groups)


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    geometry: tuple[Any, ...],
) -> tuple[int, ...]:
    shape = _convolution.output_shape("conv_stats", x, weight, *geometry)
    _convolution.check_prologue("conv_stats", scale, shift, x)
    return shape


def _kernel(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *geometry: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, scale, shift, geometry)
    format_ = memory_format(x)
    y, mean, m2 = backends.choose("conv_stats", x)(
        x.contiguous(memory_format=format_), weight, scale, shift, *geometry
    )
    return y.contiguous(memory_format=format_), mean, m2


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *geometry: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _check(x, weight, scale, shift, geometry)
    y = x.new_empty(shape).contiguous(memory_format=memory_format(x))
    mean = x.new_empty(shape[1], dtype=reference.statistics_dtype(x))
    return y, mean, torch.empty_like(mean)


class _ConvStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *geometry: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, m2 = _conv_stats(x, weight, scale, shift, *geometry)
        ctx.save_for_backward(x, weight, scale, shift, y, mean)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return y, mean, m2

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, y, mean = ctx.saved_tensors
        needs_x, needs_weight, needs_scale, needs_shift = ctx.needs_input_grad[:4]
        grad_conv = torch.zeros_like(y) if grad_y is None else grad_y
        coefficients = None
        if grad_mean is not None or grad_m2 is not None:
            coefficients = _coefficients(grad_mean, grad_m2, y, mean)
        grad_x = grad_weight = grad_scale = grad_shift = None
        if needs_x or needs_scale or needs_shift:
            dtype = mean.dtype
            centre = x.new_zeros(x.size(1), dtype=dtype) if needs_scale or needs_shift else None
            grad_x, sum_grad, sum_grad_x, combined = conv_dgrad(
                *(grad_conv, weight, x.shape[2:], None if coefficients is None else y),
                *(coefficients, None, None if scale is None else x, scale, shift, None, centre),
                *ctx.geometry,
            )
            if coefficients is not None:
                grad_conv = combined
            if scale is not None and shift is not None:
                factor = scale.to(dtype).view(1, -1, 1, 1)
                grad_x = (grad_x.to(dtype) * factor).to(x.dtype)
                grad_scale = sum_grad_x.to(scale.dtype) if needs_scale else None
                grad_shift = sum_grad.to(shift.dtype) if needs_shift else None
            grad_x = grad_x.contiguous(memory_format=memory_format(x)) if needs_x else None
        elif coefficients is not None:
            grad_conv = reference.combine(grad_conv, y, coefficients)
        if needs_weight:
            grad_weight = conv_wgrad(grad_conv, x, weight, scale, shift, *ctx.geometry)
        return grad_x, grad_weight, grad_scale, grad_shift, None, None, None, None


def _coefficients(
    grad_mean: Tensor | None, grad_m2: Tensor | None, y: Tensor, mean: Tensor
) -> Tensor:
    """(a, b, d), (3, K): a * grad_y + (b * y + d) is the gradient through all three outputs.

    The mean adds grad_mean / count, m2 adds 2 * grad_m2 * (y - mean).
    """
    count = y.size(0) * y.size(2) * y.size(3)
    zero = torch.zeros_like(mean)
    b = zero if grad_m2 is None else 2 * grad_m2
    d = (zero if grad_mean is None else grad_mean / count) - b * mean
    return torch.stack([torch.ones_like(mean), b, d])


def _cast(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    if x.dtype == torch.float64 or not x.is_floating_point():
        return (x, *rest)
    return (x.to(dtype), *rest)


_conv_stats = define(
    "conv_stats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, SymInt[2] stride,"
    " SymInt[2] padding, SymInt[2] dilation, SymInt groups)"
    " -> (Tensor y, Tensor mean, Tensor m2)",
    _kernel,
    _fake,
    as_node(_ConvStats, _kernel),
)
autocast(_conv_stats, _cast)
