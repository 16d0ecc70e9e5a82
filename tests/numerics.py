"""What every operator's test shares: shapes, layouts, backends, and the rule for accuracy."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import emulated_backend
import interpreted_backend
import pytest
import torch
from torch import Tensor

from resnet_fused import backends

emulated_backend.install()
interpreted_backend.install()

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SHAPE = (2, 12, 5, 4)  # where the shape is not the point
# 1x1 images, one channel, odd channels, channels that are no multiple of 8, real layers.
SHAPES = (
    (2, 1, 3, 5),
    (3, 7, 1, 1),
    (2, 8, 1, 7),
    (1, 13, 5, 4),
    (2, 17, 9, 3),
    (4, 36, 6, 6),
    (1, 512, 7, 7),
)
# Dense in several formats at once: fake and real tensors must choose the same.
DEGENERATE = (SHAPE, (2, 5, 1, 1), (2, 1, 3, 3), (2, 8, 1, 7), (0, 4, 2, 2))
LARGE = (1, 64, 56, 56)  # a real layer, summed in more than one piece


def _misaligned(x: Tensor) -> Tensor:
    """channels_last, one element behind the start of its storage."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    return x.new_empty(x.numel() + 1).as_strided(x.shape, strides, 1).copy_(x)


def _sliced(x: Tensor) -> Tensor:
    """Cut out of a tensor that is larger in every dimension, with NaN around."""
    n, c, h, w = x.shape
    larger = x.new_full((n + 1, c + 3, h + 2, w + 1), float("nan"))
    larger = larger.contiguous(memory_format=torch.channels_last)
    return larger[1:, 2:-1, 1:-1, :-1].copy_(x)


def _nchw(x: Tensor) -> Tensor:
    return x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    # Not .contiguous(), which leaves 1x1 images and single channels as they are.
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """One row, seen as all of them."""
    return x[:, :, :1].contiguous().expand_as(x)


def _transposed(x: Tensor) -> Tensor:
    """Dense, but with W before H."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


# How x, and how every other activation lies in memory.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "nchw": (_nchw, _nchw),
    "channels_last": (_channels_last, _channels_last),
    "mixed": (_channels_last, _nchw),
    "mixed_reversed": (_nchw, _channels_last),
    "sliced": (_sliced, _sliced),
    "expanded": (_expanded, _expanded),
    "misaligned": (_misaligned, _misaligned),
    "transposed": (_transposed, _misaligned),
}
DENSE_LAYOUTS = ("nchw", "channels_last")


class Case(NamedTuple):
    """One point of the test grid."""

    backend: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    @property
    def device(self) -> str:
        return device_of(self.backend)

    @property
    def draws(self) -> range:
        """Seeds, far apart: as many as it takes to see 16 channels or more."""
        channels = self.shape[1]
        return range(0, 100 * -(-16 // channels), 100)

    def x(self, seed: int = 0, shape: Sequence[int] | None = None) -> Tensor:
        """The activation named x in the test at hand."""
        values = normal(shape or self.shape, seed).to(self.device, self.dtype)
        return LAYOUTS[self.layout][0](values)

    def other(self, seed: int, shape: Sequence[int] | None = None) -> Tensor:
        """Any other activation: the residual, the gradient of the output."""
        values = normal(shape or self.shape, seed).to(self.device, self.dtype)
        return LAYOUTS[self.layout][1](values)


def grid(
    operator: str,
    shapes: Iterable[tuple[int, ...]] = (SHAPE,),
    dtypes: Iterable[torch.dtype] = DTYPES,
    layouts: Iterable[str] = DENSE_LAYOUTS,
    interpreter: bool = True,
) -> list[Any]:
    """Parameters of a test: every shape, dtype and layout on every backend that runs here.

    Each of the other backends is one skipped test for each dtype, with the reason. In Triton's
    interpreter, which is slow, each of them occurs, but not with all of the others, and nothing
    with interpreter=False: test_interpreted_*.py have that.
    """
    parameters = []
    shapes, dtypes, layouts = list(shapes), list(dtypes), list(layouts)
    for backend in backends.NAMES:
        if backend == interpreted_backend.NAME and not interpreter:
            continue
        running = []
        for dtype in dtypes:
            reason = missing(operator, backend, dtype)
            if reason is None:
                running.append(dtype)
                continue
            case, mark = (
                Case(backend, shapes[0], dtype, layouts[0]),
                pytest.mark.skip(reason=reason),
            )
            parameters.append(pytest.param(case, id=f"{backend}-{short(dtype)}", marks=mark))
        points = itertools.product(running, shapes, layouts)
        if backend == interpreted_backend.NAME and running:
            count = max(len(running), len(shapes), len(layouts))
            points = (
                (running[i % len(running)], shapes[i % len(shapes)], layouts[-1 - i % len(layouts)])
                for i in range(count)
            )
        for dtype, shape, layout in points:
            parameters.append(
                pytest.param(
                    Case(backend, shape, dtype, layout),
                    id=f"{backend}-{'x'.join(map(str, shape))}-{short(dtype)}-{layout}",
                    marks=marks_of(backend),
                )
            )
    return parameters


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_backends(
    operator: str, dtype: torch.dtype = torch.float32, interpreter: bool = True
) -> list[Any]:
    """Names of the backends that run `operator` here on `dtype`, and skips for the others.

    interpreter: as in `grid`.
    """
    names = []
    for backend in backends.NAMES:
        if backend == interpreted_backend.NAME and not interpreter:
            continue
        reason = missing(operator, backend, dtype)
        marks = marks_of(backend) if reason is None else [pytest.mark.skip(reason=reason)]
        names.append(pytest.param(backend, marks=marks))
    return names


def missing(operator: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` does not run `operator` here on `dtype`; None if it does."""
    device_type = device_of(backend)
    if device_type == "cuda" and not torch.cuda.is_available():
        return f"{backend}: no CUDA device"
    implementation = backends._IMPLEMENTATIONS[operator].get(backend)
    if implementation is None:
        return f"{backend}: it has no implementation of {operator}"
    reason = implementation.unsupported(device_type, dtype)
    return None if reason is None else f"{backend}: {reason}"


def marks_of(backend: str) -> list[pytest.MarkDecorator]:
    """The markers `emulator` and `interpreter` for tests on kernels that are run on the CPU."""
    marks = {
        emulated_backend.NAME: pytest.mark.emulator,
        interpreted_backend.NAME: pytest.mark.interpreter,
    }
    return [marks[backend]] if backend in marks else []


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton", "cudnn") else "cpu"


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same ones in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_as_accurate_as_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, name: str = "out", factor: float = 2.0
) -> None:
    """exact: the same mathematics in float64.

    Where float64 itself is tested nothing more exact is at hand: the two may differ by the order
    of their sums.
    """
    assert actual.shape == exact.shape, name
    if actual.numel() == 0:
        return
    assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN in other places"
    largest = exact.abs().nan_to_num().max()
    if actual.dtype == torch.float64:
        error = (actual - exact).abs().nan_to_num().max()
        assert error <= 1e-13 * (largest + 1), f"{name}: {error=:.2e} in float64"
        return
    rounding = torch.finfo(actual.dtype).eps * largest
    error = (actual.double() - exact).abs().nan_to_num().max()
    eager_error = (eager.double() - exact).abs().nan_to_num().max()
    assert error <= factor * eager_error + rounding, (
        f"{name}: {error=:.2e} exceeds {factor} x {eager_error=:.2e} + {rounding=:.2e}"
    )


def assert_same_function(
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    *draws: tuple[dict[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """fused(**tensors) and each of its gradients are as accurate as eager's, in eager's dtypes.

    draws: (tensors, grad_out) each; errors are the largest over all of them, because in one draw
    of a small tensor eager may be rounded luckily. Returns output and gradients of `fused` for the
    last draw, the latter as "grad NAME".
    """
    collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for tensors, grad_out in draws:
        actual = _results(fused, tensors, grad_out)
        plain = _results(eager, tensors, grad_out)
        doubled = {name: tensor.double() for name, tensor in tensors.items()}
        exact = _results(eager, doubled, grad_out.double())
        for name, tensor in actual.items():
            assert tensor.shape == exact[name].shape, name
            assert tensor.dtype == plain[name].dtype, name
            collected.setdefault(name, []).append((tensor, plain[name], exact[name]))
    for name, triples in collected.items():
        of_all = (torch.cat([t.flatten() for t in each]) for each in zip(*triples, strict=True))
        assert_as_accurate_as_eager(*of_all, name)
    return actual


def assert_format_follows(results: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Output and gradients of activations: NCHW where x is, channels_last for all other x."""
    nchw = tensors["x"].is_contiguous()
    expected = torch.contiguous_format if nchw else torch.channels_last
    for name, tensor in results.items():
        if tensor.dim() == 4 and name != "grad weight":
            assert tensor.is_contiguous(memory_format=expected), f"{name}: {tensor.stride()}"


@contextlib.contextmanager
def no_recompilation() -> Iterator[None]:
    """Whatever is compiled inside is compiled once, or it is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def strides(tensor: Tensor) -> list[int]:
    """Strides that are ever stepped over: those of a dimension of size 1 mean nothing."""
    if tensor.numel() == 0:
        return []
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def assert_fake_is_like_real(fake: Tensor, real: Tensor) -> None:
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert strides(fake) == strides(real)


def _results(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], grad_out: Tensor
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    named = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}
