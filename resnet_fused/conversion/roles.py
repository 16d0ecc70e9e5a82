"""Which child of a module plays which part in a pattern this library can run."""

from typing import NamedTuple


class Roles(NamedTuple):
    """The parts of a proven module. Every name is that of a direct child.

    pattern: "BasicBlock", "Bottleneck", "PreActBasicBlock", "PreActBottleneck", "ResNet" (the stem
    and the order of the stages), or "Sequential" (a sequence of blocks, where no child has a part
    of its own).
    convs, norms: in data-flow order. bypassed: ReLU and Identity children, no longer called.
    shortcut: the child that the input, with pre-activation behind its first normalisation and ReLU,
    goes through before the add; None if it is added as is.
    """

    pattern: str
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    bypassed: tuple[str, ...]
    shortcut: str | None

    @property
    def is_preactivation(self) -> bool:
        """Whether each normalisation stands in front of its convolution."""
        return self.pattern.startswith("PreAct")
