"""Do experiments name what they need in order, do each piece once, choose on validation rows, tell all?"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.errors import StateError, UsageError
from peer.benchmark import Method
from peer.statistics import Answers, compare
from peer.stopping import StopRequested, StopSwitch
from scripts.experiments import (
    PRETRAINED,
    TITLES,
    Choice,
    Chosen,
    Mix,
    Multitask,
    Piece,
    Profile,
    Run,
    Scoring,
    all_pieces,
    cost,
    load_profile,
    winner,
)
from scripts.lab import Lab, locked, validation_texts
from scripts.report import Provenance, readme, write_report
from scripts.reproduce import CONFIG, _check_work, main
from scripts.simulate import Plan
from tests.tiny_models import make_model_dir, make_texts

NAMES = ("sst2", "qqp", "subj", "tweet_emotion", "ag_news", "cola")  # of the smoke profile


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
        (folder / name).mkdir()
        for part, (split, size) in enumerate((("train", 60), ("validation", 44), ("test", 40))):
            texts, labels = make_texts(size, seed=10 * number + part)
            with (folder / name / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                writer.writerows(zip(texts, [("bad", "good")[label] for label in labels], strict=True))
    return folder


@pytest.fixture(scope="module")
def night() -> Profile:
    return load_profile(CONFIG, "night")


@pytest.fixture(scope="module")
def smoke(model_dir: Path) -> Profile:
    return load_profile(CONFIG, "smoke", str(model_dir))


def reproduce(data_dir: Path, model_dir: Path, out: Path, *flags: str) -> int:
    given = ["--data-dir", str(data_dir), "--out", str(out), "--model", str(model_dir), "--profile", "smoke"]
    return main([*given, "--threads", "1", *flags])


# ---- what the experiments need ------------------------------------------------------------


def needs(piece: Piece) -> Iterator[str]:
    """Names of models and choices."""
    if isinstance(piece, Scoring):
        yield piece.model.partition("@")[0].removeprefix("chosen:")
    elif isinstance(piece, Mix):
        yield from (name.partition("@")[0] for name in piece.parts)
    elif isinstance(piece, Choice):
        yield from piece.candidates
    elif isinstance(piece, Run) and isinstance(piece.plan, Chosen):
        yield piece.plan.choice


@pytest.mark.parametrize("numbers", [(n,) for n in TITLES] + [tuple(TITLES)])
def test_a_piece_needs_only_what_stands_before_it(night: Profile, numbers: tuple[int, ...]) -> None:
    there = {PRETRAINED}
    for _, piece in all_pieces(night, numbers):
        assert set(needs(piece)) <= there, piece.name
        there.add(piece.name)


def test_a_choice_comes_after_its_scorings(night: Profile) -> None:
    scored: set[tuple[str, str, str, str]] = set()
    for _, piece in all_pieces(night):
        if isinstance(piece, Scoring):
            scored |= {(piece.book, piece.model, piece.method, name) for name in piece.datasets}
        if isinstance(piece, Choice):
            assert piece.book == "validation"
            wanted = {
                (piece.book, model, method, name)
                for candidate, groups in piece.candidates.items()
                for method, names in groups
                for name in names
                for model in (candidate, PRETRAINED)
            }
            assert wanted <= scored, piece.name


def test_states_that_a_mix_or_a_scoring_reads_are_kept(night: Profile) -> None:
    kept = {p.name: p.keep_every for _, p in all_pieces(night) if isinstance(p, Run) and p.keep_every}
    read = [n for _, p in all_pieces(night) for n in (getattr(p, "parts", None) or [getattr(p, "model", "")])]
    states = [name.split("@") for name in read if "@" in name]
    assert states
    assert all(int(round_) % kept[name] == 0 for name, round_ in states)


def test_every_data_set_is_unseen_once(night: Profile) -> None:
    assert len(night.datasets) == 23
    for fold in range(3):
        assert not set(night.trained(fold)) & set(night.unseen(fold))
        assert len(night.trained(fold)) in (15, 16)
    assert sorted(name for fold in range(3) for name in night.unseen(fold)) == sorted(night.datasets)


def test_schedules_have_the_same_steps(night: Profile) -> None:
    assert night.num_examples == 20 * 8 * 256
    for changes in night.schedules.values():
        plan = night.plan(night.trained(0), 0, **changes).run
        peers = min(plan["max_peers"], len(night.trained(0)))
        num = plan["num_rounds"] * peers * plan["round_examples"]
        assert num == pytest.approx(night.num_examples, rel=1e-3)


def test_a_night_is_a_night_in_pieces_of_under_two_hours(night: Profile) -> None:
    hours = [cost(night, piece) / night.forward_per_second / 3600 for _, piece in all_pieces(night)]
    assert sum(hours) < 10
    assert max(hours) < 2


def test_who_is_alone_takes_no_longer_steps_than_it_learned(night: Profile) -> None:
    """The outer learning rate of a swarm makes up for deltas of other tasks, of which there are none."""
    runs = {piece.name: piece.plan for _, piece in all_pieces(night) if isinstance(piece, Run)}
    for name, plan in runs.items():
        if name.startswith(("alone-", "split")) or name == "cohort1":
            assert isinstance(plan, Plan)
            assert plan.run["outer_lr"] == 1.0, name


def test_keys_of_a_run_go_where_they_are_known(night: Profile) -> None:
    plan = night.plan(["sst2"], 3, outer_lr=2.0, learning_rate=1e-3, churn=0.5, max_peers=1)
    assert plan.run["outer_lr"] == 2.0
    assert plan.run["min_peers"] == 1
    assert plan.finetune["learning_rate"] == 1e-3
    assert plan.churn == 0.5
    with pytest.raises(UsageError, match="unknown key 'outr_lr'"):
        night.plan(["sst2"], 3, outr_lr=2.0)


def test_a_wrong_config_is_told(tmp_path: Path) -> None:
    text = CONFIG.read_text()
    for old, new, words in (
        ("alphas = [0.5]\n", "", "alphas"),
        ('"outer lr 2" = { outer_lr = 2.0 }\n', '"a/b" = {}\n', "'a/b' cannot be the name"),
        ('["ag_news", "cola"]]', '["ag_news", "sst2"]]', "in two folds"),
        ("[smoke.own]", "[smoke.owl]", "own"),
    ):
        head, _, smoke = text.partition("[smoke]")
        assert old in smoke or old in text
        (tmp_path / "c.toml").write_text(head + "[smoke]" + smoke.replace(old, new))
        with pytest.raises(UsageError, match=words):
            load_profile(tmp_path / "c.toml", "smoke")
    with pytest.raises(
        UsageError, match=r"no profile 'dawn'; it has: night, again, baselines, variants, base, smoke$"
    ):
        load_profile(CONFIG, "dawn")


def test_folds_above_the_profiles_are_for_those_that_have_none() -> None:
    night, variants, smoke = (load_profile(CONFIG, name) for name in ("night", "variants", "smoke"))
    assert night.folds == variants.folds
    assert len(night.datasets) == 23
    assert smoke.folds == (("sst2", "qqp"), ("subj", "tweet_emotion"), ("ag_news", "cola"))


# ---- the lab ------------------------------------------------------------------------------


def test_validation_rows_are_cut_in_two_and_no_test_row_is_among_them(data_dir: Path, smoke: Profile) -> None:
    rows = validation_texts(data_dir, "sst2", smoke.validation).data
    with (data_dir / "sst2" / "validation.csv").open(newline="") as file:
        there = [row["text"] for row in csv.DictReader(file)]
    chosen_on, figures = list(rows.validation["text"]), list(rows.test["text"])
    assert len(chosen_on) == len(figures) == 20
    assert sorted(chosen_on + figures) != sorted(there)  # 40 of 44
    assert all(there.count(text) >= (chosen_on + figures).count(text) for text in there)
    assert set(chosen_on + figures) <= set(there)


def keep(
    lab: Lab, book: str, model: str, dataset: str, predictions: list[int], method: Method = "probe"
) -> None:
    """As if it had been scored: labels are all 1."""
    file = lab._score_file(book, model, dataset, method)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        "key": lab._score_key(book, model),
        "labels": [1] * 4,
        "predictions": [predictions],
        "chosen": [1],
    }
    file.write_text(json.dumps(kept))


def choice_of(smoke: Profile) -> Choice:
    return next(p for _, p in all_pieces(smoke, (4,)) if isinstance(p, Choice) and p.name == "multitask")


def test_the_best_on_validation_rows_is_chosen(smoke: Profile, data_dir: Path, tmp_path: Path) -> None:
    lab, choice = Lab(smoke, data_dir, tmp_path), choice_of(smoke)
    worse, better = choice.candidates
    for dataset in smoke.trained(0):
        keep(lab, "validation", PRETRAINED, dataset, [1, 1, 0, 0])
        keep(lab, "validation", worse, dataset, [1, 0, 0, 0])
        keep(lab, "validation", better, dataset, [1, 1, 1, 0])
    assert not lab.is_done(choice)
    lab.do(choice)
    assert lab.is_done(choice)
    assert lab.chosen("multitask") == better
    # cola's metric is Matthews: 0 where all labels are equal; the other three gain a quarter
    num_accuracy = sum(name != "cola" for name in smoke.trained(0))
    share = num_accuracy / len(smoke.trained(0))
    assert lab.gains_of_choice("multitask") == pytest.approx({worse: -0.25 * share, better: 0.25 * share})


def test_a_choice_without_its_scorings_is_refused(smoke: Profile, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not scored yet"):
        Lab(smoke, data_dir, tmp_path).do(choice_of(smoke))


def test_broken_and_foreign_pieces_are_refused(smoke: Profile, data_dir: Path, tmp_path: Path) -> None:
    lab = Lab(smoke, data_dir, tmp_path)
    keep(lab, "test", PRETRAINED, "sst2", [1, 1, 1, 0])
    found = lab.answers("test", PRETRAINED, "sst2", "probe")
    assert found is not None
    assert found.value == 0.75
    file = lab._score_file("test", PRETRAINED, "sst2", "probe")
    file.write_text(file.read_text().replace('"key": "', '"key": "other'))
    with pytest.raises(UsageError, match="of other settings"):
        lab.answers("test", PRETRAINED, "sst2", "probe")
    file.write_text("{")
    with pytest.raises(StateError, match="is broken"):
        lab.answers("test", PRETRAINED, "sst2", "probe")


def test_models_are_made_only_for_scores_that_are_missing(
    smoke: Profile, data_dir: Path, tmp_path: Path
) -> None:
    lab, pieces = Lab(smoke, data_dir, tmp_path), [p for _, p in all_pieces(smoke, (4,))]
    assert [p.name for p in lab.pending(pieces)] == [p.name for p in pieces]
    scorings = [p for p in pieces if isinstance(p, Scoring) and not p.model.startswith("chosen:")]
    for scoring in scorings:
        for dataset in scoring.datasets:
            keep(lab, scoring.book, scoring.model, dataset, [1, 1, 1, 0], scoring.method)
    chosen = [p for p in pieces if isinstance(p, Scoring) and p.model.startswith("chosen:")]
    candidates = {name for p in pieces if isinstance(p, Choice) for name in p.candidates}
    left = lab.pending(pieces)
    assert {p.name for p in left if isinstance(p, Run | Multitask)} == candidates
    for choice in (p for p in pieces if isinstance(p, Choice)):
        lab.do(choice)
    left = lab.pending(pieces)
    best = {lab.chosen("multitask"), lab.chosen("best single")}
    assert {p.name for p in left} == {*best, *(p.name for p in chosen)}
    assert left == [p for p in pieces if p in left]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StateError, match="another process"), locked(tmp_path):
        pass


def test_states_are_deleted_when_nothing_needs_them(smoke: Profile, data_dir: Path, tmp_path: Path) -> None:
    for name in (
        "fold0/models/round-0001",
        "fold0/models/round-0002",
        "fold0/model",
        "fold1/models/round-0001",
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
    lab = Lab(smoke, data_dir, tmp_path)
    lab.tidy([Mix("last", {"fold0@1": 0.5, "fold0": 0.5})])
    assert (tmp_path / "runs/fold0/models/round-0001").exists()  # a mix needs it
    assert not (tmp_path / "runs/fold0/models/round-0002").exists()
    assert (tmp_path / "runs/fold1/models/round-0001").exists()  # its run is not over


@pytest.mark.parametrize("kind", ["fold1", "split1-seed0", "score"])
def test_a_stopped_piece_goes_on(smoke: Profile, data_dir: Path, tmp_path: Path, kind: str) -> None:
    pieces = [p for _, p in all_pieces(smoke)]
    wanted = Scoring(PRETRAINED, "test", "few_shot", ("sst2",)) if kind == "score" else None
    piece = wanted or next(p for p in pieces if p.name == kind)
    switch = StopSwitch()

    def stop(fraction: float) -> None:
        if fraction > 0.6:
            switch._set("interrupted", 130)

    with pytest.raises(StopRequested):
        Lab(smoke, data_dir, tmp_path / "a", switch=switch).do(piece, stop)
    again, whole = Lab(smoke, data_dir, tmp_path / "a"), Lab(smoke, data_dir, tmp_path / "b")
    assert not again.is_done(piece)
    for lab in (again, whole):
        lab.do(piece)
        assert lab.is_done(piece)
    assert [record["piece"] for record in again.times] == [piece.name] * 2
    if kind != "score":
        ours, theirs = (lab.work / "runs" / kind / "model" / "model.safetensors" for lab in (again, whole))
        assert ours.read_bytes() == theirs.read_bytes()


# ---- the command --------------------------------------------------------------------------


def test_pieces_are_done_once_and_told(
    data_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = tmp_path / "out" / "work" / "times.jsonl"
    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6", "--max-minutes", "0") == 0
    assert "The time is up" in capsys.readouterr().out
    assert not times.exists()
    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6") == 0
    num_done = len(times.read_text().splitlines())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 a round |" in text
    assert "experiment-6.png" in text
    assert text.count("\nnot run\n") == 7  # the other seven experiments
    assert str(tmp_path) not in text
    assert str(data_dir) not in text
    finding = json.loads((tmp_path / "out" / "experiment-6.json").read_text())
    row = finding["rows"]["2 a round"]["unseen tasks, head-only"]
    assert list(row["datasets"]) == ["sst2", "qqp"]
    assert row["mean"] == pytest.approx(np.mean([ours - base for base, ours in row["datasets"].values()]))

    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6") == 0
    assert len(times.read_text().splitlines()) == num_done
    assert (tmp_path / "out" / "README.md").read_text() == text
    capsys.readouterr()
    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6", "--list") == 0
    listed = capsys.readouterr().out
    assert "to do │" not in listed
    assert "0.0 s to do" in listed

    for folder in ("runs", "books"):  # as in a clone that has only what is committed
        shutil.rmtree(tmp_path / "out" / "work" / folder)
    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6") == 0
    assert len(times.read_text().splitlines()) == num_done
    assert (tmp_path / "out" / "README.md").read_text() == text

    assert reproduce(data_dir, model_dir, tmp_path / "out", "--only", "6", "--model", "another") == 2
    assert "holds results of profile smoke" in capsys.readouterr().err
    config = CONFIG.read_text().replace("round_examples = 16\n", "round_examples = 17\n")
    config = config.replace("test_examples = 40", "test_examples = 39")
    (tmp_path / "c.toml").write_text(config)
    flags = ("--only", "6", "--config", str(tmp_path / "c.toml"))
    assert reproduce(data_dir, model_dir, tmp_path / "out", *flags) == 2
    assert "of other settings" in capsys.readouterr().err


def test_a_folder_of_others_is_left_alone(data_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert reproduce(data_dir, model_dir, tmp_path) == 6
    (tmp_path / "settings.json").write_text("{")
    assert reproduce(data_dir, model_dir, tmp_path) == 6
    (tmp_path / "settings.json").write_text("[]")
    assert reproduce(data_dir, model_dir, tmp_path) == 6
    assert not (tmp_path / "work" / "times.jsonl").exists()
    assert reproduce(tmp_path / "none", model_dir, tmp_path / "out") == 3


def test_results_whose_work_is_elsewhere_are_left_alone(
    data_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a clone of the repository, where the work of the night is not."""
    assert reproduce(data_dir, model_dir, tmp_path, "--max-minutes", "0") == 0
    write_report(tmp_path, hand_made(), PROVENANCE)
    shutil.rmtree(tmp_path / "work")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for flags in (("--max-minutes", "0"), ("--only", "6"), ()):
        assert reproduce(data_dir, model_dir, tmp_path, *flags) == 6
        told = capsys.readouterr().err
        assert "(0 of 3 lines)" in told
        assert "name another --out, or say --redraw" in told
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert reproduce(data_dir, model_dir, tmp_path, "--list") == 0
    (tmp_path / "work" / "times.jsonl").write_text('{"piece": "a", "seconds": 1, "commit": "abc"}\n' * 3)
    assert reproduce(data_dir, model_dir, tmp_path, "--max-minutes", "0", "--no-plots") == 0


@pytest.mark.parametrize("name", ["baselines", "variants"])
def test_the_work_in_the_repository_goes_on(name: str) -> None:
    _check_work(CONFIG.parent.parent / "results" / name)  # no StateError


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_experiments_run_and_are_told(data_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    assert reproduce(data_dir, model_dir, tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "not run" not in text
    assert "Peers made worse: " in text
    for number, title in TITLES.items():
        assert f"## {number}. {title}" in text
        assert (tmp_path / "out" / f"experiment-{number}.png").stat().st_size > 10_000
    kept = [f for f in (tmp_path / "out").iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in kept) < 5_000_000
    assert not list((tmp_path / "out" / "work" / "runs").glob("fold*/models/round-*"))
    winner = json.loads((tmp_path / "out" / "work" / "runs" / "winner" / "plan.json").read_text())
    assert Plan(**winner).run["num_rounds"] == 2


# ---- the report ---------------------------------------------------------------------------


def compared(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """Data sets a, b, ...: rows that are right."""
    one, other = ([Answers.of_correct(np.array(rows)) for rows in side] for side in (ours, theirs))
    names = "abcdefgh"[: len(one)]
    return {
        **asdict(compare(one, other, seed=0)),
        "datasets": {n: [b.value, a.value] for n, a, b in zip(names, one, other, strict=True)},
        "ours": 0.5,
        "theirs": 0.5,
    }


def hand_made() -> dict[int, dict[str, Any]]:
    nothing: dict[str, Any] = {"probe": None, "few_shot": None, "finetune": None}
    own = compared([[1, 1, 1, 1], [0, 0, 0, 1]], [[1, 1, 0, 0], [0, 0, 1, 1]])  # +50 and -25 points
    return {
        1: {"seeds": [{"seed": 0, "num_datasets": 2, "rounds": {1: own, 2: None}}]},
        2: {"methods": nothing, "num_datasets": 2},
        3: {"rows": {"x": {"m": None}}},
        4: {"rows": {"x": {"m": None}}, "swarm_against_multitask": {"m": None}, "chosen": {}, "tried": {}},
        5: {"dataset": "qqp", "base": 0.5, "runs": [{"contributors": 2, "seed": 0, "values": [None]}]},
        6: {"rows": {"x": {"m": None}}},
        7: {"comparison": own, "share_worse": 0.5},
        8: {"variants": {"x": {"m": None}}, "states": {}, "test": {}, "chosen": {}},
    }


PROVENANCE = Provenance("python", "smoke", "tiny", {"abc": 3}, {}, {}, "a machine", 2, 0.5, 4, 3)


def test_losses_are_told_and_what_was_not_run_is_said(tmp_path: Path) -> None:
    text = readme(hand_made(), PROVENANCE, {})
    assert "Peers made worse: 1 of 2 (50 %)" in text
    assert "| b | 50.0 | 25.0 | 50.0 → 25.0 (-25.0) |" in text
    assert "+12.50 [" in text  # the mean of +50 and -25
    assert text.count("\nnot run\n") == 6
    assert "| 2 | not run | not run |" in text  # round 2 of experiment 1
    assert "3 of 4 pieces, 0.50 hours" in text


def test_what_was_run_in_a_folder_below_stands_in(tmp_path: Path) -> None:
    whole = hand_made()
    run = {4: {**whole[4], "swarm_against_multitask": {"m": whole[7]["comparison"]}}, 7: whole[7]}
    for name in ("small", "smaller"):
        (tmp_path / name).mkdir()
    write_report(tmp_path / "small", run, PROVENANCE, with_plots=False)
    write_report(tmp_path / "smaller", {4: run[4]}, PROVENANCE, with_plots=False)
    write_report(
        tmp_path, {**whole, 7: {"comparison": None, "share_worse": None}}, PROVENANCE, with_plots=False
    )
    text = (tmp_path / "README.md").read_text()
    points = r"training: m \| \+12\.50 \[[-+.\d]+, [-+.\d]+\] "
    assert re.search(points + r"\(of \[small\]\(small/README.md\)\) \|", text)  # the first one that has it
    assert "with the same steps | 50 % (of [small](small/README.md)) |" in text
    assert text.count("See also: ") == 2
    assert "See also: [small](small/README.md), [smaller](smaller/README.md)\n" in text
    assert (
        "## 7. Who gains? Each peer alone against the swarm, on its own test rows\n\nSee also: [small]"
        in text
    )
    own = (tmp_path / "small" / "README.md").read_text()
    assert re.search(points + r"\|", own)
    assert "See also" not in own


def test_rows_without_a_figure_are_named_in_one_line() -> None:
    found = {"m": compared([[1, 1]], [[1, 0]])}
    text = readme({3: {"rows": {"x, longer": {"m": None}, "y": found, "z": {"m": None}}}}, PROVENANCE, {})
    assert "| y | +50.00 [" in text
    assert "\n\nNot run: x, longer; z.\n" in text
    assert "| z |" not in text


def test_variants_are_told_against_the_run_that_they_change() -> None:
    against = {"y": {"m": compared([[1, 1]], [[1, 0]])}, "z": {"m": None}}
    finding = {**hand_made()[8], "chosen": {"variant": None, "mix": None}}
    text = readme({8: {**finding, "against_as_is": against}}, PROVENANCE, {})
    assert 'Each against "as is", paired' in text
    assert "| y | +50.00 [" in text
    assert "| z |" not in text  # it is in the table above, as not run
    run_only = {**finding, "variants": against}
    assert "Each against" not in readme({8: run_only}, PROVENANCE, {})


def test_unseen_tasks_are_told_of_the_folds_that_are_scored() -> None:
    one_fold = compared([[1, 1, 1, 1]], [[1, 1, 0, 0]])
    methods = {"probe": one_fold, "few_shot": None, "finetune": None}
    text = readme({2: {"methods": methods, "num_datasets": 3}}, PROVENANCE, {})
    assert "| head-only, 1 of 3 data sets | " in text
    assert "| unseen tasks head-only not below the base, 1 of 3 data sets | +50.00 [" in text
    assert "| few examples | not run |" in text


@pytest.mark.parametrize("name", ["baselines", "variants"])
def test_the_scores_in_the_repository_are_of_the_present_settings(name: str) -> None:
    """A field that is added to a plan must not make hours of results useless."""
    profile = load_profile(CONFIG, name)
    lab = Lab(profile, Path("not read"), CONFIG.parent.parent / "results" / name / "work")
    scorings = [piece for _, piece in all_pieces(profile) if isinstance(piece, Scoring)]
    assert sum(map(lab.is_done, scorings)) >= 10  # and no UsageError


def test_a_variant_that_changes_nothing_is_not_run_twice() -> None:
    variants = load_profile(CONFIG, "variants")
    names = [piece.name for _, piece in all_pieces(variants)]
    assert "fold0" in names
    assert "variant lr 1e-4" in names
    assert not {"variant as is", "winner"} & set(names)  # at full length, the best variant is there already
    assert winner(variants) == "chosen:variant"
    chosen = next(piece for _, piece in all_pieces(variants) if piece.name == "variant")
    assert isinstance(chosen, Choice)
    assert {"fold0", "variant lr 1e-4"} < chosen.candidates.keys()
    assert (
        not {"variant a third slow", "variant unequal speeds"} & chosen.candidates.keys()
    )  # nobody chooses that
    assert winner(load_profile(CONFIG, "night")) == "winner"


def test_a_profile_may_be_based_on_another_and_follow_one_run(tmp_path: Path) -> None:
    night, again = load_profile(CONFIG, "night"), load_profile(CONFIG, "again")
    assert (again.swarm, again.scoring, again.folds) == (night.swarm, night.scoring, night.folds)
    pieces = [piece for _, piece in all_pieces(again)]
    assert [piece.name for piece in pieces if isinstance(piece, Run)] == ["fold2"]
    scored = [piece for piece in pieces if isinstance(piece, Scoring)]
    assert [piece.model for piece in scored] == [PRETRAINED, *(f"fold2@{r}" for r in (4, 8, 12, 16)), "fold2"]
    assert {piece.name for piece in pieces} < {piece.name for _, piece in all_pieces(night, [1])}
    for old, new in (("followed = [2]", "followed = [3]"), ('based_on = "night"', 'based_on = "day"')):
        (tmp_path / "c.toml").write_text(CONFIG.read_text().replace(old, new))
        with pytest.raises(UsageError, match="profile again"):
            load_profile(tmp_path / "c.toml", "again")


def test_a_profile_may_be_for_some_experiments(tmp_path: Path) -> None:
    baselines = load_profile(CONFIG, "baselines")
    assert {number for number, _ in all_pieces(baselines)} == {2, 3, 4, 5, 6, 7}
    some = {number: finding for number, finding in hand_made().items() if number in (3, 7)}
    text = readme(some, replace(PROVENANCE, note="Look elsewhere, too."), {})
    assert "## 1." not in text
    assert "| share of peers made worse, against being alone with the same steps | 50 % |" in text
    assert "+6 points" not in text
    assert "Look elsewhere, too." in text
    assert "At a glance" not in readme({8: hand_made()[8]}, PROVENANCE, {})  # it has nothing to reach
    broken = CONFIG.read_text().replace("experiments = [2, 3, 4, 5, 6, 7]", "experiments = [9]")
    (tmp_path / "c.toml").write_text(broken)
    with pytest.raises(UsageError, match="no experiment 9"):
        load_profile(tmp_path / "c.toml", "baselines")


def test_tables_are_drawn_again_from_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, hand_made(), PROVENANCE)
    note = load_profile(CONFIG, "night").note
    assert note
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")}
    expected = readme(hand_made(), replace(PROVENANCE, note=note), {1: True, 7: True})
    (tmp_path / "README.md").unlink()
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path), "--redraw"]) == 0
    assert (tmp_path / "README.md").read_text() == expected
    assert before == {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")}
    (tmp_path / "made.json").write_text("[]")
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path), "--redraw"]) == 6
    assert "made.json is broken (not an object): restore it" in capsys.readouterr().err


def test_plots_come_with_what_was_run_only(tmp_path: Path) -> None:
    write_report(tmp_path, hand_made(), PROVENANCE)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["experiment-1.png", "experiment-7.png"]
    assert len(list(tmp_path.glob("experiment-*.json"))) == 8
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_report(tmp_path, hand_made(), PROVENANCE)
    assert first == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
