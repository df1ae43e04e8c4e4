"""A run's rows as a Markdown table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Tokens per second by contestant, and our ratio to the best peer of each group."""
    machine = result["machine"]
    bandwidth = result["read_bandwidth"] / 1e9
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, GPU: {machine['gpu']}; torch {machine['torch']}; "
        f"read bandwidth {bandwidth:.1f} GB/s ({min(result['bandwidths']) / 1e9:.1f} to "
        f"{max(result['bandwidths']) / 1e9:.1f} in the run); size {result['size']}, "
        f"prompts of 128 tokens, {result['new_tokens']} new tokens; tokens/s, medians.",
        "",
    ]
    columns = _columns(result)
    lines.append("| class | who | precision | " + " | ".join(f"{w} {s}" for w, s in columns) + " |")
    lines.append("|---|---|---|" + "---:|" * len(columns))
    for who in _contestants(result):
        cells = [_cell(result, who, column) for column in columns]
        lines.append(f"| {who[0]} | {who[1]} | {who[2]} | " + " | ".join(cells) + " |")
    lines += ["", *_ratios(result, columns), "", *_starts(result), ""]
    return "\n".join(lines)


def _columns(result: Result) -> list[tuple[str, int]]:
    found = {(row["what"], row["size"]) for row in result["rows"] if "size" in row}
    return sorted(found, key=lambda column: (column[0] != "prefill", column[1]))


def _contestants(result: Result) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((r["group"], r["name"], r["precision"]) for r in result["rows"]))


def _rate(result: Result, who: tuple[str, str, str], column: tuple[str, int]) -> float | None:
    for row in result["rows"]:
        same = (row["group"], row["name"], row["precision"]) == who
        if same and (row.get("what"), row.get("size")) == column:
            return float(row["tokens_per_second"])
    return None


def _cell(result: Result, who: tuple[str, str, str], column: tuple[str, int]) -> str:
    for row in result["rows"]:
        if (row["group"], row["name"], row["precision"]) == who and "absent" in row:
            return str(row["absent"])
    rate = _rate(result, who, column)
    if rate is None:
        return ""
    share = _share(result, who, column, rate)
    digits = 1 if rate >= 2 else 2
    return f"{rate:.{digits}f}" + (f" ({share:.0%})" if share else "")


def _share(
    result: Result, who: tuple[str, str, str], column: tuple[str, int], rate: float
) -> float | None:
    """The share of the read bandwidth that decoding at batch 1 uses; None for other columns."""
    if column != ("decode", 1):
        return None
    for row in result["rows"]:
        if (row["group"], row["name"], row["precision"]) == who and "weight_bytes" in row:
            return rate * float(row["weight_bytes"]) / float(result["read_bandwidth"])
    return None


def _ratios(result: Result, columns: list[tuple[str, int]]) -> list[str]:
    lines = ["| ours / the best peer | " + " | ".join(f"{w} {s}" for w, s in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for group in dict.fromkeys(who[0] for who in _contestants(result)):
        cells = []
        for column in columns:
            ours: list[tuple[float, str]] = []
            peers: list[tuple[float, str]] = []
            for who in _contestants(result):
                rate = _rate(result, who, column) if who[0] == group else None
                if rate is not None:
                    side = ours if who[1].startswith("ours") else peers
                    side.append((rate, who[1]))
            known = ours and peers
            cells.append(f"{max(ours)[0] / max(peers)[0]:.2f} ({max(peers)[1]})" if known else "")
        if any(cells):
            lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return lines


def _starts(result: Result) -> list[str]:
    lines = [
        "| start | load, s | first text (compile), s | peak memory with PyTorch's own, GiB "
        "| weights, GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "load_seconds" in row:
            lines.append(
                f"| {row['name']}, {row['precision']} | {row['load_seconds']:.1f} | "
                f"{row['first_seconds']:.1f} | {row['peak'] / 2**30:.2f} | "
                f"{row['weight_bytes'] / 2**30:.2f} |"
            )
    return lines


def plot(result: Result, path: Path) -> None:
    """Plot decoding at batch 1 by contestant and precision, with the limit set by the bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars: list[tuple[str, float, bool]] = []
    limits: list[float | None] = []
    places: list[float] = []  # with a gap between groups
    groups: dict[str, int] = {}
    bits = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
    ours = [row for row in result["rows"] if row["name"] == "ours" and "weight_bytes" in row]
    sizes = {row["precision"]: float(row["weight_bytes"]) for row in ours}
    for who in _contestants(result):
        rate = _rate(result, who, ("decode", 1))
        if rate is None:
            continue
        places.append(len(bars) + 0.5 * groups.setdefault(who[0], len(groups)))
        bars.append((f"{who[1]}, {who[2]}", rate, who[1].startswith("ours")))
        same = [size for key, size in sizes.items() if bits[key] == bits[who[2]]]
        limits.append(float(result["read_bandwidth"]) / same[0] if same else None)
    figure, axes = pyplot.subplots(
        figsize=(9, 0.35 * (places[-1] if places else 0) + 1.5), layout="constrained"
    )
    colours = ["#c03b2b" if bar[2] else "#8a949e" for bar in bars]
    drawn = axes.barh(places, [bar[1] for bar in bars], color=colours)
    legible = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over a line
    axes.bar_label(drawn, fmt="%.1f", padding=4, bbox=legible)
    for place, limit in zip(places, limits, strict=True):
        if limit:
            ends = [place - 0.45, place + 0.45]
            axes.plot([limit, limit], ends, color="black", linewidth=2, zorder=0)
    axes.set_yticks(places, [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(
        "tokens/s, decoding at batch 1\n(black: what the machine's "
        f"{result['read_bandwidth'] / 1e9:.0f} GB/s of read bandwidth allow)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
