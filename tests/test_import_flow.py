"""Imports point one way: cli -> trainers, patches -> flags -> sub-packages of hf_ext -> leaves -> kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"kernels": 0, "leaf": 1, "package": 2, "flags": 3, "patches": 4, "trainers": 4, "cli": 5}
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", "hf_ext"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder in ("hf_ext", "patches", "trainers", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if folder != "hf_ext":
                parts.insert(0, "hf_ext")
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def layer(module: str) -> str:
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else ""
    if second in ("kernels", "patches", "trainers", "cli", "flags"):
        return second
    is_package = (ROOT / "hf_ext" / second).is_dir()
    return "package" if is_package else "leaf"


MODULES = [(name, path) for name, path in modules() if name not in ("hf_ext", "hf_ext.__main__")]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_down(name, path):
    for imported in imports(path):
        if not imported.startswith("hf_ext"):
            continue
        own, other = layer(name), layer(imported)
        if own == other:
            same_package = own != "package" or name.split(".")[1] == imported.split(".")[1]
            assert same_package, f"{name} imports its sibling {imported}"
        else:
            assert LAYERS[other] < LAYERS[own], f"{name} ({own}) imports {imported} ({other})"


def test_kernels_know_tensors_only():
    import sys

    for name, path in MODULES:
        if layer(name) == "kernels":
            for imported in imports(path):
                top = imported.split(".")[0]
                assert top in KERNELS_MAY_IMPORT or top in sys.stdlib_module_names, f"{name} imports {imported}"
                assert top != "hf_ext" or imported.startswith("hf_ext.kernels"), f"{name} imports {imported}"


def test_there_is_something_to_walk():
    assert {layer(name) for name, _ in MODULES} == set(LAYERS)


def test_listed_packages_are_the_folders_with_code():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules()}
    assert listed == found
