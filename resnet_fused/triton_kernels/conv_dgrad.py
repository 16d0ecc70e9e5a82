"""conv_dgrad: gradient of a convolution's input, with what stands around the convolution.

An implicit GEMM over pixels of the input. Pixels whose rows and columns leave the same remainder
when divided by the stride see the same taps: each such set is a phase, which is a convolution with
stride 1 of its own and meets no tap in vain.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.layout import to_format
from resnet_fused.triton_kernels import boxes, convolution, device, reductions, tiles
from resnet_fused.triton_kernels.boxes import View
from resnet_fused.triton_kernels.convolution import LEAST_DOT, LEAST_WGMMA, Configuration, side
from resnet_fused.triton_kernels.device import Architecture
from resnet_fused.triton_kernels.problem import (
    TMA_KINDS,
    ConvProblem,
    Kind,
    PixelTile,
    kind_of_pixels,
    per_axis,
    pixel_tile,
)
from resnet_fused.triton_kernels.problem import tiles as count_tiles


class Options(NamedTuple):
    """What the choice of a configuration depends on beside the problem.

    tma: whether `device.fits_tma` holds for all tensors; the others: what is fused.
    """

    tma: bool = True
    prologue: bool = False
    residual: bool = False


_PLAIN = Options()

# block_m pixels and block_n channels of grad_x, block_k channels of grad_y per step. Depths are for
# 16-bit floats. 128 registers: two programs share a multiprocessor, and one computes while the
# other one is in its epilogue, which reads up to three more tensors.
_WIDE = Configuration("boxes", 128, 128, 64, warps=8, stages=3, registers=128)
_NARROW = Configuration("boxes", 128, 64, 64, warps=4, stages=3)
# A residual comes with an output of many channels from few: memory decides. Three programs share
# a multiprocessor.
_EPILOGUE = Configuration("boxes", 128, 64, 64, warps=8, stages=3)
# The prologue has a second tensor in shared memory, and is repeated for each tile of channels.
_PROLOGUE = Configuration("boxes", 128, 128, 64, warps=8, stages=2, registers=128)
_SMALL = Configuration("boxes", 64, 64, 64, warps=4, stages=4)
_BY_TMA = (_WIDE, _NARROW, _SMALL)
# mma.sync has both operands in registers: 128 x 128 would leave one program per multiprocessor.
_BY_POINTER = (
    Configuration("gather", 128, 64, 32, warps=4, stages=4),
    # With 4 warps, what else is read, or the short loop of a 1x1, would take all 255 registers.
    Configuration("gather", 128, 64, 32, warps=8, stages=4),
    Configuration("gather", 64, 64, 32, warps=4, stages=4),
    Configuration("gather", 32, 32, 64, warps=4, stages=4),
)
_ELEMENTWISE_TILE = 4096  # 16 elements per thread of 8 warps: two loads of 16 bytes in flight


def configurations(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    options: Options = _PLAIN,
) -> tuple[Configuration, ...]:
    """Ways to compute it: the one chosen without measurements, then what is worth timing."""
    kind = _kind(problem, architecture, options)
    reads_more = options.prologue or options.residual or problem.is_pointwise
    pointer_rows = _BY_POINTER[1:] if reads_more else _BY_POINTER
    gathered = [_fitted(row, problem, dtype, architecture, options) for row in pointer_rows]
    rows = [_fitted(row, problem, dtype, architecture, options) for row in _rows(problem, options)]
    found = gathered if kind == "gather" else [row._replace(kind=kind) for row in rows]
    if kind == "strided_boxes":
        # A box that runs over the end of the channels would write into the next column.
        found = [each for each in found if problem.c % each.block_n == 0]
    busy = [each for each in found if _programs(problem, each) >= architecture.multiprocessors]
    found = [*busy[:1], found[-1], *found]  # the last: its tiles are the smallest
    free = [each._replace(registers=None) for each in found if each.registers]
    if architecture.generation == "hopper" and kind != "gather":
        free += [each._replace(registers=128) for each in found if not each.registers]
    alternatives = [] if kind == "gather" else gathered
    return tuple(dict.fromkeys(found + free + alternatives))


def _kind(problem: ConvProblem, architecture: Architecture, options: Options) -> Kind:
    kind = kind_of_pixels(problem, architecture, options.tma)
    # As in `configurations`: the narrowest tile must fit.
    return "gather" if kind == "strided_boxes" and problem.c % _NARROW.block_n != 0 else kind


def _rows(problem: ConvProblem, options: Options) -> tuple[Configuration, ...]:
    """The table, what is best for many pixels first."""
    if problem.c <= _NARROW.block_n and options.prologue:
        return (_EPILOGUE._replace(stages=2), *_BY_TMA[1:])
    if options.prologue:
        # From 1024 channels on the addresses of their coefficients exceed 128 registers.
        fits = problem.k < 1024 and not options.residual
        return (_PROLOGUE if fits else _PROLOGUE._replace(registers=None), *_BY_TMA[1:])
    if options.residual:
        return (_EPILOGUE, *_BY_TMA)
    # Without half a tile of channels that do not exist.
    wide = problem.c % _WIDE.block_n == 0 or problem.c > 2 * _WIDE.block_n
    return _BY_TMA if wide else _BY_TMA[1:]


def _fitted(
    row: Configuration,
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    options: Options,
) -> Configuration:
    """`row` for such tensors, with as many stages as shared memory holds."""
    # What does not exist, TMA fills with zeros.
    least_n = LEAST_DOT if row.kind == "gather" else LEAST_WGMMA
    block_n = side(problem.c // problem.groups, least_n, row.block_n)
    block_k = side(problem.k // problem.groups, LEAST_DOT, row.block_k * 2 // dtype.itemsize)
    stage_bytes = (row.block_m * (2 if options.prologue else 1) + block_n) * block_k
    # What is left is for barriers.
    stages = (architecture.shared_bytes - device.KIB) // (stage_bytes * dtype.itemsize)
    registers = row.registers
    if dtype.itemsize != 2 or not _whole(problem, row):
        registers = None  # halves of float32 take registers, and so does which pixels exist
    if architecture.generation == "blackwell":
        registers = None  # a thread gets a row of the accumulator, with all of its channels
    return row._replace(
        block_n=block_n,
        block_k=block_k,
        stages=max(1, min(row.stages, stages)),
        registers=registers,
    )


def _phase(problem: ConvProblem) -> tuple[int, int, int]:
    """Images, rows and columns of the largest phase; all pixels are one row where that will do."""
    if problem.is_pointwise:
        return 1, 1, problem.rows
    stride_h, stride_w = problem.stride
    return problem.n, -(-problem.h // stride_h), -(-problem.w // stride_w)


def _tile(problem: ConvProblem, configuration: Configuration) -> PixelTile:
    if configuration.kind == "gather":
        return PixelTile(1, 1, configuration.block_m)
    return pixel_tile(*_phase(problem), configuration.block_m)


def _tiles(problem: ConvProblem, configuration: Configuration) -> int:
    if configuration.kind == "gather":
        return triton.cdiv(math.prod(_phase(problem)), configuration.block_m)
    return count_tiles(*_phase(problem), _tile(problem, configuration))


def _whole(problem: ConvProblem, configuration: Configuration) -> bool:
    """Whether all pixels of all tiles exist."""
    covered = _tiles(problem, configuration) * configuration.block_m
    return covered == math.prod(_phase(problem))


def _programs(problem: ConvProblem, configuration: Configuration) -> int:
    """Of one phase."""
    channels = problem.c // problem.groups
    blocks = problem.groups * triton.cdiv(channels, configuration.block_n)
    return _tiles(problem, configuration) * blocks


def _packed_gradient(dtype: str, masked: bool) -> tl.constexpr:
    """PTX of `_batch_norm_gradient` for two neighbours, which share a register."""
    unpack = {
        "bf16": "shl.b32 {0}0, {1}, 16; and.b32 {0}1, {1}, 0xffff0000;",
        "f16": "mov.b32 {{low, high}}, {1}; cvt.f32.f16 {0}0, low; cvt.f32.f16 {0}1, high;",
    }[dtype]
    mask = "prmt.b32 keep, $9, $10, 0x5410; and.b32 packed, packed, keep;" if masked else ""
    return tl.constexpr(
        "{ .reg .b16 low, high; .reg .b32 packed, keep; .reg .f32 y0, y1, g0, g1;"
        + unpack.format("y", "$2")
        + "fma.rn.f32 y0, y0, $5, $7; fma.rn.f32 y1, y1, $6, $8;"
        + unpack.format("g", "$1")
        + "fma.rn.f32 g0, g0, $3, y0; fma.rn.f32 g1, g1, $4, y1;"
        + f"cvt.rn.{dtype}x2.f32 packed, g1, g0; {mask} mov.b32 $0, packed; }}"
    )


_PACKED_BF16 = _packed_gradient("bf16", masked=False)
_PACKED_F16 = _packed_gradient("f16", masked=False)
_PACKED_BF16_MASKED = _packed_gradient("bf16", masked=True)
_PACKED_F16_MASKED = _packed_gradient("f16", masked=True)


@triton.jit
def _batch_norm_gradient(gradient, y, a, b, d, keep, PACKED: tl.constexpr):
    """Batch norm's backward, a * gradient + (b * y + d), in the dtype of `gradient`.

    keep: int32, broadcastable: -1, or 0 where the result is 0; or None. PACKED: two 16-bit values
    per instruction, which is about half of the instructions that the compiler would need.
    """
    BF16: tl.constexpr = gradient.dtype == tl.bfloat16
    if PACKED and keep is None:
        result = tl.inline_asm_elementwise(
            _PACKED_BF16 if BF16 else _PACKED_F16,
            "=r,r,r,f,f,f,f,f,f",
            [gradient, y, a, b, d],
            dtype=gradient.dtype,
            is_pure=True,
            pack=2,
        )
    elif PACKED:
        result = tl.inline_asm_elementwise(
            _PACKED_BF16_MASKED if BF16 else _PACKED_F16_MASKED,
            "=r,r,r,f,f,f,f,f,f,r,r",
            [gradient, y, a, b, d, keep],
            dtype=gradient.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        value = tl.fma(gradient.to(tl.float32), a, tl.fma(y.to(tl.float32), b, d))
        if keep is not None:
            value = tl.where(keep != 0, value, 0.0)
        result = value.to(gradient.dtype)
    return result


@triton.jit
def _load_coefficients(coefficients_ptr, channels, inside, K: tl.constexpr):
    a = tl.load(coefficients_ptr + channels, mask=inside, other=0.0)
    b = tl.load(coefficients_ptr + K + channels, mask=inside, other=0.0)
    d = tl.load(coefficients_ptr + 2 * K + channels, mask=inside, other=0.0)
    return a[None, :], b[None, :], d[None, :]


@triton.jit
def _taps(
    phase,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
):
    """The taps of one axis that reach row STRIDE * i + phase of grad_x, for any i.

    Returns (first, count, offset): tap first + j * STEP, j < count, takes row
    i + offset - j * (DILATION * STEP // STRIDE) of grad_y.
    """
    first = SIZE
    for i in tl.static_range(STEP):
        tap = STEP - 1 - i
        first = tl.where((phase + PADDING - tap * DILATION) % STRIDE == 0, tap, first)
    count = (SIZE - first + STEP - 1) // STEP
    return first, count, (phase + PADDING - first * DILATION) // STRIDE


@triton.jit
def _relu_and_sums(
    gradient,
    x,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    sums_ptr,
    products_ptr,
    partial,
    inside,
    channels,
    in_channels,
    PIXELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What depends on x, for a float32 tile of the gradient whose axis PIXELS are its pixels.

    Each is optional (None): the ReLU of x * scale + shift, the sums. partial: where those of this
    tile go; inside: which pixels exist, ignored where WHOLE says that all do.
    """
    if x is not None:
        x = x.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=in_channels, other=0.0)
        shift = tl.load(shift_ptr + channels, mask=in_channels, other=0.0)
        total = tiles.scale_shift(x, tl.expand_dims(scale, PIXELS), tl.expand_dims(shift, PIXELS))
        gradient = tl.where(tiles.passes_relu(total), gradient, 0.0)
    if mean_ptr is not None:
        counted = gradient
        if not WHOLE:
            counted = tl.where(tl.expand_dims(inside, 1 - PIXELS), gradient, 0.0)
        mean = tl.load(mean_ptr + channels, mask=in_channels, other=0.0)
        product = counted * (x - tl.expand_dims(mean, PIXELS))
        tl.store(sums_ptr + partial + channels, tl.sum(counted, PIXELS), mask=in_channels)
        tl.store(products_ptr + partial + channels, tl.sum(product, PIXELS), mask=in_channels)
    return gradient


@triton.jit
def _load_box(
    tensor,
    image,
    row,
    column,
    channel,
    phase_h,
    phase_w,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """A tile of a tensor like grad_x, in the orientation of the accumulator."""
    if STRIDE == 2:
        box = tensor.load([image, row, phase_h, column, phase_w * C + channel])
    else:
        box = tensor.load([image, row, column, channel])
    tile = tl.reshape(box, (PIXELS, CHANNELS))
    return tl.trans(tile) if SWAPPED else tile


@triton.jit(do_not_specialize=["n", "h", "w"])
def _conv_dgrad_tma_kernel(
    grad_y,
    y,
    grad_conv,
    weight,
    grad_x,
    residual,
    x,
    coefficients_ptr,
    scale_ptr,
    shift_ptr,
    mask_ptr,
    mean_ptr,
    sums_ptr,
    products_ptr,
    n,
    h,
    w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    HEAVY_H: tl.constexpr,
    HEAVY_W: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_y, y, grad_conv: descriptors of (N, P, Q, K); weight: of (K, R * S * C).

    grad_x, residual, x: of (N, H, W, C), or with STRIDE 2 of (N, H / 2, 2, W / 2, 2 * C), in which
    a phase is a box. n, h, w: the pixels of a phase. SWAPPED: the product is transposed, so that
    wgmma reads both operands from shared memory.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_H * TILE_W
    DEPTHS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PIXELS: tl.constexpr = 1 if SWAPPED else 0
    channel_tile = tl.program_id(0) % CHANNEL_TILES
    tile = tl.program_id(0) // CHANNEL_TILES
    channel = channel_tile * BLOCK_C
    image, row, column = tiles.tile_origin(tile, h, w, TILE_N, TILE_H, TILE_W)
    # The phase with the most work starts first.
    phase_h = (HEAVY_H + tl.program_id(1) // STRIDE) % STRIDE
    phase_w = (HEAVY_W + tl.program_id(1) % STRIDE) % STRIDE
    first_h, count_h, offset_h = _taps(phase_h, R, STRIDE, PADDING_H, DILATION_H, STEP_H)
    first_w, count_w, offset_w = _taps(phase_w, S, STRIDE, PADDING_W, DILATION_W, STEP_W)
    depth = tl.arange(0, BLOCK_K)

    if SWAPPED:
        gradient = tl.zeros((BLOCK_C, BLOCK_M), dtype=tl.float32)
    else:
        gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in tl.range(0, count_h * count_w * DEPTHS, num_stages=STAGES):
        tap_h = i // DEPTHS // count_w
        tap_w = i // DEPTHS % count_w
        k = i % DEPTHS * BLOCK_K
        source_h = row + offset_h - tap_h * (DILATION_H * STEP_H // STRIDE)
        source_w = column + offset_w - tap_w * (DILATION_W * STEP_W // STRIDE)
        a = tl.reshape(grad_y.load([image, source_h, source_w, k]), (BLOCK_M, BLOCK_K))
        if y is not None:
            y_tile = tl.reshape(y.load([image, source_h, source_w, k]), (BLOCK_M, BLOCK_K))
            coefficients = _load_coefficients(coefficients_ptr, k + depth, k + depth < K, K)
            a = _batch_norm_gradient(a, y_tile, *coefficients, None, PACKED)
            if channel_tile == 0:
                box = tl.reshape(a, (TILE_N, TILE_H, TILE_W, BLOCK_K))
                grad_conv.store([image, source_h, source_w, k], box)
        tap = (first_h + tap_h * STEP_H) * S + first_w + tap_w * STEP_W
        # What is read beyond C belongs to the next tap, and goes to channels that nobody stores.
        b = weight.load([k, tap * C + channel])
        if SWAPPED:
            gradient = tl.dot(b.T, a.T, gradient, input_precision=PRECISION)
        else:
            gradient = tl.dot(a, b, gradient, input_precision=PRECISION)

    pixel = tl.arange(0, BLOCK_M)
    image_of = image + pixel // (TILE_H * TILE_W)
    row_of = row + pixel // TILE_W % TILE_H
    column_of = column + pixel % TILE_W
    inside = (image_of < n) & (row_of < h) & (column_of < w)
    channels = channel + tl.arange(0, BLOCK_C)
    # One tensor after the other: two tiles at once would not fit into the registers.
    if residual is not None:
        residual_tile = _load_box(
            *(residual, image, row, column, channel, phase_h, phase_w),
            *(C, STRIDE, BLOCK_M, BLOCK_C, SWAPPED),
        )
        gradient += residual_tile.to(tl.float32)
    if mask_ptr is not None:
        BYTES: tl.constexpr = (C + 7) // 8
        line = (image_of * h * STRIDE + row_of * STRIDE + phase_h).to(tl.int64) * (w * STRIDE)
        line += column_of * STRIDE + phase_w
        byte = channel_tile * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        exists = inside[:, None] & (byte < BYTES)[None, :]
        bits = tl.load(mask_ptr + line[:, None] * BYTES + byte[None, :], exists, other=0)
        passes = tiles.unpack_bits(bits, BLOCK_M, BLOCK_C)
        if SWAPPED:
            passes = tl.trans(passes)
        gradient = tl.where(passes, gradient, 0.0)
    x_tile = None
    if x is not None:
        x_tile = _load_box(
            *(x, image, row, column, channel, phase_h, phase_w),
            *(C, STRIDE, BLOCK_M, BLOCK_C, SWAPPED),
        )
    phases = STRIDE * STRIDE
    partial = (tile * phases + phase_h * STRIDE + phase_w).to(tl.int64) * C
    gradient = _relu_and_sums(
        gradient,
        x_tile,
        scale_ptr,
        shift_ptr,
        mean_ptr,
        sums_ptr,
        products_ptr,
        *(partial, inside, channels, channels < C, PIXELS, WHOLE),
    )
    out = gradient.to(grad_x.dtype)
    if SWAPPED:
        out = tl.trans(out)
    if STRIDE == 2:
        box = tl.reshape(out, (TILE_N, TILE_H, 1, TILE_W, BLOCK_C))
        grad_x.store([image, row, phase_h, column, phase_w * C + channel], box)
    else:
        grad_x.store(
            [image, row, column, channel], tl.reshape(out, (TILE_N, TILE_H, TILE_W, BLOCK_C))
        )


@triton.jit(do_not_specialize=["n", "h", "w", "p", "q"])
def _conv_dgrad_kernel(
    grad_y_ptr,
    y_ptr,
    grad_conv_ptr,
    weight_ptr,
    grad_x_ptr,
    residual_ptr,
    x_ptr,
    coefficients_ptr,
    scale_ptr,
    shift_ptr,
    mask_ptr,
    mean_ptr,
    sums_ptr,
    products_ptr,
    n,
    h,
    w,
    p,
    q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    HEAVY_H: tl.constexpr,
    HEAVY_W: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_conv_dgrad_tma_kernel`, through pointers; any stride and groups. n, h, w: of grad_x."""
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    DEPTHS: tl.constexpr = (GROUP_K + BLOCK_K - 1) // BLOCK_K
    CHANNEL_TILES: tl.constexpr = (GROUP_C + BLOCK_C - 1) // BLOCK_C
    channel_tile = tl.program_id(0) % CHANNEL_TILES
    group = tl.program_id(0) // CHANNEL_TILES % GROUPS
    tile = tl.program_id(0) // (CHANNEL_TILES * GROUPS)
    phase_h = (HEAVY_H + tl.program_id(1) // STRIDE_W) % STRIDE_H
    phase_w = (HEAVY_W + tl.program_id(1) % STRIDE_W) % STRIDE_W
    first_h, count_h, offset_h = _taps(phase_h, R, STRIDE_H, PADDING_H, DILATION_H, STEP_H)
    first_w, count_w, offset_w = _taps(phase_w, S, STRIDE_W, PADDING_W, DILATION_W, STEP_W)

    rows = (h - phase_h + STRIDE_H - 1) // STRIDE_H
    columns = (w - phase_w + STRIDE_W - 1) // STRIDE_W
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < n * rows * columns
    column = pixel % tl.maximum(columns, 1)
    row = pixel // tl.maximum(columns, 1) % tl.maximum(rows, 1)
    image = pixel // tl.maximum(rows * columns, 1)
    source_h = row + offset_h
    source_w = column + offset_w
    source = ((image * p + source_h) * q + source_w).to(tl.int64) * K + group * GROUP_K
    depth = tl.arange(0, BLOCK_K)
    local = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = local < GROUP_C
    channels = group * GROUP_C + local

    gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in tl.range(0, count_h * count_w * DEPTHS, num_stages=STAGES):
        tap_h = i // DEPTHS // count_w
        tap_w = i // DEPTHS % count_w
        k = i % DEPTHS * BLOCK_K + depth
        back_h = tap_h * (DILATION_H * STEP_H // STRIDE_H)
        back_w = tap_w * (DILATION_W * STEP_W // STRIDE_W)
        reads = inside & (source_h >= back_h) & (source_h < p + back_h)
        reads = reads & (source_w >= back_w) & (source_w < q + back_w)
        in_depth = k < GROUP_K
        back = (back_h * q + back_w).to(tl.int64) * K
        offsets = (source - back)[:, None] + k[None, :]
        mask = reads[:, None]
        if GROUP_K % BLOCK_K != 0:
            mask = mask & in_depth[None, :]
        a = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
            coefficients = _load_coefficients(coefficients_ptr, k, in_depth, K)
            # The mask also keeps the arithmetic out of mma's layout, in which every warp of a row
            # would repeat it.
            keep = tl.where(reads, -1, 0)[:, None]
            a = _batch_norm_gradient(a, y, *coefficients, keep, PACKED)
            if channel_tile == 0:
                tl.store(grad_conv_ptr + offsets, a, mask=mask)
        tap = (first_h + tap_h * STEP_H) * S + first_w + tap_w * STEP_W
        weight_offsets = (group * GROUP_K + k)[:, None] * (R * S * GROUP_C) + local[None, :]
        weight_mask = in_channels[None, :]
        if GROUP_K % BLOCK_K != 0:
            weight_mask = weight_mask & in_depth[:, None]
        b = tl.load(weight_ptr + weight_offsets + tap * GROUP_C, mask=weight_mask, other=0.0)
        gradient = tl.dot(a, b, gradient, input_precision=PRECISION)

    line = ((image * h + row * STRIDE_H + phase_h) * w + column * STRIDE_W + phase_w).to(tl.int64)
    at = line[:, None] * C + channels[None, :]
    exists = inside[:, None] & in_channels[None, :]
    if residual_ptr is not None:
        gradient += tl.load(residual_ptr + at, mask=exists, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        BYTES: tl.constexpr = (C + 7) // 8
        if GROUPS == 1 or GROUP_C % 8 == 0:
            byte = channel_tile * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            in_bytes = inside[:, None] & (byte < (GROUP_C + 7) // 8)[None, :]
            byte += group * (GROUP_C // 8)
            bits = tl.load(mask_ptr + line[:, None] * BYTES + byte[None, :], in_bytes, other=0)
            passes = tiles.unpack_bits(bits, BLOCK_M, BLOCK_C)
        else:  # groups begin in the middle of bytes
            byte = tl.load(
                mask_ptr + line[:, None] * BYTES + channels[None, :] // 8, exists, other=0
            )
            passes = (byte.to(tl.int32) >> (channels % 8)[None, :] & 1) != 0
        gradient = tl.where(passes, gradient, 0.0)
    x = None
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=exists, other=0.0)
    phases = STRIDE_H * STRIDE_W
    partial = (tile * phases + phase_h * STRIDE_W + phase_w).to(tl.int64) * C
    gradient = _relu_and_sums(
        gradient,
        x,
        scale_ptr,
        shift_ptr,
        mean_ptr,
        sums_ptr,
        products_ptr,
        *(partial, inside, channels, in_channels, 0, False),
    )
    tl.store(grad_x_ptr + at, gradient.to(grad_x_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _grad_conv_kernel(
    grad_y_ptr,
    y_ptr,
    coefficients_ptr,
    grad_conv_ptr,
    rows,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < K)[None, :]
    offsets = row[:, None] * K + k[None, :]
    grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    coefficients = _load_coefficients(coefficients_ptr, k, k < K, K)
    grad_conv = _batch_norm_gradient(grad_y, y, *coefficients, None, False)
    tl.store(grad_conv_ptr + offsets, grad_conv, mask=mask)


def conv_dgrad(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None,
    coefficients: Tensor | None,
    residual: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, sum_grad, sum_grad_x, grad_conv), activations in channels_last."""
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    y, residual, x = (to_format(t, torch.channels_last) for t in (y, residual, x))
    weight = convolution.packed(weight, grad_y.dtype)
    problem = _problem(grad_y.shape, weight, input_size, stride, padding, dilation, groups)
    grad_x = _empty(grad_y, (problem.n, problem.c, problem.h, problem.w))
    grad_conv = grad_y.new_empty(0) if y is None else _empty(grad_y, grad_y.shape)
    if grad_x.numel() == 0:
        channels = 0 if mean is None else problem.c
        sum_grad, sum_grad_x = (grad_y.new_zeros(channels, dtype=torch.float32) for _ in range(2))
        return grad_x, sum_grad, sum_grad_x, grad_conv
    coefficients, scale, shift, mean = (
        None if t is None else convolution.vector(t) for t in (coefficients, scale, shift, mean)
    )
    with device.guard(grad_y):
        if y is not None and coefficients is not None and not problem.is_pointwise:
            _form_grad_conv(grad_y, y, coefficients, grad_conv)
            grad_y, y, coefficients = grad_conv, None, None
        read_x = x if scale is not None or mean is not None else None
        side = None if y is None else grad_conv
        activations = grad_y, y, side, weight, grad_x, residual, read_x
        plan = _plan(
            problem,
            grad_y.dtype,
            device.architecture(grad_y),
            Options(device.fits_tma(*activations), y is not None, residual is not None),
            configuration,
            device.dot_precision(grad_y),
            device.inline_assembly(),
        )
        partials_shape = (0,) if mean is None else (plan.partials, problem.c)
        partials = [grad_y.new_empty(partials_shape, dtype=torch.float32) for _ in range(2)]
        plan.kernel[plan.grid](
            *map(boxes.argument, plan.views, activations),
            *(coefficients, scale, shift, mask, mean, *partials),
            *plan.sizes,
            **plan.constants,
            **plan.options,
        )
        sum_grad, sum_grad_x = partials
        if mean is not None:
            sum_grad, sum_grad_x = reductions.sum_partials(*partials)
    return grad_x, sum_grad, sum_grad_x, grad_conv


def _problem(
    output_shape: Sequence[int],
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """The convolution whose output has `output_shape`."""
    n, k, p, q = output_shape
    _, group_c, r, s = weight.shape
    return ConvProblem(
        n=n,
        c=group_c * groups,
        h=input_size[0],
        w=input_size[1],
        k=k,
        r=r,
        s=s,
        p=p,
        q=q,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
    )


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _form_grad_conv(grad_y: Tensor, y: Tensor, coefficients: Tensor, grad_conv: Tensor) -> None:
    k = grad_y.size(1)
    rows = grad_y.numel() // k
    block_k = min(256, triton.next_power_of_2(k))
    block_rows = _ELEMENTWISE_TILE // block_k
    grid = triton.cdiv(rows, block_rows), triton.cdiv(k, block_k)
    _grad_conv_kernel[grid](
        *(grad_y, y, coefficients, grad_conv, rows, k, block_rows, block_k),
        num_warps=8,
        enable_fp_fusion=False,
    )


class _Plan(NamedTuple):
    """A launch but for its tensors.

    views: of the activations and the weight, in the order of the kernels; partials: rows of the
    partial sums; sizes: of the pixels; constants, options: keywords of the launch.
    """

    views: tuple[View | None, ...]
    kernel: Any
    grid: tuple[int, int]
    partials: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@functools.cache
def _plan(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    options: Options,
    configuration: Configuration | None,
    precision: str,
    assembly: bool,
) -> _Plan:
    if configuration is None or (configuration.kind in TMA_KINDS and not options.tma):
        configuration = configurations(problem, dtype, architecture, options)[0]
    row = configuration
    n, c, h, w, k, r, s, p, q, stride, padding, dilation, groups = problem
    tile = _tile(problem, row)
    heavy = [_heaviest(*each) for each in zip((r, s), stride, padding, dilation, strict=True)]
    constants: dict[str, Any] = {
        **{"C": c, "K": k, "R": r, "S": s},
        **per_axis("PADDING", padding),
        **per_axis("DILATION", dilation),
        **per_axis("STEP", [a // math.gcd(a, b) for a, b in zip(stride, dilation, strict=True)]),
        **per_axis("HEAVY", heavy),
        "PACKED": assembly and row.assembly and options.prologue and dtype.itemsize == 2,
        "PRECISION": precision,
        **{"BLOCK_C": row.block_n, "BLOCK_K": row.block_k, "STAGES": row.stages},
    }
    sizes: tuple[int, ...]
    views: tuple[View | None, ...] = (None,) * 7
    if row.kind == "gather":
        kernel, sizes = _conv_dgrad_kernel, (n, h, w, p, q)
        constants |= {**per_axis("STRIDE", stride), "GROUPS": groups, "BLOCK_M": row.block_m}
    else:
        kernel, sizes = _conv_dgrad_tma_kernel, _phase(problem)
        of_y = boxes.like_y(problem, row.kind, tile, row.block_k)
        of_weight = boxes.dense((k, r * s * c), (row.block_k, row.block_n))
        of_x = boxes.like_x(problem, row.kind, tile, row.block_n)
        views = of_y, of_y, of_y, of_weight, of_x, of_x, of_x
        constants |= {
            **{"TILE_N": tile.n, "TILE_H": tile.h, "TILE_W": tile.w},
            "STRIDE": stride[0],
            # tcgen05 keeps its accumulator in a memory of its own: there the transposition costs.
            "SWAPPED": architecture.generation == "hopper",
            "WHOLE": _whole(problem, row),
        }
    phases = stride[0] * stride[1]
    return _Plan(
        views=views,
        kernel=kernel,
        grid=(_programs(problem, row), phases),
        partials=_tiles(problem, row) * phases,
        sizes=sizes,
        constants=constants,
        options=convolution.launch_options(row),
    )


def _heaviest(size: int, stride: int, padding: int, dilation: int) -> int:
    """The phase of one axis that the most taps reach."""
    phases = [(tap * dilation - padding) % stride for tap in range(size)]
    return max(range(stride), key=phases.count)
