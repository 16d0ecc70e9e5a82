"""The operators as PyTorch's own: for programs that leave this library behind."""

from collections.abc import Callable
from typing import Any

from resnet_fused.ops._registration import DECOMPOSITIONS, Operator


def decompositions() -> dict[Operator, Callable[..., Any]]:
    """Every operator of this library, and a function that computes it by ATen operators alone.

    For `ExportedProgram.run_decompositions`, whose result needs nothing of this library: to export
    to ONNX, to compile ahead of time, to run where it is not installed. The formulas are those of
    `resnet_fused.reference`, layouts and checks those of the operators.
    """
    return dict(DECOMPOSITIONS)
