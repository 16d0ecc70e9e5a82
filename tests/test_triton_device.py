"""resnet_fused/triton_kernels/device.py: the table of architectures.

Neither Triton nor a GPU is needed.
"""

import pytest

from resnet_fused.triton_kernels import device


@pytest.mark.parametrize(
    ("capability", "generation", "shared_kib"),
    [
        ((8, 0), "ampere", 163),
        ((8, 6), "ampere", 99),
        ((8, 7), "ampere", 163),
        ((8, 9), "ampere", 99),
        ((9, 0), "hopper", 227),
        ((10, 0), "blackwell", 227),
        ((12, 0), "ampere", 99),
    ],
)
def test_architectures(capability: tuple[int, int], generation: str, shared_kib: int) -> None:
    """Shared memory as in the table that the function names; 12.x is Blackwell by name only."""
    found = device.of_capability(capability, 132)
    assert found == (generation, shared_kib * 1024, 132)
