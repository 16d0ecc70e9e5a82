"""bn_relu on the layers of a ResNet: python benchmarks/bench_bn_relu.py --device cpu."""

import sys

from operators import activation_bytes, benchmark

from resnet_fused.commands.cases import Case


def moved_bytes(case: Case, mode: str) -> int:
    """Tensors of the size of x that pass through memory.

    Forward in training reads what is normalised twice (statistics, then apply) and writes out;
    backward does its reduction and its apply over the same tensors, then writes the gradients.
    """
    training, residual = "training" in case.label, "residual" in case.tensors
    dual = "residual_weight" in case.tensors
    if mode == "forward":
        reads = (2 if training else 1) * (2 if dual else 1) + (residual and not dual)
        return (reads + 1) * activation_bytes(case)
    read_per_pass = 2 + residual + dual  # grad_out and x; out for its sign; the other branch
    passes = 2 if training else 1
    return (passes * read_per_pass + 1 + residual) * activation_bytes(case)


if __name__ == "__main__":
    sys.exit(benchmark("bn_relu", __doc__, moved_bytes))
