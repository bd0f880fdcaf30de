"""The three floors: who may import whom, what an import costs, what every file keeps to."""

import ast
import functools
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

import probattn
from tests.support.project import ROOT

FLOORS = {"probattn": "probattn", "probattn.models": "models", "probattn.inference": "inference"}
UP = {"probattn": ("models", "inference"), "probattn.models": ("inference",)}
ENTRY = "probattn.__main__"  # `python -m probattn` is the command line, which is the top floor's
# The rooms of the top floor, each of which imports only those before it.
COLUMN = (
    "runtime",
    "config",
    "config_sampling",
    "config_tuning",
    "config_imported",
    "config_files",
    "config_memory",
    "pages",
    "pretrained",
    "runs",
    "evaluation",
    "exchange",
    "guides",
    "fitting",
    "sampling",
    "export",
    "comparison",
    "figures",
    "paper",
    "cli",
)
ROOMS = (
    "blocks",
    "text",
    "stability",
    "models.decoder",
    "stages",
    *(f"inference.{room}" for room in COLUMN if "config" not in room),
)
HAND_ON = ("probattn.inference.cli", "probattn.inference.figures")  # rooms with public names
MATHEMATICS = (
    "probattn.arguments",
    "probattn.attention",
    "probattn.blocks",
    "probattn.log_determinants",
    "probattn.positivity",
    "probattn.margins",
    "probattn.stability",
    "probattn.stages",
    "probattn.ancestral",
)
MATHEMATICS_MAY_IMPORT = {
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "jax",
    "jaxtyping",
    "math",
    "typing",
}
BLOCKS_MAY_IMPORT = ("probattn.arguments", "probattn.blocks")
AT_HOME_IN = {  # package (its sub-distributions included): where alone it may be imported
    "arviz": ("probattn.inference.export",),
    "matplotlib": ("probattn.inference.figures", "probattn.inference.paper"),
    "tyro": ("probattn.inference.cli",),
    "rich": ("probattn.inference.cli",),
    "tqdm": ("probattn.inference.runtime.progress",),
    "orbax": ("probattn.inference.runs.checkpoints",),
}
OPTIONAL = {"huggingface_hub", "safetensors", "tokenizers"}
HEAVY = {"arviz", "arviz_base", "matplotlib", "orbax", "tokenizers", "tyro"}
MOST_FILES = 15  # of a room, its __init__.py apart
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
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root / folder)
            if inside.parts[0] in ("models", "inference"):
                continue  # `probattn/models` and `probattn/inference` are links to the floors
            parts = [*inside.parent.parts, *([] if path.stem == "__init__" else [path.stem])]
            found[".".join([package, *parts])] = path
    return found


def within(module: str, place: str) -> bool:
    """Whether a module is a package or module, or lies in it."""
    return f"{module}.".startswith(f"{place}.")


def _statements(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_function
        deferred = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _statements(node, deferred)


@functools.cache
def _parsed(text: str) -> list[tuple[ast.stmt, bool]]:
    """Return the imports of a source text, which most rules ask for again."""
    return list(_statements(ast.parse(text)))


def imports(house: dict[str, Path], module: str) -> list[Import]:
    """What a module imports, by dotted name."""
    package = module if house[module].stem == "__init__" else module.rpartition(".")[0]
    found = []
    for node, in_function in _parsed(house[module].read_text("utf-8")):
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
        if within(found.target, f"probattn.{above}") and module != ENTRY
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


def rooms_above(root: Path) -> list[str]:
    """Imports of the top floor that run up its column, or into the floor's own public names."""
    house = modules(root)

    def place(module: str) -> int:
        return COLUMN.index(module.split(".")[2])

    return [
        f"{module}:{found.line} imports {found.target}"
        for module in house
        for found in imports(house, module)
        if module.startswith("probattn.inference.") and within(found.target, "probattn.inference")
        if found.target == "probattn.inference" or place(found.target) > place(module)
    ]


def blocks_that_know_more(root: Path) -> list[str]:
    house = modules(root)
    return [
        f"{module}:{found.line} imports {found.target}"
        for module in house
        for found in imports(house, module)
        if within(module, "probattn.blocks") and within(found.target, "probattn")
        if not any(within(found.target, allowed) for allowed in BLOCKS_MAY_IMPORT)
    ]


def rooms_that_hand_on_names(root: Path) -> list[str]:
    """The `__init__.py` of a room is a docstring, so that no function hides its module."""
    return [
        name
        for name, path in modules(root).items()
        if path.stem == "__init__" and name not in (*FLOORS, *HAND_ON)
        if len(ast.parse(path.read_text("utf-8")).body) != 1
    ]


def names_of_two_things(root: Path) -> list[str]:
    """Public names of a package that are a module of it, too."""
    house = modules(root)
    return [
        f"{package}.{alias.asname or alias.name}"
        for package in (*FLOORS, *HAND_ON)
        for node in ast.walk(ast.parse(house[package].read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{package}.{alias.asname or alias.name}" in house
    ]


def crowded_rooms(root: Path) -> list[str]:
    files = [path.parent for path in modules(root).values() if path.stem != "__init__"]
    counts = {folder: files.count(folder) for folder in files}
    return [f"{folder.name}: {count}" for folder, count in counts.items() if count > MOST_FILES]


def impure_mathematics(root: Path) -> list[str]:
    """What the mathematics imports beyond JAX, its own helpers included."""
    house = modules(root)
    waiting = [name for name in house if any(within(name, place) for place in MATHEMATICS)]
    seen, found = set(waiting), []
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
        if re.match(rf"{package}(_\w+)?(\.|$)", found.target)
        if not any(within(module, home) for home in homes)
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
        for path in sorted((root / "tests").rglob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s*(from|import) (tests[\w.]*\.)?test_\w+", line)
    ]


RULES = [
    upward_imports,
    import_cycles,
    rooms_above,
    blocks_that_know_more,
    rooms_that_hand_on_names,
    names_of_two_things,
    crowded_rooms,
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
        (import_cycles, "probattn/attention.py", "from probattn.ancestral import solve_residual"),
        (import_cycles, "probattn/attention.py", "from probattn import coupling"),
        (import_cycles, "models/priors.py", "from .language import language_model"),
        (rooms_above, "inference/runs/files.py", "from probattn.inference.fitting import fit"),
        (rooms_above, "inference/config.py", "def f():\n    from ..inference import config_files"),
        (rooms_above, "inference/cli/demo.py", "from probattn.inference import fit"),
        (blocks_that_know_more, "probattn/blocks/moments.py", "from probattn import messages"),
        (rooms_that_hand_on_names, "inference/runs/__init__.py", "from .run import Run"),
        (names_of_two_things, "models/__init__.py", "from .priors import normal as priors"),
        (crowded_rooms, "inference/paper/data.py", ""),
        (impure_mathematics, "probattn/log_determinants.py", "import numpyro"),
        (impure_mathematics, "probattn/blocks/moments.py", "import numpy"),
        (impure_mathematics, "probattn/margins.py", "from probattn._helper import f"),
        (strangers, "inference/runs/run.py", "import arviz_base as azb"),
        (strangers, "inference/export/to_arviz.py", "import matplotlib.pyplot as plt"),
        (strangers, "models/priors.py", "from tyro.conf import arg"),
        (strangers, "inference/runs/run.py", "from tqdm import tqdm"),
        (strangers, "inference/fitting/fit.py", "def f():\n    import orbax.checkpoint"),
        (
            eager_extras,
            "probattn/text/vocabulary.py",
            "if True:\n    import tokenizers",
        ),
        (long_files, "models/transformer.py", "\n" * LONGEST),
        (
            imports_among_tests,
            "tests/support/cases.py",
            "from tests.probattn.test_margins import X",
        ),
    ],
)
def test_each_rule_catches_a_breach(rule, file, text, tmp_path):
    for folder in (*FLOORS.values(), "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    (tmp_path / "probattn/_helper.py").write_text("import numpy\n")
    if rule is crowded_rooms:
        for number in range(MOST_FILES):
            (tmp_path / file).with_name(f"another_{number}.py").touch()
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
        ("probattn.models", HEAVY),  # and probattn, which it imports
        # Nothing that a fit does without: it is what a user waits for before the first step.
        (
            "probattn.inference.cli.command_line",
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


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("probattn") == probattn.__version__
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [probattn.__version__]


@pytest.fixture(scope="module", name="files_shown")
def files_shown_fixture() -> list[str]:
    """Files in the order in which the list in the docs shows them."""
    shown, room = [], ""
    for line in (ROOT / "docs/architecture.md").read_text("utf-8").splitlines():
        if entry := re.match(r"### `([\w/]+)/`", line):
            room = entry[1]
        elif entry := re.match(r"\| `(\w+\.py)` \|", line):
            shown.append(f"{room}/{entry[1]}")
    return shown


def test_the_list_in_the_docs_shows_every_file_and_no_other(files_shown):
    files = {p.relative_to(ROOT).as_posix() for p in modules(ROOT).values()}
    hidden = ("__init__.py", "__main__.py")
    assert sorted(files_shown) == sorted(file for file in files if not file.endswith(hidden))


def test_the_list_shows_every_file_below_those_of_its_room_that_it_imports(files_shown):
    house = modules(ROOT)
    place = {module: path.relative_to(ROOT).as_posix() for module, path in house.items()}
    assert [
        f"{file} imports {place[found.target]}"
        for module, file in place.items()
        for found in imports(house, module)
        if file in files_shown and place.get(found.target) in files_shown
        if Path(file).parent == Path(place[found.target]).parent
        if files_shown.index(place[found.target]) > files_shown.index(file)
    ] == []


def test_the_picture_in_the_docs_shows_every_room(files_shown):
    picture = (ROOT / "docs/architecture.md").read_text("utf-8").split("```")[1]
    lines = picture.splitlines()
    assert len(lines) <= 40  # a screen
    assert max(map(len, lines)) <= 100
    column = [line.split()[0].removesuffix("/") for line in lines if re.match(r"    \w", line)]
    assert [room for room in column if room in COLUMN] == [
        room for room in reversed(COLUMN) if not room.startswith("config_")
    ]


def test_every_room_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {name for name, path in modules(ROOT).items() if path.stem == "__init__"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    assert {f"probattn.{room}" for room in ROOMS} < packages


@pytest.mark.parametrize("floor", ["models", "inference"])
def test_type_checkers_find_a_floor_where_its_name_says(floor):
    link = ROOT / "probattn" / floor
    assert link.readlink().as_posix() == f"../{floor}"


def test_ci_runs_the_test_command_of_the_readme_and_all_others():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    ci = (ROOT / ".ci/run").read_text("utf-8")
    for target in ("test", "test-slow"):
        assert re.search(rf"^stage .* make {target}$", ci, re.MULTILINE)


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
