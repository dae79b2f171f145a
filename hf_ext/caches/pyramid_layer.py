"""One layer of PyramidInfer: it votes on the prompt's tokens, and thins out generated ones."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.caches.budgets import generation_keep
from hf_ext.caches.evicting_layer import Evicts
from hf_ext.caches.observed import ObservedLayer
from hf_ext.caches.packed_layer import PackedLayer
from hf_ext.kernels.window_scores import smooth, window_scores


class PyramidLayer(ObservedLayer):
    """What PyramidInfer adds to a layer's storage.

    Attributes:
        settings: a `PyramidInferConfig`.
        index, depth: which of how many layers this is.
        settled: ``[B]`` stored tokens, from the first, that will not be compressed any more.
        queries: ``[B, Hq, R, D]`` latest queries, which vote on generated tokens.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (*ObservedLayer.row_tensors, "settled", "queries")

    per_head = False
    keep_own = Evicts.keep_own

    def set_up(self, settings: Any, index: int, depth: int) -> None:
        """Fill in what the storage's own constructor does not know."""
        self.settings, self.index, self.depth = settings, index, depth
        self.settled: Any = None
        self.queries: Any = None
        self._coming = 0
        self._longest_layer: list[int] | None = None
        self._votes: list[Tensor | None] | None = None
        self._prompt: list[int] | None = None
        self._added: Any = None
        self._gathered = False

    # --- one forward ---------------------------------------------------------------------------------------------

    def begin(self, length: int, longest_layer: list[int] | None) -> None:
        """Told before a forward its length, and what the first layer stores."""
        self._coming, self._longest_layer, self._gathered, self._votes = length, longest_layer, False, None
        # The schedule is one for the whole prompt, whatever reaches this layer of it.
        self._prompt = None if self.incoming is None else self.incoming.tolist()

    def gather(self, counts: Tensor | None, index: Tensor) -> None:
        """Told that only the tokens ``index [B, m]`` will come: ``counts [B]`` real ones, or as many in every row."""
        self.incoming, self._gathered = counts, True
        if self.positions is not None:
            self.positions = self.positions.gather(1, index.to(self.positions.device))

    def given_counts(self, given: int) -> list[int]:
        """Real tokens of this forward that reached this layer, in each row."""
        return [given] * len(self.real_count) if self.incoming is None else self.incoming.tolist()

    def count(self, key_states: Tensor) -> None:
        """Add the new tokens to those stored."""
        before = self.real_count
        super().count(key_states)
        self._added = self.real_count if before is None else self.real_count - before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append what reached this layer; what did not counts as seen."""
        returned = super().update(key_states, value_states, *args, **kwargs)
        self.seen += self._coming - key_states.shape[-2]
        return returned

    def own_mask(self, query: Tensor, length: int, mask: Any, module: Any) -> Any:
        """The host's mask only where the host knows which tokens came."""
        if self._gathered and mask is not None and mask.shape[-1] == length:
            self._uneven = True
            mask = mask[..., :0]
        return super().own_mask(query, length, mask, module)

    @torch.no_grad()
    def observe(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, module: Any) -> None:
        """Vote on a prompt's tokens; remember the latest queries."""
        super().observe(query, keys, values, scaling, module)
        if self.settings.generation_block:
            recent = query[:, :, -self.settings.voters :].detach()
            old = self.queries if self.queries is not None else recent[:, :, :0]
            self.queries = torch.cat([old, recent], 2)[:, :, -self.settings.voters :].clone()
        if query.shape[-2] == 1 or self.record_past:
            return
        if keys.shape[-2] < self.stored and isinstance(self, PackedLayer):
            keys, _ = self._dense(query.dtype)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        given = self.given_counts(query.shape[-2])
        self._votes = [self._vote(row, query, keys, count, scaling) for row, count in enumerate(given)]

    def _vote(self, row: int, query: Tensor, keys: Tensor, given: int, scaling: float) -> Tensor | None:
        """Votes ``[given]`` of one row's window on the tokens that reached this layer; None where nothing is cut."""
        prompt, window = self._prompt_and_window(row, given)
        if prompt == 0 or self._kept(prompt, given - window) >= given - window:
            return None
        stored = int(self.real_count[row])
        row_keys = keys[row : row + 1, :, keys.shape[-2] - stored :]
        voters = min(self.settings.vote_size or window, window)
        weights = torch.linspace(1.0, self.settings.distance_weight, voters, device=keys.device)
        first = torch.zeros(1, dtype=torch.long, device=keys.device)
        by_head = self.settings.vote_heads == "max"
        votes = window_scores(query[row : row + 1, :, -voters:], row_keys, first, scaling, weights, per_head=by_head)
        votes = smooth(votes, self.settings.kernel, "max").amax(1)[0, stored - given :]
        if stored == given:
            votes[: self.settings.sink_size] = float("inf")
        return votes

    def _prompt_and_window(self, row: int, given: int) -> tuple[int, int]:
        """Real tokens of one row's prompt, and how many of the last ones stay."""
        prompt = self._coming if self._prompt is None else self._prompt[row]
        return prompt, min(self.settings.schedule(prompt, self.depth).window(prompt), given) if prompt else 0

    def _kept(self, prompt: int, context: int) -> int:
        return self.settings.schedule(prompt, self.depth).hand_on(context, prompt, self.index, self.depth)

    def choose(self, agreed: list[Tensor] | None = None) -> list[Tensor] | None:
        """Ordinals, ascending, of this forward's tokens that the next layer is to have, out of ``agreed`` or all.

        None when nobody voted, that is when every layer is to have everything.
        """
        if self._votes is None:
            return None
        return [self._choose_row(row, None if agreed is None else agreed[row]) for row in range(len(self._votes))]

    def _choose_row(self, row: int, agreed: Tensor | None) -> Tensor:
        assert self._votes is not None
        votes, given = self._votes[row], int(self._added[row])
        candidates = torch.arange(given, device=self.real_count.device) if agreed is None else agreed
        prompt, window = self._prompt_and_window(row, given)
        context = len(candidates) - window
        kept = self._kept(prompt, context) if votes is not None else context
        if votes is None or kept >= context:
            return candidates
        best = votes[candidates[:context]].topk(kept).indices.sort().values
        return torch.cat([candidates[best], candidates[context:]])

    def narrow(self, agreed: list[Tensor] | None) -> list[Tensor] | None:
        """Store only ``agreed`` of this forward's tokens, by ordinal; return what this layer leaves of them."""
        added = [] if self._added is None else self._added.tolist()
        chosen = self.choose(agreed)
        if agreed is not None:
            device = self.real_count.device
            old = [torch.arange(s - a, device=device) for s, a in zip(self.real_count.tolist(), added, strict=True)]
            self.keep_own([torch.cat([o, row + len(o)])[None] for o, row in zip(old, agreed, strict=True)])
        return chosen

    # --- after a forward -----------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Settle a prompt, thin out generated tokens, then let the storage pack."""
        if self.real_count is not None and not self.record_past:
            if self._votes is not None or self.settled is None:
                self.settled = self.real_count.clone()
                self._note_window(self._added.tolist())
            elif self.settings.generation_block:
                self._thin()
            self._votes = None
        super().commit()

    def _note_window(self, added: list[int]) -> None:
        if self._gathered or not self.settings.gathers:
            prompt = [self._coming] * len(added) if self._prompt is None else self._prompt
            windows = [self.settings.schedule(p, self.depth).window(p) if p else 0 for p in prompt]
            self.unbroken = min(windows)

    @torch.no_grad()
    def _thin(self) -> None:
        """Of each row whose generated tokens fill a block before the recent ones, keep the block's best."""
        block, counts = self.settings.generation_block, self.real_count.tolist()
        settled, own, due = self.settled.tolist(), [], False
        longest = self._longest_layer or counts
        for row, count in enumerate(counts):
            recent = int(self.settings.recent_ratio * (longest[row] + 1))
            if count - recent - settled[row] < block:
                own.append(torch.arange(count, device=self.real_count.device)[None])
                continue
            due = True
            end = min(max(count - 1 - recent, settled[row] + block), count)
            own.append(self._thin_row(row, end - block, end)[None])
            settled[row] = own[-1].shape[-1] - recent
            self.unbroken = min(1 + recent, self.unbroken if self.unbroken is not None else 1 + recent)
        if due:
            self.keep_own(own)
            self.settled = torch.tensor(settled, device=self.real_count.device)

    def _thin_row(self, row: int, begin: int, end: int) -> Tensor:
        """Ordinals of one row that stay when the tokens from ``begin`` to ``end`` are thinned out."""
        s, count = self.settings, int(self.real_count[row])
        if isinstance(self, PackedLayer) and self.packed_count is not None:
            keys = self.row_tokens(row, self.keys, self.packed_rows()[0])
        else:
            keys = self.keys[row, :, self.keys.shape[-2] - count :]
        queries = self.queries[row : row + 1, :, -max(count - end, 1) :]
        weights = torch.linspace(1.0, s.distance_weight, queries.shape[2], device=keys.device)
        first = torch.zeros(1, dtype=torch.long, device=keys.device)
        scores = window_scores(queries, keys[None], first, keys.shape[-1] ** -0.5, weights)[0, 0, begin:end]
        kept = generation_keep(self.index, self.depth, end - begin, s.generation_ratio, s.generation_decay)
        best = scores.topk(min(kept, end - begin)).indices.sort().values + begin
        everything = torch.arange(count, device=keys.device)
        return torch.cat([everything[:begin], best, everything[end:]])

    # --- taking back ---------------------------------------------------------------------------------------------

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens seen; of a prompt that was interrupted, what reached this layer."""
        if count == self._coming and self._added is not None and self._gathered:
            reached = int(self._added.max())
            super().drop_last(reached)
            self.seen -= count - reached
            return
        super().drop_last(count)
        if self.queries is not None and 0 < count < self.queries.shape[2]:
            self.queries = self.queries[:, :, :-count]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.settled = self.queries = self._votes = self._added = None


class PyramidDenseLayer(PyramidLayer):
    """PyramidInfer on keys and values in the model's own precision."""

    def __init__(self, settings: Any, index: int, depth: int) -> None:
        self.set_up(settings, index, depth)
        super().__init__()


class PyramidPackedLayer(PyramidLayer, PackedLayer):
    """PyramidInfer on DecoQuant rows."""

    drops_tokens: ClassVar[bool] = True
    row_tensors: ClassVar[tuple[str, ...]] = (*PackedLayer.row_tensors, "settled", "queries")

    def __init__(self, settings: Any, index: int, depth: int, storage: Any) -> None:
        self.set_up(settings, index, depth)
        super().__init__(storage)
