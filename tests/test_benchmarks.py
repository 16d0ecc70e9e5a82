"""Every benchmark runs to its CSV file and plot, in seconds and on tiny inputs.

Nothing here looks at how long anything took.
"""

import argparse
import csv
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from numerics import missing
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import _extension, cuda_chains
from resnet_fused.commands import baselines, networks, timing
from resnet_fused.commands.cases import Case, ConvShape, Shapes, cases, layer_shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_bn_relu  # noqa: E402
import bench_chains  # noqa: E402
import harness  # noqa: E402
import operators  # noqa: E402
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


@pytest.mark.parametrize("operator", ["add_relu", "bn_relu", "bn_relu_max_pool", "conv_bn_relu"])
def test_operator_benchmark(operator: str, run: Callable[..., Done], tmp_path: Path) -> None:
    model = "resnet18" if operator == "bn_relu_max_pool" else "resnet20"
    done = run(f"bench_{operator}.py", *OPERATOR, "--model", model, "--providers", "fused")
    assert done.status == 0, done.out + done.err
    rows = rows_of(tmp_path, operator)
    assert {row["provider"] for row in rows} == {"eager", "fused"}
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(float(row["copy_gb_per_s"]) > 0 and float(row["gb_per_s"]) > 0 for row in rows)
    assert all(bool(row["tflop_per_s"]) == (operator == "conv_bn_relu") for row in rows)


def test_chain_benchmark(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run(
        "bench_chains.py", "--model", "resnet50", "--size", "32", "--batch", "1", "--seconds", "0",
        "--match", "-> 64 -> ", "--dtype", "float32",
        "--providers", "fused,layers_reference,layers_cudnn,layers_cuda",
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    rows = rows_of(tmp_path, "chains")
    assert {row["subject"] for row in rows} == set(cuda_chains.OPERATORS)
    assert {row["provider"] for row in rows} == {"eager", "fused", "layers_reference"}
    assert {row["mode"] for row in rows} == {"forward"}
    assert all(float(row["gb_per_s"]) > 0 and float(row["tflop_per_s"]) > 0 for row in rows)
    assert "skipped layers_cudnn: there is no cuDNN for these tensors" in done.err
    assert "skipped layers_cuda: cuda does not run conv_bn_relu on cpu" in done.err


def chains_of_resnet50() -> list[Case]:
    arguments = argparse.Namespace(model="resnet50", size=32, batch=1)
    return list(bench_chains.find(arguments, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("operator", cuda_chains.OPERATORS)
def test_layers_of_cudnn_are_what_a_chain_computes(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_fake_cudnn(monkeypatch)
    monkeypatch.setattr(bench_chains, "need_cudnn", lambda x: None)
    for case in (case for case in chains_of_resnet50() if case.operator == operator):
        provider = bench_chains.by_cudnn(case, torch.float32)
        expected = case.before_relu(*case.tensors.values()).relu()
        torch.testing.assert_close(provider.function(*case.tensors.values()), expected)


def test_bytes_and_products_of_chains() -> None:
    """Of the first Bottleneck with an identity shortcut: 8 x 8 pixels, 64 channels inside."""
    # Of 64 x 64 weights conv1 and conv3 have 4, conv2 has 9.
    products = {"bottleneck_tail": 13, "bottleneck_roll": 17, "bottleneck_block": 17}
    moved = {}
    for case in chains_of_resnet50():
        if case.operator in products and "-> 64 -> 1x256x8x8" in case.label:
            moved[case.operator] = bench_chains.moved_bytes(case, "forward")
            factor = products[case.operator]
            assert bench_chains.flop(case, "forward") == 2 * 64 * 64 * 64 * factor
    weights = {name: 64 * 64 * factor for name, factor in products.items()}
    vectors = {"bottleneck_tail": 2 * 320, "bottleneck_roll": 2 * 384, "bottleneck_block": 2 * 384}
    pixels = {"bottleneck_tail": 9, "bottleneck_roll": 10, "bottleneck_block": 8}
    for name, count in pixels.items():
        assert moved[name] == 4 * (64 * 64 * count + weights[name] + vectors[name]), name


def test_backends_and_cudnn_as_providers(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run(
        "bench_bn_relu.py", *OPERATOR, "--dtype", "float32", "--mode", "forward",
        "--providers", "eager,cudnn,cuda,reference",
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    assert [row["provider"] for row in rows_of(tmp_path, "bn_relu")] == ["eager", "reference"]
    assert "skipped cudnn: there is no cuDNN for these tensors" in done.err
    assert "skipped cuda: it does not run bn_relu on cpu" in done.err


def conv_cases() -> list[Case]:
    """A strided and a grouped convolution, each with and without residual."""
    geometry = (2, 2), (1, 1), (1, 1)
    strided = ConvShape((2, 8, 9, 7), (12, 8, 3, 3), *geometry, 1)
    grouped = ConvShape((2, 8, 9, 7), (12, 2, 3, 3), *geometry, 4)
    shapes = Shapes([strided, grouped], [], [], [])
    return list(cases(shapes, torch.float32, torch.device("cpu"), ("conv_bn_relu",)))


def add_fake_cudnn(monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> None:
    """The two convolutions of cuDNN, computed by PyTorch, off by `error`."""

    def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry).relu() + error

    def convolution_add_relu(
        x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        return (F.conv2d(x, weight, bias, *geometry) + alpha * z).relu() + error

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", convolution_add_relu)


@pytest.mark.parametrize("number", range(4))
def test_cudnn_convolutions_get_folded_weights(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_fake_cudnn(monkeypatch)
    case = conv_cases()[number]
    provider = operators._cudnn_convolution(case, torch.float32)
    expected = case.before_relu(*case.tensors.values()).relu()
    torch.testing.assert_close(provider.function(*case.tensors.values()), expected)
    assert provider.modes == ("forward",)


def test_wrong_cudnn_convolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake_cudnn(monkeypatch, error=1e-2)
    with pytest.raises(baselines.UnavailableError, match=r"its out is off by 1\.0e-02 where"):
        operators._cudnn_convolution(conv_cases()[0], torch.float32)


def test_cudnn_convolution_has_no_backward(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_fake_cudnn(monkeypatch)
    case = conv_cases()[0]
    providers = {
        "eager": operators.Provider(operators._eager(case)),
        "cudnn": operators._cudnn_convolution(case, torch.float32),
    }
    prepared = {
        mode: list(operators._prepared(providers, case, mode, ["cudnn"]))
        for mode in operators.MODES
    }
    assert prepared == {"forward": ["eager", "cudnn"], "backward": ["eager"]}
    assert "skipped cudnn: it has no backward pass of conv_bn_relu" in capfd.readouterr().err


def test_compile_with_max_autotune(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []

    def compiled(function: Callable[..., Tensor], **settings: Any) -> Callable[..., Tensor]:
        options.append(settings["options"])
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(baselines, "need_compiler", lambda device: None)
    wanted = ["compile_max_autotune", "compile"]
    assert list(operators._prepared({}, conv_cases()[0], "forward", wanted)) == wanted[::-1]
    assert options == [{}, {"max_autotune": True}]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--providers", "cudn"), "must be of eager, compile, compile_max_autotune, cudnn, fused"),
        (("--dtype", "half"), "must be of float32"),
        (("--mode", "train"), "must be of forward, backward"),
    ],
)
def test_operator_benchmark_refuses(
    option: tuple[str, str], message: str, run: Callable[..., Done]
) -> None:
    done = run("bench_bn_relu.py", *option)
    assert done.status == 2
    assert message in done.err


def test_operator_benchmark_without_a_layer(run: Callable[..., Done]) -> None:
    done = run("bench_add_relu.py", *OPERATOR, "--match", "no such layer")
    assert done.status == 1
    assert not done.out


def test_only_cases_of_the_network_are_timed() -> None:
    with torch.device("meta"):
        shapes = layer_shapes(networks.build_pair("resnet50").eager, torch.empty(2, 3, 64, 64))
    assert [shape[1] for shape in shapes.sums] == [256, 512, 1024, 2048]
    assert set(shapes.sums) <= set(shapes.activations)
    small = Shapes([], [(2, 3, 4, 4), (2, 5, 4, 4)], [(2, 5, 4, 4)], [])
    found = cases(small, torch.float32, torch.device("cpu"), ("bn_relu", "add_relu"))
    timed = [case for case in found if operators._occurs(case, small)]
    with_residual = [case.label for case in timed if "residual" in case.tensors]
    assert len(timed) - len(with_residual) == 4  # plain, in training and with frozen statistics
    assert len(with_residual) == 5
    assert all(label.startswith("2x5x4x4") for label in with_residual)


SMALL = Shapes([], [(2, 64, 24, 20)], [(2, 64, 24, 20)], [])


def bn_cases(device: str) -> list[Case]:
    return list(cases(SMALL, torch.bfloat16, torch.device(device), ("bn_relu",)))


@pytest.mark.emulator
@pytest.mark.skipif(
    missing("bn_relu", "emulated") is not None, reason=str(missing("bn_relu", "emulated"))
)
@pytest.mark.parametrize("number", range(6))
def test_bytes_of_the_cuda_kernels(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bench_bn_relu.py says must move is what they move, values per channel left out."""
    case = bn_cases("cpu")[number]
    kernels = emulation.library()
    moved: dict[str, int] = {}
    with rf.backend("emulated"):
        tensors = operators._inputs(case, operators.in_training(case))
        emulation.launches(kernels)
        case.fused(*tensors)
        moved["forward"] = bytes_of(emulation.launches(kernels))
        backward = operators._backward(case.fused, case)
        emulation.launches(kernels)
        backward()
        moved["backward"] = bytes_of(emulation.launches(kernels))
    monkeypatch.setattr(bench_bn_relu, "_on_gpu", lambda case: True)
    assert moved == {mode: bench_bn_relu.moved_bytes(case, mode) for mode in moved}, case.label


def bytes_of(launches: list[dict[str, Any]]) -> int:
    """Activations in accesses of 16 bytes, masks in those of one; nothing else is as wide."""
    accesses = [launch["accesses"] for launch in launches]
    return sum(16 * by_width.get("16", 0) + by_width.get("1", 0) for by_width in accesses)


def test_bytes_of_the_cpu_kernels() -> None:
    """In sizes of x: the sign of a ReLU behind a residual is read from the output."""
    passes = {
        case.label.partition(", ")[2]: tuple(
            bench_bn_relu.moved_bytes(case, mode) / operators.activation_bytes(case)
            for mode in ("forward", "backward")
        )
        for case in bn_cases("cpu")
    }
    assert passes == {
        "training": (3, 5),
        "training, residual": (4, 8),
        "training, residual with batch norm": (5, 10),
        "eval": (2, 3),
        "eval, residual": (3, 5),
        "eval, residual with batch norm": (3, 6),
    }


def test_on_a_gpu_the_clock_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("_cuda_clock", "_cuda_kernel_clock"):
        monkeypatch.setattr(timing, name, lambda call, repeats, n=name: used.append(n) or 1e-3)
    timing.interleave({"a": lambda: None}, 0.0, "cuda")
    assert set(used) == {"_cuda_clock"}
    used.clear()
    flushes: list[int] = []
    timing.interleave({"a": lambda: None}, 0.0, "cuda", flush=lambda: flushes.append(1))
    assert set(used) == {"_cuda_kernel_clock"}
    assert len(flushes) == len(used) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_clocks_of_a_gpu() -> None:
    """Work of a known size on a real one: a copy takes as long by both, and not nothing."""
    source = torch.randn(2**26, device="cuda")
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    plain = timing.interleave(call, 0.1, "cuda")["copy"].median_ms
    alone = timing.interleave(call, 0.1, "cuda", flush=lambda: None)["copy"].median_ms
    assert 0.5 < alone / plain < 2
    assert 2 * source.nbytes / alone / 1e6 < 20_000, "GB/s that no GPU has"


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
