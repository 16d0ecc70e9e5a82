"""Fused classes: made per original class, given to an instance and taken away by `__class__`."""

import functools
import types
from typing import Any, NamedTuple, SupportsIndex

from torch import Tensor, nn

from resnet_fused.conversion.roles import Roles
from resnet_fused.models import ResNet
from resnet_fused.models.stages import planned_forwards, run_blocks, stage_forwards
from resnet_fused.nn import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    TrainingMode,
    chains,
    inference_plan,
)
from resnet_fused.nn.blocks import residual_forward
from resnet_fused.nn.pairs import has_hooks


class Plan(NamedTuple):
    """What a fused class is made from, and is made from again when it is unpickled.

    children: name and class of every child at conversion. As long as they are the same, the proof
    that the roles stand for holds.
    """

    original: type[nn.Module]
    roles: Roles
    children: tuple[tuple[str, type], ...]


class Fused(nn.Module):
    """What fused classes have in common; the original class is their next base class."""

    plan: Plan

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # The class cannot be found by name: it is made again from the plan.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, tuple) and reduced[1] == (type(self),):
            return _rebuild, (self.plan,), *reduced[2:]
        return reduced

    def _is_as_proven(self) -> bool:
        """Whether the children are those at conversion, and nobody listens to the bypassed ones.

        A batch norm may have become one over several processes, or the other way round.
        """
        modules, plan = self._modules, type(self).plan
        return (
            len(modules) == len(plan.children)
            and all(_same_kind(type(modules.get(name)), cls) for name, cls in plan.children)
            and not any(has_hooks(getattr(self, name)) for name in plan.roles.bypassed)
        )


def _same_kind(cls: type, other: type) -> bool:
    return cls is other or {cls, other} == {nn.BatchNorm2d, nn.SyncBatchNorm}


class FusedBlock(Fused):
    """The forward of a converted residual block."""

    training_mode = TrainingMode.SPEED

    def forward(self, *args: object, **kwargs: object) -> object:
        # Proven is the call with one tensor; any other, and symbolic tracing, is the original's.
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            out = inference_plan.run((self,), args[0])
            if out is None and self._is_as_proven():
                out = self._forward_fused(args[0])
            if out is not None:
                return out
        return super().forward(*args, **kwargs)

    def _forward_fused(self, x: Tensor) -> Tensor | None:
        parts = parts_of(self, type(self).plan.roles)
        return residual_forward(x, *parts, owner=self, mode=self.training_mode)


def _parts(block: FusedBlock) -> chains.Parts | None:
    return parts_of(block, type(block).plan.roles) if block._is_as_proven() else None


planned_forwards.add(FusedBlock.forward)
chains.readers[FusedBlock.forward] = _parts


class FusedStage(Fused):
    """The forward of a Sequential of converted blocks."""

    def forward(self, *args: object, **kwargs: object) -> object:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            out = run_blocks(args[0], [*self._modules.values()])  # type: ignore[list-item]
            if out is not None:
                return out
        return super().forward(*args, **kwargs)


stage_forwards.add(FusedStage.forward)


class FusedNetwork(Fused):
    """The forward of a converted network: fused stem, channels_last inside."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and self._is_as_proven():
            return ResNet.forward(self, x)  # type: ignore[arg-type]
        return super().forward(x)


_OURS: dict[str, type[nn.Module]] = {
    "BasicBlock": BasicBlock,
    "Bottleneck": Bottleneck,
    "ResNet": ResNet,
    "PreActBasicBlock": PreActBasicBlock,
    "PreActBottleneck": PreActBottleneck,
}
_NOTHING = (type(None), nn.Identity)
_CONVOLUTIONS = {
    "BasicBlock": 2,
    "Bottleneck": 3,
    "ResNet": 1,
    "PreActBasicBlock": 2,
    "PreActBottleneck": 3,
}


def swap_in(module: nn.Module, roles: Roles) -> None:
    """Give the module the fused forward; its original class stays its base class."""
    children = tuple((name, type(child)) for name, child in module._modules.items())
    module.__class__ = _fused_class(Plan(type(module), roles, children))


def swap_in_stage(stage: nn.Module) -> None:
    """Give a Sequential of blocks, not an instance of a subclass, the forward of a fused stage."""
    nothing = Roles("Sequential", convs=(), norms=(), bypassed=(), shortcut=None)
    stage.__class__ = _fused_class(Plan(nn.Sequential, nothing, children=()))


def swap_out(module: nn.Module) -> None:
    """Give the module its original class back."""
    plan = plan_of(module)
    if plan is not None:
        if isinstance(vars(module).get("training_mode"), TrainingMode):
            del module.training_mode
        module.__class__ = plan.original


def plan_of(module: nn.Module) -> Plan | None:
    """How the module was fused; None if it was not."""
    return type(module).plan if isinstance(module, Fused) else None


def parts_of(block: nn.Module, roles: Roles) -> chains.Parts:
    """The layers that play these roles in a block, and its shortcut."""
    pairs = [
        (getattr(block, conv), getattr(block, norm))
        for conv, norm in zip(roles.convs, roles.norms, strict=True)
    ]
    return pairs, None if roles.shortcut is None else getattr(block, roles.shortcut)


def native_roles(module: nn.Module) -> Roles | None:
    """The roles in one of this library's own modules with this library's forward; else None."""
    for pattern, ours in _OURS.items():
        if isinstance(module, ours) and type(module).forward is ours.forward:
            numbers = range(1, _CONVOLUTIONS[pattern] + 1)
            convs, norms = tuple(f"conv{i}" for i in numbers), tuple(f"bn{i}" for i in numbers)
            downsample = getattr(module, "downsample", None)
            shortcut = None if type(downsample) in _NOTHING else "downsample"
            return Roles(pattern, convs, norms, ("relu",), shortcut)
    return None


@functools.cache
def _fused_class(plan: Plan) -> type[nn.Module]:
    original, pattern = plan.original, plan.roles.pattern
    ours = _OURS.get(pattern, original)
    mixin = {"Sequential": FusedStage, "ResNet": FusedNetwork}.get(pattern, FusedBlock)
    bases = (mixin, original) if issubclass(original, ours) else (mixin, original, ours)
    namespace = {"__doc__": original.__doc__, "__module__": __name__, "plan": plan}
    name = f"Fused{original.__name__}"
    return types.new_class(name, bases, exec_body=lambda body: body.update(namespace))


def _rebuild(plan: Plan) -> nn.Module:
    cls = _fused_class(plan)
    return cls.__new__(cls)
