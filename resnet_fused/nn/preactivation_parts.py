"""A pre-activation block as the autograd node of `preactivation_function` takes it apart."""

import enum
from typing import NamedTuple

from torch import Tensor

from resnet_fused.nn.block_parts import Branch, Convolution, Step
from resnet_fused.nn.normalization import BackwardArguments
from resnet_fused.nn.synchronization import Group
from resnet_fused.ops.bn_relu import BatchNormArgs


class Shortcut(enum.Enum):
    """What is added to the last convolution's output.

    IDENTITY: the block's input x. PROJECTION: a convolution of z = relu(bn(x)). OUTSIDE: nothing,
    and z is returned as well, so that anything can be made from it.
    """

    IDENTITY = enum.auto()
    PROJECTION = enum.auto()
    OUTSIDE = enum.auto()


class Norm(NamedTuple):
    """A batch norm. group: as in `Branch`."""

    bn: BatchNormArgs
    group: Group | None = None


class PreActivation(NamedTuple):
    """What a forward computes: last(relu of inner in order, on z = relu(first(x))) + shortcut.

    inner: a convolution and the batch norm behind it each. projection: with that shortcut only.
    """

    x: Tensor
    first: Norm
    inner: list[Branch]
    last: Convolution
    projection: Convolution | None
    shortcut: Shortcut


class Kept(NamedTuple):
    """What a forward returns.

    z: relu(first(x)) for a shortcut outside, else None. tensors: mean and invstd of the first batch
    norm, then of each inner branch the convolution's output, mean and invstd.
    """

    out: Tensor
    z: Tensor | None
    tensors: list[Tensor]


class FirstStep(NamedTuple):
    """The first batch norm as the backward finds it."""

    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float
    group: Group | None

    def backward_arguments(self, grad: Tensor, relu: bool = True) -> BackwardArguments:
        """For `grad`, the gradient behind the ReLU, or without it that in front of the ReLU."""
        return BackwardArguments(
            *(grad, self.x, None, None, self.weight, self.bias, self.mean, self.invstd),
            *(self.training,),
            relu=relu,
        )


class Saved(NamedTuple):
    """What a backward starts from.

    grad_z: of z, with a shortcut outside. needs_first: whether x (needs_x), weight or bias of the
    first batch norm need a gradient. needs_weight: whether each convolution's weight does, the
    projection's last.
    """

    grad_out: Tensor
    grad_z: Tensor | None
    first: FirstStep
    inner: list[Step]
    last: Convolution
    projection: Convolution | None
    shortcut: Shortcut
    needs_x: bool
    needs_first: bool
    needs_weight: list[bool]

    @property
    def convolutions(self) -> list[Step | Convolution]:
        """Those of the main branch in order."""
        return [*self.inner, self.last]


NormGradients = tuple[Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """Gradients of x, of weight and bias of each batch norm, the first one's first, and of each
    convolution's weight, the projection's last. What is not needed may be None.
    """

    x: Tensor | None
    norms: list[NormGradients]
    weights: list[Tensor | None]
