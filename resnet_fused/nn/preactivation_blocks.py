"""What a pre-activation block computes, fused, on any modules that have its attributes.

As in `blocks`: everything is decided at each call from the modules at hand, and where the fused
computation would not be exact, or no faster, the functions return None and the caller runs its
modules one by one.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from resnet_fused.nn import normalization
from resnet_fused.nn.block_parts import Convolution, Geometry
from resnet_fused.nn.blocks import applies, is_live, pair_forward
from resnet_fused.nn.pairs import (
    BatchNorm,
    batch_norm_args,
    computed_dtype,
    is_plain_conv,
    is_plain_norm,
    is_plain_norm_before_relu,
)
from resnet_fused.nn.preactivation_function import preactivation_block
from resnet_fused.nn.preactivation_parts import Norm, Shortcut
from resnet_fused.nn.synchronization import group_of


def bn_relu(x: Tensor, bn: nn.Module) -> Tensor | None:
    """relu(bn(x)), following `bn.training`; None where that cannot be fused."""
    if not (applies(x) and is_plain_norm(bn)):
        return None
    group = group_of(bn)
    if torch.compiler.is_compiling() and group is not None:
        return None  # messages to other processes are not traced
    return normalization.bn_relu(x, batch_norm_args(cast(BatchNorm, bn)), group)


def preactivation_forward(
    x: Tensor, units: Sequence[tuple[nn.Module, nn.Module]], downsample: nn.Module | None
) -> Tensor | None:
    """conv(relu(bn(... conv(z)))) + shortcut, z = relu(bn(x)); None where that cannot be fused.

    units: a batch norm and the convolution behind it each, in order. The shortcut is downsample(z),
    or x without downsample. Every normalisation is in the mode of its own training flag.
    """
    norms, convs = [bn for bn, _ in units], [conv for _, conv in units]
    if not (
        applies(x) and all(map(is_plain_norm_before_relu, norms)) and all(map(is_plain_conv, convs))
    ):
        return None
    if torch.compiler.is_compiling():
        if any(group_of(bn) is not None for bn in norms):
            return None  # messages to other processes are not traced
    elif _is_one_node(x, norms, convs, downsample):  # type: ignore[arg-type]
        return _trained_forward(x, norms, convs, downsample)  # type: ignore[arg-type]
    first, *others = norms
    z = h = normalization.bn_relu(x, batch_norm_args(first), group_of(first))  # type: ignore[arg-type]
    for pair in zip(convs, others, strict=False):
        h = pair_forward(h, pair)  # type: ignore[arg-type]
    out: Tensor = convs[-1](h)
    out += x if downsample is None else downsample(z)
    return out


def _is_one_node(
    x: Tensor,
    norms: Sequence[BatchNorm],
    convs: Sequence[nn.Conv2d],
    downsample: nn.Module | None,
) -> bool:
    """Whether the block needs a gradient that it gets as one autograd node.

    The node neither adds biases nor casts x, whose first normalisation is in its own dtype.
    """
    if not torch.is_grad_enabled() or computed_dtype(x) != x.dtype:
        return False
    if not any(map(is_live, norms)) or any(conv.bias is not None for conv in convs):
        return False
    parameters = [t for bn in norms for t in (bn.weight, bn.bias)]
    parameters += [conv.weight for conv in convs]
    if _is_projection(downsample):
        parameters.append(cast(nn.Conv2d, downsample).weight)
    return x.requires_grad or any(p is not None and p.requires_grad for p in parameters)


def _is_projection(downsample: nn.Module | None) -> bool:
    """Whether the shortcut is a convolution that can be part of the node."""
    return downsample is not None and is_plain_conv(downsample) and downsample.bias is None


def _trained_forward(
    x: Tensor,
    norms: Sequence[BatchNorm],
    convs: Sequence[nn.Conv2d],
    downsample: nn.Module | None,
) -> Tensor:
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type)

    def convolution(conv: nn.Conv2d) -> Convolution:
        geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        return Convolution(conv.weight.to(x.dtype) if autocast else conv.weight, geometry)

    shortcut, projection = Shortcut.IDENTITY, None
    if _is_projection(downsample):
        shortcut, projection = Shortcut.PROJECTION, convolution(cast(nn.Conv2d, downsample))
    elif downsample is not None:
        shortcut = Shortcut.OUTSIDE
    settings = [Norm(batch_norm_args(bn), group_of(bn)) for bn in norms]
    main = [convolution(conv) for conv in convs]
    with torch.autocast(device_type, enabled=False):
        out, z = preactivation_block(x, settings, main, projection, shortcut)
    if downsample is not None and z is not None:
        out += downsample(z)
    return out
