"""The ImageNet ResNet family, with the constructor, attributes and checkpoints of torchvision's."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from resnet_fused.models.initialization import initialize
from resnet_fused.models.stages import channels_last, run_stem_and_stages
from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.nn.inference_plan import Stem


class ResNet(nn.Module):
    """ResNet for images: stem, four stages of blocks, average pool, linear classifier.

    x: (N, 3, H, W) -> (N, num_classes). Equivalent to torchvision.models.ResNet of the same
    arguments; its checkpoints load unchanged. Activations are channels_last inside, whatever the
    format of x.

    block: BasicBlock or Bottleneck; layers: number of blocks in each of the four stages.
    replace_stride_with_dilation: for stages 2 to 4, whether to dilate instead of striding.
    Raises ValueError unless replace_stride_with_dilation has three elements.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if len(layers) != 4:
            raise ValueError(
                f"ResNet: layers must have 4 elements, one per stage, got {list(layers)}"
            )
        dilate = replace_stride_with_dilation or (False, False, False)
        if len(dilate) != 3:
            raise ValueError(
                "ResNet: replace_stride_with_dilation must be None or have 3 elements, "
                f"got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialize(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        # Called on torchvision's instances too, whose class conversion has swapped: it may rely on
        # the attributes that both have, and on nothing else.
        stem = Stem(self.conv1, self.bn1, self.relu, self.maxpool)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        x = run_stem_and_stages(channels_last(x), stem, stages)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, out_planes, kernel_size=1, stride=stride, bias=False),
                self._norm_layer(out_planes),
            )
        width = (self.groups, self.base_width)
        stage = [
            block(
                self.inplanes, planes, stride, downsample, *width, first_dilation, self._norm_layer
            )
        ]
        self.inplanes = out_planes
        stage += [
            block(out_planes, planes, 1, None, *width, self.dilation, self._norm_layer)
            for _ in range(1, blocks)
        ]
        return nn.Sequential(*stage)


class ResNetOptions(TypedDict, total=False):
    """The optional arguments of ResNet."""

    num_classes: int
    zero_init_residual: bool
    groups: int
    width_per_group: int
    replace_stride_with_dilation: Sequence[bool] | None
    norm_layer: Callable[..., nn.Module] | None


def resnet18(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-18 (https://arxiv.org/abs/1512.03385). options: see ResNet."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-34 (https://arxiv.org/abs/1512.03385). options: see ResNet."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50, stride in the 3x3 convolutions (v1.5), as in torchvision. options: see ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101, stride in the 3x3 convolutions (v1.5), as in torchvision. options: see ResNet."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-152, stride in the 3x3 convolutions (v1.5), as in torchvision. options: see ResNet."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-50, 32 groups of width 4 (https://arxiv.org/abs/1611.05431). options: see ResNet."""
    options.setdefault("groups", 32)
    options.setdefault("width_per_group", 4)
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def wide_resnet50_2(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide (https://arxiv.org/abs/1605.07146)."""
    options.setdefault("width_per_group", 128)
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def wide_resnet101_2(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide (https://arxiv.org/abs/1605.07146)."""
    options.setdefault("width_per_group", 128)
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)
