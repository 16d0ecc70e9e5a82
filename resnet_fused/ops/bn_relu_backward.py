"""The backward of bn_relu: in one call, or as its two passes where sums must be combined between.

With g the gradient of the output where the ReLU passed, xc = x - mean and n values per channel:
  grad_bias = sum(g), grad_weight = sum(g * xc) * invstd, grad_residual = g,
  grad_x = (g - sum(g) / n - xc * sum(g * xc) * invstd^2 / n) * weight * invstd,
without the two middle terms where running statistics were used. Statistics over several processes
have n values in all of them, and sums over all of them.
"""

from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format, to_format
from resnet_fused.ops import _checks
from resnet_fused.ops._registration import call, define, refuse_gradient

_REMEDY = "use bn_relu, or detach the arguments"


def bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    has_residual: bool = False,
    residual: Tensor | None = None,
    residual_bn: bool = False,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    residual_mean: Tensor | None = None,
    residual_invstd: Tensor | None = None,
    residual_training: bool = False,
    relu: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of `bn_relu`: one pass that reduces, one that applies.

    grad_out, x, out, residual: (N, C, H, W); weight, bias, mean, invstd, ...: (C,); mask: as the
    forward returned it. The sign of the ReLU is that of `out`, or `mask`, or where both are None it
    is recomputed from x (and residual with residual_bn). Kernels for CPUs want `out` with a
    residual, those for GPUs `mask` with a residual without residual_bn. `residual` is needed with
    residual_bn only. Returns (grad_x, grad_weight, grad_bias,
    grad_residual, grad_residual_weight, grad_residual_bias); what does not exist is empty.
    """
    return call(
        _bn_relu_backward,
        *(grad_out, x, out, mask, weight, bias, mean, invstd, training, has_residual, residual),
        *(residual_bn, residual_weight, residual_bias, residual_mean, residual_invstd),
        *(residual_training, relu),
    )


def bn_relu_backward_sums(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None = None,
    residual_bn: bool = False,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    residual_mean: Tensor | None = None,
    residual_invstd: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """The sums of `bn_relu_backward`: of g, of g * (x - mean), of g * (residual - residual_mean).

    g: grad_out where the ReLU passed, else 0; arguments are those of `bn_relu_backward`, `out` or
    `mask` with a plain residual, too. Returns (2, C), or (3, C) with residual_bn, in float32
    (float64 for float64): 0 where x is empty. sums[0] is the gradient of bias, sums[1] * invstd
    that of weight, sums[2] * residual_invstd that of residual_weight. For `bn_relu_backward_apply`
    they are divided by the number of values per channel, with statistics of several processes once
    they are summed over all of those.

    Raises ValueError on mismatched shapes or devices, TypeError on missing tensors and on wrong
    dtypes, and RuntimeError where an argument needs a gradient.
    """
    sums: Tensor = call(
        _bn_relu_backward_sums,
        *(grad_out, x, out, mask, weight, bias, mean, invstd, residual, residual_bn),
        *(residual_weight, residual_bias, residual_mean, residual_invstd, relu),
    )
    return sums


def bn_relu_backward_apply(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    has_residual: bool,
    residual: Tensor | None,
    residual_bn: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_invstd: Tensor | None,
    residual_training: bool,
    relu: bool,
    averages: Tensor,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_residual) of `bn_relu_backward`, from sums that are known already.

    averages: (2, C), or (3, C) with residual_bn, float32 (float64 for float64): what
    `bn_relu_backward_sums` returns, divided by the number of values per channel behind the
    statistics. All other arguments are those of `bn_relu_backward`. In training
    grad_x = weight * invstd * (g - averages[0] - (x - mean) * invstd^2 * averages[1]), else
    weight * invstd * g; the same holds for a residual with residual_bn, with averages[2]. A plain
    residual gets g; without residual its gradient is empty.

    Raises ValueError on mismatched shapes or devices, TypeError on missing tensors and on wrong
    dtypes, and RuntimeError where an argument needs a gradient.
    """
    gradients: tuple[Tensor, Tensor] = call(
        _bn_relu_backward_apply,
        *(grad_out, x, out, mask, weight, bias, mean, invstd, training, has_residual, residual),
        *(residual_bn, residual_weight, residual_bias, residual_mean, residual_invstd),
        *(residual_training, relu, averages),
    )
    return gradients


def _check(
    operator: str,
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    residual_bn: bool,
    *residual_vectors: Tensor | None,
) -> None:
    _checks.check_activation(operator, "x", x)
    _checks.check_tensors(operator, mean=mean, invstd=invstd)
    _checks.check_like(operator, "grad_out", grad_out, "x", x)
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is not None:
            _checks.check_like(operator, name, tensor, "x", x)
    named = {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd}
    for name, vector in named.items():
        _checks.check_per_channel(operator, name, vector, x)
    if mask is not None and (mask.dtype != torch.uint8 or mask.dim() != 2):
        raise TypeError(
            f"{operator}: mask must be what bn_relu returned, a 2-d uint8 tensor,"
            f" got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if not residual_bn:
        return
    names = ("residual_weight", "residual_bias", "residual_mean", "residual_invstd")
    for name, vector in zip(names, residual_vectors, strict=True):
        _checks.check_per_channel(operator, name, vector, x)
    _checks.check_tensors(
        operator,
        residual=residual,
        residual_mean=residual_vectors[2],
        residual_invstd=residual_vectors[3],
    )


def _check_with_residual(operator: str, grad_out: Tensor, x: Tensor, *rest: Any) -> None:
    """rest: what `bn_relu_backward` takes behind x."""
    _check(operator, grad_out, x, *rest[:6], *rest[8:14])
    out, mask, has_residual, residual_bn, relu = (rest[i] for i in (0, 1, 7, 9, 15))
    if has_residual and not residual_bn and relu and out is None and mask is None:
        raise ValueError(
            f"{operator}: out or mask must be given with relu and a residual, got None"
        )
    if residual_bn and not has_residual:
        raise ValueError(f"{operator}: has_residual must be True with residual_bn, got False")


def _check_averages(averages: Tensor, x: Tensor, residual_bn: bool) -> None:
    operator = "bn_relu_backward_apply"
    _checks.check_tensors(operator, averages=averages)
    meaning = "a row for each of the sums, shape"
    shape = 3 if residual_bn else 2, x.size(1)
    _checks.check_shape(operator, "averages", averages, meaning, shape)
    dtype = reference.statistics_dtype(x)
    if averages.dtype != dtype:
        raise TypeError(
            f"{operator}: averages must be {dtype} for x of {x.dtype}, got {averages.dtype}"
        )
    _checks.check_device(operator, "averages", averages, "x", x)


def _kernel(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check_with_residual("bn_relu_backward", grad_out, x, *rest)
    format_ = memory_format(x)
    out, residual = to_format(rest[0], format_), to_format(rest[8], format_)
    grads: tuple[Tensor, ...] = backends.choose("bn_relu_backward", x)(
        grad_out.contiguous(memory_format=format_),
        x.contiguous(memory_format=format_),
        *(out, *rest[1:8], residual, *rest[9:]),
    )
    return grads


def _fake(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check_with_residual("bn_relu_backward", grad_out, x, *rest)
    weight, mean, has_residual, residual_bn, residual_weight = (rest[i] for i in (2, 4, 7, 9, 10))
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    grad_residual = torch.empty_like(grad_x) if has_residual else x.new_empty(0)
    like = mean if weight is None else weight
    like_residual = (
        like if not residual_bn else mean if residual_weight is None else residual_weight
    )
    shape = like.shape if residual_bn else (0,)
    return (
        grad_x,
        torch.empty_like(like),
        torch.empty_like(like),
        grad_residual,
        like_residual.new_empty(shape),
        like_residual.new_empty(shape),
    )


def _differentiable(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The formulas with batch statistics as functions of x, for derivatives of the gradient."""
    arguments = list(rest)
    training, residual, residual_training = rest[6], rest[8], rest[14]
    if training:
        arguments[4:6] = differentiable_statistics(x, rest[5])
    if residual is not None and residual_training:
        arguments[12:14] = differentiable_statistics(residual, rest[13])
    return reference.bn_relu_backward(grad_out, x, *arguments)


def differentiable_statistics(x: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of the batch as functions of x.

    invstd: as the forward computed it, without a gradient.
    """
    mean, var = reference.batch_moments(x)
    eps = invstd.pow(-2) - var.detach()  # what the forward added to the variance
    return mean, (var + eps).rsqrt()


def _sums_kernel(grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
    _check("bn_relu_backward_sums", grad_out, x, *rest[:12])
    format_ = memory_format(x)
    out, residual = to_format(rest[0], format_), to_format(rest[6], format_)
    sums: Tensor = backends.choose("bn_relu_backward_sums", x)(
        grad_out.contiguous(memory_format=format_),
        x.contiguous(memory_format=format_),
        *(out, *rest[1:6], residual, *rest[7:]),
    )
    return sums


def _sums_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
    _check("bn_relu_backward_sums", grad_out, x, *rest[:12])
    return x.new_empty((3 if rest[7] else 2, x.size(1)), dtype=reference.statistics_dtype(x))


def _apply_kernel(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_with_residual("bn_relu_backward_apply", grad_out, x, *rest[:-1])
    _check_averages(rest[-1], x, rest[9])
    format_ = memory_format(x)
    out, residual = to_format(rest[0], format_), to_format(rest[8], format_)
    gradients: tuple[Tensor, Tensor] = backends.choose("bn_relu_backward_apply", x)(
        grad_out.contiguous(memory_format=format_),
        x.contiguous(memory_format=format_),
        *(out, *rest[1:8], residual, *rest[9:-1], rest[-1].contiguous()),
    )
    return gradients


def _apply_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_with_residual("bn_relu_backward_apply", grad_out, x, *rest[:-1])
    _check_averages(rest[-1], x, rest[9])
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    return grad_x, torch.empty_like(grad_x) if rest[7] else x.new_empty(0)


_bn_relu_backward = define(
    "bn_relu_backward(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor invstd, bool training, bool has_residual,"
    " Tensor? residual, bool residual_bn, Tensor? residual_weight, Tensor? residual_bias,"
    " Tensor? residual_mean, Tensor? residual_invstd, bool residual_training, bool relu)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_residual, Tensor grad_residual_weight, Tensor grad_residual_bias)",
    _kernel,
    _fake,
    _differentiable,
)
_bn_relu_backward_sums = define(
    "bn_relu_backward_sums(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor invstd, Tensor? residual, bool residual_bn,"
    " Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean,"
    " Tensor? residual_invstd, bool relu) -> Tensor",
    _sums_kernel,
    _sums_fake,
    refuse_gradient("bn_relu_backward_sums", _REMEDY),
)
_bn_relu_backward_apply = define(
    "bn_relu_backward_apply(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor invstd, bool training, bool has_residual,"
    " Tensor? residual, bool residual_bn, Tensor? residual_weight, Tensor? residual_bias,"
    " Tensor? residual_mean, Tensor? residual_invstd, bool residual_training, bool relu,"
    " Tensor averages) -> (Tensor grad_x, Tensor grad_residual)",
    _apply_kernel,
    _apply_fake,
    refuse_gradient("bn_relu_backward_apply", _REMEDY),
)
