"""The site: Markdown pages, and the reference from the docstrings."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
PACKAGES = [Path(folder).name for folder in WHEEL["packages"]]
URLS = PYPROJECT["project"]["urls"]

project = "asgi-db"
html_title = "asgi-db"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": URLS["Source"],
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view", "edit"],
}
extensions = [
    "myst_parser",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
]

myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]  # a fence that shows as a diagram in repository browsers too
# Drawn when the site is built, without network or browser.
mermaid_cmd = shlex.join([sys.executable, "-m", "mermaidx"])
mermaid_params = ["--background", "white"]
mermaid_output_format = "svg"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings are Markdown
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

LINK = re.compile(
    r"\[([^][]+)\]\((?:\.\./)*((?:docs|examples|tests)\b[\w./-]*|[A-Z]+\.md)(#[^)]*)?\)"
)


def link_inside_the_site(text: str) -> str:
    """Let links between the files of the repository lead to the pages which show them.

    What the site does not show, such as a folder of examples, is linked in the repository.
    """
    shown = {"CHANGELOG.md": "/changelog.md"}

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match[1], match[2], match[3] or ""
        page = shown.get(target) or target.removeprefix("docs")
        if page.startswith("/"):
            return f"[{name}]({page}{anchor})"
        return f"[{name}]({URLS['Source']}/tree/main/{target}{anchor})"

    return LINK.sub(link, text)


def read_page(_app: Sphinx, _name: str, content: list[str]) -> None:
    content[0] = link_inside_the_site(content[0])


def read_included(_app: Sphinx, _path: Path, _parent: str, content: list[str]) -> None:
    content[0] = link_inside_the_site(content[0])


def docstring_from_markdown(
    _app: Sphinx, what: str, _name: str, _object: object, _options: Any, lines: list[str]
) -> None:
    """Turn the Markdown of a docstring, code by indentation and tables, into what Sphinx reads."""
    # Napoleon takes what is before a colon in the first line of a value's docstring for its type:
    # an empty comment goes before it.
    done = ["..", ""] if what in ("attribute", "data", "property") else list[str]()
    for line in lines:
        before = done[-1] if done else ""
        if line.startswith("    ") and not before:
            done += [".. code-block:: python", ""]
        if line.startswith("|"):
            if set(line) <= set("|- "):
                continue
            if not before.startswith("     - "):
                done += [".. list-table::", "   :header-rows: 1", ""]
            first, *others = [cell.strip() for cell in line.strip("|").split(" | ")]
            done += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
            continue
        done.append(line)
    lines[:] = done


def exported() -> Iterator[str]:
    """Everything which the packages and their modules export."""
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        modules = [found.name for found in pkgutil.iter_modules(folder, f"{package}.")]
        for module in [package, *modules]:
            if module == "asgi_db.sqlalchemy_versions":  # what it exports is for the library alone
                continue
            for name in getattr(importlib.import_module(module), "__all__", ()):
                yield f"{module}.{name}"


def everything_exported_is_there(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each exported name which the reference does not show."""
    for name in exported():
        if name not in env.domains.python_domain.objects:
            getLogger(__name__).warning("the reference lacks %s", name)


LOADED = re.compile(
    r'<(?:script|link|img|iframe|object)\b[^>]*(?:src|href|data)="(https?:[^"]*)"'
    r'|\bimport [^;"]*"(https?:[^"]*)"'
)


def nothing_is_loaded_from_elsewhere(app: Sphinx, error: Exception | None) -> None:
    """Refuse a page that needs the network to be seen."""
    for page in Path(app.outdir).glob("**/*.html"):
        if error is None and (address := LOADED.search(page.read_text())):
            raise ExtensionError(f"{page} loads {address[1] or address[2]}")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", docstring_from_markdown, priority=400)
    app.connect("env-check-consistency", everything_exported_is_there)
    app.connect("build-finished", nothing_is_loaded_from_elsewhere)
