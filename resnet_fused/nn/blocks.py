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
from resnet_fused.nn import chains, normalization
from resnet_fused.nn.block_function import residual_block
from resnet_fused.nn.block_parts import Branch, Geometry
from resnet_fused.nn.inference_plan import make_plan
from resnet_fused.nn.pairs import (
    BatchNorm,
    Pair,
    Shortcut,
    as_pair,
    batch_norm_args,
    calls_are_plain,
    fold,
    is_pair,
    is_plain_max_pool,
    pair_of,
    uses_batch,
)
from resnet_fused.nn.synchronization import group_of
from resnet_fused.nn.training_mode import TrainingMode
from resnet_fused.ops.bn_relu_max_pool import LARGEST_KERNEL
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
    if not (applies(x) and is_pair(conv, bn)):
        return None
    if torch.compiler.is_compiling() and group_of(bn) is not None:
        return None  # messages to other processes are not traced
    return pair_forward(x, (conv, bn), residual, relu, reuse_residual)  # type: ignore[arg-type]


def conv_bn_relu_max_pool(
    x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module
) -> Tensor | None:
    """pool(relu(bn(conv(x)))) with a live normalisation; None where that cannot be fused."""
    if not (
        x.dim() == 4
        and _has_max_pool(x)
        and calls_are_plain()
        and is_pair(conv, bn)
        and is_live(bn)  # type: ignore[arg-type]
        and is_plain_max_pool(pool)
        and max(pair_of(pool.kernel_size)) <= LARGEST_KERNEL
    ):
        return None
    if torch.compiler.is_compiling() and group_of(bn) is not None:
        return None  # messages to other processes are not traced
    windows = (pair_of(size) for size in (pool.kernel_size, pool.stride, pool.padding))
    y, bn_args = _convolve(x, conv), batch_norm_args(bn)  # type: ignore[arg-type]
    return normalization.bn_relu_max_pool(y, bn_args, group_of(bn), *windows)


def residual_forward(
    x: Tensor,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    downsample: Shortcut,
    owner: nn.Module,
    mode: TrainingMode = TrainingMode.SPEED,
) -> Tensor | None:
    """The block of `pairs` around the shortcut `downsample`; None where that cannot be fused.

    relu(bn(conv(... relu(bn(conv(x))))) + downsample(x)) with every normalisation in the mode of
    its own training flag. owner: the block, for which an inference plan is made where possible.
    mode: what is kept for a backward.
    """
    if not (applies(x) and all(is_pair(conv, bn) for conv, bn in pairs)):
        return None
    projection = as_pair(downsample)
    every: list[Pair] = [*pairs, projection] if projection is not None else [*pairs]  # type: ignore[list-item]
    if torch.compiler.is_compiling() and any(group_of(bn) is not None for _, bn in every):
        return None  # messages to other processes are not traced
    main: list[Pair] = [*pairs]  # type: ignore[list-item]
    has_live = any(is_live(bn) for _, bn in every)
    if torch.is_grad_enabled() and has_live and not torch.compiler.is_compiling():
        if _is_one_node(x, every):
            return _trained_forward(x, main, projection, downsample, mode)
    elif downsample is None or projection is not None:
        make_plan(owner, x, every, projection is not None)
        out = chains.run_block(x, pairs, downsample)
        if out is not None:
            return out
    *first, last = main
    z = x
    for pair in first:
        z = pair_forward(z, pair)
    if downsample is None:
        return pair_forward(z, last, x)
    if projection is None:
        return pair_forward(z, last, downsample(x))
    if not _share_statistics(last[1], projection[1]):
        return pair_forward(z, last, pair_forward(x, projection, relu=False))
    if not _folds(x) or is_live(last[1]) or is_live(projection[1]):
        y, y_shortcut = _convolve(z, last[0]), _convolve(x, projection[0])
        return normalization.bn_relu(
            *(y, batch_norm_args(last[1]), group_of(last[1])),
            *(y_shortcut, batch_norm_args(projection[1]), group_of(projection[1])),
        )
    shortcut = pair_forward(x, projection, relu=False)
    return pair_forward(z, last, shortcut, reuse_residual=True)


def _share_statistics(bn: BatchNorm, other: BatchNorm) -> bool:
    """Whether both, if they normalise by the batch, do so by the batches of the same processes."""
    return not (uses_batch(bn) and uses_batch(other)) or group_of(bn) is group_of(other)


def applies(x: Tensor) -> bool:
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


def is_live(bn: BatchNorm) -> bool:
    """Whether `bn` must see the convolution's output: to normalise by it, or for a gradient.

    The gradient of a folded scale is exact as well, but that of the normalisation's weight would be
    the small difference of two large numbers then.
    """
    parameters = (bn.weight, bn.bias)
    return uses_batch(bn) or (
        torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    )


def pair_forward(
    x: Tensor,
    pair: Pair,
    residual: Tensor | None = None,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    conv, bn = pair
    if not _folds(x) or is_live(bn):
        y = _convolve(x, conv)
        if residual is not None:
            residual = residual.to(y.dtype)  # as in `out += identity`
        return normalization.bn_relu(
            y, batch_norm_args(bn), group_of(bn), residual=residual, relu=relu
        )
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


def _trained_forward(
    x: Tensor,
    pairs: Sequence[Pair],
    projection: Pair | None,
    downsample: Shortcut,
    mode: TrainingMode,
) -> Tensor:
    device_type = x.device.type
    residual = None
    if projection is not None and not _share_statistics(pairs[-1][1], projection[1]):
        residual = pair_forward(x, projection, relu=False)
        projection = None
    elif downsample is not None and projection is None:
        residual = downsample(x)
    autocast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype

    def branch(pair: Pair) -> Branch:
        conv, bn = pair
        geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        weight = conv.weight.to(dtype) if autocast else conv.weight
        return Branch(weight, batch_norm_args(bn), geometry, group_of(bn))

    branches = [branch(pair) for pair in pairs]
    with torch.autocast(device_type, enabled=False):
        return residual_block(
            *(x.to(dtype), branches, None if projection is None else branch(projection)),
            *(None if residual is None else residual.to(dtype), mode),
        )
