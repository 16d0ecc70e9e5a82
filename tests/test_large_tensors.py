"""More than 2^31 elements in one tensor, on a GPU: offsets must not be 32-bit anywhere."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_as_accurate_as_eager, missing
from torch import Tensor

import resnet_fused as rf
from resnet_fused.ops import add_relu, bn_relu

SHAPE = (515, 64, 255, 257)
BORDER = 2**31 // (64 * 255 * 257)  # the image with element 2^31, wherever its channels lie
IMAGES = (0, BORDER - 1, BORDER, SHAPE[0] - 1)
EPS = 1e-5
LAYOUTS = [(torch.channels_last, torch.bfloat16), (torch.contiguous_format, torch.float16)]


def parameter(backend: str) -> Any:
    reason = missing("bn_relu", backend)
    marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
    return pytest.param(backend, marks=marks)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("backend", [parameter("cuda"), parameter("triton")]),
    pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=["channels_last", "nchw"]),
]


def test_add_relu(backend: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    need_memory(tensors=5)
    x, residual, grad_out = (random(seed, layout, dtype) for seed in range(3))
    x.requires_grad_()
    with rf.backend(backend):
        out = add_relu(x, residual)
        (grad_x,) = torch.autograd.grad(out, x, grad_out)
    for i in IMAGES:
        exact = torch.relu(x[i].double() + residual[i].double()).detach()
        assert_rounded(out[i].detach(), exact, f"out[{i}]")
        assert torch.equal(grad_x[i], torch.where(out[i] > 0, grad_out[i], 0)), f"grad_x[{i}]"


def test_bn_relu_in_training(backend: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    need_memory(tensors=6)
    x, residual, grad_out = (random(seed, layout, dtype) for seed in range(3))
    channels = SHAPE[1]
    weight, bias = torch.linspace(0.5, 1.5, channels), torch.linspace(-0.5, 0.5, channels)
    running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    leaves = [t.to("cuda").requires_grad_() for t in (weight, bias)]
    for activation in (x, residual):
        activation.requires_grad_()
    with rf.backend(backend):
        out = bn_relu(x, *leaves, *running, True, 1.0, EPS, residual)
        grads = torch.autograd.grad(out, [x, residual, *leaves], grad_out)
    x, residual, out = x.detach(), residual.detach(), out.detach()
    exact = Exact.of(x, out, grad_out)
    close(running[0], exact.mean, "running_mean")
    close(running[1], exact.var * exact.count / (exact.count - 1), "running_var")
    close(grads[3], exact.sum_dy, "grad_bias")
    close(grads[2], exact.sum_dy_xc * exact.invstd, "grad_weight")
    scale = leaves[0].detach().double() * exact.invstd
    for i in IMAGES:
        xc = x[i].double() - broadcast(exact.mean)
        total = xc * broadcast(scale) + broadcast(leaves[1].detach().double())
        assert_rounded(out[i], torch.relu(total + residual[i].double()), f"out[{i}]")
        dy = torch.where(out[i] > 0, grad_out[i], 0)
        assert torch.equal(grads[1][i], dy), f"grad_residual[{i}]"
        slope = exact.sum_dy_xc * exact.invstd**2 / exact.count
        centered = dy.double() - broadcast(exact.sum_dy / exact.count) - xc * broadcast(slope)
        assert_rounded(grads[0][i], centered * broadcast(scale), f"grad_x[{i}]")


class Exact(NamedTuple):
    """Sums over N, H and W in float64, (C,) each."""

    count: int
    mean: Tensor
    var: Tensor
    sum_dy: Tensor
    sum_dy_xc: Tensor

    @property
    def invstd(self) -> Tensor:
        return (self.var + EPS).rsqrt()

    @classmethod
    def of(cls, x: Tensor, out: Tensor, grad_out: Tensor) -> "Exact":
        count = x.numel() // x.size(1)
        mean = sum_over(part.double() for part in x.split(5)) / count
        var = sum_over((part.double() - broadcast(mean)).square() for part in x.split(5)) / count
        parts = list(zip(x.split(5), out.split(5), grad_out.split(5), strict=True))
        sum_dy = sum_over(torch.where(o > 0, g, 0).double() for _, o, g in parts)
        sum_dy_xc = sum_over(
            torch.where(o > 0, g, 0).double() * (p.double() - broadcast(mean)) for p, o, g in parts
        )
        return cls(count, mean, var, sum_dy, sum_dy_xc)


def sum_over(parts: Iterator[Tensor]) -> Tensor:
    total = torch.zeros(SHAPE[1], dtype=torch.float64, device="cuda")
    for part in parts:
        total += part.sum((0, 2, 3))
    return total


def broadcast(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def random(seed: int, layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    """Filled image by image, so that nothing else has to be right about large tensors."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.empty(SHAPE, dtype=dtype, device="cuda", memory_format=layout)
    for image in x:
        image.normal_(0.5, 1.0, generator=generator)
    return x


def assert_rounded(actual: Tensor, exact: Tensor, name: str) -> None:
    assert exact.abs().max() > 0.1, f"{name}: nothing to compare"
    assert_as_accurate_as_eager(actual, exact.to(actual.dtype), exact, name)


def close(actual: Tensor, exact: Tensor, name: str) -> None:
    """For sums of 33 million values in float32; one image more or less changes them by 1e-3."""
    error = (actual.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-5, f"{name}: {error=:.1e}"


def need_memory(tensors: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    elements = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
    needed = tensors * 2 * elements + 2 * 2**30
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
