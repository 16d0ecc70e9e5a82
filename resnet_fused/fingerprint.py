"""Has a tensor changed since it was last seen? The guard of everything derived from parameters."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Snapshot:
    """Identity, version and a fingerprint of tensors at one moment.

    The version counter sees every in-place edit that autograd sees. Edits through `.data` pass it
    by: with `sampled`, 8 evenly spaced elements of each tensor are compared as well, which sees
    those that touch a tensor as a whole, such as copies and moving averages. Inference tensors have
    no version counter: all of their elements are compared.
    """

    __slots__ = ("_references", "_sampled", "_state")

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        sampled: bool,
        on_death: Callable[[object], object],
    ) -> None:
        self._sampled = sampled
        self._references = tuple(None if t is None else weakref.ref(t, on_death) for t in tensors)
        self._state = _state(tensors, sampled)

    def is_current(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the same tensors with the same contents."""
        for reference, tensor in zip(self._references, tensors, strict=True):
            if (None if reference is None else reference()) is not tensor:
                return False
        return self._state == _state(tensors, self._sampled)


def fingerprint(tensors: list[Tensor], samples: int = 8) -> int:
    """One number for the dtypes, shapes, addresses and `samples` elements of CPU tensors.

    The elements are evenly spaced; a negative number of samples takes all of them.
    """
    value: int = torch.ops.resnet_fused_native.fingerprint.default(tensors, samples)
    return value


def _state(tensors: Sequence[Tensor | None], sampled: bool) -> tuple[int, ...]:
    present = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in present):
        return (-1, fingerprint(present, samples=-1))
    versions = [t._version for t in present]
    if sampled:
        return (*versions, fingerprint(present))
    return (*versions, *[t.data_ptr() for t in present])
