"""gpu_check.py: what it refuses, what it starts, and that its verdict can be negative.

No GPU is needed: the programs that it would start are replaced.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_check
import pytest
import torch

from resnet_fused import _extension, native

ROOT = Path(__file__).resolve().parent.parent
PASSED_ON_GPU = '<testcase name="test_layouts[cuda-2x12x5x4-float32-nchw]"/>'
PASSED_ON_CPU = '<testcase name="test_layouts[cpu-2x12x5x4-float32-nchw]"/>'
SKIPPED_ON_GPU = '<testcase name="test_layouts[cuda-float32]"><skipped/></testcase>'
FAILED = '<testcase name="test_layouts[cuda-bfloat16]"><failure/></testcase>'


class Started(NamedTuple):
    command: list[str]
    cwd: Path
    environment: dict[str, str]


class Programs:
    """Stands in for the programs that are started: what they were, and how they end."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.tests = PASSED_ON_GPU + PASSED_ON_CPU
        self.status: Callable[[list[str]], int] = lambda command: 0

    def run(self, command: list[str], cwd: Path, environment: dict[str, str]) -> int:
        self.started.append(Started(command, cwd, environment))
        for word in command:
            if word.startswith("--junitxml="):
                text = f"<testsuites><testsuite>{self.tests}</testsuite></testsuites>"
                Path(word.partition("=")[2]).write_text(text)
        return self.status(command)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    result = Programs()
    monkeypatch.setattr(gpu_check, "_run", result.run)
    monkeypatch.setattr(gpu_check, "_refuse_what_cannot_be_checked", lambda: None)
    monkeypatch.setattr(gpu_check, "_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    return result


@pytest.fixture
def summary(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def run(*arguments: str) -> tuple[int, list[str]]:
        status = gpu_check.main(list(arguments))
        return status, capsys.readouterr().out.partition("Summary\n")[2].splitlines()

    return run


def test_all_parts(programs: Programs, summary: Callable[..., tuple[int, list[str]]]) -> None:
    status, lines = summary()
    assert status == 0
    assert [line.split("  ")[0] for line in lines] == [
        "tests", "sanitizer memcheck", "sanitizer racecheck", "sanitizer initcheck",
        "sanitizer synccheck", "bench_add_relu", "bench_bn_relu",
        "bench_bn_relu_max_pool", "bench_conv_bn_relu", "bench_chains",
    ]  # fmt: skip
    assert all(" passed " in line for line in lines)
    assert "2 passed, 1 of these on the GPU" in lines[0]
    tests, memcheck, *_, bench = programs.started
    assert tests.cwd == gpu_check.TESTS, "the source tree must not come before an installation"
    assert memcheck.command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    assert memcheck.command[-1] == "test_cuda_kernels.py"
    assert memcheck.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert bench.command[1:] == [
        "benchmarks/bench_chains.py", "--device", "cuda",
        "--batch", "256", "--dtype", "bfloat16",
        "--providers", "eager,compile,layers_cudnn,layers_triton,layers_cuda,cuda",
        "--mode", "forward",
        "--seconds", "0.3",
    ]  # fmt: skip
    package = str(Path(_extension.__file__).parent.parent)
    for program in programs.started:
        assert program.environment["PYTHONPATH"].split(":")[0] == package
        assert "RESNET_FUSED_BACKEND" not in program.environment


def test_options_reach_the_programs(
    programs: Programs, summary: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    own = ["--part", "tests", "-k", "bn_relu", "-m", "not emulator"]
    shared = ["--part", "benchmarks", "--match", "training", "--limit", "2", "--out", str(tmp_path)]
    status, lines = summary(*own, *shared)
    assert status == 0
    assert len(lines) == 1 + len(gpu_check.BENCHMARKS)
    assert programs.started[0].command[-4:] == ["-k", "bn_relu", "-m", "not emulator"]
    assert programs.started[1].command[-6:] == shared[2:]


def test_providers_are_those_of_every_benchmark(
    programs: Programs, summary: Callable[..., tuple[int, list[str]]]
) -> None:
    summary("--part", "benchmarks", "--providers", "eager")
    assert len(programs.started) == len(gpu_check.BENCHMARKS)
    for program in programs.started:
        assert program.command[program.command.index("--providers") + 1] == "eager"


def test_a_failing_part_does_not_stop_the_others(
    programs: Programs, summary: Callable[..., tuple[int, list[str]]]
) -> None:
    programs.tests += FAILED
    programs.status = lambda command: 86 if "memcheck" in command else int("pytest" in command)
    status, lines = summary()
    assert status == 1
    assert len(lines) == 5 + len(gpu_check.BENCHMARKS)
    assert "FAILED" in lines[0]
    assert "1 failed" in lines[0]
    assert "the sanitizer found errors" in lines[1]
    assert lines[-1].split()[1] == "passed"


def test_a_part_that_cannot_start_has_failed(
    programs: Programs, summary: Callable[..., tuple[int, list[str]]]
) -> None:
    def missing(command: list[str]) -> int:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    programs.status = missing
    status, lines = summary()
    assert status == 1
    assert [line.split()[:2] for line in lines] == [[p, "FAILED"] for p in gpu_check.PARTS]


@pytest.mark.parametrize("part", ["tests", "sanitizers"])
def test_tests_that_were_all_skipped_are_no_success(
    part: str, programs: Programs, summary: Callable[..., tuple[int, list[str]]]
) -> None:
    programs.tests = PASSED_ON_CPU + SKIPPED_ON_GPU
    status, lines = summary("--part", part)
    assert status == 1
    assert all("no test ran on the GPU" in line for line in lines)


def test_a_missing_sanitizer_is_a_visible_skip(
    programs: Programs,
    summary: Callable[..., tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_check, "_sanitizer", lambda: None)
    status, (line,) = summary("--part", "sanitizers")
    assert status == 0
    assert "skipped" in line
    assert "no compute-sanitizer in PATH" in line


def test_sanitizer_is_found_in_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check._sanitizer() == str(program)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine on which nothing is amiss, as far as these questions go."""
        monkeypatch.setattr(gpu_check, "PARTS", {})  # what is not refused ends at once
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(_extension, "load", lambda: True)
        monkeypatch.setattr(_extension, "built_with_cuda", lambda: True)
        monkeypatch.setattr(_extension, "cuda_archs", lambda: ("8.0", "9.0a"))

    def refusal(self, capsys: pytest.CaptureFixture[str]) -> str:
        assert gpu_check.main([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def test_nothing_is_refused(self) -> None:
        gpu_check._refuse_what_cannot_be_checked()

    def test_torch_without_cuda(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert f"torch {torch.__version__} has no CUDA" in self.refusal(capsys)

    def test_no_device(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "finds no CUDA device on this machine" in self.refusal(capsys)

    def test_no_extension(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_extension, "load", lambda: False)
        monkeypatch.setattr(_extension, "error", lambda: "this installation was built without it")
        line = self.refusal(capsys)
        assert line == (
            "gpu-check: the compiled extension is missing: this installation was built without it."
        )

    def test_extension_for_cpus(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(_extension, "built_with_cuda", lambda: False)
        assert "the extension was built without CUDA" in self.refusal(capsys)

    def test_no_code_for_this_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(gpu_check, "_facts", lambda package: [])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        line = self.refusal(capsys)
        assert "no code for compute capability 7.5 (it was built for 8.0, 9.0a" in line


@pytest.mark.skipif(
    torch.cuda.is_available() and native.unsupported_on_cuda("cuda", torch.float32) is None,
    reason="there is a GPU that the kernels run on",
)
def test_without_a_gpu_it_ends_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu_check.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: ")
    assert line.endswith(".")
    for fact in ("driver", "torch", "resnet_fused", "extension"):
        assert f"\n{fact}" in f"\n{done.stdout}"
