"""Convolution, folded batch norm, residual and ReLU in one kernel."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.layout import to_format
from resnet_fused.triton_kernels import boxes, convolution, device, tiles
from resnet_fused.triton_kernels.conv_bn_relu_backward import conv_bn_relu_backward
from resnet_fused.triton_kernels.convolution import Configuration
from resnet_fused.triton_kernels.problem import ConvProblem, conv_problem

__all__ = ["conv_bn_relu", "conv_bn_relu_", "conv_bn_relu_backward"]


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "steps"])
def _conv_bn_relu_kernel(
    x,
    weight,
    out,
    residual,
    scale_ptr,
    shift_ptr,
    N,
    H,
    W,
    P,
    Q,
    steps,
    LOOP: tl.constexpr,
    RELU: tl.constexpr,
):
    if LOOP.persistent:
        parts = convolution.parts(N, P, Q, LOOP)
        first, programs = tl.program_id(0), tl.num_programs(0)
        for part in tl.range(first, parts, programs, num_stages=LOOP.stages, flatten=True):
            _compute_part(
                *(part, x, weight, out, residual, scale_ptr, shift_ptr),
                *(N, H, W, P, Q, steps, LOOP, RELU),
            )
    else:
        _compute_part(
            *(tl.program_id(0), x, weight, out, residual, scale_ptr, shift_ptr),
            *(N, H, W, P, Q, steps, LOOP, RELU),
        )


@triton.jit
def _compute_part(
    part,
    x,
    weight,
    out,
    residual,
    scale_ptr,
    shift_ptr,
    N,
    H,
    W,
    P,
    Q,
    steps,
    LOOP: tl.constexpr,
    RELU: tl.constexpr,
):
    tile, group, k0 = convolution.place(part, LOOP)
    acc = convolution.accumulate(x, weight, None, None, tile, group, k0, N, H, W, P, Q, steps, LOOP)
    kernels, exists = convolution.kernels_of(group, k0, LOOP)
    scale = tl.load(scale_ptr + kernels, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + kernels, mask=exists, other=0.0)
    acc = tiles.scale_shift(
        acc, convolution.per_kernel(scale, LOOP), convolution.per_kernel(shift, LOOP)
    )
    if residual is not None:
        acc += convolution.load_tile(residual, tile, group, k0, N, P, Q, LOOP)
    if RELU:
        acc = tiles.relu(acc)
    convolution.store_tile(out, acc, tile, group, k0, N, P, Q, LOOP)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    configuration: Configuration | None = None,
) -> Tensor:
    """relu(conv2d(x, weight) * scale + shift + residual), in channels_last."""
    problem = conv_problem(x, weight, stride, padding, dilation, groups)
    out = convolution.new_output(x, problem)
    residual = to_format(residual, torch.channels_last)
    _launch(problem, x, weight, scale, shift, residual, out, relu, configuration)
    return out


def conv_bn_relu_(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    configuration: Configuration | None = None,
) -> None:
    """`conv_bn_relu` into the memory of `residual`, which x does not share."""
    geometry = stride, padding, dilation, groups
    if not residual.is_contiguous(memory_format=torch.channels_last):
        out = conv_bn_relu(x, weight, scale, shift, residual, relu, *geometry, configuration)
        residual.copy_(out)
        return
    problem = conv_problem(x, weight, *geometry)
    _launch(problem, x, weight, scale, shift, residual, residual, relu, configuration)


def _launch(
    problem: ConvProblem,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    relu: bool,
    configuration: Configuration | None,
) -> None:
    """residual, where given, and out lie in channels_last; both may be the same."""
    if out.numel() == 0:
        return
    x = x.contiguous(memory_format=torch.channels_last)
    weight = convolution.packed(weight, x.dtype)
    plan = convolution.plan(problem, x, weight, out, residual, configuration=configuration)
    with device.guard(x):
        _conv_bn_relu_kernel[(plan.programs,)](
            boxes.argument(plan.x, x),
            boxes.argument(plan.weight, weight),
            boxes.argument(plan.out, out),
            boxes.argument(plan.out, residual),
            convolution.vector(scale),
            convolution.vector(shift),
            *plan.sizes,
            plan.loop,
            relu,
            **plan.options,
        )
