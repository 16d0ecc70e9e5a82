"""Residual blocks as people write them: some that can be proven, some that must be left alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def projection(inplanes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class Basic(nn.Module):
    """The layers of a BasicBlock and the most common way to call them."""

    def __init__(
        self,
        inplanes: int = 8,
        planes: int = 16,
        stride: int = 2,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=bias)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=bias)
        self.bn2 = norm(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = projection(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class BasicFunctional(Basic):
    """Functional ReLU, `x + y`."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicMethods(Basic):
    """Tensor methods, shortcut first in the sum, an Identity on the way."""

    def __init__(self, inplanes: int = 8, planes: int = 16, stride: int = 2) -> None:
        super().__init__(inplanes, planes, stride)
        self.drop = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x)).relu_()
        out = self.drop(self.bn2(self.conv2(out)))
        if mask is not None:
            out = out * mask
        return torch.add(identity, out).relu()


class BasicEmptyShortcut(nn.Module):
    """An empty Sequential as identity, other names, biases."""

    def __init__(self, planes: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(planes, planes, 3, padding=1)
        self.norm_a = nn.BatchNorm2d(planes)
        self.second = nn.Conv2d(planes, planes, 3, padding=1)
        self.norm_b = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()

    def forward(self, inputs: Tensor) -> Tensor:
        out = F.relu(self.norm_a(self.first(inputs)))
        out = self.norm_b(self.second(out))
        out += self.shortcut(inputs)
        return F.relu(out)


class Subsample(nn.Module):
    """Shortcut without parameters: stride 2, zeros for the new channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))


class BasicOptionA(Basic):
    """A shortcut of the user's own."""

    def __init__(self) -> None:
        super().__init__(8, 16, 2)
        self.downsample = Subsample()


class BottleneckCloned(nn.Module):
    """The input cloned first, a shortcut called identity_downsample, three ReLU modules."""

    expansion = 2

    def __init__(self, inplanes: int = 8, width: int = 4, stride: int = 2) -> None:
        super().__init__()
        planes = width * self.expansion
        self.l1 = nn.Conv2d(inplanes, width, 1, stride)
        self.BN1 = nn.BatchNorm2d(width)
        self.l2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.BN2 = nn.BatchNorm2d(width)
        self.l3 = nn.Conv2d(width, planes, 1)
        self.BN3 = nn.BatchNorm2d(planes)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True)
        self.identity_downsample = nn.Conv2d(inplanes, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.act1(self.BN1(self.l1(x)))
        x = self.act2(self.BN2(self.l2(x)))
        x = self.BN3(self.l3(x))
        if self.identity_downsample is not None:
            identity = self.identity_downsample(identity)
        x += identity
        return self.act3(x)


class PreActivation(Basic):
    """Batch norm and ReLU in front of each convolution, the sum out of place."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(out))) + x


class PreActivationProjected(Basic):
    """The shortcut starts behind the first ReLU; it is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8)
        self.downsample = nn.Conv2d(8, 16, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(z))))
        out += self.downsample(z)
        return out


class Unit(nn.Module):
    """Convolution, batch norm and activation as one module."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.normalization = nn.BatchNorm2d(planes)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class NestedUnits(nn.Module):
    """A block whose layers stand in modules of its own, the shortcut's too."""

    def __init__(self, inplanes: int = 8, planes: int = 16, stride: int = 2) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inplanes != planes:
            self.shortcut = Unit(inplanes, planes, stride, relu=False)
        self.layer = nn.Sequential(Unit(inplanes, planes, stride), Unit(planes, planes, relu=False))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.layer(x)
        residual = self.shortcut(residual)
        x += residual
        return self.activation(x)


class ProjectionAsAttributes(Basic):
    """Convolution and batch norm of the shortcut are children of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = None
        self.conv3 = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.bn3 = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.bn3(self.conv3(x))
        return self.relu(out)


PROVABLE: dict[str, Callable[[], nn.Module]] = {
    "basic": Basic,
    "basic_identity": lambda: Basic(8, 8, 1),
    "basic_bias": lambda: Basic(bias=True),
    "basic_functional": BasicFunctional,
    "basic_methods": BasicMethods,
    "basic_empty_shortcut": BasicEmptyShortcut,
    "basic_option_a": BasicOptionA,
    "bottleneck_cloned": BottleneckCloned,
    "pre_activation": PreActivation,
    "pre_activation_projected": PreActivationProjected,
    "nested_units": NestedUnits,
    "nested_units_identity": lambda: NestedUnits(8, 8, 1),
    "projection_as_attributes": ProjectionAsAttributes,
}


class AddsIntoInput(Basic):
    def __init__(self) -> None:
        super().__init__(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity += out
        return self.relu(identity)


class Scaled(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(0.1 * out + self.downsample(x))


class NoLastRelu(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out + self.downsample(x)


class Gelu(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.GELU()


class Excited(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out * self.se(out)
        return self.relu(out + self.downsample(x))


class DropsInTraining(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + self.downsample(x)
        return F.relu(F.dropout(out, 0.5) if self.training else out)


class ReturnsTwo(Basic):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(x)
        return out, out


class Counts(Basic):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Records(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.append(out)
        return out


class Branches(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Raises(Basic):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 8:
            raise ValueError("8 channels, please")
        return super().forward(x)


class OneNormTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn1(self.conv2(out))
        return self.relu(out + self.downsample(x))


class ExtraWork(Basic):
    def forward(self, x: Tensor) -> Tensor:
        torch.sigmoid(x)
        return super().forward(x)


class FourConvolutions(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList()
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.conv4, self.bn4 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.relu(self.bn3(self.conv3(out)))
        return self.relu(self.bn4(self.conv4(out)) + self.downsample(x))


class NoShortcut(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + out)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class OwnSyncNorm(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


# The text stands in the reason that `explain` gives.
UNPROVABLE: dict[str, tuple[type[Basic], str]] = {
    "adds_into_input": (AddsIntoInput, "adds in place into the shortcut"),
    "scaled": (Scaled, "expected a batch norm, found mul"),
    "no_last_relu": (NoLastRelu, "expected the last ReLU, found add"),
    "gelu": (Gelu, "expected the last ReLU, found relu (GELU)"),
    "squeeze_and_excitation": (Excited, "expected a batch norm, found mul"),
    "drops_in_training": (DropsInTraining, "it differs between training and evaluation"),
    "returns_two": (ReturnsTwo, "does not return one tensor"),
    "counts": (Counts, "changes the attribute calls"),
    "records": (Records, "changes the attribute seen"),
    "branches": (Branches, "cannot be traced (TraceError"),
    "raises": (Raises, "cannot be traced (TraceError"),
    "one_norm_twice": (OneNormTwice, "calls bn1 more than once"),
    "extra_work": (ExtraWork, "also computes sigmoid"),
    "four_convolutions": (FourConvolutions, "4 convolutions in a row, not 2 or 3"),
    "no_shortcut": (NoShortcut, "a batch norm and a shortcut"),
}
