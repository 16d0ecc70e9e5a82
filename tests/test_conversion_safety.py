"""Conversion of code that does more than compute: exact, or left alone, and never touched."""

import contextlib
import copy
import functools
import gc
import importlib
import inspect
import itertools
import logging
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hand_written_blocks import Basic
from model_equality import images, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused.conversion import explain, fuse, unfuse
from resnet_fused.conversion.layers import why_not_conv
from resnet_fused.conversion.swap import Fused, FusedBlock, FusedGraph

X = images(2, 4, 6, 5)
FLAG = True
CALLS: list[int] = []
COUNT = 0
LOG = logging.getLogger("test_conversion_safety")


class Layers(nn.Module):
    """Two groups to fuse, for forwards that do something else besides."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([nn.ReLU(), nn.Identity()])
        self.register_buffer("steps", torch.ones(1))
        self.factor = 0.5
        self.widths = [1, 2]

    def first(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.first(x))) + x)


def layers(forward: Callable[..., Any], **namespace: Any) -> nn.Module:
    """Such a module with another forward."""
    cls = type(forward.__name__, (Layers,), {"forward": forward, "__module__": __name__})
    for name, value in namespace.items():
        setattr(cls, name, value)
    torch.manual_seed(3)
    return randomize(cls())


def run(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Outputs, the gradient of the input, buffers, in training and twice in evaluation."""
    found = []
    for training in (True, False):
        model.train(training)
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        tensors = [*out.values()] if isinstance(out, dict) else [out]
        sum(t.square().sum() for t in tensors).backward()
        found += [*(t.detach() for t in tensors), leaf.grad]
    with torch.no_grad():
        for _ in range(2):
            out = model(x.clone(memory_format=torch.channels_last))
            found += [*out.values()] if isinstance(out, dict) else [out]
    return found + [buffer.clone() for buffer in model.buffers()]


def assert_same(fused: nn.Module, twin: nn.Module, x: Tensor = X) -> None:
    for actual, expected in zip(run(fused, x), run(twin, x), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def is_fused(model: nn.Module) -> bool:
    return isinstance(model, Fused)


def quiet_fuse(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could be fused")
        return fuse(model)


# What code can do besides


def prints(self: Layers, x: Tensor) -> Tensor:
    print("seen")
    return self.first(x)


def warns(self: Layers, x: Tensor) -> Tensor:
    warnings.warn("seen", stacklevel=2)
    return self.first(x)


def logs(self: Layers, x: Tensor) -> Tensor:
    LOG.warning("seen")
    return self.first(x)


def logs_by_module(self: Layers, x: Tensor) -> Tensor:
    logging.warning("seen")
    return self.first(x)


def writes_to_stderr(self: Layers, x: Tensor) -> Tensor:
    sys.stderr.write("seen")
    return self.first(x)


def counts_globally(self: Layers, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return self.first(x)


def appends_to_global(self: Layers, x: Tensor) -> Tensor:
    CALLS.append(1)
    return self.first(x)


def reads_global(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) if FLAG else self.first(x) * 2


def reads_clock(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if time.time() > 0 else 1.0)


def draws(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (0.5 if random.random() < 2 else 1.0)  # noqa: S311


def draws_tensor(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) if torch.rand(1).item() < 2 else x


def makes_noise(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) + 0 * torch.rand_like(x)


def makes_tensor(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) + torch.arange(5.0)


def makes_like(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) + torch.ones_like(x)


def without_gradient(self: Layers, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.first(x)
    return y + x


def autocast_off(self: Layers, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.first(x.float())


def autocast_off_in_training(self: Layers, x: Tensor) -> Tensor:
    if self.training:
        with torch.autocast("cpu", enabled=False):
            return self.first(x)
    return self.first(x)


def autocast_on(self: Layers, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.first(x)
    return y.float()


def checkpoints(self: Layers, x: Tensor) -> Tensor:
    return checkpoint(self.first, x, use_reentrant=False)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class ReverseView(Reverse):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


def reverses(self: Layers, x: Tensor) -> Tensor:
    return Reverse.apply(self.first(x))


def reverses_view(self: Layers, x: Tensor) -> Tensor:
    return ReverseView.apply(self.first(x))


def sets_item(self: Layers, x: Tensor) -> Tensor:
    y = self.first(x) * 1.0
    y[:, 0] = 0.0
    return y


def detaches(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * x.detach().data


def adds_to_buffer(self: Layers, x: Tensor) -> Tensor:
    self.steps += 1
    return self.first(x) * self.steps


def adds_to_buffer_in_place(self: Layers, x: Tensor) -> Tensor:
    self.steps.add_(1)
    return self.first(x) * self.steps


def registers_buffer(self: Layers, x: Tensor) -> Tensor:
    self.register_buffer("last", torch.ones(1))
    return self.first(x)


def caches(self: Layers, x: Tensor) -> Tensor:
    self.last = self.first(x)
    return self.last


def nests(self: Layers, x: Tensor) -> Tensor:
    self.record["calls"].append(1)
    return self.first(x)


def evaluates_norm(self: Layers, x: Tensor) -> Tensor:
    self.bn.eval()
    return self.first(x)


def asks_dtype(self: Layers, x: Tensor) -> Tensor:
    return self.first(x.to(next(self.parameters()).dtype))


def asks_weight_dtype(self: Layers, x: Tensor) -> Tensor:
    return self.first(x.to(self.conv.weight.dtype))


def looks_up_dtype(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * {torch.float32: 2.0}.get(x.dtype, 3.0)


def spells_device(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if str(x.device) == "cpu" else 3.0)


def formats_dtype(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if f"{x.dtype}" == "torch.float32" else 3.0)


def asks_is_tensor(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if torch.is_tensor(x) else 3.0)


def asks_type(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if type(x) is Tensor else 3.0)


def asks_isinstance(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * (2.0 if isinstance(x, Tensor) else 3.0)


def asks_length(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * len(x)


def iterates(self: Layers, x: Tensor) -> Tensor:
    return torch.stack(list(self.first(x)))


def asks_for_tag(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * getattr(x, "tag", 2.0)


def asks_identity(self: Layers, x: Tensor) -> Tensor:
    y = self.layers[1](x)
    return self.first(x) * (2.0 if y is x else 3.0)


def catches(self: Layers, x: Tensor) -> Tensor:
    try:
        factor = 2.0 if x.sum() > -1e9 else 1.0
    except Exception:  # what a forward is tested for
        factor = 3.0
    return self.first(x) * factor


def suppresses(self: Layers, x: Tensor) -> Tensor:
    factor = 3.0
    with contextlib.suppress(Exception):
        factor = 2.0 if isinstance(x, Tensor) else 1.0
    return self.first(x) * factor


@functools.lru_cache
def cached(n: float) -> float:
    return n


def calls_cached(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * cached(2.0)


def inside_of_hooks() -> Generator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def leaves_generator_open(self: Layers, x: Tensor) -> Tensor:
    region = inside_of_hooks()
    next(region)
    return self.first(x)


def imports_module(self: Layers, x: Tensor) -> Tensor:
    from imported_by_forward import double

    return double(self.first(x))


def returns_ordered(self: Layers, x: Tensor) -> OrderedDict[str, Tensor]:
    return OrderedDict(out=self.first(x))


def returns_dict(self: Layers, x: Tensor) -> dict[str, Tensor]:
    return {"out": self.first(x)}


class Out(NamedTuple):
    out: Tensor


def returns_named(self: Layers, x: Tensor) -> Tensor:
    return Out(self.first(x)).out


def multiplies_by_class_attribute(self: Layers, x: Tensor) -> Tensor:
    return self.first(x) * self.scale


def enclosed(factor: float) -> Callable[..., Tensor]:
    def forward(self: Layers, x: Tensor) -> Tensor:
        return self.first(x) * factor

    return forward


def with_lambda(self: Layers, x: Tensor) -> Tensor:
    y = self.first(x)
    double = lambda t: t * 2 + y  # noqa: E731
    return sum(double(t) for t in [y, x])


def reads_statistics(self: Layers, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    factor = self.bn.running_mean.sum() * 3
    return self.relu(y + x * factor)


class OwnCall(nn.Module):
    """A class whose call is more than its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def calls_own_call(self: Layers, x: Tensor) -> Tensor:
    return self.first(self.inner(x))


class InPlaceNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


def norm_writes_to_input(self: Layers, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.conv2(y)
    self.inner(y.data)
    return self.relu(self.bn2(z) + y.detach())


def for_each_in_place(self: Layers, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.conv2(y)
    torch._foreach_mul_([y.data], 2.0)
    return self.relu(self.bn2(z) + y.detach())


def opens_super(self: Layers, x: Tensor) -> Tensor:
    return Layers.forward(self, x) + 1


EXACT: dict[str, Callable[[], nn.Module]] = {
    f.__name__: functools.partial(layers, f)
    for f in (
        *(makes_noise, makes_like, detaches, adds_to_buffer_in_place, asks_weight_dtype),
        *(returns_dict, returns_named, multiplies_by_class_attribute, with_lambda, opens_super),
    )
}
WATCHED = (
    *(prints, warns, logs, logs_by_module, writes_to_stderr, counts_globally, appends_to_global),
    *(reads_global, reads_clock, draws, draws_tensor, makes_tensor, without_gradient),
    *(autocast_off, autocast_off_in_training, autocast_on, checkpoints, reverses, reverses_view),
    *(sets_item, adds_to_buffer, registers_buffer, caches, evaluates_norm, asks_dtype),
    *(looks_up_dtype, spells_device, formats_dtype, asks_is_tensor, asks_type, asks_isinstance),
    *(asks_length, iterates, asks_for_tag, asks_identity, catches, suppresses, calls_cached),
    *(returns_ordered, leaves_generator_open),
)
REFUSED: dict[str, Callable[[], nn.Module]] = {
    **{f.__name__: functools.partial(layers, f) for f in WATCHED},
    "enclosed": lambda: layers(enclosed(2.0)),
}


def with_inner(forward: Callable[..., Any], inner: nn.Module) -> nn.Module:
    model = layers(forward)
    model.inner = inner
    return model


EXACT["calls_own_call"] = lambda: with_inner(calls_own_call, OwnCall())
EXACT["norm_writes_to_input"] = lambda: with_inner(norm_writes_to_input, InPlaceNorm(4))
EXACT["for_each_in_place"] = lambda: layers(for_each_in_place)
EXACT["reads_statistics"] = lambda: layers(reads_statistics)


def nested() -> nn.Module:
    model = layers(nests)
    model.record = {"calls": []}
    return model


REFUSED["nests"] = nested


def seen(capsys: Any, caplog: Any) -> tuple[object, ...]:
    captured = capsys.readouterr()
    records = len(caplog.records)
    caplog.clear()
    return captured.out, captured.err.count("seen"), records, COUNT, len(CALLS)


@pytest.mark.parametrize("name", [*EXACT, *REFUSED])
def test_code_that_does_more(name: str, capsys: Any, caplog: Any, recwarn: Any) -> None:
    model = {**EXACT, **REFUSED}[name]().eval()
    before, states = copy.deepcopy(vars(model)), (random.getstate(), torch.get_rng_state())
    nothing = seen(capsys, caplog)
    gc.disable()  # what is left open must not be closed by chance
    try:
        explain(model)
        fused = quiet_fuse(model)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    finally:
        gc.enable()
    assert seen(capsys, caplog) == nothing
    assert not [w for w in recwarn if "seen" in str(w.message)]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert vars(model).keys() == before.keys()
    assert getattr(model, "record", {"calls": []}) == {"calls": []}
    if name in REFUSED:
        assert not is_fused(fused)
    twin = copy.deepcopy(model)
    results = []
    for each in (fused, twin):
        torch.manual_seed(0)
        results.append(run(each))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    x = X.clone()
    x.tag = 7.0
    assert type(fused(x)) is type(twin(x))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(x), twin(x)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


# What runs at the import of a module: a table that grows, and a warning.
IMPORTED = """
import warnings
TABLE = {}
def register(function):
    TABLE[function.__name__] = function
    warnings.warn("imported", stacklevel=2)
    return function
@register
def double(x):
    return 2 * x
"""


def test_modules_imported_by_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_forward.py").write_text(IMPORTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = layers(imports_module)
    with pytest.warns(UserWarning, match="imported"):
        fused = quiet_fuse(model)
    assert is_fused(fused)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(fused), run(twin), rtol=1e-4, atol=1e-4)
    del sys.modules["imported_by_forward"]


# Changes after fusing


class Parts(nn.Module):
    """Groups of layers over the borders of modules, and between them what is not fused."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(8), none=nn.Identity()))
        self.acts = nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU()])
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.tail = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1), "bn": nn.BatchNorm2d(8)})
        self.scale, self.twice, self.skip, self.widths = 1.5, False, None, [0.5, 2.0]
        self.activation = F.relu
        self.gamma = nn.Parameter(torch.full((1,), 0.7))
        self.register_parameter("beta", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.acts[0](self.stem(x)))
        if self.skip is not None:
            x = self.skip(x)
        y = self.bn(self.conv(x))
        y = y * self.gate(y) * self.scale
        y = self.activation(y + x)
        for module in self.tail.values():
            y = module(y)
        y = self.acts[1](y + x) * sum(self.widths)
        if self.gamma is not None:
            y = y * self.gamma
        if self.beta is not None:
            y = y + self.beta
        if hasattr(self, "final"):
            y = self.final(y)
        return y * 2 if self.twice else self.finish(y)

    def finish(self, y: Tensor) -> Tensor:
        return y + 1


class Whole(Basic):
    """A block with attributes that its forward reads."""

    offset = 0

    def __init__(self) -> None:
        super().__init__(4, 8)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        if self.twice or self.offset:
            out = out * 2
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    models: dict[str, Callable[[], nn.Module]] = {
        "parts": Parts,
        "whole": Whole,
        "sequence": lambda: nn.Sequential(
            *(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        ),
    }
    return randomize(models[name]())


STEPS = {
    "parts": "conv+BN+ReLU+max pool, conv+BN, add+ReLU, conv+BN+add+ReLU",
    "sequence": "conv+BN+ReLU+max pool, conv+BN+ReLU",
}


def test_the_models_here_are_fused() -> None:
    assert isinstance(fuse(make("whole")), FusedBlock)
    for name, text in STEPS.items():
        fused = fuse(make(name))
        assert isinstance(fused, FusedGraph)
        assert ", ".join(step.text for step in fused._resnet_fused_plan.recipe.steps) == text


def _set(path: str, value: object) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        made = (
            value() if isinstance(value, types.LambdaType) and value.__name__ == "make" else value
        )
        setattr(model.get_submodule(owner), name, made)

    return change


def _method(name: str, *args: object, path: str = "") -> Callable[[nn.Module], None]:
    return lambda model: getattr(model.get_submodule(path), name)(*args)


def _without(name: str) -> Callable[[nn.Module], None]:
    return lambda model: delattr(model, name)


class LoRA(nn.Module):
    """A wrapper around a convolution, as parameter-efficient fine-tuning makes them."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        rank, sizes = 2, (base_layer.kernel_size, base_layer.stride, base_layer.padding)
        first = nn.Conv2d(base_layer.in_channels, rank, *sizes, bias=False)
        self.lora_A = nn.ModuleDict({"a": first, "b": copy.deepcopy(first)})
        second = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        self.lora_B = nn.ModuleDict({"a": second, "b": copy.deepcopy(second)})
        self.active_adapters, self.merged = ["a"], False

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out = self.base_layer(x, *args)
        if not self.merged:
            for name in self.active_adapters:
                out = out + self.lora_B[name](self.lora_A[name](x))
        return out


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) * 3
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def _wrap(path: str, wrap: Callable[[Any], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, wrap(model.get_submodule(path)))

    return change


def _prune(path: str) -> Callable[[nn.Module], None]:
    return lambda model: prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)


def _prune_and_remove(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)
        prune.remove(model.get_submodule(path), "weight")

    return change


def _on(path: str, function: Callable[[Any], object]) -> Callable[[nn.Module], None]:
    return lambda model: function(model.get_submodule(path))


def _of_layers(conv: str, bn: str, relu: str) -> dict[str, Callable[[nn.Module], Any]]:
    """Changes of a convolution, a batch norm and a ReLU."""
    return {
        "wrapped": _wrap(conv, LoRA),
        "conv_of_another_class": _wrap(conv, lambda c: _standardized(c)),
        "conv_with_forward": _on(conv, lambda c: setattr(c, "forward", lambda x: _twice(c, x))),
        "relu_with_forward": _on(relu, lambda r: setattr(r, "forward", lambda x: x * 3)),
        "norm_with_forward": _on(bn, lambda b: setattr(b, "forward", lambda x: x * 3)),
        "parametrized": _on(conv, lambda c: register_parametrization(c, "weight", Scaled())),
        "parametrized_norm": _on(bn, lambda b: register_parametrization(b, "weight", Scaled())),
        "weight_norm": _on(conv, parametrizations.weight_norm),
        "spectral_norm": _on(conv, torch.nn.utils.spectral_norm),
        "pruned": _prune(conv),
        "pruned_for_good": _prune_and_remove(conv),
        "padding_as_text": _set(f"{conv}.padding", "same"),
        "eps": _set(f"{bn}.eps", 0.3),
        "momentum": _set(f"{bn}.momentum", 0.9),
        "no_running_stats": _set(f"{bn}.track_running_stats", False),
        "statistics_taken_away": _on(bn, _without_statistics),
        "frozen_norm": _on(bn, lambda b: b.requires_grad_(False)),
        "another_relu": _wrap(relu, lambda _: nn.LeakyReLU(0.3)),
        "relu_not_in_place": _set(f"{relu}.inplace", False),
        "relu_in_place": _set(f"{relu}.inplace", True),
        "same_class": _wrap(bn, lambda b: randomize(nn.BatchNorm2d(b.num_features), seed=4)),
        "group_norm": _wrap(bn, lambda b: nn.GroupNorm(2, b.num_features)),
        "weights_in_place": _on(conv, lambda c: c.weight.data.mul_(2)),
        "new_weights": _on(conv, lambda c: setattr(c, "weight", nn.Parameter(c.weight * 2))),
        "float64": _method("to", torch.float64),
        "shared": _method("share_memory"),
        "frozen": _method("requires_grad_", False),
        "applied": _method("apply", _halve),
    }


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def _twice(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return nn.Conv2d.forward(conv, x) * 2


def _standardized(conv: nn.Conv2d) -> nn.Module:
    other = StandardizedConv(
        *(conv.in_channels, conv.out_channels, conv.kernel_size),
        stride=conv.stride,
        padding=conv.padding,
    )
    other.weight = conv.weight
    torch.nn.init.constant_(other.bias, 0.1)
    return other


def _reflect(conv: nn.Conv2d) -> None:
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [p for p in conv.padding for _ in range(2)][::-1]


def _without_statistics(bn: nn.BatchNorm2d) -> None:
    bn.running_mean = bn.running_var = None


def _halve(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.data.mul_(0.5)


CHANGES: dict[tuple[str, str], Callable[[nn.Module], Any]] = {
    **{("parts", k): v for k, v in _of_layers("stem.conv", "stem.bn", "acts.0").items()},
    **{("parts", f"tail_{k}"): v for k, v in _of_layers("tail.conv", "tail.bn", "acts.1").items()},
    **{("whole", k): v for k, v in _of_layers("conv2", "bn1", "relu").items()},
    **{("sequence", k): v for k, v in _of_layers("4", "1", "2").items()},
    ("parts", "scale"): _set("scale", 3.0),
    ("parts", "scale_as_int"): _set("scale", 2),
    ("parts", "twice"): _set("twice", True),
    ("parts", "skip"): _set("skip", nn.Softplus()),
    ("parts", "widths_in_place"): lambda m: m.widths.append(4.0),
    ("parts", "function"): _set("activation", torch.sigmoid),
    ("parts", "no_gamma"): _set("gamma", None),
    ("parts", "beta"): _set("beta", nn.Parameter(torch.ones(1))),
    ("parts", "final"): _set("final", nn.Sigmoid()),
    ("parts", "method_on_the_instance"): _set("finish", lambda y: y - 1),
    ("parts", "layer_appended"): lambda m: m.tail.update({"extra": nn.Tanh()}),
    ("parts", "stem_appended"): _on("stem", lambda stem: stem.append(nn.Softshrink(0.1))),
    ("parts", "layer_taken_away"): lambda m: m.tail.pop("bn"),
    ("parts", "gate_exchanged"): _set("gate", nn.Tanh()),
    ("parts", "ceil_mode"): _set("pool.ceil_mode", True),
    ("parts", "another_pool"): _set("pool", nn.AvgPool2d(3, 2, 1)),
    ("parts", "window"): _set("pool.stride", 1),
    ("whole", "twice"): _set("twice", True),
    ("whole", "class_attribute_on_the_instance"): _set("offset", 1),
    ("whole", "dilation"): _on("conv2", lambda c: vars(c).update(dilation=(2, 2), padding=(2, 2))),
    ("whole", "another_shortcut"): _wrap("downsample", lambda _: nn.Conv2d(4, 8, 1, 2)),
    ("sequence", "appended"): lambda m: m.append(nn.Tanh()),
    ("sequence", "inserted"): lambda m: m.insert(3, nn.Tanh()),
    ("sequence", "shortened"): lambda m: m.pop(6),
    ("sequence", "ceil_mode"): _set("3.ceil_mode", True),
    ("parts", "padding_mode"): _on("conv", _reflect),
    ("sequence", "padding"): _set("0.padding", (2, 2)),
}
# In evaluation.
STAYS_THE_SAME = {
    *("relu_not_in_place", "relu_in_place", "shared", "frozen", "frozen_norm", "float64"),
    *("momentum", "no_running_stats", "weight_norm", "padding_as_text"),
}


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_changes_after_fusing_are_followed(name: str, change: str) -> None:
    model = make(name)
    twin = copy.deepcopy(model)
    fused = fuse(model)
    x = X.contiguous(memory_format=torch.channels_last)
    for each in (fused, twin):
        each.eval()
        with torch.no_grad():
            before = [each(x) for _ in range(3)][-1]  # what is derived from the weights is kept
        torch.manual_seed(5)
        CHANGES[name, change](each)
    dtype = torch.float64 if "float64" in change else torch.float32
    with torch.no_grad():
        after = twin(x.to(dtype))
        torch.testing.assert_close(fused(x.to(dtype)), after, rtol=1e-4, atol=1e-4)
    assert_same(fused, twin, X.to(dtype))
    if change.removeprefix("tail_") not in STAYS_THE_SAME:
        is_other = before.shape != after.shape or (before - after).abs().max() > 1e-3
        assert is_other, "the change shows nowhere"


def test_attributes_that_are_taken_away() -> None:
    for name, attribute in (("parts", "scale"), ("parts", "acts"), ("whole", "twice")):
        fused = fuse(make(name))
        delattr(fused, attribute)
        with pytest.raises(AttributeError, match=attribute):
            fused(X)


# Hooks

Hook = Callable[[nn.Module, list[Any]], Any]


def _forward(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))


def _forward_changed(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_hook(lambda m, i, o: (seen.append(o.detach().clone()), o * 2)[1])


def _forward_pre(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach().clone()))


def _backward(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_full_backward_hook(lambda m, i, o: seen.extend([*i, *o]))


def _backward_pre(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_full_backward_pre_hook(lambda m, o: seen.extend(o))


HOOKS: dict[str, Hook] = {
    f.__name__[1:]: f for f in (_forward, _forward_changed, _forward_pre, _backward, _backward_pre)
}


def heard(model: nn.Module, seen: list[Any]) -> list[Any]:
    """What the hooks see in a step, and its results; an exception where there is one."""
    seen.clear()
    try:
        results = run(model)
    except RuntimeError as error:
        return [type(error)]
    return [*seen, *results]


def assert_heard_alike(fused: list[Any], eager: list[Any]) -> None:
    assert len(fused) == len(eager)
    for actual, expected in zip(fused, eager, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        else:
            assert actual is expected


def convolutions_called(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    called, forward = [], nn.Conv2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda *args: (called.append(1), forward(*args))[1])
        model(X)
    return len(called)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_hooks_registered_after(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, ours, theirs = make(name), [], []
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # eager refuses to write to what a backward hook has seen
    fused = fuse(copy.deepcopy(twin))
    expected_calls = convolutions_called(fused, monkeypatch)
    convolutions_called(twin, monkeypatch)
    assert expected_calls == (1 if name == "parts" else 0)
    for path, module in twin.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue  # never called
        handles = [HOOKS[kind](module, theirs), HOOKS[kind](fused.get_submodule(path), ours)]
        expected = heard(twin, theirs)
        assert_heard_alike(heard(fused, ours), expected)
        assert len(theirs) >= 2 or expected == [RuntimeError], path
        for handle in handles:
            handle.remove()
        fused.train()
        twin.train()
        assert convolutions_called(fused, monkeypatch) == expected_calls
        convolutions_called(twin, monkeypatch)


@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_hooks_registered_before(name: str) -> None:
    paths = {"", "stem", "stem.conv", "acts.1", "pool", "tail.bn", "gate"}
    paths |= {"conv1", "bn2", "relu", "downsample", "1", "2", "3"}
    for path in paths & {path for path, _ in make(name).named_modules()}:
        model, seen = make(name), []
        for hook in (_forward, _backward) if path else (_forward,):
            hook(model.get_submodule(path), seen)
        explain(model)
        fused = quiet_fuse(model)
        assert seen == []
        ours, theirs = heard(fused, seen), []
        twin = make(name)
        for hook in (_forward, _backward) if path else (_forward,):
            hook(twin.get_submodule(path), theirs)
        assert_heard_alike(ours, heard(twin, theirs))


@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_hooks_of_all_modules(name: str) -> None:
    model, seen = make(name), []
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        explain(model)
        fused = fuse(model)
        assert seen == []
        fused(X)
        ours = [kind.removeprefix("Fused") for kind in seen]
        seen.clear()
        make(name)(X)
    finally:
        handle.remove()
    assert ours == seen


# Modules of other kinds


def test_wrapped_before() -> None:
    for path in ("stem.conv", "conv"):
        model = make("parts")
        torch.manual_seed(5)
        _wrap(path, LoRA)(model)
        twin = copy.deepcopy(model)
        fused = fuse(model)
        assert is_fused(fused)
        changes: list[Callable[[LoRA], object]] = [
            lambda lora: None,
            lambda lora: lora.active_adapters.append("b"),
            lambda lora: setattr(lora, "merged", True),
            lambda lora: setattr(lora, "merged", False),
            lambda lora: lora.active_adapters.clear(),
        ]
        for change in changes:
            for each in (fused, twin):
                change(each.get_submodule(path))
            assert_same(fused, twin)


@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_from_meta_to_memory(name: str) -> None:
    model = make(name)
    twin = make(name)
    with torch.device("meta"):
        fused = fuse(make(name).to("meta"))
    assert is_fused(fused)
    fused.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert_same(fused, model)


@pytest.mark.parametrize("name", ["parts", "sequence", "whole"])
def test_fake_tensors(name: str) -> None:
    fused = fuse(make(name))
    expected = fused(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = fused(mode.from_tensor(X))
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    with FakeTensorMode():
        model = make(name)
        assert "of type FakeTensor" in str(explain(model)) + str(_reasons(model))
        assert quiet_fuse(model)(torch.empty(X.shape)).shape == expected.shape


def _reasons(model: nn.Module) -> list[str | None]:
    return [why_not_conv(m) for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_lazy_layers_before_and_after_they_are_known() -> None:
    def lazy() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            *(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()),
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        )

    fused, twin = quiet_fuse(lazy()), lazy()
    for each in (fused, twin):
        torch.manual_seed(4)
        each.eval()(X)
    assert_same(fused, twin)
    assert is_fused(fuse(fused))
    assert_same(fuse(fused), twin)


def test_scripted_and_quantized_modules() -> None:
    model = make("parts").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.gate = torch.jit.script(model.gate)
        fused = fuse(model)
        assert is_fused(fused)
        assert fused.gate is model.gate
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)
        for change in (_script_stem, _quantize):
            torch.testing.assert_close(
                change(fuse(make("parts")).eval())(X), change(make("parts").eval())(X)
            )


def _script_stem(model: nn.Module) -> nn.Module:
    model.stem = torch.jit.script(model.stem)
    return model


def _quantize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model = torch.ao.quantization.prepare_qat(model)
    model(X)
    return model.eval()


# Twice, in parts, as files


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_in_any_order() -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return randomize(nn.Sequential(Parts(), nn.ReLU(), nn.Conv2d(8, 4, 1), Whole()))

    once, twin = fuse(model()), model()
    assert kinds(fuse(once)) == kinds(once)
    assert kinds(fuse(unfuse(fuse(model())))) == kinds(once)
    assert kinds(unfuse(once)) == kinds(model())
    child_first = model()
    fuse(child_first[0], inplace=True)
    fuse(child_first[3], inplace=True)
    parent = fuse(child_first)
    assert kinds(parent) == kinds(once)
    assert_same(parent, twin)
    assert kinds(unfuse(parent)) == kinds(model())
    fused, twin = fuse(model()), model()
    assert kinds(fuse(fused[0])) == kinds(fused[0])
    unfuse(fused[0], inplace=True)
    assert_same(fused, twin)
    assert kinds(fuse(fused)) == kinds(once)


def test_explaining_changes_nothing() -> None:
    for name in ("parts", "whole", "sequence"):
        for model in (make(name), fuse(make(name))):
            model.register_forward_hook(lambda *_: None)
            before = [(type(m), _described(m)) for m in model.modules()]
            explain(model, X)
            assert [(type(m), _described(m)) for m in model.modules()] == before


def _described(module: nn.Module) -> list[tuple[str, object]]:
    """Attributes, and what tables and lists hold, by identity."""
    return [
        (name, [*map(id, v.values())] if isinstance(v, dict) else copy.copy(v))
        for name, v in vars(module).items()
    ]


MODULE = """
import torch
from torch import nn
from torch.nn import functional as F

class Mine(nn.Module):
    "Somebody's block."
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.widths, self.kind = [1, 2.0], torch.float32
    def forward(self, pixels, labels=None):
        y = torch.cat([F.relu(self.bn(self.conv(pixels))), pixels.to(self.kind)], 1)
        return F.max_pool2d(torch.clamp(y, min=0.1), 2) * self.widths[1]
"""
LOADS = """
import sys, io, pickle, torch
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "resnet_fused":
            raise ImportError(name)
if {blocked}:
    sys.meta_path.insert(0, Blocked())
for name in ("model.pt", "model.2", "model.3", "model.4", "model.5"):
    is_saved = name == "model.pt"
    model = torch.load(name, weights_only=False) if is_saved else pickle.load(open(name, "rb"))
    x, out = torch.load("x.pt", weights_only=True)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    print(name, [type(m).__name__ for m in model], "resnet_fused" in sys.modules)
state = torch.load("state.pt", weights_only=True)
model.load_state_dict(state)
"""


@pytest.mark.parametrize("blocked", [False, True], ids=["fused", "unfused"])
def test_files_load_in_another_process(
    blocked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("somebodys_module").Mine
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = fuse(randomize(nn.Sequential(mine(), nn.Sequential(*layers))).eval())
    assert [type(m).__name__ for m in model] == ["FusedMine", "FusedSequential"]
    out = model(X).detach()
    if blocked:
        model = unfuse(model)
    torch.save((X, out), tmp_path / "x.pt")
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for protocol in range(2, 6):
        (tmp_path / f"model.{protocol}").write_bytes(pickle.dumps(model, protocol))
    package = Path(resnet_fused.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS.format(blocked=blocked)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = ["Mine", "Sequential"] if blocked else ["FusedMine", "FusedSequential"]
    assert done.stdout.count(f"{names} {not blocked}") == 5
    assert [*inspect.signature(model[0].forward).parameters] == ["pixels", "labels"]
    assert inspect.getdoc(model[0]) == "Somebody's block."


def test_sequences_stay_sequences() -> None:
    fused, twin = fuse(make("sequence")), make("sequence")
    other = nn.Sequential(nn.Tanh())
    for edit in (
        *(lambda m: m[:3], lambda m: m[4:], lambda m: m[:2] + m[2:], lambda m: m[:2] + other),
        *(lambda m: m.append(nn.Tanh()), lambda m: m * 1, lambda m: m[::-1][::-1]),
        lambda m: nn.Sequential(*m),
    ):
        x = images(2, 8, 6, 5) if edit(copy.deepcopy(twin))[0].weight.shape[1] == 8 else X
        assert_same(edit(copy.deepcopy(fused)), edit(copy.deepcopy(twin)), x)


def test_replicas_and_vectors() -> None:
    for name in ("parts", "sequence", "whole"):
        fused, twin = fuse(make(name)).eval(), make(name).eval()
        replica = fused._replicate_for_data_parallel()
        for key, module in fused.named_children():
            replica._modules[key] = module._replicate_for_data_parallel()
            for inner, parameter in module._parameters.items():
                setattr(replica._modules[key], inner, parameter)
        if name == "whole":
            torch.testing.assert_close(fused(X), twin(X), rtol=1e-4, atol=1e-4)
        vector = torch.nn.utils.parameters_to_vector(fused.parameters())
        for each in (fused, twin):
            torch.nn.utils.vector_to_parameters(vector * 1.1, each.parameters())
        assert_same(fused, twin)


def test_a_class_that_minds_being_derived_from() -> None:
    derived = []

    class Strict(Layers):
        def __init_subclass__(cls, **options: object) -> None:
            derived.append(cls)

    model = Strict()
    assert is_fused(fuse(model))
    assert derived == []
    assert pickle.loads(pickle.dumps(fuse(Layers()))) is not None  # noqa: S301


# Inputs of other kinds


class Tagged(Tensor):
    """A tensor with a class of its own."""


INPUTS: dict[str, Callable[[], Any]] = {
    "empty": lambda: X[:0],
    "one_image": lambda: X[0],
    "five_dimensions": lambda: X[None],
    "float64": lambda: X.double(),
    "bfloat16": lambda: X.bfloat16(),
    "complex": lambda: X.to(torch.complex64),
    "integers": lambda: X.long(),
    "list": lambda: [1.0],
    "none": lambda: None,
    "array": lambda: X.numpy(),
    "subclass": lambda: X.as_subclass(Tagged),
    "parameter": lambda: nn.Parameter(X),
    "sparse": lambda: X.to_sparse(),
    "narrow": lambda: X[:, :, :1, :1],
    "too_many_channels": lambda: X.repeat(1, 2, 1, 1),
}


@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_inputs_of_other_kinds(name: str) -> None:
    fused, twin = fuse(make(name)).eval(), make(name).eval()
    for kind, make_input in INPUTS.items():
        for training in (False, True):
            results = []
            for model in (fused, twin):
                try:
                    results.append(model.train(training)(make_input()))
                except Exception as error:  # compared below
                    results.append(error)
            actual, expected = results
            if isinstance(expected, Tensor):
                assert type(actual) is type(expected), kind
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            else:
                assert isinstance(actual, Exception), kind
    with pytest.raises(TypeError, match="argument"):
        fused(X, X, X)
    keyword = "input" if name == "sequence" else "x"
    torch.testing.assert_close(fused(**{keyword: X}), twin(**{keyword: X}))


class Sum(Layers):
    """The residual is added out of place, or in place, and may be of another dtype or shape."""

    in_place = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.in_place:
            y += x
        else:
            y = y + x.mean((2, 3), keepdim=True)
        return self.relu(y)


class SumInPlace(Sum):
    in_place = True


class WholeSum(Basic):
    """A block whose sum is in the wider dtype of both branches, that of x under autocast."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + x)


@pytest.mark.parametrize(
    "make_model",
    [Sum, SumInPlace, Whole, WholeSum, lambda: nn.Sequential(WholeSum(), WholeSum())],
    ids=["Sum", "SumInPlace", "Whole", "WholeSum", "Sequential"],
)
def test_autocast_and_other_dtypes(make_model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = randomize(make_model()).eval()
    fused, modes = fuse(model), itertools.product((False, True), repeat=2)
    layouts = [X.contiguous(memory_format=torch.channels_last), X]
    with torch.no_grad():
        for x in layouts * 2:
            fused(x)  # inference in float32 is planned now
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for x, dtype, (training, grad) in itertools.product(layouts, dtypes, modes):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            actual, expected = (m.train(training)(x.to(dtype)) for m in (fused, model))
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["parts", "whole", "sequence"])
def test_transforms(name: str) -> None:
    fused, twin = fuse(make(name)).eval(), make(name).eval()
    batches = torch.stack([X, X + 1])
    for apply in (
        lambda m: torch.func.vmap(m)(batches),
        lambda m: torch.func.jvp(m, (X,), (X * 0.1,))[1],
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(X),
        lambda m: torch.jit.trace(m, X)(X + 1),
        lambda m: torch.fx.symbolic_trace(m)(X),
        lambda m: torch.func.functional_call(m, {k: v * 1.1 for k, v in m.named_parameters()}, X),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(apply(fused), apply(twin), rtol=1e-4, atol=1e-4)


def test_threads() -> None:
    model, twin = make("parts").eval(), make("parts").eval()
    expected, errors, stop = twin(X), [], threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                torch.testing.assert_close(twin(X), expected)
                torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        except Exception as error:  # asserted below: a thread cannot fail the test
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            assert is_fused(fuse(model))
        fuse(model, inplace=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(model, [X] * 16):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_several_threads_convert() -> None:
    models = [nn.Sequential(*map(make, ("parts", "whole", "sequence"))) for _ in range(16)]
    expected = explain(models[0]).rows
    with ThreadPoolExecutor(4) as pool:
        assert all(found.rows == expected for found in pool.map(explain, models))
