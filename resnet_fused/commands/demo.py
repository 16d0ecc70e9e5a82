"""See the whole library at work on real images, in a few minutes.

First a ResNet-20 learns to read real handwritten digits twice, with eager blocks and with fused
ones; the two trainings must agree. Then a ResNet-50 (--model) is fused, checked against float64,
and timed against eager PyTorch and torch.compile. Plots and a report land in demo_report/ (--out).
Exits with 1 if the trainings disagree or a number is wrong.
"""

import argparse
import json
import pickle
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.commands import baselines, digits, environment, networks, photos, report, verify
from resnet_fused.commands.console import CommandError, output_folder, table, write_atomically
from resnet_fused.commands.digits import EARLY_STEPS, EXACT_ALLOWED, EXACT_STEPS, Comparison
from resnet_fused.commands.memory import saved_bytes
from resnet_fused.commands.numerics import Check
from resnet_fused.commands.timing import Timing, interleave

IMAGENET_NAMES = tuple(name for name in networks.NAMES if name not in networks.CIFAR_NAMES)
CHECK_SIZE = 64  # the layers are checked on small images: float64 on a CPU is slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict for --model")
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder with your images")
    parser.add_argument(
        "--model",
        default="resnet50",
        choices=IMAGENET_NAMES,
        metavar="NAME",
        help=f"default resnet50; of {', '.join(IMAGENET_NAMES)}",
    )
    parser.add_argument("--batch", type=verify.positive, default=8, help="images, default 8")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    verify.add_device_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("demo_report"), metavar="DIR")
    parser.add_argument(
        "--quick", action="store_true", help="smaller images, fewer steps, no torch.compile"
    )


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    device = verify.checked_device(arguments.device)
    report.load_pyplot()  # everything that may be missing is asked for before the long work
    data = digits.load(size=8 if arguments.quick else 16)
    pair, images, sources = _network_and_images(arguments)
    with output_folder(arguments.out) as out:
        dtype = verify.DTYPES[arguments.dtype]
        print(f"1/3 training on {len(data.train_images)} digits", flush=True)
        training = digits.train_both(data, 3 if arguments.quick else 5, device, dtype)
        print(training_text(training), flush=True)
        print(f"\n2/3 checking {arguments.model} against float64 ({sources})", flush=True)
        small = images[:2, :, :CHECK_SIZE, :CHECK_SIZE]
        checks = verify.certify(arguments.model, pair, small, dtype, device)
        print(verify.checks_table(verify.worst(checks)), flush=True)
        print(f"\n3/3 timing {arguments.model}", flush=True)
        timings = _time(arguments, pair, images.to(device, dtype))
        saved = [saved_bytes(model, images[:2].to(device)) / 2**20 / 2 for model in pair[:2]]
        passed = not training.disagreements() and all(c.passed for c in checks)
        print(timing_text(timings, arguments.batch, saved))
        _write(out, arguments, training, checks, timings, saved, sources)
    seconds = time.monotonic() - started
    print(f"\n{'PASSED' if passed else 'FAILED'} in {seconds:.0f} s; see {out / 'report.html'}")
    return 0 if passed else 1


def training_text(training: Comparison) -> str:
    rows = [
        (name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{accuracy[-1]:.1%}", f"{step:.1f}")
        for name, losses, accuracy, step in (
            (
                "eager", training.eager_losses, training.eager_accuracies, training.eager_step_ms
            ),
            (
                "fused", training.fused_losses, training.fused_accuracies, training.fused_step_ms
            ),
        )
    ]  # fmt: skip
    header = ("blocks", "first loss", "last loss", "test accuracy", "ms per step")
    lines = [table(header, rows), *training_facts(training)]
    return "\n".join([*lines, *(f"DISAGREE: {text}" for text in training.disagreements())])


def training_facts(training: Comparison) -> list[str]:
    return [
        f"fused steps are {training.speedup:.2f}x as fast as eager's (median of pairs)",
        f"in float64 the losses of the first {EXACT_STEPS} steps differ by "
        f"{training.exact_difference:.1e} (relative), allowed {EXACT_ALLOWED:.0e}",
        f"the losses before the first step differ by {training.first_difference:.1e} (relative), "
        f"allowed {training.first_allowed:.1e}; those of the first {EARLY_STEPS} steps by at most "
        f"{training.early_difference:.1e} (rounding alone, eager in its other memory format: "
        f"{training.control_difference:.1e})",
        f"final accuracies differ by {training.accuracy_difference:.1%}, allowed "
        f"{training.accuracy_allowed:.1%} (three standard errors on {digits.TEST_IMAGES} images)",
        f"eager blocks that load the fused weights change {training.changed_predictions} of "
        f"{digits.TEST_IMAGES} predictions",
    ]


def timing_text(timings: dict[str, Timing], batch: int, saved: list[float]) -> str:
    header, rows = _timing_table(timings, batch)
    return "\n".join([table(header, rows), _saved_text(saved)])


def _network_and_images(arguments: argparse.Namespace) -> tuple[networks.Pair, Tensor, str]:
    size = 96 if arguments.quick else 224
    if arguments.images is not None:
        images, source = photos.from_folder(arguments.images, arguments.batch, size)
    else:
        images, source = photos.samples(arguments.batch, size)
    if arguments.weights is None:
        pair = networks.build_pair(arguments.model)
        # At least two: batch norm has no statistics of a single value in a last 1x1 layer.
        networks.warm_up(pair, images if len(images) > 1 else images.repeat(2, 1, 1, 1))
        weights = "random weights"
    else:
        state = load_weights(arguments.weights)
        classes = len(state["fc.weight"]) if "fc.weight" in state else 1000
        pair = networks.build_pair(arguments.model, num_classes=classes)
        for model in pair[:2]:
            _load_state(model.eval(), state, arguments)
        weights = f"weights from {arguments.weights}"
    return pair, images, f"{pair.source}'s network, {weights}, {source}"


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state_dict from a file; CommandError, in one line, on anything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"--weights: cannot read {str(path)!r}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CommandError(
            f"--weights: {str(path)!r} is not a file of weights ({_first_line(error)})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CommandError(
            f"--weights: {str(path)!r} must hold a state_dict, got {type(state).__name__}"
        )
    return state


def _load_state(model: nn.Module, state: dict[str, Tensor], arguments: argparse.Namespace) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CommandError(
            f"--weights: {str(arguments.weights)!r} does not fit {arguments.model} ({reason} ...)"
        ) from error


def _time(arguments: argparse.Namespace, pair: networks.Pair, images: Tensor) -> dict[str, Timing]:
    providers: dict[str, Callable[[], object]] = {"eager": baselines.eager(pair.eager, images)}
    if arguments.quick:
        print("torch.compile: left out by --quick")
    else:
        print("torch.compile: compiling (about a minute) ...", flush=True)
        try:
            providers["compile"] = baselines.compiled(pair.eager, images)
        except baselines.UnavailableError as reason:
            print(f"torch.compile: left out: {reason}")
        except Exception as error:  # its failures are many, and none of them is ours
            print(f"torch.compile: left out, it failed: {_first_line(error)}")
    providers["fused"] = baselines.eager(pair.fused, images)
    return interleave(providers, 2 if arguments.quick else 30, images.device, minimum_runs=3)


def _write(
    out: Path,
    arguments: argparse.Namespace,
    training: Comparison,
    checks: list[Check],
    timings: dict[str, Timing],
    saved: list[float],
    sources: str,
) -> None:
    report.plot_training(training, out / "training.png")
    title = f"{arguments.model}, {arguments.dtype}, batch {arguments.batch}, inference"
    report.plot_timing(timings, title, out / "timing.png")
    facts = {
        "resnet_fused": environment.library_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": verify.device_name(torch.device(arguments.device)),
        "threads": torch.get_num_threads(),
        "sources": sources,
    }
    results: dict[str, Any] = {
        **facts,
        "training": {**training._asdict(), "disagreements": training.disagreements()},
        "checks": [{**c._asdict(), "passed": c.passed} for c in checks],
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "saved_for_backward_mib_per_image": dict(zip(("eager", "fused"), saved, strict=True)),
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    _page(arguments, facts, training, checks, timings, saved, out).write(out / "report.html")


def _page(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    training: Comparison,
    checks: list[Check],
    timings: dict[str, Timing],
    saved: list[float],
    out: Path,
) -> report.Page:
    page = report.Page("resnet_fused: demonstration")
    page.text("; ".join(f"{key}: {value}" for key, value in facts.items()))
    page.heading("Training ResNet-20 on handwritten digits, with eager and with fused blocks")
    page.text(
        "Same start, same batches in the same order. Rounding differs between the two, and "
        "training multiplies every difference from step to step, as it does between two memory "
        "formats of eager PyTorch itself (the control). So the curves need not coincide: the "
        "mathematics is compared in float64, the first loss within rounding, and the final "
        "accuracies within chance."
    )
    page.image(out / "training.png", "loss and accuracy of both trainings")
    for text in training_facts(training):
        page.text(text)
    disagreements = training.disagreements()
    page.verdict("; ".join(disagreements) or "The two trainings agree.", not disagreements)
    page.heading(f"Numbers of {arguments.model}: errors against float64")
    page.preformatted(verify.checks_table(verify.worst(checks)))
    failed = sum(not c.passed for c in checks)
    page.verdict(f"{len(checks) - failed} of {len(checks)} comparisons pass.", failed == 0)
    page.heading(f"Time and memory of {arguments.model}, {arguments.dtype}")
    page.image(out / "timing.png", "time per batch")
    page.table(*_timing_table(timings, arguments.batch))
    page.text(_saved_text(saved))
    return page


def _timing_table(
    timings: dict[str, Timing], batch: int
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("inference", "median ms", "p20", "p80", "x eager", "images/s", "runs")
    rows: list[tuple[str, ...]] = [
        (
            name, f"{t.median_ms:.1f}", f"{t.p20_ms:.1f}", f"{t.p80_ms:.1f}", f"{t.speedup:.2f}",
            f"{batch / t.median_ms * 1e3:.1f}", str(t.runs),
        )
        for name, t in timings.items()
    ]  # fmt: skip
    return header, rows


def _saved_text(saved: list[float]) -> str:
    eager, fused = saved
    return (
        f"kept for backward in training, float32: {eager:.1f} MiB per image in eager, {fused:.1f} "
        f"MiB fused ({fused / eager:.2f}x)"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
