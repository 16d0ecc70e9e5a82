"""One more backend for the tests: the CUDA kernels, run on CPU tensors by csrc/emulator."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import emulation
import torch
from torch import Tensor

from resnet_fused import backends, cuda_chains, cuda_convolutions, native, precision

NAME = "emulated"


def install() -> None:
    """Let `resnet_fused.backend("emulated")` choose it; nothing else ever does."""
    if NAME in backends.NAMES:
        return
    backends.NAMES = (*backends.NAMES, NAME)
    for operator, implementations in backends._IMPLEMENTATIONS.items():
        if "cuda" in implementations:
            implementations[NAME] = backends._Implementation(_resolve(operator), _unsupported)
    for module in (
        "resnet_fused.ops.bn_relu",
        "resnet_fused.nn.block_function",
        "resnet_fused.nn.normalization",
    ):
        sys.modules[module].keeps_output = _keeps_output
    for module in (cuda_convolutions, cuda_chains):
        module.uses_tf32 = _uses_tf32


def _resolve(operator: str) -> Callable[[], Callable[..., Any]]:
    for module in (cuda_convolutions, cuda_chains):
        if operator in module.OPERATORS:
            return functools.partial(module.launcher, operator, emulation.library)
    return lambda: getattr(emulation.library(), operator).default


def _unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    if dtype not in native._CUDA_DTYPES:
        return f"it does not take {dtype}"
    return emulation.unavailable()


def _uses_tf32(x: Tensor) -> bool:
    """Eager on a CPU has no TF32 to compare with."""
    return x.is_cuda and precision.uses_tf32(x)


def _keeps_output(x: Tensor) -> bool:
    """As on a GPU, where this backend was asked for."""
    return x.is_cpu and backends._wish != NAME
