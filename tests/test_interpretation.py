"""The repairs and checks of Triton's interpreter, each on a kernel of one line."""

from typing import Any

import interpreted_backend
import pytest
import torch

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)
import interpreted_kernels as kernels
from interpretation import AccessError, corners_only

pytestmark = pytest.mark.interpreter
interpreted_backend.install()


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.7, float("nan"), 3e38, 0, 1])
    out = torch.empty(8, dtype=torch.bfloat16)
    kernels.cast_kernel[(1,)](x, out, 8)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(8)
    kernels.cast_kernel[(1,)](out, back, 8)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_arithmetic_is_refused() -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="convert to float32 first"):
        kernels.add_kernel[(1,)](x, torch.empty_like(x), 4)


def test_fma_rounds_once() -> None:
    x = torch.full((4,), 1 + 2.0**-12)
    out = torch.empty(4)
    kernels.fma_kernel[(1,)](x, out, 4)
    assert out.double().equal((x.double() ** 2 - 1).float().double())
    assert not out.equal(x * x - 1)


@pytest.mark.parametrize(("everywhere", "expected"), [(True, float("nan")), (False, 0.0)])
def test_maximum_and_nan(everywhere: bool, expected: float) -> None:
    out = torch.empty(4)
    kernels.maximum_kernel[(1,)](torch.full((4,), float("nan")), out, everywhere, 4)
    torch.testing.assert_close(out, torch.full((4,), expected), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("precision", "error"), [("tf32", 2e-3), ("tf32x3", 2e-6), ("ieee", 2e-6)])
def test_precision_of_products(dtype: torch.dtype, precision: str, error: float) -> None:
    a, b = torch.randn(2, 32, 32).to(dtype).unbind()
    out = torch.empty(32, 32)
    kernels.dot_kernel[(1,)](a, b, out, precision, 32)
    exact = a.double() @ b.double()
    relative = ((out - exact).norm() / exact.norm()).item()
    assert relative < error
    if (dtype, precision) == (torch.float32, "tf32"):
        assert relative > 1e-4


@pytest.mark.parametrize("argument", ["x", "out"])
def test_access_out_of_bounds(argument: str) -> None:
    whole, part = torch.ones(32), torch.ones(32)[4:20]
    x, out = (part, whole) if argument == "x" else (whole, part)
    with pytest.raises(AccessError, match="copy_kernel: 4 accesses out of bounds"):
        kernels.copy_kernel[(2,)](x, out, 20, 16)
    kernels.copy_kernel[(1,)](x, out, 16, 16)


@pytest.mark.parametrize("value", [2**30, -(2**30) - 1])
def test_integers_that_overflow(value: int) -> None:
    x = torch.full((4,), value, dtype=torch.int32)
    with pytest.raises(Exception, match="int32 overflows in add"):
        kernels.add_kernel[(1,)](x, torch.empty_like(x), 4)
    kernels.add_kernel[(1,)](x // 2, x, 4)
    assert x.tolist() == [value // 2 * 2] * 4


def test_two_programs_that_write_one_element() -> None:
    with pytest.raises(AccessError, match="same_place_kernel: two programs write"):
        kernels.same_place_kernel[(2,)](torch.zeros(1, dtype=torch.int32))
    kernels.same_place_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


def test_a_program_that_reads_what_another_one_writes() -> None:
    with pytest.raises(AccessError, match="neighbour_kernel: a program reads"):
        kernels.neighbour_kernel[(4,)](torch.zeros(4), 4)


def test_programs_run_in_another_order_each_time() -> None:
    orders = []
    for _ in range(2):
        out = torch.empty(32, dtype=torch.int32)
        kernels.order_kernel[(32,)](out, torch.zeros(1, dtype=torch.int32))
        orders.append(out.tolist())
        assert sorted(orders[-1]) == list(range(32))
    assert orders[0] != orders[1]


def test_corners_of_a_grid() -> None:
    out = torch.full((32,), -1, dtype=torch.int32)
    with corners_only():
        kernels.order_kernel[(32, 3)](out, torch.zeros(1, dtype=torch.int32))
    assert out.tolist() == [0, 0, 31, 31] + [-1] * 28


def test_numbers_of_one_element_are_scalars() -> None:
    out = torch.empty(1, dtype=torch.int32)
    kernels.scalar_kernel[(1,)](out, 6)
    assert out.item() == 6


def test_new_memory_is_not_zero() -> None:
    def launcher(x: Any) -> Any:
        return torch.empty_like(x)

    assert interpreted_backend.on_uninitialised_memory(launcher)(torch.ones(3)).isnan().all()
