"""Groups of layers in a traced graph that one fused operator computes."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from resnet_fused.conversion.effects import Effects, is_in_place_add
from resnet_fused.conversion.layers import is_conv, is_norm, norm_includes_relu
from resnet_fused.conversion.tracing import Trace

ADD: set[object] = {operator.add, torch.add, "add", operator.iadd, "add_"}
RELU: set[object] = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}


class Group(NamedTuple):
    """Nodes that become one: in data-flow order, conv, norm, add, relu, pool as far as there.

    nodes: all of them, and identities between. The last one's value is the group's. conv, norm,
    pool: paths of modules, or None. x, residual: nodes that it reads.
    """

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    conv: str | None
    norm: str | None
    residual: fx.Node | None
    in_place: bool
    relu: bool
    pool: str | None

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


def find_groups(
    trace: Trace, may_fuse: Callable[[str], bool], may_write: Callable[[str], bool]
) -> list[Group]:
    """The groups of a graph, in its order; no node is in two of them.

    may_fuse, may_write: whether the module at a path may be left uncalled, may change its input.
    """
    return list(_Finder(trace, may_fuse, may_write).groups())


class _Finder:
    def __init__(
        self, trace: Trace, may_fuse: Callable[[str], bool], may_write: Callable[[str], bool]
    ) -> None:
        self._nodes = list(trace.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._effects = Effects(trace.graph, trace.module, may_write)
        self._module = trace.module
        self._calls = Counter(n.target for n in self._nodes if n.op == "call_module")
        self._read = {str(n.target).rpartition(".")[0] for n in self._nodes if n.op == "get_attr"}
        self._may_fuse = may_fuse
        self._taken: set[fx.Node] = set()

    def groups(self) -> Iterator[Group]:
        for start in self._nodes:
            if start in self._taken:
                continue
            for group in self._candidates(start):
                if not self._is_disturbed(group):
                    self._taken.update(group.nodes)
                    yield group
                    break

    def _candidates(self, start: fx.Node) -> Iterator[Group]:
        """What could start at `start`, best first."""
        conv = self._path(start, is_conv)
        if conv is not None:
            after, skipped = self._next(start)
            norm = after is not None and self._path(after, is_norm)
            if norm:
                yield from self._with_end((start, *skipped, after), conv, norm)
        elif self._path(start, is_norm) is not None:
            yield from self._with_end((start,), None, self._path(start, is_norm))
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
        x, residual, in_place = nodes[0].args[0], None, False
        if norm is None:
            x, residual = nodes[0].args[:2]
            in_place = is_in_place_add(nodes[0])
        relu = norm is not None and norm_includes_relu(self._module.get_submodule(norm))
        return Group(nodes, x, conv, norm, residual, in_place, relu, None)  # type: ignore[arg-type]

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
            return group._replace(nodes=nodes, residual=residual, in_place=is_in_place_add(after))
        if self._is_relu(after) and not group.relu:
            return group._replace(nodes=nodes, relu=True)
        pool = self._path(after, lambda module: type(module) is nn.MaxPool2d)
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
            if self._path(node, lambda module: type(module) is nn.Identity) is None:
                return node, skipped
            skipped += (node,)
        return None, ()

    def _path(self, node: fx.Node, accept: Callable[[nn.Module], bool]) -> str | None:
        """The path of the module that `node` calls with one tensor, if it may be left uncalled."""
        if node.op != "call_module" or not is_unary(node) or node in self._taken:
            return None
        path = str(node.target)
        module = self._module.get_submodule(path)
        has_parameters = is_conv(module) or is_norm(module)
        # Somebody may read the statistics between their update and the end of the group.
        if has_parameters and (self._calls[path] > 1 or path in self._read):
            return None
        return path if accept(module) and self._may_fuse(path) else None

    def _is_relu(self, node: fx.Node) -> bool:
        if self._path(node, lambda module: type(module) is nn.ReLU) is not None:
            return True
        return node.op != "call_module" and node.target in RELU and is_unary(node, flag="inplace")

    def _is_disturbed(self, group: Group) -> bool:
        """Whether it would read what another node has changed meanwhile, or hide a change.

        It reads its inputs where its last node stands.
        """
        reads = {group.nodes[0]: group.x}
        if group.residual is not None:
            reads[next(n for n in group.nodes if is_add(n))] = group.residual
        end = self._position[group.nodes[-1]]
        for reader, value in reads.items():
            between = self._nodes[self._position[reader] + 1 : end]
            if any(self._effects.writes(n, value) for n in between if n not in group.nodes):
                return True
        if group.norm is None and group.in_place:
            return not self._effects.is_alone(group.x)
        return False


def is_add(node: fx.Node) -> bool:
    """Whether `node` adds two values, and does nothing else."""
    is_sum = node.op in ("call_function", "call_method") and node.target in ADD
    both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return is_sum and both and not node.kwargs


def is_unary(node: fx.Node, flag: str | None = None) -> bool:
    """Whether `node` has one argument, a tensor, and at most the flag besides."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if flag is not None:
        rest = [value for value in rest if not isinstance(value, bool)]
    only_flags = all(keyword == flag for keyword in node.kwargs)
    return bool(node.args) and isinstance(node.args[0], fx.Node) and not rest and only_flags
