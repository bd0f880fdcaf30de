"""Print the lowest versions that pyproject.toml allows, those of the extras named included."""

import re
import sys
import tomllib
from pathlib import Path

pyproject = Path(__file__).parents[1] / "pyproject.toml"
project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
for requirement in wanted:
    if not requirement.startswith(project["name"]):
        print(re.sub(r">=([\w.]+)", r"==\1", requirement))
