"""Sphinx settings: `make docs` builds the site from these pages and the docstrings, without a network.

Every warning is an error there, so a dead link or a module that no page of `api/` names fails the build.
"""

import inspect
import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils.nodes import Element, Text
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import dhlens

sys.path.insert(0, str(Path(__file__).parent))
import reference

project = "dhlens"
author = "The dhlens authors"
version = release = version_of("dhlens")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dhlens {release}"
html_show_sphinx = html_show_copyright = False

_here = Path(__file__).parent
shutil.rmtree(_here / "notebooks", ignore_errors=True)
shutil.copytree(_here.parent / "notebooks", _here / "notebooks", ignore=shutil.ignore_patterns(".*"))
_amiss = reference.write(Path(dhlens.__file__).parent, _here / "api")

# Notebooks are shown as they were last run; .ci/run runs them.
nb_execution_mode = "off"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

nitpicky = True
# Types of other packages have no page here; names of ours must have one.
nitpick_ignore_regex = [("py:.*", r"(?!dhlens\.).*"), ("py:class", r".*\.[A-Z]")]
linkcheck_anchors = False

autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_function_parentheses = False
napoleon_custom_sections = ["Source"]
# A name in single backticks is a link where it has a page, else code.
default_role = "py:obj"

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Source|Example|Note)s?:$")


def _as_restructured(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as Sphinx reads them: indented examples marked as code, marks of its own meant as they stand."""
    text = re.sub(r"^( *)Source: ", r"\1Source:\n\1    ", "\n".join(lines), flags=re.M)
    # behind an empty comment "Int[n]: ids" is not taken for a type and its attribute
    out = ["..", ""] if what in ("attribute", "data", "property") else []
    prose, code = "", False
    for line in text.split("\n"):
        indented = line.startswith("    ")
        if code and (indented or not line):
            out.append(line)
            continue
        code = False
        if indented and not out[-1] and prose and not prose.startswith((" ", "- ")) and not _SECTION.match(prose):
            out, code = [*out, "::", "", line], True
            continue
        prose = line if line and not (indented and prose.startswith("    ")) else prose
        out.append(_literal(line))
    lines[:] = out


def _readable(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """A default that a factory makes, in a form that Sphinx can read."""
    return signature and signature.replace("<factory>", "..."), returned


def _literal(line: str) -> str:
    """Bars, stars and a last underscore as they stand; `Episode`s as a name and a letter."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "`".join(parts))


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a module imports from elsewhere."""
    ours = str(getattr(obj, "__module__", "")).startswith("dhlens")
    return True if (inspect.isclass(obj) or inspect.isroutine(obj)) and not ours else None


def _shapes_are_text(app: Sphinx, doctree: Element) -> None:
    """The axes of `Float[Tensor, "n layer head"]` are no names to link."""
    for node in list(doctree.findall(pending_xref)):
        if node.hasattr("refspecific") and re.fullmatch(r"[a-z_]*", node["reftarget"]):
            node.replace_self(Text(node["reftarget"]))


def _resolve(app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element) -> Element | None:
    """Link `dh.observe`, `Trace` and `dhlens.recipes.rag` to the module that defines them."""
    found: Any = dhlens
    for part in re.sub(r"^(dhlens|dh)\.", "", node.get("reftarget", "")).split("."):
        found = getattr(found, part, None)
    if not str(getattr(found, "__module__", "")).startswith("dhlens.") or not hasattr(found, "__qualname__"):
        return None
    name = f"{found.__module__}.{found.__qualname__}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    if _amiss:
        logging.getLogger(__name__).warning(_amiss)
    app.connect("autodoc-process-docstring", _as_restructured, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _readable)
    app.connect("autodoc-skip-member", _skip)
    app.connect("doctree-read", _shapes_are_text)
    app.connect("missing-reference", _resolve)
