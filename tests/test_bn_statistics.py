"""bn_statistics: mean and sum of squared differences, in every dtype, layout and size."""

from typing import Any

import pytest
import torch
from numerics import (
    DEGENERATE,
    LARGE,
    LAYOUTS,
    SHAPE,
    SHAPES,
    Case,
    assert_as_accurate_as_eager,
    assert_fake_is_like_real,
    device_of,
    grid,
    no_recompilation,
    normal,
    on_backends,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused as rf
from resnet_fused import reference
from resnet_fused.ops import BatchNormArgs, bn_statistics
from resnet_fused.ops.bn_relu import bn_relu_with_statistics

CHANNEL_DIMS = (0, 2, 3)


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(reference.statistics_dtype(x)), CHANNEL_DIMS, correction=0)
    return mean, var * (x.numel() // x.size(1))


def check(case: Case) -> None:
    """Means are off by no more than x is: one near zero is subtracted from larger numbers."""
    collected: dict[str, list[tuple[Tensor, ...]]] = {"mean": [], "m2": []}
    for seed in case.draws:
        x = case.x(seed)
        with rf.backend(case.backend):
            actual = bn_statistics(x)
        plain, exact = eager(x), eager(x.double())
        deviation = (exact[1] / (x.numel() // x.size(1))).sqrt()
        for name, *triple in zip(collected, actual, plain, exact, strict=True):
            assert triple[0].dtype == triple[1].dtype
            collected[name].append((*triple, deviation))
    mean, plain_mean, exact_mean, deviation = map(torch.cat, zip(*collected["mean"], strict=True))
    if mean.dtype == torch.float64:
        assert_as_accurate_as_eager(mean, plain_mean, exact_mean, "mean")
    else:
        rounding = torch.finfo(mean.dtype).eps * (exact_mean.abs() + deviation).max()
        error, eager_error = ((t.double() - exact_mean).abs().max() for t in (mean, plain_mean))
        assert error <= 2 * eager_error + rounding
    m2, plain_m2, exact_m2, _ = map(torch.cat, zip(*collected["m2"], strict=True))
    assert_as_accurate_as_eager(m2, plain_m2, exact_m2, "m2")


@pytest.mark.parametrize("case", grid("bn_statistics", SHAPES))
def test_matches_eager(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case", grid("bn_statistics", [SHAPE, LARGE], [torch.float32], LAYOUTS, interpreter=False)
)
def test_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case", grid("bn_statistics", [(4, 6, 30, 30)], [torch.float32, torch.bfloat16])
)
def test_large_mean(case: Case) -> None:
    """Mean 1000, deviation 1: a sum of squares in float32 would lose a tenth of the variance.

    Combining means that are rounded to float32 costs some roundings.
    """
    x = LAYOUTS[case.layout][0]((normal(case.shape, 0) + 1000).to(case.device, case.dtype))
    with rf.backend(case.backend):
        mean, m2 = bn_statistics(x)
    (plain_mean, _), (exact_mean, exact_m2) = eager(x), eager(x.double())
    assert_as_accurate_as_eager(mean, plain_mean, exact_mean, "mean")
    assert (m2.double() / exact_m2 - 1).abs().max() < 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "case",
    grid(
        *("bn_statistics", [(2, 17, 9, 3), LARGE], [torch.float32, torch.bfloat16]),
        interpreter=False,
    ),
)
def test_is_what_bn_relu_normalises_by(case: Case) -> None:
    x = case.x()
    bn = BatchNormArgs(None, None, None, None, training=True)
    with rf.backend(case.backend):
        mean, m2 = bn_statistics(x)
        _, bn_mean, bn_invstd, *_ = bn_relu_with_statistics(x, bn)
    assert torch.equal(mean, bn_mean)
    variance = m2 / (x.numel() // x.size(1))
    rounding = 4 * torch.finfo(mean.dtype).eps
    torch.testing.assert_close(bn_invstd, (variance + bn.eps).rsqrt(), rtol=rounding, atol=0)


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (2, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", on_backends("bn_statistics"))
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    with rf.backend(backend):
        mean, m2 = bn_statistics(torch.empty(shape, device=device_of(backend)))
    for tensor in (mean, m2):
        assert torch.equal(tensor.cpu(), torch.zeros(shape[1]))
    assert shape[1] == 0 or mean.data_ptr() != m2.data_ptr()


@pytest.mark.parametrize("backend", on_backends("bn_statistics"))
def test_nan_stays_in_its_channel(backend: str) -> None:
    x = Case(backend, SHAPE, torch.float32, "channels_last").x()
    x[1, 3, 2, 2] = float("nan")
    with rf.backend(backend):
        mean, m2 = bn_statistics(x)
    for tensor in (mean, m2):
        assert tensor.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "case",
    grid(
        *("bn_statistics", DEGENERATE, [torch.float32]),
        *(["sliced"], False),
    ),
)
def test_fake_is_like_real(case: Case) -> None:
    x = case.x()
    with FakeTensorMode() as mode:
        faked = bn_statistics(mode.from_tensor(x))
    with rf.backend(case.backend):
        real = bn_statistics(x)
    for ours, theirs in zip(faked, real, strict=True):
        assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize("backend", on_backends("bn_statistics", interpreter=False))
def test_opcheck(backend: str) -> None:
    x = Case(backend, (2, 3, 4, 2), torch.bfloat16, "sliced").x()
    with rf.backend(backend):
        torch.library.opcheck(torch.ops.resnet_fused.bn_statistics.default, (x,))


def test_fullgraph_with_dynamic_shapes() -> None:
    with no_recompilation():
        compiled = torch.compile(bn_statistics, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 4, 6, 7)):
            x = normal(shape, 0, torch.float32)
            torch.testing.assert_close(compiled(x), eager(x))


X = torch.ones(2, 3, 4, 4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "dimensions": (X[0], ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4"),
    "integers": (X.int(), TypeError, r"x must be a floating-point tensor, got torch.int32 \(call"),
    "number": (1.0, TypeError, "x must be a Tensor, got float"),
    "gradient": (X.clone().requires_grad_(), RuntimeError, "an argument requires a gradient, but"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    x, error, message = BAD[bad]
    with pytest.raises(error, match=f"bn_statistics: {message}"):
        bn_statistics(x)
