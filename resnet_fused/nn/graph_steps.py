"""What a node of a rewritten graph computes: layers of other people's modules, fused.

Everything is decided at each call from the modules and tensors at hand. Where the fused computation
would not be exact, the layers run one by one, and the sum is written as it was: `out += residual`
keeps the dtype of out, and the memory format of a sum is that of its first operand. relu: whether a
ReLU follows; a batch norm may have one in it besides.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.layout import convolution_shape, memory_format
from resnet_fused.nn import blocks, normalization
from resnet_fused.nn.pairs import (
    BatchNorm,
    Pair,
    batch_norm_args,
    calls_are_plain,
    computed_dtype,
    is_plain_conv,
    is_plain_norm,
    is_plain_norm_before_relu,
)
from resnet_fused.nn.synchronization import group_of
from resnet_fused.ops.add_relu import add_relu as fused_add_relu

Sum = Literal["out + residual", "residual + out", "out += residual"]


def conv_bn_relu(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    residual: Tensor | None = None,
    relu: bool = True,
    how: Sum = "out + residual",
) -> Tensor:
    """relu(bn(conv(x)) + residual). x: (N, C, H, W); residual, out: (N, K, P, Q)."""
    activated = _activated(x, bn, relu, residual) if is_plain_conv(conv) else None
    if activated is not None:
        pair = cast(Pair, (conv, bn))
        if residual is None:
            return blocks.pair_forward(x, pair, None, activated)
        if _is_like(residual, x, _output_shape(x, pair[0]), computed_dtype(x)):
            return blocks.pair_forward(x, pair, residual, relu)
        return _finish(blocks.pair_forward(x, pair, None, relu=False), residual, relu, how)
    return _finish(bn(conv(x)), residual, relu, how)


def conv_bn_relu_max_pool(
    x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module, relu: bool = True
) -> Tensor:
    """pool(relu(bn(conv(x)))). x: (N, C, H, W); out: (N, K, P, Q)."""
    out = None
    if isinstance(x, Tensor) and relu and is_plain_norm(bn):
        out = blocks.conv_bn_relu_max_pool(x, conv, bn, pool)
    return pool(conv_bn_relu(x, conv, bn, None, relu)) if out is None else out


def bn_relu(
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None = None,
    relu: bool = True,
    how: Sum = "out + residual",
) -> Tensor:
    """relu(bn(x) + residual). x, residual, out: (N, C, H, W)."""
    activated = _activated(x, bn, relu, residual)
    if activated is not None:
        arguments = batch_norm_args(cast(BatchNorm, bn)), group_of(cast(BatchNorm, bn))
        if residual is None or _is_like(residual, x, tuple(x.shape), x.dtype):
            return normalization.bn_relu(x, *arguments, residual=residual, relu=activated)
        return _finish(normalization.bn_relu(x, *arguments, relu=False), residual, relu, how)
    return _finish(bn(x), residual, relu, how)


def add_relu(x: Tensor, residual: Tensor, how: Sum = "out + residual") -> Tensor:
    """relu(x + residual). x, residual, out: (N, C, H, W)."""
    if (
        isinstance(x, Tensor)
        and x.dim() == 4
        and calls_are_plain()
        and _is_like(residual, x, tuple(x.shape), x.dtype)
        and backends.is_accelerated("add_relu", x)
    ):
        return fused_add_relu(x, residual)
    return _finish(x, residual, True, how)


def _activated(x: Tensor, bn: nn.Module, relu: bool, residual: Tensor | None) -> bool | None:
    """Whether a fused operator ends in a ReLU, be it in `bn`; None if `bn` cannot be fused."""
    if not (isinstance(x, Tensor) and blocks.applies(x)):
        return None
    if torch.compiler.is_compiling() and group_of(bn) is not None:
        return None  # messages to other processes are not traced
    if is_plain_norm(bn):
        return relu
    return True if residual is None and is_plain_norm_before_relu(bn) else None


def _is_like(residual: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether adding the residual to what is made of x neither broadcasts nor promotes.

    Nor may it be in another memory format, that of the sum being the format of its first operand.
    """
    return (
        isinstance(residual, Tensor)
        and tuple(residual.shape) == tuple(shape)
        and residual.dtype == dtype
        and residual.is_contiguous(memory_format=memory_format(x))
    )


def _output_shape(x: Tensor, conv: nn.Conv2d) -> tuple[int, ...]:
    padding = cast(tuple[int, int], conv.padding)
    return convolution_shape(tuple(x.shape), conv.weight.shape, conv.stride, padding, conv.dilation)


def _finish(out: Tensor, residual: Tensor | None, relu: bool, how: Sum) -> Tensor:
    """relu(out + residual), step by step. `out` belongs to nobody else."""
    if residual is not None and how == "out += residual":
        out += residual
    elif residual is not None:
        out = residual + out if how == "residual + out" else out + residual
    return F.relu(out) if relu else out
