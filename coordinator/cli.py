"""What the command lines share: flags of a run, of the network and of the output, and how errors end."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from coordinator.credentials import MAX_INVITE_CHARS, Invite, parse_invite
from coordinator.errors import SpecError, StateError, SwarmError, UsageError
from coordinator.organizer import default_key_path
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

_HOME_KEY = "~/.config/cold-fusion/organizer.key"

DEFAULT_NUM_ROUNDS = 30  # the paper's
DEFAULT_ROUND_EXAMPLES = 4096
DEFAULT_OUTER_LR = {"nesterov": 0.7, "adam": 1e-3}  # Douillard et al. 2023; of Adam a length
EXIT_CODES = """exit codes:
  0  ended as planned           4  the model cannot be used
  1  an error without a code    5  the network: no entry point answers, p2p daemon dead
  2  wrong flags or run spec    6  the output directory cannot be used
  3  the data cannot be used    7  a private run does not let this peer in
                                130 Ctrl-C, 143 SIGTERM: the checkpoint is kept
"""


class Parser(argparse.ArgumentParser):
    """Accepts underscores for hyphens in flags, as Hugging Face users write them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse(self, args: Sequence[str] | None) -> argparse.Namespace:
        """`args`, or the command line."""
        given = sys.argv[1:] if args is None else args
        return self.parse_args([_hyphenated(arg) for arg in given])


def add_run_arguments(parser: argparse.ArgumentParser, *, title: str) -> None:
    """Flags that become keys of the run spec; unset ones are None, so that a file or a default counts."""
    group = parser.add_argument_group(title)
    group.add_argument("--model", metavar="PATH_OR_ID", help="pretrained encoder: a directory, or a hub id")
    group.add_argument("--revision", help="revision of the model on the hub")
    group.add_argument("--run-name", help="name of the run (default: model and date)")
    group.add_argument(
        "--rounds", type=positive_int, metavar="N", help="rounds of the run (default: 30, the paper's)"
    )
    group.add_argument(
        "--round-examples",
        type=positive_int,
        metavar="N",
        help="examples that a peer finetunes on in a round (default: 4096)",
    )
    group.add_argument(
        "--round-seconds", type=positive, metavar="S", help="the same as time; the first limit counts"
    )
    group.add_argument(
        "--round-limit-seconds",
        type=positive,
        metavar="S",
        help="a round waits at most so long for slow peers (default: 1800)",
    )
    group.add_argument(
        "--min-peers",
        type=positive_int,
        metavar="N",
        help="quorum: a round is fused by at least so many (default: 2)",
    )
    group.add_argument(
        "--max-peers",
        type=positive_int,
        metavar="N",
        help="at most so many train in a round; the draw is by lot (default: 64)",
    )
    group.add_argument(
        "--aggregation",
        choices=choices("aggregation"),
        help="rule of the average (default: mean, the paper's)",
    )
    group.add_argument(
        "--screening",
        choices=choices("screening"),
        help="leave out whole contributions by their length or direction (default: none)",
    )
    group.add_argument(
        "--outer-optimizer",
        choices=choices("outer_optimizer"),
        help="what is done with the averaged delta (default: plain, it is added)",
    )
    group.add_argument(
        "--outer-lr",
        type=positive,
        metavar="LR",
        help="its learning rate (default: plain 1, nesterov 0.7, adam 0.001)",
    )
    group.add_argument(
        "--outer-momentum", type=float, metavar="M", help="its momentum, Adam's beta1 (default: 0.9)"
    )
    group.add_argument(
        "--weights",
        choices=("uniform", "examples"),
        help="what a peer counts: the same, or by its examples (default: uniform)",
    )
    group.add_argument(
        "--max-weight",
        type=positive,
        metavar="W",
        help="cap of a weight by examples, in round budgets (default: 4)",
    )
    group.add_argument(
        "--compression", choices=choices("compression"), help="of what travels (default: fp32)"
    )
    group.add_argument(
        "--exchange-limit-seconds",
        type=positive,
        metavar="S",
        help="one averaging takes at most so long, however slow a peer is (default: 600)",
    )
    group.add_argument(
        "--audit-parts",
        type=int,
        metavar="N",
        help="parts of others' averages that each peer computes again after a round (default: 2)",
    )
    group.add_argument(
        "--gate",
        action=argparse.BooleanOptionalAction,
        help="members judge each new state on their held-out data and undo a harmful round (default: on)",
    )
    group.add_argument(
        "--gate-level",
        type=positive,
        metavar="P",
        help="level of a member's test: how often noise alone makes it reject (default: 0.01)",
    )
    group.add_argument(
        "--gate-share",
        type=positive,
        metavar="S",
        help="more than this share of the votes undoes a round (default: 0.5)",
    )
    group.add_argument(
        "--gate-min-voters",
        type=positive_int,
        metavar="N",
        help="fewer votes undo nothing, nor do those of half of the round's members (default: 2)",
    )
    group.add_argument(
        "--gate-vote-seconds",
        type=positive,
        metavar="S",
        help="who has not voted so long after a round has accepted it (default: 60)",
    )
    group.add_argument(
        "--gate-leaves-out",
        choices=choices("gate_leaves_out"),
        help="who of an undone round takes no part in the next ones (default: most_deviant)",
    )
    group.add_argument(
        "--gate-left-out-rounds",
        type=positive_int,
        metavar="N",
        help="for how many rounds that stand (default: 3)",
    )
    group.add_argument(
        "--gate-max-rollbacks",
        type=positive_int,
        metavar="N",
        help="so many in a row at most; then the round stands (default: 3)",
    )
    group.add_argument(
        "--lease-seconds",
        type=positive,
        metavar="S",
        help="silence after which a peer counts as gone (default: 30)",
    )


def choices(key: str) -> tuple[str, ...]:
    """Values that a key of the spec may have."""
    return get_args(RunSpec.model_fields[key].annotation)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--identity-path",
        type=Path,
        metavar="FILE",
        help="key of this peer (default: identity.key in the output directory)",
    )
    group.add_argument(
        "--host-maddrs",
        nargs="+",
        default=["/ip4/0.0.0.0/tcp/0"],
        metavar="MADDR",
        help="where to listen (default: /ip4/0.0.0.0/tcp/0, all interfaces, any port)",
    )
    group.add_argument(
        "--announce-maddrs",
        nargs="+",
        default=[],
        metavar="MADDR",
        help="addresses to tell others, where they differ",
    )
    group.add_argument(
        "--reachability",
        choices=("unknown", "public", "private"),
        default="unknown",
        help="public: others can dial this peer, and it relays for those that cannot be dialled; "
        "private: they cannot, so its entry points relay for it (default: unknown)",
    )


def add_private_arguments(parser: argparse.ArgumentParser) -> None:
    """Of who begins a run."""
    group = parser.add_argument_group("a private run")
    group.add_argument(
        "--private", action="store_true", help="begin one that only invited peers can join; prints an invite"
    )
    add_organizer_argument(group)


def add_organizer_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--organizer-key",
        type=Path,
        default=default_key_path(),
        metavar="FILE",
        help=f"the organizer's key, made with --private where there is none (default: {_HOME_KEY})",
    )


def add_invite_argument(parser: argparse.ArgumentParser) -> None:
    """For every command that enters a swarm; `with_invite` reads it."""
    parser.add_argument(
        "--invite",
        metavar="STRING",
        help="of a private run, in the place of --initial-peers and --run; @FILE: read it from a file, "
        "so that other users of this machine do not see it",
    )


def with_invite(args: argparse.Namespace) -> argparse.Namespace:
    """`args.invite` becomes an Invite or None, its entry points and run those of the flags. SwarmError."""
    if args.invite is None:
        return args
    invite: Invite = parse_invite(_text_of(args.invite))
    if args.run not in (None, invite.run):
        raise UsageError(f"--run {args.run[:80]} is not the run of the invite, {invite.run}")
    args.invite, args.run = invite, invite.run
    args.initial_peers = list(dict.fromkeys([*args.initial_peers, *invite.entry_points]))
    if not args.initial_peers:
        raise UsageError("the invite names no entry point; give --initial-peers ADDR as well")
    return args


def trusted_digest(text: str | None) -> str | None:
    """Of `--run`. Raises UsageError."""
    if text is not None and (len(text) != 64 or set(text) - set("0123456789abcdef")):
        raise UsageError(
            f"--run {text[:80]}: a digest has 64 hexadecimal digits, as the entry point printed them"
        )
    return text


def _text_of(argument: str) -> str:
    if not argument.startswith("@"):
        return argument
    try:
        with open(argument[1:], encoding="utf-8", errors="replace") as file:
            return file.read(MAX_INVITE_CHARS + 1)
    except (OSError, ValueError) as error:
        raise StateError(f"{argument[1:]}: cannot read the invite: {error}") from error


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per line on standard output, and nothing else there",
    )
    group.add_argument(
        "--log-level",
        default="warning",
        metavar="LEVEL",
        help="debug, info, warning or error (default: warning)",
    )
    group.add_argument("--log-file", type=Path, metavar="FILE", help="the log with times, as well")


def spec_options(
    args: argparse.Namespace, *, seed: int, from_file: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Keys of the spec that a person chose: explicit flag beats file beats default."""
    options = {**(from_file or {}), **said_options(args)}
    if options.get("round_examples") is None and options.get("round_seconds") is None:
        options["round_examples"] = DEFAULT_ROUND_EXAMPLES
    options.setdefault("num_rounds", DEFAULT_NUM_ROUNDS)
    outer_lr = DEFAULT_OUTER_LR.get(str(options.get("outer_optimizer")))
    if outer_lr is not None:
        options.setdefault("outer_lr", outer_lr)
    options.setdefault("created_at", round(time.time(), 3))
    options.setdefault("seed", seed)
    return options


def said_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of the spec that flags name, also where they say what is the default."""
    keys = {
        "run_name": args.run_name,
        "num_rounds": args.rounds,
        "round_examples": args.round_examples,
        "round_seconds": args.round_seconds,
        "round_limit_seconds": args.round_limit_seconds,
        "min_peers": args.min_peers,
        "max_peers": args.max_peers,
        "aggregation": args.aggregation,
        "screening": args.screening,
        "outer_optimizer": args.outer_optimizer,
        "outer_lr": args.outer_lr,
        "outer_momentum": args.outer_momentum,
        "weights": args.weights,
        "max_weight": args.max_weight,
        "compression": args.compression,
        "exchange_limit_seconds": args.exchange_limit_seconds,
        "audit_parts": args.audit_parts,
        "gate": args.gate,
        "gate_level": args.gate_level,
        "gate_share": args.gate_share,
        "gate_min_voters": args.gate_min_voters,
        "gate_vote_seconds": args.gate_vote_seconds,
        "gate_leaves_out": args.gate_leaves_out,
        "gate_left_out_rounds": args.gate_left_out_rounds,
        "gate_max_rollbacks": args.gate_max_rollbacks,
        "lease_seconds": args.lease_seconds,
    }
    return {key: value for key, value in keys.items() if value is not None}


def default_run_name(model: str) -> str:
    base = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model).name).strip("._-") or "run"
    return f"{base[:48]}-{datetime.now(UTC):%Y%m%d}"


def read_toml(path: Path) -> dict[str, Any]:
    """Raises SpecError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot read the run spec: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a TOML file: {error}") from error


def run_main(main: Callable[[], int]) -> int:
    """The outermost loop: a named error becomes its message and exit code, anything else a traceback."""
    try:
        return main()
    except SwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:  # the one outermost place: say all that is known
        logger.exception("unexpected error; please report it with this traceback")
        return 1


def _hyphenated(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
