"""The compiled extension: loading it, and the CUDA code in it, as far as no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension

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
