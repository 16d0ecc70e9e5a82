"""The CUDA kernels, run on CPU tensors by the emulator in csrc/emulator."""

from __future__ import annotations

import itertools
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def emulated() -> Any:
    return emulation.library()


class TestAddRelu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_at_every_alignment_and_length(self, emulated: Any, dtype: torch.dtype) -> None:
        # Lengths around one vector, one block of vectors and several blocks.
        for n, offset in itertools.product((1, 2, 7, 8, 9, 1023, 4096, 8193), (0, 1, 4)):
            x, residual, grad_out = (cut_out(n, offset, dtype, seed) for seed in (0, 1, 2))
            expected = torch.relu(x + residual)
            out = emulated.add_relu(x, residual)
            assert torch.equal(out, expected), (n, offset)
            grad = emulated.add_relu_backward(grad_out, out)
            assert torch.equal(grad, grad_out * (out > 0)), (n, offset)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_byte_moves_once(self, emulated: Any, dtype: torch.dtype, seed: int) -> None:
        x, residual = (cut_out(16 * 700, 0, dtype, seed) for seed in (0, 1))
        emulated.configure(seed, 3)
        emulation.launches(emulated)
        out = emulated.add_relu(x, residual)
        assert torch.equal(out, torch.relu(x + residual))
        emulated.add_relu_backward(x, out)
        for launch in emulation.launches(emulated):
            assert launch["kernel"].startswith("elementwise_kernel<")
            assert launch["bytes_read"] == 2 * x.nbytes
            assert launch["bytes_written"] == x.nbytes
            assert launch["accesses"] == {"16": 3 * x.nbytes // 16}

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_misaligned_and_ragged_tensors_move_once_too(
        self, emulated: Any, dtype: torch.dtype
    ) -> None:
        per_vector = 16 // dtype.itemsize
        for n, offset, rest in ((8 * 99 + 1, 0, 1), (8 * 99, 1, 8 * 99)):
            x, residual = (cut_out(n, offset, dtype, seed) for seed in (0, 1))
            emulation.launches(emulated)
            emulated.add_relu(x, residual)
            (launch,) = emulation.launches(emulated)
            assert launch["bytes_read"] == 2 * x.nbytes
            assert launch["bytes_written"] == x.nbytes
            accesses = {str(dtype.itemsize): 3 * rest, "16": 3 * (n - rest) // per_vector}
            assert launch["accesses"] == {
                width: count for width, count in accesses.items() if count
            }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_and_infinity_pass_as_in_torch(self, emulated: Any, dtype: torch.dtype) -> None:
        inf, nan = float("inf"), float("nan")
        x = torch.tensor([nan, inf, -inf, 1.0, inf, -1.0, 0.0, -0.0], dtype=dtype).view(1, 8, 1, 1)
        residual = torch.tensor([1.0, 1, 1, nan, -inf, 1, 0, 0], dtype=dtype).view(1, 8, 1, 1)
        expected = torch.relu(x + residual)
        out = emulated.add_relu(x, residual)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        grad = emulated.add_relu_backward(torch.ones_like(out), out)
        eager = torch.ops.aten.threshold_backward(torch.ones_like(out), expected, 0)
        assert torch.equal(grad, eager)

    def test_channels_last_and_empty(self, emulated: Any) -> None:
        x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
        residual = torch.randn_like(x)
        out = emulated.add_relu(x, residual)
        assert torch.equal(out, torch.relu(x + residual))
        assert out.stride() == x.stride()
        assert emulated.add_relu(x[:0], residual[:0]).shape == (0, 3, 5, 7)

    @pytest.mark.parametrize(
        ("x", "residual", "message"),
        [
            (
                torch.ones(1, 2, 3, 4),
                torch.ones(1, 2, 3, 5),
                r"add_relu: residual must have the shape of x \(1, 2, 3, 4\), got \(1, 2, 3, 5\)",
            ),
            (
                torch.ones(1, 2, 3, 4),
                torch.ones(1, 2, 3, 4).half(),
                "add_relu: residual must have the dtype of x Float, got Half",
            ),
            (
                torch.ones(1, 2, 3, 4),
                torch.ones(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
                "add_relu: residual must have the strides of x",
            ),
            (
                torch.ones(1, 2, 3, 8)[..., ::2],
                torch.ones(1, 2, 3, 8)[..., ::2],
                "add_relu: x must be a 4-d tensor, contiguous or channels_last, got shape",
            ),
            (
                torch.ones(1, 2, 3, 4).int(),
                torch.ones(1, 2, 3, 4).int(),
                "add_relu: x must be float32, float16 or bfloat16, got Int",
            ),
        ],
        ids=["shape", "dtype", "layout", "strides", "integers"],
    )
    def test_bad_input_is_named(
        self, emulated: Any, x: Tensor, residual: Tensor, message: str
    ) -> None:
        with pytest.raises(RuntimeError, match=f"^{message}"):
            emulated.add_relu(x, residual)


def cut_out(n: int, offset: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Make n elements at an offset into a larger buffer: addresses are really misaligned then."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(n + offset, generator=generator).to(dtype)
    return buffer[offset:].view(1, n, 1, 1)
