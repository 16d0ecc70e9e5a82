"""Which child of a module plays which part in a pattern this library can run."""

from typing import NamedTuple


class Roles(NamedTuple):
    """The parts of a proven module. Every name is a path in it.

    pattern: "BasicBlock", "Bottleneck", "PreActBasicBlock", "PreActBottleneck", "ResNet" (the stem
    and the order of the stages), or "Sequential" (a sequence of blocks, where no child has a part
    of its own).
    convs, norms: in data-flow order. bypassed: ReLU and Identity modules, and modules around the
    layers, that are no longer called.
    shortcut: the module that the input, with pre-activation behind its first normalisation and
    ReLU, goes through before the add; None if it is added as is, or behind a projection.
    projection: convolution and normalisation of the shortcut, where no module stands for both.
    in_place: the sum is `out += shortcut`, which keeps the dtype of out.
    """

    pattern: str
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    bypassed: tuple[str, ...]
    shortcut: str | None
    projection: tuple[str, str] | None = None
    in_place: bool = True

    @property
    def is_preactivation(self) -> bool:
        """Whether each normalisation stands in front of its convolution."""
        return self.pattern.startswith("PreAct")

    @property
    def layers(self) -> tuple[str, ...]:
        """The convolutions and normalisations that are computed without being called."""
        return (*self.convs, *self.norms, *(self.projection or ()))
