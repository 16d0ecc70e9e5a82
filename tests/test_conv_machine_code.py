"""The machine code of the CUDA convolutions: tensor cores, copies, registers, lean loops."""

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

NAMES = ("conv_kernel", "conv_wgrad_kernel", "conv_projection_kernel")
# What goes around them: they pad, pack and add up, and multiply nothing.
HELPERS = (
    *("pad_kernel", "pack_weight_kernel", "combine_kernel"),
    *("combine_partials_kernel", "sum_shares_kernel"),
)
MULTIPLIES = {
    "BFloat16": "HMMA.16816.F32.BF16",
    "Half": "HMMA.16816.F32",
    "Tf32": "HMMA.1688.F32.TF32",
    "SplitTf32": "HMMA.1688.F32.TF32",
}
SHARED_BYTES = 163 * 1024  # of a multiprocessor, for blocks, where it has the least: sm_80
STEP_BYTES = 64  # of a row of an operand
STEP_DEPTH = 2  # products of the tensor cores over a step


class Kernel(NamedTuple):
    """One instance, as its mangled name tells: names as in csrc/cuda/conv_tiles.h."""

    arch: str
    name: str
    arithmetic: str
    m: int
    n: int
    warp_m: int
    warp_n: int
    stages: int
    resident_blocks: int
    prologue: str
    epilogue: str

    @classmethod
    def parse(cls, arch: str, mangled: str) -> Kernel:
        name = next(n for n in NAMES if re.search(rf"\d{n}I", mangled))
        template = mangled.partition(f"{name}I")[2].partition("EEv")[0]
        dtype = re.search(r"4TileI(?:N3c10\d+(BFloat16|Half)E|f)", template)
        sides = re.search(r"Li(\d+)E" * 6, template)
        assert dtype is not None, mangled
        assert sides is not None, mangled
        tf32 = re.search(r"\d(SplitTf32|Tf32)E", template)
        policies = re.findall(r"\d(Identity|ScaleShiftRelu|BatchNormBackward)E", template)
        ends = r"\d(ScaleShiftResidualRelu|ChannelStats|ReluMaskBnBackward)E"
        epilogue = re.search(ends, template)
        return cls(
            *(arch, name, dtype[1] or (tf32[1] if tf32 else "")),
            *(int(side) for side in sides.groups()),
            policies[0] if policies else "Identity",
            epilogue[1] if epilogue else "",
        )

    @property
    def threads(self) -> int:
        return 32 * (self.m // self.warp_m) * (self.n // self.warp_n)

    @property
    def products(self) -> int:
        """Instructions of the tensor cores in one step of a warp."""
        parts = 4 if self.arithmetic == "SplitTf32" else 1
        return parts * STEP_DEPTH * (self.warp_m // 16) * (self.warp_n // 8)

    @property
    def copies(self) -> int:
        """16-byte copies of a thread in one step."""
        tensors = 2 if self.prologue == "BatchNormBackward" else 1
        return (tensors * self.m + self.n) * STEP_BYTES // 16 // self.threads

    @property
    def shared_bytes(self) -> int:
        """Of the loop; what is at the end needs no more, except where an output is wide."""
        tensors = 2 if self.prologue == "BatchNormBackward" else 1
        loop = self.stages * (tensors * self.m + self.n) * STEP_BYTES
        element = 2 if self.arithmetic in ("BFloat16", "Half") else 4
        sums = 2 * 4 * self.n * (self.m // self.warp_m)
        return max(loop, self.m * self.n * element + sums)


Functions = Mapping[Kernel, machine_code.Function]


@pytest.fixture(scope="module")
def functions() -> Functions:
    names = "|".join(NAMES)
    found = machine_code.select(lambda name: re.search(rf"\d({names})I", name) is not None)
    return {Kernel.parse(function.arch, function.name): function for function in found}


def test_every_arithmetic_is_there_for_every_promised_architecture(functions: Functions) -> None:
    expected = {(a, m) for a in machine_code.promised_archs() for m in MULTIPLIES}
    for name in NAMES:
        found = {(kernel.arch, kernel.arithmetic) for kernel in functions if kernel.name == name}
        assert found == expected, name
    policies = {(kernel.prologue, kernel.epilogue) for kernel in functions}
    assert policies == {
        ("Identity", "ScaleShiftResidualRelu"),
        *(("Identity", "ChannelStats"), ("ScaleShiftRelu", "ChannelStats")),
        *(("Identity", "ReluMaskBnBackward"), ("BatchNormBackward", "ReluMaskBnBackward")),
        *(("Identity", ""), ("ScaleShiftRelu", "")),
    }


def test_no_kernel_spills(functions: Functions) -> None:
    assert [kernel for kernel, function in functions.items() if function.spills] == []
    helpers = "|".join(HELPERS)
    others = machine_code.select(lambda name: re.search(rf"\d({helpers})I", name) is not None)
    assert {re.search(rf"\d({helpers})I", f.name)[1] for f in others} == set(HELPERS)  # type: ignore[index]
    assert [function.name for function in others if function.spills] == []


def test_a_step_multiplies_on_tensor_cores_and_copies_16_bytes(functions: Functions) -> None:
    for kernel, function in functions.items():
        assert len(function.loops) == (2 if kernel.name == "conv_projection_kernel" else 1), kernel
        for loop in function.loops:
            multiply = MULTIPLIES[kernel.arithmetic]
            assert loop[multiply] == machine_code.count(loop, "HMMA") == kernel.products, kernel
            copies = machine_code.count(loop, "LDGSTS")
            assert loop["LDGSTS.E.BYPASS.LTC128B.128"] == copies == kernel.copies, kernel


def test_16_bit_fragments_come_by_ldmatrix(functions: Functions) -> None:
    for kernel, function in functions.items():
        if kernel.arithmetic not in ("BFloat16", "Half"):
            continue
        for loop in function.loops:
            matrices = STEP_DEPTH * (kernel.warp_m // 16 + kernel.warp_n // 16)
            assert machine_code.count(loop, "LDSM") == matrices, kernel
            # Besides, chunks go through the prologue.
            chunks = 0 if kernel.prologue == "Identity" else loop["LDS.128"]
            assert machine_code.count(loop, "LDS") == matrices + chunks, kernel


# Instructions of a step besides its products, at most: addresses and predicates of copies, the
# prologue, and for the gradient of the weight where pixels lie.
OVERHEAD = {
    ("conv_kernel", "Identity"): 130,
    ("conv_projection_kernel", "Identity"): 110,
    ("conv_kernel", "ScaleShiftRelu"): 210,
    ("conv_kernel", "BatchNormBackward"): 380,
    ("conv_wgrad_kernel", "Identity"): 200,
    ("conv_wgrad_kernel", "ScaleShiftRelu"): 250,
}


def test_loops_are_lean(functions: Functions) -> None:
    for kernel, function in functions.items():
        if kernel.arithmetic in ("BFloat16", "Half"):
            for loop in function.loops:
                rest = loop.total() - kernel.products
                assert rest <= OVERHEAD[kernel.name, kernel.prologue], (kernel, rest)


def test_registers_and_shared_memory_leave_room_for_the_promised_blocks(
    functions: Functions,
) -> None:
    for kernel, function in functions.items():
        # They are given out eight at a time.
        most = machine_code.REGISTERS // (kernel.threads * kernel.resident_blocks) // 8 * 8
        assert function.registers <= min(255, most), kernel
        assert kernel.shared_bytes * kernel.resident_blocks <= SHARED_BYTES, kernel
