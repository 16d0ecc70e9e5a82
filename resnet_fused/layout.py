"""Memory format of activations: one rule, shared by fake kernels and every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of an operator's output (and of its gradient) for the activation `x`.

    x: (N, C, H, W). NCHW stays NCHW, channels_last stays channels_last; anything that is not dense
    (slices, expanded tensors, other permutations) gives channels_last, the library's native format.
    """
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the bit mask of a ReLU whose output has the layout of `x`: runs, bytes of each.

    x: (N, C, H, W), dense. A run is the channels of a pixel in channels_last, a plane in NCHW; bit
    i % 8 of byte i // 8 belongs to its element i.
    """
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return n * h * w, -(-c // 8)
    return n * c, -(-h * w // 8)


def convolution_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """(N, K, P, Q): the shape of a convolution's output for the shapes of x and weight."""
    extent = [
        (x[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return (x[0], weight[0], *extent)


def pooled_shape(
    x: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """(N, C, P, Q): the shape of a pooling's output for the shape of x."""
    extent = [(x[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in range(2)]
    return (x[0], x[1], *extent)


def to_format(tensor: Tensor | None, memory_format: torch.memory_format) -> Tensor | None:
    """`tensor` in `memory_format`, itself where it already is; None stays None."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format)
