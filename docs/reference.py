"""The pages of the API reference: one per module, made from its docstrings, and one per topic that lists them.

A topic names its modules in the order in which they are best read; each module belongs to one topic.
"""

import ast
import shutil
from pathlib import Path
from typing import NamedTuple


class Topic(NamedTuple):
    """One page of the reference."""

    page: str
    title: str
    about: str
    modules: str


TOPICS = (
    Topic(
        "engine",
        "Models and the engine",
        "Load a model, let it answer, and read every step. Everything else is computed from the trace.",
        "model weights devices check card plan skeleton limits cache hooks reads episode engine prefix stream "
        "hooked_stream masks drafts record trace pack store observation executor",
    ),
    Topic(
        "scores",
        "Scores and dynamics",
        "From a trace to numbers: which heads are active, how their set changes, and what chance would give.",
        "heads scores wu detectors spellings compare raster dynamics static nulls paper reasoning carryover stats "
        "tables kinship agreement",
    ),
    Topic(
        "edits",
        "Edits and policies",
        "What happens to a head, which heads at which step, and what becomes of the answer.",
        "edits policies controls predicted lanes shadow causal patching transplant copies trial contrasts",
    ),
    Topic(
        "prediction",
        "Prediction",
        "What the state at a step says of the heads to come, beside what needs no state.",
        "pairs cca lagged probe fitting network baselines forecasts probe_report study verdicts signals monitor",
    ),
    Topic(
        "retrieval",
        "Dynamic retrieval",
        "Heads choose what the model may read of a long context.",
        "choosers windows triggers views lookup answering inquiry arms",
    ),
    Topic(
        "circuits",
        "Circuits and crowds",
        "What feeds a head, what it writes, and which heads work together.",
        "nodes opened attribution paths graphs edgesets circuits frozen direct reading composition dissection "
        "coactivation crowds bindings ties counterparts findings faithfulness",
    ),
    Topic("tasks", "Tasks", "Text with a known answer at a known place.", "tasks tasks.*"),
    Topic("recipes", "Recipes", "Whole experiments, in memory or in a resumable folder.", "recipes recipes.*"),
    Topic("render", "Render", "Figures, token views, the player and the report.", "render render.*"),
    Topic(
        "cli",
        "Command line",
        "The commands read their options and call a recipe; `dhlens COMMAND --help` lists the options.",
        "cli cli.*",
    ),
)


def write(package: Path, folder: Path) -> str:
    """Write the pages anew into `folder`; returns what is amiss: modules in no topic or in two, or that are none."""
    known = sorted(filter(None, (_module(path.relative_to(package)) for path in package.rglob("*.py"))))
    listed = {topic: _modules(topic, known) for topic in TOPICS}
    flat = [module for modules in listed.values() for module in modules]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for topic, modules in listed.items():
        lines = [f"- {{py:mod}}`dhlens.{module}`: {_door(package, module)}" for module in modules]
        tree = ["```{toctree}", ":hidden:", *(f"dhlens.{module}" for module in modules), "```"]
        page = "\n".join([f"# {topic.title}", "", topic.about, "", *lines, "", *tree, ""])
        (folder / f"{topic.page}.md").write_text(page, encoding="utf-8")
    for name in (f"dhlens.{module}" for module in flat):
        page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    wrong = sorted({module for module in {*known, *flat} if module not in known or flat.count(module) != 1})
    return f"each module belongs to one topic of docs/reference.py: {', '.join(wrong)}" if wrong else ""


def _module(path: Path) -> str:
    """`tasks/niah.py` as `tasks.niah`; a package by its own name, and the root as nothing."""
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def _modules(topic: Topic, known: list[str]) -> list[str]:
    found = []
    for name in topic.modules.split():
        found += [m for m in known if m.startswith(name[:-1])] if name.endswith(".*") else [name]
    return found


def _door(package: Path, module: str) -> str:
    """The first line of a module's docstring, without the name that it may begin with."""
    path = package / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]
