"""What do people get to see of the experiments? README.md with tables, plots, and the figures as JSON.

Written from findings alone, so that the same findings give the same files. Points are percentage points.
Results of other sizes, in folders of their own below, stand in where one was not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.benchmark import headline_metric
from peer.state import write_text
from scripts.experiments import AS_IS, TITLES
from scripts.json_files import read_json

Finding = Mapping[str, Any]
Elsewhere = Mapping[str, Mapping[int, Finding]]  # findings by the name of a folder, and by experiment
NOT_RUN = "not run"
METHOD_NAMES = {"probe": "head-only", "few_shot": "few examples", "finetune": "full finetuning"}
MAX_SVG_BYTES = 150_000
_OURS, _THEIRS, _SEEDS = (
    "tab:blue",
    "0.55",
    ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"),
)


@dataclass(frozen=True)
class Provenance:
    """How the figures were made."""

    command: str  # without machine paths
    profile: str
    model: str
    commits: Mapping[str, int]  # pieces done by the program at each commit
    sizes: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    num_cores: int
    hours: float  # of all pieces
    num_pieces: int
    num_done: int
    note: str = ""  # of the profile


def write_report(
    out: Path, findings: Mapping[int, Finding], made: Provenance, *, with_plots: bool = True
) -> None:
    """README.md, experiment-N.json and .png, made.json, in `out`. Raises StateError."""
    for number, finding in findings.items():
        write_text(out / f"experiment-{number}.json", json.dumps(finding, indent=1) + "\n")
        plot = out / f"experiment-{number}.png"
        if with_plots and is_run(finding):
            _save_plot(_PLOTS[number], finding, plot)
        elif not is_run(finding):
            plot.unlink(missing_ok=True)
            plot.with_suffix(".svg").unlink(missing_ok=True)
    write_text(out / "made.json", json.dumps(vars(made), indent=1) + "\n")
    shown = {number: (out / f"experiment-{number}.png").exists() for number in findings}
    write_text(out / "README.md", readme(findings, made, shown, _elsewhere(out)))


def redraw(out: Path, note: str) -> None:
    """README.md and plots once more, from the figures as JSON in `out`. Raises StateError."""
    made = Provenance(**{**_read(out / "made.json"), "note": note})
    write_report(out, _read_findings(out), made)


def _read_findings(folder: Path) -> dict[int, Finding]:
    files = sorted(folder.glob("experiment-*.json"))
    return {int(file.stem.removeprefix("experiment-")): _read(file) for file in files}


def _elsewhere(out: Path) -> Elsewhere:
    return {made.parent.name: _read_findings(made.parent) for made in sorted(out.glob("*/made.json"))}


def is_run(finding: Any) -> bool:
    """Whether there is at least one comparison or course in it."""
    if isinstance(finding, Mapping):
        if "mean" in finding:
            return True
        return any(is_run(value) for key, value in finding.items() if key not in ("chosen", "tried", "base"))
    if isinstance(finding, Sequence) and not isinstance(finding, str):
        return any(is_run(value) for value in finding)
    return isinstance(finding, float)


def readme(
    findings: Mapping[int, Finding],
    made: Provenance,
    has_plot: Mapping[int, bool],
    elsewhere: Elsewhere | None = None,
) -> str:
    elsewhere = elsewhere or {}
    lines = [
        "# Results",
        "",
        "Written by `scripts.reproduce`; do not edit. Gains are in percentage points over the pretrained",
        "model, with a 95 % interval (paired bootstrap: data sets are drawn anew, then the rows of each).",
        "Accuracy, but for cola (Matthews) and tweet_hate (macro-F1). The round to report was fixed in",
        "advance: the last one. Whatever was chosen was chosen on validation rows.",
        "",
        *([made.note, ""] if made.note else []),
        *_provenance(made),
        *_glance(findings, elsewhere),
    ]
    for number, finding in findings.items():
        lines += ["", f"## {number}. {TITLES[number]}", ""]
        others = [_link(name) for name, found in elsewhere.items() if is_run(found.get(number))]
        lines += [f"See also: {', '.join(others)}", ""] if others else []
        if not is_run(finding):
            lines += [NOT_RUN]
            continue
        lines += _TABLES[number](finding)
        if has_plot.get(number):
            lines += ["", f"![{TITLES[number]}](experiment-{number}.png)"]
        lines += ["", f"All figures: [experiment-{number}.json](experiment-{number}.json)"]
    return "\n".join(lines) + "\n"


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, advice="restore it, or run the experiments")


# ---- tables -------------------------------------------------------------------------------


def _provenance(made: Provenance) -> list[str]:
    commits = ", ".join(f"{commit} ({num})" for commit, num in made.commits.items()) or "-"
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    rows = [
        ("command", f"`{made.command}`"),
        ("profile", f"`{made.profile}` of `scripts/reproduce.toml`; model {made.model}"),
        ("commit (pieces done there, repeats included)", commits),
        ("done", f"{made.num_done} of {made.num_pieces} pieces, {made.hours:.2f} hours"),
        ("machine", f"{made.device}, {made.num_cores} cores"),
        ("versions", versions),
        *((name, f"{value}") for name, value in made.sizes.items()),
    ]
    return _table(("what", "value"), rows)


def _link(folder: str) -> str:
    return f"[{folder}]({folder}/README.md)"


def _glance(findings: Mapping[int, Finding], elsewhere: Elsewhere) -> list[str]:
    rows = []
    for goal, text in _goals(findings):
        others = (
            f"{there} (of {_link(name)})"
            for name, found in elsewhere.items()
            for other, there in _goals(found)
            if other == goal and there != NOT_RUN
        )
        rows.append((goal, next(others, text) if text == NOT_RUN else text))
    return ["", "## At a glance", "", *_table(("to reach", "found"), rows)] if rows else []


def _goals(findings: Mapping[int, Finding]) -> list[tuple[str, str]]:
    """What was to be reached, and what was found."""
    rows: list[tuple[str, str]] = []
    if 1 in findings:
        trained = _glance_trained(findings[1])
        rows += [
            ("at least +6 points head-only on the trained tasks, in the run of every fold", trained),
            ("more trained tasks better than worse in the run of every fold", _glance_wins(findings[1])),
        ]
    if 2 in findings:
        unseen, total = findings[2]["methods"], findings[2]["num_datasets"]
        goals = {
            "few_shot": "at least +3 with few examples on unseen tasks, interval above 0",
            "probe": "unseen tasks head-only not below the base",
        }
        rows += [
            (_of_total(goal, unseen[method], total), _points(unseen[method]))
            for method, goal in goals.items()
        ]
    if 4 in findings:
        rows += [
            (f"not below centralized multitask training: {measure}", _points(found))
            for measure, found in findings[4]["swarm_against_multitask"].items()
        ]
    if 7 in findings:
        share = findings[7]["share_worse"]
        rows.append(
            (
                "share of peers made worse, against being alone with the same steps",
                NOT_RUN if share is None else f"{100 * share:.0f} %",
            )
        )
    return rows


def _glance_trained(finding: Finding) -> str:
    return "; ".join(f"seed {c['seed']}: {_points(_last(c))}" for c in finding["seeds"])


def _glance_wins(finding: Finding) -> str:
    return "; ".join(
        f"seed {c['seed']}: {NOT_RUN if (last := _last(c)) is None else _wins(last)}"
        for c in finding["seeds"]
    )


def _last(course: Finding) -> Finding | None:
    found: Finding | None = list(course["rounds"].values())[-1]
    return found


def _trajectory_table(finding: Finding) -> list[str]:
    courses = finding["seeds"]
    rounds = list(courses[0]["rounds"])
    rows = [
        (
            str(r),
            *(_points(c["rounds"][r]) for c in courses),
            *(_wins_or_not(c["rounds"][r]) for c in courses),
        )
        for r in rounds
    ]
    seeds = [f"seed {c['seed']}: {c['num_datasets']} data sets" for c in courses]
    wins = [f"seed {c['seed']}: better/worse/equal" for c in courses]
    per_set: dict[str, list[str]] = {}
    for c in courses:
        for name, (base, ours) in ((_last(c) or {}).get("datasets") or {}).items():
            per_set.setdefault(name, []).append(f"{100 * base:.1f} → {100 * ours:.1f} (seed {c['seed']})")
    last = [(_with_metric(name), ", ".join(texts)) for name, texts in per_set.items()]
    return [
        *_table(("round", *seeds, *wins), rows),
        "",
        f"By data set, pretrained → round {rounds[-1]}, test rows, %:",
        "",
        *_table(("data set", "head-only"), last),
    ]


def _unseen_table(finding: Finding) -> list[str]:
    methods, total = finding["methods"], finding["num_datasets"]
    rows = [_comparison_row(_of_total(METHOD_NAMES[m], found, total), found) for m, found in methods.items()]
    names = dict.fromkeys(name for found in methods.values() if found for name in found["datasets"])
    per_set = [
        (_with_metric(n), *(_change(found and found["datasets"].get(n)) for found in methods.values()))
        for n in names
    ]
    return [
        *_table(_COMPARISON_COLUMNS, rows),
        "",
        "By data set, pretrained → fused, test rows, %:",
        "",
        *_table(("data set", *(METHOD_NAMES[method] for method in methods)), per_set),
    ]


def _of_total(name: str, found: Finding | None, total: int) -> str:
    num = total if found is None else found["num_datasets"]
    return name if num == total else f"{name}, {num} of {total} data sets"


def _gains_table(rows: Mapping[str, Mapping[str, Finding | None]]) -> list[str]:
    """Rows without any figure are named below it."""
    run = _with_figures(rows)
    missing = [label for label in rows if label not in run]
    told = [f"Not run: {'; '.join(missing)}."] if missing else []
    if not run:
        return told
    columns, made = _measures(run), []
    for label, row in run.items():
        known = {
            c: NOT_RUN if found is None else f"{_points(found)}; {_wins(found)}" for c, found in row.items()
        }
        made.append((label, *(known.get(column, "-") for column in columns)))
    table = _table(("model", *(f"{c}; better/worse/equal" for c in columns)), made)
    return [*table, "", *told] if told else table


def _with_figures(
    rows: Mapping[str, Mapping[str, Finding | None]],
) -> dict[str, Mapping[str, Finding | None]]:
    return {label: row for label, row in rows.items() if any(row.values())}


def _measures(rows: Mapping[str, Mapping[str, Finding | None]]) -> list[str]:
    """A model may be measured on a part of them."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def _baselines_table(finding: Finding) -> list[str]:
    chosen, tried = finding["chosen"], finding["tried"]
    lines = _gains_table(finding["rows"])
    lines += ["", "Pretrained is 0 by definition. Swarm against centralized multitask training:", ""]
    against = finding["swarm_against_multitask"]
    lines += _table(_COMPARISON_COLUMNS, [_comparison_row(name, found) for name, found in against.items()])
    for name, gains in tried.items():
        if gains:
            texts = ", ".join(f"{model} {100 * gain:+.2f}" for model, gain in gains.items())
            lines += ["", f"Chosen as {name}: {chosen[name]}, by the mean gain on validation rows: {texts}."]
    return lines


def _one_set_table(finding: Finding) -> list[str]:
    num = max(len(run["values"]) for run in finding["runs"])
    rows = [
        (str(run["contributors"]), str(run["seed"]), *(_percent(value) for value in run["values"]))
        for run in finding["runs"]
    ]
    header = ("contributors", "seed", *(f"round {r + 1}" for r in range(num)))
    base = (
        f"Head-only accuracy on {finding['dataset']}, test rows, %. Pretrained: {_percent(finding['base'])}."
    )
    return [base, "", *_table(header, rows)]


def _own_table(finding: Finding) -> list[str]:
    found = finding["comparison"]
    rows = [
        (_with_metric(name), *map(_percent, pair), _change(pair)) for name, pair in found["datasets"].items()
    ]
    share = f"{found['losses']} of {found['num_datasets']} ({100 * finding['share_worse']:.0f} %)"
    return [
        f"Peers made worse: {share}. Alone: finetuned from the pretrained model on the own rows, with",
        "as many steps as the peer of the swarm has done in its rounds and in its last finetuning together.",
        "",
        *_table(_COMPARISON_COLUMNS, [_comparison_row("swarm against alone", found)]),
        "",
        *_table(("data set", "alone, %", "swarm, %", "alone → swarm"), rows),
    ]


def _better_table(finding: Finding) -> list[str]:
    chosen = finding["chosen"]
    return [
        f"Variants of fold 0's run{', shorter' if finding.get('is_shorter', True) else ''}; validation rows:",
        "",
        *_gains_table(finding["variants"]),
        "",
        *_against_as_is(finding.get("against_as_is", {})),
        "What can be made of the states of fold 0 afterwards; validation rows:",
        "",
        *_gains_table(finding["states"]),
        "",
        f"Chosen on validation rows: {chosen['variant'] or NOT_RUN}; {chosen['mix'] or NOT_RUN}.",
        "At full length, on test rows:",
        "",
        *_gains_table(finding["test"]),
    ]


def _against_as_is(rows: Mapping[str, Mapping[str, Finding | None]]) -> list[str]:
    """Those that were run. Paired: what the data sets gain in any case is not in it."""
    run = _with_figures(rows)
    if not run:
        return []
    return [f'Each against "{AS_IS}", paired; validation rows:', "", *_gains_table(run), ""]


_TABLES: dict[int, Callable[[Finding], list[str]]] = {
    1: _trajectory_table,
    2: _unseen_table,
    3: lambda finding: _gains_table(finding["rows"]),
    4: _baselines_table,
    5: _one_set_table,
    6: lambda finding: _gains_table(finding["rows"]),
    7: _own_table,
    8: _better_table,
}
_COMPARISON_COLUMNS = (
    *("", "base, %", "ours, %", "gain, points [interval]", "median", "better/worse/equal"),
    "without the 3 largest",
)


def _comparison_row(label: str, found: Finding | None) -> tuple[str, ...]:
    if found is None:
        return (label, NOT_RUN, "", "", "", "", "")
    rest = found["mean_without_largest"]
    return (
        label,
        _percent(found["theirs"]),
        _percent(found["ours"]),
        _points(found),
        _signed(found["median"]),
        _wins(found),
        "-" if rest is None else _signed(rest),
    )


def _points(found: Finding | None) -> str:
    if found is None:
        return NOT_RUN
    interval = found["interval"]
    return f"{_signed(found['mean'])} [{_signed(interval['low'])}, {_signed(interval['high'])}]"


def _signed(value: float) -> str:
    """Points of a difference; never -0.00."""
    return f"{round(100 * value, 2) + 0.0:+.2f}"


def _wins(found: Finding | None) -> str:
    assert found is not None  # the callers have looked
    return f"{found['wins']}/{found['losses']}/{found['ties']}"


def _wins_or_not(found: Finding | None) -> str:
    return NOT_RUN if found is None else _wins(found)


def _percent(value: float | None) -> str:
    return NOT_RUN if value is None else f"{100 * value:.1f}"


def _change(pair: Sequence[float] | None) -> str:
    if pair is None:
        return NOT_RUN
    base, ours = (100 * value for value in pair)
    return f"{base:.1f} → {ours:.1f} ({ours - base:+.1f})"


def _with_metric(name: str) -> str:
    metric = headline_metric(name)
    return name if metric == "accuracy" else f"{name} ({metric})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines]


# ---- plots --------------------------------------------------------------------------------


def _save_plot(draw: Callable[[Any, Finding], None], finding: Finding, file: Path) -> None:
    import matplotlib as mpl  # the caller has checked that it is there
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "reproduce", "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({**style, "axes.axisbelow": True}):  # the same findings give the same file
        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(figure, finding)
        figure.savefig(file, dpi=110)
        drawn = file.with_suffix(".svg")
        figure.savefig(drawn, metadata={"Date": None})
    if drawn.stat().st_size > MAX_SVG_BYTES:
        drawn.unlink()


def _plot_trajectory(figure: Any, finding: Finding) -> None:
    courses, last = figure.subplots(1, 2, width_ratios=(1.3, 1))
    figure.set_size_inches(11, 6)
    names: list[str] = []
    for color, course in zip(_SEEDS * len(finding["seeds"]), finding["seeds"], strict=False):
        known = [(int(r), 100 * found["mean"]) for r, found in course["rounds"].items() if found]
        if not known:
            continue
        rounds, values = zip(*[(0, 0.0), *known], strict=True)
        label = f"seed {course['seed']} ({course['num_datasets']} data sets)"
        courses.plot(rounds, values, marker="o", markersize=4, color=color, label=label)
        final = _last(course)
        for name, (base, ours) in (final or {"datasets": {}})["datasets"].items():
            if name not in names:
                names.append(name)
            at = names.index(name) + 0.14 * (course["seed"] % 3 - 1)  # beside each other where they are equal
            last.scatter(100 * (ours - base), at, s=22, color=color, zorder=3)
    courses.axhline(0, color="0.4", linestyle=":", label="pretrained")
    courses.set(
        title="Mean over the trained tasks", xlabel="round", ylabel="head-only gain, points (test rows)"
    )
    courses.xaxis.get_major_locator().set_params(integer=True)
    courses.grid(color="0.92")
    courses.legend(frameon=False)
    last.axvline(0, color="0.4", linestyle=":")
    last.set_yticks(range(len(names)), [_with_metric(name) for name in names])
    last.invert_yaxis()
    last.grid(axis="both", color="0.92")
    last.set(title="Each task, at the last round", xlabel="gain, points")


def _plot_unseen(figure: Any, finding: Finding) -> None:
    methods = {method: found for method, found in finding["methods"].items() if found}
    num = max(len(found["datasets"]) for found in methods.values())
    figure.set_size_inches(2 + 3.2 * len(methods), 1.8 + 0.28 * num)
    is_same = len({tuple(found["datasets"]) for found in methods.values()}) == 1
    panels = figure.subplots(1, len(methods), sharey=is_same, squeeze=False)[0]
    for panel, (method, found) in zip(panels, methods.items(), strict=True):
        _dumbbell(panel, found, ("pretrained", "fused"))
        panel.set_title(f"{METHOD_NAMES[method]}\n{_points(found)}", fontsize=10)
    _legend_above(figure, panels[0])


def _plot_own(figure: Any, finding: Finding) -> None:
    found = finding["comparison"]
    figure.set_size_inches(8, 1.8 + 0.28 * len(found["datasets"]))
    panel = figure.subplots()
    _dumbbell(panel, found, ("alone", "swarm"))
    panel.set_title(f"Own classifier after full finetuning, {_points(found)}", fontsize=10)
    _legend_above(figure, panel)


def _dumbbell(panel: Any, found: Finding, labels: tuple[str, str]) -> None:
    """One line for each data set, from theirs to ours; dotted: the means."""
    pairs = [(100 * base, 100 * ours) for base, ours in found["datasets"].values()]
    for row, (base, ours) in enumerate(pairs):
        color = "tab:blue" if ours >= base else "tab:red"
        panel.plot((base, ours), (row, row), color=color, linewidth=2, alpha=0.4, zorder=1)
    for values, color, label in zip(zip(*pairs, strict=True), (_THEIRS, _OURS), labels, strict=True):
        panel.scatter(values, range(len(pairs)), color=color, s=28, label=label, zorder=2)
        panel.axvline(sum(values) / len(values), color=color, linestyle=":", linewidth=1, zorder=0)
    panel.set_yticks(range(len(pairs)), [_with_metric(name) for name in found["datasets"]])
    panel.set_ylim(len(pairs) - 0.4, -0.6)
    panel.set_xlabel("test rows, %  (dotted: mean)")
    panel.grid(axis="both", color="0.92")


def _legend_above(figure: Any, panel: Any) -> None:
    handles, texts = panel.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(texts), frameon=False)


def _plot_gains(figure: Any, finding: Finding) -> None:
    _gain_panels(figure, finding["rows"], "test rows")


def _plot_better(figure: Any, finding: Finding) -> None:
    _gain_panels(figure, {**finding["variants"], **finding["states"]}, "validation rows")


def _gain_panels(figure: Any, rows: Mapping[str, Mapping[str, Finding | None]], where: str) -> None:
    """A panel for each measure, a line for each model: the mean gain and its interval."""
    columns = _measures(rows)
    figure.set_size_inches(2.5 + 3.2 * len(columns), 1.5 + 0.36 * len(rows))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        for number, row in enumerate(rows.values()):
            found = row.get(column)
            if found is None:
                continue
            mean, low, high = found["mean"], found["interval"]["low"], found["interval"]["high"]
            panel.plot((100 * low, 100 * high), (number, number), color=_OURS, linewidth=2, alpha=0.4)
            panel.scatter(100 * mean, number, color=_OURS, s=30, zorder=3)
        panel.axvline(0, color="0.4", linestyle=":")
        panel.set(title=column, xlabel=f"gain over pretrained (0), points\n({where}; bar: 95 %)")
        panel.title.set_fontsize(10)
        panel.grid(axis="both", color="0.92")
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].set_ylim(len(rows) - 0.4, -0.6)


def _plot_one_set(figure: Any, finding: Finding) -> None:
    panel = figure.subplots()
    numbers = sorted({run["contributors"] for run in finding["runs"]})
    for run in finding["runs"]:
        known = [(r, 100 * v) for r, v in enumerate(run["values"], start=1) if v is not None]
        if not known:
            continue
        if finding["base"] is not None:
            known.insert(0, (0, 100 * finding["base"]))
        rounds, values = zip(*known, strict=True)
        color = _SEEDS[numbers.index(run["contributors"]) % len(_SEEDS)]
        is_first = run is next(r for r in finding["runs"] if r["contributors"] == run["contributors"])
        label = f"{run['contributors']} contributors" if run["contributors"] > 1 else "1 contributor"
        panel.plot(rounds, values, color=color, marker="o", markersize=4, label=label if is_first else None)
    if finding["base"] is not None:
        panel.axhline(100 * finding["base"], color="0.4", linestyle=":", label="pretrained")
    panel.set(
        xlabel="round", ylabel="head-only accuracy, %", title=f"{finding['dataset']}, a line for each seed"
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(color="0.92")
    panel.legend(frameon=False)


_PLOTS: dict[int, Callable[[Any, Finding], None]] = {
    1: _plot_trajectory,
    2: _plot_unseen,
    3: _plot_gains,
    4: _plot_gains,
    5: _plot_one_set,
    6: _plot_gains,
    7: _plot_own,
    8: _plot_better,
}
