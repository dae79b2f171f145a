"""``hf-ext model``: where the default model is; found, converted and verified where that has not happened yet."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_ext.cli.common import console, human_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--path", action="store_true", help="print the folder and nothing else, for use in scripts")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")


def run(arguments: argparse.Namespace) -> int:
    """Find, convert, compare every checksum, and say where the model is."""
    from hf_ext.default_model import default_model_path

    folder = default_model_path(online=not arguments.offline, thorough=True)
    if arguments.path:
        print(folder)
    elif arguments.json:
        print(json.dumps(describe(folder), indent=2))
    else:
        _show(describe(folder))
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """Folder, origin, and size and checksum of each file; files of the hub have no recorded checksum."""
    from hf_ext.model_folder import read_manifest

    manifest = read_manifest(folder) or {}
    recorded = manifest.get("files", {})
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    files = {name: {"bytes": size, "sha256": recorded.get(name, {}).get("sha256")} for name, size in sizes.items()}
    return {"folder": str(folder), "source": manifest.get("source"), "files": files}


def _show(described: dict[str, Any]) -> None:
    from rich.table import Table

    source = described["source"]
    out = console()
    out.print("[bold]SmolLM2-135M-Instruct[/bold], the model used when none is named", soft_wrap=True)
    out.print(f"folder  {described['folder']}", soft_wrap=True)
    out.print(f"source  {source['package']}: {source['file']}" if source else "source  the hub", soft_wrap=True)
    table = Table("file", "size", "sha256", box=None)
    for name, file in described["files"].items():
        table.add_row(name, human_bytes(file["bytes"]), (file["sha256"] or "")[:16])
    out.print(table)
    out.print("Every recorded checksum is right." if source else "The folder is complete.")
