"""Networks in pairs: eager, as everybody writes them, and fused, with the same numbers inside."""

import copy
import difflib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused import nn as fused_nn
from resnet_fused._torchvision import import_torchvision
from resnet_fused.commands.console import CommandError
from resnet_fused.conversion import fuse

NAMES = tuple(name for name in models.__all__ if name.islower())
CIFAR_NAMES = (
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("preact_resnet20", "preact_resnet56", "preact_resnet110", "preact_resnet164"),
)


class Pair(NamedTuple):
    """The same network twice, with equal but separate parameters and buffers."""

    eager: nn.Module
    fused: nn.Module
    source: str  # where the eager network comes from


def build_pair(name: str, seed: int = 0, **options: object) -> Pair:
    """An eager network and its fused twin, with random weights.

    The eager one is torchvision's where torchvision is installed and has it, and goes through
    `resnet_fused.fuse`; otherwise it is ours with every fused forward replaced by the plain one.
    Raises CommandError on an unknown name.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(NAMES)}"
        raise CommandError(f"unknown model {name!r}: {hint}", status=2)
    torch.manual_seed(seed)
    torchvision = import_torchvision()
    constructor = getattr(torchvision.models, name, None) if torchvision else None
    if constructor is not None:
        eager = constructor(weights=None, **options)
        return Pair(eager, fuse(copy.deepcopy(eager)), "torchvision")
    fused = getattr(models, name)(**options)
    return Pair(eager_twin(fused), fused, "resnet_fused.models")


def eager_twin(model: nn.Module) -> nn.Module:
    """A copy of one of our models that computes everything with plain PyTorch modules."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for ours, plain in _PLAIN.items():
            if type(module) is ours:
                module.__class__ = plain
                break
    return twin


def placed(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """The model itself, moved; in channels_last, the faster format, unless told otherwise."""
    model.to(device, dtype)
    return model.to(memory_format=memory_format)  # type: ignore[call-overload]


def fused_blocks(model: nn.Module) -> int:
    blocks = (
        *(fused_nn.BasicBlock, fused_nn.Bottleneck),
        *(fused_nn.PreActBasicBlock, fused_nn.PreActBottleneck),
    )
    return sum(isinstance(module, blocks) for module in model.modules())


def warm_up(pair: Pair, images: Tensor) -> None:
    """Give networks with random weights the running statistics that these images call for.

    Without them activations grow from block to block, and an evaluation compares huge numbers.
    """
    norms = [m for m in pair.eager.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    pair.eager.train()
    with torch.no_grad():
        pair.eager(images)
    pair.eager.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    pair.fused.load_state_dict(pair.eager.state_dict())
    pair.fused.eval()


class PlainBasicBlock(fused_nn.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class PlainBottleneck(fused_nn.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class PlainPreActBasicBlock(fused_nn.PreActBasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(z)
        out = self.conv2(self.relu(self.bn2(self.conv1(z))))
        out += identity
        return out


class PlainPreActBottleneck(fused_nn.PreActBottleneck):
    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(z)
        out = self.conv2(self.relu(self.bn2(self.conv1(z))))
        out = self.conv3(self.relu(self.bn3(out)))
        out += identity
        return out


class PlainResNet(models.ResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PlainCifarResNet(models.CifarResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PlainPreActCifarResNet(models.PreActCifarResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


_PLAIN = {
    fused_nn.BasicBlock: PlainBasicBlock,
    fused_nn.Bottleneck: PlainBottleneck,
    models.ResNet: PlainResNet,
    models.CifarResNet: PlainCifarResNet,
    fused_nn.PreActBasicBlock: PlainPreActBasicBlock,
    fused_nn.PreActBottleneck: PlainPreActBottleneck,
    models.PreActCifarResNet: PlainPreActCifarResNet,
}
