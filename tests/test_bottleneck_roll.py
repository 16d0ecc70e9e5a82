"""bottleneck_roll: both outputs, formats, tracing, autocast and bad input."""

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
    bad_residual,
    eager_layer,
    eager_tail,
    layer,
    tail_tensors,
)
from convolutions import Tensors, assert_refused
from numerics import LAYOUTS, Case, grid, on_backends
from torch import Tensor

from resnet_fused.ops import bottleneck_roll


def tensors_of(case: Case, seed: int, next_width: int | None = None) -> Tensors:
    width = case.shape[1]
    next_first = (next_width or width, EXPANSION * width, 1, seed + 8)
    return tail_tensors(case, seed) | layer(case, "next_{}1", *next_first)


def eager(y1: Tensor, residual: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    out = eager_tail(y1, residual, *layers[:6])
    return out, eager_layer(out, *layers[6:])


SUBJECT = Subject(bottleneck_roll, tensors_of, eager, ("out", "next_y1"))


@pytest.mark.parametrize("case", grid("bottleneck_roll", SHAPES, FAST))
def test_matches_eager(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_roll", [SHAPE, (1, 64, 3, 4)]))
def test_dtypes(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_roll", LAYERED, FAST, LAYOUTS))
def test_layouts(case: Case) -> None:
    assert_matches_eager(case, SUBJECT)


@pytest.mark.parametrize(
    "case", grid("bottleneck_roll", [SHAPE, (1, 64, 3, 4)], FAST, ["channels_last"])
)
def test_next_block_of_another_width(case: Case) -> None:
    def tensors(case: Case, seed: int) -> Tensors:
        return tensors_of(case, seed, next_width=case.shape[1] + 8)

    assert_matches_eager(case, SUBJECT._replace(tensors=tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", on_backends("bottleneck_roll", torch.bfloat16))
def test_weights_wider_than_activations(backend: str, dtype: torch.dtype) -> None:
    assert_takes_wider_weights(backend, dtype, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_roll", torch.bfloat16))
def test_empty_batch(backend: str) -> None:
    assert_empty_batch_is_empty(backend, SUBJECT)


@pytest.mark.parametrize("backend", on_backends("bottleneck_roll", torch.bfloat16))
def test_nan_passes(backend: str) -> None:
    assert_nan_passes(backend, SUBJECT)


@pytest.mark.parametrize("dtype", FAST)
def test_autocast_is_as_eager(dtype: torch.dtype) -> None:
    assert_autocast_is_as_eager(dtype, SUBJECT)


def test_autocast_leaves_float64() -> None:
    assert_autocast_leaves_float64(SUBJECT)


@pytest.mark.parametrize("case", grid("bottleneck_roll", DEGENERATE, [torch.bfloat16], LAYOUTS))
def test_fake_is_like_real(case: Case) -> None:
    assert_fake_is_like_real_of(case, SUBJECT)


@pytest.mark.parametrize("layout", ["channels_last", "mixed"])
@pytest.mark.parametrize("backend", on_backends("bottleneck_roll"))
def test_opcheck(backend: str, layout: str) -> None:
    assert_opcheck_passes(backend, layout, SUBJECT)


def test_compiles_once() -> None:
    assert_compiles_once(SUBJECT)


def test_gradients_are_refused() -> None:
    assert_gradients_are_refused(SUBJECT)


X, R = torch.ones(2, 4, 6, 5), torch.ones(2, 7, 6, 5)
W2, W3, W1 = torch.ones(4, 4, 3, 3), torch.ones(7, 4, 1, 1), torch.ones(5, 7, 1, 1)
S2, S3, S1 = torch.ones(4), torch.ones(7), torch.ones(5)
GOOD = {
    **{"y1": X, "residual": R, "weight2": W2, "scale2": S2, "shift2": S2},
    **{"weight3": W3, "scale3": S3, "shift3": S3},
    **{"next_weight1": W1, "next_scale1": S1, "next_shift1": S1},
}
BAD = {
    **bad_image("y1", X),
    **bad_residual(R),
    **bad_layer("{}2", W2, "y1"),
    **bad_layer("{}3", W3, "y1"),
    **bad_layer("next_{}1", W1, "y1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    assert_refused(bottleneck_roll, GOOD | changed, error, message)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_below_the_public_function(bad: str) -> None:
    changed, error, _ = BAD[bad]
    with pytest.raises((error, RuntimeError)):
        torch.ops.resnet_fused.bottleneck_roll(**(GOOD | changed))
