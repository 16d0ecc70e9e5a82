"""conv_wgrad: gradient of a convolution's weight, with the batch norm and ReLU in front of it.

A matrix product with a row for every kernel, a column for every tap and input channel, and sums
over the pixels of the output. Rows and columns are few and pixels are many: programs share the
pixels of a tile of the result, and what each of them has found is added up in a fixed order.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import boxes, convolution, device, tiles
from resnet_fused.triton_kernels.boxes import View
from resnet_fused.triton_kernels.convolution import LEAST_DOT, LEAST_WGMMA, Configuration, side
from resnet_fused.triton_kernels.device import Architecture
from resnet_fused.triton_kernels.problem import (
    TMA_KINDS,
    ConvProblem,
    Kind,
    PixelTile,
    conv_problem,
    kind_of_pixels,
    per_axis,
    pixel_tile,
)
from resnet_fused.triton_kernels.problem import tiles as count_tiles

# block_m kernels by block_n channels per program, block_k pixels per step (of 16-bit floats).
# Within 128 registers two programs share a multiprocessor.
_BY_TMA = (
    Configuration("boxes", 128, 128, 64, warps=8, stages=3, registers=128),
    Configuration("boxes", 128, 64, 64, warps=4, stages=3),
    Configuration("boxes", 64, 128, 64, warps=4, stages=3),
    Configuration("boxes", 64, 64, 64, warps=4, stages=4),
)
# Short steps and more of them in flight, as copies are issued by threads.
_BY_POINTER = tuple(
    row._replace(kind="gather", block_k=32, stages=4, registers=None) for row in _BY_TMA
)
_WHOLE_VECTORS = 32  # channels: the least tile that has one tap
_RESIDENT_PROGRAMS = 2  # of a multiprocessor
_LEAST_STEPS = 4  # of a split: below it filling the pipeline is most of the work
_SUM_SPLITS = 16  # loads in flight per element: their latency is what the sum takes
_SUM_BLOCK = 128


def configurations(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    tma: bool = True,
    prologue: bool = False,
) -> tuple[Configuration, ...]:
    """Ways to compute it: the one chosen without measurements, then what is worth timing.

    tma: whether `device.fits_tma` holds for x and grad_y.
    """
    kind = kind_of_pixels(problem, architecture, tma)
    table = _BY_POINTER if kind == "gather" else _BY_TMA
    rows, columns = _result(problem, kind)
    found = []
    for row in table:
        # What does not exist, TMA fills with zeros.
        least = LEAST_DOT if kind == "gather" else LEAST_WGMMA
        block_m = side(rows, least, row.block_m)
        block_n = side(columns, least, row.block_n)
        if (block_m, block_n) != (row.block_m, row.block_n) and row is not table[-1]:
            continue  # a smaller tile of the table does the same with fewer warps
        warps = row.warps
        if kind == "gather" and _has_mixed_tiles(problem):
            warps = 8  # every element has an address and a mask of its own, in registers
        elif kind == "gather":
            while problem.c // problem.groups % block_n:
                block_n //= 2
        block_k = max(LEAST_DOT, row.block_k * 2 // dtype.itemsize)
        stage_bytes = (block_m + block_n) * block_k * dtype.itemsize
        stages = max(1, min(row.stages, (architecture.shared_bytes - device.KIB) // stage_bytes))
        made = Configuration(kind, block_m, block_n, block_k, warps, stages)
        through_registers = prologue or _is_ragged(problem, made)
        limited = dtype.itemsize == 2 and architecture.generation == "hopper"
        if limited and not through_registers:
            made = made._replace(registers=row.registers)
        found.append(made)
    free = [each._replace(registers=None) for each in found if each.registers]
    alternatives = []
    if kind != "gather":
        alternatives = [*configurations(problem, dtype, architecture, False, prologue)]
    return tuple(dict.fromkeys(found + free + alternatives))


def _result(problem: ConvProblem, kind: Kind) -> tuple[int, int]:
    """Rows and columns of the product of one group, or with TMA of one tap."""
    group_c, group_k = problem.c // problem.groups, problem.k // problem.groups
    if kind == "gather" and _has_mixed_tiles(problem):
        return group_k, group_c * problem.r * problem.s
    return group_k, group_c


def _has_mixed_tiles(problem: ConvProblem) -> bool:
    """Whether tiles of columns have several taps in them, not whole vectors of one tap."""
    return problem.c // problem.groups % _WHOLE_VECTORS != 0


def _tile(problem: ConvProblem, configuration: Configuration) -> tuple[PixelTile, int]:
    """A box of pixels of the output, and how many boxes there are."""
    pixels = configuration.block_k
    if configuration.kind == "gather":
        return PixelTile(1, 1, pixels), triton.cdiv(problem.rows, pixels)
    rows = configuration.kind == "rows"
    shape = (1, 1, problem.rows) if rows else (problem.n, problem.p, problem.q)
    tile = pixel_tile(*shape, pixels)
    return tile, count_tiles(*shape, tile)


def _is_ragged(problem: ConvProblem, configuration: Configuration) -> bool:
    """Whether TMA reads pixels of x for pixels of grad_y that do not exist, but in other taps.

    grad_y is zero there, but the product with infinity would be NaN.
    """
    if configuration.kind in ("gather", "rows") or (problem.r, problem.s) == (1, 1):
        return False
    tile, _ = _tile(problem, configuration)
    return problem.p % tile.h != 0 or problem.q % tile.w != 0


@triton.jit(do_not_specialize=["h", "w", "p", "q", "steps", "steps_per_split"])
def _conv_wgrad_tma_kernel(
    grad_y,
    x,
    partials_ptr,
    scale_ptr,
    shift_ptr,
    h,
    w,
    p,
    q,
    steps,
    steps_per_split,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_y: descriptor of (N, P, Q, K); x: of (N, H, W, C), or with STRIDE 2 of its halves.

    partials: (splits, K, R * S * C) float32. scale_ptr, shift_ptr: (C,) float32, or None. h, w, p,
    q: of x and grad_y; steps: tiles of pixels, of which a split has steps_per_split. RAGGED: as
    `_is_ragged` says.
    """
    # The operand that comes from registers must be the first one.
    X_FIRST: tl.constexpr = scale_ptr is not None or RAGGED
    MASKED: tl.constexpr = RAGGED or (scale_ptr is not None and PADDING_H + PADDING_W > 0)
    PIXELS: tl.constexpr = TILE_N * TILE_H * TILE_W
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c0 = tl.program_id(0) % C_TILES * BLOCK_C
    k0 = tl.program_id(0) // C_TILES % K_TILES * BLOCK_K
    tap = tl.program_id(0) // (C_TILES * K_TILES)
    down = tap // S * DILATION_H - PADDING_H
    right = tap % S * DILATION_W - PADDING_W
    channels = c0 + tl.arange(0, BLOCK_C)
    kernels = k0 + tl.arange(0, BLOCK_K)
    pixel = tl.arange(0, PIXELS)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=channels < C, other=0.0)
        shift = tl.load(shift_ptr + channels, mask=channels < C, other=0.0)
    if X_FIRST:
        acc = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)

    split = tl.program_id(1)
    last = tl.minimum(steps, (split + 1) * steps_per_split)
    for step in tl.range(split * steps_per_split, last, num_stages=STAGES):
        if ROWS:
            image = 0
            row = 0
            column = step * PIXELS
        else:
            image, row, column = tiles.tile_origin(step, p, q, TILE_N, TILE_H, TILE_W)
        gradient = tl.reshape(grad_y.load([image, row, column, k0]), (PIXELS, BLOCK_K))
        if STRIDE == 2:
            # The tap reads rows and columns of one parity.
            odd_h = down & 1
            odd_w = right & 1
            source_h = row + (down - odd_h) // 2
            source_w = column + (right - odd_w) // 2
            box = x.load([image, source_h, odd_h, source_w, odd_w * C + c0])
        else:
            box = x.load([image, row + down, column + right, c0])
        values = tl.reshape(box, (PIXELS, BLOCK_C))
        keep = None
        if MASKED:
            row_of = row + pixel // TILE_W % TILE_H
            column_of = column + pixel % TILE_W
            # Padding is zero behind the ReLU.
            source_h = row_of * STRIDE + down
            source_w = column_of * STRIDE + right
            inside = (source_h >= 0) & (source_h < h) & (source_w >= 0) & (source_w < w)
            if RAGGED:
                inside &= (row_of < p) & (column_of < q)
            keep = inside[:, None]
        if scale_ptr is not None:
            values = convolution.scale_shift_relu(values, scale, shift, keep, ASSEMBLY)
        elif RAGGED:
            values = tl.where(keep, values, tl.zeros_like(values))
        if X_FIRST:
            acc = tl.dot(values.T, gradient, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(gradient.T, values, acc, input_precision=PRECISION)

    if X_FIRST:
        acc = tl.trans(acc)
    COLUMNS: tl.constexpr = R * S * C
    at = split.to(tl.int64) * (K * COLUMNS) + tap * C
    offsets = kernels[:, None] * COLUMNS + channels[None, :]
    tl.store(
        partials_ptr + at + offsets, acc, mask=(kernels < K)[:, None] & (channels < C)[None, :]
    )


@triton.jit(do_not_specialize=["n", "h", "w", "p", "q", "steps_per_split"])
def _conv_wgrad_kernel(
    grad_y_ptr,
    x_ptr,
    partials_ptr,
    scale_ptr,
    shift_ptr,
    n,
    h,
    w,
    p,
    q,
    steps_per_split,
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
    GROUPS: tl.constexpr,
    POINTWISE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_conv_wgrad_tma_kernel`, through pointers; any stride and groups.

    BLOCK_C: of the columns, which are taps with all channels of a group.
    """
    GROUP_C: tl.constexpr = C // GROUPS
    GROUP_K: tl.constexpr = K // GROUPS
    COLUMNS: tl.constexpr = R * S * GROUP_C
    K_TILES: tl.constexpr = (GROUP_K + BLOCK_K - 1) // BLOCK_K
    C_TILES: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    c_tile = tl.program_id(0) % C_TILES
    k0 = tl.program_id(0) // C_TILES % K_TILES * BLOCK_K
    group = tl.program_id(0) // (C_TILES * K_TILES)
    kernels = k0 + tl.arange(0, BLOCK_K)
    columns = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if GROUP_C % BLOCK_C == 0:  # whole vectors of one tap
        C_TILES_OF_TAP: tl.constexpr = GROUP_C // BLOCK_C
        tap = c_tile // C_TILES_OF_TAP
        channels = group * GROUP_C + c_tile % C_TILES_OF_TAP * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        tap = (columns // GROUP_C)[None, :]
        channels = group * GROUP_C + columns % GROUP_C
    in_columns = (columns < COLUMNS)[None, :]
    of_kernels = group * GROUP_K + kernels
    down = tap // S * DILATION_H - PADDING_H
    right = tap % S * DILATION_W - PADDING_W
    of_columns = (down * w + right) * C + channels[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=columns < COLUMNS, other=0.0)
        shift = tl.load(shift_ptr + channels, mask=columns < COLUMNS, other=0.0)
        acc = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)

    split = tl.program_id(1)
    pixels = n * p * q
    last = tl.minimum(tl.cdiv(pixels, PIXELS), (split + 1) * steps_per_split)
    for step in tl.range(split * steps_per_split, last, num_stages=STAGES):
        pixel = step * PIXELS + tl.arange(0, PIXELS)
        reads = (pixel < pixels)[:, None]
        # The first operand is loaded as it is used: a transposition of what is in registers would
        # keep cp.async from loading it.
        if scale_ptr is not None:
            of_gradient = pixel.to(tl.int64)[:, None] * K + of_kernels[None, :]
            gradient_mask = (pixel < pixels)[:, None]
            if GROUP_K % BLOCK_K != 0:
                gradient_mask = gradient_mask & (kernels < GROUP_K)[None, :]
        else:
            of_gradient = pixel.to(tl.int64)[None, :] * K + of_kernels[:, None]
            gradient_mask = (pixel < pixels)[None, :]
            if GROUP_K % BLOCK_K != 0:
                gradient_mask = gradient_mask & (kernels < GROUP_K)[:, None]
        gradient = tl.load(grad_y_ptr + of_gradient, mask=gradient_mask, other=0.0)
        source = pixel
        if not POINTWISE:
            row = pixel // q % p * STRIDE_H
            column = pixel % q * STRIDE_W
            source = (pixel // (p * q) * h + row) * w + column
            source_h = row[:, None] + down
            source_w = column[:, None] + right
            reads = reads & (source_h >= 0) & (source_h < h) & (source_w >= 0) & (source_w < w)
        if COLUMNS % BLOCK_C != 0:
            reads = reads & in_columns
        values = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * C + of_columns, mask=reads, other=0.0
        )
        if scale_ptr is not None:
            values = convolution.scale_shift_relu(values, scale, shift, reads, ASSEMBLY)
            acc = tl.dot(values.T, gradient, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(gradient, values, acc, input_precision=PRECISION)

    if scale_ptr is not None:
        acc = tl.trans(acc)
    at = split.to(tl.int64) * (K * COLUMNS) + group * (GROUP_K * COLUMNS)
    offsets = kernels[:, None] * COLUMNS + columns[None, :]
    mask = (kernels < GROUP_K)[:, None] & in_columns
    tl.store(partials_ptr + at + offsets, acc, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(
    partials_ptr,
    scale_ptr,
    grad_weight_ptr,
    splits,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    SIZE: tl.constexpr,
    GROUP_C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials: (splits, K, R, S, GROUP_C), SIZE elements each; scale: (K,) float32, or None."""
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < SIZE
    total = tl.zeros((BLOCK_SPLITS, BLOCK), dtype=tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        offsets = split.to(tl.int64)[:, None] * SIZE + elements[None, :]
        mask = (split < splits)[:, None] & inside[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    gradient = tl.sum(total, axis=0)
    k = elements // (R * S * GROUP_C)
    r = elements // (S * GROUP_C) % R
    s = elements // GROUP_C % S
    if scale_ptr is not None:
        gradient *= tl.load(scale_ptr + k, mask=inside, other=0.0)
    at = k * stride_k + elements % GROUP_C * stride_c + r * stride_r + s * stride_s
    tl.store(grad_weight_ptr + at, gradient.to(grad_weight_ptr.dtype.element_ty), mask=inside)


def conv_wgrad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    configuration: Configuration | None = None,
) -> Tensor:
    """The gradient of `weight`, laid out as `torch.empty_like(weight)` is."""
    if scale is not None and shift is not None:
        scale, shift = convolution.vector(scale), convolution.vector(shift)
    geometry = stride, padding, dilation, groups
    return scaled_wgrad(grad_y, x, weight, scale, shift, None, geometry, configuration)


def scaled_wgrad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    output_scale: Tensor | None,
    geometry: tuple[Any, ...],
    configuration: Configuration | None = None,
) -> Tensor:
    """`conv_wgrad` times a factor per output channel.

    scale, shift: (C,), output_scale: (K,), contiguous, float32, or None; geometry: stride, padding,
    dilation, groups.
    """
    grad_weight = torch.empty_like(weight)
    if grad_weight.numel() == 0 or grad_y.numel() == 0:
        return grad_weight.zero_()
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    plan = _plan(
        conv_problem(x, weight, *geometry),
        x.dtype,
        device.architecture(x),
        device.fits_tma(grad_y, x),
        scale is not None,
        configuration,
        device.dot_precision(x),
        device.inline_assembly(),
    )
    partials = x.new_empty((plan.splits, weight.numel()), dtype=torch.float32)
    with device.guard(x):
        plan.kernel[plan.grid](
            *map(boxes.argument, plan.views, (grad_y, x)),
            *(partials, scale, shift),
            *plan.sizes,
            **plan.constants,
            **plan.options,
        )
        _sum_splits_kernel[(triton.cdiv(weight.numel(), _SUM_BLOCK),)](
            *(partials, output_scale, grad_weight, plan.splits),
            *grad_weight.stride(),
            *(weight.numel(), *weight.shape[1:]),
            *(_SUM_SPLITS, _SUM_BLOCK),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad_weight


class _Plan(NamedTuple):
    """A launch but for its tensors.

    views: of grad_y and x; sizes, constants: arguments; options: keywords of the launch.
    """

    views: tuple[View | None, ...]
    kernel: Any
    grid: tuple[int, int]
    splits: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@functools.cache
def _plan(
    problem: ConvProblem,
    dtype: torch.dtype,
    architecture: Architecture,
    tma: bool,
    prologue: bool,
    configuration: Configuration | None,
    precision: str,
    assembly: bool,
) -> _Plan:
    if configuration is None or (configuration.kind in TMA_KINDS and not tma):
        configuration = configurations(problem, dtype, architecture, tma, prologue)[0]
    row = configuration
    n, c, h, w, k, r, s, p, q, stride, padding, dilation, groups = problem
    constants: dict[str, Any] = {
        **{"C": c, "K": k, "R": r, "S": s},
        **per_axis("PADDING", padding),
        **per_axis("DILATION", dilation),
        "ASSEMBLY": assembly and row.assembly and prologue and dtype.itemsize == 2,
        "PRECISION": precision,
        **{"BLOCK_K": row.block_m, "BLOCK_C": row.block_n, "STAGES": row.stages},
    }
    tile, steps = _tile(problem, row)
    views: tuple[View | None, ...] = None, None
    if row.kind == "gather":
        columns = triton.cdiv(r * s * c // groups, row.block_n)
        constants |= {
            **per_axis("STRIDE", stride),
            **{"GROUPS": groups, "POINTWISE": problem.is_pointwise, "PIXELS": row.block_k},
        }
    else:
        columns = r * s * triton.cdiv(c, row.block_n)
        views = (
            boxes.like_y(problem, row.kind, tile, row.block_m),
            boxes.like_x(problem, row.kind, tile, row.block_n),
        )
        constants |= {
            **{"STRIDE": stride[0], "ROWS": row.kind == "rows"},
            "RAGGED": _is_ragged(problem, row),
            **{"TILE_N": tile.n, "TILE_H": tile.h, "TILE_W": tile.w},
        }
    programs = groups * triton.cdiv(k // groups, row.block_m) * columns
    splits = min(
        max(1, _RESIDENT_PROGRAMS * architecture.multiprocessors // programs),
        max(1, steps // _LEAST_STEPS),
    )
    steps_per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_per_split)
    gathered = row.kind == "gather"
    return _Plan(
        views=views,
        kernel=_conv_wgrad_kernel if gathered else _conv_wgrad_tma_kernel,
        grid=(programs, splits),
        splits=splits,
        sizes=(n, h, w, p, q, steps_per_split)
        if gathered
        else (h, w, p, q, steps, steps_per_split),
        constants=constants,
        options=convolution.launch_options(row),
    )
