"""Which values of a traced graph may share memory, and which nodes may write to it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from resnet_fused.conversion.layers import hook_on, is_conv, is_norm
from resnet_fused.nn.batch_norm_act import is_batch_norm_act
from resnet_fused.nn.frozen_batch_norm import is_frozen_batch_norm

# Calls whose result is memory of its own. Whatever is missing here is taken to be a view.
_FRESH_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.stack, torch.matmul),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clone, torch.mean, torch.sum),
    *(F.relu, F.sigmoid, F.silu, F.gelu, F.leaky_relu, F.conv2d, F.linear, F.softmax),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}
_FRESH_METHODS = {"add", "sub", "mul", "div", "relu", "sigmoid", "clone", "mean", "sum", "softmax"}
_FRESH_MODULES = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.GroupNorm, nn.LayerNorm),
)
_OUTSIDE = ("placeholder", "get_attr")  # nodes that stand for what is there before the call
_RUNNING = ("running_mean", "running_var")
_IN_PLACE_FUNCTIONS = {
    getattr(operator, name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "setitem"),
    )
}


class Effects:
    """Of the nodes of a graph whose modules are those of `module`.

    may_write: whether the module at a path, which is none of torch.nn's layers, may change its
    input.
    """

    def __init__(
        self, graph: fx.Graph, module: nn.Module, may_write: Callable[[str], bool]
    ) -> None:
        self._module, self._may_write = module, may_write
        self._nodes = [*graph.nodes]
        self._memory: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            self._memory[node] = node
            for source in self._sources(node):
                self._memory[self._root(source)] = self._root(node)

    def reads(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `node` may see what is in the memory of `value`, or change it."""
        memory = self._root(value)
        return any(self._root(source) is memory for source in node.all_input_nodes)

    def writes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `node` may change `value`."""
        if not self.reads(node, value):
            return False
        memory = self._root(value)
        return any(self._root(target) is memory for target in self._targets(node))

    def writes_to_input(self) -> bool:
        """Whether anything may change an argument of the forward."""
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        return any(self.writes(node, value) for node in self._nodes for value in inputs)

    def is_alone(self, node: fx.Node) -> bool:
        """Whether the memory of `node` is its own and only one node reads it."""
        sharers = [other for other in self._memory if self._root(other) is self._root(node)]
        chain = {node}
        for other in sharers:
            # Earlier results written in place are the same memory, seen by nobody else any more.
            if other is node or (len(other.users) == 1 and other.op not in _OUTSIDE):
                chain.add(other)
        return len(node.users) == 1 and len(chain) == len(sharers)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Earlier nodes whose memory the value of `node` may be in."""
        return [] if self._is_fresh(node) else node.all_input_nodes

    def _root(self, node: fx.Node) -> fx.Node:
        while self._memory[node] is not node:
            node = self._memory[node]
        return node

    def _child(self, node: fx.Node) -> nn.Module:
        return self._module.get_submodule(str(node.target))

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op in _OUTSIDE:
            return True
        if node.op == "call_module":
            child = self._child(node)
            is_layer = is_torch_conv_or_norm(child) or type(child) in _FRESH_MODULES
            return is_layer and not (getattr(child, "inplace", False) or hook_on(child))
        if node.op == "call_method":
            return node.target in _FRESH_METHODS
        is_fresh = node.op == "call_function" and node.target in _FRESH_FUNCTIONS
        return is_fresh and not (_is_flagged(node) or "out" in node.kwargs)

    def _targets(self, node: fx.Node) -> list[fx.Node]:
        """The arguments of `node` that it may write to."""
        first = _nodes_in(node.args[:1])
        if node.op == "call_method":
            return first if str(node.target).endswith("_") else []
        if node.op == "call_function":
            if isinstance(node.target, torch._ops.OpOverload):
                return _written(node, node.target)
            if isinstance(node.target, torch._ops.OperatorBase | torch._ops.OpOverloadPacket):
                return [*node.all_input_nodes]  # it may be a graph of its own
            if node.target is F.batch_norm:
                running = (*node.args[1:3], *map(node.kwargs.get, _RUNNING))
                return [value for value in running if isinstance(value, fx.Node)]
            outputs = _nodes_in(node.kwargs.get("out"))
            if node.target in _IN_PLACE_FUNCTIONS or _is_flagged(node) or _ends_in_place(node):
                return first + outputs
            is_pure = _is_torch(node.target) and not _is_mutable(node.target)
            return outputs if is_pure else [*node.all_input_nodes]
        if node.op == "call_module":
            child = self._child(node)
            if is_torch_layer(child) or is_torch_conv_or_norm(child):
                return first if getattr(child, "inplace", False) else []
            return [*node.all_input_nodes] if self._may_write(str(node.target)) else []
        return []


class CapturedEffects(Effects):
    """Of the nodes of a graph that Dynamo has captured: fake tensors tell what shares memory."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._first: dict[int, fx.Node] = {}
        super().__init__(graph, module, lambda _: True)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        leaves = pytree.tree_leaves(node.meta.get("example_value"))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return super()._sources(node)
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        return [self._first.setdefault(storage, node) for storage in storages]


def is_torch_layer(module: nn.Module) -> bool:
    """Whether `module` is one of torch.nn's own classes, and calls no other module."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not module._modules


def is_torch_conv_or_norm(module: nn.Module) -> bool:
    """Whether `module` is a convolution or a batch norm whose forward is not somebody's own."""
    if is_batch_norm_act(module) or is_frozen_batch_norm(module):
        return True
    forward = getattr(type(module), "forward", None)
    is_own = not getattr(forward, "__module__", "").startswith("torch.")
    return (is_conv(module) or is_norm(module)) and not (is_own or "forward" in vars(module))


def is_in_place_add(node: fx.Node) -> bool:
    """Whether the addition that `node` is writes to its first operand."""
    return node.target is operator.iadd or node.target == "add_"


def _written(node: fx.Node, operator: torch._ops.OpOverload) -> list[fx.Node]:
    """The arguments of `node` that its operator writes to, by the schema."""
    parameters = operator._schema.arguments
    values = [*zip(parameters, node.args, strict=False)]
    values += [(p, node.kwargs[p.name]) for p in parameters if p.name in node.kwargs]
    return _nodes_in([value for p, value in values if p.is_write])


def _nodes_in(arguments: object) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, fx.Node)]


def _is_flagged(node: fx.Node) -> bool:
    """Whether a function is called with inplace=True, or with a flag whose name is not seen."""
    if node.op != "call_function":
        return False
    return bool(node.kwargs.get("inplace")) or any(arg is True for arg in node.args[1:])


def _ends_in_place(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").endswith("_")


def _is_mutable(target: Any) -> bool:
    """Whether an operator of `torch.ops` says that it writes to an argument."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_is_mutable(getattr(target, name)) for name in target.overloads())
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_torch(target: Any) -> bool:
    module = getattr(target, "__module__", None)
    if module is None:  # functions of PyTorch that are written in C++ do not say
        return getattr(torch, getattr(target, "__name__", ""), None) is target
    return module.partition(".")[0] in ("torch", "_operator", "math", "builtins")
