"""Prints the dependencies in pyproject.toml, of the extras named too: a layer that new code does not make again."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for extra in sys.argv[1:]:
    if extra not in project["optional-dependencies"]:
        sys.exit(f"Expected an extra of pyproject.toml, but got {extra}.")
    project["dependencies"] += project["optional-dependencies"][extra]
print(*project["dependencies"], sep="\n")
