"""What a residual block computes, fused, on any modules that have a block's attributes.

Everything is decided at each call from the modules at hand: their types, training flags and hooks.
Where the fused computation would not be exact, or no faster, the functions return None and the
caller runs its modules one by one.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from resnet_fused import backends
from resnet_fused.nn import chains
from resnet_fused.nn.block_function import Branch, Geometry, residual_block
from resnet_fused.nn.inference_plan import make_plan
from resnet_fused.nn.pairs import (
    BatchNorm,
    Pair,
    as_pair,
    calls_are_plain,
    fold,
    is_pair,
    is_plain_max_pool,
    pair_of,
    uses_batch,
)
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu
from resnet_fused.ops.bn_relu_max_pool import LARGEST_KERNEL, bn_relu_max_pool
from resnet_fused.ops.conv_bn_relu import conv_bn_relu as folded_conv_bn_relu
from resnet_fused.ops.conv_bn_relu import conv_bn_relu_ as folded_conv_bn_relu_


def conv_bn_relu(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    residual: Tensor | None = None,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor | None:
    """relu(bn(conv(x)) + residual), following `bn.training`; None where that cannot be fused.

    reuse_residual: the memory of `residual` may become the output's, if no gradient is needed.
    """
    if not (_applies(x) and is_pair(conv, bn)):
        return None
    return _pair_forward(x, (conv, bn), residual, relu, reuse_residual)  # type: ignore[arg-type]


def conv_bn_relu_max_pool(
    x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module
) -> Tensor | None:
    """pool(relu(bn(conv(x)))) with a live normalisation; None where that cannot be fused."""
    if not (
        x.dim() == 4
        and _has_max_pool(x)
        and calls_are_plain()
        and is_pair(conv, bn)
        and _is_live(bn)  # type: ignore[arg-type]
        and is_plain_max_pool(pool)
        and max(pair_of(pool.kernel_size)) <= LARGEST_KERNEL
    ):
        return None
    y, bn_args = _convolve(x, conv), batch_norm_args(bn)  # type: ignore[arg-type]
    return bn_relu_max_pool(y, *bn_args, pool.kernel_size, pool.stride, pool.padding)


def residual_forward(
    x: Tensor,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    downsample: nn.Module | None,
    owner: nn.Module,
) -> Tensor | None:
    """The block of `pairs` around the shortcut `downsample`; None where that cannot be fused.

    relu(bn(conv(... relu(bn(conv(x))))) + downsample(x)) with every normalisation in the mode of
    its own training flag. owner: the block, for which an inference plan is made where possible.
    """
    if not (_applies(x) and all(is_pair(conv, bn) for conv, bn in pairs)):
        return None
    projection = as_pair(downsample)
    every: list[Pair] = [*pairs, projection] if projection is not None else [*pairs]  # type: ignore[list-item]
    if downsample is None or projection is not None:
        trained = torch.is_grad_enabled() and any(_is_live(bn) for _, bn in every)
        if trained and not torch.compiler.is_compiling() and _is_one_node(x, every):
            return _trained_forward(x, every, projection is not None)
        make_plan(owner, x, every, projection is not None)
        out = chains.run_block(x, pairs, downsample)
        if out is not None:
            return out
    *first, last = every if projection is None else every[:-1]
    z = x
    for pair in first:
        z = _pair_forward(z, pair)
    if downsample is None:
        return _pair_forward(z, last, x)
    if projection is None:
        return _pair_forward(z, last, downsample(x))
    if not _folds(x) or _is_live(last[1]) or _is_live(projection[1]):
        y, y_shortcut = _convolve(z, last[0]), _convolve(x, projection[0])
        return bn_relu(
            *(y, *batch_norm_args(last[1])),
            residual=y_shortcut,
            residual_bn=batch_norm_args(projection[1]),
        )
    shortcut = _pair_forward(x, projection, relu=False)
    return _pair_forward(z, last, shortcut, reuse_residual=True)


def batch_norm_args(bn: BatchNorm) -> BatchNormArgs:
    """How `bn` normalises now. In training it counts a batch, as calling the module does."""
    if not isinstance(bn, nn.BatchNorm2d):
        return BatchNormArgs(bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    running = (bn.running_mean, bn.running_var)
    if bn.training and not bn.track_running_stats:
        running = (None, None)
    return BatchNormArgs(bn.weight, bn.bias, *running, uses_batch(bn), momentum, bn.eps)


def _applies(x: Tensor) -> bool:
    """Whether fused operators are exact and worth calling for x, here and now."""
    return x.dim() == 4 and backends.is_accelerated("bn_relu", x) and calls_are_plain()


def _folds(x: Tensor) -> bool:
    """Whether a convolution can take a folded normalisation, residual and ReLU along.

    Else they are one pass over its output.
    """
    name = "conv_bn_relu"
    return backends.is_implemented(name) and backends.is_accelerated(name, x)


def _has_max_pool(x: Tensor) -> bool:
    """Whether batch norm, ReLU and pooling can be one operator that is faster than three."""
    name = "bn_relu_max_pool"
    return backends.is_implemented(name) and backends.is_accelerated(name, x)


def _is_live(bn: BatchNorm) -> bool:
    """Whether `bn` must see the convolution's output: to normalise by it, or for a gradient.

    The gradient of a folded scale is exact as well, but that of the normalisation's weight would be
    the small difference of two large numbers then.
    """
    parameters = (bn.weight, bn.bias)
    return uses_batch(bn) or (
        torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    )


def _pair_forward(
    x: Tensor,
    pair: Pair,
    residual: Tensor | None = None,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    conv, bn = pair
    if not _folds(x) or _is_live(bn):
        y = _convolve(x, conv)
        if residual is not None:
            residual = residual.to(y.dtype)  # as in `out += identity`
        return bn_relu(y, *batch_norm_args(bn), residual=residual, relu=relu)
    scale, shift = fold(conv, bn)
    geometry = conv.stride, cast(tuple[int, int], conv.padding), conv.dilation, conv.groups
    if residual is not None and not torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    if reuse_residual and residual is not None and _may_overwrite(residual, x):
        return folded_conv_bn_relu_(x, conv.weight, scale, shift, residual, relu, *geometry)
    return folded_conv_bn_relu(x, conv.weight, scale, shift, residual, relu, *geometry)


def _may_overwrite(residual: Tensor, x: Tensor) -> bool:
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or residual.is_inference() is not torch.is_inference_mode_enabled()
    )


def _convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return torch.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _is_one_node(x: Tensor, pairs: Sequence[Pair]) -> bool:
    """Whether the block can be one autograd node, and something in it needs a gradient."""
    if any(conv.bias is not None for conv, _ in pairs):
        return False
    return x.requires_grad or any(
        p.requires_grad for conv, bn in pairs for p in (conv.weight, bn.weight) if p is not None
    )


def _trained_forward(x: Tensor, pairs: Sequence[Pair], has_projection: bool) -> Tensor:
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    branches = [
        Branch(
            conv.weight.to(dtype) if autocast else conv.weight,
            batch_norm_args(bn),
            Geometry(conv.stride, conv.padding, conv.dilation, conv.groups),  # type: ignore[arg-type]
        )
        for conv, bn in pairs
    ]
    shortcut = branches.pop() if has_projection else None
    with torch.autocast(device_type, enabled=False):
        return residual_block(x.to(dtype), branches, shortcut)
