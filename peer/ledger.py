"""What left my machine? Verifies the chain of DIR/ledger.jsonl and sums it up.

    python -m peer.ledger DIR            # DIR: the --output-dir of peer.join or coordinator.start
    python -m peer.ledger DIR --json     # the same as one JSON object
    python -m peer.ledger DIR --expect HASH   # is this hash, noted earlier, still in the chain?

The ledger says what the program reports of itself; `tests/test_capture.py` holds that against the bytes
which real peers give to the p2p daemon.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coordinator.cli import Parser, run_main
from coordinator.errors import StateError
from peer.ledger_file import LEDGER_NAME, NO_HASH, line_hash, split_line

NOTES = ("start", "end", "layout", "lost")  # lines about no message
TENSOR_KINDS = {
    "delta part": "what finetuning changed in the backbone",
    "result part": "averages of the backbone that this peer made",
    "state chunk": "the backbone that a round agreed on",
    "audit part": "parts of the same deltas, for auditors",
    "audit residual": "what compression cut off them, for auditors",
}
OTHER_KINDS = {
    "record": "signed heartbeats, on the board",
    "call": "questions and signed records, to one peer each",
    "reply": "answers to such calls",
    "refusal": "why a call was refused",
    "delta manifest": "signed hashes and norms of the own delta",
    "statement": "signed hashes of the averages made",
    "figures": "inner products of contributions",
    "model file": "config and tokenizer files of the base model",
    "evidence": "proofs that a peer lied: signed records, parts of deltas",
    "greeting": "the first frame of a stream",
    "signal": "frames that say: I am alive, go on, done",
}
EPILOG = """exit codes:
  0  the chain is complete      6  it is not, or the file cannot be read: the message names the line
  2  wrong flags
"""


@dataclass(frozen=True)
class Chain:
    lines: tuple[Mapping[str, Any], ...]  # content, in order
    hashes: tuple[str, ...]
    is_torn: bool  # a last line was not written to its end


@dataclass
class Sum:
    """Of one kind."""

    num: int = 0
    num_bytes: int = 0
    peers: Counter[str] = field(default_factory=Counter)  # bytes
    rounds: set[int] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)

    def add(self, line: Mapping[str, Any], tensors: Sequence[str]) -> None:
        self.num += line["num"]
        self.num_bytes += line["bytes"]
        self.peers.update(line["peers"])
        self.tensors.update(tensors)
        if "round" in line:
            self.rounds.add(line["round"])


@dataclass(frozen=True)
class Summary:
    """What `--json` prints, and what the text is made of."""

    num_lines: int
    last_hash: str  # to be noted: cutting off the end of a ledger does not show in the chain
    starts: int  # processes that wrote it
    cut_short: int  # of them, those that did not end in order: their last open lines are missing
    num_lost: int  # messages that came faster than they could be written down
    first_time: float | None
    last_time: float | None
    kinds: Mapping[str, Sum]
    peers: Mapping[str, int]  # bytes to each
    unknown_kinds: tuple[str, ...]  # of another version of this program
    num_unnamed: int  # lines with values of tensors that no layout names
    private_tensors: tuple[str, ...]  # of the classifier in task_model/, which are not of the backbone
    private_sent: tuple[str, ...]  # of those, what the ledger names: never any, as far as we know

    @property
    def is_clean(self) -> bool:
        return not (self.unknown_kinds or self.num_unnamed or self.private_sent)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": True,
            "num_lines": self.num_lines,
            "last_hash": self.last_hash,
            "starts": self.starts,
            "cut_short": self.cut_short,
            "num_lost": self.num_lost,
            "first_time": self.first_time,
            "last_time": self.last_time,
            "kinds": {
                kind: {
                    "num": s.num,
                    "bytes": s.num_bytes,
                    "peers": dict(s.peers),
                    "rounds": sorted(s.rounds),
                    "tensors": sorted(s.tensors),
                }
                for kind, s in self.kinds.items()
            },
            "peers": dict(self.peers),
            "heads_labels_texts": "none" if self.is_clean else "cannot be told",
            "unknown_kinds": list(self.unknown_kinds),
            "num_unnamed": self.num_unnamed,
            "private_sent": list(self.private_sent),
        }


class BrokenChainError(StateError):
    """Line `line` does not follow from those before it."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}, line {line}: {why}")
        self.line, self.why = line, why


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(lambda: _show(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m peer.ledger", description=__doc__.partition("\n")[0], epilog=EPILOG)
    parser.add_argument("directory", type=Path, metavar="DIR", help="output directory of a peer")
    parser.add_argument("--expect", metavar="HASH", help="a hash that must be in the chain, noted earlier")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse(argv)


def _show(args: argparse.Namespace) -> int:
    path = args.directory / LEDGER_NAME
    try:
        chain = read_chain(path)
        known = chain.hashes or (NO_HASH,)  # else a hash of zeros, or none, would be in every ledger
        if args.expect is not None and args.expect not in known:
            raise BrokenChainError(
                path,
                len(chain.lines) + 1,
                f"the chain is complete up to here, but the hash {args.expect[:16]}... is not in it: lines "
                "were cut off the end, or all were written anew, or it is no hash of a line",
            )
    except StateError as error:
        if args.json:
            line = error.line if isinstance(error, BrokenChainError) else None
            print(json.dumps({"ok": False, "line": line, "why": str(error)}))
        raise
    summary = summarise(chain, private_tensors(args.directory / "task_model"))
    print(json.dumps(summary.to_json()) if args.json else as_text(path, summary, chain.is_torn))
    return 0


# --- the chain


def read_chain(path: Path) -> Chain:
    """Raises StateError when the file cannot be read, BrokenChainError at the first line that is wrong."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise StateError(
            f"cannot read {path}: {error.strerror}; give the --output-dir of a peer that has run"
        ) from error
    *complete, rest = text.split("\n")
    lines: list[Mapping[str, Any]] = []
    hashes: list[str] = []
    for number, line in enumerate(complete, 1):
        content, digest = _check_line(path, number, line, hashes[-1] if hashes else NO_HASH)
        lines.append(content)
        hashes.append(digest)
    return Chain(tuple(lines), tuple(hashes), is_torn=bool(rest))


def _check_line(path: Path, number: int, line: str, previous: str) -> tuple[Mapping[str, Any], str]:
    try:
        text, digest, content = split_line(line)
    except ValueError as error:
        raise BrokenChainError(
            path,
            number,
            f"this is no line of a ledger ({error}): it was changed by hand, or the disk is damaged",
        ) from error
    if content["n"] > number:
        raise BrokenChainError(
            path,
            number,
            f"it bears number {content['n']}: {content['n'] - number} line(s) before it were removed",
        )
    if content["n"] < number:
        raise BrokenChainError(
            path, number, f"it bears number {content['n']}: a line before it was put in or doubled"
        )
    if line_hash(text, previous) != digest:
        raise BrokenChainError(
            path,
            number,
            "its hash does not fit: this line, or the hash of the one before, was changed afterwards",
        )
    if content.get("kind") not in NOTES and not _is_message(content):
        raise BrokenChainError(path, number, "its hash fits, but it does not say what was sent to whom")
    return content, digest


def _is_message(content: Mapping[str, Any]) -> bool:
    peers = content.get("peers")
    return (
        isinstance(content.get("kind"), str)
        and type(content.get("num")) is int
        and isinstance(peers, dict)
        and all(type(num_bytes) is int for num_bytes in peers.values())
        and content.get("bytes") == sum(peers.values())
    )


# --- the summary


def summarise(chain: Chain, private: Sequence[str] = ()) -> Summary:
    """`private`: names of the tensors in a classifier; those that are no backbone's are the head's."""
    kinds: dict[str, Sum] = {}
    peers: Counter[str] = Counter()
    layout: list[tuple[str, int, int]] = []  # name, first value, the first behind
    named: set[str] = set()
    num_unnamed = 0
    for line in chain.lines:
        if line["kind"] == "layout":
            layout = _bounds(line["tensors"])
            named.update(name for name, _, _ in layout)
        if line["kind"] in NOTES:
            continue
        tensors = _tensors(layout, line.get("values"))
        num_unnamed += "values" in line and not tensors
        kinds.setdefault(line["kind"], Sum()).add(line, tensors)
        peers.update(line["peers"])
    count = Counter(line["kind"] for line in chain.lines)
    heads = tuple(name for name in private if not _is_backbone(name, named))
    sent = {name for s in kinds.values() for name in s.tensors}
    return Summary(
        num_lines=len(chain.lines),
        last_hash=chain.hashes[-1] if chain.hashes else NO_HASH,
        starts=count["start"],
        cut_short=count["start"] - count["end"],
        num_lost=sum(line.get("num", 0) for line in chain.lines if line["kind"] == "lost"),
        first_time=chain.lines[0].get("time") if chain.lines else None,
        last_time=chain.lines[-1].get("time") if chain.lines else None,
        kinds=kinds,
        peers=peers,
        unknown_kinds=tuple(sorted(kinds.keys() - TENSOR_KINDS.keys() - OTHER_KINDS.keys())),
        num_unnamed=num_unnamed,
        private_tensors=heads,
        private_sent=tuple(sorted(sent & set(heads))),
    )


def _bounds(tensors: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, int, int]]:
    bounds, first = [], 0
    for name, shape in tensors:
        size = 1
        for length in shape:
            size *= length
        bounds.append((name, first, first + size))
        first += size
    return bounds


def _tensors(layout: Sequence[tuple[str, int, int]], values: Sequence[int] | None) -> list[str]:
    if values is None:
        return []
    start, stop = values
    return [name for name, first, last in layout if first < stop and start < last]


def _is_backbone(name: str, named: set[str]) -> bool:
    """In a classifier the backbone's tensors have a prefix, as in bert.embeddings.LayerNorm.bias."""
    return not named or name in named or name.partition(".")[2] in named


def private_tensors(task_model: Path) -> list[str]:
    """Names of the tensors of the own classifier, where there is one."""
    try:
        with safe_open(task_model / "model.safetensors", framework="np") as file:
            return sorted(file.keys())
    except (OSError, SafetensorError):
        return []


# --- the text


def as_text(path: Path, summary: Summary, is_torn: bool) -> str:
    lines = [f"{path}: {summary.num_lines} lines, the chain is complete", f"last hash: {summary.last_hash}"]
    if summary.first_time is not None and summary.last_time is not None:
        lines.append(f"from {_instant(summary.first_time)} to {_instant(summary.last_time)}")
    lines += [f"note: {note}" for note in _notes(summary, is_torn)]
    lines += ["", f"{'sent':<16}{'messages':>10}{'bytes':>16}{'peers':>7}  what it is"]
    for kind, what in (*TENSOR_KINDS.items(), *OTHER_KINDS.items()):
        if kind in summary.kinds:
            s = summary.kinds[kind]
            lines.append(f"{kind:<16}{s.num:>10,}{s.num_bytes:>16,}{len(s.peers):>7}  {what}")
    lines += _tensor_lines(summary)
    lines += ["", f"{'to':<56}{'bytes':>16}"]
    lines += [f"{peer:<56}{n:>16,}" for peer, n in sorted(summary.peers.items(), key=lambda item: -item[1])]
    return "\n".join([*lines, "", _verdict(summary)])


def _notes(summary: Summary, is_torn: bool) -> list[str]:
    notes = []
    if summary.cut_short:
        notes.append(
            f"{summary.cut_short} of {summary.starts} processes have not ended in order, or still run: what "
            "they sent in their last minute (tensors: 6 seconds) may be missing"
        )
    if is_torn:
        notes.append("the last line was not written to its end, as when the power fails; it is not counted")
    if summary.num_lost:
        notes.append(f"{summary.num_lost} messages could not be written down")
    return notes


def _tensor_lines(summary: Summary) -> list[str]:
    lines = []
    for kind in TENSOR_KINDS:
        tensors = sorted(summary.kinds[kind].tensors) if kind in summary.kinds else []
        if tensors:
            rounds = sorted(summary.kinds[kind].rounds)
            when = f", rounds {rounds[0]} to {rounds[-1]}" if rounds else ""
            lines.append(f"  {kind}s are of {len(tensors)} tensors, {tensors[0]} to {tensors[-1]}{when}")
    return ["", *lines] if lines else []


def _verdict(summary: Summary) -> str:
    if summary.private_sent:
        return f"heads: SENT: {', '.join(summary.private_sent)}"
    if summary.unknown_kinds or summary.num_unnamed:
        return (
            f"heads, labels, texts: cannot be told: {summary.num_unnamed} lines name no tensors, "
            f"unknown kinds: {', '.join(summary.unknown_kinds) or 'none'}"
        )
    own = ", ".join(summary.private_tensors)
    return "heads, labels, texts: none" + (f" (the head is: {own})" if own else "")


def _instant(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


if __name__ == "__main__":
    sys.exit(main())
