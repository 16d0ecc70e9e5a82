"""How an operator enters PyTorch: schema, kernel, fake kernel, autograd, vmap and autocast."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from resnet_fused import backends
from resnet_fused.ops import _vmap

LIBRARY = torch.library.Library("resnet_fused", "DEF")
Operator = torch._ops.OpOverload
# Each operator by PyTorch's own.
DECOMPOSITIONS: dict[Operator, Callable[..., Any]] = {}


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any],
    images: tuple[int, ...] = (),
    updated: _vmap.Updated = _vmap.updates_nothing,
) -> Operator:
    """Define `resnet_fused::<schema>` and return its overload.

    kernel runs on real tensors, fake gives outputs without data, differentiable(*args) is called
    instead of the kernel where a gradient is needed. images: positions of the activations, if each
    image's result depends on that image alone. updated(*args): positions of the arguments that a
    call writes to. The schema has no defaults: a call names every argument, because the dispatcher
    drops trailing arguments equal to a default.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    LIBRARY.define(schema, tags=tags)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=LIBRARY)
    overload: Operator = getattr(torch.ops.resnet_fused, name).default
    DECOMPOSITIONS[overload] = functools.partial(in_plain_pytorch, kernel)
    rule = functools.partial(_vmap.rule, overload, images, updated)
    torch.library.register_vmap(f"resnet_fused::{name}", rule, lib=LIBRARY)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and _needs_gradient(args):
            return differentiable(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return overload


def autocast(overload: Operator, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Under autocast, call `overload` with `cast(dtype, *args)` in place of its arguments."""
    for device_type in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

        def kernel(*args: Any, device_type: str = device_type, key: Any = key) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*cast(torch.get_autocast_dtype(device_type), *args))

        LIBRARY.impl(overload._schema.name.partition("::")[2], kernel, key.name)


def call(overload: Operator, *args: Any) -> Any:
    """`overload(*args)`, without the step through autograd where no gradient can be needed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return overload(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(overload._schema.name.partition("::")[2], args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def in_plain_pytorch(kernel: Callable[..., Any], *args: Any) -> Any:
    """What a kernel computes, by PyTorch's own operators alone, which any transform can follow."""
    with backends.backend("reference"):
        return kernel(*args)


def as_node(node: type[torch.autograd.Function], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For `define`: one autograd node; under torch.func, which cannot take it, plain PyTorch."""

    def differentiable(*args: Any) -> Any:
        if torch._C._functorch.maybe_current_level() is not None:
            # In NCHW, because vmap knows no other memory format.
            images = (isinstance(a, Tensor) and a.dim() == 4 for a in args)
            args = tuple(a.contiguous() if i else a for a, i in zip(args, images, strict=True))
            return in_plain_pytorch(kernel, *args)
        return node.apply(*args)

    return differentiable


def refuse_gradient(operator: str, remedy: str) -> Callable[..., Any]:
    """For `define`: the operator has no gradient, and says so."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"{operator}: an argument requires a gradient, but this operator has none ({remedy})"
        )

    return refuse


def _refuse_tangents(operator: str, args: tuple[Any, ...]) -> None:
    """Kernels would drop them: an error is better than a derivative of zero."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"{operator}: forward-mode derivatives are not implemented (use reverse mode)"
            )


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)
