"""The picture of the demo: memory over the dialogue, and what was remembered at its end."""

from pathlib import Path

from hf_ext.cli.demo_recall import Recall

COLOURS = {"full cache": "#777777", "SirLLM": "#0b6e4f", "sink window": "#d1495b"}


def check_matplotlib() -> None:
    """Raise `ImportError` before anything long begins where the picture could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('The demo draws with matplotlib: run `pip install "hf_ext[demo]"`.') from error


def draw(results: dict[str, Recall], path: Path) -> None:
    """Write the PNG: on the left MiB over tokens of dialogue, on the right the share of right answers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, result in results.items():
        mebibytes = [size / 2**20 for size in result.nbytes]
        style = "--" if name == "sink window" else "-"
        memory.plot(result.seen, mebibytes, style, color=COLOURS[name], label=name, linewidth=2)
    memory.set(xlabel="tokens of dialogue", ylabel="cache (MiB)", title="memory", ylim=0)
    memory.legend(frameon=False)
    shares = [100 * result.right / result.asked for result in results.values()]
    bars = right.bar(list(results), shares, color=[COLOURS[name] for name in results])
    right.bar_label(bars, [f"{result.right} of {result.asked}" for result in results.values()])
    right.axhline(25, color="black", linewidth=1, linestyle=":")
    right.text(-0.4, 26.5, "chance", fontsize=8)
    right.set(ylim=(0, 112), ylabel="right answers (%)", title="facts from the beginning, asked at the end")
    for axes in (memory, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
