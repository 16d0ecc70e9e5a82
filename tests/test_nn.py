"""Modules against torchvision's blocks: every mode, normalisation, shortcut, hook and transform."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from model_equality import assert_same_function, randomize
from numerics import no_recompilation, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused._torchvision import import_torchvision
from resnet_fused.nn import BasicBlock, Bottleneck, ConvBnReLU2d, FrozenBatchNorm2d

torchvision = import_torchvision()
pytestmark = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class PlainConvBnReLU(nn.Module):
    """ConvBnReLU2d of PyTorch's modules."""

    def __init__(self, *args: Any, relu: bool = True, **kwargs: Any) -> None:
        super().__init__()
        made = ConvBnReLU2d(*args, **kwargs)
        self.conv, self.bn, self.relu = made.conv, made.bn, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out = out if residual is None else out + residual
        return torch.relu(out) if self.relu else out


def projection(
    channels: int, planes: int, stride: int = 1, norm: Any = nn.BatchNorm2d
) -> nn.Sequential:
    conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
    return nn.Sequential(conv, norm(planes))


# Constructor arguments of the blocks: (kind, inplanes, planes, options).
BLOCKS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "basic": ("BasicBlock", 8, 8, {}),
    "basic_projection": (
        "BasicBlock",
        8,
        12,
        {"stride": 2, "downsample": projection(8, 12, stride=2)},
    ),
    "bottleneck": ("Bottleneck", 16, 4, {}),
    "bottleneck_projection": (
        "Bottleneck",
        8,
        4,
        {"stride": 2, "downsample": projection(8, 16, stride=2)},
    ),
    "groups": ("Bottleneck", 16, 4, {"groups": 4, "base_width": 32}),
    "width": ("Bottleneck", 16, 4, {"base_width": 128}),
    "dilation": ("Bottleneck", 16, 4, {"dilation": 2}),
    "pooled_shortcut": (
        "BasicBlock",
        8,
        12,
        {
            "stride": 2,
            "downsample": nn.Sequential(nn.AvgPool2d(2), *projection(8, 12)),
        },
    ),
    "conv_shortcut": ("BasicBlock", 8, 12, {"downsample": nn.Conv2d(8, 12, 1)}),
    "identity_shortcut": ("Bottleneck", 16, 4, {"downsample": nn.Identity()}),
    "frozen": ("BasicBlock", 8, 8, {"norm_layer": FrozenBatchNorm2d}),
    "group_norm": ("BasicBlock", 8, 8, {"norm_layer": lambda n: nn.GroupNorm(2, n)}),
    "no_affine": (
        "Bottleneck",
        16,
        4,
        {"norm_layer": lambda n: nn.BatchNorm2d(n, affine=False)},
    ),
    "no_statistics": (
        "Bottleneck",
        16,
        4,
        {"norm_layer": lambda n: nn.BatchNorm2d(n, track_running_stats=False)},
    ),
    "cumulative": ("BasicBlock", 8, 8, {"norm_layer": lambda n: nn.BatchNorm2d(n, momentum=None)}),
}
MAIN = ("basic", "basic_projection", "bottleneck", "bottleneck_projection")


def make(name: str) -> tuple[nn.Module, nn.Module]:
    """Our block and torchvision's, with the same parameters."""
    kind, inplanes, planes, options = BLOCKS[name]
    ours = getattr(rf.nn, kind)(inplanes, planes, **copy.deepcopy(options))
    blocks = torchvision.models.resnet
    theirs = getattr(blocks, kind)(inplanes, planes, **copy.deepcopy(options))
    for module in ours.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(normal(module.running_mean.shape, 1) / 5)
            module.running_var.copy_(normal(module.running_var.shape, 2).abs() + 0.5)
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            module.weight.data.copy_(normal(module.weight.shape, 3) / 2 + 1)
            module.bias.data.copy_(normal(module.bias.shape, 4) / 2)
    theirs.load_state_dict(ours.state_dict())
    return ours.double(), theirs.double()


def x_for(module: nn.Module, layout: torch.memory_format = torch.channels_last) -> Tensor:
    channels = module.conv1.in_channels
    return normal((3, channels, 6, 6), 9).contiguous(memory_format=layout)


def results(module: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> list[Any]:
    """Output, gradients of x and of every parameter, and buffers, after one step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = (module if call is None else call)(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out, [x, *parameters], normal(out.shape, 5).to(out.dtype))
    return [out.detach(), *grads, *(b.clone() for b in module.buffers())]


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_torchvisions(name: str, training: bool, layout: torch.memory_format) -> None:
    ours, theirs = make(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(2):
        x = x_for(ours, layout)
        ours, theirs = ours.train(training), theirs.train(training)
        assert_equal(results(ours, x), results(theirs, x))
        with torch.no_grad():
            out = ours(x)
            torch.testing.assert_close(out, theirs(x))
            assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MAIN)
def test_accuracy(name: str, training: bool) -> None:
    kind, inplanes, planes, options = BLOCKS[name]
    theirs = getattr(torchvision.models.resnet, kind)(inplanes, planes, **copy.deepcopy(options))

    def convert(eager: nn.Module) -> nn.Module:
        ours = getattr(rf.nn, kind)(inplanes, planes, **copy.deepcopy(options))
        ours.load_state_dict(eager.state_dict())
        return ours.to(next(eager.parameters()).dtype)

    x = normal((4, inplanes, 12, 12), 9, torch.float32)
    assert_same_function(randomize(theirs), convert, x, training, deep=False)


@pytest.mark.parametrize("frozen", range(4))
def test_each_normalisation_follows_its_own_flag(frozen: int) -> None:
    ours, theirs = make("bottleneck_projection")
    for module in (ours, theirs):
        module.train()
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        norms[frozen].eval()
    assert_equal(results(ours, x_for(ours)), results(theirs, x_for(ours)))


def test_frozen_parameters() -> None:
    ours, theirs = make("bottleneck_projection")
    for module in (ours, theirs):
        for parameter in (module.conv1.weight, module.bn2.weight, module.downsample[0].weight):
            parameter.requires_grad_(False)
    assert_equal(results(ours, x_for(ours)), results(theirs, x_for(ours)))
    ours.requires_grad_(False)
    theirs.requires_grad_(False)
    assert_equal(results(ours, x_for(ours)), results(theirs, x_for(ours)))


def test_x_without_gradient() -> None:
    ours, theirs = make("bottleneck_projection")
    x = x_for(ours)
    for module in (ours, theirs):
        module(x).square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_conv_bias() -> None:
    ours, theirs = make("bottleneck")
    for module in (ours, theirs):
        module.conv2.bias = nn.Parameter(normal((4,), 8))
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        assert_equal(results(ours, x_for(ours)), results(theirs, x_for(ours)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        *((inner, "forward") for inner in ("conv1", "bn1", "relu", "conv3", "bn3", "downsample.1")),
        *((inner, "pre") for inner in ("conv2", "bn2", "relu", "downsample", "downsample.0")),
        *((inner, "backward") for inner in ("conv1", "conv3", "downsample.0")),
    ],
)
def test_hooks_of_inner_modules_run(inner: str, kind: str, training: bool) -> None:
    ours, theirs = make("bottleneck_projection")
    seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    x = x_for(ours)
    for name, module in (("ours", ours), ("theirs", theirs)):
        module.train(training)
        with torch.no_grad():
            module(x)  # a plan may be made; hooks come later

        def keep(*args: Any, name: str = name) -> None:
            tensor = args[2 if kind == "forward" else 1]
            tensor = tensor if isinstance(tensor, Tensor) else tensor[0]
            seen[name].append(tensor.detach().clone())

        submodule = module.get_submodule(inner)
        if kind == "forward":
            submodule.register_forward_hook(keep)
        elif kind == "pre":
            submodule.register_forward_pre_hook(keep)
        else:
            submodule.register_full_backward_hook(keep)
    assert_equal(results(ours, x), results(theirs, x))
    with torch.no_grad():
        ours(x)
        theirs(x)
    assert len(seen["ours"]) == len(seen["theirs"]) > 0
    assert_equal(seen["ours"], seen["theirs"])


def test_another_activation_is_called() -> None:
    ours, theirs = make("basic")
    x = x_for(ours)
    ours.eval()(x)
    ours.relu = theirs.relu = nn.SiLU()
    for training in (True, False):
        assert_equal(results(ours.train(training), x), results(theirs.train(training), x))


@pytest.mark.parametrize("name", MAIN)
def test_second_derivatives(name: str) -> None:
    ours, theirs = make(name)
    values = []
    for module in (ours, theirs):
        x = x_for(module).requires_grad_()
        leaves = [x, *module.parameters()]
        grads = torch.autograd.grad(module(x).square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        values.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
    # Biases in front of a normalisation are not there: all leaves take part in both.
    torch.testing.assert_close(values[0], values[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", MAIN)
def test_checkpoint(name: str) -> None:
    ours, theirs = make(name)
    calls = [
        lambda x, module=module: checkpoint(module, x, use_reentrant=False)
        for module in (ours, theirs)
    ]
    x = x_for(ours)
    assert_equal(results(ours, x, calls[0]), results(theirs, x, calls[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MAIN)
def test_autocast(name: str, training: bool) -> None:
    """The dtypes of eager, and numbers as near to float64 as its numbers are.

    Biases keep values away from 0, where a rounding to bfloat16 may change the sign that the
    gradient of a ReLU asks for, in either of the two. Of five inputs the median counts.
    """
    ours, theirs = make(name)
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(8)
    exact = copy.deepcopy(theirs).train(training)
    errors: dict[int, list[tuple[float, float]]] = {}
    ours, theirs = ours.float().train(training), theirs.float().train(training)
    for trial in range(5):
        x = normal(x_for(ours).shape, 20 + trial)
        true = results(exact, x)
        both = []
        for module in (ours, theirs):

            def call(x: Tensor, module: nn.Module = module) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return module(x)

            both.append(results(module, x.float(), call))
        for index, (mine, eager) in enumerate(zip(*both, strict=True)):
            assert mine.dtype == eager.dtype
            pair = [float((t.double() - true[index]).norm()) for t in (mine, eager)]
            errors.setdefault(index, []).append((pair[0], pair[1]))
    for index, of_trials in errors.items():
        error, eager_error = (median(side) for side in zip(*of_trials, strict=True))
        rounding = torch.finfo(torch.bfloat16).eps * float(true[index].double().norm())
        assert error <= 2 * eager_error + rounding, f"tensor {index}"


# In training only without running statistics: torchvision's cannot update captured ones either.
@pytest.mark.parametrize(
    ("name", "training"),
    [("no_statistics", True), ("basic", False), ("bottleneck_projection", False)],
)
def test_functorch_transforms(name: str, training: bool) -> None:
    values = []
    for module in make(name):
        module.train(training)
        parameters = dict(module.named_parameters())
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        x = x_for(module)

        def loss(
            given: dict[str, Tensor],
            module: nn.Module = module,
            buffers: dict[str, Tensor] = buffers,
            x: Tensor = x,
        ) -> Tensor:
            return torch.func.functional_call(module, (given, buffers), x).square().sum()

        values.append(list(torch.func.grad(loss)(parameters).values()))
    assert_equal(*values)


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(training: bool) -> None:
    values = []
    for module in make("no_statistics" if training else "bottleneck_projection"):
        module.train(training)
        x = x_for(module)
        with torch.no_grad():
            module(x)  # a plan may be made
        values.append(torch.func.jvp(module, (x,), (normal(x.shape, 3),)))
    assert values[0][1].abs().sum() > 0
    assert_equal(*(list(value) for value in values))


def test_vmap() -> None:
    ours, theirs = make("basic")
    x = normal((4, 2, 8, 5, 5), 3)
    both = [torch.vmap(module.eval())(x) for module in (ours, theirs)]
    torch.testing.assert_close(*both)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MAIN)
def test_jit_trace(name: str) -> None:
    ours, theirs = make(name)
    traced = torch.jit.trace(ours.eval(), x_for(ours))
    other = x_for(ours) * 2
    torch.testing.assert_close(traced(other), theirs.eval()(other))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic_projection", "bottleneck"])
def test_compile(name: str, training: bool) -> None:
    ours, theirs = make(name)
    ours.train(training)
    theirs.train(training)
    x = x_for(ours)
    with no_recompilation():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            mine, true = results(ours, x, compiled), results(theirs, x)
            torch.testing.assert_close(mine, true, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", MAIN)
def test_wrong_channels(name: str) -> None:
    ours, _ = make(name)
    for training in (True, False):
        ours.train(training)
        for x in (torch.ones(2, 5, 6, 6).double(), torch.ones(2, 5, 6, 6)):
            for guard in (torch.enable_grad, torch.no_grad):
                with guard(), pytest.raises((ValueError, RuntimeError)):
                    ours(x)


def test_unbatched_images() -> None:
    """Torch's layers say what they want."""
    ours, _ = make("basic")
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.ones(8, 6, 6).double())


def test_bad_constructor_arguments() -> None:
    with pytest.raises(ValueError, match="BasicBlock: groups and base_width must be 1 and 64"):
        BasicBlock(8, 8, groups=2)
    with pytest.raises(ValueError, match="BasicBlock: dilation must be 1, got 2"):
        BasicBlock(8, 8, dilation=2)


CONVS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"kernel_size": 1},
    "7x7": {"kernel_size": 7, "stride": 2},
    "bias": {"bias": True},
    "grouped": {"groups": 4},
    "dilated": {"dilation": 2},
    "unpadded": {"padding": 0},
    "no_relu": {"relu": False},
    "frozen": {"norm_layer": FrozenBatchNorm2d},
    "group_norm": {"norm_layer": lambda n: nn.GroupNorm(4, n)},
    "no_statistics": {"norm_layer": lambda n: nn.BatchNorm2d(n, track_running_stats=False)},
    "cumulative": {"norm_layer": lambda n: nn.BatchNorm2d(n, momentum=None)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_conv_bn_relu(
    name: str, training: bool, residual: bool, layout: torch.memory_format
) -> None:
    options = CONVS[name]
    ours = randomize(ConvBnReLU2d(8, 12, **options)).double().train(training)
    theirs = PlainConvBnReLU(8, 12, **options).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    x = normal((2, 8, 9, 7), 1).contiguous(memory_format=layout)
    shortcut = None
    if residual:
        with torch.no_grad():
            shortcut = normal(ours(x).shape, 2).contiguous(memory_format=layout)
        theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        both = [results(m, x, lambda x, m=m: m(x, shortcut)) for m in (ours, theirs)]
        assert_equal(*both)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, shortcut), theirs(x, shortcut))
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_low_precision_inference(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """PyTorch cannot add a residual to those in bfloat16 in one pass."""
    ours = randomize(ConvBnReLU2d(8, 8, groups=4)).eval()
    x = normal((2, 8, 9, 7), 1, torch.float32).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = torch.relu(ours.bn(ours.conv(x)) + x)
        ours.to(dtype)
        for _ in range(3):
            out = ours(x.to(dtype), x.to(dtype))
            torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_that_ends_in_a_grouped_convolution(layout: torch.memory_format) -> None:
    ours, theirs = make("basic")
    for module in (ours, theirs):
        module.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = x_for(ours, layout)
    with torch.no_grad():
        expected = theirs.double().eval()(x)
        ours.bfloat16().eval()
        for _ in range(3):
            out = ours(x.bfloat16())
            torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)


def test_frozen_batch_norm_is_torchvisions() -> None:
    ours = randomize(FrozenBatchNorm2d(6))
    theirs = torchvision.ops.FrozenBatchNorm2d(6)
    theirs.load_state_dict(ours.state_dict())
    x = normal((2, 6, 3, 3), 1, torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.load_state_dict(nn.BatchNorm2d(6).state_dict())


def test_blocks_with_torchvisions_frozen_batch_norm_fuse() -> None:
    ours = Bottleneck(16, 4, norm_layer=torchvision.ops.FrozenBatchNorm2d).double()
    theirs = torchvision.models.resnet.Bottleneck(
        16, 4, norm_layer=torchvision.ops.FrozenBatchNorm2d
    ).double()
    theirs.load_state_dict(ours.state_dict())
    assert_equal(results(ours, x_for(ours)), results(theirs, x_for(ours)))


def test_blocks_do_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The equalities above say little if nothing fuses."""
    ran: set[str] = set()
    choose = backends.choose

    def spy(operator: str, x: Tensor) -> Any:
        ran.add(operator)
        return choose(operator, x)

    monkeypatch.setattr(backends, "choose", spy)
    with rf.backend("reference"):
        for training, frozen, expected in (
            (True, False, "bn_relu"),
            (
                False,
                False,
                "bn_relu",
            ),  # the normalisation's gradients need the convolution's output
            (False, True, "conv_bn_relu"),
        ):
            for name in MAIN:
                ran.clear()
                ours, _ = make(name)
                for module in ours.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.requires_grad_(not frozen)
                ours.train(training)(x_for(ours).requires_grad_()).sum().backward()
                assert {expected, f"{expected}_backward"} <= ran
