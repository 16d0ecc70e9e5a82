"""Every place in a model that this library can run, or that looks like it, with the verdict."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import fx, nn

from resnet_fused.conversion.effects import Effects, is_torch_conv_or_norm, is_torch_layer
from resnet_fused.conversion.groups import Group, find_groups, is_add
from resnet_fused.conversion.layers import hook_on, is_conv, is_lazy, is_norm
from resnet_fused.conversion.obstacles import Registrations, obstacle, why_not_layer
from resnet_fused.conversion.program import Program, make_program
from resnet_fused.conversion.proof import prove_block, prove_network
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.stand_ins import Attribute, NotProvenError, join
from resnet_fused.conversion.swap import is_stage, native_roles, parts_of, plan_of
from resnet_fused.conversion.trace_cache import TraceCache
from resnet_fused.conversion.tracing import Trace, Traces, trace, trace_once
from resnet_fused.nn.pairs import as_pair, is_plain_conv

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCK_NAMES = {"conv1", "bn1", "conv2", "bn2"}
_NETWORK_NAMES = {
    *("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"),
}
_QUANTIZATION = (
    torch.ao.nn.quantized.FloatFunctional,
    torch.ao.quantization.QuantStub,
    torch.ao.quantization.DeQuantStub,
    torch.ao.quantization.ObserverBase,
    torch.ao.quantization.FakeQuantizeBase,
)


class Finding(NamedTuple):
    """A candidate. recipe is None where it must be left alone, and then reason says why.

    recipe: how to run it fused: Roles for a whole block or network, a Program for groups of layers.
    With a Program, reason says why it is not more, "" if there is no more.
    attributes: what the proof depends on. fused: it runs fused as it stands, having been converted
    or being one of this library's own.
    """

    path: str
    module: nn.Module
    recipe: Roles | Program | None
    reason: str
    fused: bool
    attributes: tuple[Attribute, ...] = ()

    @property
    def roles(self) -> Roles | None:
        """The roles, where it is a whole block or network."""
        return self.recipe if isinstance(self.recipe, Roles) else None


def survey(model: nn.Module) -> list[Finding]:
    """The findings in `model`, in its order. Nothing is changed."""
    findings = _Survey(model).run()
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return sorted(findings, key=lambda finding: order[finding.path])


class _Survey:
    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._registrations = Registrations(model)
        blocks = {path for path, module in self._modules.items() if _looks_like_block(module)}
        # Something that contains blocks is no block, whatever its layers are called.
        blocks -= {path for path in blocks if any(_is_inside(other, path) for other in blocks)}
        self._candidates = blocks | {p for p, m in self._modules.items() if _looks_like_network(m)}
        self._verdicts: dict[str, Finding] = {}
        self._cache = TraceCache()
        self._findings: list[Finding] = []

    def run(self) -> list[Finding]:
        for path in reversed(self._modules):
            self._judge(path)
        self._visit("")
        return self._findings

    def _judge(self, path: str) -> None:
        """Note the verdict on the module as a whole block or network, if there is one."""
        module = self._modules[path]
        plan, native = plan_of(module), native_roles(module)
        if plan is not None:
            if not is_stage(module):  # of a stage, what is in it counts
                self._judge_fused(path, plan.recipe, plan.proof.attributes)
        elif native is not None:
            self._judge_fused(path, native, ())
        else:
            try:
                self._judge_unfused(path)
            except NotProvenError as error:
                if path in self._candidates:
                    self._verdicts[path] = Finding(path, module, None, str(error), fused=False)

    def _judge_fused(
        self, path: str, recipe: Roles | Program, attributes: tuple[Attribute, ...]
    ) -> None:
        module, rest = self._modules[path], None
        if isinstance(recipe, Roles):
            rest = obstacle(module, recipe, self._registrations, path)
            if rest is not None:
                self._verdicts[path] = Finding(path, module, None, rest, fused=False)
                return
        rest = recipe.rest if isinstance(recipe, Program) else ""
        self._verdicts[path] = Finding(path, module, recipe, rest, True, attributes)

    def _judge_unfused(self, path: str) -> None:
        """Raise NotProvenError where a candidate has to be left alone."""
        module = self._modules[path]
        if isinstance(module, torch.jit.ScriptModule):
            raise NotProvenError("it is a TorchScript module")
        if type(module) is nn.Module or isinstance(module, fx.GraphModule):
            raise NotProvenError(
                "a torch.fx graph calls its layers (fuse the model before tracing)"
            )
        if "forward" in vars(module):
            raise NotProvenError("the instance has its own forward")
        if not self._is_worth_tracing(path):
            return
        try:
            found = self._trace_of(path).single
            if path not in self._candidates and not any(map(is_add, found.graph.nodes)):
                return
            roles, attributes = self._prove(path, found)
        except NotProvenError as error:
            raise NotProvenError(f"its forward is not a known one: {error}") from error
        reason = obstacle(module, roles, self._registrations, path)
        if reason is not None:
            raise NotProvenError(reason)
        self._verdicts[path] = Finding(path, module, roles, "", False, attributes)

    def _prove(self, path: str, found: Trace) -> tuple[Roles, tuple[Attribute, ...]]:
        if _looks_like_network(self._modules[path]):
            return prove_network(found), found.attributes
        may_write = functools.partial(self._may_write, path)
        failure, roles = None, None
        try:
            roles = prove_block(found, may_write)
            if roles.shortcut is None or _is_part(self._modules[path], roles):
                return roles, found.attributes
        except NotProvenError as error:
            failure = error
        # Layers may stand in modules of the block: their forwards are part of its own then.
        try:
            inside = self._open(path, self._inlinable(path)).single
            return prove_block(inside, may_write), inside.attributes
        except NotProvenError:
            if roles is None:
                raise failure or NotProvenError("") from None
            return roles, found.attributes

    def _visit(self, path: str) -> None:
        """Find what can be fused in the module at `path` and below."""
        module, verdict = self._modules.get(path), self._verdicts.get(path)
        if module is None:  # registered in two places: visited at the other
            return
        if any(isinstance(child, _QUANTIZATION) for child in module.children()):
            self._leave_alone(path, "it is made for quantization")
            return
        if verdict is not None and (verdict.recipe is not None or verdict.fused):
            self._findings.append(verdict)
            self._visit_rest(path, verdict.recipe)
            return
        made = self._program(path)
        if made is not None:
            program, attributes = made
            finding = Finding(path, module, program, program.rest, False, attributes)
            self._findings.append(finding)
            self._visit_rest(path, program)
            return
        if verdict is not None:
            self._findings.append(verdict)
        if isinstance(module, torch.jit.ScriptModule):
            return
        for name, _ in module.named_children():
            self._visit(join(path, name))

    def _visit_rest(self, path: str, recipe: Roles | Program | None) -> None:
        """Visit the modules that a recipe calls as they are."""
        module = self._modules[path]
        if isinstance(recipe, Roles) and recipe.pattern != "ResNet":
            if recipe.shortcut is not None and not _is_part(module, recipe):
                self._visit(join(path, recipe.shortcut))
            return
        opened = {"", *(recipe.bypassed if recipe is not None else ())}
        for inner in opened:
            for name, _ in module.get_submodule(inner).named_children():
                child = join(inner, name)
                if child not in opened:
                    self._visit(join(path, child))

    def _leave_alone(self, path: str, reason: str) -> None:
        for other in self._candidates:
            if other == path or _is_inside(other, path):
                module = self._modules[other]
                self._findings.append(Finding(other, module, None, reason, fused=False))

    def _program(self, path: str) -> tuple[Program, tuple[Attribute, ...]] | None:
        """The forward of the module with the groups of layers fused that no module below has."""
        module = self._modules[path]
        if not self._is_worth_tracing(path):
            return None
        if any(map(is_lazy, module.modules())):
            return None
        try:
            everything = self._inlinable(path)
            inside = [path, *(join(path, inner) for inner in everything)]
            are_same = all(self._trace_of(each).are_same for each in inside)
            inlined: set[str] = set()
            for training in (module.training,) if are_same else (False, True):
                found = self._open_once(path, everything, training)
                inlined |= _needed(self._groups(path, found))
            if not inlined:
                return None
            traces = self._open(path, frozenset(inlined) - {""})
        except NotProvenError:
            return None
        verdict = self._verdicts.get(path)
        rest = "" if verdict is None else verdict.reason
        return self._written(path, traces, rest)

    def _written(
        self, path: str, traces: Traces, rest: str
    ) -> tuple[Program, tuple[Attribute, ...]] | None:
        found = [traces.evaluation] if traces.are_same else [traces.evaluation, traces.training]
        groups = [self._groups(path, each) for each in found]
        if not any(groups):
            return None
        program, *others = map(make_program, found, groups, (rest, rest))
        for other in others:
            program = program.with_training(other)
        return program, traces.evaluation.attributes

    def _groups(self, path: str, found: Trace) -> list[Group]:
        def may_fuse(inner: str) -> bool:
            module, place = found.module.get_submodule(inner), join(path, inner)
            return why_not_layer(module, self._registrations, place) is None

        return find_groups(found, may_fuse, functools.partial(self._may_write, path))

    def _trace_of(self, path: str) -> Traces:
        """The trace of one module in which every child is a node. Raises NotProvenError."""
        return self._traced(path, frozenset())

    def _open(self, path: str, inlined: frozenset[str]) -> Traces:
        """The traces with the modules at `inlined` taken apart, but those that prevent it."""
        return _without_obstacles(functools.partial(self._traced, path), inlined)

    def _open_once(self, path: str, inlined: frozenset[str], training: bool) -> Trace:
        """The same in one mode."""
        module = self._modules[path]

        def once(inlined: frozenset[str]) -> Trace:
            make = functools.partial(trace_once, module, inlined, training)
            return self._cache.get((inlined, training), module, make)

        return _without_obstacles(once, inlined)

    def _traced(self, path: str, inlined: frozenset[str]) -> Traces:
        module = self._modules[path]
        return self._cache.get(inlined, module, lambda: trace(module, inlined))

    def _inlinable(self, path: str) -> frozenset[str]:
        """Paths, inside the module at `path`, of the modules that can be taken apart."""
        found: set[str] = set()
        stack = [(name, child) for name, child in self._modules[path].named_children()]
        while stack:
            inner, module = stack.pop()
            if self._can_inline(join(path, inner), module):
                found.add(inner)
                stack += [(f"{inner}.{name}", child) for name, child in module.named_children()]
            elif type(module) in _CONTAINERS and type(module) is not nn.Sequential:
                # Lists of modules are not called: what is in them is.
                stack += [(f"{inner}.{name}", child) for name, child in module.named_children()]
        return frozenset(found)

    def _can_inline(self, path: str, module: nn.Module) -> bool:
        verdict = self._verdicts.get(path)
        if verdict is not None and verdict.recipe is not None:
            return False
        if path not in self._modules or hook_on(module) is not None:
            return False
        if not self._is_worth_tracing(path):
            return False
        try:
            self._trace_of(path)
        except NotProvenError:
            return False
        return True

    def _is_worth_tracing(self, path: str) -> bool:
        module = self._modules[path]
        if isinstance(module, torch.jit.ScriptModule | nn.ModuleList | nn.ModuleDict):
            return False
        if "forward" in vars(module):  # it may be bound to the module itself, not to a stand-in
            return False
        if is_torch_layer(module) or is_conv(module) or is_norm(module):
            return False
        if type(module).__module__.startswith("torch.") and type(module) is not nn.Sequential:
            return False
        return plan_of(module) is None and self._has_layers(path)

    def _has_layers(self, path: str) -> bool:
        """Whether there is anything in the module that this library has kernels for."""
        return any(is_conv(m) or is_norm(m) for m in self._modules[path].modules())

    def _may_write(self, path: str, inner: str) -> bool:
        """Whether the module at `inner`, inside that at `path`, may change its input in place."""
        place = join(path, inner)
        module = self._modules.get(place)
        if module is None:
            return True
        if is_torch_layer(module) or is_torch_conv_or_norm(module):
            return bool(getattr(module, "inplace", False))
        if isinstance(module, torch.jit.ScriptModule):
            return True
        plan = plan_of(module)
        if (plan is not None and isinstance(plan.recipe, Roles)) or native_roles(module):
            return False
        may_write = functools.partial(self._may_write, place)
        for training in (True, False):
            try:
                inside = self._open_once(place, self._all_inside(place), training)
            except NotProvenError:
                return True
            if Effects(inside.graph, inside.module, may_write).writes_to_input():
                return True
        return False

    def _all_inside(self, path: str) -> frozenset[str]:
        module = self._modules[path]
        return frozenset(
            name
            for name, inner in module.named_modules()
            if name
            and hook_on(inner) is None
            and "forward" not in vars(inner)
            and not (is_torch_layer(inner) or is_torch_conv_or_norm(inner))
        )


Found = TypeVar("Found")


def _without_obstacles(traced: Callable[[frozenset[str]], Found], inlined: frozenset[str]) -> Found:
    """traced(inlined), without the modules that prevent it."""
    while True:
        try:
            return traced(inlined)
        except NotProvenError as error:
            if error.path not in inlined:
                raise
            blamed = error.path
            inlined = frozenset(p for p in inlined if p != blamed and not _is_inside(p, blamed))


def _needed(groups: list[Group]) -> frozenset[str]:
    """The modules that must be taken apart for the groups that reach over their borders.

    Empty where no group starts in one module and ends in another, or in the outermost one, "".
    """
    opened: set[str] = set()
    owned: set[int] = set()
    changed = True
    while changed:
        changed = False
        for i, group in enumerate(groups):
            scopes = {str(node.meta["scope"]) for node in group.nodes}
            if i in owned or _common(scopes) not in opened | {""}:
                continue
            owned.add(i)
            for scope in scopes:
                opened |= {scope} | {*_above(scope)}
            changed = True
    return frozenset(opened | {""}) if owned else frozenset()


def _common(paths: set[str]) -> str:
    """The innermost module around all of these."""
    split = [path.split(".") if path else [] for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _above(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:i]) for i in range(1, len(names))]


def _is_part(module: nn.Module, roles: Roles) -> bool:
    """Whether the shortcut is computed with the block, and not called."""
    _, shortcut = parts_of(module, roles)
    if roles.is_preactivation:
        return isinstance(shortcut, nn.Module) and is_plain_conv(shortcut)
    return as_pair(shortcut) is not None


def _looks_like_block(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    children = dict(module.named_children())
    if children.keys() >= _BLOCK_NAMES:
        return True
    return all(sum(map(kind, children.values())) >= 2 for kind in (is_conv, is_norm))


def _looks_like_network(module: nn.Module) -> bool:
    return dict(module.named_children()).keys() >= _NETWORK_NAMES


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
