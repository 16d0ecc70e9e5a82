"""conv_bn_relu: convolution, folded batch normalisation, residual and ReLU in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format, to_format
from resnet_fused.ops import _checks, _convolution
from resnet_fused.ops._functional import functionalise
from resnet_fused.ops._registration import as_node, autocast, call, define, refuse_gradient


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """relu(conv2d(x, weight) * scale + shift + residual), for inference and for frozen BN.

    x: (N, C, H, W); weight: (K, C / groups, R, S); scale, shift: (K,); residual, out: (N, K, P, Q).
    `resnet_fused.folding.scale_shift` makes scale and shift from a batch normalisation. Equivalent
    to relu(F.conv2d(x, weight, None, stride, padding, dilation, groups) * scale + shift + residual)
    with the arithmetic after the products in float32. weight may be wider than x (float32 beside
    bfloat16); under autocast x and residual are cast as conv2d casts them. The output keeps the
    memory format of x. Differentiable twice. NaN passes a ReLU, except where oneDNN applies it
    (inference on CPUs with a weight seen before), which gives 0.

    Raises ValueError on mismatched shapes, channels or devices, on groups that do not divide the
    channels and on stride, padding or dilation out of range; TypeError on tensors that are not
    floating point.
    """
    _checks.check_tensors("conv_bn_relu", x=x, weight=weight, scale=scale, shift=shift)
    geometry = _convolution.pairs("conv_bn_relu", stride, padding, dilation)
    return call(_conv_bn_relu, x, weight, scale, shift, residual, relu, *geometry, groups)


def conv_bn_relu_(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool = True,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`conv_bn_relu` into the memory of `residual`, which is returned: one tensor less to write.

    For inference: raises RuntimeError where a gradient is needed. Arguments as in `conv_bn_relu`.
    """
    geometry = _convolution.pairs("conv_bn_relu", stride, padding, dilation)
    call(_conv_bn_relu_, x, weight, scale, shift, residual, relu, *geometry, groups)
    return residual


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    geometry: tuple[Any, ...],
) -> tuple[int, ...]:
    shape = _convolution.output_shape("conv_bn_relu", x, weight, *geometry)
    _check_vector("scale", scale, shape[1], x)
    _check_vector("shift", shift, shape[1], x)
    if residual is not None:
        _check_like_output("conv_bn_relu", "residual", residual, shape, x)
    return shape


def _check_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    geometry: tuple[Any, ...],
) -> None:
    shape = _convolution.output_shape("conv_bn_relu", x, weight, *geometry)
    _check_vector("scale", scale, shape[1], x)
    _check_like_output("conv_bn_relu_backward", "grad_out", grad_out, shape, x)
    if out is not None:
        _check_like_output("conv_bn_relu_backward", "out", out, shape, x)


def _check_vector(name: str, vector: Tensor, channels: int, x: Tensor) -> None:
    meaning = "one value per output channel"
    _convolution.check_vector("conv_bn_relu", name, vector, meaning, (channels,), "x", x)


def _check_like_output(
    operator: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor
) -> None:
    meaning = "the shape of the output"
    _convolution.check_activation_like(operator, name, tensor, meaning, shape, "x", x)


def _kernel(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    _check(x, weight, scale, shift, residual, geometry)
    format_ = memory_format(x)
    out: Tensor = backends.choose("conv_bn_relu", x)(
        x.contiguous(memory_format=format_),
        *(weight, scale, shift, to_format(residual, format_), relu, *geometry),
    )
    # With one channel in, x has both formats now, and out has one of them.
    return out.contiguous(memory_format=format_)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    *geometry: Any,
) -> Tensor:
    shape = _check(x, weight, scale, shift, residual, geometry)
    return x.new_empty(shape).contiguous(memory_format=memory_format(x))


def _inplace_kernel(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    *geometry: Any,
) -> None:
    _check(x, weight, scale, shift, residual, geometry)
    x = x.contiguous(memory_format=memory_format(x))
    if residual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        # Kernels write residual before they have read all of x.
        residual.copy_(_kernel(x, weight, scale, shift, residual, relu, *geometry))
        return
    backends.choose("conv_bn_relu_", x)(x, weight, scale, shift, residual, relu, *geometry)
    if not residual.is_inference():
        # Kernels write through pointers: autograd must see that it was edited.
        torch.autograd.graph.increment_version(residual)


def _inplace_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    *geometry: Any,
) -> None:
    _check(x, weight, scale, shift, residual, geometry)


def _inplace_functional(*args: Any) -> None:
    args[4].copy_(_conv_bn_relu(*args))


class _ConvBnReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        *geometry: Any,
    ) -> Tensor:
        out: Tensor = _conv_bn_relu(x, weight, scale, shift, residual, relu, *geometry)
        ctx.save_for_backward(x, weight, scale, out if relu else None)
        ctx.has_residual, ctx.geometry = residual is not None, geometry
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, out = ctx.saved_tensors
        grad_x, grad_weight, grad_shift, grad_residual = _conv_bn_relu_backward(
            grad_out, x, weight, scale, out, ctx.has_residual, *ctx.geometry
        )
        grad_scale = None
        if ctx.needs_input_grad[2]:
            grad_scale = _grad_scale(grad_out, x, weight, scale, out, ctx.geometry)
        grads = (grad_x, grad_weight, grad_scale, grad_shift, grad_residual)
        needed = ctx.needs_input_grad
        return (*(g if n else None for g, n in zip(grads, needed, strict=False)), *(None,) * 5)


def _grad_scale(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    geometry: tuple[Any, ...],
) -> Tensor:
    """Sum of the gradient times the convolution's output, which is computed once more.

    Frozen BN does not need it. The product of weight and its own gradient is the same number, but
    inherits the rounding of that gradient in 16 bits.
    """
    grad = grad_out if out is None else grad_out.masked_fill(out <= 0, 0)
    y = torch.conv2d(x, weight.to(x.dtype), None, *geometry)
    # In float64: a normalisation's weight gets the small difference of this and mean * grad_shift.
    return (grad.double() * y.double()).sum((0, 2, 3)).to(scale.dtype)


def _backward_kernel(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    *geometry: Any,
) -> tuple[Tensor, ...]:
    _check_backward(grad_out, x, weight, scale, out, geometry)
    format_ = memory_format(x)
    grad_out = grad_out.contiguous(memory_format=format_)
    grad_x, grad_weight, *grads, grad_residual = backends.choose("conv_bn_relu_backward", x)(
        grad_out,
        x.contiguous(memory_format=format_),
        *(weight, scale, to_format(out, format_), has_residual, *geometry),
    )
    grad_weight = _convolution.with_strides_of(weight, grad_weight)
    if has_residual:
        grad_residual = grad_residual.contiguous(memory_format=format_)
    if grad_residual is grad_out:  # outputs never alias arguments
        grad_residual = grad_residual.clone()
    return (grad_x.contiguous(memory_format=format_), grad_weight, *grads, grad_residual)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    *geometry: Any,
) -> tuple[Tensor, ...]:
    _check_backward(grad_out, x, weight, scale, out, geometry)
    format_ = memory_format(x)
    grad_residual = torch.empty_like(grad_out, memory_format=format_)
    return (
        torch.empty_like(x, memory_format=format_),
        torch.empty_like(weight),
        torch.empty_like(scale),
        grad_residual if has_residual else x.new_empty(0),
    )


def _cast(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *rest: Any,
) -> tuple[Any, ...]:
    if x.dtype == torch.float64 or not x.is_floating_point():
        return (x, weight, scale, shift, residual, *rest)
    return (
        x.to(dtype),
        weight,
        scale,
        shift,
        None if residual is None else residual.to(dtype),
        *rest,
    )


_SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor shift, {residual}, bool relu,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups)"
)
_conv_bn_relu = define(
    f"conv_bn_relu{_SIGNATURE.format(residual='Tensor? residual')} -> Tensor",
    _kernel,
    _fake,
    as_node(_ConvBnReLU, _kernel),
    images=(0, 4),
)
_conv_bn_relu_ = define(
    f"conv_bn_relu_{_SIGNATURE.format(residual='Tensor(a!) residual')} -> ()",
    _inplace_kernel,
    _inplace_fake,
    refuse_gradient("conv_bn_relu_", "use conv_bn_relu, or torch.no_grad()"),
    updated=lambda *args: (4,),
)
functionalise(_conv_bn_relu_, _inplace_functional)
_conv_bn_relu_backward = define(
    "conv_bn_relu_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor scale, Tensor? out,"
    " bool has_residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_shift, Tensor grad_residual)",
    _backward_kernel,
    _backward_fake,
    reference.conv_bn_relu_backward,
)
autocast(_conv_bn_relu, _cast)
