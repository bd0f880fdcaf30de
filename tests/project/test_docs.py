"""The pages: their links, the reference, the notebooks, and the commands that they show.

`make docs` builds the site and runs the notebooks; nothing here does either.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib

import pytest

from tests.support.markdown import anchors, code_blocks, links, pages
from tests.support.project import ROOT

DOCS = ROOT / "docs"
PACKAGES = {
    "probattn": "mathematics",
    "probattn.models": "models",
    "probattn.inference": "inference",
    "probattn.inference.figures": "figures",
}
NOTEBOOKS = sorted(path for path in (DOCS / "notebooks").glob("*.md") if path.stem != "index")


def broken(path):
    """Links of a page that lead to no file, or to no heading of a Markdown file."""
    for link in links(path.read_text("utf-8")):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"{path.relative_to(ROOT)}: {link} is not there"
        elif anchor and anchor not in anchors(target.read_text("utf-8")):
            yield f"{path.relative_to(ROOT)}: {link} has no such heading"


def test_links_lead_to_files_and_headings():
    found = pages()
    assert len(found) > 30
    assert [line for path in found for line in broken(path)] == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# One `code` head\n\n[a](#one-code-head) [b](#two) [c](other.md)\n")
    assert list(broken(page)) == [
        "page.md: #two has no such heading",
        "page.md: other.md is not there",
    ]


def extension(name):
    """Import what the site is made with, from where it lies."""
    found = importlib.util.spec_from_file_location(name, DOCS / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_faults_of_a_built_site_are_found(tmp_path):
    check_site = extension("check_site")
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<p id="here"><a href="sub/page.html#there">a</a> <a href="#here">b</a></p>'
        '<link rel="canonical" href="https://example.org"><a href="https://example.org">c</a>'
    )
    (tmp_path / "sub/page.html").write_text('<p id="there"></p><img src="../index.html">')
    assert check_site.faults(tmp_path) == []
    (tmp_path / "sub/other.html").write_text(
        '<script src="https://example.org/a.js"></script><a href="none.html">a</a>'
        '<a href="page.html#nowhere">b</a>'
    )
    assert sorted(check_site.faults(tmp_path)) == [
        "sub/other.html links to none.html, which is not there",
        "sub/other.html links to page.html#nowhere, which has no such place",
        "sub/other.html loads https://example.org/a.js",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("μ_t = Σ_{s<t} β_ts x_s", "μ[t] = Σ[s<t] β[ts] x[s]"),
        ("Cov_{β_t}(x_s, k_s) W_Qᵀ", "Cov[β[t]](x[s], k[s]) W[Q]ᵀ"),
        ("C^{-1/2} + (I + S)^(-1/2)", "C{-1/2} + (I + S){-1/2}"),
        ("log_det and pair_rho", "log_det and pair_rho"),
    ],
)
def test_scripts_of_formulas(text, expected):
    pytest.importorskip("sphinx")
    made = "".join(map(str, extension("formulas").pieces(text)))
    for tag, (left, right) in {"subscript": "[]", "superscript": "{}"}.items():
        made = made.replace(f"<{tag}>", left).replace(f"</{tag}>", right)
    assert made == expected


def test_every_page_is_in_the_table_of_contents():
    listed = {DOCS / "index.md"}
    for path in DOCS.rglob("*.md"):
        for block in code_blocks(path.read_text("utf-8"), "{toctree}"):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {path.parent / f"{entry}.md" for entry in entries}
    assert listed == set(DOCS.rglob("*.md"))


@pytest.mark.parametrize(("package", "page"), PACKAGES.items())
def test_the_reference_has_every_public_name(package, page):
    text = (DOCS / "reference" / f"{page}.md").read_text("utf-8")
    assert f".. automodule:: {package}\n   :members:\n" in text
    tables = re.findall(
        r"currentmodule:: ([\w.]+)\n\n\.\. autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)",
        text,
    )
    listed = [name for module, names in tables if module == package for name in names.split()]
    assert sorted(listed) == sorted(importlib.import_module(package).__all__)


def test_what_only_the_theory_asks_for_is_in_the_reference():
    text = (DOCS / "reference/mathematics.md").read_text("utf-8")
    names = re.search(r"automodule:: probattn\.process\n   :members: (.*)", text)[1].split(", ")
    process = importlib.import_module("probattn.process")
    assert len(names) == 4
    assert all(callable(getattr(process, name)) for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_notebooks(path):
    """Whose code the build runs, and whose imports are there."""
    text = path.read_text("utf-8")
    assert text.startswith("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n")
    cells = code_blocks(text, "{code-cell} ipython3")
    assert len(cells) >= 5
    for cell in cells:
        code = re.sub(r"\A---\n.*?^---\n", "", cell, flags=re.DOTALL | re.MULTILINE)
        code = re.sub(r"^[:%].*$", "", code, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("probattn"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_there_are_five_notebooks():
    names = {"process", "svi", "posterior", "pretrained", "barrier_weight"}
    assert {path.stem for path in NOTEBOOKS} == names


def commands():
    """Every command that a page shows in a block, with the name of the page."""
    for path in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for block in code_blocks(path.read_text("utf-8"), "bash", ""):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(probattn|python|make|pip) [\w.-]+( |$)", line):
                    yield path.name, shlex.split(line)


def test_commands_that_are_shown_exist():
    """The scripts, their options, and the targets; other tests run those of the command."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    shown = list(commands())
    assert len(shown) > 40
    for page, words in shown:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (page, words)
        elif words[0] == "pip":
            for extra in re.findall(r"\[(\w+)\]", words[-1]):
                assert extra in extras["optional-dependencies"], (page, words)
        elif words[0] == "python" and not words[1].startswith(("-m", "nanoGPT")):
            script = (ROOT / words[1]).read_text("utf-8")
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in script, (page, words)


def test_the_site_is_built_where_it_is_promised():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "sphinx -W --keep-going" in makefile
    assert re.search(r"^stage .* make docs$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    hosted = (ROOT / ".readthedocs.yaml").read_text("utf-8")
    assert "fail_on_warning: true" in hosted
    for name, target in {"tests": "test", "docs": "docs", "wheel": None}.items():
        workflow = (ROOT / f".github/workflows/{name}.yml").read_text("utf-8")
        assert target is None or f"make {target}" in workflow
