"""hf_ext: research on efficient and well-aligned LLMs as one-line changes for Hugging Face users.

Importing this package is light: it loads none of torch, transformers, trl, peft or triton. It only asks to be
told when those are imported, and then opens the ``hf_ext=`` flag on them. Public names are listed, once, in
``__init__.pyi`` and are loaded on first use.
"""

from pathlib import Path

import lazy_loader

__version__ = "0.1.0"

# In a source checkout patches/, trainers/ and kernels/ lie beside this folder; in an installed wheel they are
# inside it. Without this line a checkout's hf_ext/ in the working directory would hide the installed sub-packages.
if not (Path(__file__).parent / "patches").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

from hf_ext.patches.install import install  # noqa: E402  (the path must be complete first)

install()
