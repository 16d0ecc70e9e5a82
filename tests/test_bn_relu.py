"""bn_relu and its partners: forward, gradients, running statistics, formats, tracing, bad input."""

from typing import Any, NamedTuple

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
    assert_format_follows,
    assert_same_function,
    device_of,
    grid,
    missing,
    no_recompilation,
    normal,
    on_backends,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import BatchNormArgs, bn_relu
from resnet_fused.ops.bn_relu import bn_relu_apply, bn_relu_with_statistics

ops = torch.ops.resnet_fused
native = torch.ops.resnet_fused_native
MOMENTUM, EPS = 0.3, 1e-3


class Variant(NamedTuple):
    """One way to call bn_relu."""

    training: bool = True
    residual: bool = False
    residual_bn: bool = False
    residual_training: bool = True
    relu: bool = True
    affine: bool = True
    cast_parameters: bool = False  # weight and bias in the dtype of x


VARIANTS = {
    "train": Variant(),
    "train_residual": Variant(residual=True),
    "train_dual": Variant(residual=True, residual_bn=True),
    "eval": Variant(training=False),
    "eval_residual": Variant(training=False, residual=True),
    "eval_dual": Variant(training=False, residual=True, residual_bn=True, residual_training=False),
    "train_eval_dual": Variant(residual=True, residual_bn=True, residual_training=False),
    "eval_train_dual": Variant(training=False, residual=True, residual_bn=True),
    "train_no_relu": Variant(relu=False),
    "train_residual_no_relu": Variant(residual=True, relu=False),
    "train_dual_no_relu": Variant(residual=True, residual_bn=True, relu=False),
    "eval_no_relu": Variant(training=False, relu=False),
    "train_plain": Variant(affine=False),
    "train_dual_plain": Variant(residual=True, residual_bn=True, affine=False),
    "eval_plain": Variant(training=False, affine=False),
    "train_cast": Variant(cast_parameters=True),
    "train_dual_cast": Variant(residual=True, residual_bn=True, cast_parameters=True),
}
MAIN = ("train", "train_residual", "train_dual", "eval_residual")


def per_channel(case: Case, seed: int, positive: bool = False) -> Tensor:
    """(C,) in the dtype that modules keep their parameters in."""
    values = normal((case.shape[1],), seed)
    values = values.abs() + 0.5 if positive else values
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return values.to(case.device, dtype)


def arguments(case: Case, variant: Variant, seed: int = 0) -> dict[str, Tensor]:
    """The differentiable arguments."""
    tensors = {"x": case.x(seed)}
    dtype = case.dtype if variant.cast_parameters else None
    if variant.affine:
        tensors["weight"] = per_channel(case, seed + 1).to(dtype)
        tensors["bias"] = per_channel(case, seed + 2).to(dtype)
    if variant.residual:
        tensors["residual"] = case.other(seed + 3)
    if variant.residual_bn and variant.affine:
        tensors["residual_weight"] = per_channel(case, seed + 4).to(dtype)
        tensors["residual_bias"] = per_channel(case, seed + 5).to(dtype)
    return tensors


class Function:
    """bn_relu, or the eager composition, as a function of the differentiable arguments."""

    def __init__(self, case: Case, variant: Variant, fused: bool) -> None:
        self.variant, self.fused = variant, fused
        dtype = case.dtype if variant.cast_parameters else None
        self.running = [per_channel(case, 6 + i, positive=i % 2 == 1).to(dtype) for i in range(4)]
        self.updated: list[Tensor] = []  # running statistics after the last call

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        residual_weight: Tensor | None = None,
        residual_bias: Tensor | None = None,
    ) -> Tensor:
        v = self.variant
        running = [t.double() if x.dtype == torch.float64 else t.clone() for t in self.running]
        self.updated = running = [t.clone() for t in running]
        other = None
        if v.residual_bn:
            other = BatchNormArgs(
                residual_weight, residual_bias, *running[2:], v.residual_training, MOMENTUM, EPS
            )
        if self.fused:
            return bn_relu(
                *(x, weight, bias, *running[:2], v.training, MOMENTUM, EPS),
                *(residual, other, v.relu),
            )
        out = F.batch_norm(x, *running[:2], weight, bias, v.training, MOMENTUM, EPS)
        if other is not None:
            assert residual is not None
            residual = F.batch_norm(
                residual, *running[2:], other.weight, other.bias, v.residual_training, MOMENTUM, EPS
            )
        out = out if residual is None else out + residual
        return torch.relu(out) if v.relu else out


def check(case: Case, variant: Variant) -> None:
    draws = [(arguments(case, variant, seed), case.other(seed + 10)) for seed in case.draws]
    fused, eager = Function(case, variant, fused=True), Function(case, variant, fused=False)
    with rf.backend(case.backend):
        results = assert_same_function(fused, eager, *draws)
    assert_format_follows(results, draws[-1][0])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("case", grid("bn_relu", SHAPES))
def test_matches_eager(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", grid("bn_relu", dtypes=[torch.float32, torch.bfloat16]))
def test_variants(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("case", grid("bn_relu", dtypes=[torch.float32], layouts=LAYOUTS))
def test_layouts(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize(
    "case", grid("bn_relu", [LARGE], [torch.float32, torch.bfloat16], interpreter=False)
)
def test_real_layer(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", grid("bn_relu", [(3, 21, 4, 5)]))
def test_running_statistics(case: Case, momentum: float) -> None:
    x = case.x() * 2 + 0.5
    running = [per_channel(case, 6), per_channel(case, 7, positive=True)]
    ours, plain, exact = ([t.to(d, copy=True) for t in running] for d in (None, None, torch.double))
    versions = [t._version for t in ours]
    with rf.backend(case.backend):
        bn_relu(x, None, None, *ours, training=True, momentum=momentum)
    F.batch_norm(x, *plain, training=True, momentum=momentum)
    F.batch_norm(x.double(), *exact, training=True, momentum=momentum)
    for name, *tensors in zip(("mean", "var"), ours, plain, exact, strict=True):
        assert_as_accurate_as_eager(*tensors, f"running_{name}")
    assert all(t._version > v for t, v in zip(ours, versions, strict=True))


@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_running_statistics_of_the_residual(backend: str) -> None:
    x, residual = (normal(SHAPE, i, torch.float32).to(device_of(backend)) for i in (0, 1))
    running = [torch.zeros(12, device=x.device), torch.ones(12, device=x.device)]
    expected = [t.clone() for t in running]
    versions = [t._version for t in running]
    residual_bn = BatchNormArgs(None, None, *running, training=True, momentum=0.5)
    own = torch.zeros(12, device=x.device), torch.ones(12, device=x.device)
    with rf.backend(backend):
        bn_relu(x, None, None, *own, residual=residual, residual_bn=residual_bn)
    F.batch_norm(residual, *expected, training=True, momentum=0.5)
    torch.testing.assert_close(running, expected)
    assert all(t._version > v for t, v in zip(running, versions, strict=True))
    assert torch.equal(own[0], torch.zeros_like(own[0])), "updated in evaluation"
    assert [t._version for t in own] == [0, 0]


@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_evaluation_leaves_running_statistics_alone(backend: str) -> None:
    x = normal(SHAPE, 0, torch.float32).to(device_of(backend))
    running = torch.zeros(12, device=x.device), torch.ones(12, device=x.device)
    with rf.backend(backend):
        _, mean, invstd, *_ = bn_relu_with_statistics(x, BatchNormArgs(None, None, *running))
    mean.add_(1)
    invstd.add_(1)
    assert torch.equal(running[0], torch.zeros_like(running[0]))
    assert [t._version for t in running] == [0, 0]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_large_mean(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Mean 1000, standard deviation 1: a sum of squares in float32 would lose the variance."""
    case = Case(backend, (4, 6, 30, 30), dtype, layout)
    x = (normal(case.shape, 0) + 1000).to(case.device, dtype)
    x = LAYOUTS[layout][0](x)
    running = per_channel(case, 6), per_channel(case, 7, positive=True)
    ours, plain = ([t.clone() for t in running] for _ in range(2))
    exact = [t.double() for t in running]
    with rf.backend(backend):
        out = bn_relu(x, None, None, *ours, training=True)
    expected = torch.relu(F.batch_norm(x, *plain, training=True))
    truth = torch.relu(F.batch_norm(x.double(), *exact, training=True))
    assert_as_accurate_as_eager(out, expected, truth)
    for name, *tensors in zip(("mean", "var"), ours, plain, exact, strict=True):
        assert_as_accurate_as_eager(*tensors, f"running_{name}")


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_nan_in_one_channel(backend: str, variant: str) -> None:
    """The rule for accuracy wants NaN where eager has it, and nowhere else."""
    case = Case(backend, SHAPE, torch.float32, "channels_last")
    tensors = arguments(case, VARIANTS[variant])
    tensors["x"][1, 3, 2, 2] = float("nan")
    functions = [Function(case, VARIANTS[variant], fused) for fused in (True, False)]
    with rf.backend(backend):
        results = assert_same_function(*functions, (tensors, case.other(10)))
    assert results["out"].isnan().any()
    assert not results["out"][:, 4].isnan().any()


@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_empty_batch(backend: str) -> None:
    """As in eager: gradients of zero, and statistics that do not move."""
    case = Case(backend, (0, 5, 4, 4), torch.float32, "nchw")
    for name in (*MAIN, "eval", "eval_dual"):
        tensors = {n: t.requires_grad_() for n, t in arguments(case, VARIANTS[name]).items()}
        function = Function(case, VARIANTS[name], fused=True)
        with rf.backend(backend):
            out = function(**tensors)
            out.sum().backward()
        assert out.shape == case.shape
        assert all(map(torch.equal, function.updated, function.running))
        for parameter in (t for t in tensors.values() if t.dim() == 1):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", on_backends("bn_relu", torch.float64))
def test_second_derivatives(backend: str, variant: str) -> None:
    case = Case(backend, (2, 3, 2, 2), torch.float64, "nchw")
    tensors = {n: t.requires_grad_() for n, t in arguments(case, VARIANTS[variant]).items()}
    function = Function(case, VARIANTS[variant], fused=True)

    def positional(*values: Tensor) -> Tensor:
        return function(**dict(zip(tensors, values, strict=True)))

    with rf.backend(backend):
        assert torch.autograd.gradcheck(positional, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(positional, tuple(tensors.values()))


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual", "residual_weight"])
@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_gradient_of_one_argument(backend: str, needed: str) -> None:
    case = Case(backend, SHAPE, torch.float32, "channels_last")
    variant = VARIANTS["train_dual"]
    tensors = arguments(case, variant)
    tensors[needed].requires_grad_()
    with rf.backend(backend):
        Function(case, variant, fused=True)(**tensors).square().sum().backward()
    grad = tensors[needed].grad
    tensors[needed].grad = None
    Function(case, variant, fused=False)(**tensors).square().sum().backward()
    torch.testing.assert_close(grad, tensors[needed].grad, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_without_gradients(backend: str, guard: Any) -> None:
    case = Case(backend, SHAPE, torch.float32, "nchw")
    for variant in VARIANTS.values():
        tensors = {n: t.requires_grad_() for n, t in arguments(case, variant).items()}
        with rf.backend(backend), guard():
            out = Function(case, variant, fused=True)(**tensors)
            expected = Function(case, variant, fused=False)(**tensors)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", MAIN)
def test_autocast_is_as_eager(variant: str, dtype: torch.dtype) -> None:
    case = Case("cpu", SHAPE, dtype, "channels_last")
    functions = [Function(case, VARIANTS[variant], fused) for fused in (True, False)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draw = arguments(case, VARIANTS[variant]), case.other(10)
        assert_same_function(*functions, draw)


def test_promotes_as_a_sum_does() -> None:
    x, residual = normal(SHAPE, 0, torch.bfloat16), normal(SHAPE, 1, torch.float32)
    out = bn_relu(x, None, None, None, None, training=True, residual=residual)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", grid("bn_relu_apply", [SHAPE, (2, 17, 9, 3)], layouts=LAYOUTS))
def test_apply_repeats_the_forward_bit_by_bit(case: Case, training: bool, relu: bool) -> None:
    weight, bias, mean = (per_channel(case, i) for i in (1, 2, 6))
    bn = BatchNormArgs(weight, bias, mean, per_channel(case, 7, positive=True), training)
    x = case.x()
    with rf.backend(case.backend):
        out, mean, invstd, *_ = bn_relu_with_statistics(x, bn, relu=relu)
        again = bn_relu_apply(x, weight, bias, mean, invstd, relu)
    assert torch.equal(out, again)
    assert out.stride() == again.stride()


def calls(case: Case, variant: Variant, requires_grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Overloads and their arguments: bn_relu, its backward and, without residual, bn_relu_apply.

    With a mask where there can be one, except on CPUs.
    """
    tensors = arguments(case, variant)
    tensors = {n: t.detach().requires_grad_(requires_grad) for n, t in tensors.items()}
    get = tensors.get
    stats = [per_channel(case, 6 + i, positive=i % 2 == 1) for i in range(4)]
    residual_stats = stats[2:] if variant.residual_bn else [None, None]
    x, residual, residual_bn = tensors["x"], get("residual"), variant.residual_bn
    residual_training = variant.residual_training and residual_bn
    forward = (
        *(x, get("weight"), get("bias"), *stats[:2], variant.training, MOMENTUM, EPS),
        *(residual, residual_bn, get("residual_weight"), get("residual_bias"), *residual_stats),
        *(residual_training, MOMENTUM, EPS, variant.relu),
    )
    out, mask = case.other(10).relu(), None
    save_mask = variant.relu and variant.residual and not residual_bn and case.backend != "cpu"
    if save_mask:
        with rf.backend("reference"), torch.no_grad():
            mask = ops.bn_relu(*forward, True)[5]
    backward = (
        *(case.other(11), x, out, mask, get("weight"), get("bias"), *stats[:2], variant.training),
        *(residual is not None, residual, residual_bn, get("residual_weight")),
        *(get("residual_bias"), *residual_stats, residual_training, variant.relu),
    )
    listed = [(ops.bn_relu_backward.default, backward)]
    listed += [(ops.bn_relu.default, (*forward, flag)) for flag in {False, save_mask}]
    if residual is None and not requires_grad:
        apply = (x, get("weight"), get("bias"), *stats[:2], variant.relu)
        listed.append((ops.bn_relu_apply.default, apply))
    return listed


@pytest.mark.parametrize("case", grid("bn_relu", DEGENERATE, [torch.float32], LAYOUTS))
def test_fake_is_like_real(case: Case) -> None:
    check_fake(case, VARIANTS["eval_dual" if case.shape[0] == 0 else "train_dual"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "case", grid("bn_relu", dtypes=[torch.float32, torch.bfloat16], interpreter=False)
)
def test_fake_is_like_real_for_all_variants(case: Case, variant: str) -> None:
    check_fake(case, VARIANTS[variant])


def check_fake(case: Case, variant: Variant) -> None:
    for overload, real_arguments in calls(case, variant, requires_grad=False):
        with FakeTensorMode() as mode:
            faked = overload(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments)
            )
        with rf.backend(case.backend):
            real = overload(*real_arguments)
        faked, real = ((r,) if isinstance(r, Tensor) else r for r in (faked, real))
        for ours, theirs in zip(faked, real, strict=True):
            assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        *(("channels_last", v) for v in (*MAIN, "eval", "train_residual_no_relu", "train_plain")),
        *((layout, "train_dual") for layout in ("mixed", "sliced", "expanded")),
    ],
)
@pytest.mark.parametrize("backend", on_backends("bn_relu"))
def test_opcheck(backend: str, layout: str, variant: str) -> None:
    case = Case(backend, (2, 3, 4, 2), torch.float32, layout)
    with rf.backend(backend):
        for requires_grad in (False, True):
            for overload, example in calls(case, VARIANTS[variant], requires_grad):
                torch.library.opcheck(overload, example)


@pytest.mark.parametrize("variant", MAIN)
def test_switching_the_backend_recompiles_nothing(variant: str) -> None:
    case = Case("cpu", SHAPE, torch.float32, "channels_last")
    v = VARIANTS[variant]
    tensors = {n: t.requires_grad_() for n, t in arguments(case, v).items()}
    expected = Function(case, v, fused=False)(**tensors)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(tensors.values()))

    def function(running_mean: Tensor, running_var: Tensor, **given: Tensor) -> Tensor:
        residual_bn = None
        if v.residual_bn:
            affine = given["residual_weight"], given["residual_bias"]
            residual_bn = BatchNormArgs(*affine, None, None, True, MOMENTUM, EPS)
        return bn_relu(
            *(given["x"], given["weight"], given["bias"], running_mean, running_var),
            *(v.training, MOMENTUM, EPS, given.get("residual"), residual_bn),
        )

    with no_recompilation():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for backend in ("reference", "cpu"):
            running = per_channel(case, 6), per_channel(case, 7, positive=True)
            with rf.backend(backend):
                out = compiled(*running, **tensors)
                grads = torch.autograd.grad(out.square().sum(), list(tensors.values()))
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
            assert running[0].equal(per_channel(case, 6)) is not v.training


def test_dynamic_shapes() -> None:
    with no_recompilation():
        compiled = torch.compile(bn_relu, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 4, 6, 7), (5, 2, 3, 9)):
            x = normal(shape, 0, torch.float32)
            running = torch.zeros(shape[1]), torch.ones(shape[1])
            expected = torch.relu(F.batch_norm(x, None, None, training=True))
            torch.testing.assert_close(compiled(x, None, None, *running, True), expected)


X = torch.ones(2, 3, 4, 4)
C = torch.ones(3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight shape": (
        {"weight": torch.ones(4)},
        ValueError,
        r"bn_relu: weight must have one value per channel \(3,\), got \(4,\)",
    ),
    "bias dimensions": (
        {"bias": torch.ones(3, 1)},
        ValueError,
        r"bn_relu: bias must have one value per channel \(3,\), got \(3, 1\)",
    ),
    "running_mean shape": (
        {"running_mean": torch.ones(2)},
        ValueError,
        r"bn_relu: running_mean must have one value per channel \(3,\), got \(2,\)",
    ),
    "running_var dtype": (
        {"running_var": torch.ones(3, dtype=torch.int64)},
        TypeError,
        r"bn_relu: running_var must be a floating-point tensor, got torch.int64",
    ),
    "weight device": (
        {"weight": torch.ones(3, device="meta")},
        ValueError,
        r"bn_relu: weight must be on the device of x cpu, got meta \(move one with .to\(\)\)",
    ),
    "dimensions": (
        {"x": torch.ones(3, 4, 4)},
        ValueError,
        r"bn_relu: x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4, 4\)",
    ),
    "integers": (
        {"x": torch.ones(2, 3, 4, 4, dtype=torch.int32)},
        TypeError,
        r"bn_relu: x must be a floating-point tensor, got torch.int32 \(call .float\(\)\)",
    ),
    "x is a list": ({"x": [1.0]}, TypeError, r"bn_relu: x must be a Tensor, got list"),
    "residual is a number": (
        {"residual": 1.0},
        TypeError,
        r"bn_relu: residual must be a Tensor, got float",
    ),
    "no running statistics": (
        {"running_mean": None},
        ValueError,
        r"bn_relu: running_mean and running_var must be given in evaluation, got None"
        r" \(pass training=True",
    ),
    "one value": (
        {"x": torch.ones(1, 3, 1, 1), "training": True},
        ValueError,
        r"bn_relu: expected more than 1 value per channel when training,"
        r" got x of shape \(1, 3, 1, 1\)",
    ),
    "residual shape": (
        {"residual": torch.ones(2, 3, 4, 5)},
        ValueError,
        r"bn_relu: residual must have the shape of x \(2, 3, 4, 4\), got \(2, 3, 4, 5\)",
    ),
    "residual device": (
        {"residual": torch.ones(2, 3, 4, 4, device="meta")},
        ValueError,
        r"bn_relu: residual must be on the device of x cpu, got meta",
    ),
    "residual_bn without residual": (
        {"residual_bn": BatchNormArgs(C, C, C, C)},
        ValueError,
        r"bn_relu: residual_bn must come with a residual, got residual=None",
    ),
    "residual_bn channels": (
        {"residual": X, "residual_bn": BatchNormArgs(torch.ones(4), C, C, C)},
        ValueError,
        r"bn_relu: residual_bn.weight must have one value per channel \(3,\), got \(4,\)",
    ),
    "residual_bn without running statistics": (
        {"residual": X, "residual_bn": BatchNormArgs(C, C, None, None)},
        ValueError,
        r"bn_relu: residual_bn.running_mean and residual_bn.running_var must be given",
    ),
    "weight is a list": ({"weight": [1.0, 2.0, 3.0]}, (TypeError, RuntimeError), "weight"),
    "momentum is text": ({"momentum": "0.1"}, (TypeError, RuntimeError), "momentum"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    good = {"x": X, "weight": C, "bias": C, "running_mean": C, "running_var": C}
    with pytest.raises(error, match=message):
        bn_relu(**(good | changed))


def test_no_gradient_of_apply() -> None:
    with pytest.raises(RuntimeError, match=r"bn_relu_apply: .* requires a gradient, but this"):
        bn_relu_apply(X.clone().requires_grad_(), C, C, C, C)


BELOW: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "apply: mean": ("bn_relu_apply", (X, C, C, torch.ones(2), C, True), "mean must have one value"),
    "apply: None": ("bn_relu_apply", (X, C, C, None, C, True), "mean must be a Tensor"),
    "apply: device": (
        "bn_relu_apply",
        (X, C, C, C, torch.ones(3, device="meta"), True),
        "invstd must be on",
    ),
    "apply: integers": (
        "bn_relu_apply",
        (X.int(), C, C, C, C, True),
        "x must be a floating-point tensor",
    ),
    "backward: grad_out": (
        "bn_relu_backward",
        (X[:1], X, *(None, None, C, C, C, C, True, False, None, False), *(None,) * 4, False, True),
        "grad_out must have the shape of x",
    ),
    "backward: out": (
        "bn_relu_backward",
        (X, X, *(None, None, C, C, C, C, True, True, None, False), *(None,) * 4, False, True),
        "(out|mask|out or mask) must be given",
    ),
    "backward: residual": (
        "bn_relu_backward",
        (X, X, X, None, C, C, C, C, True, True, None, True, C, C, C, C, False, True),
        "residual must be a Tensor",
    ),
    "backward: statistics of the residual": (
        "bn_relu_backward",
        (X, X, X, None, C, C, C, C, True, True, X, True, C, C, None, None, True, True),
        "residual_mean must be a Tensor",
    ),
    "backward: channels of the residual": (
        "bn_relu_backward",
        (X, X, X, None, C, C, C, C, True, True, X, True, torch.ones(5), C, C, C, True, True),
        "residual_weight must have one value",
    ),
    "backward: has_residual": (
        "bn_relu_backward",
        (X, X, X, None, C, C, C, C, True, False, X, True, C, C, C, C, True, True),
        "has_residual must be",
    ),
    "backward: mean": (
        "bn_relu_backward",
        (X, X, *(None, None, C, C, None, C, True, False, None, False), *(None,) * 4, False, True),
        "mean must be a Tensor",
    ),
}


@pytest.mark.parametrize("backend", on_backends("bn_relu"))
@pytest.mark.parametrize("bad", BELOW)
def test_bad_input_below_the_public_function(bad: str, backend: str) -> None:
    name, arguments, message = BELOW[bad]
    with (
        rf.backend(backend),
        pytest.raises((ValueError, TypeError, RuntimeError), match=f"{name}: {message}"),
    ):
        getattr(ops, name)(*arguments)


@pytest.mark.skipif(missing("bn_relu", "cpu") is not None, reason=str(missing("bn_relu", "cpu")))
@pytest.mark.parametrize("bad", BELOW)
def test_bad_input_of_the_native_operators(bad: str) -> None:
    name, arguments, _ = BELOW[bad]
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        getattr(native, name)(*arguments)


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(guard: Any) -> None:
    """A tangent that is dropped would be a derivative of zero."""
    x, tangent = (normal(SHAPE, i, torch.float32) for i in (0, 2))

    def function(x: Tensor) -> Tensor:
        with guard():
            return bn_relu(x, None, None, None, None, training=True)

    expected = "bn_relu: forward-mode derivatives are not implemented"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=expected):
        function(forward_ad.make_dual(x, tangent))
    with pytest.raises(NotImplementedError, match=expected):
        torch.func.jvp(function, (x,), (tangent,))
    assert function(x).isfinite().all()
