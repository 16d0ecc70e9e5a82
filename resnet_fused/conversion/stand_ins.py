"""Stand-ins for the modules of a model, which note what a forward reads and refuse changes."""

import contextlib
import enum
import functools
import sys
import types
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from resnet_fused.conversion.watch import is_foreign, is_harmless

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NAMED = (torch.memory_format, torch.layout, enum.Enum, type, types.FunctionType)
_BUILTIN = (types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_REFERENCES = (*_NAMED, *_BUILTIN)
_SEQUENCES = (tuple, list)  # tuples of classes: torch.compile knows no unions of them
_MUTABLE = (list, dict, set, functools._lru_cache_wrapper)
_MODULE_ATTRIBUTES = vars(nn.Module()).keys()
# Ways around the attributes, to tensors whose dtypes and devices would become constants.
_TENSOR_TABLES = {
    *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict"),
    *("_parameters", "_buffers", "get_parameter", "get_buffer", "__dict__", "__class__"),
}


class NotProvenError(Exception):
    """What a forward computes could not be shown; the text says why. path: of the module."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(text)
        self.path = path


class Attribute(NamedTuple):
    """What a forward reads of a module: its path, the name, and what `reading` gives for it."""

    path: str
    name: str
    value: Hashable

    def holds(self, owner: nn.Module) -> bool:
        """Whether reading it of `owner`, the module at `path`, gives the same now."""
        try:
            return reading(owner, self.name, original_class(owner)) == self.value
        except NotProvenError:
            return False


class _Found(enum.Enum):
    """What stands in place of a value in `reading`."""

    NOTHING = 1
    TENSOR = 2
    OF_THE_CLASS = 3


def reading(module: nn.Module, name: str, cls: type) -> Hashable:
    """A constant that equals that of another time if reading the attribute gives the same.

    cls: the class of the module as the user knows it. "_modules" gives the children's names and
    classes; a tensor is only told from none. Raises NotProvenError, see `frozen`.
    """
    own = vars(module)
    if name == "_modules":
        return tuple((child, original_class(m)) for child, m in own["_modules"].items())
    if name in own:
        return frozen(own[name])
    for table in ("_parameters", "_buffers"):
        if name in own[table]:
            return None if own[table][name] is None else _Found.TENSOR
    value: Any = getattr(cls, name, _Found.NOTHING)
    if value is _Found.NOTHING:
        return value
    if isinstance(value, _MUTABLE):
        raise NotProvenError(f"a {type(value).__name__} of its class")
    # What a method reads is seen where it runs; here it matters that the instance has no other.
    return _Found.OF_THE_CLASS, None if hasattr(value, "__get__") else frozen(value)


def frozen(value: object) -> Hashable:
    """A constant that equals that of another value if both are the same; see `_CONSTANTS`.

    Raises NotProvenError for values that can change without being exchanged.
    """
    if isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, _REFERENCES):
        return value
    if isinstance(value, functools.partial):
        return frozen([value.func, value.args, value.keywords])
    if isinstance(value, _SEQUENCES):
        return type(value), *map(frozen, value)
    if isinstance(value, dict):
        return type(value), *((frozen(key), frozen(item)) for key, item in value.items())
    raise NotProvenError(f"a {type(value).__name__}")


def _check_harmless(value: object) -> None:
    """Raise if there is a function or class that may do more than compute."""
    if isinstance(value, tuple):
        for item in value:
            _check_harmless(item)
    elif isinstance(value, _REFERENCES) and not is_harmless(value):
        raise NotProvenError(f"the {type(value).__name__} {getattr(value, '__name__', value)}")


def original_class(module: nn.Module | None) -> type:
    """The class of the module before conversion."""
    cls: type = getattr(type(module), "_resnet_fused_original", type(module))
    return cls


class StandIns:
    """A second set of the modules of `module` that its forward can meet, over the same tensors.

    There is one for each inlined module and its children, and for others as they are reached.
    reads: what has been read, by path and name. refusal: the first reason why nothing is proven.
    """

    def __init__(self, module: nn.Module, inlined: frozenset[str], training: bool) -> None:
        self.reads: dict[tuple[str, str], Hashable] = {}
        self.refusal: NotProvenError | None = None
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
        copied: nn.Module = object.__new__(_recording_class(type(module)))  # type: ignore[arg-type]
        self._copies[id(module)] = copied
        values = vars(copied)
        values.update({name: _copied(value) for name, value in vars(module).items()})
        if path in self._inlined or isinstance(module, _CONTAINERS):
            for name, child in module._modules.items():
                if child is not None:
                    values["_modules"][name] = self._of(child, join(path, name))
        if path in self._inlined:
            values["training"] = self._training
        self.paths[id(copied)] = path
        self._modules.append((path, copied, {k: _copied(v) for k, v in values.items()}))
        return copied

    @contextlib.contextmanager
    def recording(self, active: bool = True) -> Iterator[None]:
        """Note every attribute that is read, refuse every change; active=False: do not."""
        global _active
        previous, _active = _active, self if active else None
        try:
            yield
        finally:
            _active = previous

    def refuse(self, text: str, path: str = "") -> NotProvenError:
        """The error to raise; it counts even if the forward catches it."""
        error = NotProvenError(text, path)
        self.refusal = self.refusal or error
        return error

    def read(self, module: nn.Module, name: str, cls: type) -> None:
        """Note that the attribute of a stand-in has been read.

        Both values of `training` are tried, and children are compared, of what is inlined.
        """
        path = self.paths.get(id(module))
        if path is None or (path in self._inlined and name in ("training", "_modules")):
            return
        try:
            value = self.reads[path, name] = reading(module, name, cls)
            _check_harmless(value)
        except NotProvenError as error:
            raise self.refuse(f"it reads the attribute {name}, which is {error}") from None

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


_active: StandIns | None = None


class _Recording(nn.Module):
    """A base class of stand-ins: other people's `__init_subclass__` is not for them."""

    def __init_subclass__(cls, **_: object) -> None:
        pass


@functools.lru_cache(maxsize=256)
def _recording_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class like `cls` whose instances report what is read of them, and refuse changes."""

    def get_attribute(self: nn.Module, name: str) -> object:
        if _active is not None:
            if name in _TENSOR_TABLES and is_foreign(sys._getframe(1)):
                raise _active.refuse(f"it looks into its {name}")
            if name in ("training", "_modules") or not _is_of_every_module(name):
                own = object.__getattribute__(self, "__dict__")
                if name in own or not _is_safe_to_inherit(getattr(cls, name, None)):
                    _active.read(self, name, cls)
        return cls.__getattribute__(self, name)

    def get_child(self: nn.Module, name: str) -> object:
        if _active is not None and not name.startswith("__"):
            is_child = name in object.__getattribute__(self, "__dict__")["_modules"]
            _active.read(self, "_modules" if is_child else name, cls)
        value = cls.__getattr__(self, name)
        if _active is not None and isinstance(value, nn.Module):
            return _active.reach(self, name, value)
        return value

    def change(self: nn.Module, name: str, *_: object) -> None:
        path = "" if _active is None else _active.paths.get(id(self), "")
        text = f"it changes the attribute {name}"
        raise NotProvenError(text, path) if _active is None else _active.refuse(text, path)

    namespace = {
        "__getattribute__": get_attribute,
        "__getattr__": get_child,
        "__setattr__": change,
        "__delattr__": change,
        "_resnet_fused_original": getattr(cls, "_resnet_fused_original", cls),
        "__module__": cls.__module__,
    }
    bases = (_Recording, cls)
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))


def _is_of_every_module(name: str) -> bool:
    return name.startswith("__") or name in _MODULE_ATTRIBUTES or hasattr(nn.Module, name)


def _is_safe_to_inherit(value: object) -> bool:
    """Whether an instance cannot have another one, or is not expected to."""
    is_method_of_torch = getattr(value, "__module__", "").startswith("torch.")
    return isinstance(value, property | None) or (callable(value) and is_method_of_torch)


def join(path: str, name: str) -> str:
    """The path of the module `name` in the one at `path`."""
    return f"{path}.{name}" if path and name else path or name


def _copied(value: Any) -> Any:
    """Containers copied, in containers too, over the same objects."""
    if type(value) in (tuple, list, set):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        copied = value.copy()
        for key, item in value.items():
            copied[key] = _copied(item)
        return copied
    return value.copy() if isinstance(value, list | set) else value


def _same(before: object, after: object) -> bool:
    """Whether the value is the same object, or a container of the same objects."""
    if isinstance(before, dict) and isinstance(after, dict):
        return _same([*before.keys(), *before.values()], [*after.keys(), *after.values()])
    if isinstance(before, tuple | list) and isinstance(after, tuple | list):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, set) and isinstance(after, set):
        return {*map(id, before)} == {*map(id, after)}
    return before is after
