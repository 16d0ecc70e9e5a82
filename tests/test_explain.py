"""What `explain` says: states, implementations, bytes per image, advice, as a table and as data."""

import dataclasses
import inspect
import json
from collections.abc import Callable

import pytest
import torch
from hand_written_blocks import (
    PROVABLE,
    UNPROVABLE,
    Basic,
    BasicOptionA,
    Excited,
    ProjectionAsAttributes,
)
from model_equality import images
from test_conversion import OBSTACLES, Pair, reason_for
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import _extension, backends, direct, models, native, onednn
from resnet_fused.conversion import explain, fuse, runtime_path
from resnet_fused.conversion.advice import COMPILE
from resnet_fused.conversion.explain import Row
from resnet_fused.conversion.table import Line, table
from resnet_fused.conversion.traffic import STEPS
from resnet_fused.nn import graph_steps

FUSE = "call resnet_fused.fuse(model)"
CHANNELS_LAST = "pass images in channels_last: x.to(memory_format=torch.channels_last)"
DOCTOR = "run python -m resnet_fused doctor: it says why no kernel of this library runs here on cpu"
HALF = torch.float16


def only_row(model: nn.Module, *example_input: Tensor) -> Row:
    (row,) = explain(model, *example_input).rows
    return row


# The table


def test_table_and_data() -> None:
    model = nn.Sequential(Pair(), UNPROVABLE["gelu"][0]())
    fuse(model[0][0], inplace=True)
    explanation = explain(model)
    lines = str(explanation).splitlines()
    names = ["path", "class", "state", "pattern", "backend", "dtype", "layout", "notes"]
    assert lines[0].split() == names
    assert [line.split("  ")[0] for line in lines[2:6]] == ["0.0", "0.1", "1", "1.downsample"]
    assert lines[4].endswith("  1")
    reason = "expected the last ReLU, found relu (GELU)"
    assert lines[6:] == [
        f"1: its forward is not a known one: {reason}",
        "Sequential: 2 can be fused, 1 can be fused in part, 1 fused (of 4).",
        *("To get more:", f"- {CHANNELS_LAST}", f"- {FUSE}"),
    ]
    data = explanation.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["model"] == "Sequential"
    assert data["advice"] == [CHANNELS_LAST, FUSE]
    states = ["fused", "can be fused", "can be fused in part", "can be fused"]
    assert [row["state"] for row in data["rows"]] == states
    assert data["rows"][0].keys() == {field.name for field in dataclasses.fields(Row)}
    assert data["rows"][0]["bytes_before"] is None
    assert data["totals"] == {
        "rows": 4,
        "states": {"fused": 1, "can be fused": 2, "can be fused in part": 1},
        **dict.fromkeys(["bytes_before", "bytes_after", "bytes_chained", "saved"]),
    }


def test_equal_neighbours_are_one_line() -> None:
    """Where their numbers follow each other, in any place of the path."""

    def line(path: str, count: int = 10**6, notes: tuple[str, ...] = ()) -> Line:
        return Line(path, ("Block", count), notes)

    paths = [f"stage1.{i}" for i in range(11)]
    paths += ["stage2.0", "stage2.1", "stage2.3", "stage03.0", "stage03.1", "stage5.0", "stage6.0"]
    paths += [f"{outer}.conv.paths.{inner}" for outer in (0, 1) for inner in (0, 1)]
    lines = [*map(line, paths), line("stage2.4", 5 * 10**5), line("stage2.5", notes=("a", "b"))]
    lines += [line("", notes=("b",))]
    assert table(["path", "class", "MB"], lines, total=True) == [
        "path                    class     MB  notes",
        "----------------------  -----  -----  -----",
        "stage1.0-10 (11)        Block  11.00",
        "stage2.0-1 (2)          Block   2.00",
        "stage2.3                Block   1.00",
        "stage03.0-1 (2)         Block   2.00",
        "stage5-6.0 (2)          Block   2.00",
        "0-1.conv.paths.0-1 (4)  Block   4.00",
        "stage2.4                Block   0.50",
        "stage2.5                Block   1.00  1, 2",
        "(model)                 Block   1.00  2",
        "total (25)                     24.50",
        "1: a",
        "2: b",
    ]


def test_lines_fit() -> None:
    """Of blocks with notes of every kind; a long pattern is cut, and stands below."""
    blocks = [rf.nn.Bottleneck(256, 64) for _ in range(3)]
    blocks[1].conv1.register_forward_hook(lambda *_: None)
    explanation = explain(nn.Sequential(*blocks), torch.empty(1, 256, 4, 4))
    lines = str(explanation).splitlines()
    assert max(map(len, lines)) <= 160
    notes = [line for line in lines if line[1:].startswith(": ")]
    assert [note[3:].split(" ")[0] for note in notes] == ["chain:", "conv1", "pattern:"]
    assert notes[2] == f"3: pattern: {explanation.rows[1].pattern}"
    assert lines[3].endswith("  2, 3")
    assert f"  {explanation.rows[1].pattern[:33]}...  " in lines[3]
    assert max(map(len, lines[lines.index(notes[0]) :])) <= 100


def test_without_blocks() -> None:
    assert str(explain(nn.Linear(2, 2))) == (
        "Linear has no residual blocks that this library knows: nothing to fuse."
    )
    assert explain(nn.Linear(2, 2)).totals.saved is None


def test_own_models_are_fused_already() -> None:
    explanation = explain(models.resnet20())
    assert len(explanation.rows) == 9
    assert all(row.fused for row in explanation.rows)
    assert explain(models.resnet18()).summary == "ResNet: 9 fused (of 9)."


def test_later_hooks_are_told() -> None:
    fused = fuse(Pair())
    assert [row.state for row in explain(fused).rows] == ["fused", "fused"]
    handle = fused[1].conv1.register_forward_hook(lambda *_: None)
    assert "conv1 has a forward hook" in reason_for(fused, "1")
    handle.remove()
    assert explain(fused).rows[1].fused


def test_projections_without_a_module_are_named_in_chains() -> None:
    class Deep(rf.nn.Bottleneck):
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.side, self.side_bn = nn.Conv2d(64, 256, 1), nn.BatchNorm2d(256)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.relu(self.bn2(self.conv2(y)))
            return self.relu(self.bn3(self.conv3(y)) + self.side_bn(self.side(x)))

    row = only_row(Deep(), torch.empty(1, 64, 4, 4))
    assert row.chain == "conv3+side+add"
    assert row.bytes_after - row.bytes_chained == 4 * 2 * 256 * 16  # the shortcut


# Which implementation


@pytest.fixture
def kernels_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with oneDNN for float32 and bfloat16, direct convolutions for float32, kernels."""
    monkeypatch.setattr(native, "unsupported_on_cpu", lambda device_type, dtype: None)
    monkeypatch.setattr(_extension, "load", lambda: True)
    fast = (torch.float32, torch.bfloat16)
    monkeypatch.setattr(onednn, "runs", lambda dtype, elements: dtype in fast)
    monkeypatch.setattr(direct, "runs", lambda dtype: dtype == torch.float32)


def path_of(model: nn.Module) -> tuple[str, ...]:
    row = explain(model).rows[0]
    return row.backend, row.convolutions, row.dtype, row.layout


@pytest.mark.skipif(not _extension.load(), reason="the compiled extension is not available")
@pytest.mark.usefixtures("kernels_of_cpus")
def test_implementations_on_cpus() -> None:
    place = "as its input"
    block = Basic(32, 32, 1)
    assert path_of(block) == ("cpu", "direct", "float32", place)
    assert path_of(Basic(8, 8, 1)) == ("cpu", "oneDNN", "float32", place)
    assert path_of(block.bfloat16()) == ("cpu", "oneDNN", "bfloat16", place)
    block.bn1.float()
    assert path_of(block) == ("cpu", "oneDNN", "mixed", place)
    assert path_of(block.double()) == ("cpu", "PyTorch", "float64", place)
    assert path_of(Basic(8, 8, 1).half())[:2] == ("cpu", "PyTorch")
    assert path_of(UNPROVABLE["branches"][0]())[:2] == ("PyTorch", "PyTorch")
    assert path_of(rf.nn.PreActBasicBlock(32, 32))[:2] == ("cpu", "oneDNN")
    assert path_of(Basic(32, 32, 1).to("meta")) == ("", "", "float32", place)
    with rf.backend("reference"):
        assert path_of(block.float()) == ("reference", "PyTorch", "float32", place)
    with rf.backend("triton"):
        assert path_of(block)[:2] == ("PyTorch", "PyTorch")


@pytest.mark.parametrize(
    ("chosen", "is_available", "expected"),
    [
        ("reference", True, "cuDNN"),
        ("reference", False, "PyTorch"),
        ("cuda", True, "cuda"),
        ("triton", True, "triton"),
    ],
)
def test_convolutions_on_gpus(
    chosen: str, is_available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "chosen", lambda *_: chosen)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: is_available)
    assert runtime_path._convolutions("cuda", torch.bfloat16, is_direct=True) == expected


def test_an_add_is_where_its_module_is() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.tanh(torch.relu(self.first(x) + self.second(x))))

    row = only_row(Adds().double().to("meta"))
    assert (row.pattern, row.backend, row.dtype) == ("add+ReLU", "", "float64")


def test_layout_inside_networks() -> None:
    for model in (models.resnet20(), models.preact_resnet20(), nn.Sequential(models.resnet18())):
        assert {row.layout for row in explain(model).rows} == {"channels_last"}
    mixed = nn.Sequential(models.resnet18(), Basic(8, 8, 1))
    assert [row.layout for row in explain(mixed).rows[-2:]] == ["channels_last", "as its input"]


def grouped_in_one_block() -> nn.Module:
    """A block without a plan, so that the others run one by one."""
    model = models.CifarResNet(1, shortcut="B")
    model.layer2[0].conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)
    model.layer3.append(rf.nn.BasicBlock(64, 64))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.ResNet(rf.nn.BasicBlock, (1, 1, 1, 1), num_classes=3),
        lambda: models.ResNet(rf.nn.Bottleneck, (1, 1, 1, 1), 3, groups=4, width_per_group=8),
        lambda: models.CifarResNet(1, shortcut="B"),
        lambda: models.CifarResNet(2),
        grouped_in_one_block,
        lambda: fuse(nn.Sequential(Basic(64, 64, 1), Basic(64, 64, 1))),
    ],
    ids=["resnet", "grouped", "small", "small_option_a", "one_grouped", "blocks"],
)
def test_direct_convolutions_run_where_they_are_named(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (_extension.load() and direct.runs(torch.float32)):
        pytest.skip("this CPU or build has no direct convolutions")
    model, ran, run = make().eval(), [], direct.run

    def count(x: Tensor, blocks: list[object], stem: object) -> Tensor:
        ran.extend([*blocks, *([stem] if stem is not None else [])])
        return run(x, blocks, stem)

    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    x = images(1, channels, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(2):  # the first call makes the plans
            model(x)
        monkeypatch.setattr(direct, "run", count)
        model(x)
    assert len(ran) == sum(row.convolutions == "direct" for row in explain(model).rows)


# Bytes


def bytes_of(row: Row) -> tuple[int | None, int | None]:
    return row.bytes_before, row.bytes_after


def test_bytes_per_image() -> None:
    model = nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1))
    model[0].register_forward_hook(lambda *_: pytest.fail("the user's hook ran"))
    unfused, fused = (
        explain(model, torch.empty(5, 8, 8, 8)),
        explain(fuse(model), images(5, 8, 8, 8)),
    )
    x, y = 8 * 64, 16 * 16  # elements of the input and of every other activation
    first = (x + y) + (y + y) + (x + y)  # three convolutions
    eager = first + 3 * 2 * y + 2 * 2 * y + 3 * y  # three norms, two ReLUs, the add
    second, eager_second = 4 * y, 4 * y + 2 * 2 * y + 2 * 2 * y + 3 * y
    before, after = 4 * (eager + eager_second), 4 * (first + y + second + y)
    for explanation in (unfused, fused):
        assert [row.bytes_before for row in explanation.rows] == [4 * eager, 4 * eager_second]
        assert [row.bytes_after for row in explanation.rows] == [4 * (first + y), 4 * (second + y)]
        totals = explanation.totals
        assert (totals.bytes_before, totals.bytes_after) == (before, after)
        assert totals.saved == pytest.approx(1 - after / before)
    assert f"{before / 1e6:.2f} MB unfused" in fused.summary
    assert f"({1 - after / before:.0%} less)" in fused.summary
    assert "MB fused" in str(fused).splitlines()[0]
    half = explain(model, torch.empty(1, 8, 8, 8, dtype=HALF))
    assert half.rows[0].bytes_before == 2 * eager
    assert model[0].conv1.weight.device.type == "cpu"


class Steps(nn.Module):
    """Groups of every kind, none of which make a block; a path that is not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.bn = nn.BatchNorm2d(8)
        self.conv, self.conv_bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.pool(F.relu(self.stem_bn(self.stem(x))))
        y = torch.sigmoid(F.relu(self.bn(x)))
        y = torch.sigmoid(F.relu(self.bn_residual(y, x)))
        return {"out": F.relu(self.conv_bn(self.conv(y)) + x[:, :4])}

    def bn_residual(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(y) + x


def test_bytes_of_groups_of_layers() -> None:
    model = Steps()
    x, y, pooled, last = 3 * 64, 8 * 64, 8 * 16, 4 * 16
    stem = x + y, y + pooled
    before = sum(stem) + 2 * y + 2 * y
    before += (2 + 2) * pooled + (3 + 2) * pooled
    before += pooled + last + (2 + 3 + 2) * last
    after = sum(stem) + 2 * pooled + 3 * pooled + pooled + 2 * last
    example = torch.empty(3, 3, 8, 8)
    for either in (model, fuse(model)):
        outer, unused = explain(either, example).rows
        kinds = "conv+BN+ReLU+max pool, BN+ReLU, add+ReLU, conv+BN+add+ReLU"
        assert (outer.pattern, unused.path) == (kinds, "unused")
        assert bytes_of(outer) == (4 * before, 4 * after)
        assert bytes_of(unused) == (None, None)
    assert explain(model, example).totals.bytes_after == 4 * after


def test_every_step_is_counted() -> None:
    public = {
        name
        for name, function in vars(graph_steps).items()
        if inspect.isfunction(function) and function.__module__ == graph_steps.__name__
    }
    assert {name for name in public if not name.startswith("_")} == {*STEPS}


def test_bytes_of_what_is_fused_in_part_are_those_of_its_groups() -> None:
    """What stands between them is not counted."""
    row = only_row(Excited(), torch.empty(1, 8, 8, 8))
    assert row.pattern == "conv+BN+ReLU, conv+BN, conv+BN+add+ReLU"
    x, y = 8 * 64, 16 * 16
    convs = 2 * (x + y) + 2 * y
    assert bytes_of(row) == (4 * (convs + (4 + 2 + 7) * y), 4 * (convs + y))


def test_bytes_of_shortcuts() -> None:
    """Counted with the block where it computes them, else in a row of their own, or never."""
    example = torch.empty(1, 8, 8, 8)
    as_module, as_attributes = Basic(), ProjectionAsAttributes()
    expected = bytes_of(only_row(as_module, example))
    assert bytes_of(only_row(as_attributes, example)) == expected
    pooled = Basic()
    pooled.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    block, shortcut = explain(pooled, example).rows
    y, x = 16 * 16, 8 * 64
    assert bytes_of(shortcut) == (4 * (x // 4 + 3 * y), 4 * (x // 4 + y))
    before, after = expected
    assert bytes_of(block) == (before - 4 * (x + 3 * y), after - 4 * (x + y))
    assert bytes_of(only_row(BasicOptionA(), example)) == bytes_of(block)
    outer = models.PreActCifarResNet(rf.nn.PreActBasicBlock, 1, shortcut="A")
    row = next(r for r in explain(outer, torch.empty(1, 3, 8, 8)).rows if r.path == "layer2.0")
    x, y = 16 * 64, 32 * 16
    after = (x + y) + (y + y) + 3 * y + 2 * x
    assert bytes_of(row) == (4 * (after - 2 * x + 4 * (x + y)), 4 * after)


def test_bytes_of_every_call() -> None:
    block = Basic(8, 8, 1)
    once, twice = (only_row(nn.Sequential(*[block] * n), torch.empty(2, 8, 4, 4)) for n in (1, 2))
    assert bytes_of(twice) == tuple(2 * count for count in bytes_of(once))


@pytest.mark.parametrize("name", PROVABLE)
def test_fusing_saves_bytes_and_keeps_the_count(name: str) -> None:
    model, example = PROVABLE[name](), torch.empty(1, 8, 8, 8)
    row = explain(model, example).rows[0]
    assert row.bytes_before > row.bytes_after > 0
    assert bytes_of(explain(fuse(model), example).rows[0]) == bytes_of(row)


def test_bytes_of_own_models() -> None:
    explanation = explain(models.resnet18(), torch.empty(1, 3, 64, 64))
    assert all(row.bytes_before > 2 * row.bytes_after for row in explanation.rows)
    x, y, pooled = 3 * 64 * 64, 64 * 32 * 32, 64 * 16 * 16
    pooling = y + pooled
    assert bytes_of(explanation.rows[0]) == (4 * (x + 5 * y + pooling), 4 * (x + y + pooling))


def test_bytes_for_an_input_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="example_input must be an input of the model, got shape"):
        explain(Pair(), torch.empty(1, 3, 8, 8))

    class Two(Basic):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    with pytest.raises(ValueError, match=r"dry run fails \(TypeError: .* argument: 'y'\)"):
        explain(Two(), torch.empty(1, 8, 8, 8))
    with pytest.raises(TypeError, match="explain: example_input must be a tensor, got tuple"):
        explain(Pair(), (1, 8, 8, 8))


@pytest.mark.parametrize("outer", [nn.Sequential, lambda block: block], ids=["inside", "alone"])
def test_scripted_modules_are_not_touched(outer: Callable[[nn.Module], nn.Module]) -> None:
    scripted = torch.jit.script(Basic(8, 8, 1))
    row = only_row(outer(scripted), torch.empty(1, 8, 8, 8))
    assert (row.state, row.bytes_before) == ("left alone", None)
    assert {tensor.device.type for tensor in scripted.state_dict().values()} == {"cpu"}
    assert scripted.training


# Advice

# None: nothing that would keep the model the same helps.
_HOOK = "remove the hook on {}, or hook the whole block"
_COMPUTED = (
    "make the weight of {} a parameter before fuse: torch.nn.utils.prune.remove, "
    "remove_weight_norm or remove_spectral_norm"
)
_PARAMETRIZED = (
    "remove the parametrization of {} before fuse: "
    "torch.nn.utils.parametrize.remove_parametrizations"
)
_PLAIN = "use torch.nn's own layer for {}, if it computes the same"
_LAZY = "run the model once, then fuse: {} is lazy"
REMEDIES: dict[str, str | None] = {
    "forward_hook": _HOOK.format("0.conv1"),
    "forward_pre_hook": _HOOK.format("0.bn2"),
    "backward_hook": _HOOK.format("0.conv2"),
    "backward_pre_hook": _HOOK.format("0.bn1"),
    "hook_on_relu": _HOOK.format("0.relu"),
    "parametrization": _PARAMETRIZED.format("0.conv1"),
    "weight_norm": _PARAMETRIZED.format("0.conv2"),
    "old_weight_norm": _COMPUTED.format("0.conv2"),
    "old_spectral_norm": _COMPUTED.format("0.conv2"),
    "pruning": _COMPUTED.format("0.conv1"),
    "own_conv": _PLAIN.format("0.conv1"),
    "own_norm": _PLAIN.format("0.bn1"),
    "own_sync_norm": _PLAIN.format("0.bn2"),
    "padding_mode": None,
    "padding_same": "write the padding of 0.conv2 as a number",
    "lazy_conv": _LAZY.format("0.conv1"),
    "lazy_norm": _LAZY.format("0.bn1"),
    "complex_weight": None,
    "forward_on_the_instance": "define the forward of 0 in its class",
    "forward_on_a_layer": "remove the forward that is set on the instance 0.conv1",
    "conv_under_two_names": "give each place of 0.conv1 a layer of its own, under one name",
    "adds_into_input": "add the shortcut to the result of the layers in 0",
    "scaled": None,
    "no_last_relu": None,
    "gelu": None,
    "squeeze_and_excitation": None,
    "drops_in_training": str(COMPILE),
    "returns_two": None,
    "counts": "do not store anything in the forward of 0 (a hook can)",
    "records": "do not store anything in the forward of 0 (a hook can)",
    "branches": str(COMPILE),
    "raises": str(COMPILE),
    "one_norm_twice": "give each call of 0.bn1 a layer of its own",
    "extra_work": None,
    "four_convolutions": None,
    "no_shortcut": None,
}


def remedies(model: nn.Module, path: str) -> list[str]:
    """The advice on a block, without what concerns every block."""
    row = next(row for row in explain(model).rows if row.path == path)
    return [text for text in row.advice if text not in (FUSE, CHANNELS_LAST, DOCTOR)]


@pytest.mark.parametrize("name", [*OBSTACLES, *UNPROVABLE])
def test_every_reason_has_its_remedy(name: str) -> None:
    block = UNPROVABLE[name][0]() if name in UNPROVABLE else Basic()
    if name in OBSTACLES:
        OBSTACLES[name][0](block)
    expected = REMEDIES[name]
    assert remedies(nn.Sequential(block), "0") == ([] if expected is None else [expected])


def test_remedies_of_other_reasons() -> None:
    class Drops(Basic):
        def __init__(self) -> None:
            super().__init__(8, 8, 1)
            self.drop_path = nn.Dropout2d(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop_path(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return self.relu(y + x)

    class InPlace(Basic):
        def __init__(self) -> None:
            super().__init__()
            self.downsample = nn.Sequential(nn.ReLU(inplace=True), self.downsample)

    class Prints(Basic):
        def forward(self, x: Tensor) -> Tensor:
            print("here")
            return super().forward(x)

    class Makes(Basic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.ones(1)

    class Special(Tensor):
        pass

    foreign = Basic()
    foreign.conv1._parameters["weight"] = foreign.conv1.weight.detach().as_subclass(Special)
    shared = Pair()
    shared[1].bn1 = shared[0].bn2
    quantized = nn.Sequential(Basic(), torch.ao.quantization.QuantStub())
    for model, path, expected in (
        (torch.jit.script(Basic()), "", "fuse before torch.jit.script or torch.jit.trace"),
        (torch.fx.symbolic_trace(nn.Sequential(Basic())), "0", "fuse before tracing with torch.fx"),
        (quantized, "0", "fuse the float model, before it is made for quantization"),
        (shared, "1", "give each place of 1.bn1 a layer of its own, under one name"),
        (InPlace(), "", "set inplace=False in downsample"),
        (Prints(), "", "take the print out of the forward of the model"),
        (Makes(), "", "register the tensor that the forward of the model makes as a buffer"),
        (foreign, "", "make the tensors of conv1 plain parameters or buffers"),
        (Drops(), "", "for inference, exchange the drop path of the model for Identity()"),
    ):
        assert remedies(model, path) == [expected]


def test_advice_is_given_once_for_all_blocks() -> None:
    model = nn.Sequential(*(Basic(8, 8, 1) for _ in range(5)))
    for block in model:
        block.conv1.register_forward_hook(lambda *_: None)
    explanation = explain(fuse(model, inplace=True), images(1, 8, 4, 4))
    text = "remove the hook on 0.conv1, 1.conv1, 2.conv1 and 2 more, or hook the whole block"
    assert explanation.advice[0] == text
    assert str(explanation).endswith(f"To get more:\n- {text}\n- {CHANNELS_LAST}")
    assert explanation.rows[4].advice[0] == "remove the hook on 4.conv1, or hook the whole block"


def test_networks_that_no_block_is_found_in() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)) if x.mean() > 0 else x

    assert str(explain(Untraceable())).endswith(f"nothing to fuse.\nTo get more:\n- {COMPILE}")
    assert explain(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())).advice == ()


@pytest.mark.skipif(not _extension.load(), reason="the compiled extension is not available")
@pytest.mark.usefixtures("kernels_of_cpus")
def test_advice_on_dtypes_formats_and_backends() -> None:
    block = fuse(Basic(8, 8, 1))
    x = torch.empty(1, 8, 8, 8)
    assert only_row(block).advice == only_row(block, x).advice == (CHANNELS_LAST,)
    assert only_row(block, x.to(memory_format=torch.channels_last)).advice == ()
    assert explain(models.resnet20()).advice == ()
    slow = "use float32 or bfloat16: this CPU has no fused convolutions in {}"
    assert only_row(block.bfloat16()).advice == (CHANNELS_LAST,)
    assert only_row(block.half()).advice == (slow.format("float16"), CHANNELS_LAST)
    assert only_row(block.double()).advice == (slow.format("float64"),)
    with rf.backend("triton"):
        refused = "backend 'triton' was asked for, but it runs on cuda tensors, got cpu"
        assert only_row(block).advice[0].startswith(f"ask for another backend: bn_relu: {refused}")


def test_advice_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable = lambda device_type, dtype: "the extension is missing"  # noqa: E731
    for name in ("bn_relu", "conv_bn_relu"):
        monkeypatch.setattr(
            backends,
            "_IMPLEMENTATIONS",
            backends._IMPLEMENTATIONS
            | {
                name: {
                    kind: each._replace(unsupported=unavailable) if kind != "reference" else each
                    for kind, each in backends._IMPLEMENTATIONS[name].items()
                }
            },
        )
    monkeypatch.setattr(_extension, "load", lambda: False)
    for cached in (backends._chosen, backends._is_accelerated, backends._warn_slow):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the compiled extension is not available"):
            row = only_row(fuse(Basic(8, 8, 1)))
    finally:
        monkeypatch.undo()
        for cached in (backends._chosen, backends._is_accelerated, backends._warn_slow):
            cached.cache_clear()
    assert (row.backend, row.convolutions) == ("PyTorch", "PyTorch")
    assert row.advice[0] == DOCTOR
