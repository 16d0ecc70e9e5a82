"""bottleneck_roll: the end of a Bottleneck and the first convolution of the next one."""

from torch import Tensor

from resnet_fused import backends
from resnet_fused.layout import memory_format
from resnet_fused.ops import _bottleneck, _checks
from resnet_fused.ops._registration import autocast, call, define, refuse_gradient


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
    """(out, next_y1): `bottleneck_tail`, and conv1 of the next block without a pass over out.

    next_y1 = relu(conv2d(out, next_weight1) * next_scale1 + next_shift1), with out rounded to its
    dtype. next_weight1: (M2, K, 1, 1); next_scale1, next_shift1: (M2,); next_y1: (N, M2, H, W);
    everything else as in `bottleneck_tail`. Of a block and the next one's first convolution, only
    y1, the shortcut, out and next_y1 travel through memory.

    Raises as `bottleneck_tail` does.
    """
    _checks.check_tensors("bottleneck_roll", y1=y1, residual=residual)
    return call(
        *(_bottleneck_roll, y1, residual, weight2, scale2, shift2, weight3, scale3, shift3),
        *(next_weight1, next_scale1, next_shift1),
    )


def _check(
    y1: Tensor, residual: Tensor, *layers: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of out and next_y1."""
    operator = "bottleneck_roll"
    second, third, next_first = layers[:3], layers[3:6], layers[6:]
    shape = _bottleneck.check_tail(operator, y1, residual, second, third)
    names = "next_{}1"
    width = _bottleneck.check_layer(operator, names, next_first, shape[1], 1, "y1", y1)
    return shape, (shape[0], width, *shape[2:])


def _kernel(y1: Tensor, residual: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    _check(y1, residual, *layers)
    format_ = memory_format(y1)
    activations = (t.contiguous(memory_format=format_) for t in (y1, residual))
    out, next_y1 = backends.choose("bottleneck_roll", y1)(*activations, *layers)
    # With one channel in, y1 has both formats now, and the outputs have one of them.
    return out.contiguous(memory_format=format_), next_y1.contiguous(memory_format=format_)


def _fake(y1: Tensor, residual: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    format_ = memory_format(y1)
    shape, next_shape = _check(y1, residual, *layers)
    return (
        y1.new_empty(shape).contiguous(memory_format=format_),
        y1.new_empty(next_shape).contiguous(memory_format=format_),
    )


_bottleneck_roll = define(
    "bottleneck_roll(Tensor y1, Tensor residual, Tensor weight2, Tensor scale2, Tensor shift2,"
    " Tensor weight3, Tensor scale3, Tensor shift3, Tensor next_weight1, Tensor next_scale1,"
    " Tensor next_shift1) -> (Tensor out, Tensor next_y1)",
    _kernel,
    _fake,
    refuse_gradient("bottleneck_roll", "use conv_bn_relu, or torch.no_grad()"),
    images=(0, 1),
)
autocast(_bottleneck_roll, _bottleneck.cast_activations(0, 1))
