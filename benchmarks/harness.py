"""One discipline for every benchmark: check first, then time, then write one CSV row per provider.

Timing itself is `resnet_fused.commands.timing.interleave`; NOTES.md explains the columns.
"""

import argparse
import csv
import datetime
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from resnet_fused.commands import environment, verify
from resnet_fused.commands.console import CommandError, atomic_path, table
from resnet_fused.commands.numerics import Check
from resnet_fused.commands.timing import Timing, interleave

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20


class Row(NamedTuple):
    """One provider in one benchmark: the columns of every CSV file, in this order."""

    timestamp: str  # equal in all rows of one comparison
    device: str  # "cpu" or "cuda"
    device_name: str
    driver: str
    threads: int
    python: str
    torch: str
    triton: str
    library: str
    commit: str
    benchmark: str
    subject: str  # model or operator
    mode: str  # "eval", "train", "forward", "backward"
    dtype: str
    shape: str
    batch: int
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio_to_eager: float
    images_per_s: float | None
    gb_per_s: float | None
    copy_gb_per_s: float | None  # the measured ceiling for gb_per_s
    tflop_per_s: float | None
    peak_memory_mib: float | None
    runs: int
    command: str


class Work(NamedTuple):
    """What is timed: columns that all providers of one comparison share."""

    benchmark: str
    subject: str
    mode: str
    dtype: str
    shape: str
    batch: int
    moved_bytes: int | None = None  # the least that must move through memory, for GB/s
    flop: int | None = None
    counts_images: bool = False


class Wrong(SystemExit):
    """A provider computes something else than eager does: nothing is timed."""


class Harness:
    """Collects the rows of one benchmark run and writes them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        try:
            self.device = verify.checked_device(arguments.device)
        except CommandError as error:
            print(error, file=sys.stderr)
            raise SystemExit(error.status) from error
        self.seconds: float = arguments.seconds
        self.out = Path(arguments.out) / slug(self.device)
        self.rows: list[Row] = []
        self._flush = _flusher(self.device)
        self._copy_gb_per_s: float | None = None

    def compare(
        self,
        work: Work,
        providers: Mapping[str, Callable[[], object]],
        checks: list[Check],
        flush: bool = False,
        memory: bool = False,
    ) -> None:
        """Refuse wrong providers, time the others in turns and print them as they come.

        The first provider is eager. checks: what was compared with float64 beforehand. flush: empty
        the caches before every sample. memory: also measure the peak of each provider's memory.
        """
        wrong = [c for c in checks if not c.passed]
        if wrong:
            raise Wrong(f"{work.subject} {work.dtype} is wrong, nothing is timed: {wrong[0]}")
        timings = interleave(
            providers, self.seconds, self.device, flush=self._flush if flush else None
        )
        ceiling = self.copy_gb_per_s() if work.moved_bytes else None
        timestamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = [
            self._row(
                timestamp,
                work, name, timing, ceiling,
                peak_memory_mib(providers[name], self.device) if memory else None,
            )
            for name, timing in timings.items()
        ]  # fmt: skip
        self.rows += rows
        print(f"\n{work.subject} {work.mode} {work.dtype} {work.shape}, batch {work.batch}")
        print(summary(rows), flush=True)

    def copy_gb_per_s(self) -> float:
        """Bytes read and written per second by a plain copy within the device, measured once.

        128 MiB, or on a GPU 1 GiB, with the same clock and the same empty caches as operators.
        """
        if self._copy_gb_per_s is None:
            on_gpu = self.device.type == "cuda"
            source = torch.randn((1024 if on_gpu else 128) * MIB // 4, device=self.device)
            target = torch.empty_like(source)
            copy = {"copy": lambda: target.copy_(source)}
            flush = self._flush if on_gpu else None
            timing = interleave(copy, min(1.0, self.seconds), self.device, flush)["copy"]
            self._copy_gb_per_s = 2 * source.nbytes / timing.median_ms / 1e6
        return self._copy_gb_per_s

    def write(self) -> Path:
        """Write the rows to results/<device>/<benchmark>.csv, after those of earlier runs."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.rows[0].benchmark}.csv"
        earlier = read_rows(path) if path.exists() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, Row._fields)
            writer.writeheader()
            writer.writerows([*earlier, *(row._asdict() for row in self.rows)])
        print(f"\nwrote {len(self.rows)} rows to {path}")
        return path

    def _row(
        self,
        timestamp: str,
        work: Work,
        provider: str,
        timing: Timing,
        ceiling: float | None,
        peak: float | None,
    ) -> Row:
        seconds = timing.median_ms / 1e3
        gpu = environment.gpus() if self.device.type == "cuda" else []
        return Row(
            timestamp=timestamp,
            device=self.device.type,
            device_name=device_name(self.device),
            driver=gpu[0].driver if gpu else "",
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=environment.package_version("triton") or "",
            library=environment.library_version(),
            commit=environment.commit(),
            benchmark=work.benchmark,
            subject=work.subject,
            mode=work.mode,
            dtype=work.dtype,
            shape=work.shape,
            batch=work.batch,
            provider=provider,
            median_ms=_rounded(timing.median_ms),
            p20_ms=_rounded(timing.p20_ms),
            p80_ms=_rounded(timing.p80_ms),
            ratio_to_eager=_rounded(timing.speedup),
            images_per_s=_rounded(work.batch / seconds) if work.counts_images else None,
            gb_per_s=_rounded(work.moved_bytes / seconds / 1e9) if work.moved_bytes else None,
            copy_gb_per_s=_rounded(ceiling) if ceiling else None,
            tflop_per_s=_rounded(work.flop / seconds / 1e12) if work.flop else None,
            peak_memory_mib=_rounded(peak) if peak is not None else None,
            runs=timing.runs,
            command=shlex.join(["python", *sys.argv]),
        )


def parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    result.add_argument("--threads", type=int, default=environment.usable_cores())
    result.add_argument(
        "--seconds", type=float, default=seconds, help="per comparison, default %(default)s"
    )
    result.add_argument("--out", default=str(RESULTS), help="folder for CSV files")
    return result


def comma_list(text: str) -> list[str]:
    """An argparse type: "a,b" -> ["a", "b"]."""
    return [item for item in text.split(",") if item]


def choices(*allowed: str) -> Callable[[str], list[str]]:
    """An argparse type: a comma_list of at least one of `allowed`, and of nothing else."""

    def parse(text: str) -> list[str]:
        chosen = comma_list(text)
        unknown = [name for name in chosen if name not in allowed]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {text!r}")
        return chosen

    return parse


def skipped(provider: str, reason: object) -> None:
    """Say on stderr that a provider does not take part, and why."""
    print(f"skipped {provider}: {str(reason).strip().splitlines()[0]}", file=sys.stderr)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summary(rows: list[Row]) -> str:
    """A table of one comparison, without the columns that it does not fill."""
    columns: dict[str, list[float | None]] = {
        "median ms": [row.median_ms for row in rows],
        "p20": [row.p20_ms for row in rows],
        "p80": [row.p80_ms for row in rows],
        f"x {rows[0].provider}": [row.ratio_to_eager for row in rows],
        "images/s": [row.images_per_s for row in rows],
        "GB/s": [row.gb_per_s for row in rows],
        "of copy": [row.gb_per_s and row.gb_per_s / (row.copy_gb_per_s or 1) for row in rows],
        "TFLOP/s": [row.tflop_per_s for row in rows],
        "peak MiB": [row.peak_memory_mib for row in rows],
    }
    filled = {name: values for name, values in columns.items() if None not in values}
    cells = [[f"{value:.4g}" for value in values] for values in filled.values()]
    names = [row.provider for row in rows]
    return table(["provider", *filled], list(zip(names, *cells, strict=True)))


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """How far one call raises the memory in use above its level before; None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the current level
    except OSError:
        return None
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return environment.cpu_name()


def slug(device: torch.device) -> str:
    """The name of the results folder of this device, e.g. "cpu-amd-epyc" or "nvidia-h100"."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"cpu-{name}" if device.type == "cpu" else name


def _flusher(device: torch.device) -> Callable[[], object]:
    """Fills the caches with other memory (GPUs have up to 126 MB of second level).

    On a GPU by reading: lines that were written would go to memory while the next call is timed.
    """
    on_gpu = device.type == "cuda"
    size = 512 * MIB if on_gpu else max(64 * MIB, 2 * _last_level_cache())
    holder: list[torch.Tensor] = []

    def flush() -> None:
        if not holder:
            holder.append(torch.zeros(size // 4, device=device))
        if on_gpu:
            holder[0].amax()
        else:
            holder[0].zero_()

    return flush


def _last_level_cache() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


def _status_kib(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) if match else 0


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
