"""How TMA sees the tensors of a convolution: arrays that it moves box by box."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.triton_kernels.problem import ConvProblem, Kind, PixelTile


class View(NamedTuple):
    """An array, and the box of it that is moved at a time; elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def dense(shape: Sequence[int], box: Sequence[int]) -> View:
    """Of memory that holds `shape` without gaps.

    The strides are not the tensor's: those of sides of 1 mean nothing to PyTorch, but TMA checks
    them.
    """
    strides = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return View(tuple(shape), tuple(strides), tuple(box))


def like_x(problem: ConvProblem, kind: Kind, tile: PixelTile, channels: int) -> View:
    """(N, H, W, C) in boxes of `tile` pixels x `channels`.

    rows: all pixels are one row. strided_boxes: (N, H / 2, 2, W / 2, 2 * C), where rows and columns
    of one parity are a box without gaps.
    """
    n, c, h, w, *_ = problem
    if kind == "rows":
        return dense((1, 1, n * h * w, c), (*tile, channels))
    if kind == "strided_boxes":
        halves = n, h // 2, 2, w // 2, 2 * c
        return dense(halves, (tile.n, tile.h, 1, tile.w, channels))
    return dense((n, h, w, c), (*tile, channels))


def like_y(problem: ConvProblem, kind: Kind, tile: PixelTile, channels: int) -> View:
    """(N, P, Q, K), as `like_x` but for the halves."""
    n, k, p, q = problem.n, problem.k, problem.p, problem.q
    return dense((1, 1, n * p * q, k) if kind == "rows" else (n, p, q, k), (*tile, channels))


def argument(view: View | None, tensor: Tensor | None) -> Any:
    """What a kernel takes for `tensor`: a descriptor, or a pointer where there is no view."""
    if view is None or tensor is None:
        return tensor
    # Not TensorDescriptor(...), which checks the same view again in each launch.
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_attributes(view, tensor.dtype), base=tensor)
    return descriptor


@functools.cache
def _attributes(view: View, dtype: torch.dtype) -> dict[str, Any]:
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype), *map(list, view)))
