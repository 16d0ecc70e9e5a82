"""Convolution that also measures its output, with the batch norm and ReLU in front of it."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import boxes, convolution, device, reductions, tiles
from resnet_fused.triton_kernels.convolution import Configuration
from resnet_fused.triton_kernels.problem import conv_problem

_PROLOGUE_BLOCK = 2048  # elements: 16 bytes per thread, two of them in flight
_PROLOGUE_WARPS = 4


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "steps"])
def _conv_stats_kernel(
    x,
    weight,
    y,
    scale_ptr,
    shift_ptr,
    counts_ptr,
    means_ptr,
    m2s_ptr,
    N,
    H,
    W,
    P,
    Q,
    steps,
    LOOP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """counts: (tiles,); means, m2s: (tiles, K). WHOLE: every pixel of every tile exists."""
    if LOOP.persistent:
        parts = convolution.parts(N, P, Q, LOOP)
        first, programs = tl.program_id(0), tl.num_programs(0)
        for part in tl.range(first, parts, programs, num_stages=LOOP.stages, flatten=True):
            _compute_part(
                *(part, x, weight, y, scale_ptr, shift_ptr, counts_ptr, means_ptr, m2s_ptr),
                *(N, H, W, P, Q, steps, LOOP, WHOLE),
            )
    else:
        _compute_part(
            *(tl.program_id(0), x, weight, y, scale_ptr, shift_ptr),
            *(counts_ptr, means_ptr, m2s_ptr, N, H, W, P, Q, steps, LOOP, WHOLE),
        )


@triton.jit
def _compute_part(
    part,
    x,
    weight,
    y,
    scale_ptr,
    shift_ptr,
    counts_ptr,
    means_ptr,
    m2s_ptr,
    N,
    H,
    W,
    P,
    Q,
    steps,
    LOOP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    tile, group, k0 = convolution.place(part, LOOP)
    acc = convolution.accumulate(
        x, weight, scale_ptr, shift_ptr, tile, group, k0, N, H, W, P, Q, steps, LOOP
    )
    kernels, exists = convolution.kernels_of(group, k0, LOOP)
    inside, count = convolution.pixels_of(tile, N, P, Q, LOOP)
    mean, m2 = tiles.tile_statistics(
        acc, convolution.per_pixel(inside, LOOP), count, 1 if LOOP.swapped else 0, WHOLE
    )
    partials = tile.to(tl.int64) * LOOP.k + kernels
    tl.store(means_ptr + partials, mean, mask=exists)
    tl.store(m2s_ptr + partials, m2, mask=exists)
    tl.store(counts_ptr + tile, count, mask=k0 == 0)
    convolution.store_tile(y, acc, tile, group, k0, N, P, Q, LOOP)


def conv_stats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, m2) of y = conv2d(relu(x * scale + shift), weight), which is channels_last."""
    problem = conv_problem(x, weight, stride, padding, dilation, groups)
    y = convolution.new_output(x, problem)
    if y.numel() == 0:
        mean = x.new_zeros(problem.k, dtype=torch.float32)
        return y, mean, torch.zeros_like(mean)
    x = x.contiguous(memory_format=torch.channels_last)
    if scale is not None and shift is not None:
        scale, shift = convolution.vector(scale), convolution.vector(shift)
        if not convolution.is_fused_prologue(problem):
            x, scale, shift = scale_shift_relu(x, scale, shift), None, None
    weight = convolution.packed(weight, x.dtype)
    plan = convolution.plan(
        *(problem, x, weight, y),
        statistics=True,
        prologue=scale is not None,
        configuration=configuration,
    )
    counts = x.new_empty(plan.tiles, dtype=torch.float32)
    means, m2s = (counts.new_empty(plan.tiles, problem.k) for _ in range(2))
    with device.guard(x):
        _conv_stats_kernel[(plan.programs,)](
            boxes.argument(plan.x, x),
            boxes.argument(plan.weight, weight),
            boxes.argument(plan.out, y),
            scale,
            shift,
            counts,
            means,
            m2s,
            *plan.sizes,
            plan.loop,
            plan.whole,
            **plan.options,
        )
    return y, *reductions.combine_statistics(counts, means, m2s)


@triton.jit
def _scale_shift_relu_kernel(
    x_ptr, out_ptr, scale_ptr, shift_ptr, n, C: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    elements = tl.arange(0, BLOCK)
    inside = elements < n - first
    channels = ((first % C).to(tl.int32) + elements) % C
    x = tl.load(x_ptr + first + elements, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channels)
    shift = tl.load(shift_ptr + channels)
    out = tiles.relu(tiles.scale_shift(x, scale, shift)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + elements, out, mask=inside)


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(x * scale + shift) in the dtype of x.

    x: (N, C, H, W), channels_last; scale, shift: (C,) float32, contiguous.
    """
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    with device.guard(x):
        _scale_shift_relu_kernel[(triton.cdiv(x.numel(), _PROLOGUE_BLOCK),)](
            *(x, out, scale, shift, x.numel(), x.size(1), _PROLOGUE_BLOCK),
            num_warps=_PROLOGUE_WARPS,
            enable_fp_fusion=False,
        )
    return out
