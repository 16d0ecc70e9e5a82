"""add_relu: forward, gradients, formats, tracing and bad input."""

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

import resnet_fused as rf
from resnet_fused.ops import add_relu

ops = torch.ops.resnet_fused


def eager(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def check(case: Case) -> None:
    tensors = {"x": case.x(), "residual": case.other(1)}
    with rf.backend(case.backend):
        results = assert_same_function(add_relu, eager, (tensors, case.other(2)))
    assert_format_follows(results, tensors)


@pytest.mark.parametrize("case", grid("add_relu", SHAPES))
def test_matches_eager(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", grid("add_relu", [LARGE], [torch.float32, torch.bfloat16]))
def test_real_layer(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", grid("add_relu", layouts=LAYOUTS))
def test_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("backend", on_backends("add_relu"))
def test_empty_batch(backend: str) -> None:
    x = torch.empty(0, 3, 4, 4, device=device_of(backend), requires_grad=True)
    with rf.backend(backend):
        out = add_relu(x, x)
        out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("case", grid("add_relu", layouts=["nchw"]))
def test_special_values(case: Case) -> None:
    """NaN passes, -0 and infinities are treated as torch.relu treats them, gradients too."""
    nan, inf = float("nan"), float("inf")
    values = [nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 65504.0, 1e-7]
    x = torch.tensor(values, dtype=case.dtype, device=case.device)
    x = x.repeat(5).view(1, 5, 3, 3).contiguous().requires_grad_()
    zero = torch.zeros_like(x)
    with rf.backend(case.backend):
        out = add_relu(x, zero)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    expected = eager(x, zero)
    (expected_grad,) = torch.autograd.grad(expected, x, torch.ones_like(out))
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("backend", on_backends("add_relu", torch.float64))
def test_second_derivatives(backend: str) -> None:
    x, residual = (normal((2, 3, 2, 3), i).to(device_of(backend)).requires_grad_() for i in (0, 1))
    with rf.backend(backend):
        assert torch.autograd.gradcheck(add_relu, (x, residual))
        assert torch.autograd.gradgradcheck(add_relu, (x, residual))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("backend", on_backends("add_relu"))
def test_gradients_of_some_arguments(backend: str, needed: tuple[bool, bool]) -> None:
    x, residual = (
        normal(SHAPE, i, torch.float32).to(device_of(backend)).requires_grad_(n)
        for i, n in enumerate(needed)
    )
    with rf.backend(backend):
        out = add_relu(x, residual)
        assert out.requires_grad is any(needed)
        if out.requires_grad:
            out.sum().backward()
    assert [t.grad is not None for t in (x, residual)] == list(needed)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", on_backends("add_relu"))
def test_without_gradients(backend: str, guard: Any) -> None:
    x = normal(SHAPE, 0, torch.float32).to(device_of(backend)).requires_grad_()
    with rf.backend(backend), guard():
        out = add_relu(x, x)
    assert not out.requires_grad
    assert torch.equal(out, eager(x, x).detach())


def test_one_tensor_twice() -> None:
    x = normal(SHAPE, 0, torch.float32).requires_grad_()
    add_relu(x, x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2.0 * (x > 0))


def test_promotes_as_a_sum_does() -> None:
    x = normal(SHAPE, 0, torch.bfloat16).requires_grad_()
    residual = normal(SHAPE, 1, torch.float32).requires_grad_()
    out = add_relu(x, residual)
    assert out.dtype == torch.float32
    assert torch.equal(out, eager(x, residual))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_autocast_is_as_eager(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, residual = (normal(SHAPE, i, dtype) for i, dtype in enumerate(dtypes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = add_relu(x, residual), eager(x, residual)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", grid("add_relu", DEGENERATE, [torch.float32], LAYOUTS))
def test_fake_is_like_real(case: Case) -> None:
    tensors = case.x(), case.other(1)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        faked = [ops.add_relu(*fakes), ops.add_relu_backward(*fakes)]
    with rf.backend(case.backend):
        real = [ops.add_relu(*tensors), ops.add_relu_backward(*tensors)]
    for ours, theirs in zip(faked, real, strict=True):
        assert_fake_is_like_real(ours, theirs)


@pytest.mark.parametrize("case", grid("add_relu", dtypes=[torch.float32], layouts=LAYOUTS))
def test_opcheck(case: Case) -> None:
    x, residual = case.x(), case.other(1)
    with rf.backend(case.backend):
        for gradient in (False, True):
            arguments = tuple(t.detach().requires_grad_(gradient) for t in (x, residual))
            torch.library.opcheck(ops.add_relu.default, arguments)
            torch.library.opcheck(ops.add_relu_backward.default, arguments)


def test_switching_the_backend_recompiles_nothing() -> None:
    x, residual = (normal(SHAPE, i, torch.float32).requires_grad_() for i in (0, 1))
    with no_recompilation():
        compiled = torch.compile(add_relu, fullgraph=True, backend="aot_eager")
        for backend in ("reference", "cpu"):
            with rf.backend(backend):
                out = compiled(x, residual)
                grads = torch.autograd.grad(out.sum(), (x, residual))
            assert torch.equal(out, eager(x, residual))
            assert torch.equal(grads[0], (out > 0).float())
            assert torch.equal(grads[1], grads[0])


def test_dynamic_shapes() -> None:
    with no_recompilation():
        compiled = torch.compile(add_relu, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 4, 5), (3, 4, 6, 7), (5, 2, 3, 9)):
            x, residual = (normal(shape, i, torch.float32) for i in (0, 1))
            assert torch.equal(compiled(x, residual), eager(x, residual))


BAD = {
    "shape": (
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)),
        ValueError,
        r"add_relu: residual must have the shape of x \(2, 3, 4, 4\), got \(2, 3, 4, 5\)",
    ),
    "broadcast": (
        (torch.ones(2, 3, 4, 4), torch.ones(1, 3, 1, 1)),
        ValueError,
        r"add_relu: residual must have the shape of x",
    ),
    "dimensions": (
        (torch.ones(3, 4, 4), torch.ones(3, 4, 4)),
        ValueError,
        r"add_relu: x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4, 4\) \(unsqueeze",
    ),
    "integers": (
        (torch.ones(2, 3, 4, 4, dtype=torch.int32),) * 2,
        TypeError,
        r"add_relu: x must be a floating-point tensor, got torch.int32 \(call .float\(\)\)",
    ),
    "complex": (
        (torch.ones(2, 3, 4, 4, dtype=torch.complex64),) * 2,
        TypeError,
        r"add_relu: x must be a floating-point tensor, got torch.complex64",
    ),
    "device": (
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, device="meta")),
        ValueError,
        r"add_relu: residual must be on the device of x cpu, got meta \(move one with .to\(\)\)",
    ),
    "x is a list": (
        ([1.0], torch.ones(2, 3, 4, 4)),
        TypeError,
        r"add_relu: x must be a Tensor, got list",
    ),
    "residual is None": (
        (torch.ones(2, 3, 4, 4), None),
        TypeError,
        r"add_relu: residual must be a Tensor, got NoneType",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    arguments, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        add_relu(*arguments)


@pytest.mark.parametrize("namespace", ["resnet_fused", "resnet_fused_native"])
@pytest.mark.parametrize("name", ["add_relu", "add_relu_backward"])
@pytest.mark.parametrize(
    "bad", ["shape", "integers", "device", "x is a list", "residual is None", "complex"]
)
def test_bad_input_below_the_public_function(namespace: str, name: str, bad: str) -> None:
    arguments = BAD[bad][0]
    operator = getattr(getattr(torch.ops, namespace), name)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        operator(*arguments)


def test_bad_layout_of_the_native_operator() -> None:
    x = torch.ones(2, 3, 4, 4)
    mixed = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"add_relu: residual must have the strides of x"):
        torch.ops.resnet_fused_native.add_relu(x, mixed)
    with pytest.raises(RuntimeError, match=r"add_relu: x must be .* contiguous or channels_last"):
        torch.ops.resnet_fused_native.add_relu(x[:, :, ::2], x[:, :, ::2])


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(guard: Any) -> None:
    """A tangent that is dropped would be a derivative of zero."""
    x, tangent = (normal(SHAPE, i, torch.float32) for i in (0, 2))

    def function(x: Tensor) -> Tensor:
        with guard():
            return add_relu(x, normal(SHAPE, 1, torch.float32))

    expected = "add_relu: forward-mode derivatives are not implemented"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=expected):
        function(forward_ad.make_dual(x, tangent))
    with pytest.raises(NotImplementedError, match=expected):
        torch.func.jvp(function, (x,), (tangent,))
    assert function(x).isfinite().all()
