"""Write the generated parts of docs/scenario.md: the quickstart, every field, every method. Run by ``make docs``.

Types, bounds and defaults come from the dataclasses, the sentences from their docstrings; only where a class has no
sentence for a field does it stand here. tests/test_docs.py fails where the tables are not what this would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types

from fedbd import plans
from fedbd.central import CentralPlan, PoisonPlan
from fedbd.data.trusted import Trusted
from fedbd.registry import METHODS, resolve
from fedbd.scenario import Scenario
from fedbd.schema import Kind, Method
from fedbd.training import TrainingPlan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scenario.md"
EXAMPLE = ROOT / "scenarios" / "quickstart.yaml"
BEGIN, END = "<!-- {}: written by docs/figures/fields.py -->", "<!-- end of {} -->"

SECTIONS: dict[str, tuple[type, str]] = {
    "Top level": (Scenario, ""),
    "data": (plans.DataPlan, "The fields of the `data` method stand beside these."),
    "start": (plans.StartPlan, "`null`: a fresh model, whose weights the seed decides."),
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
        "clients with a local defense, which has an objective of its own.",
    ),
    "evaluation": (plans.EvaluationPlan, ""),
    "engine": (plans.EnginePlan, ""),
    "Central training": (
        CentralPlan,
        "What `fedbd train` reads, in a file of its own: one model on one data set, as in scenarios/central.",
    ),
    "poison": (PoisonPlan, "Of a central training. The fields of the `attack` method stand beside these."),
}
"""Heading -> dataclass and what stands below the heading."""

SENTENCES: dict[tuple[str, str], str] = {
    ("Scenario", "name"): "Names the run's folder and its row in a comparison.",
    ("Scenario", "rounds"): "Rounds of the federation.",
    ("Scenario", "data"): "The data set.",
    ("Scenario", "model"): "The model family and its fields.",
    (
        "Scenario",
        "seed",
    ): "Decides every draw: partition, initialization, cohorts, batches, roles, buckets, decryptors.",
    ("Scenario", "partition"): "How the training set is split among clients.",
    ("Scenario", "trusted"): "Clean data that the server holds.",
    ("Scenario", "training"): "How a client trains.",
    ("Scenario", "cohort"): "Who takes part in a round, and how much a client counts.",
    ("Scenario", "attacks"): "Who attacks, when and how; an empty list: nobody.",
    ("Scenario", "local_defense"): "What replaces plain training at honest and polluted clients; `null`: nothing does.",
    ("Scenario", "local_defense_clients"): (
        "Which clients run it when they do not attack; `null`: all. The draw does not depend on who attacks."
    ),
    ("Scenario", "start"): "The model that the run starts from.",
    ("Scenario", "strategy"): "The Flower strategy that gets the aggregate.",
    ("Scenario", "server_rate"): "Factor on the aggregate before the strategy gets it.",
    ("Scenario", "secure_sum"): "How updates are encrypted; `null`: they travel in the clear.",
    ("Scenario", "bucket_size"): (
        "Clients per sum that the server comes to see: 1: single updates; `null`: one sum over the cohort. Under "
        "`secure_sum` the default is `null`. A short last bucket joins the one before."
    ),
    ("Scenario", "aggregation"): "The rule that turns updates, bucket means or the sum into one update.",
    ("Scenario", "cleanup"): "What repairs the model after a round.",
    ("Scenario", "detection"): "What scores samples after a round.",
    ("Scenario", "evaluation"): "What is measured beside the run itself.",
    ("Scenario", "engine"): "How the run is carried out.",
    ("Scenario", "on_client_failure"): (
        "`fail`: the run ends with the reason; `skip`: the round goes on without the client, and the record names it."
    ),
    ("DataPlan", "root"): "The folder of data files; `null`: the one that the environment variable FEDBD_DATA names.",
    ("PartitionPlan", "clients"): "How many clients there are.",
    ("Selection", "share"): "This share of all clients, rounded, at least one; who they are is drawn from the seed.",
    ("Selection", "count"): "So many clients, drawn from the seed.",
    ("Selection", "ids"): "These clients.",
    ("Window", "first"): "First round.",
    ("Window", "last"): "Last round, included; `null`: the end of the run.",
    ("StrategyPlan", "name"): "A registered strategy, or `package.module:Class`.",
    ("StrategyPlan", "arguments"): "Its constructor's arguments; those that decide who takes part are `cohort`'s.",
}


def sentences(cls: type) -> dict[str, str]:
    """Return a class's sentence for each field, from the ``Attributes:`` of its docstring."""
    block = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in (block.group(1) if block else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif line.strip():
            found[name] += " " + line.strip()
    return {field: markdown(text) for field, text in found.items()}


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
    hints, own = typing.get_type_hints(cls, include_extras=True), sentences(cls)
    rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name == "method":
            rows.append(f"| `name` | {kind(hints['method'])} | required | Which one; its own fields stand beside it. |")
            continue
        if field.name in skip:
            continue
        text = own.get(field.name) or SENTENCES.get((cls.__name__, field.name))
        if text is None:
            raise SystemExit(
                f"{cls.__name__}.{field.name} has no sentence in its docstring, nor in docs/figures/fields.py"
            )
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
            first = markdown((inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " "))
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


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
