"""Reads back what a script of this project wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.errors import StateError


def read_json(file: Path, keys: Sequence[str] = (), *, advice: str = "delete it") -> dict[str, Any]:
    """An object with at least these keys. Raises StateError, with what to do about it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{file} is broken ({error}): {advice}") from error
    if not isinstance(value, dict):
        raise StateError(f"{file} is broken (not an object): {advice}")
    if missing := [key for key in keys if key not in value]:
        raise StateError(f"{file} is broken (no {', '.join(missing)}): {advice}")
    return value
