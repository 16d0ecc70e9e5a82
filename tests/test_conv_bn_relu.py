"""conv_bn_relu: forward, gradients, packed weights, formats, tracing and bad input."""

from typing import Any, NamedTuple

import pytest
import torch
from numerics import (
    LAYOUTS,
    Case,
    assert_as_accurate_as_eager,
    assert_fake_is_like_real,
    assert_format_follows,
    assert_same_function,
    grid,
    no_recompilation,
    normal,
    on_backends,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.commands.cases import scaled
from resnet_fused.ops import conv_bn_relu
from resnet_fused.ops.conv_bn_relu import conv_bn_relu_

ops = torch.ops.resnet_fused


class Conv(NamedTuple):
    """A convolution: shape of x, number of kernels, and how they slide."""

    x: tuple[int, ...]
    kernels: int
    kernel: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.kernels, self.x[1] // self.groups, self.kernel, self.kernel)

    @property
    def out(self) -> tuple[int, ...]:
        x, weight = torch.empty(self.x, device="meta"), torch.empty(self.weight, device="meta")
        return tuple(F.conv2d(x, weight, None, *self.geometry).shape)


CONVS = {
    "3x3": Conv((2, 16, 7, 6), 24),
    "1x1": Conv((2, 16, 5, 7), 32, kernel=1, padding=(0, 0)),
    "strided": Conv((2, 8, 9, 8), 16, stride=(2, 2)),
    "strided 1x1": Conv((2, 8, 9, 8), 16, kernel=1, stride=(2, 2), padding=(0, 0)),
    "uneven": Conv((2, 8, 9, 8), 16, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "dilated": Conv((1, 8, 11, 9), 8, padding=(2, 2), dilation=(2, 2)),
    "grouped": Conv((2, 24, 6, 5), 36, groups=4),
    "depthwise": Conv((2, 9, 6, 5), 9, groups=9),
    "stem": Conv((1, 3, 21, 18), 16, kernel=7, stride=(2, 2), padding=(3, 3)),
    "odd channels": Conv((2, 13, 5, 4), 7),
    "one channel": Conv((3, 1, 5, 4), 17),
    "1x1 image": Conv((5, 16, 1, 1), 24),
    "layer3": Conv((1, 256, 14, 14), 64, kernel=1, padding=(0, 0)),
    "layer4": Conv((1, 64, 7, 7), 64),
}
LAYERED = ("3x3", "strided", "1x1 image")


def tensors_of(case: Case, conv: Conv, residual: bool, seed: int = 0) -> dict[str, Tensor]:
    vectors = torch.float64 if case.dtype == torch.float64 else torch.float32
    fan_in = conv.weight[1] * conv.kernel**2
    weight = normal(conv.weight, seed + 1) / fan_in**0.5
    tensors = {
        "x": case.x(seed, conv.x),
        "weight": weight.to(case.device, case.dtype),
        "scale": (normal((conv.kernels,), seed + 2).abs() + 0.5).to(case.device, vectors),
        "shift": normal((conv.kernels,), seed + 3).to(case.device, vectors),
    }
    if residual:
        tensors["residual"] = case.other(seed + 4, conv.out)
    return tensors


def eager(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    *geometry: Any,
) -> Tensor:
    out = scaled(F.conv2d(x, weight, None, *geometry), scale, shift)
    out = out if residual is None else out + residual
    return torch.relu(out) if relu else out


def check(case: Case, conv: Conv, residual: bool, relu: bool = True) -> None:
    if torch.finfo(case.dtype).bits == 16:
        relu = False  # a rounding may change the sign that its gradient asks for
    draws = []
    for seed in range(0, 100 * -(-64 // conv.kernels), 100):  # 64 channels or more
        grad_out = case.other(seed + 5, conv.out)
        draws.append((tensors_of(case, conv, residual, seed), grad_out))

    def call(function: Any, residual: Tensor | None = None, **tensors: Tensor) -> Tensor:
        arguments = tensors["x"], tensors["weight"], tensors["scale"], tensors["shift"]
        return function(*arguments, residual, relu, *conv.geometry)

    with rf.backend(case.backend):
        results = assert_same_function(
            lambda **tensors: call(conv_bn_relu, **tensors),
            lambda **tensors: call(eager, **tensors),
            *draws,
        )
    assert_format_follows(results, draws[-1][0])


FAST = (torch.float32, torch.bfloat16)  # the other convolutions are slow on most CPUs


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("case", grid("conv_bn_relu", dtypes=FAST, interpreter=False))
def test_matches_eager(case: Case, conv: str) -> None:
    check(case, CONVS[conv], residual=case.layout == "channels_last")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", grid("conv_bn_relu"))
def test_dtypes(case: Case, residual: bool) -> None:
    check(case, CONVS["odd channels"], residual)


@pytest.mark.parametrize("conv", LAYERED)
@pytest.mark.parametrize("case", grid("conv_bn_relu", dtypes=[torch.float32], layouts=LAYOUTS))
def test_layouts(case: Case, conv: str) -> None:
    check(case, CONVS[conv], residual=True)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", grid("conv_bn_relu", dtypes=FAST))
def test_without_relu(case: Case, residual: bool) -> None:
    check(case, CONVS["3x3"], residual, relu=False)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("case", grid("conv_bn_relu", dtypes=FAST, interpreter=False))
def test_packed_weights_match_eager(case: Case, conv: str, inplace: bool) -> None:
    """Weights are packed when they are seen again. In channels_last eager has the same order."""
    geometry = CONVS[conv].geometry
    tensors = tensors_of(case, CONVS[conv], residual=inplace)
    native = [LAYOUTS["channels_last"][0](t) if t.dim() == 4 else t for t in tensors.values()]
    expected = eager(*native, *(() if inplace else (None,)), True, *geometry)
    doubled = [t.double() for t in tensors.values()]
    exact = eager(*doubled, *(() if inplace else (None,)), True, *geometry)
    for call in range(3):
        with rf.backend(case.backend), torch.no_grad():
            if inplace:
                residual = tensors["residual"].clone()
                version = residual._version
                arguments = *list(tensors.values())[:4], residual
                out = conv_bn_relu_(*arguments, True, *geometry)
                assert out is residual
                assert residual._version > version
            else:
                out = conv_bn_relu(*tensors.values(), None, True, *geometry)
        assert_as_accurate_as_eager(out, expected, exact, f"call {call}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conv", LAYERED)
@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu", interpreter=False))
def test_packed_weights_in_all_layouts(
    backend: str, dtype: torch.dtype, conv: str, layout: str
) -> None:
    case, geometry = Case(backend, (), dtype, layout), CONVS[conv].geometry
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    tensors = tensors_of(case, CONVS[conv], residual=True)
    expected = eager(*tensors.values(), True, *geometry)
    for _ in range(3):
        with rf.backend(backend), torch.no_grad():
            out = conv_bn_relu(*tensors.values(), True, *geometry)
            torch.testing.assert_close(out, expected, **close)
            if layout == "expanded":
                continue
            for residual in (tensors["residual"], LAYOUTS["nchw"][0](tensors["residual"])):
                wide = [2 * s for s in residual.stride()]
                apart = residual.new_empty_strided(residual.shape, wide)
                for copy in (residual.clone(), apart.copy_(residual)):
                    arguments = *list(tensors.values())[:4], copy
                    result = conv_bn_relu_(*arguments, True, *geometry)
                    torch.testing.assert_close(result, expected, **close)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu", interpreter=False))
def test_inplace_into_the_memory_of_x(backend: str, dtype: torch.dtype) -> None:
    """All of x must have been read before anything is written."""
    case, conv = Case(backend, (), dtype, "channels_last"), Conv((2, 64, 12, 11), 64)
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    tensors = tensors_of(case, conv, residual=False)
    for _ in range(3):
        x, *others = (tensor.clone() for tensor in tensors.values())
        with rf.backend(backend), torch.no_grad():
            expected = conv_bn_relu(x, *others, x, True, *conv.geometry)
            conv_bn_relu_(x, *others, x, True, *conv.geometry)
        torch.testing.assert_close(x, expected, **close)


def test_inplace_on_an_expanded_residual_is_refused() -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = list(tensors_of(case, conv, residual=True).values())
    tensors[-1] = tensors[-1][:, :, :1].expand(conv.out)
    for _ in range(3):
        with torch.no_grad(), pytest.raises(RuntimeError, match="single memory location"):
            conv_bn_relu_(*tensors, True, *conv.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_weight_wider_than_x(backend: str, dtype: torch.dtype) -> None:
    case, conv = Case(backend, (), torch.bfloat16, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, residual=False)
    wide = tensors | {"weight": tensors["weight"].to(dtype)}
    for _ in range(3):
        with rf.backend(backend), torch.no_grad():
            out = conv_bn_relu(*wide.values(), None, True, *conv.geometry)
            expected = eager(*tensors.values(), None, True, *conv.geometry)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("conv", ["3x3", "grouped", "uneven"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu", torch.float64))
def test_second_derivatives(backend: str, residual: bool, conv: str) -> None:
    small = {
        "3x3": Conv((1, 2, 3, 3), 2),
        "grouped": Conv((1, 4, 2, 3), 2, groups=2),
        "uneven": Conv((1, 2, 4, 3), 2, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    }[conv]
    case = Case(backend, (), torch.float64, "nchw")
    tensors = [t.requires_grad_() for t in tensors_of(case, small, residual).values()]

    def function(*values: Tensor) -> Tensor:
        given = values if residual else (*values, None)
        return conv_bn_relu(*given, True, *small.geometry)

    with rf.backend(backend):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("needed", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_gradient_of_one_argument(backend: str, needed: str) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, residual=True)
    tensors[needed].requires_grad_()
    expected = eager(*tensors.values(), True, *conv.geometry).square().sum()
    (expected_grad,) = torch.autograd.grad(expected, tensors[needed])
    with rf.backend(backend):
        conv_bn_relu(*tensors.values(), True, *conv.geometry).square().sum().backward()
    torch.testing.assert_close(tensors[needed].grad, expected_grad, rtol=1e-4, atol=1e-3)
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_without_gradients(backend: str, guard: Any) -> None:
    case, conv = Case(backend, (), torch.float32, "nchw"), CONVS["3x3"]
    tensors = [t.requires_grad_() for t in tensors_of(case, conv, residual=True).values()]
    for _ in range(3):
        with rf.backend(backend), guard():
            out = conv_bn_relu(*tensors, True, *conv.geometry)
            torch.testing.assert_close(out, eager(*tensors, True, *conv.geometry))
        assert not out.requires_grad


@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_empty_batch(backend: str) -> None:
    conv = CONVS["3x3"]._replace(x=(0, 16, 7, 6))
    case = Case(backend, (), torch.float32, "nchw")
    tensors = [t.requires_grad_() for t in tensors_of(case, conv, residual=True).values()]
    for _ in range(2):
        with rf.backend(backend), torch.no_grad():
            out = conv_bn_relu(*tensors, True, *conv.geometry)
        assert out.shape == conv.out
    with rf.backend(backend):
        conv_bn_relu(*tensors, True, *conv.geometry).sum().backward()
    assert torch.equal(tensors[1].grad, torch.zeros_like(tensors[1]))


def with_nan(case: Case, conv: Conv) -> dict[str, Tensor]:
    tensors = tensors_of(case, conv, residual=True)
    tensors["x"][0, 3, 2, 2] = float("nan")
    tensors["residual"][1, 5, 3, 3] = float("nan")
    return tensors


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_nan_passes(backend: str, relu: bool) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = list(with_nan(case, conv).values())
    expected = eager(*tensors, relu, *conv.geometry)
    assert expected[1].isnan().sum() == 1
    with rf.backend(backend):
        out = conv_bn_relu(*tensors, relu, *conv.geometry)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.xfail(strict=True, reason="the ReLU that oneDNN fuses gives 0 for NaN")
def test_nan_passes_the_relu_of_onednn() -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = list(with_nan(case, conv).values())
    with rf.backend("cpu"), torch.no_grad():
        for _ in range(2):
            out = conv_bn_relu(*tensors, True, *conv.geometry)
    assert out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_autocast_is_as_eager(residual: bool, dtype: torch.dtype) -> None:
    """Without ReLU, because a rounding to bfloat16 may change the sign that it asks for."""
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["3x3"]
    draws = []
    for seed in (0, 100):
        tensors = tensors_of(case, conv, residual, seed)
        for name in ("x", "residual") if residual else ("x",):
            tensors[name] = tensors[name].to(dtype)
        draws.append((tensors, case.other(seed + 5, conv.out).to(torch.bfloat16)))

    def call(function: Any, residual: Tensor | None = None, **tensors: Tensor) -> Tensor:
        exact = tensors["x"].dtype == torch.float64
        if residual is not None and not exact:
            residual = residual.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
            return function(*tensors.values(), residual, False, *conv.geometry)

    assert_same_function(
        lambda **tensors: call(conv_bn_relu, **tensors),
        lambda **tensors: call(eager, **tensors),
        *draws,
    )


def calls(case: Case, conv: Conv, gradient: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Overloads and their arguments: conv_bn_relu, in place, and its backward."""
    listed: list[tuple[Any, tuple[Any, ...]]] = []
    for residual in (False, True):
        tensors = tensors_of(case, conv, residual)
        leaves = [t.detach().requires_grad_(gradient) for t in tensors.values()]
        given = leaves if residual else [*leaves, None]
        listed.append((ops.conv_bn_relu.default, (*given, residual, *conv.geometry)))
        grad_out, out = case.other(5, conv.out), case.other(6, conv.out).relu()
        backward = (*(grad_out, *leaves[:3], out if residual else None, True, *conv.geometry),)
        listed.append((ops.conv_bn_relu_backward.default, backward))
    if not gradient and case.layout != "expanded":
        arguments = tuple(tensors_of(case, conv, residual=True).values())
        listed.append((ops.conv_bn_relu_.default, (*arguments, True, *conv.geometry)))
    return listed


@pytest.mark.parametrize("conv", ["strided", "1x1 image", "one channel"])
@pytest.mark.parametrize("case", grid("conv_bn_relu", dtypes=[torch.float32], layouts=LAYOUTS))
def test_fake_is_like_real(case: Case, conv: str) -> None:
    for overload, arguments in calls(case, CONVS[conv], gradient=False):
        with FakeTensorMode() as mode:
            faked = overload(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
            )
        for _ in range(2):
            with rf.backend(case.backend), torch.no_grad():
                real = overload(*arguments)
            if real is None:
                continue
            pairs = [(faked, real)] if isinstance(real, Tensor) else zip(faked, real, strict=True)
            for ours, theirs in pairs:
                assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
@pytest.mark.parametrize("backend", on_backends("conv_bn_relu"))
def test_opcheck(backend: str, layout: str) -> None:
    case, conv = Case(backend, (), torch.float32, layout), Conv((2, 4, 3, 3), 6)
    with rf.backend(backend):
        for gradient in (False, True):
            for overload, arguments in calls(case, conv, gradient):
                torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("residual", [False, True])
def test_switching_the_backend_recompiles_nothing(residual: bool) -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["strided"]
    tensors = [t.requires_grad_() for t in tensors_of(case, conv, residual).values()]
    given = tensors if residual else [*tensors, None]
    expected = eager(*given, True, *conv.geometry)
    expected_grads = torch.autograd.grad(expected.square().sum(), tensors)
    with no_recompilation():
        compiled = torch.compile(conv_bn_relu, fullgraph=True, backend="aot_eager")
        for backend in ("reference", "cpu"):
            with rf.backend(backend):
                out = compiled(*given, True, *conv.geometry)
                grads = torch.autograd.grad(out.square().sum(), tensors)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-3)


def test_dynamic_shapes() -> None:
    weight, scale, shift = normal((6, 3, 3, 3), 0, torch.float32), torch.ones(6), torch.zeros(6)
    with no_recompilation():
        compiled = torch.compile(conv_bn_relu, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 3, 6, 7), (5, 3, 5, 9)):
            x = normal(shape, 0, torch.float32)
            expected = eager(x, weight, scale, shift)
            torch.testing.assert_close(compiled(x, weight, scale, shift), expected)


X, W, S = torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3), torch.ones(6)
BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "x dimensions": (
        {"x": X[0]},
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\), got shape \(4, 6, 6\)",
    ),
    "x integers": (
        {"x": X.int()},
        TypeError,
        r"x must be a floating-point tensor, got torch.int32",
    ),
    "x is a list": ({"x": [1.0]}, TypeError, r"x must be a Tensor, got list"),
    "weight is None": ({"weight": None}, TypeError, r"weight must be a Tensor, got NoneType"),
    "weight dimensions": (
        {"weight": W[0]},
        ValueError,
        r"weight must be a floating-point \(K, C / groups, R, S\) tensor, got torch.float32 of"
        r" shape \(4, 3, 3\)",
    ),
    "weight integers": (
        {"weight": W.int()},
        ValueError,
        r"weight must be a floating-point .* got torch.int32",
    ),
    "weight channels": (
        {"weight": torch.ones(6, 5, 3, 3)},
        ValueError,
        r"weight must have C / groups = 4 input channels, got 5",
    ),
    "weight device": (
        {"weight": torch.ones(6, 4, 3, 3, device="meta")},
        ValueError,
        r"weight must be on the device of x cpu, got meta \(move one with .to\(\)\)",
    ),
    "groups": (
        {"groups": 3},
        ValueError,
        r"groups must divide the channels of x \(4\) and of weight \(6\), got 3",
    ),
    "no groups": ({"groups": 0}, ValueError, r"groups must divide .* got 0"),
    "scale": (
        {"scale": torch.ones(4)},
        ValueError,
        r"scale must have one value per output channel \(6,\), got \(4,\)",
    ),
    "scale integers": (
        {"scale": S.int()},
        TypeError,
        r"scale must be a floating-point tensor, got torch.int32",
    ),
    "shift": (
        {"shift": torch.ones(6, 1)},
        ValueError,
        r"shift must have one value per output channel \(6,\), got \(6, 1\)",
    ),
    "shift device": (
        {"shift": torch.ones(6, device="meta")},
        ValueError,
        r"shift must be on the device of x cpu, got meta",
    ),
    "stride": ({"stride": -1}, ValueError, r"stride must be at least 1, got \(-1, -1\)"),
    "zero stride": ({"stride": (1, 0)}, ValueError, r"stride must be at least 1, got \(1, 0\)"),
    "three strides": (
        {"stride": (1, 1, 1)},
        ValueError,
        r"stride must be one int or two, got \(1, 1, 1\)",
    ),
    "stride is a float": ({"stride": 1.5}, (TypeError, ValueError), r"stride must be .* got 1.5"),
    "dilation": ({"dilation": 0}, ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    "padding": ({"padding": -1}, ValueError, r"padding must not be negative, got \(-1, -1\)"),
    "padding by name": ({"padding": "same"}, ValueError, r"padding must be one int or two, got"),
    "small image": (
        {"x": torch.ones(2, 4, 2, 2)},
        ValueError,
        r"x must be at least as large as the kernel, got \(2, 4, 2, 2\) for weight \(6, 4, 3, 3\)",
    ),
    "residual shape": (
        {"residual": torch.ones(2, 6, 6, 6)},
        ValueError,
        r"residual must have the shape of the output \(2, 6, 4, 4\), got \(2, 6, 6, 6\)",
    ),
    "residual dtype": (
        {"residual": torch.ones(2, 6, 4, 4).double()},
        TypeError,
        r"residual must have the dtype of x torch.float32, got torch.float64",
    ),
    "residual device": (
        {"residual": torch.ones(2, 6, 4, 4, device="meta")},
        ValueError,
        r"residual must be on the device of x cpu, got meta",
    ),
    "residual is a number": (
        {"residual": 1.0},
        (TypeError, RuntimeError),
        r"residual",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    good = {"x": X, "weight": W, "scale": S, "shift": S}
    for _ in range(3):  # the same once weights could be packed
        with pytest.raises(error, match=message):
            conv_bn_relu(**(good | changed))


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed = BAD[bad][0]
    good = {"x": X, "weight": W, "scale": S, "shift": S, "residual": None, "relu": True}
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    out = torch.ones(2, 6, 4, 4)
    arguments = good | geometry | changed
    if bad in ("stride", "padding", "dilation"):
        arguments[bad] = (changed[bad],) * 2
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.conv_bn_relu(**arguments)
    if not bad.startswith("residual"):
        arguments["residual"] = out.clone()
    if bad != "residual device":  # fails in the dispatcher's own words
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.conv_bn_relu_(**arguments)
    del arguments["residual"], arguments["shift"], arguments["relu"]
    if not bad.startswith(("residual", "shift")):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.conv_bn_relu_backward(grad_out=out, out=out, has_residual=False, **arguments)


def test_bad_input_of_the_backward() -> None:
    geometry = (1, 1), (0, 0), (1, 1), 1
    out = torch.ones(2, 6, 4, 4)
    with pytest.raises(ValueError, match="conv_bn_relu_backward: grad_out must have the shape"):
        ops.conv_bn_relu_backward(out[:1], X, W, S, out, False, *geometry)
    with pytest.raises(ValueError, match="conv_bn_relu_backward: out must have the shape"):
        ops.conv_bn_relu_backward(out, X, W, S, out[:1], False, *geometry)


def test_no_gradient_in_place() -> None:
    residual = torch.ones(2, 6, 4, 4)
    with pytest.raises(RuntimeError, match=r"conv_bn_relu_: an argument requires a gradient, but"):
        conv_bn_relu_(X, W.clone().requires_grad_(), S, S, residual)


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(guard: Any) -> None:
    """A tangent that is dropped would be a derivative of zero."""
    x, tangent = (normal((2, 4, 6, 6), i, torch.float32) for i in (0, 2))

    def function(x: Tensor) -> Tensor:
        with guard():
            return conv_bn_relu(x, W, S, S)

    expected = "conv_bn_relu: forward-mode derivatives are not implemented"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=expected):
        function(forward_ad.make_dual(x, tangent))
    with pytest.raises(NotImplementedError, match=expected):
        torch.func.jvp(function, (x,), (tangent,))
    assert function(x).isfinite().all()
