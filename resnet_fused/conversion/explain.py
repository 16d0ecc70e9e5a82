"""`explain`: what is fused in a model, what is not, and why."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from resnet_fused.conversion.program import Program
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.links import Link, links
from resnet_fused.conversion.survey import Finding, survey
from resnet_fused.conversion.swap import plan_of
from resnet_fused.conversion.traffic import Traffic, inference_traffic

State = Literal["fused", "fused in part", "can be fused", "can be fused in part", "left alone"]


@dataclass(frozen=True)
class Row:
    """One residual block, or the stem of a network.

    path: its name in the model ("" for the model itself). fused: whether it runs fused as it
    stands. reason: why it is left alone, else "". chain: the layers of the block, and of the next
    one, that the cuda backend runs at once, else "". bytes_*: activation bytes per image of one
    inference, unfused, fused, and fused with chains; None where they were not asked for or are not
    known.
    """

    path: str
    class_name: str
    state: State
    pattern: str
    fused: bool
    reason: str
    bytes_before: int | None = None
    bytes_after: int | None = None
    chain: str = ""
    bytes_chained: int | None = None


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
                f"{_megabytes(after)} MB fused"
            )
            if self._has_chains:
                chained = sum(row.bytes_chained or 0 for row in known)
                text += f", {_megabytes(chained)} MB chained"
            text += "."
        if self._has_chains:
            text += (
                ' Chains run in inference where resnet_fused.backend("cuda") asks for them, in '
                "bfloat16 and float16; no rule chooses them."
            )
        return text

    @property
    def _has_chains(self) -> bool:
        return any(row.chain for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "summary": self.summary, "rows": rows}

    def __str__(self) -> str:
        if not self.rows:
            return self.summary
        columns = {
            "path": [row.path or "(model)" for row in self.rows],
            "class": [row.class_name for row in self.rows],
            "state": [row.state for row in self.rows],
            "pattern": [row.pattern for row in self.rows],
        }
        if any(row.bytes_before is not None for row in self.rows):
            columns["MB unfused"] = [_megabytes(row.bytes_before) for row in self.rows]
            columns["MB fused"] = [_megabytes(row.bytes_after) for row in self.rows]
            if self._has_chains:
                columns["MB chained"] = [_megabytes(row.bytes_chained) for row in self.rows]
        if self._has_chains:
            columns["chain"] = [row.chain for row in self.rows]
        columns["reason"] = [row.reason for row in self.rows]
        lines = [list(line) for line in zip(*columns.values(), strict=True)]
        return "\n".join([*_table([[*columns], *lines]), self.summary])


def explain(model: nn.Module, example_input: Tensor | None = None) -> Explanation:
    """What `fuse` did or would do to each residual block of `model`, and why.

    example_input: an input of the model, (N, C, H, W); with it, the activation bytes per image are
    counted from the shapes, without computing anything. The model is not changed.
    Raises TypeError unless model is a module, ValueError if it does not run on example_input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    findings = survey(model)
    chained = links(model, findings)
    traffic: dict[str, Traffic] = {}
    if example_input is not None:
        places = {f.path: f.roles for f in findings if f.roles is not None}
        traffic = inference_traffic(model, places, chained, example_input)
    rows = tuple(_row(f, chained.get(f.path), traffic.get(f.path)) for f in findings)
    return Explanation(_class_name(model), rows)


def _row(finding: Finding, link: Link | None, traffic: Traffic | None) -> Row:
    state: State = "left alone"
    is_part = finding.recipe is not None and bool(finding.reason)
    if finding.fused:
        state = "fused in part" if is_part else "fused"
    elif finding.recipe is not None:
        state = "can be fused in part" if is_part else "can be fused"
    return Row(
        path=finding.path,
        class_name=_class_name(finding.module),
        state=state,
        pattern=_pattern(finding.recipe),
        fused=finding.fused,
        reason=finding.reason,
        bytes_before=traffic.before if traffic else None,
        bytes_after=traffic.after if traffic else None,
        chain=link.text if link else "",
        bytes_chained=traffic.chained if traffic else None,
    )


def _pattern(recipe: Roles | Program | None) -> str:
    """Its name, or the groups of layers with their numbers."""
    if isinstance(recipe, Program):
        counts = Counter(step.text for step in recipe.steps)
        return ", ".join(f"{text} x{n}" if n > 1 else text for text, n in counts.items())
    return "" if recipe is None else recipe.pattern


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
