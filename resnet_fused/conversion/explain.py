"""`explain`: what is fused in a model, what is not, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from resnet_fused.conversion.advice import COMPILE, Advice, advice_for, merged
from resnet_fused.conversion.layers import is_conv, is_norm
from resnet_fused.conversion.links import Link, links
from resnet_fused.conversion.program import Program
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.runtime_path import RuntimePath, runtime_paths
from resnet_fused.conversion.survey import Finding, survey
from resnet_fused.conversion.swap import plan_of
from resnet_fused.conversion.table import LONGEST, Line, megabytes, table, wrapped
from resnet_fused.conversion.traffic import Traffic, inference_traffic

State = Literal["fused", "fused in part", "can be fused", "can be fused in part", "left alone"]


@dataclass(frozen=True)
class Row:
    """One residual block, a network with its stem, or another module with layers to fuse.

    path: its name in the model ("" for the model itself). pattern: the block that it is, or its
    groups of layers, each one call. fused: whether it runs fused as it stands. reason: why it, or
    the rest of it, is left alone, else "". backend, convolutions: what runs batch norm, add and
    ReLU, and what convolves in inference; dtype of the parameters; layout of the activations; see
    `RuntimePath`. chain: the layers of the block, and of the next one, that the cuda backend runs
    at once, else "". bytes_*: activation bytes per image of one inference, unfused, fused, and
    fused with chains; None where they were not asked for or are not known. advice: what the user
    could change to get more.
    """

    path: str
    class_name: str
    state: State
    pattern: str
    fused: bool
    reason: str
    backend: str
    convolutions: str
    dtype: str
    layout: str
    bytes_before: int | None = None
    bytes_after: int | None = None
    chain: str = ""
    bytes_chained: int | None = None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Of all rows. states: how many there are of each. bytes_*: sums, None if none is known.

    saved: share of bytes_before that fusion saves, in 0..1; None if it is not known.
    """

    rows: int
    states: dict[State, int]
    bytes_before: int | None
    bytes_after: int | None
    bytes_chained: int | None
    saved: float | None


@dataclass(frozen=True)
class Explanation:
    """The rows of `explain`, in model order, and the advice of all of them. `str` is a table."""

    model: str
    rows: tuple[Row, ...]
    advice: tuple[str, ...]

    @property
    def totals(self) -> Totals:
        """Counts and sums over the rows."""
        known = [row for row in self.rows if row.bytes_before is not None]
        before = sum(row.bytes_before or 0 for row in known) if known else None
        after = sum(row.bytes_after or 0 for row in known) if known else None
        chained = sum(row.bytes_chained or 0 for row in known) if known else None
        saved = 1 - after / before if before and after is not None else None
        states = Counter(row.state for row in self.rows)
        return Totals(len(self.rows), dict(states), before, after, chained, saved)

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.rows:
            return f"{self.model} has no residual blocks that this library knows: nothing to fuse."
        totals = self.totals
        parts = [f"{count} {state}" for state, count in sorted(totals.states.items())]
        text = f"{self.model}: {', '.join(parts)} (of {totals.rows})."
        if totals.saved is not None:
            text += (
                f" Activations moved per image, inference: {megabytes(totals.bytes_before)} MB "
                f"unfused, {megabytes(totals.bytes_after)} MB fused ({totals.saved:.0%} less)"
            )
            if self._has_chains:
                text += f", {megabytes(totals.bytes_chained)} MB chained"
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
        """The same as plain data, ready for JSON: every row is in it, equal ones too."""
        rows = [{**asdict(row), "advice": list(row.advice)} for row in self.rows]
        return {
            "model": self.model,
            "summary": self.summary,
            "totals": asdict(self.totals),
            "advice": list(self.advice),
            "rows": rows,
        }

    def __str__(self) -> str:
        return "\n".join([*self._table(), wrapped("", self.summary), *self._advice_lines()])

    def _table(self) -> list[str]:
        if not self.rows:
            return []
        header = ["path", "class", "state", "pattern", "backend", "dtype", "layout"]
        has_bytes = self.totals.bytes_before is not None
        if has_bytes:
            header += ["MB unfused", "MB fused", *(["MB chained"] if self._has_chains else [])]
        lines = []
        for row in self.rows:
            texts = (row.class_name, row.state, row.pattern, _engines(row), row.dtype, row.layout)
            numbers = (row.bytes_before, row.bytes_after, row.bytes_chained)
            lines.append(Line(row.path, (*texts, *numbers)[: len(header) - 1], (*_notes(row),)))
        return table(header, lines, total=has_bytes)

    def _advice_lines(self) -> list[str]:
        return ["To get more:", *(wrapped("- ", text) for text in self.advice)] * bool(self.advice)


def explain(model: nn.Module, example_input: Tensor | None = None) -> Explanation:
    """What `fuse` did or would do to each residual block of `model`, and why.

    example_input: an input of the model, (N, C, H, W); with it, the activation bytes per image are
    counted from the shapes, without computing anything. The model is not changed.
    Raises TypeError unless model is a module and example_input a tensor, ValueError if the model
    does not run on example_input alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor | None):
        raise TypeError(
            f"explain: example_input must be a tensor, got {type(example_input).__name__}"
        )
    findings = survey(model)
    chained = links(model, findings)
    traffic: dict[str, Traffic] = {}
    if example_input is not None:
        traffic = inference_traffic(model, findings, chained, example_input)
    rows: list[Row] = []
    every: list[Advice] = []
    for finding, path in zip(findings, runtime_paths(model, findings), strict=True):
        advice = advice_for(finding, path, example_input)
        every += advice
        rows.append(
            _row(finding, path, chained.get(finding.path), traffic.get(finding.path), advice)
        )
    if not rows and any(map(is_conv, model.modules())) and any(map(is_norm, model.modules())):
        every = [COMPILE]
    return Explanation(_class_name(model), tuple(rows), merged(every))


def _row(
    finding: Finding,
    path: RuntimePath,
    link: Link | None,
    traffic: Traffic | None,
    advice: tuple[Advice, ...],
) -> Row:
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
        backend=path.backend,
        convolutions=path.convolutions,
        dtype=path.dtype,
        layout=path.layout,
        bytes_before=traffic.before if traffic else None,
        bytes_after=traffic.after if traffic else None,
        chain=link.text if link else "",
        bytes_chained=traffic.chained if traffic else None,
        advice=tuple(map(str, advice)),
    )


def _pattern(recipe: Roles | Program | None) -> str:
    """Its name, or the groups of layers with their numbers."""
    if isinstance(recipe, Program):
        counts = Counter(step.text for step in recipe.steps)
        return ", ".join(f"{text} x{n}" if n > 1 else text for text, n in counts.items())
    return "" if recipe is None else recipe.pattern


def _engines(row: Row) -> str:
    return " + ".join(dict.fromkeys(name for name in (row.backend, row.convolutions) if name))


def _notes(row: Row) -> Iterator[str]:
    if row.reason:
        yield row.reason
    if len(row.pattern) > LONGEST:
        yield f"pattern: {row.pattern}"
    if row.chain:
        yield f"chain: {row.chain}"


def _class_name(module: nn.Module) -> str:
    plan = plan_of(module)
    return (type(module) if plan is None else plan.original).__name__
