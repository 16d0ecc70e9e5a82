"""Checkpoints that survive `kill -9`, a full disk and a wrong argument."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from reporting import UsageError, rewritten
from torch import distributed as dist


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Raises UsageError where the disk refuses; the file that was there before stays."""
    with rewritten(path, "wb") as file:
        torch.save(dict(state), file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises UsageError where it cannot be read."""
    try:
        # weights_only: a checkpoint from elsewhere holds tensors and numbers, and runs no code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"there is no checkpoint {str(path)!r}") from error
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"cannot read the checkpoint {str(path)!r}: {reason[0]} "
            "(start anew with --resume never, or name another file with --resume PATH)"
        ) from error
    if not isinstance(state, dict) or not {"model", "arguments", "epoch"} <= state.keys():
        raise UsageError(f"{str(path)!r} is no checkpoint of train.py")
    return state


def random_states() -> list[dict[str, Any]]:
    """Per process the states of all generators that shuffling and augmentation draw from."""
    own = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def restore_random_state(own: Mapping[str, Any]) -> None:
    """own: the element of `random_states` of this process."""
    random.setstate(own["python"])
    torch.set_rng_state(own["torch"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
