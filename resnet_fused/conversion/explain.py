"""`explain`: what is fused in a model, what is not, and why."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from resnet_fused.conversion.survey import Finding, survey
from resnet_fused.conversion.swap import plan_of
from resnet_fused.conversion.traffic import Traffic, inference_traffic

State = Literal["fused", "can be fused", "left alone"]


@dataclass(frozen=True)
class Row:
    """One residual block, or the stem of a network.

    path: its name in the model ("" for the model itself). fused: whether it runs fused as it
    stands. reason: why it is left alone, else "". bytes_*: activation bytes per image of one
    inference, unfused and fused; None where they were not asked for or are not known.
    """

    path: str
    class_name: str
    state: State
    fused: bool
    reason: str
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass(frozen=True)
class Explanation:
    """The rows of `explain`, in model order. `str` of it is a table."""

    model: str
    rows: tuple[Row, ...]

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.rows:
            return f"{self.model} has no residual blocks that this library knows: nothing to fuse."
        counts = {row.state: 0 for row in self.rows}
        for row in self.rows:
            counts[row.state] += 1
        parts = [f"{count} {state}" for state, count in sorted(counts.items())]
        text = f"{self.model}: {', '.join(parts)} (of {len(self.rows)})."
        known = [row for row in self.rows if row.bytes_before is not None]
        if known:
            before = sum(row.bytes_before or 0 for row in known)
            after = sum(row.bytes_after or 0 for row in known)
            text += (
                f" Activations moved per image, inference: {_megabytes(before)} MB unfused, "
                f"{_megabytes(after)} MB fused."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "summary": self.summary, "rows": rows}

    def __str__(self) -> str:
        header = ["path", "class", "state", "reason"]
        lines = [
            [row.path or "(model)", row.class_name, row.state, row.reason] for row in self.rows
        ]
        if any(row.bytes_before is not None for row in self.rows):
            header[3:3] = ["MB unfused", "MB fused"]
            for line, row in zip(lines, self.rows, strict=True):
                line[3:3] = [_megabytes(row.bytes_before), _megabytes(row.bytes_after)]
        return "\n".join([*_table([header, *lines]), self.summary] if lines else [self.summary])


def explain(model: nn.Module, example_input: Tensor | None = None) -> Explanation:
    """What `fuse` did or would do to each residual block of `model`, and why.

    example_input: an input of the model, (N, C, H, W); with it, the activation bytes per image are
    counted from the shapes, without computing anything. The model is not changed.
    Raises TypeError unless model is a module, ValueError if it does not run on example_input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    findings = survey(model)
    traffic: dict[str, Traffic] = {}
    if example_input is not None:
        places = {f.path: f.roles for f in findings if f.roles is not None}
        traffic = inference_traffic(model, places, example_input)
    rows = tuple(_row(finding, traffic.get(finding.path)) for finding in findings)
    return Explanation(_class_name(model), rows)


def _row(finding: Finding, traffic: Traffic | None) -> Row:
    state: State = "left alone"
    if finding.fused:
        state = "fused"
    elif finding.roles is not None:
        state = "can be fused"
    return Row(
        path=finding.path,
        class_name=_class_name(finding.module),
        state=state,
        fused=state == "fused",
        reason=finding.reason,
        bytes_before=traffic.before if traffic else None,
        bytes_after=traffic.after if traffic else None,
    )


def _class_name(module: nn.Module) -> str:
    plan = plan_of(module)
    return (type(module) if plan is None else plan.original).__name__


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def _table(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    )
    return ["  ".join(line).rstrip() for line in padded]
