"""``hf-ext cla info|rank|convert``: Cross-Layer Attention for a model folder or hub name."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hf_ext.cli.common import add_model_arguments, human_bytes, human_count, load, read_text

PATTERNS = ("uniform", "keep_ends", "dense_front", "dense_back", "tail")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="info|rank|convert")
    info = commands.add_parser("info", help="what a map would save, or what a model shares already")
    add_model_arguments(info)
    _add_map_arguments(info)
    rank = commands.add_parser("rank", help="measure what each layer's keys and values are worth; resumable")
    add_model_arguments(rank)
    rank.add_argument("--text", required=True, metavar="FILE", help="some text; - reads standard input")
    rank.add_argument("--tokens", type=int, default=2048, help="tokens of it to use (default: %(default)s)")
    rank.add_argument("--reach", type=int, default=1, help="earlier layers each layer tries (default: %(default)s)")
    rank.add_argument("--window", type=int, default=512, help="tokens a forward (default: %(default)s)")
    rank.add_argument("--init", choices=("copy", "fit"), default="fit", help="default: %(default)s")
    rank.add_argument("--output", required=True, metavar="JSON", help="written after every layer; continued if there")
    convert = commands.add_parser("convert", help="write a converted, and if asked healed, model; resumable")
    add_model_arguments(convert)
    _add_map_arguments(convert)
    convert.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the converted model")
    convert.add_argument("--init", choices=("copy", "mean", "fit"), help="default: fit with --text, else copy")
    convert.add_argument("--separate-kv-norm", action="store_true", help="a norm of its own for keys and values")
    convert.add_argument("--text", metavar="FILE", help="for the init and for healing, best of the kind to be read")
    convert.add_argument("--calibration-tokens", type=int, default=8192, help="for the init (default: %(default)s)")
    convert.add_argument(
        "--search-tokens",
        type=int,
        default=0,
        help="with --ranking and --text: measure the map step by step on so many tokens (default: take the ranking's "
        "losses as additive)",
    )
    convert.add_argument("--heal-tokens", type=int, default=0, help="tokens of distillation (default: none)")
    convert.add_argument(
        "--layer-tokens",
        type=int,
        default=0,
        help="with --heal-tokens: tokens to heal each layer by itself on before that (default: none)",
    )
    convert.add_argument("--learning-rate", type=float, default=1e-3, help="of the healing (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    return {"info": run_info, "rank": run_rank, "convert": run_convert}[arguments.action](arguments)


def run_info(arguments: argparse.Namespace) -> int:
    """Print the layers that would share, bytes a token and parameters."""
    from hf_ext.cla.plan import consumers, plan
    from hf_ext.cla.shared import shared_layers
    from hf_ext.patches.cla_config import layer_kinds
    from hf_ext.patches.cla_convert import convert_to_cla

    model, _ = load(arguments)
    before, parameters = model.kv_bytes_per_token(), model.num_parameters()
    if shared := shared_layers(model):
        print(f"shares already: {', '.join(f'{layer} reads {source}' for layer, source in sorted(shared.items()))}")
        print(f"{human_bytes(before)} of keys and values a token, {human_count(parameters)} parameters")
        return 0
    config = _config(arguments, model)
    sources = plan(config, layer_kinds(model.get_decoder().config))
    converted = convert_to_cla(model, config, inplace=True)
    print(f"map: {list(sources)}")
    print(f"layers that read another's keys and values: {len(consumers(sources))} of {len(sources)}")
    print(f"keys and values a token: {human_bytes(before)} -> {human_bytes(converted.kv_bytes_per_token())}")
    print(f"parameters: {human_count(parameters)} -> {human_count(converted.num_parameters())}")
    return 0


def run_rank(arguments: argparse.Namespace) -> int:
    """Measure every layer that has not been measured, writing each down."""
    from hf_ext.cla.ranking import PairLoss
    from hf_ext.evaluation import tokenize
    from hf_ext.patches.cla_rank import rank_layers

    text, output = read_text(arguments.text), Path(arguments.output)
    settings = {
        "model": arguments.model or "default",
        "text": _digest(text),
        **{name: getattr(arguments, name) for name in ("tokens", "window", "init", "reach")},
    }
    known = read_ranking(output, settings) if output.exists() else []
    model, tokenizer = load(arguments)

    def write(pair: PairLoss) -> None:
        known.append(pair)
        _write_json(output, {**settings, "losses": [vars(one) for one in known]})

    ids = tokenize(tokenizer, text)[: arguments.tokens]
    ranked = rank_layers(
        model,
        ids,
        init=arguments.init,
        reach=arguments.reach,
        window=arguments.window,
        known=list(known),
        done=write,
        progress=sys.stderr.isatty(),
    )
    for pair in ranked:
        print(f"layer {pair.layer:3d} reading {pair.source:3d}: {pair.nats:+.4f} nats a token")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert, heal and write the folder at once; a failure leaves nothing at its place."""
    from hf_ext.evaluation import tokenize
    from hf_ext.patches.cla_convert import convert_to_cla

    output = Path(arguments.output)
    if output.exists():
        raise ValueError(f"--output {output} exists already; name a new folder.")
    if arguments.heal_tokens and not arguments.text:
        raise ValueError("--heal-tokens needs --text FILE to heal on.")
    text = read_text(arguments.text) if arguments.text else None
    model, tokenizer = load(arguments)
    ids = None if text is None else tokenize(tokenizer, text)
    init: Any = arguments.init or ("copy" if ids is None else "fit")
    calibration = None if ids is None else ids[: arguments.calibration_tokens]
    work = output.with_name(output.name + ".work")
    config = _config(arguments, model)
    searches = arguments.ranking and arguments.search_tokens and ids is not None
    if searches or arguments.heal_tokens:
        check_work(work, {"text": _digest(text or ""), **_settings(arguments)})
    if searches:
        config = _searched(arguments, model, ids, work)
    print(f"converting with init={init}: {human_bytes(model.kv_bytes_per_token())} of keys and values a token before")
    converted = convert_to_cla(model, config, init, calibration)
    if arguments.heal_tokens:
        assert ids is not None  # checked above
        from hf_ext.trainers.cla_heal import heal

        options = {"learning_rate": arguments.learning_rate, "layer_tokens": arguments.layer_tokens}
        heal(converted, model, ids, work, tokens=arguments.heal_tokens, **options)
    save_atomically(converted, tokenizer, output)
    shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {output}: {human_bytes(converted.kv_bytes_per_token())} of keys and values a token")
    return 0


def check_work(work: Path, settings: dict[str, Any]) -> None:
    """Begin a work folder with these settings, or see that the one there was begun with the same.

    Raises:
        ValueError: it was begun with others, so that its checkpoints belong to another conversion.
    """
    path, settings = work / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        _write_json(path, settings)
    elif json.loads(path.read_text()) != settings:
        raise ValueError(f"{work} holds an unfinished conversion with other options; repeat those, or remove it.")


def save_atomically(model: Any, tokenizer: Any, output: Path) -> None:
    """Write a model folder beside its place and move it there whole."""
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_ranking(path: Path, settings: dict[str, Any] | None = None) -> list[Any]:
    """What a ranking file holds.

    Raises:
        ValueError: it is no ranking, or one with other settings than these.
    """
    from hf_ext.cla.ranking import PairLoss

    try:
        found = json.loads(path.read_text())
        losses = [PairLoss(**loss) for loss in found["losses"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no ranking written by `hf-ext cla rank`.") from error
    for name, value in (settings or {}).items():
        if found.get(name) != value:
            raise ValueError(f"{path} was measured with {name}={found.get(name)!r}, not {value!r}; name a new file.")
    return losses


def _add_map_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--factor", type=int, default=2, help="layers that use one layer's keys (default: 2)")
    parser.add_argument("--pattern", choices=PATTERNS, default="keep_ends", help="default: %(default)s")
    parser.add_argument("--map", metavar="JSON", help="kv_source_layers, such as [0,0,2,2]; replaces the pattern")
    parser.add_argument("--ranking", metavar="JSON", help="a file of `hf-ext cla rank`; replaces the pattern")
    parser.add_argument("--keep", type=float, default=0.8, help="with --ranking: share of the bytes to keep (0.8)")


def _config(arguments: argparse.Namespace, model: Any) -> Any:
    from hf_ext.cla.config import CLAConfig
    from hf_ext.patches.cla_rank import map_for_bytes

    separate = getattr(arguments, "separate_kv_norm", False)
    if arguments.map and arguments.ranking:
        raise ValueError("Give either --map or --ranking, not both.")
    if arguments.map:
        try:
            sources = json.loads(arguments.map)
        except json.JSONDecodeError as error:
            raise ValueError(f"--map must be a list such as [0,0,2,2], got {arguments.map!r}.") from error
        return CLAConfig(kv_source_layers=sources, separate_kv_norm=separate)
    if arguments.ranking:
        if not 0 < arguments.keep <= 1:
            raise ValueError(f"--keep must be above 0 and at most 1, got {arguments.keep}.")
        losses = read_ranking(Path(arguments.ranking))
        budget = int(model.kv_bytes_per_token() * arguments.keep)
        return CLAConfig(kv_source_layers=map_for_bytes(model, losses, budget), separate_kv_norm=separate)
    return CLAConfig(arguments.factor, arguments.pattern, separate_kv_norm=separate)


def _searched(arguments: argparse.Namespace, model: Any, ids: Any, work: Path) -> Any:
    """The map that measuring step by step finds, every measurement written down."""
    from hf_ext.cla.config import CLAConfig
    from hf_ext.patches.cla_search import search_map

    path = work / "search.json"
    known = {tuple(sources): nats for sources, nats in json.loads(path.read_text())} if path.exists() else {}

    def write(sources: tuple[int, ...], nats: float) -> None:
        known[sources] = nats
        _write_json(path, [[list(one), value] for one, value in known.items()])

    found = search_map(
        model,
        ids[: arguments.search_tokens],
        int(model.kv_bytes_per_token() * arguments.keep),
        read_ranking(Path(arguments.ranking)),
        known=known,
        done=write,
        progress=sys.stderr.isatty(),
    )
    return CLAConfig(kv_source_layers=found, separate_kv_norm=arguments.separate_kv_norm)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same for a conversion to go on from where it was interrupted."""
    left_out = ("command", "action", "output", "text", "run")
    return {name: value for name, value in vars(arguments).items() if name not in left_out and not callable(value)}


def _write_json(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)
