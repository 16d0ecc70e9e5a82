"""Layers of random networks: what a block's convolutions, norms, ReLUs and shortcut are made of.

`Block` is plain data, so that the repr of a failing case can be pasted into a test.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import resnet_fused

IDENTITIES = ("identity", "nn.Identity", "empty", "relu_only", "norm_only")
PROJECTIONS = (
    *("conv_bn", "conv", "pool_conv_bn", "pad", "partial", "conv_bn_relu"),
    *("relu_conv_bn", "relu_view_conv_bn", "nested_conv_bn", "conv_bn_drop"),
)
CONVS = (
    *("plain", "bias", "grouped", "depthwise", "dilated", "pointwise", "oblong", "reflect"),
    *("circular", "same", "own", "own_forward", "weight_norm", "pruned", "parametrized"),
    *("spectral", "no_grad"),
)
NORMS = (
    *("batch", "not_affine", "not_tracking", "cumulative", "eps", "frozen", "group", "own"),
    *("own_forward", "instance", "nn.Identity", "no_grad", "buffers"),
)
ACTIVATIONS = ("relu", "relu6", "leaky", "gelu", "own", "prelu")


class Short:
    """A repr that leaves out what is as by default."""

    def __repr__(self) -> str:
        defaults: dict[str, Any] = self._field_defaults  # type: ignore[attr-defined]
        fields: dict[str, Any] = self._asdict()  # type: ignore[attr-defined]
        given = [
            f"{name}={value!r}"
            for name, value in fields.items()
            if name not in defaults or defaults[name] != value
        ]
        return f"{type(self).__name__}({', '.join(given)})"


class _Block(NamedTuple):
    """style: a class in random_blocks. odd: which conv and norm are special, 0 for all of them.

    downsamples: stride 2, where the shortcut is a projection.
    """

    style: str = "Basic"
    shortcut: str = "identity"
    downsamples: bool = False
    conv: str = "plain"
    norm: str = "batch"
    odd: int = 0
    activation: str = "relu"
    inplace: bool = True
    shares_relu: bool = True


class Block(Short, _Block):
    __doc__ = _Block.__doc__


class Builder:
    """Makes the layers of one block: cin, cout, stride are those of the whole block."""

    def __init__(self, block: Block, cin: int, downsamples: bool) -> None:
        self.block, self.cin = block, cin
        self.stride = 2 if downsamples else 1
        self.cout = 8 if downsamples else cin
        self._convs, self._norms = 0, 0

    def conv(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        self._convs += 1
        is_odd = self.block.odd in (0, self._convs)
        return make_conv(self.block.conv if is_odd else "plain", cin, cout, kernel, stride)

    def norm(self, channels: int) -> nn.Module:
        self._norms += 1
        is_odd = self.block.odd in (0, self._norms)
        return make_norm(self.block.norm if is_odd else "batch", channels)

    def relu(self) -> nn.Module:
        inplace = self.block.inplace
        return {
            "relu": lambda: nn.ReLU(inplace=inplace),
            "relu6": lambda: nn.ReLU6(inplace=inplace),
            "leaky": lambda: nn.LeakyReLU(0.1, inplace=inplace),
            "gelu": nn.GELU,
            "own": OwnReLU,
            "prelu": nn.PReLU,
        }[self.block.activation]()

    def shortcut(self) -> nn.Module | None:
        cin, cout, stride = self.cin, self.cout, self.stride
        conv = functools.partial(nn.Conv2d, cin, cout, 1, bias=False)
        kinds: dict[str, Any] = {
            "identity": lambda: None,
            "nn.Identity": nn.Identity,
            "empty": nn.Sequential,
            "relu_only": lambda: nn.ReLU(inplace=self.block.inplace),
            "norm_only": lambda: nn.BatchNorm2d(cin),
            "conv_bn": lambda: nn.Sequential(conv(stride=stride), nn.BatchNorm2d(cout)),
            "conv": lambda: nn.Conv2d(cin, cout, 1, stride),
            "pool_conv_bn": lambda: nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                conv(),
                nn.BatchNorm2d(cout),
            ),
            "pad": lambda: Subsample(stride, cout - cin),
            "partial": lambda: Calls(functools.partial(subsample, stride=stride, more=cout - cin)),
            "conv_bn_relu": lambda: nn.Sequential(
                conv(stride=stride), nn.BatchNorm2d(cout), nn.ReLU(inplace=self.block.inplace)
            ),
            "relu_conv_bn": lambda: nn.Sequential(
                nn.ReLU(inplace=True), conv(stride=stride), nn.BatchNorm2d(cout)
            ),
            "relu_view_conv_bn": lambda: nn.Sequential(
                Calls(torch.Tensor.detach), nn.ReLU(True), conv(stride=stride), nn.BatchNorm2d(cout)
            ),
            "nested_conv_bn": lambda: nn.Sequential(
                nn.Sequential(conv(stride=stride)), nn.Sequential(nn.BatchNorm2d(cout))
            ),
            "conv_bn_drop": lambda: nn.Sequential(
                conv(stride=stride), nn.BatchNorm2d(cout), nn.Dropout(0.2)
            ),
        }
        return kinds[self.block.shortcut]()


def make_conv(kind: str, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    padding: Any = kernel // 2
    more: dict[str, Any] = {"bias": kind in ("bias", "circular", "parametrized")}
    cls: type[nn.Conv2d] = nn.Conv2d
    size: Any = kernel
    if kind == "grouped":
        more["groups"] = 2
    elif kind == "depthwise" and cin == cout:
        more["groups"] = cin
    elif kind == "dilated":
        padding, more["dilation"] = 2 * padding, 2
    elif kind == "pointwise":
        size, padding = 1, 0
    elif kind == "oblong":
        size, padding = (1, kernel), (0, padding)
    elif kind in ("reflect", "circular"):
        more["padding_mode"] = kind
    elif kind == "same" and stride == 1:
        padding = "same"
    elif kind == "own":
        cls = OwnConv
    conv = cls(cin, cout, size, stride, padding, **more)
    if kind == "own_forward":
        conv.forward = functools.partial(_twice, conv)  # type: ignore[method-assign]
    elif kind == "weight_norm":
        parametrizations.weight_norm(conv)
    elif kind == "spectral":
        parametrizations.spectral_norm(conv)
    elif kind == "pruned":
        prune.l1_unstructured(conv, "weight", amount=0.3)
    elif kind == "parametrized":
        parametrize.register_parametrization(conv, "bias", Doubles())
    elif kind == "no_grad":
        conv.requires_grad_(requires_grad=False)
    return conv


def make_norm(kind: str, channels: int) -> nn.Module:
    norm: nn.Module = {
        "not_affine": lambda: nn.BatchNorm2d(channels, affine=False),
        "not_tracking": lambda: nn.BatchNorm2d(channels, track_running_stats=False),
        "cumulative": lambda: nn.BatchNorm2d(channels, momentum=None),
        "eps": lambda: nn.BatchNorm2d(channels, eps=1e-2, momentum=0.3),
        "frozen": lambda: resnet_fused.nn.FrozenBatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(2, channels),
        "own": lambda: OwnNorm(channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
        "nn.Identity": nn.Identity,
    }.get(kind, lambda: nn.BatchNorm2d(channels))()
    if kind == "own_forward":
        norm.forward = functools.partial(_twice, norm)  # type: ignore[method-assign]
    elif kind == "no_grad":
        norm.requires_grad_(requires_grad=False)
    elif kind == "buffers":  # frozen by hand
        weight = norm.weight
        del norm.weight
        norm.register_buffer("weight", weight.detach().clone())
    return norm


def subsample(x: Tensor, stride: int, more: int) -> Tensor:
    """Zeros for the new channels."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, more))


class Subsample(nn.Module):
    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        return subsample(x, self.stride, self.more)


class Calls(nn.Module):
    """The LambdaLayer of CIFAR's ResNets."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def _twice(module: nn.Module, x: Tensor) -> Tensor:
    return 2.0 * type(module).forward(module, x)
