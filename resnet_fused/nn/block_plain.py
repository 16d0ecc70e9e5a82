"""A residual block in training with PyTorch's convolutions."""

from typing import cast

import torch
from torch import Tensor

from resnet_fused.nn.block_parts import (
    Block,
    BranchGradients,
    Convolution,
    Gradients,
    Kept,
    Saved,
    Step,
    convolve,
    last_normalisation,
    relu_output,
)
from resnet_fused.nn.normalization import BackwardArguments, normalise, normalise_backward


def forward(block: Block, save_mask: bool) -> Kept:
    x, residual, main, projection = block
    *inner, last = main
    kept: list[Tensor] = []
    z = x
    for branch in inner:
        y = convolve(z, branch)
        z, mean, invstd, *_ = normalise(y, branch.bn, branch.group)
        kept += (y, mean, invstd)
    y = convolve(z, last)
    del z  # its memory is free for what follows
    if projection is not None:
        residual = convolve(x, projection)
    residual_bn, residual_group = (None, None) if projection is None else projection[1::2]
    out, mean, invstd, *statistics, mask = normalise(
        *(y, last.bn, last.group, residual, residual_bn, residual_group),
        save_mask=save_mask,
    )
    kept += (y, mean, invstd)
    if projection is not None:
        kept += (cast(Tensor, residual), *statistics)
    return Kept(out, mask, kept)


def backward(saved: Saved) -> Gradients:
    x, main, projection = saved.x, saved.main, saved.projection
    last_input = None
    if main[-1].y is None:
        last_input = relu_output(main[-2]) if len(main) > 1 else x
        saved = _with_outputs(saved, last_input)
    grad_y, *bn_grads, grad_shortcut, shortcut_weight, shortcut_bias = last_normalisation(saved)
    branches: list[BranchGradients] = []
    if projection is not None:
        wanted = (saved.needs_x, saved.needs_weight[-1])
        grad_shortcut, grad_weight = convolution_backward(grad_shortcut, x, projection, wanted)
        branches.append((grad_weight, shortcut_weight, shortcut_bias))
    for index in reversed(range(len(main))):
        step = main[index]
        z = last_input
        if z is None:
            z = relu_output(main[index - 1]) if index else x
        last_input = None
        wanted = (saved.needs_x or index > 0, saved.needs_weight[index])
        grad_z, grad_weight = convolution_backward(grad_y, z, step, wanted)
        branches.insert(0, (grad_weight, bn_grads[0], bn_grads[1]))
        if index:
            before = main[index - 1]
            arguments = BackwardArguments(
                *(grad_z, cast(Tensor, before.y), None, None, before.bn_weight, before.bn_bias),
                *(before.mean, before.invstd, before.plan.training),
            )
            grad_y, *bn_grads = normalise_backward(arguments, before.plan.group)[:3]
    has_residual = projection is None and not saved.is_identity
    if saved.needs_x and not has_residual:
        grad_z = grad_z.add_(grad_shortcut)
    return Gradients(grad_z, grad_shortcut if has_residual else None, branches)


def _with_outputs(saved: Saved, last_input: Tensor) -> Saved:
    """Outputs of the last convolution and of the projection, computed once more."""
    *inner, last = saved.main
    main = [*inner, last._replace(y=convolve(last_input, last))]
    projection = saved.projection
    if projection is not None:
        projection = projection._replace(y=convolve(saved.x, projection))
    return saved._replace(main=main, projection=projection)


def convolution_backward(
    grad_y: Tensor, x: Tensor, step: Step | Convolution, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = step.geometry
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_y, x, step.weight, None, stride, padding, dilation, False, [0, 0], groups),
        [*wanted, False],
    )
    return grad_x, grad_weight
