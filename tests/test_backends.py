"""The choice of a backend: by wish, by environment, by default, and without the extension."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_backend
import pytest
import torch
from torch import Tensor

import resnet_fused as rf
from resnet_fused import (
    _extension,
    backends,
    cuda_chains,
    cuda_convolutions,
    native,
    onednn,
    reference,
    triton_kernels,
)

PACKAGE = Path(rf.__file__).parent
X = torch.ones(1, 2, 3, 3)


@pytest.fixture(autouse=True)
def _without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backends as they come: other tests may have added one."""
    names = tuple(name for name in backends.NAMES if name != emulated_backend.NAME)
    monkeypatch.setattr(backends, "NAMES", names)
    for implementations in backends._IMPLEMENTATIONS.values():
        monkeypatch.delitem(implementations, emulated_backend.NAME, raising=False)


def run_python(code: str, package: Path = PACKAGE, **environment: str) -> Any:
    """Run code in a new process that imports the package."""
    variables = os.environ | {"PYTHONPATH": str(package.parent)} | environment
    variables = {k: v for k, v in variables.items() if v != ""}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)


# Faster than plain PyTorch there only.
ON_GPUS = ("conv_stats", "conv_dgrad", "conv_wgrad", *cuda_chains.OPERATORS)


@needs_extension
@pytest.mark.parametrize("operator", [name for name in backends.OPERATORS if name not in ON_GPUS])
def test_default_is_the_fastest_that_is_there(operator: str) -> None:
    assert backends.available(operator, "cpu") == ["cpu", "reference"]
    module = onednn if operator.startswith("conv") else None
    expected = getattr(module, operator) if module else native.launcher(operator)
    assert backends.choose(operator, X) is expected


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_a_wish_is_followed(operator: str) -> None:
    with rf.backend("reference"):
        assert backends.choose(operator, X) is getattr(reference, operator)


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_reference_takes_over_for_other_dtypes_and_devices(operator: str) -> None:
    assert backends.available(operator, "mps") == ["reference"]
    assert backends.available(operator, "cpu", torch.float8_e4m3fn) == ["reference"]


@needs_extension
def test_wishes_nest_and_end() -> None:
    default = backends.choose("add_relu", X)
    with rf.backend("reference"):
        with rf.backend("cpu"):
            assert backends.choose("add_relu", X) is native.launcher("add_relu")
        assert backends.choose("add_relu", X) is reference.add_relu
        with pytest.raises(KeyError), rf.backend("cpu"):
            raise KeyError
        assert backends.choose("add_relu", X) is reference.add_relu
    assert backends.choose("add_relu", X) is default


def test_unknown_name() -> None:
    expected = "backend: must be one of reference, cpu, cuda, triton, cudnn, got 'fast'"
    with pytest.raises(ValueError, match=f"^{expected}$"), rf.backend("fast"):
        pass
    assert backends.choose("add_relu", X) is not None


def test_backend_without_the_operator() -> None:
    expected = (
        f"add_relu: backend 'cudnn' was asked for, but it has no implementation of add_relu"
        f" (available here: {', '.join(backends.available('add_relu', 'cpu'))})"
    )
    with rf.backend("cudnn"), pytest.raises(RuntimeError, match=f"^{re.escape(expected)}$"):
        rf.ops.add_relu(X, X)


def test_what_the_backend_asked_for_implements() -> None:
    with rf.backend("cudnn"):
        assert not backends.is_implemented("add_relu")
    with rf.backend("cpu"):
        assert backends.is_implemented("add_relu")
        assert not backends.is_implemented("conv_stats")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_for_another_device(name: str) -> None:
    expected = f"add_relu: backend '{name}' was asked for, but it runs on cuda tensors, got cpu"
    with rf.backend(name), pytest.raises(RuntimeError, match=re.escape(expected)):
        rf.ops.add_relu(X, X)


def test_the_backward_follows_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    choose = backends.choose

    def spy(operator: str, x: Tensor) -> Any:
        ran.append(f"{operator}: {choose(operator, x).__module__}")
        return choose(operator, x)

    monkeypatch.setattr(backends, "choose", spy)
    x = X.clone().requires_grad_()
    with rf.backend("reference"):
        rf.ops.add_relu(x, x).sum().backward()
    module = "resnet_fused.reference"
    assert ran == [f"add_relu: {module}", f"add_relu_backward: {module}"]


CHOSEN = """
import torch, resnet_fused as rf
from resnet_fused import backends
x = torch.ones(1, 2, 3, 3)
print(backends.choose("add_relu", x).__module__)
with rf.backend("cpu"):
    print(backends.choose("add_relu", x).__module__)
"""


@needs_extension
def test_environment_variable() -> None:
    ran = run_python(CHOSEN, RESNET_FUSED_BACKEND="reference")
    assert ran.returncode == 0, ran.stderr
    chosen, wished = ran.stdout.split()
    assert chosen == "resnet_fused.reference"
    assert wished != "resnet_fused.reference", "`with backend` takes precedence"


def test_bad_environment_variable() -> None:
    ran = run_python(CHOSEN, RESNET_FUSED_BACKEND="fast")
    assert ran.returncode != 0
    expected = "ValueError: RESNET_FUSED_BACKEND: must be one of reference, cpu, cuda, triton"
    assert expected in ran.stderr


def test_import_works_with_a_bad_environment_variable() -> None:
    ran = run_python("import resnet_fused", RESNET_FUSED_BACKEND="fast")
    assert ran.returncode == 0, ran.stderr


WITHOUT_EXTENSION = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import torch, resnet_fused as rf
    from resnet_fused import models, nn
torch.manual_seed(0)
x = torch.randn(2, 8, 5, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(rf.ops.add_relu(x, x), torch.relu(x + x))
        vectors = torch.zeros(8), torch.ones(8)
        out = rf.ops.bn_relu(x, None, None, *vectors, training=True)
        expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(out, expected)
        weight = torch.randn(4, 8, 3, 3)
        out = rf.ops.conv_bn_relu(x, weight, torch.ones(4), torch.zeros(4))
        torch.testing.assert_close(out, torch.relu(torch.conv2d(x, weight)))
    block = nn.BasicBlock(8, 8)
    for training in (True, False):
        block.train(training)
        inner = torch.relu(block.bn1(block.conv1(x)))
        expected = torch.relu(block.bn2(block.conv2(inner)) + x)
        torch.testing.assert_close(block(x), expected)
        block(x).sum().backward()
slow = [str(w.message) for w in caught if "extension" in str(w.message)]
print(len(slow), slow[0])
with rf.backend("cpu"):
    try:
        rf.ops.add_relu(x, x)
    except RuntimeError as error:
        print(error)
"""


def test_without_the_extension(tmp_path: Path) -> None:
    package = tmp_path / "resnet_fused"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    ran = run_python(WITHOUT_EXTENSION, package, RESNET_FUSED_BACKEND="")
    assert ran.returncode == 0, ran.stderr
    warned, refused = ran.stdout.splitlines()
    assert warned.startswith("1 resnet_fused: the compiled extension is not available (this")
    assert "doctor" in warned
    assert refused.startswith(
        "add_relu: backend 'cpu' was asked for, but the compiled extension is not available"
    )


def test_triton_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> str | None:
        return triton_kernels.unavailable.__wrapped__()

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert unavailable() == "Triton 3.5.1 is older than 3.6"
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.0+git1"))
    assert unavailable() is None
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    assert str(unavailable()).startswith("Triton cannot be imported (AttributeError")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert unavailable() == "Triton is not installed"


@pytest.mark.parametrize(
    ("capability", "hip", "unavailable", "expected"),
    [
        ((8, 0), None, None, None),
        ((7, 5), None, None, "it needs compute capability 8.0, got 7.5"),
        ((9, 0), "6", None, "it is written for NVIDIA GPUs"),
        ((9, 0), None, "Triton is not installed", "Triton is not installed"),
    ],
)
def test_where_triton_kernels_run(
    capability: tuple[int, int],
    hip: str | None,
    unavailable: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: unavailable)
    assert triton_kernels.unsupported("cuda", torch.float32) == expected


def test_triton_convolutions_run_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule chooses them before they have been timed; elementwise kernels replace PyTorch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.available("bn_relu", "cuda")[-2:] == ["triton", "reference"]
    assert backends.available("conv_bn_relu", "cuda")[0] == "reference"
    assert "triton" in backends.available("conv_bn_relu", "cuda")
    assert "triton" not in backends.available("conv_bn_relu", "cuda", torch.float64)


@pytest.mark.parametrize("operator", cuda_convolutions.OPERATORS)
def test_cuda_convolutions_run_when_asked_for(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rule chooses them before they have been timed."""
    monkeypatch.setattr(native, "unsupported_on_cuda", lambda device_type, dtype: None)
    monkeypatch.setitem(backends._IMPLEMENTATIONS, operator, backends._convolution(operator))
    found = backends.available(operator, "cuda")
    assert found[0] == "reference"
    assert "cuda" in found


@pytest.mark.parametrize("operator", cuda_chains.OPERATORS)
def test_chains_run_when_asked_for(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule chooses them before they have been timed."""
    monkeypatch.setattr(native, "unsupported_on_cuda", lambda device_type, dtype: None)
    monkeypatch.setitem(backends._IMPLEMENTATIONS, operator, backends._chain(operator))
    assert backends.available(operator, "cuda") == ["reference", "cuda"]
    x = torch.empty(0, device="meta")
    assert backends.is_implemented(operator)
    assert not backends.is_accelerated(operator, x)
    with rf.backend("cuda"):
        assert backends.is_implemented(operator)
        assert backends.is_accelerated(operator, x)
    with rf.backend("cpu"):
        assert not backends.is_implemented(operator)


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, resnet_fused; print('resnet_fused.triton_kernels.device' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
