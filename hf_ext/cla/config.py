"""`CLAConfig`: which layers share keys and values (Cross-Layer Attention, arXiv 2405.12981)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hf_ext.options import Options

Pattern = Literal["uniform", "keep_ends", "dense_front", "dense_back", "tail"]
Remainder = Literal["front", "back"]
DEFAULT_FACTOR = 2


@dataclass(frozen=True)
class CLAConfig(Options):
    """Cross-Layer Attention: a layer either produces keys and values or reads those of one earlier layer.

    The layers are given either by ``sharing_factor`` and ``pattern``, or one by one in ``kv_source_layers``. In models
    that mix attention types a pattern is laid over the layers of each type separately, because a sliding-window layer
    and a full one cannot read each other's keys.

    Attributes:
        sharing_factor: how many layers use one layer's keys and values; 2 is the paper's recommendation and the
            default, 1 shares nothing.
        pattern: ``uniform`` groups adjacent layers (the paper's choice for training from scratch). The others are the
            paper's ablations: ``keep_ends`` leaves the first and the last layer alone (better for conversion),
            ``dense_front`` and ``dense_back`` put all sharing into one run, ``tail`` lets every layer behind the first
            ones read the last of them.
        remainder: which end gets the short group when the factor does not divide the number of layers; ``front`` is
            the paper's figure 2.
        kv_source_layers: for every layer the layer whose keys and values it uses, itself for a producer. Replaces
            ``sharing_factor`` and ``pattern``.
        separate_kv_norm: give the key and value projections a normalisation weight of their own, as the paper trains.
            Off, they read the same normalised input as the queries, as in the stock model.
    """

    sharing_factor: int | None = None
    pattern: Pattern = "uniform"
    remainder: Remainder = "front"
    kv_source_layers: tuple[int, ...] | None = None
    separate_kv_norm: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        if self.kv_source_layers is None:
            factor = DEFAULT_FACTOR if self.sharing_factor is None else self.sharing_factor
            if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
                raise ValueError(f"sharing_factor must be a whole number of at least 1, got {factor!r}.")
            object.__setattr__(self, "sharing_factor", factor)
            return
        if self.sharing_factor is not None or self.pattern != "uniform":
            raise ValueError("Give either sharing_factor and pattern or kv_source_layers, not both.")
        object.__setattr__(self, "kv_source_layers", check_map(self.kv_source_layers))

    def _check_choices(self) -> None:
        for name, choices in (("pattern", get_args(Pattern)), ("remainder", get_args(Remainder))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if not isinstance(self.separate_kv_norm, bool):
            raise ValueError(f"separate_kv_norm must be True or False, got {self.separate_kv_norm!r}.")


def check_map(sources: Sequence[int]) -> tuple[int, ...]:
    """``kv_source_layers`` as a tuple, after checking what can be checked without a model.

    Raises:
        ValueError: it is no list of layer numbers, or a layer reads a later layer or one that produces nothing.
    """
    is_list = isinstance(sources, list | tuple)
    if not is_list or not sources or any(isinstance(s, bool) or not isinstance(s, int) for s in sources):
        raise ValueError(f"kv_source_layers must be a list of layer numbers, one for every layer, got {sources!r}.")
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer:
            raise ValueError(
                f"kv_source_layers[{layer}] must be a layer from 0 to {layer}, got {source}; a layer reads the keys "
                f"and values of an earlier layer, or makes its own."
            )
        if sources[source] != source:
            raise ValueError(
                f"kv_source_layers[{layer}] is {source}, but layer {source} reads those of layer {sources[source]} "
                f"and has none of its own; name layer {sources[source]} instead."
            )
    return tuple(sources)
