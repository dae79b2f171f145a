"""How many batches of every bucket an epoch takes: the mixtures of the paper (arXiv 2405.13226, Table 1)."""

from collections.abc import Mapping

import numpy as np

from hf_ext.data.pieces import Integers

MIXTURES = ("natural", "equal")
Mixture = str | Mapping[int, float]


def mixture_batches(mixture: Mixture, lengths: list[int], sequences: Integers, tokens_per_batch: int) -> Integers:
    """Full batches of each bucket ``[N]`` in one epoch; 0 for a bucket the mixture leaves out.

    No sequence is used twice in an epoch, so a mixture is scaled to the largest for which every bucket suffices.
    Each epoch draws its sequences anew, so a bucket that is only used in part is seen whole over the epochs.

    Args:
        mixture: ``"natural"`` (every full batch there is), ``"equal"`` (the same number of tokens of every bucket
            that has a full batch), or a mapping from length to its weight in tokens; lengths not named are left out.
        lengths: tokens of a sequence of each bucket, ascending.
        sequences: sequences in each bucket ``[N]``.
        tokens_per_batch: tokens of one batch.

    Raises:
        ValueError: no such mixture, a length that does not exist or has no full batch, a batch that does not hold
            whole sequences of every bucket in use, or no batch at all.
    """
    weights = _weights(mixture, lengths)
    for length, weight in weights.items():
        if not (np.isfinite(weight) and weight > 0):
            raise ValueError(f"The weight of length {length} must be positive, got {weight!r}; or leave it out.")
        if tokens_per_batch % length:
            raise ValueError(
                f"tokens_per_batch must be a multiple of every length in use, got {tokens_per_batch} for sequences of "
                f"{length} tokens."
            )
    full = np.array([int(n) * length // tokens_per_batch for length, n in zip(lengths, sequences, strict=True)])
    shares = np.array([weights.get(length, 0.0) for length in lengths])
    if isinstance(mixture, Mapping) and (short := [lengths[i] for i in np.flatnonzero((shares > 0) & (full == 0))]):
        raise ValueError(
            f"The mixture names the lengths {short}, which do not fill one batch: {tokens_per_batch} tokens."
        )
    if not full.any():
        raise ValueError(f"No bucket fills one batch of {tokens_per_batch} tokens: take fewer a batch or more data.")
    if mixture == "natural":
        return full.astype(np.int64)
    usable = (shares > 0) & (full > 0)
    scale = (full[usable] / shares[usable]).min()
    batches = np.where(usable, np.floor(shares * scale + 1e-9), 0)  # the scarcest bucket loses none to rounding
    return np.minimum(batches, full).astype(np.int64)


def _weights(mixture: Mixture, lengths: list[int]) -> dict[int, float]:
    if isinstance(mixture, Mapping):
        if not mixture:
            raise ValueError("The mixture must name at least one length, got an empty mapping.")
        if absent := [int(length) for length in mixture if int(length) not in lengths]:
            raise ValueError(f"The mixture names the lengths {absent}, which no sequence has; there are {lengths}.")
        return {int(length): float(weight) for length, weight in mixture.items()}
    if mixture not in MIXTURES:
        allowed = ", ".join(MIXTURES)
        raise ValueError(f"{mixture!r} is no mixture; allowed: {allowed} or a mapping from length to weight.")
    return dict.fromkeys(lengths, 1.0)
