"""Who was left out of a round, and why? Pure: from the chain, and from the last heartbeats of who is missing.

The chain says who was excluded for what it sent, got no weight, came in part, or sits out some rounds after
a roll-back. Who is **absent** is in it only by omission: in the fusion before, and not in this one. Why is
not in it at all; the last heartbeat of such a peer tells it, as long as the peer has not come back since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from coordinator.chain import Chain
from coordinator.membership import CLOCK_DIFFERENCE_SECONDS
from coordinator.records import Commit, PeerRecord

What = Literal["excluded", "sits out", "screened out", "in part", "absent"]


@dataclass(frozen=True)
class Drop:
    round: int  # a roll-back's own number where the peer sits out
    peer: str
    what: What
    reason: str  # untrusted: signers of a commit may write here what they like
    num_rounds_left: int | None = (
        None  # of who sits out: fusions yet to stand without it, 0 when that is over
    )


def find_dropped(
    chain: Chain, heard: Mapping[str, PeerRecord], *, now: float, max_rounds: int
) -> Iterator[Drop]:
    """Of the last `max_rounds`, newest first. `heard`: the newest record of each, expired ones included."""
    recent = chain.commits[-max_rounds:]
    back_in: dict[str, int] = {}  # peer -> the round, of those looked at, in which it took part next
    told: set[str] = set()  # who sits out: its latest roll-back counts
    for index in reversed(range(len(recent))):
        commit = recent[index].commit
        if commit.kind == "rollback":
            yield from _sitting_out(commit, chain.left_out_rounds, told)
            continue
        yield from dropped_in(commit)
        before = Chain(chain.spec, recent[:index])
        for peer in _missing(commit, before):
            why = _why_absent(commit, before, heard.get(peer), back_in.get(peer), now)
            if why is not None:
                yield Drop(commit.round, peer, "absent", why)
        back_in.update(dict.fromkeys(commit.cohort, commit.round))


def _sitting_out(commit: Commit, num_left: Mapping[str, int], told: set[str]) -> Iterator[Drop]:
    for exclusion in commit.excluded:
        num = 0 if exclusion.peer in told else num_left.get(exclusion.peer, 0)
        told.add(exclusion.peer)
        how_long = f"for {num} more round{'s' if num != 1 else ''}" if num else "its rounds are over"
        yield Drop(commit.round, exclusion.peer, "sits out", f"{how_long}: {exclusion.reason}", num)


def dropped_in(commit: Commit) -> Iterator[Drop]:
    """Whose contribution a fusion lacks, in whole or in part, as its commit says."""
    for exclusion in commit.excluded:
        yield Drop(commit.round, exclusion.peer, "excluded", exclusion.reason)
    for c in commit.contributors:
        if c.factor == 0.0:
            why = c.reason or "the spec's rule gave its contribution no weight"
            yield Drop(commit.round, c.peer, "screened out", why)
        elif c.missing:
            num_parts = sum(stop - first for first, stop in c.missing)
            parts = f"{num_parts} part{'s' if num_parts != 1 else ''} missing"
            yield Drop(commit.round, c.peer, "in part", f"{parts}: {c.reason or 'it stopped sending'}")


def _missing(commit: Commit, before: Chain) -> list[str]:
    """Took part in the fusion before, rolled back or not; neither in this one, nor told to stay out of it."""
    missing = before.cohort - commit.cohort - {exclusion.peer for exclusion in commit.excluded}
    return sorted(missing - before.left_out.keys()) if missing else []


def _why_absent(
    commit: Commit, before: Chain, record: PeerRecord | None, back_in: int | None, now: float
) -> str | None:
    """None where it may be that the peer was just not drawn, as the round was full."""
    if back_in is None and record is not None and (gone := _why_gone(record, commit, now)) is not None:
        return gone
    if len(commit.contributors) >= before.spec.max_peers:
        return None
    if back_in is not None:
        return f"not in this round; back in round {back_in}"
    if record is not None and record.phase == "paused":
        return "paused"
    if before.is_rolled_back:
        return f"not in this round, the first after one was undone: {before.commits[-1].commit.reason}"
    return "not in this round"


def _why_gone(record: PeerRecord, commit: Commit, now: float) -> str | None:
    """A heartbeat issued after the round was proposed says nothing of then: its peer was still there."""
    if record.issued_at > commit.committed_at + CLOCK_DIFFERENCE_SECONDS:
        return None
    if record.phase == "leaving":
        return "left"
    return "silent: its heartbeats ended before this round" if record.expires_at <= now else None
