"""Checksums of every saved tensor, kept in the checkpoint itself, and the bits per weight that its bytes really take.

safetensors keeps no checksums, and the host only warns of a missing tensor and fills it with random numbers. So a
checkpoint of ours lists every tensor with its CRC-32 in the metadata of each shard, and loading compares.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHECKSUMS = "hf_ext.crc32"


def checksums(tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of every tensor's bytes, as JSON."""
    return json.dumps({name: checksum(tensor) for name, tensor in sorted(tensors.items())})


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes in order."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def verify_checkpoint(files: Iterable[str | Path]) -> set[str]:
    """Compare every tensor of a checkpoint with its checksum, and the list of tensors with the files.

    Returns:
        The names of the tensors.

    Raises:
        ValueError: a file cannot be read, a tensor is missing or its bytes have changed, or there are no checksums.
    """
    expected: dict[str, int] | None = None
    found: set[str] = set()
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as opened:
                listed = json.loads((opened.metadata() or {}).get(CHECKSUMS, "null"))
                if not isinstance(listed, dict):
                    raise ValueError(f"{file.name} holds no checksums of its tensors; it is damaged or not complete.")
                if expected is not None and listed != expected:
                    raise ValueError(f"{file.name} belongs to another checkpoint than the files beside it.")
                expected = listed
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name not in listed or checksum(opened.get_tensor(name)) != listed[name]:
                        raise ValueError(f"The bytes of {name} in {file.name} have changed since it was saved.")
                    found.add(name)
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file.name} is no complete safetensors file: {error}.") from error
    missing = sorted(set(expected or ()) - found)
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}.")
    return found


def bits_on_disk(folder: str | Path) -> dict[str, float]:
    """Bits per weight of a saved model, from the bytes of its files.

    Returns:
        ``linear``: bits of all parts of the quantised layers over the number of their weights; ``whole_file``: bits of
        all safetensors files over the number of all weights, the unquantised ones included; ``linear_bytes``,
        ``file_bytes``, ``linear_weights`` and ``weights``.

    Raises:
        ValueError: the folder holds no model quantised by hf_ext.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = (config.get("quantization_config") or {}).get("plan")
    if not plan:
        raise ValueError(f"{folder} holds no model quantised by hf_ext.")
    sizes = _tensor_sizes(folder)
    linear_bytes = linear_weights = other_weights = 0
    for name, (shape, nbytes) in sizes.items():
        layer, _, part = name.rpartition(".")
        if layer in plan and part != "bias":
            linear_bytes += nbytes
            linear_weights += plan[layer][1] * plan[layer][2] if part == "qweight" else 0
        else:
            other_weights += torch.Size(shape).numel()
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = linear_weights + other_weights
    return {
        "linear": 8 * linear_bytes / linear_weights,
        "whole_file": 8 * file_bytes / weights,
        "linear_bytes": linear_bytes,
        "file_bytes": file_bytes,
        "linear_weights": linear_weights,
        "weights": weights,
    }


def _tensor_sizes(folder: Path) -> dict[str, tuple[list[int], int]]:
    """Shape and bytes of every tensor, from the headers alone."""
    sizes: dict[str, tuple[list[int], int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = (entry["shape"], end - begin)
    return sizes
