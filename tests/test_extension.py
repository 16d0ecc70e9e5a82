"""The compiled extension: loading it, and the CUDA code in it, as far as no GPU is needed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import _extension

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)
needs_cuda_build = pytest.mark.skipif(
    not _extension.built_with_cuda(), reason="the extension was built without CUDA (no nvcc?)"
)


class TestLoading:
    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        """Lets each test try to load again, and the session go on with what it had."""
        _extension.error.cache_clear()
        yield
        _extension.error.cache_clear()

    @needs_extension
    def test_loads_once_and_says_how_it_was_built(self) -> None:
        assert _extension.load()
        assert _extension.load()
        assert _extension.error() is None
        info = _extension.build_info()
        assert info is not None
        assert info["isa"] in {"default", "avx2", "avx512", "avx512_bf16"}
        assert info["cuda"] == bool(info["archs"])
        assert _extension.cuda_archs() == tuple(info["archs"])

    def test_without_the_file_the_reason_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(_extension, "FILE", tmp_path / "_C.abi3.so")
        assert not _extension.load()
        assert "built without it" in str(_extension.error())

    def test_under_an_old_torch_nothing_is_loaded(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "_C.abi3.so").touch()
        monkeypatch.setattr(_extension, "FILE", tmp_path / "_C.abi3.so")
        monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
        assert not _extension.load()
        assert _extension.error() == "it needs torch 2.11 or newer, got 2.10.1+cu128"

    def test_a_file_that_cannot_be_loaded_is_a_reason_not_an_exception(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
        monkeypatch.setattr(_extension, "FILE", tmp_path / "_C.abi3.so")
        assert not _extension.load()
        reason = str(_extension.error())
        assert reason.startswith(f"it does not load under torch {torch.__version__}: ")
        assert reason.endswith("; install resnet_fused again")


@needs_extension
def test_every_schema_has_a_cpu_kernel() -> None:
    operators = ["add_relu", "add_relu_backward", "bn_relu", "bn_relu_apply", "bn_relu_backward"]
    for operator in operators:
        name = f"resnet_fused_native::{operator}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), operator


@needs_cuda_build
@pytest.mark.parametrize("operator", ["add_relu", "add_relu_backward"])
def test_cuda_kernels_are_registered_also_under_a_cpu_only_torch(operator: str) -> None:
    name = f"resnet_fused_native::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.fixture(scope="module")
def functions() -> dict[str, dict[str, str]]:
    """Machine code by architecture and by mangled kernel name."""
    listing = cuobjdump("-sass")
    by_arch: dict[str, dict[str, str]] = {}
    for section in re.split(r"^arch = sm_", listing, flags=re.MULTILINE)[1:]:
        arch, _, code = section.partition("\n")
        kernels = re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]
        by_arch.setdefault(arch.strip(), {}).update(
            {name.strip(): body for name, _, body in (k.partition("\n") for k in kernels)}
        )
    return by_arch


@needs_cuda_build
class TestMachineCode:
    """What nvcc made of csrc/cuda/add_relu.cu, for each architecture in the extension."""

    def test_every_promised_architecture_is_there(
        self, functions: dict[str, dict[str, str]]
    ) -> None:
        promised = {arch.removesuffix("+PTX").replace(".", "") for arch in _extension.cuda_archs()}
        assert set(functions) == promised

    def test_vector_kernels_move_16_bytes_per_access(
        self, functions: dict[str, dict[str, str]]
    ) -> None:
        for arch, kernels in functions.items():
            vectorised = [
                body
                for name, body in kernels.items()
                if re.search(r"AddRelu|ReluMask", name) and "Li1EEEv" not in name
            ]
            assert len(vectorised) == 2 * len(DTYPES), arch
            for body in vectorised:
                # Two vectors in flight of each input: the next access may not wait for arithmetic.
                assert len(re.findall(r"\bLDG\.E\.128", body)) == 4, arch
                assert len(re.findall(r"\bSTG\.E\.128", body)) == 2, arch

    def test_no_kernel_spills(self, functions: dict[str, dict[str, str]]) -> None:
        for arch, kernels in functions.items():
            for name, body in kernels.items():
                assert not re.search(r"\b(LDL|STL)\b", body), f"sm_{arch}: {name}"


def cuobjdump(*options: str) -> str:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        # Given a PATH of its own directory only, cuobjdump finds the nvdisasm that lies there.
        found = str(bundled) if bundled.is_file() else None
    if found is None:
        pytest.skip("no cuobjdump in PATH and no triton that bundles one")
    done = subprocess.run(
        [found, *options, str(_extension.FILE)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("csrc is not beside the tests")
    torch_dir = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("emulated") / "add_relu.so"
    subprocess.run(
        [
            *(compiler, "-shared", "-fPIC", "-O1", "-std=c++20", "-Wno-unknown-pragmas"),
            # An access that is not aligned as its type promises ends the process.
            *("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"),
            *("-DRESNET_FUSED_EMULATE", "-DTORCH_STABLE_ONLY"),
            *("-DTORCH_TARGET_VERSION=0x020b000000000000",),
            *("-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests/emulator")),
            *("-isystem", str(torch_dir / "include"), "-x", "c++"),
            *(str(ROOT / "csrc/cuda/add_relu.cu"), str(ROOT / "tests/emulator/schemas.cpp")),
            *("-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu"),
        ],
        check=True,
        timeout=120,
    )
    torch.ops.load_library(str(library))
    return torch.ops.resnet_fused_emulated


class TestEmulated:
    """The source of the CUDA kernels, compiled as C++ and run on CPU tensors."""

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
                "add_relu: x must be float32, float64, float16 or bfloat16, got Int",
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
