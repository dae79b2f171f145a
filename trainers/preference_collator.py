"""Collators of preference data: TRL's pairs with columns that travel along, and triples of ADPO in one batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

PREVIOUS_MARGIN = "previous_margin"
OLDEST_MARGIN = "oldest_margin"
TOXIC_REFERENCE = "ref_toxic_logps"
PASSED_COLUMNS = (PREVIOUS_MARGIN, OLDEST_MARGIN, TOXIC_REFERENCE)
TOKENS = ("input_ids", "attention_mask", "completion_mask")


class PairCollator(DataCollatorForPreference):
    """TRL's batch of 2B rows (chosen first), and as tensors ``[B]`` those of `PASSED_COLUMNS` that the rows have."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a list of prepared rows."""
        batch = super().torch_call(examples)
        for column in PASSED_COLUMNS:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return batch


class TripleCollator(PairCollator):
    """2B rows (chosen, rejected) and one more for each example that has a toxic response, at one common width.

    Adds ``toxic_examples`` ``[N]``, the example each toxic row belongs to, and ``control_input_ids``,
    ``control_attention_mask``, ``control_completion_mask`` ``[N, T']``: the same responses after the prompt with the
    control token. A batch without toxic responses is TRL's.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a list of prepared rows."""
        batch = super().torch_call(examples)
        index = [i for i, example in enumerate(examples) if example.get("toxic_ids")]
        if not index:
            batch.pop(TOXIC_REFERENCE, None)
            return batch
        toxic = self._rows([(examples[i]["prompt_ids"], examples[i]["toxic_ids"]) for i in index])
        width = max(batch["input_ids"].size(1), toxic["input_ids"].size(1))
        for name in TOKENS:
            value = self.pad_token_id if name == "input_ids" else 0
            batch[name] = torch.cat([widen(batch[name], width, value), widen(toxic[name], width, value)])
        batch["toxic_examples"] = torch.tensor(index)
        if TOXIC_REFERENCE in batch:
            batch[TOXIC_REFERENCE] = batch[TOXIC_REFERENCE][index]
        elif "control_prompt_ids" in examples[0]:
            control = [(examples[i]["control_prompt_ids"], examples[i]["control_toxic_ids"]) for i in index]
            batch.update({f"control_{name}": value for name, value in self._rows(control).items()})
        return batch

    def _rows(self, sequences: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """(prompt, completion) token ids as right-padded ``[N, T]`` tensors, cut at ``max_length``."""
        cut = slice(self.max_length)
        ids = [torch.tensor((prompt + completion)[cut]) for prompt, completion in sequences]
        masks = [torch.tensor(([0] * len(p) + [1] * len(c))[cut]) for p, c in sequences]
        ones = [torch.ones_like(row) for row in ids]
        values = (self.pad_token_id, 0, 0)
        return {
            name: pad(rows, value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            for name, rows, value in zip(TOKENS, (ids, ones, masks), values, strict=True)
        }


def pair_examples(batch: dict[str, Any]) -> Tensor:
    """The example of each of TRL's 2B rows, chosen first."""
    ids = batch["input_ids"]
    return torch.arange(len(ids) // 2, device=ids.device).repeat(2)


def widen(rows: Tensor, width: int, value: int) -> Tensor:
    """Pad ``[N, T]`` on the right to ``[N, width]``."""
    return F.pad(rows, (0, width - rows.size(1)), value=value)
