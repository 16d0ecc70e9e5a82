"""A residual block in training on a CPU: one native call forward, one backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import backends, native, onednn
from resnet_fused.layout import memory_format
from resnet_fused.nn.block_parts import Block, Gradients, Kept, Plan, Saved
from resnet_fused.ops.bn_relu import count_as_edited


def runs(x: Tensor, plans: Sequence[Plan]) -> bool:
    """Whether the compiled extension runs whole blocks on tensors like x."""
    return (
        x.is_cpu
        and memory_format(x) is torch.channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
        and onednn.runs(x.dtype, x.numel())
        and all(plan.group is None for plan in plans)
        and backends.choose("bn_relu", x) is native.launcher("bn_relu")
    )


def forward(block: Block, save_mask: bool) -> Kept:
    """save_mask is False: on a CPU the backward reads the sign of the output."""
    residual, projection = block.residual, block.projection
    branches = block.main if projection is None else [*block.main, projection]
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    run = native.launcher("residual_block_forward")
    with torch._C._AutoDispatchBelowAutograd():
        out, *kept = run(
            *(block.x, residual, [t for b in branches for t in (b.weight, *b.bn[:4])]),
            *_settings([Plan(b.geometry, *b.bn[4:], b.group) for b in branches]),
            projection is not None,
        )
    for branch in branches:
        if branch.bn.training:
            count_as_edited(branch.bn.running_mean, branch.bn.running_var)
    return Kept(out, out.new_empty(0), kept)


def backward(saved: Saved) -> Gradients:
    steps, has_projection = saved.steps, saved.projection is not None
    run = native.launcher("residual_block_backward")
    with torch._C._AutoDispatchBelowAutograd():
        grad_x, grad_shortcut, *grads = run(
            saved.grad_out.contiguous(memory_format=torch.channels_last),
            *(saved.out, saved.x, [t for step in steps for t in (step.y, step.mean, step.invstd)]),
            [t for step in steps for t in (step.weight, step.bn_weight, step.bn_bias, None, None)],
            *_settings([step.plan for step in steps]),
            has_projection,
            [int(needed) for needed in (saved.needs_x, *saved.needs_weight)],
        )
    has_residual = not (has_projection or saved.is_identity)
    if saved.needs_x and not has_residual:
        grad_x = grad_x.add_(grad_shortcut)
    branches = [tuple(grads[3 * i : 3 * i + 3]) for i in range(len(steps))]
    return Gradients(grad_x, grad_shortcut if has_residual else None, branches)


def _settings(plans: Sequence[Plan]) -> tuple[list[int], list[int], list[float]]:
    geometry = [
        number
        for stride, padding, dilation, groups in (plan.geometry for plan in plans)
        for number in (*padding, *stride, *dilation, groups)
    ]
    training = [int(plan.training) for plan in plans]
    return geometry, training, [v for plan in plans for v in (plan.momentum, plan.eps)]
