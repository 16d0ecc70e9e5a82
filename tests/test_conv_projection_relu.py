"""conv_projection_relu: outputs, strides, formats, tracing, autocast and bad input."""

from typing import Any

import pytest
import torch
from bottlenecks import (
    DEGENERATE,
    EXPANSION,
    FAST,
    LAYERED,
    SHAPE,
    SHAPES,
    Subject,
    assert_autocast_is_as_eager,
    assert_autocast_leaves_float64,
    assert_compiles_once,
    assert_empty_batch_is_empty,
    assert_fake_is_like_real_of,
    assert_gradients_are_refused,
    assert_matches_eager,
    assert_nan_passes,
    assert_opcheck_passes,
    assert_takes_wider_weights,
    bad_image,
    bad_layer,
    eager_layer,
    layer,
)
from convolutions import Tensors, assert_refused, in_pairs
from numerics import LAYOUTS, Case, grid, on_backends
from torch import Tensor

from resnet_fused.ops import conv_projection_relu


def tensors_of(case: Case, seed: int, stride: tuple[int, int] = (2, 2)) -> Tensors:
    """For y of the shape of `case`, and x of as odd a size as `stride` allows."""
    n, width, p, q = case.shape
    kernels, channels = EXPANSION * width, 2 * width
    size = ((p - 1) * stride[0] + 1, q * stride[1])
    return {
        "y": case.x(seed),
        **layer(case, "{}", kernels, width, 1, seed + 2),
        "x": case.other(seed + 1, (n, channels, *size)),
        **layer(case, "projection_{}", kernels, channels, 1, seed + 5),
    }


def eager(y: Tensor, *rest: Any) -> Tensor:
    projection = eager_layer(*rest[3:7], None, False, rest[7])
    return eager_layer(y, *rest[:3], projection)


SUBJECT = Subject(conv_projection_relu, tensors_of, eager, settings=((2, 2),))
STRIDES = {1: (1, 1), 2: (2, 2), 3: (3, 3), (1, 2): (1, 2)}


@pytest.mark.parametrize("case", grid("conv_projection_relu", SHAPES, FAST))
def test_matches_eager(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("conv_projection_relu", [SHAPE, (1, 64, 3, 4)]))
def test_dtypes(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("conv_projection_relu", LAYERED, FAST, LAYOUTS))
def test_layouts(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(
    "case", grid("conv_projection_relu", [SHAPE, (2, 32, 1, 3)], FAST, ["channels_last"])
)
def test_strides(case: Case, stride: int | tuple[int, int]) -> None:
    pair = STRIDES[stride]
    by_pair = Subject(
        lambda *arguments: conv_projection_relu(*arguments[:-1], stride=stride),
        lambda case, seed: tensors_of(case, seed, pair),
        *(eager, ("out",), (pair,)),
    )
    assert_matches_eager(case, by_pair)


def test_stride_is_1_as_it_comes() -> None:
    case = Case("reference", SHAPE, torch.float32, "channels_last")
    tensors = list(tensors_of(case, 0, (1, 1)).values())
    tensors[4] = tensors[4][:, :, :, : SHAPE[3]]
    with torch.no_grad():
        out = conv_projection_relu(*tensors)
    torch.testing.assert_close(out, eager(*tensors, (1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("conv_projection_relu", torch.bfloat16))
def test_weights_wider_than_activations(backend: str, dtype: torch.dtype) -> None:
    assert_takes_wider_weights(backend, dtype, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("conv_projection_relu", torch.bfloat16))
def test_empty_batch(backend: str) -> None:
    assert_empty_batch_is_empty(backend, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("conv_projection_relu", torch.bfloat16))
def test_nan_passes(backend: str) -> None:
    assert_nan_passes(backend, SUBJECT)


@pytest.mark.parametrize("dtype", FAST)
def test_autocast_is_as_eager(dtype: torch.dtype) -> None:
    assert_autocast_is_as_eager(dtype, SUBJECT)


def test_autocast_leaves_float64() -> None:
    assert_autocast_leaves_float64(SUBJECT)


@pytest.mark.parametrize(
    "case", grid("conv_projection_relu", DEGENERATE, [torch.bfloat16], LAYOUTS)
)
def test_fake_is_like_real(case: Case) -> None:
    assert_fake_is_like_real_of(case, SUBJECT)


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
@pytest.mark.parametrize("backend", on_backends("conv_projection_relu"))
def test_opcheck(backend: str, layout: str) -> None:
    assert_opcheck_passes(backend, layout, SUBJECT)


def test_compiles_once() -> None:
    assert_compiles_once(SUBJECT)


def test_gradients_are_refused() -> None:
    assert_gradients_are_refused(SUBJECT)


Y, X, S = torch.ones(2, 4, 3, 3), torch.ones(2, 5, 6, 5), torch.ones(7)
W, P = torch.ones(7, 4, 1, 1), torch.ones(7, 5, 1, 1)
GOOD = {
    **{"y": Y, "weight": W, "scale": S, "shift": S, "x": X},
    **{"projection_weight": P, "projection_scale": S, "projection_shift": S, "stride": 2},
}
BAD = {
    **bad_image("y", Y),
    **bad_image("x", X),
    **bad_layer("{}", W, "y"),
    **bad_layer("projection_{}", P, "y"),
    "projection kernels": (
        {"projection_weight": torch.ones(8, 5, 1, 1)},
        ValueError,
        r"projection_weight must have the shape \(K, C, R, S\) = \(7, 5, 1, 1\), got \(8, 5, 1,",
    ),
    "size of x": (
        {"x": torch.ones(2, 5, 7, 5)},
        ValueError,
        r"x must give \(2, 7, 3, 3\) as y does, got \(2, 5, 7, 5\), which stride \(2, 2\) brings to"
        r" \(2, 7, 4, 3\)",
    ),
    "batch of x": (
        {"x": torch.ones(1, 5, 6, 5)},
        ValueError,
        r"x must give \(2, 7, 3, 3\) as y does, got \(1, 5, 6, 5\), which stride .* \(1, 7, 3, 3\)",
    ),
    "dtype of x": (
        {"x": X.double()},
        TypeError,
        r"x must have the dtype of y torch.float32, got torch.float64 \(convert one with .to",
    ),
    "device of x": (
        {"x": X.to("meta")},
        ValueError,
        r"x must be on the device of y cpu, got meta",
    ),
    "stride": ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "negative stride": (
        {"stride": (1, -1)},
        ValueError,
        r"stride must be at least 1, got \(1, -1\)",
    ),
    "three strides": (
        {"stride": (1, 1, 1)},
        ValueError,
        r"stride must be one int or two, got \(1, 1, 1\)",
    ),
    "stride is a float": ({"stride": 1.5}, ValueError, r"stride must be one int or two, got 1.5"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    assert_refused(conv_projection_relu, GOOD | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    with pytest.raises((error, RuntimeError)):
        torch.ops.resnet_fused.conv_projection_relu(
            **(GOOD | {"stride": (2, 2)} | in_pairs(changed))
        )
