"""A fused block trains as its eager twin does: modes, precisions, autograd, loops, compilers."""

import contextlib
import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import mean, median

import pytest
import torch
from model_equality import distance, images, randomize
from numerics import no_recompilation
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused import _extension
from resnet_fused.commands.networks import eager_twin
from resnet_fused.models import ZeroPadShortcut

LAYOUTS = (torch.contiguous_format, torch.channels_last)
Norm = Callable[[int], nn.Module]
Run = Callable[[nn.Module, Tensor], Tensor]


def projection(inplanes: int, planes: int, stride: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm(planes))


def pooled(inplanes: int, planes: int, stride: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(stride), *projection(inplanes, planes, 1, norm))


def zero_padded(inplanes: int, planes: int, stride: int, norm: Norm) -> nn.Module:
    return ZeroPadShortcut(planes - inplanes, stride)


SHORTCUTS: dict[str, Callable[[int, int, int, Norm], nn.Module] | None] = {
    "identity": None,
    "projection": projection,
    "zero_padded": zero_padded,
    "pooled": pooled,
}
VARIANTS = [f"{kind}-{shortcut}" for kind in ("basic", "bottleneck") for shortcut in SHORTCUTS]
ONE_NODE = [name for name in VARIANTS if name.endswith(("identity", "projection"))]


def make(variant: str, norm: Norm = nn.BatchNorm2d, width: int = 8) -> nn.Module:
    """A fused block of `width` input channels in training; its stride is 2 but for identity."""
    kind, shortcut = variant.split("-")
    make_shortcut = SHORTCUTS[shortcut]
    block = {"basic": rf.nn.BasicBlock, "bottleneck": rf.nn.Bottleneck}[kind]
    out = width if make_shortcut is None else 2 * width
    downsample = None if make_shortcut is None else make_shortcut(width, out, 2, norm)
    stride = 1 if make_shortcut is None else 2
    return randomize(block(width, out // block.expansion, stride, downsample, norm_layer=norm))


def norms_of(block: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)}


NORMS = [(variant, name) for variant in VARIANTS for name in norms_of(make(variant))]


def x_for(
    block: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 3
) -> Tensor:
    x = images(batch, block.conv1.in_channels, 6, 6, seed=seed, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def outcome(
    block: nn.Module, x: Tensor, run: Run = call, x_needs_grad: bool = True
) -> dict[str, Tensor | None]:
    """Output, every gradient, None where there is none, and buffers after one step."""
    block.zero_grad()
    x = x.detach().clone().requires_grad_(x_needs_grad)
    out = run(block, x)
    if out.requires_grad:
        out.backward(images(*out.shape, seed=5).to(out.dtype))
    tensors = {"out": out.detach(), "grad x": x.grad}
    tensors |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
    tensors |= {f"buffer {name}": b for name, b in block.named_buffers()}
    return {name: None if t is None else t.clone() for name, t in tensors.items()}


def assert_equal(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], allowed: float = 1e-9
) -> None:
    """The same tensors, None in the same places, at most `allowed` apart (0: bit by bit)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = ours[name]
        assert (mine is None) is (tensor is None), name
        if mine is not None:
            assert mine.dtype == tensor.dtype, name
            error = distance(mine, tensor) if allowed else float(not torch.equal(mine, tensor))
            assert error <= allowed, f"{name}: {error=:.2e}"


FEW_VALUES = 64


def assert_same_training(
    block: nn.Module,
    run: Run = call,
    steps: int = 1,
    trials: int = 5,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    x: Tensor | None = None,
    **options: bool,
) -> None:
    """What `steps` calls of the block leave behind is what calls of its eager twin leave.

    In float64 within 1e-9. Else the error against float64 is at most twice that of eager, plus one
    rounding of dtype, over all inputs together, see `typical`. dtype: that of the convolutions, by
    autocast in `run`, which must leave float64 alone, or because the block is. Small tensors, whose
    few values eager may round luckily, count together: one distribution for all gradients.
    """
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    shape = (x_for(block) if x is None else x).shape
    for trial in range(trials):
        exact64 = eager_twin(block).double()
        blocks = [exact64, copy.deepcopy(block), eager_twin(block)]
        blocks += [copy.deepcopy(block).double()] * (trial < 3)
        for step in range(steps):
            given = images(*shape, seed=10 * trial + step).contiguous(memory_format=layout)
            exact, fused, eager, *fused64 = (
                outcome(b, given.to(next(b.parameters()).dtype), run, **options) for b in blocks
            )
            for doubled in fused64:
                assert_equal(doubled, exact)
        for name, tensor in exact.items():
            mine, theirs = fused[name], eager[name]
            assert (mine is None) is (theirs is None) is (tensor is None), name
            if tensor is not None:
                assert mine.dtype == theirs.dtype, name
                small = tensor.numel() < FEW_VALUES
                kind = f"small {name.partition(' ')[0]}" if small else name
                errors[kind].append((distance(mine, tensor), distance(theirs, tensor)))
    for name, pairs in errors.items():
        error, eager_error = (typical(side, dtype) for side in zip(*pairs, strict=True))
        limit = 2 * eager_error + torch.finfo(dtype).eps
        assert error <= limit, f"{name}: {error=:.2e} exceeds 2 x {eager_error=:.2e} in {dtype}"


def typical(errors: tuple[float, ...], dtype: torch.dtype) -> float:
    """Their median in float32, as in `model_equality`, and root mean square in 16 bits.

    Values next to 0 are rounded to the other side of a ReLU, in eager as in fused blocks. That is
    a rare accident in float32, to be left out, but in 16 bits most of every error: a sum over
    enough of them says how many there are.
    """
    return median(errors) if dtype.itemsize == 4 else math.sqrt(mean(e * e for e in errors))


# Gradients of every variant


def as_function(block: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The block as a function of its input and all of its parameters, and those, in float64."""
    block = block.double()
    names = [name for name, _ in block.named_parameters()]
    values = [p.detach().requires_grad_() for p in block.parameters()]
    x = images(2, block.conv1.in_channels, 4, 4, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, given, (x,))

    return function, [x, *values]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, training: bool) -> None:
    """Every derivative of every output by itself in training, random sums of them otherwise."""
    width = 2 if variant.startswith("basic") else 4
    function, inputs = as_function(make(variant, width=width).train(training))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=not training)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_real_sizes(variant: str, layout: torch.memory_format) -> None:
    block = make(variant, width=64)
    assert_same_training(block, layout=layout, trials=3, x=images(4, 64, 14, 14))


def under_autocast(block: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=x.dtype != torch.float64):
        return block(x)


MANY_IMAGES = images(8, 32, 14, 14)


@pytest.mark.parametrize(("dtype", "trials"), [(torch.bfloat16, 4), (torch.float16, 10)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str, dtype: torch.dtype, trials: int) -> None:
    run = functools.partial(under_autocast, dtype=dtype)
    block = make(variant, width=32)
    assert_same_training(block, run, trials=trials, dtype=dtype, x=MANY_IMAGES)


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ONE_NODE)
def test_weights_in_bfloat16(variant: str, norm_dtype: torch.dtype) -> None:
    """Without autocast, with normalisations in float32 as people keep them, or also in bfloat16."""
    block = make(variant, width=32).bfloat16()
    for norm in norms_of(block).values():
        norm.to(norm_dtype)
    assert_same_training(block, trials=4, dtype=torch.bfloat16, x=MANY_IMAGES)


# Modes


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("variant", "name"), NORMS)
def test_one_norm_in_evaluation(variant: str, name: str, frozen: bool) -> None:
    block = make(variant)
    norms_of(block)[name].eval().requires_grad_(not frozen)
    assert_same_training(block)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_norms_in_evaluation(variant: str, frozen: bool) -> None:
    block = make(variant)
    for norm in norms_of(block).values():
        norm.eval().requires_grad_(not frozen)
    assert_same_training(block)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_frozen_but_x(variant: str, training: bool) -> None:
    block = make(variant).train(training).requires_grad_(False)
    assert_same_training(block)
    assert_same_training(block, trials=1, x_needs_grad=False)  # nothing needs a gradient


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_freezing_changes_no_other_gradient(variant: str, layout: torch.memory_format) -> None:
    """Each leaf alone, and all but each, get bit by bit what they get with all others."""
    block = make(variant)
    x = x_for(block).contiguous(memory_format=layout)
    full = outcome(copy.deepcopy(block), x)
    leaves = ["x", *dict(block.named_parameters())]
    for leaf in leaves:
        for trained in ({leaf}, {*leaves} - {leaf}):
            partly = copy.deepcopy(block)
            for name, parameter in partly.named_parameters():
                parameter.requires_grad_(name in trained)
            expected = {
                name: None if name[5:] in {*leaves} - trained else tensor
                for name, tensor in full.items()
            }
            assert_equal(outcome(partly, x, x_needs_grad="x" in trained), expected, allowed=0)


NORM_KINDS: dict[str, Norm] = {
    "no_statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "not_affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "other_momentum": lambda n: nn.BatchNorm2d(n, eps=1e-2, momentum=0.9),
    "no_momentum": lambda n: nn.BatchNorm2d(n, momentum=0.0),
}


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_steps_of_each_kind_of_norm(variant: str, kind: str) -> None:
    """num_batches_tracked and cumulative averages are among the buffers compared."""
    assert_same_training(make(variant, NORM_KINDS[kind]), steps=3, trials=3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ONE_NODE)
def test_tracking_switched_off_later(variant: str, training: bool) -> None:
    """The buffers are still there: unused in training, used in evaluation."""
    block = make(variant).train(training)
    for norm in norms_of(block).values():
        norm.track_running_stats = False
    assert_same_training(block, trials=3)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_move_without_gradients(
    variant: str, guard: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        with guard():
            return block(x).clone()

    block = make(variant)
    before = {name: b.clone() for name, b in block.named_buffers()}
    after = outcome(copy.deepcopy(block), x_for(block), run, x_needs_grad=False)
    assert not any(torch.equal(after[f"buffer {name}"], b) for name, b in before.items())
    assert_same_training(block, run, steps=2, trials=3, x_needs_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.endswith("pooled")])
def test_one_value_per_channel_is_refused(variant: str, dtype: torch.dtype) -> None:
    x = images(1, 8, 1, 1, dtype=dtype)
    x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    for block in (make(variant).to(dtype), eager_twin(make(variant).to(dtype))):
        for guard in (torch.enable_grad, torch.no_grad):
            message = "xpected more than 1 value per channel when training"
            with guard(), pytest.raises(ValueError, match=message):
                block(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_without_images(variant: str) -> None:
    """Gradients of zero, statistics that do not move, and a batch that is counted."""
    assert_same_training(make(variant), x=images(0, 8, 6, 6), trials=1)


@pytest.mark.parametrize("bad", ["int64", "bool", "complex64", "float64", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dtypes_are_refused_as_by_eager(variant: str, bad: str) -> None:
    block = make(variant)
    x = torch.ones(2, 8, 6, 6, dtype=getattr(torch, bad))
    for guard in (torch.enable_grad, torch.no_grad):
        with guard(), pytest.raises((RuntimeError, TypeError), match=r"\w+ \w+") as eager:
            eager_twin(block)(x)
        with guard(), pytest.raises(eager.type, match=r"\w+ \w+"):
            block(x)


# What people do with autograd


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(variant: str, use_reentrant: bool) -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=use_reentrant)

    block = make(variant)
    assert_same_training(block, run, steps=2, trials=3)
    kept, recomputed = (outcome(copy.deepcopy(block), x_for(block), r) for r in (call, run))
    gradients = [name for name in kept if not name.startswith("buffer")]
    if not use_reentrant:  # else the first forward runs without gradients, on other operators
        assert all(torch.equal(kept[name], recomputed[name]) for name in gradients)


@pytest.mark.parametrize("variant", ONE_NODE)
def test_checkpoint_under_autocast(variant: str) -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(under_autocast, block, x, use_reentrant=False)

    block = make(variant, width=32)
    assert_same_training(block, run, trials=4, dtype=torch.bfloat16, x=MANY_IMAGES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_accumulation(variant: str) -> None:
    """Gradients that shared their memory would be added twice."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        for part in (x[:2], x[2:4]):
            block(part).square().sum().backward()
        return block(x[4:])

    assert_same_training(make(variant), run, trials=3, x=images(6, 8, 6, 6))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_have_memory_of_their_own(variant: str) -> None:
    block = make(variant)
    x = x_for(block).requires_grad_()
    out = block(x)
    grad_out = torch.ones_like(out)
    out.backward(grad_out)
    tensors = [grad_out, x.grad, out, x, *block.parameters(), *(p.grad for p in block.parameters())]
    memory = {t.untyped_storage().data_ptr() for t in tensors}
    assert len(memory) == len(tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_gradient_on_its_own_from_a_kept_graph(variant: str) -> None:
    block = make(variant)
    x = x_for(block).requires_grad_()
    leaves = [x, *block.parameters()]
    out = block(x)
    grad_out = images(*out.shape, seed=5)
    together = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(out, [leaf], grad_out, retain_graph=True)
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_of_a_partly_frozen_block(variant: str) -> None:
    """A gradient penalty, as in WGAN-GP, where only some leaves take part."""
    block = make(variant).double()
    block.bn1.eval()
    block.conv1.weight.requires_grad_(False)
    block.bn2.requires_grad_(False)

    def run(block: nn.Module, x: Tensor) -> Tensor:
        out = block(x)
        trained = [p for p in block.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), [x, *trained], create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sqrt()

    assert_equal(
        *(outcome(b, x_for(block, torch.float64), run) for b in (block, eager_twin(block)))
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_around_a_backward_changes_nothing(variant: str) -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        out = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            grads = torch.autograd.grad(out.square().sum(), [x, block.bn1.bias], create_graph=True)
            sum(g.square().sum() for g in grads).backward(retain_graph=True)
        return out

    assert_same_training(make(variant), run, trials=9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_gradients_in_one_backward(variant: str, layout: torch.memory_format) -> None:
    """As in torch.autograd.functional.jacobian(vectorize=True)."""
    block = make(variant)
    x = x_for(block).contiguous(memory_format=layout).requires_grad_()
    leaves = [x, *block.parameters()]
    out = block(x)
    several = images(2, *out.shape)
    batched = torch.autograd.grad(out, leaves, several, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in several]
    for together, alone in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode(variant: str, training: bool) -> None:
    """Dual tensors, unlike torch.func.jvp, leave running statistics free to move."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = images(*x.shape, seed=3).to(x)
            out = forward_ad.unpack_dual(block(forward_ad.make_dual(x, tangent)))
            return torch.cat((out.primal, out.tangent))

    block = make(variant).train(training)
    with torch.no_grad():
        block(x_for(block))  # a plan may be made
    assert_same_training(block, run, trials=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_algorithms(variant: str) -> None:
    """The same bits as without, though uninitialised memory is then filled with NaN."""
    block = make(variant)
    x = x_for(block)
    free = outcome(copy.deepcopy(block), x)
    with deterministic():
        assert_equal(outcome(copy.deepcopy(block), x), free, allowed=0)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_on_tensors_and_on_the_block(variant: str) -> None:
    seen: list[Tensor] = []

    def run(block: nn.Module, x: Tensor) -> Tensor:
        seen.clear()
        given = x * 1
        given.retain_grad()
        given.register_hook(lambda grad: 3 * grad)
        block.conv1.weight.register_hook(lambda grad: 2 * grad)
        block.bn2.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
        block.register_full_backward_hook(lambda _, inner, outer: seen.extend((*inner, *outer)))
        out = block(given)
        out.register_hook(lambda grad: grad / 2)
        out.backward(images(*out.shape, seed=6).to(out))
        return torch.cat([t.flatten() for t in (*seen, given.grad)])

    block = make(variant)
    assert_same_training(block, run, trials=3)
    assert len(seen) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_steps_inside_of_the_backward(variant: str) -> None:
    """Each parameter is changed as soon as its gradient is there, while others are pending."""

    def run(blocks: nn.Module, x: Tensor) -> Tensor:
        def step(parameter: nn.Parameter) -> None:
            parameter.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None

        handles = [
            p.register_post_accumulate_grad_hook(torch.no_grad()(step)) for p in blocks.parameters()
        ]
        blocks(x).square().mean().backward()
        for handle in handles:
            handle.remove()
        return blocks(x)

    block = nn.Sequential(make(variant), make(variant.split("-")[0] + "-identity", width=16))
    if variant.endswith("identity"):
        block = nn.Sequential(make(variant), make(variant))
    assert_same_training(block, run, trials=3, x=images(3, 8, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_after_the_forward_are_noticed_or_harmless(variant: str, dtype: torch.dtype) -> None:
    """Of x, the output, each parameter and each buffer: an error, or the right gradients."""
    names = ["x", "out", *(name for name in make(variant).state_dict() if "num_" not in name)]
    for training in (True, False):
        block = make(variant).to(dtype).train(training)
        expected = outcome(copy.deepcopy(block), x_for(block, dtype))
        for name in names:

            def run(block: nn.Module, x: Tensor, name: str = name) -> Tensor:
                given = x * 1
                out = block(given)
                clone = out * 1
                edited = {"x": given, "out": out} | block.state_dict()
                with torch.no_grad():
                    edited[name].add_(1)
                return clone

            try:
                found = outcome(copy.deepcopy(block), x_for(block, dtype), run)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
            else:
                found |= {k: v for k, v in expected.items() if k.startswith("buffer")}
                assert_equal(found, expected, allowed=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_call(variant: str) -> None:
    """Other parameters and buffers than the block's own: those get the gradients and updates."""
    block = make(variant)
    others = {name: 2 * t.detach() for name, t in make(variant).state_dict().items()}

    def run(block: nn.Module, x: Tensor) -> Tensor:
        state = {n: t.to(x.dtype).clone() if t.dim() else t.clone() for n, t in others.items()}
        leaves = [state[name].requires_grad_() for name, _ in block.named_parameters()]
        out = torch.func.functional_call(block, state, (x,))
        grads = torch.autograd.grad(out, leaves, images(*out.shape, seed=6).to(out))
        updated = [state[name].to(x.dtype).flatten() for name, _ in block.named_buffers()]
        return torch.cat([t.flatten() for t in (out, *grads, *updated)]).detach()

    before = copy.deepcopy(block.state_dict())
    assert_same_training(block, run, trials=3)
    run(block, x_for(block))
    torch.testing.assert_close(block.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_tensors_on_the_way_to_elsewhere(variant: str) -> None:
    """Offloading to host memory, and anomaly detection."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
            return block(x)

    block = make(variant)
    both = [outcome(copy.deepcopy(block), x_for(block), r) for r in (call, run)]
    assert_equal(*both, allowed=0)


class Tied(nn.Sequential):
    """Two blocks with one conv1.weight, one bn2, and a convolution that stands twice in one."""

    def __init__(self, variant: str) -> None:
        super().__init__(make(variant), make(variant))
        self[1].conv1.weight = self[0].conv1.weight
        self[1].bn2 = self[0].bn2
        if variant.startswith("basic"):
            self[1].conv2 = self[1].conv1


@pytest.mark.parametrize("variant", ["basic-identity", "bottleneck-identity"])
def test_blocks_that_share_some_of_their_parts(variant: str) -> None:
    tied = Tied(variant)
    assert_same_training(tied, steps=2, trials=3, x=images(3, 8, 6, 6))


def test_one_norm_twice_in_a_block() -> None:
    """Its running statistics move twice, in order, also as a cumulative average."""
    for momentum in (0.1, None):
        block = make("basic-identity")
        block.bn2 = block.bn1
        block.bn1.momentum = momentum
        assert_same_training(block, steps=2, trials=3)


# Training loops


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_in_the_middle_of_training(variant: str) -> None:
    """An EMA of the weights, a deepcopy that trains on alone, and statistics estimated anew."""
    block = make(variant).double()
    ends = []
    for model in (copy.deepcopy(block), eager_twin(block)):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(x_for(block, torch.float64, seed=step)).square().mean()
            if step == 1:
                alone = copy.deepcopy(model)  # between a forward and its backward
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        batches = [x_for(block, torch.float64, seed=20 + i) for i in range(2)]
        update_bn(batches, average)
        left = outcome(alone, batches[0])
        for name, module in (("trained", model), ("average", average), ("copy", alone)):
            with torch.no_grad():
                left[f"evaluation of {name}"] = module.eval()(batches[1])
            left |= {f"{name} {n}": t for n, t in module.state_dict().items()}
        ends.append(left)
    assert_equal(*ends)


SCALE = 2.0**40  # far too large for float16, and two skips later right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_scaler(variant: str, dtype: torch.dtype) -> None:
    """The same steps are skipped: in float16 where the scale is too large, and where a loss is inf.

    What is trained then is as near to float64 as what eager trains.
    """
    block = make(variant, width=32)
    scales, trained = zip(
        *(scaled_training(b, dtype) for b in (copy.deepcopy(block), eager_twin(block))),
        strict=True,
    )
    assert scales[0] == scales[1]
    skipped = [b < a for a, b in zip((SCALE, *scales[0]), scales[0], strict=False)]
    assert skipped == [dtype == torch.float16, True, False, False, False]
    _, exact = scaled_training(eager_twin(block).double(), torch.float64, skipped)
    error, eager_error = (distance(t, exact) for t in trained)
    assert error <= 2 * eager_error + torch.finfo(dtype).eps


def scaled_training(
    model: nn.Module, dtype: torch.dtype, skipped: list[bool] | None = None
) -> tuple[list[float], Tensor]:
    """Scale after each step, and by how much all parameters and buffers moved in the end."""
    scaler = torch.amp.GradScaler(
        "cpu", SCALE, growth_factor=1.5, backoff_factor=2.0**-14, growth_interval=2
    )
    scaler = scaler if skipped is None else torch.amp.GradScaler("cpu", enabled=False)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scales = []
    for step in range(5):
        optimizer.zero_grad()
        x = images(4, 32, 8, 8, seed=step).contiguous(memory_format=torch.channels_last)
        out = under_autocast(model, x.to(next(model.parameters()).dtype), dtype)
        target = images(*out.shape, seed=50 + step).to(out)
        loss = (out - target).double().square().mean() * (float("inf") if step == 1 else 1)
        scaler.scale(loss).backward()
        if skipped is None or not skipped[step]:
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    moved = [(t - start[name]).double().flatten() for name, t in model.state_dict().items()]
    return scales, torch.cat(moved)


# Compilers


class Network(nn.Module):
    """Blocks and a classifier, in float64."""

    def __init__(self, *variants: str) -> None:
        super().__init__()
        widths = [8 if i == 0 else 16 for i in range(len(variants))]
        self.blocks = nn.Sequential(*map(make, variants, [nn.BatchNorm2d] * 2, widths))
        self.fc = nn.LazyLinear(5)
        self.double()(images(2, 8, 8, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self(x), torch.arange(x.shape[0]) % 5)


def trained(
    model: Network, loss_of: Callable[[Tensor], Tensor], batches: tuple[int, ...] = (4, 6, 3)
) -> dict[str, Tensor | None]:
    """The losses of steps on batches of these sizes, and the state after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        x = images(batch, 8, 8, 8, seed=batch, dtype=torch.float64)
        loss = loss_of(x.contiguous(memory_format=torch.channels_last))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | model.state_dict()


@pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)
def test_compiled_training_runs_fused_operators() -> None:
    """The equalities below say little about blocks that run their plain layers."""
    called: set[str] = set()

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    block = make("basic-identity")
    torch._dynamo.reset()
    torch.compile(block, fullgraph=True, backend=record)(x_for(block))
    assert any("resnet_fused" in name for name in called)


@pytest.mark.parametrize(
    "variants",
    [("basic-projection", "basic-identity"), ("bottleneck-zero_padded", "bottleneck-pooled")],
)
def test_compiled_training(variants: tuple[str, str]) -> None:
    """Forward, loss and backward in one graph each, for every batch size, without recompilation."""
    model = Network(*variants)
    eager = eager_twin(model)
    with no_recompilation():
        compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, backend="aot_eager")
        ours = trained(model, compiled)
    assert_equal(ours, trained(eager, eager.loss))


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace Tensor.backward()",
)
@pytest.mark.parametrize("variant", ["basic-zero_padded", "bottleneck-projection"])
def test_compiled_training_in_a_single_graph(variant: str) -> None:
    """With the backward."""
    model = Network(variant)
    eager = eager_twin(model)

    def step(x: Tensor) -> Tensor:
        loss = model.loss(x)
        loss.backward()
        return loss.detach()

    with no_recompilation(), torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        ours = trained(model, compiled)
    assert_equal(ours, trained(eager, eager.loss))


def test_training_compiled_by_inductor() -> None:
    model = Network("basic-identity")
    eager = eager_twin(model)
    with no_recompilation():
        compiled = torch.compile(model.loss, fullgraph=True)
        ours = trained(model, compiled, batches=(4, 4))
    assert_equal(ours, trained(eager, eager.loss, batches=(4, 4)))
