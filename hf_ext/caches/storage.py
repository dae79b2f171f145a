"""Bytes, state and files of caches: reads the `RowState` of a cache and of its layers, the host's own included."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_ext.caches.row_state import RowState

METADATA = "hf_ext_cache"

Owners = Iterable[tuple[str, Any]]  # (prefix of its names, the cache or a layer)


def nbytes_by_name(owners: Owners) -> dict[str, int]:
    """Bytes by attribute name; a storage that several tensors share is counted once, with the first."""
    counted: set[int] = set()
    sizes: dict[str, int] = {}
    for _, owner in owners:
        for name, tensor in _read(owner)[0].items():
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in counted:
                counted.add(memory.data_ptr())
                sizes[name] = sizes.get(name, 0) + memory.nbytes()
    return sizes


def read(owners: Owners, made_for: dict[str, Any]) -> dict[str, Any]:
    """The state of a cache and its layers, with the options and the shape of model it was made for."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"made_for": made_for, "owners": {}}
    for prefix, owner in owners:
        own_tensors, own_values = _read(owner)
        tensors.update({prefix + name: tensor for name, tensor in own_tensors.items()})
        values["owners"][prefix] = own_values
    return {"tensors": tensors, "values": values}


def write(owners: Owners, made_for: dict[str, Any], state: dict[str, Any], device: Any = None) -> None:
    """Give a cache and its layers the state that `read` took from another one, on ``device``.

    Raises:
        ValueError: the state is not that of a cache with these options for a model of this shape.
    """
    if "made_for" not in state.get("values", {}) or "tensors" not in state:
        raise ValueError(f"this is no state_dict of a cache; it has {', '.join(map(repr, state)) or 'nothing'}.")
    values, tensors = state["values"], state["tensors"]
    for what, ours in made_for.items():
        theirs = values["made_for"].get(what)
        if theirs != ours:
            raise ValueError(f"the saved cache is for the {what} {theirs}, this one for {ours}.")
    for prefix, owner in owners:
        names = [name for name in tensors if name.startswith(prefix) and "." not in name[len(prefix) :]]
        own_tensors = {name[len(prefix) :]: tensors[name].to(device) for name in names}
        _write(owner, own_tensors, values["owners"][prefix])


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state to one safetensors file; an interrupted write leaves an older file as it was."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state["tensors"].items()}
    try:
        save_file(tensors, str(new), metadata={METADATA: json.dumps(state["values"])})
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a state that `save` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged or no saved cache.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no saved cache at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
    if METADATA not in metadata:
        raise ValueError(f"{path} holds tensors but no saved cache.")
    return {"tensors": tensors, "values": json.loads(metadata[METADATA])}


def _read(owner: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(owner, RowState):
        return owner.read_state()
    tensors = {} if owner.keys is None else {"keys": owner.keys, "values": owner.values}
    counters = {"cumulative_length": owner.cumulative_length} if hasattr(owner, "cumulative_length") else {}
    return tensors, counters


def _write(owner: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    if isinstance(owner, RowState):
        owner.write_state(tensors, values)
        return
    owner.reset()
    if "keys" in tensors:
        owner.lazy_initialization(tensors["keys"], tensors["values"])
        owner.keys, owner.values = tensors["keys"], tensors["values"]
    for name, value in values.items():
        setattr(owner, name, value)
