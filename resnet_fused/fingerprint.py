"""Has a tensor changed since it was last seen? The guard of everything derived from parameters."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SAMPLES = 16


class Snapshot:
    """Identity, version and a fingerprint of tensors at one moment.

    The version counter sees every in-place edit that autograd sees. Edits through `.data` pass it
    by: the fingerprint (address, dtype and 16 evenly spaced elements) sees those that touch the
    tensor as a whole, such as copies and moving averages. Inference tensors have no version
    counter: all of their elements are read.
    """

    __slots__ = ("_references", "_state")

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        on_death: Callable[[object], object] | None = None,
    ) -> None:
        self._references = tuple(None if t is None else weakref.ref(t, on_death) for t in tensors)
        self._state = _state(tensors)

    def is_current(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the same tensors with the same contents."""
        for reference, tensor in zip(self._references, tensors, strict=True):
            if (None if reference is None else reference()) is not tensor:
                return False
        return self._state == _state(tensors)


def _state(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    present = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in present):
        return (-1, _fingerprint(present, -1))
    return (*(t._version for t in present), _fingerprint(present, _SAMPLES))


def _fingerprint(tensors: list[Tensor], samples: int) -> int:
    value: int = torch.ops.resnet_fused_native.fingerprint.default(tensors, samples)
    return value
