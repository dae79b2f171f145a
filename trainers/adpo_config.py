"""Options of ADPO (arXiv 2405.12900)."""

from dataclasses import dataclass, field

from hf_ext.data.preference import POSITIONS
from hf_ext.trainers.losses import TOXIC_LOSSES, TOXIC_REFERENCES
from hf_ext.trainers.preference_checks import check_choice, check_number
from hf_ext.trainers.preference_config import PreferenceConfig

MISSING = ("error", "mask")


@dataclass
class ADPOConfig(PreferenceConfig):
    """DPOConfig with the toxic term of ADPO.

    Raises:
        ValueError: an option is out of range, unknown, or does not go with another.
    """

    toxic_weight: float = field(default=0.25, metadata={"help": "Weight lambda of the toxic term; 0 leaves DPO."})
    toxic_beta: float | None = field(
        default=None, metadata={"help": "Temperature gamma of the toxic term; beta by default."}
    )
    toxic_loss: str = field(
        default="additive",
        metadata={
            "help": "'additive': -log sigmoid(-gamma d_t) beside DPO; 'pairwise': toxic as a second rejected "
            "response; 'joint': inside DPO's sigmoid.",
            "choices": list(TOXIC_LOSSES),
        },
    )
    toxic_reference: str = field(
        default="tox",
        metadata={
            "help": "'tox': the reference conditioned on the control token; 'ref': the reference itself.",
            "choices": list(TOXIC_REFERENCES),
        },
    )
    toxic_margin: float | None = field(
        default=None,
        metadata={"help": "Nats below its reference at which a toxic response is no longer pushed; None for never."},
    )
    toxic_weight_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which toxic_weight rises linearly from 0."}
    )
    toxic_column: str = field(default="toxic", metadata={"help": "Column of the toxic responses."})
    missing_toxic: str = field(
        default="error",
        metadata={
            "help": "A row without a toxic response: 'error' refuses it, 'mask' trains it as a DPO pair.",
            "choices": list(MISSING),
        },
    )
    control_token: str = field(default="[TOXIC]", metadata={"help": "Text that makes the reference answer toxically."})
    control_token_position: str = field(
        default="suffix", metadata={"help": "Where it stands in the prompt.", "choices": list(POSITIONS)}
    )

    def check(self) -> None:
        """Refuse values that no run can have."""
        super().check()
        check_number("toxic_weight", self.toxic_weight, at_least=0.0)
        check_choice("toxic_loss", self.toxic_loss, TOXIC_LOSSES)
        check_choice("toxic_reference", self.toxic_reference, TOXIC_REFERENCES)
        check_choice("missing_toxic", self.missing_toxic, MISSING)
        check_choice("control_token_position", self.control_token_position, POSITIONS)
        check_number("toxic_weight_warmup_ratio", self.toxic_weight_warmup_ratio, at_least=0.0)
        if self.toxic_weight_warmup_ratio > 1:
            raise ValueError(f"toxic_weight_warmup_ratio is {self.toxic_weight_warmup_ratio}; it must be at most 1.")
        for name in ("toxic_beta", "toxic_margin"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0.0)
        if self.toxic_reference == "tox" and not self.control_token.strip():
            raise ValueError("control_token is empty; toxic_reference='tox' conditions the reference on it.")
        if self.toxic_weight and self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"f_divergence_type is {self.f_divergence_type!r}; ADPO is derived for 'reverse_kl' only."
            )
        if self.toxic_weight and self.ld_alpha is not None:
            raise ValueError(f"ld_alpha is {self.ld_alpha}; it compares two lengths, and ADPO has three responses.")
        if self.toxic_weight and self.toxic_loss == "joint" and list(self.loss_type) != ["sigmoid"]:
            raise ValueError(f"toxic_loss='joint' lies inside the sigmoid loss; loss_type is {self.loss_type}.")
