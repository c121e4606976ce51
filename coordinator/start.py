"""Begin a run and be its first entry point.

    python -m coordinator.start --model sentence-transformers/all-MiniLM-L6-v2 --rounds 30 --min-peers 3

An entry point, not a server: once one peer has joined, this process may end and the run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.cli import (
    EXIT_CODES,
    Parser,
    add_network_arguments,
    add_output_arguments,
    add_private_arguments,
    add_run_arguments,
    default_run_name,
    positive,
    read_toml,
    run_main,
    said_options,
    spec_options,
)
from coordinator.errors import UsageError
from coordinator.organizer import load_organizer

EPILOG = f"""examples:
  python -m coordinator.start --model ./my-encoder --rounds 10 --round-examples 2000
  python -m coordinator.start --spec run.toml --host-maddrs /ip4/0.0.0.0/tcp/4001
  python -m coordinator.start --output-dir my-run          # serve a run again that was begun there

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(lambda: _start(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m coordinator.start",
        usage="python -m coordinator.start --model PATH_OR_ID [option ...]",
        description="Begin a run: write its spec, hold its first state, and print how to join.",
        epilog=EPILOG,
    )
    add_run_arguments(parser, title="the run")
    parser.add_argument(
        "--spec", type=Path, metavar="FILE", help="take what the flags do not say from this TOML file"
    )
    parser.add_argument("--seed", type=int, help="seed of the run (default: 0)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: the name of the run")
    parser.add_argument("--max-seconds", type=positive, metavar="S", help="stop serving after this time")
    add_network_arguments(parser)
    add_private_arguments(parser)
    add_output_arguments(parser)
    return parser.parse(argv)


def _start(args: argparse.Namespace) -> int:
    # Imported after the flags are read: torch and transformers take seconds, --help should not.
    from peer.display import Reporter, claim_stdout, setup_logging
    from peer.serving import EntryPoint
    from peer.stopping import StopSwitch

    setup_logging(args.log_level, args.log_file)
    reporter = Reporter(args.json, stream=claim_stdout() if args.json else None)
    with StopSwitch(args.max_seconds).listening() as stop:
        values = _values(args)
        output_dir = args.output_dir or Path(values["run_name"])
        EntryPoint(
            output_dir,
            values,
            explicit=_explicit(args),
            source=f"{args.spec}, with the flags" if args.spec else "the flags",
            identity_path=args.identity_path or output_dir / "identity.key",
            host_maddrs=tuple(args.host_maddrs),
            announce_maddrs=tuple(args.announce_maddrs),
            reachability=args.reachability,
            organizer_key=args.organizer_key,
            reporter=reporter,
            stop=stop,
        ).serve()
    return stop.exit_code


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """What the person wants of the spec; what follows from the model is still missing."""
    values = spec_options(args, seed=0, from_file=_explicit(args))
    if "model" not in values:
        stored = args.output_dir / "run.toml" if args.output_dir else None
        if stored is None or not stored.exists():
            raise UsageError(
                "give --model (a directory or a hub id), --spec FILE, or the --output-dir of an earlier run"
            )
        values["model"] = read_toml(stored).get("model")
    values.setdefault("run_name", default_run_name(str(values["model"])))
    return values


def _explicit(args: argparse.Namespace) -> dict[str, Any]:
    """Only what was said on this command line or in --spec: it must not contradict a run begun earlier."""
    said = {**(read_toml(args.spec) if args.spec else {}), **said_options(args)}
    for key in ("model", "revision", "seed"):
        if getattr(args, key) is not None:
            said[key] = getattr(args, key)
    if args.private:
        said["organizer"] = load_organizer(args.organizer_key).peer_id
    return said


if __name__ == "__main__":
    sys.exit(main())
