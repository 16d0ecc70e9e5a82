"""Launchers of the compiled extension, one per operator."""

from collections.abc import Callable
from typing import Any

import torch

from resnet_fused import _extension

_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_CUDA_DTYPES, torch.float64)


def launcher(operator: str) -> Callable[..., Any]:
    """The extension's implementation of `operator`, for CPU and CUDA tensors.

    Raises AttributeError where the extension is not loaded.
    """
    overload: Callable[..., Any] = getattr(torch.ops.resnet_fused_native, operator).default
    return overload


def operators() -> Any:
    """The extension's operators."""
    return torch.ops.resnet_fused_native


def unsupported_on_cpu(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ CPU kernels cannot run for such tensors; None if they can."""
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    return _unsupported(dtype, _CPU_DTYPES)


def unsupported_on_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the CUDA C++ kernels cannot run for such tensors; None if they can."""
    if device_type != "cuda":
        return f"it runs on cuda tensors, got {device_type}"
    if _extension.load() and not _extension.built_with_cuda():
        return "the extension was built without CUDA"
    archs = _extension.cuda_archs()
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not any(_runs_on(arch, capability) for arch in archs):
            return (
                f"the extension has no code for compute capability {capability[0]}.{capability[1]}"
                f" (it was built for {', '.join(archs)}; see TORCH_CUDA_ARCH_LIST)"
            )
    return _unsupported(dtype, _CUDA_DTYPES)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch`, such as "8.0", "9.0a" or "10.0+PTX", runs on a GPU."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    if ptx:
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def _unsupported(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if not _extension.load():
        return f"the compiled extension is not available ({_extension.error()})"
    return None if dtype in dtypes else f"it does not take {dtype}"
