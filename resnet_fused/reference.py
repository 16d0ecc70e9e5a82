"""Every operator in plain PyTorch: the oracle, the fallback and the baseline.

Runs on any device and in float64. Signatures are those of the operators in `resnet_fused.ops`,
where shapes are described. Arithmetic is in float32 (float64 for float64 activations) with one
rounding at the end; every function is differentiable by autograd.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from resnet_fused.layout import mask_shape, memory_format

_CHANNEL_DIMS = (0, 2, 3)
# In place of the maximum's position in a pooling window: the ReLU in front lets no gradient pass.
CLOSED = 255


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of means, inverse standard deviations and arithmetic for activations like `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def add_relu_backward(grad_out: Tensor, out: Tensor) -> Tensor:
    # Not masked_fill, which loses channels_last where H or W is 1.
    return torch.where(out <= 0, 0, grad_out)


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
    updates: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """updates: gets the new running statistics, in order, which then stay what they are."""
    mean, invstd = _statistics(x, running_mean, running_var, training, momentum, eps, updates)
    total = _affine(x, weight, bias, mean, invstd)
    residual_mean, residual_invstd = mean.new_empty(0), mean.new_empty(0)
    if residual is not None and residual_bn:
        residual_mean, residual_invstd = _statistics(
            residual,
            residual_running_mean,
            residual_running_var,
            residual_training,
            residual_momentum,
            residual_eps,
            updates,
        )
        total = total + _affine(
            residual, residual_weight, residual_bias, residual_mean, residual_invstd
        )
    elif residual is not None:
        total = total + residual
    out = (torch.relu(total) if relu else total).to(x.dtype)
    mask = _pack_mask(out, x) if save_mask else x.new_empty(0, dtype=torch.uint8)
    return out, mean, invstd, residual_mean, residual_invstd, mask


def bn_relu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
) -> Tensor:
    out = _affine(x, weight, bias, mean, invstd)
    return (torch.relu(out) if relu else out).to(x.dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = _Branch(x, weight, bias, mean, invstd)
    other = _residual_branch(
        residual, residual_bn, residual_weight, residual_bias, residual_mean, residual_invstd
    )
    grad = _behind_relu(grad_out, out, mask, own, other, relu)
    sums = _gradient_sums(grad, own, other)
    averages = sums / max(_values_per_channel(x), 1)
    grad_x = _bn_gradient(grad, own, training, averages[:2])
    grad_weight, grad_bias = _parameter_gradients(own, sums[:2])
    grad_residual = x.new_empty(0)
    grad_residual_weight, grad_residual_bias = grad_weight.new_empty(0), grad_weight.new_empty(0)
    if other is not None:
        grad_residual = _bn_gradient(grad, other, residual_training, averages[::2])
        grad_residual_weight, grad_residual_bias = _parameter_gradients(other, sums[::2])
    elif has_residual:
        grad_residual = grad.to(x.dtype, copy=grad is grad_out)  # outputs never alias arguments
    return (
        grad_x,
        grad_weight,
        grad_bias,
        grad_residual,
        grad_residual_weight,
        grad_residual_bias,
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
    residual: Tensor | None,
    residual_bn: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_invstd: Tensor | None,
    relu: bool,
) -> Tensor:
    own = _Branch(x, weight, bias, mean, invstd)
    other = _residual_branch(
        residual, residual_bn, residual_weight, residual_bias, residual_mean, residual_invstd
    )
    grad = _behind_relu(grad_out, out, mask, own, other, relu)
    return _gradient_sums(grad, own, other).to(statistics_dtype(x))


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
    own = _Branch(x, weight, bias, mean, invstd)
    other = _residual_branch(
        residual, residual_bn, residual_weight, residual_bias, residual_mean, residual_invstd
    )
    grad = _behind_relu(grad_out, out, mask, own, other, relu)
    grad_x = _bn_gradient(grad, own, training, averages[:2])
    if other is not None:
        return grad_x, _bn_gradient(grad, other, residual_training, averages[::2])
    if has_residual:
        return grad_x, grad.to(x.dtype, copy=grad is grad_out)
    return grad_x, x.new_empty(0)


def bn_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        mean, m2 = x.new_zeros((2, x.size(1)), dtype=statistics_dtype(x)).unbind()
        return mean, m2
    mean, var = batch_moments(x)
    return mean, var * _values_per_channel(x)


def bn_relu_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    updates: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """updates: as in `bn_relu`."""
    mean, invstd = _statistics(x, running_mean, running_var, training, momentum, eps, updates)
    # The maximum is that of the unrounded values: rounded ones would be equal more often.
    total = _affine(x, weight, bias, mean, invstd)
    windows = tuple(kernel_size), tuple(stride), tuple(padding)
    highest, indices = F.max_pool2d(total, *windows, return_indices=True)
    r, s = (
        index - start
        for index, start in zip(
            (indices // x.size(3), indices % x.size(3)),
            _window_starts(highest, stride, padding),
            strict=True,
        )
    )
    argmax = torch.where(highest <= 0, CLOSED, r * kernel_size[1] + s).to(torch.uint8)
    format_ = memory_format(x)
    out = torch.relu(highest).to(x.dtype).contiguous(memory_format=format_)
    return out, mean, invstd, argmax.contiguous(memory_format=format_)


def bn_relu_max_pool_backward_sums(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    dtype = statistics_dtype(x)
    starts = _window_starts(argmax, stride, padding)
    taps = argmax // kernel_size[1], argmax % kernel_size[1]
    h, w = (
        (start + tap).clamp(0, size - 1)
        for start, tap, size in zip(starts, taps, x.shape[2:], strict=True)
    )
    chosen = x.to(dtype).flatten(2).gather(2, (h * x.size(3) + w).flatten(2)).view(argmax.shape)
    passes = argmax != CLOSED
    grad = torch.where(passes, grad_out.to(dtype), 0)
    centred = torch.where(passes, chosen - _per_channel(mean, dtype), 0)
    return torch.stack([grad.sum(_CHANNEL_DIMS), (grad * centred).sum(_CHANNEL_DIMS)])


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
    dtype = statistics_dtype(x)
    taps = torch.arange(kernel_size[0] * kernel_size[1], dtype=torch.uint8, device=x.device)
    is_chosen = argmax.unsqueeze(2) == taps.view(-1, 1, 1)
    by_tap = torch.where(is_chosen, grad_out.to(dtype).unsqueeze(2), 0).flatten(1, 2).flatten(2)
    # Unlike a scatter it adds in a fixed order.
    grad = F.fold(
        *(by_tap, x.shape[2:], tuple(kernel_size)), padding=tuple(padding), stride=tuple(stride)
    )
    if training:
        centred = (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(invstd.square(), dtype)
        average, slope = (_per_channel(row, dtype) for row in averages)
        grad = grad - average - centred * slope
    scale = invstd if weight is None else invstd * weight.to(dtype)
    grad_x = (grad * _per_channel(scale, dtype)).to(x.dtype)
    return grad_x.contiguous(memory_format=memory_format(x))


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)
    out = _scale_shift(y, scale, shift)
    if residual is not None:
        out = out + residual
    out = (torch.relu(out) if relu else out).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x))


def conv_bn_relu_(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    residual.copy_(
        conv_bn_relu(x, weight, scale, shift, residual, relu, stride, padding, dilation, groups)
    )


def conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor | None,
    has_residual: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x)
    grad = grad_out if out is None else add_relu_backward(grad_out, out)
    scaled = (weight.to(dtype) * scale.to(dtype).view(-1, 1, 1, 1)).to(x.dtype)
    grad_x, grad_scaled, _ = torch.ops.aten.convolution_backward(
        grad, x, scaled, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )
    grad_weight = (grad_scaled.to(dtype) * scale.to(dtype).view(-1, 1, 1, 1)).to(weight.dtype)
    grad_shift = grad.to(dtype).sum(_CHANNEL_DIMS).to(scale.dtype)
    grad_x = grad_x.contiguous(memory_format=memory_format(x))
    grad_residual = grad if has_residual else grad.new_empty(0)
    return grad_x, grad_weight, grad_shift, grad_residual


def bottleneck_tail(
    y1: Tensor,
    residual: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
) -> Tensor:
    y2 = _relu_of_convolution(y1, weight2, scale2, shift2)
    return _relu_of_convolution(y2, weight3, scale3, shift3, residual)


def bottleneck_roll(
    y1: Tensor,
    residual: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    next_weight1: Tensor,
    next_scale1: Tensor,
    next_shift1: Tensor,
) -> tuple[Tensor, Tensor]:
    out = bottleneck_tail(y1, residual, weight2, scale2, shift2, weight3, scale3, shift3)
    return out, _relu_of_convolution(out, next_weight1, next_scale1, next_shift1)


def bottleneck_block(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
) -> Tensor:
    y1 = _relu_of_convolution(x, weight1, scale1, shift1)
    return bottleneck_tail(y1, x, weight2, scale2, shift2, weight3, scale3, shift3)


def conv_projection_relu(
    y: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    projection_weight: Tensor,
    projection_scale: Tensor,
    projection_shift: Tensor,
    stride: Sequence[int],
) -> Tensor:
    main = _scale_shift(F.conv2d(y, weight.to(y.dtype)), scale, shift)
    projection = F.conv2d(x, projection_weight.to(x.dtype), None, stride)
    projection = _scale_shift(projection, projection_scale, projection_shift)
    out = torch.relu(main + projection).to(y.dtype)
    return out.contiguous(memory_format=memory_format(y))


def conv_stats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    p = _scale_shift_relu(x, scale, shift)
    y = F.conv2d(p, weight.to(x.dtype), None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=memory_format(x))
    return y, *bn_statistics(y)


def conv_dgrad(
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(grad_y)
    format_ = memory_format(grad_y if x is None else x)
    grad_conv, grad = grad_y.new_empty(0), grad_y
    if y is not None and coefficients is not None:
        grad = grad_conv = combine(grad_y, y, coefficients).contiguous(memory_format=format_)
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    geometry = stride, padding, dilation, groups
    grad = conv2d_input(shape, weight.to(grad.dtype), grad, *geometry).to(dtype)
    if residual is not None:
        grad = grad + residual
    if x is not None and scale is not None and shift is not None:
        grad = torch.where(_scale_shift(x, scale, shift) <= 0, 0, grad)
    elif mask is not None:
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad = torch.where(unpack_mask(mask, grad), grad, 0)
    sum_grad, sum_grad_x = grad.new_empty(0), grad.new_empty(0)
    if x is not None and mean is not None:
        sum_grad = grad.sum(_CHANNEL_DIMS)
        sum_grad_x = (grad * (x.to(dtype) - _per_channel(mean, dtype))).sum(_CHANNEL_DIMS)
    grad_x = grad.to(grad_y.dtype).contiguous(memory_format=format_)
    return grad_x, sum_grad, sum_grad_x, grad_conv


def conv_wgrad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    p = _scale_shift_relu(x, scale, shift)
    geometry = stride, padding, dilation, groups
    return conv2d_weight(p, weight.shape, grad_y, *geometry).to(weight.dtype)


def combine(grad_y: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """Per channel a * grad_y + (b * y + d), where coefficients is (a, b, d), of shape (3, K)."""
    dtype = statistics_dtype(y)
    a, b, d = (_per_channel(row, dtype) for row in coefficients)
    return (a * grad_y.to(dtype) + (b * y.to(dtype) + d)).to(y.dtype)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H and W, both (C,), differentiable."""
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), _CHANNEL_DIMS, correction=0)
    return mean, var


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    updates: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("bn_relu: running_mean and running_var must be given in evaluation")
        return running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()
    mean, var = batch_moments(x)
    count = x.numel() // x.size(1)
    with torch.no_grad():
        if running_mean is not None:
            _move(running_mean, mean, momentum, updates)
        if running_var is not None:
            _move(running_var, var * (count / (count - 1)), momentum, updates)
    return mean, (var + eps).rsqrt()


def _move(running: Tensor, value: Tensor, momentum: float, updates: list[Tensor] | None) -> None:
    value = value.to(running.dtype)
    if updates is None:
        running.mul_(1 - momentum).add_(value, alpha=momentum)
    else:
        updates.append((running * (1 - momentum)).add(value, alpha=momentum))


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
) -> Tensor:
    dtype = mean.dtype
    branch = _Branch(x, weight, bias, mean, invstd)
    out = branch.centered() * _per_channel(branch.scale(), dtype)
    return out if bias is None else out + _per_channel(bias, dtype)


class _Branch(NamedTuple):
    """What goes into the ReLU: an activation, normalised by what was saved in the forward."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor

    def scale(self) -> Tensor:
        return self.invstd if self.weight is None else self.invstd * self.weight.to(self.mean.dtype)

    def centered(self) -> Tensor:
        return self.x.to(self.mean.dtype) - _per_channel(self.mean, self.mean.dtype)


def _residual_branch(
    residual: Tensor | None,
    residual_bn: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
) -> _Branch | None:
    """None where the residual has no batch norm, or there is none."""
    if not residual_bn:
        return None
    if residual is None or mean is None or invstd is None:
        raise ValueError("bn_relu_backward: residual_bn needs residual and its statistics")
    return _Branch(residual, weight, bias, mean, invstd)


def _behind_relu(
    grad_out: Tensor,
    out: Tensor | None,
    mask: Tensor | None,
    own: _Branch,
    other: _Branch | None,
    relu: bool,
) -> Tensor:
    """grad_out where the ReLU passed, else 0."""
    grad = grad_out.to(own.mean.dtype)
    if not relu:
        return grad
    if mask is not None:
        return torch.where(unpack_mask(mask, own.x), grad, 0)
    if out is None:
        out = _affine(*own) if other is None else _affine(*own) + _affine(*other)
    return torch.where(out <= 0, 0, grad)


def _gradient_sums(grad: Tensor, *branches: _Branch | None) -> Tensor:
    """(1 + branches, C): the sum of grad, then that of grad * (x - mean) of every branch."""
    products = [grad * branch.centered() for branch in branches if branch is not None]
    # Image by image: the error grows with how many terms are added in a row.
    return torch.stack([each.sum((2, 3)).sum(0) for each in (grad, *products)])


def _bn_gradient(grad: Tensor, branch: _Branch, training: bool, averages: Tensor) -> Tensor:
    """The gradient of branch.x; averages: (2, C), of grad and of grad * (x - mean)."""
    dtype = grad.dtype
    if training:
        slope = averages[1] * branch.invstd.square()
        grad = grad - _per_channel(averages[0], dtype)
        grad = grad - branch.centered() * _per_channel(slope, dtype)
    return (grad * _per_channel(branch.scale(), dtype)).to(branch.x.dtype)


def _parameter_gradients(branch: _Branch, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias, in the dtype of the weight; sums: as `_bn_gradient`'s averages."""
    dtype = sums.dtype if branch.weight is None else branch.weight.dtype
    # Copied, because outputs never alias each other.
    return (sums[1] * branch.invstd).to(dtype), sums[0].to(dtype, copy=True)


def _pack_mask(out: Tensor, x: Tensor) -> Tensor:
    """One bit per element, 1 where a gradient passes the ReLU; laid out as `mask_shape(x)` says."""
    runs, run_bytes = mask_shape(x)
    run = x.size(2) * x.size(3)
    if x.is_contiguous(memory_format=torch.channels_last):
        out, run = out.permute(0, 2, 3, 1), x.size(1)
    passes = ~(out <= 0).reshape(runs, run)
    bits = F.pad(passes, (0, 8 * run_bytes - run)).view(runs, run_bytes, 8)
    return (bits << _bit_positions(x)).sum(2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Where the bits of a mask, laid out as `mask_shape(x)` says, are set; of the shape of x."""
    n, c, h, w = x.shape
    bits = (mask.unsqueeze(2) >> _bit_positions(x) & 1).bool().flatten(1)
    if x.is_contiguous(memory_format=torch.channels_last):
        return bits[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)
    return bits[:, : h * w].reshape(n, c, h, w)


def _bit_positions(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)


def _relu_of_convolution(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> Tensor:
    """conv_bn_relu with a stride of 1, for a kernel of 1x1 or 3x3 that keeps the image size."""
    padding = (weight.size(2) // 2, weight.size(3) // 2)
    return conv_bn_relu(x, weight, scale, shift, residual, True, (1, 1), padding, (1, 1), groups=1)


def _scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    dtype = statistics_dtype(x)
    return x.to(dtype) * _per_channel(scale, dtype) + _per_channel(shift, dtype)


def _scale_shift_relu(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return x
    return torch.relu(_scale_shift(x, scale, shift)).to(x.dtype)


def _values_per_channel(x: Tensor) -> int:
    return x.size(0) * x.size(2) * x.size(3)


def _window_starts(
    pooled: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """First row, (P, 1), and first column, (Q,), of each pooling window; negative in padding."""
    p, q = (
        torch.arange(size, device=pooled.device) * step - before
        for size, step, before in zip(pooled.shape[2:], stride, padding, strict=True)
    )
    return p.view(-1, 1), q


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).view(1, -1, 1, 1)
