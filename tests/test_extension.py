"""The compiled extension: loading it, and the kernels registered by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension

OPERATORS = [
    *("add_relu", "add_relu_backward", "bn_relu", "bn_relu_apply", "bn_relu_backward"),
    *("bn_relu_backward_sums", "bn_relu_backward_apply", "bn_statistics"),
]

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
    for operator in OPERATORS:
        name = f"resnet_fused_native::{operator}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), operator


@needs_cuda_build
@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_kernels_are_registered_also_under_a_cpu_only_torch(operator: str) -> None:
    name = f"resnet_fused_native::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
