"""Backward of convolution, folded batch norm, residual and ReLU."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.layout import to_format
from resnet_fused.triton_kernels import convolution, device, reductions, tiles
from resnet_fused.triton_kernels.conv_dgrad import conv_dgrad
from resnet_fused.triton_kernels.conv_wgrad import scaled_wgrad
from resnet_fused.triton_kernels.device import Architecture

_TILE = 4096  # elements: 16 per thread, loads of 16 bytes with two of each tensor in flight
_WARPS = 8
_WIDEST = 256  # channels of a tile at most
_WAVES = 4  # programs per multiprocessor: enough to hide latency, few partial sums


@triton.jit(do_not_specialize=["rows", "tiles_per_program"])
def _relu_backward_kernel(
    grad_out_ptr,
    out_ptr,
    grad_ptr,
    partials_ptr,
    rows,
    tiles_per_program,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad: grad_out where `out` lets it pass, else 0; partials: its sums over a program's rows.

    out_ptr, grad_ptr: None where there was no ReLU.
    """
    program = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    for i in range(tiles_per_program):
        row = (program * tiles_per_program + i) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (channels < C)[None, :]
        offsets = row.to(tl.int64)[:, None] * C + channels[None, :]
        grad = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(tiles.passes_relu(out), grad, 0.0)
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        total += grad
    at = program.to(tl.int64) * C + channels
    tl.store(partials_ptr + at, tl.sum(total, axis=0), mask=channels < C)


def conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_shift, grad_residual), activations in channels_last."""
    grad, grad_shift = _relu_backward(grad_out, out)
    factors = convolution.vector(scale)
    scaled = (weight.to(torch.float32) * factors.view(-1, 1, 1, 1)).to(x.dtype)
    geometry = stride, padding, dilation, groups
    around = (None,) * 8
    grad_x, *_ = conv_dgrad(grad, scaled, x.shape[2:], *around, *geometry)
    grad_weight = scaled_wgrad(grad, x, weight, None, None, factors, geometry)
    grad_residual = grad if has_residual else x.new_empty(0)
    return grad_x, grad_weight, grad_shift.to(scale.dtype), grad_residual


def _relu_backward(grad_out: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient in front of the ReLU, channels_last (grad_out where out is None); its sums."""
    channels_last = torch.channels_last
    grad_out = grad_out.contiguous(memory_format=channels_last)
    if grad_out.numel() == 0:
        return grad_out, grad_out.new_zeros(grad_out.size(1), dtype=torch.float32)
    out = to_format(out, channels_last)
    grad = None if out is None else torch.empty_like(grad_out, memory_format=channels_last)
    channels = grad_out.size(1)
    plan = _plan(grad_out.numel() // channels, channels, device.architecture(grad_out))
    partials = grad_out.new_empty((plan.programs, channels), dtype=torch.float32)
    with device.guard(grad_out):
        _relu_backward_kernel[plan.programs, plan.columns](
            *(grad_out, out, grad, partials, plan.rows, plan.tiles_per_program),
            **plan.constants,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        (sums,) = reductions.sum_partials(partials)
    return grad_out if grad is None else grad, sums


class _Plan(NamedTuple):
    rows: int
    tiles_per_program: int
    programs: int  # over the rows
    columns: int  # programs over the channels
    constants: dict[str, Any]


@functools.cache
def _plan(rows: int, channels: int, architecture: Architecture) -> _Plan:
    block_c = min(_WIDEST, triton.next_power_of_2(channels))
    block_rows = _TILE // block_c
    columns = triton.cdiv(channels, block_c)
    row_tiles = triton.cdiv(rows, block_rows)
    wanted = max(1, _WAVES * architecture.multiprocessors // columns)
    tiles_per_program = triton.cdiv(row_tiles, wanted)
    return _Plan(
        rows=rows,
        tiles_per_program=tiles_per_program,
        programs=triton.cdiv(row_tiles, tiles_per_program),
        columns=columns,
        constants={"C": channels, "BLOCK_ROWS": block_rows, "BLOCK_C": block_c},
    )
