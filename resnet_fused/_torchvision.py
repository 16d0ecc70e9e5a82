"""Import torchvision also where its compiled operators cannot be loaded."""

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType | None:
    """torchvision, or None if it is not installed.

    A torchvision built for CUDA cannot load its operators next to a CPU-only torch, and then fails
    to import for the lack of two of them. Both are declared here, without an implementation, so
    that everything works except non-maximum suppression, which says that it has none.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or not spec.submodule_search_locations:
            return None
        if not _loads_operators(list(spec.submodule_search_locations)):
            _declare_operators()
    return importlib.import_module("torchvision")


def _loads_operators(package_folders: list[str]) -> bool:
    for name in ("_C_stable", "_C"):  # since and before torchvision 0.29
        extension = importlib.machinery.PathFinder.find_spec(name, package_folders)
        if extension is not None and extension.origin is not None:
            try:
                torch.ops.load_library(extension.origin)
            except OSError:
                continue
            return True
    return False


def _declare_operators() -> None:
    global _library
    if _library is None:
        # Kept alive: the declarations go when the library object does.
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
