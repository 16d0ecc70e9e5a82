"""Streams, graphs and devices of CUDA, and that the same call gives the same bits twice."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from numerics import device_of, missing, normal, on_backends
from torch import Tensor

import resnet_fused as rf
from resnet_fused.ops import BatchNormArgs, add_relu, bn_relu

SHAPE = (4, 24, 40, 25)  # summed by several blocks, whose results must meet
VARIANTS = ("add_relu", "bn_relu", "bn_relu residual", "bn_relu dual", "bn_relu eval")

needs_cuda = pytest.mark.skipif(
    missing("bn_relu", "cuda") is not None, reason=str(missing("bn_relu", "cuda"))
)


class Step:
    """Forward and backward of one operator on tensors that stay where they are."""

    def __init__(self, variant: str, device: str, dtype: torch.dtype) -> None:
        self.variant = variant
        values = [normal(SHAPE, i).to(device, dtype) for i in range(3)]
        self.x, self.residual, self.grad_out = (
            v.contiguous(memory_format=torch.channels_last) for v in values
        )
        vectors = [normal(SHAPE[1:2], i, torch.float32).to(device) for i in range(3, 11)]
        self.vectors = [v.abs() + 0.5 if i % 4 == 3 else v for i, v in enumerate(vectors)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, self.residual, self.grad_out, *self.vectors]

    def __call__(self) -> list[Tensor]:
        """Output, gradients, running statistics."""
        x, residual = self.x.detach().requires_grad_(), self.residual.detach().requires_grad_()
        weight, bias, mean, var, *other = self.vectors
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        inputs = [x, weight, bias, residual]
        if self.variant == "add_relu":
            out, inputs = add_relu(x, residual), [x, residual]
        elif self.variant == "bn_relu residual":
            out = bn_relu(x, weight, bias, mean, var, True, residual=residual)
        elif self.variant == "bn_relu dual":
            args = BatchNormArgs(*other, training=True)
            out = bn_relu(x, weight, bias, mean, var, True, residual=residual, residual_bn=args)
        else:
            out, inputs = (
                bn_relu(x, weight, bias, mean, var, "eval" not in self.variant),
                inputs[:3],
            )
        grads = torch.autograd.grad(out, inputs, self.grad_out)
        return [out.detach(), *grads, mean, var]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert not e.isnan().any(), f"result {i}"
        assert torch.equal(a, e), f"result {i}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", on_backends("bn_relu", interpreter=False))
def test_same_bits_twice(backend: str, dtype: torch.dtype, variant: str) -> None:
    results = []
    with rf.backend(backend):
        for _ in range(2):
            results.append(copies(Step(variant, device_of(backend), dtype)()))
    assert_same_bits(*results)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=needs_cuda)])
class TestOnGpu:
    def test_other_stream(self, backend: str, variant: str) -> None:
        """Work queued on another stream waits for what that stream does first."""
        step, late, first = (Step(variant, "cuda", torch.float32) for _ in range(3))
        values = copies(late.tensors)
        for tensor in late.tensors:
            tensor.fill_(float("nan"))
        with rf.backend(backend):
            expected = copies(step())
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                copies(first())  # allocates, which may wait
                torch.cuda._sleep(100_000_000)
                for tensor, value in zip(late.tensors, values, strict=True):
                    tensor.copy_(value)
                actual = copies(late())
            assert not stream.query(), "the host waited for the GPU"
            stream.synchronize()
        assert_same_bits(actual, expected)

    def test_captured_graph(self, backend: str, variant: str) -> None:
        """Replays see new inputs, and update the running statistics each time."""
        step, captured = (Step(variant, "cuda", torch.bfloat16) for _ in range(2))
        statistics = copies(captured.vectors)
        with rf.backend(backend):
            graph, results = capture(captured)
            for tensor, value in zip(captured.vectors, statistics, strict=True):
                tensor.copy_(value)
            for scale in (2.0, 3.0):
                for s in (step, captured):
                    s.x.mul_(scale)
                    s.grad_out.mul_(scale)
                expected = copies(step())
                graph.replay()
                torch.cuda.synchronize()
                assert_same_bits(results, expected)

    def test_other_device(self, backend: str, variant: str) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device alone")
        devices = [torch.device("cuda", i) for i in range(2)]
        if len({torch.cuda.get_device_name(device) for device in devices}) > 1:
            pytest.skip("two CUDA devices of different kinds need not agree in every bit")
        with rf.backend(backend):
            expected, actual = (Step(variant, str(device), torch.float32)() for device in devices)
        assert torch.cuda.current_device() == 0
        assert all(tensor.device == devices[1] for tensor in actual)
        assert_same_bits([tensor.cpu() for tensor in actual], [t.cpu() for t in expected])


@needs_cuda
@pytest.mark.parametrize("backend", ["by rule", "cuda"])
class TestBlocksOnGpu:
    def test_captured_inference(self, backend: str) -> None:
        """Replays see new images and new weights."""
        network = rf.models.ResNet(rf.nn.Bottleneck, (1, 1, 1, 1), num_classes=5).cuda().eval()
        x, other = (normal((2, 3, 65, 65), seed, torch.float32).cuda() for seed in range(2))
        with running_on(backend), torch.no_grad():
            graph, (out,) = capture(lambda: [network(x)])
            x.copy_(other)
            network.layer1[0].bn1.weight.mul_(2)
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out, network(other))

    def test_graphed_training(self, backend: str) -> None:
        """Output, gradients and running statistics of a block in a graph, at every step."""
        block = rf.nn.Bottleneck(16, 4).cuda()
        twin = copy.deepcopy(block)
        leaf = normal((4, 16, 9, 9), 0, torch.float32).cuda().requires_grad_()
        with running_on(backend):
            graphed = torch.cuda.make_graphed_callables(block, (leaf,))
            graphed.load_state_dict(twin.state_dict())  # the calls before the capture moved it
            for seed in (1, 2):
                results = []
                x, grad_out = (normal(leaf.shape, i * seed, torch.float32) for i in (10, 20))
                for module in (graphed, twin):
                    module.zero_grad()
                    given = x.cuda().requires_grad_()
                    out = module(given)
                    out.backward(grad_out.cuda())
                    grads = [p.grad.clone() for p in module.parameters()]
                    results.append([out.detach(), given.grad, *grads, *copies(module.buffers())])
                torch.testing.assert_close(*results)


@contextlib.contextmanager
def running_on(backend: str) -> Iterator[None]:
    """On a backend or those of the static rule, with convolutions whose results repeat."""
    asked = contextlib.nullcontext() if backend == "by rule" else rf.backend(backend)
    with asked, torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield


def capture(step: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """As torch.cuda.graphs asks for it: a few calls on another stream, then the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
