"""A forward in which groups of layers are one call each, as source over the original modules."""

import functools
import importlib
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from resnet_fused.conversion.groups import Group
from resnet_fused.conversion.tracing import Trace
from resnet_fused.nn import graph_steps


class Step(NamedTuple):
    """A group of layers that became one call.

    text: its parts, "conv+BN+add+ReLU". conv, norm, pool: paths of modules, None where the group
    has none. residual: whether a value is added.
    """

    text: str
    conv: str | None
    norm: str | None
    residual: bool
    relu: bool
    pool: str | None


class Program(NamedTuple):
    """The forward of a module with fused steps. It can be hashed and pickled.

    rest: why the module is not fused as a whole, "" if there is nothing to say.
    source: of `forward(self, x)`. names: what it refers to, by global name; modules as _Imported.
    steps: in order. bypassed: paths of modules that are no longer called, convolutions and batch
    norms apart, which each step looks at. inlined: paths of those whose forwards are part of it.
    training: what runs in training, where that is another forward; all that is inlined must be in
    the same mode then.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    steps: tuple[Step, ...]
    rest: str
    bypassed: tuple[str, ...]
    inlined: tuple[str, ...]
    training: "Program | None" = None

    def with_training(self, training: "Program") -> "Program":
        """The same in evaluation, and `training` in training."""
        bypassed = tuple(sorted({*self.bypassed, *training.bypassed}))
        return self._replace(bypassed=bypassed, training=training)


class _Imported(NamedTuple):
    name: str


def make_program(trace: Trace, groups: Sequence[Group], rest: str) -> Program:
    """The forward of a trace's module with `groups` fused."""
    bypassed = set(trace.inlined) - {""}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(trace.graph, copies))
    for group in groups:
        layers = (group.conv, group.norm)
        bypassed |= {str(n.target) for n in group.nodes if n.op == "call_module"} - {*layers}
        _replace(graph, group, copies)
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    used = set(re.findall(r"\w+", code.src))
    names = {name: value for name, value in code.globals.items() if name in used}
    return Program(
        code.src,
        tuple((name, _storable(value)) for name, value in sorted(names.items())),
        tuple(_step(group) for group in groups),
        rest,
        tuple(sorted(bypassed)),
        tuple(sorted(trace.inlined)),
    )


@functools.cache
def compiled(program: Program) -> Callable[[Any, Tensor], Any]:
    """The function `forward(self, x)` of a program."""
    names: dict[str, Any] = {
        name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in program.names
    }
    # Its own code, generated above from a graph; torch.fx runs graphs in the same way.
    exec(compile(program.source, "<resnet_fused program>", "exec"), names)  # noqa: S102
    forward: Callable[[Any, Tensor], Any] = names["forward"]
    return forward


def _step(group: Group) -> Step:
    residual = group.residual is not None
    return Step(group.text, group.conv, group.norm, residual, group.relu, group.pool)


def _replace(graph: fx.Graph, group: Group, copies: dict[fx.Node, fx.Node]) -> None:
    """Exchange the nodes of a group for one; copies: the nodes of `graph`, by those they are of."""
    residual = None if group.residual is None else copies[group.residual]
    last = copies[group.nodes[-1]]
    with graph.inserting_before(last):
        layers = [graph.get_attr(path) for path in (group.conv, group.norm) if path is not None]
        function, rest = _call(graph, group._replace(residual=residual))
        fused = graph.call_function(function, (copies[group.x], *layers, *rest))
    last.replace_all_uses_with(fused)
    for node in reversed(group.nodes):
        graph.erase_node(copies[node])
    copies[group.nodes[-1]] = fused


def _call(graph: fx.Graph, group: Group) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    if group.pool is not None:
        pool = graph.get_attr(group.pool)
        return graph_steps.conv_bn_relu_max_pool, (pool, group.relu_follows)
    if group.norm is None:
        return graph_steps.add_relu, (group.residual, group.how)
    function = graph_steps.bn_relu if group.conv is None else graph_steps.conv_bn_relu
    return function, (group.residual, group.relu_follows, group.how)


def _storable(value: Any) -> Any:
    return _Imported(value.__name__) if isinstance(value, types.ModuleType) else value
