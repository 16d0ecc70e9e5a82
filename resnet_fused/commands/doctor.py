"""What is installed, what is missing, what that costs and how to repair it.

Always prints, whatever is broken; exits with 1 only if not even the slow path can compute.
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from resnet_fused.commands import environment
from resnet_fused.commands.console import attempt, table

SOURCE_TREE = environment.PACKAGE.parent
SOURCE = "pip install --no-build-isolation ."
REINSTALL = (
    f"cd {SOURCE_TREE} && python setup.py build_ext --inplace"
    if (SOURCE_TREE / "setup.py").is_file()
    else "pip install --force-reinstall --no-deps resnet_fused"
)
PACKAGES = ("triton", "numpy", "torchvision", "timm", "onnxruntime", "openvino")


class Finding(NamedTuple):
    """Something missing: what, what that costs, and the command that repairs it."""

    missing: str
    cost: str
    repair: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    report = examine()
    findings = diagnose(report)
    report["findings"] = [finding._asdict() for finding in findings]
    print(json.dumps(report, indent=2) if arguments.json else _text(report, findings))
    return 0 if report["computes"].get("ok") else 1


def examine() -> dict[str, Any]:
    """Everything that doctor knows, as plain data; a failed probe leaves its reason instead."""
    return {
        "resnet_fused": environment.library_version(),
        "folder": str(environment.PACKAGE),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": _probed(_torch),
        "packages": {name: environment.package_version(name) for name in PACKAGES},
        "extension": _probed(_extension),
        "cpu": _probed(_cpu),
        "gpus": [gpu._asdict() for gpu in environment.gpus()],
        "nvcc": environment.nvcc(),
        "compiler": environment.compiler(),
        "triton": _probed(_triton),
        "backends": _probed(_backends),
        "computes": _probed(_computes),
    }


def diagnose(report: dict[str, Any]) -> list[Finding]:
    """What is missing, most costly first."""
    torch_error = report["torch"]["error"]
    if torch_error:
        missing = torch_error == "ModuleNotFoundError: No module named 'torch'"
        return [
            Finding(
                "PyTorch is not installed" if missing else f"PyTorch is broken ({torch_error})",
                "nothing in this library can run",
                "pip install 'torch>=2.11'" if missing else "pip install --force-reinstall torch",
            )
        ]
    found = []
    if not report["computes"].get("ok"):
        found.append(
            Finding(
                f"the operators do not compute ({report['computes']['error']})",
                "nothing in this library can run",
                REINSTALL,
            )
        )
    elif report["computes"]["default_error"]:
        found.append(
            Finding(
                f"an extension that fits this version ({report['computes']['default_error']})",
                'operators fail unless RESNET_FUSED_BACKEND is "reference"',
                REINSTALL,
            )
        )
    extension, gpus = report["extension"], report["gpus"]
    if not extension.get("loaded"):
        why = extension.get("reason") or extension["error"]
        found.append(
            Finding(
                f"the compiled extension ({why})",
                "results are the same, but fused layers run in plain PyTorch: no gain in speed",
                f"{REINSTALL} (a C++ compiler is needed)",
            )
        )
    found += _gpu_findings(report, gpus, extension)
    if not report["compiler"]:
        found.append(
            Finding(
                "a C++ compiler",
                "no build from source, and torch.compile cannot be compared with on a CPU",
                "apt-get install g++",
            )
        )
    if not report["cpu"].get("onednn"):
        found.append(
            Finding(
                "oneDNN in this PyTorch",
                "fused convolutions on a CPU run as separate steps",
                "pip install torch (the official wheels for x86 and ARM contain oneDNN)",
            )
        )
    return found


def _gpu_findings(
    report: dict[str, Any], gpus: list[dict[str, str]], extension: dict[str, Any]
) -> list[Finding]:
    if not gpus:
        return []
    found = []
    index = "--index-url https://download.pytorch.org/whl/cu130"
    if not report["torch"].get("cuda_available"):
        found.append(
            Finding(
                f"CUDA in PyTorch ({report['torch'].get('cuda_reason')})",
                f"the {gpus[0]['name']} is not used",
                f"pip install --force-reinstall torch {index}",
            )
        )
    if extension.get("loaded") and not extension.get("cuda"):
        found.append(
            Finding(
                "CUDA kernels in the extension (it was built for the CPU alone)",
                f"on the {gpus[0]['name']} fused layers run in plain PyTorch",
                f"CUDA_HOME=/usr/local/cuda RESNET_FUSED_BUILD=cuda {SOURCE} (in a source tree)",
            )
        )
    why = report["backends"].get("kernels", {}).get("cuda", {}).get("unusable")
    if extension.get("cuda") and report["torch"].get("cuda_available") and why:
        found.append(
            Finding(
                f"CUDA kernels for this GPU ({why})",
                f"on the {gpus[0]['name']} fused layers run in plain PyTorch",
                f"TORCH_CUDA_ARCH_LIST=<compute capability> RESNET_FUSED_BUILD=cuda {SOURCE}"
                " (in a source tree)",
            )
        )
    why = report["triton"].get("unusable")
    if why:
        found.append(
            Finding(
                f"Triton ({why})",
                "the backend triton cannot be asked for; where the extension has no CUDA kernels,"
                " operators run in plain PyTorch",
                "pip install 'triton>=3.6'",
            )
        )
    return found


def _probed(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    facts, error = attempt(probe)
    return {**(facts or {}), "error": error}


def _torch() -> dict[str, Any]:
    import torch

    available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": available,
        "cuda_reason": None if available else _cuda_reason(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cuda_reason() -> str:
    import torch

    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    return attempt(torch.cuda.init)[1] or "no device was found"


def _extension() -> dict[str, Any]:
    import torch

    from resnet_fused import _extension

    if not _extension.load():
        return {"loaded": False, "reason": _extension.error()}
    return {
        "loaded": True,
        "cuda": _extension.built_with_cuda(),
        "archs": list(_extension.cuda_archs()),
        "build": json.loads(torch.ops.resnet_fused_native.build_info()),
    }


def _cpu() -> dict[str, Any]:
    # The name does not need PyTorch, and is all that is left when PyTorch is broken.
    facts: dict[str, Any] = {
        "name": environment.cpu_name(),
        "isa": environment.cpu_isa(),
        "cores": environment.usable_cores(),
    }
    torch, error = attempt(lambda: __import__("torch"))
    if torch is None:
        return {**facts, "threads": None, "onednn": False, "reason": error}
    return {
        **facts,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available(),
    }


def _triton() -> dict[str, Any]:
    from resnet_fused import triton_kernels

    return {
        "version": environment.package_version("triton"),
        "unusable": triton_kernels.unavailable(),
    }


def _backends() -> dict[str, Any]:
    """Per device type and operator the backends that run here; on "cuda" none without a GPU.

    kernels: per backend for GPUs its operators, whether or not they can run, and why they cannot
    (unusable, None where they can).
    """
    import torch

    from resnet_fused import _extension, backends, native, triton_kernels

    available = torch.cuda.is_available()
    unsupported = {"cuda": native.unsupported_on_cuda, "triton": triton_kernels.unsupported}
    operators = {
        backend: [name for name in backends.OPERATORS if backends.has(backend, name)]
        for backend in unsupported
    }
    if not _extension.built_with_cuda():
        operators["cuda"] = []
    return {
        "cpu": {name: backends.available(name, "cpu") for name in backends.OPERATORS},
        "cuda": {
            name: backends.available(name, "cuda") if available else []
            for name in backends.OPERATORS
        },
        "kernels": {
            backend: {
                "operators": operators[backend],
                "unusable": reason("cuda", torch.float32)
                if available
                else "there is no CUDA device",
            }
            for backend, reason in unsupported.items()
        },
    }


def _computes() -> dict[str, Any]:
    import torch

    from resnet_fused import backends

    with backends.backend("reference"):
        _check_operators("cpu")
    # The backends of choice may be broken, say by an extension of another version.
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _, error = attempt(functools.partial(_check_operators, device))
        if error:
            return {"ok": True, "default_error": f"on {device}: {error}"}
    return {"ok": True, "default_error": None}


def _check_operators(device: str) -> None:
    import torch

    from resnet_fused import ops

    x = torch.ones(1, 2, 3, 3, device=device)
    one, zero = x.new_ones(2), x.new_zeros(2)
    with torch.no_grad():
        results = {
            "add_relu": (ops.add_relu(x, x), 2),
            "bn_relu": (ops.bn_relu(x, one, one, zero, one, residual=x, eps=0.0), 3),
            "conv_bn_relu": (ops.conv_bn_relu(x, x.new_ones(2, 2, 1, 1), one, zero), 2),
        }
    wrong = [name for name, (out, value) in results.items() if not torch.equal(out, x * value)]
    if wrong:
        raise RuntimeError(f"wrong results from {', '.join(wrong)}")


def _text(report: dict[str, Any], findings: list[Finding]) -> str:
    torch, cpu, extension = report["torch"], report["cpu"], report["extension"]
    packages = ", ".join(f"{k} {v or '-'}" for k, v in report["packages"].items())
    gpus = [f"{gpu['name']} ({gpu['memory']}), driver {gpu['driver']}" for gpu in report["gpus"]]
    rows = [
        ("resnet_fused", f"{report['resnet_fused']} in {report['folder']}"),
        ("python", f"{report['python']} ({sys.executable})"),
        ("system", report["system"]),
        ("torch", _torch_text(torch)),
        ("packages", packages),
        ("extension", _extension_text(extension)),
        ("cpu", _cpu_text(cpu)),
        ("gpu", "; ".join(gpus) or "none (no NVIDIA driver answers)"),
        ("nvcc", report["nvcc"] or "not found (only needed to build CUDA kernels)"),
        ("compiler", report["compiler"] or "not found"),
        ("triton", _triton_text(report["triton"])),
        ("computes", "yes" if report["computes"].get("ok") else report["computes"]["error"]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", *_backend_lines(report["backends"], extension.get("archs", [])), ""]
    if not findings:
        return "\n".join([*lines, "Nothing is missing."])
    for number, finding in enumerate(findings, 1):
        lines += [
            f"{number}. Missing: {finding.missing}",
            f"   Cost:    {finding.cost}",
            f"   Repair:  {finding.repair}",
        ]
    return "\n".join(lines)


def _torch_text(torch: dict[str, Any]) -> str:
    if torch["error"]:
        return f"cannot be imported: {torch['error']}"
    if torch["cuda_available"]:
        return f"{torch['version']}, CUDA {torch['cuda_build']}: {', '.join(torch['devices'])}"
    return f"{torch['version']}, no CUDA ({torch['cuda_reason']})"


def _extension_text(extension: dict[str, Any]) -> str:
    if not extension.get("loaded"):
        return f"not loaded: {extension.get('reason') or extension['error']}"
    build = extension["build"]
    cuda = f"CUDA for {', '.join(extension['archs'])}" if extension["cuda"] else "no CUDA"
    own = ", ".join(build["convolutions"]) or "no dtype (oneDNN's are used)"
    return (
        f"loaded; {cuda}; CPU code path {build['isa']}, direct convolutions in {own};"
        f" compiler {build['compiler']}"
    )


def _triton_text(triton: dict[str, Any]) -> str:
    return str(triton["error"] or triton["unusable"] or triton["version"])


def _cpu_text(cpu: dict[str, Any]) -> str:
    if cpu["error"]:
        return cpu["error"]
    isa = " ".join(cpu["isa"]) or "no vector instruction set known"
    text = f"{cpu['name']}, {cpu['cores']} cores, {isa}"
    if cpu["threads"] is None:
        return text
    onednn = "with oneDNN" if cpu["onednn"] else "without oneDNN"
    return f"{text}; {cpu['threads']} threads, {onednn}"


def _backend_lines(report: dict[str, Any], archs: list[str]) -> list[str]:
    if report["error"]:
        return [f"backends: cannot be listed: {report['error']}"]
    idle = {name: each for name, each in report["kernels"].items() if each["unusable"]}
    rows = []
    for operator, on_cpu in report["cpu"].items():
        on_cuda = list(report["cuda"][operator])
        built = [name for name, each in idle.items() if operator in each["operators"]]
        if built:
            on_cuda.append(f"({', '.join(built)}: cannot run here)")
        rows.append((operator, ", ".join(on_cpu), ", ".join(on_cuda) or "-"))
    lines = [table(("operator", "on cpu (first is used)", "on cuda (first is used)"), rows)]
    names = {"cuda": f"CUDA kernels, built for {', '.join(archs)},", "triton": "Triton kernels"}
    for name, each in idle.items():
        if each["operators"]:
            lines += ["", f"{names[name]} cannot run here: {each['unusable']}."]
    return lines
