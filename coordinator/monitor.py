"""Watch a run from any machine, without taking part.

python -m coordinator.monitor --initial-peers ADDR [ADDR ...] [--web PORT]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from coordinator.cli import (
    Parser,
    add_invite_argument,
    positive,
    run_main,
    trusted_digest,
    with_invite,
)
from coordinator.errors import UsageError

if TYPE_CHECKING:
    from coordinator.chain import Chain
    from coordinator.network import Network
    from coordinator.observer import Observer
    from coordinator.overview import Overview
    from coordinator.spec import RunSpec
    from peer.stopping import StopSwitch

DEFAULT_WEB_HOST = "127.0.0.1"

EPILOG = """examples:
  python -m coordinator.monitor --initial-peers ADDR              a live view in this terminal
  python -m coordinator.monitor --initial-peers ADDR --web 8080   the same as a page, http://127.0.0.1:8080/
  python -m coordinator.monitor --initial-peers ADDR --once --json
  python -m coordinator.monitor --initial-peers ADDR --json --each-round >> rounds.jsonl

A monitor only reads: no peer counts it or waits for it, and it sends nothing but questions. Its JSON is
described in coordinator/overview.py; with --web the first line is {"event": "web", "url": ...}.
Under --web: / the page, /api/state JSON, /metrics for Prometheus, /card.md the model card. Whoever can
reach the port can read them: there is no password.

exit codes:
  0  as planned (--once, --max-seconds)    5    the network: no entry point answers, p2p daemon dead
  1  an error without a code               7    a private run, and no valid credential
  2  wrong flags, port or run              130  Ctrl-C, 143 SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(lambda: _monitor(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m coordinator.monitor",
        usage="python -m coordinator.monitor (--initial-peers ADDR ... | --invite STRING) [option ...]",
        description="Watch a run: peers, rounds, shared scores, who was dropped and why.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--initial-peers", nargs="+", default=[], metavar="ADDR", help="address of any peer of the swarm"
    )
    add_invite_argument(parser)
    parser.add_argument(
        "--run", metavar="DIGEST", help="the run to watch (64 hex digits); default: ask the entry point"
    )
    parser.add_argument("--once", action="store_true", help="one look, then end")
    parser.add_argument(
        "--refresh-seconds", type=positive, default=2.0, metavar="S", help="between two looks (default: 2)"
    )
    parser.add_argument("--max-seconds", type=positive, metavar="S", help="end after this time")
    parser.add_argument(
        "--identity-path",
        type=Path,
        metavar="FILE",
        help="key to watch with (default: a new one, thrown away at the end)",
    )
    _add_output_arguments(parser)
    args = with_invite(parser.parse(argv))
    _check(args)
    return args


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="one JSON object per line and look, and nothing else"
    )
    group.add_argument(
        "--each-round", action="store_true", help="a line only at the start and at each new round"
    )
    group.add_argument(
        "--web",
        type=int,
        metavar="PORT",
        help="serve the page there as well; 0: any free port, which is said",
    )
    group.add_argument(
        "--web-host",
        metavar="HOST",
        help=f"address to serve it on (default: {DEFAULT_WEB_HOST}, for this machine only)",
    )
    group.add_argument(
        "--log-level", default="error", metavar="LEVEL", help="debug, info, warning, error (default)"
    )
    group.add_argument("--log-file", type=Path, metavar="FILE", help="the log with times, as well")


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    if not args.initial_peers:
        raise UsageError("give --initial-peers ADDR, or for a private run --invite STRING")
    if args.web is not None and not 0 <= args.web <= 65535:
        raise UsageError(f"--web {args.web}: a port is a number from 0 to 65535")
    if args.web_host is not None and args.web is None:
        raise UsageError("--web-host says where --web PORT serves: give --web, too")
    if args.once and args.web is not None:
        raise UsageError("--once ends after one look: leave out --web, or --once")
    if args.each_round and not args.json:
        raise UsageError("--each-round is about the lines of --json: give --json, too")


def _monitor(args: argparse.Namespace) -> int:
    # Imported after the flags are read: hivemind takes seconds, --help should not.
    from coordinator.web import Latest, WebServer
    from peer.display import claim_stdout, setup_logging
    from peer.stopping import StopRequested, StopSwitch

    setup_logging(args.log_level, args.log_file)
    digest = trusted_digest(args.run)
    output = claim_stdout() if args.json else sys.stdout
    with StopSwitch(args.max_seconds).listening() as stop, ExitStack() as stack:
        latest, server = Latest(), None
        if args.web is not None:  # first of all: that the port is taken is told at once
            server = stack.enter_context(WebServer(args.web_host or DEFAULT_WEB_HOST, args.web, latest))
        try:
            observer = stack.enter_context(_observing(args, digest, stop))
            overview = observer.first_look(stop.check)
            latest.set(overview, lambda: _card(observer.chain))
            if server is not None:
                server.start()
                _tell_address(server.url, output if args.json else None)
            show = _json_lines(output, args.each_round) if args.json else stack.enter_context(_terminal())
            show(overview)
            while not args.once:
                stop.wait(args.refresh_seconds)
                overview = observer.look(stop.check)
                latest.set(overview)
                show(overview)
        except StopRequested:
            pass
        except BrokenPipeError:  # nobody reads any more, as after `| head`; nor must the flush at exit fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    return stop.exit_code


def _tell_address(url: str, output: TextIO | None) -> None:
    if output is None:
        print(f"the page is at {url}", file=sys.stderr, flush=True)
    else:
        print(json.dumps({"event": "web", "url": url}), file=output, flush=True)


@contextmanager
def _observing(args: argparse.Namespace, digest: str | None, stop: StopSwitch) -> Iterator[Observer]:
    """Raises SwarmError."""
    from coordinator.observer import Observer

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="monitor-")))
        network, spec = _enter(stack, args, digest, folder)
        stop.check()
        observer = Observer(network, spec)
        observer.start()
        yield observer


def _enter(
    stack: ExitStack, args: argparse.Namespace, digest: str | None, folder: Path
) -> tuple[Network, RunSpec]:
    """The way in: an entry point, and the spec of its run."""
    from coordinator.admission import admission_of
    from coordinator.identity import load_identity
    from coordinator.network import Network, NetworkConfig
    from peer.genesis import ask_spec

    identity = load_identity(args.identity_path or folder / "monitor.key")
    config = NetworkConfig(
        identity=identity,
        admission=admission_of(None, args.invite, identity, None),
        host_maddrs=("/ip4/127.0.0.1/tcp/0",),  # it listens nowhere; so no port is mapped at a router either
        initial_peers=tuple(args.initial_peers),
        listens=False,
        is_dht_client=True,
    )
    network = stack.enter_context(Network(config))
    return network, ask_spec(network, network.entry_points, digest)


def _json_lines(output: TextIO, each_round: bool) -> Callable[[Overview], None]:
    shown: list[str] = []  # the commit shown last

    def show(overview: Overview) -> None:
        if each_round and shown == [overview["state"]["commit"]]:
            return
        shown[:] = [overview["state"]["commit"]]
        print(json.dumps(overview, allow_nan=False), file=output, flush=True)

    return show


@contextmanager
def _terminal() -> Iterator[Callable[[Overview], None]]:
    """A view that is drawn anew in place; where there is no terminal, one after another at each new round."""
    from rich.console import Console
    from rich.live import Live

    from coordinator.terminal import render

    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        shown: list[str] = []

        def show(overview: Overview) -> None:
            if shown != [overview["state"]["commit"]]:
                shown[:] = [overview["state"]["commit"]]
                console.print(render(overview, console.width))

        yield show
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda overview: live.update(render(overview, console.width), refresh=True)


def _card(chain: Chain) -> str:
    from peer.state import write_model_card

    commits = [signed.commit for signed in chain.commits]
    with tempfile.TemporaryDirectory(prefix="monitor-") as folder:
        write_model_card(
            Path(folder),
            base_model=chain.spec.model,
            base_revision=chain.spec.revision,
            run_name=chain.spec.run_name,
            spec_digest=chain.spec.digest,
            round=chain.round,
            state_hash=chain.state_hash,
            num_contributions=sum(len(commit.contributors) for commit in commits),
            peers=sorted({peer for commit in commits for peer in commit.cohort}),
            commits=[commit.model_dump(mode="json") for commit in commits],
        )
        return (Path(folder) / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
