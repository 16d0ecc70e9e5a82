"""Compiles CUDA sources for the emulator in csrc/emulator, which runs their kernels on CPU tensors.

What was compiled stays in build/emulator under a name made from everything that went into it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
# Chosen for a whole process, which must have been started with libasan: see the Makefile.
SANITIZE = os.environ.get("RESNET_FUSED_TEST_SANITIZER") == "address"
OLDEST_COMPILER = 11  # <source_location>

FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    # Vectors are loaded under a condition and used under the same one, which g++ cannot follow.
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-fmax-errors=5"),
    *("-DRESNET_FUSED_EMULATE", "-DTORCH_STABLE_ONLY"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *("-Icsrc", "-isystem", str(TORCH / "include")),
]
# Of the kernels, which are to be tested, and of the emulator, which takes most of the time.
KERNEL_FLAGS = ["-O1", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
EMULATOR_FLAGS = ["-O3"]
SANITIZE_FLAGS = ["-fsanitize=address", "-fno-omit-frame-pointer"]
LINK_FLAGS = ["-shared", "-Wl,-z,defs", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
DAYS_KEPT = 3


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        system = f"{platform.system()} on {platform.machine()}"
        return f"the emulator runs on Linux on x86_64 only, not {system}"
    if shutil.which("g++") is None:
        return "no g++ to compile the emulated kernels with"
    version = compiler_output("-dumpversion")
    if int(version.split(".")[0]) < OLDEST_COMPILER:
        return f"g++ is {version}: the emulator needs {OLDEST_COMPILER} or newer"
    return None if CSRC.is_dir() else "csrc is not beside the tests"


@functools.cache
def library(sanitize: bool = SANITIZE) -> Any:
    """torch.ops.resnet_fused_emulated: all kernels of csrc/cuda, compiled if need be, and loaded.

    Its operators `launches` and `configure` belong to the emulator.
    """
    # The largest take longest, so they come first.
    sources = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("emulator/*.cpp")]
    sources.sort(key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_file(source, sanitize), sources))
    return load(link("emulated", sorted(objects), sanitize), "resnet_fused_emulated")


def compile_source(text: str, name: str, filename: str, sanitize: bool = SANITIZE) -> Any:
    """The operators of one .cu file, whose text may have been changed, loaded beside all others.

    name: a name for this text, unique in the process, of letters, digits and _.
    filename: what errors call the file.
    """
    return load(build_source(text, name, filename, sanitize), namespace(name))


def compile_sources(
    texts: Mapping[str, str], filename: str, sanitize: bool = SANITIZE
) -> dict[str, Any]:
    """Like compile_source for each of {name: text}, several at a time."""
    compile_emulator(sanitize)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = pool.map(
            lambda name: build_source(texts[name], name, filename, sanitize), texts
        )
        return {
            name: load(path, namespace(name)) for name, path in zip(texts, libraries, strict=True)
        }


def build_source(text: str, name: str, filename: str, sanitize: bool = SANITIZE) -> Path:
    """The file that compile_source loads."""
    defines = f"#define RESNET_FUSED_NAMESPACE {namespace(name)}\n"
    text = f'{defines}#include "emulator/library.cpp"\n#line 1 "{filename}"\n{text}'
    objects = [*compile_emulator(sanitize), compile_text(name, text, KERNEL_FLAGS, sanitize)]
    return link(name, objects, sanitize)


def namespace(name: str) -> str:
    """Of the operators of the source compiled under that name."""
    return f"resnet_fused_emulated_{name}"


def mutate(text: str, old: str, new: str) -> str:
    """Text with its only occurrence of old replaced."""
    assert text.count(old) == 1, f"{text.count(old)} occurrences of {old!r}"
    return text.replace(old, new)


# Declares what chooses between mistakes, and the operator make_mistake(int number), which sets it;
# 0: none.
MISTAKE = """
#include <cstdint>
namespace resnet_fused {
inline int64_t mistake = 0;
}
"""
MAKE_MISTAKE = """
namespace {
void set_mistake(int64_t number) { resnet_fused::mistake = number; }
}
STABLE_TORCH_LIBRARY_FRAGMENT(RESNET_FUSED_NAMESPACE, m) {
  m.def("make_mistake(int number) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("make_mistake", TORCH_BOX(&set_mistake));
}
"""
# New tensors of launchers hold NaN and lie amid NaN: what is written beside them hits nothing else.
AMID_NAN = """
#include <cstring>
#include "emulator/emulator.h"
inline AOTITorchError empty_amid_nan(int64_t dimensions, const int64_t* sizes,
                                     const int64_t* strides, int32_t dtype, int32_t device_type,
                                     int32_t device_index, AtenTensorHandle* result) {
  constexpr int64_t kMargin = 1 << 15, kStride = 1;
  int64_t elements = 2 * kMargin + 1;
  bool is_empty = false;
  for (int64_t i = 0; i < dimensions; ++i) {
    elements += (sizes[i] - 1) * strides[i];
    is_empty |= sizes[i] == 0;
  }
  if (is_empty) elements = 2 * kMargin;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(1, &elements, &kStride, dtype, device_type, device_index, &handle)) {
    return AOTI_TORCH_FAILURE;
  }
  torch::stable::Tensor whole(handle);
  std::memset(whole.mutable_data_ptr(), 0xff, elements * whole.element_size());
  return aoti_torch__reinterpret_tensor(handle, dimensions, sizes, strides, kMargin, result);
}
#define aoti_torch_empty_strided empty_amid_nan
#include "cuda/activation.h"
#undef aoti_torch_empty_strided
"""


def with_mistakes(text: str, mistakes: Iterable[tuple[int, str, str]]) -> str:
    """A source in which `mistake` chooses between what is right and each of the mistakes.

    mistakes: (number, site, new) each: what stands between the two @ of `site` becomes `new`.
    """
    places: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for number, site, new in mistakes:
        before, old, after = site.split("@")
        whole = before + old + after
        assert text.count(whole) == 1, f"{text.count(whole)} occurrences of {whole!r}"
        start = text.index(whole) + len(before)
        places.setdefault((start, start + len(old)), []).append((number, new))
    end = len(text)
    for start, stop in sorted(places, reverse=True):
        assert stop <= end, f"overlapping sites at {text[start:stop]!r}"
        end = start
        choice = text[start:stop]
        is_statement = choice.endswith(";")
        for number, new in places[start, stop]:
            condition = f"::resnet_fused::mistake == {number}"
            if is_statement:
                choice = f"{{ if ({condition}) {{ {new} }} else {{ {choice} }} }}"
            else:
                choice = f"({condition} ? ({new}) : ({choice}))"
        text = text[:start] + choice + text[stop:]
    return text


def amid_nan(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The same with NaN, or all bits, around: where a mistake reads, there is something to see."""
    margin = 1 << 15
    nothing = float("nan") if tensor.is_floating_point() else 255
    storage = tensor.new_full((tensor.numel() + 2 * margin,), nothing)
    return storage.as_strided(tensor.shape, tensor.stride(), margin + offset).copy_(tensor)


def launches(ops: Any) -> list[dict[str, Any]]:
    """What the emulator recorded of each launch since the last call, as described in records.h."""
    records: list[dict[str, Any]] = json.loads(ops.launches())
    return records


def preload() -> dict[str, str]:
    """Environment variables for a process that loads sanitized libraries; {} without libasan."""
    # Without libstdc++ beside it, libasan would look for the functions it wraps before
    # any library that has them is loaded, and end the process at the first exception.
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [compiler_output(f"-print-file-name={name}") for name in names]
    if not all(Path(path).is_absolute() for path in libraries):
        return {}
    return {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "RESNET_FUSED_TEST_SANITIZER": "address",
    }


def load(path: Path, name: str) -> Any:
    if SANITIZE and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("RESNET_FUSED_TEST_SANITIZER=address: use make test-emulator-asan")
    if _loaded.setdefault(name, path) != path:
        raise RuntimeError(f"{name} is loaded already, from {_loaded[name]}")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, name)


_loaded: dict[str, Path] = {}


def compile_emulator(sanitize: bool) -> list[Path]:
    """All of it but the library of operators, whose name differs."""
    files = sorted(file for file in CSRC.glob("emulator/*.cpp") if file.stem != "library")
    return [compile_file(file, sanitize) for file in files]


def compile_file(source: Path, sanitize: bool) -> Path:
    text = f'#line 1 "{source.relative_to(ROOT)}"\n{source.read_text()}'
    flags = KERNEL_FLAGS if source.suffix == ".cu" else EMULATOR_FLAGS
    return compile_text(source.stem, text, flags, sanitize)


def compile_text(title: str, text: str, flags: Sequence[str], sanitize: bool) -> Path:
    command = ["g++", *FLAGS, *flags, *(SANITIZE_FLAGS if sanitize else ()), "-x", "c++", "-c", "-"]
    return cached(f"{title}.o", command, text, headers(text))


def link(title: str, objects: Sequence[Path], sanitize: bool) -> Path:
    command = ["g++", *(SANITIZE_FLAGS if sanitize else ()), "-fsanitize=alignment,bounds"]
    command += [*map(str, objects), *LINK_FLAGS]
    return cached(f"{title}.so", command)


def cached(
    title: str, command: Sequence[str], text: str = "", included: Mapping[str, str] | None = None
) -> Path:
    """The file that a compiler command makes of a text, run only if it has not been before."""
    versions = [compiler_output("--version"), torch.__version__]
    ingredients = json.dumps([*command, text, included, *versions])
    key = hashlib.sha256(ingredients.encode()).hexdigest()[:16]
    stem, _, suffix = title.rpartition(".")
    path = folder() / f"{stem}-{key}.{suffix}"
    if path.is_file():
        with contextlib.suppress(OSError):
            path.touch()
        return path
    # Another process may be making the same file: the later one replaces it by its equal.
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        done = subprocess.run(
            [*command, "-o", str(part)],
            cwd=ROOT,
            env=clean_environment(),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(f"compiling {title} failed:\n{done.stderr}")
        if done.stderr:
            warnings.warn(f"compiling {title}:\n{done.stderr}", stacklevel=2)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def headers(text: str) -> dict[str, str]:
    """The files of csrc that text includes, and those that they include: {name: contents}."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in re.findall(r'^#include "(.+)"', waiting.pop(), re.MULTILINE):
            if name not in found and (CSRC / name).is_file():
                found[name] = (CSRC / name).read_text()
                waiting.append(found[name])
    return dict(sorted(found.items()))


@functools.cache
def folder() -> Path:
    path = ROOT / "build/emulator"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError:
        return Path(temporary_folder().name)
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for file in path.iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()
    return path


@functools.cache
def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="resnet_fused_emulator_")


@functools.cache
def compiler_output(option: str) -> str:
    done = subprocess.run(
        ["g++", option], env=clean_environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def clean_environment() -> dict[str, str]:
    """That of a process without preloaded libraries."""
    return {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}


def main() -> None:
    """Prints the environment that `make test-emulator-asan` needs."""
    variables = preload() if unavailable() is None else {}
    if not variables:
        sys.exit(f"no AddressSanitizer: {unavailable() or 'g++ comes without libasan'}")
    print(*(f"{key}={value}" for key, value in variables.items()))


if __name__ == "__main__":
    main()
