r"""Puts ``benchmarks/.venv-peers`` on the path, where other projects' packages may lie; import it before transformers.

They come without their dependencies, which ask for other versions of what is installed here and are not needed:

```bash
python -m venv --without-pip benchmarks/.venv-peers
pip install --no-deps --target benchmarks/.venv-peers/lib/python3.11/site-packages \\
    --requirement benchmarks/requirements-peers.txt
```

Quanto compiles its unpacking of weights at first use, which takes a C++ compiler, ninja and a minute.
"""

import sys
from pathlib import Path

for site in (Path(__file__).resolve().parent / ".venv-peers").glob("lib/python3*/site-packages"):
    sys.path.append(str(site))
