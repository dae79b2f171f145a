"""A layer that drops tokens by a score, over dense or packed storage; the method that scores is an `EvictConfig`.

Every row of a batch is treated by its own tokens and counts alone. Dropping happens after a forward, so a forward
always attends to all that was stored, and an interrupted or rejected one can be taken back.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_ext.caches.decoquant import DecoQuantConfig
from hf_ext.caches.layer import gather_slots
from hf_ext.caches.observed import ObservedLayer
from hf_ext.caches.packed_layer import PackedLayer

if TYPE_CHECKING:
    from hf_ext.caches.evicting import EvictConfig

SLACK = 8  # generated tokens by which a row may exceed its budget before some go at once
WAITING = 16  # generated tokens whose queries may wait, so that keys are read for their scores once


class Evicts(ObservedLayer):
    """What an evicting layer adds to its storage.

    Attributes:
        policy: the method.
        share: this layer's part of the average budget.
        real_seen: ``[B]`` real tokens that ever came.
        scores: ``[B, H or 1, n]`` of the stored tokens, where a method carries them on.
        waiting: ``[B, Hq, w, D]`` queries of the latest tokens that have given no scores yet.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (*ObservedLayer.row_tensors, "real_seen", "scores", "waiting")

    policy: "EvictConfig"
    share: float
    per_head: bool

    def set_up(self, policy: "EvictConfig", share: float) -> None:
        """Fill in what the storage's own constructor does not know."""
        self.policy, self.share = policy, share
        self.per_head = policy.per_head and not isinstance(self, PackedLayer)
        self.real_seen: Any = None
        self.scores: Any = None
        self.waiting: Any = None
        self.tokens: int | None = None  # the budget in tokens, where it was given in tokens or bytes
        self._new_scores: Tensor | None = None
        self._unread = False  # no reader has asked in this forward; where layers share keys, there are several
        self._asked = False  # the waiting queries gave their scores in this forward
        self._added: Any = None

    def expect(self, incoming: Tensor | None, decoder: Any, positions: Tensor) -> None:
        """Told before a forward of ``decoder`` how many of its tokens are real, and where they stand."""
        super().expect(incoming, decoder, positions)
        self._new_scores, self._asked, self._unread = None, False, True

    def hold(self) -> None:
        """Told after a forward whose tokens may be taken back: nothing goes, but scores are carried on."""
        if self.policy.accumulates and self._new_scores is not None:
            self.scores = self._new_scores
        self._let_go()

    def _let_go(self) -> None:
        """Forget the queries that have given their scores."""
        if self._asked:
            self.waiting, self._asked = None, False

    def count(self, key_states: Tensor) -> None:
        """Add the new tokens to those stored and to those seen."""
        before = 0 if self.real_count is None else self.real_count
        super().count(key_states)
        new = self.real_count - before
        self.real_seen = new if self.real_seen is None else self.real_seen + new
        self._added = new

    def observe(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, module: Any) -> None:
        """Score what is stored."""
        super().observe(query, keys, values, scaling, module)
        first_reader, self._unread = self._unread, False
        if not self._asks_for_scores(query) or (first_reader and self._wait(query)):
            return
        if keys.shape[-2] < self.stored and isinstance(self, PackedLayer):
            keys, values = self._dense(query.dtype)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        asking = [query]
        if self.waiting is not None and not self._asked:  # another reader may have let its query of this token wait
            asking = [torch.cat([self.waiting, query], 2)] if first_reader else [self.waiting, query]
            self._asked = True
        with torch.no_grad():
            for queries in asking:
                self._add_scores(self.policy.score(self, queries, keys, values, scaling), queries.shape[-2])

    def _wait(self, query: Tensor) -> bool:
        """Let the query of a generated token wait, if nothing has to go now; whether it does."""
        held = 0 if self.waiting is None else self.waiting.shape[-2]
        must = query.shape[-2] > 1 or self.scores is None or held + 1 >= WAITING or any(self.due())
        if must or not self.policy.accumulates:
            return False
        query = query.detach().clone()
        self.waiting = query if self.waiting is None else torch.cat([self.waiting, query], 2)
        return True

    def _add_scores(self, scores: Tensor | None, q_length: int) -> None:
        """Add what the newest ``q_length`` queries gave, or another reader of the same keys."""
        if scores is None:
            return
        if self._new_scores is not None:
            self._new_scores = self._new_scores + scores
        else:
            self._new_scores = scores if self.scores is None else self._carried_on(scores, q_length)

    def _carried_on(self, scores: Tensor, q_length: int) -> Tensor:
        """These scores and those that the stored tokens had before the newest ``q_length`` came."""
        old = self.scores[..., -(scores.shape[-1] - q_length) :]
        return scores + torch.nn.functional.pad(old, (scores.shape[-1] - q_length - old.shape[-1], q_length))

    def _asks_for_scores(self, query: Tensor) -> bool:
        """Whether this forward's scores will be used; packed keys would have to be rebuilt for them."""
        if self.policy.accumulates:
            return True
        prompt = query.shape[-2] >= self.stored or query.shape[-2] >= max(self.policy.recent_size, 2)
        return (prompt or not self.policy.prompts_only) and any(self.due())

    def due(self) -> list[bool]:
        """Which rows now store so much more than their budget that some of it goes."""
        slack = [SLACK if new == 1 else 0 for new in self._added.tolist()]
        limits = [budget + more for budget, more in zip(self.budget(), slack, strict=True)]
        return [count > limit for count, limit in zip(self.real_count.tolist(), limits, strict=True)]

    def budget(self) -> list[int]:
        """Tokens each row may keep now."""
        if self.tokens is not None:
            return [max(int(self.tokens * self.share), 1)] * len(self.real_seen)
        ratio = min(float(self.policy.budget) * self.share, 1.0)
        return [max(int(seen * ratio + 0.5), 1) for seen in self.real_seen.tolist()]

    def commit(self) -> None:
        """Drop what is due, then let the storage pack."""
        scores, self._new_scores = self._new_scores, None
        self._let_go()
        if scores is not None and self.real_count is not None and not self.record_past:
            self._evict(scores)
        super().commit()

    def first_slots(self, keys: Tensor) -> Tensor:
        """Slot of each row's first real token among ``keys``, ``[B]``."""
        return (keys.shape[-2] - self.real_count.to(keys.device)).clamp(min=0)

    @torch.no_grad()
    def _evict(self, scores: Tensor) -> None:
        counts, budgets, due = self.real_count.tolist(), self.budget(), self.due()
        if not any(due):
            self._carry(scores, None)
            return
        own = []
        for row, (count, budget) in enumerate(zip(counts, budgets, strict=True)):
            row_scores = scores[row, :, scores.shape[-1] - count :]
            everything = torch.arange(count, device=scores.device).expand(len(row_scores), -1)
            own.append(self._best(row_scores, budget) if due[row] else everything)
        self.unbroken = min(self.policy.protected(min(budgets))[1], min(counts))
        self.keep_own(own)
        self._carry(scores, own)

    def _best(self, scores: Tensor, budget: int) -> Tensor:
        """Ordinals ``[H or 1, budget]``, ascending, of what stays of one row with scores ``[H or 1, count]``."""
        sinks, recent = self.policy.protected(budget)
        scores = scores.clone()
        scores[:, :sinks] = float("inf")
        if recent:
            scores[:, -recent:] = float("inf")
        return scores.topk(budget, dim=-1).indices.sort(-1).values

    def _carry(self, scores: Tensor, own: list[Tensor] | None) -> None:
        """Keep the scores of what stayed, for methods that add them up."""
        if not self.policy.accumulates:
            return
        if own is not None:
            longest = max(ordinals.shape[-1] for ordinals in own)
            carried = scores.new_zeros(*scores.shape[:2], longest)
            for row, ordinals in enumerate(own):
                begin = scores.shape[-1] - self._before[row]
                carried[row, :, longest - ordinals.shape[-1] :] = scores[row].gather(-1, ordinals + begin)
            scores = carried
        self.scores = scores

    def keep_own(self, own: list[Tensor]) -> None:
        """Store in each row only the tokens with these ordinals, ``[H or 1, k]``."""
        self._before = self.real_count.tolist()
        if isinstance(self, PackedLayer):
            self._select([ordinals[0] for ordinals in own])
            self._uneven = bool((self.real_count != self.stored).any())
            return
        counts = [ordinals.shape[-1] for ordinals in own]
        longest, stored = max(counts), self.keys.shape[-2]
        slots = own[0].new_zeros(len(own), own[0].shape[0], longest)  # a dead slot is a copy of some token
        for row, ordinals in enumerate(own):
            slots[row, :, longest - counts[row] :] = ordinals + stored - self._before[row]
        self.keys, self.values = gather_slots(self.keys, slots), gather_slots(self.values, slots)
        self.real_count = torch.tensor(counts, device=self.real_count.device)
        self._uneven = min(counts) < longest

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens; their scores go with them."""
        super().drop_last(count)
        if count > 0:
            self.real_seen = (self.real_seen - count).clamp(min=0)
            if self._new_scores is not None:
                self._new_scores = self._new_scores[..., : max(self._new_scores.shape[-1] - count, 0)]
            if self.waiting is not None and not (self._unread or self._asked):  # else none of theirs waits
                left = self.waiting.shape[-2] - count
                self.waiting = self.waiting[:, :, :left] if left > 0 else None
            if self.scores is not None:  # those of a forward that was interrupted are not among them
                self.scores = self.scores[..., : self.stored]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.real_seen = self.scores = self.waiting = self._new_scores = None


class EvictingDenseLayer(Evicts):
    """Evicts from keys and values in the model's own precision."""

    def __init__(self, policy: "EvictConfig", share: float) -> None:
        self.set_up(policy, share)
        super().__init__()


class EvictingPackedLayer(Evicts, PackedLayer):
    """Evicts from DecoQuant rows, by moving codes."""

    drops_tokens: ClassVar[bool] = True
    row_tensors: ClassVar[tuple[str, ...]] = (*PackedLayer.row_tensors, "real_seen", "scores", "waiting")

    def __init__(self, policy: "EvictConfig", share: float, storage: DecoQuantConfig) -> None:
        self.set_up(policy, share)
        super().__init__(storage)
