"""Is what was measured on this machine good enough to join? Figures in, one `Check` each out; no I/O.

The probes that measure are in `peer/probes.py` and `peer/swarm_probes.py`; who asks is `peer/doctor.py`,
and `peer/join.py` for the quick ones. Every limit stands here, with where it comes from.
"""

from __future__ import annotations

import ipaddress
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coordinator.dial_back import DialledBack
from coordinator.errors import NetworkError, StateError, SwarmError
from coordinator.membership import CLOCK_DIFFERENCE_SECONDS
from coordinator.records import MAX_CLOCK_SKEW_SECONDS
from peer.display import clean, format_seconds, format_size

Status = Literal["ok", "warning", "failure"]
Scope = Literal["loopback", "private", "public", "relay"]  # from where an address can be dialled

PROCESS_BYTES = 500_000_000  # Python with torch, transformers and hivemind, before a model is loaded
# Of a peer beyond bare finetuning: evaluation, delta, parts on their way, new state. Measured 649 MiB with
# 22.7M parameters (docs/experiments.md, "Freed memory that stays").
PEER_BYTES_PER_PARAMETER = 30
# What a forward pass keeps for the backward one, of BERT in float32 with dropout: for each token and layer so
# many bytes a hidden value, and so many for each head and other token. Tensors saved by autograd, counted for
# 6 layers of 384 and 12 of 768, 32 to 512 tokens: within 1%. Fused kernels on a GPU keep no attention.
ACTIVATION_BYTES_PER_VALUE = 74
ATTENTION_BYTES_PER_PAIR = 12
# Texts that are shorter than --max-length take less: 350 MB of 1.15 GB, as measured (1157 MiB less the other
# two lines). So much is certain to be needed.
SHORT_TEXTS = 0.3
FINETUNE_BYTES_PER_PARAMETER = 16  # float32: weights, gradients, and the two moments of AdamW
NUM_CHECKPOINTS = 3  # two are kept, and one is being written beside them (peer/state.py)
NUM_EXPORTS = 4  # model/ and task_model/, each written beside the old one
COMFORT_FACTOR = 1.5  # less room than that times the need is worth a warning
FEW_HELD_OUT = 50  # with less the standard error of an accuracy is above 7 points
DIGEST_CHARS = 8  # of a run's digest, for people
MANY_CUT = 0.2  # of the rows; more lose text at max_length than is harmless
MANY_DUPLICATES = 0.01  # of the held-out rows that are in the training data, too
SLOW_EXAMPLES_PER_SECOND = 1.0
_ERRORS = {"disk": StateError, "output": StateError, "clock": NetworkError}


@dataclass(frozen=True)
class Check:
    name: str  # what was looked at: a few letters, the first column
    status: Status
    message: str  # what was found, in one line
    fix: str = ""  # what to do; empty where nothing is to be done
    figures: Mapping[str, Any] = field(default_factory=dict)  # for scripts

    def to_json(self) -> dict[str, Any]:
        names = {"check": self.name, "status": self.status, "message": self.message, "fix": self.fix}
        return {**names, "figures": dict(self.figures)}


def exit_code(checks: Sequence[Check]) -> int:
    """0: all ok, 1: warnings, 2: failures."""
    statuses = {check.status for check in checks}
    return 2 if "failure" in statuses else 1 if "warning" in statuses else 0


def failed(name: str, text: str) -> Check:
    """Of an error's message; what it advises comes after its first full stop or semicolon."""
    message, fix = text, ""
    found = re.search(r"; |\. (?=[A-Z])|\n", text)
    if found:
        message, fix = text[: found.start()], text[found.end() :]
    return Check(name, "failure", clean(message, 300), clean(fix, 300))


def raise_failure(checks: Sequence[Check]) -> None:
    """The first failure as the error, with the exit code, that `join` would end with later."""
    for check in checks:
        if check.status == "failure":
            raise _ERRORS.get(check.name, SwarmError)(f"{check.name}: {check.message}; {check.fix}")


# ---- this machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    requirement: str  # as pyproject.toml has it: "torch>=2.6"
    installed: str | None  # its version; None: it is not there


def judge_python(version: str, required: str) -> Check:
    if version in SpecifierSet(required):
        return Check("python", "ok", f"Python {version}")
    what = f"Python {version}, but {required} is needed"
    return Check("python", "failure", what, "install a newer Python and make a new virtual environment")


def judge_packages(packages: Sequence[Package]) -> Check:
    wrong = [package for package in packages if not _fits(package)]
    if not wrong:
        return Check("packages", "ok", f"{len(packages)} packages, all in the ranges needed")
    found = ", ".join(f"{Requirement(p.requirement).name} {p.installed or 'missing'}" for p in wrong)
    fix = "pip install " + " ".join(f"'{package.requirement}'" for package in wrong)
    return Check("packages", "failure", f"not as needed: {found}", fix)


def _fits(package: Package) -> bool:
    if package.installed is None:
        return False
    return Requirement(package.requirement).specifier.contains(package.installed, prereleases=True)


@dataclass(frozen=True)
class ModelSize:
    """What of a run's model decides how much memory and disk it takes."""

    num_parameters: int  # of the backbone
    num_state_values: int  # with the buffers of the outer optimizer
    files_bytes: int  # config and tokenizer
    is_lossy: bool  # the codec cuts something off, which is kept and stored


def disk_needed(size: ModelSize) -> int:
    """Bytes that an output directory has at its largest: while a checkpoint and the exports are written."""
    vector = 4 * size.num_parameters
    residuals = 2 * vector if size.is_lossy else 0  # as a sender, and as the reducer of parts
    checkpoint = 4 * size.num_state_values + vector + residuals  # with the kept delta
    return NUM_CHECKPOINTS * checkpoint + NUM_EXPORTS * vector + 6 * size.files_bytes


def judge_disk(free_bytes: int, used_bytes: int, size: ModelSize) -> Check:
    """`free_bytes` where the output goes; `used_bytes`: what an earlier start of this run has there."""
    needed = max(0, disk_needed(size) - used_bytes)
    figures = {"free_bytes": free_bytes, "needed_bytes": needed}
    said = f"{format_size(free_bytes)} free, {format_size(needed)} needed"
    if free_bytes < needed:
        fix = f"free {format_size(needed - free_bytes)}, or choose an --output-dir on another disk"
        return Check("disk", "failure", said, fix, figures)
    if free_bytes < COMFORT_FACTOR * needed:
        return Check("disk", "warning", f"{said}: little room is left", "free some space", figures)
    return Check("disk", "ok", said, figures=figures)


@dataclass(frozen=True)
class Batch:
    """What of a step of finetuning decides how much memory its activations take."""

    num_texts: int = 32  # --batch-size
    num_tokens: int = 128  # of each, if all are as long as --max-length lets them be
    num_layers: int = 6  # this and what follows of the model's config; here all-MiniLM-L6-v2's
    hidden_size: int = 384
    num_heads: int = 12


def activations_bytes(batch: Batch, *, on_gpu: bool = False) -> int:
    attention = 0 if on_gpu else ATTENTION_BYTES_PER_PAIR * batch.num_heads * batch.num_tokens
    for_token = ACTIVATION_BYTES_PER_VALUE * batch.hidden_size + attention
    return batch.num_texts * batch.num_tokens * batch.num_layers * for_token


def memory_needed(size: ModelSize, batch: Batch, *, on_gpu: bool = False) -> tuple[int, int]:
    """Bytes of main memory without which it cannot work, and those that a round takes at its peak.

    With 22.7M parameters and batches of 32 texts of 128 tokens: 1.21 GB, as measured with shorter ones
    (1157 MiB, docs/experiments.md), and 2.70 GB.
    """
    training = 0 if on_gpu else FINETUNE_BYTES_PER_PARAMETER * size.num_parameters
    activations = 0 if on_gpu else activations_bytes(batch)
    buffers = 4 * (size.num_state_values - size.num_parameters)
    least = PROCESS_BYTES + training
    beside = PEER_BYTES_PER_PARAMETER * size.num_parameters + 3 * buffers
    return least + round(SHORT_TEXTS * activations), least + activations + beside


def judge_memory(available_bytes: int, size: ModelSize, batch: Batch, *, on_gpu: bool = False) -> Check:
    """`available_bytes`: to this process in all, what it has already included."""
    least, peak = memory_needed(size, batch, on_gpu=on_gpu)
    figures = {"available_bytes": available_bytes, "least_bytes": least, "needed_bytes": peak}
    said = f"{format_size(available_bytes)} available, about {format_size(peak)} needed"
    fix = "end other programs" if on_gpu else "end other programs, or lower --batch-size and --max-length"
    if available_bytes < least:
        return Check("memory", "failure", said, f"{fix}; or use a machine with more memory", figures)
    if available_bytes < peak:
        return Check("memory", "warning", f"{said}: it may be killed", fix, figures)
    return Check("memory", "ok", said, figures=figures)


@dataclass(frozen=True)
class Device:
    name: str  # "cpu", or the name of the GPU
    is_gpu: bool
    num_threads: int  # that torch uses
    has_bf16: bool  # in hardware
    free_bytes: int | None = None  # of the GPU's memory
    has_unused_gpu: bool = False  # --use-cpu was said where there is one


def judge_device(device: Device, size: ModelSize | None, batch: Batch, wants_bf16: bool | None) -> Check:
    precision = "bfloat16" if device.has_bf16 and wants_bf16 is not False else "float32"
    threads = f", {device.num_threads} thread{'s' if device.num_threads != 1 else ''}"
    said = f"{clean(device.name, 40)}{'' if device.is_gpu else threads}, {precision}"
    figures = {"device": device.name, "is_gpu": device.is_gpu, "bf16": device.has_bf16}
    if wants_bf16 and not device.has_bf16:
        what = f"{device.name} has no bfloat16: --bf16 will be slow here"
        return Check("device", "warning", what, "leave --bf16 out", figures)
    if device.free_bytes is not None and size is not None:
        check = _judge_gpu_memory(said, device.free_bytes, size, batch, figures)
        if check is not None:
            return check
    if device.has_unused_gpu:
        said += "; the GPU here stays unused (--use-cpu)"
    return Check("device", "ok", said, figures=figures)


def _judge_gpu_memory(
    device: str, free_bytes: int, size: ModelSize, batch: Batch, figures: Mapping[str, Any]
) -> Check | None:
    """None: there is enough."""
    training = FINETUNE_BYTES_PER_PARAMETER * size.num_parameters
    activations = activations_bytes(batch, on_gpu=True)
    needed = training + activations
    figures = {**figures, "free_bytes": free_bytes, "needed_bytes": needed}
    said = f"{device}: {format_size(free_bytes)} free, about {format_size(needed)} needed"
    fix = "end other programs on the GPU, lower --batch-size and --max-length"
    if free_bytes < training + SHORT_TEXTS * activations:
        return Check("device", "failure", said, f"{fix}, or add --use-cpu", figures)
    if free_bytes < needed:
        return Check("device", "warning", f"{said}: it may run out", fix, figures)
    return None


# ---- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFigures:
    kind: str  # "classification" or "regression"
    is_pair: bool
    num_train: int
    num_validation: int
    num_test: int
    train_counts: Mapping[str, int]  # examples of each class; empty for a regression
    validation_counts: Mapping[str, int]
    num_overlap: int  # held-out rows whose texts are in the training data, too
    notes: tuple[str, ...] = ()  # what was guessed, dropped or cut


def judge_data(figures: DataFigures) -> list[Check]:
    """Sizes and columns, duplicates, classes."""
    checks = [_judge_sizes(figures), _judge_overlap(figures), *_judge_classes(figures)]
    return [*checks[:1], *_judge_notes(figures), *checks[1:]]


def _judge_sizes(figures: DataFigures) -> Check:
    what = "sentence pairs" if figures.is_pair else "texts"
    task = f"{len(figures.train_counts)} classes" if figures.train_counts else figures.kind
    sizes = f"{figures.num_train} train, {figures.num_validation} validation, {figures.num_test} test"
    numbers = {
        "num_train": figures.num_train,
        "num_validation": figures.num_validation,
        "num_test": figures.num_test,
    }
    said = f"{task}, {what}: {sizes}"
    if figures.num_validation < FEW_HELD_OUT:
        error = 50 / math.sqrt(max(1, figures.num_validation))  # of an accuracy of 50%, in points
        fix = f"scores will be off by about {error:.0f} points: add examples, or give --validation-data"
        return Check("data", "warning", said, fix, numbers)
    return Check("data", "ok", said, figures=numbers)


def _judge_notes(figures: DataFigures) -> list[Check]:
    checks = []
    for note in figures.notes:
        if note.startswith("guessed columns: "):
            checks.append(Check("columns", "ok", f"guessed: {clean(note.partition(': ')[2])}"))
        elif note.endswith("dropped") or " dropped (" in note:
            checks.append(Check("rows", "warning", clean(note), "fill them in, or leave it at that"))
    return checks


def _judge_overlap(figures: DataFigures) -> Check:
    held_out = figures.num_validation + figures.num_test
    said = f"{figures.num_overlap} of {held_out} held-out rows are in the training data"
    numbers = {"num_overlap": figures.num_overlap, "num_held_out": held_out}
    if figures.num_overlap > MANY_DUPLICATES * held_out:
        fix = "remove the duplicates: your own scores will look better than they are"
        return Check("duplicates", "warning", said, fix, numbers)
    return Check("duplicates", "ok", said, figures=numbers)


def _judge_classes(figures: DataFigures) -> list[Check]:
    counts = figures.train_counts
    if not counts:
        return []
    single = [name for name, count in counts.items() if count < 2]
    unseen = [name for name in counts if not figures.validation_counts.get(name)]
    numbers = {"num_classes": len(counts), "smallest": min(counts.values())}
    if single:
        what = f"one training row only: {_some(single)}"
        fix = "add examples of it, or remove the class"
        return [Check("classes", "warning", what, fix, numbers)]
    if unseen:
        what = f"not in the validation data: {_some(unseen)}"
        fix = "its score is not seen: add examples, or raise --validation-fraction"
        return [Check("classes", "warning", what, fix, numbers)]
    said = f"{_some(list(counts), 12)}; the smallest has {min(counts.values())} rows"
    return [Check("classes", "ok", said, "", numbers)]


def judge_lengths(
    num_rows: int, num_cut: int, max_length: int, longest: int, num_in_all: int, *, can_raise: bool = True
) -> Check:
    """`num_rows`: looked at, the first of `num_in_all`; `longest`: tokens of the longest of them;
    `can_raise`: the model takes longer texts than `max_length`."""
    figures = {
        "num_rows": num_rows,
        "num_in_all": num_in_all,
        "num_cut": num_cut,
        "max_length": max_length,
        "longest": longest,
    }
    rows = f"{num_rows} rows" if num_rows == num_in_all else f"the first {num_rows} rows"
    if num_cut == 0:
        what = f"none of {rows} is cut at {max_length} tokens (longest: {longest})"
        return Check("length", "ok", what, "", figures)
    said = f"{num_cut} of {rows} are cut at {max_length} tokens (longest: {longest})"
    if num_cut > MANY_CUT * num_rows:
        fix = (
            "raise --max-length: slower, but nothing is lost"
            if can_raise
            else "the model takes no longer ones: split the texts, or put first what matters"
        )
        return Check("length", "warning", said, fix, figures)
    return Check("length", "ok", said, "", figures)


# ---- the swarm ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EntryPoint:
    """What came of dialling one address, and of asking the peer there for its run."""

    address: str
    why_not: str | None = None  # it was not reached
    run: str | None = None  # digest of the run that it is in
    is_refusing: bool = False  # it is in a private run, and does not let this peer in


def judge_entries(
    given: Sequence[EntryPoint], remembered: Sequence[EntryPoint] = (), wanted: str | None = None
) -> list[Check]:
    """One line for each entry point, and one for all peers met before. `wanted`: digest of the run.

    Which run a peer is in tells its process: a connection is only its daemon's. What is wrong with one is
    only a warning where another one is well.
    """
    is_one_well = any(_is_well(entry, wanted) for entry in (*given, *remembered))
    checks = [_judge_entry(entry, wanted, is_one_well) for entry in given]
    return [*checks, *_judge_remembered(remembered, wanted, is_one_well, has_others=bool(given))]


def _is_well(entry: EntryPoint, wanted: str | None) -> bool:
    return entry.why_not is None and entry.run is not None and entry.run == wanted


def _judge_entry(entry: EntryPoint, wanted: str | None, is_one_well: bool) -> Check:
    name, figures = short_address(entry.address), {"address": entry.address, "run": entry.run}
    status: Status = "warning" if is_one_well else "failure"
    enough = "another one answers, that is enough"
    if entry.why_not is not None:
        fix = enough if is_one_well else "ask for its present address; any other peer's will do"
        return Check("entry point", status, f"{name}: {entry.why_not}", fix, figures)
    if entry.is_refusing:
        what, fix = f"{name}: it does not let you in", "ask the organizer of the run for an invite"
        return Check("entry point", status, what, fix, figures)
    if entry.run is None:
        what = f"{name}: connected, but silent"
        fix = enough if is_one_well else "its process hangs, or it is no peer: try another peer's address"
        return Check("entry point", "warning", what, fix, figures)
    if entry.run != wanted:
        what = f"{name}: in another run, {entry.run[:DIGEST_CHARS]}"
        fix = "leave it out; or check the address and --run with whoever gave them to you"
        return Check("entry point", status, what, fix, figures)
    return Check("entry point", "ok", f"{name} answers", figures=figures)


def _judge_remembered(
    entries: Sequence[EntryPoint], wanted: str | None, is_one_well: bool, *, has_others: bool
) -> list[Check]:
    if not entries:
        return []
    num_answering = sum(_is_well(entry, wanted) for entry in entries)
    figures = {"num_remembered": len(entries), "num_answering": num_answering}
    what = f"{num_answering} of {len(entries)} addresses of peers met before answer"
    if is_one_well:
        return [Check("entry point", "ok", what, "", figures)]
    fix = "any other peer's address will do" if has_others else "you would go on alone: give --initial-peers"
    return [Check("entry point", "warning", what, fix, figures)]


def judge_solitude() -> Check:
    """Of a run that is resumed without an address of another peer."""
    fix = "others must come to you; or give --initial-peers ADDR"
    return Check("entry point", "warning", "no address of another peer is known", fix)


@dataclass(frozen=True)
class SwarmFigures:
    run_name: str
    digest: str
    round: int  # the last one committed, as heartbeats say
    num_rounds: int
    num_trainers: int  # live peers that train, without this one
    min_peers: int


def judge_swarm(figures: SwarmFigures) -> Check:
    name = short_name(figures.run_name, figures.digest)
    who = f"{name}, round {figures.round}/{figures.num_rounds}"
    numbers = {"digest": figures.digest, "round": figures.round, "num_trainers": figures.num_trainers}
    if figures.round >= figures.num_rounds:
        fix = "ask for a new run; the fused model can still be downloaded"
        return Check("run", "warning", f"{who}: it is over", fix, numbers)
    return Check("run", "ok", f"{who}; {figures.num_trainers} train, quorum {figures.min_peers}", "", numbers)


def short_name(run_name: str, digest: str) -> str:
    """Of a run, for people; the digest tells runs of one name apart."""
    return f"{clean(run_name, 24)} {digest[:DIGEST_CHARS]}"


@dataclass(frozen=True)
class ClockSample:
    """By how much a peer's clock is ahead of mine; between two bounds, since a heartbeat has an age."""

    low_seconds: float
    high_seconds: float


def heartbeat_sample(issued_at: float, seen_at: float, max_age_seconds: float) -> ClockSample:
    """From when a heartbeat says that it was issued; it was issued at most so long before it was seen."""
    return ClockSample(issued_at - seen_at, issued_at - seen_at + max_age_seconds)


def judge_clock(samples: Sequence[ClockSample], *, lease_seconds: float = 30.0) -> Check:
    """`samples` are of peers that answer. None: a clock ahead by a lease sees each heartbeat as expired.

    Of several peers the median counts: one wrong clock among them says nothing about mine.

    Beyond 10 s the others drop my records (coordinator/records.py); beyond 2 s rounds may fork and heal
    (coordinator/membership.py).
    """
    fix = "set the clock: sudo timedatectl set-ntp true"
    if not samples:
        what = "peers answer, but their heartbeats are not seen"
        wrong = f"your clock may be ahead by {lease_seconds:.0f} s or more: sudo timedatectl set-ntp true"
        return Check("clock", "failure", what, wrong, {"num_peers": 0})
    low = statistics.median(sample.low_seconds for sample in samples)
    high = statistics.median(sample.high_seconds for sample in samples)
    figures = {"num_peers": len(samples), "low_seconds": round(low, 3), "high_seconds": round(high, 3)}
    difference = low if low > 0 else -high if high < 0 else 0.0  # what is certain
    peers = f"{len(samples)} peer{'s' if len(samples) != 1 else ''}"
    if difference <= CLOCK_DIFFERENCE_SECONDS:
        within = max(abs(low), abs(high))
        return Check("clock", "ok", f"within {within:.1f} s of the clocks of {peers}", figures=figures)
    said = f"{difference:.1f} s {'behind' if low > 0 else 'ahead of'} {peers}"
    if len(samples) == 1:
        fix += " (or is the peer's wrong?)"
    if difference > MAX_CLOCK_SKEW_SECONDS:
        return Check(
            "clock", "failure", f"{said}; at most {MAX_CLOCK_SKEW_SECONDS:.0f} s are taken", fix, figures
        )
    return Check(
        "clock", "warning", f"{said}; above {CLOCK_DIFFERENCE_SECONDS:.0f} s rounds may fork", fix, figures
    )


def judge_clock_at_a_glance(samples: Sequence[ClockSample], *, lease_seconds: float) -> Check:
    """For `join`, which looks for a few seconds: seeing nobody is worth a warning, and ends nothing."""
    check = judge_clock(samples, lease_seconds=lease_seconds)
    return check if samples else replace(check, status="warning")


@dataclass(frozen=True)
class Reach:
    listens: bool  # not --no-listen
    reachability: str  # the flag
    answered: frozenset[Scope]  # of own addresses: where a second process reached this peer
    unanswered: tuple[str, ...]  # own addresses at which it did not
    entry_scopes: frozenset[Scope]  # of the entry points that answered; empty: this peer begins a swarm
    dialled_back: tuple[DialledBack, ...] = ()  # what peers of the run say who tried


def judge_reach(reach: Reach) -> Check:
    """Whether others can dial this peer.

    What others say who tried counts most: a peer that dials itself does not see what a router lets through.
    """
    figures = {
        "answered": sorted(reach.answered),
        "reachability": reach.reachability,
        "dialled_back": [asdict(said) for said in reach.dialled_back],
    }
    if "relay" in reach.answered:
        return Check(
            "reachable", "ok", "through the relay of an entry point; slower than directly", "", figures
        )
    if reach.reachability == "private":
        what = "no entry point relays for you, so others cannot dial you"
        fix = "ask one peer to run with --reachability public; until then you reach only who listens"
        return Check("reachable", "warning", what, fix, figures)
    if not reach.listens:
        what = "client mode (--no-listen): you dial others, nobody dials you"
        fix = "two such peers cannot exchange deltas: add --reachability private for a relay"
        return Check("reachable", "warning", what, fix, figures)
    if (check := _judge_dialled_back(reach.dialled_back, figures)) is not None:
        return check
    if not reach.answered:
        named = ", ".join(short_address(address) for address in reach.unanswered[:2]) or "no address"
        fix = "check --host-maddrs, --announce-maddrs and the firewall; or use --reachability private"
        return Check("reachable", "failure", f"nobody answers at your own {named}", fix, figures)
    if "public" in reach.answered:
        return Check("reachable", "ok", "at a public address, which answers", "", figures)
    if "public" in reach.entry_scopes:
        what = "only inside your own network: behind a router (NAT), others cannot dial you"
        fix = "forward a port (--host-maddrs, --announce-maddrs), or add --reachability private"
        return Check("reachable", "warning", what, fix, figures)
    where = "in your local network" if "private" in reach.answered else "on this machine only"
    if "private" in reach.entry_scopes and "private" not in reach.answered:
        fix = "listen on all interfaces: --host-maddrs /ip4/0.0.0.0/tcp/0"
        return Check("reachable", "warning", f"{where}, but the swarm is in your local network", fix, figures)
    return Check("reachable", "ok", f"{where}, as the swarm is" if reach.entry_scopes else where, "", figures)


def is_from_outside(said: DialledBack) -> bool:
    """Not by a peer on this machine, which proves nothing."""
    return _scope_of_host(said.host) != "loopback"


def _judge_dialled_back(said: Sequence[DialledBack], figures: Mapping[str, Any]) -> Check | None:
    """None: nobody outside has tried. Whoever is farther away tells more."""
    outside = [one for one in said if is_from_outside(one)]
    far = [one for one in outside if _scope_of_host(one.host) == "public"]
    if not outside:
        return None
    for one in far or outside:
        if one.knocked == "open":
            where = "" if far else " in your local network"
            what = f"a peer dialled you back at {clean(one.host, 40)}:{one.port}{where}"
            return Check("reachable", "ok", what, "", figures)
    first = (far or outside)[0]
    how = "it is refused there" if first.knocked == "refused" else "nothing answers there"
    what = f"others cannot dial you: a peer tried {clean(first.host, 40)}:{first.port}, {how}"
    fix = "open that port in router and firewall (--host-maddrs), or add --reachability private"
    return Check("reachable", "warning", what, fix, figures)


def _scope_of_host(host: str) -> Scope:
    return scope_of(f"/{'ip6' if ':' in host else 'ip4'}/{host}")


def scope_of(address: str) -> Scope:
    """Of a multiaddress; a name (dns4) counts as public, since it is for others."""
    if "/p2p-circuit" in address:
        return "relay"
    parts = address.split("/")
    if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
        try:
            ip = ipaddress.ip_address(parts[2])
        except ValueError:
            return "public"
        return "loopback" if ip.is_loopback else "public" if ip.is_global else "private"
    return "public"


def short_address(address: str) -> str:
    """ "127.0.0.1:4001 …kGJdSJ8w" of "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...": for people."""
    transport, _, peer_id = address.rpartition("/p2p/")
    parts = (transport or address).strip("/").split("/")
    if len(parts) >= 4 and parts[2] in ("tcp", "udp"):
        transport = f"{parts[1]}:{parts[3]}{' by relay' if 'p2p-circuit' in address else ''}"
    return clean(f"{transport} …{peer_id[-8:]}", 60)


# ---- a round --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundBudget:
    """What the spec says a round may cost."""

    num_examples: int | None
    seconds: float | None
    limit_seconds: float  # it closes so long after it could begin
    part_bytes: int  # the encoded delta of one peer
    num_peers: int  # that are likely to be in a round, this one included
    num_scored: int  # rows, held-out ones and those that the head is fitted to; twice a round
    upload_bytes_per_second: float | None = None  # the limit that the person set


def round_bytes(budget: RoundBudget) -> int:
    """Sent, and as much received: parts of the delta to their reducers, and results to all others."""
    return 2 * budget.part_bytes * (budget.num_peers - 1) // max(1, budget.num_peers)


def work_seconds(examples_per_second: float, budget: RoundBudget) -> float:
    """Finetuning and evaluating; a forward pass takes a third of a training step."""
    wanted = [] if budget.num_examples is None else [budget.num_examples / examples_per_second]
    finetune = min(wanted + ([] if budget.seconds is None else [budget.seconds]))
    return finetune + 2 * budget.num_scored / (3 * examples_per_second)


def traffic_seconds(download_bytes_per_second: float | None, budget: RoundBudget) -> float | None:
    """By the slower of the two directions, which go on at one time; None: neither rate is known."""
    rate = _slower(download_bytes_per_second, budget.upload_bytes_per_second)
    return None if rate is None else round_bytes(budget) / rate


def _slower(*rates: float | None) -> float | None:
    return min((rate for rate in rates if rate is not None), default=None)


def judge_speed(examples_per_second: float, budget: RoundBudget) -> Check:
    seconds = work_seconds(examples_per_second, budget)
    figures = {"examples_per_second": round(examples_per_second, 2), "round_seconds": round(seconds, 1)}
    said = f"{examples_per_second:.3g} examples/s: about {format_seconds(seconds)} a round"
    if seconds > budget.limit_seconds:
        what = f"{said}, it closes after {format_seconds(budget.limit_seconds)}"
        fix = "what is done by then counts; lower --max-length, use a GPU, or give more --threads"
        return Check("speed", "warning", what, fix, figures)
    if examples_per_second < SLOW_EXAMPLES_PER_SECOND:
        return Check("speed", "warning", said, "lower --max-length, or use a GPU", figures)
    return Check("speed", "ok", said, figures=figures)


def unmeasured_speed(limit_seconds: float) -> Check:
    what = f"two steps of finetuning take more than {limit_seconds:.0f} s"
    fix = "end other programs, lower --batch-size and --max-length, or use a GPU"
    return Check("speed", "warning", what, fix)


def judge_traffic(download_bytes_per_second: float | None, budget: RoundBudget) -> Check:
    """`download_bytes_per_second`: as measured with pieces of the state; None: nobody could be asked.

    What is sent is not measured: nobody would take it. It counts where the person has limited it.
    """
    moved, upload = round_bytes(budget), budget.upload_bytes_per_second
    said = f"{format_size(moved)} each way a round of {budget.num_peers} peers"
    figures: dict[str, Any] = {"bytes_each_way": moved, "num_peers": budget.num_peers}
    if download_bytes_per_second is not None:
        figures["download_bytes_per_second"] = round(download_bytes_per_second)
    if upload is not None:
        figures["upload_bytes_per_second"] = round(upload)
    rate = _slower(download_bytes_per_second, upload)
    if rate is None:
        return Check("traffic", "ok", f"{said}; rate not measured", figures=figures)
    seconds = moved / rate
    figures["seconds"] = round(seconds, 1)
    is_held_back = rate == upload
    said += f", {format_seconds(seconds)} at {8e-6 * rate:.3g} Mbit/s{' up' if is_held_back else ''}"
    if seconds > budget.limit_seconds / 2:
        faster = "raise --max-upload-mbps" if is_held_back else "use a faster line"
        fix = f"the others wait for you: {faster}; or a run with --compression int8"
        return Check("traffic", "warning", said, fix, figures)
    return Check("traffic", "ok", said, figures=figures)


def judge_round(
    examples_per_second: float, download_bytes_per_second: float | None, budget: RoundBudget
) -> Check:
    """What a round takes in all; whether that is too much is said of its two parts."""
    work, moved = work_seconds(examples_per_second, budget), round_bytes(budget)
    traffic = traffic_seconds(download_bytes_per_second, budget)
    seconds = work + (traffic or 0.0)
    figures = {
        "seconds": round(seconds, 1),
        "bytes_each_way": moved,
        "is_traffic_measured": traffic is not None,
    }
    took = f"{format_seconds(seconds)}{' in all' if traffic is not None else ' and the traffic'}"
    return Check("round", "ok", f"about {took}, {format_size(moved)} each way", "", figures)


# ---- the model ------------------------------------------------------------------------------------

ModelSource = Literal["here", "kept", "peers", "other weights", "other files", "new", "nowhere"]


def judge_model(name: str, num_parameters: int, source: ModelSource) -> Check:
    """`source`: where its files were found, all of them checked against the hashes of the spec."""
    said = f"{clean(name.rstrip('/').rpartition('/')[2] or name, 32)}, {num_parameters / 1e6:.1f}M"
    figures = {"model": name, "num_parameters": num_parameters, "source": source}
    told = {
        "here": "here, hashes fit",
        "kept": "in --output-dir, hashes fit",
        "peers": "from peers, hashes of the files fit",
        "new": "usable",
    }
    if source in told:
        return Check("model", "ok", f"{said}: {told[source]}", "", figures)
    if source == "nowhere":
        fix = "give --initial-peers ADDR of a peer that runs: its files come from there"
        return Check("model", "warning", f"{said}: not here, and no peer was asked", fix, figures)
    what = "the weights here are" if source == "other weights" else "the files here are"
    fix = "nothing to do: the right ones come from the peers when you join"
    return Check("model", "warning", f"{said}: {what} not the run's", fix, figures)


def _some(names: Sequence[str], max_chars: int = 20) -> str:
    """The first three, each cut and cleaned, and how many more there are."""
    shown = ", ".join(repr(clean(name, max_chars)) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
