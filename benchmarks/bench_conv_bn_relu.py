"""conv_bn_relu on the layers of a ResNet: python benchmarks/bench_conv_bn_relu.py --device cpu."""

import math
import sys

import torch
from operators import benchmark

from resnet_fused.commands.cases import Case


def moved_bytes(case: Case, mode: str) -> int:
    """Forward reads x, weight and residual and writes out; backward moves all of it twice."""
    tensors = case.tensors
    inputs = [tensors[name].nbytes for name in ("x", "weight", "residual") if name in tensors]
    out = math.prod(_out_shape(case)) * tensors["x"].element_size()
    return (sum(inputs) + out) * (1 if mode == "forward" else 2)


def flop(case: Case, mode: str) -> int:
    """Two per multiply-add; backward has two convolutions of the same cost."""
    per_output = 2 * case.tensors["weight"][0].numel()
    return math.prod(_out_shape(case)) * per_output * (1 if mode == "forward" else 2)


def _out_shape(case: Case) -> torch.Size:
    with torch.device("meta"):
        tensors = [torch.empty_like(tensor, device="meta") for tensor in case.tensors.values()]
        return case.before_relu(*tensors).shape


if __name__ == "__main__":
    sys.exit(benchmark("conv_bn_relu", __doc__, moved_bytes, flop))
