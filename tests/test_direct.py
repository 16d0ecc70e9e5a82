"""Direct convolutions of residual networks against the same mathematics in float64."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numerics import normal
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import _extension, direct, models, native
from resnet_fused.nn import inference_plan
from resnet_fused.packing import Convolution, PackedBlock

DTYPES = (torch.float32, torch.bfloat16)
SUPPORTED = [dtype for dtype in DTYPES if direct.runs(dtype)]

pytestmark = pytest.mark.skipif(
    not SUPPORTED,
    reason="no inner loops for direct convolutions: "
    + (_extension.error() or "this CPU, or RESNET_FUSED_CPU_ISA, has no AVX-512"),
)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Fewer threads than images, as many, and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def convolution(
    seed: int,
    channels: int,
    planes: int,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | None = None,
    dilation: tuple[int, int] = (1, 1),
) -> Convolution:
    if padding is None:
        padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
    fan_in = channels * kernel[0] * kernel[1]
    weight = (normal((planes, channels, *kernel), seed) * (2 / fan_in) ** 0.5).float()
    scale, shift = normal((planes,), seed + 1).abs().float() + 0.5, normal((planes,), seed + 2)
    return Convolution(weight, scale, shift.float(), (padding, stride, dilation, 1))


def apply(x: Tensor, conv: Convolution, dtype: torch.dtype) -> Tensor:
    """The convolution and its normalisation in `dtype`, with the weight folded as eager would."""
    padding, stride, dilation, _ = conv.geometry
    weight = conv.weight.double() * conv.scale.double().view(-1, 1, 1, 1)
    bias = conv.shift.to(dtype)
    return F.conv2d(x.to(dtype), weight.to(dtype), bias, stride, padding, dilation)


def network(
    x: Tensor, blocks: list[tuple[list[Convolution], bool]], stem: Convolution | None, dtype: Any
) -> Tensor:
    """The same network layer by layer in `dtype`."""
    if stem is not None:
        x = F.max_pool2d(torch.relu(apply(x, stem, dtype)), 3, 2, 1)
    for convolutions, has_projection in blocks:
        main = convolutions[:-1] if has_projection else convolutions
        z = x
        for conv in main[:-1]:
            z = torch.relu(apply(z, conv, dtype))
        shortcut = apply(x, convolutions[-1], dtype) if has_projection else x.to(dtype)
        x = torch.relu(apply(z, main[-1], dtype) + shortcut)
    return x


def run(
    x: Tensor, blocks: list[tuple[list[Convolution], bool]], stem: Convolution | None = None
) -> Tensor:
    packed_stem = None if stem is None else direct.pack_stem(tuple(x.shape), x.dtype, stem, {})
    shape = tuple(x.shape) if packed_stem is None else packed_stem.out_shape
    packed: list[PackedBlock] = []
    for convolutions, has_projection in blocks:
        packed.append(direct.pack_block(shape, x.dtype, convolutions, has_projection, {}))
        shape = packed[-1].out_shape
    out = direct.run(x.contiguous(memory_format=torch.channels_last), packed, packed_stem)
    assert tuple(out.shape) == shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out


def check(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    blocks: list[tuple[list[Convolution], bool]],
    stem: Convolution | None = None,
) -> None:
    """At most twice eager's error plus one rounding, over a few draws of x."""
    ratios = []
    for seed in range(3):
        x = normal(shape, 1000 + seed).to(dtype)
        exact = network(x.double(), blocks, stem, torch.float64)
        eager = network(x, blocks, stem, dtype).double()
        out = run(x, blocks, stem).double()
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        limit = 2 * (eager - exact).abs().max() + rounding
        ratios.append(float((out - exact).abs().max() / limit))
    assert sorted(ratios)[1] <= 1, ratios


def basic(channels: int, planes: int, stride: int = 1) -> tuple[list[Convolution], bool]:
    first = convolution(1, channels, planes, (3, 3), (stride, stride))
    second = convolution(5, planes, planes, (3, 3))
    if stride == 1 and channels == planes:
        return [first, second], False
    return [first, second, convolution(9, channels, planes, stride=(stride, stride))], True


def bottleneck(channels: int, width: int, stride: int = 1) -> tuple[list[Convolution], bool]:
    planes = 2 * width
    convolutions = [
        convolution(1, channels, width),
        convolution(5, width, width, (3, 3), (stride, stride)),
        convolution(9, width, planes),
    ]
    if stride == 1 and channels == planes:
        return convolutions, False
    return [*convolutions, convolution(13, channels, planes, stride=(stride, stride))], True


STEM = convolution(20, 3, 64, (7, 7), (2, 2))
NETWORKS: dict[str, tuple[tuple[int, ...], list[tuple[list[Convolution], bool]], Any]] = {
    # Sizes that tiles of 14 pixels and of 2x2 divide, and sizes that they do not.
    "basic": ((2, 64, 28, 28), [basic(64, 64)], None),
    "basic, odd": ((3, 32, 9, 15), [basic(32, 32)], None),
    "basic, strided": ((2, 32, 12, 10), [basic(32, 64, 2), basic(64, 64)], None),
    "bottleneck": ((2, 64, 14, 14), [bottleneck(64, 32), bottleneck(64, 32)], None),
    "bottleneck, odd": ((3, 64, 7, 5), [bottleneck(64, 32), bottleneck(64, 32)], None),
    "bottleneck, strided": (
        (2, 64, 13, 17),
        [bottleneck(64, 64, 2), bottleneck(128, 64), bottleneck(128, 64, 2)],
        None,
    ),
    # Channels far apart (copied), more than one block of words, more than one chunk of tiles.
    "wide": ((2, 512, 10, 10), [bottleneck(512, 256), bottleneck(512, 64, 2)], None),
    "long sums": ((1, 1024, 4, 4), [basic(1024, 32)], None),
    "many pixels": ((1, 32, 64, 96), [basic(32, 32)], None),
    "channels in pairs": ((2, 6, 8, 8), [basic(6, 32)], None),
    "single convolutions": (
        (2, 32, 12, 12),
        [([convolution(seed, 32, 32, (3, 3))], False) for seed in (1, 5, 9)],
        None,
    ),
    "one pixel": ((2, 64, 1, 1), [basic(64, 64), bottleneck(64, 32)], None),
    "stem": ((3, 3, 64, 64), [bottleneck(64, 32)], STEM),
    "stem, odd": ((2, 3, 45, 37), [basic(64, 64)], STEM),
    "stem alone early": ((1, 3, 8, 8), [basic(64, 256, 2)], STEM),
    "batch": ((19, 3, 16, 16), [basic(64, 64), basic(64, 128, 2)], STEM),
}


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, dtype: torch.dtype, threads: int) -> None:
    check(dtype, *NETWORKS[name])


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (3, 3), "dilation": (2, 2)},
        {"kernel": (3, 3), "dilation": (1, 3)},
        {"kernel": (3, 3), "dilation": (12, 1)},  # further than the image
        {"kernel": (5, 5)},
        {"kernel": (1, 7)},
        {"kernel": (7, 1)},
        {"kernel": (3, 3), "padding": (0, 0)},
        {"kernel": (3, 3), "padding": (2, 0)},
        {"kernel": (1, 1), "padding": (1, 1)},
        {"kernel": (3, 3), "stride": (2, 1)},
        {"kernel": (3, 3), "stride": (1, 3)},
        {"kernel": (2, 2), "padding": (1, 1)},
    ],
    ids=str,
)
def test_geometries(geometry: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
    """The convolution in question first, last, and as the projection beside itself."""
    conv = convolution(3, 32, 32, **geometry)
    check(dtype, (2, 32, 10, 12), [([conv, convolution(30, 32, 32), conv], True)])
    check(dtype, (2, 32, 10, 12), [([convolution(30, 32, 32), conv, conv], True)])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    shape, blocks, stem = NETWORKS["batch"]
    x, before, outs = normal(shape, 1).float(), torch.get_num_threads(), []
    for threads in (1, 2, 3, 32):
        torch.set_num_threads(threads)
        outs.append(run(x, blocks, stem))
    torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_nan_stays(dtype: torch.dtype, value: float) -> None:
    """Through ReLU, pooling and the residual, and nowhere else than in eager."""
    x = normal((2, 3, 32, 32), 1).to(dtype)
    x[1, 2, 17, 9] = value
    blocks = [bottleneck(64, 32)]
    nan = network(x.double(), blocks, STEM, torch.float64).isnan()
    assert nan.any()
    assert not nan.all()
    assert torch.equal(run(x, blocks, STEM).isnan(), nan)


def test_x_is_kept() -> None:
    for name in ("basic", "bottleneck", "stem"):
        shape, blocks, stem = NETWORKS[name]
        x = normal(shape, 1).float().contiguous(memory_format=torch.channels_last)
        copy = x.clone()
        run(x, blocks, stem)
        assert torch.equal(x, copy)


def test_misaligned() -> None:
    shape, blocks, _ = NETWORKS["bottleneck, odd"]
    _, c, h, w = shape
    values = normal(shape, 1).float()
    storage = torch.empty(values.numel() + 1)
    x = storage.as_strided(shape, (h * w * c, 1, w * c, c), 1).copy_(values)
    assert torch.equal(run(x, blocks), run(values, blocks))


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_models_run_it(
    name: str, autocast_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if autocast_dtype is not None and autocast_dtype not in SUPPORTED:
        pytest.skip("no inner loops for bfloat16: this CPU has no AVX-512 BF16")
    model = getattr(models, name)(num_classes=10)
    x = normal((2, 3, 64, 64), 1).float()
    for _ in range(3):
        model(x)  # running statistics
    model.eval()
    calls: list[bool] = []
    original = direct.run

    def spy(x: Tensor, blocks: Any, stem: Any) -> Tensor:
        calls.append(stem is not None)
        return original(x, blocks, stem)

    monkeypatch.setattr(direct, "run", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast_dtype is not None):
        outs = [model(x) for _ in range(3)]
        with torch.enable_grad():
            eager = model(x)
    assert calls == [True, True]
    tolerance = 1e-4 if autocast_dtype is None else 0.1
    for out in outs:
        torch.testing.assert_close(out, eager.detach(), rtol=tolerance, atol=tolerance)


def _stem_changes(model: nn.Module) -> dict[str, Any]:
    return {
        "weight": lambda: model.conv1.weight.data.mul_(1.5),
        "statistics": lambda: model.bn1.running_mean.add_(1),
        "eps": lambda: setattr(model.bn1, "eps", 1.0),
        "stride": lambda: setattr(model.conv1, "stride", (1, 1)),
        "training": lambda: model.bn1.train(),
        "conv": lambda: setattr(model, "conv1", nn.Conv2d(3, 64, 7, 2, 3, bias=False)),
        "bn": lambda: setattr(model, "bn1", nn.BatchNorm2d(64, eps=2.0).eval()),
        "pool": lambda: setattr(model, "maxpool", nn.MaxPool2d(2)),
        "pool_padding": lambda: setattr(model.maxpool, "padding", 0),
        "relu": lambda: setattr(model, "relu", nn.Sigmoid()),
        "hook": lambda: model.maxpool.register_forward_hook(lambda m, a, out: out * 2),
    }


@pytest.mark.parametrize("change", _stem_changes(nn.Module()))
def test_changes_of_the_stem_are_seen(change: str) -> None:
    model, x = models.resnet18(num_classes=10).eval(), normal((2, 3, 64, 64), 1).float()
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
        _stem_changes(model)[change]()
        expected = model.relu(model.bn1(model.conv1(x)))
        out = model.maxpool(expected)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            out = stage(out)
        expected = model.fc(out.mean((2, 3)))
        for _ in range(3):
            if change == "training":
                model.bn1.reset_running_stats()
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)


def test_stem_plans_do_not_keep_models_alive() -> None:
    gc.collect()
    before = len(inference_plan._plans)
    model = models.resnet18(num_classes=10).eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 3, 64, 64))
    assert len(inference_plan._plans) == before + 9
    del model
    gc.collect()
    assert len(inference_plan._plans) == before


def test_weights_are_packed_once_for_all_shapes() -> None:
    model = models.resnet18(num_classes=10).eval()
    with torch.no_grad():
        for size in (64, 64, 96, 128, 160, 192, 224):
            model(torch.ones(1, 3, size, size))
    plan = inference_plan._plans[model.layer1[0]]
    assert len(plan._kept) == 2


def _native(x: Tensor, **changes: Any) -> Tensor:
    packed = direct.pack_block(tuple(X.shape), torch.float32, basic(64, 64)[0], False, {})
    arguments: dict[str, Any] = {
        "weights": packed.weights,
        "shifts": packed.shifts,
        "geometry": packed.geometry,
        "convolutions": [2],
        "projections": [0],
    }
    arguments.update(changes)
    return native.launcher("direct_network")(x, *arguments.values(), False)


X = torch.ones(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _native(X[0]), "x must be a 4-d tensor"),
        (lambda: _native(X.contiguous()), "x must be channels_last"),
        (lambda: _native(X.double()), "no inner loop for the dtype of x"),
        (lambda: _native(X, weights=[X, X]), "weights must be packed for x"),
        (lambda: _native(X, shifts=[X, X]), "shifts must be float32, one for each"),
        (lambda: _native(X, shifts=[X]), "must describe 2 convolutions, got 2, 1 and 14 numbers"),
        (lambda: _native(X, convolutions=[]), "projections must have one number per block"),
        (lambda: _native(X, convolutions=[0]), "every block must have a convolution"),
        (lambda: _native(X, geometry=[-1] * 14), "stride and dilation must be positive"),
        (
            lambda: _native(X, geometry=[1, 1, 1, 1, 1, 1, 1] * 2),
            "weights for Winograd's algorithm must be float32 and 4x4",
        ),
        (
            lambda: _native(X, geometry=[0, 0, 1, 1, 1, 1, 0] * 2),
            "the shortcut of a block must have the shape of its output",
        ),
        (
            lambda: _native(X, geometry=[0, 0, 1, 1, 9, 9, 0] * 2),
            "images of 8x8 are too small for the kernel",
        ),
        (
            lambda: _native(X[:, :32].clone(memory_format=torch.channels_last)),
            "the channels of one convolution must be those of the next",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"direct_network: .*{message}"):
        call()


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_other_instruction_sets_do_without(isa: str) -> None:
    code = (
        "import torch, resnet_fused as rf\n"
        "from resnet_fused import direct, models\n"
        "m = models.resnet18(num_classes=10).eval(); x = torch.randn(2, 3, 64, 64)\n"
        "assert not direct.runs(torch.float32)\n"
        "with torch.no_grad():\n"
        "    ours = [m(x) for _ in range(3)][-1]\n"
        "    with rf.backend('reference'): torch.testing.assert_close(ours, m(x))\n"
    )
    environment = {**os.environ, "RESNET_FUSED_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
