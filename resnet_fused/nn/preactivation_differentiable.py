"""The backward of a pre-activation block for derivatives of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.nn.block_differentiable import normalisation
from resnet_fused.nn.block_parts import convolve
from resnet_fused.nn.preactivation_parts import FirstStep, Gradients, Saved, Shortcut
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_with_statistics


def backward(saved: Saved, needed: Sequence[bool]) -> Gradients:
    """The same gradients by autograd over operators that are differentiable twice.

    needed: for weight and bias of every batch norm, then for the weight of every convolution.
    """
    if saved.first.group is not None or any(s.plan.group is not None for s in saved.inner):
        raise RuntimeError(
            "pre-activation block: derivatives of gradients are not implemented for SyncBatchNorm"
            " (call backward without create_graph)"
        )
    with torch.enable_grad():
        outputs = _outputs(saved)
    grads_out = [g for g in (saved.grad_out, saved.grad_z) if g is not None]
    convolutions = [*saved.convolutions, *([saved.projection] if saved.projection else [])]
    tensors = [saved.first.x, saved.first.weight, saved.first.bias]
    tensors += [t for step in saved.inner for t in (step.bn_weight, step.bn_bias)]
    tensors += [convolution.weight for convolution in convolutions]
    wanted = [saved.needs_x, *needed]
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(outputs, inputs, grads_out, create_graph=True))
    grad_x, *grads = [
        next(found) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    count = 2 * (1 + len(saved.inner))
    norms = [(grads[i], grads[i + 1]) for i in range(0, count, 2)]
    return Gradients(grad_x, norms, grads[count:])


def _outputs(saved: Saved) -> list[Tensor]:
    """What the forward returned, once more."""
    first = saved.first
    z = h = bn_relu_with_statistics(first.x, _first_normalisation(first))[0]
    for step in saved.inner:
        h = bn_relu_with_statistics(convolve(h, step), normalisation(step))[0]
    out = convolve(h, saved.last)
    if saved.shortcut is Shortcut.OUTSIDE:
        return [out, z]
    return [out + (first.x if saved.projection is None else convolve(z, saved.projection))]


def _first_normalisation(first: FirstStep) -> BatchNormArgs:
    """As `normalisation` of a step."""
    if first.training:
        return BatchNormArgs(first.weight, first.bias, None, None, True, 0.0, first.eps)
    variance = first.invstd.pow(-2)
    return BatchNormArgs(first.weight, first.bias, first.mean, variance, False, 0.0, 0.0)
