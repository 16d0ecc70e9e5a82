"""Does a built wheel work under these interpreters, each with the torch that it has?

    python tests/check_wheel.py dist/resnet_fused-*.whl
    python tests/check_wheel.py dist/resnet_fused-*.whl --python a/bin/python --python b/bin/python

The wheel is unpacked into a temporary folder and nothing is installed. Under each interpreter the
package from that folder must load its extension, have every kernel registered, and compute outputs
and gradients that are as accurate as eager PyTorch's, on the CPU and on a GPU where there is one.
Prints a line for each interpreter; exits with 1 if the wheel fails under one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

NATIVE = ("add_relu", "add_relu_backward", "bn_relu", "bn_relu_apply", "bn_relu_backward")
TIME_LIMIT_S = 600


class Broken(Exception):  # noqa: N818 (what the wheel is)
    """The wheel does not work here; the message says how that shows."""


class Verdict(NamedTuple):
    """What one interpreter says: its versions, what works, and what does not (or "")."""

    python: str
    torch: str
    works: str
    broken: str

    def __str__(self) -> str:
        result = f"FAILED: {self.broken}" if self.broken else f"ok: {self.works}"
        return f"python {self.python}, torch {self.torch}: {result}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--python", action="append", metavar="EXE", help="can be repeated; default: this one"
    )
    options = parser.parse_args(arguments)
    if not zipfile.is_zipfile(options.wheel):
        parser.error(f"{options.wheel} is not a wheel")
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(options.wheel) as archive:
            archive.extractall(folder)
        for executable in options.python or [sys.executable]:
            verdicts.append(_ask(executable, Path(folder)))
            print(verdicts[-1], flush=True)
    return 1 if any(verdict.broken for verdict in verdicts) else 0


def _ask(executable: str, folder: Path) -> Verdict:
    """Run this file's checks under another interpreter, which sees the wheel's package first."""
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {n: v for n, v in os.environ.items() if not n.startswith("RESNET_FUSED_")}
    try:
        done = subprocess.run(
            [executable, str(Path(__file__).resolve()), "--inside", str(folder)],
            cwd=folder,
            env={**kept, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Verdict("?", "?", "", f"{executable}: {error}")
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and last.startswith("{"):
        return Verdict(**json.loads(last))
    complaint = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
    return Verdict("?", "?", "", f"{executable}: exit status {done.returncode}: {complaint}")


# --- under the interpreter in question -----------------------------------------------------------


def inside(folder: Path) -> Verdict:
    python = platform.python_version()
    try:
        import torch
    except Exception as error:  # a broken torch can raise anything
        return Verdict(python, "none", "", f"torch: {error}")
    try:
        return Verdict(python, torch.__version__, _works(folder), "")
    except Broken as reason:
        return Verdict(python, torch.__version__, "", str(reason))
    except Exception as error:  # what a broken wheel raises is what is wanted
        return Verdict(python, torch.__version__, "", f"{type(error).__name__}: {error}")


def _works(folder: Path) -> str:
    import torch

    import resnet_fused
    from resnet_fused import _extension, native

    if folder.resolve() not in Path(resnet_fused.__file__).resolve().parents:
        raise Broken(f"resnet_fused was imported from {resnet_fused.__file__}, not from the wheel")
    info = _extension.build_info()
    if info is None:
        raise Broken(f"the extension is not loaded: {_extension.error()}")
    _check_registrations(info)
    works = f"CPU kernels ({info['isa']}), {_check_operators(torch.device('cpu'))} comparisons"
    if not info["cuda"]:
        return f"{works}; built without CUDA"
    built = f"{works}; CUDA kernels for {', '.join(info['archs'])} registered"
    if not torch.cuda.is_available():
        return f"{built}, no GPU to run them"
    reason = native.unsupported_on_cuda("cuda", torch.float32)
    if reason is not None:
        return f"{built}, not run: {reason}"
    count = _check_operators(torch.device("cuda"))
    return f"{built} and run on {torch.cuda.get_device_name()}, {count} comparisons"


def _check_registrations(info: Any) -> None:
    import torch

    for operator in NATIVE:
        for key in ("CPU", "CUDA") if info["cuda"] else ("CPU",):
            name = f"resnet_fused_native::{operator}"
            if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
                raise Broken(f"{name} has no kernel for {key}")


def _check_operators(device: Any) -> int:
    """Outputs and gradients of every operator on the layers of a small network."""
    import torch

    import resnet_fused
    from resnet_fused import models
    from resnet_fused.commands.cases import cases, layer_shapes, run_case

    shapes = layer_shapes(models.resnet20().eval(), torch.randn(2, 3, 16, 16))
    backend = device.type
    count = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in cases(shapes, dtype, device):
            if device.type == "cuda" and case.operator == "conv_bn_relu":
                continue  # it has no kernel there
            with resnet_fused.backend(backend):
                checks = run_case(case, dtype)
            wrong = [check for check in checks if not check.passed]
            if wrong:
                raise Broken(f"wrong result: {wrong[0]}")
            count += len(checks)
    return count


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(inside(Path(sys.argv[2]))._asdict()))
    else:
        sys.exit(main())
