"""Is one model the same function as another: outputs, gradients, running statistics?"""

import copy
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters away from 0 and 1, so that mixed-up ones are noticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.data.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.data.uniform_(0.5, 1.5, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return model


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def step(
    model: nn.Module,
    x: Tensor,
    training: bool,
    call: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__,
) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and parameters, and buffers after one step.

    call: runs the model on x. Its result may nest tensors in lists and dicts. What is drawn at
    random in the model is the same in every step.
    """
    model.train(training)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = tensors_in(call(model, x.clone()))
    seed = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=seed).to(o.dtype)).sum() for o in outputs)
    loss.backward()
    tensors = {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {"grad_x": x.grad}
    tensors |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return tensors | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


def tensors_in(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among the outputs of a model, however nested."""
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [o for o in leaves if isinstance(o, Tensor) and o.is_floating_point()]


def assert_same_function(
    eager: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    x: Tensor,
    training: bool,
    deep: bool = True,
) -> None:
    """`convert(eager)` does what `eager` does, in outputs, gradients and running statistics.

    In float64 within 1e-9. In float32 its distance from float64 is at most twice that of eager,
    plus a rounding; of nine inputs, the median counts, as a few elements may be rounded luckily.
    Distances are relative, in the 2-norm per tensor. deep: one input, and no gradients in float32:
    in a deep network some value next to 0 is rounded to the other side of a ReLU by one of the two,
    which then is a few percent off.
    """
    errors: dict[str, list[float]] = defaultdict(list)
    eager_errors: dict[str, list[float]] = defaultdict(list)
    for trial in range(1 if deep else 9):
        if trial:
            x = torch.empty_like(x).copy_(images(*x.shape, seed=1000 + trial))  # same layout
        exact = step(copy.deepcopy(eager).double(), x.double(), training)
        fused = step(convert(copy.deepcopy(eager).double()), x.double(), training)
        assert exact.keys() == fused.keys()
        for name, tensor in exact.items():
            error = distance(fused[name], tensor)
            assert error <= 1e-9, f"{name}: {error=:.2e} in float64"
        native = x.contiguous(memory_format=torch.channels_last)
        plain = step(copy.deepcopy(eager), native, training)
        fused = step(convert(copy.deepcopy(eager)), x, training)
        for name, tensor in exact.items():
            errors[name].append(distance(fused[name], tensor))
            eager_errors[name].append(distance(plain[name], tensor))
    for name in errors:
        if deep and name.startswith("grad"):
            continue
        error, eager_error = median(errors[name]), median(eager_errors[name])
        limit = 2.0 * eager_error + torch.finfo(torch.float32).eps
        assert error <= limit, f"{name}: {error=:.2e} exceeds 2 x {eager_error=:.2e} in float32"


def distance(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; 0 where both are zero but for rounding.

    Such are the gradients of biases in front of a batch norm in training.
    """
    assert actual.shape == exact.shape
    norm = exact.double().norm()
    if norm < 1e-9 and actual.double().norm() < 1e-3:
        return 0.0
    return float((actual.double() - exact.double()).norm() / norm)
