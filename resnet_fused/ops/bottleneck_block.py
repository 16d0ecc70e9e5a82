"""bottleneck_block: a whole Bottleneck with the identity as shortcut, in one operator."""

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.layout import memory_format
from resnet_fused.ops import _bottleneck, _checks
from resnet_fused.ops._registration import autocast, call, define, refuse_gradient


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
    """A Bottleneck with the identity as shortcut, in inference: only x and out travel.

    y1 = relu(conv2d(x, weight1) * scale1 + shift1) and `bottleneck_tail` of it with x as residual.
    x, out: (N, K, H, W); weight1: (M, K, 1, 1); weight2: (M, M, 3, 3); weight3: (K, M, 1, 1);
    scale1, shift1, scale2, shift2: (M,); scale3, shift3: (K,). Equivalent to three calls of
    `conv_bn_relu`, whose notes on weights, autocast and memory formats hold here too.

    Raises ValueError on mismatched shapes or devices, TypeError on tensors that are not floating
    point, RuntimeError where a gradient is needed.
    """
    _checks.check_tensors("bottleneck_block", x=x)
    layers = weight1, scale1, shift1, weight2, scale2, shift2, weight3, scale3, shift3
    return call(_bottleneck_block, x, *layers)


def _check(x: Tensor, *layers: Tensor) -> None:
    operator = "bottleneck_block"
    _bottleneck.check_image(operator, "x", x)
    first, second, third = layers[:3], layers[3:6], layers[6:]
    channels = x.size(1)
    width = _bottleneck.check_layer(operator, "{}1", first, channels, 1, "x", x)
    _bottleneck.check_layer(operator, "{}2", second, width, 3, "x", x, kernels=width)
    _bottleneck.check_layer(operator, "{}3", third, width, 1, "x", x, kernels=channels)


def _kernel(x: Tensor, *layers: Tensor) -> Tensor:
    _check(x, *layers)
    format_ = memory_format(x)
    out: Tensor = backends.choose("bottleneck_block", x)(
        x.contiguous(memory_format=format_), *layers
    )
    # With one channel in, x has both formats now, and out has one of them.
    return out.contiguous(memory_format=format_)


def _fake(x: Tensor, *layers: Tensor) -> Tensor:
    _check(x, *layers)
    return torch.empty_like(x, memory_format=memory_format(x))


_bottleneck_block = define(
    "bottleneck_block(Tensor x, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2,"
    " Tensor scale2, Tensor shift2, Tensor weight3, Tensor scale3, Tensor shift3) -> Tensor",
    _kernel,
    _fake,
    refuse_gradient("bottleneck_block", "use conv_bn_relu, or torch.no_grad()"),
    images=(0,),
)
autocast(_bottleneck_block, _bottleneck.cast_activations(0))
