"""Residual blocks as people write them, each with a forward of its own, made by a `Builder`."""

import torch
from random_layers import Builder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SETTINGS = {"scale": 1.0}


class Basic(nn.Module):
    """The layers of most blocks below, and torchvision's way to call them."""

    def __init__(self, b: Builder) -> None:
        super().__init__()
        self.conv1 = b.conv(b.cin, b.cout, stride=b.stride)
        self.bn1 = b.norm(b.cout)
        self.relu = b.relu()
        self.conv2 = b.conv(b.cout, b.cout)
        self.bn2 = b.norm(b.cout)
        self.relu2 = self.relu if b.block.shares_relu else b.relu()
        self.downsample = b.shortcut()
        self.inplace = b.block.inplace

    def identity(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def main(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu2(out)


class ShortcutFirst(Basic):
    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        return self.relu2(identity + self.main(x))


class MainFirst(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) + self.identity(x))


class ShortcutBetween(Basic):
    """The shortcut reads x after conv1 and before the rest."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        identity = self.identity(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(out))))
        return self.relu2(out + identity)


class Functional(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        out = torch.add(self.bn2(self.conv2(out)), self.identity(x))
        return F.relu_(out) if self.inplace else torch.relu(out)


class Methods(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(out)).add_(self.identity(x)).relu()


class AddsIntoShortcut(Basic):
    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        identity += self.main(x)
        return self.relu2(identity)


class AddsScaled(Basic):
    """torch.add has a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(torch.add(self.main(x), self.identity(x), alpha=0.5))


class AddsSum(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(sum([self.main(x), self.identity(x)]))


class Clones(Basic):
    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.downsample is not None:
            identity = self.downsample(identity)
        x += identity
        return self.relu2(x)


class NoLastRelu(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.identity(x)


class NoShortcut(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x))


class SumOfItself(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        return self.relu2(out + out)


class Detached(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) + self.identity(x).detach())


class PartlyWithoutGradients(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.relu(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.identity(x))


class WithoutGradientsInside(Basic):
    """One layer in the middle of what could be one pass."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        with torch.set_grad_enabled(not self.training):
            out = self.bn1(out)
        return self.relu2(self.bn2(self.conv2(self.relu(out))) + self.identity(x))


class Bottleneck(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.conv1, self.conv2 = b.conv(b.cin, 4, 1), b.conv(4, 4, stride=b.stride)
        self.bn1, self.bn2 = b.norm(4), b.norm(4)
        self.conv3, self.bn3 = b.conv(4, b.cout, 1), b.norm(b.cout)
        self.act3 = self.relu if b.block.shares_relu else b.relu()

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act3(out)


class BottleneckFunctional(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.identity(x) + self.bn3(self.conv3(out)))


class OneConvolution(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out += self.identity(x)
        return self.relu(out)


class FourConvolutions(Bottleneck):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.conv4, self.bn4 = b.conv(b.cout, b.cout), b.norm(b.cout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = F.relu(self.bn3(self.conv3(out)))
        out = self.bn4(self.conv4(out))
        return self.act3(out + self.identity(x))


class LoopsOverLists(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.convs = nn.ModuleList([self.conv1, self.conv2])
        self.norms = nn.ModuleList([self.bn1, self.bn2])
        del self.conv1, self.bn1, self.conv2, self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if i < len(self.convs) - 1:
                out = self.relu(out)
        return self.relu2(out + self.identity(x))


class ActivationList(Basic):
    """ReLUs in containers that nobody calls."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.acts = nn.ModuleList([self.relu])
        self.more = nn.ModuleDict({"last": self.relu2})
        del self.relu, self.relu2

    def forward(self, x: Tensor) -> Tensor:
        out = self.acts[0](self.bn1(self.conv1(x)))
        return self.more["last"](self.bn2(self.conv2(out)) + self.identity(x))


class DirectShortcut(Basic):
    """Projection and norm of the shortcut are attributes of the block."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.conv_s = nn.Conv2d(b.cin, b.cout, 1, b.stride, bias=False)
        self.bn_s = b.norm(b.cout)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn_s(self.conv_s(x))
        out = self.main(x)
        return self.relu2(out + residual)


class TwoBranches(DirectShortcut):
    """RepVGG: one convolution beside another one, and the input."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)) + self.bn_s(self.conv_s(x)) + self.identity(x)
        return self.relu2(out)


class PreActivation(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.bn1 = b.norm(b.cin)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = self.downsample(out) if self.downsample is not None else x
        out = self.conv1(out)
        out = self.conv2(self.relu2(self.bn2(out)))
        out += shortcut
        return out


class PreActivationPlainShortcut(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        out = self.conv1(F.relu(self.bn1(x)))
        return identity + self.conv2(F.relu(self.bn2(out)))


class PreActivationLastNorm(PreActivation):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.bn3 = b.norm(b.cout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.bn3(self.conv2(self.relu2(self.bn2(out))))
        return out + self.identity(x)


class MutatesInput(Basic):
    """A ReLU in place on the block's input, which the shortcut then sees."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(F.relu(x, inplace=True)))))
        return self.identity(x) + self.bn2(out)


class MutatesInputLate(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        x.mul_(0.5)
        return self.relu2(out + self.identity(x))


class MutatesInputBetween(Basic):
    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        out = self.relu(self.bn1(self.conv1(x)))
        F.relu_(x)
        return self.relu2(self.bn2(self.conv2(out)) + identity)


class MutatesThroughView(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        flat = out.view(out.shape)
        flat.mul_(0.5)
        return self.relu2(self.bn2(self.conv2(self.relu(out))) + self.identity(x))


class ReluFirst(Basic):
    """Norm behind the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.relu(self.conv1(x)))
        out = self.bn2(self.relu2(self.conv2(out)))
        return out + self.identity(x)


class NormOfSum(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out) + self.identity(x)))


class ConvNormAct(nn.Module):
    """Hugging Face's ResNetConvLayer."""

    def __init__(self, b: Builder, cin: int, stride: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.convolution = b.conv(cin, b.cout, stride=stride)
        self.normalization = b.norm(b.cout)
        self.activation = activation if activation is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convolution(x)
        hidden = self.normalization(hidden)
        return self.activation(hidden)


class Nested(nn.Module):
    """Hugging Face's ResNetBasicLayer."""

    def __init__(self, b: Builder) -> None:
        super().__init__()
        self.shortcut = b.shortcut() or nn.Identity()
        self.layer = nn.Sequential(
            ConvNormAct(b, b.cin, b.stride, b.relu()), ConvNormAct(b, b.cout, 1, None)
        )
        self.activation = b.relu()

    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden
        hidden = self.layer(hidden)
        residual = self.shortcut(residual)
        hidden += residual
        return self.activation(hidden)


class SequentialBranch(Basic):
    """One Sequential for the main branch, with as many ReLUs as places."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.branch = nn.Sequential(self.conv1, self.bn1, self.relu, self.conv2, self.bn2)
        del self.conv1, self.bn1, self.conv2, self.bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.branch(x) + self.identity(x))


class Plain(nn.Sequential):
    """No shortcut at all, and no forward."""

    def __init__(self, b: Builder) -> None:
        layers = (b.conv(b.cin, b.cout, stride=b.stride), b.norm(b.cout), b.relu())
        super().__init__(*layers, b.conv(b.cout, b.cout), b.norm(b.cout), b.relu())


class OwnSequential(Plain):
    """A Sequential with a forward of its own, which calls that of its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x) - x.mean())


class Excited(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(b.cout, b.cout, 1), nn.ReLU(), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        out = out * self.se(out)
        return self.relu2(out + self.identity(x))


class Dropped(Basic):
    """Dropout of a rate that a user may change."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.drop = nn.Dropout2d(0.0 if b.block.shares_relu else 0.3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.drop(self.bn2(self.conv2(out)))
        return self.relu2(out + self.identity(x))


class DroppedInside(Dropped):
    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.relu(self.bn1(self.conv1(x))), 0.2, self.training)
        return self.relu2(self.bn2(self.conv2(out)) + self.identity(x))


class AntiAliased(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.blur = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blur(self.relu(self.bn1(self.conv1(x))))
        return self.relu2(self.bn2(self.conv2(out)) + self.identity(x))


class ConvBetween(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.between = nn.Conv2d(b.cout, b.cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.between(self.main(x)) + self.identity(x))


class Scaled(Basic):
    """Reads a number that may change."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale * self.main(x)
        return self.relu2(out + self.identity(x))


class ScaledByTable(Scaled):
    """The number stands in a dictionary that no attribute assignment touches."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.config = {"scale": 0.5, "relu": True}

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) * self.config["scale"] + self.identity(x)
        return self.relu2(out) if self.config["relu"] else out


class ScaledBySetting(Basic):
    """The number is global."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) * SETTINGS["scale"] + self.identity(x))


class ScaledByClass(Basic):
    """The number belongs to the class, until an instance gets one of its own."""

    scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) * self.scale + self.identity(x))


class ScaledByOptionalParameter(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.register_parameter("gamma", None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.gamma is not None:
            out = out * self.gamma
        return self.relu2(out + self.identity(x))


class ScaledByParameter(Basic):
    """LayerScale."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.gamma = nn.Parameter(torch.full((b.cout, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.gamma * self.main(x) + self.identity(x))


class Flagged(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.has_shortcut, self.has_relu = True, True

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.has_shortcut:
            out = out + self.identity(x)
        return self.relu2(out) if self.has_relu else out


class OptionalLayer(Basic):
    """A layer that may be None, or be set later."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.drop_block: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.drop_block is not None:
            out = self.drop_block(out)
        return self.relu2(out + self.identity(x))


class OptionalArgument(Basic):
    def forward(self, x: Tensor, factor: float | None = None) -> Tensor:
        out = self.main(x)
        if factor is not None:
            out = out * factor
        return self.relu2(out + self.identity(x))


class BranchesOnTraining(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.training:
            return self.relu2(out + self.identity(x))
        return out + self.identity(x)


class BranchesOnGradients(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return self.relu2(out) if x.requires_grad else out


class BranchesOnGradMode(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return self.relu2(out) if torch.is_grad_enabled() else out


class BranchesOnShape(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        identity = self.identity(x)
        if x.shape[2] > 6:
            out = out * 2.0
        return self.relu2(out + identity)


class BranchesOnType(Basic):
    """Takes a tensor or a list of tensors."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            x = [x]
        return self.relu2(self.main(x[0]) + self.identity(x[0]))


class BranchesOnOtherTypes(Basic):
    """What is no tensor is multiplied by 3: a symbol of one must not be."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return self.relu2(out) if isinstance(out, Tensor) else out * 3.0


class BranchesOnExactType(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return self.relu2(out) if type(out) is Tensor else out * 3.0


class BranchesOnIsTensor(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return self.relu2(out) if torch.is_tensor(out) else out * 3.0


class BranchesOnInference(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return out if torch.is_inference_mode_enabled() else self.relu2(out)


class BranchesOnAutocast(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x) + self.identity(x)
        return out if torch.is_autocast_enabled("cpu") else self.relu2(out)


class BranchesOnValues(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        # Not at 0 or 1, which are the moments of a normalised image but for rounding.
        if out.square().mean() > 1.1:
            out = out + self.identity(x)
        return self.relu2(out)


class BranchesOnChild(Basic):
    """Reads settings of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if isinstance(self.bn2, nn.BatchNorm2d) and self.bn2.training:
            out = out * 0.5
        return self.relu2(out + self.identity(x))


class StochasticDepth(Basic):
    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.rate = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(1)) < self.rate:
            return self.identity(x)
        return self.relu2(self.main(x) + self.identity(x))


class StochasticScale(StochasticDepth):
    """A number drawn in every call, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) * float(torch.rand(1)) + self.identity(x))


class StochasticTensor(StochasticDepth):
    """A tensor drawn in training, as drop path does it."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.training:
            mask = torch.rand(1) < self.rate
            out = out * mask.to(out.dtype)
        return self.relu2(out + self.identity(x))


class UsesIntermediateTwice(Basic):
    """The norm's output is read again, after a ReLU that may have changed it in place."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(self.relu(first)))
        return self.relu2(out + first)


class UsesConvolutionTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(first))))
        return self.relu2(out + first)


class UsesSumTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        out = out + self.identity(x)
        return self.relu2(out) + 0.1 * out


class ReturnsInside(Basic):
    """Ends in a value that is read inside, too."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(inner)) + self.identity(x))
        return out * inner.mean()


class Keeps(Basic):
    """Stores an activation on itself."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        self.kept = out.detach()
        return self.relu2(out + self.identity(x))


class Counts(Basic):
    """Depends on how often it has been called."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.relu2(self.main(x) * self.calls[0] + self.identity(x))


class CountsInside(Basic):
    """The same in a list in a dictionary."""

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.state = {"calls": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.state["calls"][0] += 1
        return self.relu2(self.main(x) * self.state["calls"][0] + self.identity(x))


class OneConvTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu2(self.bn2(self.conv2(out)) + self.identity(x))


class OneNormTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.identity(x))


class ReadsWeights(Basic):
    """Weight standardisation beside the layers."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv1
        out = self.bn1(conv(x)) * conv.weight.mean()
        return self.relu2(self.bn2(self.conv2(self.relu(out))) + self.identity(x))


class EvaluatesNorm(Basic):
    """A norm that stays in evaluation, set in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn1.eval()
        return self.relu2(self.main(x) + self.identity(x))


class Keywords(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(input=self.conv1(input=x))
        out = self.bn2(input=self.conv2(input=self.relu(input=out)))
        return self.relu2(out + self.identity(x))


class CallsForward(Basic):
    """Past the hooks of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1.forward(self.conv1.forward(x)))
        return self.relu2(self.bn2.forward(self.conv2.forward(out)) + self.identity(x))


class Checkpointed(Basic):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            out = checkpoint(self.main, x, use_reentrant=False)
        else:
            out = self.main(x)
        return self.relu2(out + self.identity(x))


class Crops(Basic):
    """Shapes and slices."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        identity = self.identity(x)[:, :, : out.shape[2], : out.shape[3]]
        return self.relu2(out + identity)


class Concatenates(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        half = out.shape[1] // 2
        out = torch.cat([out[:, :half], self.identity(x)[:, half:]], 1)
        return self.relu2(out)


class SplitsHalves(Basic):
    """Writes into a part of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        half = out.shape[1] // 2
        out[:, :half] += self.identity(x)[:, :half]
        return self.relu2(out)


class Casts(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x).float() + self.identity(x).float()).to(x.dtype)


class AddsBroadcast(Basic):
    """A residual of one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) + self.identity(x).mean((2, 3), keepdim=True))


class AddsNumber(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) + 1)


class Subtracts(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.main(x) - self.identity(x))


class CatchesErrors(Basic):
    def forward(self, x: Tensor) -> Tensor:
        try:
            out = self.main(x)
        except ValueError:
            out = self.bn2(self.conv2(self.conv1(x)))
        return self.relu2(out + self.identity(x))


class CatchesEverything(Basic):
    """What fails for a symbol of a tensor does not for a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        try:
            if float(out.abs().sum()) >= 0.0:
                out = out * 2.0
        except Exception:  # what a forward is tested for
            out = out * 3.0
        return self.relu2(out + self.identity(x))


class Inherits(ShortcutFirst):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Chains(Basic):
    """A helper method that an instance may exchange."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.main(x), self.identity(x))

    def finish(self, out: Tensor, identity: Tensor) -> Tensor:
        out = out.add(identity)
        return out.clamp(min=0)


# The first are most likely.
USUAL: tuple[type[nn.Module], ...] = (
    *(Basic, ShortcutFirst, MainFirst, Functional, Methods, Clones, Bottleneck),
    *(BottleneckFunctional, OneConvolution, FourConvolutions, PreActivation),
    *(PreActivationPlainShortcut, Nested, SequentialBranch, Plain, DirectShortcut),
)
UNUSUAL: tuple[type[nn.Module], ...] = (
    *(ShortcutBetween, AddsIntoShortcut, AddsScaled, AddsSum, NoLastRelu, NoShortcut),
    *(SumOfItself, Detached, PartlyWithoutGradients, WithoutGradientsInside, LoopsOverLists),
    *(TwoBranches, PreActivationLastNorm, MutatesInput, MutatesInputLate, MutatesInputBetween),
    *(MutatesThroughView, ReluFirst, NormOfSum, OwnSequential, Excited, Dropped),
    *(DroppedInside, AntiAliased, ConvBetween, Scaled, ScaledByTable, ScaledByParameter),
    *(ScaledBySetting, BranchesOnGradMode),
    *(Flagged, OptionalLayer, OptionalArgument, BranchesOnTraining, BranchesOnGradients),
    *(BranchesOnShape, BranchesOnType, BranchesOnOtherTypes, BranchesOnValues, BranchesOnChild),
    *(StochasticDepth, StochasticScale, StochasticTensor, UsesIntermediateTwice),
    *(UsesConvolutionTwice, UsesSumTwice, ReturnsInside, Keeps, Counts, OneConvTwice),
    *(OneNormTwice, ReadsWeights, EvaluatesNorm, Keywords, CallsForward, Checkpointed, Crops),
    *(Concatenates, SplitsHalves, Casts, AddsBroadcast, AddsNumber, Subtracts, CatchesErrors),
    *(Inherits, Chains, ScaledByClass, ScaledByOptionalParameter, ActivationList, CountsInside),
    *(BranchesOnExactType, BranchesOnIsTensor, BranchesOnInference, BranchesOnAutocast),
    *(CatchesEverything,),
)
STYLES = {cls.__name__: cls for cls in (*USUAL, *UNUSUAL)}
RANDOM = ("Dropped", "DroppedInside", "StochasticDepth", "StochasticScale", "StochasticTensor")
