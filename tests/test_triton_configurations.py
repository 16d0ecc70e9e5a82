"""Everything that Triton's convolutions offer to a tuner, run on a GPU.

The interpreter has no registers, no pipeline and no TMA: whether each configuration computes the
same on a device is seen there only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_as_accurate_as_eager, normal
from torch import Tensor

from resnet_fused import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda"


class Conv(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0

    @property
    def geometry(self) -> tuple[Any, ...]:
        return (self.stride, self.stride), (self.padding, self.padding), (1, 1), 1


# Enough pixels that persistent programs have several parts, and some that fill no tile.
CONVS = {
    "1x1": Conv((33, 64, 28, 28), (256, 64, 1, 1)),
    "wide 1x1": Conv((65, 256, 14, 14), (128, 256, 1, 1)),
    "strided 1x1": Conv((9, 128, 28, 28), (256, 128, 1, 1), stride=2),
    "3x3": Conv((9, 64, 28, 28), (128, 64, 3, 3), padding=1),
    "strided 3x3": Conv((9, 128, 28, 28), (128, 128, 3, 3), stride=2, padding=1),
    "7x7 images": Conv((33, 128, 7, 7), (128, 128, 3, 3), padding=1),
    "stem": Conv((3, 3, 64, 64), (64, 3, 7, 7), stride=2, padding=3),
}
every_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


@every_conv
def test_forward(conv: Conv) -> None:
    from resnet_fused.triton_kernels import conv_bn_relu, conv_stats, convolution, device
    from resnet_fused.triton_kernels.problem import conv_problem

    x, weight = activation(conv.x, 0), filters(conv)
    problem = conv_problem(x, weight, *conv.geometry)
    residual = activation((problem.n, problem.k, problem.p, problem.q), 2)
    scale, shift = (normal((problem.k,), seed).float().to(DEVICE) for seed in (3, 4))
    prologue = [normal((problem.c,), seed).float().to(DEVICE) for seed in (5, 6)]
    epilogue = compared(
        reference.conv_bn_relu, x, weight, scale, shift, residual, True, *conv.geometry
    )
    plain = compared(reference.conv_stats, x, weight, None, None, *conv.geometry)
    behind = compared(reference.conv_stats, x, weight, *prologue, *conv.geometry)
    found = convolution.configurations(problem, x.dtype, device.architecture(x))
    for each in found:
        epilogue(
            conv_bn_relu.conv_bn_relu(
                *(x, weight, scale, shift, residual, True, *conv.geometry), configuration=each
            )
        )
        plain(conv_stats.conv_stats(x, weight, None, None, *conv.geometry, configuration=each))
        behind(conv_stats.conv_stats(x, weight, *prologue, *conv.geometry, configuration=each))


@every_conv
def test_gradients(conv: Conv) -> None:
    from resnet_fused.triton_kernels import conv_dgrad, conv_wgrad, device
    from resnet_fused.triton_kernels.problem import conv_problem

    x, weight = activation(conv.x, 0), filters(conv)
    problem = conv_problem(x, weight, *conv.geometry)
    grad_y = activation((problem.n, problem.k, problem.p, problem.q), 2)
    scale, shift, mean = (normal((problem.c,), seed).float().to(DEVICE) for seed in (3, 4, 5))
    architecture = device.architecture(x)
    arguments = grad_y, weight, conv.x[2:], None, None, x, x, scale, shift, None, mean
    check = compared(reference.conv_dgrad, *arguments, *conv.geometry)
    options = conv_dgrad.Options(residual=True)
    for each in conv_dgrad.configurations(problem, x.dtype, architecture, options):
        check(conv_dgrad.conv_dgrad(*arguments, *conv.geometry, configuration=each))
    for vectors in ((None, None), (scale, shift)):
        check = compared(reference.conv_wgrad, grad_y, x, weight, *vectors, *conv.geometry)
        prologue = vectors[0] is not None
        for each in conv_wgrad.configurations(problem, x.dtype, architecture, True, prologue):
            check(
                conv_wgrad.conv_wgrad(
                    grad_y, x, weight, *vectors, *conv.geometry, configuration=each
                )
            )


def compared(function: Callable[..., Any], *arguments: Any) -> Callable[[Any], None]:
    """What compares results with those of `function`, as it is and in float64."""
    doubled = (
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in arguments
    )
    eager, exact = as_tuple(function(*arguments)), as_tuple(function(*doubled))

    def check(actual: Any) -> None:
        for index, each in enumerate(zip(as_tuple(actual), eager, exact, strict=True)):
            assert_as_accurate_as_eager(*each, f"result {index}")

    return check


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def activation(shape: tuple[int, ...], seed: int) -> Tensor:
    values = normal(shape, seed).to(DEVICE, torch.bfloat16)
    return values.contiguous(memory_format=torch.channels_last)


def filters(conv: Conv) -> Tensor:
    _, c, r, s = conv.weight
    return (normal(conv.weight, 1) / (c * r * s) ** 0.5).to(DEVICE, torch.bfloat16)
