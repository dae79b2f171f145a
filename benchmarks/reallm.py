"""ReALLM against other quantizers on a real model: perplexity at measured bits per weight, time and memory.

    python benchmarks/reallm.py --calibration FOLDER --text wiki.test.raw pydoc gsm8k.jsonl [--only reallm-3 NF4 ...]

Every method runs in a process of its own, which also measures its peak memory, and its row is kept in ``--work``: an
interrupted run goes on where it stopped. Perplexity is taken on non-overlapping windows of a text, tokenised once;
texts after the first are shorter samples, and are left out where the first shows a model that is of no use. The
default model's weights already lie on a 4-bit grid of groups of 32 columns, so 4-bit rows say little about other
models, and no row uses that grouping. Calibration text must not be related to the texts measured. HQQ and quanto are
found as benchmarks/_peers.py says.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _own_text import own_text
from _quantizers import load_hqq, load_nf4, load_quanto
from _run import Report
from _texts import read_text

USELESS = 1000  # a perplexity from which on no second text is worth measuring
ROUNDING = {"codebook": "uniform", "affine": True, "group_size": 64, "permute": False, "rank": 0, "row_weights": False}

# method -> options of ReALLMConfig; "calibrated" is replaced by the calibration text
METHODS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "RTN-4": {"bits": 4, **ROUNDING},
    "RTN-3": {"bits": 3, **ROUNDING},
    "RTN-2": {"bits": 2, **ROUNDING},
    "NF4 (bitsandbytes)": None,
    "HQQ-4": None,
    "HQQ-3": None,
    "HQQ-2": None,
    "quanto int4": None,
    "quanto int2": None,
    "GPTQ-4": {"bits": 4, **ROUNDING, "calibrated": True},
    "GPTQ-3": {"bits": 3, **ROUNDING, "calibrated": True},
    "reallm-4": {"budget": 4.3, "state_bits": 12, "calibrated": True},
    "reallm-3": {"budget": 3.3, "state_bits": 12, "calibrated": True},
    "reallm-2": {"budget": 2.5, "state_bits": 12, "calibrated": True},
    "reallm-3 shorter states": {"budget": 3.3, "calibrated": True},
    "reallm-2 shorter states": {"budget": 2.5, "calibrated": True},
    "reallm-3 one shape": {"bits": 3, "rank": 4, "calibrated": True},
    "reallm-2 one shape": {"bits": 2, "rank": 4, "calibrated": True},
    "reallm-3 k-means": {"budget": 3.3, "decoder": "identity", "calibrated": True},
    "reallm-2 k-means": {"budget": 2.5, "decoder": "identity", "calibrated": True},
    "reallm-3 data-free": {"bits": 3, "rank": 4},
    # what each ingredient buys, at 3 bits and one shape
    "3 bits: no low rank": {"bits": 3, "rank": 0, "calibrated": True},
    "3 bits: outliers among the codes": {"bits": 3, "rank": 4, "outliers": 0, "calibrated": True},
    "3 bits: no feedback": {"bits": 3, "rank": 4, "feedback": False, "calibrated": True},
    "3 bits: no weighting": {"bits": 3, "rank": 4, "weighting": False, "calibrated": True},
    "3 bits: no permutation": {"bits": 3, "rank": 4, "permute": False, "calibrated": True},
    "3 bits: two rounds": {"bits": 3, "rank": 4, "rounds": 2, "calibrated": True},
    "3 bits: all rows alike": {"bits": 3, "rank": 4, "row_weights": False, "calibrated": True},
    "3 bits: k-means": {"bits": 3, "rank": 4, "decoder": "identity", "calibrated": True},
    "3 bits: pointwise decoder": {"bits": 3, "rank": 4, "decoder": "pointwise", "calibrated": True},
    "3 bits: context decoder": {"bits": 3, "rank": 4, "decoder": "context", "calibrated": True},
}


def main() -> None:
    """Run what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--calibration", required=True, help="text file or folder to calibrate on")
    parser.add_argument("--text", required=True, nargs="+", help="texts to measure perplexity on; see _texts.py")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="windows of the first text")
    parser.add_argument("--other-windows", type=int, default=1, help="windows of each other text")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--calibration-length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--own-windows", type=int, default=0, help="as many more that the model writes itself")
    parser.add_argument("--own-seed", type=int, default=0, help="of the draw of the first batch")
    parser.add_argument("--own-batch", type=int, help="windows that it writes at once (default: all)")
    parser.add_argument("--report", default="reallm", help="name of the result files")
    parser.add_argument("--work", default="out/reallm", help="where finished rows and ReALLM models are kept")
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("one", "only", "work", "report")
    }
    settings["calibration"] = Path(arguments.calibration).name
    settings["text"] = [Path(text).stem for text in arguments.text]
    report = Report(arguments.report, settings)
    for method in METHODS:
        row = _row(method, arguments)
        if row is not None:
            report.row(**row)
    report.save()


def _row(method: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a method, from an earlier run or from a process of its own; None if it was not asked for."""
    kept = _place(method, arguments).with_suffix(f".{arguments.window}x{arguments.windows}.json")
    if not kept.exists():
        if method not in arguments.only:
            return None
        command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
        shutil.rmtree(_layers(_place(method, arguments)), ignore_errors=True)
    row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return row


def _place(method: str, arguments: argparse.Namespace) -> Path:
    return Path(arguments.work, method.replace(" ", "_").replace(":", ""))


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantise by one method and measure."""
    from transformers import AutoTokenizer

    from hf_ext.default_model import resolve_model

    before = time.perf_counter()
    place = _place(method, arguments)
    begun = place.exists() or _layers(place).exists()  # then the time and memory of the whole are not known
    model, linear, whole_file = _load(method, arguments)
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.model))
    return {
        "method": method,
        "bits_linear": round(linear, 3),
        "bits_file": None if whole_file is None else round(whole_file, 3),
        **_perplexities(model, tokenizer, arguments),
        "load_and_quantise_s": None if begun else round(seconds, 1),
        "peak_mib": None if begun else round(peak),
        "threads": torch.get_num_threads(),
    }


def _load(method: str, arguments: argparse.Namespace) -> tuple[Any, float, float | None]:
    """The model, its bits per weight in linear layers, and in the whole file where it writes one."""
    if method == "float32":
        from hf_ext.default_model import load_model

        return load_model(arguments.model)[0], 32.0, None
    if METHODS[method] is not None:
        return _reallm(dict(METHODS[method] or {}), arguments, _place(method, arguments))
    if method.startswith("NF4"):
        return *load_nf4(arguments.model), None
    load = load_hqq if method.startswith("HQQ") else load_quanto
    return *load(arguments.model, int(method[-1])), None


def _reallm(options: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> tuple[Any, float, float]:
    """The model in ``folder``, quantised and saved there first if there is none."""
    from transformers import AutoModelForCausalLM

    from hf_ext.quant.integrity import bits_on_disk
    from hf_ext.quant.linear import set_decode_mode

    if not folder.exists():
        _quantize(options, arguments, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    bits = bits_on_disk(folder)
    set_decode_mode(model, "once")
    return model, bits["linear"], bits["whole_file"]


def _quantize(options: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> None:
    from hf_ext import ReALLMConfig
    from hf_ext.default_model import load_model
    from hf_ext.quant.quantize import Progress
    from hf_ext.quant.quantizer import quantize_in_place

    model, tokenizer = load_model(arguments.model)
    if options.pop("calibrated", False):
        ids = _calibration(model, tokenizer, arguments)
        options |= {"calibration": ids, "windows": len(ids), "window_length": ids.shape[1]}
    config = ReALLMConfig(**options)
    quantize_in_place(model, config, Progress(folder=_layers(folder), show=sys.stderr.isatty()))
    unfinished = folder.with_name(folder.name + ".new")
    model.save_pretrained(unfinished)
    unfinished.replace(folder)


def _calibration(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> torch.Tensor:
    """Windows of the calibration text and of the model's own, in turn, so that a survey of the first few sees both."""
    from hf_ext.quant.calibration import calibration_windows, in_turn

    count, length = arguments.calibration_windows, arguments.calibration_length
    text = calibration_windows(arguments.calibration, tokenizer, count, length)
    if not arguments.own_windows:
        return text
    source = (length, arguments.work, arguments.own_seed, arguments.own_batch)
    return in_turn(text, own_text(model, tokenizer, arguments.own_windows, *source))


def _layers(folder: Path) -> Path:
    """Where solved layers are kept until the row is done."""
    return folder.with_name(folder.name + ".layers")


def _perplexities(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    from hf_ext.evaluation import perplexity, tokenize

    found: dict[str, float] = {}
    for text in arguments.text:
        if found and min(found.values()) > USELESS:
            break
        ids, count = tokenize(tokenizer, read_text(text)), arguments.other_windows if found else arguments.windows
        measured = perplexity(model, ids, arguments.window, max_windows=count)
        found[Path(text).stem] = round(measured.perplexity, 2)
    return found


if __name__ == "__main__":
    main()
