"""Groups of layers in a traced graph that one fused operator computes."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import fx, nn
from torch.nn import functional as F

from resnet_fused.conversion.effects import Effects, is_in_place_add
from resnet_fused.conversion.layers import is_conv, is_norm, norm_includes_relu
from resnet_fused.conversion.tracing import Trace
from resnet_fused.nn.graph_steps import Sum

ADD: set[object] = {operator.add, torch.add, "add", operator.iadd, "add_"}
RELU: set[object] = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}


class Group(NamedTuple):
    """Nodes that become one: in data-flow order, conv, norm, add, relu, pool as far as there.

    nodes: all of them, and identities between. The last one's value is the group's. conv, norm,
    pool: paths of modules, or what else names a layer, or None. x, residual: nodes that it reads.
    how: in which way the residual is added. relu: whether there is one, be it in the batch norm;
    relu_follows: whether it is a node.
    """

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    conv: str | None
    norm: str | None
    residual: fx.Node | None
    how: Sum
    relu: bool
    pool: str | None
    relu_follows: bool = False

    @property
    def text(self) -> str:
        """Its layers, as `explain` names them."""
        parts = {
            "conv": self.conv,
            "BN": self.norm,
            "add": self.residual,
            "ReLU": self.relu or None,
            "max pool": self.pool,
        }
        return "+".join(name for name, part in parts.items() if part is not None)


class Layers(Protocol):
    """What the nodes of a graph are, each as one layer with one tensor as its first argument."""

    def conv(self, node: fx.Node) -> str | None:
        """The name of the convolution that may be fused, None if it is none; so below."""

    def norm(self, node: fx.Node) -> str | None: ...

    def pool(self, node: fx.Node) -> str | None: ...

    def is_relu(self, node: fx.Node) -> bool: ...

    def is_identity(self, node: fx.Node) -> bool: ...

    def includes_relu(self, norm: str) -> bool: ...

    def accepts(self, group: Group) -> bool:
        """Whether there is a fused operator for the group, as far as one can tell by now."""


def find_groups(
    trace: Trace, may_fuse: Callable[[str], bool], may_write: Callable[[str], bool]
) -> list[Group]:
    """The groups of a graph of modules, in its order; no node is in two of them.

    may_fuse, may_write: whether the module at a path may be left uncalled, may change its input.
    """
    effects = Effects(trace.graph, trace.module, may_write)
    return find_groups_of(_ModuleLayers(trace, may_fuse), trace.graph, effects)


def find_groups_of(layers: Layers, graph: fx.Graph, effects: Effects) -> list[Group]:
    """The groups of a graph, in its order; no node is in two of them."""
    return list(_Finder(layers, graph, effects).groups())


class _Finder:
    def __init__(self, layers: Layers, graph: fx.Graph, effects: Effects) -> None:
        self._layers, self._effects = layers, effects
        self._nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._taken: set[fx.Node] = set()

    def groups(self) -> Iterator[Group]:
        for start in self._nodes:
            if start in self._taken:
                continue
            for group in self._candidates(start):
                if not self._is_disturbed(group) and self._layers.accepts(group):
                    self._taken.update(group.nodes)
                    yield group
                    break

    def _candidates(self, start: fx.Node) -> Iterator[Group]:
        """What could start at `start`, best first."""
        conv, norm = self._layers.conv(start), self._layers.norm(start)
        if conv is not None:
            after, skipped = self._next(start)
            norm = None if after is None else self._layers.norm(after)
            if after is not None and norm is not None:
                yield from self._with_end((start, *skipped, after), conv, norm)
        elif norm is not None:
            yield from self._with_end((start,), None, norm)
        elif is_add(start):
            yield from self._with_end((start,), None, None)

    def _with_end(
        self, nodes: tuple[fx.Node, ...], conv: str | None, norm: str | None
    ) -> Iterator[Group]:
        """Groups of these nodes and of what follows on them, the longest first."""
        found = [self._group(nodes, conv, norm)]
        while True:
            longer = self._longer(found[-1])
            if longer is None:
                break
            found.append(longer)
        for group in reversed(found):
            if group.conv is not None or group.relu:
                yield group

    def _group(self, nodes: tuple[fx.Node, ...], conv: str | None, norm: str | None) -> Group:
        x, residual, how = nodes[0].args[0], None, "out + residual"
        if norm is None:
            x, residual = nodes[0].args[:2]
            how = _how(nodes[0], x)
        relu = norm is not None and self._layers.includes_relu(norm)
        return Group(nodes, x, conv, norm, residual, how, relu, None)  # type: ignore[arg-type]

    def _longer(self, group: Group) -> Group | None:
        """The group and the node behind it, where that belongs to it."""
        after, skipped = self._next(group.nodes[-1])
        if after is None:
            return None
        nodes = (*group.nodes, *skipped, after)
        value = nodes[-2]
        if is_add(after) and group.residual is None and not group.relu:
            first, second = after.args
            if first is second or (is_in_place_add(after) and first is not value):
                return None
            residual = second if first is value else first
            return group._replace(nodes=nodes, residual=residual, how=_how(after, value))  # type: ignore[arg-type]
        if self._layers.is_relu(after) and not group.relu:
            return group._replace(nodes=nodes, relu=True, relu_follows=True)
        pool = self._layers.pool(after)
        is_stem = group.conv is not None and group.relu and group.residual is None
        if pool is not None and is_stem and group.pool is None:
            return group._replace(nodes=nodes, pool=pool)
        return None

    def _next(self, node: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
        """The only reader of the value of `node`, and the identities that stand between."""
        skipped: tuple[fx.Node, ...] = ()
        while len(node.users) == 1:
            (node,) = node.users
            if node.op == "output" or node in self._taken:
                break
            if not self._layers.is_identity(node):
                return node, skipped
            skipped += (node,)
        return None, ()

    def _is_disturbed(self, group: Group) -> bool:
        """Whether it would read what another node has changed meanwhile, or hide a change.

        It reads its inputs, and writes to those that it changes, where its last node stands.
        """
        end = self._position[group.nodes[-1]]
        for node in group.nodes:
            between = self._nodes[self._position[node] + 1 : end]
            others = [other for other in between if other not in group.nodes]
            for value in node.all_input_nodes:
                if value in group.nodes:
                    continue
                is_changed = self._effects.writes(node, value)
                touches = self._effects.reads if is_changed else self._effects.writes
                if any(touches(other, value) for other in others):
                    return True
        if group.norm is None and group.how == "out += residual":
            return not self._effects.is_alone(group.x)
        return False


class _ModuleLayers:
    """Layers that are modules, called where they stand in `trace.module`."""

    def __init__(self, trace: Trace, may_fuse: Callable[[str], bool]) -> None:
        self._module, self._may_fuse = trace.module, may_fuse
        nodes = trace.graph.nodes
        self._calls = Counter(n.target for n in nodes if n.op == "call_module")
        self._read = {str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"}

    def conv(self, node: fx.Node) -> str | None:
        return self._path(node, is_conv)

    def norm(self, node: fx.Node) -> str | None:
        return self._path(node, is_norm)

    def pool(self, node: fx.Node) -> str | None:
        return self._path(node, lambda module: type(module) is nn.MaxPool2d)

    def is_relu(self, node: fx.Node) -> bool:
        return self._is_a(node, nn.ReLU) or is_relu_call(node)

    def is_identity(self, node: fx.Node) -> bool:
        return self._is_a(node, nn.Identity)

    def includes_relu(self, norm: str) -> bool:
        return norm_includes_relu(self._module.get_submodule(norm))

    def accepts(self, group: Group) -> bool:
        return True  # `graph_steps` decide at each call

    def _is_a(self, node: fx.Node, cls: type[nn.Module]) -> bool:
        return self._path(node, lambda module: type(module) is cls) is not None

    def _path(self, node: fx.Node, accept: Callable[[nn.Module], bool]) -> str | None:
        """The path of the module that `node` calls with one tensor, if it may be left uncalled."""
        if node.op != "call_module" or not is_unary(node):
            return None
        path = str(node.target)
        module = self._module.get_submodule(path)
        has_parameters = is_conv(module) or is_norm(module)
        # Somebody may read the statistics between their update and the end of the group.
        if has_parameters and (self._calls[path] > 1 or path in self._read):
            return None
        return path if accept(module) and self._may_fuse(path) else None


def is_add(node: fx.Node) -> bool:
    """Whether `node` adds two values, and does nothing else."""
    is_sum = node.op in ("call_function", "call_method") and node.target in ADD
    both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return is_sum and both and not node.kwargs


def is_relu_call(node: fx.Node) -> bool:
    """Whether `node` is a ReLU, called as a function or method."""
    is_call = node.op in ("call_function", "call_method")
    return is_call and node.target in RELU and is_unary(node, flag="inplace")


def _how(add: fx.Node, out: object) -> Sum:
    """How the addition `add` is written, of which one operand is `out`."""
    if is_in_place_add(add):
        return "out += residual"
    return "out + residual" if add.args[0] is out else "residual + out"


def is_unary(node: fx.Node, flag: str | None = None) -> bool:
    """Whether `node` has one argument, a tensor, and at most the flag besides."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if flag is not None:
        rest = [value for value in rest if not isinstance(value, bool)]
    only_flags = all(keyword == flag for keyword in node.kwargs)
    return bool(node.args) and isinstance(node.args[0], fx.Node) and not rest and only_flags
