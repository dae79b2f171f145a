r"""Puts ``benchmarks/.venv-peers`` on the path, where other projects' packages may lie; import it before transformers.

```bash
python -m venv --without-pip benchmarks/.venv-peers
pip install --no-deps --target benchmarks/.venv-peers/lib/python3.11/site-packages \\
    optimum-quanto==0.2.7 hqq==0.2.8.post1 termcolor einops
```
"""

import sys
from pathlib import Path

for site in (Path(__file__).resolve().parent / ".venv-peers").glob("lib/python3*/site-packages"):
    sys.path.append(str(site))
