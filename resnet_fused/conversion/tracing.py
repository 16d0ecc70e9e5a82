"""The data flow of a module's forward, and everything that it was seen to depend on.

A forward is traced on stand-ins: objects of the same classes that share the tensors, so that
whatever it stores stays out of the user's model. It is traced in training and in evaluation, with
and without gradients, and all four must agree. What cannot be seen in a graph is refused: random
numbers drawn, text printed, attributes written, a gradient mode or an autocast region entered.
Plain attributes that were read become part of the result, as they may change.
"""

import contextlib
import itertools
import operator
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resnet_fused.conversion.stand_ins import Attribute, NotProvenError, StandIns
from resnet_fused.conversion.watch import Watch, is_foreign

_ROOT = "module"  # the name of the traced module inside _OneArgument
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_AUTOCAST_DEVICES = ("cpu", "cuda")
_one_at_a_time = threading.RLock()  # torch.fx patches nn.Module for all threads


class Trace(NamedTuple):
    """What the forward of `module`, called with one tensor, computes.

    graph: the targets of its nodes are paths in `module`; `node.meta["scope"]` is the path of the
    module whose forward made the node. inlined: paths of the modules whose forwards are part of it,
    "" being the module itself; every other module is one node.
    """

    module: nn.Module
    graph: fx.Graph
    inlined: frozenset[str]
    attributes: tuple[Attribute, ...]


class Traces(NamedTuple):
    """The traces of a module in training and in evaluation, all that it is made of in that mode."""

    training: Trace
    evaluation: Trace

    @property
    def are_same(self) -> bool:
        """Whether both compute the same."""
        return _are_equal(self.training, self.evaluation)

    @property
    def single(self) -> Trace:
        """The trace of both modes. Raises NotProvenError if they differ."""
        if not self.are_same:
            raise NotProvenError("it differs between training and evaluation")
        return self.training


def trace(module: nn.Module, inlined: frozenset[str] = frozenset()) -> Traces:
    """The traces of `module` and the modules at the paths `inlined`, with and without gradients.

    Raises NotProvenError, with the path of the module whose forward is to blame.
    """
    traces = []
    for training, grad in itertools.product((True, False), repeat=2):
        # An autocast region shows where it changes the mode, so both are tried in training and not.
        with torch.set_grad_enabled(grad), _autocast(enabled=training is grad):
            traces.append(trace_once(module, inlined, training))
    if not (_are_equal(*traces[:2]) and _are_equal(*traces[2:])):
        raise NotProvenError("it differs with and without gradients")
    # A read in one of the modes is a read.
    attributes = tuple(dict.fromkeys(a for found in traces for a in found.attributes))
    return Traces(*(found._replace(attributes=attributes) for found in traces[::2]))


def trace_once(module: nn.Module, inlined: frozenset[str], training: bool) -> Trace:
    """The trace in one mode, with the gradient mode of the caller."""
    inlined = inlined | {""}
    tracer = failure = None
    try:
        stand_ins = StandIns(module, inlined, training)
        tracer = _Tracer(stand_ins, inlined)
        with _one_at_a_time, _no_random_numbers():
            graph = tracer.trace(_OneArgument(stand_ins))
    except Exception as error:  # the forward is arbitrary code
        # What its frames hold open (a generator may be inside of a context manager) is closed.
        failure = error.with_traceback(None)
    if failure is not None:
        message = str(failure)
        if not isinstance(failure, NotProvenError):
            text = message.strip().split("\n")[0]
            message = f"it cannot be traced ({type(failure).__name__}: {text})"
        raise NotProvenError(message, tracer.failed if tracer is not None else "")
    stand_ins.check_unchanged()
    for node in graph.nodes:
        if isinstance(node.target, str) and node.op in ("call_module", "get_attr"):
            node.target = _without_root(node.target)
            if node.op == "get_attr" and not _is_tensor_of(module, node.target):
                raise NotProvenError("it makes a tensor of its own at each call")
    attributes = (Attribute(*key, value) for key, value in stand_ins.reads.items())
    return Trace(module, graph, inlined, tuple(attributes))


class _InPlace:
    """Records `a += b` as what it is, where fx itself records a + b."""


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def method(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE.split():
    setattr(_InPlace, f"__{_name}__", _in_place(getattr(operator, _name)))


def _type_for_torch(self: Any) -> type:
    """What isinstance sees of a proxy: the user's code would be told that it is no tensor."""
    if is_foreign(sys._getframe(1)):
        raise self.tracer.refuse("it asks for the type of its input")
    return type(self)


def _text_for_torch(self: Any, *_: object) -> str:
    if is_foreign(sys._getframe(1)):
        raise self.tracer.refuse("it makes a text of a tensor")
    return fx.Proxy.__repr__(self)


def _hash_for_torch(self: Any) -> int:
    if is_foreign(sys._getframe(1)):
        raise self.tracer.refuse("it looks for a tensor in a table")
    return object.__hash__(self)


class _Unknown(_InPlace):
    """What must not be asked of a value that is not known yet."""

    __class__ = property(_type_for_torch)
    __str__ = __repr__ = __format__ = _text_for_torch
    __hash__ = _hash_for_torch

    def __getattr__(self: Any, name: str) -> fx.proxy.Attribute:
        if hasattr(Tensor, name):
            return _Attribute(self, name)
        if is_foreign(sys._getframe(1)):
            raise self.tracer.refuse(f"it asks for the attribute {name} of a tensor")
        raise AttributeError(f"'Tensor' object has no attribute '{name}'")


class _Proxy(_Unknown, fx.Proxy):
    """A value that is not known yet, with the attributes of a tensor."""


class _Attribute(_Unknown, fx.proxy.Attribute):
    """An attribute of such a value."""


class _OneArgument(nn.Module):
    """Calls the forward with one positional argument (that call is traced) and without hooks."""

    def __init__(self, stand_ins: StandIns) -> None:
        super().__init__()
        self.module, self._stand_ins = stand_ins.root, stand_ins

    def forward(self, x: Tensor) -> object:
        with self._stand_ins.recording(), Watch(self._stand_ins.refuse):
            out: object = self.module.forward(x)
        if self._stand_ins.refusal is not None:
            raise self._stand_ins.refusal
        return out


class _Tracer(fx.Tracer):
    """Modules that are not inlined are leaves; tensors of modules show up as nodes.

    torch.fx patches nn.Module for all threads: what others call meanwhile is not for this tracer.
    """

    proxy_buffer_attributes = True

    def __init__(self, stand_ins: StandIns, inlined: frozenset[str]) -> None:
        super().__init__()
        self._paths, self._inlined = stand_ins.paths, inlined
        self.refuse, self._recording = stand_ins.refuse, stand_ins.recording
        self._scopes = [""]
        self._surroundings = _surroundings()
        self._thread = threading.get_ident()
        self.failed = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _without_root(module_qualified_name) not in self._inlined

    def path_of_module(self, mod: nn.Module) -> str:
        path = self._paths.get(id(mod))
        return super().path_of_module(mod) if path is None else f"{_ROOT}.{path}".rstrip(".")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        with self._recording(False):  # it looks for the tensor in all modules
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            if _has_own_call(m):
                raise self.refuse(f"{_without_root(path)} has its own __call__")
            return super().call_module(m, forward, args, kwargs)
        self._scopes.append(_without_root(path))
        try:
            return super().call_module(m, m.forward, args, kwargs)  # without any hooks
        except Exception:
            self.failed = self.failed or _without_root(path)
            raise
        finally:
            self._scopes.pop()

    def create_arg(self, a: Any) -> Any:
        is_other = isinstance(a, dict | list | tuple) and type(a) not in _CONTAINERS
        if is_other and not hasattr(a, "_fields"):  # torch.fx would make a plain one of it
            raise self.refuse(f"it makes an object of type {type(a).__name__}")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise self.refuse("it changes the gradient mode, autocast or saved tensors' hooks")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        return node


_CONTAINERS = (dict, list, tuple, torch.Size, fx.immutable_collections.immutable_list)


def _has_own_call(module: nn.Module) -> bool:
    """Whether a call of `module`, which is one node, is preceded by code of its class."""
    classes = type(module).__mro__
    return any("__call__" in vars(c) and not c.__module__.startswith("torch.") for c in classes)


def _surroundings() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *map(torch.is_autocast_enabled, _AUTOCAST_DEVICES),
        *map(torch.get_autocast_dtype, _AUTOCAST_DEVICES),
        torch.is_autocast_cache_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )


@contextlib.contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    # Set directly: entering torch.autocast warns where a device is missing.
    before = [torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES]
    try:
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was_enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, was_enabled)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raise if random numbers are drawn meanwhile, and draw them for others again."""
    generators = list(_generators())
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        changed = [
            (set_state, state)
            for (get, set_state), state in zip(generators, before, strict=True)
            if pickle.dumps(get()) != pickle.dumps(state)
        ]
        for set_state, state in changed:
            set_state(state)
    if changed:
        raise NotProvenError("it draws random numbers outside of its tensors")


def _generators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How the state of every global random number generator is read and written."""
    yield random.getstate, random.setstate
    yield lambda: torch.get_rng_state().numpy(), lambda s: torch.set_rng_state(torch.from_numpy(s))
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        yield numpy_random.get_state, numpy_random.set_state
    if torch.cuda.is_initialized():
        yield (
            (lambda: torch.cuda.get_rng_state().numpy()),
            (lambda s: torch.cuda.set_rng_state(torch.from_numpy(s))),
        )


def _are_equal(trace: Trace, other: Trace) -> bool:
    return [*map(_described, trace.graph.nodes)] == [*map(_described, other.graph.nodes)]


def _described(node: fx.Node) -> tuple[object, ...]:
    # Nodes are printed by their names, which are given out in order.
    return node.op, node.name, node.target, repr(node.args), repr(node.kwargs)


def _without_root(path: str) -> str:
    return path.partition(".")[2]


def _is_tensor_of(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    return name in owner._parameters or name in owner._buffers
