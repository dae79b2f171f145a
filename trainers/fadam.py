"""`FAdamTrainerMixin`: FAdam in any trainer, also in those that have no argument for an optimizer class."""

from typing import Any

from torch import nn

from hf_ext.optim.arguments import fadam_optimizer


class FAdamTrainerMixin:
    """Put before a trainer class to train with FAdam, and to keep weight decay off embeddings.

    Embeddings are left out because a row that is seen rarely has a small Fisher information and takes the decay of
    the whole table. Weights tied to an embedding (an output head) are left out with it.

    Example:
        ```python
        class FAdamDPOTrainer(FAdamTrainerMixin, DPOTrainer):
            pass
        ```
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """FAdam with the settings of ``args``.

        Raises:
            ValueError: ``args.optim`` names another optimizer than the host's default or ``"fadam"``.
        """
        optim = getattr(args.optim, "value", args.optim)
        if optim not in ("fadam", "adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"optim={optim!r} contradicts FAdamTrainerMixin; leave it out or use 'fadam'.")
        return fadam_optimizer(args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The host's choice without the weights of embeddings."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        tables_names = {name for name, param in model.named_parameters() if id(param) in tables}
        return [name for name in names if name not in tables_names]
