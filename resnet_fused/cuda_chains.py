"""The Python half of the CUDA kernels that run several convolutions of a Bottleneck at once.

They exist for the widths of ResNets, in bfloat16 and float16; `conv_projection_relu` for all. Other
tensors take the same layers one by one, by the CUDA convolutions, so that every operator always
computes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.cuda_convolutions import CHOSEN, conv_bn_relu, vector
from resnet_fused.precision import uses_tf32

ROLL_WIDTHS = (64, 128)  # in and between the blocks
EXPANSION = 4  # of a Bottleneck: output channels per channel of its 3x3 convolution
_DTYPES = (torch.bfloat16, torch.float16)
_TAIL_WIDTHS = (64, 128, 256)
_BLOCK_WIDTHS = (64,)
# By width: rows of pixels that lie in shared memory next to the weights, on every GPU.
WIDEST_IMAGES = {64: 176, 128: 80, 256: 19}

Layer = Sequence[Tensor]  # weight, and scale and shift of what it gives


def launcher(operator: str, ops: Callable[[], Any]) -> Callable[..., Any]:
    """The CUDA implementation of one of OPERATORS, with the arguments of `reference`.

    ops: gives the namespace that the kernels are registered in.
    """
    return functools.partial(_LAUNCHERS[operator], ops())


def _bottleneck_tail(ops: Any, y1: Tensor, residual: Tensor, *layers: Tensor) -> Tensor:
    second, third = layers[:3], layers[3:]
    if not _has_instance(y1, _TAIL_WIDTHS, second, third):
        return _tail_by_layers(ops, y1, residual, second, third)
    out: Tensor = ops.bottleneck_tail.default(
        _aligned(y1), _aligned(residual), *_arguments(second, third)
    )
    return out


def _bottleneck_roll(
    ops: Any, y1: Tensor, residual: Tensor, *layers: Tensor
) -> tuple[Tensor, Tensor]:
    second, third, next_first = layers[:3], layers[3:6], layers[6:]
    same_width = next_first[0].size(0) == y1.size(1)
    if not (same_width and _has_instance(y1, ROLL_WIDTHS, second, third)):
        out = _tail_by_layers(ops, y1, residual, second, third)
        return out, _layer(ops, out, next_first)
    results: tuple[Tensor, Tensor] = ops.bottleneck_roll.default(
        _aligned(y1), _aligned(residual), *_arguments(second, third, next_first)
    )
    return results


def _bottleneck_block(ops: Any, x: Tensor, *layers: Tensor) -> Tensor:
    first, second, third = layers[:3], layers[3:6], layers[6:]
    if not _has_instance(x, _BLOCK_WIDTHS, second, third):
        return _tail_by_layers(ops, _layer(ops, x, first), x, second, third)
    out: Tensor = ops.bottleneck_block.default(_aligned(x), *_arguments(first, second, third))
    return out


def _conv_projection_relu(
    ops: Any,
    y: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    projection_weight: Tensor,
    projection_scale: Tensor,
    projection_shift: Tensor,
    stride: Sequence[int],
) -> Tensor:
    out: Tensor = ops.conv_projection_relu.default(
        *(_native(y), weight, vector(scale), vector(shift)),
        *(_native(x), projection_weight, vector(projection_scale), vector(projection_shift)),
        *(stride, uses_tf32(y), *CHOSEN),
    )
    return out


def has_tail(width: int, kernels: int, widths: Sequence[int] = _TAIL_WIDTHS) -> bool:
    """Whether a kernel ends blocks of this width, of the 3x3 convolution, with so many channels."""
    return width in widths and kernels == EXPANSION * width


def _has_instance(x: Tensor, widths: tuple[int, ...], second: Layer, third: Layer) -> bool:
    """Whether there is a kernel for these layers and images like x."""
    return (
        x.dtype in _DTYPES
        and has_tail(second[0].size(0), third[0].size(0), widths)
        and x.size(3) <= WIDEST_IMAGES[second[0].size(0)]
    )


def _arguments(*layers: Layer) -> list[Tensor]:
    """The layers as the kernels take them."""
    return [
        tensor
        for weight, scale, shift in layers
        for tensor in (weight, vector(scale), vector(shift))
    ]


def _aligned(x: Tensor) -> Tensor:
    """Kernels that hold rows in shared memory copy 16 bytes at a time."""
    x = _native(x)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def _native(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tail_by_layers(ops: Any, y1: Tensor, residual: Tensor, second: Layer, third: Layer) -> Tensor:
    return _layer(ops, _layer(ops, y1, second, padding=1), third, residual)


def _layer(
    ops: Any, x: Tensor, layer: Layer, residual: Tensor | None = None, padding: int = 0
) -> Tensor:
    weight, scale, shift = layer
    geometry = (1, 1), (padding, padding), (1, 1), 1
    return conv_bn_relu(ops, x, weight, scale, shift, residual, True, *geometry)


_LAUNCHERS: dict[str, Callable[..., Any]] = {
    "bottleneck_tail": _bottleneck_tail,
    "bottleneck_roll": _bottleneck_roll,
    "bottleneck_block": _bottleneck_block,
    "conv_projection_relu": _conv_projection_relu,
}
OPERATORS = tuple(_LAUNCHERS)
