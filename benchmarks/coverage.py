"""What `fuse` does to the ResNets that people have, and whether the numbers stay right.

python benchmarks/coverage.py                          # every model, writes docs/coverage.md
python benchmarks/coverage.py --filter resnetv2        # some of them, writes nothing
python benchmarks/coverage.py --quick                  # the first model of each family

Each model gets random weights and statistics and is compared with its fused self, in evaluation and
in training: outputs, gradients and buffers in float64, outputs in float32. Then other weights are
loaded into the fused model, and `unfuse` must give back the plain one. Exit status 1 if anything is
wrong.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import itertools
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.commands.console import write_atomically

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from coverage_models import Case, cases  # noqa: E402
from model_equality import distance, images, randomize, step, tensors_in  # noqa: E402

OUTPUT = ROOT / "docs" / "coverage.md"
LIMIT = 1e-9  # of relative distances in float64
MODES = {"eval": False, "train": True}
LIBRARIES = ("torch", "torchvision", "timm", "transformers")


class Result(NamedTuple):
    """One line of the table. errors: the largest in float64 per mode. wrong: what is not as it must
    be. skipped: why nothing was compared.
    """

    family: str
    name: str
    states: Mapping[str, int]
    errors: Mapping[str, float]
    reason: str = ""
    wrong: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def verdict(self) -> str:
        if self.wrong:
            return "WRONG: " + "; ".join(self.wrong)
        return f"skipped: {self.skipped}" if self.skipped else "ok"

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of the table."""
        counts = (self.states.get(s, 0) for s in ("fused", "fused in part", "left alone"))
        errors = (f"{self.errors[mode]:.0e}" if mode in self.errors else "-" for mode in MODES)
        return (self.name, *map(str, counts), *errors, self.verdict, self.reason)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", help="only models with this in their name")
    parser.add_argument("--quick", action="store_true", help="only the first of each family")
    parser.add_argument("--output", type=Path, help=f"default for a full run: {OUTPUT.name}")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes, each with a model and up to 5 GB (2)"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    chosen = choose(arguments.filter, arguments.quick)
    if not chosen:
        parser.error(f"--filter must be part of the name of a model, got {arguments.filter!r}")
    is_full = not (arguments.filter or arguments.quick)
    output = arguments.output or (OUTPUT if is_full else None)
    try:
        results = run(chosen, arguments.jobs)
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, document(results))
        print(f"wrote {output}")
    print(summary(results))
    return int(any(result.wrong for result in results))


def choose(text: str, quick: bool) -> list[Case]:
    """The models with `text` in their label, or of those the first of each family."""
    chosen = [case for case in cases() if text.lower() in case.label.lower()]
    if quick:
        return list({case.family: case for case in reversed(chosen)}.values())[::-1]
    return chosen


def run(chosen: list[Case], jobs: int) -> list[Result]:
    """One result for each, printed as they come, returned in order."""
    places = {case.label: i for i, case in enumerate(chosen)}
    results = {}
    found = map(examine, chosen) if jobs == 1 else _in_processes(chosen, jobs)
    for result in found:
        label = f"{result.family}: {result.name}"
        results[places[label]] = result
        fused, partly, alone, in_eval, in_train, verdict = result.cells[1:7]
        print(
            f"[{len(results)}/{len(chosen)}] {label}: fused {fused}, in part {partly}, left alone "
            f"{alone}, eval {in_eval}, train {in_train}, {verdict}",
            flush=True,
        )
    return [results[i] for i in range(len(chosen))]


def _in_processes(chosen: list[Case], jobs: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # forked threads of OpenMP would hang
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,))
    try:
        yield from (
            f.result() for f in as_completed([pool.submit(_named, c.label) for c in chosen])
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _named(label: str) -> Result:
    return examine(next(case for case in cases() if case.label == label))


# One model


def examine(case: Case) -> Result:
    """Compare the model with its fused self."""
    result = Result(case.family, case.name, states={}, errors={})
    x = images(*case.shape)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = vary(case.build())
            double = copy.deepcopy(model).double()
            exact = {mode: one_step(double, x, case, mode) for mode in MODES}
    except Exception as error:  # whatever a model of somebody else's raises
        return result._replace(skipped=f"the plain model does not run: {_first_line(error)}")
    for tensors in exact.values():
        if not all(t.isfinite().all() for t in tensors.values()) or not tensors["out0"].any():
            return result._replace(skipped="the plain model gives infinite numbers, or zeros")
    wrong: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fuse: .* could be fused")
            fused = rf.fuse(double)
            errors = {
                mode: float64_error(fused, double, x, case, mode, exact[mode], wrong)
                for mode in MODES
            }
            exact.clear()
            return compare(Trio(model, rf.fuse(model), double), case, wrong, result)._replace(
                errors=errors
            )
    except Exception as error:  # is a wrong result like any other
        return result._replace(wrong=(*wrong, _first_line(error)))


class Trio(NamedTuple):
    """The same weights three times: fused shares those of plain, double has them in float64."""

    plain: nn.Module
    fused: nn.Module
    double: nn.Module


def compare(trio: Trio, case: Case, wrong: list[str], result: Result) -> Result:
    """In float32, and with other weights; and is all of it undone?"""
    model, fused, double = trio
    for mode in MODES:
        check_float32(trio, case, mode, wrong)
    if not shares_state(fused, model):
        wrong.append("state_dict has other keys or tensors")
    rows = rf.explain(fused).rows
    fused.load_state_dict({name: other(t) for name, t in model.state_dict().items()})
    double.load_state_dict(model.state_dict())
    more = case._replace(shape=(case.shape[0] + 1, *case.shape[1:]))
    check_float32(trio, more, "eval", wrong, "after load_state_dict, with one image more, ")
    back = rf.unfuse(fused)
    if classes(back) != classes(model):
        wrong.append("unfuse gives other classes")
    x = images(*case.shape)
    for mode in MODES:
        pairs = zip(outputs(back, x, case, mode), outputs(model, x, case, mode), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            wrong.append(f"{mode}: unfuse gives other numbers")
    return result._replace(
        states=dict(Counter(row.state for row in rows)),
        reason=main_reason([row.reason for row in rows if row.reason]),
        wrong=tuple(wrong),
    )


def vary(model: nn.Module) -> nn.Module:
    """Parameters and statistics that no longer stand where initialisation has put them all."""
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.numel() > 1 and p.min() == p.max():
            p.data += 0.2 * (torch.rand(p.shape, generator=generator) - 0.5)
    return model


def one_step(model: nn.Module, x: Tensor, case: Case, mode: str) -> dict[str, Tensor]:
    """In float64; the model's buffers stay as they were."""
    with buffers_kept(model):
        return step(model, x.double(), MODES[mode], case.call)


def float64_error(
    fused: nn.Module,
    plain: nn.Module,
    x: Tensor,
    case: Case,
    mode: str,
    exact: dict[str, Tensor],
    wrong: list[str],
) -> float:
    """The largest relative distance from `exact`, of outputs, gradients and buffers.

    In evaluation also of the outputs without gradients, twice, as weights may then be prepared.
    Above LIMIT, it may be twice what the plain model makes of a rounding of its input: gradients
    that are zero but for rounding, and batch norms of two values, can be that far off.
    """
    tensors = one_step(fused, x, case, mode)
    if tensors.keys() != exact.keys():
        wrong.append(f"{mode}: other tensors: {sorted(tensors.keys() ^ exact.keys())[:3]}")
    errors = {name: distance(tensors[name], exact[name]) for name in tensors.keys() & exact.keys()}
    if mode == "eval":
        for _ in range(2):
            for i, out in enumerate(outputs(fused, x.double(), case, mode)):
                name = f"out{i}"
                errors[name] = max(errors[name], distance(out, exact[name]))
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= LIMIT:
        noise = rounding_errors(plain, x, case, mode, exact)
        wrong += [
            f"{mode}: {name} is off by {error:.0e} in float64"
            for name, error in errors.items()
            if not (error <= LIMIT or error <= 2.0 * noise[name])
        ][:1]
    return errors[worst]


def rounding_errors(
    plain: nn.Module, x: Tensor, case: Case, mode: str, exact: dict[str, Tensor]
) -> dict[str, float]:
    """The largest relative distances from `exact` when the input is rounded in five other ways."""
    largest = dict.fromkeys(exact, 0.0)
    for seed in range(5):
        signs = torch.sign(images(*x.shape, seed=seed, dtype=torch.float64))
        rounded = x.double() * (1.0 + torch.finfo(torch.float64).eps * signs)
        for name, tensor in one_step(plain, rounded, case, mode).items():
            largest[name] = max(largest[name], distance(tensor, exact[name]))
    return largest


def check_float32(trio: Trio, case: Case, mode: str, wrong: list[str], when: str = "") -> None:
    """The error is at most twice that of the plain model and a rounding, over the outputs.

    One input may be rounded luckily: where it is beyond that, the median of nine counts.
    """
    errors, plain_errors = [], []
    for trial in range(9):
        x = images(*case.shape, seed=trial)
        exact = outputs(trio.double, x.double(), case, mode)
        errors.append(_distance(outputs(trio.fused, x, case, mode), exact))
        if mode == "eval":
            errors[-1] = max(errors[-1], _distance(outputs(trio.fused, x, case, mode), exact))
        native = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        plain_errors.append(_distance(outputs(trio.plain, native, case, mode), exact))
        limit = 2.0 * median(plain_errors) + torch.finfo(torch.float32).eps
        if trial in (0, 8) and median(errors) <= limit:
            return
    wrong.append(
        f"{when}{mode}: the outputs are off by {median(errors):.1e} in float32, the plain model's "
        f"by {median(plain_errors):.1e}"
    )


def _distance(tensors: list[Tensor], exact: list[Tensor]) -> float:
    """Over all of them as if they were one; NaN is infinitely far away."""
    pairs = list(zip(tensors, exact, strict=True))
    square = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    distance = (square / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
    return distance if distance == distance else float("inf")


def outputs(model: nn.Module, x: Tensor, case: Case, mode: str) -> list[Tensor]:
    """Of one call, which leaves the model as it was; without gradients in evaluation."""
    model.train(MODES[mode])
    with (
        buffers_kept(model),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(mode == "train"),
    ):
        torch.manual_seed(0)
        return [out.detach() for out in tensors_in(case.call(model, x.clone()))]


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)


def shares_state(fused: nn.Module, model: nn.Module) -> bool:
    """The same keys in the same order, over the same memory."""
    ours, theirs = fused.state_dict(), model.state_dict()
    return list(ours) == list(theirs) and all(
        a.data_ptr() == b.data_ptr() for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def classes(model: nn.Module) -> list[type]:
    """Of all its modules. A GraphModule has a class of its own, and so has each copy of it."""
    found = [type(module) for module in model.modules()]
    return [nn.Module if issubclass(c, torch.fx.GraphModule) else c for c in found]


def other(tensor: Tensor) -> Tensor:
    """Weights of the same size, for load_state_dict."""
    if not tensor.is_floating_point():
        return tensor.clone()
    generator = torch.Generator().manual_seed(2)
    return tensor * (0.8 + 0.4 * torch.rand(tensor.shape, generator=generator))


def main_reason(reasons: list[str]) -> str:
    """The most frequent one, shortened."""
    if not reasons:
        return ""
    reason, count = Counter(map(_shortened, reasons)).most_common(1)[0]
    return reason if count == len(reasons) else f"{reason} ({count} of {len(reasons)})"


def _shortened(reason: str) -> str:
    text = " ".join(reason.removeprefix("its forward is not a known one: ").split())
    return text if len(text) <= 90 else text[:87] + "..."


def _first_line(error: Exception) -> str:
    return _shortened(f"{type(error).__name__}: {error}".splitlines()[0])


# The table


def document(results: Iterable[Result]) -> str:
    """docs/coverage.md."""
    results = list(results)
    parts = [
        "# Models that were converted and compared",
        "`python benchmarks/coverage.py` wrote this with "
        + ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
        + ", on a CPU.",
        "Of each model, with random weights and statistics: how many of the places that `explain` "
        "lists are fused, fused in part, and left alone, with the most frequent reason; and the "
        "largest relative distance from the plain model in float64, over outputs, gradients and "
        f"buffers, which must be at most {LIMIT:.0e}, or twice what a rounding of the input makes "
        "of it in the plain model. `ok` says besides that the outputs in "
        "float32 are as near to float64 as the rule in CONTRIBUTING.md asks, that `state_dict` has "
        "the same keys over the same tensors, that weights loaded into the fused model take "
        "effect, and that `unfuse` gives the same classes and, bit by bit, the same numbers. Of "
        "detectors everything with weights is called; proposals and non-maximum suppression are "
        "not.",
        summary(results),
    ]
    header = ("model", "fused", "in part", "left alone", "eval", "train", "verdict", "reason")
    for family, group in itertools.groupby(results, key=lambda result: result.family):
        lines = [header, ("---",) * len(header), *(result.cells for result in group)]
        rows = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        parts += [f"## {family}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def summary(results: list[Result]) -> str:
    """One sentence."""
    verdicts = Counter(result.verdict.partition(":")[0] for result in results)
    states: Counter[str] = Counter()
    for result in results:
        states.update(result.states)
    return (
        f"{len(results)} models: {verdicts['ok']} ok, {verdicts['WRONG']} wrong, "
        f"{verdicts['skipped']} skipped. {states['fused']} places fused, "
        f"{states['fused in part']} in part, {states['left alone']} left alone."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
