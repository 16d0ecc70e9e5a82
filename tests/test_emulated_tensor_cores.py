"""The emulator's tensor cores and asynchronous copies: kernels that use all of cuda/ptx.cuh."""

from __future__ import annotations

import itertools
import re
from typing import Any

import emulation
import pytest
import torch
from broken_kernels import Mutant, Source
from torch import Tensor

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

SOURCE = Source.read("emulated_tensor_cores.cu")
SEEDS = range(20)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

CHUNK_BYTES = 16
BLOCK_ROWS, BLOCK_COLUMNS, STAGE_BYTES, STAGES = 32, 16, 1536, 3  # of product_kernel

COPY = "ptx::copy_async(to, ptx::offset<kChunkBytes>(data, row * chunks + chunk), exists);"
WAIT = "ptx::wait_for_copies<kStages - 1>();"
LOAD_OF_A = "ptx::load_matrices(fragment_a[0], from + at"
IN_FLIGHT = r"reads byte \d+ of the dynamic shared memory .* while a cp.async started .* in flight"
STORE_OF_HALVES = "ptx::store_shared(reversed + 2 * to"

MUTANTS = {
    "no_wait": Mutant("product", WAIT, "", IN_FLIGHT, "ptx::load_matrices"),
    "one_group_too_many_pending": Mutant(
        "product", WAIT, "ptx::wait_for_copies<kStages>();", IN_FLIGHT, "ptx::load_matrices"
    ),
    "no_first_commit": Mutant(
        "product", "ptx::commit_copies();  // first", "", IN_FLIGHT, "ptx::load_matrices"
    ),
    "no_later_commit": Mutant(
        "product", "ptx::commit_copies();  // later", "", IN_FLIGHT, "ptx::load_matrices"
    ),
    # Each thread has waited for its own copies only.
    "no_barrier_after_wait": Mutant(
        "product",
        "__syncthreads();  // copied",
        "",
        f"{IN_FLIGHT}|races through shared memory: it reads byte|reads uninitialised",
        "ptx::load_matrices",
    ),
    "no_barrier_before_refill": Mutant(
        "product",
        "__syncthreads();  // read",
        "",
        rf"races through shared memory: it writes byte \d+ .* has read|{IN_FLIGHT}",
        COPY,
    ),
    "refill_of_what_is_in_flight": Mutant(
        "product",
        "copy(step + kStages, stage);",
        "copy(step + kStages, (step + 1) % kStages);",
        r"writes byte \d+ .* while a cp.async started at .* is in flight",
        COPY,
    ),
    "one_copy_too_few": Mutant(
        "product",
        "    a.copy(to,",
        "    if (thread != 37) a.copy(to,",
        r"reads uninitialised shared memory, byte \d+ of the dynamic shared memory",
        LOAD_OF_A,
    ),
    "too_little_memory": Mutant(
        "product",
        "kThreads, kStages * kStageBytes,",
        "kThreads, kStages * kStageBytes - kChunkBytes,",
        "makes a 16-byte cp.async of byte 4592 of the dynamic shared memory, which has 4592,",
        COPY,
    ),
    "load_before_the_memory": Mutant(
        "product",
        LOAD_OF_A,
        LOAD_OF_A.replace("from +", "from - kStageBytes +"),
        r"makes a 16-byte load of byte -\d+ of the dynamic shared memory, which has 4608,",
        "from - kStageBytes",
    ),
    "misaligned_source": Mutant(
        "product",
        "(data, row * chunks + chunk), exists)",
        "(static_cast<const char*>(data) + 8, row * chunks + chunk), exists)",
        "makes a misaligned 16-byte cp.async of address 0x[0-9a-f]+8 ",
        "static_cast<const char*>(data) + 8",
    ),
    "misaligned_copy": Mutant(
        "product",
        "ptx::copy_async(to,",
        "ptx::copy_async(to + 4,",
        r"makes a misaligned 16-byte cp.async of shared address \d+ ",
        "to + 4",
    ),
    "misaligned_load": Mutant(
        "product",
        LOAD_OF_A,
        LOAD_OF_A.replace("from +", "from + 2 +"),
        r"makes a misaligned 16-byte load of shared address \d+ ",
        "from + 2",
    ),
    "end_with_copies": Mutant(
        "product",
        "ptx::wait_for_copies<0>();",
        "",
        "ends while copies are in flight: it has not waited for the cp.async started at",
        COPY,
    ),
    "load_in_branch": Mutant(
        "product",
        LOAD_OF_A,
        f"if (lane != 13) {LOAD_OF_A}",
        "divergent warp collective: .* load_matrices .*, but .* waits in load_matrices",
        "if (lane != 13)",
    ),
    "product_in_branch": Mutant(
        "product",
        "ptx::multiply_add<T>(",
        "if (lane < 16) ptx::multiply_add<T>(",
        "divergent warp collective: .* multiply_add",
        "if (lane < 16)",
    ),
    "load_without_syncwarp": Mutant(
        "fragments",
        "  __syncwarp();\n  const SharedAddress row",
        "  const SharedAddress row",
        "races through shared memory: it reads byte",
        "ptx::load_matrices(fragment, row)",
    ),
    "no_barrier_before_wide_load": Mutant(
        "halves",
        "__syncthreads();  // values",
        "",
        "races through shared memory: it reads byte|reads uninitialised",
        "const auto chunk =",
    ),
    "no_syncwarp_after_narrow_stores": Mutant(
        "halves",
        "  __syncwarp();\n  // By way",
        "  // By way",
        "races through shared memory: it reads byte|reads uninitialised",
        "const auto whole =",
    ),
    "no_syncwarp_after_wide_store": Mutant(
        "halves",
        "  __syncwarp();\n  const SharedAddress first",
        "  const SharedAddress first",
        "races through shared memory",
        "ptx::load_shared<uint2>(first)",
    ),
    # One in the chunk of a neighbour, of the first thread behind the memory.
    "half_of_a_neighbour": Mutant(
        "halves",
        STORE_OF_HALVES,
        f"{STORE_OF_HALVES} + 2",
        "races through shared memory: it writes byte|makes a 2-byte store of byte 1024 ",
        STORE_OF_HALVES,
    ),
}


@pytest.fixture(scope="module")
def ops() -> Any:
    return SOURCE.compile("tensor_cores")


@pytest.fixture(scope="module")
def mutants() -> dict[str, Any]:
    return SOURCE.compile_mutants({f"tensor_cores_{name}": m for name, m in MUTANTS.items()})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)))


def random_bits(n: int, dtype: torch.dtype = torch.int32) -> Tensor:
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max, (n,), dtype=dtype, generator=generator())


class TestProduct:
    @pytest.mark.parametrize("shape", [(32, 16, 16), (33, 24, 40), (70, 40, 200)], ids=str)
    @pytest.mark.parametrize(
        ("dtype", "transposed"),
        [
            *itertools.product((torch.bfloat16, torch.float16), (False, True)),
            (torch.float32, False),
        ],
        ids=str,
    )
    def test_is_that_of_float64(
        self, ops: Any, dtype: torch.dtype, transposed: bool, shape: tuple[int, int, int]
    ) -> None:
        m, n, k = shape
        a = normal(m, k).to(dtype)
        b = (normal(k, n) if transposed else normal(n, k)).to(dtype)
        out = torch.full((m, n), float("nan"))
        ops.configure(0, 3)
        emulation.launches(ops)
        ops.product(a, b, out, transposed)
        seen_a, seen_b = (seen(x).double() for x in (a, b if transposed else b.T))
        # Of a sum of k products, in any order.
        bound = k * 2**-24 * (seen_a.abs() @ seen_b.abs())
        assert ((out.double() - seen_a @ seen_b).abs() <= bound).all()

        tiles = -(-m // BLOCK_ROWS), -(-n // BLOCK_COLUMNS)
        steps = -(-k * dtype.itemsize // (2 * CHUNK_BYTES))
        bytes_read = tiles[1] * a.nbytes + tiles[0] * b.nbytes
        (launch,) = emulation.launches(ops)
        assert launch == {
            **{"kernel": "product_kernel<T, kTransposed>"},
            **{"grid": [*tiles, 1], "block": [64, 1, 1], "shared_bytes": STAGES * STAGE_BYTES},
            **{"bytes_read": bytes_read, "bytes_written": out.nbytes},
            **{"distinct_bytes_read": a.nbytes + b.nbytes, "distinct_bytes_written": out.nbytes},
            # Copies of what exists, and pairs of results.
            **{"accesses": {"8": m * n // 2, "16": bytes_read // CHUNK_BYTES}, "atomics": 0},
            # Two of 16x8 in each of two warps.
            **{"products": tiles[0] * tiles[1] * steps * 2 * 2, "bank_conflicts": 0},
            **{"barriers": tiles[0] * tiles[1] * steps * 2},
        }

    def test_is_the_same_in_any_order(self, ops: Any) -> None:
        a, b = normal(65, 80).bfloat16(), normal(40, 80).bfloat16()
        results = torch.empty(len(SEEDS), 65, 40)
        for seed in SEEDS:
            ops.configure(seed, 3)
            ops.product(a, b, results[seed], False)
        assert torch.equal(results, results[:1].expand_as(results))

    def test_goes_on_after_an_error_with_copies_in_flight(self, ops: Any) -> None:
        a, b = normal(32 * 32 + 1), normal(16, 32)
        out = torch.empty(32, 16)
        for seed in SEEDS:
            ops.configure(seed, 3)
            with pytest.raises(RuntimeError, match=r"misaligned 16-byte cp\.async of address"):
                ops.product(b, a[1:].view(32, 32)[:16], out, False)
            ops.product(a[:-1].view(32, 32), b, out, False)
            torch.testing.assert_close(out, seen(a)[:-1].view(32, 32) @ seen(b).T)


def seen(x: Tensor) -> Tensor:
    """What the tensor cores use of x: of float32 the first 10 bits of the fraction."""
    if x.dtype != torch.float32:
        return x
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def chunks_at(*chunks: int) -> list[int]:
    return [CHUNK_BYTES * chunk for chunk in chunks]


# Where the 32 rows of 4 matrices lie, and how often they wait for each other's banks.
ADDRESSES = {
    "dense": (chunks_at(*range(32)), 0),
    "pitch of 32": (chunks_at(*range(0, 64, 2)), 4 * 1),
    "pitch of 64": (chunks_at(*range(0, 128, 4)), 4 * 3),
    "pitch of 128": (chunks_at(*range(0, 256, 8)), 4 * 7),
    "pitch of 144": (chunks_at(*range(0, 288, 9)), 0),
    "pitch of 128, permuted": (chunks_at(*(8 * i + (5 ^ i % 8) for i in range(32))), 0),
    "one row for all": (chunks_at(*[77] * 32), 0),
    "each row twice": (chunks_at(*(8 * (i // 2) for i in range(32))), 4 * 3),
    # Of the second matrix three in one group of banks, of the third two in each of two.
    "by matrix": (
        chunks_at(*range(8), *(0, 8, 16, 3, 4, 5, 6, 7), *(0, 8, 1, 9, 4, 5, 6, 7), *range(8)),
        2 + 1,
    ),
}


class TestFragments:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("layout", ADDRESSES)
    def test_rows_and_bank_conflicts(self, ops: Any, layout: str, transposed: bool) -> None:
        addresses, conflicts = ADDRESSES[layout]
        x = random_bits(8 * 288, torch.int16)
        out = torch.empty(32, 4, 2, dtype=torch.int16)
        emulation.launches(ops)
        ops.fragments(x, torch.tensor(addresses, dtype=torch.int32), out, transposed)
        rows = x.view(-1, 8)[torch.tensor(addresses) // CHUNK_BYTES]
        matrices = rows.view(4, 8, 8).mT if transposed else rows.view(4, 8, 8)
        # Lane after lane has two elements of each.
        assert torch.equal(out, matrices.reshape(4, 32, 2).transpose(0, 1))
        (launch,) = emulation.launches(ops)
        assert launch["bank_conflicts"] == conflicts

    @pytest.mark.parametrize("array", [False, True])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_same_memory_in_every_width(self, ops: Any, seed: int, array: bool) -> None:
        x = normal(128)
        out = torch.empty_like(x)
        ops.configure(seed, 3)
        ops.halves(x, out, array)
        assert torch.equal(out.view(torch.int16), x.view(torch.int16).flip(0))


class TestConversions:
    # Of every exponent: subnormals, infinities and NaN among them.
    ALL = torch.cat([random_bits(1 << 16), torch.tensor([0, 1, 0xFF]) << 23]).view(torch.float32)

    @staticmethod
    def ties(dtype: torch.dtype) -> Tensor:
        """Half-way between each two finite neighbours."""
        largest = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}[dtype]
        values = torch.arange(largest + 1).to(torch.int16).view(dtype).double()
        middles = ((values[1:] + values[:-1]) / 2).float()
        return torch.cat([middles, -middles])

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    def test_pack(self, ops: Any, dtype: torch.dtype, relu: bool) -> None:
        x = torch.cat([self.ALL, self.ties(dtype), normal(100_000)])
        x = x[: x.numel() // 2 * 2]
        out = torch.empty_like(x, dtype=dtype)
        ops.pack(x, out, relu)
        expected = (x.relu() if relu else x).to(dtype)
        nan = expected.isnan()
        assert (x[nan].isnan()).all()
        assert nan.any()
        assert expected.isinf().any()
        assert torch.equal(out[~nan], expected[~nan])
        # Of NaN only one: PTX ISA, "cvt".
        assert (out.view(torch.int16)[nan] == 0x7FFF).all()

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    def test_unpack(self, ops: Any, dtype: torch.dtype) -> None:
        x = torch.arange(1 << 16).to(torch.int16).view(dtype)
        out = torch.empty_like(x, dtype=torch.float32)
        ops.unpack(x, out)
        assert torch.equal(out.isnan(), x.isnan())
        assert torch.equal(out[~x.isnan()], x.float()[~x.isnan()])

    def test_round_to_tf32(self, ops: Any) -> None:
        # The low bits of all values of the high ones around zero, one and the largest: ties, too.
        bits = torch.cat([torch.arange(1 << 15) + (high << 13) for high in (0, 0x1FC00, 0x3FBFE)])
        around = torch.cat([bits, bits - (1 << 31)]).to(torch.int32).view(torch.float32)
        x = torch.cat([self.ALL, around, normal(100_000)])
        out = torch.empty_like(x)
        ops.round_to_tf32(x, out)
        # 11 bits from the leading one on, or of the smallest normal number.
        exponent = torch.frexp(x.double())[1].clamp(min=-125)
        scaled = torch.ldexp(x.double(), 11 - exponent)
        expected = torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor(), exponent - 11).float()
        expected = torch.where(x.isinf(), x, expected)
        nan = x.isnan()
        assert nan.any()
        assert (expected.isinf() & x.isfinite()).any()
        assert torch.equal(out[~nan], expected[~nan])
        # ptxas makes it so for sm_80, sm_90 and sm_100.
        assert torch.equal(out[nan].view(torch.int32), seen(x)[nan].view(torch.int32))


class TestDistinctBytes:
    @pytest.mark.parametrize("offset", [0, 3])
    def test_each_counts_once(self, ops: Any, offset: int) -> None:
        # Over several pages, and where accesses of all widths overlap.
        n, count = 3 * 4096, 2000
        x, out = random_bits(2 * (n + 16), torch.uint8).view(2, -1)[:, offset:]
        within = torch.where(torch.arange(count) % 2 == 0, n, 200)
        widths = 2 ** torch.randint(5, (count,), generator=generator(1))
        firsts = (torch.rand(count, generator=generator(2)) * within).long()
        # Multiples of the width as addresses go.
        table = torch.stack([firsts // widths * widths + -offset % widths, widths], 1).int()
        accesses = table.tolist()
        expected = out.clone()
        touched = torch.zeros(out.numel(), dtype=torch.bool)
        for first, width in accesses:
            touched[first : first + width] = True
        expected[touched] = x[touched]
        emulation.launches(ops)
        ops.touch(x, out, table)
        assert torch.equal(out, expected)
        (launch,) = emulation.launches(ops)
        moved = widths.sum()
        assert launch["bytes_read"] == moved + table.nbytes
        assert launch["bytes_written"] == moved
        assert launch["distinct_bytes_read"] == touched.sum() + table.nbytes
        assert launch["distinct_bytes_written"] == touched.sum()
        assert touched.sum() < moved


def test_shared_memory_is_limited_to_what_is_allowed(ops: Any) -> None:
    kib, static = 1024, 16

    def reach(size: int, allowed: int = 0) -> None:
        out = torch.tensor([1.5])
        ops.reach(out, size, allowed)
        assert out.item() == 3
        assert emulation.launches(ops)[-1]["shared_bytes"] == size + static

    reach(48 * kib - static)
    with pytest.raises(RuntimeError, match=r"^reach_kernel: uses more than 48 KiB"):
        reach(48 * kib)
    message = r"^reach_kernel: launched with more than 48 KiB .* has not allowed$"
    with pytest.raises(RuntimeError, match=message):
        reach(48 * kib + 16)
    # With the arrays that a kernel declares, 48 KiB are more than it gets without asking.
    reach(48 * kib, allowed=48 * kib)
    with pytest.raises(RuntimeError, match="more shared memory than allow_shared_bytes has"):
        reach(48 * kib + 16)
    reach(60_000, allowed=60_000)
    reach(50_000)
    with pytest.raises(RuntimeError, match="more shared memory than allow_shared_bytes has"):
        reach(60_016)
    reach(227 * kib - static, allowed=227 * kib)
    with pytest.raises(RuntimeError, match=r"^reach_kernel: uses more than 227 KiB"):
        reach(227 * kib)
    with pytest.raises(RuntimeError, match=r"^allow_shared_bytes: 232449 bytes are more than"):
        reach(60_000, allowed=227 * kib + 1)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found_in_any_order(mutants: dict[str, Any], name: str) -> None:
    mutant, broken = MUTANTS[name], mutants[f"tensor_cores_{name}"]

    def call() -> None:
        if mutant.operator == "product":
            broken.product(normal(32, 128), normal(16, 128), torch.empty(32, 16), False)
        elif mutant.operator == "halves":
            broken.halves(normal(128), torch.empty(128), False)
        else:
            rows = torch.arange(0, 32 * CHUNK_BYTES, CHUNK_BYTES, dtype=torch.int32)
            broken.fragments(normal(128), rows.flip(0), torch.empty(128), False)

    SOURCE.assert_found(mutant, broken, call, SEEDS)


# Of (31, 40) and (16, 40) in bfloat16: of each row the last copy has one chunk that does not exist.
PRODUCT = """
a, b = (torch.arange(-n, n).bfloat16().view(-1, 40) for n in (620, 320))
out = torch.empty(31, 16)
ops.product(a, b, out, False)
assert torch.equal(out, a.float() @ b.float().T)
"""


def test_copy_out_of_bounds_is_found_by_address_sanitizer() -> None:
    if not emulation.preload():
        pytest.skip("g++ comes without libasan")
    # The last row goes on for one vector.
    mutant = Mutant("product", "chunk < chunks;", "chunk <= chunks;", "READ of size 16", COPY)
    done = SOURCE.run_sanitized(SOURCE.mutated(mutant), "tensor_cores_out_of_bounds", PRODUCT)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert mutant.message in done.stderr
    assert re.search(rf" ({SOURCE.places(mutant)})\n", done.stderr), done.stderr


def test_zeros_are_copied_from_any_address() -> None:
    if not emulation.preload():
        pytest.skip("g++ comes without libasan")
    address = "exists ? ptx::offset<kChunkBytes>(data, row * chunks + chunk)"
    text = emulation.mutate(
        SOURCE.text, COPY, f"ptx::copy_async(to, {address} : (const void*)5, exists);"
    )
    done = SOURCE.run_sanitized(text, "tensor_cores_zeros", PRODUCT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
