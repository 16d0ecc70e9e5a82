"""The parts that the models share around their blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck, inference_plan
from resnet_fused.nn.blocks import conv_bn_relu
from resnet_fused.nn.inference_plan import Stem
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
    out = _run_plans(x, stages)
    if out is not None:
        return out
    for stage in stages:
        x = stage(x)
    return x


def run_stem_and_stages(x: Tensor, stem: Stem, stages: Sequence[nn.Module]) -> Tensor:
    """The stem, its pooling and the stages; in inference in one native call where possible."""
    is_plain = inference_plan.is_plain_stem(stem)
    out = _run_plans(x, stages, stem) if is_plain else None
    if out is not None:
        return out
    if is_plain:
        inference_plan.make_stem_plan(stem, x)
    return run_stages(stem.maxpool(run_stem(x, stem.conv, stem.bn, stem.relu)), stages)


def _run_plans(x: Tensor, stages: Sequence[nn.Module], stem: Stem | None = None) -> Tensor | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    blocks = _plain_blocks(stages)
    return None if blocks is None else inference_plan.run(blocks, x, stem)


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
