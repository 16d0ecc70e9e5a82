"""Whole small networks in the styles of tutorials and popular repositories.

All take images (N, 3, 32, 32), except where NETWORKS says otherwise.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

# The tutorial ResNet


class IdentityDownsample(nn.Module):
    """Input cloned first, every convolution with a bias, one ReLU module for all three places."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        identity_downsample: nn.Module | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU()
        self.identity_downsample = identity_downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.relu(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.identity_downsample is not None:
            identity = self.identity_downsample(identity)
        x += identity
        return self.relu(x)


class TutorialResNet(nn.Module):
    def __init__(self, layers: tuple[int, int] = (2, 1), num_classes: int = 10) -> None:
        super().__init__()
        self.in_channels = 8
        self.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(layers[0], width=4, stride=1)
        self.layer2 = self._make_layer(layers[1], width=6, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = x.reshape(x.shape[0], -1)
        return self.fc(x)

    def _make_layer(self, count: int, width: int, stride: int) -> nn.Sequential:
        identity_downsample = None
        if stride != 1 or self.in_channels != width * 4:
            identity_downsample = nn.Sequential(
                nn.Conv2d(self.in_channels, width * 4, kernel_size=1, stride=stride),
                nn.BatchNorm2d(width * 4),
            )
        blocks = [IdentityDownsample(self.in_channels, width, identity_downsample, stride)]
        self.in_channels = width * 4
        blocks += [IdentityDownsample(self.in_channels, width) for _ in range(count - 1)]
        return nn.Sequential(*blocks)


class Conform(nn.Module):
    """A projection without batch norm, always there; the stride in the first 1x1."""

    def __init__(self, n_in: int, n_mid: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.l1 = nn.Conv2d(n_in, n_mid, 1, stride=stride)
        self.BN1 = nn.BatchNorm2d(n_mid)
        self.l2 = nn.Conv2d(n_mid, n_mid, 3, padding=1)
        self.BN2 = nn.BatchNorm2d(n_mid)
        self.l3 = nn.Conv2d(n_mid, n_out, 1)
        self.BN3 = nn.BatchNorm2d(n_out)
        self.conform_layer = nn.Conv2d(n_in, n_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.BN1(self.l1(x)))
        y = F.relu(self.BN2(self.l2(y)))
        y = self.BN3(self.l3(y))
        return F.relu(y + self.conform_layer(x))


def conform_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        Conform(8, 4, 16, 1), Conform(16, 4, 16, 1), Conform(16, 8, 24, 2),
        nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24 * 4, 10),
    )  # fmt: skip


# Networks for CIFAR


class LambdaLayer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pad_channels(x: Tensor) -> Tensor:
    """Shortcut option A: every other pixel, zeros on both sides of the channels."""
    extra = x.shape[1] // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra), "constant", 0)


class CifarBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(pad_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarBlockInline(nn.Module):
    """The padding stands in the forward itself."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.increase = stride != 1

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.increase:
            sub = F.avg_pool2d(identity, 1, 2)
            identity = torch.cat((sub, torch.zeros_like(sub)), dim=1)
        out += identity
        return self.relu(out)


class CifarNet(nn.Module):
    """Stem without pooling, two stages, average pooling and `view`."""

    def __init__(self, block: Callable[..., nn.Module], widths: tuple[int, int] = (8, 16)) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = nn.Sequential(block(first, first), block(first, first))
        self.layer2 = nn.Sequential(block(first, second, 2), block(second, second))
        self.linear = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class PreActBlock(nn.Module):
    """`hasattr` decides about the shortcut, which starts behind the first ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActNet(nn.Module):
    def __init__(self, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.Sequential(block(8, 8, 1), block(8, 16, 2), block(16, 16, 1))
        self.bn = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class WideBlock(nn.Module):
    """Wide ResNet: the input itself may be overwritten by its activation; dropout inside."""

    def __init__(
        self, in_planes: int, out_planes: int, stride: int, drop_rate: float = 0.3
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.drop_rate = drop_rate
        self.equal = in_planes == out_planes
        self.shortcut = None if self.equal else nn.Conv2d(in_planes, out_planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equal else self.shortcut(x), out)


class ReluBeforeConv(nn.Module):
    """The ReLU in place on the input: the shortcut carries relu(x), not x."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1)
        self.skip = (
            nn.Identity() if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(self.relu(x)))))
        return out + self.skip(x)


class ResNeXtBlock(nn.Module):
    """Long names, a Sequential shortcut filled with add_module."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, cardinality: int = 2
    ) -> None:
        super().__init__()
        width = out_channels // 2
        self.conv_reduce = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, 1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut.add_module("shortcut_conv", projection)
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        bottleneck = self.conv_reduce.forward(x)
        bottleneck = F.relu(self.bn_reduce.forward(bottleneck), inplace=True)
        bottleneck = self.conv_conv.forward(bottleneck)
        bottleneck = F.relu(self.bn.forward(bottleneck), inplace=True)
        bottleneck = self.conv_expand.forward(bottleneck)
        bottleneck = self.bn_expand.forward(bottleneck)
        residual = self.shortcut.forward(x)
        return F.relu(residual + bottleneck, inplace=True)


# Sequences and helper functions


def conv_block(in_channels: int, out_channels: int, pool: bool = False) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class ResNet9(nn.Module):
    """Sequences only; the add has no ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_block(3, 8)
        self.conv2 = conv_block(8, 16, pool=True)
        self.res1 = nn.Sequential(conv_block(16, 16), conv_block(16, 16))
        self.conv3 = conv_block(16, 24, pool=True)
        self.conv4 = conv_block(24, 32, pool=True)
        self.res2 = nn.Sequential(conv_block(32, 32), conv_block(32, 32))
        self.classifier = nn.Sequential(
            nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10)
        )

    def forward(self, xb: Tensor) -> Tensor:
        out = self.conv1(xb)
        out = self.conv2(out)
        out = self.res1(out) + out
        out = self.conv3(out)
        out = self.conv4(out)
        out = self.res2(out) + out
        return self.classifier(out)


def sequential_chain() -> nn.Sequential:
    """Nothing but one Sequential; two convolutions without batch norm at the end."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def named_sequence() -> nn.Sequential:
    """A Sequential of an OrderedDict, normalisation first as in DenseNet."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv0"] = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    layers["norm0"] = nn.BatchNorm2d(8)
    layers["relu0"] = nn.ReLU(inplace=True)
    layers["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
    layers["norm1"] = nn.BatchNorm2d(8)
    layers["relu1"] = nn.ReLU(inplace=True)
    layers["conv1"] = nn.Conv2d(8, 12, 1, bias=False)
    return nn.Sequential(layers)


class ConvLayer(nn.Sequential):
    """A convolution with what belongs to it; the last of a branch starts with gamma 0."""

    def __init__(
        self, ni: int, nf: int, ks: int = 3, stride: int = 1, act: bool = True, zero: bool = False
    ) -> None:
        conv = nn.Conv2d(ni, nf, ks, stride, (ks - 1) // 2, bias=False)
        bn = nn.BatchNorm2d(nf)
        nn.init.constant_(bn.weight, 0.0 if zero else 1.0)
        super().__init__(conv, bn, *([nn.ReLU()] if act else []))


def noop(x: Tensor) -> Tensor:
    return x


class FastBlock(nn.Module):
    """Nested sequences; the shortcut pools and projects, or is a function."""

    def __init__(self, ni: int, nf: int, stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvLayer(ni, nf // 2, 1),
            ConvLayer(nf // 2, nf // 2, stride=stride),
            ConvLayer(nf // 2, nf, 1, act=False, zero=True),
        )
        self.idconv = noop if ni == nf else ConvLayer(ni, nf, 1, act=False)
        self.pool = noop if stride == 1 else nn.AvgPool2d(2, ceil_mode=True)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convs(x) + self.idconv(self.pool(x)))


class FastNet(nn.Sequential):
    def __init__(self) -> None:
        stem = [ConvLayer(3, 4, stride=2), ConvLayer(4, 8), ConvLayer(8, 8)]
        super().__init__(
            *stem, nn.MaxPool2d(3, 2, 1),
            nn.Sequential(FastBlock(8, 16), FastBlock(16, 16)),
            nn.Sequential(FastBlock(16, 24, 2), FastBlock(24, 24)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
        )  # fmt: skip


# Dense prediction


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Residual encoder, concatenating decoder; every stage's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), CifarBlock(8, 8), DoubleConv(8, 16))
        self.down2 = CifarBlock(16, 32, 2)
        self.up1 = nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2)
        self.conv1 = DoubleConv(32, 16)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv2 = DoubleConv(24, 8)
        self.outc = nn.Conv2d(8, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.up1(self.down2(x2))
        x = self.conv1(torch.cat([x2, x], dim=1))
        x = self.conv2(torch.cat([x1, self.up2(x)], dim=1))
        return torch.sigmoid(self.outc(x))


class FeaturePyramid(nn.Module):
    """Laterals and a top-down path of adds without ReLU; returns a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8, pool=True)
        self.c2 = CifarBlock(8, 8)
        self.c3 = CifarBlock(8, 16, 2)
        self.c4 = CifarBlock(16, 32, 2)
        self.laterals = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (8, 16, 32))
        self.smooth = nn.ModuleList(conv_block(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        c2 = self.c2(self.stem(x))
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        tops = [lateral(c) for lateral, c in zip(self.laterals, (c2, c3, c4), strict=True)]
        for i in (1, 0):
            tops[i] = tops[i] + F.interpolate(tops[i + 1], scale_factor=2, mode="nearest")
        return [smooth(top) for smooth, top in zip(self.smooth, tops, strict=True)]


class Detector(nn.Module):
    """Backbone, heads that every level shares, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = FeaturePyramid()
        self.head = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.classes = nn.Conv2d(12, 5, 1)
        self.boxes = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = [self.head(feature) for feature in self.backbone(x)]
        logits = [self.classes(f).flatten(2) for f in features]
        boxes = [self.boxes(f).flatten(2) for f in features]
        return {"logits": torch.cat(logits, 2), "boxes": F.relu(torch.cat(boxes, 2))}


class EnhancedResidual(nn.Module):
    """Super resolution without batch norm: the branch is scaled, only the add is left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.res_scale = 0.1

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x).mul(self.res_scale)
        res += x
        return res


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(EnhancedResidual(8) for _ in range(2)))
        self.after = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU())
        self.relu = nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        x = self.relu(self.body(x) + x)
        return self.tail(self.after(x) + x)


class Generator(nn.Module):
    """Reflection padding, instance norm, transposed convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(True),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        )  # fmt: skip
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x + self.block(x))


def discriminator() -> nn.Sequential:
    """Spectral norm, LeakyReLU."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, inplace=True),
        parametrizations.weight_norm(nn.Conv2d(16, 16, 3, 1, 1)), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 1, 3),
    )  # fmt: skip


# Blocks that are no residual blocks, or more than that


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


def dense_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8, 4), DenseLayer(12, 4),
        nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1), nn.AvgPool2d(2),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.use_res_connect = stride == 1 and channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class ChannelAndSpatialAttention(nn.Module):
    """Attention between the last batch norm and the add."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.mlp = nn.Sequential(nn.Conv2d(planes, 4, 1), nn.ReLU(), nn.Conv2d(4, planes, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.downsample = None
        if stride != 1 or in_planes != planes:
            self.downsample = ConvLayer(in_planes, planes, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        pooled = self.mlp(F.adaptive_avg_pool2d(out, 1)) + self.mlp(F.adaptive_max_pool2d(out, 1))
        out = torch.sigmoid(pooled) * out
        maps = torch.cat([out.mean(1, keepdim=True), out.amax(1, keepdim=True)], 1)
        out = torch.sigmoid(self.spatial(maps)) * out
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class DeepAggregation(nn.Module):
    """The shortcut comes as an argument; the root adds one of its inputs to their mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.base = conv_block(3, 8)
        self.one, self.two = CifarBlock(8, 8), CifarBlock(8, 8)
        self.conv = nn.Conv2d(16, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def root(self, *x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(torch.cat(x, 1)))
        if residual is not None:
            out += residual
        return self.relu(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        first = self.one(x)
        second = self.two(first)
        return self.root(first, second, residual=second)


class StochasticDepth(nn.Module):
    """A branch that training leaves out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.blocks = nn.ModuleList(CifarBlock(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training and torch.rand(1).item() < 0.5:
                continue
            x = block(x)
        return x


class Checkpointed(nn.Module):
    """Stages under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.layer = nn.Sequential(ConvLayer(8, 8), ConvLayer(8, 8))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.bn(checkpoint(self.layer, x, use_reentrant=False)) + x)


# Sharing


class OneRelu(nn.Module):
    """One ReLU module, in place, registered in the network and handed to every block."""

    class Block(nn.Module):
        def __init__(self, channels: int, relu: nn.Module) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.act = relu

        def forward(self, x: Tensor) -> Tensor:
            out = self.act(self.bn1(self.conv1(x)))
            return self.act(self.bn2(self.conv2(out)) + x)

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), self.relu)
        self.blocks = nn.Sequential(self.Block(8, self.relu), self.Block(8, self.relu))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class NormTwice(nn.Module):
    """One batch norm behind two convolutions: it sees two batches in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        return self.relu(self.bn(self.conv2(x)) + x)


class ConvTwice(nn.Module):
    """One convolution in front of two batch norms: its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv(x)))
        return F.relu(self.bn2(self.conv(out)) + x)


class SharedAcrossBlocks(nn.Module):
    """Two blocks, each with batch norms of its own, over the same convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.first, self.second = CifarBlock(8, 8), CifarBlock(8, 8)
        self.second.conv1 = self.first.conv1
        self.second.bn2 = self.first.bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class Recurrent(nn.Module):
    """The same block three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.block = CifarBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


class Siamese(nn.Module):
    """One encoder for two images: its running statistics move twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_block(3, 8, pool=True), CifarBlock(8, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - self.encoder(x.flip(3) * 0.5)).abs().mean((2, 3))


# What is used a second time, or changed in place


class SumIsUsedTwice(nn.Module):
    """What goes into the last ReLU also goes to an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        total = self.bn(self.conv(x)) + x
        return F.relu(total), self.aux(total)


class NormIsUsedTwice(nn.Module):
    """The output of the batch norm is returned, before and after a ReLU in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normalized = self.bn(self.conv(x))
        return self.relu(normalized) * 2.0, normalized


class ConvIsUsedTwice(nn.Module):
    """The convolution's output is the shortcut of its own batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.bn(x) + x)


class ChangedInPlace(nn.Module):
    """The shortcut is a view of what changes before the add; the sum changes before its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        identity = x[:, :]
        out = self.bn(self.conv(x.clone()))
        x.mul_(0.5)
        out = out + identity
        out[:, 0] += 1.0
        return F.relu(out)


class AddsOfAllKinds(nn.Module):
    """Scaled, subtracted, in place, broadcast, with a number, of the same tensor: then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.stem = conv_block(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = [norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)]
        out = F.relu(torch.add(branch[0], x, alpha=0.5))
        out = out * F.relu(branch[1] - x)
        out = out + F.relu(branch[2].add_(x))
        out = out + F.relu(branch[3] + x.mean((2, 3), keepdim=True))
        out = out + F.relu(x.amax((0, 2, 3), keepdim=True) + branch[4]) + F.relu(x + x)
        return out + F.relu(branch[5] + 0.25)


class PooledAndKept(nn.Module):
    """The stem's output is pooled, and used as it is; the second pooling gives indices, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.pool_with_indices = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        full = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(self.pool(full))))
        x, indices = self.pool_with_indices(x)
        x = self.unpool(x, indices)
        return F.interpolate(x, size=full.shape[2:]) + full


class PaddingUNet(nn.Module):
    """Pads what comes up to the size of what it is joined with."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 8)
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.up = nn.ConvTranspose2d(16, 8, kernel_size=2, stride=2)
        self.conv = DoubleConv(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x2 = self.inc(x)
        x1 = self.up(self.down(x2))
        rows = x2.size()[2] - x1.size()[2]
        columns = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


# Settings of layers


class SettingsOfNorms(nn.Module):
    """Batch norms without statistics, without parameters, with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.bn2 = nn.BatchNorm2d(8, affine=False, eps=1e-3)
        self.conv3 = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=4)
        self.bn3 = nn.BatchNorm2d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(y)) + x)


class FunctionalLayers(nn.Module):
    """Functions over parameters instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.beta = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8) * 0.1)
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, padding=1)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)
        return F.relu(x)


class NormsInEvalMode(nn.Module):
    """`train` leaves the batch norms in evaluation, as detectors do; the stem is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.layer = nn.Sequential(CifarBlock(8, 8), CifarBlock(8, 16, 2))
        self.stem.requires_grad_(False)

    def train(self, mode: bool = True) -> "NormsInEvalMode":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x))


def signal_network() -> nn.Sequential:
    """Convolutions over time."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv1d(8, 8, 5, padding=2)
            self.bn1 = nn.BatchNorm1d(8)
            self.conv2 = nn.Conv1d(8, 8, 5, padding=2)
            self.bn2 = nn.BatchNorm1d(8)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(out + x)

    stem = nn.Sequential(nn.Conv1d(3, 8, 7, padding=3), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(stem, Block(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))


class Network(NamedTuple):
    """build: makes one with random weights. shape: of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 32, 32)


NETWORKS: dict[str, Network] = {
    "tutorial_identity_downsample": Network(TutorialResNet),
    "tutorial_conform_layer": Network(conform_network),
    "cifar_option_a_lambda": Network(lambda: CifarNet(CifarBlock)),
    "cifar_option_a_inline": Network(lambda: CifarNet(CifarBlockInline)),
    "cifar_resnext": Network(lambda: CifarNet(ResNeXtBlock)),
    "cifar_attention": Network(lambda: CifarNet(ChannelAndSpatialAttention)),
    "cifar_preactivation": Network(lambda: PreActNet(PreActBlock)),
    "cifar_wide": Network(lambda: PreActNet(WideBlock)),
    "cifar_relu_before_conv": Network(lambda: PreActNet(ReluBeforeConv)),
    "resnet9": Network(ResNet9),
    "sequential_chain": Network(sequential_chain),
    "named_sequence": Network(named_sequence),
    "nested_conv_layers": Network(FastNet),
    "unet": Network(UNet),
    "feature_pyramid": Network(FeaturePyramid),
    "detector": Network(Detector),
    "super_resolution": Network(SuperResolution),
    "generator": Network(Generator),
    "discriminator": Network(discriminator),
    "dense": Network(dense_network),
    "inverted_residual": Network(lambda: PreActNet(InvertedResidual)),
    "deep_aggregation": Network(DeepAggregation),
    "stochastic_depth": Network(StochasticDepth),
    "checkpointed": Network(Checkpointed),
    "one_relu": Network(OneRelu),
    "norm_twice": Network(NormTwice),
    "conv_twice": Network(ConvTwice),
    "shared_across_blocks": Network(SharedAcrossBlocks),
    "recurrent": Network(Recurrent),
    "siamese": Network(Siamese),
    "sum_is_used_twice": Network(SumIsUsedTwice),
    "norm_is_used_twice": Network(lambda: NormIsUsedTwice(inplace=False)),
    "norm_is_used_twice_in_place": Network(lambda: NormIsUsedTwice(inplace=True)),
    "conv_is_used_twice": Network(ConvIsUsedTwice),
    "changed_in_place": Network(ChangedInPlace),
    "adds_of_all_kinds": Network(AddsOfAllKinds),
    "pooled_and_kept": Network(PooledAndKept),
    "unet_with_padding": Network(PaddingUNet, (2, 3, 21, 19)),
    "settings_of_norms": Network(SettingsOfNorms),
    "functional_layers": Network(FunctionalLayers),
    "norms_in_eval_mode": Network(NormsInEvalMode),
    "signal": Network(signal_network, (3, 3, 40)),
}
