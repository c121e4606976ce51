"""Which versions of Python and of the packages are here, and which are needed? Imports none of them."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from coordinator.errors import SwarmError
from peer.checkup import Check, Package, judge_packages, judge_python

DISTRIBUTION = "cold-swarm"


def check_versions() -> list[Check]:
    python, requirements = _declared()
    packages = [Package(text, _installed(text)) for text in requirements]
    return [judge_python(platform.python_version(), python), judge_packages(packages)]


def _declared() -> tuple[str, list[str]]:
    """The ranges of pyproject.toml: the file itself in a checkout, else what the install noted."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return project["requires-python"], project["dependencies"]
    try:
        found = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise SwarmError("cannot tell which versions are needed: install the project with pip") from error
    needed = importlib.metadata.requires(DISTRIBUTION) or []
    return str(found["Requires-Python"]), [text for text in needed if "extra ==" not in text]


def _installed(requirement: str) -> str | None:
    try:
        return importlib.metadata.version(Requirement(requirement).name)
    except importlib.metadata.PackageNotFoundError:
        return None
