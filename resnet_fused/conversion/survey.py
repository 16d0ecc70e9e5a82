"""Every place in a model that looks like something this library runs, with the verdict on it."""

from typing import NamedTuple

import torch
from torch import nn

from resnet_fused.conversion.layers import is_conv, is_norm
from resnet_fused.conversion.obstacles import Registrations, obstacle
from resnet_fused.conversion.proof import NotProvenError, prove_block, prove_network
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.swap import native_roles, plan_of

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCK_NAMES = {"conv1", "bn1", "conv2", "bn2"}
_NETWORK_NAMES = {
    "conv1",
    "bn1",
    "maxpool",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "avgpool",
    "fc",
}


class Finding(NamedTuple):
    """A candidate. roles is None where it must be left alone, and then reason says why.

    fused: it runs fused as it stands, having been converted or being one of this library's own.
    """

    path: str
    module: nn.Module
    roles: Roles | None
    reason: str
    fused: bool


def survey(model: nn.Module) -> list[Finding]:
    """The verdict on every residual block and on every torchvision-like network, in model order."""
    registrations = Registrations(model)
    modules = dict(model.named_modules())
    blocks = {path for path, module in modules.items() if _looks_like_block(module)}
    # Something that contains blocks is no block, whatever its layers are called.
    blocks -= {path for path in blocks if any(_is_inside(other, path) for other in blocks)}
    findings = []
    for path, module in modules.items():
        if path in blocks or _looks_like_network(module):
            findings.append(_judge(path, module, path in blocks, registrations))
    return findings


def _judge(path: str, module: nn.Module, is_block: bool, registrations: Registrations) -> Finding:
    if isinstance(module, torch.jit.ScriptModule):
        return Finding(path, module, None, "it is a TorchScript module", fused=False)
    if "forward" in vars(module):
        return Finding(path, module, None, "the instance has its own forward", fused=False)
    plan = plan_of(module)
    roles = native_roles(module) if plan is None else plan.roles
    is_fused = roles is not None
    try:
        if roles is None:
            roles = prove_block(module) if is_block else prove_network(module)
    except NotProvenError as error:
        return Finding(path, module, None, f"its forward is not a known one: {error}", fused=False)
    reason = obstacle(module, roles, registrations, path)
    if reason is not None:
        return Finding(path, module, None, reason, fused=False)
    return Finding(path, module, roles, "", is_fused)


def _looks_like_block(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    children = dict(module.named_children())
    if children.keys() >= _BLOCK_NAMES:
        return True
    return all(sum(map(kind, children.values())) >= 2 for kind in (is_conv, is_norm))


def _looks_like_network(module: nn.Module) -> bool:
    return dict(module.named_children()).keys() >= _NETWORK_NAMES


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
