"""Gradients of convolutions in Triton, run by the interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted_backend
import pytest
import torch
from numerics import assert_as_accurate_as_eager, normal
from torch import Tensor

from resnet_fused import reference
from resnet_fused.layout import mask_shape

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)

from test_interpreted_convolutions import NO_PADDING, Conv

from resnet_fused.triton_kernels import conv_dgrad as dgrad_module
from resnet_fused.triton_kernels import conv_wgrad as wgrad_module
from resnet_fused.triton_kernels import device
from resnet_fused.triton_kernels.conv_bn_relu_backward import conv_bn_relu_backward
from resnet_fused.triton_kernels.conv_dgrad import conv_dgrad
from resnet_fused.triton_kernels.conv_wgrad import conv_wgrad
from resnet_fused.triton_kernels.convolution import Configuration

pytestmark = pytest.mark.interpreter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# by_tma: how the gradient of the input is read and written where TMA can do it.
CONVS = {
    "1x1": Conv((3, 24, 5, 7), 40, (1, 1), padding=(0, 0), by_tma="rows"),
    "padded 1x1": Conv((2, 16, 3, 4), 24, (1, 1), by_tma="boxes"),
    "strided 1x1": Conv((2, 64, 4, 6), 24, (1, 1), (2, 2), (0, 0), by_tma="strided_boxes"),
    "strided 1x1, odd image": Conv((2, 16, 5, 7), 16, (1, 1), (2, 2), (0, 0)),
    "3x3": Conv((2, 24, 6, 5), 16, by_tma="boxes"),
    "strided 3x3": Conv((2, 64, 4, 6), 16, stride=(2, 2), by_tma="strided_boxes"),
    "strided 3x3, odd image": Conv((2, 16, 7, 9), 8, stride=(2, 2)),
    "strided 3x3, odd height": Conv((1, 64, 7, 6), 8, stride=(2, 2)),
    "strided 3x3, odd width": Conv((1, 64, 6, 7), 8, stride=(2, 2)),
    "dilated": Conv((1, 16, 9, 8), 16, padding=(2, 3), dilation=(2, 3), by_tma="boxes"),
    "strided, dilated": Conv(
        (1, 64, 8, 8), 8, (3, 3), (2, 2), (2, 3), (2, 3), by_tma="strided_boxes"
    ),
    "uneven": Conv((1, 16, 7, 6), 8, (2, 5), padding=(0, 3), by_tma="boxes"),
    "strides of 2 and 1": Conv((1, 64, 6, 8), 8, stride=(2, 1)),
    "uneven strides": Conv((1, 8, 7, 9), 8, (3, 1), (3, 2), (1, 0), (2, 1)),
    "stem": Conv((1, 3, 13, 12), 8, (7, 7), (2, 2), (3, 3)),
    "grouped": Conv((2, 32, 5, 4), 16, groups=2),
    "grouped 1x1": Conv((2, 32, 5, 4), 16, (1, 1), padding=NO_PADDING, groups=2),
    "groups within a byte": Conv((1, 15, 4, 5), 6, groups=3),
    "depthwise": Conv((1, 5, 6, 5), 5, stride=(2, 2), groups=5),
    "odd channels": Conv((2, 13, 5, 4), 19),
    "many odd channels": Conv((1, 37, 3, 4), 35),
    # No output depends on the last row and columns.
    "left over": Conv((1, 8, 7, 9), 8, (2, 2), (3, 3), (0, 0)),
    "smaller than the stride": Conv((2, 8, 1, 1), 8, (1, 1), (2, 2), (0, 0)),
    "one pixel": Conv((40, 16, 1, 1), 48, by_tma="boxes"),
}
# Every convolution in one dtype, and some in every dtype.
IN_EVERY_DTYPE = ("1x1", "strided 1x1", "odd channels")
GRADIENTS = pytest.mark.parametrize(
    ("conv", "kind", "dtype"),
    [
        pytest.param(conv, kind, dtype, id=f"{name}-{kind}-{str(dtype).removeprefix('torch.')}")
        for name, conv in CONVS.items()
        for kind in dict.fromkeys((conv.by_tma, "gather"))
        for dtype in (DTYPES if name in IN_EVERY_DTYPE else DTYPES[:1])
    ],
)
# What is fused with the gradient of the input, by the names of what `inputs_around` makes.
FUSIONS = {
    "nothing": (),
    "batch norm": ("y", "coefficients"),
    "residual": ("residual",),
    "relu of x": ("x", "scale", "shift"),
    "relu by mask": ("mask",),
    "sums": ("x", "mean"),
    "all but batch norm": ("residual", "x", "scale", "shift", "mean"),
    "everything": ("y", "coefficients", "residual", "x", "scale", "shift", "mean"),
    "everything, by mask": ("y", "coefficients", "residual", "mask", "x", "mean"),
}


def activation(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return normal(shape, seed).to(dtype).contiguous(memory_format=torch.channels_last)


def around(conv: Conv, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    """The optional arguments of conv_dgrad: tensors where they are named."""
    channels = conv.x[1]
    bits = torch.Generator().manual_seed(9)
    made = {
        "y": activation(conv.out, 1, dtype),
        "coefficients": normal((3, conv.kernels), 2).float(),
        "residual": activation(conv.x, 3, dtype),
        "x": activation(conv.x, 4, dtype),
        "scale": normal((channels,), 5).float(),
        "shift": normal((channels,), 6).float(),
        "mask": torch.randint(
            0, 256, mask_shape(activation(conv.x, 0, dtype)), generator=bits, dtype=torch.uint8
        ),
        "mean": normal((channels,), 7).float(),
    }
    return {name: tensor if name in names else None for name, tensor in made.items()}


def small(kind: str) -> Configuration:
    """Tiles so small that these problems have several, some of them ragged."""
    return Configuration(kind, 32, 16, 32, warps=4, stages=2)  # type: ignore[arg-type]


def results(function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Tensor]:
    found = function(*arguments, **named)
    return list(found) if isinstance(found, tuple) else [found]


def doubled(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, tuple):
        return tuple(doubled(each) for each in values)
    return values


def assert_accurate(
    launcher: Callable[..., Any],
    eager: Callable[..., Any],
    *arguments: Any,
    configuration: Configuration | None = None,
) -> list[Tensor]:
    """Every result of the launcher is as accurate as eager's, in eager's dtype."""
    run = interpreted_backend.on_uninitialised_memory(launcher)
    actual = results(run, *arguments, configuration=configuration)
    plain = results(eager, *arguments)
    exact = results(eager, *doubled(arguments))
    for index, each in enumerate(zip(actual, plain, exact, strict=True)):
        assert each[0].dtype == each[1].dtype
        assert_as_accurate_as_eager(*each, f"result {index}")
    return actual


def dgrad_arguments(conv: Conv, dtype: torch.dtype, fusion: str) -> tuple[Any, ...]:
    grad_y, weight = activation(conv.out, 10, dtype), normal(conv.weight, 11).to(dtype)
    options = around(conv, dtype, FUSIONS[fusion])
    return grad_y, weight, list(conv.x[2:]), *options.values(), *conv.geometry


@GRADIENTS
def test_dgrad(conv: Conv, kind: str, dtype: torch.dtype) -> None:
    fusion = "everything" if conv.kernel == (1, 1) else "all but batch norm"
    arguments = dgrad_arguments(conv, dtype, fusion)
    assert_accurate(conv_dgrad, reference.conv_dgrad, *arguments, configuration=small(kind))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", ["1x1", "strided 1x1", "grouped 1x1", "groups within a byte"])
def test_every_fusion_of_dgrad(name: str, fusion: str) -> None:
    for kind in {CONVS[name].by_tma, "gather"}:
        arguments = dgrad_arguments(CONVS[name], torch.bfloat16, fusion)
        assert_accurate(conv_dgrad, reference.conv_dgrad, *arguments, configuration=small(kind))


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@GRADIENTS
def test_wgrad(conv: Conv, kind: str, prologue: bool, dtype: torch.dtype) -> None:
    arguments = wgrad_arguments(conv, dtype, prologue)
    assert_accurate(conv_wgrad, reference.conv_wgrad, *arguments, configuration=small(kind))


def wgrad_arguments(conv: Conv, dtype: torch.dtype, prologue: bool) -> tuple[Any, ...]:
    named = around(conv, dtype, ("scale", "shift") if prologue else ())
    tensors = activation(conv.out, 10, dtype), activation(conv.x, 4, dtype), normal(conv.weight, 11)
    # A weight in float32 beside activations in 16 bits, as under autocast.
    return *tensors[:2], tensors[2].float(), named["scale"], named["shift"], *conv.geometry


# Tiles of the real configurations, which exceed these images.
@pytest.mark.parametrize("generation", interpreted_backend.CAPABILITIES)
@pytest.mark.parametrize("name", ["1x1", "strided 1x1", "grouped", "many odd channels"])
def test_chosen_configurations(name: str, generation: str) -> None:
    with interpreted_backend.generation(generation):
        for fusion in ("nothing", "everything, by mask"):
            arguments = dgrad_arguments(CONVS[name], torch.bfloat16, fusion)
            assert_accurate(conv_dgrad, reference.conv_dgrad, *arguments)
        arguments = wgrad_arguments(CONVS[name], torch.bfloat16, True)
        assert_accurate(conv_wgrad, reference.conv_wgrad, *arguments)


@pytest.mark.parametrize("generation", ["hopper", "blackwell"])
def test_whole_tiles(generation: str) -> None:
    """Every pixel of every tile exists: nothing is masked."""
    conv = Conv((2, 64, 8, 8), 16, by_tma="boxes")
    with interpreted_backend.generation(generation):
        arguments = dgrad_arguments(conv, torch.float16, "everything")
        assert_accurate(conv_dgrad, reference.conv_dgrad, *arguments)


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_tma_is_chosen_where_it_can_be(conv: Conv) -> None:
    problem = dgrad_module._problem(conv.out, torch.empty(conv.weight), conv.x[2:], *conv.geometry)
    tma = conv.x[1] % 8 == conv.kernels % 8 == 0
    for generation in interpreted_backend.CAPABILITIES:
        with interpreted_backend.generation(generation):
            architecture = device.architecture(torch.empty(0))
        of_x, of_weight = (
            dgrad_module.configurations(
                problem, torch.bfloat16, architecture, dgrad_module.Options(tma)
            ),
            wgrad_module.configurations(problem, torch.bfloat16, architecture, tma, False),
        )
        expected = "gather" if generation == "ampere" else conv.by_tma
        assert of_x[0].kind == of_weight[0].kind == expected
        for found in (of_x, of_weight):
            assert len(set(found)) == len(found)
            assert all(min(each.block_m, each.block_n, each.block_k) >= 16 for each in found)


@pytest.mark.parametrize("kind", ["rows", "gather"])
def test_results_repeat(kind: str) -> None:
    """Bit by bit, in whatever order programs run."""
    conv = Conv((2, 24, 9, 7), 16, (1, 1), padding=(0, 0))
    for function, arguments in (
        (conv_dgrad, dgrad_arguments(conv, torch.bfloat16, "everything")),
        (conv_wgrad, wgrad_arguments(conv, torch.bfloat16, True)),
    ):
        first = results(function, *arguments, configuration=small(kind))
        for _ in range(2):
            again = results(function, *arguments, configuration=small(kind))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def misaligned(x: Tensor) -> Tensor:
    """channels_last, one element behind the start of its storage."""
    n, c, h, w = x.shape
    strides = h * w * c, 1, w * c, c
    return x.new_empty(x.numel() + 1).as_strided((n, c, h, w), strides, 1).copy_(x)


@pytest.mark.parametrize("lay_out", [Tensor.contiguous, misaligned], ids=["nchw", "misaligned"])
def test_layouts(lay_out: Callable[[Tensor], Tensor]) -> None:
    """Also of the weight; vectors in another dtype and with steps between their elements."""
    conv = CONVS["strided 3x3"]
    arguments = list(dgrad_arguments(conv, torch.bfloat16, "everything"))
    for index in (0, 3, 5, 6):  # the activations
        arguments[index] = lay_out(arguments[index])
    for index in (4, 7, 8, 10):  # the vectors
        arguments[index] = with_gaps(arguments[index])
    # A configuration that cannot read the tensors is replaced.
    for configuration in (None, small(conv.by_tma)):
        grad_x, *_ = assert_accurate(
            conv_dgrad, reference.conv_dgrad, *arguments, configuration=configuration
        )
        assert grad_x.is_contiguous(memory_format=torch.channels_last)
    grad_y, x, weight, scale, shift, *geometry = wgrad_arguments(conv, torch.bfloat16, True)
    tensors = lay_out(grad_y), lay_out(x)
    vectors = with_gaps(scale), with_gaps(shift)
    for configuration in (None, small(conv.by_tma)):
        for weight_format in (torch.contiguous_format, torch.channels_last):
            weight = weight.contiguous(memory_format=weight_format)
            (grad_weight,) = assert_accurate(
                *(conv_wgrad, reference.conv_wgrad, *tensors, weight, *vectors, *geometry),
                configuration=configuration,
            )
            assert grad_weight.stride() == weight.stride()


def with_gaps(vector: Tensor) -> Tensor:
    """Its values in float64, with others between them."""
    return torch.stack([vector.double(), vector.new_zeros(vector.shape)], -1)[..., 0]


def test_strided_boxes_of_dgrad_need_whole_tiles_of_channels() -> None:
    """Those of wgrad do not: what it reads beyond, nobody stores."""
    conv = Conv((2, 24, 4, 6), 16, stride=(2, 2))
    problem = dgrad_module._problem(conv.out, torch.empty(conv.weight), conv.x[2:], *conv.geometry)
    architecture = device.architecture(torch.empty(0))
    of_x, *_ = dgrad_module.configurations(problem, torch.bfloat16, architecture)
    of_weight, *_ = wgrad_module.configurations(problem, torch.bfloat16, architecture)
    assert (of_x.kind, of_weight.kind) == ("gather", "strided_boxes")
    assert_accurate(
        conv_dgrad, reference.conv_dgrad, *dgrad_arguments(conv, torch.bfloat16, "sums")
    )
    arguments = wgrad_arguments(conv, torch.bfloat16, True)
    assert_accurate(
        conv_wgrad, reference.conv_wgrad, *arguments, configuration=small("strided_boxes")
    )


def test_no_images() -> None:
    conv = CONVS["3x3"]._replace(x=(0, 24, 6, 5))
    grad_x, sum_grad, sum_grad_x, grad_conv = conv_dgrad(
        *dgrad_arguments(conv, torch.bfloat16, "everything")
    )
    assert grad_x.shape == conv.x
    assert grad_conv.shape == conv.out
    assert torch.equal(sum_grad, torch.zeros(24))
    assert torch.equal(sum_grad_x, torch.zeros(24))
    _, *sums, _ = conv_dgrad(*dgrad_arguments(conv, torch.bfloat16, "nothing"))
    assert [tuple(each.shape) for each in sums] == [(0,), (0,)]
    grad_weight = conv_wgrad(*wgrad_arguments(conv, torch.bfloat16, True))
    assert torch.equal(grad_weight, torch.zeros(conv.weight))


def test_nan_passes_the_relu() -> None:
    conv = CONVS["1x1"]
    arguments = list(dgrad_arguments(conv, torch.float16, "relu of x"))
    arguments[6][0, :, 0, 0] = float("nan")
    grad_x, *_ = conv_dgrad(*arguments)
    plain, *_ = conv_dgrad(*dgrad_arguments(conv, torch.float16, "nothing"))
    assert torch.equal(grad_x[0, :, 0, 0], plain[0, :, 0, 0])


def test_weight_gradients_are_summed_in_float32() -> None:
    """Up to the end: a float32 weight gets more than the 8 bits of the activations."""
    conv = CONVS["3x3"]
    grad_y, x, weight, *rest = wgrad_arguments(conv, torch.bfloat16, False)
    exact = reference.conv_wgrad(*doubled((grad_y, x, weight, *rest)))
    sizes = reference.conv_wgrad(*doubled((grad_y.abs(), x.abs(), weight, *rest)))
    for kind in (conv.by_tma, "gather"):
        actual = conv_wgrad(grad_y, x, weight, *rest, configuration=small(kind))
        eps = torch.finfo(torch.float32).eps
        assert ((actual - exact).abs() <= 4 * eps * sizes).all()


@pytest.mark.parametrize("channels", [64, 2048])
def test_pixels_are_split_between_programs(channels: int) -> None:
    """Where multiprocessors outnumber the tiles of the result."""
    conv = Conv((256, channels, 14, 14), channels)
    x, weight = (torch.empty(shape, device="meta") for shape in (conv.x, conv.weight))
    plan = wgrad_module._plan(
        wgrad_module.conv_problem(x, weight, *conv.geometry),
        *(torch.bfloat16, device.of_capability((9, 0), 132), True, False, None, "tf32", True),
    )
    programs = plan.grid[0] * plan.splits
    assert (plan.splits > 1) == (channels == 64)
    assert channels == 2048 or 132 <= programs <= 264


def test_the_phase_with_the_most_taps_comes_first() -> None:
    """Of a 3x3 with stride 2 and padding 1: odd rows are reached by taps 0 and 2."""
    assert dgrad_module._heaviest(3, stride=2, padding=1, dilation=1) == 1
    assert dgrad_module._heaviest(3, stride=2, padding=0, dilation=1) == 0


def test_padding_is_zero_behind_the_relu() -> None:
    """Not relu(0 * scale + shift)."""
    conv = CONVS["3x3"]
    grad_y, x, weight, scale, shift, *rest = wgrad_arguments(conv, torch.bfloat16, True)
    arguments = grad_y, x, weight, scale, shift + 100, *rest
    for kind in (conv.by_tma, "gather"):
        assert_accurate(conv_wgrad, reference.conv_wgrad, *arguments, configuration=small(kind))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [192, 320])
def test_strided_boxes_end_with_the_channels(channels: int, residual: bool) -> None:
    """Where tiles of 128 channels do not: behind the last one stands the next column."""
    conv = Conv((6, channels, 8, 16), 16, (1, 1), (2, 2), NO_PADDING)
    arguments = dgrad_arguments(conv, torch.bfloat16, "residual" if residual else "nothing")
    problem = dgrad_module._problem(conv.out, torch.empty(conv.weight), conv.x[2:], *conv.geometry)
    options = dgrad_module.Options(residual=residual)
    architecture = device.architecture(arguments[0])
    found = dgrad_module.configurations(problem, torch.bfloat16, architecture, options)
    by_tma = {each._replace(registers=None) for each in found if each.kind == "strided_boxes"}
    assert by_tma
    assert found[0].kind == "strided_boxes"
    for configuration in by_tma:
        assert_accurate(conv_dgrad, reference.conv_dgrad, *arguments, configuration=configuration)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("name", ["3x3", "strided 3x3", "dilated", "uneven", "padded 1x1"])
def test_infinity_reaches_its_own_taps_only(name: str, prologue: bool) -> None:
    """In the last pixel, for which tiles have neighbours that grad_y has not."""
    conv = CONVS[name]
    grad_y, x, weight, *rest = wgrad_arguments(conv, torch.bfloat16, prologue)
    x[0, 3, -1, -1] = float("inf")
    if prologue:
        rest[0].abs_()  # or the ReLU would stop it
    expected = reference.conv_wgrad(*doubled((grad_y, x, weight, *rest))).isfinite()
    for kind in (conv.by_tma, "gather"):
        actual = conv_wgrad(grad_y, x, weight, *rest, configuration=small(kind))
        assert torch.equal(actual.isfinite(), expected)


def backward_arguments(conv: Conv, dtype: torch.dtype, relu: bool = True) -> tuple[Any, ...]:
    x, out = activation(conv.x, 1, dtype), activation(conv.out, 2, dtype).relu()
    return (
        *(activation(conv.out, 3, dtype), x, normal(conv.weight, 4).float()),
        *(normal((conv.kernels,), 5).float(), out if relu else None, True, *conv.geometry),
    )


def assert_accurate_backward(*arguments: Any) -> list[Tensor]:
    return assert_accurate(
        lambda *tensors, configuration: conv_bn_relu_backward(*tensors),
        reference.conv_bn_relu_backward,
        *arguments,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("name", ["1x1", "odd channels"])
def test_conv_bn_relu_backward(name: str, relu: bool, dtype: torch.dtype) -> None:
    conv = CONVS[name]
    arguments = backward_arguments(conv, dtype, relu)
    actual = assert_accurate_backward(*arguments)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    grad_x, *_, grad_residual = conv_bn_relu_backward(
        *(None if t is None else t.contiguous() for t in arguments[:5]), False, *conv.geometry
    )
    assert torch.equal(grad_x, actual[0])
    assert grad_residual.numel() == 0


@pytest.mark.parametrize(
    "conv",
    [
        Conv((2, 8, 3, 3), 300, (1, 1), padding=NO_PADDING),
        Conv((2, 8, 15, 16), 256, (1, 1), padding=NO_PADDING),
    ],
    ids=["two tiles of channels", "programs with several tiles of pixels"],
)
def test_conv_bn_relu_backward_in_many_tiles(conv: Conv) -> None:
    assert_accurate_backward(*backward_arguments(conv, torch.bfloat16))


def test_conv_bn_relu_backward_passes_nan_and_takes_any_scale() -> None:
    conv = CONVS["1x1"]
    grad_out, x, weight, scale, out, *rest = backward_arguments(conv, torch.float16)
    expected = conv_bn_relu_backward(grad_out, x, weight, scale, out, *rest)
    actual = conv_bn_relu_backward(grad_out, x, weight, with_gaps(scale), out, *rest)
    assert actual[2].dtype == torch.float64
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(actual, expected, strict=True))
    out[0, :, 0, 0] = float("nan")
    *_, grad_residual = conv_bn_relu_backward(grad_out, x, weight, scale, out, *rest)
    assert torch.equal(grad_residual[0, :, 0, 0], grad_out[0, :, 0, 0])


def test_conv_bn_relu_backward_rounds_the_scaled_weight_once() -> None:
    """With one kernel its gradient is a product of two such numbers, rounded."""
    conv = Conv((2, 16, 3, 4), 1, (1, 1), padding=NO_PADDING)
    arguments = backward_arguments(conv, torch.bfloat16, relu=False)
    grad_out, _, weight, scale, *_ = arguments
    scaled = (weight * scale).bfloat16().float()
    grad_x, *_ = conv_bn_relu_backward(*arguments)
    assert torch.equal(grad_x, (grad_out.float() * scaled.view(1, 16, 1, 1)).bfloat16())


def test_conv_bn_relu_backward_of_no_images() -> None:
    conv = CONVS["1x1"]._replace(x=(0, 24, 5, 7))
    run = interpreted_backend.on_uninitialised_memory(conv_bn_relu_backward)
    grad_x, grad_weight, grad_shift, _ = run(*backward_arguments(conv, torch.bfloat16))
    assert grad_x.shape == conv.x
    assert torch.equal(grad_weight, torch.zeros(conv.weight))
    assert torch.equal(grad_shift, torch.zeros(conv.kernels))
