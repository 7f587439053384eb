"""What `language.py` measured, as tables: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SHARES = (0.5, 0.75, 0.9, 1.0)  # of a peer's best match, at which times are compared
MOMENTS = (2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400)  # seconds at which matches are compared


def time_to(points: list[dict[str, float]], match: float) -> float | None:
    """Seconds of the first evaluation that reached `match`; None when none did."""
    return next((point["seconds"] for point in points if point["match"] >= match), None)


def best_by(points: list[dict[str, float]], seconds: float) -> float | None:
    """Best match of the evaluations up to then."""
    return max((point["match"] for point in points if point["seconds"] <= seconds), default=None)


def compare(runs: dict[str, dict[str, Any]], peers: Sequence[str]) -> dict[str, Any]:
    """For each peer, times at which it and we reached shares of its best match."""
    table = {}
    for name in peers:
        best = max(point["match"] for point in runs[name]["points"])
        rows = []
        for share in SHARES:
            peer = time_to(runs[name]["points"], share * best)
            ours = {kind: time_to(runs[kind]["points"], share * best) for kind in ("cold", "warm")}
            ratios = {f"{kind}_ratio": peer / at if peer and at else None for kind, at in ours.items()}
            rows.append({"share": share, "match": share * best, "peer_seconds": peer, **ours, **ratios})
        table[name] = {"best_match": best, "rows": rows}
    return table


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table, as text."""

    def number(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    runs = result["runs"]
    speed = [
        [
            name,
            number(max(p["match"] for p in run["points"]), ".1f"),
            number(run["encoding_seconds"], ",.1f"),
            number(run["training_seconds"], ",.1f"),
            number(run["first_epoch_pairs_per_second"]),
            number(run["later_epoch_pairs_per_second"]),
            number(run["trained_parameters"] / 1e6, ".1f"),
            number(run["peak_memory_mb"]),
        ]
        for name, run in runs.items()
    ]
    times = [
        [
            f"{name}, {row['share']:.0%} of its best",
            number(row["match"], ".1f"),
            number(row["peer_seconds"], ",.1f"),
            number(row["cold"], ",.1f"),
            number(row["warm"], ",.1f"),
            number(row["cold_ratio"], ".1f") + " x",
            number(row["warm_ratio"], ".1f") + " x",
        ]
        for name, table in result["comparison"].items()
        for row in table["rows"]
    ]
    columns = ["run", "best match %", "encoding s", "training s", "pairs/s, epoch 1", "later", "trained M", "peak MB"]
    longest = max(run["points"][-1]["seconds"] for run in runs.values())
    moments = [moment for moment in MOMENTS if moment < longest]
    curves = [[name, *(number(best_by(run["points"], at), ".1f") for at in moments)] for name, run in runs.items()]
    made = [
        ("Speed and memory", columns, speed),
        ("Time to equal match", ["peer", "match %", "peer s", "cold s", "warm s", "cold ratio", "warm ratio"], times),
        ("Best match by time", ["run", *(f"{moment} s" for moment in moments)], curves),
    ]
    if sums := runs.get("warm", {}).get("arithmetic"):
        cells = [
            f"{sums['flops_per_epoch'] / 1e9:,.0f}",
            f"{sums['matrix_rate_flops'] / 1e9:,.0f} ({sums['precision']})",
            f"{sums['floor_seconds']:.2f}",
            f"{sums['epoch_seconds']:.2f}",
            f"{sums['times_the_floor']:.2f}",
        ]
        floor = ["GFLOP per epoch", "matrix GFLOP/s", "floor s", "later epoch s", "times the floor"]
        made.append(("Adapter-only arithmetic", floor, [cells]))
    return [table for table in made if table[2]]


def as_markdown(result: dict[str, Any]) -> str:
    facts = "; ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [f"{facts}; {result['pairs']:,} pairs, {result['validation_pairs']:,} for validation.", ""]
    for title, columns, rows in tables(result):
        lines += [f"**{title}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 140  # nobody's window
    for title, columns, rows in tables(result):
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="left" if column in ("run", "peer") else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
