"""Which implementation of an operator runs: the user's wish, else a static rule.

The choice is made on real tensors, below the dispatcher, so that tracing never sees it and
switching a backend recompiles nothing.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import (
    _extension,
    cuda_chains,
    cuda_convolutions,
    native,
    onednn,
    reference,
    triton_kernels,
)

NAMES = ("reference", "cpu", "cuda", "triton", "cudnn")
ENVIRONMENT_VARIABLE = "RESNET_FUSED_BACKEND"


class _Implementation(NamedTuple):
    resolve: Callable[[], Callable[..., Any]]  # called once, when first chosen
    unsupported: Callable[[str, torch.dtype], str | None]  # reason, or None where it can run
    by_rule: bool = True  # whether the static rule may choose it; else it runs when asked for


def _supports_everything(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _native(operator: str, *backends: str) -> dict[str, _Implementation]:
    unsupported = {"cpu": native.unsupported_on_cpu, "cuda": native.unsupported_on_cuda}
    resolve = functools.partial(native.launcher, operator)
    return {name: _Implementation(resolve, unsupported[name]) for name in backends}


def _onednn(operator: str) -> dict[str, _Implementation]:
    return {"cpu": _Implementation(lambda: getattr(onednn, operator), onednn.unsupported)}


def _triton(operator: str, by_rule: bool = True) -> dict[str, _Implementation]:
    resolve = functools.partial(triton_kernels.launcher, operator)
    return {"triton": _Implementation(resolve, triton_kernels.unsupported, by_rule)}


def _cuda_when_asked(operator: str, module: Any) -> dict[str, _Implementation]:
    """Kernels whose launchers have a Python half, in `module`; no rule chooses them untimed."""
    resolve = functools.partial(module.launcher, operator, native.operators)
    return {"cuda": _Implementation(resolve, native.unsupported_on_cuda, by_rule=False)}


def _reference(operator: str) -> dict[str, _Implementation]:
    return {
        "reference": _Implementation(lambda: getattr(reference, operator), _supports_everything)
    }


def _elementwise(operator: str) -> dict[str, _Implementation]:
    return _native(operator, "cpu", "cuda") | _triton(operator) | _reference(operator)


def _convolution(operator: str, on_cpu: bool = False) -> dict[str, _Implementation]:
    """No rule chooses our own over cuDNN's as long as nobody has timed them."""
    accelerated = _onednn(operator) if on_cpu else {}
    return (
        accelerated
        | _cuda_when_asked(operator, cuda_convolutions)
        | _triton(operator, by_rule=False)
        | _reference(operator)
    )


def _chain(operator: str) -> dict[str, _Implementation]:
    return _cuda_when_asked(operator, cuda_chains) | _reference(operator)


# Per operator its implementations, in the order in which the static rule tries them.
_IMPLEMENTATIONS: dict[str, dict[str, _Implementation]] = {
    "add_relu": _elementwise("add_relu"),
    "add_relu_backward": _elementwise("add_relu_backward"),
    "bn_relu": _elementwise("bn_relu"),
    "bn_relu_apply": _elementwise("bn_relu_apply"),
    "bn_relu_backward": _elementwise("bn_relu_backward"),
    "bn_relu_backward_sums": _elementwise("bn_relu_backward_sums"),
    "bn_relu_backward_apply": _elementwise("bn_relu_backward_apply"),
    "bn_statistics": _elementwise("bn_statistics"),
    "bn_relu_max_pool": _elementwise("bn_relu_max_pool"),
    "bn_relu_max_pool_backward_sums": _elementwise("bn_relu_max_pool_backward_sums"),
    "bn_relu_max_pool_backward_apply": _elementwise("bn_relu_max_pool_backward_apply"),
    "conv_bn_relu": _convolution("conv_bn_relu", on_cpu=True),
    "conv_bn_relu_": _convolution("conv_bn_relu_", on_cpu=True),
    "conv_bn_relu_backward": _convolution("conv_bn_relu_backward", on_cpu=True),
    "conv_projection_relu": _chain("conv_projection_relu"),
    "bottleneck_tail": _chain("bottleneck_tail"),
    "bottleneck_roll": _chain("bottleneck_roll"),
    "bottleneck_block": _chain("bottleneck_block"),
    "conv_stats": _convolution("conv_stats"),
    "conv_dgrad": _convolution("conv_dgrad"),
    "conv_wgrad": _convolution("conv_wgrad"),
}
OPERATORS = tuple(_IMPLEMENTATIONS)

_EXTENSION_LOADED = _extension.load()
_wish: str | None = None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on one backend, forward and backward.

    name: one of "reference", "cpu", "cuda", "triton", "cudnn". Raises ValueError on another name;
    an operator which that backend cannot run for the tensors at hand raises RuntimeError when
    it is called. Takes precedence over the environment variable RESNET_FUSED_BACKEND. Holds for
    the whole process, like the flags of `torch.backends`: autograd may run the backward in other
    threads.
    """
    global _wish
    previous, _wish = _wish, _checked(name, "backend")
    try:
        yield
    finally:
        _wish = previous


def choose(operator: str, x: Tensor) -> Callable[..., Any]:
    """The implementation of `operator` for tensors with the device and dtype of `x`.

    Raises RuntimeError where the backend asked for by `backend` or RESNET_FUSED_BACKEND cannot run
    it, with the reason, and ValueError where RESNET_FUSED_BACKEND is not the name of a backend.
    """
    device_type = "cpu" if x.is_cpu else x.device.type
    return _choose(operator, device_type, x.dtype, _wish or _environment())


def chosen(operator: str, device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend whose implementation `choose` returns for such tensors; raises as it."""
    return _chosen(operator, device_type, dtype, _wish or _environment())


def available(operator: str, device_type: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that can run `operator`, the static rule's choice first."""
    implementations = _IMPLEMENTATIONS[operator].items()
    names = [name for name, each in implementations if each.unsupported(device_type, dtype) is None]
    return sorted(names, key=lambda name: not _IMPLEMENTATIONS[operator][name].by_rule)


def has(name: str, operator: str) -> bool:
    """Whether backend `name` has an implementation of `operator`, wherever it may run."""
    return name in _IMPLEMENTATIONS[operator]


def is_accelerated(operator: str, x: Tensor) -> bool:
    """Whether something faster than plain PyTorch runs `operator` on tensors like `x`.

    True also where a backend was asked for: then that one runs, whatever its speed. Traced code
    asks for the default: a wish that changes later must not need a recompilation.
    """
    if torch.compiler.is_compiling():
        return x.is_cpu and _EXTENSION_LOADED
    if _wish or _environment():
        return True
    return _is_accelerated(operator, x.device.type, x.dtype)


def is_implemented(operator: str) -> bool:
    """Whether the backend asked for has `operator`; True where none was asked for."""
    if torch.compiler.is_compiling():
        return True
    wish = _wish or _environment()
    return wish is None or has(wish, operator)


@functools.cache
def _is_accelerated(operator: str, device_type: str, dtype: torch.dtype) -> bool:
    if device_type == "cpu" and not _extension.load():
        _warn_slow()
    return available(operator, device_type, dtype)[0] != "reference"


@functools.cache
def _choose(
    operator: str, device_type: str, dtype: torch.dtype, wish: str | None
) -> Callable[..., Any]:
    name = _chosen(operator, device_type, dtype, wish)
    if wish is None and name == "reference" and device_type == "cpu" and not _extension.load():
        _warn_slow()
    return _IMPLEMENTATIONS[operator][name].resolve()


@functools.cache
def _chosen(operator: str, device_type: str, dtype: torch.dtype, wish: str | None) -> str:
    if wish is None:
        return available(operator, device_type, dtype)[0]
    if not has(wish, operator):
        reason = f"it has no implementation of {operator}"
    else:
        reason = _IMPLEMENTATIONS[operator][wish].unsupported(device_type, dtype) or ""
    if reason:
        raise RuntimeError(
            f"{operator}: backend {wish!r} was asked for, but {reason}"
            f" (available here: {', '.join(available(operator, device_type, dtype))})"
        )
    return wish


@functools.cache
def _warn_slow() -> None:
    warnings.warn(
        f"resnet_fused: the compiled extension is not available ({_extension.error()}); results are"
        " the same but slower. `python -m resnet_fused doctor` says how to repair this.",
        stacklevel=2,
    )


@functools.cache
def _environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name, ENVIRONMENT_VARIABLE) if name else None


def _checked(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: must be one of {', '.join(NAMES)}, got {name!r}")
    return name
