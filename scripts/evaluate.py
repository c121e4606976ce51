"""How good is a model as a base model? Probe, few-shot and full finetuning on many data sets.

    python -m scripts.evaluate MODEL --data-dir DATA [--against MODEL] [--out DIR]

MODEL is a directory (as `mine/model`), a hub id, or `packaged`: all-MiniLM-L6-v2, which the demo starts from.
DATA holds a folder for each data set: sst2/train.csv, validation.csv, test.csv, columns text, [text_pair],
label. Learning rates and penalties are chosen on validation rows, for each model alike; test rows are read
once. With --out every result is kept when it is done, so the same command goes on where it was stopped;
there, too, evaluation.json, evaluation.csv, and the plot as evaluation.png and evaluation.svg.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from coordinator.cli import EXIT_CODES, Parser, positive, positive_int, run_main
from coordinator.errors import DataError, StateError, SwarmError, UsageError
from peer.benchmark import (
    METHODS,
    Benchmark,
    BenchmarkConfig,
    BenchmarkTexts,
    EncodedTask,
    Encoder,
    Method,
    Score,
    answers,
    cost,
    encode,
    headline_metric,
    load_texts,
)
from peer.display import clean, format_seconds
from peer.model import load_tokenizer
from peer.state import write_text
from peer.statistics import Comparison, Metric, compare
from scripts.simulate import model_directory

METHOD_NAMES: Mapping[Method, str] = {
    "probe": "head-only probe",
    "few_shot": "few-shot finetuning",
    "finetune": "full finetuning",
}
METRICS: tuple[Metric, ...] = get_args(Metric)
_NAME_LENGTH = 30
_OTHER_COLOR, _MODEL_COLOR = "0.55", "tab:blue"  # of the plot


@dataclass(frozen=True)
class Model:
    name: str  # as the person gave it, cut if it is long
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    tokenizer_key: str  # the same for tokenizers that give the same tokens


Results = Mapping[tuple[str, str, Method], Sequence[Score]]  # by model, data set and method


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def evaluate(
    models: Sequence[Model],
    texts: Sequence[BenchmarkTexts],
    methods: Sequence[Method],
    config: BenchmarkConfig,
    store: Store,
    on_start: Callable[[str], None] = lambda _: None,
    on_cost: Callable[[float], None] = lambda _: None,
    on_result: Callable[[str, Sequence[Score]], None] = lambda _, __: None,
) -> dict[tuple[str, str, Method], list[Score]]:
    """All results; those that `store` has are not computed again. One model is in training at a time."""
    results: dict[tuple[str, str, Method], list[Score]] = {}
    for task in texts:
        encoded: dict[str, EncodedTask] = {}  # by tokenizer
        for model in models:
            pending = [m for m in methods if not store.has(model, task, m)]
            if pending and model.tokenizer_key not in encoded:
                encoded[model.tokenizer_key] = encode(task, model.tokenizer, config)
            benchmark = (
                Benchmark(model.encoder, encoded[model.tokenizer_key], config, on_cost) if pending else None
            )
            for method in methods:
                if benchmark is not None and method in pending:
                    on_start(f"{task.name}, {METHOD_NAMES[method]}, {model.name}")
                    store.save(model, task, method, benchmark.run(method))
                    on_result(model.name, store.load(model, task, method))
                results[model.name, task.name, method] = store.load(model, task, method)
    return results


class Store:
    """Results by backbone, rows and method; in files if there is a folder, else in memory."""

    def __init__(self, folder: Path | None, config: BenchmarkConfig) -> None:
        """Raises UsageError for a folder of other settings, StateError for one that cannot be used."""
        self._folder, self._kept = folder, dict[str, str]()
        if folder is not None:
            _claim_folder(folder, config)

    def has(self, model: Model, task: BenchmarkTexts, method: Method) -> bool:
        name = self._name(model, task, method)
        return name in self._kept or (self._folder is not None and (self._folder / name).is_file())

    def save(self, model: Model, task: BenchmarkTexts, method: Method, scores: Sequence[Score]) -> None:
        result = {
            "dataset": task.name,
            "method": method,
            "state_hash": model.encoder.state_hash,
            "rows": task.digest,
            "draws": [_score_to_json(score) for score in scores],
        }
        text, name = json.dumps(result) + "\n", self._name(model, task, method)
        if self._folder is None:
            self._kept[name] = text
        else:
            write_text(self._folder / name, text)

    def load(self, model: Model, task: BenchmarkTexts, method: Method) -> list[Score]:
        """Raises StateError for a broken file, UsageError for one of other rows."""
        name = self._name(model, task, method)
        text = self._kept[name] if self._folder is None else _read(self._folder / name)
        try:
            result = json.loads(text)
            is_same = (result["rows"], result["state_hash"]) == (task.digest, model.encoder.state_hash)
            scores = [_score_from_json(task.name, method, draw) for draw in result["draws"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{self._folder}/{name} is broken ({error}): delete it") from error
        if not is_same:
            raise UsageError(f"{self._folder}/{name} is of other rows of {task.name}: name another --out")
        return scores

    def _name(self, model: Model, task: BenchmarkTexts, method: Method) -> str:
        return f"{task.name}.{method}.{model.encoder.state_hash[:16]}.json"


def comparisons(
    results: Results, model: str, other: str, names: Sequence[str], methods: Sequence[Method], seed: int
) -> dict[Method, Comparison]:
    """`model` against `other`, over all data sets, by method."""
    return {
        method: compare(
            [answers(results[model, name, method]) for name in names],
            [answers(results[other, name, method]) for name in names],
            seed=seed,
        )
        for method in methods
    }


# ---- models and data ----------------------------------------------------------------------


def open_model(name: str, shown_as: str, revision: str | None = None) -> Model:
    """Raises ModelError, UsageError."""
    model_dir, _ = model_directory(name, revision)
    tokenizer = load_tokenizer(model_dir)
    return Model(shown_as, Encoder.load(model_dir), tokenizer, tokenizer_key(tokenizer))


def short_names(names: Sequence[str]) -> list[str]:
    """Narrow enough for a table, and different: their ends, as paths often begin alike."""
    names = [clean(name, 1000) for name in names]
    short = [name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}" for name in names]
    if len(set(short)) == len(short):
        return short
    return [f"{number}: {name}" for number, name in enumerate(short, start=1)]


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Two directories often hold the same tokenizer, in files that differ."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else type(tokenizer).__name__
    if isinstance(rules, dict):
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    parts = (rules, sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_datasets(data_dir: Path, wanted: Sequence[str] | None) -> list[str]:
    """Names of the data sets in `data_dir`, or those wanted. Raises DataError."""
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: no such folder; it must hold a folder for each data set")
    found = sorted(folder.name for folder in data_dir.iterdir() if any(folder.glob("train.*")))
    if not found:
        raise DataError(f"--data-dir {data_dir} holds no data set: none of its folders has a train.csv")
    unknown = [name for name in wanted or () if name not in found]
    if unknown:
        raise DataError(f"{data_dir} has no data set {', '.join(unknown)}; it has: {', '.join(found)}")
    return list(dict.fromkeys(wanted)) if wanted else found


# ---- the folder ---------------------------------------------------------------------------


def _claim_folder(folder: Path, config: BenchmarkConfig) -> None:
    file = folder / "settings.json"
    settings = json.loads(json.dumps({**asdict(config), "device": config.device.type}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"--out {folder} cannot be made: {error.strerror}") from error
    if not file.exists():
        write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        there = json.loads(_read(file))
    except ValueError as error:
        raise StateError(f"{file} is broken ({error}): name another --out") from error
    if there != settings:
        kept = there if isinstance(there, dict) else {}
        differing = [f"{key} {kept.get(key)}" for key in settings if kept.get(key) != settings[key]]
        raise UsageError(
            f"{folder} holds results of other settings ({', '.join(differing)}): name another --out"
        )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"{file} cannot be read: {error}") from error


def _score_to_json(score: Score) -> dict[str, Any]:
    return {
        "draw": score.draw,
        "chosen": score.chosen,
        "validation_score": score.validation_score,
        "labels": score.labels.tolist(),
        "predictions": score.predictions.tolist(),
    }


def _score_from_json(dataset: str, method: Method, draw: Mapping[str, Any]) -> Score:
    return Score(
        dataset=dataset,
        method=method,
        draw=int(draw["draw"]),
        labels=np.array(draw["labels"], dtype=np.int64),
        predictions=np.array(draw["predictions"], dtype=np.int64),
        chosen=float(draw["chosen"]),
        validation_score=float(draw["validation_score"]),
    )


# ---- what people see ----------------------------------------------------------------------


def result_table(
    results: Results, models: Sequence[str], names: Sequence[str], methods: Sequence[Method]
) -> Table:
    """Headline metric in percent, by data set; of several draws their mean and standard deviation."""
    table = Table(title="Test rows, %", title_justify="left")
    table.add_column("data set")
    table.add_column("metric")
    for method in methods:
        for model in models:
            table.add_column(f"{METHOD_NAMES[method]}\n{model}", justify="right")
        if len(models) == 2:
            table.add_column("\ngain", justify="right")
    for name in names:
        cells = [_cell(results, models, name, method) for method in methods]
        table.add_row(name, headline_metric(name), *(text for row in cells for text in row))
    table.add_section()
    for word, summarize in (("mean", np.mean), ("median", np.median)):
        row: list[str] = []
        for method in methods:
            values = [float(summarize(_values(results, model, names, method))) for model in models]
            row += [f"{100 * value:.1f}" for value in values]
            if len(models) == 2:
                ours, theirs = (np.array(_values(results, model, names, method)) for model in models)
                row.append(f"{100 * float(summarize(ours - theirs)):+.1f}")
        table.add_row(word, "", *row)
    return table


def comparison_table(compared: Mapping[Method, Comparison], model: str, other: str) -> Table:
    table = Table(title=f"{model} against {other}, points", title_justify="left")
    for column in (
        "method",
        "mean",
        "95 % interval",
        "median",
        "wins",
        "losses",
        "ties",
        "without 3 largest gains",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, row in compared.items():
        rest = row.mean_without_largest
        table.add_row(
            METHOD_NAMES[method],
            f"{100 * row.mean:+.2f}",
            f"{100 * row.interval.low:+.2f} to {100 * row.interval.high:+.2f}",
            f"{100 * row.median:+.2f}",
            str(row.wins),
            str(row.losses),
            str(row.ties),
            "-" if rest is None else f"{100 * rest:+.2f}",
        )
    return table


def _values(results: Results, model: str, names: Sequence[str], method: Method) -> list[float]:
    return [answers(results[model, name, method]).value for name in names]


def _cell(results: Results, models: Sequence[str], name: str, method: Method) -> list[str]:
    """One text for each model, and the gain where there are two."""
    texts, means = [], []
    for model in models:
        values = [100 * score.headline for score in results[model, name, method]]
        means.append(float(np.mean(values)))
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        texts.append(f"{means[-1]:.1f}{spread}")
    return [*texts, f"{means[0] - means[1]:+.1f}"] if len(models) == 2 else texts


@contextmanager
def _progress(
    console: Console, total: float
) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Gives functions to say what is being done, and how much of the total was; a bar on a terminal only."""
    if not console.is_terminal:
        yield lambda _: None, lambda _: None
        return
    columns = (
        BarColumn(20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        RemainingColumn(),
    )
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, speed_estimate_period=600
    ) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda text: bar.update(task, description=text),
            lambda done: bar.update(task, advance=done),
        )


class _Lines:
    """One line for each result, with the time that is left by the speed so far."""

    def __init__(self, console: Console, total: float) -> None:
        self._console, self._total, self._done, self._started_at = console, total, 0.0, time.monotonic()

    def on_cost(self, done: float) -> None:
        self._done += done

    def on_result(self, model: str, scores: Sequence[Score]) -> None:
        passed = time.monotonic() - self._started_at
        left = passed * max(0.0, self._total / max(self._done, 1.0) - 1)
        first, value = scores[0], 100 * float(np.mean([score.headline for score in scores]))
        self._console.print(
            f"{format_seconds(passed):>12}  {first.dataset}, {METHOD_NAMES[first.method]}, {model}:"
            f" {value:.1f}  (about {format_seconds(left)} left)",
            soft_wrap=True,
        )


# ---- files --------------------------------------------------------------------------------


def report(
    results: Results, models: Sequence[Model], config: BenchmarkConfig, compared: Mapping[Method, Comparison]
) -> dict[str, Any]:
    """What evaluation.json holds: everything but the single rows."""
    return {
        "settings": {**asdict(config), "device": config.device.type},
        "models": {model.name: model.encoder.state_hash for model in models},
        "scores": [_flat(model, score) for (model, _, _), scores in results.items() for score in scores],
        "comparison": {method: asdict(row) for method, row in compared.items()},
    }


def _flat(model: str, score: Score) -> dict[str, Any]:
    return {
        "model": model,
        "dataset": score.dataset,
        "method": score.method,
        "draw": score.draw,
        "headline": headline_metric(score.dataset),
        **{metric: round(float(getattr(score, metric)), 6) for metric in METRICS},
        "chosen": score.chosen,
        "validation_score": round(score.validation_score, 6),
        "num_test_rows": len(score.labels),
    }


def _write_files(out: Path, contents: Mapping[str, Any]) -> None:
    write_text(out / "evaluation.json", json.dumps(contents, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(contents["scores"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(contents["scores"])
    write_text(out / "evaluation.csv", text.getvalue())


def plot(
    results: Results, models: Sequence[str], names: Sequence[str], methods: Sequence[Method], out: Path
) -> None:
    """One panel for each method, one line for each data set. Raises SwarmError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SwarmError(
            f"matplotlib is not installed, so there is no plot: pip install matplotlib, then run this again "
            f"(nothing is computed twice), or say --no-plot. The tables are in {out}"
        ) from error
    with mpl.rc_context({"svg.hashsalt": "evaluation"}):  # the same results give the same file
        size = (1.6 + 3.2 * len(methods), 1.5 + 0.3 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for panel, method in zip(panels, methods, strict=True):
            _plot_method(panel, results, models, names, method)
        labels = [n if headline_metric(n) == "accuracy" else f"{n} ({headline_metric(n)})" for n in names]
        panels[0].set_yticks(range(len(names)), labels)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        handles, texts = panels[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper center", ncols=len(texts), frameon=False)
        figure.savefig(out / "evaluation.png", dpi=150)
        figure.savefig(out / "evaluation.svg", metadata={"Date": None})


def _plot_method(
    panel: Any, results: Results, models: Sequence[str], names: Sequence[str], method: Method
) -> None:
    rows = range(len(names))
    values = {model: 100 * np.array(_values(results, model, names, method)) for model in models}
    if len(models) == 2:
        low, high = np.minimum(*values.values()), np.maximum(*values.values())
        panel.hlines(rows, low, high, color="0.8", linewidth=2, zorder=1)
    for number, model in reversed(list(enumerate(models))):
        color = _OTHER_COLOR if number else _MODEL_COLOR
        panel.scatter(values[model], rows, s=36, color=color, label=model, zorder=3 - number)
        draws = [
            (s.headline, row) for row, n in zip(rows, names, strict=True) for s in results[model, n, method]
        ]
        if len(draws) > len(names):
            shown, at = zip(*draws, strict=True)
            panel.scatter(100 * np.array(shown), at, s=8, color=color, alpha=0.6, zorder=3 - number)
        panel.axvline(float(values[model].mean()), color=color, linewidth=1, linestyle=":", zorder=0)
    panel.set(title=METHOD_NAMES[method], xlabel="test, %  (dotted: mean)")
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


# ---- the command --------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.evaluate", description=__doc__, epilog=EXIT_CODES)
    default = BenchmarkConfig()
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub id, or `packaged`")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DATA")
    parser.add_argument("--against", metavar="MODEL", help="compare with this one, on the same rows")
    parser.add_argument("--revision", help="of MODEL on the hub")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="folders of DATA (default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="keeps results, tables and plot")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    group = parser.add_argument_group("sizes and tries")
    helps = {
        "train_examples": "rows that probe and full finetuning learn from",
        "validation_examples": "rows that learning rate and penalty are chosen on",
        "test_examples": "rows of the figures",
        "finetune_examples": "what one full finetuning uses; rows repeat",
        "few_shot_examples": "rows of one few-shot draw",
        "few_shot_draws": "draws of them",
        "few_shot_epochs": "passes over them",
        "batch_size": "examples of one step",
        "max_length": "tokens; longer texts are cut",
    }
    for name, text in helps.items():
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(
            flag, type=positive_int, default=value, metavar="N", help=f"{text} (default: {value})"
        )
    lists = {
        "learning_rates": "of finetuning, all tried",
        "probe_cs": "inverse penalties of the probe, all tried",
    }
    for name, text in lists.items():
        values = getattr(default, name)
        flag, shown = f"--{name.replace('_', '-')}", " ".join(map(str, values))
        group.add_argument(
            flag, type=positive, nargs="+", default=values, metavar="X", help=f"{text} (default: {shown})"
        )
    group.add_argument("--seed", type=int, default=default.seed, help=f"default: {default.seed}")
    group.add_argument("--use-cpu", action="store_true", help="even where there is a GPU")
    return parser.parse(arguments)


def _config(flags: argparse.Namespace) -> BenchmarkConfig:
    given: dict[str, Any] = {field.name: getattr(flags, field.name) for field in fields(BenchmarkConfig)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return BenchmarkConfig(**given)


def _main(flags: argparse.Namespace) -> int:
    datasets.disable_progress_bars()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    config = _config(flags)
    methods: list[Method] = [method for method in METHODS if method in flags.methods]
    if flags.against == flags.model:
        raise UsageError(f"--against {flags.against} is the model itself: name another one")
    names = find_datasets(flags.data_dir, flags.datasets)
    store = Store(flags.out, config)
    shown = short_names([flags.model, *([flags.against] if flags.against else [])])
    models = [open_model(flags.model, shown[0], flags.revision)]
    models += [open_model(flags.against, shown[1])] if flags.against else []
    texts = [load_texts(flags.data_dir, name, config) for name in names]  # all, before anything is spent

    total = sum(cost(m, t, config) for t in texts for m in methods for x in models if not store.has(x, t, m))
    lines = _Lines(console, total)
    with _progress(console, total) as (on_start, advance):

        def on_cost(done: float) -> None:
            lines.on_cost(done)
            advance(done)

        results = evaluate(models, texts, methods, config, store, on_start, on_cost, lines.on_result)
    _show(results, models, names, methods, config, flags, console)
    return 0


def _show(
    results: Results,
    models: Sequence[Model],
    names: Sequence[str],
    methods: Sequence[Method],
    config: BenchmarkConfig,
    flags: argparse.Namespace,
    console: Console,
) -> None:
    shown = [model.name for model in models]
    console.print(result_table(results, shown, names, methods))
    compared: dict[Method, Comparison] = {}
    if len(shown) == 2:
        compared = comparisons(results, shown[0], shown[1], names, methods, config.seed)
        console.print(comparison_table(compared, *shown))
        console.print(
            "Interval: paired bootstrap of the mean; data sets are drawn anew, then the rows of each."
        )
    if flags.out is None:
        return
    _write_files(flags.out, report(results, models, config, compared))
    console.print(f"Tables: {flags.out}/evaluation.json, evaluation.csv", soft_wrap=True)
    if not flags.no_plot:
        plot(results, shown, names, methods, flags.out)
        console.print(f"Plot: {flags.out}/evaluation.png, evaluation.svg", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
