"""What the tests of the operators over several layers of a Bottleneck share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from convolutions import Tensors, assert_fake_is_like, assert_in_format, vector
from numerics import Case, assert_as_accurate_as_eager, no_recompilation, normal
from test_conv_bn_relu import eager as eager_layer
from torch import Tensor
from torch.autograd import forward_ad

import resnet_fused as rf

FAST = (torch.float32, torch.bfloat16)  # convolutions in the other dtypes are slow on most CPUs
EXPANSION = 4
SHAPE = (2, 12, 5, 4)  # of y1, where the shape is not the point
# 1x1 images, one channel, odd channels, rows and columns alone, real layers.
SHAPES = (
    (5, 7, 1, 1),
    (3, 1, 4, 5),
    (2, 13, 5, 4),
    (1, 8, 1, 9),
    (2, 8, 9, 1),
    (2, 64, 3, 5),
    (1, 128, 4, 3),
)
LAYERED = (SHAPE, (3, 8, 1, 1), (1, 64, 3, 2))
# Dense in several formats at once: fake and real tensors must choose the same.
DEGENERATE = (SHAPE, (2, 5, 1, 1), (2, 1, 3, 3), (2, 8, 1, 7), (0, 4, 2, 2))


class Subject(NamedTuple):
    """One operator. tensors(case, seed): its arguments; eager: the same in plain PyTorch.

    Outputs are in `outputs`; the first argument decides on dtype and memory format.
    """

    function: Callable[..., Any]
    tensors: Callable[[Case, int], Tensors]
    eager: Callable[..., Any]
    outputs: tuple[str, ...] = ("out",)
    settings: tuple[Any, ...] = ()

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.resnet_fused, self.function.__name__).default

    def outputs_of(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Tensors:
        """What `function` gives, by name."""
        result = function(*tensors, *self.settings)
        results = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self.outputs, results, strict=True))


def layer(
    case: Case, names: str, kernels: int, channels: int, size: int, seed: int
) -> dict[str, Tensor]:
    """A weight, and scale and shift of what it gives."""
    shape = (kernels, channels, size, size)
    weight = normal(shape, seed) / (channels * size**2) ** 0.5
    return {
        names.format("weight"): weight.to(case.device, case.dtype),
        names.format("scale"): vector(case, normal((kernels,), seed + 1).abs() + 0.5),
        names.format("shift"): vector(case, normal((kernels,), seed + 2)),
    }


def tail_tensors(case: Case, seed: int) -> Tensors:
    """Those of bottleneck_tail, for y1 of the shape of `case`."""
    n, width, h, w = case.shape
    kernels = EXPANSION * width
    return {
        "y1": case.x(seed),
        "residual": case.other(seed + 1, (n, kernels, h, w)),
        **layer(case, "{}2", width, width, 3, seed + 2),
        **layer(case, "{}3", kernels, width, 1, seed + 5),
    }


def eager_tail(y1: Tensor, residual: Tensor, *layers: Tensor) -> Tensor:
    y2 = eager_layer(y1, *layers[:3], None, True, (1, 1), (1, 1))
    return eager_layer(y2, *layers[3:], residual)


def assert_matches_eager(case: Case, subject: Subject) -> None:
    """Every output is as accurate as eager's, and in the format of the first argument."""
    triples: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in subject.outputs}
    for seed in case.draws:
        tensors = list(subject.tensors(case, seed).values())
        with rf.backend(case.backend), torch.no_grad():
            actual = subject.outputs_of(subject.function, tensors)
        plain = subject.outputs_of(subject.eager, tensors)
        exact = subject.outputs_of(subject.eager, [t.double() for t in tensors])
        for name in subject.outputs:
            assert actual[name].dtype == case.dtype
            assert_in_format(actual[name], tensors[0])
            assert actual[name].shape == exact[name].shape
            triples[name].append((actual[name], plain[name], exact[name]))
    for name, draws in triples.items():
        of_all = (torch.cat([t.flatten() for t in each]) for each in zip(*draws, strict=True))
        assert_as_accurate_as_eager(*of_all, name)


def assert_takes_wider_weights(backend: str, dtype: torch.dtype, subject: Subject) -> None:
    """Weights in `dtype` beside activations in bfloat16, as under autocast."""
    case = Case(backend, SHAPE, torch.bfloat16, "channels_last")
    tensors = subject.tensors(case, 0)
    wide = {name: t.to(dtype) if "weight" in name else t for name, t in tensors.items()}
    with rf.backend(backend), torch.no_grad():
        actual = subject.outputs_of(subject.function, list(wide.values()))
    plain = subject.outputs_of(subject.eager, list(tensors.values()))
    exact = subject.outputs_of(subject.eager, [t.double() for t in tensors.values()])
    for name, out in actual.items():
        assert out.dtype == torch.bfloat16
        assert_as_accurate_as_eager(out, plain[name], exact[name], name)


def assert_empty_batch_is_empty(backend: str, subject: Subject) -> None:
    for width in (12, 64):
        case = Case(backend, (0, width, 5, 4), torch.bfloat16, "channels_last")
        tensors = list(subject.tensors(case, 0).values())
        with rf.backend(backend), torch.no_grad():
            actual = subject.outputs_of(subject.function, tensors)
        expected = subject.outputs_of(subject.eager, tensors)
        assert {n: t.shape for n, t in actual.items()} == {n: t.shape for n, t in expected.items()}


def assert_nan_passes(backend: str, subject: Subject) -> None:
    """NaN in one pixel of every activation, each in an image of its own."""
    for width in (12, 64):
        case = Case(backend, (3, width, 6, 5), torch.bfloat16, "channels_last")
        tensors = list(subject.tensors(case, 0).values())
        activations = [t for t in tensors if t.dim() == 4 and t.size(0) == 3]
        assert activations
        for image, activation in enumerate(activations):
            activation[image, 5, 2, 2] = float("nan")
        expected = subject.outputs_of(subject.eager, tensors)
        with rf.backend(backend), torch.no_grad():
            actual = subject.outputs_of(subject.function, tensors)
        for name, out in actual.items():
            assert 0 < expected[name].isnan().sum() < out.numel()
            assert torch.equal(out.isnan(), expected[name].isnan()), name


def assert_autocast_is_as_eager(dtype: torch.dtype, subject: Subject) -> None:
    case = Case("cpu", SHAPE, torch.float32, "channels_last")
    tensors = list(subject.tensors(case, 0).values())
    # Values that bfloat16 has, and activations in `dtype`.
    cast = [t.bfloat16().float() if t.dim() == 4 else t for t in tensors]
    given = [t.to(dtype) if t.size(0) == SHAPE[0] else t for t in cast]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        actual = subject.outputs_of(subject.function, given)
        plain = subject.outputs_of(subject.eager, given)
    exact = subject.outputs_of(subject.eager, [t.double() for t in cast])
    for name, out in actual.items():
        assert out.dtype == torch.bfloat16
        assert_as_accurate_as_eager(out, plain[name], exact[name], name)


def assert_autocast_leaves_float64(subject: Subject) -> None:
    case = Case("cpu", SHAPE, torch.float64, "channels_last")
    tensors = list(subject.tensors(case, 0).values())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        actual = subject.outputs_of(subject.function, tensors)
    torch.testing.assert_close(actual, subject.outputs_of(subject.eager, tensors))


def assert_fake_is_like_real_of(case: Case, subject: Subject) -> None:
    arguments = (*subject.tensors(case, 0).values(), *subject.settings)
    assert_fake_is_like(case.backend, subject.overload, arguments)


def assert_opcheck_passes(backend: str, layout: str, subject: Subject) -> None:
    case = Case(backend, (2, 4, 3, 3), torch.float32, layout)
    arguments = (*subject.tensors(case, 0).values(), *subject.settings)
    with rf.backend(backend):
        torch.library.opcheck(subject.overload, arguments)


def assert_compiles_once(subject: Subject) -> None:
    """Into one graph, for shapes that change."""
    with no_recompilation(), torch.no_grad():
        compiled = torch.compile(
            subject.function, fullgraph=True, backend="aot_eager", dynamic=True
        )
        for n, h, w in ((2, 5, 4), (3, 4, 6), (5, 6, 7)):
            case = Case("cpu", (n, 12, h, w), torch.float32, "channels_last")
            tensors = list(subject.tensors(case, n).values())
            actual = subject.outputs_of(compiled, tensors)
            torch.testing.assert_close(actual, subject.outputs_of(subject.eager, tensors))


def assert_gradients_are_refused(subject: Subject) -> None:
    """Of every argument, and forward-mode derivatives with gradients on or off."""
    case, name = Case("cpu", SHAPE, torch.float32, "channels_last"), subject.function.__name__
    tensors = list(subject.tensors(case, 0).values())
    refused = f"^{name}: an argument requires a gradient, but this operator has none"
    for tensor in tensors:
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=refused):
            subject.outputs_of(subject.function, tensors)
        with torch.no_grad():
            outputs = subject.outputs_of(subject.function, tensors)
        assert not any(out.requires_grad for out in outputs.values())
        tensor.requires_grad_(False)
    x, *rest = tensors
    for guard in (torch.enable_grad, torch.no_grad):
        with (
            guard(),
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=f"{name}: forward-mode derivatives are not"),
        ):
            subject.outputs_of(
                subject.function, [forward_ad.make_dual(x, torch.ones_like(x)), *rest]
            )


def bad_layer(names: str, weight: Tensor, like: str) -> dict[str, tuple[dict[str, Any], Any, str]]:
    """What can be wrong with weight, scale and shift of one layer, and the messages."""
    weight_name, scale, shift = (names.format(part) for part in ("weight", "scale", "shift"))
    kernels, channels, *kernel = weight.shape
    expected = ", ".join(map(str, weight.shape))
    wrong = torch.ones(kernels, channels + 1, *kernel)
    vector = torch.ones(kernels)
    return {
        f"{weight_name} is None": (
            {weight_name: None},
            TypeError,
            rf"{weight_name} must be a Tensor, got NoneType",
        ),
        f"{weight_name} dimensions": (
            {weight_name: weight[0]},
            ValueError,
            rf"{weight_name} must be a floating-point \(K, C, R, S\) tensor, got torch.float32 of"
            r" shape \(",
        ),
        f"{weight_name} integers": (
            {weight_name: weight.int()},
            ValueError,
            rf"{weight_name} must be a floating-point .* tensor, got torch.int32",
        ),
        f"{weight_name} channels": (
            {weight_name: wrong},
            ValueError,
            rf"{weight_name} must have the shape \(K, C, R, S\) = \({expected}\),"
            rf" got \({kernels}, {channels + 1},",
        ),
        f"{weight_name} kernel": (
            {weight_name: torch.ones(kernels, channels, 5, 5)},
            ValueError,
            rf"{weight_name} must have the shape .*\({expected}\), got .* 5, 5\)",
        ),
        f"{weight_name} device": (
            {weight_name: weight.to("meta")},
            ValueError,
            rf"{weight_name} must be on the device of {like} cpu, got meta \(move one with .to",
        ),
        f"{scale} is None": ({scale: None}, TypeError, rf"{scale} must be a Tensor, got NoneType"),
        f"{scale} size": (
            {scale: torch.ones(kernels + 1)},
            ValueError,
            rf"{scale} must have one value per output channel \({kernels},\),"
            rf" got \({kernels + 1},\)",
        ),
        f"{scale} integers": (
            {scale: vector.int()},
            TypeError,
            rf"{scale} must be a floating-point tensor, got torch.int32",
        ),
        f"{shift} dimensions": (
            {shift: vector[:, None]},
            ValueError,
            rf"{shift} must have one value per output channel \({kernels},\),"
            rf" got \({kernels}, 1\)",
        ),
        f"{shift} device": (
            {shift: vector.to("meta")},
            ValueError,
            rf"{shift} must be on the device of {like} cpu, got meta",
        ),
    }


def bad_image(name: str, x: Tensor) -> dict[str, tuple[dict[str, Any], Any, str]]:
    """What can be wrong with the first activation alone."""
    return {
        f"{name} is a list": ({name: [1.0]}, TypeError, rf"{name} must be a Tensor, got list"),
        f"{name} dimensions": (
            {name: x[0]},
            ValueError,
            rf"{name} must have 4 dimensions \(N, C, H, W\), got shape \(",
        ),
        f"{name} integers": (
            {name: x.int()},
            TypeError,
            rf"{name} must be a floating-point tensor, got torch.int32 \(call .float\(\)\)",
        ),
        f"{name} without pixels": (
            {name: x[:, :, :0]},
            ValueError,
            rf"{name} must have at least one row and one column, got shape \(",
        ),
    }


def bad_residual(residual: Tensor) -> dict[str, tuple[dict[str, Any], Any, str]]:
    expected = ", ".join(map(str, residual.shape))
    return {
        "residual is None": (
            {"residual": None},
            TypeError,
            r"residual must be a Tensor, got NoneType",
        ),
        "residual shape": (
            {"residual": residual[:, :, 1:]},
            ValueError,
            rf"residual must have the shape of the output \({expected}\), got \(",
        ),
        "residual dtype": (
            {"residual": residual.double()},
            TypeError,
            r"residual must have the dtype of y1 torch.float32, got torch.float64 \(convert one",
        ),
        "residual device": (
            {"residual": residual.to("meta")},
            ValueError,
            r"residual must be on the device of y1 cpu, got meta",
        ),
    }
