"""The shape of a convolution, and how its pixels are read and cut into tiles."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from resnet_fused.layout import convolution_shape
from resnet_fused.triton_kernels.device import Architecture

# rows: a plain matrix product, read by TMA. boxes, strided_boxes: TMA moves a box of pixels for
# each tap, with stride 1 and 2. gather: pointers, any geometry. filter_rows: pointers, few
# channels. depthwise: pointers, one channel in and out per group.
Kind = Literal["rows", "boxes", "strided_boxes", "gather", "filter_rows", "depthwise"]
TMA_KINDS = ("rows", "boxes", "strided_boxes")


class ConvProblem(NamedTuple):
    """One convolution: x (N, C, H, W) with weight (K, C / groups, R, S) gives (N, K, P, Q)."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a matrix product over pixels: 1x1, stride 1, no padding, one group."""
        return (
            (self.r, self.s) == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    @property
    def rows(self) -> int:
        """Pixels of the output, N * P * Q."""
        return self.n * self.p * self.q


def conv_problem(x: Tensor, weight: Tensor, *geometry: Any) -> ConvProblem:
    """geometry: stride, padding, dilation, groups, as in `torch.conv2d`."""
    *pairs, groups = geometry
    return _conv_problem(x.shape, weight.shape, *map(tuple, pairs), groups)


@functools.cache
def _conv_problem(
    x: Sequence[int],
    weight: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> ConvProblem:
    _, _, p, q = convolution_shape(x, weight, stride, padding, dilation)
    n, c, h, w = x
    k, _, r, s = weight
    return ConvProblem(n, c, h, w, k, r, s, p, q, stride, padding, dilation, groups)


def kind_of_pixels(problem: ConvProblem, architecture: Architecture, fits_tma: bool) -> Kind:
    """How the pixels of x are read or written; fits_tma: as in `device.fits_tma`."""
    if problem.groups > 1 or architecture.generation == "ampere" or not fits_tma:
        return "gather"
    if problem.is_pointwise:
        return "rows"
    if problem.stride == (1, 1):
        return "boxes"
    even = problem.h % 2 == 0 and problem.w % 2 == 0
    return "strided_boxes" if problem.stride == (2, 2) and even else "gather"


class PixelTile(NamedTuple):
    """A box of images x rows x columns, each a power of two."""

    n: int
    h: int
    w: int


@functools.cache
def pixel_tile(n: int, h: int, w: int, pixels: int) -> PixelTile:
    """The box of `pixels` elements that covers (n, h, w) with the fewest elements outside.

    Among equals the widest, because neighbours in a row share cache lines; a side is at most 256,
    TMA's limit.
    """
    sides = [1 << i for i in range(9) if 1 << i <= pixels]
    boxes = [
        PixelTile(pixels // (b * c), b, c)
        for b, c in itertools.product(sides, sides)
        if pixels % (b * c) == 0 and pixels // (b * c) <= 256
    ]

    def covered(box: PixelTile) -> int:
        return -(-n // box.n) * -(-h // box.h) * -(-w // box.w)

    return min(boxes, key=lambda box: (covered(box), -box.w, -box.h))


def tiles(n: int, h: int, w: int, tile: PixelTile) -> int:
    """Boxes that it takes to cover (n, h, w)."""
    return -(-n // tile.n) * -(-h // tile.h) * -(-w // tile.w)


def per_axis(name: str, pair: Sequence[int]) -> dict[str, int]:
    """The constants of a kernel for rows and for columns."""
    return {f"{name}_H": pair[0], f"{name}_W": pair[1]}
