"""Convolutions as CPU backends keep them for inference: normalisation folded in, weights packed."""

from typing import NamedTuple

from torch import Tensor

# padding, stride, dilation, groups: the order of oneDNN's operators
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class Convolution(NamedTuple):
    """A convolution and the folded normalisation of its output."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    geometry: Geometry


class PackedBlock(NamedTuple):
    """Convolutions as a native call takes them, the projection of a shortcut last.

    out_shape: what the block gives for the shape of x that it was packed for.
    """

    weights: list[Tensor]
    shifts: list[Tensor]
    geometry: list[int]
    has_projection: bool
    out_shape: tuple[int, ...]
