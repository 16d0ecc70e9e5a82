"""Proof that a module's forward computes a known pattern, read off its traced data flow.

The graph must consist of exactly the nodes of the pattern. What contains anything else is not
proven.
"""

from collections.abc import Callable

import torch
from torch import fx, nn

from resnet_fused.conversion.effects import is_in_place_add
from resnet_fused.conversion.groups import RELU, is_add, is_unary
from resnet_fused.conversion.layers import is_conv, is_norm, norm_includes_relu
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.stand_ins import NotProvenError
from resnet_fused.conversion.tracing import Trace

_CLONE: set[object] = {torch.clone, "clone"}
_FLATTEN: set[object] = {torch.flatten, "flatten"}
_STAGES_BACKWARD = ("fc", "flatten", "avgpool", "layer4", "layer3", "layer2", "layer1", "maxpool")


def prove_block(trace: Trace, may_write: Callable[[str], bool]) -> Roles:
    """The roles of a residual block's layers, whatever they are called.

    may_write: whether the module at a path may change its input. Raises NotProvenError.
    """
    if _Graph(trace).adds_convolution():
        roles = _read_preactivation_block(trace)
    else:
        roles = _read_block(_Graph(trace))
    for name in roles.layers:
        if roles.layers.count(name) > 1:
            raise NotProvenError(f"it calls {name} more than once")
    if roles.shortcut is not None and may_write(roles.shortcut):
        raise NotProvenError(f"its shortcut {roles.shortcut} may change the input in place")
    return roles


def prove_network(trace: Trace) -> Roles:
    """The roles in a network of stem, pooling, four stages, pooling, classifier, as torchvision's.

    Raises NotProvenError.
    """
    graph = _Graph(trace)
    node = graph.result
    for name in _STAGES_BACKWARD:
        node = graph.take_flatten(node) if name == "flatten" else graph.take_named(node, name)
    node = graph.take_relu(node, "the stem's ReLU")
    norm, node = graph.take_module(node, is_norm, "batch norm")
    conv, node = graph.take_module(node, is_conv, "convolution")
    if (conv, norm) != ("conv1", "bn1") or graph.skip(node) is not graph.x:
        raise NotProvenError("its stem is not conv1, bn1 and ReLU on the input")
    graph.check_all_taken()
    return Roles("ResNet", (conv,), (norm,), graph.bypassed(), None)


def _read_block(graph: "_Graph") -> Roles:
    node = graph.take_relu(graph.result, "the last ReLU")
    in_place = is_in_place_add(graph.skip(node))
    main, shortcut, projection = graph.take_add(node)
    convs: list[str] = []
    norms: list[str] = []
    while True:
        name, node = graph.take_module(main, is_norm, "batch norm")
        norms.insert(0, name)
        name, node = graph.take_module(node, is_conv, "convolution")
        convs.insert(0, name)
        if graph.skip(node) is graph.x:
            break
        main = graph.take_relu(node, f"the ReLU before {name}")
    pattern = {2: "BasicBlock", 3: "Bottleneck"}.get(len(convs))
    if pattern is None:
        raise NotProvenError(f"it has {len(convs)} convolutions in a row, not 2 or 3")
    graph.check_all_taken()
    layers = tuple(convs), tuple(norms)
    return Roles(pattern, *layers, graph.bypassed(), shortcut, projection, in_place)


def _read_preactivation_block(trace: Trace) -> Roles:
    """Either branch may be the main one: both can begin with a convolution."""
    try:
        return _read_preactivation_branches(_Graph(trace), main_first=True)
    except NotProvenError as error:
        try:
            return _read_preactivation_branches(_Graph(trace), main_first=False)
        except NotProvenError:
            raise error from None


def _read_preactivation_branches(graph: "_Graph", main_first: bool) -> Roles:
    result = graph.skip(graph.result)
    main, other = graph.take_operands(result)[:: 1 if main_first else -1]
    in_place = is_in_place_add(result)
    if in_place and not main_first:
        raise NotProvenError("it adds in place into the shortcut, which may be the input")
    convs: list[str] = []
    norms: list[str] = []
    node = main
    while True:
        name, z = graph.take_module(node, is_conv, "convolution")
        convs.insert(0, name)
        z = graph.skip(z)
        if graph.calls(z, norm_includes_relu):
            name, node = graph.take_module(z, is_norm, "batch norm")
        else:
            node = graph.take_relu(z, f"the ReLU before {name}")
            name, node = graph.take_module(node, is_norm, "batch norm")
        norms.insert(0, name)
        node = graph.skip(node)
        if node is graph.x:
            break
    pattern = {2: "PreActBasicBlock", 3: "PreActBottleneck"}.get(len(convs))
    if pattern is None:
        raise NotProvenError(f"it has {len(convs)} convolutions in a row, not 2 or 3")
    shortcut = None
    if graph.skip(other) is not graph.x:
        shortcut, source = graph.take_module(other, lambda _: True, "shortcut")
        if graph.skip(source) is not z:
            raise NotProvenError(f"its shortcut {shortcut} does not start behind the first ReLU")
    graph.check_all_taken()
    layers = tuple(convs), tuple(norms)
    return Roles(pattern, *layers, graph.bypassed(), shortcut, None, in_place)


class _Graph:
    """A traced forward, taken apart from its result back to its input, node by node."""

    def __init__(self, trace: Trace) -> None:
        self._module = trace.module
        self._nodes = [n for n in trace.graph.nodes if n.op not in ("placeholder", "output")]
        self._taken: set[fx.Node] = set()
        self._bypassed: set[str] = set(trace.inlined) - {""}
        self.x = next(node for node in trace.graph.nodes if node.op == "placeholder")
        result = next(node for node in trace.graph.nodes if node.op == "output").args[0]
        if not isinstance(result, fx.Node):
            raise NotProvenError("it does not return one tensor")
        self.result = result

    def adds_convolution(self) -> bool:
        """Whether a sum is returned as it is, and one of the two comes from a convolution."""
        result = self.skip(self.result, take=False)
        operands = result.all_input_nodes if is_add(result) else ()
        return any(self.calls(self.skip(node, take=False), is_conv) for node in operands)

    def take_relu(self, node: fx.Node, which: str) -> fx.Node:
        """The input of the ReLU that makes `node`."""
        node = self.skip(node)
        if self.calls(node, lambda module: type(module) is nn.ReLU):
            self._bypassed.add(str(node.target))
        elif not (_calls(node, RELU) and is_unary(node, flag="inplace")):
            raise NotProvenError(f"expected {which}, found {self._describe(node)}")
        return self._take(node)

    def take_operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What is added to make `node`."""
        node = self.skip(node)
        if not is_add(node):
            raise NotProvenError(f"expected the residual add, found {self._describe(node)}")
        self._taken.add(node)
        first, second = node.args
        return first, second  # type: ignore[return-value]

    def take_add(self, node: fx.Node) -> tuple[fx.Node, str | None, tuple[str, str] | None]:
        """(main branch, module on the shortcut, projection) of the addition that makes `node`."""
        node = self.skip(node)
        operands = self.take_operands(node)
        shortcuts = [operand for operand in operands if self._is_shortcut(operand)]
        if len(shortcuts) != 1:
            found = " and ".join(self._describe(self.skip(operand)) for operand in operands)
            raise NotProvenError(
                f"expected the add of a batch norm and a shortcut, found that of {found}"
            )
        shortcut = shortcuts[0]
        main = operands[1] if operands[0] is shortcut else operands[0]
        if is_in_place_add(node) and main is not operands[0]:
            raise NotProvenError("it adds in place into the shortcut, which may be the input")
        return main, *self._take_shortcut(shortcut)

    def take_module(
        self, node: fx.Node, accept: Callable[[nn.Module], bool], what: str
    ) -> tuple[str, fx.Node]:
        """(path, input) of the module call that makes `node`."""
        node = self.skip(node)
        if not self.calls(node, accept):
            raise NotProvenError(f"expected a {what}, found {self._describe(node)}")
        return str(node.target), self._take(node)

    def take_named(self, node: fx.Node, name: str) -> fx.Node:
        """The input of the call of the child `name` that makes `node`."""
        if not self.calls(node, lambda _: True) or node.target != name:
            raise NotProvenError(f"expected {name}, found {self._describe(node)}")
        return self._take(node)

    def take_flatten(self, node: fx.Node) -> fx.Node:
        """The input of the flatten(x, 1) that makes `node`."""
        arguments = (node.args[1:], dict(node.kwargs))
        if not _calls(node, _FLATTEN) or arguments not in (((1,), {}), ((), {"start_dim": 1})):
            raise NotProvenError(f"expected flatten(x, 1), found {self._describe(node)}")
        return self._take(node)

    def skip(self, node: fx.Node, take: bool = True) -> fx.Node:
        """The node whose value `node` has: through Identity modules and clones."""
        while True:
            is_identity = self.calls(node, lambda module: type(module) is nn.Identity)
            if not is_identity and not (_calls(node, _CLONE) and is_unary(node)):
                return node
            if take:
                self._bypassed |= {str(node.target)} if is_identity else set()
                self._taken.add(node)
            node = self._source(node)

    def calls(self, node: fx.Node, accept: Callable[[nn.Module], bool]) -> bool:
        """Whether `node` calls a module, of that kind, with one tensor."""
        if node.op != "call_module" or not is_unary(node):
            return False
        return accept(self._module.get_submodule(str(node.target)))

    def check_all_taken(self) -> None:
        """Raise unless every node has been taken."""
        for node in self._nodes:
            if node not in self._taken:
                raise NotProvenError(f"it also computes {self._describe(node)}")

    def bypassed(self) -> tuple[str, ...]:
        """The ReLU and Identity modules that were met, and the modules around the layers."""
        return tuple(sorted(self._bypassed))

    def _take(self, node: fx.Node) -> fx.Node:
        self._taken.add(node)
        return self._source(node)

    def _source(self, node: fx.Node) -> fx.Node:
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise NotProvenError(f"{self._describe(node)} is not applied to a tensor")
        return node.args[0]

    def _is_shortcut(self, node: fx.Node) -> bool:
        node = self.skip(node, take=False)
        if self._projection(node) is not None:
            return True
        if self.calls(node, lambda _: True):
            node = self._source(node)
        return self.skip(node, take=False) is self.x

    def _take_shortcut(self, node: fx.Node) -> tuple[str | None, tuple[str, str] | None]:
        node = self.skip(node)
        projection = self._projection(node)
        if projection is not None:
            self.skip(self._take(self.skip(self._take(node))))
            return None, projection
        if node is self.x:
            return None, None
        self.skip(self._take(node))
        return str(node.target), None

    def _projection(self, node: fx.Node) -> tuple[str, str] | None:
        """Convolution and batch norm that lead from the input to `node`."""
        if not self.calls(node, is_norm):
            return None
        conv = self.skip(self._source(node), take=False)
        if not self.calls(conv, is_conv):
            return None
        is_all = self.skip(self._source(conv), take=False) is self.x
        return (str(conv.target), str(node.target)) if is_all else None

    def _describe(self, node: fx.Node) -> str:
        if node is self.x:
            return "the input"
        name = str(node.target)
        if node.op == "call_module":
            return f"{name} ({type(self._module.get_submodule(name)).__name__})"
        if node.op == "get_attr":
            return f"the tensor {name}"
        return str(getattr(node.target, "__name__", name))


def _calls(node: fx.Node, functions: set[object]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions
