"""Which blocks of a model stand next to each other, and what a chain runs of each of them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from resnet_fused import cuda_chains
from resnet_fused.conversion.survey import Finding
from resnet_fused.conversion.swap import is_stage, parts_of, plan_of
from resnet_fused.nn import chains
from resnet_fused.nn.pairs import has_hooks

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class Link(NamedTuple):
    """A block's place in a chain: what is computed at once at its end, and who computes its conv1.

    text: names of the layers. is_rolled_into: conv1 is computed with the end of the block before.
    """

    text: str
    is_rolled_into: bool


def stages(model: nn.Module, findings: Sequence[Finding]) -> list[nn.Module]:
    """Sequences in which converted blocks are neighbours, where no converted network calls them.

    findings: of `survey` before or after the conversion. Sequences of this library's own blocks
    alone are left as they are.
    """
    converted, called = set(), set()
    for finding in findings:
        if finding.roles is not None and finding.roles.pattern == "ResNet":
            called |= {id(child) for child in finding.module.children()}
        elif finding.roles is not None and (plan_of(finding.module) or not finding.fused):
            converted.add(id(finding.module))
    return [
        module
        for module in model.modules()
        if _is_sequence(module)
        and id(module) not in called
        and sum(id(block) in converted for block in module._modules.values()) > 1
    ]


def links(model: nn.Module, findings: Sequence[Finding]) -> dict[str, Link]:
    """By path: the blocks of which a chain computes more than one layer at once."""
    blocks = {
        id(f.module): f for f in findings if f.roles is not None and f.roles.pattern != "ResNet"
    }
    found: dict[str, Link] = {}
    for sequence in _sequences(model, findings):
        is_rolled_into = False
        for module, following in itertools.pairwise([*sequence, None]):
            finding, behind = blocks.get(id(module)), blocks.get(id(following))
            text, rolls = _text(finding, behind) if finding is not None else ("", False)
            if finding is not None and (text or is_rolled_into):
                found[finding.path] = Link(text, is_rolled_into)
            is_rolled_into = rolls
    return found


def _sequences(model: nn.Module, findings: Sequence[Finding]) -> list[list[nn.Module]]:
    """Neighbours, in order; of modules that stand alone a sequence each."""
    sequences: list[list[nn.Module]] = []
    for finding in findings:
        if finding.roles is not None and finding.roles.pattern == "ResNet":
            sequences += _stages_in_a_row(finding.module)
    sequences += [[*stage.children()] for stage in stages(model, findings)]
    neighbours = {id(module) for sequence in sequences for module in sequence}
    alone = [[f.module] for f in findings if id(f.module) not in neighbours]
    return sequences + alone


def _stages_in_a_row(network: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a network, which end a sequence where a stage is called as a whole."""
    sequences: list[list[nn.Module]] = [[]]
    for name in _STAGES:
        part = network.get_submodule(name)
        if _is_sequence(part) and not has_hooks(part):
            sequences[-1] += part.children()
        else:
            sequences.append([])
    return sequences


def _text(finding: Finding, following: Finding | None) -> tuple[str, bool]:
    """What runs at once at the end of a block, and whether conv1 of the next one is part of it."""
    layers, roles = _layers(finding), finding.roles
    if layers is None or roles is None:
        return "", False
    if layers.projection is not None:
        shortcut = roles.shortcut if roles.projection is None else roles.projection[0]
        return f"{roles.convs[2]}+{shortcut}+add", False
    if not cuda_chains.has_tail(layers.second[0].out_channels, layers.third[0].out_channels):
        return "", False
    text = f"{roles.convs[1]}+{roles.convs[2]}+add"
    behind = _layers(following) if following is not None else None
    if following is None or following.roles is None or behind is None:
        return text, False
    is_called = has_hooks(finding.module) or has_hooks(following.module)
    if is_called or not chains.rolls_into(layers, behind):
        return text, False
    return f"{text}, {following.roles.convs[0]} of the next block", True


def _layers(finding: Finding) -> chains.Layers | None:
    if finding.roles is None or finding.roles.is_preactivation:
        return None
    return chains.as_layers(*parts_of(finding.module, finding.roles))


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential or is_stage(module)
