"""The parts that the models share around their blocks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck, inference_plan
from resnet_fused.nn.blocks import conv_bn_relu
from resnet_fused.nn.pairs import has_hooks


def channels_last(x: Tensor) -> Tensor:
    """The same x in channels_last memory format if it is a floating-point image batch."""
    if x.dim() == 4 and x.is_floating_point():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def run_stem(x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> Tensor:
    """relu(bn(conv(x))), fused where nobody listens to the three."""
    out = None if has_hooks(relu) else conv_bn_relu(x, conv, bn)
    return relu(bn(conv(x))) if out is None else out


def run_stage(x: Tensor, stage: nn.Module) -> Tensor:
    """stage(x), where a block in inference may overwrite the output of the block before it.

    Only an output that came straight from a plan: then no hook and no other module has seen it.
    """
    if type(stage) is not nn.Sequential or has_hooks(stage) or torch.is_grad_enabled():
        return stage(x)
    is_ours_alone = False
    for block in stage:
        out = None
        if type(block).forward in planned_forwards and not has_hooks(block):
            out = inference_plan.run(block, x, reuse_input=is_ours_alone)
        x, is_ours_alone = (block(x), False) if out is None else (out, True)
    return x


# Forwards that compute what the inference plan of their block computes, where it has one.
planned_forwards: set[Callable[..., object]] = {BasicBlock.forward, Bottleneck.forward}
