"""Numerics certificate: is every result as accurate as eager PyTorch's?

For each operator (on the layer shapes of the model, output and every gradient) and each model
(output, and the gradients of one training step) it computes the error of this library and the
error of eager PyTorch, both against float64 from the same low-precision inputs. A result passes
when its error is at most twice eager's plus one rounding of the output. Exits with 1 if one fails.
"""

import argparse
import contextlib
import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.commands import environment, networks, numerics
from resnet_fused.commands.cases import cases, layer_shapes, run_case
from resnet_fused.commands.chain_cases import blocks, chain_cases
from resnet_fused.commands.console import CommandError, progress, table
from resnet_fused.commands.numerics import Check, Subject, check, check_norm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        default=["resnet18"],
        help=f"default resnet18; one or more of {', '.join(networks.NAMES)}",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="DTYPE",
        help="one or more of float32, bfloat16 (both by default) and float16",
    )  # fmt: skip
    add_device_argument(parser)
    parser.add_argument(
        "--backend", choices=resnet_fused.backends.NAMES, help="default: the one chosen per call"
    )
    parser.add_argument("--batch", type=positive, default=4, help="images per batch, default 4")
    parser.add_argument(
        "--size", type=positive, default=64, help="height and width of the images, default 64"
    )
    parser.add_argument("--all", action="store_true", help="print every comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    device = checked_device(arguments.device)
    checks: list[Check] = []
    models: dict[str, Any] = {}
    wish = resnet_fused.backend(arguments.backend) if arguments.backend else None
    with wish or contextlib.nullcontext():
        for name in arguments.model:
            pair = networks.build_pair(name)
            images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
            networks.warm_up(pair, images)
            models[name] = {"source": pair.source, "fused": networks.fused_blocks(pair.fused)}
            for dtype in arguments.dtype:
                checks += certify(name, pair, images, DTYPES[dtype], device)
    certificate = {
        "resnet_fused": environment.library_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "backend": arguments.backend or "chosen per call",
        "precision": numerics.precision_flags(),
        "models": models,
        "rule": f"error <= {numerics.FACTOR:g} x eager's error + one rounding of the output",
        "passed": all(c.passed for c in checks) and all(m["fused"] for m in models.values()),
    }
    if arguments.json:
        rows = [{**c._asdict(), "passed": c.passed} for c in checks]
        print(json.dumps({**certificate, "checks": rows}, indent=2))
    else:
        print(certificate_text(certificate, checks, arguments.all))
    return 0 if certificate["passed"] else 1


def certify(
    name: str,
    pair: networks.Pair,
    images: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    operators: bool = True,
) -> list[Check]:
    """All comparisons for one model in one dtype.

    images: (N, 3, H, W) in float32. The models of the pair are left as they are.
    """
    eager = networks.placed(copy.deepcopy(pair.eager), device)
    fused = networks.placed(copy.deepcopy(pair.fused), device)
    images = images.to(device, memory_format=torch.channels_last)
    checks = []
    if operators:
        shapes = layer_shapes(eager, images)
        title = f"{name} {numerics.short_name(dtype)}: operators"
        chained = chain_cases(blocks(eager, images), dtype, device)
        for case in progress([*cases(shapes, dtype, device), *chained], title):
            checks += run_case(case, dtype)
    checks += check_inference(name, eager, fused, images, dtype)
    checks += check_training_step(name, eager, fused, images, dtype)
    return checks


def check_inference(
    name: str, eager: nn.Module, fused: nn.Module, images: Tensor, dtype: torch.dtype
) -> list[Check]:
    """Outputs of both models in eval mode, with weights and images in `dtype`."""
    x = images.to(dtype)
    low = [copy.deepcopy(model).eval().to(dtype) for model in (eager, fused)]
    exact = copy.deepcopy(low[0]).double()
    with torch.no_grad():
        eager_out, fused_out, exact_out = low[0](x), low[1](x), exact(x.double())
    subject = Subject(name, f"{_label(x)}, eval", dtype)
    return [check(subject, "out", fused_out, eager_out, exact_out)]


def check_training_step(
    name: str, eager: nn.Module, fused: nn.Module, images: Tensor, dtype: torch.dtype
) -> list[Check]:
    """Loss, all gradients and all running statistics after one training step.

    Weights are in float32; other dtypes run under autocast, as in practice.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        classes = eager(images[:1]).shape[1]
    labels = torch.randint(classes, (len(images),), generator=generator).to(images.device)

    def step(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, list[Tensor]]:
        model = copy.deepcopy(model).train().to(x.dtype)
        with torch.autocast(x.device.type, dtype, enabled=autocast):
            out = model(x)
        F.cross_entropy(out.to(x.dtype), labels).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        buffers = [b for key, b in model.named_buffers() if "running" in key]
        return {"out": [out.detach()], "gradients": grads, "running statistics": buffers}

    autocast = dtype != torch.float32
    eager_step, fused_step = step(eager, images, autocast), step(fused, images, autocast)
    exact_step = step(eager, images.double(), False)
    subject = Subject(name, f"{_label(images)}, training{' (autocast)' * autocast}", dtype)
    return [
        check_norm(subject, key, fused_step[key], eager_step[key], exact_step[key])
        for key in exact_step
    ]


def certificate_text(
    certificate: dict[str, Any], checks: list[Check], everything: bool = False
) -> str:
    lines = [
        f"resnet_fused {certificate['resnet_fused']} numerics certificate",
        f"torch {certificate['torch']}, {certificate['device']}, {certificate['threads']} threads, "
        f"backend {certificate['backend']}",
        "; ".join(f"{key}: {value}" for key, value in certificate["precision"].items()),
        *(f"{k}: {m['fused']} blocks fused, eager model from {m['source']}"
          for k, m in certificate["models"].items()),
        "errors are against float64 from the same inputs: max = largest error of one element, "
        "l2 = relative error of the whole vector",
        f"rule: {certificate['rule']}",
        "",
    ]  # fmt: skip
    lines.append(checks_table(checks if everything else worst(checks)))
    failed = [c for c in checks if not c.passed]
    if failed and not everything:
        lines += ["", "failed:", checks_table(failed)]
    unfused = [name for name, model in certificate["models"].items() if not model["fused"]]
    lines += [f"\nno block of {name} was fused" for name in unfused]
    verdict = "PASSED" if certificate["passed"] else "FAILED"
    lines += ["", f"{verdict}: {len(checks) - len(failed)} of {len(checks)} comparisons"]
    return "\n".join(lines)


def worst(checks: Iterable[Check]) -> list[Check]:
    """Per operator or model, dtype and tensor the comparison that is closest to failing."""
    found: dict[tuple[str, ...], Check] = {}
    for c in checks:
        key = (c.subject, c.dtype, c.tensor, c.norm)
        if key not in found or not c.ratio <= found[key].ratio:
            found[key] = c
    return list(found.values())


def checks_table(checks: Iterable[Check]) -> str:
    header = (
        "what", "dtype", "tensor", "worst case", "norm", "error", "eager error", "allowed",
        "verdict",
    )  # fmt: skip
    rows = [
        (
            c.subject, c.dtype, c.tensor, c.case, c.norm, f"{c.error:.2e}", f"{c.eager_error:.2e}",
            f"{c.allowed:.2e}", "ok" if c.passed else "FAILED",
        )
        for c in checks
    ]  # fmt: skip
    return table(header, rows)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; default: cuda where there is one",
    )


def checked_device(text: str) -> torch.device:
    """The device, after a first allocation there; CommandError with the reason otherwise."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"device {text!r} cannot be used: {reason}", status=2) from error
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({environment.cpu_name()})"


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _label(images: Tensor) -> str:
    return "x".join(map(str, images.shape))
