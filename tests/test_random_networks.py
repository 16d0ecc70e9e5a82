"""fuse changes no result, whatever the network and whatever happens to it: hypothesis draws both.

`RESNET_FUSED_CASES=20000 python -m pytest tests/test_random_networks.py` runs that many cases, and
others each time; without the variable they are few and the same each time.
"""

import contextlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_blocks import SETTINGS
from random_layers import Block, Short
from random_networks import Network, build, networks
from random_programs import (
    CallPart,
    Compare,
    FuseAgain,
    Hook,
    Recorder,
    Replace,
    Set,
    SetItem,
    compares,
    happen,
    part,
    programs,
    recorders,
)
from torch import Tensor, nn

from resnet_fused import fuse, unfuse

_CASES = int(os.environ.get("RESNET_FUSED_CASES", "500"))
_SHARDS = max(1, _CASES // 1000)  # of which each process of pytest-xdist takes the next
_LOW_SHARE = 0.2  # of the cases in float32 and bfloat16, which are slower
# Errors of eager that fused models need not have: the memory format of an output is that of the
# input, where eager's may not be; they keep other tensors for a backward than eager does; and a
# ReLU behind a hook, which made a view, need not be in place.
_ABOUT_MEMORY = (
    *("view size is not compatible", "modified by an inplace operation"),
    "is a view and is being modified inplace",
)
# Of the input, in a comparison in low precision. The rule holds for the median of the errors; where
# it fails for a few draws, more show whether that was chance: in small tensors eager may be lucky.
_DRAWS = (5, 15, 45)


class _Case(NamedTuple):
    network: Network = Network()
    program: tuple[Any, ...] = ()
    last: Compare = Compare()
    batch: int = 2
    size: tuple[int, int] = (6, 6)
    dtype: torch.dtype = torch.float64
    inplace: bool = False


class Case(Short, _Case):
    """A network, what happens to it after `fuse`, and a comparison at the end."""

    @property
    def is_low(self) -> bool:
        """Whether float64 is more exact."""
        return self.dtype != torch.float64


def _cases(*dtypes: torch.dtype) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        network=networks,
        program=programs,
        last=compares,
        batch=st.integers(1, 3),
        size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
        dtype=st.sampled_from(dtypes),
        inplace=st.booleans(),
    )


def _many(share: float) -> settings:
    return settings(
        max_examples=max(1, round(_CASES * share / _SHARDS)),
        derandomize="RESNET_FUSED_CASES" not in os.environ,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


_fused: list[bool] = []  # of every case


def _block(style: str = "Basic", training: bool = True, **settings: Any) -> Network:
    return Network((Block(style, **settings),), training=training)


@_many(1.0 - _LOW_SHARE)
@given(_cases(torch.float64))
# The shortcut changes what the main branch has read, and what the next call of a user reads.
@example(Case(_block(shortcut="relu_conv_bn"), last=Compare("no_grad")))
@example(Case(_block("MainFirst", shortcut="relu_only"), last=Compare("no_grad")))
# What tracing does not see, or takes for another thing.
@example(Case(_block("PartlyWithoutGradients")))
@example(Case(_block("StochasticDepth")))
@example(Case(_block("EvaluatesNorm")))
@example(Case(_block("BranchesOnExactType")))
@example(Case(_block("BranchesOnIsTensor")))
@example(Case(_block("CatchesEverything")))
@example(Case(_block("BranchesOnInference"), last=Compare("inference_mode")))
@example(Case(_block("BranchesOnAutocast"), last=Compare("autocast")))
@example(Case(_block("CountsInside")))
# What is changed after the conversion.
@example(Case(_block("ScaledByTable"), (SetItem(2.0),)))
@example(Case(_block("ScaledBySetting"), (SetItem(2.0),)))
@example(Case(_block("ScaledByClass"), (Set("scale", 2.0),)))
@example(Case(_block("ScaledByOptionalParameter"), (Set("gamma", "nn.Parameter"),)))
@example(Case(_block("MainFirst"), (Set("identity", "torch.neg"),)))
@example(Case(_block("ActivationList"), (Replace("nn.Tanh", 5),)))
# Hooks of every module count the calls of a ReLU behind a convolution and a norm, too.
@example(Case(Network(stem="conv_bn_relu"), last=Compare("global_hook")))
# A shortcut module that returns its argument.
@example(Case(_block(shortcut="nn.Identity"), last=Compare("double")))
@example(Case(_block(shortcut="empty", training=False), last=Compare("double")))
# The memory format of a sum is that of its first operand, behind a group as in eager.
@example(
    Case(
        Network((Block("OneNormTwice", "nested_conv_bn", norm="instance"),), head="view"),
        last=Compare("no_grad", channels_last=True),
    )
)
def _in_float64(case: Case) -> None:
    _fused.append(check(case))


@_many(_LOW_SHARE)
@given(_cases(torch.float32, torch.bfloat16))
# A backward pre-hook makes a view of its output, where a batch of one image may have any stride.
@example(
    Case(
        Network(hooks=(Hook("backward_pre", 1),)),
        last=Compare("frozen_input", channels_last=True),
        batch=1,
        dtype=torch.bfloat16,
    )
)
def _in_low_precision(case: Case) -> None:
    _fused.append(check(case))


@pytest.mark.parametrize("shard", range(_SHARDS))
@pytest.mark.parametrize("run_cases", [_in_float64, _in_low_precision])
def test_fuse_changes_no_result(run_cases: Callable[[], None], shard: int) -> None:
    _fused.clear()
    run_cases()
    # Where nothing is fused, nothing is tested.
    assert sum(_fused) >= 0.75 * len(_fused), f"only {sum(_fused)} of {len(_fused)} were fused"


def check(case: Case) -> bool:
    """Raise AssertionError where the fused model differs; returns whether something was fused."""
    SETTINGS["scale"] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "could not be fused", and what eager warns of
        return _check(case)


def _check(case: Case) -> bool:
    eager, given_model = (build(case.network).to(case.dtype) for _ in range(2))
    exact = build(case.network).to(case.dtype).double() if case.is_low else eager
    fused = _fuse(given_model, case.inplace)
    _assert_is_lossless(eager, given_model, fused, case.inplace)
    is_fused = _classes(fused) != _classes(eager)
    judge = Judge(case)
    for event in (*case.program, case.last):
        if isinstance(event, Compare):
            if not judge.compare(event, eager, fused, exact):
                return is_fused
        elif isinstance(event, CallPart):
            _assert_part_is_the_same(event, eager, fused, case)
        elif isinstance(event, FuseAgain):
            fused = _fuse(unfuse(fused) if event.unfuses else fused, event.inplace)
        else:
            # The names that events go by are those before them: the plain model comes last.
            results = [_after(event, fused, eager)]
            results += [_after(event, exact, eager)] if case.is_low else []
            results += [_after(event, eager, eager)]
            failures = [result if isinstance(result, Exception) else None for result in results]
            _assert_same_errors(event, failures[0], failures[-1])
            if any(failures):
                return is_fused
            fused, exact, eager = results[0], results[-2 if case.is_low else -1], results[-1]
    judge.assert_nothing_was_overwritten()
    _assert_unfuses(eager, fused, case)
    return is_fused


def _after(event: Any, model: nn.Module, plain: nn.Module) -> Any:
    try:
        return happen(event, model, plain)
    except Exception as error:  # compared with eager's
        return error


def _assert_same_errors(where: Any, ours: Exception | None, plain: Exception | None) -> None:
    """One for one, not the same text or type: operators check their arguments themselves."""
    if ours is None and any(text in str(plain) for text in _ABOUT_MEMORY):
        return
    assert (ours is None) == (plain is None), f"{where}: {ours!r} for {plain!r}"


def _fuse(model: nn.Module, inplace: bool) -> nn.Module:
    before = torch.get_rng_state()
    fused = fuse(model, inplace=inplace)
    assert torch.equal(before, torch.get_rng_state()), "fuse draws random numbers"
    assert (fused is model) == inplace
    return fused


def _assert_is_lossless(
    eager: nn.Module, given_model: nn.Module, fused: nn.Module, inplace: bool
) -> None:
    """unfuse(fused) has the classes and the very tensors of what was given, which is as it was."""
    plain = unfuse(fused)
    for model in (plain, *(() if inplace else (given_model,))):
        assert _classes(model) == _classes(eager)
        assert [*model.state_dict()] == [*fused.state_dict()] == [*eager.state_dict()]
        assert all(map(torch.equal, model.state_dict().values(), eager.state_dict().values()))
    for named in ("named_parameters", "named_buffers"):
        tensors = [dict(getattr(m, named)()) for m in (plain, fused, given_model)]
        for name, tensor in tensors[0].items():
            assert all(other[name] is tensor for other in tensors), f"{name} is another tensor"


def _assert_unfuses(eager: nn.Module, fused: nn.Module, case: Case) -> None:
    """The unfused model computes what the plain one does, bit for bit."""
    plain = unfuse(fused)
    assert _classes(plain) == _classes(eager)
    plain.load_state_dict(eager.state_dict())
    outcomes = [run(model, Compare(), _images(case, 7), eager) for model in (eager, plain)]
    assert outcomes[0].facts == outcomes[1].facts
    for name, tensor in outcomes[0].tensors.items():
        same = torch.equal(tensor.nan_to_num(), outcomes[1].tensors[name].nan_to_num())
        assert same, f"{name} of the unfused model"


def _assert_part_is_the_same(
    event: CallPart, eager: nn.Module, fused: nn.Module, case: Case
) -> None:
    modules = [part(model, eager, event) for model in (eager, fused)]
    if modules[0] is not eager and type(modules[0]) in (nn.Conv2d, nn.BatchNorm2d):
        channels = getattr(modules[0], "in_channels", None) or modules[0].num_features
        x = torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outs = [module(x.to(case.dtype)) for module in modules]
        # The statistics of a norm may come from other roundings.
        tolerance = 1e-3 if case.is_low else 1e-9
        assert torch.allclose(outs[0], outs[1], tolerance, tolerance), f"{event}"


def _classes(model: nn.Module) -> list[tuple[str, str, str, bool]]:
    """By name: parametrized layers have a class each."""
    return [
        (path, type(m).__module__, type(m).__qualname__, m.training)
        for path, m in model.named_modules()
    ]


class Outcome(NamedTuple):
    """facts: everything that must be equal."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    outputs: list[Tensor]
    error: Exception | None


def run(model: nn.Module, compare: Compare, x: Tensor, plain: nn.Module) -> Outcome:
    """Everything that a call of `model`, and a backward, leave behind.

    plain: the model with the names of submodules to look for hooks at.
    """
    for recorder in recorders(model, plain):
        recorder.calls.clear()
    model.zero_grad()
    torch.manual_seed(compare.seed)
    has_gradients = compare.mode not in ("no_grad", "inference_mode")
    leaf = x.clone().requires_grad_(has_gradients and compare.mode != "frozen_input")
    facts: dict[str, Any] = {}
    failure: Exception | None = None
    outputs: list[Tensor] = []
    everywhere = Recorder(1.0)
    x = leaf
    try:
        with _mode(compare.mode, everywhere):
            x = leaf.clone() if compare.mode != "leaf" else leaf
            outputs = [*_tensors_in(model(x))]
            if compare.mode == "two_calls":
                outputs += _tensors_in(model(2.0 * leaf))
            if has_gradients:
                _backward(outputs, leaf, compare.mode)
    except Exception as error:  # compared with eager's
        failure = error
    tensors = {f"out {i}": out for i, out in enumerate(outputs)} | {"x": x}
    if leaf.grad is not None:
        tensors["grad_x"] = leaf.grad
    tensors |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"buffer {n}": b for n, b in model.named_buffers()}
    tensors |= {f"kept {n}": m.kept for n, m in model.named_modules() if _keeps(m)}
    for i, recorder in enumerate((everywhere, *recorders(model, plain))):
        for j, (kind, seen) in enumerate(recorder.calls):
            tensors |= {f"hook {i} {j} {kind} {k}": t for k, t in enumerate(seen) if t is not None}
    facts["names"] = [*tensors]
    facts["outputs"] = [
        (out.shape, out.dtype, out.requires_grad, out.is_inference()) for out in outputs
    ]
    facts["random numbers"] = torch.get_rng_state().tolist()
    return Outcome({n: t.detach().clone() for n, t in tensors.items()}, facts, outputs, failure)


def _keeps(module: nn.Module) -> bool:
    return isinstance(vars(module).get("kept"), Tensor)


@contextlib.contextmanager
def _mode(mode: str, everywhere: Recorder) -> Iterator[None]:
    """everywhere: the hook of every module, in that mode."""
    handle = None
    if mode == "global_hook":
        handle = nn.modules.module.register_module_forward_hook(everywhere.forward)
    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    try:
        with contexts.get(mode, contextlib.nullcontext)():
            yield
    finally:
        if handle is not None:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _backward(outputs: list[Tensor], leaf: Tensor, mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    loss = leaf.new_zeros(())
    for out in outputs:
        weights = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
        loss = loss + (out * weights).sum()
    if mode == "double" and leaf.requires_grad and loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        loss = grad.pow(2).sum() + loss
    if mode == "grad_twice":
        loss.backward(retain_graph=True)
    if loss.requires_grad:
        loss.backward()


def _images(case: Case, seed: int, channels_last: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.batch, 3, *case.size, generator=generator).to(case.dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


class Judge:
    """The rule for accuracy, applied to runs of a plain, a fused and a float64 model."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._held: list[tuple[Tensor, Tensor]] = []

    def compare(
        self, compare: Compare, eager: nn.Module, fused: nn.Module, exact: nn.Module
    ) -> bool:
        """Whether the program can go on: not after an error, which both must raise."""
        if not self._case.is_low:
            return self._compare_draw(compare, eager, fused)
        errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
        violations: list[str] = []
        for draw in range(_DRAWS[-1]):
            seeded = compare._replace(seed=compare.seed + 100 * draw)
            if not self._compare_draw(seeded, eager, fused, exact, errors):
                return False
            if draw + 1 in _DRAWS:
                violations = [*self._violations(compare, errors)]
                if not violations:
                    return True
        raise AssertionError(f"{compare}: {violations[0]}")

    def _compare_draw(
        self,
        compare: Compare,
        eager: nn.Module,
        fused: nn.Module,
        exact: nn.Module | None = None,
        errors: dict[str, list[tuple[float, float]]] | None = None,
    ) -> bool:
        x = _images(self._case, compare.seed, compare.channels_last)
        plain, ours = (run(model, compare, x, eager) for model in (eager, fused))
        _assert_same_errors(compare, ours.error, plain.error)
        if plain.error is not None:
            return False
        for fact, value in plain.facts.items():
            assert ours.facts[fact] == value, f"{compare}: {fact}: {ours.facts[fact]}, {value}"
        self._held += [(out, out.detach().clone()) for out in ours.outputs]
        if exact is None or errors is None:
            _assert_equal(ours.tensors, plain.tensors, f"{compare}")
            return True
        truth = run(exact, compare, x.double(), eager)
        if truth.facts["names"] != plain.facts["names"]:
            return False  # float64 took another branch
        for name, pair in _errors(ours.tensors, plain.tensors, truth.tensors).items():
            errors[name].append(pair)
        return True

    def _violations(
        self, compare: Compare, errors: dict[str, list[tuple[float, float]]]
    ) -> Iterator[str]:
        dtype = torch.bfloat16 if compare.mode == "autocast" else self._case.dtype
        for name, pairs in errors.items():
            error, eager_error = (median(each) for each in zip(*pairs, strict=True))
            if error > 2.0 * eager_error + torch.finfo(dtype).eps:
                yield f"{name}: {error=:.2e} exceeds 2 x {eager_error=:.2e}"

    def assert_nothing_was_overwritten(self) -> None:
        for out, as_it_was in self._held:
            is_same = torch.allclose(out, as_it_was, rtol=0, atol=0, equal_nan=True)
            assert is_same, "an output was overwritten by a later call"


def _assert_equal(ours: dict[str, Tensor], plain: dict[str, Tensor], where: str) -> None:
    norms = {name: tensor.double().nan_to_num().norm() for name, tensor in plain.items()}
    # Some gradients are zero but for rounding: those of biases in front of a norm in training.
    zero = 1e-3 * max([1.0, *(norm for name, norm in norms.items() if name.startswith("grad"))])
    for name, tensor in plain.items():
        assert torch.equal(ours[name].isnan(), tensor.isnan()), f"{where}: {name}: NaN elsewhere"
        error = (ours[name] - tensor).double().nan_to_num().norm()
        norm = max(norms[name], zero if name.startswith("grad") else 1e-3)
        assert error <= 1e-9 * norm, f"{where}: {name}: {error / norm:.2e} off in float64"


def _errors(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """(our error, eager's), relative to the truth, of each kind of tensors as one."""
    squares: dict[str, list[tuple[float, float]]] = defaultdict(list)
    largest: dict[str, float] = defaultdict(float)
    for name, tensor in truth.items():
        kind = name.split()[0]
        largest[kind] = max(largest[kind], float(tensor.double().nan_to_num().norm()))
    for name, tensor in truth.items():
        kind = name.split()[0]
        norm = max(float(tensor.double().nan_to_num().norm()), 0.01 * largest[kind], 1e-30)
        pair = [
            float((other[name] - tensor).double().nan_to_num().norm() / norm) ** 2
            for other in (ours, plain)
        ]
        squares[kind].append((pair[0], pair[1]))
    return {
        kind: tuple((sum(each) / len(each)) ** 0.5 for each in zip(*pairs, strict=True))  # type: ignore[misc]
        for kind, pairs in squares.items()
    }
