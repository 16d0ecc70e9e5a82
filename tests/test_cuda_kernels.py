"""The CUDA kernels alone: inputs are copied from the host, results are compared there.

Nothing else runs on the GPU, so that a sanitizer has only these kernels to look at, and every byte
that they read has been written by a copy or by one of them: see gpu_check.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numerics import LAYOUTS, Case, assert_as_accurate_as_eager, device_of, grid, normal
from test_conv_bn_relu import Conv
from torch import Tensor

from resnet_fused import backends, reference

# In one block, with rests that fill no vector; in several, whose results must meet.
SHAPES = ((2, 13, 5, 3), (3, 24, 40, 25))
KINDS = ("plain", "residual", "dual")
EITHER = ("cuda", "emulated")


@pytest.fixture(autouse=True)
def _float32_as_on_the_host() -> Iterator[None]:
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


def cases(operator: str) -> list[Any]:
    """Those of the CUDA kernels, on a GPU and emulated."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return [p for p in grid(operator, SHAPES, dtypes) if p.values[0].backend in EITHER]


def run(case: Case, operator: str, *arguments: Any) -> Any:
    device = device_of(case.backend)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    kernel = backends._IMPLEMENTATIONS[operator][case.backend].resolve()
    return kernel(*moved)


def activations(case: Case) -> list[Tensor]:
    """Three of them, on the host: not around 0, where the rounding of a mean has no scale."""
    values = [(normal(case.shape, i) * 2 + 0.5).to(case.dtype) for i in range(3)]
    return [LAYOUTS[case.layout][0](v) for v in values]


def vectors(channels: int, seed: int) -> list[Tensor]:
    """weight, bias, running_mean, running_var: (C,)."""
    values = [normal((channels,), seed + i, torch.float32) for i in range(4)]
    return [*values[:3], values[3].abs() + 0.5]


def compare(
    actual: tuple[Tensor, ...], eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> None:
    for i, (ours, theirs, truth) in enumerate(zip(actual, eager, exact, strict=True)):
        if theirs.is_floating_point():
            assert_as_accurate_as_eager(ours.cpu(), theirs, truth.double(), f"result {i}")


def doubled(tensor: Any) -> Any:
    floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.double() if floating else tensor


@pytest.mark.parametrize("case", cases("add_relu"))
def test_add_relu(case: Case) -> None:
    x, residual, grad_out = activations(case)
    out = run(case, "add_relu", x, residual)
    expected = torch.relu(x + residual)
    compare((out,), (expected,), (torch.relu(x.double() + residual.double()),))
    grad = run(case, "add_relu_backward", grad_out, out)
    assert torch.equal(grad.cpu(), grad_out * (out.cpu() > 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", cases("bn_relu"))
def test_bn_relu(case: Case, training: bool, kind: str) -> None:
    x, residual, grad_out = activations(case)
    own, other = vectors(case.shape[1], 3), vectors(case.shape[1], 7)
    has_residual, dual = kind != "plain", kind == "dual"
    bn, no_bn = (training, 0.3, 1e-3), (None, None, None, None, False, 0.1, 1e-5)
    forward = (
        *(x, *own, *bn, residual if has_residual else None, dual),
        *((*other, *bn) if dual else no_bn),
        *(True, kind == "residual"),
    )
    out, mean, invstd, residual_mean, residual_invstd, mask = results = run(
        case, "bn_relu", *clones(forward)
    )
    # The mask has a layout of its own where the reference works in another: not compared here, but
    # by the gradients that it decides.
    eager = reference.bn_relu(*clones(forward))
    compare(results[:5], eager[:5], reference.bn_relu(*map(doubled, clones(forward)))[:5])
    backward = (
        *(grad_out, x, None, mask if kind == "residual" else None, *own[:2], mean, invstd),
        *(training, has_residual, residual if dual else None, dual),
        *(other[:2] if dual else (None, None)),
        *((residual_mean, residual_invstd) if dual else (None, None)),
        *(training, True),
    )
    grads = run(case, "bn_relu_backward", *backward)
    # The same signs of the ReLU for all: those of our own output.
    given = [tensor.cpu() if isinstance(tensor, Tensor) else tensor for tensor in backward]
    given[2:4] = out.cpu(), None
    exact = reference.bn_relu_backward(*map(doubled, given))
    compare(grads, reference.bn_relu_backward(*given), exact)


def clones(arguments: tuple[Any, ...]) -> list[Any]:
    """Each call updates the running statistics that it was given."""
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("case", cases("bn_relu_apply"))
def test_bn_relu_apply(case: Case) -> None:
    x = activations(case)[0]
    arguments = x, *vectors(x.size(1), 1), True
    out = run(case, "bn_relu_apply", *arguments)
    exact = reference.bn_relu_apply(*map(doubled, arguments))
    compare((out,), (reference.bn_relu_apply(*arguments),), (exact,))


# A stem's, and others for which there are kernels of their own.
WINDOWS = {"stem": ([3, 3], [2, 2], [1, 1]), "wide": ([2, 3], [1, 3], [1, 0])}


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", cases("bn_relu_max_pool"))
def test_bn_relu_max_pool(case: Case, training: bool, windows: str) -> None:
    x, sizes = activations(case)[0], WINDOWS[windows]
    own = vectors(case.shape[1], 3)
    arguments = (x, *own, training, 0.3, 1e-3, *sizes)
    out, mean, invstd, argmax = results = run(case, "bn_relu_max_pool", *clones(arguments))
    eager = reference.bn_relu_max_pool(*clones(arguments))
    # Places are compared by the gradients that they decide.
    exact = reference.bn_relu_max_pool(*map(doubled, clones(arguments)))
    compare(results[:3], eager[:3], exact[:3])
    grad_out = LAYOUTS[case.layout][0](normal(out.shape, 1).to(case.dtype))
    backward = [t.cpu() for t in (grad_out, x, argmax, mean)]
    sums = run(case, "bn_relu_max_pool_backward_sums", *backward, *sizes)
    eager = (reference.bn_relu_max_pool_backward_sums(*backward, *sizes),)
    exact = (reference.bn_relu_max_pool_backward_sums(*map(doubled, backward), *sizes),)
    compare((sums,), eager, exact)
    averages = sums.cpu() / (x.numel() // x.size(1))
    backward = [*backward[:3], own[0], mean.cpu(), invstd.cpu(), training, averages]
    grad_x = run(case, "bn_relu_max_pool_backward_apply", *backward, *sizes)
    eager = (reference.bn_relu_max_pool_backward_apply(*backward, *sizes),)
    exact = (reference.bn_relu_max_pool_backward_apply(*map(doubled, backward), *sizes),)
    compare((grad_x,), eager, exact)


# Vectors and rests of them, several tiles, a sum in parts, phases of a stride.
CONVOLUTIONS = {
    "1x1": Conv((3, 40, 9, 8), 72, kernel=1, padding=(0, 0)),
    "3x3": Conv((2, 13, 9, 7), 27),
    "strided": Conv((2, 24, 9, 8), 40, stride=(2, 2)),
    "grouped": Conv((2, 24, 6, 5), 36, groups=4),
    "stem": Conv((1, 3, 21, 18), 16, kernel=7, stride=(2, 2), padding=(3, 3)),
    "deep": Conv((1, 1024, 4, 4), 64, kernel=1, padding=(0, 0)),
}


def convolution_cases(operator: str) -> list[Any]:
    dtypes = torch.float32, torch.bfloat16
    return [p for p in grid(operator, dtypes=dtypes) if p.values[0].backend in EITHER]


def laid_out(case: Case, shape: tuple[int, ...], seed: int) -> Tensor:
    return LAYOUTS[case.layout][0](normal(shape, seed).to(case.dtype))


def weight_of(case: Case, conv: Conv) -> Tensor:
    fan_in = conv.weight[1] * conv.kernel**2
    return (normal(conv.weight, 9) / fan_in**0.5).to(case.dtype)


def assert_convolution(case: Case, operator: str, *arguments: Any) -> None:
    """The kernel, the reference, and the reference in float64."""
    results = run(case, operator, *arguments)
    function = getattr(reference, operator)
    eager, exact = function(*arguments), function(*map(doubled, arguments))
    if isinstance(results, Tensor):
        results, eager, exact = (results,), (eager,), (exact,)
    compare(results, eager, exact)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("case", convolution_cases("conv_bn_relu"))
def test_conv_bn_relu(case: Case, name: str) -> None:
    conv = CONVOLUTIONS[name]
    scale, shift, *_ = vectors(conv.kernels, 3)
    arguments = laid_out(case, conv.x, 0), weight_of(case, conv), scale, shift
    residual = laid_out(case, conv.out, 1)
    assert_convolution(case, "conv_bn_relu", *arguments, residual, False, *conv.geometry)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("case", convolution_cases("conv_stats"))
def test_conv_stats(case: Case, name: str) -> None:
    conv = CONVOLUTIONS[name]
    # Behind a ReLU, whose mean is not 0.
    scale, shift, *_ = vectors(conv.x[1], 3)
    arguments = laid_out(case, conv.x, 0), weight_of(case, conv), scale, shift
    assert_convolution(case, "conv_stats", *arguments, *conv.geometry)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("case", convolution_cases("conv_dgrad"))
def test_conv_dgrad(case: Case, name: str) -> None:
    conv = CONVOLUTIONS[name]
    coefficients = torch.stack(vectors(conv.kernels, 3)[:3])
    scale, shift, mean, _ = vectors(conv.x[1], 7)
    gradients = laid_out(case, conv.out, 0), weight_of(case, conv), conv.x[2:]
    behind = laid_out(case, conv.out, 1), coefficients
    before = laid_out(case, conv.x, 2), laid_out(case, conv.x, 3), scale, shift, None, mean
    assert_convolution(case, "conv_dgrad", *gradients, *behind, *before, *conv.geometry)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("case", convolution_cases("conv_wgrad"))
def test_conv_wgrad(case: Case, name: str) -> None:
    conv = CONVOLUTIONS[name]
    scale, shift, *_ = vectors(conv.x[1], 3)
    tensors = laid_out(case, conv.out, 0), laid_out(case, conv.x, 1), weight_of(case, conv)
    assert_convolution(case, "conv_wgrad", *tensors, scale, shift, *conv.geometry)
