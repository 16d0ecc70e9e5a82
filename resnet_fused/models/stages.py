"""The parts that the models share around their blocks."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck, chains, inference_plan
from resnet_fused.nn.blocks import conv_bn_relu, conv_bn_relu_max_pool
from resnet_fused.nn.inference_plan import Stem
from resnet_fused.nn.pairs import has_hooks, is_plain_relu


def channels_last(x: Tensor) -> Tensor:
    """The same x in channels_last memory format if it is a floating-point image batch.

    As it is inside of torch.func, where vmap knows no memory formats.
    """
    is_transformed = torch._C._functorch.maybe_current_level() is not None
    if x.dim() == 4 and x.is_floating_point() and not is_transformed:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def run_stem(x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> Tensor:
    """relu(bn(conv(x))), fused where that is all that the three do."""
    out = conv_bn_relu(x, conv, bn) if is_plain_relu(relu) else None
    return relu(bn(conv(x))) if out is None else out


def run_stages(x: Tensor, stages: Sequence[nn.Module]) -> Tensor:
    """The stages one after the other; in inference, where nobody listens, as `run_blocks` does."""
    out = run_blocks(x, _unrolled(stages)) if _is_inference() else None
    if out is not None:
        return out
    for stage in stages:
        x = stage(x)
    return x


def run_blocks(x: Tensor, blocks: Sequence[nn.Module]) -> Tensor | None:
    """The blocks in one native call, else by operators that reach over the borders of blocks.

    None, and nothing done, where neither can be.
    """
    if not _is_inference():
        return None
    out = _run_plans(x, blocks)
    return chains.run(x, blocks) if out is None and chains.applies(x) else out


def run_stem_and_stages(x: Tensor, stem: Stem, stages: Sequence[nn.Module]) -> Tensor:
    """The stem, its pooling and the stages; in inference in one native call where possible."""
    is_plain = inference_plan.is_plain_stem(stem)
    out = _run_plans(x, _unrolled(stages), stem) if is_plain and _is_inference() else None
    if out is not None:
        return out
    if is_plain:
        inference_plan.make_stem_plan(stem, x)
    return run_stages(_run_pooled_stem(x, stem), stages)


def _run_pooled_stem(x: Tensor, stem: Stem) -> Tensor:
    conv, bn, relu, maxpool = stem
    out = conv_bn_relu_max_pool(x, conv, bn, maxpool) if is_plain_relu(relu) else None
    return maxpool(run_stem(x, conv, bn, relu)) if out is None else out


def _run_plans(x: Tensor, blocks: Sequence[nn.Module], stem: Stem | None = None) -> Tensor | None:
    for block in blocks:
        if type(block).forward not in planned_forwards or has_hooks(block):
            return None
    return inference_plan.run(blocks, x, stem)


# Forwards that compute what the inference plan of their block computes, where it has one.
planned_forwards: set[Callable[..., object]] = {BasicBlock.forward, Bottleneck.forward}
# Forwards that compute what that of nn.Sequential does.
stage_forwards: set[Callable[..., object]] = set()


def _is_inference() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _unrolled(stages: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks of the stages; a stage that does more than call its blocks stays whole."""
    blocks: list[nn.Module] = []
    for stage in stages:
        is_sequence = type(stage) is nn.Sequential or type(stage).forward in stage_forwards
        if is_sequence and not has_hooks(stage):
            blocks += cast(nn.Sequential, stage)
        else:
            blocks.append(stage)
    return blocks
