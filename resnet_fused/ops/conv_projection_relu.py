"""conv_projection_relu: the last convolution of a Bottleneck and its shortcut's projection."""

from collections.abc import Sequence

from torch import Tensor

from resnet_fused import backends
from resnet_fused.layout import convolution_shape, memory_format
from resnet_fused.ops import _bottleneck, _checks, _convolution
from resnet_fused.ops._registration import autocast, call, define, refuse_gradient


def conv_projection_relu(
    y: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    projection_weight: Tensor,
    projection_scale: Tensor,
    projection_shift: Tensor,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """relu(conv2d(y, weight) * scale + shift + projection(x)), the sum of two 1x1 convolutions.

    projection(x) = conv2d(x, projection_weight, stride=stride) * projection_scale +
    projection_shift: the end of a Bottleneck that changes its shape, in inference. The channels of
    x are further input channels of the last convolution, so that the shortcut is never written.
    y: (N, M, P, Q); x: (N, C, H, W); weight: (K, M, 1, 1); projection_weight: (K, C, 1, 1);
    scales and shifts: (K,); out: (N, K, P, Q). Equivalent to two calls of `conv_bn_relu` with one
    rounding, and its notes on weights, autocast and memory formats hold here too, with y in place
    of x.

    Raises ValueError on mismatched shapes or devices and on a stride that does not bring x to the
    size of y, TypeError on unequal dtypes of y and x and on tensors that are not floating point,
    RuntimeError where a gradient is needed.
    """
    operator = "conv_projection_relu"
    _checks.check_tensors(operator, y=y, x=x)
    return call(
        *(_conv_projection_relu, y, weight, scale, shift, x),
        *(projection_weight, projection_scale, projection_shift),
        _convolution.pair(operator, "stride", stride),
    )


def _check(
    y: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    x: Tensor,
    projection_weight: Tensor,
    projection_scale: Tensor,
    projection_shift: Tensor,
    stride: Sequence[int],
) -> tuple[int, ...]:
    """(N, K, P, Q), the shape of the output."""
    operator = "conv_projection_relu"
    _bottleneck.check_image(operator, "y", y)
    _bottleneck.check_image(operator, "x", x)
    layer = weight, scale, shift
    kernels = _bottleneck.check_layer(operator, "{}", layer, y.size(1), 1, "y", y)
    projection = projection_weight, projection_scale, projection_shift
    names = "projection_{}"
    _bottleneck.check_layer(operator, names, projection, x.size(1), 1, "y", y, kernels=kernels)
    if min(stride) < 1:
        raise ValueError(f"{operator}: stride must be at least 1, got {tuple(stride)}")
    projected = convolution_shape(x.shape, projection_weight.shape, stride, (0, 0), (1, 1))
    shape = (y.size(0), kernels, *y.shape[2:])
    if projected != shape:
        raise ValueError(
            f"{operator}: x must give {shape} as y does, got {tuple(x.shape)}, which stride"
            f" {tuple(stride)} brings to {projected}"
        )
    _convolution.check_device_and_dtype(operator, "x", x, "y", y)
    return shape


def _kernel(
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
    projection = projection_weight, projection_scale, projection_shift
    _check(y, weight, scale, shift, x, *projection, stride)
    format_ = memory_format(y)
    out: Tensor = backends.choose("conv_projection_relu", y)(
        *(y.contiguous(memory_format=format_), weight, scale, shift),
        *(x.contiguous(memory_format=format_), *projection, stride),
    )
    # With one channel in, y has both formats now, and out has one of them.
    return out.contiguous(memory_format=format_)


def _fake(
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
    projection = projection_weight, projection_scale, projection_shift
    shape = _check(y, weight, scale, shift, x, *projection, stride)
    return y.new_empty(shape).contiguous(memory_format=memory_format(y))


_conv_projection_relu = define(
    "conv_projection_relu(Tensor y, Tensor weight, Tensor scale, Tensor shift, Tensor x,"
    " Tensor projection_weight, Tensor projection_scale, Tensor projection_shift,"
    " SymInt[2] stride) -> Tensor",
    _kernel,
    _fake,
    refuse_gradient("conv_projection_relu", "use conv_bn_relu, or torch.no_grad()"),
    images=(0, 4),
)
autocast(_conv_projection_relu, _bottleneck.cast_activations(0, 4))
