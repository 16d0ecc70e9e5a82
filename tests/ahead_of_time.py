"""Compiles what launchers would launch, for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

from resnet_fused.triton_kernels import device

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (9, 0): 132, (10, 0): 148}
REGISTERS = 65536  # of a multiprocessor
THREADS_PER_WARP = 32


class Code(NamedTuple):
    """A kernel as the GPU would run it; loop: its innermost loop around tensor-core products."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these, e.g. "LDG.E.128"."""
        return sum(self._operations(self.instructions)[each] for each in self._named(prefixes))

    def count_in_loop(self, *prefixes: str) -> int:
        counts = self._operations(self.loop)
        return sum(number for each, number in counts.items() if each.startswith(prefixes))

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
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **named))

    def architecture(_: torch.Tensor) -> device.Architecture:
        return device.of_capability(capability, MULTIPROCESSORS[capability])

    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(device, "architecture", architecture),
        ThreadPoolExecutor(os.cpu_count()) as executor,
        AsyncCompileMode(executor),
    ):
        yield compiled
    # What Triton had in memory already is no future.
    compiled[:] = [each.result() if hasattr(each, "result") else each for each in compiled]


def products(capability: tuple[int, int], launch: Callable[[], object]) -> list[Code]:
    """The machine code of those kernels started by `launch()` that multiply matrices."""
    with compiling_for(capability) as compiled:
        launch()
    found = [kernel for kernel in compiled if "mma" in kernel.asm["ptx"]]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(read, found))


def read(kernel: Any) -> Code:
    """Disassemble what Triton compiled."""
    return _read(kernel.hash, kernel.name, kernel)


@functools.cache
def _disassembled(_: str, cubin: bytes) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers is not None, usage
    assert stack is not None, usage
    instructions, labels = _parsed(listing)
    return int(registers[1]), int(stack[1]), tuple(instructions), _loop(instructions, labels)


def _read(key: str, name: str, kernel: Any) -> Code:
    registers, stack, instructions, loop = _disassembled(key, kernel.asm["cubin"])
    metadata = kernel.metadata
    return Code(name, registers, stack, metadata.shared, metadata.num_warps, instructions, loop)


def _parsed(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the position of each label among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(match[1])
    return instructions, labels


def _loop(instructions: list[str], labels: dict[str, int]) -> tuple[str, ...]:
    """The smallest stretch from a branch back to its target that has a product in it."""
    found: list[str] = []
    for position, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if branch is None or labels.get(branch[1], position + 1) > position:
            continue
        body = instructions[labels[branch[1]] : position + 1]
        if any("MMA" in each for each in body) and (not found or len(body) < len(found)):
            found = body
    return tuple(found)


def _tool(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ.get('PATH', '')}"}
    result = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, env=environment, check=True
    )
    return result.stdout + result.stderr
