"""Compiles ``fadam_step_cpu.cpp`` for this machine, once, with torch's own extension builder.

The library is kept in ``$TORCH_EXTENSIONS_DIR/hf_ext`` (or ``~/.cache/torch_extensions/hf_ext``) under a name made of
the source, the flags and the CPU's instruction sets, so that a home folder shared by unlike machines is safe. Every
process that finds none builds in a folder of its own and moves the result into place in one operation: processes that
race waste seconds and never wait for one another or see half a file.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fadam_step_cpu.cpp")
# Without the two -fno flags the compiler may not vectorise square roots; none of them changes a result.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


@dataclass
class Library:
    """The loaded library, or why there is none.

    Attributes:
        handle: the library, None if it cannot be had.
        why_not: the reason in words, empty if it can.
        forked: whether this process was forked after loading, when OpenMP's threads of the parent are gone.
    """

    handle: ctypes.CDLL | None = None
    why_not: str = ""
    forked: bool = False

    def threads(self) -> int:
        """Threads that a call may use: torch's number, and 1 in a forked process."""
        return 1 if self.forked else torch.get_num_threads()


@functools.cache
def load_library() -> Library:
    """The library, built if this machine has not built it yet; tried once per process."""
    try:
        library = Library(ctypes.CDLL(str(_built())))
    except Exception as error:  # whatever a missing or odd tool chain raises, the loop does the same work
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning(
            "The fused FAdam step could not be compiled (%s); the loop is used, which takes about three times as "
            "long. A C++ compiler with OpenMP, ninja and setuptools are needed.",
            reason,
        )
        return Library(why_not=f"its kernel could not be compiled ({reason})")
    os.register_at_fork(after_in_child=functools.partial(setattr, library, "forked", True))
    return library


def _built() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / "hf_ext"
    path = folder / f"fadam_step-{_fingerprint()}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        try:
            os.replace(_build(workplace), path)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    return path


def _build(workplace: Path) -> Path:
    from torch.utils import cpp_extension

    logger.info("Compiling the fused FAdam step for this CPU, once per machine.")
    name = "fadam_step"
    cpp_extension.load(
        name,
        [str(SOURCE)],
        extra_cflags=list(FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(workplace),
        is_python_module=False,
    )
    return workplace / f"{name}{cpp_extension.LIB_EXT}"


def _fingerprint() -> str:
    """What the compiled code depends on, as 16 hexadecimal digits."""
    cpu = f"{platform.machine()} {platform.processor()}"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    text = SOURCE.read_bytes() + " ".join((*FLAGS, cpu, torch.__version__)).encode()
    return hashlib.sha256(text).hexdigest()[:16]
