"""The command line: what it prints, what it refuses, and that its verdicts can be negative."""

import contextlib
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import _extension, backends, models
from resnet_fused.__main__ import main
from resnet_fused.commands import baselines, console, digits, doctor, networks, numerics, verify
from resnet_fused.commands.cases import (
    OPERATORS,
    Case,
    PoolShape,
    cases,
    layer_shapes,
    run_case,
)
from resnet_fused.commands.chain_cases import Block, blocks, chain_cases
from resnet_fused.commands.memory import saved_bytes
from resnet_fused.commands.timing import interleave

# Where this package was imported from: an installation, or the source tree.
ROOT = Path(resnet_fused.__file__).resolve().parent.parent


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m resnet_fused ...` as its own process, with one thread."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "resnet_fused", *arguments],
        env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which a command refuses its arguments."""
    assert main(arguments) != 0
    lines = capsys.readouterr().err.splitlines()
    messages = [line for line in lines if line.startswith("python -m resnet_fused: ")]
    assert len(messages) == 1, lines
    return messages[0]


@pytest.fixture
def demo_packages() -> None:
    for name in ("sklearn", "matplotlib", "PIL"):
        pytest.importorskip(name, reason=f"the demo needs {name}")


# --- the program ---------------------------------------------------------------------------------


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("doctor", "verify", "demo"))


@pytest.mark.parametrize("name", ["doctor", "verify", "demo"])
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"python -m resnet_fused {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("resnet_fused ")


@pytest.mark.parametrize(
    ("typed", "hint"), [("docter", "did you mean 'doctor'?"), ("xyzzy", "choose from doctor")]
)
def test_unknown_command(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([typed])
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_closed_pipe_is_quiet() -> None:
    process = command("verify", "--all", "--model", "resnet20", "--size", "16", "--batch", "2")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell runs in the background ignores Ctrl-C, and so would all that it starts."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_interrupt_leaves_nothing_behind(
    tmp_path: Path, demo_packages: None, interruptible: None
) -> None:
    out = tmp_path / "report"
    process = command("demo", "--quick", "--batch", "2", "--out", str(out))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            break
    assert out.is_dir()
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait() == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not out.exists()


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_prints_and_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "extension", "compiler", "oneDNN", "add_relu", "computes      yes"):
        assert word in text


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert report["computes"]["ok"]
    assert "reference" in report["backends"]["cpu"]["conv_bn_relu"]
    assert all({"missing", "cost", "repair"} == set(finding) for finding in report["findings"])


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "not installed"),
        ("raise OSError('libtorch.so: cannot open shared object file')", "libtorch.so"),
    ],
)
def test_doctor_without_torch(tmp_path: Path, fake: str, expected: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(fake)
    process = command("doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    out, error = process.communicate()
    assert process.returncode == 1, error
    assert f"Missing: PyTorch is {'not installed' if 'not' in expected else 'broken'}" in out
    assert expected in out
    assert "pip install" in out


def test_doctor_explains_what_is_missing_and_how_to_repair_it() -> None:
    report = doctor.examine()
    report["extension"] = {"loaded": False, "reason": "no such file", "error": None}
    report["compiler"] = None
    report["gpus"] = [{"name": "NVIDIA H100", "driver": "580", "memory": "80 GB"}]
    report["torch"] |= {"cuda_available": False, "cuda_reason": "built without CUDA"}
    report["triton"] |= {"unusable": "Triton is not installed"}
    text = "\n".join(" ".join(finding) for finding in doctor.diagnose(report))
    for word in (
        "extension (no such file)",
        "g++",
        "NVIDIA H100 is not used",
        "Triton (Triton is not installed)",
        "pip install 'triton>=3.6'",
    ):
        assert word in text


def backends_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None
) -> str:
    """What doctor says of backends with kernels for 8.0 and 9.0a and a GPU of this capability."""
    built = {"cuda": True, "archs": ["8.0", "9.0a"]}
    monkeypatch.setattr(_extension, "load", lambda: True)
    monkeypatch.setattr(_extension, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    facts = doctor._probed(doctor._backends)
    assert facts["error"] is None
    return "\n".join(doctor._backend_lines(facts, built["archs"]))


def row(text: str, operator: str) -> str:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [operator])
    return line


def test_doctor_lists_cuda_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    text = backends_of_a_machine(monkeypatch, (8, 6))
    assert row(text, "bn_relu_backward").endswith("  cuda, triton, reference")
    assert row(text, "conv_bn_relu_backward").endswith("  reference, cuda, triton")
    assert row(text, "bottleneck_roll").endswith("  reference, cuda")
    assert "cannot run" not in text


def test_doctor_lists_cuda_kernels_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    text = backends_of_a_machine(monkeypatch, None)
    assert row(text, "bn_relu").endswith("  (cuda, triton: cannot run here)")
    assert row(text, "bottleneck_roll").endswith("  (cuda: cannot run here)")
    assert "CUDA kernels, built for 8.0, 9.0a, cannot run here: there is no CUDA device." in text
    assert text.endswith("Triton kernels cannot run here: there is no CUDA device.")


def test_doctor_lists_cuda_kernels_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    text = backends_of_a_machine(monkeypatch, (7, 5))
    assert row(text, "bn_relu").endswith("  reference, (cuda, triton: cannot run here)")
    assert "no code for compute capability 7.5" in text
    assert "Triton kernels cannot run here: it needs compute capability 8.0, got 7.5." in text


def test_doctor_does_not_list_cuda_kernels_that_were_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda": False, "archs": []})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "\n".join(doctor._backend_lines(doctor._probed(doctor._backends), []))
    assert row(text, "bn_relu").endswith("  (triton: cannot run here)")
    assert "Triton kernels cannot run here" in text
    assert "CUDA kernels" not in text


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"error": None, "unusable": None, "version": "3.6.0"}, "3.6.0"),
        ({"error": None, "unusable": "too old", "version": "3.5.1"}, "too old"),
        ({"error": "the probe failed"}, "the probe failed"),
    ],
)
def test_doctor_says_why_triton_is_of_no_use(facts: dict[str, str | None], expected: str) -> None:
    assert doctor._triton_text(facts) == expected


def test_doctor_finds_that_the_kernels_are_for_other_gpus() -> None:
    report = doctor.examine()
    report["gpus"] = [{"name": "Tesla T4", "driver": "580", "memory": "16 GB"}]
    report["torch"] |= {"cuda_available": True}
    report["extension"] = {"loaded": True, "cuda": True, "archs": ["8.0"], "error": None}
    report["backends"]["kernels"]["cuda"]["unusable"] = "the extension has no code for 7.5"
    text = "\n".join(" ".join(finding) for finding in doctor.diagnose(report))
    assert "CUDA kernels for this GPU (the extension has no code for 7.5)" in text
    assert "TORCH_CUDA_ARCH_LIST" in text


@pytest.mark.skipif(not _extension.built_with_cuda(), reason="built without CUDA")
def test_cuda_kernels_that_were_built() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels = {name for name in backends.OPERATORS if backends.has("cuda", name)}
    kernels.remove("conv_bn_relu_backward")  # its Python half calls three others
    assert not [name for name in kernels if not registered(f"resnet_fused_native::{name}", "CUDA")]


def test_doctor_survives_a_broken_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("driver and toolkit disagree")

    monkeypatch.setattr(doctor, "_torch", broken)
    monkeypatch.setattr(doctor, "_cpu", broken)
    report = doctor.examine()
    assert "driver and toolkit disagree" in doctor._text(report, doctor.diagnose(report))


# --- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_verify_passes(backend: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backend", backend] if backend else []
    assert main(["verify", "--model", "resnet20", "--size", "16", *options]) == 0
    text = capsys.readouterr().out
    assert "PASSED" in text
    assert "tf32" in text
    assert "9 blocks fused" in text


def test_verify_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "resnet20", "--size", "16", "--dtype", "float32", "--json")
    assert main(["verify", *options]) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["passed"]
    assert {c["subject"] for c in certificate["checks"]} == {
        "add_relu", "bn_relu", "conv_bn_relu", "resnet20",
    }  # fmt: skip
    assert all(c["passed"] == (c["error"] <= c["allowed"]) for c in certificate["checks"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet5"), "unknown model 'resnet5': did you mean"),
        (("--device", "cuda:9"), "device 'cuda:9' cannot be used"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
    ],
)
def test_verify_refuses(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "verify", *arguments)


BOTTLENECKS = {
    "bottleneck_tail": 4, "bottleneck_roll": 8, "bottleneck_block": 4, "conv_projection_relu": 4
}  # fmt: skip


def blocks_of(name: str) -> list[Block]:
    images = torch.empty(1, 3, 64, 64, device="meta")
    return blocks(copy.deepcopy(networks.build_pair(name).eager).to("meta"), images)


def chains_of_resnet50() -> list[Case]:
    return list(chain_cases(blocks_of("resnet50"), torch.float32, torch.device("cpu")))


def test_verify_takes_the_blocks_of_bottlenecks() -> None:
    found = chains_of_resnet50()
    assert Counter(case.operator for case in found) == BOTTLENECKS
    for case in found:
        assert all(c.passed for c in run_case(case, torch.float32)), case.label
        wrong = case._replace(fused=lambda *tensors, fused=case.fused: fused(*tensors) * (1 + 1e-4))
        assert not any(c.passed for c in run_case(wrong, torch.float32))
    with resnet_fused.backend("cpu"):
        assert chains_of_resnet50() == []


def test_verify_takes_no_other_blocks() -> None:
    """Of grouped convolutions only what adds a projection is one operator."""
    assert [block.stride for block in blocks_of("resnext50_32x4d")] == [(1, 1), *[(2, 2)] * 3]
    assert blocks_of("resnet18") == []


def test_verify_fails_on_a_wrong_operator(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = layer_shapes(models.resnet20(), torch.randn(2, 3, 8, 8))
    pooling = PoolShape((2, 8, 9, 8), (3, 3), (2, 2), (1, 1))
    found = list(cases(shapes._replace(poolings=[pooling]), torch.float32, torch.device("cpu")))
    assert {case.operator for case in found} == set(OPERATORS)
    for case in found:
        assert all(c.passed for c in run_case(case, torch.float32)), case.label
        wrong = case._replace(fused=lambda *tensors, fused=case.fused: fused(*tensors) * (1 + 1e-4))
        assert not all(c.passed for c in run_case(wrong, torch.float32))


def test_poolings_are_found() -> None:
    with torch.device("meta"):
        shapes = layer_shapes(models.resnet18(), torch.empty(2, 3, 32, 32))
    assert shapes.poolings == [PoolShape((2, 64, 16, 16), (3, 3), (2, 2), (1, 1))]


def test_verify_fails_on_a_wrong_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_pair(name: str) -> networks.Pair:
        pair = build_pair(name)
        pair.fused.layer2[0].bn1.eps = 1e-3
        return pair

    build_pair = networks.build_pair
    monkeypatch.setattr(networks, "build_pair", wrong_pair)
    options = ("--model", "resnet20", "--size", "16", "--dtype", "float32")
    assert main(["verify", *options]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_fails_when_nothing_was_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unfused_pair(name: str) -> networks.Pair:
        pair = build_pair(name)
        return pair._replace(fused=networks.eager_twin(pair.fused))

    build_pair = networks.build_pair
    monkeypatch.setattr(networks, "build_pair", unfused_pair)
    monkeypatch.setattr(networks, "fused_blocks", lambda model: 0)
    options = ("--model", "resnet20", "--size", "16", "--dtype", "float32")
    assert main(["verify", *options]) == 1
    assert "no block of resnet20 was fused" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0])
def test_a_check_fails_on_wrong_values(wrong: float) -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    actual, eager = torch.zeros(4), torch.zeros(4)
    subject = numerics.Subject("op", "4", torch.float32)
    assert numerics.check(subject, "out", actual, eager, exact).passed
    actual[2] = wrong
    assert not numerics.check(subject, "out", actual, eager, exact).passed
    exact += 1
    assert not numerics.check_norm(subject, "out", [actual], [eager + 1], [exact]).passed


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_eager_twins_are_plain_and_equal(name: str) -> None:
    model = getattr(models, name)(num_classes=7).eval()
    twin = networks.eager_twin(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)
    plain = [type(m) for m in twin.modules() if type(m).__module__.startswith("resnet_fused")]
    assert {cls.__module__ for cls in plain} <= {networks.__name__, models.cifar.__name__}


# --- demo ----------------------------------------------------------------------------------------


def test_demo_writes_its_report(
    tmp_path: Path, demo_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, weights, out = tmp_path / "pictures", tmp_path / "weights.pt", tmp_path / "report"
    pictures.mkdir()
    image = importlib.import_module("PIL.Image")
    for number in range(2):
        image.effect_noise((80, 60), 50 + number).convert("RGB").save(pictures / f"{number}.png")
    torch.save(models.resnet18(num_classes=5).state_dict(), weights)
    options = ("--model", "resnet18", "--batch", "2", "--out", str(out))
    mine = ("--images", str(pictures), "--weights", str(weights))
    status = main(["demo", "--quick", *options, *mine])
    text = capsys.readouterr().out
    assert status == 0, text
    assert "PASSED" in text
    assert "2 images from" in text
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html", "results.json", "timing.png", "training.png",
    ]  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["disagreements"] == []
    assert set(results["timings"]) == {"eager", "fused"}
    saved = results["saved_for_backward_mib_per_image"]
    assert saved["fused"] < saved["eager"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2


def test_demo_refuses_bad_arguments(
    tmp_path: Path, demo_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, text, wrong = tmp_path / "empty", tmp_path / "text.png", tmp_path / "wrong.pt"
    empty.mkdir()
    text.write_text("not a picture")
    torch.save(models.resnet18().state_dict(), wrong)
    torch.save([1, 2], tmp_path / "list.pt")
    for arguments, message in (
        (("--images", str(empty)), "no images in"),
        (("--images", str(empty / "nowhere")), "--images must be a folder"),
        (("--images", str(tmp_path)), "cannot read"),
        (("--weights", str(tmp_path / "none.pt")), "No such file"),
        (("--weights", str(text)), "is not a file of weights"),
        (("--weights", str(tmp_path / "list.pt")), "must hold a state_dict, got list"),
        (("--weights", str(wrong)), "does not fit resnet50"),
        (("--out", str(text / "report")), "cannot write to the folder"),
    ):
        assert message in refusal(capsys, "demo", "--quick", "--batch", "2", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty", "list.pt", "text.png", "wrong.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["matplotlib", "sklearn.datasets"])
def test_demo_names_the_missing_package(
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_packages: None,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'resnet_fused[demo]'" in refusal(capsys, "demo", "--quick")


def _change_eps(model: nn.Module) -> nn.Module:
    model.layer2[0].bn1.eps = 1e-4
    return model


def _freeze_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda model: model, None),
        (_change_eps, "in float64 the losses"),
        (_freeze_statistics, "final accuracies differ"),
    ],
)
def test_trainings_disagree_when_the_fused_one_is_wrong(
    damage: Callable[[nn.Module], nn.Module], complaint: str | None, demo_packages: None
) -> None:
    run = digits.train_both(digits.load(8), 1, torch.device("cpu"), wrap_fused=damage)
    found = run.disagreements()
    if complaint is None:
        # After a single epoch accuracies still jump about: only they may differ here.
        assert not [text for text in found if "accuracies" not in text]
    else:
        assert [text for text in found if complaint in text]


# --- what the commands stand on ------------------------------------------------------------------


def test_atomic_files(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    console.write_atomically(path, "old")
    with contextlib.suppress(KeyboardInterrupt), console.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interleaving_takes_turns() -> None:
    calls: list[str] = []
    providers = {
        "slow": lambda: (calls.append("slow"), time.sleep(0.004)),
        "fast": lambda: (calls.append("fast"), time.sleep(0.002)),
    }
    timings = interleave(providers, 0.0, minimum_runs=6, warm_up=1)
    assert timings["slow"].runs == timings["fast"].runs == 6
    assert timings["slow"].speedup == 1.0
    assert timings["slow"].p20_ms <= timings["slow"].median_ms <= timings["slow"].p80_ms
    first = calls[-12::2]
    assert first.count("slow") == first.count("fast") == 3


def test_saved_bytes_counts_what_backward_keeps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    # The convolution keeps only the images, which are not counted; the ReLU keeps its output.
    assert saved_bytes(model, images) == 2 * 4 * 8 * 8 * 4


def test_baselines_say_why_they_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.environment, "compiler", lambda: None)
    with pytest.raises(baselines.UnavailableError, match=r"install g\+\+"):
        baselines.compiled(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(baselines.UnavailableError, match="float32 only"):
        baselines.onnxruntime(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4).half())


def test_positive() -> None:
    assert verify.positive("3") == 3
    with pytest.raises(Exception, match="at least 1"):
        verify.positive("0")
