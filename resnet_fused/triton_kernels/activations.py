"""Activations (N, C, H, W) in either memory format, as the programs of a kernel walk over them.

Memory is a sequence of runs: the channels of a pixel in channels_last, a plane in NCHW. A tile is
BLOCK_ROWS runs x BLOCK_COLUMNS of their elements; programs with one number on axis 0 of the grid
see the same channels all the time: BLOCK_COLUMNS of them in channels_last, one in NCHW. Those on
axis 1 share the tiles of these channels: in channels_last they differ in their runs only, in NCHW
they are those of all images, and for each the parts of a plane.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import device

_ACCESS_BYTES = 16
_WARP = 32
# Of a tile in NCHW, at least: a row is then a cache line in 16-bit floats.
_MIN_PLANE_COLUMNS = 64
# Elements whose bits share a byte of a mask.
_MASK_BITS = 8
_MAX_SPLITS = 65535  # of axis 1 of a grid

# Arguments of kernels that are not to make variants of them.
RUNTIME = ("n_tiles", "whole_tiles", "rows", "run_units", "channels")


@triton.jit
def locate(
    tile,
    rows,
    run,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Runs (BLOCK_ROWS, 1) and columns (1, BLOCK_COLUMNS) of a tile, and which elements exist."""
    if CHANNELS_LAST:
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        runs = row.to(tl.int64)
        columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    else:
        blocks = tl.cdiv(run, BLOCK_COLUMNS)
        row = tile // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        runs = row.to(tl.int64) * channels + tl.program_id(0)
        columns = tile % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return runs[:, None], columns[None, :], (row < rows)[:, None] & (columns < run)[None, :]


@triton.jit
def own_channels(CHANNELS_LAST: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The channels that this program sees: (BLOCK_COLUMNS,) in channels_last, (1,) in NCHW."""
    if CHANNELS_LAST:
        channels = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    else:
        channels = tl.program_id(0) + tl.arange(0, 1)
    return channels


@triton.jit
def terms(
    values,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile as (terms, groups, own channels): what a thread holds of a channel is the terms.

    They can be summed without a word between threads. Rows far apart belong to one thread, and in
    NCHW the VECTOR elements of one access too.
    """
    COUNT: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // TERMS
    if CHANNELS_LAST:
        result = tl.reshape(values, (TERMS, BLOCK_ROWS // TERMS, BLOCK_COLUMNS))
    else:
        parts = tl.reshape(values, (TERMS // VECTOR, COUNT, VECTOR))
        result = tl.reshape(tl.permute(parts, (0, 2, 1)), (TERMS, COUNT, 1))
    return result


@triton.jit
def load_vector(vector_ptr, channels, inside, MISSING: tl.constexpr):
    """Values of `channels` as float32, all of them MISSING where there is no vector."""
    if vector_ptr is None:
        vector = tl.full(channels.shape, MISSING, tl.float32)
    else:
        vector = tl.load(vector_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    return vector


@triton.jit
def passes_relu(total, dtype: tl.constexpr):
    """Whether a gradient passes the ReLU of `total` rounded to `dtype`. NaN passes.

    The constants are the largest numbers that round to zero: an output is positive above them.
    """
    if dtype == tl.float16:
        passes = (total <= 2.0**-25) == 0
    elif dtype == tl.bfloat16:
        passes = (total <= 2.0**-134) == 0
    else:
        passes = (total <= 0.0) == 0
    return passes


@triton.jit
def inverse_deviation(variance, eps):
    """1 / sqrt(variance + eps), each step rounded once."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


class Spread(NamedTuple):
    """How one kernel is spread over the device: the configuration of the kernels here.

    vectors: accesses of 16 bytes per thread and tensor in one tile, all in flight together.
    columns: channels of a tile in channels_last, at most, in such accesses. programs: per
    multiprocessor, if there are tiles enough. min_tiles: of a program, if there are programs
    enough.
    """

    vectors: int
    columns: int
    programs: int
    min_tiles: int = 1
    warps: int = 8


class Plan(NamedTuple):
    """One launch: what its kernel is told of the activations."""

    grid: tuple[int, int]
    warps: int
    walk: dict[str, int]  # what `locate` needs
    terms: dict[str, int]  # what `terms` needs beyond that
    whole_tiles: int  # tiles from this number on are not full: in channels_last, in their rows

    @property
    def splits(self) -> int:
        """Programs that share the tiles of a channel."""
        return self.grid[1]


def plan(
    spread: Spread, x: Tensor, *others: Tensor | None, channels_last: bool | None = None
) -> Plan:
    """x, others: all activations of a kernel, dense and in one memory format.

    channels_last: that format, where `others` are of other shapes; x may lie in both at once.
    """
    if channels_last is None:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return _plan(
        x.shape,
        channels_last,
        x.element_size(),
        all(t is None or t.data_ptr() % _ACCESS_BYTES == 0 for t in (x, *others)),
        spread,
        device.architecture(x).multiprocessors,
    )


@functools.cache
def _plan(
    shape: tuple[int, ...],
    channels_last: bool,
    element_size: int,
    aligned: bool,
    spread: Spread,
    multiprocessors: int,
) -> Plan:
    n, c, h, w = shape
    rows, run = (n * h * w, c) if channels_last else (n, h * w)
    unit = _power_of_two_in(run)
    access = _ACCESS_BYTES // element_size
    threads = _WARP * spread.warps
    elements = threads * access * spread.vectors
    if channels_last:
        columns = max(_MASK_BITS, min(triton.next_power_of_2(run), spread.columns * access))
        terms = {"TERMS": spread.vectors, "VECTOR": 1}
    else:
        columns = _plane_columns(rows, run, elements)
        terms = {"TERMS": elements // threads, "VECTOR": min(unit, access) if aligned else 1}
    block_rows = elements // columns
    blocks = triton.cdiv(run, columns)
    column_programs, parts = (blocks, 1) if channels_last else (c, blocks)
    tiles = triton.cdiv(rows, block_rows) * parts
    # Rounded down: one program more than fit at once would be another round.
    programs = multiprocessors * spread.programs // max(column_programs, 1)
    splits = min(programs, triton.cdiv(tiles, spread.min_tiles), _MAX_SPLITS)
    return Plan(
        grid=(column_programs, max(splits, 1)),
        warps=spread.warps,
        walk={
            "n_tiles": tiles,
            "rows": rows,
            "run_units": run // unit,
            "channels": c,
            "CHANNELS_LAST": channels_last,
            "UNIT": unit,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": columns,
        },
        terms=terms,
        whole_tiles=rows // block_rows * parts if channels_last or run % columns == 0 else 0,
    )


def launch(kernel: Any, plan: Plan, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """arguments: those before what `plan.walk` names, a tensor first; constants: the others."""
    with device.guard(arguments[0]):
        kernel[plan.grid](
            *arguments, **plan.walk, **constants, num_warps=plan.warps, enable_fp_fusion=False
        )


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """A (C,) tensor as kernels read it, one value after the other, in any dtype."""
    return None if vector is None else vector.contiguous()


def _power_of_two_in(number: int) -> int:
    """The largest power of two, 16 at most, that divides `number`."""
    return min(number & -number, 16) or 16


def _plane_columns(images: int, plane: int, elements: int) -> int:
    """Columns of a tile in NCHW: those that leave the fewest elements of tiles empty.

    Among equals the most: neighbours in a plane are neighbours in memory.
    """

    def covered(columns: int) -> int:
        rows = elements // columns
        return triton.cdiv(images, rows) * rows * triton.cdiv(plane, columns) * columns

    choices = []
    columns = _MIN_PLANE_COLUMNS
    while columns <= elements:
        choices.append(columns)
        columns *= 2
    return min(choices, key=lambda columns: (covered(columns), -columns))
