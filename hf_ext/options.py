"""`Options`: the base of every configuration dataclass of hf_ext."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Self


@dataclass(frozen=True)
class Options:
    """A frozen dataclass of JSON values that reads itself from a dict and says in a sentence what is wrong with it.

    Subclasses are frozen dataclasses with defaults for every field; they check values in ``__post_init__`` and raise
    `ValueError` with the field, the value got and what is allowed.
    """

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build from a plain mapping.

        Raises:
            ValueError: a key is not an option of this class.
        """
        allowed = [field.name for field in fields(cls)]
        for name in options:
            if name not in allowed:
                raise ValueError(f"{cls.__name__} has no option {name!r}; allowed: {', '.join(allowed) or 'none'}.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain JSON values, so that a saved config keeps its meaning if a default changes."""
        return asdict(self)


def positive_integer(name: str, value: Any) -> int:
    """``value`` as an int.

    Raises:
        ValueError: it is no integer of at least 1; ``name`` says what it was for.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else 0
    if number < 1 or number % 1:  # of infinity and NaN this is NaN, which counts as true
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return int(number)
