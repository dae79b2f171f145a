"""`CLAConfig`: which layers share keys and values."""

from dataclasses import dataclass

from hf_ext.options import Options


@dataclass(frozen=True)
class CLAConfig(Options):
    """Cross-Layer Attention."""

    sharing_factor: int = 2
