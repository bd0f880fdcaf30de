"""Settings of the documentation site, which `make docs` builds."""

import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import probattn

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
sys.path.insert(0, str(HERE / "_extensions"))

project = "probattn"
author = "the authors of probattn"
version = release = probattn.__version__
copyright = "the authors of probattn; licence Apache-2.0"

extensions = [
    "formulas",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_extensions"]

# Markdown. Anchors are those that GitHub makes, so that a link works on both.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# Notebooks run when they have changed, one after another, and their results are kept in build/.
nb_execution_mode = "cache"
nb_execution_cache_path = str(BUILD / "notebooks")
nb_execution_timeout = 900  # for one cell, on a machine that does other work, too
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # nothing is fetched by a page
os.environ["MATPLOTLIBRC"] = str(HERE / "_static" / "matplotlibrc")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # of tqdm, in a kernel
# Compiling takes longer than running here, and half of that is optimising.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# The reference.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Attributes", "params_style"),
    ("Kinds", "params_style"),
    ("Groups of a posterior", "params_style"),
    ("Groups of a MAP run", "params_style"),
]
default_role = "py:obj"  # what stands between backticks is a name
maximum_signature_line_length = 90
add_module_names = False
python_use_unqualified_type_names = True


def _plain(app: Sphinx, what: str, name: str, value: object, options: object, lines: list) -> None:
    """Escape what reStructuredText would read as markup: docstrings are plain text with code."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def _inside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Leave the text of links that lead to Markdown outside of the site, which has no such page."""

    def text_of(match: re.Match) -> str:
        target = (HERE / docname).parent / match[2]
        return match[0] if target.resolve().is_relative_to(HERE) else match[1]

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\.[^)#]*\.md)[^)]*\)", text_of, source[0])


def _short(app: Sphinx, *named: Any) -> tuple[str, str] | None:
    """Call what JAX takes for an array by its name, and not by all that it stands for."""
    *_, arguments, returns = named
    alike = r"~?jax\.Array \| ~?numpy\.ndarray \|[\w.~ |]*? complex"
    return None if arguments is None else (re.sub(alike, "ArrayLike", arguments), returns)


def setup(app: Sphinx) -> None:
    """Let pages be read before MyST reads them, and docstrings before napoleon does."""
    app.connect("source-read", _inside)
    app.connect("autodoc-process-signature", _short)
    app.connect("autodoc-process-docstring", _plain, priority=100)


# Other libraries' names. Their inventories are fetched if there is a network. If there is none, the
# few names below are known all the same, and a missing inventory is no warning.
_ELSEWHERE = {
    "numpyro": (
        "https://num.pyro.ai/en/stable/",
        {
            "numpyro.infer.mcmc.MCMC": ("class", "mcmc.html#$"),
            "numpyro.infer.hmc.NUTS": ("class", "mcmc.html#$"),
            "numpyro.infer.svi.SVI": ("class", "svi.html#$"),
            "numpyro.distributions.distribution.Distribution": ("class", "distributions.html#$"),
            "numpyro.distributions.transforms.Transform": ("class", "distributions.html#$"),
        },
    ),
    "jax": (
        "https://docs.jax.dev/en/latest/",
        {"jax.Array": ("class", "_autosummary/jax.Array.html#$")},
    ),
    "arviz": ("https://python.arviz.org/en/latest/", {}),
}


def _inventory(name: str, names: dict[str, tuple[str, str]]) -> str:
    """Write an inventory in Sphinx's format, version 2, and return its path."""
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = "".join(f"{key} py:{kind} 1 {page} -\n" for key, (kind, page) in names.items())
    path = BUILD / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))
    return str(path)


intersphinx_mapping = {
    name: (address, (None, _inventory(name, names)))
    for name, (address, names) in _ELSEWHERE.items()
}
intersphinx_timeout = 5

# The page itself. Everything that it loads lies in the site.
html_theme = "pydata_sphinx_theme"
html_title = "probattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {
    page: [] for page in ("index", "start", "idea", "mathematics")
}
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
