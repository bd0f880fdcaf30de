"""Print the lowest versions that pyproject.toml allows, as requirements; arguments are extras."""

import re
import sys
import tomllib
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
project = tomllib.loads(text)["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
for requirement in wanted:
    if not requirement.startswith(project["name"]):
        print(re.sub(r">=([\w.]+)", r"==\1", requirement))
