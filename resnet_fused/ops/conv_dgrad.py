"""conv_dgrad: the gradient of a convolution's input, with what lies around it in a ResNet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format, to_format
from resnet_fused.ops import _checks, _convolution
from resnet_fused.ops._registration import call, define


def conv_dgrad(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(conv_transpose2d(dy, weight) + residual) where the ReLU passed, and its sums over pixels.

    In front of the transposed convolution stands the backward of the batch norm behind it: with
    (a, b, d) = coefficients, dy = a * grad_y + (b * y + d), rounded to the dtype of grad_y; without
    y and coefficients, dy = grad_y. Behind it stand the gradient of the shortcut (residual) and the
    ReLU of the layer before: with scale and shift the gradient passes where not
    (x * scale + shift <= 0), with mask where its bit is set.

    grad_y, y: (N, K, P, Q); weight: (K, C / groups, R, S); input_size: (H, W), which a stride
    leaves open; residual, x: (N, C, H, W); coefficients: (3, K); scale, shift, mean: (C,); mask:
    (N * H * W, ceil(C / 8)) uint8, the mask of `bn_relu` in channels_last. mask and scale exclude
    each other; scale and mean need x.

    Returns (grad_x, sum_grad, sum_grad_x, grad_conv): grad_x, (N, C, H, W), in the memory format of
    x where given, else of grad_y; with mean the sums over N, H and W of the gradient and of the
    gradient times (x - mean), (C,) in float32 (float64 for float64), else empty; with coefficients
    dy, which `conv_wgrad` needs, else empty. Equivalent to torch.nn.grad.conv2d_input(
    (N, C, H, W), weight, dy, stride, padding, dilation, groups) and sums and products around it.
    A partner of backward passes; differentiable, a ReLU as usual.

    Raises ValueError on mismatched shapes or devices, on arguments given without their partners and
    on a geometry out of range; TypeError on unequal dtypes of the activations and on tensors not of
    floating point.
    """
    _checks.check_tensors("conv_dgrad", grad_y=grad_y, weight=weight)
    geometry = _convolution.pairs("conv_dgrad", stride, padding, dilation)
    return call(
        *(_conv_dgrad, grad_y, weight, _convolution.pair("conv_dgrad", "input_size", input_size)),
        *(y, coefficients, residual, x, scale, shift, mask, mean, *geometry, groups),
    )


def _check(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None,
    coefficients: Tensor | None,
    residual: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    *geometry: Any,
) -> tuple[int, ...]:
    """(N, C, H, W), the shape of the gradient."""
    _checks.check_activation("conv_dgrad", "grad_y", grad_y)
    _convolution.check_weight("conv_dgrad", weight, "grad_y", grad_y)
    shape = (grad_y.size(0), weight.size(1) * geometry[-1], *input_size)
    out_shape = _convolution.shape_of_output("conv_dgrad", shape, weight, *geometry)
    meaning = "the shape of the convolution's output"
    _checks.check_shape("conv_dgrad", "grad_y", grad_y, meaning, out_shape)
    _check_partners(y, coefficients, x, scale, shift, mask, mean)
    for name, tensor in (("residual", residual), ("x", x)):
        if tensor is not None:
            _check_like(name, tensor, "the shape of the convolution's input", shape, grad_y)
    if y is not None and coefficients is not None:
        _check_like("y", y, meaning, out_shape, grad_y)
        rows = "three values per output channel"
        _convolution.check_vector(
            *("conv_dgrad", "coefficients", coefficients, rows, (3, out_shape[1])),
            *("grad_y", grad_y),
        )
    if x is not None:
        _convolution.check_prologue("conv_dgrad", scale, shift, x)
        _checks.check_per_channel("conv_dgrad", "mean", mean, x)
    if mask is not None:
        n, c, h, w = shape
        if mask.dtype != torch.uint8:
            raise TypeError(f"conv_dgrad: mask must be a uint8 tensor of bits, got {mask.dtype}")
        bits = "the bits of a channels_last mask"
        _checks.check_shape("conv_dgrad", "mask", mask, bits, (n * h * w, -(-c // 8)))
        _checks.check_device("conv_dgrad", "mask", mask, "grad_y", grad_y)
    return shape


def _check_partners(
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
) -> None:
    wants = (
        ("coefficients", coefficients, "y", y),
        ("y", y, "coefficients", coefficients),
        ("scale", scale, "x", x),
        ("shift", shift, "x", x),
        ("mean", mean, "x", x),
    )
    for name, tensor, partner_name, partner in wants:
        if tensor is not None and partner is None:
            raise ValueError(f"conv_dgrad: {partner_name} must be given with {name}, got None")
    if mask is not None and scale is not None:
        raise ValueError(
            "conv_dgrad: mask must be None with scale and shift, got both (either says where the"
            " ReLU passed)"
        )


def _check_like(
    name: str, tensor: Tensor, meaning: str, shape: tuple[int, ...], grad_y: Tensor
) -> None:
    _convolution.check_activation_like("conv_dgrad", name, tensor, meaning, shape, "grad_y", grad_y)


def _format(grad_y: Tensor, x: Tensor | None) -> torch.memory_format:
    return memory_format(grad_y if x is None else x)


def _kernel(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None,
    coefficients: Tensor | None,
    residual: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = scale, shift, None if mask is None else mask.contiguous(), mean
    _check(grad_y, weight, input_size, y, coefficients, residual, x, *vectors, *geometry)
    format_ = _format(grad_y, x)
    grad_x, sum_grad, sum_grad_x, grad_conv = backends.choose("conv_dgrad", grad_y)(
        *(grad_y.contiguous(memory_format=format_), weight, input_size),
        *(to_format(y, format_), coefficients),
        *(to_format(residual, format_), to_format(x, format_), *vectors, *geometry),
    )
    if coefficients is not None:
        grad_conv = grad_conv.contiguous(memory_format=format_)
    return grad_x.contiguous(memory_format=format_), sum_grad, sum_grad_x, grad_conv


def _fake(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    y: Tensor | None,
    coefficients: Tensor | None,
    residual: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = scale, shift, mask, mean
    shape = _check(grad_y, weight, input_size, y, coefficients, residual, x, *vectors, *geometry)
    format_ = _format(grad_y, x)
    sums = grad_y.new_empty(
        0 if mean is None else shape[1], dtype=reference.statistics_dtype(grad_y)
    )
    return (
        grad_y.new_empty(shape).contiguous(memory_format=format_),
        sums,
        torch.empty_like(sums),
        grad_y.new_empty(0)
        if coefficients is None
        else torch.empty_like(grad_y, memory_format=format_),
    )


_conv_dgrad = define(
    "conv_dgrad(Tensor grad_y, Tensor weight, SymInt[2] input_size, Tensor? y,"
    " Tensor? coefficients, Tensor? residual, Tensor? x, Tensor? scale, Tensor? shift,"
    " Tensor? mask, Tensor? mean, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation,"
    " SymInt groups)"
    " -> (Tensor grad_x, Tensor sum_grad, Tensor sum_grad_x, Tensor grad_conv)",
    _kernel,
    _fake,
    reference.conv_dgrad,
)
