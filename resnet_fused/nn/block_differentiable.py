"""The backward of a residual block for derivatives of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.nn.block_parts import Gradients, Saved, Step, convolve
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_with_statistics
from resnet_fused.reference import unpack_mask


def backward(saved: Saved, needed: Sequence[bool]) -> Gradients:
    """The same gradients by autograd over operators that are differentiable twice.

    needed: for weight, BN's weight and BN's bias of every branch, the projection's last.
    """
    steps = saved.steps
    if any(step.plan.group is not None for step in steps):
        raise RuntimeError(
            "residual block: derivatives of gradients are not implemented for SyncBatchNorm"
            " (call backward without create_graph)"
        )
    with torch.enable_grad():
        total = _total(saved)
    grad = torch.where(_passes(saved, total.detach()), saved.grad_out, 0)
    parameters = [t for step in steps for t in (step.weight, step.bn_weight, step.bn_bias)]
    tensors = [saved.x, *parameters]
    wanted = [saved.needs_x, *needed]
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(total, inputs, grad, create_graph=True) if inputs else ())
    grad_x, *grads = [
        next(found) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    if grad_x is not None and saved.is_identity:
        grad_x = grad_x + grad
    branches = [(grads[i], grads[i + 1], grads[i + 2]) for i in range(0, len(grads), 3)]
    return Gradients(grad_x, grad, branches)


def _total(saved: Saved) -> Tensor:
    """What the last ReLU is applied to, without a residual that is added as it is."""
    *inner, last = saved.main
    z = saved.x
    for step in inner:
        z = bn_relu_with_statistics(convolve(z, step), normalisation(step))[0]
    residual = residual_bn = None
    if saved.projection is not None:
        residual = convolve(saved.x, saved.projection)
        residual_bn = normalisation(saved.projection)
    y = convolve(z, last)
    return bn_relu_with_statistics(y, normalisation(last), residual, residual_bn, relu=False)[0]


def _passes(saved: Saved, total: Tensor) -> Tensor:
    """Where the last ReLU passes a gradient; NaN does."""
    if saved.mask is not None:
        return unpack_mask(saved.mask, total)
    return ~((total if saved.out is None else saved.out) <= 0)


def normalisation(step: Step) -> BatchNormArgs:
    """The normalisation once more: batch statistics without updates, or the running ones then."""
    if step.plan.training:
        return BatchNormArgs(step.bn_weight, step.bn_bias, None, None, True, 0.0, step.plan.eps)
    variance = step.invstd.pow(-2)
    return BatchNormArgs(step.bn_weight, step.bn_bias, step.mean, variance, False, 0.0, 0.0)
