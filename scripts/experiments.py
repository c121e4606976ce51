"""Which runs and scorings does each experiment need? Pure: from a profile of reproduce.toml to pieces.

    Run, Multitask, Mix   make a model, called by their names; "fold0@8" is run fold0 after round 8
    Scoring               a model on data sets; a book says which rows and sizes ("test", "validation", ...)
    Choice                the best of several models by their gain over the pretrained one, on validation rows

A piece needs only pieces that stand before it. Several experiments name the same piece; it is done once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from coordinator.errors import UsageError
from coordinator.spec import RunSpec
from peer.benchmark import METHODS, TRAINING_COST, BenchmarkConfig, Method
from peer.finetune import FinetuneConfig
from scripts.multitask import MultitaskPlan
from scripts.simulate import Plan

PRETRAINED = "pretrained"
AS_IS = "as is"  # the variant that changes nothing
_GIVEN = frozenset({"stragglers", "churn", "harm"})  # of a variant: what a swarm meets, and nobody chooses
TITLES = {
    1: "Head-only accuracy on the tasks trained climbs with the rounds",
    2: "The fused model is a better base for tasks that nobody trained on",
    3: "Many rounds against one fuse, total steps equal",
    4: "Against the baselines",
    5: "One data set, spread over several contributors",
    6: "How many contributors a round needs",
    7: "Who gains? Each peer alone against the swarm, on its own test rows",
    8: "What makes it better? Variants, on validation rows",
}
_PLAIN_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,+-]{0,60}")
Group = tuple[Method, tuple[str, ...]]  # a method on data sets


@dataclass(frozen=True)
class Run:
    """A simulated swarm."""

    name: str
    plan: Plan | Chosen
    keep_every: int = 0


@dataclass(frozen=True)
class Chosen:
    """One of several plans: that of the model which a choice names."""

    choice: str
    plans: Mapping[str, Plan]


@dataclass(frozen=True)
class Multitask:
    name: str
    plan: MultitaskPlan


@dataclass(frozen=True)
class Mix:
    """A weighted sum of states."""

    name: str
    parts: Mapping[str, float]  # by model; the weights sum to 1


@dataclass(frozen=True)
class Scoring:
    model: str
    book: str
    method: Method
    datasets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"score {self.model} {self.method} {self.book} {' '.join(self.datasets)}"


@dataclass(frozen=True)
class Choice:
    """The model of the highest mean gain over the pretrained one; each group counts the same."""

    name: str
    book: str
    candidates: Mapping[str, tuple[Group, ...]]  # by model: what it is measured on


Piece = Run | Multitask | Mix | Scoring | Choice


def told(piece: Piece) -> str:
    """A piece, for people."""
    if isinstance(piece, Scoring):
        what = piece.datasets[0] if len(piece.datasets) == 1 else f"{len(piece.datasets)} data sets"
        return f"score {piece.model}: {piece.method} on {what}, {piece.book} rows"
    if isinstance(piece, Choice):
        return f"choose the {piece.name}"
    return f"{'mix' if isinstance(piece, Mix) else 'train'} {piece.name}"


@dataclass(frozen=True)
class Profile:
    """One table of reproduce.toml."""

    name: str
    model: str  # "packaged", a directory, or a hub id
    folds: tuple[tuple[str, ...], ...]  # each data set is in one; a run trains on the others
    swarm: Mapping[str, Any]  # keys of the spec, of FinetuneConfig and of Plan, by their own names
    trajectory_every: int  # rounds between two scorings of experiment 1
    schedules: Mapping[str, Mapping[str, Any]]  # experiment 3: changes of `swarm`, by label
    multitask_learning_rates: tuple[float, ...]  # experiment 4; the best on validation rows is taken
    one_set: Mapping[
        str, Any
    ]  # experiment 5: dataset, contributors, seeds, examples a round, rounds, outer_lr
    per_round: Mapping[str, Any]  # experiment 6: contributors and their outer_lrs, examples a round, rounds
    own: Mapping[str, Any]  # experiment 7: changes of `scoring`
    variant_rounds: int
    variants: Mapping[str, Mapping[str, Any]]  # changes of `swarm`, by label
    last_rounds: tuple[int, ...]  # averages of so many kept states
    alphas: tuple[float, ...]  # part of the fused model in a mix with the pretrained one
    scoring: BenchmarkConfig  # test rows
    validation: BenchmarkConfig  # sizes of a scoring on validation rows, which are cut in two for it
    forward_per_second: float  # examples, for estimates of time only
    experiments: tuple[int, ...] = tuple(TITLES)  # that this profile is for
    followed: tuple[int, ...] | None = None  # experiment 1: the folds whose runs it follows; None: all
    note: str = ""  # for the readers of its results

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(name for fold in self.folds for name in fold)

    def unseen(self, fold: int) -> tuple[str, ...]:
        return self.folds[fold]

    def trained(self, fold: int) -> tuple[str, ...]:
        return tuple(name for name in self.datasets if name not in self.folds[fold])

    @property
    def followed_folds(self) -> tuple[int, ...]:
        return tuple(range(len(self.folds))) if self.followed is None else self.followed

    @property
    def rounds(self) -> int:
        return int(self.swarm["num_rounds"])

    @property
    def kept_rounds(self) -> tuple[int, ...]:
        """Of a fold's run; the last one is the model itself."""
        return tuple(range(self.trajectory_every, self.rounds, self.trajectory_every))

    @property
    def num_examples(self) -> int:
        """What all contributors of a fold's run finetune on, in all."""
        return self.rounds * int(self.swarm["max_peers"]) * int(self.swarm["round_examples"])

    def own_examples(self, fold: int) -> int:
        """What one contributor of a fold's run finetunes on, on average."""
        return round(self.num_examples / len(self.trained(fold)))

    def plan(self, datasets: Sequence[str], seed: int, **changes: Any) -> Plan:
        """Keys go where they are known: to the spec, the finetuning or the plan. Raises UsageError."""
        given = {"min_peers": 2, **self.swarm, **changes}
        given["min_peers"] = min(given["min_peers"], given.get("max_peers", len(datasets)))
        of_spec, of_training = set(RunSpec.model_fields), {f.name for f in fields(FinetuneConfig)}
        of_plan = {f.name for f in fields(Plan)} - {"datasets", "run", "finetune", "seed", "model"}
        if unknown := sorted(set(given) - of_spec - of_training - of_plan):
            raise UsageError(f"profile {self.name}: unknown key {unknown[0]!r} of a run")
        return Plan(
            datasets=tuple(datasets),
            run={key: value for key, value in given.items() if key in of_spec},
            finetune={key: value for key, value in given.items() if key in of_training},
            model=self.model,
            seed=seed,
            **{key: value for key, value in given.items() if key in of_plan},
        )

    def book(self, name: str) -> BenchmarkConfig:
        """Sizes of a scoring, by the name of its book."""
        if name == "validation":
            return self.validation
        if name == "test":
            return self.scoring
        own = replace(self.scoring, **self.own)
        if name == "own":
            return own
        alone = own.finetune_examples + self.own_examples(0)  # who is alone spends them on himself
        return replace(own, finetune_examples=alone)


def load_profile(file: Path, name: str, model: str | None = None) -> Profile:
    """Values above the first table are for every profile that has none of its own, and those of the profile
    that it is `based_on`. Raises UsageError.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as TOML: {error}") from error
    profiles = {key: tables.pop(key) for key, value in [*tables.items()] if isinstance(value, dict)}
    if name not in profiles:
        raise UsageError(f"{file} has no profile {name!r}; it has: {', '.join(profiles)}")
    try:
        own = profiles[name] | ({"model": model} if model else {})
        base = own.pop("based_on", None)
        profile = _profile(name, {**tables, **(profiles[base] if base else {}), **own})
        if unknown := sorted(set(profile.experiments) - set(TITLES)):
            raise ValueError(f"there is no experiment {unknown[0]}")
        if missing := sorted(set(profile.followed_folds) - set(range(len(profile.folds)))):
            raise ValueError(f"there is no fold {missing[0]}")
        for _, piece in all_pieces(profile):  # so that a wrong key is told before anything is spent
            cost(profile, piece)
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{file}, profile {name}: a key is missing, unknown or wrong: {error}") from error
    if len(set(profile.datasets)) < len(profile.datasets) or min(map(len, profile.folds)) == 0:
        raise UsageError(f"{file}, profile {name}: a data set is in two folds, or a fold is empty")
    labels = [*profile.schedules, *profile.variants]
    if bad := [label for label in labels if not _PLAIN_LABEL.fullmatch(label)]:
        raise UsageError(f"{file}, profile {name}: {bad[0]!r} cannot be the name of a folder")
    if profile.rounds % profile.trajectory_every:
        raise UsageError(f"{file}, profile {name}: num_rounds must be a multiple of trajectory_every")
    return profile


def all_pieces(profile: Profile, numbers: Sequence[int] | None = None) -> list[tuple[int, Piece]]:
    """What the experiments need, in an order in which it can be done, each with the first that needs it.

    `numbers`: all of the profile by default.
    """
    found: dict[str, tuple[int, Piece]] = {}
    for number in profile.experiments if numbers is None else numbers:
        for piece in _EXPERIMENTS[number](profile):
            found.setdefault(piece.name, (number, piece))
    return list(found.values())


def cost(profile: Profile, piece: Piece) -> float:
    """About how long it takes, in forward passes of one row."""
    if isinstance(piece, Run):
        plan = piece.plan if isinstance(piece.plan, Plan) else next(iter(piece.plan.plans.values()))
        peers = min(int(plan.run.get("max_peers", 64)), len(plan.contributors()))
        each = TRAINING_COST * int(plan.run["round_examples"]) + 3 * plan.eval_examples
        return int(plan.run["num_rounds"]) * peers * each
    if isinstance(piece, Multitask):
        plan_ = piece.plan
        return TRAINING_COST * plan_.num_examples + plan_.probe_examples * len(plan_.datasets)
    if isinstance(piece, Scoring):
        return len(piece.datasets) * _scoring_cost(piece.method, profile.book(piece.book))
    return 0.0


def schedule_models(profile: Profile) -> dict[str, str]:
    """Experiment 3: models by label, those of one fuse first."""
    return {label: f"schedule {label}" for label in profile.schedules} | {_label_of_folds(profile): "fold0"}


def measures(profile: Profile, fold: int = 0) -> dict[str, Group]:
    return {
        "trained tasks, head-only": ("probe", profile.trained(fold)),
        "unseen tasks, head-only": ("probe", profile.unseen(fold)),
        "unseen tasks, few examples": ("few_shot", profile.unseen(fold)),
    }


def variant_models(profile: Profile) -> dict[str, str]:
    """Experiment 8: models by label. What changes nothing is fold 0's run, where its rounds are as many."""
    is_whole = profile.variant_rounds == profile.rounds
    return {
        label: "fold0" if is_whole and not changes else f"variant {label}"
        for label, changes in profile.variants.items()
    }


def winner(profile: Profile) -> str:
    """Experiment 8: the best variant at full length."""
    return "chosen:variant" if profile.variant_rounds == profile.rounds else "winner"


def mixes(profile: Profile) -> dict[str, Mix]:
    """Experiment 8: what can be made of the states of fold 0 afterwards, by label."""
    kept = [f"fold0@{round_}" for round_ in profile.kept_rounds] + ["fold0"]
    made = {}
    for num in profile.last_rounds:
        parts = dict.fromkeys(kept[-num:], 1 / num)
        made[f"mean of the last {num} kept states"] = Mix(f"last{num}", parts)
    for alpha in profile.alphas:
        parts = {"fold0": alpha, PRETRAINED: 1 - alpha}
        made[f"{alpha:g} fused + {1 - alpha:g} pretrained"] = Mix(f"alpha{alpha:g}", parts)
    return made


def splits(profile: Profile) -> dict[tuple[int, int], str]:
    """Experiment 5: runs by contributors and seed."""
    pairs = [(int(k), int(s)) for k in profile.one_set["contributors"] for s in profile.one_set["seeds"]]
    return {(k, s): f"split{k}-seed{s}" for k, s in pairs}


def alone_models(profile: Profile) -> dict[str, str]:
    """Experiment 4: models by data set."""
    return {name: f"alone-{name}" for name in profile.trained(0)}


# ---- experiments --------------------------------------------------------------------------


def _trajectory(profile: Profile) -> Iterator[Piece]:
    for fold in profile.followed_folds:
        trained = profile.trained(fold)
        yield _fold_run(profile, fold)
        for model in (PRETRAINED, *(f"fold{fold}@{r}" for r in profile.kept_rounds), f"fold{fold}"):
            yield Scoring(model, "test", "probe", trained)


def _unseen(profile: Profile) -> Iterator[Piece]:
    for fold in range(len(profile.folds)):
        yield _fold_run(profile, fold)
        for method in METHODS:
            for model in (PRETRAINED, f"fold{fold}"):
                yield Scoring(model, "test", method, profile.unseen(fold))


def _schedules(profile: Profile) -> Iterator[Piece]:
    yield _fold_run(profile, 0)
    for label, changes in profile.schedules.items():
        yield Run(f"schedule {label}", profile.plan(profile.trained(0), 0, **changes))
    for model in (PRETRAINED, *schedule_models(profile).values()):
        yield from _measure(model, "test", measures(profile).values())


def _baselines(profile: Profile) -> Iterator[Piece]:
    yield from _schedules(profile)
    trained, alone = profile.trained(0), alone_models(profile)
    yield Scoring(PRETRAINED, "validation", "probe", trained)
    candidates = {}
    for rate in profile.multitask_learning_rates:
        model = f"multitask {rate:g}"
        candidates[model] = (("probe", trained),)
        yield Multitask(model, _multitask_plan(profile, rate))
        yield Scoring(model, "validation", "probe", trained)
    yield Choice("multitask", "validation", candidates)  # type: ignore[arg-type]
    yield from _measure("chosen:multitask", "test", measures(profile).values())

    budget = {"num_rounds": 1, "max_peers": 1, "round_examples": profile.own_examples(0), "outer_lr": 1.0}
    for number, (dataset, model) in enumerate(alone.items()):
        yield Run(model, profile.plan([dataset], number, **budget))
        yield Scoring(model, "test", "probe", (dataset,))
        yield Scoring(model, "validation", "probe", trained)
    others: dict[str, tuple[Group, ...]] = {
        model: (("probe", tuple(n for n in trained if n != dataset)),) for dataset, model in alone.items()
    }
    yield Choice("best single", "validation", others)
    yield from _measure("chosen:best single", "test", measures(profile).values())


def _one_set(profile: Profile) -> Iterator[Piece]:
    settings = profile.one_set
    dataset = (str(settings["dataset"]),)
    yield Scoring(PRETRAINED, "test", "probe", dataset)
    for (num, seed), name in splits(profile).items():
        plan = profile.plan(
            dataset,
            seed,
            max_peers=num,
            round_examples=settings["examples"] // num,
            split=num,
            num_rounds=settings["rounds"],
            train_examples=settings["train_examples"],
            outer_lr=settings["outer_lr"],
        )
        yield Run(name, plan, keep_every=1)
        for round_ in range(1, settings["rounds"]):
            yield Scoring(f"{name}@{round_}", "test", "probe", dataset)
        yield Scoring(name, "test", "probe", dataset)


def _per_round(profile: Profile) -> Iterator[Piece]:
    settings, groups = profile.per_round, list(measures(profile).values())[:2]
    for group in groups:
        yield from _measure(PRETRAINED, "test", [group])
    for num, outer_lr in zip(settings["contributors"], settings["outer_lrs"], strict=True):
        plan = profile.plan(
            profile.trained(0),
            0,
            max_peers=num,
            round_examples=settings["examples"] // num,
            num_rounds=settings["rounds"],
            outer_lr=outer_lr,
        )
        yield Run(f"cohort{num}", plan)
        yield from _measure(f"cohort{num}", "test", groups)


def _own(profile: Profile) -> Iterator[Piece]:
    yield _fold_run(profile, 0)
    for dataset in profile.trained(0):
        yield Scoring(PRETRAINED, "own alone", "finetune", (dataset,))
        yield Scoring("fold0", "own", "finetune", (dataset,))


def _better(profile: Profile) -> Iterator[Piece]:
    groups, trained = tuple(measures(profile).values()), profile.trained(0)
    models = variant_models(profile)
    yield from _measure(PRETRAINED, "validation", groups)
    for label, model in models.items():
        changed = {"num_rounds": profile.variant_rounds, **profile.variants[label]}
        whole = Run(model, profile.plan(trained, 0, **changed))
        yield _fold_run(profile, 0) if model == "fold0" else whole
        yield from _measure(model, "validation", groups)
    to_choose = {label: c for label, c in profile.variants.items() if not _GIVEN & c.keys()}
    yield Choice("variant", "validation", dict.fromkeys((models[label] for label in to_choose), groups))
    if winner(profile) == "winner":
        full = {models[label]: profile.plan(trained, 0, **c) for label, c in to_choose.items()}
        yield Run("winner", Chosen("variant", full))
    yield _fold_run(profile, 0)
    yield from _measure("fold0", "validation", groups)
    for mix in mixes(profile).values():
        yield mix
        yield from _measure(mix.name, "validation", groups)
    names = ["fold0", *(mix.name for mix in mixes(profile).values())]
    yield Choice("mix", "validation", dict.fromkeys(names, groups))
    for model in (PRETRAINED, "fold0", winner(profile), "chosen:mix"):
        yield from _measure(model, "test", groups)


_EXPERIMENTS = {
    1: _trajectory,
    2: _unseen,
    3: _schedules,
    4: _baselines,
    5: _one_set,
    6: _per_round,
    7: _own,
    8: _better,
}


# ---- helpers ------------------------------------------------------------------------------


def _fold_run(profile: Profile, fold: int) -> Run:
    return Run(f"fold{fold}", profile.plan(profile.trained(fold), fold), keep_every=profile.trajectory_every)


def _measure(model: str, book: str, groups: Any) -> Iterator[Scoring]:
    for method, datasets in groups:
        yield Scoring(model, book, method, datasets)


def _multitask_plan(profile: Profile, learning_rate: float) -> MultitaskPlan:
    plan = profile.plan(profile.trained(0), 0)
    return MultitaskPlan(
        datasets=plan.datasets,
        finetune={**plan.finetune, "learning_rate": learning_rate},
        num_examples=profile.num_examples,
        model=profile.model,
        train_examples=plan.train_examples,
        probe_examples=2 * plan.eval_examples,
    )


def _label_of_folds(profile: Profile) -> str:
    swarm = profile.swarm
    return f"{profile.rounds} rounds of {swarm['max_peers']} x {swarm['round_examples']}"


def _scoring_cost(method: Method, config: BenchmarkConfig) -> float:
    held_out = config.validation_examples + config.test_examples
    if method == "probe":
        return config.train_examples + held_out
    rates = len(config.learning_rates)
    if method == "finetune":
        tries = TRAINING_COST * config.finetune_examples + config.validation_examples
        return config.train_examples + rates * tries + config.test_examples
    few = config.few_shot_examples
    tries = TRAINING_COST * config.few_shot_epochs * few + config.validation_examples
    return config.few_shot_draws * (few + rates * tries + config.test_examples)


def _benchmark(use_cpu: bool, values: Mapping[str, Any]) -> BenchmarkConfig:
    return BenchmarkConfig(**{**_tuples(values), "use_cpu": use_cpu})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _profile(name: str, table: Mapping[str, Any]) -> Profile:
    values = dict(table)
    use_cpu = bool(values.pop("use_cpu", False))
    for key in ("multitask_learning_rates", "last_rounds", "alphas"):
        values[key] = tuple(values[key])
    for key in {"experiments", "followed"} & values.keys():
        values[key] = tuple(values[key])
    for key in ("scoring", "validation"):
        values[key] = _benchmark(use_cpu, values[key])
    values["own"] = _tuples(values["own"])
    values["folds"] = tuple(tuple(fold) for fold in values["folds"])
    values["swarm"] = {**values["swarm"], "use_cpu": use_cpu}
    return Profile(name=name, **values)
