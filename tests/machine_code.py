"""What nvcc made of csrc/cuda, read from the extension: no GPU is needed for that."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from resnet_fused import _extension

REGISTERS = 65536  # of a multiprocessor
_TARGET = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(.+?)\s*;")


class Function(NamedTuple):
    """One kernel for one architecture.

    arch: "80", "90a", ...; name: mangled; loops: what is repeated around products of matrices, in
    one counter of opcodes for each loop. Bytes and registers are those of a block and a thread.
    """

    arch: str
    name: str
    opcodes: Counter[str]
    loops: tuple[Counter[str], ...]
    registers: int
    shared_bytes: int
    local_bytes: int

    @property
    def spills(self) -> int:
        return self.opcodes["LDL"] + self.opcodes["STL"] + self.local_bytes


def count(opcodes: Counter[str], prefix: str) -> int:
    """How many instructions begin with it."""
    return sum(number for opcode, number in opcodes.items() if opcode.startswith(prefix))


@functools.cache
def functions() -> tuple[Function, ...]:
    """All kernels in the extension. Skips the test where no tool can read them."""
    usage = dict(_usage())
    return tuple(
        Function(arch, name, *_opcodes(code), *usage[arch, name])
        for arch, name, code in _listings()
    )


def promised_archs() -> set[str]:
    """Those that the extension was built for, as machine code names them."""
    return {arch.removesuffix("+PTX").replace(".", "") for arch in _extension.cuda_archs()}


Code = list[tuple[int, str]]  # addresses and instructions


def _listings() -> Iterator[tuple[str, str, Code]]:
    arch, name, code = "", "", Code()
    for line in _cuobjdump("-sass"):
        is_next = line.startswith("arch = ") or "Function : " in line
        if is_next and name:
            yield arch, name, code
            name = ""
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_").strip()
        elif is_next:
            name, code = line.partition(" : ")[2].strip(), []
        elif (match := _INSTRUCTION.match(line)) and match[2] != "@!PT":  # which never runs
            code.append((int(match[1], 16), match[3]))
    if name:
        yield arch, name, code


def _opcodes(code: Code) -> tuple[Counter[str], tuple[Counter[str], ...]]:
    """Of all of it, and of each loop."""
    everything = Counter(_opcode(instruction) for _, instruction in code)
    products = [at for at, instruction in code if _opcode(instruction).startswith("HMMA")]
    loops: list[tuple[int, int]] = []
    for at, instruction in code:
        match = _TARGET.search(instruction)
        begin, end = int(match[1], 16) if match else at, at
        if begin >= end or not any(begin <= product <= end for product in products):
            continue
        # A loop's body may be laid out in several pieces that jump back.
        while loops and loops[-1][1] >= begin:
            begin = min(begin, loops.pop()[0])
        loops.append((begin, end))
    return everything, tuple(
        Counter(_opcode(i) for at, i in code if begin <= at <= end) for begin, end in loops
    )


def _opcode(instruction: str) -> str:
    return instruction.split(maxsplit=1)[0]


def _usage() -> Iterator[tuple[tuple[str, str], tuple[int, int, int]]]:
    arch = name = ""
    for line in _cuobjdump("-res-usage"):
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            fields = dict(re.findall(r"(\w+):(\d+)", line))
            yield (arch, name), (int(fields["REG"]), int(fields["SHARED"]), int(fields["LOCAL"]))


def _cuobjdump(option: str) -> Iterator[str]:
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


def select(names: Callable[[str], bool]) -> list[Function]:
    """The kernels whose mangled names are wanted."""
    return [function for function in functions() if names(function.name)]
