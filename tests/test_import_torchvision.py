"""Whether torchvision's compiled operators are looked for where its releases keep them."""

from pathlib import Path

import pytest
import torch

from resnet_fused import _torchvision


@pytest.mark.parametrize("name", ["_C.so", "_C_stable.so"])
def test_operators_that_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert _torchvision._loads_operators([str(tmp_path)])
    assert loaded == [str(tmp_path / name)]


def test_operators_that_do_not_load(tmp_path: Path) -> None:
    assert not _torchvision._loads_operators([str(tmp_path)])
    (tmp_path / "_C.so").write_text("not a library")
    assert not _torchvision._loads_operators([str(tmp_path)])
