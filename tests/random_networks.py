"""Random residual networks: a description as plain data, and the modules built from it.

A description's repr leaves out what is as by default, so that a case that hypothesis has shrunk can
be pasted into a test. Layers: random_layers.py; blocks: random_blocks.py.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from model_equality import randomize
from random_blocks import RANDOM, STYLES, UNUSUAL, USUAL, OptionalArgument
from random_layers import (
    ACTIVATIONS,
    CONVS,
    IDENTITIES,
    NORMS,
    PROJECTIONS,
    Block,
    Builder,
    Short,
)
from random_programs import Hook, hooks, install
from torch import Tensor, nn

STEMS = ("none", "conv_bn_relu", "conv_bn_relu_maxpool", "conv")
HEADS = ("none", "linear", "tuple", "dict", "relu", "view")
CONTAINERS = ("Sequential", "Loop", "Stages", "Dense")
SHARED = ("", "conv", "norm", "block", "relu", "weight")


class _Network(NamedTuple):
    """shares: what the first two blocks have in common. seed: of the weights."""

    blocks: tuple[Block, ...] = (Block(),)
    width: int = 4
    stem: str = "none"
    head: str = "none"
    container: str = "Sequential"
    shares: str = ""
    hooks: tuple[Hook, ...] = ()
    training: bool = False
    seed: int = 0


class Network(Short, _Network):
    __doc__ = _Network.__doc__

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        return any(b.style in RANDOM or b.shortcut == "conv_bn_drop" for b in self.blocks)


class Loop(nn.Module):
    """A forward with a loop over blocks, and an argument for those that take one."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = stem, head
        self.blocks = nn.ModuleList(blocks)
        self.factor: float | None = None

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        for block in self.blocks:
            takes_factor = isinstance(block, OptionalArgument) and self.factor is not None
            x = block(x, self.factor) if takes_factor else block(x)
        return self.head(x)


class Dense(Loop):
    """Returns the output of every block, as backbones do."""

    def forward(self, x: Tensor) -> object:
        outputs = [self.stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:], self.head(outputs[-1])


class Linear(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Returns(nn.Module):
    """The same tensor in a "tuple" or "dict", or as a "view", which needs its memory format."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        if self.kind == "view":
            return x.view(len(x), -1)
        return (x, x.mean()) if self.kind == "tuple" else {"out": x}


def build(network: Network) -> nn.Module:
    """The model that `network` describes, with the same weights each time, in float32."""
    torch.manual_seed(network.seed)
    blocks: list[nn.Module] = []
    channels, may_downsample = network.width, True
    for block in network.blocks:
        # One at most: norms need more than a few values per channel, or they amplify roundings.
        downsamples = block.downsamples and block.shortcut in PROJECTIONS and may_downsample
        may_downsample = may_downsample and not downsamples
        builder = Builder(block, channels, downsamples)
        blocks.append(STYLES[block.style](builder))
        channels = builder.cout
    _share(network.shares, blocks)
    model = _assemble(network, blocks, channels)
    randomize(model, network.seed)
    model.train(network.training)
    for hook in network.hooks:
        install(hook, model, model)
    return model


def _assemble(network: Network, blocks: list[nn.Module], channels: int) -> nn.Module:
    width = network.width
    conv_bn_relu = (nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    stem: nn.Module = {
        "none": lambda: nn.Conv2d(3, width, 1),
        "conv": lambda: nn.Conv2d(3, width, 3, padding=1),
        "conv_bn_relu": lambda: nn.Sequential(*conv_bn_relu),
        "conv_bn_relu_maxpool": lambda: nn.Sequential(*conv_bn_relu, nn.MaxPool2d(3, 1, 1)),
    }[network.stem]()
    head: nn.Module = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "linear": lambda: Linear(channels),
    }.get(network.head, lambda: Returns(network.head))()
    if network.container == "Sequential":
        return nn.Sequential(stem, *blocks, head)
    if network.container == "Stages":
        return nn.Sequential(stem, nn.Sequential(*blocks), head)
    return (Dense if network.container == "Dense" else Loop)(stem, blocks, head)


def _share(kind: str, blocks: list[nn.Module]) -> None:
    """Let the first two blocks have a module, or a weight, in common, where one fits in both."""
    if kind == "" or len(blocks) < 2:
        return
    first, second = blocks[:2]
    if kind == "block":
        children = [m for m in first.modules() if isinstance(m, nn.Conv2d)]
        if all(m.in_channels == m.out_channels and m.stride == (1, 1) for m in children):
            blocks[1] = first  # called twice
        return
    wanted = {"norm": nn.BatchNorm2d, "relu": nn.ReLU}.get(kind, nn.Conv2d)
    for path, module in [*second.named_modules()]:
        for other in first.modules():
            if type(module) is type(other) is wanted and repr(module) == repr(other):
                if kind != "weight":
                    second.set_submodule(path, other)
                elif all("weight" in m._parameters for m in (module, other)):  # not if pruned
                    module.weight = other.weight
                return


def _mostly(usual: str, others: tuple[str, ...], share: int) -> st.SearchStrategy[str]:
    """`usual`, or one of `others` in one of about `share` cases."""
    others = tuple(other for other in others if other != usual)
    return st.integers(0, share - 1).flatmap(
        lambda n: st.sampled_from(others) if n == share - 1 else st.just(usual)
    )


_names = [cls.__name__ for cls in USUAL], [cls.__name__ for cls in UNUSUAL]
blocks: st.SearchStrategy[Block] = st.builds(
    Block,
    style=st.one_of(*(st.sampled_from(names) for names in _names)),
    shortcut=st.sampled_from((*IDENTITIES[:3], *PROJECTIONS, *IDENTITIES[3:])),
    downsamples=st.booleans(),
    conv=_mostly("plain", CONVS, 3),
    norm=_mostly("batch", NORMS, 3),
    odd=st.integers(0, 2),
    activation=_mostly("relu", ACTIVATIONS, 8),
    inplace=st.booleans().map(lambda flag: not flag),
    shares_relu=st.booleans().map(lambda flag: not flag),
)
networks: st.SearchStrategy[Network] = st.builds(
    Network,
    blocks=st.lists(blocks, min_size=1, max_size=2).map(tuple),
    width=st.sampled_from((4, 8, 6)),
    stem=st.sampled_from(STEMS),
    head=st.sampled_from(HEADS),
    container=st.sampled_from(CONTAINERS),
    shares=_mostly("", SHARED, 4),
    hooks=_mostly("", ("1",), 4).flatmap(
        lambda some: st.lists(hooks, min_size=1, max_size=2).map(tuple) if some else st.just(())
    ),
    training=st.booleans(),
    seed=st.integers(0, 9),
)
