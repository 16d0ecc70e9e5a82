"""conv_dgrad: the input's gradient with everything that may stand before and behind it."""

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
    has_few_channels,
    in_pairs,
    prologue_of,
    vector,
    weight_of,
)
from numerics import LAYOUTS, Case, grid, no_recompilation, normal, on_backends
from test_conv_bn_relu import Conv
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import conv_dgrad, conv_stats, conv_wgrad
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu_with_statistics

ops = torch.ops.resnet_fused
OUTPUTS = ("grad_x", "sum_grad", "sum_grad_x", "grad_conv")
# What takes part, by the names of arguments.
BATCH_NORM = ("y", "coefficients")
RELU = ("x", "scale", "shift")
PARTS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "batch norm": BATCH_NORM,
    "residual": ("residual",),
    "relu": RELU,
    "relu and sums": (*RELU, "mean"),
    "mask": ("mask",),
    "mask and sums": ("x", "mask", "mean"),
    "sums": ("x", "mean"),
    "all": (*BATCH_NORM, "residual", *RELU, "mean"),
    "all with mask": (*BATCH_NORM, "residual", "x", "mask", "mean"),
}
OPTIONAL = ("y", "coefficients", "residual", "x", "scale", "shift", "mask", "mean")


def tensors_of(case: Case, conv: Conv, parts: str, seed: int = 0) -> Tensors:
    channels, kernels = conv.x[1], conv.kernels
    candidates = {
        "y": case.other(seed + 2, conv.out),
        "coefficients": vector(case, normal((3, kernels), seed + 3)),
        "residual": case.other(seed + 4, conv.x),
        "x": case.x(seed + 5, conv.x),
        **prologue_of(case, conv, seed + 6),
        "mask": packed(normal(conv.x, seed + 8) > -0.3).to(case.device),
        "mean": vector(case, normal((channels,), seed + 9)),
    }
    chosen = {name: candidates[name] for name in PARTS[parts]}
    weight = weight_of(case, conv, seed + 1)
    return {"grad_y": case.other(seed, conv.out), "weight": weight, **chosen}


def packed(passes: Tensor) -> Tensor:
    """A channels_last mask: a run of bits per pixel, the first channel in the lowest bit."""
    n, c, h, w = passes.shape
    bits = F.pad(passes.permute(0, 2, 3, 1).reshape(n * h * w, c), (0, -c % 8))
    return (bits.view(n * h * w, -(-c // 8), 8) << torch.arange(8)).sum(2).to(torch.uint8)


def unpacked(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    n, c, h, w = shape
    bits = mask.unsqueeze(2).bitwise_right_shift(torch.arange(8, device=mask.device)) & 1
    return bits.bool().flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)


def eager(
    conv: Conv,
    grad_y: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensors:
    """Rounded after every step, as eager does."""
    results = {"grad_conv": grad_y.new_empty(0)}
    if y is not None and coefficients is not None:
        a, b, d = coefficients.unsqueeze(2).unsqueeze(2)
        grad_y = results["grad_conv"] = (a * grad_y + (b * y + d)).to(y.dtype)
    zeros = grad_y.new_zeros(grad_y.size(0), *conv.x[1:]).requires_grad_()
    with torch.enable_grad():
        out = F.conv2d(zeros, weight.detach(), None, *conv.geometry)
    (grad,) = torch.autograd.grad(out, zeros, grad_y)
    if residual is not None:
        grad = grad + residual
    if x is not None and scale is not None and shift is not None:
        grad = grad.masked_fill(x * per_channel(scale) + per_channel(shift) <= 0, 0)
    if mask is not None:
        grad = grad.masked_fill(~unpacked(mask, conv.x), 0)
    sums = vector_like(grad).new_empty(0)
    results |= {"grad_x": grad, "sum_grad": sums, "sum_grad_x": sums}
    if x is not None and mean is not None:
        values = vector_like(grad)
        results["sum_grad"] = values.sum((0, 2, 3))
        results["sum_grad_x"] = (values * (x - per_channel(mean))).sum((0, 2, 3))
    return results


def per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def vector_like(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fused(conv: Conv, grad_y: Tensor, weight: Tensor, **optional: Tensor) -> Tensors:
    stride, padding, dilation, groups = conv.geometry
    outputs = conv_dgrad(
        *(grad_y, weight, conv.x[2:]),
        **optional,
        **{"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )
    return dict(zip(OUTPUTS, outputs, strict=True))


def check(case: Case, conv: Conv, parts: str) -> None:
    with rf.backend(case.backend):
        results = assert_same_outputs(
            lambda **tensors: fused(conv, **tensors),
            lambda **tensors: eager(conv, **tensors),
            lambda seed: tensors_of(case, conv, parts, seed),
            lambda _: {},
            draws(conv),
        )
    leading = case.x(0, conv.x) if "x" in PARTS[parts] else case.other(0, conv.out)
    assert_in_format(results["grad_x"], leading)
    if "coefficients" in PARTS[parts]:
        assert_in_format(results["grad_conv"], leading)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(
    "case", grid("conv_dgrad", dtypes=FAST, layouts=["channels_last"], interpreter=False)
)
def test_matches_eager(case: Case, conv: str) -> None:
    check(case, CONVS[conv], "nothing" if has_few_channels(CONVS[conv]) else "all")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("conv", ["1x1", "strided"])
@pytest.mark.parametrize(
    "case", grid("conv_dgrad", dtypes=FAST, layouts=["channels_last"], interpreter=False)
)
def test_parts(case: Case, conv: str, parts: str) -> None:
    check(case, CONVS[conv], parts)


@pytest.mark.parametrize("parts", ["all", "all with mask"])
@pytest.mark.parametrize("case", grid("conv_dgrad"))
def test_dtypes(case: Case, parts: str) -> None:
    check(case, CONVS["odd channels"], parts)


@pytest.mark.parametrize("parts", ["all", "all with mask"])
@pytest.mark.parametrize("conv", LAYERED)
@pytest.mark.parametrize("case", grid("conv_dgrad", dtypes=[torch.float32], layouts=LAYOUTS))
def test_layouts(case: Case, conv: str, parts: str) -> None:
    check(case, CONVS[conv], parts)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (2, 1)])
@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_pixels_that_no_output_reads(backend: str, extra: tuple[int, int], kernel: int) -> None:
    """The same output fits inputs of several sizes: what is left over gets the residual alone."""
    case = Case(backend, (), torch.float32, "channels_last")
    shape = (2, 8, kernel + 6 + extra[0], kernel + 3 + extra[1])
    conv = Conv(shape, 16, kernel, stride=(3, 3), padding=(0, 0))
    assert conv.out[2:] == (3, 2)
    for parts in ("nothing", "all"):
        check(case, conv, parts)


@pytest.mark.parametrize("backend", on_backends("conv_dgrad", interpreter=False))
def test_repeats_bit_by_bit(backend: str) -> None:
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["strided"]
    tensors = tensors_of(case, conv, "all")
    with rf.backend(backend):
        first, second = (fused(conv, **tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_weight_wider_than_the_gradient(backend: str, dtype: torch.dtype) -> None:
    case, conv = Case(backend, (), torch.bfloat16, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, "residual")
    expected = eager(conv, **tensors)["grad_x"]
    with rf.backend(backend):
        wide = tensors | {"weight": tensors["weight"].to(dtype)}
        grad_x = fused(conv, **wide)["grad_x"]
    torch.testing.assert_close(grad_x, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", on_backends("conv_dgrad", torch.bfloat16))
def test_batch_norm_is_in_float32(backend: str) -> None:
    """Two numbers next to 1, which bfloat16 would round to 1, and -2."""
    case, conv = Case(backend, (), torch.bfloat16, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, "batch norm")
    for name in ("grad_y", "y"):
        tensors[name].fill_(1)
    for row, value in zip(tensors["coefficients"], (1 + 2**-8, 1 + 2**-8, -2), strict=True):
        row.fill_(value)
    with rf.backend(backend):
        grad_conv = fused(conv, **tensors)["grad_conv"]
    assert torch.equal(grad_conv, torch.full_like(grad_conv, 2**-7))


@pytest.mark.parametrize("case", grid("conv_dgrad", dtypes=FAST, layouts=["channels_last"]))
def test_mask_of_bn_relu(case: Case) -> None:
    conv = CONVS["3x3"]
    channels = conv.x[1]
    ones, zeros = (vector(case, fill((channels,))) for fill in (torch.ones, torch.zeros))
    x, residual = case.x(0, conv.x), case.other(1, conv.x)
    norm = BatchNormArgs(ones, zeros, None, None, training=True)
    with rf.backend("reference"):
        out, *_, mask = bn_relu_with_statistics(x, norm, residual, save_mask=True)
    tensors = tensors_of(case, conv, "nothing")
    expected = eager(conv, **tensors)["grad_x"].masked_fill(out <= 0, 0)
    strided = torch.stack([mask, mask], 2)[..., 0]
    close = {"rtol": 2e-2, "atol": 2e-2} if case.dtype == torch.bfloat16 else {}
    with rf.backend(case.backend):
        for given in (mask, strided):
            grad_x = fused(conv, **tensors, mask=given)["grad_x"]
            torch.testing.assert_close(grad_x, expected, **close)


def by_hand(
    conv: Conv, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, gamma: Tensor, grad: Tensor
) -> Tensors:
    prologue = scale, shift
    y, mean, m2 = conv_stats(x, weight, *prologue, *conv.geometry)
    count = y.numel() // y.size(1)
    invstd = (m2 / count + 1e-5).rsqrt()
    a = gamma * invstd
    b = -a * invstd.square() * (grad * (y - per_channel(mean))).sum((0, 2, 3)) / count
    d = -a * grad.sum((0, 2, 3)) / count - b * mean
    coefficients, zeros = torch.stack([a, b, d]), torch.zeros_like(scale)
    masked, sum_grad, sum_grad_x, grad_conv = conv_dgrad(
        *(grad, weight, x.shape[2:], y, coefficients, None, x, *prologue, None, zeros),
        *conv.geometry,
    )
    return {
        "before the relu": masked,
        "scale": sum_grad_x,
        "shift": sum_grad,
        "weight": conv_wgrad(grad_conv, x, weight, *prologue, *conv.geometry),
    }


def by_autograd(
    conv: Conv, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, gamma: Tensor, grad: Tensor
) -> Tensors:
    leaves = {"scale": scale, "shift": shift, "weight": weight}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with torch.enable_grad():
        before = x * per_channel(leaves["scale"]) + per_channel(leaves["shift"])
        y = F.conv2d(torch.relu(before), leaves["weight"], None, *conv.geometry)
        out = F.batch_norm(y, None, None, gamma, torch.zeros_like(gamma), training=True)
    gradients = torch.autograd.grad(out, [before, *leaves.values()], grad)
    return dict(zip(("before the relu", *leaves), gradients, strict=True))


@pytest.mark.parametrize("conv", ["3x3", "strided 1x1"])
@pytest.mark.parametrize(
    "case", grid("conv_dgrad", dtypes=[torch.float32, torch.float64], layouts=["channels_last"])
)
def test_backward_of_conv_and_batch_norms(case: Case, conv: str) -> None:
    """relu(bn(x)) -> conv -> bn, gone through backwards by two operators and a few vectors."""
    chosen = CONVS[conv]

    def tensors(seed: int) -> Tensors:
        return {
            "x": case.x(seed, chosen.x),
            "weight": weight_of(case, chosen, seed + 1),
            **prologue_of(case, chosen, seed + 2),
            "gamma": vector(case, normal((chosen.kernels,), seed + 4).abs() + 0.5),
            "grad": case.other(seed + 5, chosen.out),
        }

    with rf.backend(case.backend):
        assert_same_outputs(
            lambda **given: by_hand(chosen, **given),
            lambda **given: by_autograd(chosen, **given),
            tensors,
            lambda _: {},
            range(0, 200, 100),
        )


@pytest.mark.parametrize("conv", TINY)
@pytest.mark.parametrize("parts", ["nothing", "all", "all with mask"])
@pytest.mark.parametrize("backend", on_backends("conv_dgrad", torch.float64))
def test_derivatives(backend: str, parts: str, conv: str) -> None:
    small = TINY[conv]
    case = Case(backend, (), torch.float64, "nchw")
    tensors = tensors_of(case, small, parts)
    # Only their signs matter, which have no derivative.
    fixed = {name: tensors.pop(name) for name in ("scale", "shift", "mask") if name in tensors}
    names = list(tensors)
    outputs = OUTPUTS if parts != "nothing" else OUTPUTS[:1]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        results = fused(small, **dict(zip(names, values, strict=True)), **fixed)
        return tuple(results[name] for name in outputs)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with rf.backend(backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("parts", ["nothing", "all", "all with mask"])
@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_empty_batch(backend: str, parts: str) -> None:
    conv = CONVS["3x3"]._replace(x=(0, 16, 7, 6))
    tensors = tensors_of(Case(backend, (), torch.float32, "channels_last"), conv, parts)
    with rf.backend(backend):
        results = fused(conv, **tensors)
    assert results["grad_x"].shape == conv.x
    if parts != "nothing":
        assert results["grad_conv"].shape == conv.out
        for name in ("sum_grad", "sum_grad_x"):
            assert torch.equal(results[name], torch.zeros(conv.x[1]))
        assert results["sum_grad"].data_ptr() != results["sum_grad_x"].data_ptr()


@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_zero_stops_the_gradient(backend: str) -> None:
    """Where the ReLU in front saw exactly 0, its derivative is 0, as in PyTorch."""
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, "relu and sums")
    tensors["scale"][5] = tensors["shift"][5] = 0
    with rf.backend(backend):
        results = fused(conv, **tensors)
    assert not results["grad_x"][:, 5].any()
    torch.testing.assert_close(results, eager(conv, **tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", ["all", "all with mask"])
@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_nan_passes(backend: str, parts: str) -> None:
    """Also where the ReLU in front saw it: NaN is not at most zero."""
    case, conv = Case(backend, (), torch.float32, "channels_last"), CONVS["3x3"]
    tensors = tensors_of(case, conv, parts)
    nan = float("nan")
    tensors["grad_y"][0, 3, 2, 2] = tensors["residual"][1, 2, 0, 0] = nan
    tensors["x"][1, 5, 3, 3] = nan
    expected = eager(conv, **tensors)
    assert 0 < expected["grad_x"].isnan().sum() < expected["grad_x"].numel()
    with rf.backend(backend):
        results = fused(conv, **tensors)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def arguments_of(case: Case, conv: Conv, parts: str, gradient: bool) -> tuple[Any, ...]:
    tensors = {
        name: tensor.requires_grad_(gradient and name not in ("scale", "shift", "mask"))
        for name, tensor in tensors_of(case, conv, parts).items()
    }
    required = tensors["grad_y"], tensors["weight"], conv.x[2:]
    return (*required, *(tensors.get(name) for name in OPTIONAL), *conv.geometry)


@pytest.mark.parametrize("parts", ["batch norm", "all"])
@pytest.mark.parametrize("conv", ["strided", "1x1 image", "one channel"])
@pytest.mark.parametrize(
    "case", grid("conv_dgrad", dtypes=[torch.bfloat16], layouts=LAYOUTS, interpreter=False)
)
def test_fake_is_like_real(case: Case, conv: str, parts: str) -> None:
    arguments = arguments_of(case, CONVS[conv], parts, gradient=False)
    assert_fake_is_like(case.backend, ops.conv_dgrad.default, arguments)


@pytest.mark.parametrize(
    ("parts", "layout"),
    [("nothing", "channels_last"), ("all", "mixed_reversed"), ("all with mask", "channels_last")],
)
@pytest.mark.parametrize("backend", on_backends("conv_dgrad"))
def test_opcheck(backend: str, layout: str, parts: str) -> None:
    case, conv = Case(backend, (), torch.float32, layout), Conv((2, 4, 3, 3), 6)
    with rf.backend(backend):
        for gradient in (False, True):
            arguments = arguments_of(case, conv, parts, gradient)
            torch.library.opcheck(ops.conv_dgrad.default, arguments)


@pytest.mark.parametrize("parts", ["nothing", "all"])
def test_compiles_once(parts: str) -> None:
    case, conv = Case("cpu", (), torch.float32, "channels_last"), CONVS["strided"]
    arguments = arguments_of(case, conv, parts, gradient=False)
    expected = eager(conv, **tensors_of(case, conv, parts))
    with no_recompilation():
        compiled = torch.compile(conv_dgrad, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            for name, output in zip(OUTPUTS, compiled(*arguments), strict=True):
                torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)


def test_dynamic_shapes() -> None:
    weight = normal((6, 3, 3, 3), 0, torch.float32)
    with no_recompilation():
        compiled = torch.compile(conv_dgrad, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch, height, width in ((2, 9, 10), (4, 12, 14), (5, 11, 15)):
            conv = Conv((batch, 3, height, width), 6, padding=(0, 0))
            grad_y = normal(conv.out, 1, torch.float32)
            grad_x = compiled(grad_y, weight, (height, width))[0]
            torch.testing.assert_close(grad_x, eager(conv, grad_y, weight)["grad_x"])


G, X, W, S = torch.ones(2, 6, 4, 4), torch.ones(2, 4, 6, 6), torch.ones(6, 4, 3, 3), torch.ones(4)
MASK = torch.ones(72, 1, dtype=torch.uint8)
GOOD = {
    "grad_y": G, "weight": W, "input_size": (6, 6), "y": G, "coefficients": torch.ones(3, 6),
    "residual": X, "x": X, "scale": S, "shift": S, "mask": None, "mean": S,
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    **BAD_GEOMETRY,
    "grad_y dimensions": (
        {"grad_y": G[0]},
        ValueError,
        r"grad_y must have 4 dimensions \(N, C, H, W\), got shape \(6, 4, 4\)",
    ),
    "grad_y is None": ({"grad_y": None}, TypeError, r"grad_y must be a Tensor, got NoneType"),
    "grad_y integers": ({"grad_y": G.int()}, TypeError, r"grad_y must be a floating-point tensor"),
    "grad_y shape": (
        {"grad_y": torch.ones(2, 6, 6, 6)},
        ValueError,
        r"grad_y must have the shape of the convolution's output \(2, 6, 4, 4\), got"
        r" \(2, 6, 6, 6\)",
    ),
    "input_size": (
        {"input_size": (7, 6)},
        ValueError,
        r"grad_y must have the shape of the convolution's output \(2, 6, 5, 4\), got"
        r" \(2, 6, 4, 4\)",
    ),
    "three sizes": (
        {"input_size": (2, 6, 6)},
        ValueError,
        r"input_size must be one int or two, got \(2, 6, 6\)",
    ),
    "groups": (
        {"groups": 4},
        ValueError,
        r"groups must divide the channels of x \(16\) and of weight \(6\), got 4",
    ),
    "y shape": (
        {"y": X},
        ValueError,
        r"y must have the shape of the convolution's output \(2, 6, 4, 4\), got \(2, 4, 6, 6\)",
    ),
    "y alone": (
        {"coefficients": None},
        ValueError,
        r"coefficients must be given with y, got None",
    ),
    "coefficients alone": ({"y": None}, ValueError, r"y must be given with coefficients, got None"),
    "coefficients": (
        {"coefficients": torch.ones(6, 3)},
        ValueError,
        r"coefficients must have three values per output channel \(3, 6\), got \(6, 3\)",
    ),
    "coefficients integers": (
        {"coefficients": torch.ones(3, 6).int()},
        TypeError,
        r"coefficients must be a floating-point tensor, got torch.int32",
    ),
    "residual shape": (
        {"residual": G},
        ValueError,
        r"residual must have the shape of the convolution's input \(2, 4, 6, 6\), got"
        r" \(2, 6, 4, 4\)",
    ),
    "residual dtype": (
        {"residual": X.double()},
        TypeError,
        r"residual must have the dtype of grad_y torch.float32, got torch.float64",
    ),
    "x shape": (
        {"x": X[:, :3]},
        ValueError,
        r"x must have the shape of the convolution's input \(2, 4, 6, 6\), got \(2, 3, 6, 6\)",
    ),
    "x device": (
        {"x": X.to("meta")},
        ValueError,
        r"x must be on the device of grad_y cpu, got meta",
    ),
    "scale without x": ({"x": None}, ValueError, r"x must be given with scale, got None"),
    "shift without x": (
        {"x": None, "scale": None, "mean": None},
        ValueError,
        r"x must be given with shift, got None",
    ),
    "mean without x": (
        {"x": None, "scale": None, "shift": None},
        ValueError,
        r"x must be given with mean, got None",
    ),
    "scale": (
        {"scale": torch.ones(6)},
        ValueError,
        r"scale must have one value per channel \(4,\), got \(6,\)",
    ),
    "scale alone": ({"shift": None}, ValueError, r"shift must be given with scale, got None"),
    "mean": (
        {"mean": torch.ones(6)},
        ValueError,
        r"mean must have one value per channel \(4,\), got \(6,\)",
    ),
    "mask and scale": (
        {"mask": MASK},
        ValueError,
        r"mask must be None with scale and shift, got both",
    ),
    "mask shape": (
        {"mask": MASK[:36], "scale": None, "shift": None},
        ValueError,
        r"mask must have the bits of a channels_last mask \(72, 1\), got \(36, 1\)",
    ),
    "mask dtype": (
        {"mask": MASK.bool(), "scale": None, "shift": None},
        TypeError,
        r"mask must be a uint8 tensor of bits, got torch.bool",
    ),
    "mask device": (
        {"mask": MASK.to("meta"), "scale": None, "shift": None},
        ValueError,
        r"mask must be on the device of grad_y cpu, got meta",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    assert_refused(conv_dgrad, GOOD | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    with pytest.raises((error, RuntimeError)):
        ops.conv_dgrad(**(GOOD | PAIRS | {"groups": 1} | in_pairs(changed)))
