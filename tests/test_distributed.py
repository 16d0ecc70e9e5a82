"""SyncBatchNorm's semantics over 2 and 4 processes: as one process with the whole batch."""

import subprocess
import sys
from pathlib import Path

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused._torchvision import import_torchvision
from resnet_fused.commands.networks import eager_twin
from resnet_fused.nn import synchronization

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo"
)
needs_torchvision = pytest.mark.skipif(
    import_torchvision() is None, reason="torchvision is not installed"
)
TOLERANCE = 1e-10
WORLDS = (2, 4)


class Runs:
    """What every process of a run ended with, by number of processes; each is started once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[int, list[dict[str, cases.Results | str]]] = {}

    def of(self, world: int, name: str) -> list[cases.Results]:
        """The results of one case, one for each process."""
        if world not in self._results:
            self._results[world] = self._start(world)
        found = [results[name] for results in self._results[world]]
        for rank, result in enumerate(found):
            assert not isinstance(result, str), f"process {rank} of {world}:\n{result}"
        return found

    def _start(self, world: int) -> list[dict[str, cases.Results | str]]:
        folder = self._folder / str(world)
        folder.mkdir()
        command = [sys.executable, cases.__file__]
        processes = [
            subprocess.Popen([*command, str(rank), str(world), str(folder)])
            for rank in range(world)
        ]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * world
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"))


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, name
    if actual.numel():
        error = float((actual - expected).abs().max())
        assert error <= TOLERANCE * (1 + float(expected.abs().max())), f"{name}: {error=:.1e}"


def expected_of_block(case: cases.BlockCase) -> cases.Results:
    """Plain modules on the whole batch."""
    block = cases.make_block(case.block, nn.BatchNorm2d)
    if "momentum" in dict(case.options):
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    for name in dict(case.options).get("frozen", ()):
        block.get_submodule(name).eval()

    def unfused(x: Tensor) -> Tensor:
        if isinstance(block, rf.nn.ConvBnReLU2d):
            out = block.bn(block.conv(x))
            return torch.relu(out) if block.relu else out
        return block._forward_unfused(x)

    part = slice(0, sum(cases.shares(case.split, 2)))
    return cases.train_block(block, unfused, cases.block_input(block), part)


@pytest.mark.parametrize("name", cases.BLOCK_CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_block_is_as_one_process_with_the_whole_batch(runs: Runs, world: int, name: str) -> None:
    case = cases.BLOCK_CASES[name]
    expected = expected_of_block(case)
    sizes = cases.shares(case.split, world)
    for rank, results in enumerate(runs.of(world, name)):
        if not dict(case.options).get("no_grad"):
            assert results.keys() == expected.keys()
        for key, actual in results.items():
            of_whole = expected[key]
            if key in ("out", "grad_x"):
                of_whole = of_whole[cases.part_of(rank, sizes)]
            assert_close(actual, of_whole, f"{key} of process {rank}")


@pytest.mark.parametrize("world", WORLDS)
def test_one_message_for_each_batch_norm_and_for_both_ends_of_a_projection_block(
    runs: Runs, world: int
) -> None:
    """Counts and two sums per channel forward; sums of the gradient backward, and the count."""
    for results in runs.of(world, "messages"):
        inner, last = 1 + 2 * 4, 2 * (1 + 2 * 16)
        assert results["forward"].tolist() == [inner, inner, last]
        assert results["backward"].tolist() == [1 + 3 * 16, inner, inner]


def test_groups_normalise_by_the_batches_of_their_processes(runs: Runs) -> None:
    sizes = cases.shares("uneven", 4)
    found = runs.of(4, "groups")
    for half in range(2):
        block = cases.make_block("bottleneck_projection", nn.BatchNorm2d)
        first, second = (cases.part_of(2 * half + i, sizes) for i in range(2))
        part = slice(first.start, second.stop)
        x = cases.block_input(block)
        expected = cases.train_block(block, block._forward_unfused, x, part)
        for i, own in enumerate((first, second)):
            results = found[2 * half + i]
            own = slice(own.start - part.start, own.stop - part.start)
            for key, actual in results.items():
                of_both = expected[key][own] if key in ("out", "grad_x") else expected[key]
                assert_close(actual, of_both, key)


def test_a_projection_may_have_statistics_of_its_own(runs: Runs) -> None:
    """The main branch sees the whole batch, the shortcut that of its process."""
    sizes = cases.shares("even", 2)
    block = cases.make_block("local_projection", nn.BatchNorm2d)
    x = cases.block_input(block).requires_grad_()
    y = x
    for conv, bn in block._pairs()[:2]:
        y = torch.relu(bn(conv(y)))
    main = block.bn3(block.conv3(y))
    shortcuts = [block.downsample(part) for part in x.split(sizes)]
    expected = torch.relu(main + torch.cat(shortcuts))
    expected.backward(cases.gradient_of(expected))
    found = runs.of(2, "local_projection")
    assert_close(torch.cat([results["out"] for results in found]), expected.detach(), "out")
    assert_close(torch.cat([results["grad_x"] for results in found]), x.grad, "grad_x")
    for name, parameter in block.named_parameters():
        total = sum(results[f"grad {name}"] for results in found)
        assert_close(total, parameter.grad, f"grad {name}")


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_network_trains_as_in_one_process(runs: Runs, world: int, case: str) -> None:
    """DDP with uneven batches; FSDP2 with a checkpoint between the steps, and an evaluation."""
    model = eager_twin(cases.network(nn.BatchNorm2d))
    cases.train_network(model, cases.STEPS, slice(None), 1, cases.sgd(model))
    expected = cases.state(model)
    model.eval()
    with torch.no_grad():
        out = model(cases.network_batch()[0])
    for results in runs.of(world, case):
        if case == "fsdp":
            assert_close(results.pop("eval out"), out, "eval out")
        assert results.keys() == expected.keys()
        for name, tensor in results.items():
            assert_close(tensor, expected[name], name)


@needs_torchvision
@pytest.mark.parametrize("case", ["converted_before", "converted_after"])
@pytest.mark.parametrize("world", WORLDS)
def test_conversion_to_sync_batch_norm_before_and_after_fuse(
    runs: Runs, world: int, case: str
) -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(num_classes=5).double().train()
    cases.train_network(model, 1, slice(None), 1, cases.sgd(model))
    expected = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    expected |= {f"buffer {name}": b for name, b in model.named_buffers()}
    for results in runs.of(world, case):
        assert results.keys() == expected.keys()
        for name, tensor in results.items():
            assert_close(tensor, expected[name], name)


@needs_torchvision
@pytest.mark.parametrize("world", WORLDS)
def test_a_distributed_checkpoint_loads_into_the_unfused_model(runs: Runs, world: int) -> None:
    for results in runs.of(world, "plain_checkpoint"):
        assert results["count"] == 122
        assert results["difference"] == 0


def test_without_other_processes_it_is_batch_norm() -> None:
    """Also on a CPU, where torch.nn.SyncBatchNorm refuses to run."""
    case = cases.BlockCase("bottleneck_projection")
    block = cases.make_block(case.block, nn.SyncBatchNorm)
    results = cases.train_block(block, block, cases.block_input(block), slice(None))
    expected = expected_of_block(case)
    assert results.keys() == expected.keys()
    for name, tensor in results.items():
        assert_close(tensor, expected[name], name)


def test_variance_does_not_drown_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of float32 whose mean is 3000 times their spread, in messages of two processes."""
    x = 3000 + cases.images(2, 1000, 5).float()
    parts = [
        synchronization.Moments(1000, part.mean(0), part.var(0, correction=0) * 1000) for part in x
    ]
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda message, group: sent.append(message.clone()))
    for part in parts:
        synchronization.of_all_processes([part], [object()])
    total = sent[0] + sent[1]
    monkeypatch.setattr(dist, "all_reduce", lambda message, group: message.copy_(total))
    (combined,) = synchronization.of_all_processes(parts[:1], [object()])
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(combined.mean.double(), flat.mean(0), rtol=1e-7, atol=0)
    variance = combined.m2.double() / combined.values
    torch.testing.assert_close(variance, flat.var(0, correction=0), rtol=2e-3, atol=0)
