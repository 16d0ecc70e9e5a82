"""The compiled CPU operators against the same mathematics in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _extension

pytestmark = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not loaded: {_extension.error()}"
)

ops = torch.ops.resnet_fused_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["nchw", "channels_last", "misaligned nchw", "misaligned channels_last"]
SHAPES = [
    (2, 64, 8, 8),
    (4, 1, 9, 9),
    (3, 17, 5, 7),
    (5, 40, 1, 1),
    (2, 3, 1, 2),
    (2, 1000, 3, 5),
    (1, 24, 40, 40),
    (2, 2056, 2, 2),
]
RESIDUALS = ["none", "plain", "batch norm"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "channels_last",
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Random values, rounded to dtype; "misaligned" starts one element into its storage."""
    values = (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)
    channels_last = layout.endswith("channels_last")
    dense = values.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    if not layout.startswith("misaligned"):
        return dense
    storage = torch.empty(dense.numel() + 1, dtype=dtype)
    return storage.as_strided(dense.shape, dense.stride(), 1).copy_(dense)


def assert_as_accurate_as_eager(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, condition: float = 1.0
) -> None:
    """The error is at most twice eager's plus one rounding.

    In float64 the exact result carries errors of its own, as large as eager's: a few roundings,
    times what the mean is larger than the deviation.
    """
    assert actual.dtype == eager.dtype, name
    assert actual.shape == exact.shape, name
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    if actual.dtype == torch.float64:
        eager_error = 32 * condition * rounding
    assert error <= 2 * eager_error + rounding, f"{name}: {error=:.2e} {eager_error=:.2e}"


class Params(NamedTuple):
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def random(cls, channels: int, dtype: torch.dtype, mean: float = 0.0) -> Params:
        weight, bias = torch.randn(channels) + 0.5, torch.randn(channels)
        running_mean, running_var = torch.randn(channels) + mean, torch.rand(channels) + 0.5
        return cls(*(t.to(dtype) for t in (weight, bias, running_mean, running_var)))

    def to(self, dtype: torch.dtype) -> Params:
        return Params(*(t.detach().to(dtype, copy=True) for t in self))


def param_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Case(NamedTuple):
    """Inputs of one forward and backward, and what the native operators make of them."""

    x: Tensor
    residual: Tensor | None
    params: Params
    residual_params: Params | None
    training: bool
    residual_training: bool
    relu: bool

    def native_forward(self) -> tuple[Tensor, ...]:
        other = self.residual_params
        out: tuple[Tensor, ...] = ops.bn_relu(
            self.x,
            *self.params,
            self.training,
            0.1,
            1e-5,
            self.residual,
            other is not None,
            *(other or (None,) * 4),
            self.residual_training,
            0.3,
            1e-3,
            self.relu,
            False,
        )
        return out

    def native_backward(self, grad_out: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, mean, invstd, residual_mean, residual_invstd, *_ = saved
        other = self.residual_params
        grads: tuple[Tensor, ...] = ops.bn_relu_backward(
            grad_out,
            self.x,
            out if self.residual is not None else None,
            None,
            self.params.weight,
            self.params.bias,
            mean,
            invstd,
            self.training,
            self.residual is not None,
            self.residual if other else None,
            other is not None,
            other.weight if other else None,
            None,
            residual_mean if other else None,
            residual_invstd if other else None,
            self.residual_training,
            self.relu,
        )
        return grads

    def eager(self, dtype: torch.dtype, grad_out: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Results of F.batch_norm and autograd in dtype.

        The ReLU's backward uses the given mask: an element on the other side of zero is a rounding
        error in `out`, but a large one in a gradient.
        """
        names: dict[str, Tensor] = {}

        def normalised(prefix: str, t: Tensor, params: Params, training: bool, args: Any) -> Tensor:
            p = params.to(param_dtype(dtype))
            weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
            names[f"{prefix}weight"], names[f"{prefix}bias"] = weight, bias
            names[f"{prefix}running_mean"] = p.running_mean
            names[f"{prefix}running_var"] = p.running_var
            return F.batch_norm(t, p.running_mean, p.running_var, weight, bias, training, *args)

        x = self.x.detach().to(dtype).requires_grad_()
        names["x"] = x
        y = normalised("", x, self.params, self.training, (0.1, 1e-5))
        if self.residual is not None:
            residual = self.residual.detach().to(dtype).requires_grad_()
            names["residual"] = residual
            if self.residual_params is not None:
                args = (0.3, 1e-3)
                params, training = self.residual_params, self.residual_training
                y = y + normalised("residual_", residual, params, training, args)
            else:
                y = y + residual
        y.backward(grad_out.to(dtype) * mask)
        results = {f"grad_{k}": t.grad for k, t in names.items() if t.grad is not None}
        results |= {k: t for k, t in names.items() if "running" in k}
        return results | {"out": y.detach().relu() if self.relu else y.detach()}


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    residual: str = "none",
    mean: float = 0.0,
    training: bool = True,
    residual_training: bool = True,
    relu: bool = True,
) -> Case:
    return Case(
        x=make(shape, dtype, layout, mean),
        residual=None if residual == "none" else make(shape, dtype, layout, mean),
        params=Params.random(shape[1], param_dtype(dtype), mean),
        residual_params=Params.random(shape[1], param_dtype(dtype), mean)
        if residual == "batch norm"
        else None,
        training=training,
        residual_training=residual_training,
        relu=relu,
    )


Results = dict[str, Tensor]


def run_case(case: Case) -> tuple[Results, Results, Results]:
    """Every result of the native operators, of eager, and of the exact mathematics."""
    before = [t.clone() for p in (case.params, case.residual_params) if p for t in p]
    inputs = Case(*case)._replace(
        params=Params(*before[:4]),
        residual_params=Params(*before[4:]) if case.residual_params else None,
    )
    saved = case.native_forward()
    out = saved[0]
    assert out.stride() == case.x.stride()
    grad_out = torch.empty_like(case.x).copy_(torch.randn(out.shape, dtype=torch.float64))
    mask = ~(out <= 0) if case.relu else torch.ones_like(out, dtype=torch.bool)
    names = ["grad_x", "grad_weight", "grad_bias"]
    names += ["grad_residual", "grad_residual_weight", "grad_residual_bias"]
    actual = dict(zip(names, case.native_backward(grad_out, saved), strict=True))
    actual |= {"out": out}
    for prefix, params in (("", case.params), ("residual_", case.residual_params)):
        if params is not None:
            actual[f"{prefix}running_mean"] = params.running_mean
            actual[f"{prefix}running_var"] = params.running_var
    eager = inputs.eager(out.dtype, grad_out, mask)
    return actual, eager, inputs.eager(torch.float64, grad_out, mask)


def check_case(make_one: Callable[[], Case], condition: float = 1.0) -> None:
    """Few values can be right by luck: the worst of several draws is compared then."""
    first = make_one()
    draws = max(1, min(32, 4096 // max(1, first.x.numel())))
    runs = [run_case(first), *(run_case(make_one()) for _ in range(draws - 1))]
    expected_names = runs[0][2].keys()
    for name, value in runs[0][0].items():
        if name in expected_names:
            actual, eager, exact = (torch.stack([r[i][name] for r in runs]) for i in range(3))
            assert_as_accurate_as_eager(name, actual, eager, exact, condition)
        else:
            assert value.numel() == 0, f"{name} must be empty"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_equals_eager(dtype: torch.dtype, layout: str) -> None:
    for shape in [*SHAPES, (0, 3, 2, 2), (1, 1, 1, 1)]:
        x, residual, grad_out = (make(shape, dtype, layout) for _ in range(3))
        out = ops.add_relu(x, residual)
        assert out.stride() == x.stride()
        assert torch.equal(out, torch.relu(x + residual))
        grad = ops.add_relu_backward(grad_out, out)
        assert torch.equal(grad, torch.where(out <= 0, 0, grad_out))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(dtype: torch.dtype, layout: str, residual: str) -> None:
    for shape in SHAPES:
        check_case(partial(make_case, shape, dtype, layout, residual))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation(dtype: torch.dtype, layout: str, residual: str) -> None:
    for shape in [*SHAPES, (0, 5, 4, 4)]:
        args = (shape, dtype, layout, residual)
        check_case(partial(make_case, *args, training=False, residual_training=False))


@pytest.mark.parametrize(("training", "residual_training"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_side_training(dtype: torch.dtype, training: bool, residual_training: bool) -> None:
    for layout in LAYOUTS[:2]:
        check_case(
            partial(
                make_case,
                (3, 17, 5, 7),
                dtype,
                layout,
                "batch norm",
                training=training,
                residual_training=residual_training,
            )
        )


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_relu(dtype: torch.dtype, residual: str) -> None:
    for layout, training in itertools.product(LAYOUTS[:2], (True, False)):
        check_case(
            partial(
                make_case,
                (3, 17, 5, 7),
                dtype,
                layout,
                residual,
                training=training,
                residual_training=training,
                relu=False,
            )
        )


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_a_thousand_deviations_off_zero(
    dtype: torch.dtype, layout: str, residual: str
) -> None:
    for shape in [(8, 64, 14, 14), (2, 256, 7, 7), (1, 32, 30, 30)]:
        check_case(partial(make_case, shape, dtype, layout, residual, mean=1000.0), condition=1e6)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_an_outlier_does_not_spoil_the_statistics(layout: str) -> None:
    for position in [(0, 0), (3, 5)]:
        x = make((4, 32, 16, 16), torch.float32, layout)
        x[0, :, position[0], position[1]] = 1e4
        case = make_case(tuple(x.shape), torch.float32, layout)._replace(x=x)
        check_case(lambda case=case: case)  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(16, 16, 56, 56), (64, 4, 112, 112)])
def test_sums_over_many_values(shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS[:2]:
        check_case(partial(make_case, shape, torch.float32, layout, mean=3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_repeats_the_forward_bit_for_bit(dtype: torch.dtype) -> None:
    for shape, layout, relu in itertools.product(SHAPES, LAYOUTS, (True, False)):
        case = make_case(shape, dtype, layout, relu=relu)
        out, mean, invstd, *_ = case.native_forward()
        weight, bias = case.params.weight, case.params.bias
        assert torch.equal(ops.bn_relu_apply(case.x, weight, bias, mean, invstd, relu), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_recomputed_from_x_equals_sign_of_out(dtype: torch.dtype) -> None:
    # Tiny outputs: some round to zero, and then have no gradient.
    for layout in LAYOUTS[:2]:
        case = make_case((4, 33, 6, 5), dtype, layout)
        # bfloat16 instructions know no subnormal numbers, software does: straddle both borders.
        tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
        case.params.weight.copy_(torch.where(torch.arange(33) % 2 == 0, 4 * tiny * eps, tiny))
        case.params.bias.zero_()
        out, mean, invstd, *_ = case.native_forward()
        assert dtype in (torch.float32, torch.float64) or 0 < (out == 0).double().mean() < 1
        grad_out = torch.ones_like(out)
        args = (None, case.params.weight, case.params.bias, mean, invstd, True, False)
        tail = (None, False, None, None, None, None, False, True)
        recomputed = ops.bn_relu_backward(grad_out, case.x, None, *args, *tail)
        given = ops.bn_relu_backward(grad_out, case.x, out, *args, *tail)
        for a, b in zip(recomputed, given, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", range(4))
def test_each_parameter_may_have_the_dtype_of_x(dtype: torch.dtype, which: int) -> None:
    case = make_case((4, 24, 6, 6), dtype, "channels_last")
    params = list(case.params)
    params[which] = params[which].to(dtype)
    wide = case._replace(params=Params(*params).to(torch.float32))
    narrow = case._replace(params=Params(*params))
    out, mean, invstd, *_ = narrow.native_forward()
    assert torch.equal(out, wide.native_forward()[0])
    assert torch.equal(narrow.params[2].float(), wide.params[2].to(params[2].dtype).float())
    assert torch.equal(narrow.params[3].float(), wide.params[3].to(params[3].dtype).float())
    grads = narrow.native_backward(torch.ones_like(out), (out, mean, invstd, mean, invstd))
    assert grads[1].dtype == grads[2].dtype == params[0].dtype
    assert mean.dtype == invstd.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_without_parameters_and_running_statistics(layout: str) -> None:
    x = make((2, 5, 4, 3), torch.float32, layout)
    none = (None,) * 4
    out, mean, invstd, *rest = ops.bn_relu(
        x, *none, True, 0.1, 1e-5, None, False, *none, False, 0.1, 1e-5, True, False
    )
    exact = F.batch_norm(x.double(), None, None, training=True).relu()
    eager = F.batch_norm(x, None, None, training=True).relu()
    assert_as_accurate_as_eager("out", out, eager, exact)
    assert [t.shape for t in rest] == [(0,), (0,), (0,)]
    grads = ops.bn_relu_backward(
        *(x, x, None, None, None, None, mean, invstd, True, False, None, False),
        *(*(None,) * 4, False, True),
    )
    assert grads[1].dtype == torch.float32
    assert grads[1].shape == grads[2].shape == (5,)


def test_parameters_may_be_strided() -> None:
    case = make_case((2, 6, 4, 4), torch.float32, "channels_last")
    strided = Params(*(torch.stack([t, t], dim=1)[:, 0] for t in case.params))
    assert strided.running_mean.stride() == (2,)
    other = case._replace(params=strided)
    assert torch.equal(other.native_forward()[0], case.native_forward()[0])
    assert torch.equal(strided.running_mean, case.params.running_mean)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_pass_as_in_eager(dtype: torch.dtype, layout: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 65504.0, 1e-7])
    x = make((2, 19, 4, 3), dtype, layout)
    flat = x.permute(0, 2, 3, 1).reshape(-1) if layout == "channels_last" else x.reshape(-1)
    flat[: special.numel()] = special.to(dtype)
    x = flat.view(2, 4, 3, 19).permute(0, 3, 1, 2) if layout == "channels_last" else x
    residual = make((2, 19, 4, 3), dtype, layout)
    total = torch.relu(x + residual)
    assert torch.equal(ops.add_relu(x, residual).nan_to_num(7, 8, 9), total.nan_to_num(7, 8, 9))
    grad = ops.add_relu_backward(residual, total)
    assert torch.equal(grad, torch.where(total <= 0, 0, residual))

    params = Params.random(19, param_dtype(dtype))
    case = Case(x, residual, params, None, False, False, True)
    out = case.native_forward()[0]
    eager = case.eager(dtype, residual, torch.ones_like(out, dtype=torch.bool))["out"]
    assert torch.equal(out.isnan(), eager.isnan())
    assert torch.equal(out.isinf(), eager.isinf())
    grad_x = case.native_backward(
        residual, (out, params.running_mean, params.running_var, out, out)
    )
    assert torch.equal(grad_x[3], torch.where(out <= 0, 0, residual))


def test_training_statistics_with_nan_stay_in_their_channel() -> None:
    case = make_case((2, 20, 5, 5), torch.float32, "channels_last")
    case.x[1, 3, 2, 2] = float("nan")
    out, mean, *_ = case.native_forward()
    bad = torch.arange(20) == 3
    assert torch.equal(mean.isnan(), bad)
    assert torch.equal(out.isnan().any(dim=(0, 2, 3)), bad)
    assert torch.equal(case.params.running_var.isnan(), bad)


def test_no_channels() -> None:
    x = torch.empty(2, 0, 3, 3)
    empty = torch.empty(0)
    out = Case(x, None, Params(*[empty] * 4), None, True, True, True).native_forward()[0]
    assert out.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_result_does_not_depend_on_the_number_of_threads(layout: str) -> None:
    case = make_case((6, 48, 40, 40), torch.float32, layout, "batch norm")
    grad_out = make((6, 48, 40, 40), torch.float32, layout)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        saved = case.native_forward()
        results.append([*saved, *case.native_backward(grad_out, saved)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def max_pool(x: Tensor, training: bool = True) -> list[Tensor]:
    """All results of the stem's operators, forward and backward."""
    channels, windows = x.size(1), ([3, 3], [2, 2], [1, 1])
    params = Params.random(channels, param_dtype(x.dtype))
    out, mean, invstd, argmax = ops.bn_relu_max_pool(x, *params, training, 0.1, 1e-5, *windows)
    grad_out = torch.empty_like(out).copy_(make(out.shape, x.dtype))
    sums = ops.bn_relu_max_pool_backward_sums(grad_out, x, argmax, mean, *windows)
    grad_x = ops.bn_relu_max_pool_backward_apply(
        *(grad_out, x, argmax, params.weight, mean, invstd, training, sums / x.numel()), *windows
    )
    return [out, argmax, mean, invstd, sums, grad_x, *params]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_max_pool_does_not_depend_on_the_number_of_threads(layout: str) -> None:
    x = make((12, 48, 80, 80), torch.float32, layout)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        torch.manual_seed(0)
        results.append(max_pool(x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_both_layouts_is_the_same(dtype: torch.dtype) -> None:
    """Also of more channels than sums take at once; sums differ by their order alone."""
    for shape in [(3, 21, 7, 9), (1, 2060, 3, 2)]:
        x = make(shape, dtype)
        results = []
        for layout in (torch.channels_last, torch.contiguous_format):
            torch.manual_seed(0)
            results.append(max_pool(x.contiguous(memory_format=layout), training=False))
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            if i == 4:
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(actual, expected)


ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import test_native_cpu as t
torch.manual_seed(0)
torch.set_num_threads(1)
results = []
for dtype in t.DTYPES:
    for layout in t.LAYOUTS:
        for shape in [(3, 17, 5, 7), (2, 64, 12, 12), (2, 5, 1, 1)]:
            for residual in t.RESIDUALS:
                for training in (True, False):
                    case = t.make_case(shape, dtype, layout, residual, 10.0, training, training)
                    saved = case.native_forward()
                    grads = case.native_backward(t.make(shape, dtype, layout), saved)
                    results += [*saved, *grads, *case.params]
            total = t.ops.add_relu(case.x, t.make(shape, dtype, layout))
            results += [total, t.ops.add_relu_backward(case.x, total)]
            results += [*t.max_pool(case.x, True), *t.max_pool(case.x, False)]
every_half = torch.arange(65536).to(torch.uint16).view(torch.float16).reshape(1, 16, 64, 64)
every_half = every_half.nan_to_num(1.0)
results.append(t.ops.add_relu(every_half, torch.zeros_like(every_half)))
params = t.Params.random(16, torch.float32)
case = t.Case(every_half, every_half.flip(1), params, None, False, False, False)
results.append(case.native_forward()[0])
print(t.ops.build_info())
torch.save(results, sys.argv[1])
"""


def run_with_isa(isa: str, target: Path) -> subprocess.CompletedProcess[str]:
    here = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, str(target), here],
        env={**os.environ, "RESNET_FUSED_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def default_isa_results(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    target = tmp_path_factory.mktemp("isa") / "default"
    ran = run_with_isa("default", target)
    assert ran.returncode == 0, ran.stderr
    results: list[Tensor] = torch.load(target)
    return results


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_gives_the_same_bits(
    isa: str, tmp_path: Path, default_isa_results: list[Tensor]
) -> None:
    ran = run_with_isa(isa, tmp_path / "isa")
    if "of this CPU" in ran.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert ran.returncode == 0, ran.stderr
    assert f'"isa": "{isa}"' in ran.stdout
    for actual, expected in zip(torch.load(tmp_path / "isa"), default_isa_results, strict=True):
        assert torch.equal(actual, expected)


def test_unknown_instruction_set_is_named(tmp_path: Path) -> None:
    ran = run_with_isa("sse9", tmp_path / "unused")
    assert ran.returncode != 0
    assert (
        "RESNET_FUSED_CPU_ISA must be default, avx2, avx512 or avx512_bf16, got sse9" in ran.stderr
    )


def bn_relu(x: Tensor, params: Any = None, training: bool = True, **kwargs: Any) -> Any:
    residual = kwargs.get("residual")
    return ops.bn_relu(
        x,
        *(params or (None,) * 4),
        training,
        0.1,
        1e-5,
        residual,
        kwargs.get("residual_bn", False),
        *kwargs.get("residual_params", (None,) * 4),
        training,
        0.1,
        1e-5,
        True,
        kwargs.get("save_mask", False),
    )


X = torch.ones(2, 3, 4, 5)
C, G, A = torch.ones(3), torch.ones(2, 3, 2, 3), torch.zeros(2, 3, 2, 3, dtype=torch.uint8)


def pool(x: Tensor, *windows: list[int], params: Any = (None,) * 4, training: bool = True) -> Any:
    return ops.bn_relu_max_pool(x, *params, training, 0.1, 1e-5, *windows)


def pool_sums(grad_out: Tensor, argmax: Tensor, mean: Tensor = C) -> Tensor:
    windows = [3, 3], [2, 2], [1, 1]
    return ops.bn_relu_max_pool_backward_sums(grad_out, X, argmax, mean, *windows)


def pool_apply(grad_out: Tensor, argmax: Tensor, invstd: Tensor, averages: Tensor) -> Tensor:
    windows = [3, 3], [2, 2], [1, 1]
    return ops.bn_relu_max_pool_backward_apply(
        *(grad_out, X, argmax, None, C, invstd, True, averages), *windows
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.add_relu(X, X[:1]), "add_relu: residual must have the shape of x"),
        (lambda: ops.add_relu(X, X.double()), "add_relu: residual must have the dtype of x"),
        (
            lambda: ops.add_relu(X, X.contiguous(memory_format=torch.channels_last)),
            "add_relu: residual must have the strides of x",
        ),
        (lambda: ops.add_relu(X.int(), X.int()), "add_relu: x must be float32, float64, float16"),
        (lambda: ops.add_relu(X.mT, X.mT), "add_relu: x must be a 4-d tensor, contiguous or"),
        (lambda: ops.add_relu_backward(X, X[..., :2]), "add_relu_backward: "),
        (lambda: bn_relu(X[0]), "bn_relu: x must be a 4-d tensor"),
        (lambda: bn_relu(X[..., ::2]), "bn_relu: x must be a 4-d tensor, contiguous or"),
        (lambda: bn_relu(X.long()), "bn_relu: x must be float32, float64, float16 or bfloat16"),
        (lambda: bn_relu(X, residual=X[:1]), "bn_relu: residual must have the shape of x"),
        (lambda: bn_relu(X, residual=X.half()), "bn_relu: residual must have the dtype of x"),
        (lambda: bn_relu(X, residual_bn=True), "bn_relu: residual must be given with residual_bn"),
        (
            lambda: bn_relu(X, (torch.ones(4), None, None, None)),
            r"bn_relu: weight must have one value for each channel of x, shape \(3,\)",
        ),
        (
            lambda: bn_relu(X, (None, None, torch.ones(3, 1), None)),
            "bn_relu: running_mean must have one value for each channel",
        ),
        (
            lambda: bn_relu(X, (None, torch.ones(3).int(), None, None)),
            "bn_relu: bias must be float32",
        ),
        (
            lambda: bn_relu(
                X, residual=X, residual_bn=True, residual_params=(None, torch.ones(2), None, None)
            ),
            "bn_relu: residual_bias must have one value for each channel",
        ),
        (
            lambda: bn_relu(X, residual=X, save_mask=True),
            "bn_relu: save_mask must be False on a CPU",
        ),
        (
            lambda: bn_relu(X, training=False),
            "bn_relu: running_mean and running_var must be given when not training",
        ),
        (
            lambda: bn_relu(X[:1, :, :1, :1].contiguous()),
            r"Expected more than 1 value per channel when training, got input size \(1, 3, 1, 1\)",
        ),
        (
            lambda: bn_relu(X[:0]),
            r"Expected more than 1 value per channel when training, got input size \(0, 3, 4, 5\)",
        ),
        (
            lambda: ops.bn_relu_apply(X, None, None, torch.ones(2), torch.ones(3), True),
            "bn_relu_apply: mean must have one value for each channel",
        ),
        (
            lambda: ops.bn_relu_backward(
                *(X, X, None, None, None, None, torch.ones(3), torch.ones(3), True, True),
                *(None, False, None, None, None, None, False, True),
            ),
            "bn_relu_backward: out must be given when there are a residual and a ReLU",
        ),
        (
            lambda: ops.bn_relu_backward(
                *(X[:1], X, None, None, None, None, torch.ones(3), torch.ones(3), True, False),
                *(None, False, None, None, None, None, False, True),
            ),
            "bn_relu_backward: grad_out must have the shape of x",
        ),
        (
            lambda: ops.bn_relu_backward(
                *(X, X, X, None, None, None, torch.ones(3), torch.ones(3), True, True),
                *(None, True, None, None, None, None, False, True),
            ),
            "bn_relu_backward: residual, residual_mean and residual_invstd must be given",
        ),
        (
            lambda: pool(X, [3, 3], [2, 2], [2, 1]),
            "bn_relu_max_pool: padding must be at most half of kernel_size",
        ),
        (
            lambda: pool(X, [5, 3], [2, 2], [0, 1]),
            r"room for a window, got x of shape \(2, 3, 4, 5\) and kernel_size \(5, 3\)",
        ),
        (lambda: pool(X, [3, 3], [0, 1], [1, 1]), "bn_relu_max_pool: "),
        (lambda: pool(X, [3], [1, 1], [1, 1]), "must be two numbers each"),
        (
            lambda: pool(torch.ones(1, 1, 16, 16), [16, 16], [1, 1], [0, 0]),
            r"bn_relu_max_pool: kernel_size must have at most 255 places, got \(16, 16\)",
        ),
        (
            lambda: pool(X, [3, 3], [2, 2], [1, 1], params=(torch.ones(4), None, None, None)),
            "bn_relu_max_pool: weight must have one value for each channel",
        ),
        (
            lambda: pool(X, [3, 3], [2, 2], [1, 1], training=False),
            "bn_relu_max_pool: running_mean and running_var must be given when not training",
        ),
        (
            lambda: pool_sums(G[:1], A),
            "bn_relu_max_pool_backward_sums: grad_out must have the shape of the pooled x",
        ),
        (lambda: pool_sums(G.half(), A), "grad_out must have the dtype of x"),
        (lambda: pool_sums(G, A.int()), "argmax must be of uint8"),
        (
            lambda: pool_sums(G, A.contiguous(memory_format=torch.channels_last)),
            "argmax must have the memory format of x",
        ),
        (lambda: pool_sums(G, A, torch.ones(2)), "mean must have one value for each channel"),
        (
            lambda: pool_apply(G, A, torch.ones(2), torch.ones(2, 3)),
            "bn_relu_max_pool_backward_apply: invstd must have one value for each channel",
        ),
        (
            lambda: pool_apply(G, A, C, torch.ones(3, 2)),
            "bn_relu_max_pool_backward_apply: averages must have two values per channel",
        ),
        (
            lambda: ops.bn_relu_backward_sums(
                *(X, X, None, torch.ones(6, 3, dtype=torch.uint8), None, None, torch.ones(3)),
                *(torch.ones(3), None, False, None, None, None, None, True),
            ),
            "bn_relu_backward_sums: out must be given when there are a residual and a ReLU",
        ),
        (
            lambda: ops.bn_relu_backward_apply(
                *(X, X, None, None, None, None, torch.ones(3), torch.ones(3), True, False, None),
                *(False, None, None, None, None, False, True, torch.ones(3, 3)),
            ),
            r"averages must be a contiguous float32 tensor of shape \(2, 3\) on the CPU, got shape",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
