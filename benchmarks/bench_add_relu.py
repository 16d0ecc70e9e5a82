"""add_relu on the layers of a ResNet: python benchmarks/bench_add_relu.py --device cpu."""

import sys

from operators import activation_bytes, benchmark

from resnet_fused.commands.cases import Case


def moved_bytes(case: Case, mode: str) -> int:
    """Forward reads two tensors and writes one; backward reads grad_out and out, writes one."""
    return 3 * activation_bytes(case)


if __name__ == "__main__":
    sys.exit(benchmark("add_relu", __doc__, moved_bytes))
