"""`CLADistillArguments`: how a converted model is healed by its dense teacher."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

TRAINABLE = ("changed", "attention", "all")


@dataclass
class CLADistillArguments(TrainingArguments):
    """`TrainingArguments` and what the distillation adds."""

    temperature: float = field(default=2.0, metadata={"help": "T of the softened distributions, above 0."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of T² · KL(teacher ‖ student)."})
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared error of a late hidden state over its variance."}
    )
    hidden_layer: int = field(default=-2, metadata={"help": "Which of the hidden states that is; -1 is the last."})
    label_weight: float = field(default=0.0, metadata={"help": "Weight of the ordinary next-token loss."})
    trainable: str = field(
        default="changed",
        metadata={
            "help": "changed: attention and norms of the layers that share; attention: those of every layer; all."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}.")
        weights: dict[str, Any] = {
            name: getattr(self, name) for name in ("kl_weight", "hidden_weight", "label_weight")
        }
        if any(not weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"The loss weights must not be negative, and one of them above 0; got {weights}.")
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable must be one of {', '.join(TRAINABLE)}, got {self.trainable!r}.")
