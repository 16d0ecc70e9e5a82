"""bottleneck_tail: outputs, formats, tracing, autocast and bad input."""

import pytest
import torch
from bottlenecks import (
    DEGENERATE,
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
    bad_residual,
    eager_tail,
    tail_tensors,
)
from convolutions import assert_refused
from numerics import LAYOUTS, Case, grid, on_backends

from resnet_fused.ops import bottleneck_tail

SUBJECT = Subject(bottleneck_tail, tail_tensors, eager_tail)


@pytest.mark.parametrize("case", grid("bottleneck_tail", SHAPES, FAST))
def test_matches_eager(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_tail", [SHAPE, (1, 64, 3, 4)]))
def test_dtypes(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_tail", LAYERED, FAST, LAYOUTS))
def test_layouts(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("bottleneck_tail", torch.bfloat16))
def test_weights_wider_than_activations(backend: str, dtype: torch.dtype) -> None:
    assert_takes_wider_weights(backend, dtype, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_tail", torch.bfloat16))
def test_empty_batch(backend: str) -> None:
    assert_empty_batch_is_empty(backend, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_tail", torch.bfloat16))
def test_nan_passes(backend: str) -> None:
    assert_nan_passes(backend, SUBJECT)


@pytest.mark.parametrize("dtype", FAST)
def test_autocast_is_as_eager(dtype: torch.dtype) -> None:
    assert_autocast_is_as_eager(dtype, SUBJECT)


def test_autocast_leaves_float64() -> None:
    assert_autocast_leaves_float64(SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_tail", DEGENERATE, [torch.bfloat16], LAYOUTS))
def test_fake_is_like_real(case: Case) -> None:
    assert_fake_is_like_real_of(case, SUBJECT)


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
@pytest.mark.parametrize("backend", on_backends("bottleneck_tail"))
def test_opcheck(backend: str, layout: str) -> None:
    assert_opcheck_passes(backend, layout, SUBJECT)


def test_compiles_once() -> None:
    assert_compiles_once(SUBJECT)


def test_gradients_are_refused() -> None:
    assert_gradients_are_refused(SUBJECT)


X, R = torch.ones(2, 4, 6, 5), torch.ones(2, 7, 6, 5)
W2, W3 = torch.ones(4, 4, 3, 3), torch.ones(7, 4, 1, 1)
S2, S3 = torch.ones(4), torch.ones(7)
GOOD = {
    **{"y1": X, "residual": R, "weight2": W2, "scale2": S2, "shift2": S2},
    **{"weight3": W3, "scale3": S3, "shift3": S3},
}
BAD = {
    **bad_image("y1", X),
    **bad_residual(R),
    **bad_layer("{}2", W2, "y1"),
    **bad_layer("{}3", W3, "y1"),
    "more channels in conv2": (
        {"weight2": torch.ones(6, 4, 3, 3), "scale2": torch.ones(6), "shift2": torch.ones(6)},
        ValueError,
        r"weight2 must have the shape \(K, C, R, S\) = \(4, 4, 3, 3\), got \(6, 4, 3, 3\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    assert_refused(bottleneck_tail, GOOD | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    with pytest.raises((error, RuntimeError)):
        torch.ops.resnet_fused.bottleneck_tail(**(GOOD | changed))
