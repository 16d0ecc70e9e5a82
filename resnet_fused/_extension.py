"""Loads the compiled extension, and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TypedDict

import torch

FILE = Path(__file__).with_name("_C.abi3.so")
OLDEST_TORCH = (2, 11)


class BuildInfo(TypedDict):
    """How the loaded extension was built, and what it chose on this CPU.

    convolutions: dtypes that direct convolutions have inner loops for.
    """

    cuda: bool
    archs: list[str]
    compiler: str
    isa: str
    convolutions: list[str]


def load() -> bool:
    """Load the extension if that has not been tried yet. Never raises: see `error`."""
    return error() is None


@functools.cache
def error() -> str | None:
    """Why the extension is not loaded, in one clause; None when it is."""
    if not FILE.is_file():
        return "this installation was built without it: install again with a C++ compiler in reach"
    version = torch.__version__
    if _release(version) < OLDEST_TORCH:
        return f"it needs torch 2.11 or newer, got {version}"
    try:
        torch.ops.load_library(str(FILE))
    except (OSError, RuntimeError, ImportError) as failure:
        reason = str(failure).replace(f"{FILE}: ", "")
        return f"it does not load under torch {version}: {reason}; install resnet_fused again"
    return None


@functools.cache
def build_info() -> BuildInfo | None:
    """What the loaded extension says of itself; None when it is not loaded."""
    if not load():
        return None
    info: BuildInfo = json.loads(torch.ops.resnet_fused_native.build_info())
    return info


def built_with_cuda() -> bool:
    """Whether the extension is loaded and contains CUDA kernels."""
    info = build_info()
    return info is not None and info["cuda"]


def cuda_archs() -> tuple[str, ...]:
    """Compute capabilities the CUDA kernels were compiled for, e.g. ("8.0", "9.0a", "10.0")."""
    info = build_info()
    return tuple(info["archs"]) if info is not None else ()


def _release(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)
