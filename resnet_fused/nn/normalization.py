"""Batch normalisation, residual and ReLU by the statistics of one or of several processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resnet_fused.nn.synchronization import (
    Group,
    Moments,
    averages_over,
    of_all_processes,
    settle,
    values_per_channel,
)
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_with_statistics, keeps_output
from resnet_fused.ops.bn_relu_backward import (
    bn_relu_backward,
    bn_relu_backward_apply,
    bn_relu_backward_sums,
)
from resnet_fused.ops.bn_relu_max_pool import (
    bn_relu_max_pool_backward_apply,
    bn_relu_max_pool_backward_sums,
    bn_relu_max_pool_with_statistics,
)
from resnet_fused.ops.bn_statistics import bn_statistics


class BackwardArguments(NamedTuple):
    """Those of `bn_relu_backward`."""

    grad_out: Tensor
    x: Tensor
    out: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    training: bool
    has_residual: bool = False
    residual: Tensor | None = None
    residual_bn: bool = False
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None
    residual_mean: Tensor | None = None
    residual_invstd: Tensor | None = None
    residual_training: bool = False
    relu: bool = True

    def with_residual_norm(
        self,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
    ) -> "BackwardArguments":
        """The same of a residual with a batch norm of its own."""
        return self._replace(
            residual=residual,
            residual_bn=True,
            residual_weight=weight,
            residual_bias=bias,
            residual_mean=mean,
            residual_invstd=invstd,
            residual_training=training,
        )


def bn_relu(
    x: Tensor,
    bn: BatchNormArgs,
    group: Group | None,
    residual: Tensor | None = None,
    residual_bn: BatchNormArgs | None = None,
    residual_group: Group | None = None,
    relu: bool = True,
) -> Tensor:
    """`ops.bn_relu` of the processes of each batch norm's group. Differentiable, once with a group.

    x, residual, out: (N, C, H, W). Of two batch norms in training, both or none have a group.
    """
    if group is None and residual_group is None:
        return bn_relu_with_statistics(x, bn, residual, residual_bn, relu)[0]
    norms = (bn,) if residual_bn is None else (bn, residual_bn)
    settings = [norm[4:] for norm in norms], (group, residual_group), relu
    tensors = [tensor for norm in norms for tensor in norm[:4]]
    out: Tensor = _BnReLUOfGroups.apply(settings, x, residual, *tensors)
    return out


def bn_relu_max_pool(
    x: Tensor, bn: BatchNormArgs, group: Group | None, *windows: Sequence[int]
) -> Tensor:
    """`ops.bn_relu_max_pool` of the processes of a group. Differentiable, once with a group.

    x: (N, C, H, W), out: (N, C, P, Q). windows: kernel_size, stride, padding, two ints each.
    """
    if group is None:
        return bn_relu_max_pool_with_statistics(x, bn, *windows)[0]
    out: Tensor = _BnReLUMaxPoolOfGroup.apply((bn[4:], group, windows), x, *bn[:4])
    return out


def normalise(
    x: Tensor,
    bn: BatchNormArgs,
    group: Group | None,
    residual: Tensor | None = None,
    residual_bn: BatchNormArgs | None = None,
    residual_group: Group | None = None,
    relu: bool = True,
    save_mask: bool = False,
) -> tuple[Tensor, ...]:
    """`bn_relu_with_statistics`, by the statistics of the processes of each batch norm's group.

    Of two batch norms that are both in training, both or none have a group.
    """
    norms = [bn] if residual_bn is None else [bn, residual_bn]
    batches = [x, residual][: len(norms)]
    groups = [group, residual_group][: len(norms)]
    chosen = [i for i, each in enumerate(groups) if each is not None]
    moments = [_moments(cast(Tensor, batches[i])) for i in chosen]
    combined = of_all_processes(moments, [groups[i] for i in chosen])
    for i, found in zip(chosen, combined, strict=True):
        norms[i] = settle(norms[i], found)
    return bn_relu_with_statistics(x, norms[0], residual, (*norms, None)[1], relu, save_mask)


def _moments(x: Tensor) -> Moments:
    return Moments(values_per_channel(x), *bn_statistics(x))


def normalise_backward(
    arguments: BackwardArguments, group: Group | None, residual_group: Group | None = None
) -> tuple[Tensor, ...]:
    """`bn_relu_backward` of `normalise` with these groups."""
    if group is None and residual_group is None:
        return bn_relu_backward(*arguments)
    a = arguments
    sums = bn_relu_backward_sums(
        *(a.grad_out, a.x, a.out, a.mask, a.weight, a.bias, a.mean, a.invstd, a.residual),
        *(a.residual_bn, a.residual_weight, a.residual_bias, a.residual_mean, a.residual_invstd),
        a.relu,
    )
    averages = averages_over(sums, values_per_channel(a.x), group or residual_group)
    grad_x, grad_residual = bn_relu_backward_apply(*a, averages)
    grads = parameter_gradients(sums[0], sums[1], a.weight, a.invstd)
    residual_grads = (sums.new_empty(0), sums.new_empty(0))
    if a.residual_invstd is not None:
        residual_grads = parameter_gradients(sums[0], sums[2], a.residual_weight, a.residual_invstd)
    return grad_x, *grads, grad_residual, *residual_grads


def parameter_gradients(
    sum_grad: Tensor, sum_grad_x: Tensor, weight: Tensor | None, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a batch norm's weight and bias, from sums over the batch of this process."""
    dtype = invstd.dtype if weight is None else weight.dtype
    # A copy: of two batch norms in front of one ReLU both biases have this gradient.
    return (sum_grad_x * invstd).to(dtype), sum_grad.to(dtype, copy=True)


class _BnReLUOfGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Any, x: Tensor, residual: Tensor | None, *tensors: Any
    ) -> Tensor:
        norms, groups, relu = settings
        bn, *others = [BatchNormArgs(*tensors[4 * i : 4 * i + 4], *n) for i, n in enumerate(norms)]
        residual_bn = others[0] if others else None
        takes_residual = relu and residual is not None
        save_output = takes_residual and keeps_output(x)
        save_mask = takes_residual and residual_bn is None and not save_output
        out, *statistics, mask = normalise(
            x, bn, groups[0], residual, residual_bn, groups[1], relu, save_mask
        )
        ctx.settings, ctx.has_residual = settings, residual is not None
        ctx.save_for_backward(
            *(x, out if save_output else None, mask if save_mask else None),
            *(residual if others else None, *statistics),
            *(tensor for norm in (bn, *others) for tensor in norm[:2]),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        norms, groups, relu = ctx.settings
        x, out, mask, residual, *rest = ctx.saved_tensors
        mean, invstd, residual_mean, residual_invstd, weight, bias, *residual_affine = rest
        arguments = BackwardArguments(
            *(grad_out, x, out, mask, weight, bias, mean, invstd, norms[0][0], ctx.has_residual),
            relu=relu,
        )
        if residual_affine:
            residual_weight, residual_bias = residual_affine
            arguments = arguments.with_residual_norm(
                *(residual, residual_weight, residual_bias, residual_mean, residual_invstd),
                training=norms[1][0],
            )
        grads = normalise_backward(arguments, *groups)
        # Of x, residual, then weight, bias and the running statistics of each batch norm.
        every = [grads[0], grads[3], *grads[1:3], None, None]
        if residual_affine:
            every += (*grads[4:], None, None)
        needed = ctx.needs_input_grad[1:]
        return (None, *(g if need else None for g, need in zip(every, needed, strict=True)))


class _BnReLUMaxPoolOfGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, *vectors: Any) -> Tensor:
        norm, group, windows = settings
        (moments,) = of_all_processes([_moments(x)], [group])
        bn = settle(BatchNormArgs(*vectors, *norm), moments)
        out, mean, invstd, argmax = bn_relu_max_pool_with_statistics(x, bn, *windows)
        ctx.settings = settings
        ctx.save_for_backward(x, argmax, mean, invstd, bn.weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        _, group, windows = ctx.settings
        x, argmax, mean, invstd, weight = ctx.saved_tensors
        sums = bn_relu_max_pool_backward_sums(grad_out, x, argmax, mean, *windows)
        averages = averages_over(sums, values_per_channel(x), group)
        grad_x = bn_relu_max_pool_backward_apply(
            grad_out, x, argmax, weight, mean, invstd, True, averages, *windows
        )
        every = (grad_x, *parameter_gradients(sums[0], sums[1], weight, invstd), None, None)
        needed = ctx.needs_input_grad[1:]
        return (None, *(g if need else None for g, need in zip(every, needed, strict=True)))
