"""A residual block in training as one autograd node.

Kept for the backward: the block's input, the convolutions' outputs, the statistics and the block's
output (which the next block keeps as its input anyway). The ReLU outputs inside the block, which
eager keeps as well, are recomputed from the convolutions' outputs, one pass each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused import backends, native, onednn
from resnet_fused.layout import memory_format
from resnet_fused.ops.bn_relu import (
    BatchNormArgs,
    bn_relu_apply,
    bn_relu_with_statistics,
    count_as_edited,
    keeps_output,
)
from resnet_fused.ops.bn_relu_backward import bn_relu_backward


class Geometry(NamedTuple):
    """How a convolution slides, in the order of `torch.conv2d`."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Branch(NamedTuple):
    """A convolution without bias, and the batch normalisation of its output."""

    weight: Tensor
    bn: BatchNormArgs
    geometry: Geometry


class _Plan(NamedTuple):
    """What a branch is besides tensors."""

    geometry: Geometry
    training: bool
    momentum: float
    eps: float


_TENSORS = 5  # per branch: weight, bn.weight, bn.bias, bn.running_mean, bn.running_var


def residual_block(x: Tensor, branches: Sequence[Branch], shortcut: Branch | None) -> Tensor:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut(x)), with every gradient.

    x: (N, C, H, W), out: (N, K, P, Q). branches: the block's convolutions in order; shortcut: the
    projection, None for the identity. x and the convolution weights have one dtype. Running
    statistics are updated in place. Differentiable twice.
    """
    every = [*branches] if shortcut is None else [*branches, shortcut]
    plans = [_Plan(branch.geometry, *branch.bn[4:]) for branch in every]
    tensors = [t for branch in every for t in (branch.weight, *branch.bn[:4])]
    out: Tensor = _ResidualBlock.apply(plans, shortcut is not None, x, *tensors)
    return out


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plans: list[_Plan], has_shortcut: bool, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.native = _runs_natively(x)
        if ctx.native:
            out, *kept = _native_forward(plans, has_shortcut, x, tensors)
            mask = None
        else:
            out, mask, *kept = _forward(plans, has_shortcut, x, tensors)
        parameters = [t for i, t in enumerate(tensors) if i % _TENSORS < 3]
        ctx.save_for_backward(out if keeps_output(x) else None, mask, x, *kept, *parameters)
        ctx.plans, ctx.has_shortcut = plans, has_shortcut
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        plans, has_shortcut = ctx.plans, ctx.has_shortcut
        out, mask, x, *rest = ctx.saved_tensors
        kept, parameters = rest[: 3 * len(plans)], rest[3 * len(plans) :]
        steps = [
            _Step(plan, *kept[3 * i : 3 * i + 3], *parameters[3 * i : 3 * i + 3])
            for i, plan in enumerate(plans)
        ]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad_out, x, steps, has_shortcut, needed)
        elif ctx.native:
            grads = _native_backward(grad_out, out, x, steps, has_shortcut, needed)
        else:
            grads = _backward(grad_out, out, mask, x, steps, has_shortcut, needed)
        return (None, None, *grads)


def _forward(
    plans: list[_Plan], has_shortcut: bool, x: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    """out, the mask of its ReLU, then convolution output, mean and invstd of every branch."""
    branches = _branches(plans, tensors)
    main = branches[:-1] if has_shortcut else branches
    kept: list[Tensor] = []
    z = x
    for branch in main[:-1]:
        y = _convolve(z, branch)
        z, mean, invstd, *_ = bn_relu_with_statistics(y, branch.bn)
        kept += (y, mean, invstd)
    y = _convolve(z, main[-1])
    if has_shortcut:
        residual, residual_bn = _convolve(x, branches[-1]), branches[-1].bn
    else:
        residual, residual_bn = x, None
    save_mask = not (has_shortcut or keeps_output(x))
    out, mean, invstd, *residual_statistics, mask = bn_relu_with_statistics(
        y, main[-1].bn, residual, residual_bn, save_mask=save_mask
    )
    kept += (y, mean, invstd)
    if has_shortcut:
        kept += (residual, *residual_statistics)
    return [out, mask, *kept]


def _runs_natively(x: Tensor) -> bool:
    """Whether the compiled extension runs whole blocks on tensors like x."""
    return (
        x.is_cpu
        and memory_format(x) is torch.channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
        and onednn.runs(x.dtype, x.numel())
        and backends.choose("bn_relu", x) is native.launcher("bn_relu")
    )


def _native_forward(
    plans: list[_Plan], has_shortcut: bool, x: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    forward = native.launcher("residual_block_forward")
    with torch._C._AutoDispatchBelowAutograd():
        results: list[Tensor] = forward(x, tensors, *_native_settings(plans), has_shortcut)
    for i, plan in enumerate(plans):
        if plan.training:
            count_as_edited(*tensors[_TENSORS * i + 3 : _TENSORS * (i + 1)])
    return results


def _native_settings(plans: list[_Plan]) -> tuple[list[int], list[int], list[float]]:
    geometry = [
        number
        for stride, padding, dilation, groups in (plan.geometry for plan in plans)
        for number in (*padding, *stride, *dilation, groups)
    ]
    training = [int(plan.training) for plan in plans]
    return geometry, training, [v for plan in plans for v in (plan.momentum, plan.eps)]


class _Step(NamedTuple):
    """One branch as the backward finds it; y is the convolution's output."""

    plan: _Plan
    y: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def _backward(
    grad_out: Tensor,
    out: Tensor | None,
    mask: Tensor,
    x: Tensor,
    steps: list[_Step],
    has_shortcut: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    main = steps[:-1] if has_shortcut else steps
    branch_grads: list[tuple[Tensor | None, ...]] = [()] * len(steps)
    grad_y, *bn_grads, grad_shortcut, shortcut_weight, shortcut_bias = _last_bn_backward(
        grad_out, out, mask, main[-1], steps[-1] if has_shortcut else None
    )
    if has_shortcut:
        wanted = (needed[0], needed[1 + _TENSORS * (len(steps) - 1)])
        grad_shortcut, grad_conv = _convolution_backward(grad_shortcut, x, steps[-1], wanted)
        branch_grads[-1] = (grad_conv, shortcut_weight, shortcut_bias)
    for index in reversed(range(len(main))):
        step, before = main[index], main[index - 1]
        z = _relu_output(before) if index else x
        wanted = (needed[0] or index > 0, needed[1 + _TENSORS * index])
        grad_z, grad_conv = _convolution_backward(grad_y, z, step, wanted)
        branch_grads[index] = (grad_conv, *bn_grads)
        if index:
            grad_y, *bn_grads = bn_relu_backward(
                *(grad_z, before.y, None, None, before.bn_weight, before.bn_bias),
                *(before.mean, before.invstd, before.plan.training),
            )[:3]
    grads = [grad_z.add_(grad_shortcut) if needed[0] else None]
    for conv_and_bn in branch_grads:
        grads += (*conv_and_bn, None, None)  # the running statistics have no gradient
    return [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]


def _native_backward(
    grad_out: Tensor,
    out: Tensor,
    x: Tensor,
    steps: list[_Step],
    has_shortcut: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    backward = native.launcher("residual_block_backward")
    with torch._C._AutoDispatchBelowAutograd():
        grad_x, grad_shortcut, *branch_grads = backward(
            *(grad_out.contiguous(memory_format=torch.channels_last), out, x),
            [t for step in steps for t in (step.y, step.mean, step.invstd)],
            [t for step in steps for t in (step.weight, step.bn_weight, step.bn_bias, None, None)],
            *_native_settings([step.plan for step in steps]),
            has_shortcut,
            [int(wanted) for i, wanted in enumerate(needed) if i == 0 or i % _TENSORS == 1],
        )
    grads = [grad_x.add_(grad_shortcut) if needed[0] else None]
    for i in range(len(steps)):
        grads += (*branch_grads[3 * i : 3 * i + 3], None, None)
    return [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]


def _last_bn_backward(
    grad_out: Tensor, out: Tensor | None, mask: Tensor, last: _Step, shortcut: _Step | None
) -> tuple[Tensor, ...]:
    has_mask = out is None and shortcut is None
    residual_arguments = (
        ()
        if shortcut is None
        else (
            *(shortcut.y, True, shortcut.bn_weight, shortcut.bn_bias),
            *(shortcut.mean, shortcut.invstd, shortcut.plan.training),
        )
    )
    return bn_relu_backward(
        *(grad_out, last.y, out, mask if has_mask else None, last.bn_weight, last.bn_bias),
        *(last.mean, last.invstd, last.plan.training, True, *residual_arguments),
    )


def _differentiable_backward(
    grad_out: Tensor, x: Tensor, steps: list[_Step], has_shortcut: bool, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by autograd over operators that are differentiable twice."""
    tensors: list[Tensor | None] = [x]
    for step in steps:
        tensors += (step.weight, step.bn_weight, step.bn_bias, None, None)
    inputs = [t for t, wanted in zip(tensors, needed, strict=True) if wanted and t is not None]
    main = steps[:-1] if has_shortcut else steps
    z = x
    for step in main[:-1]:
        z = bn_relu_with_statistics(_convolve(z, step), _recomputed_bn(step))[0]
    residual = _convolve(x, steps[-1]) if has_shortcut else x
    out = bn_relu_with_statistics(
        _convolve(z, main[-1]),
        _recomputed_bn(main[-1]),
        residual,
        _recomputed_bn(steps[-1]) if has_shortcut else None,
    )[0]
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    return [next(grads) if wanted else None for wanted in needed]


def _recomputed_bn(step: _Step) -> BatchNormArgs:
    """The normalisation once more: batch statistics without updates, or the running ones then."""
    if step.plan.training:
        return BatchNormArgs(step.bn_weight, step.bn_bias, None, None, True, 0.0, step.plan.eps)
    variance = step.invstd.pow(-2)
    return BatchNormArgs(step.bn_weight, step.bn_bias, step.mean, variance, False, 0.0, 0.0)


def _branches(plans: list[_Plan], tensors: Sequence[Tensor | None]) -> list[Branch]:
    branches = []
    for i, plan in enumerate(plans):
        weight, bn_weight, bn_bias, mean, var = tensors[_TENSORS * i : _TENSORS * (i + 1)]
        bn = BatchNormArgs(bn_weight, bn_bias, mean, var, plan.training, plan.momentum, plan.eps)
        branches.append(Branch(cast(Tensor, weight), bn, plan.geometry))
    return branches


def _convolve(x: Tensor, branch: Branch | _Step) -> Tensor:
    geometry = branch.geometry if isinstance(branch, Branch) else branch.plan.geometry
    return torch.conv2d(x, branch.weight, None, *geometry)


def _convolution_backward(
    grad_y: Tensor, x: Tensor, step: _Step, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = step.plan.geometry
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_y, x, step.weight, None, stride, padding, dilation, False, [0, 0], groups),
        [*wanted, False],
    )
    return grad_x, grad_weight


def _relu_output(step: _Step) -> Tensor:
    return bn_relu_apply(step.y, step.bn_weight, step.bn_bias, step.mean, step.invstd)
