"""Operators that write to their arguments, in exported programs, which do not."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from resnet_fused.ops._registration import DECOMPOSITIONS, LIBRARY, Operator, define
from resnet_fused.ops._vmap import Updated


def functionalise(overload: Operator, functional: Callable[..., Any]) -> None:
    """Let export compute `overload` by functional(*args): operators without mutation and `copy_`.

    PyTorch would wrap the operator instead, and no table of decompositions reaches into the wrap.
    Compilers, which undo the wrap, still get it.
    """
    DECOMPOSITIONS[overload] = functional

    def rule(
        mode: FunctionalTensorMode, func: Operator, types: Any, args: Any, kwargs: Any = None
    ) -> Any:
        if not torch.compiler.is_exporting():
            return mode.__torch_dispatch__(func, types, args, kwargs)
        with mode:
            return functional(*args)

    name = overload._schema.name
    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=LIBRARY)


def define_functional(
    overload: Operator,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    updated: Updated,
) -> None:
    """Define `<name>_functional`, which returns updates behind its outputs, and export by it.

    Of an argument that `overload` may write to: the new value, empty where it is not updated.
    kernel, fake, updated: as in `define`, those of `overload`. plain(updates, *args): what the
    kernel returns, in plain PyTorch, with the updates appended to a list in place of being made.
    """
    arguments = enumerate(overload._schema.arguments)
    written = [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]

    def returned(outputs: Any, updates: dict[int, Any], like: Tensor) -> tuple[Tensor, ...]:
        return (*outputs, *(updates[i] if i in updates else like.new_empty(0) for i in written))

    def on_copies(run: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        copies = {i: args[i].clone() for i in updated(*args)}
        outputs = run(*(copies.get(i, arg) for i, arg in enumerate(args)))
        return returned(outputs, copies, args[0])

    def without_writing(*args: Any) -> tuple[Tensor, ...]:
        updates: list[Tensor] = []
        outputs = plain(updates, *args)
        return returned(outputs, dict(zip(updated(*args), updates, strict=True)), args[0])

    def with_writing(*args: Any) -> tuple[Tensor, ...]:
        outputs = functional(*args)
        for i in updated(*args):
            args[i].copy_(outputs[written.index(i) - len(written)])
        return tuple(outputs[: -len(written)])

    functional = define(
        _functional_schema(overload, written),
        functools.partial(on_copies, kernel),
        functools.partial(on_copies, fake),
        functools.partial(on_copies, overload),
    )
    DECOMPOSITIONS[functional] = without_writing
    functionalise(overload, with_writing)


def _functional_schema(overload: Operator, written: list[int]) -> str:
    arguments, _, results = str(overload._schema).partition(" -> ")
    arguments = re.sub(r"\(\w!\)", "", arguments.partition("(")[2])
    names = [overload._schema.arguments[i].name for i in written]
    updates = "".join(f", Tensor new_{name}" for name in names)
    return f"{_name(overload)}_functional({arguments} -> {results[:-1]}{updates})"


def _name(overload: Operator) -> str:
    return overload._schema.name.partition("::")[2]
