"""examples/train.py and examples/layer_responses.py: results, checkpoints and refusals."""

import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused._torchvision import import_torchvision

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoint  # noqa: E402
import data  # noqa: E402
import layer_responses  # noqa: E402
import reporting  # noqa: E402
import train  # noqa: E402

# Four steps an epoch, on tiny images.
SMALL = ["--image-size", "8", "--limit", "33", "--batch-size", "8", "--warmup", "0"]
SMALL += ["--device", "cpu"]
DIGITS = [*SMALL, "--epochs", "3"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that the tests start: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def call(main: Any, capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Outcome(code, *capsys.readouterr())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, main: Any = train.main) -> str:
    """The one line with which a script refuses."""
    outcome = call(main, capsys, *arguments)
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith(("train.py: ", "layer_responses.py: "))
    return line


def start(*arguments: object) -> subprocess.Popen[str]:
    """Python with these arguments, beside the examples and with one thread."""
    path = os.pathsep.join([str(EXAMPLES), str(Path(rf.__file__).resolve().parent.parent)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the speed."""
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in table]  # fmt: skip


def assert_same_training(folder: Path, other: Path) -> None:
    """Bit for bit: the numbers of all epochs, and both checkpoints."""
    assert rows(folder) == rows(other)
    for name in ("last.pt", "best.pt"):
        states = [checkpoint.load(path / name) for path in (folder, other)]
        assert states[0]["epoch"] == states[1]["epoch"]
        for key in ("model", "optimizer", "schedule"):
            torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with an uninterrupted run, and its result."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main([*DIGITS, "--out", str(folder)]) == 0
    return folder, json.loads(out.getvalue().splitlines()[-1])


class Python2Pickler(pickle._Pickler):  # the one in Python, which can be changed
    """Writes text as Python 2 did, with which CIFAR-10's files were made."""

    def save_text(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_text, bytes: save_text}


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as https://www.cs.toronto.edu/~kriz/cifar.html describes it, eight images a file."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, name in enumerate([*data.CIFAR_TRAIN_FILES, *data.CIFAR_VAL_FILES]):
        content = {
            b"batch_label": b"a batch",
            b"labels": [(number + i) % 10 for i in range(8)],
            b"data": generator.integers(0, 256, (8, 3072), dtype=np.uint8),
        }
        (folder / name).write_bytes(python2_pickle(content))
    return root


# --- what a run leaves ---------------------------------------------------------------------------


def test_result(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    assert {p.name for p in folder.iterdir()} - {"last.pt", "best.pt", "metrics.csv"} <= {
        p.name for p in folder.glob("events.out.tfevents*")
    }
    table = rows(folder)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    for name in ("epoch", "train_loss", "val_loss", "top1"):
        assert str(result[name]) == table[-1][name]
    accuracies = [float(row["top1"]) for row in table]
    assert result["best_top1"] == max(accuracies)
    assert checkpoint.load(folder / "best.pt")["epoch"] == result["best_epoch"]
    assert accuracies.index(max(accuracies)) + 1 == result["best_epoch"]
    assert result["blocks"] == "fused"
    assert result["data"] == "digits"
    assert Path(result["checkpoint"]) == folder / "last.pt"


def test_loss_and_accuracy_are_those_of_the_checkpoint(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    """By a network without fused blocks, which loads the fused ones' state_dict."""
    folder, result = trained
    network = train.build_network("resnet20", 10, eager=True)
    network.load_state_dict(checkpoint.load(folder / "last.pt")["model"])
    loss, top1 = evaluate(network, 33)
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["top1"] == top1


def evaluate(network: nn.Module, limit: int) -> tuple[float, float]:
    split = data.load(None, 8, limit).val
    ((images, labels),) = data.val_batches(split, len(split), data.Share())
    with torch.no_grad():
        logits = network.eval()(images)
    return float(F.cross_entropy(logits, labels)), float(
        (logits.argmax(1) == labels).double().mean()
    )


def test_finished_training_is_not_repeated(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = trained
    before = (folder / "last.pt").stat().st_mtime_ns
    outcome = call(train.main, capsys, *DIGITS, "--out", folder)
    assert outcome.result == result
    assert (folder / "last.pt").stat().st_mtime_ns == before


def test_eager_and_fused_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_step = [*SMALL, "--limit", "32", "--batch-size", "32", "--epochs", "1"]
    results = [
        call(train.main, capsys, *one_step, kind, "--out", tmp_path / kind).result
        for kind in ("--eager", "--fused")
    ]
    assert [result["blocks"] for result in results] == ["eager", "fused"]
    # Before the first step, by the same weights: rounding alone.
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)
    for kind in ("--eager", "--fused"):
        network = train.build_network("resnet20", 10, eager=kind == "--eager")
        assert {row.fused for row in rf.explain(network).rows} == {kind == "--fused"}


@pytest.mark.parametrize("eager", [False, True])
def test_networks_of_torchvision(eager: bool) -> None:
    if import_torchvision() is None:
        pytest.skip("torchvision is not installed")
    with torch.device("meta"):
        network = train.build_network("resnext101_32x8d", 7, eager)
    assert network.fc.out_features == 7
    assert {row.fused for row in rf.explain(network).rows} == {not eager}


# --- interruptions -------------------------------------------------------------------------------

# Kills its own process, as `kill -9` does, where half of the second epoch's checkpoint is written,
# or where all of it is and has yet to get its name.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def save(state, file, original=torch.save):
    if Path(file.name).name == "last.pt.tmp" and state["epoch"] == 2:
        file.write(b"PK" + bytes(1000))
        file.flush()
        kill()
    original(state, file)

def replace(old, new, original=Path.replace):
    if old.name == "last.pt.tmp":
        kill()
    original(old, new)

if sys.argv[1] == "write":
    torch.save = save
else:
    Path.replace = replace
sys.exit(train.main(sys.argv[2:]))
"""


def test_killed_training_continues_bit_for_bit(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the shifts and reflections of its images."""
    options = ["--root", cifar10, "--image-size", 16, "--batch-size", 8, "--epochs", 3]
    options += ["--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = call(train.main, capsys, *options, "--out", whole).result
    for moment in ("write", "rename"):
        process = start("-c", KILLED, moment, *options, "--out", killed)
        out, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, (out, err)
        assert checkpoint.load(killed / "last.pt")["epoch"] == 1
        assert (killed / "last.pt.tmp").exists()
    outcome = call(train.main, capsys, *options, "--out", killed)
    assert f"continuing after epoch 1 of {killed / 'last.pt'}" in outcome.out
    assert outcome.result["train_loss"] == result["train_loss"]
    assert_same_training(killed, whole)
    assert not list(killed.glob("*.tmp"))


def test_termination(tmp_path: Path) -> None:
    """Ctrl-C, and what torchrun and job schedulers send instead."""
    process = start(EXAMPLES / "train.py", *SMALL, "--epochs", 1000, "--out", tmp_path)
    assert process.stdout is not None
    assert any(line.startswith("epoch 2/") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    hint = f"the last complete epoch is in {tmp_path / 'last.pt'}"
    assert err.strip() == f"train.py: interrupted; {hint}"
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] >= 2


def test_interruption_before_the_first_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Training, "run_epoch", interrupt)
    outcome = call(train.main, capsys, *DIGITS, "--out", tmp_path)
    assert outcome.code == 130
    assert outcome.err.strip() == "train.py: interrupted; no epoch is complete"


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> Path:
    """A copy of the folder with an uninterrupted run."""
    folder = tmp_path / "copied"
    shutil.copytree(trained[0], folder)
    return folder


def test_damaged_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = copied / "last.pt"
    whole = last.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", pickle.dumps(print, protocol=2)):
        last.write_bytes(content)
        line = refusal(capsys, *DIGITS, "--out", copied)
        assert f"cannot read the checkpoint {str(last)!r}" in line
        assert "--resume never" in line
        assert last.read_bytes() == content
    torch.save({"model": {}}, last)
    assert "is no checkpoint of train.py" in refusal(capsys, *DIGITS, "--out", copied)


def test_resume_never_and_from_another_path(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *DIGITS, "--resume", tmp_path / "no.pt", "--out", tmp_path)
    assert f"there is no checkpoint {str(tmp_path / 'no.pt')!r}" in line
    last = copied / "last.pt"
    outcome = call(train.main, capsys, *DIGITS, "--resume", last, "--out", tmp_path / "other")
    assert f"continuing after epoch 3 of {last}" in outcome.out
    last.write_bytes(b"")
    short = [*SMALL, "--epochs", "1", "--resume", "never", "--out", copied]
    assert call(train.main, capsys, *short).result["epoch"] == 1
    assert len(rows(copied)) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", "0.5"], "lr 0.1 (now 0.5)"),
        (["--arch", "resnet32"], "arch resnet20 (now resnet32)"),
        (["--batch-size", "4", "--seed", "1"], "batch_size 8 (now 4), seed 0 (now 1)"),
    ],
)
def test_another_run_is_not_continued(
    changed: list[str],
    message: str,
    trained: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(capsys, *DIGITS, *changed, "--out", trained[0])
    assert f"was trained with {message}: pass the same" in line


def test_more_epochs_and_eager_blocks_may_follow(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = call(train.main, capsys, *SMALL, "--epochs", 4, "--eager", "--out", copied)
    assert "continuing after epoch 3" in outcome.out
    assert outcome.result["epoch"] == 4
    assert outcome.result["blocks"] == "eager"
    assert len(rows(copied)) == 4


def test_full_disk_leaves_the_old_checkpoint(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "last.pt").read_bytes()

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "last.pt.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = refusal(capsys, *SMALL, "--epochs", 4, "--out", copied)
    assert f"cannot write {str(copied / 'last.pt')!r}: No space left on device" in line
    assert (copied / "last.pt").read_bytes() == before
    assert not list(copied.glob("*.tmp"))


def test_random_states_are_restored() -> None:
    def draw() -> tuple[float, float]:
        return random.random(), float(torch.rand(()))  # noqa: S311

    (state,) = checkpoint.random_states()
    first = draw()
    assert draw() != first
    checkpoint.restore_random_state(state)
    assert draw() == first


# --- the arithmetic of training ------------------------------------------------------------------


def training(*arguments: object, folder: Path) -> train.Training:
    parsed = train.parse([*map(str, arguments), "--out", str(folder)])
    dataset = data.load(parsed.root, parsed.image_size, parsed.limit)
    return train.Training(parsed, dataset, train.Process(0, 1, torch.device("cpu")))


def test_accumulated_steps(tmp_path: Path) -> None:
    """Two batches per step: the weights that SGD written out by hand gives."""
    options = [*SMALL, "--accumulate", 2, "--label-smoothing", 0.1, "--weight-decay", 0.01]
    run = training(*options, "--epochs", 1, folder=tmp_path)
    expected = training(*options, "--epochs", 1, folder=tmp_path).network.train()
    batches = list(run.train_batches)
    assert len(batches) == 4
    momenta = [torch.zeros_like(p) for p in expected.parameters()]
    for step in range(2):
        for images, labels in batches[2 * step : 2 * step + 2]:
            loss = F.cross_entropy(expected(images), labels, label_smoothing=0.1)
            (loss / 2).backward()
        rate = 0.1 * (1 + math.cos(math.pi * step / 2)) / 2
        with torch.no_grad():
            for parameter, momentum in zip(expected.parameters(), momenta, strict=True):
                momentum.mul_(0.9).add_(parameter.grad).add_(parameter, alpha=0.01)
                parameter.sub_(momentum, alpha=rate)
                parameter.grad = None
    run.run_epoch()
    for own, other in zip(run.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_best_epoch_is_the_first_of_the_highest_accuracy(tmp_path: Path) -> None:
    run = training(*SMALL, folder=tmp_path)
    found = []
    for run.epoch, top1 in enumerate((0.1, 0.3, 0.3, 0.2), 1):
        run.history.append({"epoch": run.epoch, "top1": top1})
        found.append(run.is_best())
    assert found == [True, True, False, False]
    assert run.result()["best_epoch"] == 2


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    run = training(*SMALL, "--epochs", 2, "--lr", 1e-30, folder=tmp_path)
    seen: list[list[float]] = []

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training:
            seen[-1].append(float(inputs[0].sum()))

    run.network.register_forward_pre_hook(record)
    for _ in range(2):
        seen.append([])
        run.run_epoch()
    assert len(seen[0]) == len(seen[1]) == 4
    assert seen[0] != seen[1]


def test_learning_rate_rises_and_falls() -> None:
    factor = train.warmup_and_cosine(4, 14)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(9) == pytest.approx(0.5)
    assert factor(14) == pytest.approx(0)
    assert factor(20) == 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(*SMALL, "--amp", amp, "--epochs", 1, folder=tmp_path)
    found = []
    run.network.fc.register_forward_hook(lambda _module, _inputs, out: found.append(out.dtype))
    if amp == "fp16":  # overflows at first: those steps are not taken, and not counted
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.run_epoch()
    assert set(found) == {train.AMP_DTYPES[amp]}
    steps = run.schedule.last_epoch
    assert steps == 4 if amp == "bf16" else steps < 4
    assert run.network.conv1.weight.dtype == torch.float32


def test_memory_format(tmp_path: Path) -> None:
    for name in ("channels_last", "contiguous_format"):
        run = training(*SMALL, "--memory-format", name, "--epochs", 1, folder=tmp_path)
        memory_format = getattr(torch, name)
        assert run.network.layer1[0].conv1.weight.is_contiguous(memory_format=memory_format)
        images, _ = next(run._on_device(run.train_batches, 1, ""))
        assert images.is_contiguous(memory_format=memory_format)


def test_loss_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, *SMALL, "--lr", "1e30", "--epochs", 3, "--out", tmp_path)
    assert "the loss became" in line
    assert "--lr" in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_on_a_gpu(amp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--device", "cuda", "--amp", amp, "--out", tmp_path]
    first = call(train.main, capsys, *options, "--epochs", 1).result
    assert math.isfinite(first["train_loss"])
    outcome = call(train.main, capsys, *options, "--epochs", 2)
    assert "continuing after epoch 1" in outcome.out
    assert outcome.result["epoch"] == 2


# --- what a run tells ----------------------------------------------------------------------------


def test_without_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    reporting.Metrics(tmp_path, 1)
    assert "TensorBoard is not installed" in capsys.readouterr().out


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path), 5)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def flush(self) -> None:
            pass

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    row = {name: number for number, name in enumerate(reporting.HISTORY_COLUMNS, 5)}
    reporting.Metrics(tmp_path, 5).write([row])
    assert scalars == [(name, row[name], 5) for name in reporting.HISTORY_COLUMNS[1:]]


def test_progress_is_shown_on_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def tqdm(items: Any, **options: Any) -> Any:
        bars.append(options["total"])
        return items

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)  # noqa: B023
        assert list(reporting.progress(iter("ab"), 2, "title", show=True)) == ["a", "b"]
        assert bars == [2] * is_terminal
    assert list(reporting.progress(iter("ab"), 2, "title", show=False)) == ["a", "b"]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(reporting.progress(iter("ab"), 2, "title", show=True)) == ["a", "b"]
    assert bars == [2]


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "resnet21"], "--arch must be"),
        (["--arch", "vgg11"], "got 'vgg11'"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--epochs", "x"], "--epochs: invalid positive value: 'x'"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1, got -1"),
        (["--batch-size", "2000"], "--batch-size must be at most 1437"),
        (["--accumulate", "1000"], "--accumulate must be at most 22"),
        (["--lr", "0"], "--lr: must be greater than 0, got 0"),
        (["--lr", "nan"], "--lr: must be greater than 0, got nan"),
        (["--momentum", "1"], "--momentum: must be at least 0 and less than 1, got 1"),
        (["--warmup", "10"], "--warmup must be less than --epochs, got 10"),
        (["--workers", "-1"], "--workers: must be at least 0, got -1"),
        (["--amp", "fp8"], "--amp: invalid choice"),
        (["--eager", "--fused"], "not allowed with"),
        (["--device", "tpu"], "--device 'tpu' cannot be used"),
        (["--device", "cuda:77"], "--device 'cuda:77' cannot be used"),
        (["--root", "nowhere"], "--root must be a folder, got 'nowhere'"),
        (
            ["--root", str(EXAMPLES)],
            "--root must hold cifar-10-batches-py/ with CIFAR-10, or train/",
        ),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *arguments, "--out", tmp_path / "out")


def test_bad_arguments_leave_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, "--arch", "resnet21", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)  # permissions do not bind root
    line = refusal(capsys, "--root", tmp_path, "--out", tmp_path / "out")
    assert line.startswith(f"train.py: cannot read '{tmp_path}")
    assert "Permission denied" in line


def test_help_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (train.main, layer_responses.main):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.count("default") >= 4


def test_folder_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Training, "run_epoch", lambda _: pytest.fail("it began to train"))
    (tmp_path / "file").touch()
    read_only = tmp_path / "read_only"
    read_only.mkdir(mode=0o500)
    # Permissions do not bind root; nobody can make files in /proc.
    read_only = read_only if os.geteuid() else Path("/proc/self/fdinfo")
    for main in (train.main, layer_responses.main):
        for out in (tmp_path / "file" / "out", read_only):
            line = refusal(capsys, "--out", out, main=main)
            assert f"cannot write to the folder {str(out)!r}" in line


def test_synchronised_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = train.build_network("resnet20", 10, sync_bn=True)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    for other in ("--eager", "--compile"):
        line = refusal(capsys, *DIGITS, "--sync-bn", other, "--device", "cpu", "--out", tmp_path)
        assert f"--sync-bn must be left out with {other} on CPUs" in line


# --- data ----------------------------------------------------------------------------------------


def test_cifar10(cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = data.load(cifar10)
    assert (dataset.name, dataset.classes, len(dataset.train), len(dataset.val)) == (
        "cifar10", 10, 40, 8,
    )  # fmt: skip
    file = cifar10 / data.CIFAR_FOLDER / "test_batch"
    content = pickle.loads(file.read_bytes(), encoding="bytes")  # noqa: S301
    ((images, labels),) = data.val_batches(dataset.val, 8, data.Share())
    expected = torch.tensor(content[b"data"]).double().view(8, 3, 32, 32) / 255
    for channel in range(3):
        mean, std = data.CIFAR_MEAN[channel], data.CIFAR_STD[channel]
        error = images[:, channel] - (expected[:, channel] - mean) / std
        assert error.abs().max() < 1e-5
    assert labels.tolist() == content[b"labels"]
    inside = data.load(cifar10 / data.CIFAR_FOLDER)
    assert torch.equal(inside.train.images, dataset.train.images)
    options = ["--batch-size", 8, "--epochs", 1, "--out", tmp_path]
    assert call(train.main, capsys, "--root", cifar10, *options).result["data"] == "cifar10"


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


def test_damaged_cifar10(
    cifar10: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    shutil.copytree(cifar10, root)
    file = root / data.CIFAR_FOLDER / "data_batch_3"
    short = {b"labels": [1], b"data": np.zeros((2, 3072), np.uint8)}
    floats = {b"labels": [1], b"data": np.zeros((1, 3072))}
    pickles = map(python2_pickle, (Malicious(), short, floats, [1]))
    for content in (b"", b"text", *pickles):
        file.write_bytes(content)
        line = refusal(capsys, "--root", root, "--out", tmp_path / "out")
        assert f"{str(file)!r} is no batch of CIFAR-10" in line
    assert not Path("made by a pickle").exists()
    file.unlink()
    line = refusal(capsys, "--root", root, "--out", tmp_path / "out")
    assert f"CIFAR-10 lacks the file {str(file)!r}" in line


def test_random_crop_and_flip() -> None:
    """Each result is one of the 2 x 9 x 9 that padding, shifting and mirroring can give."""
    images = torch.randint(1, 256, (20, 3, 5, 6), dtype=torch.uint8)
    seen = set()
    for image, result in zip(images, data.random_crop_and_flip(images), strict=True):
        padded = F.pad(image, (4, 4, 4, 4))
        windows = {
            (top, left): padded[:, top : top + 5, left : left + 6]
            for top in range(9)
            for left in range(9)
        }
        found = [(at, False) for at in windows if torch.equal(result, windows[at])]
        found += [(at, True) for at in windows if torch.equal(result, windows[at].flip(2))]
        assert found
        seen.add(found[0])
    assert len(seen) > 15
    assert {flip for _, flip in seen} == {False, True}


def test_shares_hold_every_image_once() -> None:
    images = torch.arange(11.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    split = data.TensorImages(images, torch.arange(11), (0.0,) * 3, (1.0,) * 3, 2)
    shares = [data.Share(rank, 3) for rank in range(3)]

    def labels(batches: Any) -> list[int]:
        return [int(label) for _, part in batches for label in part]

    val = [labels(data.val_batches(split, 2, share)) for share in shares]
    assert sorted(itertools.chain(*val)) == list(range(11))
    orders = []
    for epoch in (0, 1, 0):
        batches = [data.train_batches(split, 3, share, seed=5) for share in shares]
        for each in batches:
            each.sampler.set_epoch(epoch)
        found = [labels(each) for each in batches]
        assert [len(each) for each in found] == [3, 3, 3]
        assert len({*itertools.chain(*found)}) == 9
        orders.append(found)
    assert orders[0] == orders[2] != orders[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with bright and dark images of several sizes and modes."""
    if import_torchvision() is None:
        pytest.skip("torchvision is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    root = tmp_path_factory.mktemp("folders")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, low in (("bright", 150), ("dark", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                shape = (40, 30 + number, 3) if number else (30, 40)
                pixels = generator.integers(low, low + 100, shape, dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_folders_of_images(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = data.load(folders, 16)
    assert dataset.classes == 2
    ((images, labels),) = data.val_batches(dataset.val, 8, data.Share())
    assert images.shape == (8, 3, 16, 16)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert images[:4].mean() > 1 > -1 > images[4:].mean()
    limited = data.load(folders, 16, 4)
    assert [sorted({label for _, label in split}) for split in (limited.train, limited.val)] == [
        [0, 1],
        [0, 1],
    ]
    options = ["--root", folders, "--image-size", 32, "--batch-size", 4, "--device", "cpu"]
    options += ["--epochs", 3, "--workers", 1, "--out"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(train.main, capsys, *options, whole).result["data"] == "folder"
    run_epoch = train.Training.run_epoch

    def run_two_epochs(self: train.Training) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "run_epoch", run_two_epochs)
        assert call(train.main, capsys, *options, stopped).code == 130
    assert "continuing after epoch 2" in call(train.main, capsys, *options, stopped).out
    assert_same_training(stopped, whole)  # also the crops that the worker chose


def test_bad_folders_of_images(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    shutil.copytree(folders, root)
    options = ["--root", root, "--image-size", 32, "--batch-size", 4, "--out", tmp_path / "out"]
    broken = root / "train" / "dark" / "0.png"
    broken.write_bytes(b"text")
    for workers in (0, 1):
        line = refusal(capsys, *options, "--workers", workers)
        assert line.startswith(f"train.py: cannot read the image {str(broken)!r}")
    (root / "val" / "dark").rename(root / "val" / "gloomy")
    assert "only one of them has dark, gloomy" in refusal(capsys, *options)
    for path in (root / "train" / "dark").iterdir():
        path.unlink()
    assert "Found no valid file for the classes dark" in refusal(capsys, *options)
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    shutil.rmtree(root / "train" / "dark")
    assert "Couldn't find any class folder" in refusal(capsys, *options)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "image folders need torchvision" in refusal(capsys, *options)


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("sync_bn", [False, True])
def test_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str], sync_bn: bool) -> None:
    """Losses are means over the images of both; one writes; the checkpoint holds what validated."""
    options = [*SMALL, "--batch-size", "16", "--epochs", "1", "--out", str(tmp_path)]
    options += ["--sync-bn"] if sync_bn else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(*torchrun, EXAMPLES / "train.py", *options)
    out, err = process.communicate(timeout=300)
    outcome = Outcome(process.returncode, out, err)
    assert [line[:6] for line in out.splitlines() if line.startswith("epoch")] == ["epoch "]
    # One step: the loss of each process is that of the first weights on its own 16 images.
    torch.manual_seed(0)
    network = train.build_network("resnet20", 10).train()
    split, batches = data.load(None, 8, 33).train, []
    for rank in range(2):
        batches += data.train_batches(split, 16, data.Share(rank, 2), seed=0)
    if sync_bn:
        batches = [[torch.cat(tensors) for tensors in zip(*batches, strict=True)]]
    losses = [float(F.cross_entropy(network(x), labels).detach()) for x, labels in batches]
    assert len(set(losses)) == 2 - sync_bn
    assert outcome.result["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    state = checkpoint.load(tmp_path / "last.pt")
    assert len(state["random_states"]) == 2
    network.load_state_dict(state["model"])
    loss, top1 = evaluate(network, 33)
    assert outcome.result["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert outcome.result["top1"] == pytest.approx(top1)
    line = refusal(capsys, *options)
    assert "processes 2 (now 1)" in line


# --- layer_responses.py --------------------------------------------------------------------------


def test_layer_responses(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    path = trained[0] / "last.pt"
    outcome = call(
        layer_responses.main, capsys, "--checkpoint", f"resnet20={path}", "--out", tmp_path
    )
    assert outcome.code == 0, outcome
    assert (tmp_path / "layer_responses.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "layer_responses.csv").open() as file:
        table = list(csv.DictReader(file))
    expected = responses(checkpoint.load(path)["model"], data.load(None, 8, 33).val)
    assert [int(row["layer"]) for row in table] == list(range(1, 20))
    assert {row["network"] for row in table} == {"resnet20"}
    assert [row["name"] for row in table] == list(expected)
    for row in table:
        assert float(row["std"]) == pytest.approx(expected[row["name"]], rel=1e-5), row["name"]


def responses(weights: dict[str, Tensor], split: data.TensorImages) -> dict[str, float]:
    """ResNet-20 written out on its state_dict, in float64."""
    ((x, _),) = data.val_batches(split, len(split), data.Share())
    w = {name: value.double() for name, value in weights.items()}
    found = {}

    def layer(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        y = F.conv2d(x, w[f"{conv}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        y = F.batch_norm(y, *(w[f"{bn}.{name}"] for name in names))
        found[bn] = float(y.std(correction=0))
        return y

    x = layer(x.double(), "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = layer(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = layer(y, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))
            x = (x + y).relu()
    return found


def test_layer_responses_trains_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    whole = data.load
    monkeypatch.setattr(data, "load", lambda root, size, limit: whole(root, 8, 64))
    options = ["--arch", "resnet20", "resnet32", "--epochs", 1, "--out", tmp_path]
    outcome = call(layer_responses.main, capsys, *options)
    assert outcome.code == 0, outcome
    assert "resnet20: 19 layers" in outcome.out
    assert "resnet32: 31 layers" in outcome.out
    assert (tmp_path / "resnet32" / "last.pt").exists()


def test_layer_responses_refuses(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained[0] / "last.pt"
    for arguments, words in (
        (["--checkpoint", "resnet20"], "must be NAME=PATH"),
        (["--checkpoint", f"resnet50={path}"], "must be NAME=PATH"),
        (["--checkpoint", f"resnet56={path}"], "resnet56=PATH must hold that network"),
        (["--checkpoint", "resnet20=no.pt"], "there is no checkpoint 'no.pt'"),
        (["--epochs", "0"], "must be at least 1"),
    ):
        options = [*arguments, "--out", tmp_path]
        assert words in refusal(capsys, *options, main=layer_responses.main)
