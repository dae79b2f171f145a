"""Compiles a small C or C++ source file of this folder once per machine, and loads it through ctypes.

No header of torch is needed, so a file compiles in seconds with any compiler. Libraries are kept in
``$TORCH_EXTENSIONS_DIR/hf_ext`` (or ``~/.cache/torch_extensions/hf_ext``) under a name made of the source, the
headers, the flags and the CPU's instruction sets. Processes that race compile twice and never see half a file.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()  # other CPUs lack the flag
FLAGS = ("-O3", "-march=native", *WIDE, "-fno-math-errno", "-fno-trapping-math")
LANGUAGES = {  # suffix -> the variable that names a compiler, compilers to look for, the standard
    ".c": ("CC", ("cc", "gcc", "clang"), "-std=gnu11"),
    ".cpp": ("CXX", ("c++", "g++", "clang++"), "-std=gnu++17"),
}
SHARED = ("-shared", "-fPIC", "-fopenmp", "-lm")


@functools.cache
def load_native(stem: str) -> ctypes.CDLL | None:
    """The compiled ``kernels/<stem>.c`` or ``.cpp``, or None, with a warning, where it cannot be compiled.

    Setting ``HF_EXT_NATIVE=0`` turns compiled kernels off.
    """
    if os.environ.get("HF_EXT_NATIVE") == "0":
        return None
    source = next(path for suffix in LANGUAGES if (path := Path(__file__).with_name(stem + suffix)).is_file())
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("kernels/%s could not be compiled (%s); the slower PyTorch path is used.", source.name, error)
        return None


def _built(source: Path) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / "hf_ext"
    path = folder / f"{source.stem}-{_fingerprint(source)}.so"
    if not path.is_file():
        variable, names, standard = LANGUAGES[source.suffix]
        compiler = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
        if compiler is None:
            raise OSError(f"there is none of {', '.join(names)} on this machine")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as workplace:
            built = Path(workplace) / path.name
            command = [compiler, standard, *FLAGS, str(source), "-o", str(built), *SHARED]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise OSError((done.stderr.strip().splitlines() or ["the compiler failed"])[0])
            os.replace(built, path)
    return path


def _fingerprint(source: Path) -> str:
    """What the compiled code depends on, as 16 hexadecimal digits."""
    cpu = f"{platform.machine()} {platform.processor()}"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    parts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    return hashlib.sha256(b"".join(parts) + " ".join((*FLAGS, *SHARED, cpu)).encode()).hexdigest()[:16]
