"""What a batch norm measures of its input: mean and sum of squared differences of every channel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import activations, device, reductions, tiles
from resnet_fused.triton_kernels.activations import Spread

# One round of as many programs as registers leave room for: each leaves partial results behind,
# which are to be combined.
SPREAD = Spread(vectors=4, columns=16, programs=2, min_tiles=2)


@triton.jit
def _origin(x_ptr, own, rows, run, channels, CHANNELS_LAST: tl.constexpr):
    """The mean of the first values of each channel, from which all are measured.

    Means are then smaller than the deviation: far from zero they would be rounded too coarsely, and
    M2 with them.
    """
    i = tl.arange(0, 8)
    if CHANNELS_LAST:
        at = i[:, None] * run + own[None, :]
        count = tl.minimum(rows, 8)
    else:
        at = own.to(tl.int64)[None, :] * run + i[:, None]
        count = tl.minimum(run, 8)
    exists = (i < count)[:, None] & (own < channels)[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    return tl.sum(x, axis=0) / count.to(tl.float32)


@triton.jit
def _load_tile(
    tile,
    x_ptr,
    origin,
    rows,
    run,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The tile of x - origin, and which elements exist."""
    runs, columns, exists = activations.locate(
        tile, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
    )
    x = tl.load(x_ptr + runs * run + columns, mask=exists, other=0.0).to(tl.float32)
    return x - origin[None, :], exists


@triton.jit(do_not_specialize=activations.RUNTIME)
def _statistics_kernel(
    x_ptr,
    partials_ptr,
    n_tiles,
    whole_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Means (splits, C), M2s (splits, C), the origin (C,) and counts (splits,).

    The means are those of x - origin. Reads x, one element size per element.
    """
    run = run_units * UNIT
    OWN: tl.constexpr = BLOCK_COLUMNS if CHANNELS_LAST else 1
    GROUPS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // OWN // TERMS
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    origin = _origin(x_ptr, own, rows, run, channels, CHANNELS_LAST)
    mean = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    m2 = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    # All values of a thread are as many in a full tile: one number counts them.
    tile_count = tl.cast(TERMS, tl.float32)
    whole_count = tl.cast(0.0, tl.float32)
    for tile in range(split, whole_tiles, splits):
        x, _ = _load_tile(
            tile, x_ptr, origin, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
        )
        x = activations.terms(x, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
        tile_mean, tile_m2 = tiles.tile_statistics(x, None, tile_count, 0, True)
        whole_count, mean, m2 = tiles.combine_statistics(
            whole_count, mean, m2, tile_count, tile_mean, tile_m2
        )
    count = tl.zeros((GROUPS, OWN), dtype=tl.float32) + whole_count
    if CHANNELS_LAST:
        total, mean, m2 = reductions.merged_statistics(count, mean, m2)
        for tile in range(whole_tiles + split, n_tiles, splits):  # there is one at most
            x, _ = _load_tile(
                tile, x_ptr, origin, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
            )
            left = rows - tile * BLOCK_ROWS
            tile_count = left.to(tl.float32)
            row_exists = (tl.arange(0, BLOCK_ROWS) < left)[:, None]
            tile_mean, tile_m2 = tiles.tile_statistics(x, row_exists, tile_count, 0, False)
            total, mean, m2 = tiles.combine_statistics(
                total, mean, m2, tile_count, tile_mean, tile_m2
            )
    else:
        for tile in range(whole_tiles + split, n_tiles, splits):
            x, exists = _load_tile(
                tile, x_ptr, origin, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
            )
            x = activations.terms(x, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
            exists = activations.terms(
                exists, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR
            )
            counts = tl.sum(exists.to(tl.float32), axis=0)
            tile_mean, tile_m2 = tiles.tile_statistics(x, exists, tl.maximum(counts, 1.0), 0, False)
            count, mean, m2 = tiles.combine_statistics(count, mean, m2, counts, tile_mean, tile_m2)
        total, mean, m2 = reductions.merged_statistics(count, mean, m2)
    inside = own < channels
    step = splits.to(tl.int64) * channels
    at = split.to(tl.int64) * channels + own
    tl.store(partials_ptr + at, mean, mask=inside)
    tl.store(partials_ptr + step + at, m2, mask=inside)
    rest_ptr = partials_ptr + 2 * step
    if split == 0:
        tl.store(rest_ptr + own, origin, mask=inside)
    tl.store(rest_ptr + channels + split + 0 * own, total, mask=own == 0)


@triton.jit
def _update(running_ptr, batch, momentum, channels, inside):
    if running_ptr is not None:
        running = tl.load(running_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        running = tl.fma(momentum, batch, (1.0 - momentum) * running)
        tl.store(running_ptr + channels, running.to(running_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "channels"])
def _finalize_kernel(
    partials_ptr,
    mean_ptr,
    invstd_ptr,
    m2_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    splits,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Mean of every channel; invstd, M2 and the running statistics where they are wanted."""
    own = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = own < channels
    step = splits.to(tl.int64) * channels
    origin_ptr = partials_ptr + 2 * step
    total, mean, m2 = reductions.combined_statistics(
        *(origin_ptr + channels, partials_ptr, partials_ptr + step, 0, splits, channels, own),
        BLOCK_ROWS,
        BLOCK_CHANNELS,
    )
    mean += tl.load(origin_ptr + own, mask=inside, other=0.0)
    tl.store(mean_ptr + own, mean, mask=inside)
    if invstd_ptr is not None:
        tl.store(invstd_ptr + own, activations.inverse_deviation(m2 / total, eps), mask=inside)
    if m2_ptr is not None:
        tl.store(m2_ptr + own, m2, mask=inside)
    _update(running_mean_ptr, mean, momentum, own, inside)
    _update(running_var_ptr, m2 / (total - 1.0), momentum, own, inside)


def bn_statistics(x: Tensor, spread: Spread = SPREAD) -> tuple[Tensor, Tensor]:
    """`reference.bn_statistics` in two launches."""
    if x.numel() == 0:
        mean, m2 = x.new_zeros((2, x.size(1)), dtype=torch.float32).unbind()
        return mean, m2
    mean, m2 = (x.new_empty(x.size(1), dtype=torch.float32) for _ in range(2))
    launch_statistics(x, (mean, None, m2, None, None, 0.0, 0.0), spread)
    return mean, m2


def launch_statistics(x: Tensor, results: tuple[Any, ...], spread: Spread) -> None:
    """results: mean, invstd, M2, running statistics, which may be None; momentum and eps."""
    channels = x.size(1)
    plan = activations.plan(spread, x)
    partials = x.new_empty((2 * plan.splits + 1) * channels + plan.splits, dtype=torch.float32)
    constants = plan.terms | {"whole_tiles": plan.whole_tiles}
    activations.launch(_statistics_kernel, plan, (x, partials), constants)
    block_rows, block_channels = reductions.block(plan.splits)
    with device.guard(x):
        _finalize_kernel[(triton.cdiv(channels, block_channels),)](
            *(partials, *results, plan.splits, channels, block_rows, block_channels),
            num_warps=reductions.WARPS,
            enable_fp_fusion=False,
        )
