"""The data flow of a module's forward, and everything that it was seen to depend on.

A forward is traced on stand-ins: objects of the same classes that share the tensors, so that
whatever it stores stays out of the user's model. It is traced in training and in evaluation, with
and without gradients, and all four must agree. What cannot be seen in a graph is refused: random
numbers drawn, text printed, attributes written, a gradient mode or an autocast region entered.
Plain attributes that were read become part of the result, as they may change.
"""

import contextlib
import enum
import functools
import io
import itertools
import operator
import pickle
import random
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

_ROOT = "module"  # the name of the traced module inside _OneArgument
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MODULE_ATTRIBUTES = vars(nn.Module()).keys()
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NAMED = (torch.memory_format, torch.layout, enum.Enum, type, types.FunctionType)
_BUILTIN = (types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class NotProvenError(Exception):
    """What a forward computes could not be shown; the text says why. path: of the module."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(text)
        self.path = path


class Attribute(NamedTuple):
    """A plain attribute that a forward reads: of which module, and its value, see `frozen`."""

    path: str
    name: str
    value: Hashable


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


def trace(module: nn.Module, inlined: frozenset[str] = frozenset()) -> Trace:
    """The trace of `module` and the modules at the paths `inlined`, the same in every mode.

    Raises NotProvenError, with the path of the module whose forward is to blame.
    """
    traces = []
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            traces.append(trace_once(module, inlined, training))
    first = traces[0]
    if any(not _are_equal(other, first) for other in traces):
        raise NotProvenError("it differs between training and evaluation")
    # A read in one of the modes is a read.
    attributes = dict.fromkeys(a for found in traces for a in found.attributes)
    return first._replace(attributes=tuple(attributes))


def trace_once(module: nn.Module, inlined: frozenset[str], training: bool) -> Trace:
    """The trace in one mode, with the gradient mode of the caller."""
    inlined = inlined | {""}
    stand_ins = _StandIns(module, inlined, training)
    tracer = _Tracer(stand_ins, inlined)
    try:
        with _nothing_else_happens(), stand_ins.recording():
            graph = tracer.trace(_OneArgument(stand_ins.root))
    except NotProvenError as error:
        raise NotProvenError(str(error), tracer.failed) from error
    except Exception as error:  # the forward is arbitrary code
        text = str(error).strip().split("\n")[0]
        message = f"it cannot be traced ({type(error).__name__}: {text})"
        raise NotProvenError(message, tracer.failed) from error
    stand_ins.check_unchanged()
    for node in graph.nodes:
        if isinstance(node.target, str) and node.op in ("call_module", "get_attr"):
            node.target = _without_root(node.target)
            if node.op == "get_attr" and not _is_tensor_of(module, node.target):
                raise NotProvenError("it makes a tensor of its own at each call")
    attributes = (Attribute(*key, value) for key, value in stand_ins.reads.items())
    return Trace(module, graph, inlined, tuple(attributes))


def frozen(value: object) -> Hashable:
    """A constant that equals that of another value if both are the same; see `_CONSTANTS`.

    Raises NotProvenError for values that can change without being exchanged.
    """
    if isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, (*_NAMED, *_BUILTIN)):
        return value
    if isinstance(value, functools.partial):
        return frozen([value.func, value.args, value.keywords])
    if isinstance(value, tuple | list):
        return type(value), *map(frozen, value)
    if isinstance(value, dict):
        return dict, *((frozen(key), frozen(item)) for key, item in value.items())
    raise NotProvenError(f"a {type(value).__name__}")


class _StandIns:
    """A second set of the modules of `module` that its forward can meet, over the same tensors.

    There is one for each inlined module and its children, and for others as they are reached.
    """

    def __init__(self, module: nn.Module, inlined: frozenset[str], training: bool) -> None:
        self.reads: dict[tuple[str, str], Hashable] = {}
        self.paths: dict[int, str] = {}
        self._modules: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._copies: dict[int, nn.Module] = {}
        self._inlined, self._training = inlined, training
        self.root = self._of(module, "")

    def _of(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule) or id(module) in self.paths:
            return module
        if id(module) in self._copies:
            return self._copies[id(module)]
        copied = object.__new__(_recording_class(type(module)))  # type: ignore[arg-type]
        self._copies[id(module)] = copied
        values = vars(copied)
        values.update({name: _shallow_copy(value) for name, value in vars(module).items()})
        if path in self._inlined or isinstance(module, _CONTAINERS):
            for name, child in module._modules.items():
                if child is not None:
                    values["_modules"][name] = self._of(child, join(path, name))
        if path in self._inlined:
            values["training"] = self._training
        self.paths[id(copied)] = path
        self._modules.append((path, copied, {k: _shallow_copy(v) for k, v in values.items()}))
        return copied

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note every plain attribute that is read."""
        global _active
        previous, _active = _active, self
        try:
            yield
        finally:
            _active = previous

    def read(self, module: nn.Module, name: str, value: object) -> None:
        """Note that the attribute of a stand-in has been read."""
        path = self.paths.get(id(module))
        if path is None or (path in self._inlined and name == "training"):
            return
        try:
            self.reads[path, name] = frozen(value)
        except NotProvenError as error:
            raise NotProvenError(f"it reads the attribute {name}, which is {error}") from None

    def reach(self, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
        """The stand-in of a child that has been read from a stand-in."""
        path = self.paths.get(id(module))
        return child if path is None else self._of(child, join(path, name))

    def check_unchanged(self) -> None:
        """Raise if the forward has stored anything."""
        for path, module, before in self._modules:
            after = vars(module)
            for name in before.keys() | after.keys():
                both = name in before and name in after
                if not (both and _same(before[name], after[name])):
                    raise NotProvenError(f"it changes the attribute {name}", path)


_active: _StandIns | None = None


@functools.lru_cache(maxsize=256)
def _recording_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like `cls` whose instances report what is read of them."""

    def get_attribute(self: nn.Module, name: str) -> object:
        value = cls.__getattribute__(self, name)
        is_plain = name == "training" or name not in _MODULE_ATTRIBUTES
        if _active is not None and is_plain and name in object.__getattribute__(self, "__dict__"):
            _active.read(self, name, value)
        return value

    def get_child(self: nn.Module, name: str) -> object:
        value = cls.__getattr__(self, name)
        if _active is not None and isinstance(value, nn.Module):
            return _active.reach(self, name, value)
        return value

    namespace = {
        "__getattribute__": get_attribute,
        "__getattr__": get_child,
        "__module__": cls.__module__,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(namespace))


class _InPlace:
    """Records `a += b` as what it is, where fx itself records a + b."""


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def method(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE.split():
    setattr(_InPlace, f"__{_name}__", _in_place(getattr(operator, _name)))


def _type_for_torch(self: object) -> type:
    """What isinstance sees of a proxy: the user's code would be told that it is no tensor."""
    if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
        raise NotProvenError("it asks for the type of its input")
    return type(self)


class _Proxy(_InPlace, fx.Proxy):
    """A value that is not known yet, with the attributes of a tensor."""

    __class__ = property(_type_for_torch)

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return _Attribute(self, name)


class _Attribute(_InPlace, fx.proxy.Attribute):
    """An attribute of such a value."""

    __class__ = property(_type_for_torch)


class _OneArgument(nn.Module):
    """Calls the forward with one positional argument (that call is traced) and without hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> object:
        return self.module.forward(x)


class _Tracer(fx.Tracer):
    """Modules that are not inlined are leaves; tensors of modules show up as nodes."""

    proxy_buffer_attributes = True

    def __init__(self, stand_ins: _StandIns, inlined: frozenset[str]) -> None:
        super().__init__()
        self._paths, self._inlined = stand_ins.paths, inlined
        self._scopes = [""]
        self._surroundings = _surroundings()
        self.failed = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _without_root(module_qualified_name) not in self._inlined

    def path_of_module(self, mod: nn.Module) -> str:
        path = self._paths.get(id(mod))
        return super().path_of_module(mod) if path is None else join(_ROOT, path)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._scopes.append(_without_root(path))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or _without_root(path)
            raise
        finally:
            self._scopes.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise NotProvenError("it changes the gradient mode, autocast or saved tensors' hooks")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        return node


def _surroundings() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )


@contextlib.contextmanager
def _nothing_else_happens() -> Iterator[None]:
    """Raise if random numbers are drawn or text is printed meanwhile; undo the former."""
    generators = list(_generators())
    before = [get() for get, _ in generators]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
        if [pickle.dumps(get()) for get, _ in generators] != [*map(pickle.dumps, before)]:
            raise NotProvenError("it draws random numbers outside of its tensors")
        if printed.getvalue():
            raise NotProvenError("it prints")
    finally:
        for (_, set_state), state in zip(generators, before, strict=True):
            set_state(state)


def _generators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How the state of every global random number generator is read and written."""
    yield random.getstate, random.setstate
    yield lambda: torch.get_rng_state().numpy(), lambda s: torch.set_rng_state(torch.from_numpy(s))
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        yield numpy_random.get_state, numpy_random.set_state
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state, torch.cuda.set_rng_state


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


def join(path: str, name: str) -> str:
    """The path of the module `name` in the one at `path`."""
    return f"{path}.{name}" if path and name else path or name


def _shallow_copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value


def _same(before: object, after: object) -> bool:
    """Whether the value is the same object, or a container of the same objects."""
    if isinstance(before, dict) and isinstance(after, dict):
        return _same([*before.keys(), *before.values()], [*after.keys(), *after.values()])
    if isinstance(before, list | set) and isinstance(after, list | set):
        return [id(item) for item in before] == [id(item) for item in after]
    return before is after
