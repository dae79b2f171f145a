"""The round manifest of SPO: what a round must know of the earlier ones, saved beside each checkpoint.

A file ``spo_manifest.json`` with the base it started from and, for each round, its beta, multipliers, data and where
its policy lies. Fingerprints are taken of sampled weights rounded to bfloat16, so that a base loaded in another
floating-point type is still recognised.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE_NAME = "spo_manifest.json"
FORMAT = 1
SAMPLES = 256  # values of each tensor that enter a fingerprint
ADAPTER_MARKS = ("lora_", "modules_to_save", "prompt_encoder", ".ia3_", "vera_", "oft_", "hada_", "lokr_")


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest in a folder, or at a path to the file itself.

    Raises:
        ValueError: there is none, or this version cannot read it.
    """
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"manifest is {folder!r}, which holds no {FILE_NAME}; give the output folder of a round.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path} has format {manifest['format']!r}; this version of hf_ext reads {FORMAT}.")
        if not manifest["rounds"] or "base" not in manifest:
            raise KeyError("rounds")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of SPO rounds ({error!r}).") from error
    manifest["folder"] = str(path.parent)
    return manifest


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """Write atomically, with the paths of policies relative to ``folder``."""
    rounds = [{**record, "policy": _relative(record["policy"], folder)} for record in manifest["rounds"]]
    path = Path(folder) / FILE_NAME
    scratch = path.with_suffix(".tmp")
    content = {"format": FORMAT, "base": manifest["base"], "rounds": rounds}
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def policy_path(manifest: Mapping[str, Any], k: int) -> str:
    """Where ``pi_k`` lies; ``pi_0`` is the base."""
    if k == 0:
        return str(manifest["base"]["name"])
    return os.path.normpath(os.path.join(manifest["folder"], manifest["rounds"][k - 1]["policy"]))


def check_manifest(manifest: Mapping[str, Any], base: Mapping[str, Any], policy: str | None) -> None:
    """Refuse a model or tokenizer other than the one the earlier rounds were trained with.

    Args:
        manifest: of the previous round.
        base: `describe_base` of the model given now.
        policy: fingerprint of the policy this round starts from; None where it cannot be taken.

    Raises:
        ValueError: the base, the starting policy or the tokenizer differ.
    """
    last = manifest["rounds"][-1]
    where = f"the manifest in {manifest['folder']!r}"
    if last["kind"] == "adapter" and base["fingerprint"] != manifest["base"]["fingerprint"]:
        raise ValueError(
            f"The base model ({base['name'] or 'an instance'}) is not the one of {where} "
            f"({manifest['base']['name'] or 'an instance'}): their weights differ. An adapter is only valid on its "
            f"own base, in the same quantisation."
        )
    if policy is not None and last["fingerprint"] is not None and policy != last["fingerprint"]:
        raise ValueError(
            f"The model is not the result of round {last['round']} of {where}: their weights differ. Each round "
            f"starts from the policy the last one ended with."
        )
    if base["tokenizer"] != manifest["base"]["tokenizer"]:
        raise ValueError(
            f"The tokenizer or its chat template is not the one of {where}; log-probabilities of different "
            f"tokenisations cannot be compared."
        )


def describe_base(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Name and fingerprints of the model (without its adapters) and of its tokenizer."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return {
        "name": getattr(inner.config, "_name_or_path", ""),
        "fingerprint": fingerprint(_base_weights(model)),
        "tokenizer": _tokenizer_fingerprint(tokenizer),
    }


def policy_fingerprint(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> str | None:
    """Of the trained adapter where there is one, of all weights otherwise; None for weights that are sharded."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return fingerprint(get_peft_model_state_dict(model, state_dict=state_dict, adapter_name="default"))
    return fingerprint(model.state_dict() if state_dict is None else state_dict)


def fingerprint(weights: Mapping[str, Tensor]) -> str | None:
    """Hash of names, shapes and evenly spaced values; None where a tensor is sharded or has no storage."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            return None
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu()
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base_weights(model: Any) -> dict[str, Tensor]:
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    weights = {}
    for name, tensor in inner.state_dict().items():
        if not any(mark in name for mark in ADAPTER_MARKS):
            weights[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return weights


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    identity = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _relative(path: str, folder: str) -> str:
    return os.path.relpath(path, folder) if os.path.isabs(path) else path
