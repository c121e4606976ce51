"""What came out of each experiment? Plain values for JSON, tables and plots; None where nothing was run.

All figures are 0 to 1 here. A comparison is paired: the same data sets, the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from peer.benchmark import METHODS, Method
from peer.statistics import compare
from scripts.experiments import (
    AS_IS,
    PRETRAINED,
    Profile,
    alone_models,
    measures,
    mixes,
    schedule_models,
    splits,
    variant_models,
    winner,
)
from scripts.lab import Lab

Finding = dict[str, Any]
Pair = tuple[str, str]  # model, data set


def findings(lab: Lab) -> dict[int, Finding]:
    """By experiment, those of the profile."""
    makers = {
        1: _trajectory,
        2: _unseen,
        3: _schedules,
        4: _baselines,
        5: _one_set,
        6: _per_round,
        7: _own,
        8: _better,
    }
    return {number: makers[number](lab) for number in lab.profile.experiments}


def comparison(
    lab: Lab, ours: Sequence[Pair], method: Method, *, book: str = "test", against: str = PRETRAINED
) -> Finding | None:
    """Models against one other, each on its data set; None unless all are there."""
    theirs = [(against, dataset) for _, dataset in ours]
    return paired(lab, (book, ours), (book, theirs), method)


def paired(
    lab: Lab, ours: tuple[str, Sequence[Pair]], theirs: tuple[str, Sequence[Pair]], method: Method
) -> Finding | None:
    """Each side: a book, and models with their data sets."""
    known = [
        [lab.answers(book, model, dataset, method) for model, dataset in pairs]
        for book, pairs in (ours, theirs)
    ]
    one, other = ([a for a in side if a is not None] for side in known)
    if len(one) < len(ours[1]) or len(other) < len(ours[1]):
        return None
    names = [dataset for _, dataset in ours[1]]
    return {
        **asdict(compare(one, other, seed=0)),
        "datasets": {
            n: [b.value, a.value] for n, a, b in zip(names, one, other, strict=True)
        },  # [theirs, ours]
        "ours": float(np.mean([a.value for a in one])),
        "theirs": float(np.mean([b.value for b in other])),
    }


def gains(
    lab: Lab, models: Mapping[str, str], book: str = "test", *, against: str = PRETRAINED
) -> dict[str, dict[str, Finding | None]]:
    """By label and measure."""
    return {
        label: {
            measure: comparison(lab, [(model, name) for name in names], method, book=book, against=against)
            for measure, (method, names) in measures(lab.profile).items()
        }
        for label, model in models.items()
    }


# ---- experiments --------------------------------------------------------------------------


def _trajectory(lab: Lab) -> Finding:
    profile = lab.profile
    return {"seeds": [_course(lab, profile, fold) for fold in profile.followed_folds]}


def _course(lab: Lab, profile: Profile, fold: int) -> Finding:
    """One run: by round the gain over the pretrained model."""
    trained = profile.trained(fold)
    models = {r: f"fold{fold}@{r}" for r in profile.kept_rounds} | {profile.rounds: f"fold{fold}"}
    rounds = {r: comparison(lab, [(m, n) for n in trained], "probe") for r, m in models.items()}
    return {"seed": fold, "num_datasets": len(trained), "rounds": rounds}


def _unseen(lab: Lab) -> Finding:
    profile = lab.profile
    folds = {f"fold{fold}": profile.unseen(fold) for fold in range(len(profile.folds))}
    found = {method: comparison(lab, _scored_pairs(lab, folds, method), method) for method in METHODS}
    return {"methods": found, "num_datasets": len(profile.datasets)}


def _scored_pairs(lab: Lab, folds: Mapping[str, Sequence[str]], method: Method) -> list[Pair]:
    """Those of the folds that are scored to the end; all where none is."""
    pairs = {fold: [(fold, name) for name in names] for fold, names in folds.items()}
    scored = [
        fold
        for fold, of_fold in pairs.items()
        if all(lab.answers("test", m, name, method) for _, name in of_fold for m in (fold, PRETRAINED))
    ]
    return [pair for fold in scored or pairs for pair in pairs[fold]]


def _schedules(lab: Lab) -> Finding:
    return {"rows": gains(lab, schedule_models(lab.profile))}


def _baselines(lab: Lab) -> Finding:
    profile = lab.profile
    fuse = next(iter(profile.schedules))
    labels = {
        "best single contributor": "chosen:best single",
        fuse: f"schedule {fuse}",
        "centralized multitask": "chosen:multitask",
        "swarm": "fold0",
    }
    alone = [(model, dataset) for dataset, model in alone_models(profile).items()]
    rows = gains(lab, labels)
    own = {next(iter(measures(profile))): comparison(lab, alone, "probe")}
    against = {
        measure: comparison(lab, [("fold0", n) for n in names], method, against="chosen:multitask")
        for measure, (method, names) in measures(profile).items()
    }
    return {
        "rows": {"each peer alone, on its own task": own, **rows},
        "swarm_against_multitask": against,
        "chosen": {name: lab.chosen(name) for name in ("best single", "multitask")},
        "tried": {name: lab.gains_of_choice(name) for name in ("best single", "multitask")},
    }


def _one_set(lab: Lab) -> Finding:
    settings, runs = lab.profile.one_set, []
    dataset, rounds = str(settings["dataset"]), int(settings["rounds"])
    base = lab.answers("test", PRETRAINED, dataset, "probe")
    for (num, seed), name in splits(lab.profile).items():
        models = [*(f"{name}@{r}" for r in range(1, rounds)), name]
        found = [lab.answers("test", model, dataset, "probe") for model in models]
        values = [None if one is None else one.value for one in found]
        runs.append({"contributors": num, "seed": seed, "values": values})
    return {"dataset": dataset, "base": None if base is None else base.value, "runs": runs}


def _per_round(lab: Lab) -> Finding:
    labels = {f"{num} a round": f"cohort{num}" for num in lab.profile.per_round["contributors"]}
    rows = gains(lab, labels)
    last = list(measures(lab.profile))[-1]  # not measured here
    return {"rows": {label: {m: c for m, c in row.items() if m != last} for label, row in rows.items()}}


def _own(lab: Lab) -> Finding:
    trained = lab.profile.trained(0)
    ours, alone = [("fold0", n) for n in trained], [(PRETRAINED, n) for n in trained]
    found = paired(lab, ("own", ours), ("own alone", alone), "finetune")
    return {"comparison": found, "share_worse": found and found["losses"] / found["num_datasets"]}


def _better(lab: Lab) -> Finding:
    profile = lab.profile
    variants = variant_models(profile)
    states = {"last state": "fold0", **{label: mix.name for label, mix in mixes(profile).items()}}
    as_is = variants.get(AS_IS)
    changed = {label: model for label, model in variants.items() if model != as_is}
    test = {AS_IS: "fold0", "best variant": winner(profile), "best of the kept states": "chosen:mix"}
    return {
        "is_shorter": profile.variant_rounds < profile.rounds,
        "variants": gains(lab, variants, "validation"),
        "against_as_is": gains(lab, changed, "validation", against=as_is) if as_is else {},
        "states": gains(lab, states, "validation"),
        "test": gains(lab, test),
        "chosen": {"variant": _label(lab, "variant", variants), "mix": _label(lab, "mix", states)},
    }


def _label(lab: Lab, choice: str, models: Mapping[str, str]) -> str | None:
    """What the tables call the model that was chosen."""
    chosen = lab.chosen(choice)
    return next((label for label, model in models.items() if model == chosen), chosen)
