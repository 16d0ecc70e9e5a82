"""Launchers of the convolutions in CUDA C++: from an operator's arguments to the kernels' own.

The kernels take activations in channels_last and per-channel vectors in float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import to_format
from resnet_fused.precision import uses_tf32

_CHANNELS_LAST = torch.channels_last
# Which tile a kernel takes, and into how many parts it divides its sum: chosen by the kernel.
CHOSEN = (-1, 0)

Operators = Callable[[], Any]


def launcher(operator: str, operators: Operators) -> Callable[..., Any]:
    """The implementation of `operator` on the compiled operators that `operators()` gives."""
    return functools.partial(_LAUNCHERS[operator], operators())


def conv_bn_relu(
    ops: Any,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    """The operator's result, in channels_last."""
    out: Tensor = ops.conv_bn_relu.default(
        *(x.contiguous(memory_format=_CHANNELS_LAST), weight, vector(scale), vector(shift)),
        *(to_format(residual, _CHANNELS_LAST), relu, flat(geometry), uses_tf32(x), *CHOSEN),
    )
    return out


def _conv_bn_relu_(
    ops: Any,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    *geometry: Any,
) -> None:
    if not residual.is_contiguous(memory_format=_CHANNELS_LAST):
        residual.copy_(conv_bn_relu(ops, x, weight, scale, shift, residual, relu, *geometry))
        return
    ops.conv_bn_relu_.default(
        *(x.contiguous(memory_format=_CHANNELS_LAST), weight, vector(scale), vector(shift)),
        *(residual, relu, flat(geometry), uses_tf32(x), *CHOSEN),
    )


def _conv_bn_relu_backward(
    ops: Any,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out = grad_out.contiguous(memory_format=_CHANNELS_LAST)
    grad, grad_shift = _relu_backward(ops, grad_out, to_format(out, _CHANNELS_LAST))
    around = (None,) * 8
    grad_x, *_ = _scaled_dgrad(ops, vector(scale), grad, weight, x.shape[2:], *around, *geometry)
    grad_weight = _scaled_wgrad(ops, vector(scale), grad, x, weight, None, None, *geometry)
    grad_residual = grad if has_residual else x.new_empty(0)
    return grad_x, grad_weight, grad_shift.to(scale.dtype), grad_residual


def _relu_backward(ops: Any, grad_out: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient in front of the ReLU whose output is `out`, and its sums over pixels."""
    if out is None or out.numel() == 0:
        return grad_out, grad_out.sum((0, 2, 3), dtype=torch.float32)
    # The backward of a batch norm that changes nothing, whose input is `out`.
    zero = grad_out.new_zeros(grad_out.size(1), dtype=torch.float32)
    grad, _, grad_shift, *_ = ops.bn_relu_backward.default(
        *(grad_out, out, None, None, None, zero, zero, torch.ones_like(zero), False, False),
        *(None, False, None, None, None, None, False, True),
    )
    return grad, grad_shift


def _conv_stats(
    ops: Any,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.size(0) == 0:
        kernels = weight.size(0)
        y = conv_bn_relu(ops, x, weight, *x.new_zeros(2, kernels), None, False, *geometry)
        zero = x.new_zeros(kernels, dtype=torch.float32)
        return y, zero, zero.clone()
    results: tuple[Tensor, Tensor, Tensor] = ops.conv_stats.default(
        *(x.contiguous(memory_format=_CHANNELS_LAST), weight, _optional(scale), _optional(shift)),
        *(flat(geometry), uses_tf32(x), *CHOSEN),
    )
    return results


def _conv_dgrad(ops: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _scaled_dgrad(ops, None, *arguments)


def _scaled_dgrad(
    ops: Any,
    output_scale: Tensor | None,
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None,
    coefficients: Tensor | None,
    residual: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """conv_dgrad with the kernels of weight times output_scale, (K,)."""
    if grad_y.size(0) == 0:
        channels = weight.size(1) * geometry[-1]
        grad_x = grad_y.new_empty((0, channels, *input_size))
        sums = grad_y.new_zeros(0 if mean is None else channels, dtype=torch.float32)
        grad_conv = grad_y.new_empty(0) if y is None else torch.empty_like(grad_y)
        return grad_x, sums, sums.clone(), grad_conv
    results: tuple[Tensor, Tensor, Tensor, Tensor] = ops.conv_dgrad.default(
        *(grad_y.contiguous(memory_format=_CHANNELS_LAST), weight, input_size),
        *(to_format(y, _CHANNELS_LAST), _optional(coefficients)),
        *(to_format(residual, _CHANNELS_LAST), to_format(x, _CHANNELS_LAST)),
        *(_optional(scale), _optional(shift), mask, _optional(mean), output_scale),
        *(flat(geometry), uses_tf32(grad_y), *CHOSEN),
    )
    return results


def _conv_wgrad(ops: Any, *arguments: Any) -> Tensor:
    return _scaled_wgrad(ops, None, *arguments)


def _scaled_wgrad(
    ops: Any,
    output_scale: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """conv_wgrad with the gradients of kernels times output_scale, (K,)."""
    if grad_y.size(0) == 0:
        return torch.zeros_like(weight)
    grad_weight: Tensor = ops.conv_wgrad.default(
        grad_y.contiguous(memory_format=_CHANNELS_LAST),
        x.contiguous(memory_format=_CHANNELS_LAST),
        *(weight, _optional(scale), _optional(shift), output_scale),
        *(flat(geometry), uses_tf32(x), *CHOSEN),
    )
    return grad_weight


def vector(values: Tensor) -> Tensor:
    """Per-channel values as the kernels read them."""
    return values.to(torch.float32).contiguous()


def _optional(values: Tensor | None) -> Tensor | None:
    return None if values is None else vector(values)


def flat(geometry: Sequence[Any]) -> list[int]:
    """stride, padding, dilation (2 each) and groups in one list."""
    stride, padding, dilation, groups = geometry
    return [*stride, *padding, *dilation, groups]


_LAUNCHERS: dict[str, Callable[..., Any]] = {
    "conv_bn_relu": conv_bn_relu,
    "conv_bn_relu_": _conv_bn_relu_,
    "conv_bn_relu_backward": _conv_bn_relu_backward,
    "conv_stats": _conv_stats,
    "conv_dgrad": _conv_dgrad,
    "conv_wgrad": _conv_wgrad,
}
OPERATORS = tuple(_LAUNCHERS)
