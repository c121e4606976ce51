"""Has a round made its members worse, and who is left out of the next one? Decisions, all of them pure.

    own held-out rows -> one bit per member -> verdict of the round -> who is left out -> roll-back

**The bit.** A member fits a linear head to the features of the new state and of the *previous state*, and
compares the two on its own held-out rows, row by row. It rejects only what is worse beyond the noise of so
many rows: a one-sided paired test at a small level. (Not compared with the own finetuned backbone: that is
better on the own task almost always, and says nothing about the round.)

**The verdict.** More than `gate_share` of the votes reject; and votes came from more than half of the
round's members, and from `gate_min_voters` at least. Silence accepts.

What liars can do with votes, with the default share. A round is undone by more than half of its members if
all vote, by more than a quarter if just over half do. So of 8:

- one liar that rejects needs 2 honest rejections if 5 vote, 4 if all do. In a round that is no worse an
  honest member rejects with a probability of at most `gate_level` = 0.01: 6 in 10,000 if 4 honest ones of 7
  vote, 4 in 10,000,000 if all do
- two liars need 1 honest rejection of 3 if 5 vote: 3%; 3 of 6 if all do: 2 in 100,000
- three liars undo any round in which no more than 2 honest members vote; so silence is what helps liars. They
  can hold up the run `gate_max_rollbacks` times in a row, then a round stands
- liars that accept a harmful state need half of the votes: 4 of 8; three do not save it if all others reject
- a verdict is no proof, so nobody is banned for it, and a roll-back takes the majority of the electorate as
  every commit does: each member comes to the verdict, and to who is left out, by itself

**Who is left out.** The contribution that is far longer than the others, else the one whose direction has
least in common with theirs. That is a guess, so it lasts for some rounds only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, wilcoxon

from coordinator.records import Contribution, Exclusion
from peer.aggregate import TOO_LONG
from peer.tasks import TaskKind

Array = NDArray[Any]
_FAR_OFF = 1e30  # a squared error that is not finite: worse than any other


@dataclass(frozen=True)
class Verdict:
    """What the votes on one round come to."""

    is_rejected: bool
    num_rejections: int
    num_votes: int
    num_members: int  # who made the round, and so could vote


def p_value(kind: TaskKind, before: Array, after: Array) -> float:
    """How likely noise alone makes the errors after a round so much larger than before it, 0 to 1.

    before, after: (n,) errors of the same rows: 0 or 1 for a classification, squared errors for a regression.
    One-sided and paired: exact McNemar test (McNemar 1947; exact form of Mosteller 1952) of the rows that
    were right and are wrong against those that were wrong and are right; for a regression the signed-rank
    test (Wilcoxon 1945) of the differences. Raises ValueError when the rows are not the same.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"errors of different rows: {before.shape} and {after.shape}")
    if kind == "classification":
        lost, gained = int(np.sum(after > before)), int(np.sum(after < before))
        if lost + gained == 0:
            return 1.0
        return float(binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue)
    differences = _finite(after) - _finite(before)
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences, alternative="greater").pvalue)


def rejects(kind: TaskKind, before: Array, after: Array, level: float) -> bool:
    """A member's bit: whether the state after the round is worse beyond noise."""
    return p_value(kind, before, after) < level


def verdict(
    members: Collection[str],
    votes: Mapping[str, bool],
    *,
    share: float,
    min_voters: int,
    is_over: bool,
) -> Verdict | None:
    """None while votes that are still to come may change it; `is_over`: none will.

    votes: peer -> whether it rejects; of others than the members they do not count.
    """
    counted = [rejected for peer, rejected in votes.items() if peer in members]
    num_rejections, num_votes, num_members = sum(counted), len(counted), len(members)
    needed = max(min_voters, num_members // 2 + 1)
    num_to_come = 0 if is_over else num_members - num_votes

    def is_rejected(rejections: int, voters: int) -> bool:
        return voters >= needed and rejections > share * voters

    # Every vote to come may be either way, or none. It is rejected whatever comes if it is with no more votes
    # and with acceptances only; it is not if even rejections only do not suffice.
    most_votes = num_votes + num_to_come
    is_certain = is_rejected(num_rejections, num_votes) and is_rejected(num_rejections, most_votes)
    if not is_certain and is_rejected(num_rejections + num_to_come, most_votes):
        return None
    return Verdict(is_certain, num_rejections, num_votes, num_members)


def most_deviant(
    contributions: Sequence[Contribution], gram: Array | None, *, min_left: int
) -> Exclusion | None:
    """Whom to leave out after a round was undone; None where nothing tells the contributions apart.

    contributions: of the commit, in its order. gram: (n, n) float64 inner products in the same order, of what
    each delivered (NaN: it did not count); the same bits on every member, so all choose the same. Who
    kept back a part is not safe by that: its cosines are nearer to 0, on the same side. At least `min_left`
    contributors stay. First whose norm is over three times the median; then whose median cosine to the others
    is lowest. (Medians, as for screening: liars cannot turn them by being long.)
    """
    if len(contributions) - 1 < max(min_left, 2) or gram is None or len(gram) != len(contributions):
        return None
    lengths = [math.sqrt(gram[i, i]) if gram[i, i] > 0 else 0.0 for i in range(len(gram))]  # 0 for a NaN
    usable = [i for i, length in enumerate(lengths) if length > 0]
    if len(usable) < 3:  # of two each is as far from the other
        return None
    return _too_long(contributions, lengths, usable) or _least_alike(contributions, gram, lengths, usable)


def _too_long(
    contributions: Sequence[Contribution], lengths: Sequence[float], usable: Sequence[int]
) -> Exclusion | None:
    median = _lower_median([lengths[i] for i in usable])
    longest = max(usable, key=lambda i: lengths[i])
    if lengths[longest] <= TOO_LONG * median:
        return None
    why = f"norm {lengths[longest]:.3g} in a round that was undone, the median is {median:.3g}"
    return Exclusion(peer=contributions[longest].peer, reason=why)


def _least_alike(
    contributions: Sequence[Contribution], gram: Array, lengths: Sequence[float], usable: Sequence[int]
) -> Exclusion:
    cosines = {}
    for i, j in itertools.combinations(usable, 2):
        cosines[i, j] = cosines[j, i] = float(gram[i, j]) / (lengths[i] * lengths[j])
    towards = {i: _lower_median([cosines[i, j] for j in usable if j != i]) for i in usable}
    lowest = min(usable, key=lambda i: towards[i])
    middle = _lower_median(list(towards.values()))
    why = (
        f"median cosine {towards[lowest]:.3f} to the others in a round that was undone, "
        f"the round's is {middle:.3f}"
    )
    return Exclusion(peer=contributions[lowest].peer, reason=why)


def _lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def _finite(errors: Array) -> Array:
    """Float64; what is not finite or too large to be squared errors of anything is as bad as can be."""
    values = np.nan_to_num(errors.astype(np.float64), nan=_FAR_OFF, posinf=_FAR_OFF)
    return np.minimum(values, _FAR_OFF)
