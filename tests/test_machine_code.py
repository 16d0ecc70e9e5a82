"""The machine code of the CUDA kernels without a product: add_relu, bn_relu, bn_relu_max_pool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import machine_code
import pytest

from resnet_fused import _extension

pytestmark = pytest.mark.skipif(
    not _extension.built_with_cuda(), reason="the extension was built without CUDA (no nvcc?)"
)

THREADS = 256  # of every block
SHARED_BYTES = 48 * 1024  # of a block, without asking for more


class Kernel(NamedTuple):
    """One instance of a kernel template, as its mangled name tells."""

    arch: str
    name: str
    dtype: str
    vectors: bool  # 16 bytes per access, not one element
    arguments: tuple[str, ...]  # template arguments behind dtype and layout

    @classmethod
    def parse(cls, arch: str, mangled: str) -> Kernel:
        match = re.search(r"\d((?:[a-z]+_)+kernel)I(.*)EEv", mangled)
        assert match is not None, mangled
        name, template = match.groups()
        width = re.search(r"Li(\d)E", template)
        assert width is not None, mangled
        dtype = re.search(r"BFloat16|Half|f", template)
        assert dtype is not None, mangled
        names = "AddRelu|ReluMask|KnownWindows|AnyWindows"
        arguments = re.findall(rf"{names}|(?<=8ResidualE)\d|(?<=L)b\d", template)
        return cls(arch, name, dtype[0], width[1] != "1", tuple(arguments))


class Accesses(NamedTuple):
    """16-byte accesses of one tile, each once per row that a thread has in flight."""

    loads: int
    stores: int
    resident_blocks: int = 2  # per multiprocessor, which registers must leave room for


# By name and template arguments: the residual (0 none, 1 plain, 2 with a batch norm), then flags.
EXPECTED: dict[tuple[str, tuple[str, ...]], Accesses] = {
    ("elementwise_kernel", ("AddRelu",)): Accesses(4, 2),
    ("elementwise_kernel", ("ReluMask",)): Accesses(4, 2),
    ("statistics_kernel", ()): Accesses(4, 0),
    ("apply_kernel", ("0", "b0")): Accesses(4, 4),
    ("apply_kernel", ("1", "b0")): Accesses(4, 2),
    ("apply_kernel", ("1", "b1")): Accesses(4, 2),
    ("apply_kernel", ("2", "b0")): Accesses(4, 2),
    ("reduction_kernel", ("0", "b0")): Accesses(4, 0),
    ("reduction_kernel", ("0", "b1")): Accesses(4, 2),
    ("reduction_kernel", ("1", "b0")): Accesses(4, 2),
    ("reduction_kernel", ("1", "b1")): Accesses(4, 4),
    ("reduction_kernel", ("2", "b0")): Accesses(3, 0),
    ("reduction_kernel", ("2", "b1")): Accesses(3, 2, resident_blocks=1),
    ("gradients_kernel", ("0",)): Accesses(4, 2),
    ("gradients_kernel", ("1",)): Accesses(4, 4),
    ("gradients_kernel", ("2",)): Accesses(6, 4, resident_blocks=1),
    # Taps of a window, until there are no more: of a stem's two rows.
    ("max_pool_kernel", ("KnownWindows",)): Accesses(6, 1),
    ("max_pool_kernel", ("AnyWindows",)): Accesses(4, 1),
    ("pooled_sums_kernel", ("KnownWindows",)): Accesses(1, 0, resident_blocks=3),
    ("pooled_sums_kernel", ("AnyWindows",)): Accesses(1, 0, resident_blocks=3),
    # All outputs that a pixel can be, and x.
    ("pooled_gradients_kernel", ("KnownWindows",)): Accesses(5, 1),
    ("pooled_gradients_kernel", ("AnyWindows",)): Accesses(3, 1),
}
LAYOUTS = {"elementwise_kernel": 1}  # else channels_last and NCHW
DTYPES = 3


Functions = Mapping[Kernel, machine_code.Function]


@pytest.fixture(scope="module")
def functions() -> Functions:
    names = "|".join({name for name, _ in EXPECTED})
    found = machine_code.select(lambda name: re.search(rf"\d({names})I", name) is not None)
    return {Kernel.parse(function.arch, function.name): function for function in found}


def test_every_kernel_is_there_for_every_promised_architecture(functions: Functions) -> None:
    assert {kernel.arch for kernel in functions} == machine_code.promised_archs()
    assert {(kernel.name, kernel.arguments) for kernel in functions} == EXPECTED.keys()
    assert {kernel.dtype for kernel in functions} == {"f", "Half", "BFloat16"}


def test_activations_move_16_bytes_at_a_time(functions: Functions) -> None:
    """All loads of a tile come before the first value is used: as many as are promised."""
    for kernel, function in functions.items():
        expected = EXPECTED[kernel.name, kernel.arguments]
        loads = machine_code.count(function.opcodes, "LDG.E.128")
        stores = machine_code.count(function.opcodes, "STG.E.128")
        if kernel.vectors:
            # The compiler may write a piece of code twice, but not with more accesses.
            for count, once in ((loads, expected.loads), (stores, expected.stores)):
                assert count >= once, kernel
                assert count == 0 if once == 0 else count % once == 0, kernel
        else:
            assert (loads, stores) == (0, 0), kernel


def test_no_kernel_spills(functions: Functions) -> None:
    assert [kernel for kernel, function in functions.items() if function.spills] == []


def test_registers_and_shared_memory_leave_room_for_the_promised_blocks(
    functions: Functions,
) -> None:
    for kernel, function in functions.items():
        blocks = EXPECTED[kernel.name, kernel.arguments].resident_blocks
        assert function.registers <= min(255, machine_code.REGISTERS // (THREADS * blocks)), kernel
        assert function.shared_bytes * blocks <= SHARED_BYTES, kernel
