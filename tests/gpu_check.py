"""Everything that needs a GPU, in one command: the tests, the sanitizers and the benchmarks.

    make gpu-check                          # all three
    make gpu-check PART=tests ARGS="-k bn_relu"
    make gpu-check PART=benchmarks ARGS="--batch 64 --match training --out /tmp/results"

It uses the torch of the interpreter that runs it and the resnet_fused that this interpreter
imports, or else the one beside it, built in place; it installs and downloads nothing. Each part's
outcome is one line of the summary at the end, and a part that fails stops no other one. Exits with
1 if one failed, and with 2 where nothing can be checked: no GPU, or no kernels for it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RESULTS = ROOT / "benchmarks/results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Here only this library's kernels run, on memory that was copied from the host.
SANITIZED = "test_cuda_kernels.py"
SANITIZER_FOUND = 86  # no exit status of pytest
ON_GPU = "of these on the GPU"
# Convolutions are compared as they run in inference, which is where cuDNN fuses what we fuse.
BENCHMARKS = {
    "bench_add_relu.py": ("eager,compile,cudnn,cuda,triton", "forward,backward"),
    "bench_bn_relu.py": ("eager,compile,cudnn,cuda,triton", "forward,backward"),
    "bench_bn_relu_max_pool.py": ("eager,compile,cudnn,cuda,triton", "forward,backward"),
    "bench_conv_bn_relu.py": ("eager,compile_max_autotune,cudnn,cuda,triton", "forward"),
    "bench_chains.py": (
        "eager,compile,layers_cudnn,layers_triton,layers_cuda,cuda",
        "forward",
    ),
}


class RefusedError(Exception):
    """Nothing can be checked here; the message is one sentence that says why."""


class Outcome(NamedTuple):
    """What became of one step: passed, failed (False) or skipped (None), and why."""

    step: str
    passed: bool | None
    text: str

    def __str__(self) -> str:
        word = {True: "passed", False: "FAILED", None: "skipped"}[self.passed]
        return f"{self.step:<24} {word:<8} {self.text}".rstrip()


class Setting(NamedTuple):
    """What the parts need to know; environment: of the programs that they start."""

    arguments: argparse.Namespace
    environment: dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        package = _package_folder()
        for line in _facts(package):
            print(line)
        _refuse_what_cannot_be_checked()
    except RefusedError as reason:
        print(f"gpu-check: {reason}.", file=sys.stderr)
        return 2
    setting = Setting(options, _environment(package))
    outcomes: list[Outcome] = []
    for name in options.part or PARTS:
        try:
            outcomes += PARTS[name](setting)
        except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
            outcomes.append(Outcome(name, False, f"{type(error).__name__}: {error}"))
    print("\nSummary")
    for outcome in outcomes:
        print(outcome)
    return 1 if any(outcome.passed is False for outcome in outcomes) else 0


# --- where it runs -------------------------------------------------------------------------------


def _package_folder() -> Path:
    """The folder to import resnet_fused from: an installation, else this source tree."""
    try:
        import resnet_fused
    except ModuleNotFoundError as error:
        if error.name != "resnet_fused":
            raise RefusedError(f"{sys.executable} has no {error.name}") from error
        sys.path.append(str(ROOT))
        return _package_folder()
    return Path(resnet_fused.__file__).resolve().parent.parent


def _facts(package: Path) -> Iterable[str]:
    import torch

    from resnet_fused import _extension
    from resnet_fused.commands import environment

    driver = {gpu.driver for gpu in environment.gpus()}
    yield f"driver        {', '.join(sorted(driver)) or 'none answers'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"device {index}      {properties.name}, compute capability"
            f" {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    yield f"torch         {torch.__version__}, CUDA {torch.version.cuda or '-'}"
    yield f"resnet_fused  {environment.library_version()} in {package}"
    archs = ", ".join(_extension.cuda_archs()) or "no architecture"
    state = f"loaded, CUDA code for {archs}" if _extension.load() else _extension.error()
    yield f"extension     {state}"


def _refuse_what_cannot_be_checked() -> None:
    import torch

    from resnet_fused import _extension, native

    if torch.version.cuda is None:
        raise RefusedError(f"no CUDA device can be used: torch {torch.__version__} has no CUDA")
    if not torch.cuda.is_available():
        raise RefusedError(f"torch {torch.__version__} finds no CUDA device on this machine")
    if not _extension.load():
        raise RefusedError(f"the compiled extension is missing: {_extension.error()}")
    reason = native.unsupported_on_cuda("cuda", torch.float32)
    if reason is not None:
        raise RefusedError(f"the CUDA kernels do not run here: {reason}")


def _environment(package: Path) -> dict[str, str]:
    """Every program that is started imports the same package as this one."""
    paths = [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **{name: value for name, value in os.environ.items() if name != "RESNET_FUSED_BACKEND"},
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
    }


# --- the parts -----------------------------------------------------------------------------------


def run_tests(setting: Setting) -> list[Outcome]:
    """The whole suite, or what -k and -m select."""
    chosen = {"-k": setting.arguments.k, "-m": setting.arguments.m}
    selection = [word for pair in chosen.items() if pair[1] is not None for word in pair]
    return [_pytest("tests", [], ["--durations=15", *selection], setting.environment)]


def run_sanitizers(setting: Setting) -> list[Outcome]:
    program = _sanitizer()
    if program is None:
        reason = "no compute-sanitizer in PATH, in CUDA_HOME or in /usr/local/cuda"
        return [Outcome("sanitizers", None, reason)]
    # PyTorch's allocator hands out parts of large allocations, and hands them out again: neither
    # an access behind the end nor memory that was never written would be seen.
    environment = {**setting.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outcomes = []
    for tool in SANITIZERS:
        wrapper = [
            *(program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)),
            *("--target-processes", "application-only"),
            *("--report-api-errors", "no", "--print-limit", "20"),
        ]
        flags = ["-q", "-k", "not emulated", SANITIZED]
        outcomes.append(_pytest(f"sanitizer {tool}", wrapper, flags, environment))
    return outcomes


def run_benchmarks(setting: Setting) -> list[Outcome]:
    options = setting.arguments
    outcomes = []
    for script, (providers, modes) in BENCHMARKS.items():
        # Named as in README.md: rows of results hold this command.
        command = [
            *(sys.executable, f"benchmarks/{script}", "--device", "cuda"),
            *("--batch", str(options.batch), "--dtype", options.dtype),
            *("--providers", options.providers or providers, "--mode", modes),
            *("--seconds", str(options.seconds)),
            *(("--match", options.match) if options.match else ()),
            *(("--limit", str(options.limit)) if options.limit else ()),
            *(("--out", str(options.out.resolve())) if options.out else ()),
        ]
        begin = time.monotonic()
        status = _run(command, ROOT, setting.environment)
        text = f"{time.monotonic() - begin:.0f} s, results in {options.out or RESULTS}"
        text = text if status == 0 else f"exit status {status}, {text}"
        outcomes.append(Outcome(script.removesuffix(".py"), status == 0, text))
    return outcomes


PARTS: dict[str, Callable[[Setting], list[Outcome]]] = {
    "tests": run_tests,
    "sanitizers": run_sanitizers,
    "benchmarks": run_benchmarks,
}


def _pytest(
    step: str, wrapper: list[str], flags: list[str], environment: dict[str, str]
) -> Outcome:
    """Passed only where some test has run on the GPU: those that cannot are skipped."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # Started in this folder: the source tree must not come before an installation.
        status = _run([*wrapper, *pytest, *flags], TESTS, environment)
        counts = _counts(report) if report.is_file() else {}
    parts = [f"{number} {what}" for what, number in counts.items() if number] or ["no report"]
    parts.append(f"{time.monotonic() - begin:.0f} s")
    if wrapper and status == SANITIZER_FOUND:
        parts.append("the sanitizer found errors")
    elif status != 0:
        parts.append(f"exit status {status}")
    elif not counts.get(ON_GPU):
        parts.append("no test ran on the GPU")
    return Outcome(step, status == 0 and bool(counts.get(ON_GPU)), ", ".join(parts))


def _counts(report: Path) -> dict[str, int]:
    """Results of the tests in pytest's report; ON_GPU: passed, on the backend "cuda"."""
    counts = {"passed": 0, ON_GPU: 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 (pytest wrote it)
        tags = {child.tag for child in case}
        if tags & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in tags:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
            counts[ON_GPU] += "cuda" in case.get("name", "").partition("[")[2]
    return counts


def _sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path)


def _run(command: list[str], cwd: Path, environment: dict[str, str]) -> int:
    print(f"\n$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, cwd=cwd, env=environment, check=False).returncode


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--part", action="append", choices=PARTS, help="only this one; can be repeated"
    )
    tests = result.add_argument_group("tests")
    tests.add_argument("-k", metavar="EXPRESSION", help="only these tests, as for pytest")
    tests.add_argument("-m", metavar="MARKERS", help='as for pytest, say "not emulator"')
    benchmarks = result.add_argument_group("benchmarks")
    benchmarks.add_argument("--batch", type=int, default=256)
    benchmarks.add_argument("--dtype", default="bfloat16", help="default %(default)s")
    benchmarks.add_argument("--providers", help="instead of those that each benchmark compares")
    benchmarks.add_argument(
        "--seconds", type=float, default=0.3, help="per comparison, default %(default)s"
    )
    benchmarks.add_argument("--match", default="", help="only layers with this in their name")
    benchmarks.add_argument("--limit", type=int, help="stop after this many layers")
    benchmarks.add_argument(
        "--out", type=Path, help="folder for CSV files and plots; default benchmarks/results"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
