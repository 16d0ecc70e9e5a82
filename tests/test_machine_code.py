"""What nvcc made of csrc/cuda, read from the extension: no GPU is needed for that."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from resnet_fused import _extension

pytestmark = pytest.mark.skipif(
    not _extension.built_with_cuda(), reason="the extension was built without CUDA (no nvcc?)"
)

REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of every block
SHARED_BYTES = 48 * 1024  # of a block, without asking for more


class Kernel(NamedTuple):
    """One instance of a kernel template, as its mangled name tells."""

    arch: str
    name: str
    vectors: bool  # 16 bytes per access, not one element
    arguments: tuple[str, ...]  # template arguments behind dtype and layout

    @classmethod
    def parse(cls, arch: str, mangled: str) -> Kernel:
        match = re.search(r"\d((?:[a-z]+_)+kernel)I(.*)EEv", mangled)
        assert match is not None, mangled
        name, template = match.groups()
        width = re.search(r"Li(\d)E", template)
        assert width is not None, mangled
        arguments = re.findall(r"AddRelu|ReluMask|(?<=8ResidualE)\d|(?<=L)b\d", template)
        return cls(arch, name, width[1] != "1", tuple(arguments))


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
    ("gradients_kernel", ("b0",)): Accesses(4, 2),
    ("gradients_kernel", ("b1",)): Accesses(6, 4, resident_blocks=1),
}
LAYOUTS = {"elementwise_kernel": 1}  # else channels_last and NCHW
DTYPES = 3


class Code(NamedTuple):
    """What counts in the instructions of a kernel."""

    loads: int = 0
    stores: int = 0
    spills: int = 0


INSTRUCTIONS = re.compile(r"\b(LDG\.E\.128|STG\.E\.128|LDL|STL)\b")


@pytest.fixture(scope="module")
def code() -> dict[Kernel, Code]:
    found: dict[Kernel, Code] = {}
    counts: dict[str, int] = {}
    arch, kernel = "", None
    for line in cuobjdump("-sass"):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_").strip()
        elif "Function : " in line:
            kernel = Kernel.parse(arch, line.partition(" : ")[2].strip())
            counts = dict.fromkeys(("LDG.E.128", "STG.E.128", "LDL", "STL"), 0)
        elif kernel is not None and (match := INSTRUCTIONS.search(line)):
            counts[match[1]] += 1
        if kernel is not None:
            loads, stores, *local = counts.values()
            found[kernel] = Code(loads, stores, sum(local))
    return found


class Resources(NamedTuple):
    """What one thread and one block of a kernel take."""

    registers: int
    shared_bytes: int
    local_bytes: int


@pytest.fixture(scope="module")
def resources() -> dict[Kernel, Resources]:
    found = {}
    arch, kernel = "", None
    for line in cuobjdump("-res-usage"):
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = Kernel.parse(arch, match[1])
        elif kernel is not None and "REG:" in line:
            fields = dict(re.findall(r"(\w+):(\d+)", line))
            found[kernel] = Resources(*(int(fields[f]) for f in ("REG", "SHARED", "LOCAL")))
    return found


def test_every_kernel_is_there_for_every_promised_architecture(code: Mapping[Kernel, Code]) -> None:
    promised = {arch.removesuffix("+PTX").replace(".", "") for arch in _extension.cuda_archs()}
    assert {kernel.arch for kernel in code} == promised
    assert {(kernel.name, kernel.arguments) for kernel in code} == EXPECTED.keys()


def test_activations_move_16_bytes_at_a_time(code: Mapping[Kernel, Code]) -> None:
    """All loads of a tile come before the first value is used: as many as are promised."""
    for kernel, found in code.items():
        expected = EXPECTED[kernel.name, kernel.arguments]
        if kernel.vectors:
            # The compiler may write a piece of code twice, but not with more accesses.
            for count, once in ((found.loads, expected.loads), (found.stores, expected.stores)):
                assert count >= once, kernel
                assert count == 0 if once == 0 else count % once == 0, kernel
        else:
            assert (found.loads, found.stores) == (0, 0), kernel


def test_no_kernel_spills(code: Mapping[Kernel, Code]) -> None:
    assert [kernel for kernel, found in code.items() if found.spills] == []


def test_registers_and_shared_memory_leave_room_for_the_promised_blocks(
    resources: Mapping[Kernel, Resources],
) -> None:
    for kernel, found in resources.items():
        blocks = EXPECTED[kernel.name, kernel.arguments].resident_blocks
        assert found.registers <= min(255, REGISTERS // (THREADS * blocks)), kernel
        assert found.shared_bytes * blocks <= SHARED_BYTES, kernel
        assert found.local_bytes == 0, kernel


def cuobjdump(option: str) -> Iterator[str]:
    """Lines of cuobjdump about the extension: from PATH, else the one that Triton bundles."""
    found, environment = shutil.which("cuobjdump"), dict(os.environ)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        found = str(bundled) if bundled.is_file() else None
        environment["PATH"] = f"{bundled.parent}:{environment['PATH']}"  # nvdisasm lies there too
    if found is None:
        pytest.skip("no cuobjdump in PATH and no triton that bundles one")
    with tempfile.TemporaryFile("w+") as listing:
        subprocess.run(
            [found, option, str(_extension.FILE)],
            stdout=listing,
            stderr=subprocess.DEVNULL,
            env=environment,
            check=True,
            timeout=300,
        )
        listing.seek(0)
        yield from listing
