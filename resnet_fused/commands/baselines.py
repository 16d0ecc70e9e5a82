"""What fused networks are timed against, each set up the way its own documentation advises."""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fused.commands import environment
from resnet_fused.commands.networks import placed

Inference = Callable[[], object]


class UnavailableError(Exception):
    """A baseline that cannot run here; the message says why."""


def eager(model: nn.Module, x: Tensor) -> Inference:
    """Plain PyTorch in channels_last, the faster of its two layouts on every device."""
    model = placed(copy.deepcopy(model).eval(), x.device, x.dtype)
    return _no_grad(model, x.contiguous(memory_format=torch.channels_last))


def eager_nchw(model: nn.Module, x: Tensor) -> Inference:
    """Plain PyTorch in the layout that it uses when nobody asks."""
    model = placed(copy.deepcopy(model).eval(), x.device, x.dtype, torch.contiguous_format)
    return _no_grad(model, x.contiguous())


def compiled(model: nn.Module, x: Tensor) -> Inference:
    """torch.compile, with constant folding of the weights (freezing) on a CPU."""
    return _compiled(model, x, {"freezing": x.device.type == "cpu"})


def compiled_max_autotune(model: nn.Module, x: Tensor) -> Inference:
    """torch.compile that also times kernels against each other, with CUDA graphs on a GPU."""
    on_cpu = x.device.type == "cpu"
    options = {"freezing": on_cpu, "max_autotune": True, "triton.cudagraphs": not on_cpu}
    return _compiled(model, x, options)


def compiled_training(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """torch.compile of a model in training mode."""
    need_compiler(next(model.parameters()).device)
    result: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return result


def onnxruntime(model: nn.Module, x: Tensor) -> Inference:
    """ONNX Runtime on the CPU, in float32, from PyTorch's own exporter."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise UnavailableError("it is compared on a CPU in float32 only")
    try:
        import onnx  # noqa: F401  (the exporter needs it)
        import onnxruntime as ort
    except ImportError as error:
        raise UnavailableError(error) from error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is deprecated
        path = Path(folder) / "model.onnx"
        plain = copy.deepcopy(model).eval()
        torch.onnx.export(plain, (x.contiguous(),), path, dynamo=False, input_names=["x"])
        network = path.read_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    array = x.contiguous().numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def openvino(model: nn.Module, x: Tensor) -> Inference:
    """OpenVINO on the CPU, with the arithmetic of x's dtype."""
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if x.dtype not in hints or x.device.type != "cpu":
        raise UnavailableError("it is compared on a CPU in float32 and bfloat16 only")
    try:
        import openvino as ov
    except ImportError as error:
        raise UnavailableError(error) from error
    array = x.float().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = copy.deepcopy(model).eval()
        network = ov.convert_model(plain, example_input=array, input=[tuple(array.shape)])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hints[x.dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    engine = ov.Core().compile_model(network, "CPU", settings)
    numpy = array.numpy()
    return lambda: torch.from_numpy(engine([numpy])[0])


def need_compiler(device: torch.device) -> None:
    """Raise UnavailableError where torch.compile cannot build code for this device."""
    if device.type == "cpu" and environment.compiler() is None:
        raise UnavailableError("torch.compile needs a C++ compiler on a CPU (install g++)")
    if device.type == "cuda" and environment.package_version("triton") is None:
        raise UnavailableError("torch.compile needs Triton on a GPU (pip install triton)")
    if device.type == "cuda" and not (shutil.which("gcc") or shutil.which("cc")):
        raise UnavailableError("Triton needs a C compiler (install gcc)")


def _compiled(model: nn.Module, x: Tensor, options: Mapping[str, bool]) -> Inference:
    need_compiler(x.device)
    model = placed(copy.deepcopy(model).eval(), x.device, x.dtype)
    # dynamic=False: after one batch size the tracer makes the next one symbolic, and slower.
    compiled = torch.compile(model, dynamic=False)
    run = _no_grad(compiled, x.contiguous(memory_format=torch.channels_last))
    # Compiles here, so that a failure is this baseline's and not the benchmark's. Not by
    # `options=`: those reach the code generator alone, and freezing begins in the tracer.
    with torch._inductor.config.patch(dict(options)):
        run()
    return run


def _no_grad(model: Callable[[Tensor], Tensor], x: Tensor) -> Inference:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run
