"""What the operators with a convolution share: geometry, checks of shapes, messages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import convolution_shape
from resnet_fused.ops import _checks


def pairs(operator: str, stride: Any, padding: Any, dilation: Any) -> tuple[tuple[int, ...], ...]:
    """stride, padding and dilation as two ints each, from one int or two."""
    return (
        pair(operator, "stride", stride),
        pair(operator, "padding", padding),
        pair(operator, "dilation", dilation),
    )


def pair(operator: str, name: str, value: Any) -> tuple[int, ...]:
    """Two ints, from one or two."""
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise ValueError(f"{operator}: {name} must be one int or two, got {value!r}")
    return tuple(values)


def output_shape(operator: str, x: Tensor, weight: Tensor, *geometry: Any) -> tuple[int, ...]:
    """(N, K, P, Q), after all checks of x, weight and geometry (stride, padding, dilation, groups).

    x: (N, C, H, W); weight: (K, C / groups, R, S).
    """
    _checks.check_activation(operator, "x", x)
    check_weight(operator, weight, "x", x)
    return shape_of_output(operator, tuple(x.shape), weight, *geometry)


def shape_of_output(
    operator: str, x_shape: tuple[int, ...], weight: Tensor, *geometry: Any
) -> tuple[int, ...]:
    """As `output_shape`, of the input's shape alone and a weight that is checked already."""
    stride, padding, dilation, groups = geometry
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1)):
        if min(values) < least:
            raise ValueError(f"{operator}: {name} must be at least {least}, got {tuple(values)}")
    if min(padding) < 0:
        raise ValueError(f"{operator}: padding must not be negative, got {tuple(padding)}")
    channels, kernels = x_shape[1], weight.size(0)
    if groups < 1 or channels % groups or kernels % groups:
        raise ValueError(
            f"{operator}: groups must divide the channels of x ({channels}) and of weight"
            f" ({kernels}), got {groups}"
        )
    if weight.size(1) * groups != channels:
        raise ValueError(
            f"{operator}: weight must have C / groups = {channels // groups} input channels,"
            f" got {weight.size(1)}"
        )
    shape = convolution_shape(x_shape, weight.shape, stride, padding, dilation)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"{operator}: x must be at least as large as the kernel, got {x_shape} for"
            f" weight {tuple(weight.shape)} with padding {tuple(padding)}"
        )
    return shape


def check_weight(operator: str, weight: Tensor, like_name: str, like: Tensor) -> None:
    """`weight` must be floating point, have 4 dimensions and be on the device of `like`."""
    if not isinstance(weight, Tensor):  # the dispatcher lets None pass
        _checks.check_tensors(operator, weight=weight)
    if weight.dim() != 4 or not weight.is_floating_point():
        raise ValueError(
            f"{operator}: weight must be a floating-point (K, C / groups, R, S) tensor,"
            f" got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    _checks.check_device(operator, "weight", weight, like_name, like)


def check_activation_like(
    operator: str,
    name: str,
    tensor: Tensor,
    meaning: str,
    shape: tuple[int, ...],
    like_name: str,
    like: Tensor,
) -> None:
    """`tensor` must have `shape`, described by `meaning`, and dtype and device of `like`."""
    _checks.check_shape(operator, name, tensor, meaning, shape)
    check_device_and_dtype(operator, name, tensor, like_name, like)


def check_device_and_dtype(
    operator: str, name: str, tensor: Tensor, like_name: str, like: Tensor
) -> None:
    """`tensor` must have dtype and device of `like`."""
    _checks.check_device(operator, name, tensor, like_name, like)
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{operator}: {name} must have the dtype of {like_name}"
            f" {like.dtype}, got {tensor.dtype} (convert one with .to())"
        )


def check_vector(
    operator: str,
    name: str,
    vector: Tensor,
    meaning: str,
    shape: tuple[int, ...],
    like_name: str,
    like: Tensor,
) -> None:
    """`vector` must be floating point, have `shape`, and be on the device of `like`."""
    _checks.check_shape(operator, name, vector, meaning, shape)
    if not vector.is_floating_point():
        raise TypeError(f"{operator}: {name} must be a floating-point tensor, got {vector.dtype}")
    _checks.check_device(operator, name, vector, like_name, like)


def check_prologue(operator: str, scale: Tensor | None, shift: Tensor | None, x: Tensor) -> None:
    """Both must be None, or both have one value per channel of `x`."""
    if (scale is None) != (shift is None):
        given, missing = ("scale", "shift") if shift is None else ("shift", "scale")
        raise ValueError(
            f"{operator}: {missing} must be given with {given}, got None (zeros for shift or ones"
            " for scale change nothing)"
        )
    _checks.check_per_channel(operator, "scale", scale, x)
    _checks.check_per_channel(operator, "shift", shift, x)


def with_strides_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """A weight's gradient, laid out as `torch.empty_like(weight)` is."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)
