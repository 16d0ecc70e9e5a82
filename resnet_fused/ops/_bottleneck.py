"""What the operators over several layers of a Bottleneck share: checks, messages, autocast."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _checks, _convolution

Layer = Sequence[Tensor]  # weight, and scale and shift of what it gives


def check_tail(
    operator: str, y1: Tensor, residual: Tensor, second: Layer, third: Layer
) -> tuple[int, ...]:
    """(N, K, H, W), the shape of the block's output, after all checks.

    second: a 3x3 convolution that keeps the channels of y1; third: a 1x1 convolution.
    """
    check_image(operator, "y1", y1)
    channels = y1.size(1)
    check_layer(operator, "{}2", second, channels, 3, "y1", y1, kernels=channels)
    kernels = check_layer(operator, "{}3", third, channels, 1, "y1", y1)
    shape = (y1.size(0), kernels, *y1.shape[2:])
    check_residual(operator, residual, shape, y1)
    return shape


def check_image(operator: str, name: str, x: Tensor) -> None:
    """`x` must be a floating-point (N, C, H, W) tensor with pixels in it."""
    _checks.check_activation(operator, name, x)
    if 0 in x.shape[2:]:  # min would compare the two, which a graph for any shape must not
        raise ValueError(
            f"{operator}: {name} must have at least one row and one column,"
            f" got shape {tuple(x.shape)}"
        )


def check_layer(
    operator: str,
    names: str,
    layer: Layer,
    channels: int,
    size: int,
    like_name: str,
    like: Tensor,
    kernels: int | None = None,
) -> int:
    """The number of kernels, after all checks of a weight (kernels, channels, size, size) and BN.

    names: how the operator calls them, such as "next_{}1". kernels: None for any number.
    """
    weight, scale, shift = layer
    name = names.format("weight")
    _checks.check_tensors(operator, **{name: weight})  # the dispatcher lets None pass
    if weight.dim() != 4 or not weight.is_floating_point():
        raise ValueError(
            f"{operator}: {name} must be a floating-point (K, C, R, S) tensor,"
            f" got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    kernels = weight.size(0) if kernels is None else kernels
    _checks.check_shape(
        operator, name, weight, "the shape (K, C, R, S) =", (kernels, channels, size, size)
    )
    _checks.check_device(operator, name, weight, like_name, like)
    for part, vector in (("scale", scale), ("shift", shift)):
        name = names.format(part)
        _checks.check_tensors(operator, **{name: vector})
        meaning = "one value per output channel"
        _convolution.check_vector(operator, name, vector, meaning, (kernels,), like_name, like)
    return kernels


def check_residual(operator: str, residual: Tensor, shape: tuple[int, ...], y1: Tensor) -> None:
    """`residual` must have the shape of the output, and dtype and device of `y1`."""
    _checks.check_tensors(operator, residual=residual)
    meaning = "the shape of the output"
    _convolution.check_activation_like(operator, "residual", residual, meaning, shape, "y1", y1)


def cast_activations(*positions: int) -> Callable[..., tuple[Any, ...]]:
    """For `autocast`: the arguments at `positions` are cast as conv2d casts its input."""

    def cast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
        def is_cast(position: int, value: Tensor) -> bool:
            return (
                position in positions and value.is_floating_point() and value.dtype != torch.float64
            )

        return tuple(a.to(dtype) if is_cast(i, a) else a for i, a in enumerate(args))

    return cast
