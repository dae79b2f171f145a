"""Makes ``TrainingArguments(optim="fadam")`` known to transformers, which keeps its optimizers in an enum.

Python's enums cannot be extended, but their three look-up tables can: the new member is entered in all of them and
taken out again on removal. A saved ``training_args.bin`` names the member, so a process without hf_ext refuses it.
"""

from types import ModuleType
from typing import Any

from hf_ext.patches.patch import Patch

NAME, VALUE = "FADAM", "fadam"


def add_name(host: ModuleType, patch: Patch) -> None:
    """Add the member ``OptimizerNames.FADAM``.

    Raises:
        RuntimeError: the enum of this version is not a string enum with the tables this patch knows.
    """
    names = host.OptimizerNames
    if VALUE in names._value2member_map_ or not issubclass(names, str):
        raise RuntimeError(
            f"{patch.name}: OptimizerNames of this transformers is not the enum this patch was written for."
        )
    member = str.__new__(names, VALUE)
    member._name_, member._value_, member._sort_order_ = NAME, VALUE, len(names._member_names_)
    patch.add(names, NAME, member)
    patch.set_item(names._member_map_, NAME, member)
    patch.set_item(names._value2member_map_, VALUE, member)
    names._member_names_.append(NAME)
    patch.on_remove(names._member_names_.remove, NAME)


def add_handler(host: ModuleType, patch: Patch) -> None:
    """Tell the trainer which class the name stands for."""
    patch.set_item(host._OPTIMIZER_HANDLERS, host.OptimizerNames(VALUE), _fadam)


def _fadam(context: Any) -> tuple[Any, dict[str, Any]]:
    from hf_ext.optim.arguments import fadam_optimizer

    return fadam_optimizer(context.args)
