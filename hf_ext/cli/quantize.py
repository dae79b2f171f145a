"""``hf-ext quantize MODEL --bits 3 --out DIR``: a ReALLM model, with a report of what it costs and what it lost."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ext.cli.common import add_model_arguments, console, load, read_text

OPTIONS = (
    "bits",
    "budget",
    "rank",
    "preset",
    "decoder",
    "low_rank_bits",
    "calibration",
    "windows",
    "window_length",
    "own_windows",
    "own_start",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to make; it appears when everything is done"
    )
    parser.add_argument("--bits", type=float, default=3, help="code bits per weight (default: %(default)g)")
    parser.add_argument("--budget", type=float, help="bits per weight of all parts; a plan then chooses every shape")
    parser.add_argument("--rank", type=int, help="rank of the low-rank term (default: by the size of the matrix)")
    parser.add_argument("--preset", choices=("fast", "quality"), default="fast", help="(default: %(default)s)")
    parser.add_argument(
        "--decoder",
        choices=("trellis", "identity", "pointwise", "context"),
        help="from codes to weights (default: trellis)",
    )
    parser.add_argument("--low-rank-bits", type=int, choices=(8, 16, 32), default=8)
    parser.add_argument(
        "--calibration", metavar="FILE", help="text to calibrate on, or a folder of *.txt (default: none)"
    )
    parser.add_argument("--windows", type=int, help="windows of it (default: the preset's)")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens in each (default: %(default)s)")
    parser.add_argument(
        "--own-windows",
        type=int,
        default=0,
        metavar="N",
        help="as many more that the model writes itself, beside --calibration or in place of it (default: none)",
    )
    parser.add_argument("--own-start", type=int, metavar="ID", help="token that each begins with (default: bos)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="measure perplexity on this text before and after")
    parser.add_argument(
        "--text-windows", type=int, default=4, metavar="N", help="windows of it (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantise, save, report."""
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"{out} exists already; give a folder that does not.")
    from hf_ext.cli.quantize_report import write_report
    from hf_ext.quant.config import ReALLMConfig
    from hf_ext.quant.integrity import bits_on_disk
    from hf_ext.quant.quantize import Progress
    from hf_ext.quant.quantizer import quantize_in_place

    arguments.device = arguments.device or "cpu"  # where calibration runs
    settings = {name: getattr(arguments, name) for name in OPTIONS}
    text = None if arguments.text is None else read_text(arguments.text, "utf-8")
    config = ReALLMConfig(**settings)
    work = _workplace(out, {"model": arguments.model, "dtype": arguments.dtype, **settings})
    model, config.tokenizer = load(arguments)
    before = _perplexity(model, config.tokenizer, text, arguments.text_windows)
    kept = len(list((work / "layers").glob("*.safetensors")))
    began = time.perf_counter()
    with _writing(work):
        errors = quantize_in_place(model, config, Progress(folder=work / "layers", show=sys.stderr.isatty()))
    seconds = time.perf_counter() - began
    after = _perplexity(model, config.tokenizer, text, arguments.text_windows)
    with _writing(work):
        model.save_pretrained(work / "model")
    config.tokenizer.save_pretrained(work / "model")
    report: dict[str, Any] = {
        "model": arguments.model or "SmolLM2-135M-Instruct",
        "settings": settings,
        "seconds": round(seconds, 1),
        "layers_kept": kept,
        "bits": bits_on_disk(work / "model"),
        "perplexity_before": before,
        "perplexity_after": after,
        "layers": _rows(model, errors),
    }
    write_report(work / "model", report)
    (work / "model").replace(out)
    shutil.rmtree(work)
    linear, whole = report["bits"]["linear"], report["bits"]["whole_file"]
    told = f"{out}: {linear:.3f} bits a weight in the linear layers, {whole:.3f} in the whole file"
    console().print(f"{told}; report in {out / 'report.md'}")
    return 0


@contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Raise safetensors' own error, such as that of a full disk, as the `OSError` that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{work} could not be written ({error}); what is done is kept there.") from error


def _workplace(out: Path, settings: dict[str, Any]) -> Path:
    """Where unfinished work is kept, ``DIR.unfinished``; another run's is not taken over.

    Raises:
        ValueError: it belongs to a run with other settings.
    """
    work = out.with_name(out.name + ".unfinished")
    record = work / "settings.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{work} was begun with other settings; finish that run, or remove the folder.")
    work.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(work / "model", ignore_errors=True)
    return work


def _perplexity(model: Any, tokenizer: Any, text: str | None, windows: int) -> float | None:
    if text is None:
        return None
    from hf_ext.evaluation import perplexity, tokenize

    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    ids = tokenize(tokenizer, text)
    return perplexity(model, ids, min(2048, longest, ids.numel()), max_windows=windows).perplexity


def _rows(model: Any, errors: dict[str, float]) -> list[dict[str, Any]]:
    """What every layer became."""
    from hf_ext.quant.linear import quantized_layers

    return [
        {
            "layer": name,
            "size": f"{layer.out_features} x {layer.in_features}",
            "decoder": layer.shape.decoder,
            "code_bits": layer.shape.bits,
            "rank": layer.shape.rank,
            "outliers": layer.shape.outliers,
            "bits": round(layer.shape.bits_per_weight(layer.out_features, layer.in_features), 3),
            "error": errors[name],
        }
        for name, layer in quantized_layers(model).items()
    ]
