"""More than 2^31 elements in one tensor: the outermost programs of each Triton kernel reach them.

An offset that does not fit into 32 bits is an error of the interpreter, and so is what lies outside
of the tensors. Tensors are as the system gives them, zeros that take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import interpreted_backend
import pytest
import torch
from torch import Tensor

from resnet_fused.layout import convolution_shape, mask_shape

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)

import interpretation

from resnet_fused.triton_kernels import (
    add_relu,
    bn_relu,
    bn_relu_max_pool,
    conv_bn_relu,
    conv_stats,
)
from resnet_fused.triton_kernels.activations import Spread
from resnet_fused.triton_kernels.conv_bn_relu_backward import conv_bn_relu_backward
from resnet_fused.triton_kernels.conv_dgrad import conv_dgrad
from resnet_fused.triton_kernels.conv_wgrad import conv_wgrad

# What other programs would have computed is missing, and what follows from it may be anything.
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
interpreted_backend.install()

SHAPE = (700, 64, 255, 257)  # so many that a program's last of 30 steps is beyond
CHANNELS = SHAPE[1]
FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
CONVS: dict[str, tuple[tuple[int, ...], Geometry]] = {
    "1x1": ((CHANNELS, CHANNELS, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "3x3": ((CHANNELS, CHANNELS, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "strided 3x3": ((4 * CHANNELS, CHANNELS, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
    "depthwise": ((CHANNELS, 1, 3, 3), ((1, 1), (1, 1), (1, 1), CHANNELS)),
}
every_conv = pytest.mark.parametrize("name", CONVS)
every_generation = pytest.mark.parametrize("generation", ["ampere", "hopper"])


@pytest.fixture(autouse=True)
def _outermost_programs() -> Iterator[None]:
    """Of a device so large that none of them has many steps to take."""
    assert torch.Size(SHAPE).numel() * 29 > 30 * 2**31
    with (
        interpretation.corners_only(),
        mock.patch.object(interpreted_backend, "MULTIPROCESSORS", 4096),
    ):
        yield


def large(layout: str = "channels_last") -> Tensor:
    return torch.empty(SHAPE, dtype=torch.bfloat16, memory_format=FORMATS[layout])


def ends_with_ones(x: Tensor) -> Tensor:
    x[-1, :, -2:, -2:] = 1
    return x


def last(x: Tensor) -> float:
    return float(x[-1, -1, -1, -1])


@pytest.mark.parametrize("layout", FORMATS)
def test_add_relu(layout: str) -> None:
    x = ends_with_ones(large(layout))
    out = add_relu.add_relu(x, x)
    assert last(out) == 2
    assert last(add_relu.add_relu_backward(x, out)) == 1


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [False, True])
def test_bn_relu(training: bool, layout: str) -> None:
    x = ends_with_ones(large(layout))
    zero, one = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    no_batch_norm = False, None, None, None, None, False, 0.1, 0.0
    out, mean, invstd, _, _, mask = bn_relu.bn_relu(
        *(x, one, 2 * one, zero, one, training, 0.1, 0.0, x, *no_batch_norm, True, True)
    )
    assert training or last(out) == 4
    assert mask.shape == mask_shape(x)
    if not training:
        bit = 7 if layout == "channels_last" else (SHAPE[2] * SHAPE[3] - 1) % 8
        assert int(mask[-1, -1]) >> bit & 1
    bn_relu.bn_relu_backward(
        *(x, x, None, mask, one, zero, mean, invstd, training, True, None, False),
        *(None, None, None, None, False, True),
    )


@pytest.mark.parametrize("layout", FORMATS)
def test_bn_relu_max_pool(layout: str) -> None:
    """With windows that overlap so far that the output is as large as x."""
    x = ends_with_ones(large(layout))
    zero, one = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    windows = (2, 2), (1, 1), (1, 1)
    # Large tiles: of them a program has few.
    spread = Spread(vectors=16, columns=32, programs=8)
    named = {"configuration": bn_relu_max_pool.Configuration(*(spread,) * 4)}
    bn = one, 2 * one, zero, one, False, 0.1, 0.0
    out, mean, invstd, argmax = bn_relu_max_pool.bn_relu_max_pool(x, *bn, *windows, **named)
    assert last(out) == 3
    assert argmax[-1, -1, -1, -1] == 0
    tensors = out, x, argmax
    bn_relu_max_pool.bn_relu_max_pool_backward_sums(*tensors, mean, *windows, **named)
    grad_x = bn_relu_max_pool.bn_relu_max_pool_backward_apply(
        *(*tensors, one, mean, invstd, True, torch.zeros(2, CHANNELS)), *windows, **named
    )
    assert last(grad_x) == 3  # from the last window, of which no other pixel is the maximum


@every_conv
@every_generation
def test_forward(generation: str, name: str) -> None:
    weight, geometry = filters(name)
    x = ends_with_ones(large())
    with interpreted_backend.generation(generation):
        y, _, _ = conv_stats.conv_stats(x, weight, None, None, *geometry)
        scale, shift = torch.ones(weight.size(0)), torch.zeros(weight.size(0))
        out = conv_bn_relu.conv_bn_relu(x, weight, scale, shift, y, True, *geometry)
    assert y.numel() > 2**31
    assert last(y) == weight.size(1) * min(weight.size(2), 2) ** 2
    assert last(out) == 2 * last(y)


def test_prologue_in_a_pass_of_its_own() -> None:
    one = torch.ones(CHANNELS)
    assert last(conv_stats.scale_shift_relu(ends_with_ones(large()), one, one)) == 2


# Of a depthwise convolution each program has thousands of steps.
@pytest.mark.parametrize("name", [name for name in CONVS if name != "depthwise"])
@every_generation
def test_gradients(generation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, geometry = filters(name)
    # conv_wgrad divides them between the taps.
    monkeypatch.setattr(interpreted_backend, "MULTIPROCESSORS", 4096 * weight[0, 0].numel())
    grad_y = ends_with_ones(output(weight, geometry))
    x = ends_with_ones(large())
    one = torch.ones(CHANNELS)
    coefficients = torch.ones(3, weight.size(0))
    with interpreted_backend.generation(generation):
        arguments = grad_y, weight, x.shape[2:], grad_y, coefficients, x, x, one, one, None, one
        conv_dgrad(*arguments, *geometry)
        grad_x, *_ = conv_dgrad(grad_y, weight, x.shape[2:], *(None,) * 8, *geometry)
        conv_wgrad(grad_y, x, weight, one, one, *geometry)
        conv_wgrad(grad_y, x, weight, None, None, *geometry)
    taps = 1 if geometry[0] == (2, 2) else min(weight.size(2), 2) ** 2
    assert last(grad_x) == weight.size(0) // geometry[3] * taps


@every_generation
def test_backward_of_conv_bn_relu(generation: str) -> None:
    weight, geometry = filters("1x1")
    x = ends_with_ones(large())
    with interpreted_backend.generation(generation):
        *_, grad_residual = conv_bn_relu_backward(
            x, x, weight, torch.ones(CHANNELS), x, True, *geometry
        )
    assert last(grad_residual) == 1


def filters(name: str) -> tuple[Tensor, Geometry]:
    shape, geometry = CONVS[name]
    return torch.ones(shape, dtype=torch.bfloat16), geometry


def output(weight: Tensor, geometry: Geometry) -> Tensor:
    shape = convolution_shape(SHAPE, weight.shape, *geometry[:3])
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
