"""What ``hf-ext quantize`` leaves beside the model: ``report.json``, ``report.md`` and, with matplotlib, a plot."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

Rows = list[dict[str, Any]]
CAPTION = "An error is the loss on a layer's outputs relative to that of having no weight at all."


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``."""
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plotted = _plot(folder / "report.png", report["layers"])
    page = [f"# {report['model']}, quantised with ReALLM", "", *_summary(report), ""]
    page += ["## By kind of layer", "", CAPTION, "", *_kinds(report["layers"]), ""]
    if plotted:
        page += ["![error and bits of every layer](report.png)", ""]
    page += ["## Every layer", "", *_layers(report["layers"]), ""]
    (folder / "report.md").write_text("\n".join(page), encoding="utf-8")


def _summary(report: dict[str, Any]) -> list[str]:
    bits = report["bits"]
    lines = [
        f"- {bits['linear']:.3f} bits a weight in the linear layers, {bits['whole_file']:.3f} in the whole file "
        f"({bits['file_bytes'] / 2**20:.1f} MiB), from the bytes on disk",
        f"- quantised in {report['seconds']:.0f} s{_resumed(report)}",
    ]
    before, after = report["perplexity_before"], report["perplexity_after"]
    if before is not None:
        lines.append(f"- perplexity {before:.2f} before, {after:.2f} after ({after / before:.2f} times)")
    given = {name: value for name, value in report["settings"].items() if value is not None}
    if "budget" in given:
        del given["bits"]
    return [*lines, "- settings: " + ", ".join(f"`{name}={value}`" for name, value in given.items())]


def _resumed(report: dict[str, Any]) -> str:
    kept = report["layers_kept"]
    return f"; {kept} of {len(report['layers'])} layers are from a run interrupted before" if kept else ""


def _kinds(rows: Rows) -> list[str]:
    """One line for all layers of the same name in different blocks."""
    lines = ["| layers | number | size | bits a weight | mean error | largest error |", "|---" + "|---:" * 5 + "|"]
    kinds: dict[str, Rows] = {}
    for row in rows:
        kinds.setdefault(row["layer"].rpartition(".")[2], []).append(row)
    for kind, mine in kinds.items():
        sizes = " or ".join(dict.fromkeys(row["size"] for row in mine))
        worst = max(mine, key=lambda row: row["error"])
        bits, error = (fmean(row[name] for row in mine) for name in ("bits", "error"))
        where = f"{worst['error']:.4f} in `{worst['layer']}`"
        lines.append(f"| {kind} | {len(mine)} | {sizes} | {bits:.3f} | {error:.4f} | {where} |")
    return lines


def _layers(rows: Rows) -> list[str]:
    heads = "| layer | size | decoder | code bits a weight | rank | outliers | bits a weight | error |"
    return [heads, "|---" + "|---:" * 7 + "|"] + [
        f"| {row['layer']} | {row['size']} | {row['decoder']} | {row['code_bits']:.3f} | {row['rank']} | "
        f"{row['outliers']} | {row['bits']:.3f} | {row['error']:.4f} |"
        for row in rows
    ]


def _plot(path: Path, rows: Rows) -> bool:
    """Error and bits of every layer over its block; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    error, bits = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for kind in dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows):
        mine = [row for row in rows if row["layer"].rpartition(".")[2] == kind]
        error.plot([row["error"] for row in mine], ".-", label=kind, linewidth=0.8)
        bits.plot([row["bits"] for row in mine], ".-", linewidth=0.8)
    error.set(ylabel="relative error", yscale="log")
    bits.xaxis.set_major_locator(MaxNLocator(integer=True))
    bits.set(xlabel="block", ylabel="bits a weight", ylim=(0, None))
    figure.legend(*error.get_legend_handles_labels(), loc="outside right center", frameon=False)
    for axis in (error, bits):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
