"""Facts about this machine and installation, from the standard library alone.

Shared by doctor (which must work without PyTorch) and by the benchmarks' CSV rows.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent


class Gpu(NamedTuple):
    name: str
    driver: str
    memory: str


def library_version() -> str:
    """Version of this source, which a stale installation cannot contradict."""
    from resnet_fused._version import __version__

    return __version__


def package_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model name of the CPU, as the system reports it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        return run_quietly("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_isa() -> list[str]:
    """The instruction sets, of those that matter for speed here, that the CPU has."""
    flags = set(re.findall(r"\S+", _cpu_flags()))
    wanted = {
        "avx2": "avx2",
        "fma": "fma",
        "avx512f": "avx512",
        "avx512_vnni": "avx512-vnni",
        "avx512_bf16": "avx512-bf16",
        "avx512_fp16": "avx512-fp16",
        "amx_tile": "amx",
        "asimd": "neon",
        "sve": "sve",
        "bf16": "bf16",
    }
    return [name for flag, name in wanted.items() if flag in flags]


def usable_cores() -> int:
    """Number of cores that this process may use (containers often allow fewer than exist)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """NVIDIA GPUs seen by the driver, whatever PyTorch thinks of them."""
    fields = "--query-gpu=name,driver_version,memory.total"
    text = run_quietly("nvidia-smi", fields, "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3]


def compiler() -> str | None:
    """First line of the version of the C++ compiler that torch.compile would use, or None."""
    for candidate in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if candidate and shutil.which(candidate):
            text = run_quietly(candidate, "--version")
            if text:
                return text.splitlines()[0]
    return None


def nvcc() -> str | None:
    """Release of the CUDA compiler in CUDA_HOME, in PATH or in /usr/local/cuda, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        text = run_quietly(candidate, "--version") if candidate else None
        release = re.search(r"release ([\d.]+)", text or "")
        if release:
            return release.group(1)
    return None


def commit() -> str:
    """Short commit of the source tree ("+" appended when it has changes), or ""."""
    head = run_quietly("git", "-C", str(PACKAGE), "rev-parse", "--short", "HEAD")
    if not head:
        return ""
    tracked = ("status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("+" if run_quietly("git", "-C", str(PACKAGE), *tracked) else "")


def run_quietly(*command: str, timeout: float = 20.0) -> str | None:
    """Standard output of a command, or None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_flags() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            return line.partition(":")[2]
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
