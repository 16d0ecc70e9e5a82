"""torch.func, torch.jit and torch.compile on operators and networks; nothing waits for a GPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_written_blocks import Basic
from model_equality import images, randomize
from numerics import marks_of, missing, no_recompilation, normal
from operator_examples import OPERATORS, Example, overload_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

import resnet_fused as rf
from resnet_fused import _extension, backends, ops

needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)


def assert_equal(actual: Any, expected: Any) -> None:
    """Of float64, whose sums may be in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# vmap of an operator


def results(operator: str, arguments: list[Any]) -> list[Tensor]:
    """Outputs, and what the arguments are afterwards."""
    out = overload_of(operator)(*arguments)
    outputs = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
    return [*outputs, *(a for a in arguments if isinstance(a, Tensor))]


def assert_vmap_is_a_loop(operator: str, is_mapped: Callable[[Tensor], bool]) -> None:
    """Of outputs, and of what the operator writes to. The mapped dimension is the second one."""
    samples = [Example(i, 2, torch.float64).arguments(operator) for i in range(3)]
    first = samples[0]
    mapped = [i for i, a in enumerate(first) if isinstance(a, Tensor) and is_mapped(a)]
    stacked = [torch.stack([sample[i] for sample in samples], dim=1) for i in mapped]

    def call(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(mapped, tensors, strict=True))
        return results(operator, [given.get(i, a) for i, a in enumerate(first)])

    actual = vmap(call, in_dims=1)(*stacked)
    every = [[s[i] if i in mapped else a for i, a in enumerate(first)] for s in samples]
    expected = zip(*(results(operator, each) for each in every), strict=True)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_over_every_argument(operator: str) -> None:
    assert_vmap_is_a_loop(operator, lambda tensor: True)


IN_ONE_BATCH = (
    *("add_relu", "add_relu_backward", "conv_bn_relu", "conv_projection_relu"),
    *("bottleneck_tail", "bottleneck_roll", "bottleneck_block"),
)


def is_image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[2:] == (6, 5)


@pytest.mark.parametrize("operator", IN_ONE_BATCH)
def test_vmap_over_images_is_one_batch(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_vmap_is_a_loop(operator, is_image)
    chosen: list[str] = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda name, x: chosen.append(name) or choose(name, x))
    arguments = Example(0, 2, torch.float64).arguments(operator)
    dims = [0 if isinstance(a, Tensor) and is_image(a) else None for a in arguments]
    twice = [a if d is None else torch.stack([a, -a]) for a, d in zip(arguments, dims, strict=True)]
    mapped = [i for i, d in enumerate(dims) if d == 0]

    def call(*images: Tensor) -> Any:
        given = dict(zip(mapped, images, strict=True))
        return overload_of(operator)(*(given.get(i, a) for i, a in enumerate(arguments)))

    vmap(call)(*(twice[i] for i in mapped))
    assert chosen == [operator]


def test_vmap_of_batch_statistics() -> None:
    """Each sample has its own, with one weight for all, and none can go into one running mean."""
    x, weight, bias = normal((3, 2, 4, 5, 5), 0), normal((4,), 1), normal((4,), 2)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)

    def normalise(x: Tensor, *running: Tensor | None) -> Tensor:
        return ops.bn_relu(x, weight, bias, *running, training=True)

    expected = torch.stack([normalise(sample, None, None) for sample in x])
    torch.testing.assert_close(vmap(lambda x: normalise(x, None, None))(x), expected)
    with pytest.raises(RuntimeError, match=r"bn_relu: running_mean must be mapped by vmap .*got"):
        vmap(lambda x: normalise(x, mean, var))(x)
    assert torch.equal(mean, torch.zeros_like(mean))


# Gradients of operators by torch.func


def _convolved(x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    return ops.conv_bn_relu(x, weight, v, -v, x, padding=1)


def _normalised(x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    return ops.bn_relu(x, v, -v, None, None, training=True, residual=x * 0.5)


def _pooled(x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    return ops.bn_relu_max_pool(x, v, -v, None, None, training=True)


def _measured(x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    y, mean, m2 = ops.conv_stats(x, weight, v, -v)
    return y * mean.view(-1, 1, 1) + m2.view(-1, 1, 1)


DIFFERENTIABLE = {
    "add_relu": lambda x, weight, v: ops.add_relu(x, x * v.view(-1, 1, 1)),
    "conv_bn_relu": _convolved,
    "bn_relu": _normalised,
    "bn_relu_max_pool": _pooled,
    "conv_stats": _measured,
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_gradients_by_torch_func(operator: str, layout: str) -> None:
    """Of one batch, of each sample by vmap, and second derivatives, against autograd's."""
    weight, v = normal((4, 4, 3, 3), 1), normal((4,), 2).abs() + 0.5
    x = normal((3, 2, 4, 5, 9), 0)[..., 2:7]
    if layout != "sliced":
        formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        x = x.flatten(0, 1).contiguous(memory_format=formats[layout]).unflatten(0, (3, 2))

    def loss(x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        return DIFFERENTIABLE[operator](x, weight, v).pow(2).sum()

    expected = []
    for sample in x.unbind():
        leaves = [t.detach().requires_grad_() for t in (sample, weight, v)]
        grads = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
        expected.append(
            [
                torch.zeros_like(leaf) if g is None else g
                for leaf, g in zip(leaves, grads, strict=True)
            ]
        )
    one = grad(loss, argnums=(0, 1, 2))(x[0], weight, v)
    torch.testing.assert_close(list(one), expected[0], rtol=1e-9, atol=1e-9)
    _, pull = vjp(loss, x[0], weight, v)
    torch.testing.assert_close(
        list(pull(torch.ones((), dtype=x.dtype))), expected[0], rtol=1e-9, atol=1e-9
    )
    each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(x, weight, v)
    torch.testing.assert_close(
        list(each), [torch.stack(g) for g in zip(*expected, strict=True)], rtol=1e-9, atol=1e-9
    )

    def first(v: Tensor) -> Tensor:
        return grad(loss, argnums=2)(x[0], weight, v)

    leaf = v.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x[0], weight, leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient]
    assert all(row.abs().sum() > 0 for row in rows)
    assert_equal(jacrev(first)(v), torch.stack(rows))


# Fused networks


class Network(nn.Module):
    """Two blocks between a convolution and a classifier, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.blocks = nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1))
        self.fc = nn.Linear(16, 3)
        randomize(self, seed).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.conv(x)).mean((2, 3)))


def pair() -> tuple[nn.Module, nn.Module]:
    """A fused network and its plain twin."""
    plain = Network().eval()
    return rf.fuse(copy.deepcopy(plain)), plain


X = images(4, 3, 11, 9, dtype=torch.float64)


def test_vmap_of_networks() -> None:
    """Over batches; also of a network that changes the memory format of its input."""
    x = torch.stack([X, -X])
    torch.testing.assert_close(*(vmap(model)(x) for model in pair()))
    whole = rf.models.ResNet(rf.nn.BasicBlock, (1, 1, 1, 1), num_classes=3).double().eval()
    with torch.no_grad():
        x = images(2, 2, 3, 33, 33, dtype=torch.float64)
        torch.testing.assert_close(vmap(whole)(x), torch.stack([whole(batch) for batch in x]))


def test_ensemble_of_networks() -> None:
    plain = [Network(seed).eval() for seed in range(3)]
    state = stack_module_state([rf.fuse(copy.deepcopy(model)) for model in plain])
    base = rf.fuse(copy.deepcopy(plain[0])).to("meta")
    outputs = vmap(lambda *state: functional_call(base, state, (X,)))(*state)
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in plain]))


def test_functional_call_computes_with_what_it_is_given() -> None:
    """Also where a plan for the module's own tensors was made."""
    fused, other = pair()[0].float(), Network(seed=5).float().eval()
    x = X.float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before, planned = fused(x), fused(x)
        out = functional_call(fused, dict(other.state_dict()), (x,))
        torch.testing.assert_close(out, other(x))
        torch.testing.assert_close(planned, before)
        assert torch.equal(fused(x), planned)


@pytest.mark.parametrize("transform", ["grad", "of each sample", "jacobian"])
def test_gradients_of_networks(transform: str) -> None:
    results = []
    for model in pair():
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

        def loss(
            parameters: dict[str, Tensor],
            x: Tensor,
            model: nn.Module = model,
            buffers: dict[str, Tensor] = buffers,
        ) -> Tensor:
            return functional_call(model, (parameters, buffers), (x,)).square().sum()

        if transform == "grad":
            results.append(grad(loss)(parameters, X))
        elif transform == "of each sample":
            results.append(vmap(grad(loss), in_dims=(None, 0))(parameters, X[:, None]))
        else:
            results.append({"x": jacrev(model)(X)})
    assert all(gradient.abs().sum() > 0 for gradient in results[0].values())
    assert_equal(*results)


# torch.jit


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("gradients", [True, False])
def test_networks_are_traced(gradients: bool) -> None:
    """torch.jit.trace traces twice, with and without gradients, and compares the two."""
    whole = rf.models.ResNet(rf.nn.BasicBlock, (1, 1, 1, 1), num_classes=3).eval()
    x = images(2, 3, 33, 33)
    for model, given in ((whole, x), (pair()[0], X)):
        with torch.set_grad_enabled(gradients):
            model(given)  # a plan may be made
            traced = torch.jit.trace(model, (given,))
        torch.testing.assert_close(traced(given * 2), model(given * 2), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "model",
    [
        rf.models.resnet20(),
        rf.models.preact_resnet20(),
        nn.Sequential(rf.nn.ConvBnReLU2d(3, 8)),
        rf.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())),
    ],
    ids=["blocks", "pre-activation", "layers", "converted"],
)
def test_scripts_are_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.script: .* got .*torch\.jit\.trace"):
        torch.jit.script(model)


# torch.compile


# What inductor makes of training is tested in test_training_semantics.py.
@pytest.mark.parametrize(
    ("backend", "training"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiled_network(backend: str, training: bool) -> None:
    """Converted blocks in one graph for every batch size, which is marked as dynamic."""
    fused, plain = (model.train(training) for model in pair())
    with no_recompilation(), torch.set_grad_enabled(training):
        compiled = torch.compile(fused, fullgraph=True, backend=backend)
        for batch in (4, 2, 3):
            x = images(batch, 3, 11, 9, seed=batch, dtype=torch.float64)
            torch._dynamo.mark_dynamic(x, 0)
            results = []
            for model in (compiled, plain):
                model.zero_grad()
                out = model(x)
                if training:
                    out.square().sum().backward()
                results.append([out.detach(), *(p.grad for p in plain.parameters() if training)])
            if training:
                results[0][1:] = [p.grad for p in fused.parameters()]
            assert_equal(*results)
    buffers = [list(model.buffers()) for model in (fused, plain)]
    assert_equal(*buffers)


# What a captured CUDA graph forbids

WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__")


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("emulated", marks=marks_of("emulated")),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_device(
    training: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is read between the blocks or in the launchers' Python, which GPUs share."""
    reason = missing("bn_relu", backend)
    if reason is not None:
        pytest.skip(reason)
    blocks = nn.Sequential(
        *(rf.nn.BasicBlock(8, 8), rf.nn.Bottleneck(8, 2, downsample=None)),
        rf.nn.PreActBasicBlock(8, 8),
    ).train(training)
    x = images(2, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    with rf.backend(backend):
        first = blocks(x)  # the emulator is compiled
        for name in WAITING:
            monkeypatch.setattr(Tensor, name, refuse(name))
        with pytest.raises(AssertionError, match="item"):
            x.sum().item()
        if training:
            blocks(x).backward(first.detach())
        with torch.no_grad():
            blocks(x)
    assert x.grad is not None or not training


def refuse(name: str) -> Callable[..., None]:
    def method(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"Tensor.{name} waits for the device")

    return method
