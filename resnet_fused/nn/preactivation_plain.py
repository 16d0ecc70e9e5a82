"""A pre-activation block in training with PyTorch's convolutions."""

from typing import cast

from torch import Tensor

from resnet_fused.nn.block_parts import convolve, relu_output
from resnet_fused.nn.block_plain import convolution_backward
from resnet_fused.nn.normalization import BackwardArguments, normalise, normalise_backward
from resnet_fused.nn.preactivation_parts import (
    Gradients,
    Kept,
    NormGradients,
    PreActivation,
    Saved,
    Shortcut,
)
from resnet_fused.ops.bn_relu import bn_relu_apply


def forward(block: PreActivation) -> Kept:
    x, first, inner, last, projection, shortcut = block
    z, mean, invstd, *_ = normalise(x, *first)
    kept, h = [mean, invstd], z
    for branch in inner:
        y = convolve(h, branch)
        h, mean, invstd, *_ = normalise(y, branch.bn, branch.group)
        kept += (y, mean, invstd)
    out = convolve(h, last)
    if shortcut is not Shortcut.OUTSIDE:
        out += x if projection is None else convolve(z, projection)
    return Kept(out, z if shortcut is Shortcut.OUTSIDE else None, kept)


def backward(saved: Saved) -> Gradients:
    grad, first, projection = saved.grad_out, saved.first, saved.projection
    convolutions = saved.convolutions
    norms: list[NormGradients] = []
    weights: list[Tensor | None] = []
    for index in reversed(range(1, len(convolutions))):
        before = saved.inner[index - 1]
        wanted = (True, saved.needs_weight[index])
        grad_h, grad_weight = convolution_backward(
            grad, relu_output(before), convolutions[index], wanted
        )
        weights.insert(0, grad_weight)
        arguments = BackwardArguments(
            *(grad_h, cast(Tensor, before.y), None, None, before.bn_weight, before.bn_bias),
            *(before.mean, before.invstd, before.plan.training),
        )
        grad, *bn_grads = normalise_backward(arguments, before.plan.group)[:3]
        norms.insert(0, (bn_grads[0], bn_grads[1]))
    z = bn_relu_apply(first.x, first.weight, first.bias, first.mean, first.invstd)
    wanted = (saved.needs_first, saved.needs_weight[0])
    grad_z, grad_weight = convolution_backward(grad, z, convolutions[0], wanted)
    weights.insert(0, grad_weight)
    grad_shortcut = saved.grad_z
    if projection is not None:
        wanted = (saved.needs_first, saved.needs_weight[-1])
        grad_shortcut, grad_weight = convolution_backward(saved.grad_out, z, projection, wanted)
        weights.append(grad_weight)
    if not saved.needs_first:
        return Gradients(None, [(None, None), *norms], weights)
    if grad_shortcut is not None:
        grad_z += grad_shortcut
    grad_x, *bn_grads = normalise_backward(first.backward_arguments(grad_z), first.group)[:3]
    if saved.shortcut is Shortcut.IDENTITY:
        grad_x += saved.grad_out
    return Gradients(grad_x, [(bn_grads[0], bn_grads[1]), *norms], weights)
