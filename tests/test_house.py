"""The three floors: who may import whom, what an import costs, what every file keeps to."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"probattn": "probattn", "probattn.models": "models", "probattn.inference": "inference"}
UP = {"probattn": ("models", "inference"), "probattn.models": ("inference",)}
MATHEMATICS = {
    f"probattn.{name}"
    for name in (
        "attention",
        "unanimous",
        "unsettled",
        "sequences",
        "covariance",
        "elimination",
        "moments",
        "determinants",
        "log_det",
        "positivity",
        "margins",
        "monitoring",
        "proper",
        "ancestral",
    )
}
MATHEMATICS_MAY_IMPORT = {"collections", "functools", "jax", "jaxtyping", "math", "typing"}
AT_HOME_IN = {  # package (its sub-distributions included): the only modules that may import it
    "arviz": ("probattn.inference.to_arviz",),
    "matplotlib": tuple(
        f"probattn.inference.{name}"
        for name in (
            "figure_style",
            "text_figure",
            "plots",
            "posterior_plots",
            "robustness_plots",
            "report",
            "paper_figures",
            "paper",
        )
    ),
    "tyro": ("probattn.inference.cli", "probattn.inference.commands"),
    "rich": tuple(f"probattn.inference.{name}" for name in ("cli", "commands", "console")),
    "tqdm": ("probattn.inference.progress",),
}
OPTIONAL = {"tokenizers"}
HEAVY = {"arviz", "arviz_base", "matplotlib", "orbax", "tokenizers", "tyro"}
LONGEST = 350  # lines


@dataclass(frozen=True)
class Import:
    """One imported name, with where it stands."""

    target: str
    line: int
    at_import_time: bool


def modules(root: Path) -> dict[str, Path]:
    """Dotted name as installed -> file, over the three floors under `root`."""
    found = {}
    for package, folder in FLOORS.items():
        for path in sorted((root / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def _statements(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_function
        deferred = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _statements(node, deferred)


def imports(house: dict[str, Path], module: str) -> list[Import]:
    """What a module imports, by dotted name."""
    package = module if house[module].stem == "__init__" else module.rpartition(".")[0]
    found = []
    for node, in_function in _statements(ast.parse(house[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            targets = [t for alias in node.names for t in _from(house, source, alias.name)]
        found += [Import(target, node.lineno, not in_function) for target in targets]
    return found


def _from(house: dict[str, Path], source: str, name: str) -> list[str]:
    """`from source import name`: the submodule if it is one, the package if it binds the name."""
    submodule = f"{source}.{name}"
    if submodule not in house:
        return [source]
    init = ast.parse(house[source].read_text("utf-8")) if source in house else ast.Module([], [])
    bound = {
        alias.asname or alias.name
        for node in init.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [submodule, source] if name in bound else [submodule]


def floor(module: str) -> str:
    """The package that a module belongs to."""
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)


def upward_imports(root: Path) -> list[str]:
    house = modules(root)
    return [
        f"{module}:{found.line} imports {found.target}"
        for module in house
        for found in imports(house, module)
        for above in UP.get(floor(module), ())
        if f"{found.target}.".startswith(f"probattn.{above}.")
    ]


def import_cycles(root: Path) -> list[str]:
    """Strongly connected components of more than one module (or of one that imports itself)."""
    house = modules(root)
    graph = {m: {i.target for i in imports(house, m) if i.target in house} for m in house}
    reach = {m: set(targets) for m, targets in graph.items()}
    for middle in house:  # Warshall's transitive closure
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    circles = {frozenset(n for n in reach[m] if m in reach[n]) for m in house if m in reach[m]}
    return sorted(" <-> ".join(sorted(circle)) for circle in circles)


def impure_mathematics(root: Path) -> list[str]:
    """What the mathematics imports beyond JAX, its own helpers included."""
    house = modules(root)
    waiting, seen, found = sorted(MATHEMATICS), set(MATHEMATICS), []
    while waiting:
        module = waiting.pop()
        for each in imports(house, module):
            if each.target in house and each.target not in FLOORS:
                if each.target not in seen:
                    seen.add(each.target)
                    waiting.append(each.target)
            elif each.target.split(".")[0] not in MATHEMATICS_MAY_IMPORT:
                found.append(f"{module}:{each.line} imports {each.target}")
    return found


def strangers(root: Path) -> list[str]:
    """Imports of a package outside the modules where it is at home."""
    house = modules(root)
    return [
        f"{module}:{found.line} imports {found.target}"
        for module in house
        for found in imports(house, module)
        for package, homes in AT_HOME_IN.items()
        if re.match(rf"{package}(_\w+)?(\.|$)", found.target) and module not in homes
    ]


def eager_extras(root: Path) -> list[str]:
    """Imports of packages that only an extra installs, outside any function."""
    house = modules(root)
    return [
        f"{module}:{found.line} imports {found.target}"
        for module in house
        for found in imports(house, module)
        if found.target.split(".")[0] in OPTIONAL and found.at_import_time
    ]


def long_files(root: Path) -> list[str]:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules(root).values()}
    return [f"{path.name}: {lines} lines" for path, lines in lengths.items() if lines > LONGEST]


def imports_among_tests(root: Path) -> list[str]:
    """What several tests need lies in a file of its own, which pytest does not collect."""
    return [
        f"{path.name}: {line}"
        for path in sorted((root / "tests").glob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s*(from|import) test_\w+", line)
    ]


RULES = [
    upward_imports,
    import_cycles,
    impure_mathematics,
    strangers,
    eager_extras,
    long_files,
    imports_among_tests,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        (upward_imports, "probattn/process.py", "def f():\n    import probattn.models"),
        (upward_imports, "probattn/margins.py", "from probattn.inference import fit"),
        (upward_imports, "models/priors.py", "from ..inference import runs"),
        (import_cycles, "probattn/attention.py", "from probattn.margins import support_tokens"),
        (import_cycles, "probattn/attention.py", "from probattn import coupling"),
        (import_cycles, "models/priors.py", "from .language_model import language_model"),
        (impure_mathematics, "probattn/log_det.py", "import numpyro"),
        (impure_mathematics, "probattn/margins.py", "from probattn._helper import f"),
        (strangers, "inference/runs.py", "import arviz_base as azb"),
        (strangers, "inference/to_arviz.py", "import matplotlib.pyplot as plt"),
        (strangers, "models/priors.py", "from tyro.conf import arg"),
        (strangers, "inference/runs.py", "from tqdm import tqdm"),
        (
            eager_extras,
            "probattn/vocabulary.py",
            "if True:\n    import tokenizers",
        ),
        (long_files, "models/transformer.py", "\n" * LONGEST),
        (imports_among_tests, "tests/cases.py", "from test_margins import X"),
    ],
)
def test_each_rule_catches_a_breach(rule, file, text, tmp_path):
    for folder in (*FLOORS.values(), "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "probattn/_helper.py").write_text("import numpy\n")
    with (tmp_path / file).open("a") as broken:
        broken.write(f"\n{text}\n")
    assert rule(tmp_path) != []


def test_an_extra_may_be_imported_inside_a_function(tmp_path):
    (tmp_path / "probattn").mkdir()
    (tmp_path / "probattn/vocabulary.py").write_text("def f():\n    import tokenizers\n")
    assert eager_extras(tmp_path) == []


@pytest.mark.parametrize("package", FLOORS)
def test_every_public_name_has_a_docstring_of_its_own(package):
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert doc, f"{package}.{name} has no docstring"
            # A dataclass without one gets its signature in that place.
            assert not doc.startswith(f"{name}("), f"{package}.{name} has no docstring"


@pytest.mark.parametrize(
    ("package", "promised"),
    [
        (
            "probattn",
            "attention_weights residual reduced_blocks jacobian_blocks log_det relaxed_barrier "
            "stability_margin support_tokens embedding_margin certificate coupling",
        ),
        ("probattn.models", "LanguageModelConfig language_model"),
        ("probattn.inference", "fit evaluate load_run to_datatree"),
    ],
)
def test_the_promised_names_are_public(package, promised):
    assert set(promised.split()) <= set(importlib.import_module(package).__all__)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("probattn", HEAVY),
        ("probattn.models", HEAVY),
        # Nothing that a fit does without: it is what a user waits for before the first step.
        (
            "probattn.inference.cli",
            {"arviz", "matplotlib", "orbax", "pandas", "scipy.stats", "xarray"},
        ),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "jax" in loaded
    assert loaded & absent == set()


def test_the_installed_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert importlib.metadata.version("probattn") == project["version"]


@pytest.fixture(scope="module", name="picture")
def picture_fixture() -> list[str]:
    """Files in the order in which the picture in the docs shows them."""
    shown, folder = [], ""
    for line in (ROOT / "docs/architecture.md").read_text("utf-8").split("```")[1].splitlines():
        if entry := re.match(r"(\w+)/ ", line):
            folder = entry[1]
        elif entry := re.match(r"  (\w+\.py)\b", line):
            shown.append(f"{folder}/{entry[1]}")
    return shown


def test_the_picture_in_the_docs_shows_every_file_and_no_other(picture):
    files = {p.relative_to(ROOT).as_posix() for p in modules(ROOT).values()}
    assert sorted(picture) == sorted(file for file in files if not file.endswith("__init__.py"))


def test_the_picture_shows_every_file_below_those_that_it_imports(picture):
    house = modules(ROOT)
    place = {module: str(path.relative_to(ROOT)) for module, path in house.items()}
    assert [
        f"{file} imports {place[found.target]}"
        for module, file in place.items()
        for found in imports(house, module)
        if file in picture and place.get(found.target) in picture
        if picture.index(place[found.target]) > picture.index(file)
    ] == []


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    assert re.search(r"^stage .* make test$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)


def repository_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not in a git checkout")
    return [ROOT / name for name in run.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_place_of_one_machine():
    # Put together here, so that this file does not contain what it looks for.
    places = ["/" + place for place in ("work/", "root/")] + ["../" + "shared"]
    hosts = ["pypi" + ".org", "pythonhosted" + ".org"]
    named = []
    for path in repository_files():
        content = path.read_bytes()
        named += [
            f"{path.relative_to(ROOT)} names {name}"
            for name in places + hosts
            if name.encode() in content and b"\0" not in content
        ]
    assert named == []
