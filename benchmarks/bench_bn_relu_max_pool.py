"""bn_relu_max_pool on a ResNet's stem: python benchmarks/bench_bn_relu_max_pool.py --device cpu."""

import sys

from operators import activation_bytes, benchmark

from resnet_fused.commands.cases import Case


def moved_bytes(case: Case, mode: str) -> int:
    """The statistics read x, then x is read again and the pooled output and its places written.

    Backward: the sums read the gradient, the places and, spread over it, a part of x, which is
    counted as if it were the pooled size; the pass that applies reads all three and writes grad_x.
    """
    x = activation_bytes(case)
    pooled = case.tensors["x"].numel() // _shrinkage(case)
    item_size = case.tensors["x"].element_size()
    if mode == "forward":
        return 2 * x + pooled * (item_size + 1)
    return 2 * x + pooled * (2 * (item_size + 1) + item_size)


def _shrinkage(case: Case) -> int:
    """Pixels of x for each pixel of the output."""
    height, width = case.label.rpartition("/")[2].split("x")
    return int(height) * int(width)


if __name__ == "__main__":
    sys.exit(benchmark("bn_relu_max_pool", __doc__, moved_bytes))
