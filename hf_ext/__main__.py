"""``python -m hf_ext`` is ``hf-ext``."""

import sys

from hf_ext.cli import main

sys.exit(main())
