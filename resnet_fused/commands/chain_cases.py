"""The operators over several layers of a Bottleneck, one case per distinct block of a network."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import backends, ops
from resnet_fused.commands.cases import Case, scaled

Tensors = dict[str, Tensor]


class Block(NamedTuple):
    """A Bottleneck as it occurs in a network.

    width: channels inside; stride: of the shortcut's projection, None where x is added as it is.
    """

    x: tuple[int, ...]
    out: tuple[int, ...]
    width: int
    stride: tuple[int, ...] | None

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of what conv3 gets, and for the identity also of what conv2 gets."""
        return (self.out[0], self.width, *self.out[2:])

    @property
    def label(self) -> str:
        x, out = ("x".join(map(str, shape)) for shape in (self.x, self.out))
        return f"{x} -> {self.width} -> {out}"


def blocks(model: nn.Module, images: Tensor) -> list[Block]:
    """Those of an eager model which one of the operators computes, for these images."""
    found: dict[Block, None] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        second, third, shortcut = (getattr(module, name) for name in _PARTS)
        projection = shortcut[0] if isinstance(shortcut, nn.Sequential) else None
        stride = projection.stride if isinstance(projection, nn.Conv2d) else None
        is_plain = shortcut is None and (second.groups, second.dilation) == (1, (1, 1))
        if stride is None and not is_plain:
            return
        x, out = tuple(inputs[0].shape), tuple(output.shape)
        found[Block(x, out, third.in_channels, stride)] = None

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if all(hasattr(module, name) for name in _PARTS)
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


_PARTS = ("conv2", "conv3", "downsample")


def chain_cases(found: list[Block], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The operators that the backend asked for has, on every block; the same inputs each time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        value = torch.randn(shape, generator=generator, device=device).to(dtype)
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

    for block in found:
        for case in (_identity if block.stride is None else _projection)(block, random):
            if backends.is_implemented(case.operator):
                yield case


def _projection(block: Block, random: Callable[..., Tensor]) -> Iterator[Case]:
    stride, kernels = block.stride or (1, 1), block.out[1]
    fused = functools.partial(ops.conv_projection_relu, stride=stride)
    tensors = {
        "y": random(*block.inner),
        **_layer("{}", (kernels, block.width, 1, 1), random),
        "x": random(*block.x),
        **_layer("projection_{}", (kernels, block.x[1], 1, 1), random),
    }

    def plain(y: Tensor, *rest: Tensor) -> Tensor:
        return _convolved(y, *rest[:3]) + _convolved(*rest[3:], stride=stride)

    yield Case("conv_projection_relu", block.label, fused, plain, tensors, inference=True)


def _identity(block: Block, random: Callable[..., Tensor]) -> Iterator[Case]:
    width, kernels = block.width, block.out[1]
    first = _layer("{}1", (width, kernels, 1, 1), random)
    tail = _layer("{}2", (width, width, 3, 3), random)
    tail |= _layer("{}3", (kernels, width, 1, 1), random)
    following = _layer("next_{}1", (width, kernels, 1, 1), random)
    inputs = {"y1": random(*block.inner), "residual": random(*block.x)}

    def plain_tail(y1: Tensor, residual: Tensor, *layers: Tensor) -> Tensor:
        y2 = _convolved(y1, *layers[:3], padding=1).relu()
        return _convolved(y2, *layers[3:6]) + residual

    def plain_roll(*tensors: Tensor) -> Tensor:
        return _convolved(plain_tail(*tensors).relu(), *tensors[8:])

    def plain_block(x: Tensor, *layers: Tensor) -> Tensor:
        return plain_tail(_convolved(x, *layers[:3]).relu(), x, *layers[3:])

    def roll(index: int) -> Callable[..., Tensor]:
        return lambda *tensors: ops.bottleneck_roll(*tensors)[index]

    name, label = "bottleneck_roll", block.label
    rolled, whole = inputs | tail | following, {"x": inputs["residual"]} | first | tail
    for case in (
        Case("bottleneck_tail", label, ops.bottleneck_tail, plain_tail, inputs | tail),
        Case(name, f"{label}, output", roll(0), plain_tail, rolled),
        Case(name, f"{label}, conv1 of the next block", roll(1), plain_roll, rolled),
        Case("bottleneck_block", label, ops.bottleneck_block, plain_block, whole),
    ):
        yield case._replace(inference=True)


def _layer(names: str, weight: tuple[int, ...], random: Callable[..., Tensor]) -> Tensors:
    fan_in = weight[1] * weight[2] * weight[3]
    scale, shift = (random(weight[0], dtype=torch.float32) for _ in range(2))
    values = {"weight": random(*weight) * fan_in**-0.5, "scale": 1 + 0.1 * scale, "shift": shift}
    return {names.format(name): value for name, value in values.items()}


def _convolved(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, **geometry: Any) -> Tensor:
    return scaled(F.conv2d(x, weight, None, **geometry), scale, shift)
