"""conv_stats: output, statistics, gradients through all of them, formats, tracing and bad input."""

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
    assert_in_format,
    assert_refused,
    assert_same_outputs,
    draws,
    eager_prologue,
    has_few_channels,
    in_pairs,
    prologue_of,
    vector,
    weight_of,
)
from numerics import (
    LAYOUTS,
    Case,
    assert_as_accurate_as_eager,
    grid,
    no_recompilation,
    normal,
    on_backends,
)
from test_conv_bn_relu import Conv
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import conv_stats

ops = torch.ops.resnet_fused
OUTPUTS = ("y", "mean", "m2")


def tensors_of(case: Case, conv: Conv, prologue: bool, seed: int = 0) -> Tensors:
    tensors = {"x": case.x(seed, conv.x), "weight": weight_of(case, conv, seed + 1)}
    return tensors | (prologue_of(case, conv, seed + 2) if prologue else {})


def grad_outs_of(case: Case, conv: Conv, seed: int) -> Tensors:
    """Of the sizes that a batch norm behind the convolution gives them."""
    _, kernels, p, q = conv.out
    return {
        "y": case.other(seed + 4, conv.out),
        "mean": vector(case, normal((kernels,), seed + 5) * (p * q) ** 0.5),
        "m2": vector(case, normal((kernels,), seed + 6) * 0.1),
    }


def eager(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.conv2d(eager_prologue(x, scale, shift), weight, None, *geometry)
    values = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return y, mean, var * (y.numel() // y.size(1))


def named(function: Any, conv: Conv, **tensors: Tensor) -> Tensors:
    scale, shift = tensors.get("scale"), tensors.get("shift")
    outputs = function(tensors["x"], tensors["weight"], scale, shift, *conv.geometry)
    return dict(zip(OUTPUTS, outputs, strict=True))


def check(case: Case, conv: Conv, prologue: bool) -> None:
    with rf.backend(case.backend):
        results = assert_same_outputs(
            lambda **tensors: named(conv_stats, conv, **tensors),
            lambda **tensors: named(eager, conv, **tensors),
            lambda seed: tensors_of(case, conv, prologue, seed),
            lambda seed: grad_outs_of(case, conv, seed),
            draws(conv),
        )
    for name in ("y", "grad x"):
        assert_in_format(results[name], case.x(0, conv.x))


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(
    "case", grid("conv_stats", dtypes=FAST, layouts=["channels_last"], interpreter=False)
)
def test_matches_eager(case: Case, conv: str) -> None:
    prologue = case.dtype == torch.bfloat16 and not has_few_channels(CONVS[conv])
    check(case, CONVS[conv], prologue)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("case", grid("conv_stats"))
def test_dtypes(case: Case, prologue: bool) -> None:
    check(case, CONVS["odd channels"], prologue)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("conv", LAYERED)
@pytest.mark.parametrize("case", grid("conv_stats", dtypes=[torch.float32], layouts=LAYOUTS))
def test_layouts(case: Case, conv: str, prologue: bool) -> None:
    check(case, CONVS[conv], prologue)


@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_large_mean(backend: str) -> None:
    """A variance that is far below the square of the mean keeps its digits."""
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["1x1"]
    conv = conv._replace(x=(2, 128, 5, 7))  # eager rounds sums, TF32x3 rounds each product
    x, weight = case.x(0, conv.x) + 300, weight_of(case, conv, 1).abs()
    with rf.backend(backend):
        results = conv_stats(x, weight)
    expected = eager(x, weight)
    exact = eager(x.double(), weight.double())
    assert (exact[1].square() * 35 * 2 > 1e4 * exact[2]).all()
    for name, actual, plain, truth in zip(OUTPUTS, results, expected, exact, strict=True):
        assert_as_accurate_as_eager(actual, plain, truth, name)


@pytest.mark.parametrize("backend", on_backends("conv_stats", interpreter=False))
def test_repeats_bit_by_bit(backend: str) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=True)
    with rf.backend(backend):
        first, second = (named(conv_stats, conv, **tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_weight_wider_than_x(backend: str, dtype: torch.dtype) -> None:
    case, conv = Case(backend, (), torch.bfloat16, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=True)
    wide = tensors | {"weight": tensors["weight"].to(dtype)}
    for given in (tensors, wide):
        given["weight"].requires_grad_()
    with rf.backend(backend):
        y, mean, m2 = named(conv_stats, conv, **wide).values()
        (grad,) = torch.autograd.grad(y.sum(), wide["weight"])
    expected = named(eager, conv, **tensors)
    (expected_grad,) = torch.autograd.grad(expected["y"].sum(), tensors["weight"])
    assert (y.dtype, mean.dtype, grad.dtype) == (torch.bfloat16, torch.float32, dtype)
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected["y"], **close)
    torch.testing.assert_close(mean, expected["mean"], **close)
    torch.testing.assert_close(m2, expected["m2"], **close)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=2e-2, atol=0.5)


def chain(convolution: Any, conv: Conv, **tensors: Tensor) -> Tensors:
    """Two convolutions with a batch norm in training and a ReLU between them."""
    y, mean, m2 = convolution(tensors["x"], tensors["weight"], None, None, *conv.geometry)
    var = m2 / (y.numel() // y.size(1))
    scale = tensors["gamma"] * (var + 1e-5).rsqrt()
    shift = tensors["beta"] - mean * scale
    return {"out": convolution(y, tensors["pointwise"], scale, shift)[0]}


def eager_chain(conv: Conv, **tensors: Tensor) -> Tensors:
    y = F.conv2d(tensors["x"], tensors["weight"], None, *conv.geometry)
    norm = F.batch_norm(y, None, None, tensors["gamma"], tensors["beta"], training=True)
    return {"out": F.conv2d(torch.relu(norm), tensors["pointwise"])}


@pytest.mark.parametrize("conv", ["3x3", "strided 1x1"])
@pytest.mark.parametrize(
    "case", grid("conv_stats", dtypes=[torch.float32, torch.float64], layouts=["channels_last"])
)
def test_batch_norm_between_two_convolutions(case: Case, conv: str) -> None:
    """In the dtypes in which no rounding changes the sign that the ReLU asks for."""
    first = CONVS[conv]
    second = Conv(first.out, 18, kernel=1, padding=(0, 0))

    def tensors(seed: int) -> Tensors:
        channels = (first.kernels,)
        return tensors_of(case, first, prologue=False, seed=seed) | {
            "gamma": vector(case, normal(channels, seed + 2).abs() + 0.5),
            "beta": vector(case, normal(channels, seed + 3)),
            "pointwise": weight_of(case, second, seed + 4),
        }

    with rf.backend(case.backend):
        assert_same_outputs(
            lambda **given: chain(conv_stats, first, **given),
            lambda **given: eager_chain(first, **given),
            tensors,
            lambda seed: {"out": case.other(seed + 5, second.out)},
            range(0, 200, 100),
        )


@pytest.mark.parametrize("conv", TINY)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_stats", torch.float64))
def test_second_derivatives(backend: str, prologue: bool, conv: str) -> None:
    small = TINY[conv]
    case = Case(backend, (), torch.float64, "nchw")
    tensors = [t.requires_grad_() for t in tensors_of(case, small, prologue).values()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = values if prologue else (*values, None, None)
        return conv_stats(*given, *small.geometry)

    with rf.backend(backend):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("needed", ["x", "weight", "scale", "shift"])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_gradient_of_one_argument_through_one_output(
    backend: str, needed: str, output: str
) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["strided"]
    tensors = tensors_of(case, conv, prologue=True)
    tensors[needed].requires_grad_()
    expected = named(eager, conv, **tensors)[output].square().sum()
    (expected_grad,) = torch.autograd.grad(expected, tensors[needed])
    with rf.backend(backend):
        named(conv_stats, conv, **tensors)[output].square().sum().backward()
    torch.testing.assert_close(tensors[needed].grad, expected_grad, rtol=1e-3, atol=1e-2)
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_without_gradients(backend: str, guard: Any) -> None:
    case, conv = Case(backend, (), torch.float32, "nchw"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=True)
    tensors["weight"].requires_grad_()
    with rf.backend(backend), guard():
        outputs = named(conv_stats, conv, **tensors)
    for name, expected in named(eager, conv, **tensors).items():
        assert not outputs[name].requires_grad
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_empty_batch(backend: str, prologue: bool) -> None:
    conv = CONVS["3x3"]._replace(x=(0, 16, 7, 6))
    case = Case(backend, (), torch.float32, "channels_last")
    tensors = tensors_of(case, conv, prologue)
    for tensor in tensors.values():
        tensor.requires_grad_()
    with rf.backend(backend):
        outputs = named(conv_stats, conv, **tensors)
        sum(output.sum() for output in outputs.values()).backward()
    assert outputs["y"].shape == conv.out
    assert torch.equal(outputs["mean"], torch.zeros(conv.kernels))
    assert torch.equal(outputs["m2"], torch.zeros(conv.kernels))
    assert outputs["mean"].data_ptr() != outputs["m2"].data_ptr()
    for tensor in tensors.values():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_nan_passes(backend: str, prologue: bool) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue)
    tensors["x"][0, 3, 2, 2] = float("nan")
    expected = named(eager, conv, **tensors)
    assert expected["y"].isnan().any(1).sum() == 9
    with rf.backend(backend):
        outputs = named(conv_stats, conv, **tensors)
    for name in OUTPUTS:
        assert torch.equal(outputs[name].isnan(), expected[name].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prologue", [False, True])
def test_autocast_is_as_eager(prologue: bool, dtype: torch.dtype) -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["3x3"]

    def call(function: Any, **tensors: Tensor) -> Tensors:
        exact = tensors["x"].dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
            return named(function, conv, **tensors)

    def tensors(seed: int) -> Tensors:
        # Values that bfloat16 has: the sign in the prologue must not depend on their rounding.
        given = tensors_of(case, conv, prologue, seed)
        return given | {"x": given["x"].bfloat16().to(dtype)}

    def grad_outs(seed: int) -> Tensors:
        given = grad_outs_of(case, conv, seed)
        return given | {"y": given["y"].bfloat16()}

    assert_same_outputs(
        lambda **given: call(conv_stats, **given),
        lambda **given: call(eager, **given),
        *(tensors, grad_outs, draws(conv)),
    )


def test_autocast_leaves_float64() -> None:
    case, conv = Case("cpu", (), torch.float64, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, prologue=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = named(conv_stats, conv, **tensors)
    torch.testing.assert_close(outputs, named(eager, conv, **tensors))


def test_autocast_refuses_integers() -> None:
    """Cast before the check they would pass it."""
    expected = "conv_stats: x must be a floating-point tensor, got torch.int32"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=expected):
        conv_stats(X.int(), W)


def arguments_of(case: Case, conv: Conv, prologue: bool, gradient: bool) -> tuple[Any, ...]:
    tensors = tensors_of(case, conv, prologue).values()
    leaves = [t.detach().requires_grad_(gradient) for t in tensors]
    return (*leaves, *(() if prologue else (None, None)), *conv.geometry)


@pytest.mark.parametrize("conv", ["strided", "1x1 image", "one channel"])
@pytest.mark.parametrize(
    "case", grid("conv_stats", dtypes=[torch.bfloat16], layouts=LAYOUTS, interpreter=False)
)
def test_fake_is_like_real(case: Case, conv: str) -> None:
    arguments = arguments_of(case, CONVS[conv], conv == "strided", gradient=False)
    assert_fake_is_like(case.backend, ops.conv_stats.default, arguments)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "mixed_reversed"])
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_opcheck(backend: str, layout: str, prologue: bool) -> None:
    case, conv = Case(backend, (), torch.float32, layout), Conv((2, 4, 3, 3), 6)
    with rf.backend(backend):
        for gradient in (False, True):
            arguments = arguments_of(case, conv, prologue, gradient)
            torch.library.opcheck(ops.conv_stats.default, arguments)


@pytest.mark.parametrize("prologue", [False, True])
def test_compiles_once(prologue: bool) -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["strided"]
    arguments = arguments_of(case, conv, prologue, gradient=True)
    leaves = [a for a in arguments if isinstance(a, Tensor)]

    def loss(function: Any) -> Tensor:
        return sum(output.square().sum() for output in function(*arguments))

    expected = torch.autograd.grad(loss(eager), leaves)
    with no_recompilation():
        compiled = torch.compile(conv_stats, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            grads = torch.autograd.grad(loss(compiled), leaves)
            torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-2)


def test_dynamic_shapes() -> None:
    weight = normal((6, 3, 3, 3), 0, torch.float32).requires_grad_()
    with no_recompilation():
        compiled = torch.compile(conv_stats, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 3, 6, 7), (5, 3, 5, 9)):
            x = normal(shape, 0, torch.float32)
            grads = [
                torch.autograd.grad(sum(out.sum() for out in function(x, weight)), weight)
                for function in (compiled, eager)
            ]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


X, W, S = torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3), torch.ones(4)
BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    **BAD_GEOMETRY,
    "x dimensions": (
        {"x": X[0]},
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\), got shape \(4, 6, 6\)",
    ),
    "x integers": ({"x": X.int()}, TypeError, r"x must be a floating-point .* got torch.int32"),
    "x is a list": ({"x": [1.0]}, TypeError, r"x must be a Tensor, got list"),
    "weight channels": (
        {"weight": torch.ones(6, 5, 3, 3)},
        ValueError,
        r"weight must have C / groups = 4 input channels, got 5",
    ),
    "groups": (
        {"groups": 3},
        ValueError,
        r"groups must divide the channels of x \(4\) and of weight \(6\), got 3",
    ),
    "small image": (
        {"x": torch.ones(2, 4, 2, 2)},
        ValueError,
        r"x must be at least as large as the kernel, got \(2, 4, 2, 2\) for weight \(6, 4, 3, 3\)",
    ),
    "scale": (
        {"scale": torch.ones(6)},
        ValueError,
        r"scale must have one value per channel \(4,\), got \(6,\)",
    ),
    "scale integers": ({"scale": S.int()}, TypeError, r"scale must be a floating-point tensor"),
    "shift": (
        {"shift": torch.ones(4, 1)},
        ValueError,
        r"shift must have one value per channel \(4,\), got \(4, 1\)",
    ),
    "shift device": (
        {"shift": torch.ones(4, device="meta")},
        ValueError,
        r"shift must be on the device of x cpu, got meta",
    ),
    "scale alone": ({"shift": None}, ValueError, r"shift must be given with scale, got None"),
    "shift alone": ({"scale": None}, ValueError, r"scale must be given with shift, got None"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    good = {"x": X, "weight": W, "scale": S, "shift": S}
    assert_refused(conv_stats, good | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    good = {"x": X, "weight": W, "scale": S, "shift": S, "groups": 1}
    with pytest.raises((error, RuntimeError)):
        ops.conv_stats(**(good | PAIRS | in_pairs(changed)))


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(guard: Any) -> None:
    """A tangent that is dropped would be a derivative of zero."""
    x, tangent = (normal((2, 4, 6, 6), i, torch.float32) for i in (0, 2))
    expected = "conv_stats: forward-mode derivatives are not implemented"
    with forward_ad.dual_level(), guard(), pytest.raises(NotImplementedError, match=expected):
        conv_stats(forward_ad.make_dual(x, tangent), W)
