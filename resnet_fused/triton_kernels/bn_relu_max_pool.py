"""Batch norm, ReLU and max pooling in one, and the backward, without the ReLU's output in memory.

With g the gradient that comes to an element of x from the outputs which it is, and xc = x - mean:
  sums = sum(g), sum(g * xc),
  grad_x = (g - averages[0] - xc * invstd^2 * averages[1]) * weight * invstd,
without the two middle terms where the running statistics were used.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.layout import memory_format, pooled_shape
from resnet_fused.triton_kernels import activations, bn_relu, device, reductions, tiles
from resnet_fused.triton_kernels.activations import Spread
from resnet_fused.triton_kernels.bn_relu_backward import affine, gradient

# Of the planes of x and of the output, as the kernels get them.
_SIZES = ("height", "width", "out_height", "out_width")
_RUNTIME = (*activations.RUNTIME, *_SIZES)
_CLOSED = tl.constexpr(255)  # in place of a tap: no gradient passes


class Configuration(NamedTuple):
    """How the passes of forward and backward are spread over the device."""

    statistics: Spread
    max_pool: Spread
    sums: Spread
    gradients: Spread


@functools.cache
def configurations(
    dtype: torch.dtype, architecture: device.Architecture
) -> tuple[Configuration, ...]:
    """What may be fastest, the static choice first."""
    (forward, *_) = bn_relu.configurations(False, dtype, architecture)
    # One access of a thread to each tensor: of x it has a row of each window in flight, and wider
    # tiles would give the bytes of argmax another layout than the elements that they belong to.
    rounds = Spread(vectors=1, columns=32, programs=8)
    # One round: each program leaves partial results behind.
    sums = Spread(vectors=1, columns=16, programs=2, min_tiles=2)
    return (Configuration(forward.statistics, rounds, sums, rounds),)


@triton.jit
def _place(runs, columns, height, width, CHANNELS_LAST: tl.constexpr):
    """Of each pixel of a tile: its image (its plane in NCHW), row and column."""
    if CHANNELS_LAST:
        pixel = runs.to(tl.int32)
        place = (pixel // width // height).to(tl.int64), pixel // width % height, pixel % width
    else:
        place = runs, columns // width, columns % width
    return place


@triton.jit
def _address(image, row, column, height, width, run, channels, CHANNELS_LAST: tl.constexpr):
    """Offset of an element; run: elements of a pixel; channels: the element's, in channels_last."""
    at = (image * height + row) * width + column
    if CHANNELS_LAST:
        at = at * run + channels
    return at


@triton.jit(do_not_specialize=_RUNTIME)
def _max_pool_kernel(
    x_ptr,
    out_ptr,
    argmax_ptr,
    mean_ptr,
    spread_ptr,
    eps,
    saved_mean_ptr,
    saved_invstd_ptr,
    weight_ptr,
    bias_ptr,
    height,
    width,
    out_height,
    out_width,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
):
    """The output, and which tap of its window each element is.

    Reads x and writes out, one element size per element of theirs, and a byte of argmax per element
    of out. What windows share is read again, mostly from a cache.
    """
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean, invstd = bn_relu.used_statistics(
        mean_ptr, spread_ptr, eps, saved_mean_ptr, saved_invstd_ptr, own, inside
    )
    scale = invstd * activations.load_vector(weight_ptr, own, inside, 1.0)
    bias = activations.load_vector(bias_ptr, own, inside, 0.0)
    # Backwards: what the statistics have read last is still in the second-level cache.
    for step in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        runs, columns, exists = activations.locate(
            n_tiles - 1 - step, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
        )
        image, row, column = _place(runs, columns, out_height, out_width, CHANNELS_LAST)
        # Of the taps so far: what is not positive is no maximum.
        best = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        argmax = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), _CLOSED, dtype=tl.int32)
        for r in range(0, KERNEL_H):
            for s in tl.static_range(KERNEL_W):
                h = row * STRIDE_H - PADDING_H + r
                w = column * STRIDE_W - PADDING_W + s
                there = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
                at = _address(image, h, w, height, width, run, columns, CHANNELS_LAST)
                x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
                y = tiles.scale_shift(x - mean[None, :], scale[None, :], bias[None, :])
                # The first of equals, and NaN over all, as in PyTorch.
                wins = ((y > best) | (y != y)) & there
                best = tl.where(wins, y, best)
                argmax = tl.where(wins, r * KERNEL_W + s, argmax)
        at = runs * run + columns
        tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=exists)
        tl.store(argmax_ptr + at, argmax.to(tl.uint8), mask=exists)


@triton.jit
def _sum_of_rows(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Neighbours first: of few pixels these are all rows that are not 0, far from a tree else."""
    values = tl.sum(tl.reshape(values, (ROWS // 4, 4, COLUMNS)), axis=1)
    return tl.sum(values, axis=0)


@triton.jit(do_not_specialize=_RUNTIME)
def _sums_kernel(
    grad_out_ptr,
    x_ptr,
    argmax_ptr,
    mean_ptr,
    sums_ptr,
    height,
    width,
    out_height,
    out_width,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    VECTOR: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
):
    """Sums of g and of g * xc: (splits, 2, C).

    Reads grad_out, one element size, and a byte of argmax per element of theirs, and for each of
    them that is open the one element of x which it is.
    """
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean = activations.load_vector(mean_ptr, own, inside, 0.0)
    OWN: tl.constexpr = BLOCK_COLUMNS if CHANNELS_LAST else 1
    GROUPS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // OWN // TERMS
    sum_g = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    sum_g_xc = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        runs, columns, exists = activations.locate(
            tile, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
        )
        at = runs * run + columns
        g = tl.load(grad_out_ptr + at, mask=exists, other=0.0).to(tl.float32)
        tap = tl.load(argmax_ptr + at, mask=exists, other=_CLOSED).to(tl.int32)
        is_open = tap != _CLOSED
        image, row, column = _place(runs, columns, out_height, out_width, CHANNELS_LAST)
        # A pixel of x in any case: an argmax from elsewhere reads nothing else.
        h = row * STRIDE_H - PADDING_H + tap // KERNEL_W
        h = tl.minimum(tl.maximum(h, 0), height - 1)
        w = column * STRIDE_W - PADDING_W + tap % KERNEL_W
        w = tl.minimum(tl.maximum(w, 0), width - 1)
        at = _address(image, h, w, height, width, run, columns, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=is_open, other=0.0).to(tl.float32)
        g = tl.where(is_open, g, 0.0)
        g_xc = tl.where(is_open, g * (x - mean[None, :]), 0.0)
        g = activations.terms(g, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
        g_xc = activations.terms(g_xc, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
        sum_g += tl.sum(g, axis=0)
        sum_g_xc += tl.sum(g_xc, axis=0)
    sums_ptr += 2 * tl.program_id(1).to(tl.int64) * channels + own
    tl.store(sums_ptr, _sum_of_rows(sum_g, GROUPS, OWN), mask=inside)
    tl.store(sums_ptr + channels, _sum_of_rows(sum_g_xc, GROUPS, OWN), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def _gradients_kernel(
    grad_out_ptr,
    x_ptr,
    argmax_ptr,
    grad_x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    averages_ptr,
    height,
    width,
    out_height,
    out_width,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """grad_x.

    Reads x in training and writes grad_x, one element size per element of theirs, and reads
    grad_out, one element size, and a byte of argmax per element of theirs. What pixels share is
    read again, mostly from a cache.
    """
    # Windows that a pixel may lie in, along each axis.
    OVERLAP_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    OVERLAP_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean, invstd, scale, _ = affine(mean_ptr, invstd_ptr, weight_ptr, None, own, inside)
    if TRAINING:
        mean_g = activations.load_vector(averages_ptr, own, inside, 0.0)
        slope = activations.load_vector(averages_ptr + channels, own, inside, 0.0)
        slope *= invstd * invstd
    # Backwards: what the sums have read last is still in the second-level cache.
    for step in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        runs, columns, exists = activations.locate(
            n_tiles - 1 - step, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
        )
        image, row, column = _place(runs, columns, height, width, CHANNELS_LAST)
        g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for i in range(0, OVERLAP_H):
            for j in tl.static_range(OVERLAP_W):
                # An output, and the tap that this pixel is of it.
                p = (row + PADDING_H) // STRIDE_H - (OVERLAP_H - 1) + i
                q = (column + PADDING_W) // STRIDE_W - (OVERLAP_W - 1) + j
                r = row + PADDING_H - p * STRIDE_H
                s = column + PADDING_W - q * STRIDE_W
                there = exists & (p >= 0) & (p < out_height) & (r < KERNEL_H)
                there = there & (q >= 0) & (q < out_width) & (s < KERNEL_W)
                at = _address(image, p, q, out_height, out_width, run, columns, CHANNELS_LAST)
                tap = tl.load(argmax_ptr + at, mask=there, other=_CLOSED).to(tl.int32)
                grad_out = tl.load(grad_out_ptr + at, mask=there, other=0.0).to(tl.float32)
                g += tl.where(tap == r * KERNEL_W + s, grad_out, 0.0)
        at = runs * run + columns
        if TRAINING:
            x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
            grad_x = gradient(g, x - mean[None, :], scale, mean_g, slope)
        else:
            grad_x = g * scale[None, :]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)


def bn_relu_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.bn_relu_max_pool` in three launches, one in evaluation."""
    spreads = configuration or _static_choice(x)
    bn = bn_relu.BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps)
    mean, invstd, normaliser = bn_relu.normalisation(x, bn, spreads.statistics)
    shape = pooled_shape(x.shape, kernel_size, stride, padding)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    argmax = torch.empty_like(out, dtype=torch.uint8)
    windows = _windows(kernel_size, stride, padding)
    plan = _plan(spreads.max_pool, x, out, x, argmax)
    arguments = x, out, argmax, *normaliser, *x.shape[2:], *out.shape[2:]
    activations.launch(_max_pool_kernel, plan, arguments, windows)
    return out, mean, invstd, argmax


def bn_relu_max_pool_backward_sums(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    configuration: Configuration | None = None,
) -> Tensor:
    """`reference.bn_relu_max_pool_backward_sums` in two launches."""
    spreads = configuration or _static_choice(x)
    plan = _plan(spreads.sums, x, grad_out, x, argmax)
    partials = x.new_empty((plan.splits, 2 * x.size(1)), dtype=torch.float32)
    vector = activations.dense_vector(mean)
    arguments = grad_out, x, argmax, vector, partials, *x.shape[2:], *grad_out.shape[2:]
    constants = plan.terms | _windows(kernel_size, stride, padding)
    activations.launch(_sums_kernel, plan, arguments, constants)
    (sums,) = reductions.sum_partials(partials)
    return sums.view(2, -1)


def bn_relu_max_pool_backward_apply(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    averages: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    configuration: Configuration | None = None,
) -> Tensor:
    """`reference.bn_relu_max_pool_backward_apply` in one launch."""
    spreads = configuration or _static_choice(x)
    grad_x = torch.empty_like(x)
    plan = _plan(spreads.gradients, x, x, grad_out, argmax, grad_x)
    vectors = map(activations.dense_vector, (mean, invstd, weight))
    arguments = (
        *(grad_out, x, argmax, grad_x, *vectors, averages.contiguous()),
        *(*x.shape[2:], *grad_out.shape[2:]),
    )
    constants = _windows(kernel_size, stride, padding) | {"TRAINING": training}
    activations.launch(_gradients_kernel, plan, arguments, constants)
    return grad_x


def _static_choice(x: Tensor) -> Configuration:
    return configurations(x.dtype, device.architecture(x))[0]


def _plan(spread: Spread, x: Tensor, *activations_: Tensor) -> activations.Plan:
    """activations_: all of a kernel, the one whose tiles it steps through first."""
    channels_last = memory_format(x) == torch.channels_last
    return activations.plan(spread, *activations_, channels_last=channels_last)


def _windows(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> dict[str, int]:
    named = {"KERNEL": kernel_size, "STRIDE": stride, "PADDING": padding}
    return {
        f"{name}_{axis}": size
        for name, sizes in named.items()
        for axis, size in zip("HW", sizes, strict=True)
    }
