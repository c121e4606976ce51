"""Are figures judged as they should be? Numbers worked by hand, no I/O."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coordinator.departures import Knocked
from coordinator.dial_back import DialledBack
from coordinator.errors import NetworkError, StateError, SwarmError
from peer.checkup import (
    Batch,
    Check,
    ClockSample,
    DataFigures,
    Device,
    EntryPoint,
    ModelSize,
    Package,
    Reach,
    RoundBudget,
    SwarmFigures,
    activations_bytes,
    disk_needed,
    exit_code,
    failed,
    heartbeat_sample,
    judge_clock,
    judge_data,
    judge_device,
    judge_disk,
    judge_entries,
    judge_lengths,
    judge_memory,
    judge_model,
    judge_packages,
    judge_python,
    judge_reach,
    judge_round,
    judge_speed,
    judge_swarm,
    judge_traffic,
    memory_needed,
    raise_failure,
    round_bytes,
    scope_of,
    short_address,
)

MILLION = ModelSize(num_parameters=1_000_000, num_state_values=1_000_000, files_bytes=0, is_lossy=False)
MINILM = ModelSize(22_700_000, 22_700_000, 0, is_lossy=False)
PEER = "12D3KooWE2Td3QWx8SxYXLZVokVWim2q2utupLYnfYAtyXzZ9dHu"


def test_the_exit_code_is_that_of_the_worst() -> None:
    ok, warning, failure = (Check("x", status, "") for status in ("ok", "warning", "failure"))
    assert exit_code([ok, ok]) == 0
    assert exit_code([ok, warning]) == 1
    assert exit_code([failure, warning, ok]) == 2


@pytest.mark.parametrize(
    ("name", "error"),
    [("disk", StateError), ("output", StateError), ("clock", NetworkError), ("memory", SwarmError)],
)
def test_join_ends_with_the_code_of_the_first_failure(name: str, error: type[SwarmError]) -> None:
    raise_failure([Check("a", "warning", "so so")])
    with pytest.raises(error, match=f"{name}: none left; buy some") as caught:
        raise_failure([Check("a", "ok", ""), Check(name, "failure", "none left", "buy some")])
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("a.csv, line 3: no label. Fill it in.", "a.csv, line 3: no label", "Fill it in."),
        ("no model; give one", "no model", "give one"),
        ("none answers:\n  ADDR: refused", "none answers:", "  ADDR: refused"),
        ("version 2.6 is old", "version 2.6 is old", ""),
    ],
)
def test_an_error_is_cut_into_what_is_wrong_and_what_to_do(text: str, message: str, fix: str) -> None:
    assert failed("x", text) == Check("x", "failure", message, fix)


# ---- this machine


def test_versions() -> None:
    assert judge_python("3.11.7", ">=3.11").status == "ok"
    assert judge_python("3.10.9", ">=3.11").status == "failure"
    good = [Package("torch>=2.6", "2.9.1+cu128"), Package("hivemind==1.1.12", "1.1.12")]
    assert judge_packages(good).status == "ok"
    check = judge_packages([*good, Package("numpy>=2.0", "1.26.4"), Package("rich>=13.7", None)])
    assert (check.status, check.message) == ("failure", "not as needed: numpy 1.26.4, rich missing")
    assert check.fix == "pip install 'numpy>=2.0' 'rich>=13.7'"


def test_disk_by_hand() -> None:
    # Three checkpoints of state and kept delta, 8 MB each, and four exports of 4 MB.
    assert disk_needed(MILLION) == 3 * 8_000_000 + 4 * 4_000_000
    # Compressed: two residuals of 4 MB more in each checkpoint. Adam: two buffers more in each state.
    assert disk_needed(dataclasses.replace(MILLION, is_lossy=True)) == 64_000_000
    assert disk_needed(dataclasses.replace(MILLION, num_state_values=3_000_000)) == 64_000_000
    assert disk_needed(dataclasses.replace(MILLION, files_bytes=1_000)) == 40_006_000


@pytest.mark.parametrize(
    ("free", "used", "status"),
    [
        (39_999_999, 0, "failure"),
        (40_000_000, 0, "warning"),
        (60_000_000, 0, "ok"),
        (10_000_000, 30_000_000, "warning"),  # what an earlier start wrote is replaced
        (0, 40_000_000, "ok"),
    ],
)
def test_disk(free: int, used: int, status: str) -> None:
    check = judge_disk(free, used, MILLION)
    assert check.status == status
    assert bool(check.fix) == (status != "ok")


def test_activations_by_hand() -> None:
    # 10 tokens in 2 layers: 20 times 74 bytes for each of 5 values, 12 for each of 3 heads and 10 tokens.
    batch = Batch(num_texts=1, num_tokens=10, num_layers=2, hidden_size=5, num_heads=3)
    assert activations_bytes(batch) == 20 * (74 * 5 + 12 * 30)
    assert activations_bytes(batch, on_gpu=True) == 20 * 74 * 5
    assert activations_bytes(dataclasses.replace(batch, num_texts=7)) == 7 * activations_bytes(batch)


@pytest.mark.parametrize(
    ("batch", "saved_mb"),
    [
        (Batch(32, 128, 6, 384, 12), 1152),
        (Batch(8, 128, 12, 768, 12), 916),
        (Batch(8, 512, 6, 384, 12), 2511),
        (Batch(4, 256, 6, 384, 6), 288),
        (Batch(32, 32, 6, 384, 12), 203),
    ],
)
def test_activations_are_those_that_autograd_saves(batch: Batch, saved_mb: int) -> None:
    """Bytes of all tensors that `saved_tensors_hooks` gave of one step, parameters left out."""
    assert activations_bytes(batch) == pytest.approx(1e6 * saved_mb, rel=0.015)


SMALL = Batch(num_texts=10, num_tokens=100, num_layers=10, hidden_size=100, num_heads=5)  # 134 MB


def test_memory_by_hand() -> None:
    # 500 MB of libraries, 16 bytes a parameter, 0.3 of the activations; all of them, and 30 bytes more.
    assert activations_bytes(SMALL) == 134_000_000
    assert memory_needed(MILLION, SMALL) == (556_200_000, 680_000_000)
    assert memory_needed(MILLION, SMALL, on_gpu=True) == (500_000_000, 530_000_000)
    adam = dataclasses.replace(MILLION, num_state_values=3_000_000)
    assert memory_needed(adam, SMALL) == (556_200_000, 680_000_000 + 3 * 8_000_000)
    finetuning = 1157 * 2**20  # measured with 22.7M parameters and texts of all lengths, docs/experiments.md
    assert memory_needed(MINILM, Batch())[0] == pytest.approx(finetuning, rel=0.01)


@pytest.mark.parametrize(
    ("available", "status"), [(556_199_999, "failure"), (556_200_000, "warning"), (680_000_000, "ok")]
)
def test_memory(available: int, status: str) -> None:
    assert judge_memory(available, MILLION, SMALL).status == status


def test_the_flags_that_the_fix_names_change_the_verdict() -> None:
    available = 8_000_000_000
    check = judge_memory(available, MINILM, Batch(num_texts=256, num_tokens=512))
    assert check.status == "failure"
    assert "lower --batch-size and --max-length" in check.fix
    assert judge_memory(available, MINILM, Batch(num_texts=32, num_tokens=512)).status == "warning"
    assert judge_memory(available, MINILM, Batch(num_texts=32, num_tokens=128)).status == "ok"


def test_device() -> None:
    cpu = Device("cpu", is_gpu=False, num_threads=2, has_bf16=False)
    assert judge_device(cpu, MILLION, SMALL, None).message == "cpu, 2 threads, float32"
    assert judge_device(cpu, MILLION, SMALL, wants_bf16=True).status == "warning"
    # 16 MB of parameters, and 74 MB of activations: 10 x 100 tokens x 10 layers x 100 values x 74 bytes.
    gpu = Device("A GPU", is_gpu=True, num_threads=2, has_bf16=True, free_bytes=90_000_000)
    assert judge_device(gpu, MILLION, SMALL, None).message == "A GPU, bfloat16"
    assert judge_device(gpu, MILLION, SMALL, wants_bf16=False).message == "A GPU, float32"
    tight = judge_device(dataclasses.replace(gpu, free_bytes=89_999_999), MILLION, SMALL, None)
    assert (tight.status, "--batch-size" in tight.fix) == ("warning", True)
    full = dataclasses.replace(gpu, free_bytes=38_199_999)
    assert judge_device(full, MILLION, SMALL, None).status == "failure"
    assert judge_device(full, MILLION, dataclasses.replace(SMALL, num_texts=1), None).status == "ok"
    assert judge_device(full, None, SMALL, None).status == "ok"


# ---- the data


def figures(**changes: Any) -> DataFigures:
    values: dict[str, Any] = {
        "kind": "classification",
        "is_pair": False,
        "num_train": 800,
        "num_validation": 100,
        "num_test": 100,
        "train_counts": {"no": 500, "yes": 300},
        "validation_counts": {"no": 60, "yes": 40},
        "num_overlap": 0,
    }
    return DataFigures(**{**values, **changes})


def warned(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.status != "ok"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"num_validation": 49}, ["data"]),
        ({"num_overlap": 2}, []),  # 1% of 200
        ({"num_overlap": 3}, ["duplicates"]),
        ({"train_counts": {"no": 799, "yes": 1}}, ["classes"]),
        ({"validation_counts": {"no": 100}}, ["classes"]),
        ({"kind": "regression", "train_counts": {}, "validation_counts": {}}, []),
        ({"notes": ("a.csv: 3 examples without text dropped (lines 2, 5 and 8)",)}, ["rows"]),
        ({"notes": ("guessed columns: text = 'review'", "validation: 4 examples cut")}, []),
    ],
)
def test_data(changes: dict[str, Any], names: list[str]) -> None:
    assert warned(judge_data(figures(**changes))) == names


def test_a_class_with_one_row_is_named_without_what_it_could_do_to_a_terminal() -> None:
    [check] = [c for c in judge_data(figures(train_counts={"no": 9, "\x1b[31m": 1})) if c.name == "classes"]
    assert check.message == "one training row only: '?[31m'"


@pytest.mark.parametrize(("num_cut", "status"), [(0, "ok"), (20, "ok"), (21, "warning")])
def test_lengths(num_cut: int, status: str) -> None:
    assert judge_lengths(100, num_cut, 128, 300, 100).status == status


def test_lengths_of_some_rows_are_not_told_as_of_all() -> None:
    assert (
        judge_lengths(100, 3, 128, 300, 100).message == "3 of 100 rows are cut at 128 tokens (longest: 300)"
    )
    assert "raise --max-length" in judge_lengths(100, 50, 128, 600, 100).fix
    assert "takes no longer ones" in judge_lengths(100, 50, 512, 600, 100, can_raise=False).fix
    some = judge_lengths(100, 3, 128, 300, 5000)
    assert some.message == "3 of the first 100 rows are cut at 128 tokens (longest: 300)"
    assert some.figures["num_in_all"] == 5000
    none = judge_lengths(100, 0, 128, 99, 5000)
    assert none.message == "none of the first 100 rows is cut at 128 tokens (longest: 99)"


def test_classes_are_named_cut_and_cleaned() -> None:
    names = ("no", "\x1b[31mred", "a label of many words", "yes")
    counts = dict.fromkeys(names, 200)
    [check] = [
        c for c in judge_data(figures(train_counts=counts, validation_counts=counts)) if c.name == "classes"
    ]
    assert check.message == "'no', '?[31mred', 'a label of …' and 1 more; the smallest has 200 rows"


# ---- the swarm

LIVE, DEAD = f"/ip4/10.0.0.1/tcp/4001/p2p/{PEER}", f"/ip4/10.0.0.2/tcp/4001/p2p/{PEER}"


RUN, OTHER_RUN = "ab" * 32, "cd" * 32
WELL, GONE = EntryPoint(LIVE, None, RUN), EntryPoint(DEAD, "connection refused")
SILENT, ELSEWHERE = EntryPoint(DEAD), EntryPoint(DEAD, None, OTHER_RUN)
REFUSING = EntryPoint(DEAD, None, None, is_refusing=True)


@pytest.mark.parametrize(
    ("entry", "beside_one_that_is_well", "alone", "said"),
    [
        (WELL, "ok", "ok", " answers"),
        (GONE, "warning", "failure", ": connection refused"),
        (SILENT, "warning", "warning", ": connected, but silent"),
        (ELSEWHERE, "warning", "failure", ": in another run, cdcdcdcd"),
        (REFUSING, "warning", "failure", ": it does not let you in"),
    ],
)
def test_each_entry_point_is_named_and_one_that_is_well_is_enough(
    entry: EntryPoint, beside_one_that_is_well: str, alone: str, said: str
) -> None:
    first, second = judge_entries([WELL, entry], wanted=RUN)
    assert (first.status, second.status) == ("ok", beside_one_that_is_well)
    [check] = judge_entries([entry], wanted=RUN)
    assert (check.status, bool(check.fix)) == (alone, alone != "ok")
    assert check.message == f"{short_address(entry.address)}{said}"


def test_peers_met_before_are_one_line() -> None:
    [check] = judge_entries([], [WELL, GONE, SILENT, ELSEWHERE], RUN)
    assert (check.status, check.message) == ("ok", "1 of 4 addresses of peers met before answer")
    [check] = judge_entries([], [GONE, SILENT], RUN)
    assert (check.status, check.fix) == ("warning", "you would go on alone: give --initial-peers")
    given, met = judge_entries([GONE], [WELL], RUN)
    assert (given.status, met.status) == ("warning", "ok")


def test_a_run_that_is_over_is_told() -> None:
    swarm = SwarmFigures("emotions", "c0ffee11" * 8, round=2, num_rounds=3, num_trainers=4, min_peers=2)
    assert judge_swarm(swarm).message == "emotions c0ffee11, round 2/3; 4 train, quorum 2"
    assert judge_swarm(dataclasses.replace(swarm, round=3)).status == "warning"


def test_a_heartbeat_bounds_the_clock_of_its_author() -> None:
    # Issued at 100 by its author, seen at 103 by mine, at most 2 s old: its clock is 1 to 3 s behind mine.
    assert heartbeat_sample(100.0, 103.0, 2.0) == ClockSample(-3.0, -1.0)


def exactly(*seconds: float) -> list[ClockSample]:
    return [ClockSample(s, s) for s in seconds]


@pytest.mark.parametrize(
    ("samples", "status", "said"),
    [
        (exactly(0.1), "ok", "within 0.1 s of the clocks of 1 peer"),
        (exactly(-2.0), "ok", "within 2.0 s"),
        (exactly(2.1), "warning", "2.1 s behind 1 peer; above 2 s"),
        (exactly(-10.0), "warning", "10.0 s ahead of 1 peer; above 2 s"),
        (exactly(10.1), "failure", "10.1 s behind 1 peer; at most 10 s"),
        (exactly(-30.0, -29.0), "failure", "29.5 s ahead of 2 peers"),
        (exactly(0.0, 500.0, 0.2), "ok", "within 0.2 s of the clocks of 3 peers"),  # one of them is wrong
        ([ClockSample(-12.0, 0.5)], "ok", "within 12.0 s"),  # an old heartbeat proves nothing
        ([ClockSample(-20.0, -13.0)], "failure", "13.0 s ahead of 1 peer"),
        ([], "failure", "their heartbeats are not seen"),
    ],
)
def test_clock(samples: list[ClockSample], status: str, said: str) -> None:
    check = judge_clock(samples)
    assert check.status == status
    assert said in check.message
    assert ("timedatectl" in check.fix) == (status != "ok")


def reach(**changes: Any) -> Reach:
    values: dict[str, Any] = {
        "listens": True,
        "reachability": "unknown",
        "answered": frozenset({"private"}),
        "unanswered": (),
        "entry_scopes": frozenset({"private"}),
    }
    return Reach(**{**values, **changes})


def dialled_back(*said: tuple[str, Knocked]) -> dict[str, Any]:
    return {"dialled_back": tuple(DialledBack(host, 4001, knocked) for host, knocked in said)}


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", "in your local network, as the swarm is"),
        ({"entry_scopes": frozenset()}, "ok", "in your local network"),
        ({"answered": frozenset({"public"}), "entry_scopes": frozenset({"public"})}, "ok", "public address"),
        ({"entry_scopes": frozenset({"public"})}, "warning", "behind a router (NAT)"),
        ({"answered": frozenset({"loopback"})}, "warning", "on this machine only, but the swarm"),
        (
            {"answered": frozenset({"loopback"}), "entry_scopes": frozenset({"loopback"})},
            "ok",
            "this machine",
        ),
        (
            {"answered": frozenset(), "unanswered": (DEAD,)},
            "failure",
            "nobody answers at your own 10.0.0.2:4001",
        ),
        ({"listens": False, "answered": frozenset()}, "warning", "client mode"),
        ({"reachability": "private", "answered": frozenset()}, "warning", "no entry point relays"),
        ({"reachability": "private", "answered": frozenset({"relay"})}, "ok", "through the relay"),
        ({"listens": False, "answered": frozenset({"relay"})}, "ok", "through the relay"),
        (dialled_back(("8.8.8.8", "open")), "ok", "a peer dialled you back at 8.8.8.8:4001"),
        (dialled_back(("8.8.8.8", "silent"), ("8.8.8.8", "open")), "ok", "at 8.8.8.8:4001"),
        (dialled_back(("10.0.0.3", "open")), "ok", "4001 in your local network"),
        (dialled_back(("2001:4860::8", "refused")), "warning", "it is refused there"),
        # Within the own network it can be dialled; that the others cannot is what counts.
        (
            dialled_back(("10.0.0.3", "open"), ("8.8.8.8", "silent")),
            "warning",
            "8.8.8.8:4001, nothing answers",
        ),
        (dialled_back(("127.0.0.1", "refused")), "ok", "as the swarm is"),  # on this machine: no proof
    ],
)
def test_reach(changes: dict[str, Any], status: str, said: str) -> None:
    check = judge_reach(reach(**changes))
    assert check.status == status
    assert said in check.message
    assert bool(check.fix) == (status != "ok")


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        ("/ip4/127.0.0.1/tcp/1", "loopback"),
        ("/ip6/::1/tcp/1", "loopback"),
        ("/ip4/192.168.1.7/tcp/1", "private"),
        ("/ip4/100.64.0.9/tcp/1", "private"),  # a provider's NAT (RFC 6598)
        ("/ip4/8.8.8.8/tcp/1", "public"),
        ("/dns4/example.org/tcp/1", "public"),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}", "relay"),
    ],
)
def test_scope_of_an_address(address: str, scope: str) -> None:
    assert scope_of(address) == scope


def test_a_short_address_tells_entry_points_apart() -> None:
    assert short_address(LIVE) == "10.0.0.1:4001 …yXzZ9dHu"
    assert short_address(f"/ip6/::1/tcp/4001/p2p/{PEER}") == "::1:4001 …yXzZ9dHu"
    relayed = f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert short_address(relayed) == "10.0.0.1:1 by relay …yXzZ9dHu"


# ---- a round


def budget(**changes: Any) -> RoundBudget:
    values: dict[str, Any] = {
        "num_examples": 1200,
        "seconds": None,
        "limit_seconds": 1800.0,
        "part_bytes": 90_000_000,
        "num_peers": 2,
        "num_scored": 300,
    }
    return RoundBudget(**{**values, **changes})


def test_seconds_of_a_round_by_hand() -> None:
    # 1200 examples at 10/s are 120 s; 600 rows scored at three times that rate are 20 s.
    assert judge_speed(10.0, budget()).figures["round_seconds"] == 140.0
    # 60 s end before the examples do.
    assert judge_speed(10.0, budget(seconds=60.0)).figures["round_seconds"] == 80.0
    assert judge_speed(10.0, budget(num_examples=None, seconds=60.0)).figures["round_seconds"] == 80.0


@pytest.mark.parametrize(
    ("rate", "limit", "status"), [(10.0, 140.0, "ok"), (10.0, 139.0, "warning"), (0.9, 1e6, "warning")]
)
def test_speed(rate: float, limit: float, status: str) -> None:
    assert judge_speed(rate, budget(limit_seconds=limit)).status == status


@pytest.mark.parametrize(("num_peers", "expected"), [(1, 0), (2, 90_000_000), (4, 135_000_000)])
def test_bytes_of_a_round_by_hand(num_peers: int, expected: int) -> None:
    # Of n peers each sends (n - 1)/n of its delta to reducers, and as much of results to the others.
    assert round_bytes(budget(num_peers=num_peers)) == expected


def test_traffic() -> None:
    assert judge_traffic(None, budget()).message == "90.0 MB each way a round of 2 peers; rate not measured"
    fast = judge_traffic(9_000_000.0, budget())
    assert (fast.status, fast.figures["seconds"]) == ("ok", 10.0)
    assert fast.message == "90.0 MB each way a round of 2 peers, 10 s at 72 Mbit/s"
    assert judge_traffic(90_000.0, budget()).status == "warning"  # 1000 s, more than half of the limit


def test_traffic_waits_for_the_slower_direction() -> None:
    slow = budget(upload_bytes_per_second=125_000.0)  # --max-upload-mbps 1
    held = judge_traffic(9_000_000.0, slow)
    assert held.message == "90.0 MB each way a round of 2 peers, 12 min 0 s at 1 Mbit/s up"
    assert (held.status, held.figures["seconds"]) == ("ok", 720.0)
    assert judge_traffic(None, slow).figures["seconds"] == 720.0  # also where nobody could be asked
    late = judge_traffic(9_000_000.0, budget(upload_bytes_per_second=90_000.0))
    assert (late.status, "raise --max-upload-mbps" in late.fix) == ("warning", True)
    assert judge_traffic(100_000.0, slow).message.endswith("at 0.8 Mbit/s")
    alone = judge_traffic(None, budget(num_peers=1, upload_bytes_per_second=125_000.0))
    assert alone.figures["seconds"] == 0.0


def test_a_round_in_all_by_hand() -> None:
    # 140 s of work, as above, and 90 MB at 9 MB/s; or at 1 Mbit/s, which is 0.125 MB/s.
    in_all = judge_round(10.0, 9_000_000.0, budget())
    assert (in_all.status, in_all.figures["seconds"]) == ("ok", 150.0)
    assert in_all.message == "about 2 min 30 s in all, 90.0 MB each way"
    assert (
        judge_round(10.0, 9_000_000.0, budget(upload_bytes_per_second=125_000.0)).figures["seconds"] == 860.0
    )
    unknown = judge_round(10.0, None, budget())
    assert unknown.figures == {"seconds": 140.0, "bytes_each_way": 90_000_000, "is_traffic_measured": False}
    assert unknown.message == "about 2 min 20 s and the traffic, 90.0 MB each way"


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("here", "ok"),
        ("peers", "ok"),
        ("new", "ok"),
        ("other files", "warning"),
        ("other weights", "warning"),
    ],
)
def test_model(source: Any, status: str) -> None:
    check = judge_model("sentence-transformers/all-MiniLM-L6-v2", 22_700_000, source)
    assert check.status == status
    assert check.message.startswith("all-MiniLM-L6-v2, 22.7M: ")


def test_lines_are_short_enough_for_80_columns() -> None:
    checks = [
        *judge_data(figures()),
        *judge_entries([WELL], wanted=RUN),
        judge_swarm(SwarmFigures("emotions-of-2026", "0" * 64, 29, 30, 12, 3)),
        judge_clock(exactly(0.1)),
        judge_memory((9e9).__int__(), MINILM, Batch()),
        judge_disk((9e9).__int__(), 0, MINILM),
        judge_speed(4.95, budget()),
        judge_traffic(2e7, budget()),
        judge_round(4.95, 2e7, budget()),
        judge_model("all-MiniLM-L6-v2", 22_700_000, "here"),
        judge_reach(reach()),
    ]
    too_long = [check.message for check in checks if len(check.message) > 58]
    assert not too_long
