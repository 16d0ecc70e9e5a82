"""Compiles what launchers would launch, for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction

from resnet_fused.triton_kernels import device

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
CAPABILITIES = (AMPERE, HOPPER, BLACKWELL)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (9, 0): 132, (10, 0): 148}
REGISTERS = 65536  # of a multiprocessor
THREADS_PER_WARP = 32
INSTRUCTION_BYTES = 16
# Of an access: without one of these in its name it moves 4.
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def case_id(value: Any) -> str:
    """Of a parameter of a test: "sm_90" for a capability."""
    return "sm_{}{}".format(*value) if value in CAPABILITIES else str(value)


def untouched(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Memory that the system never has to provide."""
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


class Code(NamedTuple):
    """A kernel as the GPU would run it; loops: stretches from a branch back to its target."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]

    @property
    def loop(self) -> tuple[str, ...]:
        """The innermost loop around tensor-core products."""
        found = [each for each in self.loops if any("MMA" in line for line in each)]
        return min(found, key=len, default=())

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these, e.g. "LDG.E.128"."""
        return sum(self._operations(self.instructions)[each] for each in self._named(prefixes))

    def count_in_loop(self, *prefixes: str) -> int:
        counts = self._operations(self.loop)
        return sum(number for each, number in counts.items() if each.startswith(prefixes))

    def loops_with(self, name: str) -> list[tuple[str, ...]]:
        return [loop for loop in self.loops if accesses(loop, name)]

    @property
    def spills(self) -> int:
        return self.count("LDL", "STL") + self.stack_bytes

    @property
    def blocks_by_registers(self) -> int:
        """Blocks of a multiprocessor that its registers leave room for."""
        per_thread = -(-max(self.registers, 8) // 8) * 8
        return REGISTERS // (per_thread * THREADS_PER_WARP * self.warps)

    def _named(self, prefixes: tuple[str, ...]) -> list[str]:
        return [each for each in self._operations(self.instructions) if each.startswith(prefixes)]

    @staticmethod
    @functools.cache
    def _operations(instructions: tuple[str, ...]) -> Counter[str]:
        return Counter(operation(each) for each in instructions)


def operation(instruction: str) -> str:
    """The name of an instruction without its predicate and operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(" ", 1)[0]


def accesses(instructions: Iterable[str], name: str) -> Counter[int]:
    """How many of "LDG" or "STG" move how many bytes for each thread."""
    found = (operation(each).split(".") for each in instructions)
    return Counter(
        next((_BYTES[part] for part in parts if part in _BYTES), 4)
        for parts in found
        if parts[0] == name
    )


class _Driver:
    """What Triton asks of a GPU's driver until the moment of a launch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], THREADS_PER_WARP)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # one per architecture: Triton keeps kernels by device

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Any]]:
    """Launches inside, on CPU tensors, are compiled for that capability and not executed.

    Yields a list that holds what was compiled, in the order of the launches, when the block ends.
    """
    compiled: list[Any] = []
    run, parse = JITFunction.run, JITFunction.parse
    parser = threading.Lock()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **named))

    def parse_alone(self: Any) -> Any:
        with parser:  # in Python 3.11 two threads at once raise SystemError, at times
            return parse(self)

    def architecture(_: torch.Tensor) -> device.Architecture:
        return device.of_capability(capability, MULTIPROCESSORS[capability])

    try:
        with (
            mock.patch.object(driver, "_active", _Driver(capability)),
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(JITFunction, "parse", parse_alone),
            mock.patch.object(device, "architecture", architecture),
            ThreadPoolExecutor(os.cpu_count()) as executor,
            AsyncCompileMode(executor),
        ):
            yield compiled
    finally:
        active_mode.set(None)  # what failed to compile leaves it set
    # What Triton had in memory already is no future.
    compiled[:] = [each.result() if hasattr(each, "result") else each for each in compiled]


def kernels(
    capability: tuple[int, int],
    launch: Callable[[], object],
    wanted: Callable[[Any], bool] = lambda kernel: True,
) -> list[Code]:
    """The machine code of the kernels started by `launch()`, of those that are wanted."""
    with compiling_for(capability) as compiled:
        launch()
    found = {kernel.hash: kernel for kernel in compiled if wanted(kernel)}
    codes = dict(zip(found, _read(capability, list(found.values())), strict=True))
    return [codes[kernel.hash] for kernel in compiled if kernel.hash in codes]


def products(capability: tuple[int, int], launch: Callable[[], object]) -> list[Code]:
    """The machine code of those kernels started by `launch()` that multiply matrices."""
    return kernels(capability, launch, lambda kernel: "mma" in kernel.asm["ptx"])


def _read(capability: tuple[int, int], kernels: list[Any]) -> list[Code]:
    """Disassemble what Triton compiled, all in one: nvdisasm takes a third of a second to start."""
    texts = [_text(kernel.asm["cubin"]) for kernel in kernels]
    if not texts:
        return []
    architecture = "SM{}{}".format(*capability)
    listing = _tool("nvdisasm", "--no-dataflow", "--binary", architecture, content=b"".join(texts))
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", listing)
    codes: list[Code] = []
    first = 0
    for kernel, text in zip(kernels, texts, strict=True):
        last = first + len(text) // INSTRUCTION_BYTES
        usage = _tool("cuobjdump", "-res-usage", content=kernel.asm["cubin"])
        registers, stack = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
        assert registers is not None, usage
        assert stack is not None, usage
        codes.append(
            Code(
                *(kernel.name, int(registers[1]), int(stack[1])),
                *(kernel.metadata.shared, kernel.metadata.num_warps),
                *(tuple(instructions[first:last]), _loops(instructions, first, last)),
            )
        )
        first = last
    assert first == len(instructions)
    return codes


def _text(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file: its section .text."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, index_of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    names = sections[index_of_names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return found


def _loops(instructions: list[str], first: int, last: int) -> tuple[tuple[str, ...], ...]:
    """Those of one kernel among the instructions of several, which begin at address 0."""
    found: list[tuple[str, ...]] = []
    for position in range(first, last):
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", instructions[position])
        if branch is not None and (target := int(branch[1], 16) // INSTRUCTION_BYTES) <= position:
            found.append(tuple(instructions[target : position + 1]))
    return tuple(found)


def _tool(name: str, *arguments: str, content: bytes) -> str:
    """What one of Triton's copies of NVIDIA's tools prints about a file."""
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(TOOLS / name), *arguments, file.name]
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        )
    return result.stdout + result.stderr
