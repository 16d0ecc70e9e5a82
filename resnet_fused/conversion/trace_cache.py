"""Traces of modules that are alike, made once.

Networks have many blocks of one class. What a forward computes depends on the classes of the
modules in it and on the attributes that it was seen to read: the same that a fused module checks at
each call. Where both are the same, so is the trace.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import nn

from resnet_fused.conversion.layers import hook_on
from resnet_fused.conversion.stand_ins import NotProvenError, frozen, original_class
from resnet_fused.conversion.tracing import Trace, Traces

Found = TypeVar("Found", Trace, Traces)


class TraceCache:
    """The traces, and the failures, of one survey."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[Trace | Traces]] = {}
        self._failed: dict[Hashable, NotProvenError] = {}
        self._structures: dict[nn.Module, Hashable] = {}

    def get(self, kind: Hashable, module: nn.Module, make: Callable[[], Found]) -> Found:
        """make(), or what an earlier call made of a module that is like this one.

        kind: what `make` depends on besides the module. Raises NotProvenError as `make` does.
        """
        if module not in self._structures:
            self._structures[module] = _structure(module)
        key = (kind, self._structures[module])
        for found in self._found.get(key, ()):
            attributes = _first(found).attributes
            if all(a.holds(module.get_submodule(a.path)) for a in attributes):
                return _about(found, module)  # type: ignore[return-value]
        failure = (key, _attributes(module))
        if failure in self._failed:
            raise self._failed[failure]
        try:
            made = make()
        except NotProvenError as error:
            self._failed[failure] = error
            raise
        self._found.setdefault(key, []).append(made)
        return made


def _structure(module: nn.Module) -> Hashable:
    """Classes, names and hooks of the modules in it, and which of them are the same one."""
    number: dict[int, int] = {}
    return tuple(
        (
            *(path, original_class(inner), number.setdefault(id(inner), len(number))),
            *("forward" in vars(inner), hook_on(inner) is None, getattr(inner, "inplace", None)),
        )
        for path, inner in module.named_modules(remove_duplicate=False)
    )


def _attributes(module: nn.Module) -> Hashable:
    """The plain attributes of the modules in it; by identity where they may change."""
    return tuple(
        (path, name, _constant(value))
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if not name.startswith("_")
    )


def _constant(value: object) -> Hashable:
    try:
        return frozen(value)
    except NotProvenError:
        return id(value)


def _first(found: Trace | Traces) -> Trace:
    return found if isinstance(found, Trace) else found.training


def _about(found: Trace | Traces, module: nn.Module) -> Trace | Traces:
    """The same of another module."""
    if isinstance(found, Trace):
        return found._replace(module=module)
    return Traces(*(each._replace(module=module) for each in found))
