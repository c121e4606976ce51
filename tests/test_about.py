"""Does a peer say of itself what it was told to, and no more?"""

from __future__ import annotations

import pytest

from coordinator.about import AboutPeer, Scores
from coordinator.outgoing import Sent
from peer.about import About, device_name, tidy_name
from peer.display import Accuracy

MEASURED = Accuracy(base=0.5, own=0.75, fused=0.62512)


def test_scores_are_kept_back_unless_the_person_agreed() -> None:
    silent, open_ = About("Ada", "cpu", False), About("Ada", "cpu", True)
    for about in (silent, open_):
        about.scored(3, "accuracy", MEASURED)
    assert silent.record() == AboutPeer(name="Ada", device="cpu")
    scores = open_.record().scores
    assert scores == Scores(round=3, metric="accuracy", base=0.5, own=0.75, fused=0.6251)


def test_what_was_not_measured_is_not_told() -> None:
    about = About("", "cpu", True)
    about.scored(1, "accuracy", Accuracy(base=float("nan"), own=None, fused=-0.5))
    assert about.record().scores == Scores(round=1, metric="accuracy", fused=-0.5)


def test_progress_is_that_of_the_phase_and_ends_with_it() -> None:
    about = About("", "cpu", False)
    seen: list[float] = []
    follow = about.following(seen.append)
    told = []
    for fraction in (0.0, 0.12345, 1.0):
        follow(fraction)
        told.append(about.record().progress)
    assert seen == [0.0, 0.12345, 1.0]
    assert told == [0.0, 0.123, None]
    follow(0.5)
    about.finetuned(100, 8.0)
    assert (about.record().progress, about.record().examples_per_second) == (None, 12.5)
    about.finetuned(0, 8.0)
    assert about.record().examples_per_second is None


def test_bytes_are_those_of_the_ledger_and_of_what_came() -> None:
    about = About("", "cpu", False)
    recorded: list[Sent] = []
    record = about.counting(recorded.append)
    for num_bytes in (3, 5):
        record(Sent("call", "", "P", num_bytes, bytes(32)))
    about.received(7)
    about.received(4)
    assert [sent.num_bytes for sent in recorded] == [3, 5]
    assert (about.record().bytes_sent, about.record().bytes_received) == (8, 11)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Ada's laptop", "Ada's laptop"),
        ("  two \n lines\x1b[31m ", "two lines [31m"),
        ("a\u202eb", "a b"),
        ("x" * 50, "x" * 40),
        ("x" * 39 + " y", "x" * 39),
        ("\x00", ""),
        ("", ""),
    ],
)
def test_a_name_is_one_short_line(given: str, name: str) -> None:
    assert tidy_name(given) == name
    assert About(given, given, False).record().name == name


def test_the_device_is_named() -> None:
    assert device_name(use_cpu=True) == "cpu"
