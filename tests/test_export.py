"""Programs that leave this library: torch.export, plain PyTorch's operators, ONNX, AOTInductor."""

import collections
import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_written_blocks import Basic, BottleneckCloned
from model_equality import images, randomize
from numerics import assert_as_accurate_as_eager, strides
from operator_examples import OPERATORS, Example, name_of, overload_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import resnet_fused as rf
from resnet_fused import _extension

BATCH = ({0: torch.export.Dim("batch")},)

needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)


# One operator each


def test_every_operator_has_a_decomposition() -> None:
    named = {name_of(overload) for overload in rf.decompositions()}
    assert named == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_in_plain_pytorch(operator: str) -> None:
    """Traced with one batch, right with another: results, layouts, what is written in place."""
    overload = overload_of(operator)
    traced, given = (Example(i, n, torch.float32).arguments(operator) for i, n in ((0, 4), (1, 7)))

    def call(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return overload(*(next(remaining) if isinstance(a, Tensor) else a for a in traced))

    def tensors_of(arguments: list[Any]) -> list[Tensor]:
        return [a.clone() for a in arguments if isinstance(a, Tensor)]

    table = rf.decompositions()
    program = make_fx(call, decomposition_table=table, tracing_mode="symbolic")(*tensors_of(traced))
    assert not [n for n in program.graph.nodes if "resnet_fused" in str(n.target)]
    results = []
    for function in (program, call):
        tensors = tensors_of(given)
        with rf.backend("reference"):
            out = function(*tensors)
        results.append([*(out if isinstance(out, (tuple, list)) else [out]), *tensors])
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert strides(actual) == strides(expected)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.endswith("_functional")])
def test_opcheck_of_functional_forms(operator: str) -> None:
    arguments = Example(0, 4, torch.float32).arguments(operator)
    torch.library.opcheck(overload_of(operator), arguments)


# Networks


class Network(nn.Module):
    """Blocks from 8 channels to 16 between a convolution and a classifier."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(16, 3)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.conv(x)).mean((2, 3)))


def basic() -> Network:
    return Network(Basic(8, 16, 2), Basic(16, 16, 1))


X = images(2, 3, 17, 15)


def exported(model: nn.Module, x: Tensor = X) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=BATCH)


def fused_nodes(program: torch.export.ExportedProgram) -> dict[str, int]:
    names = [str(node.target) for node in program.graph.nodes]
    return collections.Counter(
        name.split(".")[1] for name in names if name.startswith("resnet_fused.")
    )


def assert_program_is(program: Callable[..., Any], eager: nn.Module, training: bool) -> None:
    """Output, and in training the buffers after it, at a batch size that was not traced."""
    x = images(5, *X.shape[1:], seed=7)
    exact = copy.deepcopy(eager).double().train(training)
    eager = copy.deepcopy(eager).train(training)
    out, plain, true = program(x), eager(x), exact(x.double())
    assert_as_accurate_as_eager(out.detach(), plain.detach(), true.detach())
    buffers = dict(program.named_buffers())  # type: ignore[attr-defined]
    exact_buffers = dict(exact.named_buffers())
    for name, buffer in eager.named_buffers():
        if buffer.is_floating_point():
            assert_as_accurate_as_eager(buffers[name], buffer, exact_buffers[name], name)
        else:
            assert torch.equal(buffers[name], buffer), name


@needs_extension
def test_inference_has_one_node_for_each_convolution() -> None:
    model = rf.models.ResNet(rf.nn.Bottleneck, (1, 1, 1, 1), num_classes=3).eval()
    with torch.no_grad():
        program = exported(model, images(2, 3, 33, 33))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert fused_nodes(program) == {"conv_bn_relu": convolutions}


@needs_extension
def test_training_has_one_node_for_each_pass_over_an_output() -> None:
    """Two batch norms that are added are one, and so are the stem's and its pooling."""
    model = rf.models.ResNet(rf.nn.BasicBlock, (1, 1, 1, 1), num_classes=3).train()
    program = exported(model, images(2, 3, 33, 33))
    assert fused_nodes(program) == {"bn_relu_max_pool": 1, "bn_relu": 8}


@pytest.mark.parametrize("strict", [False, True])
def test_exported_model_trains(strict: bool) -> None:
    """The program as exported: same loss, gradients and running statistics as the fused model."""
    eager = basic()
    fused, other = (rf.fuse(copy.deepcopy(eager)).train() for _ in range(2))
    program = torch.export.export(other, (X,), dynamic_shapes=BATCH, strict=strict).module()
    x = images(4, *X.shape[1:], seed=3)
    results = []
    for model in (program, fused):
        model.zero_grad()
        model(x).square().sum().backward()
        named = dict(model.named_parameters())
        results.append(
            {name: p.grad for name, p in named.items()}
            | {name: b.clone() for name, b in model.named_buffers()}
        )
    assert all(grad is not None for grad in results[0].values())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


MODES = {
    "inference": (False, torch.no_grad),
    "evaluation": (False, contextlib.nullcontext),
    "training": (True, contextlib.nullcontext),
}


@pytest.mark.parametrize("mode", MODES)
def test_decomposed_programs_are_plain_pytorch(mode: str) -> None:
    """Without gradients, batch norms are folded; with them, operators that may write to buffers."""
    training, context = MODES[mode]
    eager = Network(BottleneckCloned(8, 4), Basic(8, 16, 1))
    with context():
        program = exported(rf.fuse(copy.deepcopy(eager)).train(training))
    assert fused_nodes(program) or not _extension.load()
    table = {**torch.export.default_decompositions(), **rf.decompositions()}
    decomposed = program.run_decompositions(table)
    assert not fused_nodes(decomposed)
    assert "auto_functionalized" not in str(decomposed.graph)
    mutated = decomposed.graph_signature.buffers_to_mutate.values()
    assert {name.rpartition(".")[2] for name in mutated} == (
        {"running_mean", "running_var", "num_batches_tracked"} if training else set()
    )
    assert_program_is(decomposed.module(), eager, training)


@needs_extension
def test_lowered_programs_keep_the_operators() -> None:
    """Without our table, and without mutation; a second step still leads to plain PyTorch."""
    eager = basic()
    program = exported(rf.fuse(copy.deepcopy(eager)).train()).run_decompositions()
    assert fused_nodes(program) == {"bn_relu_functional": 4}
    assert "auto_functionalized" not in str(program.graph)
    assert_program_is(copy.deepcopy(program).module(), eager, training=True)
    decomposed = program.run_decompositions(rf.decompositions())
    assert not fused_nodes(decomposed)
    assert_program_is(decomposed.module(), eager, training=True)


def test_saved_program(tmp_path: Path) -> None:
    eager = basic().eval()
    with torch.no_grad():
        program = exported(rf.fuse(copy.deepcopy(eager)))
    torch.export.save(program, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2")
    assert fused_nodes(loaded) == fused_nodes(program)
    assert_program_is(loaded.module(), eager, training=False)


# Where this library is not


RUN_WITHOUT_IT = """
import sys
sys.modules["resnet_fused"] = None  # importing it is an error
import torch
x, *files = torch.load(sys.argv[1])
load = {
    "decomposed.pt2": lambda path: torch.export.load(path).module(),
    "traced.pt": torch.jit.load,
    "compiled.pt2": torch._inductor.aoti_load_package,
}
torch.save([load[path.rpartition("/")[2]](path)(x).detach() for path in files], sys.argv[2])
"""


def run_without_it(folder: Path, x: Tensor, *files: str) -> list[Tensor]:
    """What these files compute for x in a process that cannot import this library."""
    torch.save([x, *(str(folder / file) for file in files)], folder / "given.pt")
    command = [sys.executable, "-c", RUN_WITHOUT_IT, folder / "given.pt", folder / "found.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Tensor] = torch.load(folder / "found.pt")
    return found


def assert_accurate(outputs: list[Any], eager: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        plain, exact = eager(x), copy.deepcopy(eager).double()(x.double())
    for output in outputs:
        assert_as_accurate_as_eager(torch.as_tensor(output), plain, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_files_that_need_nothing_of_ours(tmp_path: Path) -> None:
    """A decomposed program, one that AOTInductor compiled, and a trace."""
    eager = Network(Basic(8, 16, 2)).eval()
    fused = rf.fuse(copy.deepcopy(eager))
    with torch.no_grad():
        program = exported(fused).run_decompositions(rf.decompositions())
    torch.export.save(program, tmp_path / "decomposed.pt2")
    torch.jit.trace(fused, (X,)).save(tmp_path / "traced.pt")
    quick = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
    }
    compiled = str(tmp_path / "compiled.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=compiled, inductor_configs=quick)
    x = images(5, *X.shape[1:], seed=7)
    files = "decomposed.pt2", "traced.pt", "compiled.pt2"
    assert_accurate(run_without_it(tmp_path, x, *files), eager, x)


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("way", ["model", "program"])
def test_onnx(way: str, tmp_path: Path) -> None:
    """A model is exported as its plain layers; a program wants its decomposition first."""
    for module in ("onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    import onnxruntime

    eager = basic().eval()
    fused = rf.fuse(copy.deepcopy(eager))
    path = tmp_path / "model.onnx"
    if way == "model":
        options = {"args": (X,), "dynamic_shapes": BATCH}
        torch.onnx.export(fused, f=path, dynamo=True, verbose=False, **options)
    else:
        with torch.no_grad():
            program = exported(fused).run_decompositions(rf.decompositions())
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    x = images(5, *X.shape[1:], seed=7)
    (given,) = session.get_inputs()
    assert_accurate(session.run(None, {given.name: x.numpy()}), eager, x)
