"""Bottlenecks in inference by operators that run several of their convolutions at once.

From its 3x3 convolution on, a block with the identity as shortcut is one operator, to which conv1
of the next block belongs where it can; of a block with a projection, the last convolution and the
projection are one. What stands between is never written. Everything is decided at each call from
the modules at hand, as in `blocks`; other blocks are called as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.cuda_chains import ROLL_WIDTHS
from resnet_fused.nn.pairs import (
    Pair,
    Shortcut,
    as_pair,
    calls_are_plain,
    computed_dtype,
    fold,
    has_hooks,
    is_pair,
    uses_batch,
)
from resnet_fused.ops.bottleneck_roll import bottleneck_roll
from resnet_fused.ops.bottleneck_tail import bottleneck_tail
from resnet_fused.ops.conv_bn_relu import conv_bn_relu
from resnet_fused.ops.conv_projection_relu import conv_projection_relu

OPERATORS = ("bottleneck_tail", "bottleneck_roll", "conv_projection_relu", "conv_bn_relu")


class Layers(NamedTuple):
    """A Bottleneck that a chain can run; projection: of its shortcut, None for the identity."""

    first: Pair
    second: Pair
    third: Pair
    projection: Pair | None


# What a block consists of, pairs of layers in order and the shortcut, by the forward that computes
# it. None where that is not what a call of the block would compute now.
Parts = tuple[Sequence[tuple[nn.Module, nn.Module]], Shortcut]
readers: dict[Callable[..., object], Callable[[Any], Parts | None]] = {}


def applies(x: Tensor) -> bool:
    """Whether chains are exact for x, and asked for or faster than the layers one by one."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dim() == 4
        and all(backends.is_implemented(n) and backends.is_accelerated(n, x) for n in OPERATORS)
        and calls_are_plain()
    )


def run(x: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
    """The output of `blocks`, one after the other; for an x to which chains apply."""
    every = [layers_of(block) for block in blocks]
    y1 = None
    for block, layers, following in zip(blocks, every, [*every[1:], None], strict=True):
        # The operators keep what chains depend on, the block that is called may change it.
        if layers is None or (y1 is None and not applies(x)):
            x = block(x)
        else:
            x, y1 = _run_block(x, y1, layers, following)
    return x


def run_block(
    x: Tensor, pairs: Sequence[tuple[nn.Module, nn.Module]], downsample: Shortcut
) -> Tensor | None:
    """The output of one block of these parts; None where it is not for a chain."""
    if not applies(x):
        return None
    layers = as_layers(pairs, downsample)
    if layers is None or not _is_folded(layers):
        return None
    return _run_block(x, None, layers, None)[0]


def layers_of(block: nn.Module) -> Layers | None:
    """The layers that a chain runs in place of `block`; None where it must be called as it is."""
    read = readers.get(type(block).forward)
    if read is None or has_hooks(block):
        return None
    parts = read(block)
    layers = None if parts is None else as_layers(*parts)
    return layers if layers is not None and _is_folded(layers) else None


def as_layers(pairs: Sequence[tuple[nn.Module, nn.Module]], downsample: Shortcut) -> Layers | None:
    """The parts of a block as a chain takes them, whatever mode they are in; None if it cannot."""
    if len(pairs) != 3 or not all(is_pair(conv, bn) for conv, bn in pairs):
        return None
    projection = as_pair(downsample)
    first, second, third = cast(Sequence[Pair], pairs)
    if not _is_pointwise(third[0], stride=(1, 1)):
        return None
    if downsample is None:
        return Layers(first, second, third, None) if _keeps_shape(second[0]) else None
    if projection is None or not _is_pointwise(projection[0]):
        return None
    return Layers(first, second, third, projection)


def rolls_into(layers: Layers, following: Layers) -> bool:
    """Whether conv1 of the block behind `layers`, which has no projection, is part of its end."""
    next_conv, width = following.first[0], layers.second[0].out_channels
    return (
        width in ROLL_WIDTHS
        and next_conv.out_channels == width
        and next_conv.in_channels == layers.third[0].out_channels
        and _is_pointwise(next_conv, stride=(1, 1))
    )


def _run_block(
    x: Tensor, y1: Tensor | None, layers: Layers, following: Layers | None
) -> tuple[Tensor, Tensor | None]:
    """The block's output, and that of conv1 of the block behind it where it is there already.

    y1: what conv1 gives for x, None where that is still to be computed.
    """
    first, second, third, projection = layers
    x = x.to(computed_dtype(x))  # once, for both that read it
    if y1 is None:
        y1 = _convolve(x, first)
    if projection is not None:
        y2, stride = _convolve(y1, second), projection[0].stride
        return conv_projection_relu(y2, *_folded(third), x, *_folded(projection), stride), None
    if following is not None and rolls_into(layers, following):
        return bottleneck_roll(y1, x, *_folded(second), *_folded(third), *_folded(following.first))
    return bottleneck_tail(y1, x, *_folded(second), *_folded(third)), None


def _convolve(x: Tensor, pair: Pair) -> Tensor:
    conv, _ = pair
    weight, scale, shift = _folded(pair)
    geometry = conv.stride, cast(tuple[int, int], conv.padding), conv.dilation, conv.groups
    return conv_bn_relu(x, weight, scale, shift, None, True, *geometry)


def _folded(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    return pair[0].weight, *fold(*pair)


def _is_folded(layers: Layers) -> bool:
    """Whether every normalisation is one scale and one shift per channel."""
    return not any(uses_batch(pair[1]) for pair in layers if pair is not None)


def _is_pointwise(conv: nn.Conv2d, stride: tuple[int, int] | None = None) -> bool:
    geometry = (conv.kernel_size, conv.padding, conv.groups)
    return geometry == ((1, 1), (0, 0), 1) and stride in (None, conv.stride)


def _keeps_shape(conv: nn.Conv2d) -> bool:
    """Whether it is a 3x3 convolution that keeps channels and size of its input."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    same = (1, 1)
    return geometry == ((3, 3), same, same, same, 1) and conv.in_channels == conv.out_channels
