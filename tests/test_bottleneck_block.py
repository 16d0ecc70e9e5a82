"""bottleneck_block: outputs, formats, tracing, autocast and bad input."""

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
    eager_tail,
    layer,
)
from convolutions import Tensors, assert_refused
from numerics import LAYOUTS, Case, grid, on_backends
from torch import Tensor

from resnet_fused.ops import bottleneck_block


def tensors_of(case: Case, seed: int) -> Tensors:
    """For a block as wide inside as the images of `case` say."""
    n, width, h, w = case.shape
    channels = EXPANSION * width
    return {
        "x": case.x(seed, (n, channels, h, w)),
        **layer(case, "{}1", width, channels, 1, seed + 2),
        **layer(case, "{}2", width, width, 3, seed + 5),
        **layer(case, "{}3", channels, width, 1, seed + 8),
    }


def eager(x: Tensor, *layers: Tensor) -> Tensor:
    return eager_tail(eager_layer(x, *layers[:3]), x, *layers[3:])


SUBJECT = Subject(bottleneck_block, tensors_of, eager)


@pytest.mark.parametrize("case", grid("bottleneck_block", SHAPES, FAST))
def test_matches_eager(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_block", [SHAPE, (1, 64, 3, 4)]))
def test_dtypes(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_block", LAYERED, FAST, LAYOUTS))
def test_layouts(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("bottleneck_block", torch.bfloat16))
def test_weights_wider_than_activations(backend: str, dtype: torch.dtype) -> None:
    assert_takes_wider_weights(backend, dtype, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_block", torch.bfloat16))
def test_empty_batch(backend: str) -> None:
    assert_empty_batch_is_empty(backend, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_block", torch.bfloat16))
def test_nan_passes(backend: str) -> None:
    assert_nan_passes(backend, SUBJECT)


@pytest.mark.parametrize("dtype", FAST)
def test_autocast_is_as_eager(dtype: torch.dtype) -> None:
    assert_autocast_is_as_eager(dtype, SUBJECT)


def test_autocast_leaves_float64() -> None:
    assert_autocast_leaves_float64(SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_block", DEGENERATE, [torch.bfloat16], LAYOUTS))
def test_fake_is_like_real(case: Case) -> None:
    assert_fake_is_like_real_of(case, SUBJECT)


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
@pytest.mark.parametrize("backend", on_backends("bottleneck_block"))
def test_opcheck(backend: str, layout: str) -> None:
    assert_opcheck_passes(backend, layout, SUBJECT)


def test_compiles_once() -> None:
    assert_compiles_once(SUBJECT)


def test_gradients_are_refused() -> None:
    assert_gradients_are_refused(SUBJECT)


X, S, S2 = torch.ones(2, 7, 6, 5), torch.ones(7), torch.ones(4)
W1, W2, W3 = torch.ones(4, 7, 1, 1), torch.ones(4, 4, 3, 3), torch.ones(7, 4, 1, 1)
GOOD = {
    **{"x": X, "weight1": W1, "scale1": S2, "shift1": S2},
    **{"weight2": W2, "scale2": S2, "shift2": S2, "weight3": W3, "scale3": S, "shift3": S},
}
BAD = {
    **bad_image("x", X),
    **bad_layer("{}1", W1, "x"),
    **bad_layer("{}2", W2, "x"),
    **bad_layer("{}3", W3, "x"),
    "channels out": (
        {"weight3": torch.ones(8, 4, 1, 1), "scale3": torch.ones(8), "shift3": torch.ones(8)},
        ValueError,
        r"weight3 must have the shape \(K, C, R, S\) = \(7, 4, 1, 1\), got \(8, 4, 1, 1\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    assert_refused(bottleneck_block, GOOD | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    with pytest.raises((error, RuntimeError)):
        torch.ops.resnet_fused.bottleneck_block(**(GOOD | changed))
