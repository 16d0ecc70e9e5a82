"""Batch norm with optional residual, batch norm of the residual, and ReLU: backward.

With dy the gradient of the output where the ReLU passed and xc = x - mean:
  grad_bias = sum(dy), grad_weight = sum(dy * xc) * invstd, grad_residual = dy,
  grad_x = (dy - sum(dy) / n - xc * sum(dy * xc) * invstd^2 / n) * weight * invstd,
without the two middle terms where the running statistics were used. The sums need a pass of their
own only in training. With statistics over several processes each pass is an operator: the sums of
all of them, divided by the n of all of them, are the averages of the second.
"""

import functools
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import activations, device, reductions, tiles
from resnet_fused.triton_kernels.activations import Spread

# Where the sign of the ReLU comes from: there is none, computed again, bits, or its output.
Sign = Literal["none", "recomputed", "mask", "out"]


class Configuration(NamedTuple):
    """How the two passes of the backward are spread over the device."""

    reduction: Spread
    gradients: Spread


@functools.cache
def configurations(
    dual: bool, dtype: torch.dtype, architecture: device.Architecture
) -> tuple[Configuration, ...]:
    """What may be fastest, the static choice first. dual: with a batch norm of the residual."""
    # As many loads in flight whether there are three tensors to read or two.
    vectors = 1 if dual else 2
    # One round of as many programs as registers leave room for: each leaves partial results behind,
    # which are to be combined.
    reduction = Spread(vectors=vectors, columns=16, programs=2, min_tiles=2)
    # Few rounds: each program begins with what is per channel.
    gradients = Spread(vectors=vectors, columns=32, programs=8)
    choices = (
        Configuration(reduction, gradients),
        Configuration(reduction, gradients._replace(vectors=2 * vectors)),
    )
    # 8 TB/s and the same latency: more bytes must be under way than on a Hopper.
    return choices[::-1] if architecture.generation == "blackwell" else choices


@triton.jit
def affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, inside):
    """Mean, invstd, scale and bias of one batch norm."""
    invstd = activations.load_vector(invstd_ptr, channels, inside, 0.0)
    return (
        activations.load_vector(mean_ptr, channels, inside, 0.0),
        invstd,
        invstd * activations.load_vector(weight_ptr, channels, inside, 1.0),
        activations.load_vector(bias_ptr, channels, inside, 0.0),
    )


@triton.jit
def _load_tile(
    tile,
    grad_out_ptr,
    x_ptr,
    residual_ptr,
    sign_ptr,
    mean,
    scale,
    bias,
    residual_mean,
    residual_scale,
    rows,
    run,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Where a tile lies, which of it exists, dy, xc, and rc (or xc where there is no residual)."""
    runs, columns, exists = activations.locate(
        tile, rows, run, channels, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS
    )
    at = runs * run + columns
    dy = tl.load(grad_out_ptr + at, mask=exists, other=0.0).to(tl.float32)
    xc = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
    rc = xc
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=exists, other=0.0).to(tl.float32)
        rc = residual - residual_mean[None, :]
    if SIGN == "recomputed":
        # As the forward computes it, bit by bit.
        total = tiles.scale_shift(xc, scale[None, :], bias[None, :])
        if residual_ptr is not None:
            total = tiles.scale_shift(rc, residual_scale[None, :], total)
        dy = tl.where(activations.passes_relu(total, x_ptr.dtype.element_ty), dy, 0.0)
    elif SIGN == "out":
        out = tl.load(sign_ptr + at, mask=exists, other=0.0).to(tl.float32)
        dy = tl.where(tiles.passes_relu(out), dy, 0.0)
    elif SIGN == "mask":
        byte_runs, bytes_, bytes_exist = activations.locate(
            *(tile, rows, tl.cdiv(run, 8), channels),
            *(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS // 8),
        )
        bytes_at = byte_runs * tl.cdiv(run, 8) + bytes_
        packed = tl.load(sign_ptr + bytes_at, mask=bytes_exist, other=0)
        dy = tl.where(tiles.unpack_bits(packed, BLOCK_ROWS, BLOCK_COLUMNS), dy, 0.0)
    return at, exists, dy, xc, rc


@triton.jit(do_not_specialize=activations.RUNTIME)
def _reduction_kernel(
    grad_out_ptr,
    x_ptr,
    residual_ptr,
    sign_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_mean_ptr,
    residual_invstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    sums_ptr,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    VECTOR: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Sums of dy, dy * xc and, with a batch norm of the residual, dy * rc: (sums, splits, C).

    Reads grad_out and x (and the residual, if it has a batch norm), one element size each per
    element, and 1 bit of mask. Writes grad_residual of a plain residual, if the second pass is to
    read that instead of grad_out and mask. With grad_x it writes all gradients, and there is no
    second pass.
    """
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean, _, scale, bias = affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, own, inside)
    residual_mean, residual_scale = mean, scale
    if residual_ptr is not None:
        residual_mean, _, residual_scale, residual_bias = affine(
            *(residual_mean_ptr, residual_invstd_ptr, residual_weight_ptr, residual_bias_ptr),
            *(own, inside),
        )
        bias += residual_bias
    OWN: tl.constexpr = BLOCK_COLUMNS if CHANNELS_LAST else 1
    GROUPS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // OWN // TERMS
    sum_dy = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    sum_dy_xc = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    sum_dy_rc = tl.zeros((GROUPS, OWN), dtype=tl.float32)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        at, exists, dy, xc, rc = _load_tile(
            *(tile, grad_out_ptr, x_ptr, residual_ptr, sign_ptr),
            *(mean, scale, bias, residual_mean, residual_scale, rows, run, channels),
            *(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, SIGN),
        )
        if grad_x_ptr is not None:
            grad_x = dy * scale[None, :]
            tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)
        if grad_residual_ptr is not None:
            grad_residual = dy
            if residual_ptr is not None:
                grad_residual = dy * residual_scale[None, :]
            grad_residual = grad_residual.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + at, grad_residual, mask=exists)
        sum_dy += _sum_of_terms(dy, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
        sum_dy_xc += _sum_of_terms(dy * xc, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR)
        if residual_ptr is not None:
            sum_dy_rc += _sum_of_terms(
                dy * rc, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR
            )
    step = tl.num_programs(1).to(tl.int64) * channels
    sums_ptr += tl.program_id(1).to(tl.int64) * channels + own
    tl.store(sums_ptr, tl.sum(sum_dy, axis=0), mask=inside)
    tl.store(sums_ptr + step, tl.sum(sum_dy_xc, axis=0), mask=inside)
    if residual_ptr is not None:
        tl.store(sums_ptr + 2 * step, tl.sum(sum_dy_rc, axis=0), mask=inside)


@triton.jit
def _sum_of_terms(
    values,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    return tl.sum(
        activations.terms(values, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, TERMS, VECTOR), axis=0
    )


@triton.jit
def _finalize_branch(
    sum_dy,
    sum_dy_xc,
    invstd_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    own,
    inside,
):
    """Gradients of weight and bias."""
    if grad_weight_ptr is not None:
        grad_weight = sum_dy_xc * activations.load_vector(invstd_ptr, own, inside, 0.0)
        grad_weight = grad_weight.to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + own, grad_weight, mask=inside)
        tl.store(grad_bias_ptr + own, sum_dy.to(grad_bias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_quotient(quotients_ptr, total, divisor, own, inside):
    if quotients_ptr is not None:
        tl.store(quotients_ptr + own, tl.div_rn(total, divisor), mask=inside)


@triton.jit(do_not_specialize=["splits", "channels"])
def _finalize_kernel(
    sums_ptr,
    dy_ptr,
    dy_xc_ptr,
    dy_rc_ptr,
    divisor,
    invstd_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    residual_invstd_ptr,
    residual_grad_weight_ptr,
    residual_grad_bias_ptr,
    splits,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """What follows from the sums, for both batch norms; the sums over `divisor` where wanted."""
    own = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = own < channels
    step = splits.to(tl.int64) * channels
    sum_dy = reductions.summed(sums_ptr, 0, splits, channels, own, BLOCK_ROWS, BLOCK_CHANNELS)
    _store_quotient(dy_ptr, sum_dy, divisor, own, inside)
    sums_ptr += step
    sum_dy_xc = reductions.summed(sums_ptr, 0, splits, channels, own, BLOCK_ROWS, BLOCK_CHANNELS)
    _store_quotient(dy_xc_ptr, sum_dy_xc, divisor, own, inside)
    _finalize_branch(sum_dy, sum_dy_xc, invstd_ptr, grad_weight_ptr, grad_bias_ptr, own, inside)
    if residual_invstd_ptr is not None:
        sums_ptr += step
        sum_dy_rc = reductions.summed(
            sums_ptr, 0, splits, channels, own, BLOCK_ROWS, BLOCK_CHANNELS
        )
        _store_quotient(dy_rc_ptr, sum_dy_rc, divisor, own, inside)
        _finalize_branch(
            *(sum_dy, sum_dy_rc, residual_invstd_ptr, residual_grad_weight_ptr),
            *(residual_grad_bias_ptr, own, inside),
        )


@triton.jit
def gradient(dy, xc, scale, mean_dy, slope):
    """The gradient of the input of one batch norm."""
    return tl.fma(-xc, slope[None, :], dy - mean_dy[None, :]) * scale[None, :]


@triton.jit(do_not_specialize=activations.RUNTIME)
def _gradients_kernel(
    grad_out_ptr,
    x_ptr,
    residual_ptr,
    sign_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_mean_ptr,
    residual_invstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    dy_ptr,
    dy_xc_ptr,
    residual_dy_ptr,
    residual_dy_rc_ptr,
    n_tiles,
    rows,
    run_units,
    channels,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """grad_x and, where it is wanted, grad_residual.

    dy, dy_xc: (C,), averages; None where no batch statistics were used. Reads grad_out and x and
    writes grad_x, one element size each per element; with a batch norm of the residual it reads
    that too and writes its gradient; of a plain residual it writes that, from 1 bit of mask.
    """
    run = run_units * UNIT
    own = activations.own_channels(CHANNELS_LAST, BLOCK_COLUMNS)
    inside = own < channels
    mean, invstd, scale, bias = affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, own, inside)
    residual_mean, residual_invstd, residual_scale = mean, invstd, scale
    if residual_ptr is not None:
        residual_mean, residual_invstd, residual_scale, residual_bias = affine(
            *(residual_mean_ptr, residual_invstd_ptr, residual_weight_ptr, residual_bias_ptr),
            *(own, inside),
        )
        bias += residual_bias
    mean_dy = activations.load_vector(dy_ptr, own, inside, 0.0)
    slope = activations.load_vector(dy_xc_ptr, own, inside, 0.0) * invstd * invstd
    residual_mean_dy = activations.load_vector(residual_dy_ptr, own, inside, 0.0)
    residual_slope = activations.load_vector(residual_dy_rc_ptr, own, inside, 0.0)
    residual_slope = residual_slope * residual_invstd * residual_invstd
    # Backwards: what the reduction has read last is still in the second-level cache.
    for step in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        at, exists, dy, xc, rc = _load_tile(
            *(n_tiles - 1 - step, grad_out_ptr, x_ptr, residual_ptr, sign_ptr),
            *(mean, scale, bias, residual_mean, residual_scale, rows, run, channels),
            *(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLUMNS, SIGN),
        )
        grad_x = gradient(dy, xc, scale, mean_dy, slope)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exists)
        if grad_residual_ptr is not None:
            grad_residual = dy
            if residual_ptr is not None:
                grad_residual = gradient(dy, rc, residual_scale, residual_mean_dy, residual_slope)
            grad_residual = grad_residual.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + at, grad_residual, mask=exists)


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
    has_residual: bool,
    residual: Tensor | None,
    residual_bn: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_invstd: Tensor | None,
    residual_training: bool,
    relu: bool,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.bn_relu_backward` in three launches, two where no batch norm is in training."""
    given = _given(grad_out, x, out, mask, residual if residual_bn else None, relu)
    own, other = _branch(mean, invstd, weight, bias, training), None
    if residual_bn:
        vectors = residual_mean, residual_invstd, residual_weight, residual_bias
        other = _branch(*vectors, residual_training)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    grad_weight, grad_bias = _parameter_gradients(x, weight)
    residual_grads = grad_weight.new_empty(0), grad_weight.new_empty(0)
    if residual_bn:
        residual_grads = _parameter_gradients(x, residual_weight)
    if x.size(1) > 0:
        spreads = configuration or _static_choice(given)
        two_passes = training or (residual_bn and residual_training)
        plain = has_residual and not residual_bn
        writes_residual = has_residual and (plain or not two_passes)
        written = None if two_passes else grad_x, grad_residual if writes_residual else None
        averages = _allocate_sums(given) if two_passes else None
        gradients = (grad_weight, grad_bias), residual_grads if residual_bn else (None, None)
        count = x.numel() // x.size(1)
        _launch_reduction(given, own, other, written, gradients, averages, count, spreads.reduction)
        if averages is not None:
            if plain:  # the first pass has applied the sign to it
                given = given._replace(grad_out=grad_residual, sign="none", source=None)
            written = grad_x, grad_residual if residual_bn else None
            _launch_gradients(given, own, other, written, averages, spreads.gradients)
    return grad_x, grad_weight, grad_bias, grad_residual, *residual_grads


def bn_relu_backward_sums(
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
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_invstd: Tensor | None,
    relu: bool,
    configuration: Configuration | None = None,
) -> Tensor:
    """`reference.bn_relu_backward_sums` in two launches."""
    given = _given(grad_out, x, out, mask, residual if residual_bn else None, relu)
    own, other = _branch(mean, invstd, weight, bias, training=False), None
    if residual_bn:
        vectors = residual_mean, residual_invstd, residual_weight, residual_bias
        other = _branch(*vectors, training=False)
    sums = _allocate_sums(given)
    if x.size(1) > 0:
        spread = (configuration or _static_choice(given)).reduction
        nothing = None, None
        _launch_reduction(given, own, other, nothing, (nothing, nothing), sums, 1, spread)
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
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.bn_relu_backward_apply` in one launch."""
    given = _given(grad_out, x, out, mask, residual if residual_bn else None, relu)
    own, other = _branch(mean, invstd, weight, bias, training), None
    if residual_bn:
        vectors = residual_mean, residual_invstd, residual_weight, residual_bias
        other = _branch(*vectors, residual_training)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if has_residual else x.new_empty(0)
    if x.size(1) > 0:
        spread = (configuration or _static_choice(given)).gradients
        written = grad_x, grad_residual if has_residual else None
        _launch_gradients(given, own, other, written, averages, spread)
    return grad_x, grad_residual


class _Given(NamedTuple):
    """What both passes read. residual: the one that is normalised; source: what has the sign."""

    grad_out: Tensor
    x: Tensor
    residual: Tensor | None
    sign: Sign
    source: Tensor | None

    def plan(self, spread: Spread, *written: Tensor | None) -> activations.Plan:
        # The bits of a mask lie in bytes, whatever the activations are aligned to.
        out = self.source if self.sign == "out" else None
        return activations.plan(spread, self.x, self.grad_out, self.residual, out, *written)


def _given(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> _Given:
    if not relu:
        return _Given(grad_out, x, residual, "none", None)
    if mask is not None:
        return _Given(grad_out, x, residual, "mask", mask)
    return _Given(grad_out, x, residual, "recomputed" if out is None else "out", out)


def _static_choice(given: _Given) -> Configuration:
    dual, x = given.residual is not None, given.x
    return configurations(dual, x.dtype, device.architecture(x))[0]


class _Branch(NamedTuple):
    """One batch norm: mean, invstd, weight and bias; whether it used batch statistics."""

    affine: tuple[Tensor | None, ...]
    training: bool


def _branch(
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> _Branch:
    return _Branch(tuple(map(activations.dense_vector, (mean, invstd, weight, bias))), training)


def _parameter_gradients(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if weight is None else weight.dtype
    return x.new_empty(x.size(1), dtype=dtype), x.new_empty(x.size(1), dtype=dtype)


def _allocate_sums(given: _Given) -> Tensor:
    rows = 2 if given.residual is None else 3
    return given.x.new_empty((rows, given.x.size(1)), dtype=torch.float32)


_NO_AFFINE = (None,) * 4


def _launch_reduction(
    given: _Given,
    own: _Branch,
    other: _Branch | None,
    written: tuple[Tensor | None, Tensor | None],
    gradients: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]],
    quotients: Tensor | None,
    divisor: int,
    spread: Spread,
) -> None:
    """written: grad_x, grad_residual; gradients: of both batch norms' weight and bias.

    quotients: (sums, C), for the sums over `divisor`. All of them may be None.
    """
    grad_out, x, residual, sign, source = given
    channels = x.size(1)
    plan = given.plan(spread, *written)
    sums = x.new_empty((2 if other is None else 3, plan.splits, channels), dtype=torch.float32)
    other_affine = _NO_AFFINE if other is None else other.affine
    arguments = grad_out, x, residual, source, *written, *own.affine, *other_affine, sums
    activations.launch(_reduction_kernel, plan, arguments, plan.terms | {"SIGN": sign})
    rows = () if quotients is None else quotients.unbind()
    block_rows, block_channels = reductions.block(plan.splits)
    with device.guard(x):
        _finalize_kernel[(triton.cdiv(channels, block_channels),)](
            *(sums, *rows, *(None,) * (3 - len(rows)), float(divisor)),
            *(own.affine[1], *gradients[0], other_affine[1], *gradients[1]),
            *(plan.splits, channels, block_rows, block_channels),
            num_warps=reductions.WARPS,
            enable_fp_fusion=False,
        )


def _launch_gradients(
    given: _Given,
    own: _Branch,
    other: _Branch | None,
    written: tuple[Tensor | None, Tensor | None],
    averages: Tensor,
    spread: Spread,
) -> None:
    """written: grad_x, grad_residual, which may be None."""
    grad_out, x, residual, sign, source = given
    other_affine = _NO_AFFINE if other is None else other.affine
    own_averages = averages[:2].unbind() if own.training else (None, None)
    other_training = other is not None and other.training
    other_averages = averages[::2].unbind() if other_training else (None, None)
    arguments = (
        *(grad_out, x, residual, source, *written, *own.affine, *other_affine),
        *(*own_averages, *other_averages),
    )
    plan = given.plan(spread, *written)
    activations.launch(_gradients_kernel, plan, arguments, {"SIGN": sign})
