"""Kernels over several layers of a Bottleneck: python benchmarks/bench_chains.py --device cuda.

Against the layers that they replace, one after the other, each with its batch norm, shortcut and
ReLU, by cuDNN, Triton or CUDA kernels ("layers_...").
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from operators import Provider, benchmark, need_cudnn, refuse_wrong_convolution
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import backends, ops
from resnet_fused.commands import networks
from resnet_fused.commands.baselines import UnavailableError
from resnet_fused.commands.cases import Case
from resnet_fused.commands.chain_cases import blocks, chain_cases

# convolve(x, i, residual, relu, padding, stride): the layer whose weight, scale and shift are the
# tensors from the i-th on.
Convolve = Callable[..., Tensor]


def find(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Each operator on every distinct Bottleneck of the network; nothing is computed."""
    model = copy.deepcopy(networks.build_pair(arguments.model).eager).eval().to("meta")
    images = torch.empty(arguments.batch, 3, arguments.size, arguments.size, device="meta")
    for case in chain_cases(blocks(model, images), dtype, device):
        # A roll's first result alone would not be all of the work.
        if not case.label.endswith(", output"):
            yield case


def moved_bytes(case: Case, mode: str) -> int:
    """Everything given is read, and every result written."""
    results = {
        "bottleneck_tail": ("residual",),
        "bottleneck_roll": ("residual", "y1"),
        "bottleneck_block": ("x",),
    }
    given = sum(tensor.nbytes for tensor in case.tensors.values())
    if case.operator == "conv_projection_relu":
        out = pixels(case) * case.tensors["weight"].size(0) * case.tensors["y"].element_size()
        return given + out
    return given + sum(case.tensors[like].nbytes for like in results[case.operator])


def flop(case: Case, mode: str) -> int:
    """Two per multiply-add."""
    weights = [tensor for name, tensor in case.tensors.items() if "weight" in name]
    return 2 * pixels(case) * sum(weight.numel() for weight in weights)


def pixels(case: Case) -> int:
    """Of the output."""
    like = next(t for name, t in case.tensors.items() if name in ("y", "y1", "x"))
    return like.numel() // like.size(1)


def layer_by_layer(case: Case, convolve: Convolve) -> Callable[..., Tensor]:
    """The last result of the operator from its tensors."""

    def tail(y1: Tensor, residual: Tensor, first: int) -> Tensor:
        y2 = convolve(y1, first, padding=1)
        return convolve(y2, first + 3, residual)

    def projection(y: Tensor, x: Tensor) -> Tensor:
        stride = -(-x.size(2) // y.size(2))
        return convolve(y, 1, convolve(x, 5, relu=False, stride=stride))

    functions: dict[str, Callable[..., Tensor]] = {
        "bottleneck_tail": lambda *t: tail(*t[:2], 2),
        "bottleneck_roll": lambda *t: convolve(tail(*t[:2], 2), 8),
        "bottleneck_block": lambda *t: tail(convolve(t[0], 1), t[0], 4),
        "conv_projection_relu": lambda *t: projection(t[0], t[4]),
    }
    return functions[case.operator]


def by_backend(backend: str, case: Case, dtype: torch.dtype) -> Provider:
    """Layers by conv_bn_relu on one backend."""
    device_type = next(iter(case.tensors.values())).device.type
    if backend not in backends.available("conv_bn_relu", device_type, dtype):
        raise UnavailableError(f"{backend} does not run conv_bn_relu on {device_type} in {dtype}")
    layers = list(case.tensors.values())

    def convolve(
        x: Tensor,
        i: int,
        residual: Tensor | None = None,
        relu: bool = True,
        padding: int = 0,
        stride: int = 1,
    ) -> Tensor:
        return ops.conv_bn_relu(x, *layers[i : i + 3], residual, relu, stride, padding)

    provider = Provider(layer_by_layer(case, convolve), backend, ("forward",))
    with rf.backend(backend):
        refuse_wrong_convolution(case, dtype, provider.function)
    return provider


def by_cudnn(case: Case, dtype: torch.dtype) -> Provider:
    """Layers by cuDNN's fused convolutions, the scale folded into the weight beforehand."""
    need_cudnn(next(iter(case.tensors.values())))
    names, tensors = list(case.tensors), list(case.tensors.values())
    folded = {
        i: (tensors[i] * tensors[i + 1].view(-1, 1, 1, 1)).to(
            dtype, memory_format=torch.channels_last
        )
        for i, name in enumerate(names)
        if "weight" in name
    }

    def convolve(
        x: Tensor,
        i: int,
        residual: Tensor | None = None,
        relu: bool = True,
        padding: int = 0,
        stride: int = 1,
    ) -> Tensor:
        bias = tensors[i + 2].to(dtype)
        geometry = [stride] * 2, [padding] * 2, [1, 1], 1
        if not relu:
            return F.conv2d(x, folded[i], bias, *geometry)
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, folded[i], bias, *geometry)
        return torch.ops.aten.cudnn_convolution_add_relu(
            *(x, folded[i], residual, 1.0, bias, *geometry)
        )

    provider = Provider(layer_by_layer(case, convolve), modes=("forward",))
    refuse_wrong_convolution(case, dtype, provider.function)
    return provider


if __name__ == "__main__":
    others = {
        "layers_cudnn": by_cudnn,
        "layers_triton": functools.partial(by_backend, "triton"),
        "layers_cuda": functools.partial(by_backend, "cuda"),
        "layers_reference": functools.partial(by_backend, "reference"),
    }
    sys.exit(benchmark("chains", __doc__, moved_bytes, flop, find, others))
