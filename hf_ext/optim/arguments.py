"""`fadam_optimizer`: FAdam with the settings of a host's `TrainingArguments`."""

import inspect
from typing import Any

from hf_ext.optim.fadam import FAdam

OF_THE_HOST = {"weight_decay": "weight_decay", "betas": "adam_beta1 and adam_beta2"}  # the first would be overwritten


def fadam_optimizer(args: Any, **overrides: Any) -> tuple[type[FAdam], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes: the class and its keyword arguments.

    Reads ``learning_rate``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` and ``optim_args`` (for example
    ``"clip=1,eps_mode=rms_min,optim_bits=8"``). The host sets ``weight_decay`` itself, per group, from its own
    argument of that name (0 by default), so FAdam's default does not apply there.

    Args:
        args: the `transformers.TrainingArguments` of the run.
        **overrides: options of `FAdam` that win over all of these.

    Raises:
        ValueError: ``optim_args`` or ``overrides`` name an option that FAdam does not have, or ``optim_args`` one that
            the host has an argument for.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **_parse(args.optim_args or ""),
    }
    for name in overrides:
        _check_name(name)
    return FAdam, {**options, **overrides}


def _parse(text: str) -> dict[str, Any]:
    options = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"optim_args must read 'option=value,option=value', got {item!r}.")
        _check_name(name)
        if name in OF_THE_HOST:
            raise ValueError(
                f"optim_args must not set {name}: the host's own {OF_THE_HOST[name]} does, for every group."
            )
        options[name] = _value(value)
    return options


def _check_name(name: str) -> None:
    allowed = [option for option in inspect.signature(FAdam).parameters if option != "params"]
    if name not in allowed:
        raise ValueError(f"FAdam has no option {name!r}; allowed: {', '.join(allowed)}.")


def _value(text: str) -> Any:
    """A number, True, False, None or, failing that, the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
