"""fuse, unfuse, explain: the same numbers, everything kept, a reason for what is left alone."""

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_written_blocks import (
    PROVABLE,
    UNPROVABLE,
    Basic,
    BasicMethods,
    BottleneckCloned,
    OwnConv,
    OwnNorm,
    OwnSyncNorm,
)
from model_equality import assert_same_function, images, randomize, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import resnet_fused
from resnet_fused import models
from resnet_fused.conversion import explain, fuse, survey, tracing, unfuse
from resnet_fused.conversion.swap import Fused, FusedBlock, plan_of
from resnet_fused.nn import BasicBlock, TrainingMode

X = images(3, 8, 9, 7)
NATIVE = X.contiguous(memory_format=torch.channels_last)


class Pair(nn.Sequential):
    """Two blocks in a row, as models have them."""

    def __init__(self) -> None:
        super().__init__(Basic(8, 16, 2), Basic(16, 16, 1))


def reason_for(model: nn.Module, path: str = "") -> str:
    rows = [row for row in explain(model).rows if row.path == path]
    assert len(rows) == 1
    assert rows[0].state in ("left alone", "can be fused in part")
    assert not rows[0].fused
    return rows[0].reason


def quiet_fuse(model: nn.Module) -> nn.Module:
    with pytest.warns(UserWarning, match="could be fused"):
        return fuse(model)


# Same function


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PROVABLE)
def test_fused_block_computes_the_same(name: str, training: bool) -> None:
    block = randomize(PROVABLE[name]())
    assert isinstance(fuse(block), FusedBlock)
    assert_same_function(block, fuse, X, training, deep=False)


@pytest.mark.parametrize("x", [X, NATIVE], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PROVABLE)
def test_without_gradients_and_again(name: str, mode: Callable[[], Any], x: Tensor) -> None:
    block = randomize(PROVABLE[name]()).eval()
    fused, before = fuse(block), x.clone()
    with mode():
        for _ in range(3):  # what is derived from the weights is used from the second call on
            torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_the_fused_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fuse(Basic().double())
    monkeypatch.setattr(Basic, "forward", lambda *_: pytest.fail("the original forward ran"))
    fused(X.double())


@pytest.mark.parametrize("training", [False, True])
def test_norms_of_every_kind(training: bool) -> None:
    kinds: list[Callable[[int], nn.Module]] = [
        lambda n: nn.BatchNorm2d(n, affine=False),
        lambda n: nn.BatchNorm2d(n, track_running_stats=False),
        lambda n: nn.BatchNorm2d(n, momentum=None),
        lambda n: nn.BatchNorm2d(n, eps=1e-2, momentum=0.3),
        resnet_fused.nn.FrozenBatchNorm2d,
    ]
    for kind in kinds:
        block = randomize(Basic(norm=kind))
        assert isinstance(fuse(block), FusedBlock)
        assert_same_function(block, fuse, X, training, deep=False)


def test_other_calls_are_the_originals() -> None:
    block = randomize(BasicMethods()).eval()
    fused, mask = fuse(block), torch.zeros(1)
    assert torch.equal(fused(X, mask), block(X, mask))
    assert torch.equal(fused(X, mask=mask), block(X, mask))
    assert torch.equal(fused(x=X), block(X))
    for wrong in ((), (X, X, X), ("x",)):
        with pytest.raises(Exception) as ours:  # noqa: PT011
            fused(*wrong)
        with pytest.raises(type(ours.value)):
            block(*wrong)


# What is left alone


@pytest.mark.parametrize("name", UNPROVABLE)
def test_unknown_forwards_are_not_fused_as_a_whole(name: str) -> None:
    make, text = UNPROVABLE[name]
    block = make()
    state = copy.deepcopy(vars(block))
    reason = reason_for(block)
    assert reason.startswith("its forward is not a known one: ")
    assert text in reason
    assert not isinstance(fuse(block), FusedBlock)
    assert vars(block).keys() == state.keys()
    assert getattr(block, "seen", []) == []
    assert getattr(block, "calls", 0) == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name",
    sorted(
        UNPROVABLE.keys()
        - {
            "returns_two",
            "adds_into_input",  # which eager PyTorch refuses where the input needs a gradient
        }
    ),
)
def test_unknown_forwards_compute_the_same(name: str, training: bool) -> None:
    block = randomize(UNPROVABLE[name][0]())
    assert_same_function(block, fuse, X, training, deep=False)


class Drops(nn.Module):
    """As wide residual networks do it, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _DropsBetween()
        self.last = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.inner(x)))


class _DropsBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.dropout(x, 0.5, training=self.training)
        return self.conv2(x) if self.training else self.conv2(x) * 1.5


@pytest.mark.parametrize("training", [False, True])
def test_training_and_evaluation_may_differ(training: bool) -> None:
    model = randomize(Drops())
    patterns = {row.path: row.pattern for row in explain(model).rows}
    assert patterns == {"": "conv+BN+ReLU, BN+ReLU"}
    fused = fuse(model)
    assert [step.text for step in plan_of(fused).recipe.training.steps] == ["conv+BN+ReLU"] * 2
    assert_same_function(model, fuse, X, training)
    # A part in the other mode: nothing is made for that.
    for m in (model, fused):
        m.train(training).inner.train(not training)
    for seed in range(2):
        outs = []
        for m in (copy.deepcopy(model), fused):
            torch.manual_seed(seed)
            outs.append(m(X))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


class Scaled(Basic):
    """What its forward does depends on attributes, and on which layers are the same one."""

    def __init__(self, scale: float = 1.0, twice: bool = False, activation: Any = F.relu) -> None:
        super().__init__(8, 8, 1)
        self.scale, self.activation = scale, activation
        if twice:
            self.conv2 = self.conv1

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)) * self.scale
        out = self.bn2(self.conv2(self.activation(out))) if self.scale > 0 else out
        return F.relu(out + x)


def test_modules_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def trace_once(*args: Any) -> Any:
        traced.append(args[0])
        return tracing.trace_once(*args)

    monkeypatch.setattr(survey, "trace_once", trace_once)
    monkeypatch.setattr(
        survey, "trace", lambda *args: traced.append(args[0]) or tracing.trace(*args)
    )
    settings: list[dict[str, Any]] = [
        *({}, {"scale": 0.5}, {"scale": -1.0}, {"activation": F.silu}, {"twice": True}),
    ]
    once = [randomize(Scaled(**each), seed=i) for i, each in enumerate(settings)]
    again = [randomize(Scaled(**each), seed=9 + i) for i, each in enumerate(settings)]
    model = nn.Sequential(*once, *again)
    assert_same_function(model, fuse, X, training=True, deep=True)
    fused = [module for module in fuse(model).modules() if isinstance(module, Fused)]
    assert len(fused) == 2 * len(settings)
    assert all(module._is_as_proven() for module in fused)
    traced.clear()
    explain(nn.Sequential(*once))
    number = len(traced)
    traced.clear()
    explain(model)
    assert 5 < len(traced) <= number + 2  # the sequence is another one
    again[1].conv2.padding_mode = "circular"
    patterns = {row.path: row.pattern for row in explain(model).rows}
    assert patterns["1"] == "conv+BN, conv+BN+add+ReLU"
    assert patterns["6"] == "conv+BN, BN+add+ReLU"


def _set(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[Basic], object]:
    return lambda block: setattr(block, name, make(getattr(block, name)))


def _lazy(block: Basic) -> None:
    block.conv1 = nn.LazyConv2d(16, 3, 2, 1)


def _lazy_norm(block: Basic) -> None:
    block.bn1 = nn.LazyBatchNorm2d()


OBSTACLES: dict[str, tuple[Callable[[Basic], object], str]] = {
    "forward_hook": (
        lambda b: b.conv1.register_forward_hook(lambda *_: None),
        "conv1 has a forward hook (<lambda>), which would no longer run",
    ),
    "forward_pre_hook": (
        lambda b: b.bn2.register_forward_pre_hook(lambda *_: None),
        "bn2 has a forward pre-hook",
    ),
    "backward_hook": (
        lambda b: b.conv2.register_full_backward_hook(lambda *_: None),
        "conv2 has a backward hook",
    ),
    "backward_pre_hook": (
        lambda b: b.bn1.register_full_backward_pre_hook(lambda *_: None),
        "bn1 has a backward pre-hook",
    ),
    "hook_on_relu": (
        lambda b: b.relu.register_forward_hook(lambda *_: None),
        "relu has a forward hook",
    ),
    "parametrization": (
        lambda b: parametrize.register_parametrization(b.conv1, "weight", nn.Identity()),
        "conv1 has a parametrization (weight)",
    ),
    "weight_norm": (
        lambda b: parametrizations.weight_norm(b.conv2),
        "conv2 has a parametrization (weight)",
    ),
    "old_weight_norm": (
        lambda b: torch.nn.utils.weight_norm(b.conv2),
        "conv2 has a weight that is computed",
    ),
    "old_spectral_norm": (
        lambda b: torch.nn.utils.spectral_norm(b.conv2),
        "conv2 has a weight that is computed",
    ),
    "pruning": (
        lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5),
        "conv1 has a weight that is computed, not a parameter (pruning, weight norm)",
    ),
    "own_conv": (
        _set("conv1", lambda _: OwnConv(8, 16, 3, 2, 1)),
        "conv1 is a hand_written_blocks.OwnConv, not a plain Conv2d",
    ),
    "own_norm": (
        _set("bn1", lambda _: OwnNorm(16)),
        "bn1 is a hand_written_blocks.OwnNorm, not a plain BatchNorm2d",
    ),
    "own_sync_norm": (
        _set("bn2", lambda _: OwnSyncNorm(16)),
        "bn2 is a hand_written_blocks.OwnSyncNorm, not a plain SyncBatchNorm",
    ),
    "padding_mode": (
        _set("conv2", lambda _: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")),
        "conv2 pads with mode reflect, not with zeros",
    ),
    "padding_same": (
        _set("conv2", lambda _: nn.Conv2d(16, 16, 3, padding="same")),
        "conv2 has padding='same'",
    ),
    "lazy_conv": (_lazy, "conv1 is lazy and has not seen any input yet"),
    "lazy_norm": (_lazy_norm, "bn1 is lazy and has not seen any input yet"),
    "complex_weight": (
        _set("conv1", lambda _: nn.Conv2d(8, 16, 3, 2, 1, dtype=torch.complex64)),
        "conv1 has a weight of dtype torch.complex64",
    ),
    "forward_on_the_instance": (
        lambda b: setattr(b, "forward", lambda x: x),
        "the instance has its own forward",
    ),
    "forward_on_a_layer": (
        lambda b: setattr(b.conv1, "forward", lambda x: x),
        "conv1 has its own forward, set on the instance",
    ),
    "conv_under_two_names": (
        lambda b: b.add_module("conv3", b.conv1),
        "conv1 is shared: it is also conv3",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_are_named(name: str) -> None:
    change, text = OBSTACLES[name]
    block = Basic()
    assert explain(block).rows[0].state == "can be fused"
    change(block)
    assert text in reason_for(block)
    assert not isinstance(fuse(block), FusedBlock)


def test_a_network_is_no_block() -> None:
    class DeepStem(Basic):
        """Layers named as in a block, and blocks behind them."""

        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(Basic(16, 16, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            return self.layer1(self.relu(self.bn2(self.conv2(x))))

    assert {row.path: row.pattern for row in explain(DeepStem()).rows} == {
        "": "conv+BN+ReLU x2",
        "downsample": "conv+BN",
        "layer1.0": "BasicBlock",
    }


def test_weights_of_a_foreign_tensor_class() -> None:
    class Sub(Tensor):
        pass

    block = Basic()
    block.conv1._parameters["weight"] = block.conv1.weight.detach().as_subclass(Sub)
    assert "conv1 has a weight of type Sub" in reason_for(block)


def test_layers_shared_between_blocks() -> None:
    model = nn.Sequential(Basic(8, 8, 1), Basic(8, 8, 1), Basic(8, 8, 1))
    model[1].bn1 = model[0].bn1
    assert reason_for(model, "0") == "bn1 is shared: it is also 1.bn1"
    assert reason_for(model, "1") == "bn1 is shared: it is also 0.bn1"
    states = [row.state for row in explain(model).rows]
    assert states == ["can be fused in part"] * 2 + ["can be fused"]
    assert_same_function(randomize(model), fuse, X, training=True)


def test_a_block_in_two_places_is_fused_once() -> None:
    block = randomize(Basic(8, 8, 1))
    model = nn.Sequential(block, block)
    assert [row.path for row in explain(model).rows] == ["0"]
    fused = fuse(model)
    assert fused[0] is fused[1]
    assert isinstance(fused[0], FusedBlock)
    assert_same_function(model, fuse, X, training=True)


def test_shortcuts_with_hooks_still_call_them() -> None:
    block = randomize(Basic()).eval()
    called = []
    for path in ("downsample", "downsample.0", "downsample.1"):
        block.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    fused = fuse(block)
    assert isinstance(fused, FusedBlock)
    fused(X)
    assert sorted(called) == ["downsample", "downsample.0", "downsample.1"]


def test_scripted_and_traced_modules() -> None:
    scripted = torch.jit.script(Basic())
    assert reason_for(scripted) == "it is a TorchScript module"
    model = nn.Sequential(scripted, Basic(16, 16, 1)).eval()
    fused = fuse(model)
    assert fused[0] is scripted
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)
    assert reason_for(torch.fx.symbolic_trace(nn.Sequential(Basic())), "0").startswith(
        "a torch.fx graph calls its layers"
    )


# What is kept


def test_original_is_untouched_and_tensors_are_shared() -> None:
    model = randomize(Pair())
    fused = fuse(model)
    assert type(model[0]) is Basic
    assert fused is not model
    assert fused[0] is not model[0]
    assert fused[0].conv1 is not model[0].conv1
    ours, theirs = dict(fused.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    buffers = dict(model.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in fused.named_buffers())


def test_results_that_a_model_keeps_are_shared() -> None:
    block = UNPROVABLE["records"][0]()
    block(X)
    fused = fuse(nn.Sequential(block, Basic(16, 16, 1)))
    assert fused[0].seen[0] is block.seen[0]
    assert fused[0].seen is not block.seen


def test_inplace_converts_the_given_modules() -> None:
    model = Pair()
    block = model[0]
    assert fuse(model, inplace=True) is model
    assert model[0] is block
    assert isinstance(block, FusedBlock)
    assert unfuse(model, inplace=True) is model
    assert type(block) is Basic


def test_round_trip() -> None:
    model = randomize(Pair())
    model[0].bn1.eval()
    model[1].conv2.weight.requires_grad_(False)
    back = unfuse(fuse(model))
    assert repr(back) == repr(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    for a, b in zip(back.modules(), model.modules(), strict=True):
        assert a.training is b.training
        assert vars(a).keys() == vars(b).keys()
    assert all(a is b for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert torch.equal(back.eval()(X), model.eval()(X))


def test_state_dict_loads_both_ways() -> None:
    model, other = randomize(Pair(), seed=1), randomize(Pair(), seed=2)
    fused = fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(fused.eval()(X), other.eval()(X), rtol=1e-4, atol=1e-4)
    fresh = Pair()
    fresh.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(X), other.eval()(X))


def test_fuse_twice_is_fuse_once() -> None:
    once = fuse(Pair())
    twice = fuse(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert [type(m) for m in unfuse(twice).modules()] == [type(m) for m in Pair().modules()]


def test_unfuse_of_what_is_not_fused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), models.resnet20())
    back = unfuse(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]


def modes(model: nn.Module) -> list[TrainingMode]:
    kinds = FusedBlock | BasicBlock
    return [block.training_mode for block in model.modules() if isinstance(block, kinds)]


@pytest.mark.parametrize("mode", TrainingMode)
def test_training_mode(mode: TrainingMode) -> None:
    """Of every fused block, by name or itself; kept by copies, and by fusing again without one."""
    model = nn.Sequential(*Pair(), BasicBlock(16, 16))
    assert modes(fuse(model)) == [TrainingMode.SPEED] * 3
    fused = fuse(model, training_mode=mode)
    assert modes(fused) == [mode] * 3
    for same in (
        *(fuse(model, training_mode=mode.value), fuse(fused), copy.deepcopy(fused)),
        pickle.loads(pickle.dumps(fused)),  # noqa: S301
    ):
        assert modes(same) == [mode] * 3
    assert modes(model) == [TrainingMode.SPEED]  # of this library's own block
    back = unfuse(fused)
    assert [vars(block).keys() for block in back[:2]] == [vars(b).keys() for b in model[:2]]


def test_unknown_training_mode() -> None:
    with pytest.raises(ValueError, match="training_mode: must be one of speed, memory, got 'fast'"):
        fuse(Pair(), training_mode="fast")


def test_a_training_mode_of_the_original_stays() -> None:
    block = Basic(8, 8, 1)
    block.training_mode = "hard"
    assert unfuse(fuse(block)).training_mode == "hard"


def test_methods_and_attributes_of_the_original_stay() -> None:
    block = BottleneckCloned()
    block.note = {"by": "user"}
    fused = fuse(block)
    assert isinstance(fused, BottleneckCloned)
    assert isinstance(fused, resnet_fused.nn.Bottleneck)
    assert fused.expansion == 2
    assert fused.note == {"by": "user"}
    assert fused.l1.weight is block.l1.weight


def test_flags_devices_and_dtypes_are_kept() -> None:
    model = Pair()
    model[0].eval()
    model[1].bn1.weight.requires_grad_(False)
    meta = fuse(copy.deepcopy(model).to("meta", torch.bfloat16))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}
    assert [m.training for m in meta.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in meta.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert meta(torch.empty(2, 8, 8, 8, device="meta", dtype=torch.bfloat16)).shape[1] == 16


class Recorder:
    """What hooks write to, outside of the model."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def record(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.shapes.append(out.shape)


def test_hooks_on_blocks_run_and_write_where_they_wrote() -> None:
    recorder, grads, pre = Recorder(), [], []
    model = Pair()
    model[0].register_forward_hook(recorder.record)
    model[1].register_forward_pre_hook(lambda *_: pre.append(1))
    model[1].register_full_backward_hook(lambda *_: grads.append(1))
    fused = fuse(model)
    assert isinstance(fused[0], FusedBlock)
    assert isinstance(fused[1], FusedBlock)
    fused(X.requires_grad_()).sum().backward()
    X.requires_grad_(False)
    assert recorder.shapes == [(3, 16, 5, 4)]
    assert (pre, grads) == ([1], [1])


def test_symbolic_tracing_sees_the_original() -> None:
    model = randomize(Pair()).eval()
    traced, plain = torch.fx.symbolic_trace(fuse(model)), torch.fx.symbolic_trace(model)
    assert traced.code == plain.code
    assert torch.equal(traced(X), model(X))


def test_references_between_modules_lead_to_the_copies() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Basic()
            self.by_name = {"block": [self.block]}

    model = Holder()
    fused = fuse(model)
    assert fused.by_name["block"][0] is fused.block
    assert model.by_name["block"][0] is model.block


def test_deepcopy_is_independent() -> None:
    fused = fuse(randomize(Pair()))
    twin = copy.deepcopy(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    before = fused.eval()(X)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(fused(X), before)
    assert [type(m) for m in unfuse(twin).modules()] == [type(m) for m in Pair().modules()]


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickle(protocol: int) -> None:
    fused = fuse(randomize(Pair())).eval()
    loaded = pickle.loads(pickle.dumps(fused, protocol))  # noqa: S301
    assert [type(m) for m in loaded.modules()] == [type(m) for m in fused.modules()]
    assert torch.equal(loaded(X), fused(X))
    assert type(unfuse(loaded)[0]) is Basic


def test_torch_save() -> None:
    fused = fuse(randomize(Pair())).eval()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded[0], FusedBlock)
    assert torch.equal(loaded(X), fused(X))


def test_an_optimizer_of_the_original_trains_the_fused_model() -> None:
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = fuse(model)
    before = fused[0].conv1.weight.clone()
    fused(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(fused[0].conv1.weight, before)
    torch.testing.assert_close(model.eval()(X), fused.eval()(X), rtol=1e-4, atol=1e-4)
    assert model[0].bn1.num_batches_tracked == 1


def test_data_parallel() -> None:
    model = nn.DataParallel(randomize(Pair()))
    fused = fuse(model)
    assert isinstance(fused.module[0], FusedBlock)
    torch.testing.assert_close(fused.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-4)
    replica = fused.module[0]._replicate_for_data_parallel()
    assert isinstance(replica, FusedBlock)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(randomize(Pair()))
        with pytest.raises(ValueError, match="before wrapping it, or pass inplace=True"):
            fuse(model)
        expected = step(copy.deepcopy(model.module), X, training=True)["out0"]
        fuse(model, inplace=True)
        assert isinstance(model.module[0], FusedBlock)
        torch.testing.assert_close(step(model, X, True)["out0"], expected, rtol=1e-4, atol=1e-4)
        assert model.module[0].conv1.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


# Changes after fusing


def test_layers_changed_after_fusing_are_respected() -> None:
    def add_hook(block: Basic) -> None:
        block.bn1.register_forward_hook(lambda module, inputs, out: out + 1.0)

    def add_relu_hook(block: Basic) -> None:
        block.relu.register_forward_hook(lambda module, inputs, out: out * 2.0)

    def normalise_weight(block: Basic) -> None:
        parametrizations.weight_norm(block.conv2)
        block.conv2.parametrizations.weight.original0.data.mul_(2.0)

    changes: list[Callable[[Basic], object]] = [
        add_hook,
        add_relu_hook,
        normalise_weight,
        _set("bn1", lambda _: OwnNorm(16)),
        _set("relu", lambda _: nn.GELU()),
        _set("conv1", lambda _: nn.Conv2d(8, 16, 3, 2, 1)),
        lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5),
        lambda b: setattr(b, "downsample", Basic()),
        lambda b: setattr(b, "forward", lambda x: x + 1.0),
    ]
    for change in changes:
        for grad in (True, False):
            fused = fuse(randomize(Basic()).eval(), inplace=True)
            with torch.set_grad_enabled(grad):
                unchanged = [fused(NATIVE) for _ in range(3)][-1]
                change(fused)
                actual, expected = fused(NATIVE), unfuse(fused)(NATIVE)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            is_other = actual.shape != unchanged.shape or (actual - unchanged).abs().max() > 0.01
            assert is_other, "the change shows nowhere"


def test_global_hooks_see_every_layer() -> None:
    seen = []
    fused = fuse(randomize(Basic()))
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        fused.eval()
        with torch.no_grad():
            fused(NATIVE)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 3
    assert seen.count("ReLU") == 2


def test_evaluation_is_never_stale() -> None:
    model = randomize(Pair())
    fused = fuse(model)
    other = randomize(Pair(), seed=9).state_dict()
    changes: list[Callable[[], object]] = [
        lambda: step(model, X, training=True),
        lambda: model.load_state_dict(other),
        lambda: model[0].bn1.running_mean.add_(1.0),
        lambda: model[1].conv1.weight.data.mul_(2.0),
        lambda: fused.to(torch.bfloat16).float(),
    ]
    for change in changes:
        with torch.no_grad():
            before = [fused.eval()(NATIVE) for _ in range(3)][-1]
        change()
        with torch.no_grad():
            expected = unfuse(fused).eval()(NATIVE)
            torch.testing.assert_close(fused.eval()(NATIVE), expected, rtol=1e-4, atol=1e-4)
        assert (expected - before).abs().max() > 1e-4


# Bad input, logging


@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_not_a_module(function: Callable[..., object]) -> None:
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: model must be a torch.nn.Module, got dict"):
        function({})
    with pytest.raises(TypeError, match=f"{name}: model must be a torch.nn.Module, got type"):
        function(Basic)


def test_compiled_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"call fuse first, then torch\.compile"):
        fuse(torch.compile(Basic(), backend="eager"))
    with pytest.raises(ValueError, match=r"call unfuse first, then torch\.compile"):
        unfuse(nn.Sequential(torch.compile(Basic(), backend="eager")))


def test_warns_when_nothing_fuses() -> None:
    with pytest.warns(UserWarning, match="fuse: no residual block in Linear could be fused"):
        fuse(nn.Linear(2, 2))
    with pytest.warns(
        UserWarning, match="none of its 1 blocks in RecursiveScriptModule could be fused"
    ):
        fuse(torch.jit.script(Basic()))


def test_logs_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "resnet_fused"):
        fuse(Pair())
    assert caplog.messages == ["fused 2 of 2 candidates in Pair"]


# Compilers


@pytest.mark.parametrize("training", [False, True])
def test_dynamo_sees_one_graph(training: bool) -> None:
    model = randomize(nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1)))
    fused = fuse(model).train(training)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    expected = copy.deepcopy(model).train(training)(X)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: fuse(Basic(8, 8, 1)), lambda: BasicBlock(8, 8)])
def test_compiled_blocks_do_not_depend_on_others(make: Callable[[], nn.Module]) -> None:
    def with_plan() -> nn.Module:
        block = make().eval()
        for _ in range(2):
            block(NATIVE)
        return block

    with torch.no_grad():
        first = with_plan()
    block = make()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    compiled(NATIVE)
    with torch.no_grad():
        second = with_plan()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(NATIVE)
        del first, second
        compiled(NATIVE)
