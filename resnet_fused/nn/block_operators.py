"""A residual block in training with this library's convolutions.

Statistics come with the convolution's output; batch norm and ReLU are part of the 1x1 convolution
that reads it, in the forward and in the gradient of its weight; ReLU, the shortcut's gradient and
the sums of the batch norm's backward are part of the gradient of its input. In front of a larger
kernel, where each value would be normalised once per tap, stands a pass of its own.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.nn.block_parts import (
    Block,
    Branch,
    BranchGradients,
    Convolution,
    Gradients,
    Kept,
    Saved,
    Step,
    last_normalisation,
)
from resnet_fused.nn.normalization import BackwardArguments, parameter_gradients
from resnet_fused.nn.synchronization import (
    Moments,
    averages_over,
    of_all_processes,
    settle,
    values_per_channel,
)
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_apply, bn_relu_with_statistics
from resnet_fused.ops.bn_relu_backward import bn_relu_backward_apply
from resnet_fused.ops.conv_dgrad import conv_dgrad
from resnet_fused.ops.conv_stats import conv_stats
from resnet_fused.ops.conv_wgrad import conv_wgrad

OPERATORS = ("conv_stats", "conv_dgrad", "conv_wgrad")


def runs(x: Tensor) -> bool:
    """Whether these convolutions are asked for, or faster than PyTorch's, for tensors like x."""
    return all(backends.is_implemented(n) and backends.is_accelerated(n, x) for n in OPERATORS)


class _Affine(NamedTuple):
    """A batch norm as x * scale + shift, and as (x - mean) * invstd * weight + bias."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Input(NamedTuple):
    """What a convolution reads: x, or relu(batch norm of x)."""

    x: Tensor
    affine: _Affine | None

    def for_kernel(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, scale, shift) of the operators, for a convolution with this weight."""
        if self.affine is None:
            return self.x, None, None
        if _is_pointwise(weight):
            return self.x, self.affine.scale, self.affine.shift
        _, _, mean, invstd, weight_, bias = self.affine
        return bn_relu_apply(self.x, weight_, bias, mean, invstd), None, None


def forward(block: Block, save_mask: bool) -> Kept:
    x, residual, main, projection = block
    kept: list[Tensor] = []
    z = Input(x, None)
    for branch in main[:-1]:
        y, moments = measure(z, branch)
        (bn,) = settled([branch], [moments])
        affine = settled_affine(bn, moments.mean.dtype)
        kept += (y, affine.mean, affine.invstd)
        z = Input(y, affine)
    ends = [main[-1]] if projection is None else [main[-1], projection]
    measured = [measure(z, main[-1])]
    if projection is not None:
        measured.append(measure(Input(x, None), projection))
    outputs = [y for y, _ in measured]
    norms = settled(ends, [moments for _, moments in measured])
    if projection is not None:
        residual = outputs[1]
    out, *statistics, mask = bn_relu_with_statistics(
        *(outputs[0], norms[0], residual, norms[1] if projection is not None else None),
        save_mask=save_mask,
    )
    for i, y in enumerate(outputs):
        kept += (y, *statistics[2 * i : 2 * i + 2])
    return Kept(out, mask, kept)


def backward(saved: Saved) -> Gradients:
    if saved.main[-1].y is None:
        saved = _with_outputs(saved)
    x, main, projection = saved.x, saved.main, saved.projection
    grad, *bn_grads, grad_shortcut, shortcut_weight, shortcut_bias = last_normalisation(saved)
    branches: list[BranchGradients] = []
    if projection is not None:
        z = Input(x, None)
        grad_weight = weight_gradient(grad_shortcut, z, projection, saved.needs_weight[-1])
        branches.append((grad_weight, shortcut_weight, shortcut_bias))
        if saved.needs_x:
            geometry = projection.geometry._asdict()
            grad_shortcut, *_ = conv_dgrad(
                grad_shortcut, projection.weight, x.shape[2:], **geometry
            )
    behind = Behind(grad, None)
    for index in reversed(range(1, len(main))):
        step, before = main[index], main[index - 1]
        z = Input(cast(Tensor, before.y), affine_of(before))
        grad_z, sum_grad, sum_grad_z, grad = input_gradient(behind, step, z)
        grad_weight = weight_gradient(grad, z, step, saved.needs_weight[index])
        branches.insert(0, (grad_weight, bn_grads[0], bn_grads[1]))
        weight, invstd = before.bn_weight, before.invstd
        bn_grads = [*parameter_gradients(sum_grad, sum_grad_z, weight, invstd)]
        sums = torch.stack((sum_grad, sum_grad_z))
        averages = averages_over(sums, values_per_channel(z.x), before.plan.group)
        has_dgrad = index > 1 or saved.needs_x
        behind = normalisation_backward(grad_z, before, averages, has_dgrad)
    first, grad, grad_x = main[0], behind.grad, None
    has_residual = projection is None and not saved.is_identity
    if saved.needs_x:
        added = None if has_residual else grad_shortcut
        grad_x, _, _, grad = input_gradient(behind, first, Input(x, None), added)
    grad_weight = weight_gradient(grad, Input(x, None), first, saved.needs_weight[0])
    branches.insert(0, (grad_weight, bn_grads[0], bn_grads[1]))
    return Gradients(grad_x, grad_shortcut if has_residual else None, branches)


class Behind(NamedTuple):
    """The gradient of a convolution's output y: grad, or a * grad + (b * y + d).

    coefficients: (a, b, d), (3, K), or None.
    """

    grad: Tensor
    coefficients: Tensor | None


def input_gradient(
    behind: Behind, step: Step | Convolution, z: Input, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of z.x before its batch norm, its sums, and the gradient of the step's output."""
    grad, coefficients = behind
    y = None if coefficients is None else step.y
    affine = () if z.affine is None else (z.x, z.affine.scale, z.affine.shift, None, z.affine.mean)
    grad_z, sum_grad, sum_grad_z, grad_conv = conv_dgrad(
        *(grad, step.weight, z.x.shape[2:], y, coefficients, residual, *affine),
        **step.geometry._asdict(),
    )
    return grad_z, sum_grad, sum_grad_z, grad if coefficients is None else grad_conv


def weight_gradient(
    grad: Tensor, z: Input, step: Step | Convolution, needed: bool
) -> Tensor | None:
    if not needed:
        return None
    x, scale, shift = z.for_kernel(step.weight)
    return conv_wgrad(grad, x, step.weight, scale, shift, *step.geometry)


def normalisation_backward(grad: Tensor, step: Step, averages: Tensor, has_dgrad: bool) -> Behind:
    """From the gradient of the batch norm's output, where the ReLU passed, to that of its input.

    has_dgrad: whether `input_gradient` follows, which can do it for a 1x1 convolution.
    """
    if not (has_dgrad and _is_pointwise(step.weight)):
        arguments = BackwardArguments(
            *(grad, cast(Tensor, step.y), None, None, step.bn_weight, step.bn_bias),
            *(step.mean, step.invstd, step.plan.training),
            relu=False,
        )
        grad_y, _ = bn_relu_backward_apply(*arguments, averages)
        return Behind(grad_y, None)
    a = affine_of(step).scale
    if not step.plan.training:
        zero = torch.zeros_like(a)
        return Behind(grad, torch.stack((a, zero, zero)))
    b = -a * averages[1] * step.invstd.square()
    return Behind(grad, torch.stack((a, b, -a * averages[0] - b * step.mean)))


def measure(z: Input, branch: Branch) -> tuple[Tensor, Moments]:
    """The convolution's output, and its moments in this process."""
    x, scale, shift = z.for_kernel(branch.weight)
    y, mean, m2 = conv_stats(x, branch.weight, scale, shift, *branch.geometry)
    return y, Moments(values_per_channel(y), mean, m2)


def settled(branches: list[Branch], moments: list[Moments]) -> list[BatchNormArgs]:
    """The branches' batch norms as evaluation, which move their running statistics."""
    norms = [branch.bn for branch in branches]
    live = [i for i, bn in enumerate(norms) if bn.training]
    found = of_all_processes([moments[i] for i in live], [branches[i].group for i in live])
    for i, each in zip(live, found, strict=True):
        norms[i] = settle(norms[i], each)
    return norms


def settled_affine(bn: BatchNormArgs, dtype: torch.dtype) -> _Affine:
    mean = cast(Tensor, bn.running_mean).to(dtype, copy=True)
    invstd = (cast(Tensor, bn.running_var).to(dtype) + bn.eps).rsqrt()
    return make_affine(mean, invstd, bn.weight, bn.bias)


def affine_of(step: Step) -> _Affine:
    return make_affine(step.mean, step.invstd, step.bn_weight, step.bn_bias)


def make_affine(
    mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> _Affine:
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return _Affine(scale, shift, mean, invstd, weight, bias)


def _with_outputs(saved: Saved) -> Saved:
    """Outputs of the last convolution and of the projection, computed once more."""
    *inner, last = saved.main
    z = Input(cast(Tensor, inner[-1].y), affine_of(inner[-1])) if inner else Input(saved.x, None)
    main = [*inner, last._replace(y=convolve(z, last))]
    projection = saved.projection
    if projection is not None:
        projection = projection._replace(y=convolve(Input(saved.x, None), projection))
    return saved._replace(main=main, projection=projection)


def convolve(z: Input, step: Step | Convolution) -> Tensor:
    x, scale, shift = z.for_kernel(step.weight)
    y, _, _ = conv_stats(x, step.weight, scale, shift, *step.geometry)
    return y


def _is_pointwise(weight: Tensor) -> bool:
    return weight.size(2) == weight.size(3) == 1
