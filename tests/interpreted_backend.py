"""One more backend for the tests: the Triton kernels, run on CPU tensors by Triton's interpreter.

It exists in processes that were started with TRITON_INTERPRET=1, if there is Triton.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, triton_kernels

NAME = "interpreted"
ENABLED = os.environ.get("TRITON_INTERPRET") == "1" and triton_kernels.unavailable() is None
# For modules that call launchers, where they are skipped.
REASON = triton_kernels.unavailable() or "runs with TRITON_INTERPRET=1 (make test)"
MULTIPROCESSORS = 5  # few, so that small tensors take more than one turn
CAPABILITIES = {"ampere": (8, 0), "hopper": (9, 0), "blackwell": (10, 0)}
_capability = CAPABILITIES["hopper"]


def install() -> None:
    """Let `resnet_fused.backend("interpreted")` choose it; nothing else ever does."""
    if not ENABLED or NAME in backends.NAMES:
        return
    import interpretation

    from resnet_fused.triton_kernels import device

    interpretation.install()
    replacements = {
        "architecture": lambda _: device.of_capability(_capability, MULTIPROCESSORS),
        "dot_precision": lambda _: "tf32x3",  # eager on a CPU has no TF32 to compare with
        "inline_assembly": lambda: False,
    }
    for name, replacement in replacements.items():
        setattr(device, name, replacement)
    backends.NAMES = (*backends.NAMES, NAME)
    for operator, implementations in backends._IMPLEMENTATIONS.items():
        if "triton" in implementations:
            implementations[NAME] = backends._Implementation(_resolve(operator), _unsupported)
    for module in (
        "resnet_fused.ops.bn_relu",
        "resnet_fused.nn.block_function",
        "resnet_fused.nn.normalization",
    ):
        _replace_keeps_output(sys.modules[module])


@contextlib.contextmanager
def generation(name: str) -> Iterator[None]:
    """Inside, kernels are chosen for "ampere", "hopper" or "blackwell"."""
    global _capability
    previous, _capability = _capability, CAPABILITIES[name]
    try:
        yield
    finally:
        _capability = previous


def _resolve(operator: str) -> Callable[[], Callable[..., Any]]:
    return lambda: on_uninitialised_memory(triton_kernels.launcher(operator))


def on_uninitialised_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with NaN in every tensor that it allocates without writing it."""

    def run(*arguments: Any, **named: Any) -> Any:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # which fills new memory
        try:
            return function(*arguments, **named)
        finally:
            torch.use_deterministic_algorithms(before)

    return run


def _unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    if dtype not in triton_kernels.DTYPES:
        return f"it does not take {dtype}"
    return triton_kernels.unavailable()


def _replace_keeps_output(module: Any) -> None:
    original = module.keeps_output

    def keeps_output(x: Tensor) -> bool:
        """As on a GPU, where this backend was asked for."""
        return original(x) and backends._wish != NAME

    module.keeps_output = keeps_output
