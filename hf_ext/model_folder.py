"""Is a model folder whole? A quick look at any folder, and checksums for the ones hf_ext writes itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "hf_ext_manifest.json"
MANIFEST_FORMAT = 1
UNFINISHED_SUFFIXES = (".incomplete", ".part", ".crdownload")  # what interrupted downloads leave behind


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Record size, modification time (nanoseconds) and checksum of every file in ``folder``, and where it came from.

    Args:
        folder: a complete folder without a manifest.
        source: what the files were made from, for example its package, file name and checksum.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}
        files[path.relative_to(folder).as_posix()] = entry
    manifest = {"format": MANIFEST_FORMAT, "source": source, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``, or None where it is absent, unreadable or of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    current = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    return manifest if current and isinstance(manifest.get("files"), dict) else None


def manifest_problem(folder: Path, *, thorough: bool = False) -> str | None:
    """What is wrong with a folder that has a manifest, as a phrase, or None when it is as it was written.

    A file whose size and modification time are as recorded is trusted; one that was touched, or every file when
    ``thorough``, is compared by checksum (about half a second for 0.5 GB).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        stat = path.stat()
        if stat.st_size != expected["size"]:
            return f"{name} has {stat.st_size} bytes instead of {expected['size']}"
        touched = stat.st_mtime_ns != expected["mtime_ns"]
        if (thorough or touched) and sha256(path) != expected["sha256"]:
            return f"the checksum of {name} is wrong"
    return None


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Look at a user's folder before it is loaded: a config that is JSON, and weight files that are all there.

    With ``weights=False`` the config is enough. Only headers and sizes are read, so this costs milliseconds whatever
    the size of the model.

    Raises:
        OSError: the folder is no model folder, or is corrupt or only half downloaded.
    """
    problem = _folder_problem(folder) or (_weights_problem(folder) if weights else None)
    if problem is not None:
        raise OSError(f"{folder} is not a complete model folder: {problem}.")


def _folder_problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "it does not exist"
    half = [path.name for path in folder.iterdir() if path.suffix in UNFINISHED_SUFFIXES]
    if half:
        return f"{half[0]} is an unfinished download"
    configs = [name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if not configs:
        return "it has no config.json"
    for name in configs:
        if not _is_json_object(folder / name):
            return f"{name} is not readable JSON"
    return None


def _weights_problem(folder: Path) -> str | None:
    shards: set[str] = set()
    for index in folder.glob("*.index.json"):
        if not _is_json_object(index):
            return f"{index.name} is not readable JSON"
        shards.update(json.loads(index.read_text()).get("weight_map", {}).values())
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        return f"{missing[0]} is missing ({len(missing)} of {len(shards)} weight files are)"
    weights = [path for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in sorted(folder.glob(pattern))]
    if not weights:
        return "it has no weight file"
    return next(filter(None, map(_safetensors_problem, weights)), None)


def _safetensors_problem(path: Path) -> str | None:
    """A safetensors file says in its header how long it is, so a truncated one is seen without reading it."""
    if path.suffix != ".safetensors":
        return None if path.stat().st_size else f"{path.name} is empty"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError):
        return f"{path.name} is truncated or not a safetensors file"


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False
