"""Argument checks of the operators: "op: argument must ..., got ..., (likely fix)"."""

import torch
from torch import Tensor


def check_tensors(operator: str, **arguments: object) -> None:
    """Every argument must be a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a Tensor, got {type(value).__name__}")


def check_activation(operator: str, name: str, x: Tensor) -> None:
    """`x` must be a floating-point (N, C, H, W) tensor."""
    if not isinstance(x, Tensor):  # the dispatcher lets None pass
        check_tensors(operator, **{name: x})
    if x.dim() != 4:
        raise ValueError(
            f"{operator}: {name} must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}"
            " (unsqueeze(0) adds a batch dimension)"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{operator}: {name} must be a floating-point tensor, got {x.dtype} (call .float())"
        )


def check_like(operator: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must have the shape, dtype and device of `like`."""
    if not isinstance(tensor, Tensor):
        check_tensors(operator, **{name: tensor})
    if tensor.shape != like.shape:
        check_shape(operator, name, tensor, f"the shape of {like_name}", tuple(like.shape))
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{operator}: {name} must have the dtype of {like_name} {like.dtype},"
            f" got {tensor.dtype}"
        )
    check_device(operator, name, tensor, like_name, like)


def check_shape(
    operator: str, name: str, tensor: Tensor, meaning: str, shape: tuple[int, ...]
) -> None:
    """`tensor` must have `shape`, which is described by `meaning`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{operator}: {name} must have {meaning} {shape}, got {tuple(tensor.shape)}"
        )


def check_device(operator: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must be where `like` is."""
    if not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of {like_name} {like.device},"
            f" got {tensor.device} (move one with .to())"
        )


def check_per_channel(operator: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """`vector`, where given, must be a floating-point (C,) tensor on the device of `x`."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.size(0) != x.size(1):
        check_shape(operator, name, vector, "one value per channel", (x.size(1),))
    if not vector.is_floating_point():
        raise TypeError(f"{operator}: {name} must be a floating-point tensor, got {vector.dtype}")
    check_device(operator, name, vector, "x", x)


def promote(operator: str, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that `x + residual` has."""
    if not (isinstance(x, Tensor) and isinstance(residual, Tensor)):
        check_tensors(operator, x=x, residual=residual)
    if x.dtype == residual.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
