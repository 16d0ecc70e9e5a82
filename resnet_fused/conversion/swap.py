"""Fused classes: made per original class, given to an instance and taken away by `__class__`."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from resnet_fused.conversion.program import Program, compiled
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.stand_ins import Attribute, original_class
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
from resnet_fused.nn.pairs import Projection, computed_dtype, has_hooks, refuse_script
from resnet_fused.nn.preactivation_blocks import preactivation_forward


class Proof(NamedTuple):
    """What must be as it was at conversion, for a recipe to hold.

    children: by path of the module itself (""), and of each module whose children are called in its
    place or were looked up: the name and class of every child. silent: paths of modules that are
    not called any more. attributes: plain ones that the forwards read.
    """

    children: tuple[tuple[str, tuple[tuple[str, type], ...]], ...]
    silent: tuple[str, ...]
    attributes: tuple[Attribute, ...]


class Plan(NamedTuple):
    """What a fused class is made from, and is made from again when it is unpickled."""

    original: type[nn.Module]
    recipe: Roles | Program
    proof: Proof


class Fused(nn.Module):
    """What fused classes have in common; the original class is their next base class."""

    __prepare_scriptable__ = refuse_script
    _resnet_fused_plan: Plan
    _resnet_fused_original: type[nn.Module]

    def __init_subclass__(cls, **_: object) -> None:
        """Not that of the original class: nobody has derived from it."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # The class cannot be found by name: it is made again from the plan.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, tuple) and reduced[1] == (type(self),):
            return _rebuild, (self._resnet_fused_plan,), *reduced[2:]
        return reduced

    def _is_as_proven(self) -> bool:
        """Whether everything is as at conversion, and nobody listens to what is not called."""
        proof = type(self)._resnet_fused_plan.proof
        try:
            return (
                all(_has_children(_at(self, path), named) for path, named in proof.children)
                and not any(has_hooks(_at(self, path)) for path in proof.silent)
                and self._has_proven_attributes()
            )
        except (KeyError, AttributeError):  # a module has been taken away
            return False

    def _has_proven_attributes(self) -> bool:
        """Whether the attributes that the original forward reads are as at conversion."""
        attributes = type(self)._resnet_fused_plan.proof.attributes
        return all(a.holds(_at(self, a.path)) for a in attributes)


def _at(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _has_children(module: nn.Module, named: tuple[tuple[str, type], ...]) -> bool:
    modules = module._modules
    return len(modules) == len(named) and all(
        _same_kind(original_class(modules.get(name)), cls) for name, cls in named
    )


def _same_kind(cls: type, other: type) -> bool:
    # A batch norm may have become one over several processes, or the other way round.
    return cls is other or {cls, other} == {nn.BatchNorm2d, nn.SyncBatchNorm}


class FusedBlock(Fused):
    """The forward of a converted residual block."""

    training_mode = TrainingMode.SPEED

    def forward(self, *args: object, **kwargs: object) -> object:
        # Proven is the call with one tensor; any other, and symbolic tracing, is the original's.
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            out = self._forward_fused(args[0]) if self._keeps_dtype(args[0]) else None
            if out is not None:
                return out
        return super().forward(*args, **kwargs)

    def _keeps_dtype(self, x: Tensor) -> bool:
        """Whether the sum is in the dtype of the convolutions, as the fused one is."""
        return roles_of(self).in_place or computed_dtype(x) == x.dtype

    def _forward_fused(self, x: Tensor) -> Tensor | None:
        out = inference_plan.run((self,), x)
        if out is not None or not self._is_as_proven():
            return out
        roles = roles_of(self)
        pairs, shortcut = parts_of(self, roles)
        if roles.is_preactivation:
            units = [(bn, conv) for conv, bn in pairs]
            return preactivation_forward(x, units, cast(nn.Module | None, shortcut))
        return residual_forward(x, pairs, shortcut, owner=self, mode=self.training_mode)


def _parts(block: FusedBlock) -> chains.Parts | None:
    if roles_of(block).is_preactivation or not block._is_as_proven():
        return None
    return parts_of(block, roles_of(block))


class FusedStage(Fused):
    """The forward of a Sequential of converted blocks."""

    def forward(self, *args: object, **kwargs: object) -> object:
        # Some blocks compute in the dtype of their input, which only the first of them can see.
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and computed_dtype(x) == x.dtype:
            out = run_blocks(x, [*self._modules.values()])  # type: ignore[list-item]
            if out is not None:
                return out
        return super().forward(*args, **kwargs)


class FusedNetwork(Fused):
    """The forward of a converted network: fused stem, channels_last inside."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and self._is_as_proven():
            return ResNet.forward(self, x)  # type: ignore[arg-type]
        return super().forward(x)


class FusedGraph(Fused):
    """A forward in which groups of layers are fused."""

    _resnet_fused_programs: tuple[Callable[[Any, Tensor], Any], ...]  # evaluation, training

    def forward(self, *args: object, **kwargs: object) -> object:
        # Modules that are left out cannot be traced, and no hook of all modules hears of them.
        is_plain = torch._C._get_tracing_state() is None and not torch_module._has_any_global_hook()
        is_proven = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if is_proven and is_plain and self._is_as_proven() and self._is_in_one_mode():
            return self._resnet_fused_programs[self.training](self, cast(Tensor, args[0]))
        return super().forward(*args, **kwargs)

    def _is_in_one_mode(self) -> bool:
        """Whether the mode of this module is that of all whose forwards are part of its own."""
        recipe = cast(Program, self._resnet_fused_plan.recipe)
        return recipe.training is None or all(
            _at(self, path).training == self.training for path in recipe.inlined
        )


_OURS: dict[str, type[nn.Module]] = {
    "BasicBlock": BasicBlock,
    "Bottleneck": Bottleneck,
    "ResNet": ResNet,
    "PreActBasicBlock": PreActBasicBlock,
    "PreActBottleneck": PreActBottleneck,
}
_MIXINS: dict[str, type[Fused]] = {
    "Sequential": FusedStage,
    "ResNet": FusedNetwork,
    "Graph": FusedGraph,
}
_NOTHING = (type(None), nn.Identity)
_CONVOLUTIONS = {
    "BasicBlock": 2,
    "Bottleneck": 3,
    "ResNet": 1,
    "PreActBasicBlock": 2,
    "PreActBottleneck": 3,
}


def swap_in(module: nn.Module, recipe: Roles | Program, attributes: Sequence[Attribute]) -> None:
    """Give the module the fused forward; its original class stays its base class.

    attributes: what the forwards behind the recipe were seen to read.
    """
    # A batch norm may have its activation in it.
    layers = recipe.layers if isinstance(recipe, Roles) else ()
    opened = {"", *(path for path in (*recipe.bypassed, *layers) if _at(module, path)._modules)}
    opened |= {attribute.path for attribute in attributes if attribute.name == "_modules"}
    children = [(path, _children_of(_at(module, path))) for path in sorted(opened)]
    plain = tuple(attribute for attribute in attributes if attribute.name != "_modules")
    proof = Proof(tuple(children), recipe.bypassed, plain)
    module.__class__ = _fused_class(Plan(type(module), recipe, proof))


def _children_of(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, original_class(child)) for name, child in module._modules.items())


def swap_in_stage(stage: nn.Module) -> None:
    """Give a Sequential of blocks, not an instance of a subclass, the forward of a fused stage."""
    nothing = Roles("Sequential", convs=(), norms=(), bypassed=(), shortcut=None)
    stage.__class__ = _fused_class(Plan(nn.Sequential, nothing, Proof((), (), ())))


def is_stage(module: nn.Module) -> bool:
    """Whether it is a Sequential of converted blocks."""
    return isinstance(module, FusedStage)


def swap_out(module: nn.Module) -> None:
    """Give the module its original class back."""
    plan = plan_of(module)
    if plan is not None:
        if isinstance(vars(module).get("training_mode"), TrainingMode):
            del module.training_mode
        module.__class__ = plan.original


def plan_of(module: nn.Module) -> Plan | None:
    """How the module was fused; None if it was not."""
    return type(module)._resnet_fused_plan if isinstance(module, Fused) else None


def roles_of(block: nn.Module) -> Roles:
    """The roles in a block that was converted by them."""
    return cast(Roles, type(block)._resnet_fused_plan.recipe)  # type: ignore[attr-defined]


def parts_of(block: nn.Module, roles: Roles) -> chains.Parts:
    """The layers that play these roles in a block, and its shortcut."""
    pairs = [
        (_at(block, conv), _at(block, norm))
        for conv, norm in zip(roles.convs, roles.norms, strict=True)
    ]
    if roles.projection is not None:
        conv, norm = roles.projection
        return pairs, Projection(_at(block, conv), _at(block, norm))
    return pairs, None if roles.shortcut is None else _at(block, roles.shortcut)


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
    original, recipe = plan.original, plan.recipe
    namespace: dict[str, Any] = {"__doc__": original.__doc__, "__module__": __name__}
    namespace |= {"_resnet_fused_plan": plan, "_resnet_fused_original": original}
    if isinstance(recipe, Program):
        programs = (recipe, recipe if recipe.training is None else recipe.training)
        namespace["_resnet_fused_programs"] = tuple(map(compiled, programs))
        pattern = "Graph"
    else:
        pattern = recipe.pattern
    ours = _OURS.get(pattern, original)
    mixin = _MIXINS.get(pattern, FusedBlock)
    bases = (mixin, original) if issubclass(original, ours) else (mixin, original, ours)
    name = f"Fused{original.__name__}"
    namespace["forward"] = _announced(_with_signature_of(original.forward, mixin), mixin)
    return types.new_class(name, bases, exec_body=lambda body: body.update(namespace))


def _with_signature_of(
    original: Callable[..., object], mixin: type[Fused]
) -> Callable[..., object]:
    """The forward of `mixin`; those who ask for its arguments see those of the original."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        return mixin.forward(self, *args, **kwargs)

    return forward


def _announced(forward: Callable[..., object], mixin: type[Fused]) -> Callable[..., object]:
    """The same forward, known to those who run several blocks at once."""
    if mixin is FusedBlock:
        planned_forwards.add(forward)
        inference_plan.conditions[forward] = FusedBlock._has_proven_attributes  # type: ignore[assignment]
        chains.readers[forward] = _parts
    elif mixin is FusedStage:
        stage_forwards.add(forward)
    return forward


def _rebuild(plan: Plan) -> nn.Module:
    cls = _fused_class(plan)
    return cls.__new__(cls)
