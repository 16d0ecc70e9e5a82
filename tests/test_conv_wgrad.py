"""conv_wgrad: the weight's gradient, with and without prologue; formats, tracing and bad input."""

from typing import Any

import pytest
import torch
from convolutions import (
    BAD_GEOMETRY,
    CONVS,
    FAST,
    LAYERED,
    PAIRS,
    TINY,
    Tensors,
    assert_fake_is_like,
    assert_refused,
    assert_same_outputs,
    draws,
    eager_prologue,
    in_pairs,
    prologue_of,
    weight_of,
)
from numerics import LAYOUTS, Case, grid, no_recompilation, normal, on_backends
from test_conv_bn_relu import Conv
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import conv_wgrad

ops = torch.ops.resnet_fused


def tensors_of(case: Case, conv: Conv, prologue: bool, seed: int = 0) -> Tensors:
    tensors = {
        "grad_y": case.other(seed + 4, conv.out),
        "x": case.x(seed, conv.x),
        "weight": weight_of(case, conv, seed + 1),
    }
    return tensors | (prologue_of(case, conv, seed + 2) if prologue else {})


def eager(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *geometry: Any,
) -> Tensor:
    leaf = weight.detach().requires_grad_()
    y = F.conv2d(eager_prologue(x, scale, shift).detach(), leaf, None, *geometry)
    return torch.autograd.grad(y, leaf, grad_y)[0]


def named(function: Any, conv: Conv, **tensors: Tensor) -> Tensors:
    given = (tensors.get(name) for name in ("grad_y", "x", "weight", "scale", "shift"))
    return {"grad_weight": function(*given, *conv.geometry)}


def check(case: Case, conv: Conv, prologue: bool) -> None:
    with rf.backend(case.backend):
        assert_same_outputs(
            lambda **tensors: named(conv_wgrad, conv, **tensors),
            lambda **tensors: named(eager, conv, **tensors),
            lambda seed: tensors_of(case, conv, prologue, seed),
            lambda _: {},
            draws(conv),
        )


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(
    "case", grid("conv_wgrad", dtypes=FAST, layouts=["channels_last"], interpreter=False)
)
def test_matches_eager(case: Case, conv: str) -> None:
    check(case, CONVS[conv], prologue=case.dtype == torch.bfloat16)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("case", grid("conv_wgrad"))
def test_dtypes(case: Case, prologue: bool) -> None:
    check(case, CONVS["odd channels"], prologue)


@pytest.mark.parametrize("conv", LAYERED)
@pytest.mark.parametrize("case", grid("conv_wgrad", dtypes=[torch.float32], layouts=LAYOUTS))
def test_layouts(case: Case, conv: str) -> None:
    check(case, CONVS[conv], prologue=True)


@pytest.mark.parametrize("conv", ["1x1", "3x3"])
@pytest.mark.parametrize("case", grid("conv_wgrad", dtypes=FAST, layouts=["channels_last"]))
def test_many_pixels(case: Case, conv: str) -> None:
    """So many that the sum over them is split."""
    shape = CONVS[conv]._replace(x=(3, 16, 29, 31))
    check(case, shape, prologue=conv == "1x1")


@pytest.mark.parametrize("backend", on_backends("conv_wgrad", interpreter=False))
def test_repeats_bit_by_bit(backend: str) -> None:
    conv = CONVS["3x3"]._replace(x=(3, 16, 29, 31))
    case = Case(backend, (), torch.float32, "channels_last")
    tensors = tensors_of(case, conv, prologue=True)
    with rf.backend(backend):
        first, second = (named(conv_wgrad, conv, **tensors) for _ in range(2))
    assert torch.equal(first["grad_weight"], second["grad_weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("backend", on_backends("conv_wgrad"))
def test_result_is_laid_out_like_the_weight(backend: str, layout: str, dtype: torch.dtype) -> None:
    case, conv = Case(backend, (), torch.bfloat16, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=False)
    weight = LAYOUTS[layout][0](tensors["weight"].to(dtype))
    expected = named(conv_wgrad, conv, **tensors)["grad_weight"]
    tensors |= {"weight": weight}
    arguments = (*tensors.values(), None, None, *conv.geometry)
    assert_fake_is_like(backend, ops.conv_wgrad.default, arguments)
    for gradient in (False, True):
        tensors["x"].requires_grad_(gradient)
        with rf.backend(backend):
            grad = named(conv_wgrad, conv, **tensors)["grad_weight"]
        assert grad.requires_grad == gradient
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(weight).stride()
        torch.testing.assert_close(grad, expected.to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("conv", TINY)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_wgrad", torch.float64))
def test_derivatives(backend: str, prologue: bool, conv: str) -> None:
    small = TINY[conv]
    case = Case(backend, (), torch.float64, "nchw")
    tensors = tensors_of(case, small, prologue)
    weight = tensors.pop("weight")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def function(grad_y: Tensor, x: Tensor, *vectors: Tensor) -> Tensor:
        return conv_wgrad(grad_y, x, weight, *(vectors or (None, None)), *small.geometry)

    with rf.backend(backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", on_backends("conv_wgrad"))
def test_empty_batch(backend: str) -> None:
    conv = CONVS["3x3"]._replace(x=(0, 16, 7, 6))
    tensors = tensors_of(Case(backend, (), torch.float32, "channels_last"), conv, prologue=True)
    with rf.backend(backend):
        grad = named(conv_wgrad, conv, **tensors)["grad_weight"]
    assert torch.equal(grad, torch.zeros_like(tensors["weight"]))


@pytest.mark.parametrize("backend", on_backends("conv_wgrad"))
def test_nan_passes(backend: str) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=True)
    tensors["x"][0, 3, 2, 2] = float("nan")
    tensors["grad_y"][1, 5, 3, 3] = float("nan")
    expected = named(eager, conv, **tensors)["grad_weight"]
    with rf.backend(backend):
        grad = named(conv_wgrad, conv, **tensors)["grad_weight"]
    assert 0 < grad.isnan().sum() < grad.numel()
    assert torch.equal(grad.isnan(), expected.isnan())


def arguments_of(case: Case, conv: Conv, prologue: bool, gradient: bool) -> tuple[Any, ...]:
    tensors = tensors_of(case, conv, prologue)
    leaves = [t.requires_grad_(gradient and name != "weight") for name, t in tensors.items()]
    return (*leaves, *(() if prologue else (None, None)), *conv.geometry)


@pytest.mark.parametrize("conv", ["strided", "one channel"])
@pytest.mark.parametrize("case", grid("conv_wgrad", dtypes=[torch.bfloat16], layouts=LAYOUTS))
def test_fake_is_like_real(case: Case, conv: str) -> None:
    arguments = arguments_of(case, CONVS[conv], conv == "strided", gradient=False)
    assert_fake_is_like(case.backend, ops.conv_wgrad.default, arguments)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "mixed_reversed"])
@pytest.mark.parametrize("backend", on_backends("conv_wgrad"))
def test_opcheck(backend: str, layout: str, prologue: bool) -> None:
    case, conv = Case(backend, (), torch.float32, layout), Conv((2, 4, 3, 3), 6)
    with rf.backend(backend):
        for gradient in (False, True):
            arguments = arguments_of(case, conv, prologue, gradient)
            torch.library.opcheck(ops.conv_wgrad.default, arguments)


def test_compiles_once() -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["strided"]
    arguments = arguments_of(case, conv, prologue=True, gradient=False)
    with no_recompilation():
        compiled = torch.compile(conv_wgrad, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), eager(*arguments))


def test_dynamic_shapes() -> None:
    weight = torch.ones(6, 3, 3, 3)
    with no_recompilation():
        compiled = torch.compile(conv_wgrad, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch, height, width in ((2, 9, 10), (4, 12, 14), (5, 11, 15)):
            x = normal((batch, 3, height, width), 0, torch.float32)
            grad_y = normal((batch, 6, height - 2, width - 2), 1, torch.float32)
            torch.testing.assert_close(compiled(grad_y, x, weight), eager(grad_y, x, weight))


G, X, W = torch.ones(2, 6, 4, 4), torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3)
S = torch.ones(4)
BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    **BAD_GEOMETRY,
    "x dimensions": ({"x": X[0]}, ValueError, r"x must have 4 dimensions \(N, C, H, W\)"),
    "x is None": ({"x": None}, TypeError, r"x must be a Tensor, got NoneType"),
    "x integers": ({"x": X.int()}, TypeError, r"x must be a floating-point .* got torch.int32"),
    "grad_y is a list": ({"grad_y": [1.0]}, TypeError, r"grad_y must be a Tensor, got list"),
    "grad_y shape": (
        {"grad_y": X},
        ValueError,
        r"grad_y must have the shape of the convolution's output \(2, 6, 4, 4\), got"
        r" \(2, 4, 6, 6\)",
    ),
    "grad_y dtype": (
        {"grad_y": G.double()},
        TypeError,
        r"grad_y must have the dtype of x torch.float32, got torch.float64",
    ),
    "grad_y device": (
        {"grad_y": G.to("meta")},
        ValueError,
        r"grad_y must be on the device of x cpu, got meta",
    ),
    "weight channels": (
        {"weight": torch.ones(6, 5, 3, 3)},
        ValueError,
        r"weight must have C / groups = 4 input channels, got 5",
    ),
    "scale": (
        {"scale": torch.ones(6)},
        ValueError,
        r"scale must have one value per channel \(4,\), got \(6,\)",
    ),
    "shift integers": ({"shift": S.int()}, TypeError, r"shift must be a floating-point tensor"),
    "scale alone": ({"shift": None}, ValueError, r"shift must be given with scale, got None"),
    "shift alone": ({"scale": None}, ValueError, r"scale must be given with shift, got None"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    good = {"grad_y": G, "x": X, "weight": W, "scale": S, "shift": S}
    assert_refused(conv_wgrad, good | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    good = {"grad_y": G, "x": X, "weight": W, "scale": S, "shift": S, "groups": 1}
    with pytest.raises((error, RuntimeError)):
        ops.conv_wgrad(**(good | PAIRS | in_pairs(changed)))
