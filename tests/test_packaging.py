"""Build configuration: what setup.py decides to build, and the sentence it ends in if it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import check_wheel
import pytest
import torch

from resnet_fused import _extension
from resnet_fused._version import __version__
from resnet_fused.commands import environment

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = frozenset({"75", "80", "86", "89", "90", "100", "120"})

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "setup.py").is_file(), reason="setup.py is not beside the tests"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("setuptools") is None
        or int(importlib.metadata.version("setuptools").split(".")[0]) < 77,
        reason="building needs setuptools 77 or newer",
    ),
]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resnet_fused_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolchain(tmp_path: Path) -> dict[str, str]:
    """An environment with a compiler that accepts everything and a CUDA toolkit's nvcc."""
    toolkit = tmp_path / "cuda"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").touch()
    script(toolkit / "bin/nvcc", "echo sm_80; echo sm_90; echo sm_100")
    compiler = script(tmp_path / "bin/g++", "exit 0")
    return {"PATH": str(compiler.parent), "CUDA_HOME": str(toolkit)}


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def run_setup(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PATH", "TMPDIR")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a;10.0", ["8.0", "9.0a", "10.0"]),
        (" 8.0  9.0a+PTX ", ["8.0", "9.0a+PTX"]),
        ("8.0,8.6;8.0", ["8.0", "8.6"]),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
    ],
)
def test_arch_list_is_parsed(build: ModuleType, text: str, expected: list[str]) -> None:
    assert build.parse_arch_list(text) == expected


@pytest.mark.parametrize("text", ["80", "sm_90", "9.0b", "8.0+SASS", "Volcano"])
def test_malformed_arch_is_named(build: ModuleType, text: str) -> None:
    with pytest.raises(build.BuildConfigError, match=r"must look like .* got '" + text[:2]):
        build.parse_arch_list(text)


def test_default_archs(build: ModuleType) -> None:
    assert build.choose_archs("", SUPPORTED) == (("8.0", "9.0a", "10.0"), ())


def test_default_archs_shrink_to_what_an_old_nvcc_knows(build: ModuleType) -> None:
    archs, notes = build.choose_archs("", frozenset({"80", "90"}))
    assert archs == ("8.0", "9.0a")
    assert notes == ("left out CUDA architecture 10.0: this nvcc does not know it",)


def test_archs_older_than_supported_are_left_out_with_a_note(build: ModuleType) -> None:
    archs, notes = build.choose_archs("7.0 7.5 8.0 9.0+PTX", SUPPORTED)
    assert archs == ("8.0", "9.0+PTX")
    assert notes == (
        "left out CUDA architecture 7.0: 8.0 is the oldest supported",
        "left out CUDA architecture 7.5: 8.0 is the oldest supported",
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("7.5", "must hold 8.0 or newer, got '7.5'"),
        ("8.0;11.0", "contains 11.0, which this nvcc does not know"),
    ],
)
def test_impossible_arch_list_is_an_error(build: ModuleType, wanted: str, message: str) -> None:
    with pytest.raises(build.BuildConfigError, match=message):
        build.choose_archs(wanted, SUPPORTED)


@pytest.mark.parametrize(
    ("nvcc", "torch", "count"), [("13.0", "12.8", 1), ("12.4", "13.0", 0), ("13.0", "", 0)]
)
def test_toolkit_newer_than_torchs_is_noted(
    build: ModuleType, nvcc: str, torch: str, count: int
) -> None:
    assert len(build.toolkit_notes(nvcc, torch)) == count


def test_cuda_release_of_torch(build: ModuleType, tmp_path: Path) -> None:
    torch_dir = fake_torch(tmp_path, "2.11.0+cu130")
    assert build.torch_cuda(torch_dir) == ""
    with (torch_dir / "version.py").open("a") as file:
        file.write("cuda: Optional[str] = '13.0'\n")
    assert build.torch_cuda(torch_dir) == "13.0"


def test_gencode_flags(build: ModuleType) -> None:
    assert build.gencode_flags(("9.0a", "10.0+PTX")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
    ]


def test_auto_builds_for_cuda_where_nvcc_is_in_reach(
    build: ModuleType, toolchain: dict[str, str]
) -> None:
    config = build.resolve_config(toolchain)
    assert config.cxx == (str(Path(toolchain["PATH"], "g++")),)
    assert str(config.cuda_home) == toolchain["CUDA_HOME"]
    assert config.archs == ("8.0", "9.0a", "10.0")
    assert (config.torch_dir / "include").is_dir()


def test_auto_without_nvcc_builds_for_cpu_and_says_so(
    build: ModuleType, toolchain: dict[str, str]
) -> None:
    config = build.resolve_config(toolchain | {"CUDA_HOME": "/nowhere"})
    assert config.cuda_home is None
    assert config.notes == ("nvcc was not found in CUDA_HOME=/nowhere; building for CPU only",)


def test_auto_without_compiler_installs_pure_python_and_says_so(
    build: ModuleType, toolchain: dict[str, str]
) -> None:
    config = build.resolve_config(toolchain | {"PATH": "/nowhere"})
    assert config.cxx == ()
    (note,) = config.notes
    assert note.endswith("was not found; installing pure Python, which is slower")


def test_cpu_ignores_nvcc(build: ModuleType, toolchain: dict[str, str]) -> None:
    assert build.resolve_config(toolchain | {"RESNET_FUSED_BUILD": "cpu"}).cuda_home is None


def test_none_needs_nothing(build: ModuleType) -> None:
    config = build.resolve_config({"RESNET_FUSED_BUILD": "none", "PATH": "/nowhere"})
    assert config.cxx == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RESNET_FUSED_BUILD": "gpu"}, "one of auto, cpu, cuda, none, got 'gpu'"),
        (
            {"RESNET_FUSED_BUILD": "cuda", "CUDA_HOME": "/nowhere"},
            "nvcc was not found in CUDA_HOME",
        ),
        ({"RESNET_FUSED_BUILD": "cpu", "PATH": "/nowhere"}, r"a C\+\+ compiler .* was not found"),
        ({"RESNET_FUSED_BUILD": "cpu", "CXX": "no-such-c++"}, r"CXX=no-such-c\+\+ was not found"),
        ({"TORCH_CUDA_ARCH_LIST": "all"}, "must look like 8.0"),
    ],
)
def test_impossible_wish_is_an_error(
    build: ModuleType, toolchain: dict[str, str], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(build.BuildConfigError, match=message):
        build.resolve_config(toolchain | changes)


def test_compiler_without_cpp20_is_an_error(build: ModuleType, tmp_path: Path) -> None:
    old = script(tmp_path / "g++", "exit 1")
    with pytest.raises(build.BuildConfigError, match=r"does not compile C\+\+20"):
        build.find_cxx({"CXX": str(old), "PATH": os.environ["PATH"]})


def test_nvcc_that_is_a_wrapper_leads_to_its_toolkit(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cuda/bin").mkdir(parents=True)
    wrapper = script(tmp_path / "nvcc", f"echo '#$ TOP={tmp_path}/cuda/bin/..' >&2")
    assert build.toolkit_of(str(wrapper)) == tmp_path / "cuda"


@pytest.fixture
def no_torch_to_import(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_torch_to_import")
def test_torch_hidden_by_build_isolation_is_found_by_path(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_dir = fake_torch(tmp_path, "2.11.0+cu130")
    monkeypatch.setattr(build, "site_packages", lambda: [Path("/nowhere"), tmp_path])
    assert build.find_torch() == torch_dir


@pytest.mark.usefixtures("no_torch_to_import")
def test_missing_torch_is_an_error_that_says_what_to_do(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "site_packages", list)
    with pytest.raises(build.BuildConfigError, match=r"torch was not found .* install torch 2\.11"):
        build.find_torch()


@pytest.mark.usefixtures("no_torch_to_import")
def test_old_torch_is_an_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_torch(tmp_path, "2.9.1")
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path])
    with pytest.raises(build.BuildConfigError, match=r"torch must be 2.11 or newer, got 2\.9\.1"):
        build.find_torch()


def fake_torch(folder: Path, version: str) -> Path:
    header = folder / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.mark.parametrize(("text", "count"), [("3", 3), ("", os.cpu_count())])
def test_max_jobs(build: ModuleType, text: str, count: int) -> None:
    assert build.worker_count({"MAX_JOBS": text}) == count


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_bad_max_jobs_is_an_error(build: ModuleType, text: str) -> None:
    with pytest.raises(build.BuildConfigError, match="MAX_JOBS must be a positive integer"):
        build.worker_count({"MAX_JOBS": text})


class TestIncrementalBuild:
    @pytest.fixture
    def job(self, build: ModuleType, tmp_path: Path) -> Any:
        source, target = tmp_path / "a.cpp", tmp_path / "a.o"
        source.touch()
        command = ["/bin/sh", "-c", f"touch {target}; echo '{target}: \\\n {source}' > {target}.d"]
        return build.Job("a.cpp", target, tmp_path / "a.command", command)

    def test_second_run_has_nothing_to_do(self, job: Any) -> None:
        assert job.is_stale()
        job.run()
        assert not job.is_stale()

    def test_changed_header_and_changed_flags_are_noticed(
        self, build: ModuleType, job: Any
    ) -> None:
        job.run()
        other_flags = build.Job(job.title, job.target, job.record, [*job.command, "-O3"])
        assert other_flags.is_stale()
        os.utime(job.target.with_name("a.cpp"), (2**31, 2**31))
        assert job.is_stale()

    def test_progress_is_printed_and_failure_names_the_file(
        self, build: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        failing = build.Job("b.cpp", tmp_path / "b.o", tmp_path / "b.command", ["/bin/false"])
        with pytest.raises(build.BuildConfigError, match=r"making b\.cpp failed"):
            build.run_jobs([failing], workers=1)
        assert capfd.readouterr().out == "[1/1] b.cpp\n"


def test_bad_mode_ends_the_build_in_one_sentence() -> None:
    done = run_setup("build_ext", RESNET_FUSED_BUILD="fast")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "resnet_fused: RESNET_FUSED_BUILD must be one of auto, cpu, cuda, none, got 'fast'."
    )
    assert "Traceback" not in done.stderr


def test_version_is_the_packages_own_and_needs_no_build_tools() -> None:
    done = run_setup("--version", RESNET_FUSED_BUILD="fast")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == __version__


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source tree, without the extension."""
    if environment.package_version("pip") is None:
        pytest.skip("no pip to build a wheel with")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "resnet_fused", tree / "resnet_fused", ignore=ignored)
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tree / "dist")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *flags, str(tree)],
        env={**os.environ, "RESNET_FUSED_BUILD": "none"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


class TestCheckOfWheels:
    @pytest.fixture
    def wheel(self, pure_wheel: Path, tmp_path: Path) -> Path:
        """With the extension that the tests run, as it was compiled for them."""
        if not _extension.load():
            pytest.skip(f"the extension is not available: {_extension.error()}")
        target = tmp_path / pure_wheel.name
        shutil.copy(pure_wheel, target)
        with zipfile.ZipFile(target, "a") as archive:
            archive.write(_extension.FILE, "resnet_fused/_C.abi3.so")
        return target

    @pytest.mark.slow
    def test_a_good_wheel(self, wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_wheel.main([str(wheel)]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert f", torch {torch.__version__}: ok: CPU kernels (" in line
        for arch in _extension.cuda_archs():
            assert arch in line

    def test_every_interpreter_has_its_line(
        self, pure_wheel: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pythons = ["--python", sys.executable, "--python", "/nowhere/python"]
        assert check_wheel.main([str(pure_wheel), *pythons]) == 1
        first, second = capsys.readouterr().out.splitlines()
        assert "FAILED: the extension is not loaded: this installation was built without" in first
        assert "FAILED: /nowhere/python: [Errno 2]" in second

    def test_an_extension_that_does_not_load(
        self, pure_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "damaged.whl"
        shutil.copy(pure_wheel, target)
        with zipfile.ZipFile(target, "a") as archive:
            archive.writestr("resnet_fused/_C.abi3.so", "not a library")
        assert check_wheel.main([str(target)]) == 1
        assert "FAILED: the extension is not loaded: it does not load" in capsys.readouterr().out

    def test_another_package_is_not_mistaken_for_the_wheels(self, tmp_path: Path) -> None:
        verdict = check_wheel.inside(tmp_path)
        assert "not from the wheel" in verdict.broken
        assert json.loads(json.dumps(verdict._asdict()))["torch"] == torch.__version__

    def test_wrong_results_are_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + residual) * 1.01

        monkeypatch.setattr("resnet_fused.commands.cases.ops.add_relu", wrong)
        with pytest.raises(check_wheel.Broken, match=r"wrong result: Check.*add_relu"):
            check_wheel._check_operators(torch.device("cpu"))

    def test_a_missing_kernel_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key != "CUDA"
        )
        check_wheel._check_registrations({"cuda": False})
        with pytest.raises(check_wheel.Broken, match="add_relu has no kernel for CUDA"):
            check_wheel._check_registrations({"cuda": True})

    def test_no_wheel(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            check_wheel.main([str(tmp_path / "missing.whl")])
        assert "missing.whl is not a wheel" in capsys.readouterr().err
