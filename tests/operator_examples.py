"""Every operator of the library, and arguments that it takes."""

from typing import Any

import torch
from numerics import normal
from torch import Tensor

import resnet_fused  # noqa: F401  (defines them)

_PREFIX = "resnet_fused::"
OPERATORS = sorted(
    name.removeprefix(_PREFIX).partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(_PREFIX)
)


def overload_of(operator: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.resnet_fused, operator).default


def name_of(overload: torch._ops.OpOverload) -> str:
    return overload._schema.name.removeprefix(_PREFIX)


class Example:
    """Arguments of every operator, other ones for every seed. n: the number of images."""

    def __init__(self, seed: int, n: int, dtype: torch.dtype) -> None:
        self.seed, self.n, self.dtype = 1000 * seed, n, dtype

    def _next(self, *shape: int) -> Tensor:
        self.seed += 1
        return normal(shape, self.seed, self.dtype)

    def image(self, h: int = 6, w: int = 5) -> Tensor:
        return self._next(self.n, 8, h, w).contiguous(memory_format=torch.channels_last)

    def vector(self) -> Tensor:
        return self._next(8).abs() + 0.5

    def vectors(self, count: int) -> list[Tensor]:
        return [self.vector() for _ in range(count)]

    def layer(self, size: int) -> list[Tensor]:
        return [self._next(8, 8, size, size), *self.vectors(2)]

    def argmax(self) -> Tensor:
        taps = (self._next(self.n, 8, 3, 3).abs() * 100).long() % 10
        return torch.where(taps == 9, 255, taps).to(torch.uint8)

    def arguments(self, operator: str) -> list[Any]:
        image, vectors = self.image, self.vectors
        geometry, windows = ([1, 1], [1, 1], [1, 1], 1), ([3, 3], [2, 2], [1, 1])
        bn = [*vectors(4), True, 0.1, 1e-5]
        residual_bn = [*vectors(4), True, 0.2, 1e-5]
        sums = [*vectors(4), image(), True, *vectors(4)]
        whole = [*vectors(4), True, True, image(), True, *vectors(4), True, True]
        averages = [torch.stack(vectors(3))]
        pooled = image(3, 3)
        arguments = {
            "add_relu": [image(), image()],
            "bn_relu": [image(), *bn, image(), True, *residual_bn, True, False],
            "bn_relu_apply": [image(), *vectors(4), True],
            "bn_relu_backward": [image(), image(), image(), None, *whole],
            "bn_relu_backward_sums": [image(), image(), image(), None, *sums, True],
            "bn_relu_backward_apply": [image(), image(), image(), None, *whole, *averages],
            "bn_statistics": [image()],
            "bn_relu_max_pool": [image(), *bn, *windows],
            "bn_relu_max_pool_backward_sums": [
                *(pooled, image(), self.argmax(), self.vector(), *windows)
            ],
            "bn_relu_max_pool_backward_apply": [
                *(pooled, image(), self.argmax(), *vectors(3), True),
                *(torch.stack(vectors(2)), *windows),
            ],
            "conv_bn_relu": [image(), *self.layer(3), image(), True, *geometry],
            "conv_bn_relu_backward": [
                *(image(), image(), *self.layer(3)[:2], image(), True, *geometry)
            ],
            "conv_projection_relu": [image(), *self.layer(1), image(), *self.layer(1), [1, 1]],
            "bottleneck_tail": [image(), image(), *self.layer(3), *self.layer(1)],
            "bottleneck_roll": [image(), image(), *self.layer(3), *self.layer(1), *self.layer(1)],
            "bottleneck_block": [image(), *self.layer(1), *self.layer(3), *self.layer(1)],
            "conv_stats": [image(), *self.layer(3), *geometry],
            "conv_dgrad": [
                *(image(), self.layer(3)[0], [6, 5], image(), torch.stack(vectors(3)), image()),
                *(image(), *vectors(2), None, self.vector(), *geometry),
            ],
            "conv_wgrad": [image(), image(), *self.layer(3), *geometry],
        }
        same = {
            "add_relu_backward": "add_relu",
            "bn_relu_functional": "bn_relu",
            "bn_relu_max_pool_functional": "bn_relu_max_pool",
            "conv_bn_relu_": "conv_bn_relu",
        }
        return arguments[same.get(operator, operator)]
