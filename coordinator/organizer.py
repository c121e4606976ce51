"""Where is the key of a private run's organizer, and what does the organizer make with it at the start?

The key lets people in and puts them out, so it must not leave the organizer's machine: it is written with
mode 0600, and not where others may write, nor into a git repository, from which it might be pushed.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator.credentials import make_invite
from coordinator.errors import StateError
from coordinator.identity import Identity, load_identity
from coordinator.spec import RunSpec

ENTRY_POINTS_NAME = "entry_points.json"  # in the output directory of who began the run
DEFAULT_DAYS = 30.0  # for which an invite lets in
DAY_SECONDS = 24 * 3600.0
MAX_ENTRY_POINTS = 8


def default_key_path() -> Path:
    """One key per person, for all of his runs: what it signs names the run."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "cold-fusion" / "organizer.key"


def load_organizer(path: Path) -> Identity:
    """The key at `path`, made where there is none. Raises StateError where it would not be safe."""
    if not path.exists():
        _check_place(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{path.parent}: cannot make the folder of the key: {error.strerror}") from error
    return load_identity(path)


def first_invite(spec: RunSpec, key_path: Path, addresses: Sequence[str], output_dir: Path) -> str | None:
    """Of a run that begins or is served here; None: it is public, empty: the organizer's key is elsewhere."""
    if spec.organizer is None:
        return None
    entry_points = list(addresses)[:MAX_ENTRY_POINTS]
    try:
        (output_dir / ENTRY_POINTS_NAME).write_text(json.dumps(entry_points), encoding="utf-8")
    except OSError as error:
        raise StateError(f"{output_dir}: cannot write: {error.strerror}") from error
    if not key_path.exists():
        return ""
    organizer = load_identity(key_path)
    if organizer.peer_id != spec.organizer:
        return ""
    expires_at = round(time.time() + DEFAULT_DAYS * DAY_SECONDS)
    return make_invite(organizer, spec.digest, entry_points, expires_at=expires_at).to_text()


def _check_place(path: Path) -> None:
    existing = [folder for folder in path.absolute().parents if folder.exists()]
    for folder in existing:
        if (folder / ".git").exists():
            raise StateError(
                f"{path}: not written into the git repository {folder}, from which a key might be pushed; "
                "give --organizer-key FILE outside of it"
            )
    if existing and existing[0].stat().st_mode & stat.S_IWOTH:
        raise StateError(f"{path}: everybody may write to {existing[0]}; give --organizer-key FILE elsewhere")
