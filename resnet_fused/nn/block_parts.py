"""A residual block as the autograd node of `block_function` takes it apart."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused.nn.normalization import BackwardArguments, normalise_backward
from resnet_fused.nn.synchronization import Group
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_apply

TENSORS = 5  # per branch: weight, bn.weight, bn.bias, bn.running_mean, bn.running_var
KEPT = 3  # per branch: the convolution's output, mean, invstd


class Geometry(NamedTuple):
    """How a convolution slides, in the order of `torch.conv2d`."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Convolution(NamedTuple):
    """A convolution without bias whose output is not kept."""

    weight: Tensor
    geometry: Geometry
    y: None = None


class Branch(NamedTuple):
    """A convolution without bias, and the batch normalisation of its output.

    group: the processes whose batches are normalised together, None for this one alone.
    """

    weight: Tensor
    bn: BatchNormArgs
    geometry: Geometry
    group: Group | None = None


class Plan(NamedTuple):
    """What a branch is besides tensors."""

    geometry: Geometry
    training: bool
    momentum: float
    eps: float
    group: Group | None


class Step(NamedTuple):
    """One branch as the backward finds it; y is the convolution's output, None if not kept."""

    plan: Plan
    y: Tensor | None
    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry


class Block(NamedTuple):
    """What a forward computes: relu(the branches in order on x + the projection of x or residual).

    residual: what is added as it is, None with a projection.
    """

    x: Tensor
    residual: Tensor | None
    main: list[Branch]
    projection: Branch | None


class Kept(NamedTuple):
    """What a forward returns: its result, and per branch KEPT tensors for the backward.

    mask: where the last ReLU passed, in bits, or empty.
    """

    out: Tensor
    mask: Tensor
    tensors: list[Tensor]


class Saved(NamedTuple):
    """What a backward starts from.

    out: the forward's result where its sign says where the last ReLU passed; else it is `mask`, or
    both are None and it is recomputed, with a projection. is_identity: the residual is x.
    needs_x, needs_weight: whether x, and whether each convolution's weight needs its gradient, the
    projection's last.
    """

    grad_out: Tensor
    out: Tensor | None
    mask: Tensor | None
    x: Tensor
    main: list[Step]
    projection: Step | None
    is_identity: bool
    needs_x: bool
    needs_weight: list[bool]

    @property
    def steps(self) -> list[Step]:
        """All branches, the projection last."""
        return self.main if self.projection is None else [*self.main, self.projection]


BranchGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """Gradients of x (through everything), of a residual other than x, and of each branch.

    A branch's are those of the convolution's weight and the batch norm's weight and bias, the
    projection's last. What is not needed may be None.
    """

    x: Tensor | None
    residual: Tensor | None
    branches: list[BranchGradients]


def as_in_forward(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For a backward: dtypes are those of the forward, whatever autocast is on around it."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def convolve(x: Tensor, layer: Branch | Step | Convolution) -> Tensor:
    """PyTorch's convolution."""
    return torch.conv2d(x, layer.weight, None, *layer.geometry)


def relu_output(step: Step) -> Tensor:
    """relu(bn(y)) once more."""
    y = cast(Tensor, step.y)
    return bn_relu_apply(y, step.bn_weight, step.bn_bias, step.mean, step.invstd)


def last_normalisation(saved: Saved) -> tuple[Tensor, ...]:
    """Backward of the block's end: ReLU, addition and the batch norms in front of it.

    Returns gradients as `bn_relu_backward` does. No convolution's output may be missing.
    """
    last, projection = saved.main[-1], saved.projection
    arguments = BackwardArguments(
        *(saved.grad_out, cast(Tensor, last.y), saved.out, saved.mask, last.bn_weight),
        *(last.bn_bias, last.mean, last.invstd, last.plan.training, True),
    )
    if projection is None:
        return normalise_backward(arguments, last.plan.group)
    arguments = arguments.with_residual_norm(
        *(cast(Tensor, projection.y), projection.bn_weight, projection.bn_bias),
        *(projection.mean, projection.invstd, projection.plan.training),
    )
    return normalise_backward(arguments, last.plan.group, projection.plan.group)
