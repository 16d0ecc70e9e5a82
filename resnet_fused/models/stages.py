"""The parts that the models share around their blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck, inference_plan
from resnet_fused.nn.blocks import conv_bn_relu
from resnet_fused.nn.pairs import has_hooks, is_plain_relu


def channels_last(x: Tensor) -> Tensor:
    """The same x in channels_last memory format if it is a floating-point image batch."""
    if x.dim() == 4 and x.is_floating_point():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def run_stem(x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> Tensor:
    """relu(bn(conv(x))), fused where that is all that the three do."""
    out = conv_bn_relu(x, conv, bn) if is_plain_relu(relu) else None
    return relu(bn(conv(x))) if out is None else out


def run_stages(x: Tensor, stages: Sequence[nn.Module]) -> Tensor:
    """The stages one after the other; in inference, where nobody listens, in one native call."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        blocks = _plain_blocks(stages)
        out = None if blocks is None else inference_plan.run(blocks, x)
        if out is not None:
            return out
    for stage in stages:
        x = stage(x)
    return x


# Forwards that compute what the inference plan of their block computes, where it has one.
planned_forwards: set[Callable[..., object]] = {BasicBlock.forward, Bottleneck.forward}


def _plain_blocks(stages: Sequence[nn.Module]) -> list[nn.Module] | None:
    """The blocks of the stages; None where something besides blocks of this library is called."""
    blocks: list[nn.Module] = []
    for stage in stages:
        if type(stage) is not nn.Sequential or has_hooks(stage):
            return None
        blocks += stage
    for block in blocks:
        if type(block).forward not in planned_forwards or has_hooks(block):
            return None
    return blocks
