"""bottleneck_tail: a Bottleneck from its 3x3 convolution on, in one operator."""

from torch import Tensor

from resnet_fused import backends
from resnet_fused.layout import memory_format
from resnet_fused.ops import _bottleneck, _checks
from resnet_fused.ops._registration import autocast, call, define, refuse_gradient


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
    """relu(conv2d(y2, weight3) * scale3 + shift3 + residual), without a pass over y2.

    y2 = relu(conv2d(y1, weight2, padding=1) * scale2 + shift2), rounded to the dtype of y1: conv2,
    conv3 and the shortcut of a Bottleneck in inference. y1: (N, M, H, W); residual, out:
    (N, K, H, W); weight2: (M, M, 3, 3); weight3: (K, M, 1, 1); scale2, shift2: (M,); scale3,
    shift3: (K,). Equivalent to two calls of `conv_bn_relu`, whose notes on weights, autocast and
    memory formats hold here too, with y1 in place of x.

    Raises ValueError on mismatched shapes or devices, TypeError on unequal dtypes of y1 and
    residual and on tensors that are not floating point, RuntimeError where a gradient is needed.
    """
    _checks.check_tensors("bottleneck_tail", y1=y1, residual=residual)
    layers = weight2, scale2, shift2, weight3, scale3, shift3
    return call(_bottleneck_tail, y1, residual, *layers)


def _check(y1: Tensor, residual: Tensor, *layers: Tensor) -> tuple[int, ...]:
    second, third = layers[:3], layers[3:]
    return _bottleneck.check_tail("bottleneck_tail", y1, residual, second, third)


def _kernel(y1: Tensor, residual: Tensor, *layers: Tensor) -> Tensor:
    _check(y1, residual, *layers)
    format_ = memory_format(y1)
    activations = (t.contiguous(memory_format=format_) for t in (y1, residual))
    out: Tensor = backends.choose("bottleneck_tail", y1)(*activations, *layers)
    # With one channel in, y1 has both formats now, and out has one of them.
    return out.contiguous(memory_format=format_)


def _fake(y1: Tensor, residual: Tensor, *layers: Tensor) -> Tensor:
    shape = _check(y1, residual, *layers)
    return y1.new_empty(shape).contiguous(memory_format=memory_format(y1))


_bottleneck_tail = define(
    "bottleneck_tail(Tensor y1, Tensor residual, Tensor weight2, Tensor scale2, Tensor shift2,"
    " Tensor weight3, Tensor scale3, Tensor shift3) -> Tensor",
    _kernel,
    _fake,
    refuse_gradient("bottleneck_tail", "use conv_bn_relu, or torch.no_grad()"),
    images=(0, 1),
)
autocast(_bottleneck_tail, _bottleneck.cast_activations(0, 1))
