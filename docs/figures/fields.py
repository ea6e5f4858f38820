"""Write the generated parts of docs/scenario.md (quickstart, every field, every method) and the schemas for editors.

Run by ``make docs``. Types, bounds and defaults come from the dataclasses, the sentences from their docstrings.
tests/test_docs.py fails where tables or schemas are not what this would write.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types

from fedbd.central.plan import CentralPlan, PoisonPlan
from fedbd.config import plans
from fedbd.config.field_texts import sentences, summary
from fedbd.config.json_schema import schema_text
from fedbd.config.scenario import Scenario
from fedbd.config.schema import Kind, Method
from fedbd.data.trusted import Trusted
from fedbd.registry import METHODS, resolve
from fedbd.training import TrainingPlan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scenario.md"
EXAMPLE = ROOT / "scenarios" / "quickstart.yaml"
BEGIN, END = "<!-- {}: written by docs/figures/fields.py -->", "<!-- end of {} -->"

SECTIONS: dict[str, tuple[type, str]] = {
    "Top level": (Scenario, ""),
    "data": (plans.DataPlan, "The fields of the `data` method stand beside these."),
    "start": (plans.StartPlan, "`null`: a fresh model, whose weights the seed decides. Else exactly one of the two."),
    "partition": (plans.PartitionPlan, "The fields of the `partition` method stand beside these."),
    "trusted": (Trusted, "Clean samples, taken out of the training set before the clients get theirs; `null`: none."),
    "training": (TrainingPlan, "How one client trains in one round; the same fields serve `attacks[].training`."),
    "cohort": (plans.CohortPlan, ""),
    "attacks[]": (plans.AttackPlan, "A list. The fields of the `attack` method stand beside these."),
    "attacks[].clients": (plans.Selection, "Exactly one of the three; `local_defense_clients` has the same fields."),
    "attacks[].rounds": (plans.Window, ""),
    "cleanup[]": (
        plans.CleanupPlan,
        "A list, carried out in order. The fields of the `cleanup` method stand beside these.",
    ),
    "detection[]": (plans.DetectionPlan, "A list. The fields of the `detection` method stand beside these."),
    "detection[].adversarial[]": (plans.EvasionPlan, "A list. The fields of the `evasion` method stand beside these."),
    "strategy": (
        plans.StrategyPlan,
        "`fedprox` needs `arguments: {proximal_mu: 0.1}`, the weight of the proximal term in the training of honest "
        "and polluted clients (the step is plain FedAvg's). Attackers ignore it, whatever their attack, and so do "
        "clients with a local defense, which has an objective of its own. BatchNorm's running statistics follow the "
        "aggregate under every strategy, at most all the way: a momentum, a moment or a `server_rate` above 1 would "
        "carry a variance past zero, and the model would be NaN.",
    ),
    "evaluation": (plans.EvaluationPlan, ""),
    "faults[]": (
        plans.FaultPlan,
        "A list; where several strike one client at one stage, the first listed does. `clients` and `rounds` have the "
        "fields of `attacks[].clients` and `attacks[].rounds`.",
    ),
    "engine": (plans.EnginePlan, ""),
    "checkpoint": (plans.CheckpointPlan, "`off` or `null`: none, and a run that was ended cannot go on."),
    "Central training": (
        CentralPlan,
        "What `fedbd train` reads, in a file of its own: one model on one data set, as in scenarios/central.",
    ),
    "poison": (PoisonPlan, "Of a central training. The fields of the `attack` method stand beside these."),
}
"""Heading -> dataclass and what stands below the heading."""


def markdown(text: str) -> str:
    """Return a docstring's text as Markdown: code in single backticks, no accidental emphasis, YAML's name for None."""
    parts = re.split(r"``(.+?)``", re.sub(r"\bNone\b", "null", text))
    plain = [part.replace("*", r"\*") for part in parts[::2]]
    return "".join(f"{before}`{code}`" for before, code in zip(plain, parts[1::2], strict=False)) + plain[-1]


def kind(hint: Any) -> str:
    """Return a field's type as a reader of YAML says it."""
    extras = getattr(hint, "__metadata__", ())
    bare = typing.get_args(hint)[0] if extras else hint
    arms = typing.get_args(bare) if typing.get_origin(bare) in (typing.Union, types.UnionType) else (bare,)
    said = [said_of(arm) for arm in arms if arm is not type(None)]
    method = next((extra.kind for extra in extras if isinstance(extra, Kind)), None)
    if method is not None:
        said = [f"{'an' if method[0] in 'aeiou' else 'a'} `{method}` method"]
    bounds = [limit for extra in extras if (limit := bound(extra))]
    return " ".join(filter(None, [" or ".join(said), ", ".join(bounds)])) + (" or null" if type(None) in arms else "")


def bound(extra: object) -> str:
    """Return a constraint as text, empty for anything else."""
    signs = ((annotated_types.Ge, "ge", ">="), (annotated_types.Gt, "gt", ">"))
    signs += ((annotated_types.Le, "le", "<="), (annotated_types.Lt, "lt", "<"))
    return next((f"{sign} {getattr(extra, name):g}" for cls, name, sign in signs if isinstance(extra, cls)), "")


def said_of(arm: Any) -> str:
    """Return one arm of a type as text."""
    origin, arguments = typing.get_origin(arm), typing.get_args(arm)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple and dataclasses.is_dataclass(arguments[0]):
        return "a list of mappings"
    if origin is tuple:
        return f"a list ({kind(arguments[0])})"
    if origin is dict or dataclasses.is_dataclass(arm):
        return "a mapping"
    if origin is not None:  # a bounded number in a union
        return kind(arm)
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(arm, arm.__name__)


def default(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as YAML."""
    if field.default is dataclasses.MISSING:
        return "`{}`" if field.default_factory is not dataclasses.MISSING else "required"
    if dataclasses.is_dataclass(field.default) and not isinstance(field.default, Method):
        return "as below"
    return f"`{literal(field.default)}`"


def literal(value: Any) -> str:
    """Return a default value as YAML."""
    if isinstance(value, Method):
        return value.name
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def table(cls: type, *, skip: tuple[str, ...] = ()) -> str:
    """Return a dataclass's fields as a table.

    Raises:
        SystemExit: If a field has no sentence.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    own = {name: markdown(text) for name, text in sentences(cls).items()}
    rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name == "method":
            rows.append(f"| `name` | {kind(hints['method'])} | required | Which one; its own fields stand beside it. |")
            continue
        if field.name in skip:
            continue
        text = own.get(field.name)
        if text is None:
            raise SystemExit(f"{cls.__name__}.{field.name} has no sentence in its docstring")
        cells = (f"`{field.name}`", kind(hints[field.name]), default(field), text.replace("|", r"\|"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no fields."


def plan_tables() -> str:
    """Return the tables of all plans."""
    parts = []
    for heading, (cls, text) in SECTIONS.items():
        parts.append(f"### {heading if heading == 'Top level' else f'`{heading}`'}\n")
        if text:
            parts.append(f"{text}\n")
        parts.append(table(cls) + "\n")
    return "\n".join(parts)


def method_tables() -> str:
    """Return every registered method with its fields, kind by kind; the strategies are Flower's and only named."""
    parts = []
    for group, methods in METHODS.items():
        if group == "strategy":
            names = ", ".join(f"`{name}`" for name in methods)
            parts.append(f"### strategy\n\n{names}: Flower's own; their arguments go into `strategy.arguments`.\n")
            continue
        parts.append(f"### {group}\n")
        for name in methods:
            cls = resolve(group, name, group)
            first = markdown(summary(cls))
            parts.append(f"**`{name}`**: {first}\n\n{table(cls)}\n")
    return "\n".join(parts)


def example() -> str:
    """Return the quickstart's scenario without its opening comment."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    return "\n".join(["```yaml", *(line for line in lines if not line.startswith("#")), "```"])


def render(page: str) -> str:
    """Return the page with its generated parts written anew."""
    for name, text in (("quickstart", example()), ("fields", plan_tables()), ("methods", method_tables())):
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"
    return page


def schemas() -> dict[Path, str]:
    """Return the text of each schema that scenario files name in their first line."""
    return {
        ROOT / "scenarios" / "schema.json": schema_text(),
        ROOT / "scenarios" / "central" / "schema.json": schema_text(central=True),
    }


if __name__ == "__main__":
    for path, text in {PAGE: render(PAGE.read_text(encoding="utf-8")), **schemas()}.items():
        path.write_text(text, encoding="utf-8")
        print(path)
