"""The small ResNets of the CIFAR experiments (https://arxiv.org/abs/1512.03385, section 4.2)."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from resnet_fused.models.initialization import initialize
from resnet_fused.models.stages import channels_last, run_stages, run_stem
from resnet_fused.nn import BasicBlock


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, stages of 16, 32 and 64 channels, linear classifier.

    x: (N, in_channels, H, W) -> (N, num_classes). blocks: number of BasicBlocks per stage; the
    network has 6 * blocks + 2 layers. shortcut, where the shape changes: "A" subsamples and pads
    with zero channels and has no parameters; "B" is a 1x1 convolution and a batch norm.
    Raises ValueError for any other shortcut.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Literal["A", "B"] = "A",
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"CifarResNet: shortcut must be 'A' or 'B', got {shortcut!r}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, 16, 16, 1, shortcut, norm)
        self.layer2 = _stage(blocks, 16, 32, 2, shortcut, norm)
        self.layer3 = _stage(blocks, 32, 64, 2, shortcut, norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = run_stem(channels_last(x), self.conv1, self.bn1, self.relu)
        x = run_stages(x, (self.layer1, self.layer2, self.layer3))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNetOptions(TypedDict, total=False):
    """The optional arguments of CifarResNet."""

    num_classes: int
    in_channels: int
    shortcut: Literal["A", "B"]
    norm_layer: Callable[..., nn.Module] | None


class ZeroPadShortcut(nn.Module):
    """Shortcut option A: every stride-th pixel, and zeros for the channels that x lacks.

    x: (N, C, H, W) -> (N, C + extra_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


def _stage(
    blocks: int,
    inplanes: int,
    planes: int,
    stride: int,
    shortcut: str,
    norm_layer: Callable[..., nn.Module],
) -> nn.Sequential:
    downsample: nn.Module | None = None
    if stride != 1 or inplanes != planes:
        if shortcut == "A":
            downsample = ZeroPadShortcut(planes - inplanes, stride)
        else:
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, kernel_size=1, stride=stride, bias=False),
                norm_layer(planes),
            )
    first = BasicBlock(inplanes, planes, stride, downsample, norm_layer=norm_layer)
    others = (BasicBlock(planes, planes, norm_layer=norm_layer) for _ in range(1, blocks))
    return nn.Sequential(first, *others)


def resnet20(**options: Unpack[CifarResNetOptions]) -> CifarResNet:
    """20 layers. options: see CifarResNet."""
    return CifarResNet(3, **options)


def resnet32(**options: Unpack[CifarResNetOptions]) -> CifarResNet:
    """32 layers. options: see CifarResNet."""
    return CifarResNet(5, **options)


def resnet44(**options: Unpack[CifarResNetOptions]) -> CifarResNet:
    """44 layers. options: see CifarResNet."""
    return CifarResNet(7, **options)


def resnet56(**options: Unpack[CifarResNetOptions]) -> CifarResNet:
    """56 layers. options: see CifarResNet."""
    return CifarResNet(9, **options)


def resnet110(**options: Unpack[CifarResNetOptions]) -> CifarResNet:
    """110 layers. options: see CifarResNet."""
    return CifarResNet(18, **options)
