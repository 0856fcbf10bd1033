"""The house rules that an `ast` walk can hold: imports go downwards only, and every module says what it is."""

import ast
from pathlib import Path

import pytest

import dhlens.render.figures

PACKAGE = Path(__file__).parents[1] / "dhlens"

LAYERS = (
    {"heads", "episode", "kinship", "hooks", "nodes", "cache"},
    {"card", "trace", "pack", "store"},
    {"scores", "wu", "spellings", "detectors", "compare", "raster", "static", "nulls", "dynamics", "reasoning", "paper"}
    | {"stats", "agreement", "contrasts", "tables", "windows", "triggers", "arms"}
    | {
        "pairs",
        "cca",
        "lagged",
        "network",
        "probe",
        "fitting",
        "baselines",
        "forecasts",
        "probe_report",
        "study",
    }
    | {"coactivation", "crowds", "bindings", "findings", "ties"}
    | {"graphs", "verdicts", "signals", "monitor", "carryover"},
    {"reads", "edits", "policies", "controls", "predicted", "choosers"},
    {"weights", "model", "stream", "hooked_stream", "masks", "check", "drafts", "devices", "skeleton"},
    {
        "engine",
        "plan",
        "limits",
        "prefix",
        "record",
        "lanes",
        "shadow",
        "transplant",
        "copies",
        "opened",
        "frozen",
        "direct",
        "reading",
        "composition",
        "attribution",
        "paths",
        "edgesets",
        "circuits",
        "faithfulness",
        "patching",
        "causal",
        "trial",
        "observation",
        "executor",
        "views",
        "lookup",
        "answering",
        "inquiry",
        "counterparts",
        "dissection",
    },
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BELOW = {
    "tasks": LAYERS[0],
    "recipes": {*LEVEL, "tasks", "render"},
    "render": LAYERS[0] | LAYERS[1] | LAYERS[2],
    "cli": {*LEVEL, "tasks", "recipes", "render", ""},
    "": {*LEVEL, "tasks", "recipes", "render"},
}
"""What the folders and the roof may import, beside their own folder; "" is `dhlens/__init__.py`."""
MODEL_LIBRARIES = {"transformers", "transformer_lens"}
SEAM = {"model", "weights", "check", "stream", "hooked_stream", "drafts", "devices", "skeleton"}

MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> set[str]:
    """Dotted names that a module's text imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(dotted: str) -> str:
    """The module or folder of dhlens that `dhlens.x.y` belongs to; "" for the package itself."""
    head = [*dotted.split("."), ""][1]
    return head if head in LEVEL or head in BELOW else ""


def allowed(module: str, target: str) -> bool:
    """Whether `module` (as "scores" or "tasks/niah") may import from the place `target`."""
    here = module.split("/")[0].replace("__init__", "")
    if here in BELOW:
        return target in BELOW[here] or target == here
    return target in LEVEL and LEVEL[target] <= LEVEL[here] and target != here


def at_run_time(source: str) -> str:
    """The text without its `if TYPE_CHECKING:` blocks, which Python never runs."""
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.unparse(tree)


def edges() -> dict[str, set[str]]:
    """Module to the dhlens modules it imports when it runs, as dotted names."""
    dotted = {name: f"dhlens.{name.replace('/', '.')}".removesuffix(".__init__") for name in MODULES}
    known = set(dotted.values())
    return {
        dotted[name]: {
            target if target in known else target.rpartition(".")[0]
            for target in imported(at_run_time(path.read_text()))
            if target.split(".")[0] == "dhlens"
        }
        for name, path in MODULES.items()
    }


@pytest.mark.parametrize(
    ("module", "target", "verdict"),
    [
        ("scores", "trace", True),
        ("trace", "card", True),
        ("trace", "scores", False),
        ("masks", "engine", False),
        ("scores", "", False),
        ("tasks/niah", "episode", True),
        ("tasks/niah", "trace", False),
        ("render/player", "model", False),
        ("recipes/detect", "engine", True),
        ("recipes/detect", "cli", False),
        ("cli", "recipes", True),
        ("__init__", "engine", True),
        ("__init__", "cli", False),
    ],
)
def test_the_rule_itself(module, target, verdict):
    assert allowed(module, target) is verdict


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert module.split("/")[0] in {*LEVEL, *BELOW, "__init__"}, f"dhlens/{module}.py belongs to no layer"
    names = imported(MODULES[module].read_text())
    upward = {n for n in names if n.split(".")[0] == "dhlens" and not allowed(module, place(n))}
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_only_the_seam_sees_model_libraries(module):
    seen = {n.split(".")[0] for n in imported(MODULES[module].read_text())} & MODEL_LIBRARIES
    assert not seen or module in SEAM


def test_imports_have_no_cycle():
    graph = edges()
    assert len(graph) == len(MODULES) and "dhlens.card" in graph["dhlens.trace"]
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph


def test_recipes_do_not_import_each_other():
    shared = {"dhlens.recipes.passages", "dhlens.recipes.standard"}
    graph = edges()
    recipes = {n for n in graph if n.startswith("dhlens.recipes.")} - shared
    assert not {(n, t) for n in recipes for t in graph[n] & recipes}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_and_stays_short(module):
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), "the module docstring is the door"
    assert text.count("\n") <= 300


def test_every_figure_has_its_name_in_render_figures():
    found = set()
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body if module.startswith("render/") else ():
            if isinstance(node, ast.FunctionDef) and node.returns is not None and not node.name.startswith("_"):
                found |= {node.name} if ast.unparse(node.returns) == "Figure" else set()
    assert found == set(dhlens.render.figures.__all__)
