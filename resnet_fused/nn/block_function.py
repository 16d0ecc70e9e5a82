"""A residual block in training as one autograd node.

Kept for the backward: the block's input, the convolutions' outputs, the statistics and the block's
output (which the next block keeps as its input anyway) or the sign of its ReLU in bits. The ReLU
outputs inside the block, which eager keeps as well, are computed once more: by the convolutions
that read them, or in one pass each. `TrainingMode.MEMORY` does the same with the output of the last
convolution.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused.nn import block_differentiable, block_native, block_operators, block_plain
from resnet_fused.nn.block_parts import (
    KEPT,
    TENSORS,
    Block,
    Branch,
    Plan,
    Saved,
    Step,
    as_in_forward,
)
from resnet_fused.nn.training_mode import TrainingMode
from resnet_fused.ops.bn_relu import BatchNormArgs, keeps_output


class _Settings(NamedTuple):
    """What a block is besides tensors."""

    plans: list[Plan]
    has_projection: bool
    mode: TrainingMode


def residual_block(
    x: Tensor,
    branches: Sequence[Branch],
    projection: Branch | None = None,
    residual: Tensor | None = None,
    mode: TrainingMode = TrainingMode.SPEED,
) -> Tensor:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut), with every gradient.

    x: (N, C, H, W), out: (N, K, P, Q). branches: the block's convolutions in order. The shortcut is
    the projection of x, or else residual, (N, K, P, Q), or else x itself. x, residual and the
    convolution weights have one dtype. Running statistics are updated in place. mode: what is kept
    for the backward. Differentiable twice, unless statistics come from several processes.
    """
    every = [*branches] if projection is None else [*branches, projection]
    plans = [Plan(b.geometry, *b.bn[4:], b.group) for b in every]
    tensors = [t for branch in every for t in (branch.weight, *branch.bn[:4])]
    settings = _Settings(plans, projection is not None, mode)
    out: Tensor = _ResidualBlock.apply(settings, x, residual, *tensors)
    return out


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        plans, has_projection, mode = settings
        branches = _branches(plans, tensors)
        projection = branches.pop() if has_projection else None
        added = None if has_projection else x if residual is None else residual
        implementation = _implementation(x, plans)
        save_mask = not (has_projection or keeps_output(x))
        kept = implementation.forward(Block(x, added, branches, projection), save_mask)
        for_backward: list[Tensor | None] = [*kept.tensors]
        if mode is TrainingMode.MEMORY:
            first = KEPT * (len(branches) - 1)
            for_backward[first::KEPT] = [None] * (len(plans) - len(branches) + 1)
        parameters = [t for i, t in enumerate(tensors) if i % TENSORS < 3]
        ctx.save_for_backward(
            *(kept.out if keeps_output(x) else None, kept.mask if save_mask else None, x),
            *(*for_backward, *parameters),
        )
        # A shortcut that gives x back is a residual of its own, with a gradient of its own.
        ctx.is_identity = residual is None and not has_projection
        ctx.settings, ctx.implementation = settings, implementation
        return kept.out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        plans, has_projection, _ = ctx.settings
        needs_x, needs_residual, *needed = ctx.needs_input_grad[1:]
        out, mask, x, *rest = ctx.saved_tensors
        kept, parameters = rest[: KEPT * len(plans)], rest[KEPT * len(plans) :]
        main = [
            Step(plan, *kept[KEPT * i : KEPT * (i + 1)], *parameters[3 * i : 3 * i + 3])
            for i, plan in enumerate(plans)
        ]
        projection = main.pop() if has_projection else None
        needs_weight = needed[::TENSORS]
        saved = Saved(
            *(grad_out, out, mask, x, main, projection, ctx.is_identity, needs_x, needs_weight)
        )
        with as_in_forward(x):
            if torch.is_grad_enabled():
                needs = [needed[TENSORS * i + j] for i in range(len(plans)) for j in range(3)]
                grads = block_differentiable.backward(saved, needs)
            else:
                grads = _for_backward(ctx.implementation, grad_out).backward(saved)
        result = [None, grads.x if needs_x else None, grads.residual if needs_residual else None]
        for branch in grads.branches:
            result += (*branch, None, None)  # the running statistics have no gradient
        wanted = (False, needs_x, needs_residual, *needed)
        return tuple(g if want else None for g, want in zip(result, wanted, strict=True))


def _for_backward(implementation: ModuleType, grad_out: Tensor) -> ModuleType:
    """Vectorised Jacobians map the backward over gradients: that needs operators to map."""
    functorch = torch._C._functorch
    is_batched = functorch.is_legacy_batchedtensor(grad_out) or (
        functorch.is_functorch_wrapped_tensor(grad_out)
    )
    return block_plain if is_batched and implementation is block_native else implementation


def _implementation(x: Tensor, plans: Sequence[Plan]) -> ModuleType:
    """What runs the block on tensors like x: `forward` and `backward` of a module."""
    if block_native.runs(x, plans):
        return block_native
    return block_operators if block_operators.runs(x) else block_plain


def _branches(plans: Sequence[Plan], tensors: Sequence[Tensor | None]) -> list[Branch]:
    branches = []
    for i, plan in enumerate(plans):
        weight, bn_weight, bn_bias, mean, var = tensors[TENSORS * i : TENSORS * (i + 1)]
        bn = BatchNormArgs(bn_weight, bn_bias, mean, var, plan.training, plan.momentum, plan.eps)
        branches.append(Branch(cast(Tensor, weight), bn, plan.geometry, plan.group))
    return branches
