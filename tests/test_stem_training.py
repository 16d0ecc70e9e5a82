"""The stem of a ResNet in training: convolution, then batch norm, ReLU and pooling at once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_equality import assert_same_function, distance, images, randomize, step
from numerics import missing
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused._torchvision import import_torchvision
from resnet_fused.models.stages import channels_last, run_stem_and_stages
from resnet_fused.nn import FrozenBatchNorm2d, normalization
from resnet_fused.nn.inference_plan import Stem

needs_kernel = pytest.mark.skipif(
    missing("bn_relu_max_pool", "cpu") is not None, reason=str(missing("bn_relu_max_pool", "cpu"))
)
pytestmark = needs_kernel


class Eager(nn.Module):
    """A stem whose layers are called one by one."""

    def __init__(
        self, bias: bool = False, bn: nn.Module | None = None, pool: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 7, stride=2, padding=3, bias=bias)
        self.bn1 = nn.BatchNorm2d(12) if bn is None else bn
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool is None else pool

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class Fused(Eager):
    """The same layers, called as ResNet.forward calls its stem."""

    def forward(self, x: Tensor) -> Tensor:
        stem = Stem(self.conv1, self.bn1, self.relu, self.maxpool)
        return run_stem_and_stages(channels_last(x), stem, [nn.Identity()])


def fused(stem: nn.Module) -> nn.Module:
    stem = copy.deepcopy(stem)
    stem.__class__ = Fused
    return stem


def frozen(stem: Eager, *names: str) -> Eager:
    for name in names:
        stem.get_submodule(name).requires_grad_(False)
    return stem


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each call of the operator."""
    made: list[Any] = []
    operator = normalization.bn_relu_max_pool

    def count(*args: Any) -> Tensor:
        made.append(args[8:])
        return operator(*args)

    monkeypatch.setattr(normalization, "bn_relu_max_pool", count)
    return made


STEMS: dict[str, Callable[[], Eager]] = {
    "plain": Eager,
    "bias": lambda: Eager(bias=True),
    "no affine": lambda: Eager(bn=nn.BatchNorm2d(12, affine=False)),
    "cumulative": lambda: Eager(bn=nn.BatchNorm2d(12, momentum=None)),
    "untracked": lambda: Eager(bn=nn.BatchNorm2d(12, track_running_stats=False)),
    "frozen convolution": lambda: frozen(Eager(), "conv1"),
    "frozen parameters": lambda: frozen(Eager(), "conv1", "bn1"),
    "windows side by side": lambda: Eager(pool=nn.MaxPool2d(2)),
    "wide windows": lambda: Eager(pool=nn.MaxPool2d((2, 5), (1, 4), (1, 2))),
}


@pytest.mark.parametrize("stem", STEMS)
def test_training_equals_eager(stem: str, calls: list[Any]) -> None:
    assert_same_function(
        randomize(STEMS[stem]()), fused, images(3, 3, 27, 22), training=True, deep=False
    )
    assert len(calls) == 18  # in both precisions, nine times


def test_gradients_in_evaluation_equal_eager(calls: list[Any]) -> None:
    assert_same_function(randomize(Eager()), fused, images(3, 3, 27, 22), False, deep=False)
    assert len(calls) == 18


def hooked(name: str) -> Eager:
    stem = Eager()
    stem.get_submodule(name).register_forward_hook(lambda _, __, out: out * 1.5)
    return stem


class _OwnPool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LEFT_ALONE: dict[str, Callable[[], Eager]] = {
    **{f"hooked {name}": lambda name=name: hooked(name) for name in ("conv1", "bn1", "maxpool")},
    "hooked relu": lambda: hooked("relu"),
    "own pooling": lambda: Eager(pool=_OwnPool(3, 2, 1)),
    "dilated": lambda: Eager(pool=nn.MaxPool2d(3, 2, 1, dilation=2)),
    "ceil_mode": lambda: Eager(pool=nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "average": lambda: Eager(pool=nn.AvgPool2d(3, 2, 1)),
    "large windows": lambda: Eager(pool=nn.MaxPool2d(16, padding=4)),
    "frozen batch norm": lambda: Eager(bn=FrozenBatchNorm2d(12)),
}


@pytest.mark.parametrize("stem", LEFT_ALONE)
def test_other_stems_are_left_alone(stem: str, calls: list[Any]) -> None:
    eager = randomize(LEFT_ALONE[stem]()).double()
    x = images(2, 3, 30, 26, dtype=torch.float64)
    expected, actual = step(copy.deepcopy(eager), x, True), step(fused(eager), x, True)
    for name, tensor in expected.items():
        assert distance(actual[name], tensor) < 1e-9, name
    assert not calls


def test_inference_runs_as_before(calls: list[Any]) -> None:
    stem = randomize(Eager()).eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(stem)(images(2, 3, 30, 26)), stem(images(2, 3, 30, 26)))
    assert not calls


def test_statistics_move_without_gradients(calls: list[Any]) -> None:
    stem, x = randomize(Eager()), images(2, 3, 30, 26)
    ours = fused(stem)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stem(x))
    assert len(calls) == 1
    torch.testing.assert_close(ours.state_dict(), stem.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, calls: list[Any]) -> None:
    """Distances from float64, over several inputs, as large as eager's or smaller."""
    stem = randomize(Eager())
    errors = []
    for convert in (fused, copy.deepcopy):
        distances: dict[str, float] = {}
        for seed in range(3):
            x = images(4, 3, 32, 32, seed=seed)
            exact = step(copy.deepcopy(stem).double(), x.double(), True)
            with torch.autocast("cpu", dtype):
                actual = step(convert(stem), x, True)
            assert actual["out0"].dtype == dtype
            for name, tensor in exact.items():
                distances[name] = distances.get(name, 0.0) + distance(actual[name], tensor)
        errors.append(distances)
    assert len(calls) == 3
    for name, error in errors[0].items():
        assert error <= 2 * errors[1][name] + 3 * torch.finfo(dtype).eps, name


def test_compiled() -> None:
    stem, x = randomize(Eager()), images(2, 3, 30, 26)
    called: set[Any] = set()

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        called.update(node.target for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    ours = fused(stem)
    ours.compile(fullgraph=True, backend=backend)
    actual, expected = step(ours, x, True), step(stem, x, True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.ops.resnet_fused.bn_relu_max_pool.default in called


@pytest.mark.parametrize("source", ["own", "torchvision"])
def test_networks_use_it(source: str, calls: list[Any]) -> None:
    if source == "own":
        model: nn.Module = rf.models.resnet18(num_classes=4)
    else:
        torchvision = import_torchvision()
        if torchvision is None:
            pytest.skip("torchvision is not installed")
        model = rf.fuse(torchvision.models.resnet18(num_classes=4))
    model(images(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 1
    assert model.conv1.weight.grad.abs().sum() > 0
