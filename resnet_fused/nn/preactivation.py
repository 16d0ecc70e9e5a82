"""PreActBasicBlock and PreActBottleneck: residual blocks with batch norm and ReLU in front.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (ResNet V2): what is added is never
normalised or clipped, so that the shortcuts of a network are the identity from end to end.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from resnet_fused.nn import preactivation_blocks
from resnet_fused.nn.pairs import is_plain_relu, refuse_script
from resnet_fused.nn.residual import conv1x1, conv3x3


class _PreActBlock(nn.Module):
    """A block whose normalisations and convolutions are bn1, conv1, bn2, conv2, ..."""

    expansion: int
    relu: nn.Module
    downsample: nn.Module | None
    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W); returns (N, planes * expansion, H / stride, W / stride)."""
        out = None
        # Fused, the ReLU is not called: only a plain one that nobody listens to may be left out.
        if is_plain_relu(self.relu):
            out = preactivation_blocks.preactivation_forward(x, self._units(), self.downsample)
        return self._forward_unfused(x) if out is None else out

    def _units(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        raise NotImplementedError

    def _forward_unfused(self, x: Tensor) -> Tensor:
        """The same block module by module, where it cannot be fused."""
        (bn, conv), *others = self._units()
        z = self.relu(bn(x))
        shortcut = x if self.downsample is None else self.downsample(z)
        out = conv(z)
        for bn, conv in others:
            out = conv(self.relu(bn(out)))
        out += shortcut
        return out


class PreActBasicBlock(_PreActBlock):
    """Two 3x3 convolutions, each behind batch normalisation and ReLU, and a shortcut, fused.

    conv2(relu(bn2(conv1(z)))) + shortcut with z = relu(bn1(x)); the shortcut is downsample(z), a
    convolution as a rule, or x without downsample. Follows `.train()` and `.eval()` of each
    normalisation at every call. norm_layer makes the normalisation of a width; other than
    BatchNorm2d, SyncBatchNorm and FrozenBatchNorm2d it is called as it is. Raises ValueError for
    groups, base_width or dilation other than 1, 64 and 1.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                "PreActBasicBlock: groups and base_width must be 1 and 64,"
                f" got {groups} and {base_width} (use PreActBottleneck)"
            )
        if dilation != 1:
            raise ValueError(
                f"PreActBasicBlock: dilation must be 1, got {dilation} (use PreActBottleneck)"
            )
        norm = norm_layer or nn.BatchNorm2d
        self.bn1 = norm(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _units(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.bn1, self.conv1), (self.bn2, self.conv2)


class PreActBottleneck(_PreActBlock):
    """1x1, 3x3 and 1x1 convolutions behind batch normalisation and ReLU, and a shortcut, fused.

    conv3(relu(bn3(conv2(relu(bn2(conv1(z))))))) + shortcut with z = relu(bn1(x)); the shortcut is
    downsample(z), a convolution as a rule, or x without downsample. The stride stands in the 3x3
    convolution; groups, base_width and dilation as in `Bottleneck`. Follows `.train()` and
    `.eval()` of each normalisation at every call. norm_layer makes the normalisation of a width;
    other than BatchNorm2d, SyncBatchNorm and FrozenBatchNorm2d it is called as it is.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _units(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.bn1, self.conv1), (self.bn2, self.conv2), (self.bn3, self.conv3)
