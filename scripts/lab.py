"""How is a piece of an experiment done once, kept, and found again? The folder that all experiments share.

    WORK/runs/NAME/       one model each: plan.json (what made it), model/; of a swarm rounds.jsonl, models/
    WORK/books/BOOK/      answers of each backbone, kept by `scripts.evaluate.Store`
    WORK/scores/BOOK/MODEL/DATASET.METHOD.json    the same by the model's name, which outlives its files:
                          scores, choices and times are small enough for a repository
    WORK/choices/NAME.json                        which model a choice named
    WORK/times.jsonl                              seconds of each piece

Whatever is kept names the settings that made it, and is refused under other ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.errors import StateError, UsageError
from peer.benchmark import (
    BenchmarkConfig,
    BenchmarkTexts,
    Encoder,
    Method,
    Score,
    cut_texts,
    headline_metric,
    load_texts,
)
from peer.data import DataConfig, load_task_data
from peer.model import export_model, load_tokenizer
from peer.state import append_json_line, repair_json_lines, replace_directory, write_text
from peer.statistics import Answers
from peer.stopping import StopRequested, StopSwitch
from scripts import experiments
from scripts.evaluate import Model, Store, evaluate, tokenizer_key
from scripts.experiments import (
    PRETRAINED,
    Choice,
    Chosen,
    Group,
    Mix,
    Multitask,
    Piece,
    Profile,
    Run,
    Scoring,
)
from scripts.json_files import read_json
from scripts.multitask import train_multitask
from scripts.simulate import Plan, model_directory, settings_of, simulate

Progress = Callable[[float], None]  # gets the fraction done


class Lab:
    """Does pieces, and answers what came out. Not thread-safe; one process at a time, see `locked`."""

    def __init__(
        self,
        profile: Profile,
        data_dir: Path,
        work: Path,
        *,
        switch: StopSwitch | None = None,
        commit: str = "unknown",
    ) -> None:
        """`commit`: of the program, noted with each piece. Loads nothing yet."""
        self.profile, self.work, self._commit = profile, work, commit
        self._data_dir, self._switch = data_dir, switch or StopSwitch()
        self._texts: dict[tuple[str, str], BenchmarkTexts] = {}  # by book and data set
        self._pieces = {piece.name: piece for _, piece in experiments.all_pieces(profile)}

    # ---- doing

    def is_done(self, piece: Piece) -> bool:
        """Raises UsageError for what other settings made, StateError for what is broken."""
        if isinstance(piece, Choice):
            return self._choice_file(piece.name).exists() and self.chosen(piece.name) is not None
        if isinstance(piece, Scoring):
            model = self._resolved(piece.model)
            return model is not None and all(
                self._kept(piece.book, model, dataset, piece.method) is not None for dataset in piece.datasets
            )
        folder = self.work / "runs" / piece.name
        return (folder / "model").exists() and self._has_key(piece)

    def pending(self, pieces: Sequence[Piece]) -> list[Piece]:
        """What is to do, in the same order: not a model that only scorings read which are done.

        So figures that are kept, in a repository say, need no gigabytes of models beside them.
        """
        read: set[str] = set()
        found: list[Piece] = []
        for piece in reversed(pieces):  # a piece needs only those before it
            is_model = isinstance(piece, Run | Multitask | Mix)
            if self.is_done(piece) or (is_model and piece.name not in read):
                continue
            found.append(piece)
            read |= self._reads(piece)
        return found[::-1]

    def _reads(self, piece: Piece) -> set[str]:
        """Names of the pieces whose models it opens."""
        names: set[str] = set()
        for name in _inputs(piece):
            choice = self._pieces.get(name.removeprefix("chosen:"))
            if isinstance(choice, Choice):
                chosen = self.chosen(choice.name)
                names |= set(choice.candidates) if chosen is None else {chosen}
            else:
                names.add(name)
        return {name.partition("@")[0] for name in names}

    def do(self, piece: Piece, on_progress: Progress = lambda _: None) -> None:
        """Raises StopRequested at a stop: then the same piece goes on, or begins anew. And SwarmErrors."""
        started_at = time.monotonic()
        progress = self._switch.checking(on_progress)
        try:
            if isinstance(piece, Scoring):
                self._score(piece, progress)
            elif isinstance(piece, Choice):
                self._choose(piece)
            else:
                self._make(piece, progress)
        finally:
            seconds = round(time.monotonic() - started_at, 2)
            record = {"piece": piece.name, "seconds": seconds, "commit": self._commit}
            append_json_line(self.work / "times.jsonl", record)

    def minutes(self, piece: Piece) -> float:
        """About how long it takes, from nothing."""
        return experiments.cost(self.profile, piece) / self.profile.forward_per_second / 60

    def tidy(self, pending: Sequence[Piece]) -> None:
        """Delete the models of single rounds that no pending piece needs; they take the most room."""
        needed = {name for piece in pending for name in _inputs(piece)}
        for folder in sorted((self.work / "runs").glob("*/models/round-*")):
            round_ = int(folder.name.removeprefix("round-"))
            name = folder.parent.parent.name
            is_over = (folder.parent.parent / "model").exists()
            if is_over and f"{name}@{round_}" not in needed:
                shutil.rmtree(folder)

    # ---- asking

    def answers(self, book: str, model: str, dataset: str, method: Method) -> Answers | None:
        """None while it is not done."""
        name = self._resolved(model)
        kept = None if name is None else self._kept(book, name, dataset, method)
        if kept is None:
            return None
        draws = [np.array(draw, dtype=np.int64) for draw in kept["predictions"]]
        labels = np.array(kept["labels"], dtype=np.int64)
        return Answers(labels=labels, predictions=np.stack(draws), metric=headline_metric(dataset))

    def chosen(self, choice: str) -> str | None:
        """The model that a choice named; None while it is not done."""
        file = self._choice_file(choice)
        if not file.exists():
            return None
        kept = read_json(file, ("key", "model", "gains"))
        piece = self._pieces.get(choice)
        if isinstance(piece, Choice):
            self._check_key(file, kept["key"], _choice_key(self.profile, piece))
        return str(kept["model"])

    def gains_of_choice(self, choice: str) -> dict[str, float]:
        """Mean gain by candidate, 0 to 1; empty while it is not done."""
        if self.chosen(choice) is None:
            return {}
        return dict(read_json(self._choice_file(choice), ("gains",))["gains"])

    @property
    def times(self) -> list[dict[str, Any]]:
        """Piece, seconds and commit of all that was done, stopped pieces included."""
        file = self.work / "times.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    # ---- models

    def _make(self, piece: Run | Multitask | Mix, progress: Progress) -> None:
        folder = self.work / "runs" / piece.name
        folder.mkdir(parents=True, exist_ok=True)
        if not self._has_key(piece):
            write_text(folder / "plan.json", self._key(piece))
        if isinstance(piece, Mix):
            self._mix(piece, folder)
        elif isinstance(piece, Multitask):
            train_multitask(piece.plan, self._data_dir, folder, progress)
        elif (twin := self._twin(piece)) is not None:
            replace_directory(folder / "model", lambda building: _copy(twin / "model", building))
        else:
            self._simulate(piece, folder, progress)

    def _simulate(self, run: Run, folder: Path, progress: Progress) -> None:
        """`simulate` is asked to stop; a model is not left half made, and its rounds are kept."""
        is_done = simulate(
            self._plan(run),
            self._data_dir,
            folder,
            keep_every=run.keep_every,
            should_stop=lambda: self._switch.is_set,
            on_progress=lambda fraction: None if self._switch.is_set else progress(fraction),
        )
        if not is_done:
            raise StopRequested(self._switch.reason)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def _twin(self, run: Run) -> Path | None:
        """A run of the same plan that is done: a run that a choice names is often one that is there."""
        if run.keep_every:
            return None
        for folder in sorted((self.work / "runs").iterdir()):
            plan = folder / "plan.json"
            is_other = folder.name != run.name and (folder / "model").exists() and plan.exists()
            if is_other and plan.read_text(encoding="utf-8") == self._key(run):
                return folder
        return None

    def _mix(self, mix: Mix, folder: Path) -> None:
        mixed: torch.Tensor | None = None
        for name, weight in mix.parts.items():
            encoder = Encoder.load(self._directory(name))
            part = encoder.flat * weight
            mixed = part if mixed is None else mixed.add_(part)
        assert mixed is not None  # a mix has parts
        flat = mixed
        replace_directory(
            folder / "model",
            lambda building: export_model(encoder.model_dir, encoder.layout, flat, building),
        )

    def _directory(self, model: str) -> Path:
        """Where a model that is done lies. `model` is resolved. Raises StateError."""
        if model == PRETRAINED:
            return model_directory(self.profile.model)[0]
        name, _, round_ = model.partition("@")
        folder = self.work / "runs" / name
        kept = folder / "models" / f"round-{int(round_):04d}" if round_ else folder / "model"
        if not kept.exists():
            raise StateError(f"{kept} is gone: delete {folder} to make it again")
        return kept

    def _resolved(self, model: str) -> str | None:
        """A model's own name; None while the choice that names it, or its plan, is not done."""
        if model.startswith("chosen:"):
            return self.chosen(model.removeprefix("chosen:"))
        piece = self._pieces.get(model.partition("@")[0])
        waits = (
            isinstance(piece, Run) and isinstance(piece.plan, Chosen) and not self.chosen(piece.plan.choice)
        )
        return None if waits else model

    def _plan(self, run: Run) -> Plan:
        if isinstance(run.plan, Plan):
            return run.plan
        model = self.chosen(run.plan.choice)
        if model is None:
            raise UsageError(f"{run.name} needs the choice {run.plan.choice!r}, which is not made yet")
        return run.plan.plans[model]

    # ---- scorings

    def _score(self, piece: Scoring, progress: Progress) -> None:
        name = self._resolved(piece.model)
        if name is None:
            raise UsageError(f"{piece.model} is not chosen yet")
        config = self.profile.book(piece.book)
        folder = self.work / "books" / piece.book
        folder.mkdir(parents=True, exist_ok=True)
        store, model = Store(folder, config), _open(name, self._directory(name))
        total = experiments.cost(self.profile, piece)
        done = 0.0

        def on_cost(forward_passes: float) -> None:
            nonlocal done
            done += forward_passes
            progress(min(1.0, done / total))

        for dataset in piece.datasets:
            if self._kept(piece.book, name, dataset, piece.method) is not None:
                on_cost(total / len(piece.datasets))
                continue
            texts = self._rows(piece.book, dataset, config)
            results = evaluate([model], [texts], [piece.method], config, store, on_cost=on_cost)
            self._keep(piece.book, name, dataset, piece.method, results[name, dataset, piece.method])

    def _rows(self, book: str, dataset: str, config: BenchmarkConfig) -> BenchmarkTexts:
        if (book, dataset) not in self._texts:
            load = validation_texts if book == "validation" else load_texts
            self._texts[book, dataset] = load(self._data_dir, dataset, config)
        return self._texts[book, dataset]

    def _score_file(self, book: str, model: str, dataset: str, method: Method) -> Path:
        return self.work / "scores" / book / model / f"{dataset}.{method}.json"

    def _keep(self, book: str, model: str, dataset: str, method: Method, scores: Sequence[Score]) -> None:
        file = self._score_file(book, model, dataset, method)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "key": self._score_key(book, model),
            "labels": scores[0].labels.tolist(),
            "predictions": [score.predictions.tolist() for score in scores],
            "chosen": [score.chosen for score in scores],
        }
        write_text(file, json.dumps(kept) + "\n")

    def _kept(self, book: str, model: str, dataset: str, method: Method) -> dict[str, Any] | None:
        file = self._score_file(book, model, dataset, method)
        if not file.exists():
            return None
        kept = read_json(file, ("key", "labels", "predictions"))
        self._check_key(file, kept["key"], self._score_key(book, model))
        return kept

    # ---- choices

    def _choose(self, piece: Choice) -> None:
        gains = {model: self._mean_gain(piece.book, model, g) for model, g in piece.candidates.items()}
        best = max(gains, key=gains.__getitem__)  # the first of equals
        self._choice_file(piece.name).parent.mkdir(parents=True, exist_ok=True)
        kept = {"key": _choice_key(self.profile, piece), "model": best, "gains": gains}
        write_text(self._choice_file(piece.name), json.dumps(kept, indent=1) + "\n")

    def _mean_gain(self, book: str, model: str, groups: Sequence[Group]) -> float:
        """Over the pretrained model: mean of the groups' means."""
        means = []
        for method, datasets in groups:
            pairs = [
                (self.answers(book, model, name, method), self.answers(book, PRETRAINED, name, method))
                for name in datasets
            ]
            known = [ours.value - theirs.value for ours, theirs in pairs if ours and theirs]
            if len(known) < len(pairs):
                raise UsageError(f"{model} is not scored yet on all that the choice needs")
            means.append(float(np.mean(known)))
        return float(np.mean(means))

    def _choice_file(self, name: str) -> Path:
        return self.work / "choices" / f"{name}.json"

    # ---- keys: what made a thing

    def _key(self, piece: Run | Multitask | Mix) -> str:
        settings = settings_of(self._plan(piece)) if isinstance(piece, Run) else asdict(piece)
        if isinstance(piece, Mix):
            settings["made_of"] = {name: self._model_key(name) for name in piece.parts}
        return json.dumps(settings, indent=1, sort_keys=True) + "\n"

    def _model_key(self, model: str) -> str:
        piece = self._pieces.get(model.partition("@")[0])
        made_by = self._key(piece) if isinstance(piece, Run | Multitask | Mix) else self.profile.model
        return _digest(made_by)

    def _has_key(self, piece: Run | Multitask | Mix) -> bool:
        """Whether the folder is this piece's; False when it is nobody's."""
        file = self.work / "runs" / piece.name / "plan.json"
        if not file.exists():
            return False
        if self._resolved(piece.name) is None:
            return False
        self._check_key(file.parent, file.read_text(encoding="utf-8"), self._key(piece))
        return True

    def _score_key(self, book: str, model: str) -> str:
        return _digest([asdict(self.profile.book(book)), self._model_key(model)])

    def _check_key(self, path: Path, there: str, wanted: str) -> None:
        if there != wanted:
            raise UsageError(
                f"{path} is of other settings than those of profile {self.profile.name}: "
                "name another --out, or delete it"
            )


def validation_texts(data_dir: Path, name: str, config: BenchmarkConfig) -> BenchmarkTexts:
    """As `load_texts`, without the test rows: every second validation row stands in for one of them."""
    data = load_task_data(DataConfig(data=str(data_dir / name), task="classification", seed=config.seed))
    order = np.random.default_rng(config.seed).permutation(len(data.validation))
    half = len(order) // 2
    choosing, figures = np.sort(order[:half]), np.sort(order[half:])
    rows = replace(data, validation=data.validation.select(choosing), test=data.validation.select(figures))
    return cut_texts(name, rows, config)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Raises StateError when another process works there."""
    handle = os.open(work / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        repair_json_lines(work / "times.jsonl")
        yield
    except BlockingIOError as error:
        raise StateError(f"another process works in {work}: wait for it, or name another --out") from error
    finally:
        os.close(handle)


# ---- helpers ------------------------------------------------------------------------------


def _open(name: str, model_dir: Path) -> Model:
    tokenizer = load_tokenizer(model_dir)
    return Model(name, Encoder.load(model_dir), tokenizer, tokenizer_key(tokenizer))


def _inputs(piece: Piece) -> Sequence[str]:
    """Names of the models that a piece reads."""
    if isinstance(piece, Scoring):
        return (piece.model,)
    return tuple(piece.parts) if isinstance(piece, Mix) else ()


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _choice_key(profile: Profile, piece: Choice) -> str:
    return _digest([asdict(piece), asdict(profile.book(piece.book))])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
