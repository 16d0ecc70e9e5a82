"""Kernels that are broken on purpose, one line at a time: the emulator must find every mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import emulation
import pytest


class Mutant(NamedTuple):
    """One change that makes a kernel wrong: what finds it, and the line that must be named.

    line: a part of the line, after the change, at which the mistake can be seen.
    """

    operator: str
    old: str
    new: str
    message: str
    line: str


class Source(NamedTuple):
    """A file of kernels beside the tests, whose operators are called like their kernels."""

    filename: str
    text: str

    @staticmethod
    def read(name: str) -> Source:
        return Source(f"tests/{name}", (Path(__file__).parent / name).read_text())

    def compile(self, name: str) -> Any:
        return emulation.compile_source(self.text, name, self.filename)

    def mutated(self, mutant: Mutant) -> str:
        return emulation.mutate(self.text, mutant.old, mutant.new)

    def compile_mutants(self, mutants: Mapping[str, Mutant]) -> dict[str, Any]:
        texts = {name: self.mutated(mutant) for name, mutant in mutants.items()}
        # What finds these is the emulator; compiling them for AddressSanitizer too would take long.
        return emulation.compile_sources(texts, self.filename, sanitize=False)

    def places(self, mutant: Mutant) -> str:
        """A pattern for each "file:line" that the mistake can be seen at."""
        lines = enumerate(self.mutated(mutant).splitlines(), 1)
        found = [
            re.escape(f"{self.filename}:{number}") for number, line in lines if mutant.line in line
        ]
        assert found, f"{mutant.line!r} is not in the text"
        return "|".join(found)

    def assert_found(
        self, mutant: Mutant, ops: Any, call: Callable[[], object], seeds: Iterable[int]
    ) -> None:
        """That a call of the mutant's operator fails as it should, in the order of every seed."""
        for seed in seeds:
            ops.configure(seed, 3)
            with pytest.raises(RuntimeError, match=mutant.message) as error:
                call()
            message = str(error.value)
            assert re.match(rf"{mutant.operator}_kernel(<.+>)?: ", message), message
            assert message.endswith(f", seed {seed}]")
            assert "thread (" in message
            assert "block (" in message
            assert re.search(rf"({self.places(mutant)})\b", message), message

    def run_sanitized(self, text: str, name: str, code: str) -> subprocess.CompletedProcess[str]:
        """Runs code, which uses ops, in another process: those of text, under AddressSanitizer."""
        path = emulation.build_source(text, name, self.filename, sanitize=True)
        program = f"""
import torch
torch.ops.load_library({str(path)!r})
ops = torch.ops.{emulation.namespace(name)}
{code}
"""
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **emulation.preload()},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
