"""What launchers ask about the GPU, and what TMA asks of a tensor."""

import contextlib
import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from resnet_fused.precision import uses_tf32

Generation = Literal["ampere", "hopper", "blackwell"]
KIB = 1024


class Architecture(NamedTuple):
    """What the choice of a kernel and of its configuration depends on.

    generation: which instructions feed the tensor cores: cp.async and mma (ampere), TMA and wgmma
    (hopper), TMA and tcgen05 (blackwell). shared_bytes: of one block, at most.
    """

    generation: Generation
    shared_bytes: int
    multiprocessors: int


def architecture(x: Tensor) -> Architecture:
    """The architecture of the device of `x`."""
    return _architecture(x.device)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    return of_capability((properties.major, properties.minor), properties.multi_processor_count)


def of_capability(capability: tuple[int, int], multiprocessors: int) -> Architecture:
    """The architecture of a compute capability, 8.0 or higher.

    12.x (GeForce Blackwell) has neither wgmma nor tcgen05: it is served as Ampere is.
    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """
    generations: dict[int, Generation] = {9: "hopper", 10: "blackwell"}
    generation = generations.get(capability[0], "ampere")
    shared = {(8, 0): 163, (8, 7): 163, (9, 0): 227}
    default = 227 if generation == "blackwell" else 99
    return Architecture(generation, shared.get(capability, default) * KIB, multiprocessors)


def dot_precision(x: Tensor) -> str:
    """How float32 products are computed: "tf32", or "tf32x3", three products of both halves.

    The latter keep 22 bits of each product, which in sums of less than about 64 terms is up to 2.3
    times float32's error. Without meaning for 16-bit floats.
    """
    return "tf32" if uses_tf32(x) else "tf32x3"


def fits_tma(*tensors: Tensor | None) -> bool:
    """Whether TMA can address these (N, C, H, W) tensors in channels_last: 16-byte steps."""
    return all(
        t is None or (t.data_ptr() % 16 == 0 and t.size(1) * t.element_size() % 16 == 0)
        for t in tensors
    )


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one, to which Triton launches."""
    if x.is_cpu or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def inline_assembly() -> bool:
    """Whether kernels may use PTX instructions that Triton has no words for.

    Each of them has a twin in plain Triton, for the interpreter.
    """
    return True
