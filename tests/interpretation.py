"""Triton's interpreter, repaired where its numbers are not a GPU's, and made strict.

Set TRITON_INTERPRET=1 before Triton is imported, then call `install()`. Beside the repairs, every
launch runs its programs in an order of its own and reports accesses outside of the tensors that the
kernel was given, and bytes that one program writes while another one reads or writes them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.tools.tensor_descriptor import TensorDescriptor

ENABLED = os.environ.get("TRITON_INTERPRET") == "1"
BF16_NAN = np.uint16(0x7FC0)
VALUES_PER_THREAD = 8  # of a tile, along the axis of a sum
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

Builder = upstream.InterpreterBuilder
Handle = upstream.TensorHandle


class AccessError(AssertionError):
    """A kernel reached where it must not, or its result depends on the order of its programs."""


def install() -> None:
    """Repair the interpreter and let it check accesses, once per process."""
    if not ENABLED:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    _repair_bfloat16()
    _repair_arithmetic()
    _repair_scalars()
    _spend_less()
    _check_accesses()


def _repair_bfloat16() -> None:
    """Handles of bfloat16 hold bits: upstream adds and multiplies them as integers."""
    binary_op, cast, to_float = Builder.binary_op, Builder.cast_impl, Builder.create_fp_to_fp

    def checked_binary_op(self: Any, lhs: Handle, rhs: Handle, operation: Any) -> Handle:
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError("bfloat16 arithmetic: convert to float32 first")
        return binary_op(self, lhs, rhs, operation)

    def rounding_cast(self: Any, source: Handle, target: Any) -> Handle:
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return _widened(source)
        if types == (tl.float32, tl.bfloat16):
            return Handle(_rounded_to_bfloat16(source.data), tl.bfloat16)
        if tl.bfloat16 in types and types[0] != types[1]:
            raise TypeError(f"conversion from {types[0]} to {types[1]}: by way of float32")
        return cast(self, source, target)

    def rounding_fp_to_fp(self: Any, source: Handle, target: Any, mode: Any) -> Handle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return rounding_cast(self, source, target)
        return to_float(self, source, target, mode)

    Builder.binary_op = checked_binary_op
    Builder.cast_impl = rounding_cast
    Builder.create_fp_to_fp = rounding_fp_to_fp


def _widened(handle: Handle) -> Handle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return Handle(bits.view(np.float32), tl.float32)


def _rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest, ties to even, as cvt.rn.bf16.f32 does; upstream truncates."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), BF16_NAN, rounded)


def _repair_arithmetic() -> None:
    """Products of tensor cores in their precision, fma with one rounding, min and max with NaN."""
    dot = Builder.create_dot

    def precise_dot(self: Any, a: Handle, b: Handle, d: Handle, precision: Any, *rest: Any) -> Any:
        a, b = _widened(a), _widened(b)
        if a.dtype.scalar != tl.float32 or precision.name == "IEEE" or a.data.dtype != d.data.dtype:
            return dot(self, a, b, d, precision, *rest)
        if precision.name == "TF32":
            total = np.matmul(_truncated_to_tf32(a.data), _truncated_to_tf32(b.data))
        else:
            a_high, b_high = _rounded_to_tf32(a.data), _rounded_to_tf32(b.data)
            a_low, b_low = _rounded_to_tf32(a.data - a_high), _rounded_to_tf32(b.data - b_high)
            low = np.matmul(a_low, b_high) + np.matmul(a_high, b_low)
            # Infinity leaves a low half of NaN, which Triton drops.
            total = np.where(np.isnan(low), 0, low) + np.matmul(a_high, b_high)
        return Handle(total + d.data, d.dtype.scalar)

    def fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return Handle(exact.astype(np.float32), z.dtype.scalar)

    Builder.create_dot = precise_dot
    Builder.create_fma = fma
    upstream.ReduceOps.sum = _sum
    # max.f32 and min.f32 return the number where one side is NaN; upstream returns NaN.
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def _sum(self: Any, tensor: Any) -> Any:
    """As threads do it: each adds its own values, then halves are added to halves.

    Upstream adds all of them one after the other, with the rounding errors of a long sum.
    """
    values = np.moveaxis(tensor.handle.data, self.axis, 0)
    values = values.reshape(-1, min(VALUES_PER_THREAD, len(values)), *values.shape[1:])
    values = np.add.accumulate(values, axis=1, dtype=values.dtype)[:, -1]
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    if self.keep_dims:
        return self.to_tensor(np.moveaxis(values, 0, self.axis), tensor.dtype)
    return self.to_tensor(values[0], tensor.dtype)


def _truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: 10 bits of its fraction. NaN and infinity stay."""
    bits = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)


def _rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """Nearest, ties away from zero, as cvt.rna.tf32.f32 makes the halves of TF32x3."""
    bits = np.ascontiguousarray(values).view(np.uint32) + np.uint32(0x1000)
    bits &= np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)


def _repair_scalars() -> None:
    """Of arrays with one element: numpy 2.4 does not convert them to numbers any more."""
    patch = upstream._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        tensor.__bool__ = lambda self: (
            bool(self.handle.data.item()) if np.size(self.handle.data) == 1 else True
        )

    upstream._patch_lang_tensor = patched


class _KeptScope(upstream._LangPatchScope):
    """Patches of triton.language that stay when a kernel ends."""

    def restore(self) -> None:
        pass


def _spend_less() -> None:
    """What the interpreter computes again and again, which is half of its time, is kept."""
    patch = upstream._patch_lang
    np_dtype, of_scalars = upstream._get_np_dtype, functools.cache(upstream._get_np_dtype)
    patched: set[frozenset[str]] = set()
    modules: set[str] = set()

    def patch_once(function: Any) -> _KeptScope:
        # Nothing but kernels uses triton.language in this process.
        if function.__module__ not in modules:
            modules.add(function.__module__)
            names = (getattr(each, "__name__", "") for each in function.__globals__.values())
            key = frozenset(name for name in names if name in (tl.__name__, tl.core.__name__))
            if key not in patched:
                patched.add(key)
                patch(function)
        return _KeptScope()

    upstream._patch_lang = patch_once
    upstream._get_np_dtype = lambda type_: (
        of_scalars(type_) if type(type_) is tl.dtype else np_dtype(type_)
    )
    upstream.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    _keep_attributes(tl.block_type, _key_of_block_type)
    _keep_attributes(tl.tensor, lambda handle, type: (type.__class__, type.name), own="handle")


def _key_of_block_type(element_type: Any, shape: Any) -> tuple[Any, ...]:
    return (element_type.name, *(operator.index(size) for size in shape))


def _keep_attributes(kind: Any, key_of: Callable[..., Any], own: str | None = None) -> None:
    """Objects of `kind` with equal keys are made alike; own: their first argument, where it is not.

    kind.__init__ need run only once for each key then.
    """
    initialise = kind.__init__
    kept: dict[Any, dict[str, Any]] = {}

    def initialise_once(self: Any, *arguments: Any) -> None:
        key = key_of(*arguments)
        if key not in kept:
            initialise(self, *arguments)
            kept[key] = {name: value for name, value in vars(self).items() if name != own}
        vars(self).update(kept[key])
        if own is not None:
            setattr(self, own, arguments[0])

    kind.__init__ = initialise_once


def _check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """In one step of numpy, which upstream makes of six of its own, each with its types."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise OverflowError(f"{kind} overflows in {operation.__name__}")


class _Launch:
    """Programs in an order of their own, and what each of them has read and written."""

    def __init__(self, intervals: np.ndarray, name: str, grid: tuple[int, ...] | None) -> None:
        self.intervals, self.name = intervals, name
        self.grid = grid  # of which only the corners run, or None
        self.order: list[int] = []
        self.program = -1
        self.read: list[tuple[int, np.ndarray]] = []
        self.written: list[tuple[int, np.ndarray]] = []

    def access(self, addresses: np.ndarray, size: int, log: list[tuple[int, np.ndarray]]) -> None:
        if addresses.size == 0:
            return
        after = np.searchsorted(self.intervals[:, 0], addresses, side="right") - 1
        inside = (after >= 0) & (addresses + np.uint64(size) <= self.intervals[after, 1])
        if not inside.all():
            raise AccessError(f"{self.name}: {np.count_nonzero(~inside)} accesses out of bounds")
        log.append((self.program, addresses))

    def check_races(self) -> None:
        if not self.written:
            return
        written, writer = _by_address(self.written)
        if np.any((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])):
            raise AccessError(f"{self.name}: two programs write the same element")
        if not self.read:
            return
        read, reader = _by_address(self.read)
        found = np.minimum(np.searchsorted(written, read), written.size - 1)
        if np.any((written[found] == read) & (writer[found] != reader)):
            raise AccessError(f"{self.name}: a program reads what another one writes")


def _by_address(log: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    addresses = np.concatenate([chunk for _, chunk in log])
    programs = np.concatenate([np.full(chunk.size, program) for program, chunk in log])
    order = np.lexsort((programs, addresses))
    return addresses[order], programs[order]


_launch: _Launch | None = None
_corners_only = False
_seed = random.Random(0)  # noqa: S311


def _check_accesses() -> None:
    call, load, store = (
        upstream.GridExecutor.__call__,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )
    place, set_grid = Builder.set_grid_idx, Builder.set_grid_dim

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        name = getattr(self.fn, "__name__", str(self.fn))
        grid = None
        if _corners_only:
            grid = (*self.grid, 1, 1)[:3]
            self.grid = (len(_corners(grid)),)
        outer, _launch = _launch, _Launch(_intervals([*args, *kwargs.values()]), name, grid)
        try:
            with _accesses_not_wrapped():
                call(self, *args, **kwargs)
            _launch.check_races()
        finally:
            _launch = outer

    def checked_load(self: Any, pointers: Handle, mask: Handle, *rest: Any, **named: Any) -> Any:
        if _launch is not None:
            _launch.access(*_active(pointers, mask), _launch.read)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Handle, value: Handle, mask: Handle, *rest: Any) -> Any:
        if _launch is not None:
            _launch.access(*_active(pointers, mask), _launch.written)
        return store(self, pointers, value, mask, *rest)

    def shuffled_place(self: Any, x: int, y: int, z: int) -> None:
        nx, ny, nz = self.grid_dim
        if _launch is not None:
            if _launch.grid is not None:
                _launch.order = _corners(_launch.grid)
            elif not _launch.order:
                _launch.order = list(range(nx * ny * nz))
                _seed.shuffle(_launch.order)
            _launch.program = _launch.order[(x * ny + y) * nz + z if _launch.grid is None else x]
            x, y, z = _launch.program // (ny * nz), _launch.program // nz % ny, _launch.program % nz
        place(self, x, y, z)

    def true_grid(self: Any, *grid: int) -> None:
        set_grid(self, *(grid if _launch is None or _launch.grid is None else _launch.grid))

    upstream.GridExecutor.__call__ = checked_call
    # From a copy on the host, which a tensor on the CPU has none of.
    upstream.GridExecutor._restore_args_dev = lambda *_: None
    Builder.set_grid_dim = true_grid
    Builder.create_masked_load = checked_load
    Builder.create_masked_store = checked_store
    Builder.set_grid_idx = shuffled_place


def _corners(grid: tuple[int, ...]) -> list[int]:
    _, ny, nz = grid
    ends = ({0, size - 1} for size in grid)
    return [(x * ny + y) * nz + z for x, y, z in itertools.product(*ends)]


@contextlib.contextmanager
def corners_only() -> Iterator[None]:
    """Each launch inside runs those programs alone that are first or last on each axis of its grid.

    Its tensors may be larger than what is in reach: memory that nobody touches costs nothing.
    """
    global _corners_only
    _corners_only = True
    try:
        yield
    finally:
        _corners_only = False


@contextlib.contextmanager
def _accesses_not_wrapped() -> Iterator[None]:
    """Lets an AccessError through as it is; the interpreter makes every error one of its own."""
    try:
        yield
    except triton.runtime.errors.InterpreterError as error:
        if isinstance(error.__cause__, AccessError):
            raise error.__cause__ from None
        raise


def _active(pointers: Handle, mask: Handle) -> tuple[np.ndarray, int]:
    """Addresses that an access touches, and the bytes of an element."""
    # A descriptor has an array for its mask, whose data is a memoryview.
    active = np.broadcast_to(np.asarray(mask.data).astype(bool), pointers.data.shape)
    element = pointers.get_element_ty()
    return pointers.data[active].astype(np.uint64), max(1, element.primitive_bitwidth // 8)


def _flattened(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flattened(argument)
        else:
            yield argument


def _intervals(arguments: list[Any]) -> np.ndarray:
    """First and last-plus-one address of each tensor, sorted, overlapping ones as one."""
    found = []
    for argument in _flattened(arguments):
        tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
        if hasattr(tensor, "data_ptr") and tensor.numel() > 0:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            first = tensor.data_ptr()
            found.append([first, first + (last + 1) * tensor.element_size()])
    merged: list[list[int]] = []
    for first, end in sorted(found):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return np.array(merged or [[0, 0]], dtype=np.uint64)
