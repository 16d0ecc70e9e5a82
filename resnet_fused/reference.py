"""Every operator in plain PyTorch: the oracle, the fallback and the baseline.

Runs on any device and in float64. Signatures are those of the operators in `resnet_fused.ops`,
where shapes are described. Arithmetic is in float32 (float64 for float64 activations) with one
rounding at the end; every function is differentiable by autograd.
"""

from collections.abc import Sequence

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, invstd = _statistics(x, running_mean, running_var, training, momentum, eps)
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
    if residual_bn and (residual is None or residual_mean is None or residual_invstd is None):
        raise ValueError("bn_relu_backward: residual_bn needs residual and its statistics")
    grad = grad_out.to(mean.dtype)
    if relu and mask is not None:
        grad = torch.where(_unpack_mask(mask, x), grad, 0)
    elif relu:
        total = out
        if total is None:
            total = _affine(x, weight, bias, mean, invstd)
            if residual is not None and residual_mean is not None and residual_invstd is not None:
                total = total + _affine(
                    residual, residual_weight, residual_bias, residual_mean, residual_invstd
                )
        grad = torch.where(total <= 0, 0, grad)
    grad_x, grad_weight, grad_bias = _bn_backward(grad, x, weight, mean, invstd, training)
    grad_residual = x.new_empty(0)
    grad_residual_weight, grad_residual_bias = grad_weight.new_empty(0), grad_weight.new_empty(0)
    if residual is not None and residual_mean is not None and residual_invstd is not None:
        grad_residual, grad_residual_weight, grad_residual_bias = _bn_backward(
            grad, residual, residual_weight, residual_mean, residual_invstd, residual_training
        )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, invstd = _statistics(x, running_mean, running_var, training, momentum, eps)
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
    dtype = statistics_dtype(x)
    count = y.size(0) * y.size(2) * y.size(3)
    mean = y.to(dtype).sum(_CHANNEL_DIMS) / max(count, 1)
    m2 = (y.to(dtype) - _per_channel(mean, dtype)).square().sum(_CHANNEL_DIMS)
    return y, mean, m2


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
        grad = torch.where(_unpack_mask(mask, grad), grad, 0)
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
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    return mean, (var + eps).rsqrt()


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
) -> Tensor:
    dtype = mean.dtype
    scale = invstd if weight is None else invstd * weight.to(dtype)
    out = (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(scale, dtype)
    return out if bias is None else out + _per_channel(bias, dtype)


def _bn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = mean.dtype
    xhat = (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(invstd, dtype)
    sum_grad = grad.sum(_CHANNEL_DIMS)
    sum_grad_xhat = (grad * xhat).sum(_CHANNEL_DIMS)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    if training:
        count = x.numel() // x.size(1)
        grad = (
            grad
            - _per_channel(sum_grad / count, dtype)
            - xhat * _per_channel(sum_grad_xhat / count, dtype)
        )
    grad_x = (grad * _per_channel(scale, dtype)).to(x.dtype)
    parameter_dtype = dtype if weight is None else weight.dtype
    return grad_x, sum_grad_xhat.to(parameter_dtype), sum_grad.to(parameter_dtype)


def _pack_mask(out: Tensor, x: Tensor) -> Tensor:
    """One bit per element, 1 where a gradient passes the ReLU; laid out as `mask_shape(x)` says."""
    runs, run_bytes = mask_shape(x)
    if x.is_contiguous(memory_format=torch.channels_last):
        out = out.permute(0, 2, 3, 1)
    passes = ~(out <= 0).reshape(runs, -1)
    bits = F.pad(passes, (0, 8 * run_bytes - passes.size(1))).view(runs, run_bytes, 8)
    return (bits << _bit_positions(x)).sum(2, dtype=torch.uint8)


def _unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
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
