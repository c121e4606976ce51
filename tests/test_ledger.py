"""Does a ledger add up, does every change of it show, and does it outlive what kills its process?"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.errors import StateError
from coordinator.network import Network
from coordinator.outgoing import About, Answer, Sent, begin_answer, describe, ignore, report
from coordinator.records import RecordError
from coordinator.streams import FrameStream, open_stream, serve_streams
from coordinator.transfer import serve_blobs
from peer.genesis import about_chunk
from peer.layout import CHUNK_SIZE_BYTES, TensorLayout, make_manifest
from peer.ledger import BrokenChainError, main, read_chain
from peer.ledger_file import LEDGER_NAME, NO_HASH, Ledger, Sums, chained, covered, joined_hash, split_line
from tests.exchanges import deltas, running_swarm
from tests.fakes import CALL_SECONDS, LOOPBACK, NOW, hash_of, network_config, new_directory
from tests.fakes import addresses as addresses_of

LAYOUT = TensorLayout(names=("a.bias", "a.weight", "b.weight"), shapes=((4,), (2, 4), (10,)))  # 4 + 8 + 10
RUN = hash_of("run")


def sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def sent(
    payload: bytes = b"x", kind: str = "call", peer_id: str = "P", at: float = NOW, **about: Any
) -> Sent:
    return Sent(kind, "", peer_id, len(payload), sha256(payload), About(**about), at)


def write(path: Path, *messages: Sent) -> Path:
    with Ledger(path / LEDGER_NAME, now=lambda: NOW) as ledger:
        ledger.know(RUN, LAYOUT)
        for message in messages:
            ledger.sent(message)
    return path


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [dict(line) for line in read_chain(directory / LEDGER_NAME).lines]


# --- sums


def test_messages_of_one_kind_become_one_line_with_the_hash_of_their_hashes() -> None:
    sums = Sums()
    for payload, peer_id, at in ((b"one", "P", NOW), (b"three", "Q", NOW + 2), (b"to", "P", NOW + 3)):
        assert sums.take(sent(payload, peer_id=peer_id, at=at), 7) is None
    assert sums.due(NOW + 59.9) == []
    (line,) = sums.due(NOW + 60)
    assert line.content(None) == {
        "time": NOW,
        "kind": "call",
        "seconds": 3.0,
        "round": 7,
        "num": 3,
        "bytes": 10,
        "peers": {"P": 5, "Q": 5},
        "sha256": hashlib.sha256(sha256(b"one") + sha256(b"three") + sha256(b"to")).hexdigest(),
    }
    assert sums.all() == []


def test_one_message_bears_its_own_hash() -> None:
    sums = Sums()
    sums.take(sent(b"one"), None)
    (line,) = sums.all()
    assert line.content(None) == {
        "time": NOW,
        "kind": "call",
        "num": 1,
        "bytes": 3,
        "peers": {"P": 3},
        "sha256": sha256(b"one").hex(),
    }


def test_parts_that_follow_each_other_are_one_slice_with_its_norm_and_tensors() -> None:
    sums = Sums()
    for start, stop, squared in ((0, 2, 9.0), (2, 6, 16.0)):
        part = sent(kind="delta part", round=3, values=(start, stop), squared_norm=squared)
        assert sums.take(part, 4) is None
    sums.take(sent(kind="delta part", peer_id="Q", round=3, values=(0, 2)), 4)
    again = sums.take(sent(kind="delta part", round=3, values=(0, 2)), 4)  # the stream broke
    assert again is not None
    content = again.content(LAYOUT)
    assert (content["round"], content["num"], content["values"]) == (3, 2, [0, 6])
    assert content["norm"] == 5.0  # sqrt(9 + 16)
    assert content["tensors"] == {"num": 2, "first": ["a.bias", [4]], "last": ["a.weight", [2, 4]]}
    assert [line.peers for line in sums.all()] == [{"Q": 1}, {"P": 1}]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 4, (1, "a.bias", "a.bias")),
        (3, 5, (2, "a.bias", "a.weight")),
        (4, 12, (1, "a.weight", "a.weight")),
        (11, 22, (2, "a.weight", "b.weight")),
        (0, 22, (3, "a.bias", "b.weight")),
    ],
)
def test_the_tensors_of_a_slice(start: int, stop: int, expected: tuple[int, str, str]) -> None:
    found = covered(LAYOUT, start, stop)
    assert (found["num"], found["first"][0], found["last"][0]) == expected


def test_values_behind_the_layout_are_of_no_tensor() -> None:
    assert covered(LAYOUT, 22, 30) == {"num": 0}


def test_tensors_are_written_sooner_than_heartbeats_and_a_clock_set_back_writes_at_once() -> None:
    sums = Sums()
    sums.take(sent(kind="delta part", values=(0, 1)), None)
    sums.take(sent(), None)
    assert [line.first.kind for line in sums.due(NOW + 5)] == ["delta part"]
    assert [line.first.kind for line in sums.due(NOW - 1)] == ["call"]


# --- the chain


def test_a_ledger_goes_on_where_an_earlier_process_ended(tmp_path: Path) -> None:
    write(tmp_path, sent(b"one"))
    write(tmp_path, sent(b"two"))
    lines = lines_of(tmp_path)
    assert [line["n"] for line in lines] == list(range(1, 9))
    assert [line["kind"] for line in lines] == ["start", "layout", "call", "end"] * 2
    assert lines[1]["tensors"] == [["a.bias", [4]], ["a.weight", [2, 4]], ["b.weight", [10]]]


def test_two_processes_write_one_ledger(tmp_path: Path) -> None:
    """A peer runs, and its organizer revokes from the same directory: one chain, whoever writes when."""
    path = tmp_path / LEDGER_NAME
    with Ledger(path) as peer_, Ledger(path) as errand:
        for number in range(3):
            for ledger in (peer_, errand, errand):
                ledger.sent(sent(f"{number}".encode()))
                ledger.flush()
    kinds = [line["kind"] for line in lines_of(tmp_path)]  # lines_of checks the chain
    assert (kinds.count("start"), kinds.count("end"), len(kinds)) == (2, 2, 2 + 9 + 2)


def test_a_line_that_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    """Half of its line is there: neither is it dropped as torn, nor continued."""
    with Ledger(tmp_path / LEDGER_NAME) as ledger:
        ledger.sent(sent(b"first"))
        ledger.flush()
        whole = (tmp_path / LEDGER_NAME).read_bytes()
        number, last_hash = len(whole.splitlines()), split_line(whole.splitlines()[-1].decode())[1]
        text, _ = chained({"n": number + 1, "time": 1.0, "kind": "start", "version": 1}, last_hash)
        with (tmp_path / LEDGER_NAME).open("ab", buffering=0) as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            other.write(text[:20].encode())
            begun: list[Ledger] = []
            starter = threading.Thread(target=lambda: begun.append(Ledger(tmp_path / LEDGER_NAME)))
            starter.start()
            ledger.sent(sent(b"second"))
            flusher = threading.Thread(target=ledger.flush)
            flusher.start()
            for thread in (starter, flusher):
                thread.join(0.2)
                assert thread.is_alive()
            other.write(f"{text[20:]}\n".encode())
            fcntl.flock(other, fcntl.LOCK_UN)
            for thread in (starter, flusher):
                thread.join(30.0)
        assert begun
    assert [line["kind"] for line in lines_of(tmp_path)].count("start") == 2


def test_the_hash_is_over_the_hash_before_and_the_line_without_its_own(tmp_path: Path) -> None:
    write(tmp_path)
    first, second, *_ = (tmp_path / LEDGER_NAME).read_text().splitlines()
    text = first.partition(',"hash"')[0] + "}"
    digest = hashlib.sha256((NO_HASH + text).encode()).hexdigest()
    assert first == f'{text[:-1]},"hash":"{digest}"}}'
    text = second.partition(',"hash"')[0] + "}"
    assert json.loads(second)["hash"] == hashlib.sha256((digest + text).encode()).hexdigest()


def broken(directory: Path, lines: list[str]) -> BrokenChainError:
    (directory / LEDGER_NAME).write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(BrokenChainError) as caught:
        read_chain(directory / LEDGER_NAME)
    return caught.value


def test_every_change_shows_at_its_line(tmp_path: Path) -> None:
    write(tmp_path, sent(b"one"), sent(b"two", "reply"))
    lines = (tmp_path / LEDGER_NAME).read_text().splitlines()
    assert len(lines) == 5
    for index in range(4):  # the last one is another matter: see below
        removed = broken(tmp_path, lines[:index] + lines[index + 1 :])
        assert (removed.line, "1 line(s) before it were removed" in removed.why) == (index + 1, True)
        doubled = broken(tmp_path, [*lines[: index + 1], *lines[index:]])
        assert (doubled.line, "put in or doubled" in doubled.why) == (index + 2, True)
        changed = lines[index].replace('"time":1', '"time":2', 1)
        assert broken(tmp_path, [*lines[:index], changed, *lines[index + 1 :]]).line == index + 1
    swapped = broken(tmp_path, [*lines[:2], lines[3], lines[2], lines[4]])
    assert swapped.line == 3


def test_a_line_removed_and_the_rest_renumbered_shows(tmp_path: Path) -> None:
    write(tmp_path, sent(b"one"), sent(b"two", "reply"))
    lines = (tmp_path / LEDGER_NAME).read_text().splitlines()
    rest = [line.replace(f'"n":{n},', f'"n":{n - 1},', 1) for n, line in enumerate(lines[3:], 4)]
    error = broken(tmp_path, [*lines[:2], *rest])
    assert (error.line, "its hash does not fit" in error.why) == (3, True)


@pytest.mark.parametrize("line", ["", "{}", "[1]", "not json", '{"n":1}', '\x00\xff"}'])
def test_what_is_no_line_shows(tmp_path: Path, line: str) -> None:
    write(tmp_path)
    lines = (tmp_path / LEDGER_NAME).read_text().splitlines()
    error = broken(tmp_path, [lines[0], line, *lines[1:]])
    assert (error.line, "no line of a ledger" in error.why) == (2, True)


# --- the command


def test_the_command_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path,
        sent(b"one"),
        sent(b"12345678", "delta part", "Q", round=2, values=(0, 6), squared_norm=4.0),
    )
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "5 lines, the chain is complete" in told
    assert "delta parts are of 2 tensors, a.bias to a.weight, rounds 2 to 2" in told
    assert told.splitlines()[-1] == "heads, labels, texts: none"
    assert main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peers"] == {"P": 3, "Q": 8}
    assert told["kinds"]["delta part"] == {
        "num": 1,
        "bytes": 8,
        "peers": {"Q": 8},
        "rounds": [2],
        "tensors": ["a.bias", "a.weight"],
    }
    assert told["heads_labels_texts"] == "none"


def test_a_head_that_was_sent_would_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, sent(b"12345678", "delta part", values=(12, 22)))
    (tmp_path / "task_model").mkdir()
    head = {name: np.ones(2, dtype=np.float32) for name in ("bert.a.bias", "c.weight")}
    save_file(head, tmp_path / "task_model" / "model.safetensors")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("heads, labels, texts: none (the head is: c.weight)\n")


@pytest.mark.parametrize(
    "message", [sent(kind="letter"), sent(kind="delta part", values=(22, 23))], ids=["kind", "values"]
)
def test_what_it_does_not_know_it_does_not_call_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: Sent
) -> None:
    assert main([str(write(tmp_path, message))]) == 0
    assert "heads, labels, texts: cannot be told" in capsys.readouterr().out


def test_a_broken_chain_and_a_missing_file_end_with_6(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 6
    assert "cannot read" in capsys.readouterr().err
    lines = (write(tmp_path, sent()) / LEDGER_NAME).read_text().splitlines()
    (tmp_path / LEDGER_NAME).write_text("\n".join([lines[0], *lines[2:], ""]))
    assert main([str(tmp_path), "--json"]) == 6
    streams = capsys.readouterr()
    assert json.loads(streams.out)["line"] == 2
    assert "ledger.jsonl, line 2: it bears number 3" in streams.err


def test_lines_cut_off_the_end_show_by_a_hash_noted_earlier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, sent()) / LEDGER_NAME
    noted = read_chain(file).hashes[-1]
    assert main([str(tmp_path), "--expect", noted]) == 0
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main([str(tmp_path)]) == 0
    assert "1 of 1 processes have not ended in order" in capsys.readouterr().out
    for expected in (noted, "", "0" * 64):
        assert main([str(tmp_path), "--expect", expected]) == 6
        assert "cut off the end" in capsys.readouterr().err
    file.write_text("")
    assert main([str(tmp_path), "--expect", "0" * 64]) == 0  # as it was printed of an empty ledger
    assert main([str(tmp_path), "--expect", ""]) == 6


# --- the file


def test_a_torn_line_is_told_and_dropped_at_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, sent()) / LEDGER_NAME
    with file.open("a") as stream:
        stream.write('{"n":5,"kind":"ca')
    assert main([str(tmp_path)]) == 0
    assert "not written to its end" in capsys.readouterr().out
    write(tmp_path, sent(b"two"))
    assert [line["n"] for line in lines_of(tmp_path)] == list(range(1, 9))


def test_a_damaged_last_line_is_not_continued(tmp_path: Path) -> None:
    file = write(tmp_path) / LEDGER_NAME
    with file.open("a") as stream:
        stream.write('{"n":4}\n')
    with pytest.raises(StateError, match=r"the last line of .* is damaged"):
        Ledger(file)


def test_a_very_long_last_line_is_continued(tmp_path: Path) -> None:
    long = sent(of="x" * 200_000)
    write(tmp_path, long)
    file = tmp_path / LEDGER_NAME
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))  # the long one is the last
    write(tmp_path)
    assert len(lines_of(tmp_path)) == 6


def test_a_directory_in_its_place_is_a_state_error(tmp_path: Path) -> None:
    (tmp_path / LEDGER_NAME).mkdir()
    with pytest.raises(StateError):
        Ledger(tmp_path / LEDGER_NAME)


def test_a_disk_that_is_full_stops_the_session(tmp_path: Path) -> None:
    file = Path("/dev/full")
    if not file.exists():
        pytest.skip("needs /dev/full")
    with Ledger(tmp_path / LEDGER_NAME) as ledger:
        os.dup2(os.open(file, os.O_WRONLY), ledger._file)
        with pytest.raises(StateError, match="No space left"):
            ledger.flush()


def test_messages_that_come_too_fast_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.ledger_file.MAX_WAITING", 3)  # start, layout, and one message
    write(tmp_path, sent(b"one"), sent(b"two"), sent(b"three"))
    lost = [line["num"] for line in lines_of(tmp_path) if line["kind"] == "lost"]
    assert lost == [2]


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.outgoing import About, Sent
from peer.ledger_file import Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    ledger.sent(Sent("call", "", "P", 1, bytes(32)))
    ledger.flush()
    ledger.sent(Sent("reply", "", "P", 1, bytes(32)))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_sigkill_the_chain_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / LEDGER_NAME)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [line["kind"] for line in lines_of(tmp_path)] == ["start", "call"]
    write(tmp_path)
    assert [line["kind"] for line in lines_of(tmp_path)][2:] == ["start", "layout", "end"]


# --- what is reported


def test_an_answer_in_parts_is_one_message_also_when_it_is_cut_off() -> None:
    told: list[Sent] = []
    data = memoryview(b"abcdef")
    for known, num_parts in ((b"", 2), (b"", 1), (b"h" * 32, 2), (b"h" * 32, 1)):
        answer = Answer(told.append, "blob", "P")
        begin_answer(answer)
        describe(About(kind="state chunk", sha256=known, data=data))
        for part in (b"abc", b"def")[:num_parts]:
            answer.add(part)
        answer.end()
        answer.end()
    assert [message.num_bytes for message in told] == [6, 3, 6, 3]
    hashes = [sha256(b"abcdef"), sha256(b"abc"), b"h" * 32, sha256(b"abc")]
    assert [message.sha256 for message in told] == hashes


def test_an_answer_of_nothing_is_none() -> None:
    told: list[Sent] = []
    Answer(told.append, "blob", "P").end()
    report(ignore, "call", "", "P", b"x")
    assert told == []


def test_the_hash_of_a_whole_chunk_is_the_manifests() -> None:
    import torch

    layout = TensorLayout(names=("w",), shapes=((300_000,),))  # 1.2 MB: two chunks
    manifest = make_manifest(layout, torch.ones(300_000))
    whole = about_chunk(manifest, 0, CHUNK_SIZE_BYTES)
    assert (whole.values, whole.sha256.hex()) == ((0, 262_144), manifest.chunk_hashes[0])
    last = about_chunk(manifest, CHUNK_SIZE_BYTES, 1_200_000)
    assert (last.values, last.sha256.hex()) == ((262_144, 300_000), manifest.chunk_hashes[1])
    assert about_chunk(manifest, 0, 100).sha256 == b""
    assert about_chunk(manifest, 4, CHUNK_SIZE_BYTES).sha256 == b""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Network, Network, list[Sent], list[Sent]]]:
    directory = new_directory()
    told: tuple[list[Sent], list[Sent]] = [], []
    with Network(network_config(directory / "0.key"), told[0].append) as first:
        entry = tuple(addresses_of(first)[:1])
        config = network_config(directory / "1.key", initial_peers=entry, host_maddrs=LOOPBACK)
        with Network(config, told[1].append) as second:
            yield first, second, *told


def test_calls_replies_and_refusals_are_reported(
    pair: tuple[Network, Network, list[Sent], list[Sent]],
) -> None:
    first, second, served, asked = pair

    async def answer(_peer_id: str, body: Any) -> bytes:
        if body == "no":
            raise RecordError("not here")
        return b"an answer"

    first.on_call("ask", answer)
    first.on_stream("ask", lambda peer_id, body: _refuse())
    served.clear()
    asked.clear()
    call = second.call(first.peer_id, "ask", "yes", timeout_seconds=CALL_SECONDS)
    assert second.run(call, timeout_seconds=CALL_SECONDS) == b"an answer"
    for attempt in (
        second.call(first.peer_id, "ask", "no", timeout_seconds=CALL_SECONDS),
        _all(second, first, "ask"),
        _all(second, first, "x" * 100_000),  # a name that the caller makes up is in no ledger
    ):
        assert second.submit(attempt).exception(CALL_SECONDS) is not None
    names = [(message.kind, message.name, message.peer_id) for message in served]
    assert names == [
        ("reply", "ask", second.peer_id),
        ("refusal", "_PeerRpc.rpc_call", second.peer_id),
        ("refusal", "ask", second.peer_id),
        ("refusal", "", second.peer_id),
    ]
    payloads = [b"an answer", b"RecordError: not here", b"nothing streams here"]
    assert [message.sha256 for message in served[:3]] == [sha256(payload) for payload in payloads]
    assert [message.kind for message in asked] == ["call"] * 4
    assert asked[0].sha256 == sha256(b'{"method":"ask","body":"yes"}')


async def _refuse() -> AsyncIterator[bytes]:
    for text in ("nothing streams here",):
        raise RecordError(text)
    yield b""


async def _all(network: Network, other: Network, method: str) -> None:
    async for _ in network.stream(other.peer_id, method, None, timeout_seconds=CALL_SECONDS):
        pass


def test_frames_and_pieces_are_reported_with_known_hashes(
    pair: tuple[Network, Network, list[Sent], list[Sent]],
) -> None:
    first, second, served, asked = pair
    data = memoryview(bytes(range(256)) * 2048)  # 512 KB: two parts

    async def echo(stream: FrameStream) -> None:
        stream.describe(About(round=5, sha256=b"k" * 32))
        await stream.send(1, b"known")
        await stream.send(2, b"un", b"known")

    first.run(serve_streams(first, "echo", echo, {1: "first"}), timeout_seconds=CALL_SECONDS)
    serve_blobs(first, RUN, {"key": data}.get)
    served.clear()
    asked.clear()

    async def ask() -> None:
        stream = await open_stream(second, first.peer_id, "echo", b"hello", timeout_seconds=CALL_SECONDS)
        for _ in range(2):
            await stream.receive({1: 10, 2: 10})
        stream.close()
        body = {"run": RUN, "key": "key", "start": 0, "stop": len(data)}
        async for _ in second.stream(first.peer_id, "blob", body, timeout_seconds=CALL_SECONDS):
            pass

    second.run(ask(), timeout_seconds=CALL_SECONDS)
    assert [(message.kind, message.num_bytes) for message in served] == [
        ("first", 5),
        ("frame 2", 7),
        ("blob", 524_288),
    ]
    assert [message.sha256 for message in served] == [b"k" * 32, sha256(b"unknown"), sha256(data)]
    assert [message.kind for message in asked] == ["greeting", "call"]


def test_an_all_reduce_reports_every_part_with_its_round_range_and_hash() -> None:
    with running_swarm(3) as swarm:
        told: list[Sent] = []
        swarm.networks[0].record = told.append
        group, outgoing = swarm.group(3), swarm.prepare(deltas(3), round=6)
        swarm.reduce(group, outgoing)
        swarm.settle()
        own, owned = outgoing[0], swarm.owned(group)
    mine = swarm.peer_ids[0]
    for peer_id in swarm.peer_ids[1:]:
        parts = [m for m in told if m.kind == "delta part" and m.peer_id == peer_id]
        assert [m.about.values for m in parts] == [own.grid.bounds(part) for part in owned[peer_id]]
        assert [m.sha256 for m in parts] == [sha256(own.parts[part]) for part in owned[peer_id]]
        results = [m for m in told if m.kind == "result part" and m.peer_id == peer_id]
        assert [m.about.values for m in results] == [own.grid.bounds(part) for part in owned[mine]]
        assert {m.about.round for m in (*parts, *results)} == {6}
    assert {m.kind for m in told} >= {"greeting", "delta manifest", "statement", "signal"}


def test_the_hash_of_a_slice_follows_from_the_manifest() -> None:
    """So a slice in the ledger can be held against what the peer has signed."""
    with running_swarm(2) as swarm:
        outgoing = swarm.prepare(deltas(2))[0]
    sums = Sums()
    for part in range(3):
        data = bytes(outgoing.parts[part])
        sums.take(sent(data, "delta part", values=outgoing.grid.bounds(part), round=1), None)
    (line,) = sums.all()
    hashes = outgoing.manifest.part_hashes()[:3]
    assert line.content(None)["sha256"] == joined_hash(b"".join(hashes))
