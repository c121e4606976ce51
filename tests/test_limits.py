"""Does a budget let an honest peer through, make a busy one wait, and cut off a flood? Numbers by hand."""

from __future__ import annotations

import pytest

from coordinator.limits import MAX_PEERS_REMEMBERED, Bucket, Budget, Limiter, OpenStreams, Rate, Refusal

RATE = Rate(per_second=10.0, burst=3.0, max_delay_seconds=0.5)
WIDE = Rate(per_second=1e6, burst=1e6, max_delay_seconds=1.0)


def limiter(max_refused: int = 2, total: Rate = WIDE) -> Limiter:
    return Limiter(Budget(RATE, total, max_refused=max_refused, cut_off_seconds=30.0), 0.0)


def test_a_bucket_by_hand() -> None:
    bucket = Bucket(RATE, 0.0)
    delays = []
    for _ in range(8):
        delays.append(bucket.delay(0.0))
        bucket.take(1.0)
    assert delays[:3] == [0.0, 0.0, 0.0]  # the burst
    assert delays[3:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert bucket.delay(0.0) is None  # 0.6 s would be too long
    assert bucket.delay(0.1) == pytest.approx(0.5)  # one token has come back
    assert bucket.delay(100.0) == 0.0


def test_a_large_request_is_served_and_what_follows_waits() -> None:
    bucket = Bucket(RATE, 0.0)
    assert bucket.delay(0.0) == 0.0
    bucket.take(6.0)  # level -3: the next one token is there after 0.4 s
    assert bucket.delay(0.0) == pytest.approx(0.4)
    bucket.take(100.0)
    assert bucket.delay(0.0) is None


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = Bucket(RATE, 100.0)
    bucket.take(3.0)
    assert bucket.delay(50.0) == pytest.approx(0.1)
    assert bucket.delay(100.0) == pytest.approx(0.1)


def admitted(limiter: Limiter, peer_id: str, num_calls: int, now: float) -> int:
    return sum(isinstance(limiter.admit(peer_id, now), float) for _ in range(num_calls))


def test_what_an_answer_cost_is_waited_for() -> None:
    calls = limiter(max_refused=10_000)
    assert calls.admit("a", 0.0) == 0.0  # a level of 2
    calls.charge("a", 0.0, 5.0)  # -3: the next token is there after 0.4 s
    assert calls.admit("a", 0.0) == pytest.approx(0.4)
    assert not calls.is_overdrawn("a", 0.0)
    calls.charge("a", 0.0, 2.0)  # -6: 0.7 s are too long
    assert calls.is_overdrawn("a", 0.0)
    assert isinstance(calls.admit("a", 0.0), Refusal)
    assert calls.admit("b", 0.0) == 0.0
    assert not calls.is_overdrawn("a", 0.3)
    assert calls.admit("a", 0.3) == pytest.approx(0.4)


def test_one_peers_flood_costs_another_nothing() -> None:
    calls = limiter(max_refused=10_000)
    assert admitted(calls, "flood", 10_000, 0.0) == 3 + 5  # the burst, and those that may wait
    assert [calls.admit("honest", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_who_is_refused_too_often_is_cut_off_for_a_while_even_if_it_slows_down() -> None:
    calls = limiter(max_refused=2)
    verdicts = [calls.admit("flood", 0.0) for _ in range(8 + 3)]
    assert [v.is_cut_off for v in verdicts[8:] if isinstance(v, Refusal)] == [False, False, True]
    late = calls.admit("flood", 29.0)
    assert isinstance(late, Refusal)
    assert late.is_cut_off
    assert calls.admit("flood", 31.0) == 0.0


def test_refusals_are_told_once_a_minute_with_their_number() -> None:
    calls = limiter(max_refused=10_000)
    admitted(calls, "flood", 8, 0.0)
    told = [calls.admit("flood", 0.0) for _ in range(100)]
    assert [v.num_unlogged for v in told if isinstance(v, Refusal)] == [1] + [0] * 99
    admitted(calls, "flood", 8, 61.0)
    later = calls.admit("flood", 61.0)
    assert isinstance(later, Refusal)
    assert later.num_unlogged == 100


def test_the_budget_of_all_refuses_without_blame() -> None:
    calls = limiter(max_refused=0, total=Rate(per_second=10.0, burst=2.0, max_delay_seconds=0.0))
    assert [calls.admit("a", 0.0), calls.admit("b", 0.0)] == [0.0, 0.0]
    refusal = calls.admit("c", 0.0)
    assert isinstance(refusal, Refusal)
    assert not refusal.is_cut_off
    assert calls.admit("c", 0.2) == 0.0


def test_what_is_remembered_of_peers_is_bounded() -> None:
    calls = limiter()
    for number in range(MAX_PEERS_REMEMBERED + 10):
        calls.admit(str(number), 0.0)
    assert len(calls._accounts) == MAX_PEERS_REMEMBERED


def test_a_few_who_hold_all_they_may_leave_room_for_the_others() -> None:
    streams = OpenStreams(max_per_peer=64, max_total=768)
    greedy = [f"greedy {index}" for index in range(12)]
    held = {peer: sum(streams.open(peer) for _ in range(100)) for peer in greedy}
    assert max(held.values()) == 64
    assert streams.total < 768 * 0.6
    assert all(streams.open("honest") for _ in range(8))
    assert not streams.open("honest")
    for _ in range(held[greedy[0]]):
        streams.close(greedy[0])
    assert streams.open("honest")  # there is room again


def test_open_streams() -> None:
    streams = OpenStreams(max_per_peer=2, max_total=6)
    assert [streams.open("a") for _ in range(3)] == [True, True, False]
    assert [streams.open("b") for _ in range(2)] == [True, False]
    streams.close("a")
    assert streams.open("b")
    for peer_id in ("a", "b", "b"):
        streams.close(peer_id)
    assert streams.total == 0
    assert not streams._open
