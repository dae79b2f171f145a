"""What the options of SPO and ADPO share."""

from dataclasses import dataclass, field

from trl import DPOConfig

from hf_ext.trainers.preference_checks import check_choice, check_number

# Those of TRL 1.16, which looks at the name in the first step only.
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@dataclass
class PreferenceConfig(DPOConfig):
    """DPOConfig that refuses what it cannot train with, and the way in which a batch is computed.

    Raises:
        ValueError: an option is out of range or unknown.
    """

    share_prompt: bool = field(
        default=True,
        metadata={
            "help": "Compute a prompt once for all its responses where the model allows it and it costs less. The "
            "same values up to the order of sums; plain DPO (round 1, a weight of 0) is computed as TRL does."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Refuse values that no run can have."""
        check_number("beta", self.beta, above=0.0)
        for name in self.loss_type:
            check_choice("loss_type", name, LOSS_TYPES)
