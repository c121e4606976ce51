"""How does an overview look in a terminal? Pure: from the value of `overview.py` to a rich renderable.

Every text is a `Text`, so no markup is read from what a peer calls itself; control characters are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.overview import Overview

MAX_PEERS = 24
MAX_ROUNDS = 6
MAX_DROPPED = 4
_STYLES = {"live": "", "stale": "dim", "left": "dim"}
_BAR_CELLS = 10


# Columns of the table of peers, the cells that each needs, and which go first where it is narrow.
_COLUMNS = {
    "peer": 26,
    "phase": 10,
    "round": 5,
    "progress": 15,
    "examples/s": 10,
    "device": 12,
    "sent": 8,
    "received": 8,
    "base own fused": 17,
    "seen": 6,
}
_FIRST_TO_GO = ("received", "sent", "device", "examples/s", "base own fused", "progress", "round")


def render(overview: Overview, width: int) -> RenderableType:
    """`width`: of the terminal, in cells."""
    parts: list[RenderableType] = [_headline(overview), _state(overview)]
    if overview["problem"]:
        parts.append(Text(overview["problem"], style="yellow"))
    parts += [Text(), _peers(overview, width), Text(), _rounds(overview)]
    if overview["dropped"]:
        parts += [Text(), _dropped(overview)]
    return Group(*parts)


def age(seconds: float) -> str:
    """ "now", "12 s", "3 min", "5 h", "2 d": how long ago."""
    if seconds < 2:
        return "now"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86_400)} d"


def size_text(num_bytes: int) -> str:
    """Decimal units, as networks count: "90.8 MB"."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def score_text(metric: str, score: float | None) -> str:
    """Accuracy in percent, any other metric as it is, "-" where there is none."""
    if score is None:
        return "-"
    return f"{100 * score:.1f}" if metric == "accuracy" else f"{score:.3f}"


def shown_name(entry: dict[str, Any]) -> str:
    return f"{entry['short_id']} {entry['name']}".strip()


def _headline(overview: Overview) -> Text:
    run, state = overview["run"], overview["state"]
    text = Text(run["name"], style="bold")
    text.append(f"  round {state['round']} of {run['num_rounds']}", style="not bold")
    text.append(f"  run {run['digest'][:12]}", style="dim not bold")
    if overview["is_over"]:
        text.append("  the run is over", style="not bold")
    return text


def _state(overview: Overview) -> Text:
    state = overview["state"]
    parts = [f"state {state['state_hash'][:12]}, held by {state['num_agreeing']} of {state['num_live']}"]
    parts += [f"{state['num_behind']} behind"] if state["num_behind"] else []
    parts += [f"{state['num_differing']} with another state"] if state["num_differing"] else []
    if state["round"]:
        parts.append(f"{state['num_signatures']} signatures, electorate {state['num_electorate']}")
    return Text(", ".join(parts), style="yellow" if state["num_differing"] else "")


def _peers(overview: Overview, width: int) -> RenderableType:
    peers = overview["peers"]
    if not peers:
        return Text("no peer has been heard of yet", style="dim")
    shown = columns_that_fit(width)
    table = _table("peers", shown, right=("round", "examples/s", "sent", "received", "seen"))
    for peer in peers[:MAX_PEERS]:
        cells = _peer_cells(peer, overview["now"])
        table.add_row(*(Text(cells[name]) for name in shown), style=_STYLES[peer["status"]])
    left_out = len(peers) - MAX_PEERS + overview["num_peers_left_out"]
    if left_out > 0:
        table.caption, table.caption_justify = Text(f"and {left_out} more"), "left"
    return table


def columns_that_fit(width: int) -> list[str]:
    shown = dict(_COLUMNS)
    for name in _FIRST_TO_GO:
        if sum(cells + 2 for cells in shown.values()) > width:
            del shown[name]
    return list(shown)


def _peer_cells(peer: dict[str, Any], now: float) -> dict[str, str]:
    speed, scores = peer["examples_per_second"], peer["scores"]
    measured = (
        [score_text(scores["metric"], scores[key]) for key in ("base", "own", "fused")] if scores else []
    )
    return {
        "peer": shown_name(peer),
        "phase": peer["phase"] if peer["status"] == "live" else peer["status"],
        "round": str(peer["round"]),
        "progress": _bar(peer["progress"]),
        "examples/s": "-" if speed is None else f"{speed:.1f}",
        "device": peer["device"] or "-",
        "sent": size_text(peer["bytes_sent"]),
        "received": size_text(peer["bytes_received"]),
        "base own fused": " ".join(measured) or "-",
        "seen": age(max(0.0, now - peer["last_seen"])),
    }


def _bar(progress: float | None) -> str:
    if progress is None:
        return ""
    filled = round(progress * _BAR_CELLS)
    return "█" * filled + "░" * (_BAR_CELLS - filled) + f" {100 * progress:3.0f}%"


def _rounds(overview: Overview) -> RenderableType:
    rounds = overview["rounds"][-MAX_ROUNDS:]
    if not rounds:
        return Text("waiting for the first round", style="dim")
    table = _table(
        "rounds", ("round", "peers", "examples", "took", "ago", "state"), right=("round", "peers", "examples")
    )
    for entry in reversed(rounds):
        is_fusion = entry["kind"] == "fuse"
        table.add_row(
            str(entry["round"]),
            str(entry["num_peers"]) if is_fusion else "rolled back",
            str(entry["num_examples"]) if is_fusion else entry["reason"],
            age(entry["seconds"]).replace("now", "1 s"),
            age(max(0.0, overview["now"] - entry["committed_at"])),
            entry["state_hash"][:12],
        )
    return table


def _dropped(overview: Overview) -> RenderableType:
    table = _table("dropped", ("round", "peer", "what", "why"), right=("round",))
    for entry in overview["dropped"][:MAX_DROPPED]:
        cells = (str(entry["round"]), shown_name(entry), entry["what"], entry["reason"])
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _table(title: str, columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 1), header_style="dim", title=Text(title, style="bold")
    )
    table.title_justify = "left"
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column != "why")
    return table
