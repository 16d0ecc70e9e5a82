"""Pre-activation ResNets for CIFAR (https://arxiv.org/abs/1603.05027, section 4 and appendix)."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from resnet_fused.models.cifar import ZeroPadShortcut
from resnet_fused.models.initialization import initialize
from resnet_fused.models.stages import channels_last
from resnet_fused.nn import PreActBasicBlock, PreActBottleneck
from resnet_fused.nn.pairs import is_plain_relu
from resnet_fused.nn.preactivation_blocks import bn_relu

Block = type[PreActBasicBlock] | type[PreActBottleneck]


class PreActCifarResNet(nn.Module):
    """ResNet V2 for small images: 3x3 stem, stages of 16, 32 and 64 planes, linear classifier.

    x: (N, in_channels, H, W) -> (N, num_classes). block: PreActBasicBlock or PreActBottleneck,
    blocks: their number per stage; the network has 6 * blocks + 2 layers, or 9 * blocks + 2. The
    first block's shortcut starts behind its first ReLU, and a batch norm and ReLU stand behind the
    last block, as in the paper. shortcut, where the shape changes: "A" subsamples and pads with
    zero channels and has no parameters; "B" is a 1x1 convolution. Raises ValueError for any other
    shortcut.
    """

    def __init__(
        self,
        block: Block,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Literal["A", "B"] = "A",
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"PreActCifarResNet: shortcut must be 'A' or 'B', got {shortcut!r}")
        norm = norm_layer or nn.BatchNorm2d
        widths = [planes * block.expansion for planes in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.layer1 = _stage(block, blocks, 16, 16, 1, shortcut, norm)
        self.layer2 = _stage(block, blocks, widths[0], 32, 2, shortcut, norm)
        self.layer3 = _stage(block, blocks, widths[1], 64, 2, shortcut, norm)
        self.bn = norm(widths[2])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[2], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(channels_last(x)))))
        out = bn_relu(x, self.bn) if is_plain_relu(self.relu) else None
        out = self.relu(self.bn(x)) if out is None else out
        return self.fc(torch.flatten(self.avgpool(out), 1))


class PreActCifarResNetOptions(TypedDict, total=False):
    """The optional arguments of PreActCifarResNet."""

    num_classes: int
    in_channels: int
    shortcut: Literal["A", "B"]
    norm_layer: Callable[..., nn.Module] | None


def _stage(
    block: Block,
    blocks: int,
    inplanes: int,
    planes: int,
    stride: int,
    shortcut: str,
    norm_layer: Callable[..., nn.Module],
) -> nn.Sequential:
    width = planes * block.expansion
    # Of what stands behind the first ReLU, in the first block of the network as well.
    downsample: nn.Module = nn.Identity()
    if inplanes != width and shortcut == "A":
        downsample = ZeroPadShortcut(width - inplanes, stride)
    elif inplanes != width:
        downsample = nn.Conv2d(inplanes, width, kernel_size=1, stride=stride, bias=False)
    first = block(inplanes, planes, stride, downsample, norm_layer=norm_layer)
    others = (block(width, planes, norm_layer=norm_layer) for _ in range(1, blocks))
    return nn.Sequential(first, *others)


def preact_resnet20(**options: Unpack[PreActCifarResNetOptions]) -> PreActCifarResNet:
    """20 layers. options: see PreActCifarResNet."""
    return PreActCifarResNet(PreActBasicBlock, 3, **options)


def preact_resnet56(**options: Unpack[PreActCifarResNetOptions]) -> PreActCifarResNet:
    """56 layers. options: see PreActCifarResNet."""
    return PreActCifarResNet(PreActBasicBlock, 9, **options)


def preact_resnet110(**options: Unpack[PreActCifarResNetOptions]) -> PreActCifarResNet:
    """110 layers. options: see PreActCifarResNet."""
    return PreActCifarResNet(PreActBasicBlock, 18, **options)


def preact_resnet164(**options: Unpack[PreActCifarResNetOptions]) -> PreActCifarResNet:
    """164 layers, of Bottlenecks. options: see PreActCifarResNet."""
    return PreActCifarResNet(PreActBottleneck, 18, **options)
