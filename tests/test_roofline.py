"""benchmarks/roofline.py: bytes, FLOPs and floors by hand, CSV files, plots and bad arguments."""

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from resnet_fused.commands import networks
from resnet_fused.commands.cases import ConvShape, cases, layer_shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import roofline  # noqa: E402
from roofline import GPUS, Layer  # noqa: E402


def layer(
    x: tuple[int, ...], weight: tuple[int, ...], stride: int = 1, residual: bool = False
) -> Layer:
    padding = weight[2] // 2
    conv = ConvShape(x, weight, (stride, stride), (padding, padding), (1, 1), 1)
    return Layer(conv, residual)


GROUPED = Layer(ConvShape((2, 8, 6, 6), (12, 2, 3, 3), (2, 2), (1, 1), (1, 1), 4), True)
EXPANDING = layer((256, 64, 56, 56), (256, 64, 1, 1), residual=True)
DEEP = layer((256, 512, 7, 7), (512, 512, 3, 3))
SHORTCUT = layer((256, 256, 56, 56), (512, 256, 1, 1), stride=2)
PIXELS = 256 * 56 * 56


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run_script(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["benchmarks/roofline.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "benchmarks/roofline.py"), run_name="__main__")
        return Done(int(stop.value.code or 0), *capfd.readouterr())

    return run_script


def test_peaks_are_those_of_the_data_sheets() -> None:
    """In TFLOP/s of bfloat16 and TF32, and TB/s."""
    assert {name: gpu[:3] for name, gpu in GPUS.items()} == {
        "H100": (989.4, 494.7, 3.35),
        "H100-achievable": (800.0, 400.0, 3.0),
        "H200": (989.4, 494.7, 4.8),
        "A100": (312.0, 156.0, 2.039),
    }


def test_an_expanding_layer_by_hand() -> None:
    """x, weight, y and the shortcut in 16 bits: 925 MB in 276 us, 26.3 GFLOP in 27 us."""
    work = roofline.work(EXPANDING, "forward", 2)
    assert work.moved_bytes == 2 * (PIXELS * (64 + 256 + 256) + 256 * 64)
    assert work.flop == 2 * PIXELS * 256 * 64
    floor = roofline.floor(EXPANDING, "forward", "bfloat16", GPUS["H100"])
    assert floor.side == "memory"
    assert floor.us == pytest.approx(work.moved_bytes / 3.35e12 * 1e6)


def test_a_deep_layer_by_hand() -> None:
    """59.2 GFLOP in 74 us, 30.4 MB in 10 us."""
    work = roofline.work(DEEP, "forward", 2)
    assert work.moved_bytes == 2 * (2 * 256 * 49 * 512 + 512 * 512 * 9)
    assert work.flop == 2 * 256 * 49 * 512 * 512 * 9
    floor = roofline.floor(DEEP, "forward", "float16", GPUS["H100-achievable"])
    assert floor.side == "compute"
    assert floor.us == pytest.approx(work.flop / 800e12 * 1e6)


def test_groups_see_only_their_own_channels() -> None:
    """Each of 2x12x3x3 outputs is a sum over 2 channels of 3x3 pixels."""
    for step in roofline.STEPS["training"]:
        assert roofline.work(GROUPED, step, 2).flop == 2 * (2 * 12 * 3 * 3) * (2 * 3 * 3)


def test_float32_counts_four_bytes_and_the_peak_of_tf32() -> None:
    floor = roofline.floor(DEEP, "forward", "float32", GPUS["A100"])
    assert floor.us == pytest.approx(2 * 256 * 49 * 512 * 512 * 9 / 156e12 * 1e6)
    assert roofline.work(DEEP, "forward", 4).moved_bytes == 4 * (2 * 256 * 49 * 512 + 512 * 512 * 9)


def test_pixels_that_a_stride_skips_are_written_but_not_read() -> None:
    read, written = PIXELS // 4 * 256, PIXELS * 256
    rest = PIXELS // 4 * 512 + 512 * 256
    moved = {step: roofline.work(SHORTCUT, step, 1)[0] for step in roofline.STEPS["training"]}
    assert moved == {"forward": read + rest, "dgrad": written + rest, "wgrad": read + rest}


def test_training_is_three_steps() -> None:
    steps = [roofline.floor(EXPANDING, mode, "bfloat16", GPUS["H200"]) for mode in roofline.STEPS]
    forward, backward, training = (step.us for step in steps)
    assert training == pytest.approx(forward + backward)
    # The shortcut is read in the forward step alone, and images need no gradient.
    rest = 2 * (PIXELS * (64 + 256) + 256 * 64) / 4.8e12 * 1e6
    assert backward == pytest.approx(2 * rest)
    first = EXPANDING._replace(first=True)
    assert roofline.floor(first, "backward", "bfloat16", GPUS["H200"]).us == pytest.approx(rest)


def test_sides_of_different_steps() -> None:
    between = layer((256, 256, 14, 14), (1024, 256, 1, 1), residual=True)
    floors = {
        mode: roofline.floor(between, mode, "bfloat16", GPUS["A100"]).side
        for mode in roofline.STEPS
    }
    assert floors == {"forward": "memory", "backward": "compute", "training": "both"}


def test_layers_of_resnet50() -> None:
    with torch.device("meta"):
        model = networks.build_pair("resnet50").eager.eval()
        images = torch.empty(2, 3, 224, 224)
        found = roofline.layers(model, images)
        distinct = layer_shapes(model, images).convolutions
    assert list(dict.fromkeys(each.conv for each in found)) == distinct
    assert sum(found.values()) == 53
    assert sum(count for each, count in found.items() if each.residual) == 16
    assert [each.label for each in found if each.first] == ["2x3x224x224 -> 64, 7x7/2"]
    # The shortcut of the first block has the shape of its last convolution, but adds nothing.
    assert {(each.residual, n) for each, n in found.items() if each.label.startswith(
        "2x64x56x56 -> 256"
    )} == {(True, 3), (False, 1)}  # fmt: skip
    flop = sum(roofline.work(each, "forward", 2).flop * n for each, n in found.items())
    assert flop / 2 == pytest.approx(8.17e9, rel=1e-3)


def test_labels_are_those_of_the_benchmark() -> None:
    """Each is read back as the layer that it describes."""
    with torch.device("meta"):
        model = networks.build_pair("resnet18").eager.eval()
        shapes = layer_shapes(model, torch.empty(1, 3, 32, 32))
    found = cases(shapes, torch.float32, torch.device("cpu"), ("conv_bn_relu",))
    expected = [Layer(conv, residual) for conv in shapes.convolutions for residual in (False, True)]
    labels = [case.label for case in found]
    assert [each.label for each in expected] == labels
    assert [roofline.parsed(label) for label in labels] == expected
    assert GROUPED.label == "2x8x6x6 -> 12, 3x3/2, groups 4, residual"
    assert roofline.parsed(GROUPED.label) == GROUPED
    assert roofline.parsed("2x64x56x56, training") is None


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    shared = {
        "timestamp": "2026-01-01", "device_name": "NVIDIA H100 80GB HBM3", "mode": "forward",
        "dtype": "bfloat16", "subject": "conv_bn_relu", "batch": "256",
    }  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.Row._fields, restval="")
        writer.writeheader()
        writer.writerows(shared | row for row in rows)
    return path


ROWS: list[dict[str, Any]] = [
    {"shape": EXPANDING.label, "provider": "eager", "median_ms": 0.6},
    {"shape": EXPANDING.label, "provider": "triton", "median_ms": 0.4},
    {"shape": DEEP.label, "provider": "eager", "median_ms": 0.1},
    {"shape": DEEP.label, "provider": "eager", "median_ms": 9.0, "timestamp": "2025-12-31"},
    {"shape": DEEP.label, "provider": "eager", "median_ms": 0.3, "mode": "backward"},
    {"shape": DEEP.label, "provider": "eager", "median_ms": 0.3, "mode": "inference"},
    {"shape": DEEP.label, "provider": "eager", "median_ms": 0.3, "dtype": "float64"},
    {"shape": "256x64x56x56, training", "provider": "eager", "median_ms": 1},
]


def test_measured_rows(tmp_path: Path) -> None:
    found = roofline.measured(write_csv(tmp_path / "a.csv", *ROWS), None)
    assert [(each.layer.label, each.mode) for each in found] == [
        (EXPANDING.label, "forward"),
        (DEEP.label, "forward"),
        (DEEP.label, "backward"),
    ]
    assert found[0].us == pytest.approx({"eager": 600, "triton": 400})
    assert found[1].us == pytest.approx({"eager": 100})
    assert found[0].floor == roofline.floor(EXPANDING, "forward", "bfloat16", GPUS["H100"])
    by_name = roofline.measured(tmp_path / "a.csv", GPUS["A100"])
    assert by_name[1].floor == roofline.floor(DEEP, "forward", "bfloat16", GPUS["A100"])


def test_table_and_plot_of_a_file(run: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = write_csv(tmp_path / "conv_bn_relu.csv", *ROWS)
    done = run("--csv", str(path))
    assert done.status == 0, done.err
    assert "276.1 memory" in done.out
    assert "600.0 (46%)" in done.out
    assert "400.0 (69%)" in done.out
    assert (tmp_path / "conv_bn_relu_roofline.png").stat().st_size > 10_000
    done = run("--csv", str(path), "--plot", str(tmp_path / "other.png"))
    assert done.status == 0
    assert (tmp_path / "other.png").exists()


def test_gpu_to_compare_with(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_csv(tmp_path / "a.csv", *ROWS)
    done = run("--csv", str(path), "--gpu", "A100")
    assert done.status == 0, done.err
    assert "453.6 memory" in done.out  # 276.1 on the H100 that the rows name


def test_without_matplotlib(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("--csv", str(write_csv(tmp_path / "a.csv", *ROWS)))
    assert done.status == 0
    assert "69%" in done.out
    assert "skipped plot: " in done.err
    assert "pip install matplotlib" in done.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[-1]], "has no rows of convolutions (bench_conv_bn_relu.py writes such a file)"),
        ([], "has no rows of convolutions"),
        (
            [ROWS[0] | {"device_name": "AMD EPYC"}],
            "the device 'AMD EPYC' is not in the table of GPUs (name the one to compare with by"
            " --gpu: H100,",
        ),
    ],
)
def test_files_without_what_is_needed(
    rows: list[dict[str, Any]], message: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    done = run("--csv", str(write_csv(tmp_path / "a.csv", *rows)))
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("*.png"))


def test_a_file_that_is_not_there(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("--csv", str(tmp_path / "none.csv"))
    assert done.status == 1
    assert "none.csv" in done.err


def test_sums_over_the_layers_of_a_network() -> None:
    """A layer of 925 MB, bound by memory, and three of 59.2 GFLOP, bound by compute."""
    text = roofline.network_table({EXPANDING: 1, DEEP: 3}, "forward", "bfloat16", ["H100", "A100"])
    *_, expanding, deep, total, rate = (line.split() for line in text.splitlines())
    assert expanding[-7:] == ["1", "924.9", "26.3", "276.1", "memory", "453.6", "memory"]
    assert deep[-7:] == ["3", "30.4", "59.2", "59.8", "compute", "189.7", "compute"]
    megabytes = 2 * (PIXELS * 576 + 64 * 256 + 3 * (2 * 256 * 49 * 512 + 512 * 512 * 9)) / 1e6
    gigaflop = 2 * (PIXELS * 64 * 256 + 3 * 256 * 49 * 512 * 512 * 9) / 1e9
    us = 276.1 + 3 * 59.8, 453.6 + 3 * 189.7
    assert total[:2] == ["all", "4"]
    assert rate[0] == "images/s"
    numbers = [float(cell) for cell in total[2:]]
    assert numbers == pytest.approx([megabytes, gigaflop, *us], rel=3e-3)
    assert [float(cell) for cell in rate[1:]] == pytest.approx([256e6 / t for t in us], rel=1e-3)


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        # With another memory, or another chip.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpu_of_a_device(device_name: str, gpu: str | None) -> None:
    if gpu is not None:
        assert roofline._gpu_named(device_name) == roofline.GPUS[gpu]
        return
    with pytest.raises(ValueError, match=f"the device '{device_name}' is not in the table"):
        roofline._gpu_named(device_name)


def test_table_of_a_network(run: Callable[..., Done]) -> None:
    done = run("--model", "resnet20", "--size", "32", "--batch", "4", "--gpu", "H200,A100")
    assert done.status == 0, done.err
    assert "H200: 989.4 TFLOP/s, 4.8 TB/s (NVIDIA H200 datasheet, SXM)" in done.out
    assert "resnet20 forward bfloat16, 4x3x32x32" in done.out
    assert "resnet20 training bfloat16" in done.out
    assert "4x16x32x32 -> 16, 3x3/1, residual" in done.out
    assert "H100" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H100,V100"), "must be of H100, H100-achievable, H200, A100, got 'H100,V100'"),
        (("--dtype", "float64"), "invalid choice: 'float64'"),
        (("--mode", "backward"), "must be of forward, training"),
        (("--model", "vgg"), "invalid choice: 'vgg'"),
        (("--batch", "0"), "--batch and --size must be at least 1"),
        (("--size", "0"), "--batch and --size must be at least 1"),
        (("--plot", "x.png"), "--plot must come with exactly one --csv FILE"),
        (("--plot", "x.png", "--csv", "a", "b"), "--plot must come with exactly one --csv FILE"),
        (("--csv", "a", "--gpu", "H100,A100"), "--gpu must name exactly one GPU with --csv"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, run: Callable[..., Done]) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert message in done.err
