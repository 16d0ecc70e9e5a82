"""bn_relu_max_pool: the stem of a ResNet behind its convolution.

He et al., "Deep Residual Learning for Image Recognition", 2015. Eager training keeps the ReLU's
output and 64-bit indices for the backward; here one byte per element of the pooled output says
where the gradient goes, and whether any does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format, pooled_shape
from resnet_fused.ops import _checks
from resnet_fused.ops._convolution import pair
from resnet_fused.ops._functional import define_functional
from resnet_fused.ops._registration import as_node, call, define, refuse_gradient
from resnet_fused.ops.bn_relu import (
    BatchNormArgs,
    check_batch_norm,
    count_as_edited,
    updated_statistics,
)
from resnet_fused.ops.bn_relu_backward import differentiable_statistics

LARGEST_KERNEL = 15  # a byte holds its 225 places and reference.CLOSED


def bn_relu_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """max_pool2d(relu(batch_norm(x))), one pass for the statistics and one to apply and pool.

    x: (N, C, H, W); weight, bias, running_mean, running_var: (C,) or None, float32 or of the dtype
    of x; out: (N, C, P, Q), in dtype and memory format of x. Equivalent to
    F.max_pool2d(relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum,
    eps)), kernel_size, stride, padding), with one rounding, behind the pooling. Where values of a
    window are equal the first one gets the gradient. In training the running statistics are updated
    in place. Differentiable twice.

    Raises ValueError on mismatched shapes or devices, on missing running statistics in evaluation,
    in training on one value per channel, on kernels larger than 15, padding of more than half a
    kernel and images that no window fits in; TypeError on tensors not of floating point.
    """
    _checks.check_tensors("bn_relu_max_pool", x=x)
    windows = (
        pair("bn_relu_max_pool", "kernel_size", kernel_size),
        pair("bn_relu_max_pool", "stride", stride),
        pair("bn_relu_max_pool", "padding", padding),
    )
    bn = BatchNormArgs(weight, bias, running_mean, running_var, training, momentum, eps)
    return bn_relu_max_pool_with_statistics(x, bn, *windows)[0]


def bn_relu_max_pool_with_statistics(
    x: Tensor,
    bn: BatchNormArgs,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bn_relu_max_pool`, what it normalised by, and where each maximum was.

    Returns (out, mean, invstd, argmax): mean, invstd: (C,), without gradient; argmax: uint8, of the
    shape of out, r * kernel_width + s within the window, and reference.CLOSED where the ReLU is
    closed.
    """
    return call(_bn_relu_max_pool, x, *bn, kernel_size, stride, padding)


def bn_relu_max_pool_backward_sums(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """(2, C): the sums over N, H and W of g and of g * (x - mean), in the dtype of mean.

    g is the gradient in front of pooling and ReLU: grad_out, (N, C, P, Q), at the places that
    argmax, as the forward returned it, names. x: (N, C, H, W); mean: (C,). First half of the
    backward of `bn_relu_max_pool`: sums over several processes are added in between. It has no
    gradient of its own, and raises RuntimeError where one is needed.
    """
    windows = kernel_size, stride, padding
    sums: Tensor = call(_backward_sums, grad_out, x, argmax, mean, *windows)
    return sums


def bn_relu_max_pool_backward_apply(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    averages: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """grad_x from the averages of g and of g * (x - mean): second half of the backward.

    averages: (2, C), what `bn_relu_max_pool_backward_sums` returned, divided by the number of
    values per channel; in evaluation nobody reads them. grad_x, (N, C, H, W), is weight * invstd *
    (g - averages[0] - (x - mean) * invstd^2 * averages[1]) in training, weight * invstd * g in
    evaluation. It has no gradient of its own, and raises RuntimeError where one is needed.
    """
    windows = kernel_size, stride, padding
    arguments = grad_out, x, argmax, weight, mean, invstd, training, averages
    grad_x: Tensor = call(_backward_apply, *arguments, *windows)
    return grad_x


def _check_windows(operator: str, x: Tensor, *windows: Sequence[int]) -> tuple[int, ...]:
    """(N, C, P, Q), after all checks of the windows, by the rules of F.max_pool2d."""
    kernel_size, stride, padding = windows
    for name, values in (("kernel_size", kernel_size), ("stride", stride)):
        if min(values) < 1:
            raise ValueError(f"{operator}: {name} must be at least 1, got {tuple(values)}")
    if max(kernel_size) > LARGEST_KERNEL:
        raise ValueError(
            f"{operator}: kernel_size must be at most {LARGEST_KERNEL}, got {tuple(kernel_size)}"
            " (use F.max_pool2d behind bn_relu)"
        )
    if any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"{operator}: padding must be between 0 and half of kernel_size {tuple(kernel_size)},"
            f" got {tuple(padding)}"
        )
    shape = pooled_shape(x.shape, *windows)
    if min(x.shape[1:]) < 1 or min(shape[2:]) < 1:
        raise ValueError(
            f"{operator}: x must have channels and room for a window, got {tuple(x.shape)} for"
            f" kernel_size {tuple(kernel_size)} with padding {tuple(padding)}"
        )
    return shape


def _check(args: tuple[Any, ...]) -> tuple[int, ...]:
    check_batch_norm("bn_relu_max_pool", "x", args[0], BatchNormArgs(*args[1:8]))
    return _check_windows("bn_relu_max_pool", args[0], *args[8:])


def _kernel(*args: Any) -> tuple[Tensor, ...]:
    _check(args)
    x, bn = args[0], BatchNormArgs(*args[1:8])
    if x.numel() == 0:  # statistics that are of nothing move nothing
        return tuple(torch.zeros_like(output) for output in _fake(*args))
    outputs: tuple[Tensor, ...] = backends.choose("bn_relu_max_pool", x)(
        x.contiguous(memory_format=memory_format(x)), *args[1:]
    )
    if bn.training:
        count_as_edited(bn.running_mean, bn.running_var)
    return outputs


def _plain(updates: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    _check(args)
    x = args[0].contiguous(memory_format=memory_format(args[0]))
    return reference.bn_relu_max_pool(*(x, *args[1:], updates))


def _updated(*args: Any) -> tuple[int, ...]:
    return updated_statistics(args, 1)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    shape = _check(args)
    x = args[0]
    out = x.new_empty(shape).contiguous(memory_format=memory_format(x))
    statistics = x.new_empty(x.size(1), dtype=reference.statistics_dtype(x))
    argmax = torch.empty_like(out, dtype=torch.uint8)
    return out, statistics, torch.empty_like(statistics), argmax


class _BnReLUMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        out, mean, invstd, argmax = _bn_relu_max_pool(*args)
        x, bn = args[0], BatchNormArgs(*args[1:8])
        ctx.training, ctx.windows = bn.training, args[8:]
        ctx.save_for_backward(x, argmax, bn.weight, bn.bias, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd, argmax)
        ctx.set_materialize_grads(False)
        return out, mean, invstd, argmax

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 11
        x, argmax, weight, bias, mean, invstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sums_of, apply = bn_relu_max_pool_backward_sums, bn_relu_max_pool_backward_apply
        if torch.is_grad_enabled():
            # For derivatives of the gradient: batch statistics as functions of x.
            sums_of, apply = (
                reference.bn_relu_max_pool_backward_sums,
                reference.bn_relu_max_pool_backward_apply,
            )
            if ctx.training:
                mean, invstd = differentiable_statistics(x, invstd)
        sums = sums_of(grad_out, x, argmax, mean, *ctx.windows)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            averages = sums / max(x.numel() // x.size(1), 1)
            statistics = mean, invstd, ctx.training, averages
            grad_x = apply(grad_out, x, argmax, weight, *statistics, *ctx.windows)
        if needs_weight:
            grad_weight = (sums[1] * invstd).to(weight.dtype)
        if needs_bias:
            grad_bias = sums[0].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 8


def _check_backward(
    operator: str,
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    windows: tuple[Sequence[int], ...],
    **vectors: Tensor | None,
) -> None:
    _checks.check_activation(operator, "x", x)
    shape = _check_windows(operator, x, *windows)
    _checks.check_tensors(operator, grad_out=grad_out, argmax=argmax)
    for name, tensor, dtype in (("grad_out", grad_out, x.dtype), ("argmax", argmax, torch.uint8)):
        _checks.check_shape(operator, name, tensor, "the shape of the pooled x", shape)
        if tensor.dtype != dtype:
            raise TypeError(f"{operator}: {name} must be of {dtype}, got {tensor.dtype}")
        _checks.check_device(operator, name, tensor, "x", x)
    for name, vector in vectors.items():
        if name != "weight":
            _checks.check_tensors(operator, **{name: vector})
        _checks.check_per_channel(operator, name, vector, x)


def _backward_sums_kernel(
    grad_out: Tensor, x: Tensor, argmax: Tensor, mean: Tensor, *windows: Any
) -> Tensor:
    name = "bn_relu_max_pool_backward_sums"
    _check_backward(name, grad_out, x, argmax, windows, mean=mean)
    grad_out, x, argmax = _in_format_of_x(grad_out, x, argmax)
    sums: Tensor = backends.choose(name, x)(grad_out, x, argmax, mean, *windows)
    return sums


def _backward_sums_fake(
    grad_out: Tensor, x: Tensor, argmax: Tensor, mean: Tensor, *windows: Any
) -> Tensor:
    _check_backward("bn_relu_max_pool_backward_sums", grad_out, x, argmax, windows, mean=mean)
    return x.new_empty(2, x.size(1), dtype=reference.statistics_dtype(x))


def _check_apply(*args: Any) -> None:
    operator = "bn_relu_max_pool_backward_apply"
    grad_out, x, argmax, weight, mean, invstd, _, averages, *windows = args
    vectors = {"weight": weight, "mean": mean, "invstd": invstd}
    _check_backward(operator, grad_out, x, argmax, tuple(windows), **vectors)
    _checks.check_tensors(operator, averages=averages)
    _checks.check_shape(operator, "averages", averages, "two values per channel", (2, x.size(1)))
    dtype = reference.statistics_dtype(x)
    if averages.dtype != dtype:
        raise TypeError(f"{operator}: averages must be of {dtype}, got {averages.dtype}")
    _checks.check_device(operator, "averages", averages, "x", x)


def _backward_apply_kernel(grad_out: Tensor, x: Tensor, argmax: Tensor, *rest: Any) -> Tensor:
    _check_apply(grad_out, x, argmax, *rest)
    kernel = backends.choose("bn_relu_max_pool_backward_apply", x)
    grad_x: Tensor = kernel(*_in_format_of_x(grad_out, x, argmax), *rest)
    return grad_x


def _backward_apply_fake(grad_out: Tensor, x: Tensor, argmax: Tensor, *rest: Any) -> Tensor:
    _check_apply(grad_out, x, argmax, *rest)
    return torch.empty_like(x, memory_format=memory_format(x))


def _in_format_of_x(grad_out: Tensor, x: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    format_ = memory_format(x)
    return (
        grad_out.contiguous(memory_format=format_),
        x.contiguous(memory_format=format_),
        argmax.contiguous(memory_format=format_),
    )


_bn_relu_max_pool = define(
    "bn_relu_max_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, float eps, SymInt[2] kernel_size,"
    " SymInt[2] stride, SymInt[2] padding)"
    " -> (Tensor out, Tensor mean, Tensor invstd, Tensor argmax)",
    _kernel,
    _fake,
    as_node(_BnReLUMaxPool, _kernel),
    updated=_updated,
)
define_functional(_bn_relu_max_pool, _kernel, _fake, _plain, _updated)
_backward_sums = define(
    "bn_relu_max_pool_backward_sums(Tensor grad_out, Tensor x, Tensor argmax, Tensor mean,"
    " SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding) -> Tensor",
    _backward_sums_kernel,
    _backward_sums_fake,
    refuse_gradient(
        "bn_relu_max_pool_backward_sums", "use bn_relu_max_pool, or detach the arguments"
    ),
)
_backward_apply = define(
    "bn_relu_max_pool_backward_apply(Tensor grad_out, Tensor x, Tensor argmax, Tensor? weight,"
    " Tensor mean, Tensor invstd, bool training, Tensor averages, SymInt[2] kernel_size,"
    " SymInt[2] stride, SymInt[2] padding) -> Tensor",
    _backward_apply_kernel,
    _backward_apply_fake,
    refuse_gradient(
        "bn_relu_max_pool_backward_apply", "use bn_relu_max_pool, or detach the arguments"
    ),
)
