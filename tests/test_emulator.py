"""The emulator itself: kernels that are right run under every order, broken ones are found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from broken_kernels import Mutant, Source

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

SOURCE = Source.read("emulated_kernels.cu")
SEEDS = range(20)

SUM_OF_PAIR = "sums.store(thread, sums.load(thread) + sums.load(thread + half));"
SUM_OF_WARP = "sum = warp_sum(sums.load(thread));"
LAST_BLOCK = "is_last.store(0, atomicInc(finished, gridDim.x - 1) == gridDim.x - 1);"


MUTANTS = {
    "no_first_barrier": Mutant(
        "sum",
        "__syncthreads();  // first",
        "",
        "races through shared memory|reads uninitialised shared memory",
        SUM_OF_PAIR,
    ),
    "no_second_barrier": Mutant(
        "sum", "__syncthreads();  // second", "", "races through shared memory", SUM_OF_PAIR
    ),
    "no_third_barrier": Mutant(
        "sum",
        "__syncthreads();  // third",
        "",
        "races through shared memory|reads uninitialised shared memory",
        "is_last.load(0)",
    ),
    "barrier_in_branch": Mutant(
        "sum",
        "    }\n    __syncthreads();  // second",
        "      __syncthreads();  // second\n    }",
        "divergent barrier",
        "// second",
    ),
    "barrier_after_end": Mutant(
        "sum",
        "if (threadIdx.x == 0) {\n    store(partial_sums",
        "if (threadIdx.x == 9) return;\n  if (threadIdx.x == 0) {\n    store(partial_sums",
        "divergent barrier: .* has ended",
        "// third",
    ),
    "different_barriers": Mutant(
        "sum",
        "__syncthreads();  // third",
        "if (threadIdx.x < 64)\n    __syncthreads();\n  else\n    __syncthreads();  // third",
        "divergent barrier",
        "// third",
    ),
    "shared_index": Mutant(
        "sum",
        SUM_OF_PAIR,
        SUM_OF_PAIR.replace("thread + half", "thread + half + 1"),
        "element 128 of sums, which has 128|races through shared memory",
        "thread + half + 1",
    ),
    "dynamic_shared_index": Mutant(
        "reverse",
        "kThreads * sizeof(float), current_stream",
        "(kThreads - 1) * sizeof(float), current_stream",
        "element 127 of values, which has 127",
        "values.store(thread",
    ),
    "uninitialised": Mutant(
        "sum",
        "  sums.store(thread, value);\n",
        "  if (thread != 77) sums.store(thread, value);\n",
        "reads uninitialised shared memory, element 77 of sums",
        SUM_OF_PAIR,
    ),
    "misaligned_load": Mutant(
        "copy",
        "load(reinterpret_cast<const Vector*>(x) + i)",
        "load(reinterpret_cast<const Vector*>(x + 2) + i)",
        "misaligned 16-byte load of address 0x[0-9a-f]+8 ",
        "x + 2",
    ),
    "misaligned_store": Mutant(
        "copy",
        "store(reinterpret_cast<Vector*>(result) + i, vector)",
        "store(reinterpret_cast<Vector*>(result + 1) + i, vector)",
        "misaligned 16-byte store of address 0x[0-9a-f]+4 ",
        "result + 1",
    ),
    "shuffle_in_branch": Mutant(
        "sum",
        "if (thread < kWarp) {",
        "if (thread < kWarp / 2) {",
        "divergent warp collective",
        "__shfl_xor_sync",
    ),
    "part_of_warp": Mutant(
        "sum", "__shfl_xor_sync(~0u", "__shfl_xor_sync(0xffffu", "is not emulated", "0xffffu"
    ),
    "different_collectives": Mutant(
        "reverse",
        "__syncwarp();",
        "if (thread % 2) __shfl_sync(~0u, thread, 0); else __syncwarp();",
        "divergent warp collective: .* __s.*, but .* __s",
        "__shfl_sync",
    ),
    "no_syncwarp": Mutant(
        "reverse",
        "__syncwarp();",
        "",
        "races through shared memory|reads uninitialised shared memory",
        "values.load",
    ),
    "no_fence": Mutant(
        "sum",
        "__threadfence();",
        "",
        "races through global memory: .* without __threadfence",
        "load(partial_sums + block)",
    ),
    "atomic_before_fence": Mutant(
        "sum",
        "    __threadfence();\n    " + LAST_BLOCK,
        f"    {LAST_BLOCK}\n    __threadfence();",
        "races through global memory: .* without __threadfence",
        "load(partial_sums + block)",
    ),
    "two_threads_one_result": Mutant(
        "reverse",
        "store(result + i,",
        "store(result + i / 2,",
        "races through global memory: it writes .* with no barrier between",
        "store(result + i / 2,",
    ),
    # A shuffle makes the lanes meet, but orders nothing that they do to memory.
    "shuffle_for_syncwarp": Mutant(
        "reverse",
        "__syncwarp();",
        "__shfl_sync(~0u, thread, 0);",
        "races through shared memory",
        "values.load",
    ),
}

# Out of bounds by one, which only AddressSanitizer sees.
GLOBAL_MUTANTS = {
    "global_read": Mutant(
        "copy", "load(x + rest)", "load(x + rest + 1)", "READ of size 4", "load(x + rest + 1)"
    ),
    "global_write": Mutant(
        "copy",
        "store(result + rest,",
        "store(result + rest + 1,",
        "WRITE of size 4",
        "store(result + rest + 1,",
    ),
    "global_vector": Mutant(
        "copy", "if (i < n_vectors)", "if (i <= n_vectors)", "READ of size", "const Vector vector ="
    ),
}


@pytest.fixture(scope="module")
def ops() -> Any:
    return SOURCE.compile("correct")


@pytest.fixture(scope="module")
def mutants() -> dict[str, Any]:
    return SOURCE.compile_mutants(MUTANTS)


def call(ops: Any, operator: str) -> None:
    arguments = {"sum": (torch.ones(1000), 5), "copy": (torch.ones(1003),)}
    getattr(ops, operator)(*arguments.get(operator, (torch.ones(256),)))


class TestCorrectKernels:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_results_and_bytes_in_any_order(self, ops: Any, seed: int) -> None:
        ops.configure(seed, 3)
        x = torch.randn(1027)
        assert torch.equal(ops.copy(x), x)
        total = ops.sum(x, 5)
        torch.testing.assert_close(total, x.sum().view(1))
        x = x[:1024]
        assert torch.equal(ops.reverse(x), x.view(-1, 32).flip(1).reshape(-1))
        copy, sum_, reverse = emulation.launches(ops)
        assert copy == {
            **{"kernel": "copy_kernel", "grid": [3, 1, 1], "block": [128, 1, 1]},
            **{"bytes_read": 1027 * 4, "bytes_written": 1027 * 4},
            **{"distinct_bytes_read": 1027 * 4, "distinct_bytes_written": 1027 * 4},
            # 256 vectors and 3 single elements, in and out.
            **{"accesses": {"4": 6, "16": 512}, "atomics": 0, "shared_bytes": 0, "barriers": 0},
            **{"products": 0, "bank_conflicts": 0},
        }
        assert sum_ == {
            **{"kernel": "sum_kernel", "grid": [5, 1, 1], "block": [128, 1, 1]},
            **{"bytes_read": (1027 + 5) * 4, "bytes_written": (5 + 1) * 4},
            **{"distinct_bytes_read": (1027 + 5) * 4, "distinct_bytes_written": (5 + 1) * 4},
            **{"accesses": {"4": 1027 + 5 + 5 + 1}, "atomics": 5, "shared_bytes": 128 * 4 + 1},
            # Three in each sum of a block, one more before the last block is known.
            "barriers": 5 * (3 + 1) + 3,
            **{"products": 0, "bank_conflicts": 0},
        }
        assert reverse["accesses"] == {"4": 2048}
        assert reverse["shared_bytes"] == 512

    def test_order_follows_from_the_seed(self, ops: Any) -> None:
        x = torch.randn(5000)

        def sums() -> list[float]:
            # The order of additions is the kernel's: not even the last block changes it.
            return [ops.sum(x, 7).item() for _ in range(3)]

        ops.configure(1, 3)
        first = sums()
        ops.configure(2, 3)
        assert first == sums()
        with pytest.raises(RuntimeError, match="seed 5]"):
            ops.copy(x[1:])
        ops.configure(40, 3)
        with pytest.raises(RuntimeError, match="seed 40]"):
            ops.copy(x[1:])

    def test_goes_on_after_an_error(self, ops: Any) -> None:
        emulation.launches(ops)
        x = torch.randn(4096)
        with pytest.raises(RuntimeError, match="misaligned"):
            ops.copy(x[1:])
        assert torch.equal(ops.copy(x), x)
        assert [launch["kernel"] for launch in emulation.launches(ops)] == ["copy_kernel"]
        assert json.loads(ops.launches()) == []

    def test_impossible_launches_are_named(self, ops: Any) -> None:
        with pytest.raises(RuntimeError, match=r"^copy_kernel: launched with an empty grid$"):
            ops.copy(torch.ones(0))
        with pytest.raises(RuntimeError, match=r"^configure: multiprocessors must be positive"):
            ops.configure(0, 0)


def test_a_name_stands_for_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a broken copy would be tested that another file has loaded."""
    monkeypatch.setitem(emulation._loaded, "taken", Path("first.so"))
    with pytest.raises(RuntimeError, match=r"taken is loaded already, from first\.so"):
        emulation.load(Path("second.so"), "taken")


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found_in_any_order(mutants: dict[str, Any], name: str) -> None:
    mutant, ops = MUTANTS[name], mutants[name]
    SOURCE.assert_found(mutant, ops, lambda: call(ops, mutant.operator), SEEDS)


@pytest.mark.parametrize("name", GLOBAL_MUTANTS)
def test_access_out_of_bounds_is_found_by_address_sanitizer(name: str) -> None:
    if not emulation.preload():
        pytest.skip("g++ comes without libasan")
    mutant = GLOBAL_MUTANTS[name]
    done = SOURCE.run_sanitized(SOURCE.mutated(mutant), name, "ops.copy(torch.ones(1027))")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert mutant.message in done.stderr
    assert re.search(rf"in copy_kernel ({SOURCE.places(mutant)})\n", done.stderr), done.stderr


def test_address_sanitizer_follows_the_fibers() -> None:
    if not emulation.preload():
        pytest.skip("g++ comes without libasan")
    # An error leaves fibers half-way, whose stacks are used again.
    mutant = MUTANTS["barrier_in_branch"]
    done = SOURCE.run_sanitized(
        SOURCE.mutated(mutant),
        "barrier_in_branch",
        """
for _ in range(20):
    try:
        ops.sum(torch.ones(1000), 5)
        raise SystemExit("the mistake was not found")
    except RuntimeError as error:
        assert "divergent barrier" in str(error)
    assert ops.reverse(torch.ones(256)).sum() == 256
    assert ops.copy(torch.ones(1027)).sum() == 1027
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
