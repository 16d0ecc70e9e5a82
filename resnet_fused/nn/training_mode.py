"""What a residual block in training keeps for its backward, and what it computes once more."""

import enum


class TrainingMode(enum.Enum):
    """Both modes compute the same numbers.

    SPEED keeps the block's input and every convolution's output; ReLU outputs are computed once
    more from those, one pass each. MEMORY computes the outputs of the last convolution and of the
    projection once more, too. What each keeps and costs is measured in benchmarks/NOTES.md.
    """

    SPEED = "speed"
    MEMORY = "memory"

    @classmethod
    def of(cls, value: "TrainingMode | str") -> "TrainingMode":
        """The mode itself, or that of a name. Raises ValueError on another name."""
        if isinstance(value, cls):
            return value
        names = [mode.value for mode in cls]
        if value not in names:
            raise ValueError(f"training_mode: must be one of {', '.join(names)}, got {value!r}")
        return cls(value)
