"""Kernels in Triton: one file per operator, kernel and launcher.

Importing this package does not import Triton: its modules do, when an operator first needs one.
"""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Operators that live in the file of another.
_PARTNERS = re.compile(r"(_backward|_backward_sums|_backward_apply|_apply|_)$")


def launcher(operator: str) -> Callable[..., Any]:
    """The Triton implementation of `operator`.

    Raises ImportError where Triton is not installed.
    """
    file = _PARTNERS.sub("", operator)
    module = importlib.import_module(f"resnet_fused.triton_kernels.{file}")
    function: Callable[..., Any] = getattr(module, operator)
    return function


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run for such tensors; None if they can."""
    if device_type != "cuda":
        return f"it runs on cuda tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it does not take {dtype}"
    return unavailable() or _unsupported_devices()


@functools.cache
def unavailable() -> str | None:
    """Why Triton cannot be used at all; None if it can."""
    try:
        version: str = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "Triton is not installed"
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def _unsupported_devices() -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None
