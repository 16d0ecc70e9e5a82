"""A pre-activation block in training with this library's convolutions.

As in `block_operators`: a 1x1 convolution takes the batch norm and ReLU in front of it along, in
the forward and in the gradient of its weight, and measures its output for the batch norm behind it;
the gradient of its input takes the shortcut's gradient, ReLU and the sums of the batch norm.
"""

from typing import cast

import torch
from torch import Tensor

from resnet_fused.nn import block_operators
from resnet_fused.nn.block_operators import Behind, Input
from resnet_fused.nn.normalization import parameter_gradients
from resnet_fused.nn.preactivation_parts import (
    Gradients,
    Kept,
    Norm,
    NormGradients,
    PreActivation,
    Saved,
    Shortcut,
)
from resnet_fused.nn.synchronization import (
    Moments,
    averages_over,
    of_all_processes,
    settle,
    values_per_channel,
)
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_apply
from resnet_fused.ops.bn_relu_backward import bn_relu_backward_apply
from resnet_fused.ops.bn_statistics import bn_statistics
from resnet_fused.ops.conv_dgrad import conv_dgrad
from resnet_fused.reference import statistics_dtype


def forward(block: PreActivation) -> Kept:
    x, first, inner, last, projection, shortcut = block
    affine = block_operators.settled_affine(_settled(x, first), statistics_dtype(x))
    kept = [affine.mean, affine.invstd]
    z = Input(x, affine)
    if shortcut is Shortcut.OUTSIDE:
        z = Input(bn_relu_apply(x, affine.weight, affine.bias, affine.mean, affine.invstd), None)
    h = z
    for branch in inner:
        y, moments = block_operators.measure(h, branch)
        (bn,) = block_operators.settled([branch], [moments])
        affine = block_operators.settled_affine(bn, moments.mean.dtype)
        kept += (y, affine.mean, affine.invstd)
        h = Input(y, affine)
    out = block_operators.convolve(h, last)
    if shortcut is Shortcut.OUTSIDE:
        return Kept(out, z.x, kept)
    out += x if projection is None else block_operators.convolve(z, projection)
    return Kept(out, None, kept)


def _settled(x: Tensor, first: Norm) -> BatchNormArgs:
    """The batch norm of x as evaluation, which moves its running statistics."""
    if not first.bn.training:
        return first.bn
    moments = Moments(values_per_channel(x), *bn_statistics(x))
    (found,) = of_all_processes([moments], [first.group])
    return settle(first.bn, found)


def backward(saved: Saved) -> Gradients:
    first, projection, convolutions = saved.first, saved.projection, saved.convolutions
    norms: list[NormGradients] = []
    weights: list[Tensor | None] = []
    behind = Behind(saved.grad_out, None)
    for index in reversed(range(1, len(convolutions))):
        conv, before = convolutions[index], saved.inner[index - 1]
        h = Input(cast(Tensor, before.y), block_operators.affine_of(before))
        grad_h, sum_grad, sum_grad_h, grad = block_operators.input_gradient(behind, conv, h)
        needed = saved.needs_weight[index]
        weights.insert(0, block_operators.weight_gradient(grad, h, conv, needed))
        norms.insert(0, parameter_gradients(sum_grad, sum_grad_h, before.bn_weight, before.invstd))
        sums = torch.stack((sum_grad, sum_grad_h))
        averages = averages_over(sums, values_per_channel(h.x), before.plan.group)
        has_dgrad = index > 1 or saved.needs_first
        behind = block_operators.normalisation_backward(grad_h, before, averages, has_dgrad)
    affine = block_operators.make_affine(first.mean, first.invstd, first.weight, first.bias)
    z, conv, grad = Input(first.x, affine), convolutions[0], behind.grad
    grad_shortcut = saved.grad_z
    if projection is not None:
        needed = saved.needs_weight[-1]
        weights.append(block_operators.weight_gradient(saved.grad_out, z, projection, needed))
    if projection is not None and saved.needs_first:
        geometry = projection.geometry._asdict()
        grad_shortcut, *_ = conv_dgrad(saved.grad_out, projection.weight, z.x.shape[2:], **geometry)
    if saved.needs_first:
        grad_z, sum_grad, sum_grad_z, grad = block_operators.input_gradient(
            behind, conv, z, grad_shortcut
        )
    weights.insert(0, block_operators.weight_gradient(grad, z, conv, saved.needs_weight[0]))
    if not saved.needs_first:
        return Gradients(None, [(None, None), *norms], weights)
    norms.insert(0, parameter_gradients(sum_grad, sum_grad_z, first.weight, first.invstd))
    sums = torch.stack((sum_grad, sum_grad_z))
    averages = averages_over(sums, values_per_channel(first.x), first.group)
    arguments = first.backward_arguments(grad_z, relu=False)
    grad_x, _ = bn_relu_backward_apply(*arguments, averages)
    if saved.shortcut is Shortcut.IDENTITY:
        grad_x += saved.grad_out
    return Gradients(grad_x, norms, weights)
