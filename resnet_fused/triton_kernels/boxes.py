"""How TMA sees the tensors of a convolution's gradients."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from resnet_fused.triton_kernels import device
from resnet_fused.triton_kernels.problem import ConvProblem, Kind, PixelTile


def like_x(
    tensor: Tensor | None, problem: ConvProblem, kind: Kind, tile: PixelTile, channels: int
) -> Any:
    """A descriptor of (N, H, W, C) in boxes of `tile` pixels x `channels`; None of None.

    rows: all pixels are one row. strided_boxes: of (N, H / 2, 2, W / 2, 2 * C), where rows and
    columns of one parity are a box without gaps.
    """
    n, c, h, w, *_ = problem
    if kind == "rows":
        return described(tensor, (1, 1, n * h * w, c), (*tile, channels))
    if kind == "strided_boxes":
        halves = n, h // 2, 2, w // 2, 2 * c
        return described(tensor, halves, (tile.n, tile.h, 1, tile.w, channels))
    return described(tensor, (n, h, w, c), (*tile, channels))


def like_y(
    tensor: Tensor | None, problem: ConvProblem, kind: Kind, tile: PixelTile, channels: int
) -> Any:
    """A descriptor of (N, P, Q, K), as `like_x` makes them but for the halves."""
    n, k, p, q = problem.n, problem.k, problem.p, problem.q
    shape = (1, 1, n * p * q, k) if kind == "rows" else (n, p, q, k)
    return described(tensor, shape, (*tile, channels))


def described(tensor: Tensor | None, shape: Sequence[int], box: Sequence[int]) -> Any:
    """A descriptor of memory that holds `shape` without gaps."""
    if tensor is None:
        return None
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return device.descriptor(tensor.as_strided(shape, strides), box)


def per_axis(name: str, pair: Sequence[int]) -> dict[str, int]:
    """The constants of a kernel for rows and for columns."""
    return {f"{name}_H": pair[0], f"{name}_W": pair[1]}
