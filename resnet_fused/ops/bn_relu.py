"""bn_relu: batch normalisation, an optional residual (with its own batch normalisation), ReLU.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015; the residual form is that of He et al., "Deep Residual Learning", 2015.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import mask_shape, memory_format, to_format
from resnet_fused.ops import _checks
from resnet_fused.ops._functional import define_functional
from resnet_fused.ops._registration import as_node, call, define, refuse_gradient
from resnet_fused.ops.bn_relu_backward import bn_relu_backward


class BatchNormArgs(NamedTuple):
    """One batch normalisation, in the order of `torch.nn.functional.batch_norm`'s meaning.

    weight, bias, running_mean, running_var: (C,) or None. training: normalise by the statistics of
    the batch and update the running ones. momentum: weight of the batch in that update.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


_NO_BATCH_NORM = BatchNormArgs(None, None, None, None)


def bn_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_bn: BatchNormArgs | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(x) + residual): one pass for the statistics, one to apply.

    x, residual, out: (N, C, H, W); weight, bias, running_mean, running_var: (C,) or None, float32
    or of the dtype of x. Equivalent to relu(F.batch_norm(x, running_mean, running_var, weight,
    bias, training, momentum, eps) + residual); with `residual_bn` the residual is normalised by
    those arguments before the sum. In training the running statistics are updated in place. The
    output keeps the memory format of x; unequal dtypes of x and residual are promoted as in a sum.
    Differentiable twice.

    Raises ValueError on mismatched shapes or devices, on missing running statistics in evaluation,
    and in training on one value per channel; TypeError on tensors not of floating point.
    """
    bn = BatchNormArgs(weight, bias, running_mean, running_var, training, momentum, eps)
    return bn_relu_with_statistics(x, bn, residual, residual_bn, relu)[0]


def bn_relu_with_statistics(
    x: Tensor,
    bn: BatchNormArgs,
    residual: Tensor | None = None,
    residual_bn: BatchNormArgs | None = None,
    relu: bool = True,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`bn_relu`, what it normalised by, and where its ReLU passed.

    Returns (out, mean, invstd, residual_mean, residual_invstd, mask). The statistics are (C,), or
    empty where there is no residual_bn, and carry no gradient. mask: uint8, one bit per element of
    out, of shape `layout.mask_shape`; empty without save_mask, which wants relu and a residual
    without residual_bn, and which the kernels for CPUs do not have.
    """
    if residual is None:
        _checks.check_tensors("bn_relu", x=x)
        if residual_bn is not None:
            raise ValueError("bn_relu: residual_bn must come with a residual, got residual=None")
    else:
        x, residual = _checks.promote("bn_relu", x, residual)
    return call(
        *(_bn_relu, x, *bn, residual, residual_bn is not None),
        *(*(residual_bn or _NO_BATCH_NORM), relu, save_mask),
    )


def keeps_output(x: Tensor) -> bool:
    """Whether the sign of a ReLU behind a residual is read from the output in the backward.

    So it is on CPUs. On GPUs it comes from a mask, which is a sixteenth of the bytes in 16-bit
    floats, or with residual_bn from x and residual, which the backward reads anyway.
    """
    return x.is_cpu


def bn_relu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool = True,
) -> Tensor:
    """The output of `bn_relu` once more, from statistics that are known already.

    x, out: (N, C, H, W); mean, invstd: (C,). Equivalent to
    relu((x - mean) * invstd * weight + bias). A partner of backward passes that recompute instead
    of saving: it has no gradient of its own, and raises RuntimeError where one is needed.
    """
    return call(_bn_relu_apply, x, weight, bias, mean, invstd, relu)


def check_batch_norm(operator: str, name: str, x: Tensor, bn: BatchNormArgs) -> None:
    """All arguments of one normalisation; name: what `operator` calls x, "x" or "residual"."""
    _checks.check_activation(operator, name, x)
    prefix = "" if name == "x" else "residual_bn."
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    for field, vector in zip(BatchNormArgs._fields, vectors, strict=False):
        _checks.check_per_channel(operator, prefix + field, vector, x)
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        raise ValueError(
            f"{operator}: {prefix}running_mean and {prefix}running_var must be given in evaluation,"
            " got None (pass training=True to use the statistics of the batch)"
        )
    if bn.training and x.size(0) * x.size(2) * x.size(3) == 1:
        raise ValueError(
            f"{operator}: expected more than 1 value per channel when training,"
            f" got {name} of shape {tuple(x.shape)}"
        )


def _unpack(args: tuple[Any, ...]) -> tuple[Tensor, BatchNormArgs, Tensor | None, BatchNormArgs]:
    """x, its normalisation, the residual and the residual's normalisation, checked."""
    x, bn = args[0], BatchNormArgs(*args[1:8])
    residual, has_residual_bn, residual_bn = args[8], args[9], _NO_BATCH_NORM
    check_batch_norm("bn_relu", "x", x, bn)
    if residual is not None:
        _checks.check_like("bn_relu", "residual", residual, "x", x)
        if has_residual_bn:
            residual_bn = BatchNormArgs(*args[10:17])
            check_batch_norm("bn_relu", "residual", residual, residual_bn)
    if args[18] and (residual is None or has_residual_bn or not args[17]):
        raise ValueError(
            "bn_relu: save_mask must come with relu and a residual without residual_bn"
            " (otherwise the sign follows from x and residual)"
        )
    return x, bn, residual, residual_bn


def _kernel(*args: Any) -> tuple[Tensor, ...]:
    x, bn, _, residual_bn = _unpack(args)
    if x.numel() == 0:  # statistics that are of nothing move nothing
        return tuple(torch.zeros_like(output) for output in _fake(*args))
    outputs: tuple[Tensor, ...] = backends.choose("bn_relu", x)(*_dense(args))
    for updated in (bn, residual_bn):
        if updated.training:
            count_as_edited(updated.running_mean, updated.running_var)
    return outputs


def _plain(updates: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    _unpack(args)
    return reference.bn_relu(*(*_dense(args), updates))


def _dense(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, residual = args[0], args[8]
    format_ = memory_format(x)
    return (
        *(x.contiguous(memory_format=format_), *args[1:8], to_format(residual, format_)),
        *args[9:],
    )


def count_as_edited(*buffers: Tensor | None) -> None:
    """Kernels write through pointers: without this, what was folded from the buffers stays."""
    for buffer in buffers:
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


def updated_statistics(args: tuple[Any, ...], first: int) -> tuple[int, ...]:
    """Positions of the running statistics that a batch norm updates; first: that of its weight."""
    bn = BatchNormArgs(*args[first : first + 7])
    if not bn.training:
        return ()
    return tuple(first + i for i in (2, 3) if bn[i] is not None)


def _updated(*args: Any) -> tuple[int, ...]:
    own = updated_statistics(args, 1)
    return own + updated_statistics(args, 10) if args[8] is not None and args[9] else own


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, _, residual, _ = _unpack(args)
    out = torch.empty_like(x, memory_format=memory_format(x))
    statistics = x.new_empty(x.size(1), dtype=reference.statistics_dtype(x))
    normalised = residual is not None and args[9]
    others = [
        torch.empty_like(statistics) if normalised else statistics.new_empty(0) for _ in range(2)
    ]
    mask = x.new_empty(mask_shape(out) if args[18] else (0,), dtype=torch.uint8)
    return out, statistics, torch.empty_like(statistics), *others, mask


class _BnReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        takes_residual = args[17] and args[8] is not None
        save_output = takes_residual and keeps_output(args[0])
        save_mask = takes_residual and not args[9] and not save_output
        outputs: tuple[Tensor, ...] = _bn_relu(*args[:18], args[18] or save_mask)
        x, bn, residual = args[0], BatchNormArgs(*args[1:8]), args[8]
        ctx.has_residual_bn, residual_bn, ctx.relu = args[9], BatchNormArgs(*args[10:17]), args[17]
        ctx.training, ctx.residual_training = bn.training, residual_bn.training
        ctx.has_residual = residual is not None
        ctx.save_for_backward(
            *(x, outputs[0] if save_output else None, outputs[5] if save_mask else None),
            *(bn.weight, bn.bias, residual if ctx.has_residual_bn else None),
            *(residual_bn.weight, residual_bn.bias, *outputs[1:5]),
        )
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 19
        x, out, mask, weight, bias, residual, *rest = ctx.saved_tensors
        residual_weight, residual_bias, mean, invstd, residual_mean, residual_invstd = rest
        grads = bn_relu_backward(
            *(grad_out, x, out, mask, weight, bias, mean, invstd, ctx.training),
            *(ctx.has_residual, residual, ctx.has_residual_bn, residual_weight, residual_bias),
            *(residual_mean, residual_invstd, ctx.residual_training, ctx.relu),
        )
        needed = ctx.needs_input_grad
        # x, weight, bias, residual, residual_weight, residual_bias
        positions = 0, 1, 2, 8, 10, 11
        result: list[Tensor | None] = [None] * 19
        for position, grad in zip(positions, grads, strict=True):
            result[position] = grad if needed[position] else None
        return tuple(result)


def _apply_kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, relu: bool
) -> Tensor:
    _check_apply(x, weight, bias, mean, invstd)
    x = x.contiguous(memory_format=memory_format(x))
    out: Tensor = backends.choose("bn_relu_apply", x)(x, weight, bias, mean, invstd, relu)
    return out


def _apply_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, relu: bool
) -> Tensor:
    _check_apply(x, weight, bias, mean, invstd)
    return torch.empty_like(x, memory_format=memory_format(x))


def _check_apply(x: Tensor, *vectors: Tensor | None) -> None:
    _checks.check_activation("bn_relu_apply", "x", x)
    _checks.check_tensors("bn_relu_apply", mean=vectors[2], invstd=vectors[3])
    for name, vector in zip(("weight", "bias", "mean", "invstd"), vectors, strict=True):
        _checks.check_per_channel("bn_relu_apply", name, vector, x)


_bn_relu = define(
    "bn_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, float eps,"
    " Tensor? residual, bool residual_bn, Tensor? residual_weight, Tensor? residual_bias,"
    " Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var,"
    " bool residual_training, float residual_momentum, float residual_eps, bool relu,"
    " bool save_mask) -> (Tensor out, Tensor mean, Tensor invstd, Tensor residual_mean,"
    " Tensor residual_invstd, Tensor mask)",
    _kernel,
    _fake,
    as_node(_BnReLU, _kernel),
    updated=_updated,
)
define_functional(_bn_relu, _kernel, _fake, _plain, _updated)
_bn_relu_apply = define(
    "bn_relu_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, bool relu)"
    " -> Tensor",
    _apply_kernel,
    _apply_fake,
    refuse_gradient("bn_relu_apply", "use bn_relu, or detach the arguments"),
)
