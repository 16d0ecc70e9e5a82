"""BasicBlock and Bottleneck: torchvision's blocks, computed by fused operators.

He et al., "Deep Residual Learning for Image Recognition", 2015; the stride stands in the 3x3
convolution of a Bottleneck, as in torchvision.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from resnet_fused.nn import blocks, chains, inference_plan
from resnet_fused.nn.pairs import is_plain_relu, refuse_script
from resnet_fused.nn.training_mode import TrainingMode


class _ResidualBlock(nn.Module):
    """A block whose convolutions and normalisations are conv1, bn1, conv2, bn2, ..."""

    training_mode = TrainingMode.SPEED
    expansion: int
    relu: nn.Module
    downsample: nn.Module | None
    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inplanes, H, W); returns (N, planes * expansion, H / stride, W / stride)."""
        out = inference_plan.run((self,), x)
        # Fused, the ReLU is not called: only a plain one that nobody listens to may be left out.
        if out is None and is_plain_relu(self.relu):
            out = blocks.residual_forward(
                x, self._pairs(), self.downsample, owner=self, mode=self.training_mode
            )
        return self._forward_unfused(x) if out is None else out

    def _pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        raise NotImplementedError

    def _forward_unfused(self, x: Tensor) -> Tensor:
        """The same block module by module, where it cannot be fused."""
        identity = x if self.downsample is None else self.downsample(x)
        *first, (last_conv, last_bn) = self._pairs()
        out = x
        for conv, bn in first:
            out = self.relu(bn(conv(out)))
        out = last_bn(last_conv(out))
        out += identity
        return self.relu(out)


def _parts(block: _ResidualBlock) -> chains.Parts | None:
    return (block._pairs(), block.downsample) if is_plain_relu(block.relu) else None


chains.readers[_ResidualBlock.forward] = _parts


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions with batch normalisation, a shortcut and ReLU, fused.

    Equivalent to torchvision.models.resnet.BasicBlock: same constructor, attributes, `state_dict`
    and results. Follows `.train()` and `.eval()` of the block and of each normalisation at every
    call. norm_layer makes the normalisation of a width; other than BatchNorm2d, SyncBatchNorm and
    FrozenBatchNorm2d it is called as it is. training_mode, an attribute, says what is kept for a
    backward. Raises ValueError for groups, base_width or dilation other than 1, 64 and 1.
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
                "BasicBlock: groups and base_width must be 1 and 64,"
                f" got {groups} and {base_width} (use Bottleneck)"
            )
        if dilation != 1:
            raise ValueError(f"BasicBlock: dilation must be 1, got {dilation} (use Bottleneck)")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def _pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


class Bottleneck(_ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions with batch normalisation, a shortcut and ReLU, fused.

    Equivalent to torchvision.models.resnet.Bottleneck: same constructor, attributes, `state_dict`
    and results, with any groups, width and dilation. Follows `.train()` and `.eval()` of the block
    and of each normalisation at every call. norm_layer makes the normalisation of a width; other
    than BatchNorm2d, SyncBatchNorm and FrozenBatchNorm2d it is called as it is. training_mode, an
    attribute, says what is kept for a backward.
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
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)


def conv3x3(
    inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the image size at stride 1."""
    return nn.Conv2d(
        inplanes,
        planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, kernel_size=1, stride=stride, bias=False)
