"""Builds resnet_fused._C, the extension on the LibTorch stable ABI; pyproject.toml has the rest.

The build reads torch's headers and links libtorch, but never imports torch. So it works inside
pip's build isolation, where the torch of the environment being installed into cannot be imported
but is found by path.

Environment: RESNET_FUSED_BUILD=auto|cpu|cuda|none, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 11)
# What one compiled file of this library runs on: A100 and newer, H100, B200.
DEFAULT_ARCHS = "8.0;9.0a;10.0"
OLDEST_ARCH = (8, 0)
NAMED_ARCHS = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# -ffp-contract=off: kernels say fma where they mean it, so that the inner loops of every
# instruction set, and forward and backward, round alike.
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fopenmp-simd", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
]
NVCC_FLAGS = [
    *("-O3", "-std=c++20", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--fmad=false"),
    *("--threads", "0"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
]


class BuildConfigError(Exception):
    """The build cannot go on; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class BuildConfig:
    """What to build: nothing native when `cxx` is empty, no CUDA code when `cuda_home` is None."""

    cxx: tuple[str, ...] = ()
    torch_dir: Path = Path()
    cuda_home: Path | None = None
    archs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_config(environ: dict[str, str]) -> BuildConfig:
    """Decides what to build. Raises BuildConfigError when what was asked for is impossible."""
    mode = environ.get("RESNET_FUSED_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise BuildConfigError(
            f"RESNET_FUSED_BUILD must be one of {', '.join(MODES)}, got {mode!r}"
        )
    if mode == "none":
        return BuildConfig(notes=("RESNET_FUSED_BUILD=none: installing pure Python",))
    try:
        cxx = find_cxx(environ)
    except BuildConfigError as error:
        if mode != "auto":
            raise
        return BuildConfig(notes=(f"{error}; installing pure Python, which is slower",))
    torch_dir = find_torch()
    if mode == "cpu":
        return BuildConfig(cxx, torch_dir, notes=("building for CPU only, as asked",))
    try:
        cuda_home = find_cuda_home(environ)
    except BuildConfigError as error:
        if mode == "cuda":
            raise
        return BuildConfig(cxx, torch_dir, notes=(f"{error}; building for CPU only",))
    archs, notes = choose_archs(environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc_archs(cuda_home))
    notes += (f"building for CPU and CUDA {', '.join(archs)} with {cuda_home}/bin/nvcc",)
    notes += toolkit_notes(nvcc_release(cuda_home), torch_cuda(torch_dir))
    return BuildConfig(cxx, torch_dir, cuda_home, archs, notes)


def find_cxx(environ: dict[str, str]) -> tuple[str, ...]:
    """The C++ compiler's command: CXX, or the first of c++, g++, clang++ that exists."""
    if not sys.platform.startswith("linux"):
        raise BuildConfigError(
            f"the native extension is built on Linux only, not on {sys.platform}"
        )
    named = shlex.split(environ.get("CXX", ""))
    path = environ.get("PATH")
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    command = next((c for c in candidates if shutil.which(c[0], path=path)), None)
    if command is None:
        what = (
            f"CXX={environ['CXX']}" if named else "a C++ compiler (g++ 10 or clang++ 11 or newer)"
        )
        raise BuildConfigError(f"{what} was not found")
    command[0] = str(shutil.which(command[0], path=path))
    probe = subprocess.run(
        [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
        input="#include <concepts>\nint main() {}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        raise BuildConfigError(
            f"{shlex.join(command)} does not compile C++20 (g++ 10 or clang++ 11 or newer does)"
        )
    return tuple(command)


def find_torch() -> Path:
    """The directory of the torch to build against: importable, else of the running interpreter."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(location) for location in (spec and spec.submodule_search_locations) or ()]
    candidates += [folder / "torch" for folder in site_packages()]
    torch_dir = next((path for path in candidates if (path / "version.py").is_file()), None)
    if torch_dir is None:
        raise BuildConfigError(
            f"torch was not found in {sys.prefix}: install torch 2.11 or newer first (if it is "
            "installed, build without isolation: --no-build-isolation), or set "
            "RESNET_FUSED_BUILD=none to install pure Python"
        )
    version = torch_version(torch_dir)
    if version_key(version) < OLDEST_TORCH:
        raise BuildConfigError(f"torch must be 2.11 or newer, got {version} in {torch_dir}")
    if not (torch_dir / "include/torch/csrc/stable/library.h").is_file():
        raise BuildConfigError(f"the torch in {torch_dir} comes without its C++ headers")
    return torch_dir


def site_packages() -> list[Path]:
    """Where the running interpreter's packages lie, whether or not build isolation hides them."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    elif has_system_site_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        # The last two are Debian's.
        schemes = {"posix_prefix", "posix_local", "deb_system"} & set(sysconfig.get_scheme_names())
        folders += [sysconfig.get_path("purelib", scheme, base) for scheme in sorted(schemes)]
    return [Path(folder) for folder in folders]


def has_system_site_packages() -> bool:
    config = Path(sys.prefix, "pyvenv.cfg")
    pattern = r"(?im)^include-system-site-packages\s*=\s*true"
    return config.is_file() and re.search(pattern, config.read_text()) is not None


def torch_version(torch_dir: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (torch_dir / "version.py").read_text())
    return match.group(1) if match else "unknown"


def version_key(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def find_cuda_home(environ: dict[str, str]) -> Path:
    """The CUDA toolkit: CUDA_HOME or CUDA_PATH, else nvcc's on PATH, else /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            home = Path(environ[variable])
            if not (home / "bin/nvcc").is_file():
                raise BuildConfigError(f"nvcc was not found in {variable}={home}")
            return home
    candidates = [Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        candidates.insert(0, toolkit_of(nvcc))
    for home in candidates:
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    raise BuildConfigError(
        "nvcc was not found (CUDA_HOME is unset, PATH and /usr/local/cuda lack it)"
    )


def toolkit_of(nvcc: str) -> Path:
    """The toolkit that `nvcc` belongs to, also when it is a wrapper script lying elsewhere."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parent.parent


def nvcc_archs(cuda_home: Path) -> frozenset[str]:
    """The architectures this nvcc generates code for, as "80", "90" (it does not list "90a")."""
    listing = subprocess.run(
        [str(cuda_home / "bin/nvcc"), "--list-gpu-code"],
        capture_output=True,
        text=True,
        check=False,
    )
    return frozenset(re.findall(r"sm_(\d+)", listing.stdout))


def nvcc_release(cuda_home: Path) -> str:
    text = subprocess.run(
        [str(cuda_home / "bin/nvcc"), "--version"], capture_output=True, text=True, check=False
    ).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else ""


def torch_cuda(torch_dir: Path) -> str:
    """The CUDA release that torch was built with; "" for a CPU-only torch."""
    match = re.search(
        r"^cuda\b.*= '([\d.]+)'", (torch_dir / "version.py").read_text(), re.MULTILINE
    )
    return match.group(1) if match else ""


def toolkit_notes(nvcc: str, torch: str) -> tuple[str, ...]:
    """Says when a driver that is good enough for torch may be too old for these kernels."""
    if not nvcc or not torch or int(nvcc.split(".")[0]) <= int(torch.split(".")[0]):
        return ()
    return (f"nvcc is {nvcc}, torch has CUDA {torch}: the kernels need a driver for CUDA {nvcc}",)


def choose_archs(wanted: str, supported: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parses TORCH_CUDA_ARCH_LIST ("" means the default) into (archs, notes).

    Such a list is often set for a whole image, so entries that are too old for this library are
    left out with a note; an entry that nvcc cannot compile was asked for in vain and is an error.
    """
    archs: list[str] = []
    notes: list[str] = []
    for arch in parse_arch_list(wanted or DEFAULT_ARCHS):
        number = arch.removesuffix("+PTX")
        if version_key(number) < OLDEST_ARCH:
            notes.append(f"left out CUDA architecture {arch}: 8.0 is the oldest supported")
        elif supported and number.replace(".", "").rstrip("af") not in supported:
            if wanted:
                raise BuildConfigError(
                    f"TORCH_CUDA_ARCH_LIST contains {arch}, which this nvcc does not know"
                )
            notes.append(f"left out CUDA architecture {arch}: this nvcc does not know it")
        else:
            archs.append(arch)
    if not archs:
        raise BuildConfigError(f"TORCH_CUDA_ARCH_LIST must hold 8.0 or newer, got {wanted!r}")
    return tuple(archs), tuple(notes)


def parse_arch_list(text: str) -> list[str]:
    """ "8.0 9.0a+PTX" or "8.0;Hopper" -> ["8.0", "9.0a+PTX"], without duplicates."""
    for name, archs in NAMED_ARCHS.items():
        text = re.sub(rf"\b{name}\b", archs, text)
    entries = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise BuildConfigError(
                "TORCH_CUDA_ARCH_LIST entries must look like 8.0, 9.0a, 9.0+PTX or Hopper, "
                f"got {entry!r}"
            )
    return list(dict.fromkeys(entries))


def gencode_flags(archs: tuple[str, ...]) -> list[str]:
    """("8.0", "9.0a+PTX") -> one -gencode option for each, PTX included where asked for."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def worker_count(environ: dict[str, str]) -> int:
    text = environ.get("MAX_JOBS", "")
    if not text:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) == 0:
        raise BuildConfigError(f"MAX_JOBS must be a positive integer, got {text!r}")
    return int(text)


class NativeBuild(build_ext):
    """Compiles csrc in parallel, one visible line per file, skipping what is up to date."""

    config = BuildConfig()
    problem: BuildConfigError | None = None

    def run(self) -> None:
        if self.problem is not None:
            raise SystemExit(f"resnet_fused: {self.problem}.")
        if self.inplace and not self.extensions:
            # What an earlier build left here would be loaded all the same.
            (ROOT / "resnet_fused/_C.abi3.so").unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        temp = Path(self.build_temp).absolute()
        objects = {source: temp / f"{source}.o" for source in ext.sources}
        jobs = [
            Job(source, target, temp / f"{source}.command", self.compile_command(source, target))
            for source, target in objects.items()
        ]
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        command = self.link_command(objects.values(), library)
        link = Job(f"linking {library.name}", library, temp / f"{library.name}.command", command)
        began = time.monotonic()
        try:
            run_jobs([job for job in jobs if job.is_stale()], worker_count(dict(os.environ)))
            if link.is_stale():
                run_jobs([link], workers=1)
                report(library, time.monotonic() - began)
        except BuildConfigError as error:
            raise SystemExit(f"resnet_fused: {error}.") from error

    def compile_command(self, source: str, target: Path) -> list[str]:
        config = self.config
        headers = ["-isystem", str(config.torch_dir / "include"), "-Icsrc"]
        output = ["-MMD", "-MF", f"{target}.d", "-c", source, "-o", str(target)]
        if source.endswith(".cu"):
            nvcc = [f"{config.cuda_home}/bin/nvcc", "-ccbin", shlex.join(config.cxx), *NVCC_FLAGS]
            return [*nvcc, *gencode_flags(config.archs), *ABI_FLAGS, *headers, *output]
        defines = [f'-DRESNET_FUSED_CUDA_ARCHS="{";".join(config.archs)}"']
        return [*config.cxx, *CXX_FLAGS, *ABI_FLAGS, *defines, *headers, *output]

    def link_command(self, objects: Iterable[Path], target: Path) -> list[str]:
        config = self.config
        # libtorch must stay in the list of needed libraries although no symbol comes from it:
        # under a CUDA torch it is what brings libtorch_cuda, where the CUDA shims are.
        libraries = [
            f"-L{config.torch_dir / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
        ]
        if config.cuda_home:
            folders = [config.cuda_home / name for name in ("lib64", "lib")]
            libraries += [f"-L{folder}" for folder in folders if folder.is_dir()]
            libraries += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            libraries.append("-Wl,--exclude-libs,libcudart_static.a")
        inputs = [str(path) for path in objects]
        return [*config.cxx, "-shared", *inputs, "-o", str(target), "-Wl,-z,defs", *libraries]


@dataclass(frozen=True)
class Job:
    """One compiler call: what to print, the file it makes, and where its command is noted."""

    title: str
    target: Path
    record: Path
    command: list[str]

    def is_stale(self) -> bool:
        """Whether the target is missing, older than its inputs or made by another command."""
        if not (self.target.is_file() and self.record.is_file()):
            return True
        if self.record.read_text() != shlex.join(self.command):
            return True
        built = self.target.stat().st_mtime
        return any(not f.is_file() or f.stat().st_mtime > built for f in self.inputs())

    def inputs(self) -> list[Path]:
        """Headers and sources as the compiler listed them; a link job names its own."""
        listing = Path(f"{self.target}.d")
        if not listing.is_file():
            return [ROOT / word for word in self.command if word.endswith(".o")]
        rule = listing.read_text().replace("\\\n", " ")
        return [ROOT / word for word in shlex.split(rule.partition(":")[2])]

    def run(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(self.command, cwd=ROOT, check=True)
        except subprocess.CalledProcessError as error:
            raise BuildConfigError(
                f"making {self.title} failed, for the reason above; the command was "
                f"{shlex.join(self.command)}"
            ) from error
        self.record.write_text(shlex.join(self.command))


def run_jobs(jobs: list[Job], workers: int) -> None:
    """Runs the compilers, announcing each as it starts; the first failure ends the build."""
    numbers = itertools.count(1)
    lock = threading.Lock()

    def announce_and_run(job: Job) -> None:
        with lock:
            print(f"[{next(numbers)}/{len(jobs)}] {job.title}", flush=True)
        job.run()

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(announce_and_run, job) for job in jobs]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in done:
            future.result()


def report(library: Path, seconds: float) -> None:
    megabytes = library.stat().st_size / 1e6
    print(
        f"resnet_fused: {library.name} has {megabytes:.1f} MB, made in {seconds:.0f} s", flush=True
    )


def sources(config: BuildConfig) -> list[str]:
    # nvcc's files take longest and so come first.
    patterns = (["csrc/cuda/*.cu"] if config.cuda_home else []) + ["csrc/cpu/*.cpp", "csrc/*.cpp"]
    return [str(f.relative_to(ROOT)) for pattern in patterns for f in sorted(ROOT.glob(pattern))]


def main() -> None:
    try:
        NativeBuild.config = resolve_config(dict(os.environ))
        worker_count(dict(os.environ))
    except BuildConfigError as error:
        # Only building needs the answer; sdist, metadata and clean go on without it.
        NativeBuild.problem = error
    config = NativeBuild.config
    # An installer runs this file for the metadata too, where the notes would appear once more.
    for note in () if {"egg_info", "dist_info"} & set(sys.argv) else config.notes:
        print(f"resnet_fused: {note}", flush=True)
    has_native = bool(config.cxx) or NativeBuild.problem is not None
    extension = Extension("resnet_fused._C", sources(config), py_limited_api=True)
    setup(
        ext_modules=[extension] if has_native else [],
        cmdclass={"build_ext": NativeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
