"""A pre-activation block in training as one autograd node.

He et al., "Identity Mappings in Deep Residual Networks", 2016. Kept for the backward: the block's
input, the outputs of all convolutions but the last, and the statistics. The ReLU outputs, which
eager keeps as well, are computed once more: by the convolutions that read them, or in one pass
each. The block's output and the last convolution's are not needed at all.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused.nn import (
    block_operators,
    preactivation_differentiable,
    preactivation_operators,
    preactivation_plain,
)
from resnet_fused.nn.block_parts import (
    KEPT,
    Branch,
    Convolution,
    Geometry,
    Plan,
    Step,
    as_in_forward,
)
from resnet_fused.nn.preactivation_parts import (
    FirstStep,
    Norm,
    PreActivation,
    Saved,
    Shortcut,
)
from resnet_fused.nn.synchronization import Group
from resnet_fused.ops.bn_relu import BatchNormArgs

_NORM_TENSORS = 4  # weight, bias, running_mean, running_var


class _NormSettings(NamedTuple):
    """What a batch norm is besides tensors."""

    training: bool
    momentum: float
    eps: float
    group: Group | None


class _Settings(NamedTuple):
    """What a block is besides tensors. geometries: of the convolutions, the projection last."""

    norms: list[_NormSettings]
    geometries: list[Geometry]
    shortcut: Shortcut


def preactivation_block(
    x: Tensor,
    norms: Sequence[Norm],
    convolutions: Sequence[Convolution],
    projection: Convolution | None,
    shortcut: Shortcut,
) -> tuple[Tensor, Tensor | None]:
    """conv(relu(bn(... conv(z)))) + shortcut, where z = relu(bn(x)), with every gradient.

    x: (N, C, H, W), out: (N, K, P, Q). norms, convolutions: of the main branch in order, a batch
    norm in front of each convolution. projection: with that shortcut only. Returns out, and z with
    a shortcut outside. x and the convolution weights have one dtype. Running statistics are updated
    in place. Differentiable twice, unless statistics come from several processes.
    """
    every = [*convolutions] if projection is None else [*convolutions, projection]
    settings = _Settings(
        [_NormSettings(bn.training, bn.momentum, bn.eps, group) for bn, group in norms],
        [convolution.geometry for convolution in every],
        shortcut,
    )
    tensors = [tensor for norm in norms for tensor in norm.bn[:_NORM_TENSORS]]
    weights = [convolution.weight for convolution in every]
    result: tuple[Tensor, Tensor | None] = _PreActivationBlock.apply(
        settings, x, *tensors, *weights
    )
    return result


class _PreActivationBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        block = _block(settings, x, tensors)
        implementation = _implementation(x)
        kept = implementation.forward(block)
        count = _NORM_TENSORS * len(settings.norms)
        affine = [t for i in range(0, count, _NORM_TENSORS) for t in tensors[i : i + 2]]
        ctx.save_for_backward(x, *affine, *tensors[count:], *kept.tensors)
        ctx.settings, ctx.implementation = settings, implementation
        return kept.out, kept.z

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_z: Tensor | None) -> tuple[Any, ...]:
        settings: _Settings = ctx.settings
        needs_x, *needed = ctx.needs_input_grad[1:]
        count = _NORM_TENSORS * len(settings.norms)
        needs_affine = [n for i in range(0, count, _NORM_TENSORS) for n in needed[i : i + 2]]
        needs_weight = needed[count:]
        first, inner, last, projection = _taken_apart(settings, ctx.saved_tensors)
        saved = Saved(
            grad_out,
            grad_z if settings.shortcut is Shortcut.OUTSIDE else None,
            first,
            inner,
            last,
            projection,
            settings.shortcut,
            needs_x,
            needs_x or any(needs_affine[:2]),
            needs_weight,
        )
        with as_in_forward(grad_out):
            if torch.is_grad_enabled():
                grads = preactivation_differentiable.backward(saved, [*needs_affine, *needs_weight])
            else:
                grads = ctx.implementation.backward(saved)
        result = [None, grads.x]
        for norm in grads.norms:
            result += (*norm, None, None)  # the running statistics have no gradient
        result += grads.weights
        wanted = (False, needs_x, *needed)
        return tuple(g if want else None for g, want in zip(result, wanted, strict=True))


def _implementation(x: Tensor) -> ModuleType:
    """What runs the block on tensors like x: `forward` and `backward` of a module."""
    return preactivation_operators if block_operators.runs(x) else preactivation_plain


def _block(settings: _Settings, x: Tensor, tensors: Sequence[Tensor | None]) -> PreActivation:
    """The block as it was before it was flattened."""
    count = len(settings.norms)
    weights = [cast(Tensor, weight) for weight in tensors[_NORM_TENSORS * count :]]
    convolutions = [Convolution(*each) for each in zip(weights, settings.geometries, strict=True)]
    norms = []
    for i, (training, momentum, eps, group) in enumerate(settings.norms):
        weight, bias, mean, var = tensors[_NORM_TENSORS * i : _NORM_TENSORS * (i + 1)]
        bn = BatchNormArgs(weight, bias, mean, var, training, momentum, eps)
        norms.append(Norm(bn, group))
    inner = [
        Branch(convolution.weight, norm.bn, convolution.geometry, norm.group)
        for convolution, norm in zip(convolutions, norms[1:], strict=False)
    ]
    last, *projection = convolutions[count - 1 :]
    return PreActivation(
        x, norms[0], inner, last, projection[0] if projection else None, settings.shortcut
    )


def _taken_apart(
    settings: _Settings, tensors: Sequence[Any]
) -> tuple[FirstStep, list[Step], Convolution, Convolution | None]:
    """(first, inner, last, projection) of `Saved`."""
    count, geometries = len(settings.norms), settings.geometries
    x, *rest = tensors
    affine, rest = rest[: 2 * count], rest[2 * count :]
    weights, (mean, invstd, *kept) = rest[: len(geometries)], rest[len(geometries) :]
    first, *others = settings.norms
    convolutions = [Convolution(*each) for each in zip(weights, geometries, strict=True)]
    inner = [
        Step(
            Plan(convolution.geometry, *norm),
            *(*kept[KEPT * i : KEPT * (i + 1)], convolution.weight, *affine[2 * i + 2 : 2 * i + 4]),
        )
        for i, (convolution, norm) in enumerate(zip(convolutions, others, strict=False))
    ]
    last, *projection = convolutions[count - 1 :]
    bn_weight, bn_bias = affine[:2]
    step = FirstStep(x, mean, invstd, bn_weight, bn_bias, first.training, first.eps, first.group)
    return step, inner, last, projection[0] if projection else None
