"""The passes of bn_relu one by one, and over parts of a batch as if processes had them."""

from typing import Any, NamedTuple

import pytest
import torch
from numerics import (
    DEGENERATE,
    LARGE,
    LAYOUTS,
    SHAPE,
    Case,
    assert_fake_is_like_real,
    assert_format_follows,
    assert_same_function,
    grid,
    no_recompilation,
    normal,
    on_backends,
)
from test_bn_relu import MAIN, VARIANTS, Variant, arguments, per_channel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import (
    BatchNormArgs,
    bn_relu_backward_apply,
    bn_relu_backward_sums,
    bn_statistics,
)
from resnet_fused.ops.bn_relu import bn_relu_with_statistics, keeps_output
from resnet_fused.ops.bn_relu_backward import bn_relu_backward

ops = torch.ops.resnet_fused
EPS = 1e-3


class Statistics(NamedTuple):
    """Of one batch norm, over all parts."""

    mean: Tensor
    var: Tensor

    @property
    def invstd(self) -> Tensor:
        return (self.var + EPS).rsqrt()


def statistics_of(parts: list[Tensor]) -> Statistics:
    """Chan's formula, in float64, as the numbers are few."""
    counts = [part.numel() // part.size(1) for part in parts]
    means, m2s = zip(*((t.double() for t in bn_statistics(part)) for part in parts), strict=True)
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts)
    m2 = sum(m2 + n * (m - mean).square() for n, m, m2 in zip(counts, means, m2s, strict=True))
    dtype = bn_statistics(parts[0])[0].dtype
    return Statistics(mean.to(dtype), (m2 / sum(counts)).to(dtype))


class _InParts(torch.autograd.Function):
    """bn_relu of a batch that is split over processes; a step of all of them is a comprehension."""

    @staticmethod
    def forward(
        ctx: Any, sizes: list[int], variant: Variant, stats: list[Tensor], *tensors: Any
    ) -> Tensor:
        x, weight, bias, residual, residual_weight, residual_bias = tensors
        ctx.sizes, ctx.variant = sizes, variant
        xs = x.split(sizes)
        residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
        own = statistics_of(xs) if variant.training else Statistics(*stats[:2])
        other = None
        if variant.residual_bn:
            other = Statistics(*stats[2:])
            other = statistics_of(residuals) if variant.residual_training else other
        bn = BatchNormArgs(weight, bias, *own, eps=EPS)
        residual_bn = other and BatchNormArgs(residual_weight, residual_bias, *other, eps=EPS)
        with_mask = variant.relu and variant.residual and not (variant.residual_bn)
        save_mask = with_mask and not keeps_output(x)
        results = [
            bn_relu_with_statistics(*(part, bn, other_part, residual_bn, variant.relu, save_mask))
            for part, other_part in zip(xs, residuals, strict=True)
        ]
        ctx.signs = [
            (r[0] if variant.residual and keeps_output(x) else None, r[5] if save_mask else None)
            for r in results
        ]
        ctx.own, ctx.other = own, other
        ctx.save_for_backward(*tensors)
        return torch.cat([r[0] for r in results])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, bias, residual, residual_weight, residual_bias = ctx.saved_tensors
        v, sizes = ctx.variant, ctx.sizes
        residuals = residual.split(sizes) if v.residual_bn else [None] * len(sizes)
        other = (ctx.other.mean, ctx.other.invstd) if ctx.other else (None, None)
        affine = weight, bias, ctx.own.mean, ctx.own.invstd
        residual_affine = v.residual_bn, residual_weight, residual_bias, *other
        each = list(zip(grad_out.split(sizes), x.split(sizes), ctx.signs, residuals, strict=True))
        sums = sum(
            bn_relu_backward_sums(grad, part, *signs, *affine, r, *residual_affine, v.relu)
            for grad, part, signs, r in each
        )
        averages = sums / (x.numel() // x.size(1))
        residual_training = v.residual_bn and v.residual_training
        grads = [
            bn_relu_backward_apply(
                *(grad, part, *signs, *affine, v.training, v.residual, r, *residual_affine),
                *(residual_training, v.relu, averages),
            )
            for grad, part, signs, r in each
        ]
        grad_x, grad_residual = map(torch.cat, zip(*grads, strict=True))
        result = [grad_x, sums[1] * affine[3], sums[0]]
        result += [grad_residual] if v.residual else [None]
        result += [sums[2] * other[1], sums[0]] if v.residual_bn else [None, None]
        given = ctx.saved_tensors
        return (
            *(None, None, None),
            *(None if t is None else g.to(t.dtype) for g, t in zip(result, given, strict=True)),
        )


def check(case: Case, variant: Variant, sizes: list[int]) -> None:
    names = "x", "weight", "bias", "residual", "residual_weight", "residual_bias"
    stats = [per_channel(case, 6 + i, positive=i % 2 == 1) for i in range(4)]

    def in_parts(**tensors: Tensor) -> Tensor:
        return _InParts.apply(sizes, variant, stats, *(tensors.get(name) for name in names))

    def eager(**tensors: Tensor) -> Tensor:
        get, x = tensors.get, tensors["x"]
        running = [t.to(torch.float64 if x.dtype == torch.float64 else None) for t in stats]
        kwargs = {"training": variant.training, "eps": EPS}
        running_ = [None, None] if variant.training else running[:2]
        out = F.batch_norm(x, *running_, get("weight"), get("bias"), **kwargs)
        if variant.residual_bn:
            kwargs["training"] = variant.residual_training
            running_ = [None, None] if variant.residual_training else running[2:]
            affine = get("residual_weight"), get("residual_bias")
            out = out + F.batch_norm(tensors["residual"], *running_, *affine, **kwargs)
        elif variant.residual:
            out = out + tensors["residual"]
        return torch.relu(out) if variant.relu else out

    draws = [(arguments(case, variant, seed), case.other(seed + 10)) for seed in case.draws]
    with rf.backend(case.backend):
        results = assert_same_function(in_parts, eager, *draws)
    if len(sizes) == 1:
        assert_format_follows(results, draws[-1][0])


# Other shapes of the same kernels are in test_bn_relu.py.
SHAPES = ((3, 7, 1, 1), (2, 17, 9, 3), (4, 36, 6, 6))


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("case", grid("bn_relu_backward_sums", SHAPES, interpreter=False))
def test_matches_eager(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant], [case.shape[0]])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize(
    "case", grid("bn_relu_backward_sums", [(5, 12, 3, 4)], [torch.float32, torch.bfloat16])
)
def test_parts_of_a_batch_together(case: Case, variant: str) -> None:
    """As many processes as parts: one of them has no images."""
    check(case, VARIANTS[variant], [2, 0, 3])


@pytest.mark.parametrize("variant", ["train_residual", "train_dual"])
@pytest.mark.parametrize(
    "case",
    grid("bn_relu_backward_sums", dtypes=[torch.float32], layouts=LAYOUTS, interpreter=False),
)
def test_layouts(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant], [case.shape[0]])


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize(
    "case",
    grid("bn_relu_backward_sums", [LARGE], [torch.float32, torch.bfloat16], interpreter=False),
)
def test_real_layer(case: Case, variant: str) -> None:
    check(case, VARIANTS[variant], [case.shape[0]])


class Calls(NamedTuple):
    """Arguments of the operators for one forward."""

    whole: tuple[Any, ...]  # of bn_relu_backward, and but for averages of bn_relu_backward_apply
    sums: tuple[Any, ...]


def calls(case: Case, variant: Variant) -> Calls:
    """The sign of the ReLU is where kernels look for it: in a mask, or on CPUs in the output."""
    tensors = arguments(case, variant)
    get, x, residual_bn = tensors.get, tensors["x"], variant.residual_bn
    stats = [per_channel(case, 6 + i, positive=i % 2 == 1) for i in range(4)]
    stats[2:] = stats[2:] if residual_bn else [None, None]
    affine, residual_affine = (
        (get(prefix + "weight"), get(prefix + "bias")) for prefix in ("", "residual_")
    )
    out = mask = None
    on_cpu, plain = case.backend == "cpu", variant.residual and not residual_bn
    if variant.relu and (plain or (on_cpu and residual_bn)):
        bn, other = (
            BatchNormArgs(*of, mean, invstd.pow(-2) if invstd is not None else None, eps=0.0)
            for of, mean, invstd in ((affine, *stats[:2]), (residual_affine, *stats[2:]))
        )
        with rf.backend("reference"):
            out, *_, mask = bn_relu_with_statistics(
                *(x, bn, get("residual"), other if residual_bn else None),
                save_mask=not on_cpu,
            )
        out, mask = (LAYOUTS[case.layout][1](out), None) if on_cpu else (None, mask)
    head = case.other(11), x, out, mask, *affine, *stats[:2]
    tail = get("residual") if residual_bn else None, residual_bn, *residual_affine, *stats[2:]
    residual_training = residual_bn and variant.residual_training
    whole = *head, variant.training, variant.residual, *tail, residual_training, variant.relu
    return Calls(whole, (*head, *tail, variant.relu))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "case",
    grid(
        *("bn_relu_backward_sums", [SHAPE], [torch.float32, torch.bfloat16]),
        *(["channels_last", "mixed_reversed"], False),
    ),
)
def test_is_bn_relu_backward_in_two_steps(case: Case, variant: str) -> None:
    given = calls(case, VARIANTS[variant])
    with rf.backend(case.backend):
        grads = bn_relu_backward(*given.whole)
        sums = bn_relu_backward_sums(*given.sums)
        averages = sums / (case.x().numel() // case.shape[1])
        grad_x, grad_residual = bn_relu_backward_apply(*given.whole, averages)
    invstd, residual_invstd = given.sums[7], given.sums[13]
    found = [grad_x, sums[1] * invstd, sums[0], grad_residual]
    if VARIANTS[variant].residual_bn:
        found += [sums[2] * residual_invstd, sums[0]]
    for ours, theirs in zip(found, grads, strict=False):
        rounding = 4 * torch.finfo(theirs.dtype).eps
        close = {"rtol": rounding, "atol": rounding}
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, **close)
    assert grad_residual.data_ptr() != given.whole[0].data_ptr()


@pytest.mark.parametrize(
    "case",
    grid(
        *("bn_relu_backward_sums", DEGENERATE, [torch.float32]),
        *(["channels_last", "mixed_reversed", "transposed"], False),
    ),
)
def test_fake_is_like_real(case: Case) -> None:
    for name in ("train_residual", "train_dual"):
        given = calls(case, VARIANTS[name])
        averages = normal((2 + VARIANTS[name].residual_bn, case.shape[1]), 0, torch.float32)
        apply = *given.whole, averages.to(case.device)
        for function, args in (
            (bn_relu_backward_sums, given.sums),
            (bn_relu_backward_apply, apply),
        ):
            with FakeTensorMode() as mode:
                faked = function(
                    *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
                )
            with rf.backend(case.backend):
                real = function(*args)
            faked, real = ((r,) if isinstance(r, Tensor) else r for r in (faked, real))
            for ours, theirs in zip(faked, real, strict=True):
                assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize("variant", ["train_residual", "train_dual"])
@pytest.mark.parametrize("backend", on_backends("bn_relu_backward_sums", interpreter=False))
def test_opcheck(backend: str, variant: str) -> None:
    case = Case(backend, (2, 3, 4, 2), torch.float32, "mixed")
    given = calls(case, VARIANTS[variant])
    averages = normal((2 + VARIANTS[variant].residual_bn, 3), 0, torch.float32).to(case.device)
    with rf.backend(backend):
        torch.library.opcheck(ops.bn_relu_backward_sums.default, given.sums)
        torch.library.opcheck(ops.bn_relu_backward_apply.default, (*given.whole, averages))


def test_fullgraph_with_dynamic_shapes() -> None:
    def function(*args: Any) -> tuple[Tensor, Tensor]:
        averages = bn_relu_backward_sums(*args) / (args[1].numel() // args[1].size(1))
        tail = True, False, None, False, *(None,) * 4, False, True
        return bn_relu_backward_apply(*args, *tail, averages)

    with no_recompilation():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 4, 6, 7)):
            grad_out, x = (normal(shape, i, torch.float32) for i in (0, 1))
            weight, bias, mean, std = (normal(shape[1:2], i, torch.float32) for i in range(2, 6))
            args = grad_out, x, None, None, weight, bias, mean, std.abs()
            torch.testing.assert_close(compiled(*args), function(*args))


X = torch.ones(2, 3, 4, 4)
C = torch.ones(3)
NO_RESIDUAL = {"has_residual": False, "residual": None, "residual_bn": False} | dict.fromkeys(
    ("residual_weight", "residual_bias", "residual_mean", "residual_invstd")
)
GOOD: dict[str, Any] = {"grad_out": X, "x": X, "out": None, "mask": None, "weight": C, "bias": C}
GOOD |= {"mean": C, "invstd": C, "relu": True, "residual_training": False, "training": True}
GOOD |= NO_RESIDUAL | {"averages": torch.ones(2, 3)}
DUAL = {"has_residual": True, "residual": X, "residual_bn": True, "averages": torch.ones(3, 3)}
DUAL |= {"residual_mean": C, "residual_invstd": C}
OF_APPLY = ("training", "has_residual", "residual_training", "averages")
# Of both operators, then of apply alone.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x": ({"x": X[0]}, ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4"),
    "grad_out": ({"grad_out": X[:1]}, ValueError, "grad_out must have the shape of x"),
    "out": ({"out": X.double()}, TypeError, "out must have the dtype of x torch.float32, got torc"),
    "mask": ({"mask": C}, TypeError, "mask must be what bn_relu returned, a 2-d uint8 tensor, got"),
    "mean": ({"mean": torch.ones(2)}, ValueError, r"mean must have one value per channel \(3,\),"),
    "weight": ({"weight": C.int()}, TypeError, "weight must be a floating-point tensor, got torch"),
    "residual": (DUAL | {"residual": None}, TypeError, "residual must be a Tensor, got NoneType"),
    "residual_mean": (DUAL | {"residual_mean": None}, TypeError, "residual_mean must be a Tensor"),
    "residual_bias": (DUAL | {"residual_bias": X}, ValueError, "residual_bias must have one value"),
    "gradient": (
        {"grad_out": X.clone().requires_grad_()},
        RuntimeError,
        r"an argument requires a gradient, but this operator has none \(use bn_relu, or",
    ),
}
BAD_FOR_APPLY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows": (
        DUAL | {"averages": torch.ones(2, 3)},
        ValueError,
        r"averages must have a row for each of the sums, shape \(3, 3\), got \(2, 3\)",
    ),
    "dtype": (
        {"averages": torch.ones(2, 3).double()},
        TypeError,
        "averages must be torch.float32 for x of torch.float32, got torch.float64",
    ),
    "device": (
        {"averages": torch.ones(2, 3, device="meta")},
        ValueError,
        "averages must be on the device of x cpu, got meta",
    ),
    "sign": (
        {"has_residual": True},
        ValueError,
        "out or mask must be given with relu and a residual, got None",
    ),
    "has_residual": (
        DUAL | {"has_residual": False},
        ValueError,
        "has_residual must be True with residual_bn, got False",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    given = GOOD | changed
    with pytest.raises(error, match=f"^bn_relu_backward_apply: {message}"):
        bn_relu_backward_apply(**given)
    with pytest.raises(error, match=f"^bn_relu_backward_sums: {message}"):
        bn_relu_backward_sums(**{n: v for n, v in given.items() if n not in OF_APPLY})


@pytest.mark.parametrize("bad", BAD_FOR_APPLY)
def test_bad_input_of_apply(bad: str) -> None:
    changed, error, message = BAD_FOR_APPLY[bad]
    with pytest.raises(error, match=f"^bn_relu_backward_apply: {message}"):
        bn_relu_backward_apply(**(GOOD | changed))
