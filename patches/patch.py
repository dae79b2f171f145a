"""A `Patch`: replaced attributes and hooks that know how to put themselves back."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn


class Patch:
    """Changes to objects of other libraries, undone in reverse order by `remove` or at the end of a ``with``.

    Example:
        ```python
        patch = Patch("half the scale")
        with patch:
            patch.set(attention, "scaling", attention.scaling / 2)
            model(**inputs)                     # inside: the changed scale
        model(**inputs)                         # outside: as before, also when the block raised
        ```

    Removing twice is harmless. Patches of the same attribute come off in the reverse order of setting; out of order,
    `remove` raises and leaves everything as it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._undo = ExitStack()
        self._values: dict[tuple[int, str], tuple[Any, Any]] = {}  # (owner id, attribute) -> owner, value set last

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set ``owner.attribute`` to ``value`` until this patch is removed.

        Raises:
            AttributeError: ``owner`` has no such attribute, so the host is not the one this patch was written for.
            TypeError: ``owner`` is a module and ``attribute`` one of its parameters, buffers or submodules.
        """
        if not hasattr(owner, attribute):
            raise AttributeError(
                f"{self.name}: {_describe(owner)} has no attribute {attribute!r}; this version of its library is not "
                f"supported."
            )
        self._set(owner, attribute, value)

    def add(self, owner: Any, attribute: str, value: Any) -> None:
        """Add a new ``owner.attribute`` until this patch is removed.

        Raises:
            AttributeError: ``owner`` already has that attribute, which this patch would hide.
        """
        if hasattr(owner, attribute):
            raise AttributeError(f"{self.name}: {_describe(owner)} already has an attribute {attribute!r}.")
        self._set(owner, attribute, value)

    def set_item(self, mapping: Any, key: Any, value: Any) -> None:
        """Set ``mapping[key]`` to ``value`` until this patch is removed."""
        undo = partial(mapping.__setitem__, key, mapping[key]) if key in mapping else partial(mapping.pop, key, None)
        self._undo.callback(undo)
        mapping[key] = value

    def hook(self, register: Callable[..., Any], function: Callable[..., Any], **options: Any) -> None:
        """Register a torch hook, for example ``hook(module.register_forward_hook, f, with_kwargs=True)``."""
        self._undo.callback(register(function, **options).remove)

    def on_remove(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` when this patch is removed."""
        self._undo.callback(function, *args)

    def remove(self) -> None:
        """Put everything back, last change first.

        Raises:
            RuntimeError: something else has changed one of the attributes since; nothing is put back then.
        """
        for (_, attribute), (owner, value) in self._values.items():
            if vars(owner).get(attribute) is not value:
                raise RuntimeError(
                    f"{self.name}: {attribute!r} of {_describe(owner)} was changed again after this patch; remove the "
                    f"later change first."
                )
        self._values.clear()
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.remove()

    def _set(self, owner: Any, attribute: str, value: Any) -> None:
        if isinstance(owner, nn.Module) and attribute in {*owner._parameters, *owner._buffers, *owner._modules}:
            raise TypeError(
                f"{self.name}: {attribute!r} is a parameter, buffer or submodule of {_describe(owner)}; a patch "
                f"replaces plain attributes only."
            )
        own = vars(owner)
        undo = partial(setattr, owner, attribute, own[attribute]) if attribute in own else None
        setattr(owner, attribute, value)
        self._undo.callback(undo or partial(delattr, owner, attribute))
        self._values[id(owner), attribute] = owner, value


def _describe(owner: Any) -> str:
    return getattr(owner, "__name__", None) or type(owner).__name__
