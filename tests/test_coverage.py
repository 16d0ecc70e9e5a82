"""The conversion matrix: models as people write them, and what coverage.py makes of wrong ones."""

import copy
import importlib.util
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hand_written_networks import NETWORKS
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.conversion import fuse, unfuse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import coverage  # noqa: E402
from coverage_models import Case, cases  # noqa: E402

CASES = {case.label: case for case in cases()}
# Small, of every library, and not in test_torchvision_timm.py.
LIBRARY_MODELS = {
    "torchvision as backbone: create_feature_extractor(resnet18)": "torchvision",
    "timm resnet: test_resnet": "timm",
    "Hugging Face: ResNetModel, downsample_in_bottleneck": "transformers",
    "Hugging Face: RegNetForImageClassification": "transformers",
}
ONE = "hand-written networks: named_sequence"

Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """`python benchmarks/coverage.py ARGUMENTS` in this process; gives the exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks/coverage.py", "--jobs", "1", *arguments])
        return coverage.main()

    return run


def lines_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the name of the model."""
    rows = [line[2:-2] for line in text.splitlines() if line.startswith("| ")]
    lines = [re.split(r" (?<!\\)\| ", row) for row in rows]
    return {cells[0]: cells for cells in lines if cells[0] not in ("model", "---")}


@pytest.mark.parametrize("name", NETWORKS)
def test_hand_written_network(name: str) -> None:
    assert coverage.examine(CASES[f"hand-written networks: {name}"]).verdict == "ok"


@pytest.mark.parametrize(("label", "library"), LIBRARY_MODELS.items())
def test_library_model(label: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert coverage.examine(CASES[label]).verdict == "ok"


# What is fused in them


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tutorial_identity_downsample", {"Bottleneck": 3, "conv+BN+ReLU+max pool": 1}),
        ("tutorial_conform_layer", {"Bottleneck": 3, "conv+BN+ReLU+max pool": 1}),
        ("cifar_option_a_lambda", {"BasicBlock": 4}),
        ("cifar_option_a_inline", {"BasicBlock": 3, "conv+BN+ReLU, conv+BN+add+ReLU": 1}),
        ("cifar_preactivation", {"PreActBasicBlock": 3, "BN+ReLU": 1}),
        ("resnet9", {"conv+BN+ReLU": 5, "conv+BN+ReLU+max pool": 3}),
        ("sequential_chain", {"conv+BN+ReLU, conv+BN+ReLU+max pool": 1}),
        ("one_relu", {"BasicBlock": 2, "conv+BN+ReLU": 1}),
        ("deep_aggregation", {"BasicBlock": 2, "conv+BN+ReLU": 1, "conv+BN+add+ReLU": 1}),
        # Only what stands around the shared convolution or batch norm.
        ("norm_twice", {"add+ReLU": 1}),
        ("conv_twice", {"BN+ReLU, BN+add+ReLU": 1}),
        ("shared_across_blocks", {"conv+BN+ReLU": 1, "BN+ReLU": 2}),
        ("changed_in_place", {}),
    ],
)
def test_patterns(name: str, expected: dict[str, int]) -> None:
    rows = rf.explain(NETWORKS[name].build()).rows
    assert Counter(row.pattern for row in rows) == expected


# What must be noticed


class OffByALittle(nn.BatchNorm2d):
    """In `dtype`, in the given mode."""

    def __init__(self, norm: nn.BatchNorm2d, dtype: torch.dtype, training: bool) -> None:
        super().__init__(norm.num_features)
        self.__dict__ |= norm.__dict__
        self.wrong = (dtype, training)

    def forward(self, x: Tensor) -> Tensor:
        is_wrong = (x.dtype, self.training) == self.wrong
        return super().forward(x) * (1.0 + 1e-5 * is_wrong)


def off_by_a_little(dtype: torch.dtype, training: bool = False) -> Callable[[nn.Module], nn.Module]:
    def broken(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        for sequence in fused.modules():
            for name, child in sequence.named_children():
                if type(child) is nn.BatchNorm2d:
                    sequence.register_module(name, OffByALittle(child, dtype, training))
        return fused

    return broken


def raises(model: nn.Module) -> nn.Module:
    raise ValueError("no module | like this")


def own_parameters(model: nn.Module) -> nn.Module:
    return copy.deepcopy(fuse(model))


def other_keys(model: nn.Module) -> nn.Module:
    fused = fuse(model)
    fused.register_buffer("folded", torch.ones(1))
    return fused


def old_weights(model: nn.Module) -> nn.Module:
    """Weights prepared once and for all, for inference."""
    fused, kept = fuse(model), copy.deepcopy(model).eval()
    original = fused.forward
    fused.forward = lambda x: original(x) if torch.is_grad_enabled() else kept(x)
    return fused


def no_gradient(model: nn.Module) -> nn.Module:
    fused = fuse(model)
    original = fused.forward
    fused.forward = lambda x: original(x.detach()) + 0.0 * x.sum()
    return fused


def no_statistics(model: nn.Module) -> nn.Module:
    """Two steps at once."""
    fused = fuse(model)
    original = fused.forward
    fused.forward = lambda x: (original(x) + original(x)) / 2.0
    return fused


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (off_by_a_little(torch.float64), r"eval: \w+.* is off by \de-0\d in float64"),
        (off_by_a_little(torch.float64, True), r"train: \w+.* is off by \de-0\d in float64"),
        (off_by_a_little(torch.float32), r"eval: the outputs are off by \d.\de-05 in float32"),
        (off_by_a_little(torch.float32, True), r"train: the outputs are off by .* in float32"),
        (raises, r"ValueError: no module \\\| like this"),
        (own_parameters, "state_dict has other keys or tensors"),
        (other_keys, r"eval: other tensors: \['buffer folded'\].* state_dict has other keys"),
        (old_weights, "after load_state_dict, with one image more, eval: the outputs are off by"),
        (no_gradient, "eval: grad_x is off by"),
        (no_statistics, r"train: buffer \w+.* is off by"),
    ],
)
def test_broken_fuse(
    broken: Callable[[nn.Module], nn.Module],
    text: str,
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(rf, "fuse", broken)
    assert main("--filter", ONE, "--output", str(tmp_path / "out.md")) == 1
    document = (tmp_path / "out.md").read_text()
    assert re.search(text, lines_of(document)["named_sequence"][6])
    assert "1 models: 0 ok, 1 wrong, 0 skipped." in document


def other_class(model: nn.Module) -> nn.Module:
    plain = unfuse(model)
    plain.relu0 = nn.ReLU6()
    return plain


def other_numbers(model: nn.Module) -> nn.Module:
    plain = unfuse(model)
    plain.norm0.eps *= 1.1
    return plain


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (other_class, "unfuse gives other classes"),
        (other_numbers, "eval: unfuse gives other numbers; train: unfuse gives other numbers"),
        (lambda model: model, "unfuse gives other classes"),
    ],
)
def test_broken_unfuse(
    broken: Callable[[nn.Module], nn.Module], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rf, "unfuse", broken)
    assert text in coverage.examine(CASES[ONE]).verdict


# The command


def test_table_and_reasons(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "out.md"
    assert main("--filter", "blocks, left alone: a", "--output", str(path)) == 0
    (line,) = lines_of(path.read_text()).values()
    assert line[:6] == ["adds_into_input", "0", "0", "0", "-", "-"]
    assert line[6].startswith("skipped: the plain model does not run: RuntimeError: one of the")
    assert [p.name for p in path.parent.iterdir()] == ["out.md"]
    assert "1 models: 0 ok, 0 wrong, 1 skipped." in capsys.readouterr().out


def test_processes(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.md"
    assert main("--filter", "blocks: basic_", "--jobs", "2", "--output", str(path)) == 0
    lines = lines_of(path.read_text())
    expected = [c.name for c in cases() if "blocks: basic_" in c.label]
    assert list(lines) == expected
    for name, *cells in lines.values():
        fused, partly, alone, in_eval, in_train, verdict, reason = cells
        assert (fused, partly, alone, verdict, reason) == ("1", "0", "0", "ok", ""), name
        assert 0 < float(in_eval) < 1e-12
        assert 0 < float(in_train) < 1e-12
    assert f"[{len(expected)}/{len(expected)}]" in capsys.readouterr().out


def test_model_that_cannot_be_built() -> None:
    def build() -> nn.Module:
        raise ImportError("timm is not installed")

    result = coverage.examine(Case("timm", "resnet18", build))
    assert result.verdict == (
        "skipped: the plain model does not run: ImportError: timm is not installed"
    )


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_model_that_shows_nothing(value: float) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * value

    result = coverage.examine(Case("mine", "constant", Constant))
    assert result.verdict == "skipped: the plain model gives infinite numbers, or zeros"


def test_quick_takes_the_first_of_each_family() -> None:
    chosen = coverage.choose("timm", quick=True)
    assert len({case.family for case in chosen}) == len(chosen) > 5
    firsts = {case.family: case for case in reversed(coverage.choose("timm", quick=False))}
    assert {case.label for case in chosen} == {case.label for case in firsts.values()}


def test_interrupted(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(case: Case) -> coverage.Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(coverage, "examine", interrupt)
    (tmp_path / "out.md").write_text("as before")
    assert main("--filter", ONE, "--output", str(tmp_path / "out.md")) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["as before"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--filter", "resnet-51"),
            "--filter must be part of the name of a model, got 'resnet-51'",
        ),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
    ],
)
def test_usage(
    arguments: tuple[str, ...], text: str, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_what_is_skipped_comes_back_from_another_process() -> None:
    result = coverage.examine(CASES["hand-written blocks, left alone: adds_into_input"])
    assert result.skipped
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301


def test_the_document_lists_every_model_and_nothing_wrong() -> None:
    text = (ROOT / "docs" / "coverage.md").read_text()
    families = text.split("\n## ")[1:]
    verdicts = {
        f"{family.splitlines()[0]}: {name}": cells[6]
        for family in families
        for name, cells in lines_of(family).items()
    }
    assert verdicts.keys() == CASES.keys()
    assert all(v == "ok" or v.startswith("skipped: ") for v in verdicts.values())
    assert sum("timm" in label for label in CASES) >= 60
