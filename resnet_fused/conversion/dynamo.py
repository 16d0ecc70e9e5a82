"""`torch.compile(model, backend="resnet_fused")`: fused operators in what Dynamo captures.

For models whose forward `fuse` cannot read: Dynamo takes the path that the data takes through it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import fx

from resnet_fused.conversion.captured import fuse_captured

NAME = "resnet_fused"
_REGISTRY = "torch._dynamo.backends.registry"
_log = logging.getLogger("resnet_fused")


def resnet_fused(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The graph that Dynamo has captured, its groups of layers fused, compiled by Inductor.

    What is inference stays as it is there: Inductor makes one pass of the same layers, and can
    fuse that with its neighbours. mode, options: as `torch.compile` takes them for Inductor. The
    option "inner" names another backend that compiles what is fused here, inference too, such as
    "eager", and gets the other options. How many groups were fused is logged at INFO. Raises
    ValueError on options that Inductor does not have.
    """
    rest = dict(options or {})
    inner = rest.pop("inner", "inductor")
    groups = fuse_captured(module, inference=inner != "inductor")
    counts = Counter(group.text for group in groups)
    which = ", ".join(f"{count} x {text}" for text, count in counts.items())
    _log.info("torch.compile: %d groups of layers fused%s", len(groups), which and f" ({which})")
    if inner == "inductor":
        return _compile(module, example_inputs, mode, rest)
    from torch._dynamo import lookup_backend

    arguments = {"mode": mode, "options": rest}
    given = {name: value for name, value in arguments.items() if value}
    return lookup_backend(inner)(module, list(example_inputs), **given)


def _compile(
    module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    patches = {name.replace("-", "_"): value for name, value in options.items()}
    unknown = patches.keys() - set(inductor.list_options())
    if unknown:
        raise ValueError(
            f"{NAME}: options must be 'inner' or among those of Inductor, got"
            f" {', '.join(map(repr, sorted(unknown)))}"
            " (torch._inductor.list_options() lists what Inductor has)"
        )
    if mode is not None:
        patches = inductor.list_mode_options(mode) | patches
    compiled: Callable[..., Any] = compile_fx(module, inputs, config_patches=patches)  # type: ignore[assignment]
    return compiled


def register_backend() -> None:
    """Make the name known to `torch.compile`, without importing Dynamo, which takes seconds.

    For source trees: an installed package has an entry point, which Dynamo reads by itself.
    """
    registry = sys.modules.get(_REGISTRY)
    if registry is None:
        sys.meta_path.insert(0, _OnImport())
    elif NAME not in registry.list_backends(None):
        _register(registry)


def _register(registry: ModuleType) -> None:
    registry.register_backend(resnet_fused, name=NAME)


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the backend behind the import of Dynamo's registry."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)
