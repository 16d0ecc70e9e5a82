"""add_relu: the end of a residual block without batch normalisation."""

from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format
from resnet_fused.ops import _checks
from resnet_fused.ops._registration import as_node, call, define


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual) in one pass over memory.

    x, residual, out: (N, C, H, W), same shape. Equivalent to torch.relu(x + residual): unequal
    dtypes are promoted as in a sum. The output keeps the memory format of x. Differentiable twice.
    Raises ValueError on unequal shapes or devices, TypeError on tensors not of floating point.
    """
    return call(_add_relu, *_checks.promote("add_relu", x, residual))


def _check(x: Tensor, residual: Tensor) -> None:
    _checks.check_activation("add_relu", "x", x)
    _checks.check_like("add_relu", "residual", residual, "x", x)


def _kernel(x: Tensor, residual: Tensor) -> Tensor:
    _check(x, residual)
    format_ = memory_format(x)
    out: Tensor = backends.choose("add_relu", x)(
        x.contiguous(memory_format=format_), residual.contiguous(memory_format=format_)
    )
    return out


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    _check(x, residual)
    return torch.empty_like(x, memory_format=memory_format(x))


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = _add_relu(x, residual)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_tensors
        grad = _add_relu_backward(grad_out, out)
        return grad, grad


def _check_backward(grad_out: Tensor, out: Tensor) -> None:
    _checks.check_activation("add_relu_backward", "out", out)
    _checks.check_like("add_relu_backward", "grad_out", grad_out, "out", out)


def _backward_kernel(grad_out: Tensor, out: Tensor) -> Tensor:
    _check_backward(grad_out, out)
    format_ = memory_format(out)
    grad: Tensor = backends.choose("add_relu_backward", out)(
        grad_out.contiguous(memory_format=format_), out.contiguous(memory_format=format_)
    )
    return grad


def _backward_fake(grad_out: Tensor, out: Tensor) -> Tensor:
    _check_backward(grad_out, out)
    return torch.empty_like(out, memory_format=memory_format(out))


_add_relu = define(
    "add_relu(Tensor x, Tensor residual) -> Tensor",
    _kernel,
    _fake,
    as_node(_AddReLU, _kernel),
    images=(0, 1),
)
_add_relu_backward = define(
    "add_relu_backward(Tensor grad_out, Tensor out) -> Tensor",
    _backward_kernel,
    _backward_fake,
    reference.add_relu_backward,
    images=(0, 1),
)
