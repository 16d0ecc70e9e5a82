"""The parts that the models share around their blocks."""

import torch
from torch import Tensor, nn

from resnet_fused.nn.blocks import conv_bn_relu, has_hooks


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
    """stage(x), where a block may overwrite the output of the block before it in inference.

    Only between two blocks of this library with no hooks anywhere inside: nobody else has seen the
    tensor between them then.
    """
    if (
        type(stage) is not nn.Sequential
        or has_hooks(stage)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return stage(x)
    is_ours_alone = False
    for block in stage:
        reusing = getattr(block, "forward_reusing", None)
        if reusing is None or any(has_hooks(module) for module in block.modules()):
            x, is_ours_alone = block(x), False
        else:
            x, is_ours_alone = reusing(x, reuse_input=is_ours_alone), True
    return x
