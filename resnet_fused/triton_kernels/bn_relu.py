"""Batch norm with optional residual, batch norm of the residual, and ReLU: forward."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.layout import mask_shape
from resnet_fused.triton_kernels import activations, bn_statistics, device, tiles
from resnet_fused.triton_kernels.activations import Spread
from resnet_fused.triton_kernels.bn_relu_backward import (
    bn_relu_backward,
    bn_relu_backward_apply,
    bn_relu_backward_sums,
)

__all__ = [
    "bn_relu",
    "bn_relu_apply",
    "bn_relu_backward",
    "bn_relu_backward_apply",
    "bn_relu_backward_sums",
]

_NO_BATCH_NORM: tuple[Any, ...] = (None, None, 0.0, None, None, None, None)


class Configuration(NamedTuple):
    """How the two passes of the forward are spread over the device."""

    statistics: Spread
    apply: Spread


@functools.cache
def configurations(
    has_residual: bool, dtype: torch.dtype, architecture: device.Architecture
) -> tuple[Configuration, ...]:
    """What may be fastest, the static choice first."""
    # As many loads in flight whether there are two tensors to read or one. Few rounds of programs:
    # each of them begins with what is per channel.
    apply = Spread(vectors=2 if has_residual else 4, columns=32, programs=8)
    deeper = apply._replace(vectors=2 * apply.vectors)
    statistics = bn_statistics.SPREAD
    return Configuration(statistics, apply), Configuration(statistics, deeper)


@triton.jit
def used_statistics(mean_ptr, spread_ptr, eps, saved_mean_ptr, saved_invstd_ptr, channels, inside):
    """Mean and invstd. The spread is a variance where there is room to save both, else invstd."""
    mean = activations.load_vector(mean_ptr, channels, inside, 0.0)
    spread = activations.load_vector(spread_ptr, channels, inside, 0.0)
    if saved_mean_ptr is not None:
        spread = activations.inverse_deviation(spread, eps)
        if tl.program_id(1) == 0:
            tl.store(saved_mean_ptr + channels, mean, mask=inside)
            tl.store(saved_invstd_ptr + channels, spread, mask=inside)
    return mean, spread


@triton.jit(do_not_specialize=activations.RUNTIME)
def _apply_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    mask_ptr,
    mean_ptr,
    spread_ptr,
    eps,
    saved_mean_ptr,
    saved_invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_mean_ptr,
    residual_spread_ptr,
    residual_eps,
    residual_saved_mean_ptr,
    residual_saved_invstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Computes act(batch norm of x + residual, or its batch norm where it has a mean).

    Reads x (and the residual) and writes out, one element size each per element, and 1 bit of
    mask.
    """
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean, invstd = used_statistics(
        mean_ptr, spread_ptr, eps, saved_mean_ptr, saved_invstd_ptr, own, inside
    )
    scale = invstd * activations.load_vector(weight_ptr, own, inside, 1.0)
    bias = activations.load_vector(bias_ptr, own, inside, 0.0)
    if residual_mean_ptr is not None:
        residual_mean, residual_invstd = used_statistics(
            *(residual_mean_ptr, residual_spread_ptr, residual_eps),
            *(residual_saved_mean_ptr, residual_saved_invstd_ptr, own, inside),
        )
        residual_weight = activations.load_vector(residual_weight_ptr, own, inside, 1.0)
        residual_scale = residual_invstd * residual_weight
        bias += activations.load_vector(residual_bias_ptr, own, inside, 0.0)
    # Backwards: what an earlier pass has read last is still in the second-level cache.
    for step in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        tile = n_tiles - 1 - step
        runs, columns, exists = activations.locate(
            tile, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
        )
        at = runs * run + columns
        x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
        total = tiles.scale_shift(x - mean[None, :], scale[None, :], bias[None, :])
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + at, mask=exists, other=0.0).to(tl.float32)
            if residual_mean_ptr is not None:
                residual -= residual_mean[None, :]
                total = tiles.scale_shift(residual, residual_scale[None, :], total)
            else:
                total += residual
        if mask_ptr is not None:
            passes = activations.passes_relu(total, out_ptr.dtype.element_ty) & exists
            byte_runs, bytes_, bytes_exist = activations.locate(
                *(tile, rows, tl.cdiv(run, 8), channels),
                *(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS // 8),
            )
            packed = tiles.pack_bits(passes, BLOCK_ROWS, BLOCK_COLUMNS)
            bytes_at = byte_runs * tl.cdiv(run, 8) + bytes_
            tl.store(mask_ptr + bytes_at, packed, mask=bytes_exist)
        if RELU:
            total = tiles.relu(total)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=exists)


def bn_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    residual_bn: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    residual_training: bool,
    residual_momentum: float,
    residual_eps: float,
    relu: bool,
    save_mask: bool,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.bn_relu`; at most three launches, and two more for a residual_bn in training."""
    spreads = configuration or _static_choice(x, residual)
    own = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps)
    mean, invstd, bn = normalisation(x, own, spreads.statistics)
    residual_mean, residual_invstd, other = mean.new_empty(0), mean.new_empty(0), _NO_BATCH_NORM
    if residual is not None and residual_bn:
        of_residual = BatchNorm(
            *(residual_weight, residual_bias, residual_running_mean, residual_running_var),
            *(residual_training, residual_momentum, residual_eps),
        )
        residual_mean, residual_invstd, other = normalisation(
            residual, of_residual, spreads.statistics
        )
    mask = x.new_empty(mask_shape(x) if save_mask else (0,), dtype=torch.uint8)
    out = _apply(x, residual, mask if save_mask else None, bn, other, relu, spreads)
    return out, mean, invstd, residual_mean, residual_invstd, mask


def bn_relu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    configuration: Configuration | None = None,
) -> Tensor:
    """`reference.bn_relu_apply` in one launch."""
    mean_, invstd_, weight_, bias_ = map(activations.dense_vector, (mean, invstd, weight, bias))
    bn = mean_, invstd_, 0.0, None, None, weight_, bias_
    spreads = configuration or _static_choice(x, None)
    return _apply(x, None, None, bn, _NO_BATCH_NORM, relu, spreads)


def _static_choice(x: Tensor, residual: Tensor | None) -> Configuration:
    return configurations(residual is not None, x.dtype, device.architecture(x))[0]


class BatchNorm(NamedTuple):
    """One batch norm, as the operator is given it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def normalisation(
    x: Tensor, bn: BatchNorm, spread: Spread
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Mean, invstd, and what `_apply_kernel` is told of one batch norm.

    In evaluation the two are for that kernel to write.
    """
    mean, invstd = (x.new_empty(x.size(1), dtype=torch.float32) for _ in range(2))
    affine = activations.dense_vector(bn.weight), activations.dense_vector(bn.bias)
    buffers = bn.running_mean, bn.running_var
    running = tuple(map(activations.dense_vector, buffers))
    if not bn.training:
        return mean, invstd, (*running, bn.eps, mean, invstd, *affine)
    if x.size(1) > 0:
        results = mean, invstd, None, *running, bn.momentum, bn.eps
        bn_statistics.launch_statistics(x, results, spread)
    for buffer, updated in zip(buffers, running, strict=True):
        if buffer is not None and updated is not None and buffer is not updated:
            buffer.copy_(updated)
    return mean, invstd, (mean, invstd, 0.0, None, None, *affine)


def _apply(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    bn: tuple[Any, ...],
    residual_bn: tuple[Any, ...],
    relu: bool,
    spreads: Configuration,
) -> Tensor:
    out = torch.empty_like(x)
    if x.size(1) > 0:
        plan = activations.plan(spreads.apply, x, residual, out)
        arguments = x, residual, out, mask, *bn, *residual_bn
        activations.launch(_apply_kernel, plan, arguments, {"RELU": relu})
    return out
