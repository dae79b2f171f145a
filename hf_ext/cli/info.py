"""``hf-ext info [MODEL]``: what a model is and what hf_ext can do with it, from its config without its weights."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_ext.cli.common import MODEL_HELP, console, human_bytes, human_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the config, build the model without memory for its weights, and print what there is to know."""
    from transformers import AutoConfig

    from hf_ext.default_model import resolve_model

    place = resolve_model(arguments.model, weights=False)
    described = {"model": arguments.model or "SmolLM2-135M-Instruct", **describe(AutoConfig.from_pretrained(place))}
    if arguments.json:
        print(json.dumps(described, indent=2))
    else:
        _show(described)
    return 0


def describe(config: Any) -> dict[str, Any]:
    """Everything ``info`` prints, as plain values.

    Raises:
        ValueError: it is not the config of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hf_ext.patches.config_flag import find_flags

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"info describes causal language models; {config.model_type!r} is not one.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    text = config.get_text_config(decoder=True)
    flags = find_flags(config)
    return {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "heads": getattr(text, "num_attention_heads", None),
        "kv_heads": getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None),
        "head_dim": _head_dim(text),
        "attention": dict(Counter(_attention_types(text))),
        "sliding_window": getattr(text, "sliding_window", None),
        "rope": _rope(text),
        "context": getattr(text, "max_position_embeddings", None),
        "vocabulary": text.vocab_size,
        "kv_cache": kv_cache(model),
        "flags": {} if flags is None else flags.to_dict(),
        "features": features(model),
    }


def kv_cache(model: Any) -> dict[str, Any] | None:
    """Bytes of keys and values per token, measured on the cache that the model on the meta device fills itself.

    Returns:
        ``layers`` that store something, ``growing`` of them without a window, and bytes a token that stays for ever
        (``bytes_per_token``) for 4 and 2 bytes an element; None for a model without keys and values.
    """
    import torch

    try:
        with torch.no_grad():
            output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
        layers = [layer for layer in output.past_key_values.layers if getattr(layer, "keys", None) is not None]
    except (AttributeError, RuntimeError, NotImplementedError):
        return None  # no such cache, or an operation that meta tensors do not have
    growing = [layer for layer in layers if not getattr(layer, "is_sliding", False)]
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in growing)
    per_token = {"float32": 4 * elements, "bfloat16": 2 * elements, "float16": 2 * elements}
    return {"layers": len(layers), "growing": len(growing), "bytes_per_token": per_token}


def features(model: Any) -> dict[str, str | None]:
    """Feature -> None where it can be applied to this model as it is, else the sentence that says why not."""
    from hf_ext.patches.caches import check_flag
    from hf_ext.registry import CACHES, look_up

    checks: dict[str, Callable[[], Any]] = {"cla": partial(_check_cla, model)}
    checks["ReALLM weights"] = partial(_check_reallm, model)
    for name in CACHES:
        config = look_up(CACHES, name, "kind of cache")()
        checks[f"kv_cache={name}"] = partial(check_flag, model, (config,))
    return {feature: _refusal(check) for feature, check in checks.items()}


def _check_cla(model: Any) -> None:
    from hf_ext.cla.config import CLAConfig
    from hf_ext.cla.plan import plan
    from hf_ext.patches.architectures import architecture_of
    from hf_ext.patches.cla_config import layer_kinds

    decoder = model.get_decoder()
    architecture_of(decoder, "cla")
    plan(CLAConfig(), layer_kinds(decoder.config))


def _check_reallm(model: Any) -> None:
    from hf_ext.quant.config import ReALLMConfig
    from hf_ext.quant.quantize import linear_names

    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("this checkpoint is quantised already.")
    if not linear_names(model, ReALLMConfig()):
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise.")


def _refusal(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _head_dim(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def _attention_types(config: Any) -> list[str]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    return [str(layer_type) for layer_type in get_layer_types_and_kwargs(config)[0]]


def _rope(config: Any) -> dict[str, Any] | None:
    """``{"type", "theta"}``, or one such for each kind of layer, or None without rotary embeddings."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    if "rope_type" not in parameters:
        kinds = {kind: _rope_entry(value) for kind, value in parameters.items() if isinstance(value, dict)}
        return kinds or None
    return _rope_entry(parameters)


def _rope_entry(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": parameters.get("rope_type"), "theta": parameters.get("rope_theta")}


def _show(described: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(described):
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    out.print(f"[bold]{escape(described['model'])}[/bold]\n", table, "")
    table = Table("hf_ext feature", "", box=None, pad_edge=False)
    for feature, refusal in described["features"].items():
        table.add_row(feature, "[green]yes[/green]" if refusal is None else f"no: {escape(refusal)}")
    out.print(table)


def _rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    attention = ", ".join(f"{count} x {kind}" for kind, count in described["attention"].items())
    window = described["sliding_window"]
    rope = json.dumps(described["rope"]).replace('"', "").removeprefix("{").removesuffix("}")
    return [
        ("architecture", f"{described['architecture']} ({described['model_type']})"),
        ("parameters", f"{human_count(described['parameters'])} ({described['parameters']:,})"),
        ("dtype", str(described["dtype"] or "not stated")),
        ("layers", f"{described['layers']}, hidden size {described['hidden_size']}"),
        ("heads", f"{described['heads']} query, {described['kv_heads']} key/value, head size {described['head_dim']}"),
        ("attention", attention + (f", window {window}" if window and "sliding" in attention else "")),
        ("rope", rope if described["rope"] else "none"),
        ("context", f"{described['context']} tokens" if described["context"] else "not stated"),
        ("vocabulary", f"{described['vocabulary']:,} tokens"),
        *_cache_rows(described),
        ("hf_ext flags", json.dumps(described["flags"]) if described["flags"] else "none"),
    ]


def _cache_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    cache = described["kv_cache"]
    if cache is None:
        return [("KV cache", "unknown: the model keeps no keys and values that can be measured without its weights")]
    stored = cache["bytes_per_token"]
    half, single = human_bytes(stored["bfloat16"]), human_bytes(stored["float32"])
    grow = f"{cache['growing']} of {described['layers']} layers grow"
    rows = [("KV cache", f"{half} a token in bfloat16 or float16, {single} in float32 ({grow})")]
    if described["context"]:
        whole = human_bytes(stored["bfloat16"] * described["context"])
        rows.append(("", f"{whole} for the whole context in bfloat16"))
    return rows
