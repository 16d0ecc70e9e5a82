"""What the code of a forward touches besides its arguments, read off its instructions.

A forward that reads a global variable, a variable of an enclosing function, the clock or the class
of a tensor, that prints, warns, logs, or handles an exception, may do another thing at its next
call. None of this shows in a graph of tensors.
"""

import dis
import enum
import functools
import gc
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# Code that is trusted to give the same for the same arguments; it is not watched.
_TRUSTED = {"torch", "resnet_fused", "numpy", "math"}
_HARMLESS_LIBRARY = {
    *("abc", "builtins", "collections", "contextlib", "dataclasses", "enum", "functools"),
    *("itertools", "math", "numbers", "operator", "types", "typing"),
    *("_collections", "_collections_abc", "_functools", "_operator"),
}
_REFUSED_BUILTINS = {
    *("type", "id", "callable", "print", "input", "open", "exec", "eval", "compile"),
    *("globals", "locals", "vars", "dir", "breakpoint", "__import__"),
}
# Functions of PyTorch whose answers change, or are others for what stands for a tensor here.
_QUESTIONS = {
    *("is_compiling", "is_dynamo_compiling", "is_exporting", "is_in_onnx_export", "is_tensor"),
    *("get_default_dtype", "get_default_device", "is_inference_mode_enabled"),
}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_IMPORT = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]
_VALUES = (torch.dtype, torch.device, torch.memory_format, torch.layout, enum.Enum)


class Watch:
    """Refuses every call of a function whose code does such a thing, in this thread.

    refuse: makes the exception that is raised in place of the call. All of a function's code
    counts, as far as it is of that function: what it would call is looked at when it is called.
    What runs while a module is imported, which happens once, is let be.
    """

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        self._refuse = refuse
        self._imports = 0  # that are going on

    def __enter__(self) -> None:
        self._previous: Any = sys.getprofile()
        self._collects = gc.isenabled()
        gc.disable()  # its callbacks, and what it finalises, are not called by the forward
        sys.setprofile(self._on_event)

    def __exit__(self, *_: object) -> None:
        previous = self._previous
        sys.setprofile(previous if callable(previous) else None)
        if self._collects:
            gc.enable()
        if hasattr(previous, "enable"):  # cProfile is no function
            previous.enable()

    def _on_event(self, frame: types.FrameType, event: str, _: Any) -> None:
        if frame.f_code is _IMPORT:
            self._imports += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not self._imports and is_foreign(frame):
            for access in _accesses(frame.f_code):
                reason = _why_not(access, frame)
                if reason is not None:
                    raise self._refuse(reason)


def is_foreign(frame: types.FrameType) -> bool:
    """Whether the code that runs in `frame` is neither PyTorch's, nor ours, nor Python's own."""
    root = _root(frame.f_globals.get("__name__"))
    return root not in _TRUSTED and root not in sys.stdlib_module_names


def is_harmless(value: object) -> bool:
    """Whether a function or class gives the same for the same arguments, as far as can be told."""
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        return False
    if getattr(value, "__name__", "") in _REFUSED_BUILTINS | _QUESTIONS:
        return False
    return _is_harmless(getattr(value, "__module__", None) or "")


class _Access(NamedTuple):
    """kind: of an instruction; name: of what it accesses; chain: attributes read of that next."""

    kind: str
    name: str
    chain: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def _accesses(code: types.CodeType) -> tuple[_Access, ...]:
    """The instructions that access anything but arguments and local variables."""
    found = []
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SILENT]
    for position, instruction in enumerate(instructions):
        kind = _KINDS.get(instruction.opname)
        if kind == "is" and instructions[position - 1].opname == "LOAD_CONST":
            continue
        if _starts_bare_handler(instructions[position : position + 3]):
            kind = "except"
        if kind is not None:
            chain = tuple(_chain(instructions[position + 1 :]))
            found.append(_Access(kind, str(instruction.argval), chain))
    return tuple(found)


_KINDS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "STORE_GLOBAL": "change",
    "DELETE_GLOBAL": "change",
    "LOAD_DEREF": "closure",
    "LOAD_CLASSDEREF": "closure",
    "LOAD_FROM_DICT_OR_DEREF": "closure",
    "STORE_DEREF": "change of closure",
    "DELETE_DEREF": "change of closure",
    "IMPORT_NAME": "import",
    "IS_OP": "is",
    "CHECK_EXC_MATCH": "except",
    "JUMP_IF_NOT_EXC_MATCH": "except",
}


def _starts_bare_handler(instructions: list[dis.Instruction]) -> bool:
    """Whether an `except:` without a class begins here."""
    names = [instruction.opname for instruction in instructions]
    if sys.version_info < (3, 11):
        return names == ["POP_TOP"] * 3
    return names[:2] == ["PUSH_EXC_INFO", "POP_TOP"]


_SILENT = {"CACHE", "PRECALL", "EXTENDED_ARG", "NOP", "RESUME"}


def _chain(instructions: list[dis.Instruction]) -> Iterator[str]:
    for instruction in instructions:
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return
        yield instruction.argval


def _why_not(access: _Access, frame: types.FrameType) -> str | None:
    kind, name, chain = access
    if kind == "except":
        return "it handles exceptions"
    if kind == "is":
        return "it asks whether two values are the same object"
    if kind == "import":
        return None if _is_harmless(name) else f"it imports {name}"
    if kind == "change":
        return f"it changes the global variable {name}"
    if kind == "global":
        if name not in frame.f_globals:
            return f"it calls {name}" if name in _REFUSED_BUILTINS else None
        return _why_not_value(frame.f_globals[name], name, chain)
    if name not in frame.f_code.co_freevars or _is_local_to_caller(name, frame.f_back):
        return None
    if kind == "change of closure":
        return f"it changes the variable {name} of an enclosing function"
    return _why_not_value(frame.f_locals.get(name), name, chain, "of an enclosing function")


def _why_not_value(value: object, name: str, chain: tuple[str, ...], where: str = "") -> str | None:
    """Why the value of a variable outside of the forward, or what is read of it, may change."""
    if isinstance(value, types.ModuleType | type):
        source = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    elif isinstance(value, _FUNCTIONS) or type(value).__module__.startswith("torch."):
        source = getattr(value, "__module__", None) or ""
    elif isinstance(value, _VALUES):
        return None
    else:
        return f"it reads the variable {name}{f' {where}' if where else ', which is global'}"
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return f"it reads the variable {name}, a {type(value).__name__} outside of the module"
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        return f"it calls {name}, an autograd function of its own"
    asked = _QUESTIONS & {*chain, getattr(value, "__name__", "")}
    if asked and _root(source) in ("torch", ""):
        return f"it calls {min(asked)}"
    if not _is_harmless(source):
        return f"it uses {'.'.join((name, *chain))}"
    is_container = isinstance(value, types.ModuleType | type)
    if chain and is_container and _root(source) not in {*_TRUSTED, *sys.stdlib_module_names}:
        inner = inspect.getattr_static(value, chain[0], None)
        if not isinstance(inner, staticmethod | classmethod | property | None):
            return _why_not_value(inner, f"{name}.{chain[0]}", chain[1:], where)
    return None


def _is_harmless(source: str) -> bool:
    root = _root(source)
    return root in _HARMLESS_LIBRARY or root not in sys.stdlib_module_names


def _is_local_to_caller(name: str, frame: types.FrameType | None) -> bool:
    """Whether an enclosing function that is running has this variable, which lives no longer."""
    if name == "__class__":
        return True
    while frame is not None and _root(frame.f_globals.get("__name__")) != "resnet_fused":
        if name in frame.f_code.co_cellvars:
            return True
        frame = frame.f_back
    return False


def _root(name: object) -> str:
    return str(name or "").partition(".")[0]
