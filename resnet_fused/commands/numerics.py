"""How right a result is: its error and eager PyTorch's error, both against float64."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0


class Check(NamedTuple):
    """One tensor compared; errors are absolute, in the norm named by `norm`."""

    subject: str  # operator or model
    case: str  # shape and variant
    dtype: str
    tensor: str
    norm: str  # "max" or "l2" (relative to the norm of the exact tensor)
    error: float
    eager_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        # Written so that NaN, which compares false with everything, fails.
        return self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """Error as a fraction of what is allowed."""
        if self.allowed == 0.0:
            return 0.0 if self.error == 0.0 else float("inf")
        return self.error / self.allowed


class Subject(NamedTuple):
    name: str
    case: str
    dtype: torch.dtype


def check(
    subject: Subject,
    tensor: str,
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    exact_of_eager: Tensor | None = None,
) -> Check:
    """Largest error of `actual` <= 2 x largest error of `eager` + one rounding of the output.

    exact: the same mathematics in float64, from the same inputs. exact_of_eager: where eager has
    its own exact result, as for gradients behind a ReLU (each implementation's own signs decide).
    """
    reference = exact if exact_of_eager is None else exact_of_eager
    error = _largest(actual.double() - exact)
    eager_error = _largest(eager.double() - reference)
    rounding = torch.finfo(actual.dtype).eps * _largest(exact)
    name, case, dtype = subject
    allowed = FACTOR * eager_error + rounding
    return Check(name, case, short_name(dtype), tensor, "max", error, eager_error, allowed)


def check_norm(
    subject: Subject,
    tensor: str,
    actual: Iterable[Tensor],
    eager: Iterable[Tensor],
    exact: Iterable[Tensor],
) -> Check:
    """The same rule in the relative L2 norm over many tensors taken as one vector.

    For whole networks: a ReLU whose input is within one rounding of zero may open in one
    implementation and stay shut in another. Each such flip is a large error of one element, and
    both implementations have them; the L2 norm counts them, where the maximum would draw lots.
    """
    targets = [tensor.double() for tensor in exact]
    size = _norm(targets)
    error = _norm([a.double() - t for a, t in zip(actual, targets, strict=True)]) / size
    eager_error = _norm([e.double() - t for e, t in zip(eager, targets, strict=True)]) / size
    name, case, dtype = subject
    allowed = FACTOR * eager_error + torch.finfo(dtype).eps
    return Check(name, case, short_name(dtype), tensor, "l2", error, eager_error, allowed)


def precision_flags() -> dict[str, str]:
    """The switches of PyTorch that let float32 mathematics run in lower precision."""
    cuda = torch.backends.cuda.matmul
    # PyTorch does not declare these to type checkers.
    cudnn, mkldnn = vars(torch.backends)["cudnn"], vars(torch.backends)["mkldnn"]
    return {
        "tf32 in cuDNN convolutions": str(cudnn.conv.fp32_precision),
        "tf32 in CUDA matmul": str(cuda.fp32_precision),
        "fp32 precision in oneDNN convolutions": str(mkldnn.conv.fp32_precision),
        "fp32 precision in oneDNN matmul": str(mkldnn.matmul.fp32_precision),
        "fp16 reduced-precision reduction": str(cuda.allow_fp16_reduced_precision_reduction),
        "bf16 reduced-precision reduction": str(cuda.allow_bf16_reduced_precision_reduction),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
