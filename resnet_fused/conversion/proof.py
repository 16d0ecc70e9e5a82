"""Proof that a module's forward computes a known pattern, read off its traced data flow.

The forward is traced with every child as one opaque call, in training and evaluation and with and
without gradients. The graph must then consist of exactly the nodes of the pattern. What cannot be
traced, or contains anything else, is not proven.
"""

import copy
import itertools
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from resnet_fused.conversion.layers import is_conv, is_norm
from resnet_fused.conversion.roles import Roles

_PREFIX = "module."  # of the traced module inside _OneArgument
_ADD_IN_PLACE: set[object] = {operator.iadd, "add_"}
_ADD: set[object] = {operator.add, torch.add, "add"} | _ADD_IN_PLACE
_RELU: set[object] = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_CLONE: set[object] = {torch.clone, "clone"}
_FLATTEN: set[object] = {torch.flatten, "flatten"}


class NotProvenError(Exception):
    """The forward could not be shown to compute the pattern; the text says why."""


def prove_block(module: nn.Module) -> Roles:
    """The roles of a BasicBlock's or Bottleneck's children, whatever they are called.

    Raises NotProvenError.
    """
    return _prove(module, _read_block)


def prove_network(module: nn.Module) -> Roles:
    """The roles in a network of stem, pooling, four stages, pooling, classifier, as torchvision's.

    Raises NotProvenError.
    """
    return _prove(module, _read_network)


def _prove(module: nn.Module, read: Callable[["_Graph"], Roles]) -> Roles:
    found = set()
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            found.add(read(_trace(module, training)))
    if len(found) > 1:
        raise NotProvenError("it differs between training and evaluation")
    return found.pop()


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is; fx itself records a + b."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Children of the traced module are leaves; its own tensors show up as nodes."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self._module


class _OneArgument(nn.Module):
    """Calls the forward with one positional argument (that call is proven) and without hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> object:
        return self.module.forward(x)


def _trace(module: nn.Module, training: bool) -> "_Graph":
    # The forward runs on a stand-in that shares the children, so that whatever it stores on itself
    # is seen and does not end up in the user's model.
    before = {**vars(module), "training": training}
    stand_in = object.__new__(type(module))
    vars(stand_in).update({name: _shallow_copy(value) for name, value in before.items()})
    try:
        graph = _Tracer(stand_in).trace(_OneArgument(stand_in))
    except Exception as error:  # the forward is arbitrary code
        text = str(error).strip().split("\n")[0]
        raise NotProvenError(f"it cannot be traced ({type(error).__name__}: {text})") from error
    after = vars(stand_in)
    changed = [
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _same(before[name], after[name])
    ]
    if changed:
        raise NotProvenError(f"it changes the attribute {min(changed)}")
    return _Graph(graph, module)


def _shallow_copy(value: object) -> object:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _same(before: object, after: object) -> bool:
    """Whether the value is the same object, or a container of the same objects."""
    if isinstance(before, dict) and isinstance(after, dict):
        return _same([*before.keys(), *before.values()], [*after.keys(), *after.values()])
    if isinstance(before, list | set) and isinstance(after, list | set):
        return [id(item) for item in before] == [id(item) for item in after]
    return before is after


def _read_block(graph: "_Graph") -> Roles:
    node = graph.take_relu(graph.result, "the last ReLU")
    main, shortcut = graph.take_add(node)
    convs: list[str] = []
    norms: list[str] = []
    while True:
        name, node = graph.take_child(main, is_norm, "batch norm")
        norms.insert(0, name)
        name, node = graph.take_child(node, is_conv, "convolution")
        convs.insert(0, name)
        if graph.skip(node) is graph.x:
            break
        main = graph.take_relu(node, f"the ReLU before {name}")
    pattern = {2: "BasicBlock", 3: "Bottleneck"}.get(len(convs))
    if pattern is None:
        raise NotProvenError(f"it has {len(convs)} convolutions in a row, not 2 or 3")
    for name in (*convs, *norms):
        if (*convs, *norms).count(name) > 1:
            raise NotProvenError(f"it calls {name} more than once")
    graph.check_all_taken()
    return Roles(pattern, tuple(convs), tuple(norms), graph.bypassed(), shortcut)


_STAGES_BACKWARD = ("fc", "flatten", "avgpool", "layer4", "layer3", "layer2", "layer1", "maxpool")


def _read_network(graph: "_Graph") -> Roles:
    node = graph.result
    for name in _STAGES_BACKWARD:
        node = graph.take_flatten(node) if name == "flatten" else graph.take_named(node, name)
    node = graph.take_relu(node, "the stem's ReLU")
    norm, node = graph.take_child(node, is_norm, "batch norm")
    conv, node = graph.take_child(node, is_conv, "convolution")
    if (conv, norm) != ("conv1", "bn1") or graph.skip(node) is not graph.x:
        raise NotProvenError("its stem is not conv1, bn1 and ReLU on the input")
    graph.check_all_taken()
    return Roles("ResNet", (conv,), (norm,), graph.bypassed(), None)


class _Graph:
    """A traced forward, taken apart from its result back to its input, node by node."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._children = {k: child for k, child in module._modules.items() if child is not None}
        self._nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self._taken: set[fx.Node] = set()
        self._bypassed: set[str] = set()
        self.x = next(node for node in graph.nodes if node.op == "placeholder")
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        if not isinstance(result, fx.Node):
            raise NotProvenError("it does not return one tensor")
        self.result = result

    def take_relu(self, node: fx.Node, which: str) -> fx.Node:
        """The input of the ReLU that makes `node`."""
        node = self.skip(node)
        child = self._called_child(node)
        if child is not None and type(self._children[child]) is nn.ReLU:
            self._bypassed.add(child)
        elif not (_calls(node, _RELU) and _is_unary(node, flag="inplace")):
            raise NotProvenError(f"expected {which}, found {self._describe(node)}")
        return self._take(node)

    def take_add(self, node: fx.Node) -> tuple[fx.Node, str | None]:
        """(main branch, child on the shortcut) of the addition that makes `node`."""
        node = self.skip(node)
        operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
        if not _calls(node, _ADD) or len(operands) != 2 or len(node.args) != 2 or node.kwargs:
            raise NotProvenError(f"expected the residual add, found {self._describe(node)}")
        self._take(node)
        shortcuts = [operand for operand in operands if self._is_shortcut(operand)]
        if len(shortcuts) != 1:
            found = " and ".join(self._describe(self.skip(operand)) for operand in operands)
            raise NotProvenError(
                f"expected the add of a batch norm and a shortcut, found that of {found}"
            )
        shortcut = shortcuts[0]
        main = operands[1] if operands[0] is shortcut else operands[0]
        if node.target in _ADD_IN_PLACE and main is not operands[0]:
            raise NotProvenError("it adds in place into the shortcut, which may be the input")
        child = self._called_child(shortcut)
        self.skip(shortcut if child is None else self._take(shortcut))
        return main, child

    def take_child(
        self, node: fx.Node, accept: Callable[[nn.Module], bool], what: str
    ) -> tuple[str, fx.Node]:
        """(name, input) of the child call that makes `node`."""
        node = self.skip(node)
        name = self._called_child(node)
        if name is None or not accept(self._children[name]):
            raise NotProvenError(f"expected a {what}, found {self._describe(node)}")
        return name, self._take(node)

    def take_named(self, node: fx.Node, name: str) -> fx.Node:
        """The input of the call of the child `name` that makes `node`."""
        if self._called_child(node) != name:
            raise NotProvenError(f"expected {name}, found {self._describe(node)}")
        return self._take(node)

    def take_flatten(self, node: fx.Node) -> fx.Node:
        """The input of the flatten(x, 1) that makes `node`."""
        arguments = (node.args[1:], dict(node.kwargs))
        if not _calls(node, _FLATTEN) or arguments not in (((1,), {}), ((), {"start_dim": 1})):
            raise NotProvenError(f"expected flatten(x, 1), found {self._describe(node)}")
        return self._take(node)

    def skip(self, node: fx.Node, take: bool = True) -> fx.Node:
        """The node whose value `node` has: through Identity children and clones."""
        while True:
            child = self._called_child(node)
            is_identity = child is not None and type(self._children[child]) is nn.Identity
            if not is_identity and not (_calls(node, _CLONE) and _is_unary(node)):
                return node
            if take:
                self._bypassed |= {child} if child is not None else set()
                self._taken.add(node)
            node = self._source(node)

    def check_all_taken(self) -> None:
        """Raise unless every node has been taken."""
        for node in self._nodes:
            if node not in self._taken:
                raise NotProvenError(f"it also computes {self._describe(node)}")

    def bypassed(self) -> tuple[str, ...]:
        """The ReLU and Identity children that were met."""
        return tuple(sorted(self._bypassed))

    def _take(self, node: fx.Node) -> fx.Node:
        self._taken.add(node)
        return self._source(node)

    def _source(self, node: fx.Node) -> fx.Node:
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise NotProvenError(f"{self._describe(node)} is not applied to a tensor")
        return node.args[0]

    def _is_shortcut(self, node: fx.Node) -> bool:
        # A child that is called on the block's input, be it an Identity, counts as the shortcut.
        if self._called_child(node) is not None:
            node = self._source(node)
        return self.skip(node, take=False) is self.x

    def _called_child(self, node: fx.Node) -> str | None:
        """The name of the direct child that `node` calls with one tensor, or None."""
        name = str(node.target).removeprefix(_PREFIX)
        is_call = node.op == "call_module" and name in self._children and _is_unary(node)
        return name if is_call else None

    def _describe(self, node: fx.Node) -> str:
        if node is self.x:
            return "the input"
        name = str(node.target).removeprefix(_PREFIX)
        if node.op == "call_module":
            child = self._children.get(name)
            return name if child is None else f"{name} ({type(child).__name__})"
        if node.op == "get_attr":
            return f"the tensor {name}"
        return str(getattr(node.target, "__name__", name))


def _calls(node: fx.Node, functions: set[object]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def _is_unary(node: fx.Node, flag: str | None = None) -> bool:
    """Whether `node` has one argument, a tensor, and at most the flag besides."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if flag is not None:
        rest = [value for value in rest if not isinstance(value, bool)]
    only_flags = all(keyword == flag for keyword in node.kwargs)
    return bool(node.args) and isinstance(node.args[0], fx.Node) and not rest and only_flags
