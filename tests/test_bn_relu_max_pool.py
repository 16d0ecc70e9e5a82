"""bn_relu_max_pool: forward, gradients, places of the maxima, formats, tracing, bad input."""

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
    assert_format_follows,
    assert_same_function,
    device_of,
    grid,
    no_recompilation,
    normal,
    on_backends,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.ops import bn_relu_max_pool
from resnet_fused.ops.bn_relu_max_pool import (
    bn_relu_max_pool_backward_apply,
    bn_relu_max_pool_backward_sums,
)

OPERATOR = "bn_relu_max_pool"
ops = torch.ops.resnet_fused
MOMENTUM, EPS = 0.3, 1e-3
Windows = tuple[int | tuple[int, int], ...]  # kernel_size, stride, padding
STEM: Windows = (3, 2, 1)
WINDOWS: dict[str, Windows] = {
    "side by side": (2, 2, 0),
    "apart": (2, 3, 1),
    "overlapping": (3, 1, 1),
    "wide": ((2, 5), (1, 4), (1, 2)),
    "largest": (15, (4, 7), 7),
}
MODES = {"train": True, "eval": False}


def per_channel(case: Case, seed: int, positive: bool = False) -> Tensor:
    """(C,) in the dtype that modules keep their parameters in."""
    values = normal((case.shape[1],), seed)
    values = values.abs() + 0.5 if positive else values
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return values.to(case.device, dtype)


def pooled(shape: tuple[int, ...], windows: Windows) -> tuple[int, ...]:
    return tuple(F.max_pool2d(torch.empty(shape, device="meta"), *windows).shape)


class Function:
    """bn_relu_max_pool, or the eager composition, as a function of the differentiable arguments."""

    def __init__(
        self, case: Case, training: bool, fused: bool, windows: Windows = STEM, eps: float = EPS
    ) -> None:
        self.training, self.fused, self.windows, self.eps = training, fused, windows, eps
        self.running = [per_channel(case, 6), per_channel(case, 7, positive=True)]

    def __call__(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else None
        self.updated = running = [t.to(dtype, copy=True) for t in self.running]
        if self.fused:
            return bn_relu_max_pool(
                *(x, weight, bias, *running, self.training, MOMENTUM, self.eps), *self.windows
            )
        out = F.batch_norm(x, *running, weight, bias, self.training, MOMENTUM, self.eps)
        return F.max_pool2d(torch.relu(out), *self.windows)


def arguments(case: Case, seed: int = 0) -> dict[str, Tensor]:
    return {
        "x": case.x(seed),
        "weight": per_channel(case, seed + 1),
        "bias": per_channel(case, seed + 2),
    }


def check(case: Case, training: bool, windows: Windows = STEM) -> None:
    draws = [
        (arguments(case, seed), case.other(seed + 10, pooled(case.shape, windows)))
        for seed in case.draws
    ]
    fused, eager = (Function(case, training, fused, windows) for fused in (True, False))
    with rf.backend(case.backend):
        results = assert_same_function(fused, eager, *draws)
    assert_format_follows(results, draws[-1][0])


@pytest.mark.parametrize("case", grid(OPERATOR, SHAPES))
def test_matches_eager(case: Case) -> None:
    check(case, True)


@pytest.mark.parametrize("case", grid(OPERATOR, SHAPES, interpreter=False))
def test_matches_eager_in_evaluation(case: Case) -> None:
    check(case, False)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    "case", grid(OPERATOR, [(2, 17, 9, 10)], [torch.float32, torch.bfloat16], interpreter=False)
)
def test_windows(case: Case, windows: str) -> None:
    check(case, True, WINDOWS[windows])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case", grid(OPERATOR, dtypes=[torch.float32], layouts=LAYOUTS, interpreter=False)
)
def test_layouts(case: Case, mode: str) -> None:
    check(case, MODES[mode])


@pytest.mark.parametrize(
    "case", grid(OPERATOR, [LARGE], [torch.float32, torch.bfloat16], interpreter=False)
)
def test_real_layer(case: Case) -> None:
    check(case, True)


@pytest.mark.parametrize("case", grid(OPERATOR, [(3, 21, 4, 5)], interpreter=False))
def test_running_statistics(case: Case) -> None:
    x = case.x() * 2 + 0.5
    running = [per_channel(case, 6), per_channel(case, 7, positive=True)]
    ours, plain, exact = ([t.to(d, copy=True) for t in running] for d in (None, None, torch.double))
    versions = [t._version for t in ours]
    with rf.backend(case.backend):
        bn_relu_max_pool(x, None, None, *ours, training=True, momentum=MOMENTUM)
    F.batch_norm(x, *plain, training=True, momentum=MOMENTUM)
    F.batch_norm(x.double(), *exact, training=True, momentum=MOMENTUM)
    for name, *tensors in zip(("mean", "var"), ours, plain, exact, strict=True):
        assert_as_accurate_as_eager(*tensors, f"running_{name}")
    assert all(t._version > v for t, v in zip(ours, versions, strict=True))


@pytest.mark.parametrize("backend", on_backends(OPERATOR))
def test_evaluation_leaves_running_statistics_alone(backend: str) -> None:
    x = normal(SHAPE, 0, torch.float32).to(device_of(backend))
    running = torch.zeros(12, device=x.device), torch.ones(12, device=x.device)
    with rf.backend(backend):
        _, mean, invstd, _ = ops.bn_relu_max_pool(
            *(x, None, None, *running, False, MOMENTUM, EPS), [3, 3], [2, 2], [1, 1]
        )
    mean.add_(1)
    invstd.add_(1)
    assert torch.equal(running[0], torch.zeros_like(running[0]))
    assert [t._version for t in running] == [0, 0]


@pytest.mark.parametrize("backend", on_backends(OPERATOR))
def test_only_the_output_has_a_gradient(backend: str) -> None:
    x = normal(SHAPE, 0, torch.float32).to(device_of(backend)).requires_grad_()
    with rf.backend(backend):
        outputs = ops.bn_relu_max_pool(
            *(x, None, None, None, None, True, MOMENTUM, EPS), [3, 3], [2, 2], [1, 1]
        )
    assert [t.requires_grad for t in outputs] == [True, False, False, False]


def few_values(case: Case) -> dict[str, Tensor]:
    """Exact in every dtype, with many equal values; statistics that leave them as they are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, case.shape, generator=generator)
    channels = torch.arange(case.shape[1])
    like = per_channel(case, 0)
    return {
        "x": LAYOUTS[case.layout][0](x.to(case.device, case.dtype)),
        "weight": (1 - 2 * (channels % 2)).to(like),
        "bias": (channels % 3 - 1).to(like),
    }


def exact_outputs(
    case: Case, tensors: dict[str, Tensor], windows: Windows = STEM
) -> tuple[Tensor, Tensor]:
    """Out and argmax with a mean of 0 and a variance of 1."""
    statistics = torch.zeros_like(tensors["bias"]), torch.ones_like(tensors["bias"])
    sizes = [[n, n] if isinstance(n, int) else list(n) for n in windows]
    with rf.backend(case.backend):
        out, _, _, argmax = ops.bn_relu_max_pool(
            *(*tensors.values(), *statistics, False, MOMENTUM, 0.0), *sizes
        )
    return out, argmax


def places(total: Tensor, windows: Windows) -> Tensor:
    """What argmax must be, from the indices that F.max_pool2d gives."""
    kernel_size, stride, padding = ((n, n) if isinstance(n, int) else n for n in windows)
    highest, indices = F.max_pool2d(total, *windows, return_indices=True)
    expected = torch.full(indices.shape, 255, dtype=torch.uint8)
    for place in (highest > 0).logical_or(highest.isnan()).nonzero().tolist():
        row, column = divmod(int(indices[tuple(place)]), total.size(3))
        r = row - (place[2] * stride[0] - padding[0])
        s = column - (place[3] * stride[1] - padding[1])
        expected[tuple(place)] = r * kernel_size[1] + s
    return expected


@pytest.mark.parametrize("windows", [STEM, WINDOWS["wide"]])
@pytest.mark.parametrize("case", grid(OPERATOR, [(2, 17, 7, 6)]))
def test_places_of_equal_values(case: Case, windows: Windows) -> None:
    tensors = few_values(case)
    out, argmax = exact_outputs(case, tensors, windows)
    x, weight, bias = (t.cpu().float() for t in tensors.values())
    total = x * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    assert torch.equal(argmax.cpu(), places(total, windows))
    assert torch.equal(out.cpu().float(), F.max_pool2d(total.relu(), *windows))
    assert argmax.stride() == out.stride()


@pytest.mark.parametrize(
    "case", grid(OPERATOR, [(2, 9, 8, 7)], [torch.float32, torch.bfloat16, torch.float64])
)
def test_gradient_among_equal_values(case: Case) -> None:
    """In small integers everything is exact: each gradient goes where eager sends it."""
    tensors = few_values(case)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randint(-3, 4, pooled(case.shape, STEM), generator=generator)
    zeros, ones = torch.zeros_like(tensors["bias"]), torch.ones_like(tensors["bias"])
    results = []
    for fused in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        function = Function(case, False, fused, eps=0.0)
        function.running = [zeros, ones]
        with rf.backend(case.backend):
            out = function(*leaves)
            results.append(torch.autograd.grad(out, leaves, grad_out.to(out)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert results[0][0].count_nonzero() > 50


@pytest.mark.parametrize("case", grid(OPERATOR, [(1, 9, 6, 6)], layouts=["channels_last"]))
def test_nan(case: Case) -> None:
    """Of several in one window the last has the place, as in eager; others stay untouched."""
    tensors = few_values(case)
    for h, w in ((2, 2), (3, 3), (0, 5)):
        tensors["x"][0, 4, h, w] = float("nan")
    out, argmax = exact_outputs(case, tensors)
    x, weight, bias = (t.cpu().float() for t in tensors.values())
    total = x * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    assert torch.equal(argmax.cpu(), places(total, STEM))
    expected = F.max_pool2d(total, *STEM).relu()
    torch.testing.assert_close(out.cpu().float(), expected, rtol=0, atol=0, equal_nan=True)
    assert out[:, 4].isnan().sum() == 5
    if case.dtype == torch.float64:
        return
    draw = (tensors, case.other(10, pooled(case.shape, STEM)))
    with rf.backend(case.backend):
        assert_same_function(*(Function(case, False, fused) for fused in (True, False)), draw)


@pytest.mark.parametrize("case", grid(OPERATOR, [(2, 12, 6, 5)], [torch.float32]))
def test_closed_windows_pass_no_gradient(case: Case) -> None:
    """Not even that of an infinite or undefined gradient, as the ReLU of eager."""
    tensors = arguments(case)
    tensors["bias"][3] = -100.0
    grad_out = case.other(10, pooled(case.shape, STEM))
    grad_out[:, 3] = float("nan")
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    with rf.backend(case.backend):
        out = Function(case, False, fused=True)(**leaves)
        out.backward(grad_out)
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        grad = leaf.grad if leaf.dim() == 1 else leaf.grad.transpose(0, 1)
        assert torch.equal(grad[3], torch.zeros_like(grad[3]))
        assert grad[4].any()


@pytest.mark.parametrize("backend", on_backends(OPERATOR))
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(backend: str, training: bool) -> None:
    """As in eager: gradients of zero, and statistics that do not move."""
    case = Case(backend, (0, 5, 4, 4), torch.float32, "nchw")
    leaves = {n: t.requires_grad_() for n, t in arguments(case).items()}
    function = Function(case, training, fused=True)
    with rf.backend(backend):
        out = function(**leaves)
        out.sum().backward()
    assert all(map(torch.equal, function.updated, function.running))
    assert out.shape == (0, 5, 2, 2)
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("case", grid(OPERATOR, [(4, 19, 7, 6)], interpreter=False))
def test_statistics_over_two_processes(case: Case) -> None:
    """Sums of both halves of a batch, added and divided, give the gradient of the whole."""
    tensors, sizes = arguments(case), ([3, 3], [2, 2], [1, 1])
    grad_out = case.other(10, pooled(case.shape, STEM))
    running = per_channel(case, 6), per_channel(case, 7, positive=True)
    with rf.backend(case.backend):
        forward = (*tensors.values(), *running, True, MOMENTUM, EPS, *sizes)
        _, mean, invstd, argmax = ops.bn_relu_max_pool(*forward)
        halves = [*zip(*(t.chunk(2) for t in (grad_out, tensors["x"], argmax)), strict=True)]
        sums = sum(bn_relu_max_pool_backward_sums(*half, mean, *sizes) for half in halves)
        statistics = tensors["weight"], mean, invstd, True, sums / (4 * 7 * 6)
        grads = [bn_relu_max_pool_backward_apply(*half, *statistics, *sizes) for half in halves]
    actual = torch.cat(grads), sums[1] * invstd, sums[0]
    plain, exact = (eager_gradients(case, tensors, grad_out, d) for d in (None, torch.double))
    for name, *triple in zip(tensors, actual, plain, exact, strict=True):
        assert_as_accurate_as_eager(*triple, f"grad {name}")


def eager_gradients(
    case: Case, tensors: dict[str, Tensor], grad_out: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors.values()]
    out = Function(case, True, fused=False)(*leaves)
    return torch.autograd.grad(out, leaves, grad_out.to(out))


@pytest.mark.parametrize("backend", on_backends(OPERATOR))
def test_averages_are_not_read_in_evaluation(backend: str) -> None:
    case = Case(backend, SHAPE, torch.float32, "channels_last")
    arguments = backward_arguments(case, training=False)
    arguments[7].fill_(float("nan"))
    with rf.backend(backend):
        assert bn_relu_max_pool_backward_apply(*arguments).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", on_backends(OPERATOR, torch.float64))
def test_second_derivatives(backend: str, mode: str) -> None:
    case = Case(backend, (2, 3, 4, 3), torch.float64, "nchw")
    leaves = tuple(t.requires_grad_() for t in arguments(case).values())
    function = Function(case, MODES[mode], fused=True)
    with rf.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves[:1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("backend", on_backends(OPERATOR))
def test_gradient_of_one_argument(backend: str, needed: str, mode: str) -> None:
    case = Case(backend, SHAPE, torch.float32, "channels_last")
    tensors = arguments(case)
    leaf = tensors[needed].requires_grad_()
    grads = []
    for fused in (True, False):
        with rf.backend(backend):
            out = Function(case, MODES[mode], fused)(**tensors)
            grads += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward(dtype: torch.dtype) -> None:
    """x, a byte per element of the output, and nothing else that grows with the image."""
    case = Case("cpu", (2, 8, 20, 20), dtype, "channels_last")
    tensors = {n: t.requires_grad_() for n, t in arguments(case).items()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        Function(case, True, fused=True)(**tensors)
    per_channel_bytes = 4 * 8 * 4  # mean, invstd, weight, bias
    assert sum(kept.values()) == tensors["x"].nbytes + 2 * 8 * 10 * 10 + per_channel_bytes


def backward_arguments(case: Case, training: bool = True) -> list[Any]:
    """Of bn_relu_max_pool_backward_apply, and without some of bn_relu_max_pool_backward_sums."""
    shape = pooled(case.shape, STEM)
    generator = torch.Generator().manual_seed(5)
    argmax = torch.randint(0, 10, shape, generator=generator, dtype=torch.uint8)
    argmax = torch.where(argmax == 9, 255, argmax).to(torch.uint8).to(case.device)
    argmax = LAYOUTS[case.layout][1](argmax) if case.layout != "sliced" else argmax
    weight, mean, invstd = (per_channel(case, i) for i in (1, 6, 7))
    averages = torch.stack([per_channel(case, 8), per_channel(case, 9)])
    statistics = weight, mean, invstd, training, averages
    return [case.other(10, shape), case.x(), argmax, *statistics, [3, 3], [2, 2], [1, 1]]


def calls(case: Case, requires_grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Overloads and their arguments."""
    tensors = {n: t.detach().requires_grad_(requires_grad) for n, t in arguments(case).items()}
    running = per_channel(case, 6), per_channel(case, 7, positive=True)
    training = case.shape[0] > 0
    forward = (*tensors.values(), *running, training, MOMENTUM, EPS, [3, 3], [2, 2], [1, 1])
    listed = [(ops.bn_relu_max_pool.default, forward)]
    if not requires_grad:
        apply = tuple(backward_arguments(case))
        sums = (*apply[:3], apply[4], *apply[8:])
        listed += [
            (ops.bn_relu_max_pool_backward_sums.default, sums),
            (ops.bn_relu_max_pool_backward_apply.default, apply),
        ]
    return listed


@pytest.mark.parametrize("case", grid(OPERATOR, DEGENERATE, [torch.float32, torch.bfloat16]))
def test_fake_is_like_real(case: Case) -> None:
    check_fake(case)


@pytest.mark.parametrize(
    "case", grid(OPERATOR, [SHAPE], [torch.float32], [*LAYOUTS][2:], interpreter=False)
)
def test_fake_is_like_real_in_every_layout(case: Case) -> None:
    check_fake(case)


def check_fake(case: Case) -> None:
    for overload, real_arguments in calls(case, requires_grad=False):
        with FakeTensorMode() as mode:
            faked = overload(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real_arguments)
            )
        with rf.backend(case.backend):
            real = overload(*real_arguments)
        faked, real = ((r,) if isinstance(r, Tensor) else r for r in (faked, real))
        for ours, theirs in zip(faked, real, strict=True):
            assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("backend", on_backends(OPERATOR, interpreter=False))
def test_opcheck(backend: str, layout: str) -> None:
    case = Case(backend, (2, 3, 4, 2), torch.float32, layout)
    with rf.backend(backend):
        for requires_grad in (False, True):
            for overload, example in calls(case, requires_grad):
                torch.library.opcheck(overload, example)


def test_switching_the_backend_recompiles_nothing() -> None:
    case = Case("cpu", SHAPE, torch.float32, "channels_last")
    tensors = {n: t.requires_grad_() for n, t in arguments(case).items()}
    expected = Function(case, True, fused=False)(**tensors)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    with no_recompilation():
        compiled = torch.compile(bn_relu_max_pool, fullgraph=True, backend="aot_eager")
        for backend in rf.backends.available(OPERATOR, "cpu"):
            running = per_channel(case, 6), per_channel(case, 7, positive=True)
            with rf.backend(backend):
                out = compiled(*tensors.values(), *running, True, MOMENTUM, EPS)
                grads = torch.autograd.grad(out.square().sum(), list(tensors.values()))
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
            assert not running[0].equal(per_channel(case, 6))


def test_dynamic_shapes() -> None:
    with no_recompilation():
        compiled = torch.compile(
            bn_relu_max_pool, fullgraph=True, backend="aot_eager", dynamic=True
        )
        for shape in ((2, 3, 6, 5), (3, 4, 6, 7), (5, 2, 8, 9)):
            x = normal(shape, 0, torch.float32)
            running = torch.zeros(shape[1]), torch.ones(shape[1])
            expected = F.max_pool2d(F.batch_norm(x, None, None, training=True).relu(), *STEM)
            torch.testing.assert_close(compiled(x, None, None, *running, True), expected)


X, C = torch.ones(2, 3, 4, 4), torch.ones(3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight shape": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight must have one value per channel \(3,\), got \(4,\)",
    ),
    "dimensions": (
        {"x": X[0]},
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4, 4\)",
    ),
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "no running statistics": (
        {"running_mean": None},
        ValueError,
        "running_mean and running_var must be given in evaluation, got None",
    ),
    "one value": (
        {"x": torch.ones(1, 3, 1, 1), "training": True},
        ValueError,
        r"expected more than 1 value per channel when training, got x of shape \(1, 3, 1, 1\)",
    ),
    "kernel of three sizes": (
        {"kernel_size": (3, 3, 3)},
        ValueError,
        r"kernel_size must be one int or two, got \(3, 3, 3\)",
    ),
    "kernel of zero": (
        {"kernel_size": (0, 3)},
        ValueError,
        r"kernel_size must be at least 1, got \(0, 3\)",
    ),
    "large kernel": (
        {"x": torch.ones(1, 3, 20, 20), "kernel_size": (16, 3)},
        ValueError,
        r"kernel_size must be at most 15, got \(16, 3\) \(use F.max_pool2d behind bn_relu\)",
    ),
    "stride": ({"stride": -1}, ValueError, r"stride must be at least 1, got \(-1, -1\)"),
    "padding": (
        {"padding": (1, 2)},
        ValueError,
        r"padding must be between 0 and half of kernel_size \(3, 3\), got \(1, 2\)",
    ),
    "negative padding": (
        {"padding": -1},
        ValueError,
        r"padding must be between 0 and half of kernel_size \(3, 3\), got \(-1, -1\)",
    ),
    "small image": (
        {"padding": 0, "x": torch.ones(2, 3, 2, 4)},
        ValueError,
        r"x must have channels and room for a window, got \(2, 3, 2, 4\) for kernel_size \(3, 3\)"
        r" with padding \(0, 0\)",
    ),
    "no rows": (
        {"x": torch.ones(2, 3, 0, 4), "kernel_size": 2},
        ValueError,
        r"x must have channels and room for a window, got \(2, 3, 0, 4\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changed, error, message = BAD[bad]
    good = {"x": X, "weight": C, "bias": C, "running_mean": C, "running_var": C}
    with pytest.raises(error, match=f"bn_relu_max_pool: {message}"):
        bn_relu_max_pool(**(good | changed))


G, A = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
# Position among the arguments of bn_relu_max_pool_backward_apply, value, error, message.
BAD_BACKWARD: dict[str, tuple[int, Any, type[Exception], str]] = {
    "grad_out shape": (
        0,
        G[:1],
        ValueError,
        r"grad_out must have the shape of the pooled x \(2, 3, 2, 2\), got \(1, 3, 2, 2\)",
    ),
    "grad_out dtype": (
        0,
        G.double(),
        TypeError,
        "grad_out must be of torch.float32, got torch.float64",
    ),
    "argmax dtype": (2, A.long(), TypeError, "argmax must be of torch.uint8, got torch.int64"),
    "argmax device": (2, A.to("meta"), ValueError, "argmax must be on the device of x cpu"),
    "no mean": (4, None, TypeError, "mean must be a Tensor, got NoneType"),
    "mean shape": (4, torch.ones(2), ValueError, r"mean must have one value per channel \(3,\)"),
    "invstd shape": (5, torch.ones(2), ValueError, "invstd must have one value per channel"),
    "averages shape": (
        7,
        torch.ones(3),
        ValueError,
        r"averages must have two values per channel \(2, 3\), got \(3,\)",
    ),
    "averages dtype": (
        7,
        torch.ones(2, 3).double(),
        TypeError,
        "averages must be of torch.float32, got torch.float64",
    ),
    "padding": (10, [2, 2], ValueError, "padding must be between 0 and half of kernel_size"),
}


@pytest.mark.parametrize("bad", BAD_BACKWARD)
def test_bad_input_of_the_backward(bad: str) -> None:
    position, value, error, message = BAD_BACKWARD[bad]
    good: list[Any] = [G, X, A, C, C, C, True, torch.ones(2, 3), [3, 3], [2, 2], [1, 1]]
    good[position] = value
    with pytest.raises(error, match=f"bn_relu_max_pool_backward_apply: {message}"):
        bn_relu_max_pool_backward_apply(*good)
    if position in (0, 1, 2, 4, 10):
        with pytest.raises(error, match=f"bn_relu_max_pool_backward_sums: {message}"):
            bn_relu_max_pool_backward_sums(*good[:3], good[4], *good[8:])


def test_no_gradient_of_the_backward() -> None:
    grad_out = G.clone().requires_grad_()
    sizes = [3, 3], [2, 2], [1, 1]
    with pytest.raises(RuntimeError, match=r"_sums: .* \(use bn_relu_max_pool, or detach"):
        bn_relu_max_pool_backward_sums(grad_out, X, A, C, *sizes)
    with pytest.raises(RuntimeError, match=r"_apply: .* \(use bn_relu_max_pool, or detach"):
        bn_relu_max_pool_backward_apply(*(grad_out, X, A, C, C, C, True, torch.ones(2, 3)), *sizes)


def test_forward_mode_is_refused() -> None:
    x, tangent = (normal(SHAPE, i, torch.float32) for i in (0, 2))
    expected = "bn_relu_max_pool: forward-mode derivatives are not implemented"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=expected):
        bn_relu_max_pool(forward_ad.make_dual(x, tangent), None, None, None, None, training=True)
