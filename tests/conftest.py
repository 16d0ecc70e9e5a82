import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random weights in every run and in every order of the tests."""
    torch.manual_seed(0)
