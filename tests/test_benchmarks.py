"""Every benchmark runs to its CSV file and plot, in seconds and on tiny inputs.

Nothing here looks at how long anything took.
"""

import csv
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from resnet_fused import _extension

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import plot  # noqa: E402


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs a script of benchmarks/ as `python benchmarks/...` does, in this process."""

    def run_script(script: str, *arguments: str) -> Done:
        shared = () if script == "plot.py" else ("--threads", "1", "--out", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}", *shared, *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        status = stop.value.code
        return Done(status if isinstance(status, int) else 1, *capfd.readouterr())

    threads = torch.get_num_threads()
    yield run_script
    torch.set_num_threads(threads)


def rows_of(out: Path, benchmark: str) -> list[dict[str, str]]:
    (path,) = out.glob(f"*/{benchmark}.csv")
    rows = harness.read_rows(path)
    assert all(tuple(row) == harness.Row._fields for row in rows)
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["runs"]) >= 5
        assert row["device_name"]
        assert f"{benchmark}" in row["command"] or benchmark in row["benchmark"]
    return rows


OPERATOR = ("--model", "resnet20", "--size", "16", "--batch", "2", "--seconds", "0", "--limit", "1")


@pytest.mark.parametrize("operator", ["add_relu", "bn_relu", "conv_bn_relu"])
def test_operator_benchmark(operator: str, run: Callable[..., Done], tmp_path: Path) -> None:
    done = run(f"bench_{operator}.py", *OPERATOR, "--providers", "fused")
    assert done.status == 0, done.out + done.err
    rows = rows_of(tmp_path, operator)
    assert {row["provider"] for row in rows} == {"eager", "fused"}
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(float(row["copy_gb_per_s"]) > 0 and float(row["gb_per_s"]) > 0 for row in rows)
    assert all(bool(row["tflop_per_s"]) == (operator == "conv_bn_relu") for row in rows)


def test_resnet_benchmark(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run(
        "bench_resnet.py", "--model", "resnet18", "--size", "32", "--batch", "2",
        "--seconds", "0", "--providers", "eager_nchw,onnxruntime,openvino,fused",
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    rows = rows_of(tmp_path, "resnet")
    timed = {(row["mode"], row["dtype"], row["batch"], row["provider"]) for row in rows}
    for dtype in ("float32", "bfloat16"):
        assert ("eval", dtype, "2", "fused") in timed
        assert ("train", dtype, "2", "fused") in timed
        assert ("eval", dtype, "2", "eager_nchw") in timed
    for engine in ("onnxruntime", "openvino"):
        assert ("eval", "float32", "2", engine) in timed or f"skipped {engine}: " in done.err
    assert "skipped onnxruntime: " in done.err  # in bfloat16, which it does not have
    assert all(float(row["images_per_s"]) > 0 for row in rows)


def test_overhead_benchmark(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("bench_overhead.py", "--seconds", "0")
    if not _extension.load():
        assert done.status == 1
        assert "nothing to compare with" in done.err
        return
    assert done.status == 0, done.out + done.err
    rows = rows_of(tmp_path, "overhead")
    assert {row["subject"] for row in rows} == {"add_relu", "bn_relu", "conv_bn_relu"}
    assert "us above the bare operator" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--providers", "eager,tensorrt"), "must be of eager"),
        (("--dtype", "float8"), "must be of float32"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
    ],
)
def test_resnet_benchmark_refuses(
    arguments: tuple[str, ...], message: str, run: Callable[..., Done]
) -> None:
    done = run("bench_resnet.py", *arguments)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    arguments = harness.parser(None, seconds=0).parse_args(["--out", str(tmp_path)])
    bench = harness.Harness(arguments)
    check = harness.Check("add_relu", "4", "float32", "out", "max", 2.0, 0.0, 1.0)
    work = harness.Work("add_relu", "add_relu", "forward", "float32", "4", 1)
    timed: list[str] = []
    with pytest.raises(harness.Wrong, match="nothing is timed"):
        bench.compare(work, {"eager": lambda: timed.append("eager")}, [check])
    assert not timed
    assert not bench.rows


def test_plot_reads_only_the_newest_run_of_each_comparison(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    keys = {"subject": "resnet50", "mode": "eval", "dtype": "float32", "batch": "8", "shape": "s"}
    rows = [
        {**dict.fromkeys(harness.Row._fields, ""), **keys, **row}
        for row in (
            {"timestamp": "2026-01-01", "provider": "eager", "ratio_to_eager": "1"},
            {"timestamp": "2026-01-01", "provider": "compile", "ratio_to_eager": "9"},
            {"timestamp": "2026-01-02", "provider": "eager", "ratio_to_eager": "1"},
            {"timestamp": "2026-01-02", "provider": "fused", "ratio_to_eager": "2"},
        )
    ]
    (group,) = plot.latest(rows).values()
    assert [row["provider"] for row in group] == ["eager", "fused"]
    path = tmp_path / "resnet.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.Row._fields)
        writer.writeheader()
        writer.writerows({**row, "median_ms": "1"} for row in rows)
    done = run("plot.py", str(tmp_path))
    assert done.status == 0, done.err
    assert (tmp_path / "resnet.png").stat().st_size > 10_000


def test_plot_without_results(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("plot.py", str(tmp_path))
    assert done.status == 1
    assert "nothing drawn" in done.err


def test_rows_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    arguments = harness.parser(None, seconds=0).parse_args(["--out", str(tmp_path)])
    for _ in range(2):
        bench = harness.Harness(arguments)
        work = harness.Work("add_relu", "add_relu", "forward", "float32", "4", 1)
        bench.compare(work, {"eager": lambda: None, "fused": lambda: None}, [])
        path = bench.write()
    assert [row["provider"] for row in harness.read_rows(path)] == ["eager", "fused"] * 2
