"""Do deadlines follow from what was measured? RFC 6298 by hand."""

from __future__ import annotations

import pytest

from coordinator.pace import MIN_BYTES_PER_SECOND, Pace, Rtt


def test_the_first_measurement_and_the_next() -> None:
    """RFC 6298, 2.2 and 2.3: 0.8 s, then 1.6 s."""
    rtt = Rtt().measured(0.8)
    assert (rtt.smoothed_seconds, rtt.deviation_seconds) == (0.8, 0.4)
    assert rtt.timeout_seconds(100.0) == pytest.approx(0.8 + 4 * 0.4)
    rtt = rtt.measured(1.6)
    assert rtt.deviation_seconds == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert rtt.smoothed_seconds == pytest.approx(0.875 * 0.8 + 0.125 * 1.6)
    assert rtt.timeout_seconds(100.0) == pytest.approx(0.9 + 4 * 0.5)


def test_floor_ceiling_and_the_unmeasured() -> None:
    assert Rtt().timeout_seconds(100.0) == 3.0
    assert Rtt().measured(0.001).timeout_seconds(100.0) == 1.0
    assert Rtt().measured(10.0).timeout_seconds(15.0) == 15.0


def test_silence_doubles_the_deadline_and_an_answer_ends_that() -> None:
    rtt = Rtt().measured(0.1)
    assert [r.timeout_seconds(100.0) for r in (rtt, rtt.timed_out(), rtt.timed_out().timed_out())] == [
        1,
        2,
        4,
    ]
    assert rtt.timed_out().timed_out().timeout_seconds(3.0) == 3.0
    assert rtt.timed_out().measured(0.1).timeout_seconds(100.0) == 1.0


def test_deadlines_of_a_round() -> None:
    pace = Pace(lease_seconds=30.0)
    for peer, seconds in (("near", 0.02), ("far", 0.5)):
        for _ in range(50):  # until the deviation has gone
            pace.measured(peer, seconds)
    assert pace.call_seconds("near") == 1.0
    assert pace.call_seconds("far", size_bytes=int(MIN_BYTES_PER_SECOND)) == pytest.approx(2.0)
    assert pace.call_seconds("never seen") == 3.0
    assert pace.leader_seconds(["near", "far"]) == 2.0
    assert pace.leader_seconds(["near", "never seen"]) == 6.0
    assert pace.rtt_seconds(["near", "far"]) == pytest.approx(0.5)
    # The others may end as much later as my exchange took, and then their votes travel.
    assert pace.vote_seconds(["near"], exchange_seconds=0.2) == pytest.approx(3.0 + 4 * 0.02)
    assert pace.vote_seconds(["near", "far"], exchange_seconds=100.0) == pytest.approx(102.0)
    # After a majority the rest has a pause of their process, or four round trips, whichever is longer.
    assert pace.grace_seconds(["near"]) == 1.0
    assert pace.grace_seconds(["near", "far"]) == pytest.approx(2.0)


def test_the_ceiling_is_half_a_lease_and_who_left_is_forgotten() -> None:
    pace = Pace(lease_seconds=10.0)
    for _ in range(5):
        pace.timed_out("a")
    assert pace.call_seconds("a") == 5.0
    pace.keep({"b"})
    assert pace.call_seconds("a") == 3.0
