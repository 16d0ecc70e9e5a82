"""The machine code of the bottleneck kernels: tensor cores, wide accesses, registers, no spills."""

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

MULTIPLIES = {"BFloat16": "HMMA.16816.F32.BF16", "Half": "HMMA.16816.F32"}
WIDTH = {64: 56, 128: 28, 256: 14}  # of ResNet-50's images, by the channels of the 3x3 convolution
SLICE = 64  # channels
# Of a multiprocessor, for blocks. The first is what every block must fit into alone.
LEAST_SHARED_BYTES, SHARED_BYTES = 163 * 1024, 227 * 1024


class Kernel(NamedTuple):
    """One instance, as its mangled name tells: names as in csrc/cuda/bottleneck.cuh."""

    arch: str
    dtype: str
    part: str
    middle: int
    warps: int
    row_tiles: int
    resident_blocks: int

    @classmethod
    def parse(cls, arch: str, mangled: str) -> Kernel:
        match = re.search(
            r"5ChainIN3c10\d+(BFloat16|Half)ENS_\d+(\w+?)E" + r"Li(\d+)E" * 4, mangled
        )
        assert match is not None, mangled
        return cls(arch, match[1], match[2], *(int(match[i]) for i in range(3, 7)))

    @property
    def slices(self) -> int:
        return self.middle // SLICE

    @property
    def blocks(self) -> int:
        """Of weights, with which the code of a step multiplies.

        Of loops it has one turn: of conv2 one tap and one summed slice, of conv3 and the next conv1
        one slice of the output.
        """
        before = 4 * self.slices**2 if self.part == "WholeBlock" else 0
        return before + self.slices * (3 if self.part == "Roll" else 2)

    @property
    def chunks(self) -> int:
        """Of 16 bytes, that a lane has of a slice."""
        return 4 * self.row_tiles

    @property
    def shared_bytes(self) -> int:
        ring = self.warps * 16 * self.row_tiles + 2 * WIDTH[self.middle] + 2
        columns = self.middle * (5 if self.part == "Tail" else 6)
        return 4 * 8192 + 8 * columns + self.slices * (-(-ring // 8) * 8 + 1) * 2 * SLICE


Functions = Mapping[Kernel, machine_code.Function]


@pytest.fixture(scope="module")
def functions() -> Functions:
    found = machine_code.select(lambda name: "17bottleneck_kernelI" in name)
    return {Kernel.parse(function.arch, function.name): function for function in found}


def test_every_instance_is_there_for_every_promised_architecture(functions: Functions) -> None:
    large = {("Tail", 64), ("Tail", 128), ("Tail", 256), ("Roll", 64), ("Roll", 128)}
    whole = {("WholeBlock", 64)}
    for arch in machine_code.promised_archs():
        for dtype in MULTIPLIES:
            found = [k for k in functions if (k.arch, k.dtype) == (arch, dtype)]
            small = {(k.part, k.middle) for k in found if (k.warps, k.row_tiles) == (4, 1)}
            others = [(k.part, k.middle) for k in found if (k.warps, k.row_tiles) != (4, 1)]
            assert small == large
            assert sorted(others) == sorted(large | whole)


def test_no_kernel_spills(functions: Functions) -> None:
    assert [kernel for kernel, function in functions.items() if function.spills] == []
    packing = machine_code.select(lambda name: "17pack_chain_kernelI" in name)
    assert len(packing) == len(MULTIPLIES) * len(machine_code.promised_archs())
    assert [function.name for function in packing if function.spills] == []


def test_a_step_multiplies_on_tensor_cores(functions: Functions) -> None:
    for kernel, function in functions.items():
        multiply = MULTIPLIES[kernel.dtype]
        products = kernel.blocks * 4 * kernel.row_tiles * (SLICE // 8)
        assert function.opcodes[multiply] == products, kernel
        assert machine_code.count(function.opcodes, "HMMA") == products, kernel
        # y1 comes from the ring at one place; all other operands but weights are in registers.
        matrices = kernel.blocks * 16 + 4 * kernel.row_tiles
        assert machine_code.count(function.opcodes, "LDSM") == matrices, kernel


def test_every_access_to_global_memory_has_16_bytes(functions: Functions) -> None:
    for kernel, function in functions.items():
        count = {
            name: machine_code.count(function.opcodes, name) for name in ("LDG.", "STG.", "LDGSTS.")
        }
        assert function.opcodes["LDGSTS.E.BYPASS.LTC128B.128"] == count["LDGSTS."] > 0, kernel
        loads = machine_code.count(function.opcodes, "LDG.E.128")
        stores = machine_code.count(function.opcodes, "STG.E.128")
        assert (loads, stores) == (count["LDG."], count["STG."]), kernel
        results = 1 + (kernel.slices if kernel.part == "Roll" else 0)
        assert stores == results * kernel.chunks, kernel
        # In the loop over steps, into which the coefficients are read before.
        (loop,) = function.loops
        residuals = 5 if kernel.part == "WholeBlock" else 1
        assert machine_code.count(loop, "LDG.E.128") == residuals * kernel.chunks, kernel


def test_registers_and_shared_memory_leave_room_for_the_promised_blocks(
    functions: Functions,
) -> None:
    for kernel, function in functions.items():
        # They are given out eight at a time.
        threads = 32 * kernel.warps * kernel.resident_blocks
        most = machine_code.REGISTERS // threads // 8 * 8
        assert function.registers <= min(255, most), kernel
        assert kernel.shared_bytes <= LEAST_SHARED_BYTES, kernel
        assert kernel.shared_bytes * kernel.resident_blocks <= SHARED_BYTES, kernel
