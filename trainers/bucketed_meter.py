"""What a bucketed trainer logs: lengths, tokens a second, attention FLOPs and the loss of each length."""

import time
from typing import Any

import torch

from hf_ext.data.cost import attention_flops, matrix_parameters


class BucketMeter:
    """Sums over micro-batches since the last reading; losses stay on their device until they are read.

    Args:
        model: the model as it is before any wrapping; one without attention or embeddings that can be asked for is
            measured without FLOPs.
    """

    def __init__(self, model: Any) -> None:
        self._config = getattr(model, "config", None)
        try:
            self._matrix_parameters: int | None = matrix_parameters(model)
            attention_flops(self._config, 1, 1)
        except (AttributeError, NotImplementedError, TypeError):
            self._matrix_parameters = None
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._since = time.monotonic()
        self._losses: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}
        self._tokens = 0
        self._attention = 0.0

    def add(self, length: int, count: int, loss: torch.Tensor) -> None:
        """Note a micro-batch of ``count`` sequences of ``length`` tokens and its share of the step's loss."""
        self._losses[length] = self._losses[length] + loss if length in self._losses else loss.clone()
        self._counts[length] = self._counts.get(length, 0) + 1
        self._tokens += count * length
        if self._matrix_parameters is not None:
            self._attention += attention_flops(self._config, count * length, length)

    def flops(self, count: int, length: int) -> int | None:
        """Operations of a micro-batch, forward and backward; None where the model cannot be asked."""
        if self._matrix_parameters is None:
            return None
        tokens = count * length
        return int(6 * self._matrix_parameters * tokens + attention_flops(self._config, tokens, length))

    def read(self, accelerator: Any, micro_batches: int) -> dict[str, float]:
        """Logs of all processes since the last reading, which begins a new one; empty if nothing was added.

        Args:
            accelerator: adds the processes up; all of them must call this.
            micro_batches: gradient accumulation steps: the losses of a step's micro-batches add up to its own.
        """
        if not self._counts:
            return {}
        lengths = sorted(self._counts)
        steps = sum(self._counts.values()) / micro_batches
        losses = accelerator.reduce(torch.stack([self._losses[length] for length in lengths]), "mean").tolist()
        total = accelerator.num_processes
        logs = {
            "sequence_length": sum(n * length for length, n in self._counts.items()) / micro_batches / steps,
            "tokens_per_second": total * self._tokens / max(time.monotonic() - self._since, 1e-9),
        }
        if self._matrix_parameters is not None:
            logs["attention_flops"] = total * self._attention
        for length, loss in zip(lengths, losses, strict=True):
            logs[f"loss_{length}"] = loss / (self._counts[length] / micro_batches)
        self.start()
        return logs
