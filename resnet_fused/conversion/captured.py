"""Fused operators in a graph that Dynamo has captured: torch's functions on tensors, no modules.

What a node computes is read from its arguments and from the fake tensors beside it, which also tell
whether a fused operator takes them and gives what the nodes gave. Everything else, and what
subgraphs such as checkpointed regions hold, stays as it is.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.conversion.effects import CapturedEffects
from resnet_fused.conversion.groups import Group, find_groups_of, is_relu_call
from resnet_fused.folding import scale_shift
from resnet_fused.layout import memory_format
from resnet_fused.nn.pairs import pair_of
from resnet_fused.ops.bn_relu import BatchNormArgs

_CONV = {
    **{"input": None, "weight": None, "bias": None},
    **{"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
}
_NORM = {
    **{"input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None},
    **{"training": False, "momentum": 0.1, "eps": 1e-5},
}
_POOL = {
    **{"input": None, "kernel_size": None, "stride": None, "padding": 0, "dilation": 1},
    **{"ceil_mode": False, "return_indices": False},
}
# Calls a function with arguments: in the graph, or on fake tensors.
_Call = Callable[[Callable[..., Any], tuple[Any, ...]], Any]


def fuse_captured(module: fx.GraphModule, inference: bool = True) -> list[Group]:
    """Exchange the groups of layers in the graph of `module` for fused operators, in place.

    inference: also those that neither use the batch's statistics nor need a gradient. Returns the
    groups. The nodes must have the fake tensors that Dynamo leaves in their `meta`.
    """
    layers = _Layers(module.graph, inference)
    groups = find_groups_of(layers, module.graph, CapturedEffects(module.graph, module))
    for group in groups:
        layers.replace(group)
    if groups:
        module.recompile()
    return groups


class _Layers:
    """Layers that are calls of torch's functions, each named as its node is."""

    def __init__(self, graph: fx.Graph, inference: bool) -> None:
        self._graph, self._inference = graph, inference
        self._nodes = {node.name: node for node in graph.nodes}
        self._order = [*graph.nodes]
        self._operators: dict[fx.Node, _Operator] = {}  # by the last node of a group
        self._fused: dict[fx.Node, fx.Node] = {}  # what stands for the last node of a group now

    def conv(self, node: fx.Node) -> str | None:
        return node.name if node.target is torch.conv2d and _has_x(node) else None

    def norm(self, node: fx.Node) -> str | None:
        return node.name if node.target is F.batch_norm and _has_x(node) else None

    def pool(self, node: fx.Node) -> str | None:
        is_pool = node.target in (F.max_pool2d, torch.max_pool2d) and _has_x(node)
        return node.name if is_pool else None

    def is_relu(self, node: fx.Node) -> bool:
        return is_relu_call(node)

    def is_identity(self, node: fx.Node) -> bool:
        return False  # Dynamo leaves none

    def includes_relu(self, norm: str) -> bool:
        return False

    def accepts(self, group: Group) -> bool:
        """Whether a fused operator takes the group's tensors, and gives what the group gives."""
        values = [*map(_value, group.nodes)]
        if not all(isinstance(value, FakeTensor) for value in values) or self._changes_mode(group):
            return False
        for op in self._candidates(group):
            if _is_accelerated(op.name, values[0]) and self._gives(values[-1], op, group):
                self._operators[group.nodes[-1]] = op
                return True
        return False

    def replace(self, group: Group) -> None:
        last = group.nodes[-1]

        def call(function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
            node = self._graph.call_function(function, args)
            node.meta = {k: v for k, v in last.meta.items() if k != "example_value"}
            return node

        with self._graph.inserting_before(last):
            fused = self._operators[last].emit(call, self, group)
        fused.meta = dict(last.meta)
        self._fused[last] = fused
        last.replace_all_uses_with(fused)
        for node in reversed(group.nodes):
            if not node.users:  # a convolution whose output is normalised stays
                self._graph.erase_node(node)

    def arguments(self, name: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the call that a name stands for, by the names of the parameters."""
        node = self._nodes[cast(str, name)]
        return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs

    def batch_norm(self, group: Group) -> list[Any]:
        """Those of `BatchNormArgs`: nodes and numbers."""
        found = self.arguments(group.norm, _NORM)
        return [found[name] for name in BatchNormArgs._fields]

    def residual(self, group: Group) -> fx.Node | None:
        return group.residual and self._fused.get(group.residual, group.residual)

    def _candidates(self, group: Group) -> list["_Operator"]:
        """What could compute the group, best first."""
        is_live = group.norm is not None and self._is_live(group)
        needs_gradient = _value(group.nodes[-1]).requires_grad
        if not (self._inference or is_live or needs_gradient):
            return []
        if group.norm is None:
            return [_ADD_RELU]
        if not self._adds_alike(group):
            return []
        if group.pool is not None:
            return [_BN_RELU_MAX_POOL] if is_live and self._pools_neighbours(group) else []
        folds = group.conv is not None and not is_live
        # By name, padding may need to be another on each side: the convolution runs as it is.
        if folds and not isinstance(self.arguments(group.conv, _CONV)["padding"], str):
            return [_CONV_BN_RELU, _BN_RELU]
        return [_BN_RELU]

    def _gives(self, expected: Tensor, op: "_Operator", group: Group) -> bool:
        """Whether the operator takes these tensors, and its output is like `expected`."""
        try:
            with torch.no_grad():
                out = op.emit(_call_on_fake_tensors, self, group)
        except (ValueError, TypeError, RuntimeError):
            return False
        kind, expected_kind = ((t.shape, t.dtype, t.device) for t in (out, expected))
        return kind == expected_kind and expected.is_contiguous(memory_format=memory_format(out))

    def _adds_alike(self, group: Group) -> bool:
        """Whether adding the residual, if there is one, neither broadcasts nor promotes."""
        if group.residual is None:
            return True
        out, residual = _value(self._nodes[cast(str, group.norm)]), _value(group.residual)
        is_tensor = isinstance(residual, FakeTensor)
        return is_tensor and (residual.shape, residual.dtype) == (out.shape, out.dtype)

    def _is_live(self, group: Group) -> bool:
        """Whether the batch norm must see the convolution's output: see `nn.blocks.is_live`."""
        weight, bias, _, _, training, *_ = self.batch_norm(group)
        affine = [_value(node) for node in (weight, bias) if node is not None]
        needs_gradient = _value(self._nodes[cast(str, group.norm)]).requires_grad
        return training or (needs_gradient and any(p.requires_grad for p in affine))

    def _pools_neighbours(self, group: Group) -> bool:
        found = self.arguments(group.pool, _POOL)
        plain = pair_of(found["dilation"]) == (1, 1) and not found["ceil_mode"]
        return plain and not found["return_indices"]

    def _changes_mode(self, group: Group) -> bool:
        """Whether gradients or autocast may be switched between the first and the last node."""
        first, last = (self._order.index(node) for node in (group.nodes[0], group.nodes[-1]))
        return any(_value(node) is None for node in self._order[first:last])


class _Operator(NamedTuple):
    name: str
    emit: Callable[[_Call, _Layers, Group], Any]


def _conv_bn_relu(call: _Call, layers: _Layers, group: Group) -> Any:
    conv = layers.arguments(group.conv, _CONV)
    *vectors, _, _, eps = layers.batch_norm(group)
    folded = call(scale_shift, (*vectors, eps, conv["bias"]))
    scale, shift = (call(operator.getitem, (folded, i)) for i in range(2))
    geometry = [list(pair_of(conv[name])) for name in ("stride", "padding", "dilation")]
    tensors = conv["input"], conv["weight"], scale, shift, layers.residual(group)
    function = torch.ops.resnet_fused.conv_bn_relu.default
    return call(function, (*tensors, group.relu, *geometry, conv["groups"]))


def _bn_relu(call: _Call, layers: _Layers, group: Group) -> Any:
    x = layers.arguments(group.norm, _NORM)["input"]
    residual = layers.residual(group), False, *BatchNormArgs(None, None, None, None)
    function = torch.ops.resnet_fused.bn_relu.default
    outputs = call(function, (x, *layers.batch_norm(group), *residual, group.relu, False))
    return call(operator.getitem, (outputs, 0))


def _bn_relu_max_pool(call: _Call, layers: _Layers, group: Group) -> Any:
    x, pool = layers.arguments(group.norm, _NORM)["input"], layers.arguments(group.pool, _POOL)
    sizes = pool["kernel_size"], pool["stride"] or pool["kernel_size"], pool["padding"]
    windows = [list(pair_of(size)) for size in sizes]
    function = torch.ops.resnet_fused.bn_relu_max_pool.default
    return call(operator.getitem, (call(function, (x, *layers.batch_norm(group), *windows)), 0))


def _add_relu(call: _Call, layers: _Layers, group: Group) -> Any:
    return call(torch.ops.resnet_fused.add_relu.default, group.nodes[0].args)


_CONV_BN_RELU = _Operator("conv_bn_relu", _conv_bn_relu)
_BN_RELU = _Operator("bn_relu", _bn_relu)
_BN_RELU_MAX_POOL = _Operator("bn_relu_max_pool", _bn_relu_max_pool)
_ADD_RELU = _Operator("add_relu", _add_relu)


def _call_on_fake_tensors(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*fx.map_arg(args, _value))


def _value(node: fx.Node) -> Any:
    """What Dynamo knows about the value of `node`; None where it has none."""
    return node.meta.get("example_value")


def _is_accelerated(operator: str, x: Tensor) -> bool:
    """Whether something faster than plain PyTorch runs the operator, whatever is asked for now."""
    return backends.available(operator, x.device.type, x.dtype)[0] != "reference"


def _has_x(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(node.args) and isinstance(node.args[0], fx.Node)
