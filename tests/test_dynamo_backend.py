"""torch.compile(backend="resnet_fused"): the same numbers, fused operators in captured graphs."""

import copy
import importlib.metadata
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written_blocks import Basic, BottleneckCloned, PreActivation
from model_equality import assert_same_function, images, randomize, step
from numerics import assert_as_accurate_as_eager
from torch import Tensor, fx, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.conversion.dynamo import resnet_fused as backend

ROOT = Path(__file__).resolve().parent.parent
X = images(3, 8, 9, 7)
CAST = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """An inner backend that runs graphs as they are and counts this library's operators."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        module.graph.lint()
        targets = (str(node.target).split(".") for node in module.graph.nodes)
        self.graphs.append(dict(Counter(name[1] for name in targets if name[0] == "resnet_fused")))
        return module.forward


def compiled(model: Any, inner: Any = "eager", **settings: Any) -> Any:
    return torch.compile(model, backend="resnet_fused", options={"inner": inner}, **settings)


def fused_in(function: Any, x: Tensor) -> list[dict[str, int]]:
    """The operators in the graphs of a call, which must do as eager does."""
    recorder, plain = Recorder(), copy.deepcopy(function)
    actual, expected = compiled(function, recorder)(x.clone()), plain(x.clone())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if isinstance(function, nn.Module):
        torch.testing.assert_close(dict(function.named_buffers()), dict(plain.named_buffers()))
    return recorder.graphs


class Network(nn.Module):
    """Layers in a row, in a forward that is not PyTorch's own: that one Dynamo would skip."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Stem(Network):
    def __init__(self) -> None:
        layers = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        super().__init__(*layers, nn.MaxPool2d(3, 2, 1))


class Functional(nn.Module):
    """Layers without modules, arguments by name, batch norms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(images(8, 4, 3, 3) / 6)
        self.scale, self.shift = nn.Parameter(images(8) / 9 + 1), nn.Parameter(images(8) / 9)
        self.register_buffer("mean", images(8) / 9)
        self.register_buffer("var", images(8).abs() + 0.5)
        self.unaffine = nn.BatchNorm2d(8, affine=False)
        self.untracked = nn.BatchNorm2d(8, track_running_stats=False, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, padding="same", groups=2)
        vectors = {"weight": self.scale, "bias": self.shift}
        y = torch.relu(F.batch_norm(y, self.mean, self.var, training=self.training, **vectors))
        z = self.untracked(torch.conv2d(y, self.kernel, None, 1, 1, groups=2)).relu_()
        return F.relu(self.unaffine(z).add_(x)) + y


class Unreadable(nn.Module):
    """A forward that no tracer of modules reads: a type is asked for, and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = Stem(), Basic(8, 8, 1)
        self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, bias=False)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = torch.cat(x) if isinstance(x, list) else x
        x = self.block(self.stem(x))
        if x.mean() > 10:
            return x
        return x + self.conv(F.relu(self.norm(torch.cat([x, -x], 1))))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: Network(Stem(), PreActivation(), BottleneckCloned(), Basic()),
    "functional": Functional,
    "unreadable": Unreadable,
}
OPERATORS = {
    "blocks": [{"bn_relu": 8, "bn_relu_max_pool": 1}],
    "functional": [{"bn_relu": 3}],
    "unreadable": [{"bn_relu": 2, "bn_relu_max_pool": 1}, {"bn_relu": 1}],
}


# Same function


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_computes_the_same(name: str, training: bool) -> None:
    recorder = Recorder()

    def convert(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        model.compile(backend="resnet_fused", options={"inner": recorder})
        return model

    x = X.contiguous(memory_format=torch.channels_last)
    assert_same_function(randomize(BLOCKS[name]()), convert, x, training)
    assert recorder.graphs == 2 * OPERATORS[name]


def test_fuse_leaves_the_unreadable_model_to_the_backend() -> None:
    assert type(resnet_fused.fuse(Unreadable())) is Unreadable


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "mixed"])
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_folds(autocast: bool, layout: str) -> None:
    block, x = randomize(Network(Stem(), Basic())).eval(), X
    if layout != "nchw":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "mixed":  # eager convolves into channels_last, what is folded follows x
        block, x = block.to(memory_format=torch.channels_last), X
    recorder = Recorder()
    with torch.no_grad(), CAST if autocast else nullcontext():
        expected, exact = block(x), copy.deepcopy(block).double()(x.double())
        actual = compiled(block, recorder, fullgraph=True)(x)
    folded = {"conv_bn_relu": 4} if layout != "mixed" else {"conv_bn_relu": 3, "bn_relu": 1}
    assert recorder.graphs == [folded]
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    assert_as_accurate_as_eager(actual, expected, exact)


def test_training_under_autocast() -> None:
    block, recorder = randomize(Network(Stem(), Basic())), Recorder()
    exact = step(copy.deepcopy(block).double(), X.double(), training=True)
    with CAST:
        expected = step(copy.deepcopy(block), X, training=True)
        block.compile(backend="resnet_fused", options={"inner": recorder}, fullgraph=True)
        actual = step(block, X, training=True)
    assert recorder.graphs == [{"bn_relu_max_pool": 1, "bn_relu": 3}]
    for name in exact:
        if exact[name].is_floating_point() and "0.layers.0.bias" not in name:  # which is 0
            assert_as_accurate_as_eager(actual[name], expected[name], exact[name], factor=2.0)


def test_frozen_batch_norms_fold_with_gradients() -> None:
    block, recorder = randomize(Basic()).eval(), Recorder()
    for norm in (block.bn1, block.bn2):
        norm.requires_grad_(False)
    exact = step(copy.deepcopy(block).double(), X.double(), training=False)
    block.compile(backend="resnet_fused", options={"inner": recorder})
    actual = step(block.double(), X.double(), training=False)
    assert recorder.graphs == [{"conv_bn_relu": 2, "bn_relu": 1}]  # the shortcut's has gradients
    torch.testing.assert_close(actual, exact)


def test_batches_of_any_size_share_one_graph() -> None:
    block, recorder = randomize(Network(Stem(), Basic())), Recorder()
    function, plain = compiled(block, recorder, fullgraph=True, dynamic=True), copy.deepcopy(block)
    for n in (3, 5, 7, 2):
        torch.testing.assert_close(function(images(n, 8, 9, 7)), plain(images(n, 8, 9, 7)))
    assert recorder.graphs == [{"bn_relu_max_pool": 1, "bn_relu": 3}]


def test_compiled_by_inductor() -> None:
    block = randomize(Network(Stem(), PreActivation()))
    plain, function = copy.deepcopy(block), torch.compile(block, backend="resnet_fused")
    for _ in range(2):
        actual, expected = function(X), plain(X)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        actual.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(dict(block.named_buffers()), dict(plain.named_buffers()))
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)


# What is left alone


NORM = {"weight": images(8).abs() + 0.5, "bias": images(8, seed=1)}
STATISTICS = images(8, seed=2), images(8, seed=3).abs() + 0.5
KERNEL = images(8, 8, 3, 3, seed=4) / 8


def normalised(x: Tensor, **settings: Any) -> Tensor:
    return F.batch_norm(x, *STATISTICS, **NORM, **settings)


def broadcasts(x: Tensor) -> Tensor:
    return F.relu(normalised(x) + x[:1])


def promotes(x: Tensor) -> Tensor:
    return F.relu(normalised(x) + x.double())


def adds_vectors(x: Tensor) -> Tensor:
    return F.relu(x.flatten(1) + x.flatten(1))


def scales_the_sum(x: Tensor) -> Tensor:
    return F.relu(torch.add(normalised(x), x, alpha=2))


def reads_the_sum_again(x: Tensor) -> Tensor:
    y = normalised(x) + x
    return F.relu(y) + y


def writes_meanwhile(x: Tensor) -> Tensor:
    y = normalised(x)
    x.mul_(2)
    return F.relu(y) + x


def writes_meanwhile_through_a_view(x: Tensor) -> Tensor:
    y, view = normalised(x), x.view(-1)
    torch._foreach_mul_([view], 2)
    return F.relu(y) + x


def reads_statistics_meanwhile(x: Tensor) -> Tensor:
    mean, var = (vector.clone() for vector in STATISTICS)
    y = F.batch_norm(x, mean, var, training=True)
    seen = mean * 2
    return F.relu(y) + seen[:, None, None]


def updates_twice(x: Tensor) -> Tensor:
    mean, var = (vector.clone() for vector in STATISTICS)
    first = F.batch_norm(x, mean, var, training=True)
    second = F.batch_norm(x * 2, mean, var, training=True).sigmoid()
    return torch.cat([F.relu(first) + second, (mean + var)[None, :, None, None] + x])


def switches_autocast(x: Tensor) -> Tensor:
    with CAST:
        y = normalised(torch.conv2d(x, KERNEL) * 2)
    return F.relu(y)


def casts_inside(x: Tensor) -> Tensor:
    with CAST:  # as the operator that folds is not told where it is tried out
        return F.relu(normalised(torch.conv2d(x, KERNEL)))


def switches_gradients(x: Tensor) -> Tensor:
    y = normalised(x)
    with torch.no_grad():
        return F.relu(y)


def pools_apart(x: Tensor) -> Tensor:
    y = F.relu(normalised(torch.conv2d(x, KERNEL), training=True))
    return F.max_pool2d(y, 2, dilation=2)


def pools_up(x: Tensor) -> Tensor:
    y = F.relu(normalised(torch.conv2d(x, KERNEL), training=True))
    return F.max_pool2d(y, 3, 2, ceil_mode=True)


def pools_side_by_side(x: Tensor) -> Tensor:
    y = F.relu(normalised(torch.conv2d(x, KERNEL), training=True))
    return F.max_pool2d(y, 2)


def uses_the_convolution_twice(x: Tensor) -> Tensor:
    y = torch.conv2d(x, KERNEL)
    return F.relu(normalised(y)) + y


def pads_by_name(x: Tensor) -> Tensor:
    return F.relu(normalised(torch.conv2d(x, KERNEL, padding="same")))


def clamps(x: Tensor) -> Tensor:
    return F.relu6(normalised(x))


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        *((broadcasts, {}), (promotes, {}), (adds_vectors, {}), (scales_the_sum, {})),
        *((reads_the_sum_again, {}), (writes_meanwhile, {}), (clamps, {})),
        *((writes_meanwhile_through_a_view, {}), (reads_statistics_meanwhile, {})),
        *((updates_twice, {}), (switches_autocast, {}), (switches_gradients, {})),
        (casts_inside, {"bn_relu": 1}),
        *((pools_apart, {"bn_relu": 1}), (pools_up, {"bn_relu": 1})),
        (pools_side_by_side, {"bn_relu_max_pool": 1}),
        *((uses_the_convolution_twice, {"bn_relu": 1}), (pads_by_name, {"bn_relu": 1})),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_only_what_is_the_same_is_fused(
    function: Callable[[Tensor], Tensor], operators: dict[str, int]
) -> None:
    assert fused_in(function, X) == [operators]


def double(seed: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return seed * 2


@pytest.mark.parametrize("overload", [False, True])
def test_operators_of_others_that_write(overload: bool) -> None:
    with torch.library._scoped_library("dynamo_backend_test", "DEF") as library:
        library.define("double(Tensor seed, Tensor(a!) x) -> Tensor")
        library.impl("double", double, "CompositeExplicitAutograd")
        operator = torch.ops.dynamo_backend_test.double
        operator = operator.default if overload else operator

        def function(x: Tensor) -> Tensor:
            y = normalised(x)
            return operator(NORM["bias"], x)[:, None, None] + F.relu(y) + x

        assert fused_in(function, X) == [{}]


def test_wider_residual_under_autocast() -> None:
    def function(x: Tensor) -> Tensor:
        y = normalised(torch.conv2d(x, KERNEL, padding=1))
        y += x
        return F.relu(y)

    with CAST:
        assert fused_in(function, X) == [{"conv_bn_relu": 1}]


def test_nothing_is_fused_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet_fused.backends, "available", lambda *_: ["reference", "cuda"])
    assert fused_in(pools_apart, X) == [{}]


def test_momentum_that_is_computed() -> None:
    block = randomize(Network(nn.BatchNorm2d(8, momentum=None), nn.ReLU()))
    assert not any(fused_in(block, X))  # there Dynamo ends a graph, or captures none
    assert fused_in(block.eval(), X) == [{"bn_relu": 1}]


def test_sync_batch_norm_of_one_process() -> None:
    norm = randomize(nn.SyncBatchNorm(8))
    assert fused_in(Network(norm, nn.ReLU()), X) == [{"bn_relu": 1}]


# How it is asked for


def test_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "resnet_fused"), torch.no_grad():
        compiled(Basic().eval())(X)
        compiled(torch.sin)(X)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("torch.compile: 3 groups of layers fused (")
    assert texts[1] == "torch.compile: 0 groups of layers fused"


def test_unknown_options() -> None:
    function = torch.compile(torch.sin, backend="resnet_fused", options={"outer": "eager"})
    with pytest.raises(Exception, match=r"resnet_fused: options must be 'inner' or .* got 'outer'"):
        function(X)
    with pytest.raises(Exception, match="Invalid backend: 'none'"):
        compiled(torch.sin, "none")(X)


def test_options_and_modes_reach_the_inner_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[Any] = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda module, _, **given: seen.append(given) or module.forward
    )
    settings = {"options": {"epilogue-fusion": False}, "mode": "reduce-overhead"}
    backend(fx.symbolic_trace(clamps), [X], **settings)  # torch.compile takes one of them
    assert seen == [{"config_patches": {"epilogue_fusion": False, "triton.cudagraphs": True}}]
    inner = lambda module, _, **given: seen.append(given) or module.forward  # noqa: E731
    backend(fx.symbolic_trace(clamps), [X], options={"inner": inner, "a": 1}, mode="b")
    assert seen[1] == {"mode": "b", "options": {"a": 1}}


@pytest.mark.parametrize("training", [False, True])
def test_inference_is_left_to_inductor(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    recorder, block = Recorder(), Basic()
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *given, **_: recorder(*given))
    with torch.set_grad_enabled(training):
        torch.compile(block.train(training), backend="resnet_fused")(X)
    assert recorder.graphs == [{"bn_relu": 3} if training else {}]


RUN = """
import torch
model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())
function = torch.compile(model, backend="resnet_fused", options={"inner": "eager"})
print(function(torch.ones(2, 4, 3, 3)).shape)
assert "resnet_fused" in torch._dynamo.list_backends()
"""


def test_the_name_is_known() -> None:
    """In a source tree once the package is imported, and where its entry point is installed."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"entry-points.torch_dynamo_backends\]\nresnet_fused = \"(.*)\"\n", text)
    assert found is not None
    entry = importlib.metadata.EntryPoint("resnet_fused", found[1], "torch_dynamo_backends")
    assert entry.load() is backend
    in_tree = "import sys, resnet_fused; assert 'torch._dynamo' not in sys.modules" + RUN
    # An installed package is not imported before Dynamo reads its entry point.
    installed = (
        "from importlib import metadata\n"
        f"entry = metadata.EntryPoint('resnet_fused', {found[1]!r}, 'torch_dynamo_backends')\n"
        "plain = metadata.entry_points\n"
        "metadata.entry_points = lambda **given: metadata.EntryPoints([entry])"
        " if given == {'group': 'torch_dynamo_backends'} else plain(**given)\n" + RUN
    )
    for script in (in_tree, installed):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
