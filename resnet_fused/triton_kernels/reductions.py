"""What programs have left behind, one row each, combined over the rows in a fixed order."""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import device, tiles

# Elements of a tile: 8 per thread, loads enough in flight to hide their latency.
_TILE = 2048
WARPS = 8
# Rows of a tile at most. It is then 8 channels wide: the 32 bytes that memory moves at least.
_MAX_BLOCK_ROWS = 256
# A program steps through no more tiles than this: above it, groups of rows are combined first.
_MAX_STEPS = 4


@triton.jit
def combined_statistics(
    counts_ptr,
    means_ptr,
    m2s_ptr,
    first,
    last,
    channels,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """(count, mean, M2) of rows first to last - 1 together, for the channels `columns`.

    counts: (rows,); means, m2s: (rows, channels). The count comes as (1,).
    """
    inside = columns < channels
    count = tl.zeros((BLOCK_ROWS, 1), dtype=tl.float32)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < last)[:, None] & inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
        row_count = tl.load(counts_ptr + rows, mask=rows < last, other=0.0)
        row_mean = tl.load(means_ptr + offsets, mask=mask, other=0.0)
        row_m2 = tl.load(m2s_ptr + offsets, mask=mask, other=0.0)
        count, mean, m2 = tiles.combine_statistics(
            count, mean, m2, row_count[:, None], row_mean, row_m2
        )
    return merged_statistics(count, mean, m2)


@triton.jit
def merged_statistics(count, mean, m2):
    """(count, mean, M2) of all rows of a tile together.

    mean, m2: (ROWS, CHANNELS); count: the same or (ROWS, 1). The mean is corrected once by the
    differences from it: far from zero it would lose the last bits in a sum of that size.
    """
    total = tl.sum(count, axis=0)
    inverse = 1.0 / tl.maximum(total, 1.0)
    merged = tl.sum(mean * count, axis=0) * inverse
    difference = mean - merged[None, :]
    step = tl.sum(difference * count, axis=0) * inverse
    difference -= step[None, :]
    return total, merged + step, tl.sum(m2 + count * difference * difference, axis=0)


@triton.jit
def summed(
    partials_ptr,
    first,
    last,
    channels,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The sum of rows first to last - 1, for the channels `columns`."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < last)[:, None] & (columns < channels)[None, :]
        offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _combine_statistics_kernel(
    counts_ptr,
    means_ptr,
    m2s_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    rows,
    group_rows,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    group = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = group * group_rows
    last = tl.minimum(rows, first + group_rows)
    count, mean, m2 = combined_statistics(
        *(counts_ptr, means_ptr, m2s_ptr, first, last, channels, columns),
        BLOCK_ROWS,
        BLOCK_CHANNELS,
    )
    one = tl.arange(0, 1)
    tl.store(count_ptr + group + one, count, mask=tl.program_id(0) + one == 0)
    at = group.to(tl.int64) * channels + columns
    tl.store(mean_ptr + at, mean, mask=columns < channels)
    tl.store(m2_ptr + at, m2, mask=columns < channels)


def combine_statistics(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 (sum of squared differences from the mean) of all rows together.

    counts: (T,), how many values each row stands for; means, m2s: (T, C); all float32. Returns
    (mean, m2), (C,) float32 each: zeros where T is 0. A count of 0 wants a finite mean. Two
    launches where T is large. The order is fixed by T and C: results repeat bit by bit.
    """
    for stage in stages(*means.shape):
        shape = stage.groups, means.size(1)
        outputs = counts.new_empty(shape[0]), means.new_empty(shape), m2s.new_empty(shape)
        _launch(stage, _combine_statistics_kernel, counts, means, m2s, *outputs)
        counts, means, m2s = outputs
    return means[0], m2s[0]


@triton.jit
def _sum_kernel(
    first_ptr,
    second_ptr,
    first_sums_ptr,
    second_sums_ptr,
    rows,
    group_rows,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Sums: (groups, channels), of one tensor or, where the second one is not None, of two."""
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = columns < channels
    group = tl.program_id(1)
    first = group * group_rows
    last = tl.minimum(rows, first + group_rows)
    at = group.to(tl.int64) * channels + columns
    total = summed(first_ptr, first, last, channels, columns, BLOCK_ROWS, BLOCK_CHANNELS)
    tl.store(first_sums_ptr + at, total, mask=inside)
    if second_ptr is not None:
        total = summed(second_ptr, first, last, channels, columns, BLOCK_ROWS, BLOCK_CHANNELS)
        tl.store(second_sums_ptr + at, total, mask=inside)


def sum_partials(*partials: Tensor) -> tuple[Tensor, ...]:
    """The sum over the rows of one tensor, or of each of two of one shape.

    partials: (T, C) float32, contiguous. Returns as many (C,) float32: zeros where T is 0. Two
    launches where T is large. The order is fixed by T and C: results repeat bit by bit.
    """
    for stage in stages(*partials[0].shape):
        sums = tuple(t.new_empty(stage.groups, stage.channels) for t in partials)
        missing = (None,) * (2 - len(partials))
        _launch(stage, _sum_kernel, *partials, *missing, *sums, *missing)
        partials = sums
    return tuple(t[0] for t in partials)


class Stage(NamedTuple):
    """One launch: `groups` groups of `group_rows` rows out of `rows`, each combined to one row."""

    rows: int
    group_rows: int
    groups: int
    channels: int
    block_rows: int
    block_channels: int


@functools.cache
def stages(rows: int, channels: int) -> tuple[Stage, ...]:
    """The launches that combine (rows, channels) to (1, channels), in order."""
    block_rows, block_channels = block(rows)
    groups = 1
    if rows > _MAX_STEPS * block_rows:
        groups = min(triton.cdiv(rows, block_rows), _MAX_STEPS * block_rows)
    group_rows = triton.cdiv(max(rows, 1), groups)
    groups = triton.cdiv(max(rows, 1), group_rows)
    stage = Stage(rows, group_rows, groups, channels, block_rows, block_channels)
    return (stage,) if groups == 1 else (stage, *stages(groups, channels))


def block(rows: int) -> tuple[int, int]:
    """Rows and channels of a tile over `rows` rows."""
    block_rows = min(_MAX_BLOCK_ROWS, triton.next_power_of_2(max(rows, 1)))
    return block_rows, _TILE // block_rows


def _launch(stage: Stage, kernel: Any, *tensors: Any) -> None:
    if stage.channels == 0:
        return
    grid = triton.cdiv(stage.channels, stage.block_channels), stage.groups
    with device.guard(tensors[0]):
        kernel[grid](
            *tensors,
            stage.rows,
            stage.group_rows,
            stage.channels,
            stage.block_rows,
            stage.block_channels,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
