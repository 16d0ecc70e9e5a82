"""Forward convolutions as matrix products: main loops, tiles and plans that operators share.

Activations lie in channels_last. The product has a row for every pixel of the output, a column for
every kernel, and sums over taps (positions in the filter) and input channels; no loop writes the
matrix of input patches to memory.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import boxes, device, tiles
from resnet_fused.triton_kernels.boxes import View
from resnet_fused.triton_kernels.device import KIB, Architecture
from resnet_fused.triton_kernels.problem import (
    TMA_KINDS,
    ConvProblem,
    Kind,
    PixelTile,
    kind_of_pixels,
    pixel_tile,
)
from resnet_fused.triton_kernels.problem import tiles as count_tiles

# Below it a tap's channels fill less than one instruction of the tensor cores.
_FEW_CHANNELS = 16
LEAST_DOT = 16  # the least side of a product of tensor cores
LEAST_WGMMA = 64  # rows of its accumulator
# Registers of a thread where two programs of 8 warps share a multiprocessor: one computes while
# the other one stores.
_TWO_OF_EIGHT_WARPS = 128


class Configuration(NamedTuple):
    """How one kernel is cut and compiled.

    block_m pixels by block_n kernels per program, block_k channels per step; registers: of a
    thread at most, so that more programs share a multiprocessor; assembly: whether the prologue
    may use it; persistent, for "rows" in the forward: one program per multiprocessor takes tile
    after tile, and reads the next one, and its residual, while it finishes one.
    """

    kind: Kind
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None
    assembly: bool = True
    persistent: bool = False


class _Row(NamedTuple):
    """A `Configuration` for 16-bit floats and many channels."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None


# From large tiles, which read the least, to small ones, for problems that would leave
# multiprocessors idle.
_BY_TMA = (
    _Row(128, 128, 64, 8, 3, _TWO_OF_EIGHT_WARPS),
    _Row(128, 64, 64, 4, 3, 128),
    _Row(64, 128, 64, 8, 3, _TWO_OF_EIGHT_WARPS),
    _Row(64, 64, 64, 4, 4),
)
# They read less, but a multiprocessor has room for one program only.
_BY_TMA_TO_TIME = (_Row(256, 128, 64, 8, 4), _Row(128, 256, 64, 8, 4))
# Shorter steps, more of them in flight: on some of these GPUs a program has 99 KiB of shared
# memory. 168 registers: three programs of 4 warps.
_BY_POINTER = (
    _Row(128, 128, 32, 8, 4, _TWO_OF_EIGHT_WARPS),
    _Row(128, 64, 32, 4, 4, 168),
    _Row(64, 64, 32, 4, 4),
    _Row(32, 64, 64, 4, 4),
)
# 8 warps: each thread has the addresses of half as many pixels.
_BY_FILTER_ROW = (_Row(128, 64, 64, 8, 3), _Row(64, 64, 64, 4, 3))
# No products of matrices: a thread reads 32 bytes, or 8, for each tap.
_DEPTHWISE = (_Row(32, 64, 1, 4, 1), _Row(8, 64, 1, 4, 1))


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is constant in a kernel: it is compiled once for each. Names as in `ConvProblem`.

    swapped: the accumulator is (kernels, pixels), not (pixels, kernels): the product is
    weight @ x^T, both of whose operands wgmma can read from shared memory. taps: r * s;
    channel_blocks, kernel_blocks: tiles of block_k and block_n in a group; steps: of the loop.
    """

    kind: Kind
    swapped: bool
    described: bool  # tensors are TMA descriptors
    flat_weight: bool  # its descriptor is (K, R * S * C), not (K, R * S, C)
    block_m: int
    block_n: int
    block_k: int
    stages: int
    tile_n: int
    tile_h: int
    tile_w: int
    c: int
    k: int
    r: int
    s: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    group_c: int
    group_k: int
    pointwise: bool
    taps: int
    channel_blocks: int
    kernel_blocks: int
    steps: int
    pairs: bool  # a filter row is read two values at a time
    early: int  # values in front of it that are read for that
    prologue: bool
    assembly: bool
    persistent: bool
    precision: str


@triton.jit
def parts(N, P, Q, LOOP: tl.constexpr):
    """Into how many parts the output is cut, where `persistent`: programs of any other kernel."""
    return tl.cdiv(N * P * Q, LOOP.block_m) * LOOP.kernel_blocks


@triton.jit
def place(part, LOOP: tl.constexpr):
    """(tile, group, k0) of a part of the output: its tile of pixels, its group, its first kernel.

    Kernels run fastest, so that the pixels of a tile are read from memory once.
    """
    blocks: tl.constexpr = LOOP.k // LOOP.group_k * LOOP.kernel_blocks
    tile = part // blocks
    block = part % blocks
    group = block // LOOP.kernel_blocks
    return tile, group, group * LOOP.group_k + block % LOOP.kernel_blocks * LOOP.block_n


@triton.jit
def kernels_of(group, k0, LOOP: tl.constexpr):
    """Indices of the program's kernels, and which of them exist."""
    BLOCK_N: tl.constexpr = LOOP.block_n
    kernels = k0 + tl.arange(0, BLOCK_N)
    if LOOP.group_k % BLOCK_N == 0:
        exist = tl.full((BLOCK_N,), True, tl.int1)
    else:
        exist = kernels < (group + 1) * LOOP.group_k
    return kernels, exist


@triton.jit
def pixels_of(tile, N, P, Q, LOOP: tl.constexpr):
    """Which pixels of a tile exist, and how many do, as float32."""
    pixels = tl.arange(0, LOOP.block_m)
    if LOOP.kind == "boxes" or LOOP.kind == "strided_boxes":
        image, row, column = tiles.tile_origin(tile, P, Q, LOOP.tile_n, LOOP.tile_h, LOOP.tile_w)
        inside = image + pixels // (LOOP.tile_h * LOOP.tile_w) < N
        inside &= row + pixels // LOOP.tile_w % LOOP.tile_h < P
        inside &= column + pixels % LOOP.tile_w < Q
        images = tl.minimum(LOOP.tile_n, N - image)
        count = images * tl.minimum(LOOP.tile_h, P - row) * tl.minimum(LOOP.tile_w, Q - column)
    else:
        first = tile * LOOP.block_m
        inside = first + pixels < N * P * Q
        count = tl.minimum(LOOP.block_m, N * P * Q - first)
    return inside, count.to(tl.float32)


@triton.jit
def per_pixel(vector, LOOP: tl.constexpr):
    """(block_m,) in the orientation of the accumulator."""
    return tl.expand_dims(vector, 0 if LOOP.swapped else 1)


@triton.jit
def per_kernel(vector, LOOP: tl.constexpr):
    """(block_n,) in the orientation of the accumulator."""
    return tl.expand_dims(vector, 1 if LOOP.swapped else 0)


@triton.jit
def load_tile(tensor, tile, group, k0, N, P, Q, LOOP: tl.constexpr):
    """The program's part of a tensor like the output, oriented like the accumulator, float32."""
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    if LOOP.kind == "rows":
        values = tensor.load([tile * BLOCK_M, k0])
    elif LOOP.described:
        image, row, column = tiles.tile_origin(tile, P, Q, LOOP.tile_n, LOOP.tile_h, LOOP.tile_w)
        box = tensor.load([image, row, column, k0])
        values = tl.reshape(box, (BLOCK_M, BLOCK_N))
    else:
        pointers, mask = _output_pointers(tensor, tile, group, k0, N, P, Q, LOOP)
        values = tl.load(pointers, mask=mask, other=0.0)
    if LOOP.swapped:
        values = values.T
    return values.to(tl.float32)


@triton.jit
def store_tile(tensor, values, tile, group, k0, N, P, Q, LOOP: tl.constexpr):
    """What `load_tile` reads, rounded and written."""
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    TILE_N: tl.constexpr = LOOP.tile_n
    TILE_H: tl.constexpr = LOOP.tile_h
    TILE_W: tl.constexpr = LOOP.tile_w
    values = values.to(tensor.dtype if LOOP.described else tensor.dtype.element_ty)
    if LOOP.swapped:
        values = values.T
    if LOOP.kind == "rows":
        tensor.store([tile * BLOCK_M, k0], values)
    elif LOOP.described:
        image, row, column = tiles.tile_origin(tile, P, Q, TILE_N, TILE_H, TILE_W)
        box = tl.reshape(values, (TILE_N, TILE_H, TILE_W, BLOCK_N))
        tensor.store([image, row, column, k0], box)
    else:
        pointers, mask = _output_pointers(tensor, tile, group, k0, N, P, Q, LOOP)
        tl.store(pointers, values, mask=mask)


@triton.jit
def _output_pointers(tensor, tile, group, k0, N, P, Q, LOOP: tl.constexpr):
    """64 bits for where the tile begins, 32 within it: registers are scarce here."""
    BLOCK_M: tl.constexpr = LOOP.block_m
    pixels = tl.arange(0, BLOCK_M)
    kernels, exists = kernels_of(group, k0, LOOP)
    first = tile.to(tl.int64) * BLOCK_M * LOOP.k
    offsets = pixels[:, None] * LOOP.k + kernels[None, :]
    left = N * P * Q - tile * BLOCK_M
    return tensor + first + offsets, (pixels < left)[:, None] & exists[None, :]


@triton.jit
def accumulate(
    x, weight, scale_ptr, shift_ptr, tile, group, k0, N, H, W, P, Q, steps, LOOP: tl.constexpr
):
    """The convolution for the program's tile, float32, (block_n, block_m) where swapped.

    scale_ptr, shift_ptr: (C,) float32, of the prologue relu(x * scale + shift), or None; steps:
    LOOP.steps, unknown to the compiler, which would else unroll the loops over pointers entirely
    and run out of registers. Zero outside of the output, unless there is a prologue.
    """
    if LOOP.described:
        acc = _accumulate_boxes(x, weight, scale_ptr, shift_ptr, tile, k0, P, Q, LOOP)
    elif LOOP.kind == "gather":
        acc = _accumulate_gathered(
            x, weight, scale_ptr, shift_ptr, tile, group, k0, N, H, W, P, Q, steps, LOOP
        )
    elif LOOP.kind == "filter_rows":
        acc = _accumulate_filter_rows(x, weight, tile, k0, N, H, W, P, Q, steps, LOOP)
    else:
        acc = _accumulate_depthwise(x, weight, tile, group, k0, N, H, W, P, Q, LOOP)
    return acc


@triton.jit
def _accumulate_boxes(x, weight, scale_ptr, shift_ptr, tile, k0, P, Q, LOOP: tl.constexpr):
    """What lies outside of x or of the weight, TMA fills with zeros."""
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    BLOCK_K: tl.constexpr = LOOP.block_k
    if LOOP.swapped:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    image, row, column = tiles.tile_origin(tile, P, Q, LOOP.tile_n, LOOP.tile_h, LOOP.tile_w)
    for step in tl.range(0, LOOP.steps, num_stages=LOOP.stages):
        tap = step // LOOP.channel_blocks
        c0 = step % LOOP.channel_blocks * BLOCK_K
        if LOOP.kind == "rows":
            values = x.load([tile * BLOCK_M, c0])
        else:
            h = tap // LOOP.s * LOOP.dilation_h - LOOP.padding_h
            w = tap % LOOP.s * LOOP.dilation_w - LOOP.padding_w
            if LOOP.kind == "boxes":
                box = x.load([image, row + h, column + w, c0])
            else:
                # The tap reads rows and columns of one parity, by way of the view of x.
                odd_h = h & 1
                odd_w = w & 1
                h = row + (h - odd_h) // 2
                w = column + (w - odd_w) // 2
                box = x.load([image, h, odd_h, w, odd_w * LOOP.c + c0])
            values = tl.reshape(box, (BLOCK_M, BLOCK_K))
        if LOOP.prologue:
            channels = c0 + tl.arange(0, BLOCK_K)
            scale = tl.load(scale_ptr + channels, mask=channels < LOOP.c, other=0.0)
            shift = tl.load(shift_ptr + channels, mask=channels < LOOP.c, other=0.0)
            values = scale_shift_relu(values, scale, shift, None, LOOP.assembly)
        if LOOP.flat_weight:
            weights = weight.load([k0, tap * LOOP.c + c0])
        else:
            weights = tl.reshape(weight.load([k0, tap, c0]), (BLOCK_N, BLOCK_K))
        if LOOP.swapped:
            acc = tl.dot(weights, values.T, acc, input_precision=LOOP.precision)
        else:
            acc = tl.dot(values, weights.T, acc, input_precision=LOOP.precision)
    return acc


@triton.jit
def _accumulate_gathered(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    tile,
    group,
    k0,
    N,
    H,
    W,
    P,
    Q,
    steps,
    LOOP: tl.constexpr,
):
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    BLOCK_K: tl.constexpr = LOOP.block_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h, w, rows, exists = _corners(tile, N, H, W, P, Q, LOOP)
    if LOOP.pointwise:
        first = tile.to(tl.int64) * BLOCK_M * LOOP.c
        corners = x_ptr + first + tl.arange(0, BLOCK_M) * LOOP.c
    else:
        corners = x_ptr + (rows * W + w) * LOOP.c + group * LOOP.group_c
    kernels, wanted = kernels_of(group, k0, LOOP)
    filters = weight_ptr + kernels * (LOOP.taps * LOOP.group_c)
    for step in tl.range(0, steps, num_stages=LOOP.stages):
        tap = step // LOOP.channel_blocks
        down = tap // LOOP.s * LOOP.dilation_h
        right = tap % LOOP.s * LOOP.dilation_w
        channels = step % LOOP.channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = exists
        if LOOP.padding_h + LOOP.padding_w > 0:
            inside &= (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
        x_mask = inside[:, None]
        weight_mask = wanted[None, :]
        if LOOP.group_c % BLOCK_K != 0:
            x_mask &= (channels < LOOP.group_c)[None, :]
            weight_mask &= (channels < LOOP.group_c)[:, None]
        x_offsets = (down * W + right) * LOOP.c + channels
        values = tl.load(corners[:, None] + x_offsets[None, :], mask=x_mask, other=0.0)
        if LOOP.prologue:
            scale = tl.load(scale_ptr + channels, mask=channels < LOOP.c, other=0.0)
            shift = tl.load(shift_ptr + channels, mask=channels < LOOP.c, other=0.0)
            # The mask keeps the compiler from moving the arithmetic behind the exchange of
            # operands between threads, where each value is computed several times.
            values = scale_shift_relu(values, scale, shift, inside[:, None], LOOP.assembly)
        weight_offsets = tap * LOOP.group_c + channels
        weights = tl.load(filters[None, :] + weight_offsets[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(values, weights, acc, input_precision=LOOP.precision)
    return acc


@triton.jit
def _accumulate_filter_rows(x_ptr, weight_ptr, tile, k0, N, H, W, P, Q, steps, LOOP: tl.constexpr):
    """A step takes the taps of one filter row with all of their channels: adjacent in memory.

    With `pairs`, it begins at an even element, by starting one early if need be: cp.async copies
    4 bytes or more.
    """
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    BLOCK_K: tl.constexpr = LOOP.block_k
    RUN: tl.constexpr = LOOP.s * LOOP.c
    EARLY: tl.constexpr = LOOP.early
    GRAIN: tl.constexpr = 2 if LOOP.pairs else 1
    READ: tl.constexpr = (EARLY + RUN + GRAIN - 1) // GRAIN * GRAIN
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h, w, rows, exists = _corners(tile, N, H, W, P, Q, LOOP)
    kernels, wanted = kernels_of(0, k0, LOOP)
    filters = weight_ptr + kernels * (LOOP.r * RUN) - EARLY
    row_elements = tl.multiple_of(W * LOOP.c, GRAIN)
    first = tl.multiple_of(w * LOOP.c - EARLY, GRAIN)
    starts = x_ptr + (rows * row_elements + first)
    for step in tl.range(0, steps, num_stages=LOOP.stages):
        r = step // LOOP.channel_blocks
        down = r * LOOP.dilation_h
        elements = step % LOOP.channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        right = elements
        if LOOP.dilation_w > 1:
            right = elements // LOOP.c * (LOOP.dilation_w * LOOP.c) + elements % LOOP.c
        position = first[:, None] + right[None, :]
        inside = exists & (h + down >= 0) & (h + down < H)
        x_mask = inside[:, None] & (position >= 0) & (position < row_elements)
        x_mask &= (elements < READ)[None, :]
        x_offsets = down * row_elements + right
        values = tl.load(starts[:, None] + x_offsets[None, :], mask=x_mask, other=0.0)
        in_run = (elements >= EARLY) & (elements < EARLY + RUN)
        if READ > RUN:
            # Not left to the zeros of the weight: the product with infinity would be NaN.
            values = tl.where(in_run[None, :], values, 0.0)
        weights = tl.load(
            filters[None, :] + (r * RUN + elements)[:, None],
            mask=wanted[None, :] & in_run[:, None],
            other=0.0,
        )
        acc = tl.dot(values, weights, acc, input_precision=LOOP.precision)
    return acc


@triton.jit
def _accumulate_depthwise(x_ptr, weight_ptr, tile, group, k0, N, H, W, P, Q, LOOP: tl.constexpr):
    BLOCK_M: tl.constexpr = LOOP.block_m
    BLOCK_N: tl.constexpr = LOOP.block_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h, w, rows, exists = _corners(tile, N, H, W, P, Q, LOOP)
    corners = x_ptr + (rows * W + w) * LOOP.c
    channels, wanted = kernels_of(group, k0, LOOP)
    for tap in range(0, LOOP.taps):
        down = tap // LOOP.s * LOOP.dilation_h
        right = tap % LOOP.s * LOOP.dilation_w
        inside = exists & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
        x_offsets = (down * W + right) * LOOP.c + channels
        x_mask = inside[:, None] & wanted[None, :]
        values = tl.load(corners[:, None] + x_offsets[None, :], mask=x_mask, other=0.0)
        weights = tl.load(weight_ptr + channels * LOOP.taps + tap, mask=wanted, other=0.0)
        acc = tl.fma(values.to(tl.float32), weights.to(tl.float32)[None, :], acc)
    return acc


@triton.jit
def _corners(tile, N, H, W, P, Q, LOOP: tl.constexpr):
    """What the first tap reads for each pixel, and which pixels exist.

    Its row and column in the image, outside of it in the padding, and its row among those of all
    images, 64 bits.
    """
    BLOCK_M: tl.constexpr = LOOP.block_m
    pixels = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pixels // Q % P * LOOP.stride_h - LOOP.padding_h
    w = pixels % Q * LOOP.stride_w - LOOP.padding_w
    return h, w, (pixels // Q // P).to(tl.int64) * H + h, pixels < N * P * Q


@triton.jit
def scale_shift_relu(values, scale, shift, keep, ASSEMBLY: tl.constexpr):
    """relu(values * scale + shift), rounded to the dtype of `values`: (rows, columns).

    scale, shift: (columns,) float32; keep: (rows, 1), which rows are not zero, or None for all.
    """
    if ASSEMBLY:
        result = _scale_shift_relu_by_pairs(values, scale[None, :], shift[None, :], keep)
    else:
        result = tiles.relu(
            tiles.scale_shift(values.to(tl.float32), scale[None, :], shift[None, :])
        )
        if keep is not None:
            result = tl.where(keep, result, 0.0)
        result = result.to(values.dtype)
    return result


@triton.jit
def _scale_shift_relu_by_pairs(values, scale, shift, keep):
    """Two values per instruction where there is one for it; cvt.relu lets NaN pass.

    The two halves of a register may belong to two rows. PTX ISA, "cvt" and "prmt".
    """
    IS_BFLOAT16: tl.constexpr = values.dtype == tl.bfloat16
    UNPACK: tl.constexpr = _UNPACK_BFLOAT16 if IS_BFLOAT16 else _UNPACK_FLOAT16
    ROUND: tl.constexpr = _ROUND_BFLOAT16 if IS_BFLOAT16 else _ROUND_FLOAT16
    if keep is None:
        result = tl.inline_asm_elementwise(
            "{" + UNPACK + _SCALE_SHIFT + ROUND + "mov.b32 $0, low; }",
            "=r,r,f,f,f,f",
            [values, scale, shift],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        result = tl.inline_asm_elementwise(
            "{"
            + UNPACK
            + _SCALE_SHIFT
            + ROUND
            + "prmt.b32 high, $6, $7, 0x5410; and.b32 $0, low, high; }",
            "=r,r,f,f,f,f,r,r",
            [values, scale, shift, tl.where(keep, -1, 0)],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )
    return result


_UNPACK_BFLOAT16 = tl.constexpr(
    """.reg .b32 low, high; .reg .f32 a, b;
    shl.b32 low, $1, 16; and.b32 high, $1, 0xffff0000; mov.b32 a, low; mov.b32 b, high;"""
)
_UNPACK_FLOAT16 = tl.constexpr(
    """.reg .b32 low, high; .reg .f32 a, b; .reg .b16 c, d;
    mov.b32 {c, d}, $1; cvt.f32.f16 a, c; cvt.f32.f16 b, d;"""
)
_SCALE_SHIFT = tl.constexpr("fma.rn.f32 a, a, $2, $4; fma.rn.f32 b, b, $3, $5;")
_ROUND_BFLOAT16 = tl.constexpr("cvt.rn.relu.bf16x2.f32 low, b, a;")
_ROUND_FLOAT16 = tl.constexpr("cvt.rn.relu.f16x2.f32 low, b, a;")


class Plan(NamedTuple):
    """One launch.

    x, weight, out: None where they are given to the kernel as pointers; tiles: of pixels; whole:
    whether all pixels of all tiles exist; sizes: N, H, W, P, Q and the steps of the loop; options:
    keywords of the launch.
    """

    loop: Loop
    x: View | None
    weight: View | None
    out: View | None
    tiles: int
    whole: bool
    programs: int
    sizes: tuple[int, ...]
    options: dict[str, Any]


def plan(
    problem: ConvProblem,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    statistics: bool = False,
    prologue: bool = False,
    configuration: Configuration | None = None,
) -> Plan:
    """How to compute `problem` on these tensors: by `configuration` where it can read them.

    Tensors lie in channels_last. statistics: whether the accumulator is summed over pixels.
    """
    return _plan(
        problem,
        x.dtype,
        device.architecture(x),
        x.numel() > 0 and device.fits_tma(x, weight, out, residual),
        x.data_ptr() % 4 == 0,
        statistics or residual is not None,
        prologue,
        configuration,
        device.dot_precision(x),
        device.inline_assembly(),
    )


def configurations(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    fits_tma: bool = True,
) -> tuple[Configuration, ...]:
    """Ways to compute `problem`: the one chosen without measurements, then what is worth timing.

    fits_tma: whether `device.fits_tma` holds for all tensors.
    """
    kind = _kind(problem, dtype, architecture, fits_tma)
    found = [*_of_kind(kind, problem, dtype, architecture)]
    busy = [each for each in found if _parts(problem, each) >= architecture.multiprocessors]
    first = (busy or found[-1:])[0]
    free = [each._replace(registers=None) for each in found if each.registers]
    if kind == "rows":
        free += _persistent(found, problem, dtype, architecture)
    if kind in TMA_KINDS:
        free += _of_table(_BY_TMA_TO_TIME, kind, problem, dtype, architecture)
        free += _of_kind("gather", problem, dtype, architecture)
    return tuple(dict.fromkeys([first, *found, *free]))


def side(size: int, least: int, most: int) -> int:
    """Of a tile over `size` elements: a power of two between the others."""
    return max(least, min(most, triton.next_power_of_2(size)))


def launch_options(configuration: Configuration) -> dict[str, Any]:
    """Keywords of the launch. No fusion to fma: where there is to be one, kernels say so."""
    options: dict[str, Any] = {
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
        "enable_fp_fusion": False,
    }
    if configuration.registers is not None:
        options["maxnreg"] = configuration.registers
    return options


def is_fused_prologue(problem: ConvProblem) -> bool:
    """Whether main loops apply a prologue: where they read every pixel of x once at most."""
    return (
        (problem.r, problem.s) == (1, 1)
        and problem.padding == (0, 0)
        and problem.groups == 1
        and problem.c >= _FEW_CHANNELS
    )


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, C / groups, R, S) as kernels read it: in `dtype`, channels_last."""
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def new_output(x: Tensor, problem: ConvProblem) -> Tensor:
    """(N, K, P, Q), uninitialised."""
    shape = problem.n, problem.k, problem.p, problem.q
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def vector(tensor: Tensor) -> Tensor:
    """A value per channel as kernels read it."""
    return tensor.to(torch.float32).contiguous()


def _views(problem: ConvProblem, loop: Loop) -> tuple[View | None, View | None, View | None]:
    """Of x, weight and out."""
    if not loop.described:
        return None, None, None
    n, h, w, c, k = problem.n, problem.h, problem.w, problem.c, problem.k
    if loop.flat_weight:
        weight = boxes.dense((k, loop.taps * c), (loop.block_n, loop.block_k))
    else:
        weight = boxes.dense((k, loop.taps, c), (loop.block_n, 1, loop.block_k))
    if loop.kind == "rows":
        x = boxes.dense((n * h * w, c), (loop.block_m, loop.block_k))
        return x, weight, boxes.dense((n * h * w, k), (loop.block_m, loop.block_n))
    tile = loop.tile_n, loop.tile_h, loop.tile_w
    if loop.kind == "boxes":
        x = boxes.dense((n, h, w, c), (*tile, loop.block_k))
    else:
        # Rows and columns of one parity are a box without gaps.
        box = *tile[:2], 1, tile[2], loop.block_k
        x = boxes.dense((n, h // 2, 2, w // 2, 2 * c), box)
    return x, weight, boxes.dense((n, problem.p, problem.q, k), (*tile, loop.block_n))


def _kind(
    problem: ConvProblem, dtype: torch.dtype, architecture: Architecture, fits_tma: bool
) -> Kind:
    if problem.groups == problem.c == problem.k:
        return "depthwise"
    if problem.groups > 1:
        return "gather"
    if problem.c < _FEW_CHANNELS:
        return "filter_rows"
    kind = kind_of_pixels(problem, architecture, fits_tma and problem.k * dtype.itemsize % 16 == 0)
    if kind == "strided_boxes" and problem.c % _block_k(_BY_TMA[0], problem.c, dtype) != 0:
        return "gather"  # a step would reach from the channels of one column into the next one's
    return kind


def _of_kind(
    kind: Kind, problem: ConvProblem, dtype: torch.dtype, architecture: Architecture
) -> list[Configuration]:
    if kind in TMA_KINDS:
        table: Sequence[_Row] = _BY_TMA
    else:
        by_pointer = {"filter_rows": _BY_FILTER_ROW, "depthwise": _DEPTHWISE}
        table = by_pointer.get(kind, _BY_POINTER)
    if kind == "gather" and (dtype.itemsize == 4 or architecture.generation != "ampere"):
        # A residual in float32 takes as many registers as the accumulator, and so do operands on
        # their way to wgmma and tcgen05.
        table = [row for row in table if row.registers != _TWO_OF_EIGHT_WARPS]
    if kind == "gather" and problem.c // problem.groups * dtype.itemsize % 4 != 0:
        # Copied value by value, each with an address: fewer of them.
        table = [row for row in table if row.block_m <= 64]
    return [*_of_table(table, kind, problem, dtype, architecture)]


def _of_table(
    table: Sequence[_Row],
    kind: Kind,
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
) -> Iterator[Configuration]:
    """A configuration for each row that is not too large for the problem or the GPU."""
    channels, kernels = problem.c // problem.groups, problem.k // problem.groups
    if kind == "filter_rows":
        channels = problem.s * problem.c + _early(problem) * _has_pairs(problem, dtype)
    elif kind == "depthwise":
        channels, kernels = 1, problem.k
    smallest_n = LEAST_WGMMA if kind in TMA_KINDS else LEAST_DOT
    widest = max(smallest_n, triton.next_power_of_2(kernels))
    for row in table:
        if row.block_n > max(widest, LEAST_WGMMA):
            continue  # another row is as high and no wider than needed
        block_n = min(row.block_n, widest)
        block_k = _block_k(row, channels, dtype)
        stage_bytes = (row.block_m + block_n) * block_k * dtype.itemsize
        stages = min(row.stages, (architecture.shared_bytes - KIB) // stage_bytes)
        if stages > 0:
            registers = row.registers
            if architecture.generation == "blackwell" and row.warps == 4:
                registers = None  # a thread gets a row of the accumulator, with all its kernels
            yield Configuration(kind, row.block_m, block_n, block_k, row.warps, stages, registers)


def _persistent(
    found: Iterable[Configuration],
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
) -> Iterator[Configuration]:
    """Where every multiprocessor gets two parts or more, and shared memory holds two of them.

    Not for Blackwell: Triton 3.6 cannot compile some of them.
    """
    for each in found if architecture.generation == "hopper" else ():
        stage = (each.block_m + each.block_n) * each.block_k + each.block_m * each.block_n
        stages = min(each.stages, (architecture.shared_bytes - KIB) // (stage * dtype.itemsize))
        enough = _parts(problem, each) >= 2 * architecture.multiprocessors
        if enough and stages >= 2:
            yield each._replace(stages=stages, registers=None, persistent=True)


def _block_k(row: _Row, channels: int, dtype: torch.dtype) -> int:
    """As many bytes for every dtype, but not many more channels than there are."""
    if row.block_k == 1:
        return 1
    at_most = row.block_k * 2 // dtype.itemsize
    block_k = side(channels, LEAST_DOT, at_most)
    half = block_k // 2
    return half if half >= LEAST_DOT and channels % block_k == half else block_k


def _has_pairs(problem: ConvProblem, dtype: torch.dtype) -> bool:
    """Whether a filter row always begins as many elements from an even one."""
    even = problem.stride[1] * problem.c % 2 == 0 and problem.w * problem.c % 2 == 0
    return even and dtype.itemsize == 2 and problem.dilation[1] == 1


def _early(problem: ConvProblem) -> int:
    """How many elements after an even one a filter row begins."""
    return problem.padding[1] * problem.c % 2


def _tile(problem: ConvProblem, configuration: Configuration) -> PixelTile:
    if configuration.kind in ("boxes", "strided_boxes"):
        return pixel_tile(problem.n, problem.p, problem.q, configuration.block_m)
    return PixelTile(1, 1, configuration.block_m)


def _tiles(problem: ConvProblem, configuration: Configuration) -> int:
    if configuration.kind in ("boxes", "strided_boxes"):
        return count_tiles(problem.n, problem.p, problem.q, _tile(problem, configuration))
    return triton.cdiv(problem.rows, configuration.block_m)


def _parts(problem: ConvProblem, configuration: Configuration) -> int:
    groups = 1 if configuration.kind == "depthwise" else problem.groups
    blocks = groups * triton.cdiv(problem.k // groups, configuration.block_n)
    return _tiles(problem, configuration) * blocks


@functools.cache
def _plan(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    fits_tma: bool,
    dword_aligned: bool,
    long_epilogue: bool,
    prologue: bool,
    configuration: Configuration | None,
    precision: str,
    inline_assembly: bool,
) -> Plan:
    if configuration is None or (configuration.kind in TMA_KINDS and not fits_tma):
        configuration = configurations(problem, dtype, architecture, fits_tma)[0]
    kind = configuration.kind
    tile = _tile(problem, configuration)
    groups = 1 if kind == "depthwise" else problem.groups
    taps = problem.r * problem.s
    pairs = dword_aligned and kind == "filter_rows" and _has_pairs(problem, dtype)
    early = _early(problem) if pairs else 0
    if kind == "depthwise":
        channel_blocks, steps = 1, taps
    elif kind == "filter_rows":
        channel_blocks = triton.cdiv(early + problem.s * problem.c, configuration.block_k)
        steps = problem.r * channel_blocks
    else:
        channel_blocks = triton.cdiv(problem.c // groups, configuration.block_k)
        steps = taps * channel_blocks
    loop = Loop(
        kind=kind,
        # On Blackwell a thread holds a row of the accumulator. Swapped, its statistics stay within
        # a thread and a residual needs 80 registers, not 200; to store it takes longer.
        swapped=kind in TMA_KINDS and (architecture.generation == "hopper" or long_epilogue),
        described=kind in TMA_KINDS,
        # A step that reaches beyond the channels of a tap must find zeros there. But only what is
        # loaded in two dimensions goes to wgmma without a detour through registers.
        flat_weight=taps == 1 or problem.c % configuration.block_k == 0,
        block_m=configuration.block_m,
        block_n=configuration.block_n,
        block_k=configuration.block_k,
        stages=configuration.stages,
        tile_n=tile.n,
        tile_h=tile.h,
        tile_w=tile.w,
        c=problem.c,
        k=problem.k,
        r=problem.r,
        s=problem.s,
        stride_h=problem.stride[0],
        stride_w=problem.stride[1],
        padding_h=problem.padding[0],
        padding_w=problem.padding[1],
        dilation_h=problem.dilation[0],
        dilation_w=problem.dilation[1],
        group_c=problem.c // groups,
        group_k=problem.k // groups,
        pointwise=problem.is_pointwise,
        taps=taps,
        channel_blocks=channel_blocks,
        kernel_blocks=triton.cdiv(problem.k // groups, configuration.block_n),
        steps=steps,
        pairs=pairs,
        early=early,
        prologue=prologue,
        assembly=inline_assembly and configuration.assembly and dtype.itemsize == 2,
        persistent=configuration.persistent,
        precision=precision,
    )
    # Three products for one, from registers: they need as many as there are.
    splits = dtype == torch.float32 and precision == "tf32x3"
    options = launch_options(configuration._replace(registers=None) if splits else configuration)
    sizes = problem.n, problem.h, problem.w, problem.p, problem.q, steps
    tiles_ = _tiles(problem, configuration)
    whole = tiles_ * configuration.block_m == problem.rows
    x, weight, out = _views(problem, loop)
    programs = _parts(problem, configuration)
    if configuration.persistent:
        programs = min(programs, architecture.multiprocessors)
    return Plan(loop, x, weight, out, tiles_, whole, programs, sizes, options)
