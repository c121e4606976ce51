"""What do doctor and join say? Pictures of their real output, in a small swarm on this machine, for the docs.

    python -m scripts.record_terminal [--out docs/images]

An entry point, a peer, and a newcomer whose output is recorded: each finetunes the demo's encoder on a few
error messages of installed libraries. Takes two to three minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from coordinator.cli import run_main
from coordinator.errors import SwarmError
from scripts.demo import embedded_encoder
from scripts.error_messages import PRIVATE_TASKS, CorpusConfig, write_tasks
from scripts.swarm_processes import LocalSwarm, sigterm_as_exit

COLUMNS = 110  # of the terminal
MAX_PICTURE_BYTES = 100_000
START_SECONDS = 180.0
RECORD_SECONDS = 400.0  # of one command
ROOT = Path(__file__).parent.parent
LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
DEAD = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWNLdGmFNvfjDrn7SBG22E1WeVc62UZKLaaY8NFstWMb4b"  # nobody listens there
OWN_FLAGS = ("--learning-rate", "2e-4", "--batch-size", "16", "--max-length", "48", "--eval-examples", "64")
COLOURS = {
    r"^ok\b": "green",
    r"^warning\b": "yellow",
    r"^failure\b": "bold red",
    r"^round \d+": "bold",
    r"^\$ .*|^      --.*": "bold",
    r"^\(exit code \d+\)": "dim",
    r"→ .*": "italic",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the pictures of what doctor and join print.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: docs/images)")
    flags = parser.parse_args(arguments)
    return run_main(lambda: _main(flags.out))


def _main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    with (
        sigterm_as_exit(),
        tempfile.TemporaryDirectory() as name,
        LocalSwarm(Path(name) / "logs") as swarm,
    ):
        folder = Path(name)
        address = _start(swarm, folder)
        shown = {"ADDR": address, "OLD": DEAD}
        own = [*OWN_FLAGS, "--seed", "1", "--threads", "1", "--use-cpu", *LOOPBACK]
        looked = ["python", "-m", "peer.doctor", "--initial-peers", "$ADDR", "$OLD", "--data", "reviews"]
        text = record(looked, own, shown, folder)
        save(text, out / "terminal-doctor.svg", "peer.doctor: one of two entry points is gone")
        joined = ["python", "-m", "peer.join", "--initial-peers", "$ADDR", "--data", "reviews"]
        text = record([*joined, "--output-dir", "mine"], own, shown, folder)
        save(text, out / "terminal-join.svg", "peer.join: a run of two rounds")
    return 0


def record(command: Sequence[str], more: Sequence[str], variables: dict[str, str], folder: Path) -> Text:
    """What `command` prints, below the command itself; `more`: its flags that the second line shows.

    `variables` are put in for $NAME. Raises SwarmError when it fails.
    """
    filled = [variables.get(word.removeprefix("$"), word) for word in command[1:]]
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FORCE_COLOR", None)
    ended = subprocess.run(
        [sys.executable, *filled, *more],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RECORD_SECONDS,
        check=False,
    )
    if ended.returncode not in (0, 1) or not ended.stdout.strip():
        raise SwarmError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stdout[-2000:]}")
    said = [
        f"$ {' '.join(command)} \\",
        *_wrapped(more),
        ended.stdout.rstrip(),
        f"(exit code {ended.returncode})",
    ]
    return Text("\n".join(said))


def _wrapped(words: Sequence[str]) -> list[str]:
    """As the further lines of a command."""
    lines = textwrap.wrap(" ".join(words), COLUMNS - 8, break_on_hyphens=False, break_long_words=False)
    return [f"      {line} \\" for line in lines[:-1]] + [f"      {line}" for line in lines[-1:]]


def save(text: Text, path: Path, title: str) -> None:
    """As an SVG that needs nothing from elsewhere. Raises SwarmError for one that is too large."""
    for pattern, style in COLOURS.items():
        text.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    with console.file:
        console.print(text, soft_wrap=False)
    path.write_text(
        console.export_svg(title=title, code_format=_without_fonts(), unique_id=path.stem), encoding="utf-8"
    )
    size_bytes = path.stat().st_size
    if size_bytes > MAX_PICTURE_BYTES:
        raise SwarmError(f"{path} has {size_bytes} bytes, more than {MAX_PICTURE_BYTES}")
    print(f"{path}: {size_bytes} bytes")


def _without_fonts() -> str:
    """rich's picture fetches its font from another host; any monospace one will do."""
    return re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def _start(swarm: LocalSwarm, folder: Path) -> str:
    """An entry point and a first peer; the address of the entry point."""
    names = list(PRIVATE_TASKS)[:2]
    write_tasks(folder, CorpusConfig(max_per_class=60), {name: PRIVATE_TASKS[name] for name in names})
    (folder / names[1]).rename(folder / "reviews")
    encoder = folder / "all-MiniLM-L6-v2"
    encoder.symlink_to(embedded_encoder())
    run = ["--model", str(encoder), "--run-name", "error-messages", "--rounds", "2", "--round-examples", "96"]
    run += ["--min-peers", "2", "--output-dir", str(folder / "starter"), *LOOPBACK]
    starter = swarm.start("starter", "coordinator.start", run)
    started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
    address: str = started["initial_peers"][0]
    own = ["--initial-peers", address, "--data", str(folder / names[0]), "--use-cpu", "--threads", "1"]
    own += [*OWN_FLAGS, "--output-dir", str(folder / "first"), "--name", "first", *LOOPBACK]
    first = swarm.start("first", "peer.join", own)
    swarm.wait_for(first, "joined", timeout_seconds=START_SECONDS)
    return address


if __name__ == "__main__":
    sys.exit(main())
