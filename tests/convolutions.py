"""What the tests of the convolutions for training share: geometries, tensors, comparisons."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import Case, assert_as_accurate_as_eager, assert_fake_is_like_real, normal
from test_conv_bn_relu import Conv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused as rf
from resnet_fused.layout import memory_format

CONVS = {
    "3x3": Conv((2, 32, 7, 6), 40),
    "1x1": Conv((2, 32, 5, 7), 48, kernel=1, padding=(0, 0)),
    "strided": Conv((2, 32, 9, 8), 40, stride=(2, 2)),
    "strided 1x1": Conv((2, 32, 9, 8), 40, kernel=1, stride=(2, 2), padding=(0, 0)),
    "uneven": Conv((2, 32, 7, 6), 40, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "grouped": Conv((2, 24, 6, 5), 40, groups=2),
    "depthwise": Conv((2, 5, 4, 5), 5, groups=5),
    "stem": Conv((1, 3, 11, 10), 40, kernel=7, stride=(2, 2), padding=(3, 3)),
    "odd channels": Conv((2, 27, 5, 4), 41),
    "one channel": Conv((3, 1, 5, 4), 41),
    "1x1 image": Conv((5, 32, 1, 1), 40),
}
FAST = (torch.float32, torch.bfloat16)  # convolutions in the other dtypes are slow on most CPUs
LAYERED = ("strided", "1x1 image")
# Small enough for derivatives by differences.
TINY = {
    "uneven": Conv((1, 2, 4, 3), 2, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "grouped": Conv((1, 4, 2, 3), 2, groups=2),
}
# Each with the error and the message it must give, in every operator that has these arguments.
BAD_GEOMETRY: dict[str, tuple[dict[str, Any], Any, str]] = {
    "stride": ({"stride": -1}, ValueError, r"stride must be at least 1, got \(-1, -1\)"),
    "zero stride": ({"stride": (1, 0)}, ValueError, r"stride must be at least 1, got \(1, 0\)"),
    "three strides": (
        {"stride": (1, 1, 1)},
        ValueError,
        r"stride must be one int or two, got \(1, 1, 1\)",
    ),
    "dilation": ({"dilation": 0}, ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    "padding": ({"padding": -1}, ValueError, r"padding must not be negative, got \(-1, -1\)"),
    "padding of rows": (
        {"padding": (-1, 0)},
        ValueError,
        r"padding must not be negative, got \(-1, 0\)",
    ),
    "padding of columns": (
        {"padding": (0, -1)},
        ValueError,
        r"padding must not be negative, got \(0, -1\)",
    ),
    "padding by name": ({"padding": "same"}, ValueError, r"padding must be one int or two, got"),
    "no groups": ({"groups": 0}, ValueError, r"groups must divide .* got 0"),
    "weight is None": ({"weight": None}, TypeError, r"weight must be a Tensor, got NoneType"),
    "weight dimensions": (
        {"weight": torch.ones(4, 3, 3)},
        ValueError,
        r"weight must be a floating-point \(K, C / groups, R, S\) tensor, got torch.float32 of"
        r" shape \(4, 3, 3\)",
    ),
    "kernel too high": (
        {"weight": torch.ones(6, 4, 7, 3)},
        ValueError,
        r"x must be at least as large as the kernel, got \(2, 4, 6, 6\) for weight \(6, 4, 7, 3\)",
    ),
    "kernel too wide": (
        {"weight": torch.ones(6, 4, 3, 7)},
        ValueError,
        r"x must be at least as large as the kernel, got \(2, 4, 6, 6\) for weight \(6, 4, 3, 7\)",
    ),
    "weight integers": (
        {"weight": torch.ones(6, 4, 3, 3).int()},
        ValueError,
        r"weight must be a floating-point .* got torch.int32",
    ),
    "weight device": (
        {"weight": torch.ones(6, 4, 3, 3, device="meta")},
        ValueError,
        r"weight must be on the device of \w+ cpu, got meta \(move one with .to\(\)\)",
    ),
}
# The geometry as the schemas want it.
PAIRS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
Tensors = dict[str, Tensor]


def has_few_channels(conv: Conv) -> bool:
    """Whether per-channel sums of the input may be exact in eager by luck."""
    return conv.x[1] < 8


def draws(conv: Conv) -> range:
    """Seeds, far apart: so that the largest error of any channel is not a matter of luck."""
    return range(0, 400 if conv.kernels < 16 else 200, 100)


def weight_of(case: Case, conv: Conv, seed: int) -> Tensor:
    fan_in = conv.weight[1] * conv.kernel**2
    return (normal(conv.weight, seed) / fan_in**0.5).to(case.device, case.dtype)


def prologue_of(case: Case, conv: Conv, seed: int) -> Tensors:
    """What stands in front of the convolution, per channel of its input."""
    channels = (conv.x[1],)
    return {
        "scale": vector(case, normal(channels, seed).abs() + 0.5),
        "shift": vector(case, normal(channels, seed + 1)),
    }


def vector(case: Case, values: Tensor) -> Tensor:
    """Per-channel values in the dtype of statistics."""
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return values.to(case.device, dtype)


def eager_prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """p(x), in the format that operators choose: on CPUs eager's sums depend on it."""
    x = x.contiguous(memory_format=memory_format(x))
    if scale is None or shift is None:
        return x
    p = torch.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    return p.to(x.dtype)


def assert_same_outputs(
    fused: Callable[..., Tensors],
    eager: Callable[..., Tensors],
    tensors: Callable[[int], Tensors],
    gradients: Callable[[int], Tensors],
    seeds: range,
) -> Tensors:
    """Every named output of fused(**tensors) and every gradient is as accurate as eager's.

    tensors, gradients: arguments and gradients of outputs by name, for a seed; without the latter
    no gradient is taken. Errors are the largest over all seeds, because in one draw of a small
    tensor eager may be rounded luckily. Returns the results of `fused` for the last seed.
    """
    collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in seeds:
        given, grad_outs = tensors(seed), gradients(seed)
        actual = _results(fused, given, grad_outs)
        plain = _results(eager, given, grad_outs)
        exact = _results(eager, _doubled(given), _doubled(grad_outs))
        assert actual.keys() == plain.keys()
        for name, tensor in actual.items():
            assert tensor.shape == exact[name].shape, name
            assert tensor.dtype == plain[name].dtype, name
            collected.setdefault(name, []).append((tensor, plain[name], exact[name]))
    for name, triples in collected.items():
        of_all = (torch.cat([t.flatten() for t in each]) for each in zip(*triples, strict=True))
        assert_as_accurate_as_eager(*of_all, name)
    return actual


def assert_in_format(tensor: Tensor, like: Tensor) -> None:
    """NCHW where `like` is, channels_last for all others."""
    expected = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    assert tensor.is_contiguous(memory_format=expected), tensor.stride()


def assert_fake_is_like(backend: str, overload: Any, arguments: tuple[Any, ...]) -> None:
    """Outputs without data have shapes, dtypes and strides of the real ones."""
    with FakeTensorMode() as mode:
        given = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
        fake = overload(*given)
    with rf.backend(backend), torch.no_grad():
        real = overload(*arguments)
    pairs = [(fake, real)] if isinstance(real, Tensor) else zip(fake, real, strict=True)
    for ours, theirs in pairs:
        assert_fake_is_like_real(ours, theirs)


def assert_refused(
    function: Callable[..., Any], arguments: dict[str, Any], error: Any, message: str
) -> None:
    """function(**arguments) raises `error` with `message` behind the operator's name."""
    with pytest.raises(error, match=message) as raised:
        function(**arguments)
    assert str(raised.value).startswith(f"{function.__name__}: ")


def in_pairs(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with the geometry as the schemas want it."""
    return {
        name: (value, value) if name in PAIRS and isinstance(value, int) else value
        for name, value in arguments.items()
    }


def _results(function: Callable[..., Tensors], tensors: Tensors, grad_outs: Tensors) -> Tensors:
    leaves = {name: t.detach().requires_grad_(bool(grad_outs)) for name, t in tensors.items()}
    outputs = function(**leaves)
    detached = {name: output.detach() for name, output in outputs.items()}
    if not grad_outs:
        return detached
    gradients = torch.autograd.grad(
        [outputs[name] for name in grad_outs], list(leaves.values()), list(grad_outs.values())
    )
    named = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return detached | named


def _doubled(tensors: Tensors) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
