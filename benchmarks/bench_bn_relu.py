"""bn_relu on the layers of a ResNet: python benchmarks/bench_bn_relu.py --device cpu."""

import sys

from operators import activation_bytes, benchmark, in_training

from resnet_fused.commands.cases import Case


def moved_bytes(case: Case, mode: str) -> int:
    """Tensors of the size of x that pass through memory, and the bits of a ReLU's mask."""
    passed = _forward(case) if mode == "forward" else _backward(case)
    return passed * activation_bytes(case) + _mask_bytes(case, mode)


def _forward(case: Case) -> int:
    """In training what is normalised is read twice: for the statistics, and to apply them."""
    residual, dual = _residual(case)
    reads = (2 if in_training(case) else 1) * (2 if dual else 1)
    return reads + (residual and not dual) + 1


def _backward(case: Case) -> int:
    """A reduction and, in training, a pass that applies it; gradients of x and residual.

    The sign of the ReLU behind a plain residual comes from a mask on a GPU, where the pass that
    applies reads the gradient of the residual instead, and from the output on a CPU. Running
    statistics need no second pass.
    """
    residual, dual = _residual(case)
    reads = 2 + dual  # grad_out, x, and the residual with its own batch norm
    if residual and not _on_gpu(case):
        reads += 1  # the output
    return (2 if in_training(case) else 1) * reads + 1 + residual


def _mask_bytes(case: Case, mode: str) -> int:
    """One bit per element, written by the forward of whoever calls the backward later."""
    residual, dual = _residual(case)
    kept = mode == "backward" or in_training(case)
    exists = _on_gpu(case) and residual and not dual and kept
    return case.tensors["x"].numel() // 8 if exists else 0


def _on_gpu(case: Case) -> bool:
    return case.tensors["x"].is_cuda


def _residual(case: Case) -> tuple[bool, bool]:
    """Whether there is a residual, and whether it has a batch norm."""
    return "residual" in case.tensors, "residual_weight" in case.tensors


if __name__ == "__main__":
    sys.exit(benchmark("bn_relu", __doc__, moved_bytes))
