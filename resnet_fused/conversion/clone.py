"""A second set of modules over the same tensors."""

import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def clone_modules(model: Model) -> Model:
    """A deep copy of the modules of `model`, whose parameters and buffers are those of `model`.

    References between modules lead to the copies. Hooks are kept; what they write to (recorders,
    lists in a partial, objects they are methods of) is shared, unless it is a module of the model.
    """
    shared: dict[int, Any] = {}
    inside = {id(module) for module in model.modules()}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            shared[id(module)] = module  # copying it would copy its tensors
            continue
        for tensor in _tensors(vars(module)):
            shared[id(tensor)] = tensor
        for hook in _hooks(module):
            for owner in _owners(hook):
                if id(owner) not in inside:
                    shared[id(owner)] = owner
    return copy.deepcopy(model, shared)


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in attributes: parameters, buffers and what else is kept, also in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in HOOK_TABLES:
        yield from getattr(module, name, {}).values()


def _owners(hook: object) -> Iterator[object]:
    """The objects that copying `hook` would copy."""
    if isinstance(hook, functools.partial):
        yield from _owners(hook.func)
        for argument in (*hook.args, *hook.keywords.values()):
            if not isinstance(argument, functools.partial):
                yield argument
            else:
                yield from _owners(argument)
    else:
        yield getattr(hook, "__self__", hook)
