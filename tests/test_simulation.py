"""Is a simulated run what real peers would compute, does it go on where it stopped, what does churn do?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.chain import Chain
from coordinator.errors import StateError, UsageError
from peer.compression import CODECS
from peer.data import DataConfig, TaskData, load_task_data
from peer.finetune import Budget, FinetuneConfig
from peer.genesis import make_run
from peer.learner import Learner
from scripts.simulation import (
    Contributor,
    Outcome,
    SimulatedSwarm,
    _harmed,
    _uniform,
    dropped,
    trimmed,
)
from tests.tiny_models import make_model_dir, make_texts

CONFIG = FinetuneConfig(
    learning_rate=1e-3, per_device_train_batch_size=8, max_length=16, bf16=False, use_cpu=True
)
NAMES = ("ann", "bob", "cat", "dan")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskData]:
    directory, tasks = tmp_path_factory.mktemp("data"), {}
    for number, name in enumerate(NAMES):
        texts, labels = make_texts(60, seed=number)
        rows = [json.dumps({"text": t, "label": label}) for t, label in zip(texts, labels, strict=True)]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        tasks[name] = load_task_data(DataConfig(data=str(directory / f"{name}.jsonl")))
    return tasks


def make_swarm(
    model_dir: Path,
    tmp_path: Path,
    tasks: dict[str, TaskData],
    *,
    churn: float = 0.0,
    drop: float = 0.0,
    trim: float = 0.0,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> SimulatedSwarm:
    """`changes`: fields of the contributors, by name."""
    run = {"run_name": "t", "created_at": 0.0, "num_rounds": 3, "round_examples": 24, **options}
    spec, first = make_run(str(model_dir), None, run, tmp_path / "base")
    people = [Contributor(name, data, seed=i) for i, (name, data) in enumerate(tasks.items())]
    people = [replace(p, **(changes or {}).get(p.name, {})) for p in people]
    return SimulatedSwarm(
        spec,
        tmp_path / "base",
        first,
        people,
        CONFIG,
        eval_examples=8,
        seed=7,
        churn=churn,
        drop=drop,
        trim=trim,
    )


def run_all(swarm: SimulatedSwarm) -> list[Outcome]:
    outcomes = []
    while not swarm.is_done:
        outcome = swarm.step()
        assert outcome is not None
        outcomes.append(outcome)
    return outcomes


def test_a_round_is_the_mean_of_what_learners_learn(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    swarm = make_swarm(model_dir, tmp_path, tasks, num_rounds=2)
    layout, base = swarm.state.manifest.layout, swarm.state.flat.clone()
    learners = [
        Learner(data, model_dir, layout, base, CONFIG, eval_examples=8, seed=i)
        for i, data in enumerate(tasks.values())
    ]
    expected = base
    for round_ in (1, 2):
        swarm.step()
        total = torch.zeros(base.numel(), dtype=torch.float64)
        for learner in learners:
            learner.load_backbone(expected)
            learner.evaluate_base(round_)
            learner.finetune(Budget(24), round_=round_)
            total += (learner.export_backbone() - expected).double() / len(learners)
        step = float(total.norm())
        assert step > 1e-3
        wrong = swarm.state.flat.double() - (expected.double() + total)
        assert float(wrong.norm()) < 1e-5 * step
        expected = swarm.state.flat.clone()  # else Adam would make much of the last bits
    assert swarm.chain.round == 2
    assert swarm.chain.state_hash == swarm.state.state_hash


def test_the_drawn_are_max_peers_and_change(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    outcomes = run_all(make_swarm(model_dir, tmp_path, tasks, num_rounds=6, max_peers=2, round_examples=8))
    cohorts = [frozenset(work.name for work in outcome.works) for outcome in outcomes]
    assert [len(cohort) for cohort in cohorts] == [2] * 6
    assert len(set(cohorts)) > 1
    assert [outcome.round for outcome in outcomes] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("compression", ["fp32", "int4"])
def test_a_run_goes_on_bit_for_bit(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData], compression: str
) -> None:
    options: dict[str, Any] = {"compression": compression, "outer_optimizer": "nesterov", "max_peers": 3}
    whole = make_swarm(model_dir, tmp_path, tasks, **options)
    expected = [outcome.state_hash for outcome in run_all(whole)]
    first = make_swarm(model_dir, tmp_path, tasks, **options)
    first.step()
    first.save(tmp_path / "checkpoint")
    # Stopped within the second round: what it did is not kept.
    assert first.step(should_stop=lambda: True) is None
    second = make_swarm(model_dir, tmp_path, tasks, **options)
    second.load(tmp_path / "checkpoint")
    assert second.chain.round == second.tick == 1
    assert [outcome.state_hash for outcome in run_all(second)] == expected[1:]


def test_what_compression_cuts_off_is_kept_and_sent_later(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    swarm = make_swarm(model_dir, tmp_path, tasks, compression="int4", max_peers=2)
    outcome = swarm.step()
    assert outcome is not None
    trained = {work.name for work in outcome.works}
    for peer in swarm._peers.values():
        sent = peer.feedback.sent
        if peer.contributor.name in trained:
            assert sent is not None
            assert float(sent.norm()) > 0
            assert peer.feedback.reduced
        else:
            assert sent is None
            assert not peer.feedback.reduced


def test_what_a_rule_leaves_out_is_sent_again_and_without_a_quorum_nothing_is_added_to_it(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    swarm = make_swarm(
        model_dir, tmp_path, tasks, compression="int8", screening="norm", changes={"bob": {"harm": "x100"}}
    )
    outcome = swarm.step()
    assert outcome is not None
    assert {work.name: work.factor > 0 for work in outcome.works} == {
        "ann": True, "bob": False, "cat": True, "dan": True
    }  # fmt: skip
    sent = {p.contributor.name: p.feedback.sent for p in swarm._peers.values()}
    norms = {work.name: work.norm for work in outcome.works}
    contributions = swarm.chain.commits[0].commit.contributors
    assert sorted(len(c.missing) for c in contributions) == [0, 0, 0, 1]
    assert sent["bob"] is not None
    assert sent["ann"] is not None
    usual = float(np.median([norms[name] for name in NAMES]))
    assert float(sent["bob"].norm()) == pytest.approx(usual, rel=1e-3)  # all of it, cut to the usual norm
    assert float(sent["ann"].norm()) < 0.05 * norms["ann"]  # what int8 cut off
    before = {peer_id: peer.feedback.sent for peer_id, peer in swarm._peers.items()}
    swarm._is_here = lambda peer: peer.contributor.name in ("ann", "bob")  # type: ignore[method-assign]
    swarm.spec = swarm.spec.model_copy(update={"min_peers": 3})
    swarm.chain = Chain(swarm.spec, swarm.chain.commits)
    alone = swarm.step()
    assert alone is not None
    assert not alone.committed
    assert {peer_id: peer.feedback.sent for peer_id, peer in swarm._peers.items()} == before


def test_without_a_quorum_nothing_is_committed(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    swarm = make_swarm(model_dir, tmp_path, tasks, churn=0.75, min_peers=2, num_rounds=2, round_examples=8)
    before, outcomes = swarm.state.state_hash, run_all(swarm)
    alone = [outcome for outcome in outcomes if len(outcome.present) < 2]
    assert alone, "the draws of this seed must have a tick without a quorum"
    for outcome in outcomes:
        expected = {name for name in NAMES if _uniform(7, "here", outcome.tick, name) >= 0.75}
        assert set(outcome.present) == expected
        assert outcome.committed == (len(expected) >= 2)
        assert (outcome.state_hash != before) == outcome.committed
        before = outcome.state_hash
    assert swarm.chain.round == 2


@pytest.mark.parametrize(("max_weight", "most"), [(4.0, 2.0), (1.5, 1.5)])
def test_the_slow_do_part_of_the_budget_and_weigh_less_the_fast_more(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData], max_weight: float, most: float
) -> None:
    speeds = {"bob": {"speed": 0.25}, "cat": {"speed": 2.0}}
    swarm = make_swarm(model_dir, tmp_path, tasks, changes=speeds, weights="examples", max_weight=max_weight)
    outcome = swarm.step()
    assert outcome is not None
    examples = {work.name: work.result.num_examples for work in outcome.works}
    assert examples == {"ann": 24, "bob": 6, "cat": 48, "dan": 24}
    weights = {c.num_examples: c.weight for c in swarm.chain.commits[0].commit.contributors}
    assert weights == {6: 0.25, 24: 1.0, 48: most}


def test_dare_keeps_the_mean_and_ties_the_largest() -> None:
    drawn = dropped(torch.ones(100_000), 0.9, seed=3)
    assert sorted(set(drawn.tolist())) == pytest.approx([0.0, 10.0])
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)  # three times its standard error
    assert torch.equal(drawn, dropped(torch.ones(100_000), 0.9, seed=3))
    assert not torch.equal(drawn, dropped(torch.ones(100_000), 0.9, seed=4))
    assert trimmed(torch.tensor([1.0, -4.0, 2.0, -3.0, 0.5]), 0.6).tolist() == [0.0, -4.0, 0.0, -3.0, 0.0]
    for same in (dropped(torch.tensor([1.0, -2.0]), 0.0, seed=0), trimmed(torch.tensor([1.0, -2.0]), 0.0)):
        assert same.tolist() == [1.0, -2.0]


def test_what_is_dropped_or_trimmed_is_not_sent(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    """A tenth of the values, ten times as long: root of ten times the norm. The largest fifth is less."""
    norms = {}
    for name, drop, trim in (("plain", 0.0, 0.0), ("dare", 0.9, 0.0), ("ties", 0.0, 0.8)):
        swarm = make_swarm(model_dir, tmp_path / name, tasks, num_rounds=1, drop=drop, trim=trim)
        outcome = swarm.step()
        assert outcome is not None
        norms[name] = {work.name: work.norm for work in outcome.works}
    for peer, norm in norms["plain"].items():
        assert norms["dare"][peer] / norm == pytest.approx(10**0.5, rel=0.25)
        assert 0.5 < norms["ties"][peer] / norm < 1.0


def test_harm(model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]) -> None:
    honest = make_swarm(model_dir, tmp_path, tasks, num_rounds=1)
    base = honest.state.flat.clone()
    plain = honest.step()
    loud = make_swarm(model_dir, tmp_path, tasks, num_rounds=1, changes={"bob": {"harm": "x100"}})
    hit = loud.step()
    clipped = make_swarm(
        model_dir,
        tmp_path,
        tasks,
        num_rounds=1,
        aggregation="clipped_mean",
        changes={"bob": {"harm": "x100"}},
    )
    bounded = clipped.step()
    assert plain is not None
    assert hit is not None
    assert bounded is not None
    norms = {work.name: work.norm for work in plain.works}
    assert {w.name: w.norm / norms[w.name] for w in hit.works} == pytest.approx(
        {"ann": 1.0, "bob": 100.0, "cat": 1.0, "dan": 1.0}, rel=1e-3
    )
    assert hit.fused_norm > 20 * plain.fused_norm
    assert bounded.fused_norm < 2 * plain.fused_norm
    assert next(w.factor for w in bounded.works if w.name == "bob") < 0.02
    delta = torch.tensor([3.0, -4.0])
    assert torch.equal(_harmed(delta.clone(), "flipped", 0), torch.tensor([-3.0, 4.0]))
    assert float(_harmed(delta.clone(), "noise", 0).norm()) == pytest.approx(5.0)
    assert float(base.norm()) > 0


def test_a_contributor_that_diverges_sits_out(
    model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]
) -> None:
    swarm = make_swarm(model_dir, tmp_path, tasks, num_rounds=1)
    peer = next(p for p in swarm._peers.values() if p.contributor.name == "cat")
    head = peer.learner.head_state()
    swarm._peers[peer.identity.peer_id].learner._config = replace(CONFIG, head_init="keep")
    peer.learner.load_head_state({name: torch.full_like(t, float("nan")) for name, t in head.items()})
    outcome = swarm.step()
    assert outcome is not None
    assert {w.name: w.factor for w in outcome.works} == {"ann": 1.0, "bob": 1.0, "cat": 0.0, "dan": 1.0}
    assert len(swarm.chain.commits[0].commit.contributors) == 3
    assert bool(torch.isfinite(swarm.state.flat).all())


def test_what_cannot_be_loaded(model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]) -> None:
    swarm = make_swarm(model_dir, tmp_path, tasks)
    swarm.step()
    path = tmp_path / "checkpoint"
    swarm.save(path)
    with pytest.raises(StateError, match="another run"):
        make_swarm(model_dir, tmp_path, tasks, num_rounds=9).load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="cannot be read"):
        make_swarm(model_dir, tmp_path, tasks).load(path)
    path.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(StateError, match=r"damaged|cannot be read"):
        make_swarm(model_dir, tmp_path, tasks).load(path)


def test_what_cannot_be_simulated(model_dir: Path, tmp_path: Path, tasks: dict[str, TaskData]) -> None:
    with pytest.raises(UsageError, match="churn"):
        make_swarm(model_dir, tmp_path, tasks, churn=1.0)
    with pytest.raises(UsageError, match="speed of ann"):
        make_swarm(model_dir, tmp_path, tasks, changes={"ann": {"speed": 0.0}})
    with pytest.raises(UsageError, match="same name"):
        make_swarm(model_dir, tmp_path, tasks, changes={"ann": {"name": "bob"}})
    swarm = make_swarm(model_dir, tmp_path, tasks, num_rounds=1)
    swarm.step()
    with pytest.raises(ValueError, match="all rounds"):
        swarm.step()
    assert set(CODECS) >= {"fp32", "int4"}
