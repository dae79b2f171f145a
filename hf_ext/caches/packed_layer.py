"""One layer of packed keys and values: attention sinks and the newest tokens as they are, the rest as DecoQuant rows.

In time, a row's tokens are: its sinks, its packed tokens, its tail. Sinks and tail lie in ``keys`` and ``values``,
aligned to the right; packed rows lie in their own tensors, aligned to the left. Nothing is stored for padding, and
every row of a batch is packed by its own tokens and counts alone, so it becomes what it would become by itself.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_ext.caches.observed import SEAM, ObservedLayer
from hf_ext.caches.rotary import frequencies, move_keys, unrotated_moment
from hf_ext.kernels.decoquant import RowFormat, encode, fit_allocated, fit_uniform
from hf_ext.kernels.packed_attention import MAX_NATIVE_QUERIES, PackedRows, packed_attention

PARTS = ("codes", "scales", "widths", "synthesis", "mean", "weight")
SIDES = ("key", "value")
PACKED = tuple(f"{side}_{part}" for side in SIDES for part in PARTS)
EXTRA = ("packed_count", "sink_count", "query_moment", "places", "packed_places", *PACKED)
UNFUSED = ("softcap", "s_aux", "position_bias")  # attention options that the packed kernel does not know


class PackedLayer(ObservedLayer):
    """Sinks, packed tokens and tail of one layer.

    Attributes:
        config: a `DecoQuantConfig`.
        packed_count: ``[B]`` int64, packed tokens per row; None before any row has some.
        sink_count: ``[B]`` int64, unpacked tokens that come before a row's packed ones.
        query_moment: ``[B, D, D]`` sum of ``q q^T`` over real queries, until every row has its basis.
        places: ``[B, 1, F, 1]`` int32, where the tokens in ``keys`` stand in the text; kept only where keys are packed
            before RoPE and tokens are dropped. Without gaps a token's place is its number in its row.
        packed_places: ``[B, 1, N]`` the same of packed tokens.
        key_codes, ...: the fields of `PackedRows`, for keys and for values.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (*ObservedLayer.row_tensors, *EXTRA)
    drops_tokens: ClassVar[bool] = False
    packed_count: Any  # a tensor wherever it is read after packing has begun
    query_moment: Any
    places: Any
    packed_places: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._clear()

    def _clear(self) -> None:
        for name in EXTRA:
            setattr(self, name, None)
        self._longest = 0
        self._all_formatted = False
        self._frequencies: Tensor | None = None

    @property
    def stored(self) -> int:
        """Real tokens of the row that stores most."""
        return self._longest

    @property
    def _keeps_places(self) -> bool:
        return self.drops_tokens and self.config.pre_rope

    @property
    def _aligned(self) -> tuple[str, ...]:
        """Names of what lies aligned to the right, one slot for each token that is not packed."""
        return ("keys", "values", "places") if self._keeps_places else ("keys", "values")

    @property
    def recent_count(self) -> Tensor:
        """Tokens per row that are not packed, ``[B]``."""
        return self.real_count if self.packed_count is None else self.real_count - self.packed_count

    # --- one forward ---------------------------------------------------------------------------------------------

    def expect(self, incoming: Tensor | None, decoder: nn.Module, positions: Tensor) -> None:
        """Told before a forward of ``decoder`` how many of its tokens are real, and where they stand."""
        super().expect(incoming, decoder, positions)
        self._frequencies = frequencies(decoder, "full_attention") if self.config.pre_rope else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, q, D]``; return all keys and values, or the new ones where `attend` reads the packed."""
        fused = self.packed_count is not None and SEAM.open and self.proved
        past = None if fused or self.packed_count is None else self._dense(key_states.dtype)
        self._append(key_states, value_states)
        if fused:
            return self.mark(key_states), value_states
        if past is None:
            return self.mark(self.keys), self.values
        return self.mark(torch.cat([past[0], key_states], -2)), torch.cat([past[1], value_states], -2)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.count(key_states)
        self.seen += key_states.shape[-2]
        empty = self.keys is None or self.keys.numel() == 0
        self.keys = key_states.clone() if empty else torch.cat([self.keys, key_states], -2)
        self.values = value_states.clone() if empty else torch.cat([self.values, value_states], -2)
        if self._keeps_places:
            assert self.positions is not None
            new = self.positions[:, None, :, None].to(device=key_states.device, dtype=torch.int32)
            self.places = new.clone() if empty else torch.cat([self.places, new], -2)
        self._longest = self._longest + key_states.shape[-2] if self.incoming is None else int(self.real_count.max())

    def attend(
        self,
        inner: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Attend to packed and recent tokens; to rebuilt ones where the packed kernel has no such option."""
        dense = self.packed_count is None or key.shape[-2] > query.shape[-2]
        if dense:
            return super().attend(inner, module, query, key, value, attention_mask, **kwargs)
        self.attended = True
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        plain = all(kwargs.get(name) is None for name in UNFUSED) and not kwargs.get("output_attentions")
        self.observe(query, key, value, scaling, module)
        if plain and not kwargs.get("dropout") and rows <= MAX_NATIVE_QUERIES and not self.config.pre_rope:
            out = packed_attention(
                query, self.keys, self.values, self.recent_count, *self.packed_rows(), self.packed_count, scaling
            )
            return out.transpose(1, 2).contiguous(), None
        keys, values = self._dense(query.dtype)
        mask = self.own_mask(query, keys.shape[-2], attention_mask, module)
        return inner(module, query, keys, values, mask, **kwargs)

    def observe(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, module: Any) -> None:
        """Add the queries to the metric by which the keys' error will be measured."""
        if not self.config.query_metric or self.config.method != "allocated" or self._all_formatted:
            return
        q = query.detach().to(torch.promote_types(query.dtype, torch.float32))
        if self.incoming is not None:
            real = torch.arange(q.shape[-2], device=q.device) >= q.shape[-2] - self.incoming.to(q.device)[:, None]
            q = q.masked_fill(~real[:, None, :, None], 0.0)
        q = q.transpose(1, 2).flatten(1, 2)
        moment = q.transpose(1, 2) @ q
        self.query_moment = moment if self.query_moment is None else self.query_moment + moment

    # --- packing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def commit(self) -> None:
        """Pack what each row has ready."""
        if self.real_count is None or self.record_past:
            return
        recent = self.recent_count.tolist()
        ready = [self._ready(r, f) for r, f in zip(recent, self._formatted(), strict=True)]
        if any(ready):
            self._pack(recent, ready)
        elif self.keys.shape[-2] > max(recent):
            begin = self.keys.shape[-2] - max(recent)
            self._change_aligned(lambda dense: dense[..., begin:, :].clone())

    def _formatted(self) -> list[bool]:
        """Which rows have their basis, even if none of their packed tokens is left."""
        if self.key_synthesis is None:
            return [False] * len(self.real_count)
        return self.key_synthesis.flatten(1).any(-1).tolist()

    def _ready(self, recent: int, formatted: bool) -> int:
        """How many of a row's recent tokens are to be packed now."""
        count = recent - self.config.sink_size - self.config.recent_size
        return count if count >= (self.config.block_size if formatted else self.config.first_block) else 0

    def _pack(self, recent: list[int], ready: list[int]) -> None:
        if self.packed_count is None:
            self.packed_count = torch.zeros_like(self.real_count)
            self.sink_count = torch.full_like(self.real_count, self.config.sink_size)
        capacity, formatted = self.keys.shape[-2], self._formatted()
        for side, dense in zip(SIDES, (self.keys, self.values), strict=True):
            pieces: list[Any] = []
            for row, count in enumerate(ready):
                begin = capacity - recent[row] + int(self.sink_count[row])
                x = dense[row, :, begin : begin + count]
                places = self._places_of_recent(row, begin, count)
                if side == "key":
                    x = self._turned(x, places, -1)
                pieces.append(self._encode_row(side, row, x, places, formatted[row]) if count else None)
            self._store(side, pieces, ready, formatted)
        if self._keeps_places:
            self._store_places(recent, ready)
        left = [r - count for r, count in zip(recent, ready, strict=True)]
        self._change_aligned(lambda dense: self._without(dense, recent, ready, left))
        self.packed_count = self.packed_count + torch.tensor(ready, device=self.packed_count.device)
        self._all_formatted = all(self._formatted())
        if self._all_formatted:
            self.query_moment = None

    def _encode_row(
        self, side: str, row: int, x: Tensor, places: Tensor, formatted: bool
    ) -> tuple[RowFormat, Tensor, Tensor]:
        if formatted:
            row_format = self._rows(side).row_format(row)
        elif self.config.method == "uniform":
            row_format = fit_uniform(x, self.config.bits, self.config.group)
        else:
            metric = self.query_moment[row] if side == "key" and self.query_moment is not None else None
            if metric is not None and self._frequencies is not None:
                metric = unrotated_moment(metric, int(places[-1]) + 1, self._frequencies)
            row_format = fit_allocated(x, self.config.row_bytes(x.shape[-1]), metric)
        return (row_format, *encode(x, row_format))

    def _store(self, side: str, pieces: list[Any], ready: list[int], formatted: list[bool]) -> None:
        """Append each row's new codes and scales at its own count, and its format where it is new."""
        example = next(piece for piece in pieces if piece is not None)
        before = self.packed_count.tolist()
        need = max(b + r for b, r in zip(before, ready, strict=True))
        for part, new in (("codes", [p and p[1] for p in pieces]), ("scales", [p and p[2] for p in pieces])):
            old, shape = getattr(self, f"{side}_{part}"), example[1 if part == "codes" else 2].shape
            dtype = example[1 if part == "codes" else 2].dtype
            grown = torch.zeros(len(pieces), shape[0], need, *shape[2:], dtype=dtype, device=self.keys.device)
            if old is not None:
                grown[:, :, : old.shape[2]] = old[:, :, :need]
            for row, piece in enumerate(new):
                if piece is not None:
                    grown[row, :, before[row] : before[row] + ready[row]] = piece
            setattr(self, f"{side}_{part}", grown)
        for part, like in example[0].tensors().items():
            old = getattr(self, f"{side}_{part}")
            rows = torch.zeros(len(pieces), *like.shape, dtype=like.dtype, device=like.device) if old is None else old
            for row, piece in enumerate(pieces):
                if piece is not None and not formatted[row]:
                    rows[row] = getattr(piece[0], part)
            setattr(self, f"{side}_{part}", rows)

    def _store_places(self, recent: list[int], ready: list[int]) -> None:
        """Append the places of each row's newly packed tokens at its own count."""
        before = self.packed_count.tolist()
        need = max(b + r for b, r in zip(before, ready, strict=True))
        grown = self.places.new_zeros(len(ready), 1, need)
        if self.packed_places is not None:
            grown[..., : self.packed_places.shape[-1]] = self.packed_places[..., :need]
        for row, count in enumerate(ready):
            begin = self.places.shape[-2] - recent[row] + int(self.sink_count[row])
            grown[row, :, before[row] : before[row] + count] = self.places[row, :, begin : begin + count, 0]
        self.packed_places = grown

    def _change_aligned(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self._aligned:
            setattr(self, name, function(getattr(self, name)))

    def _without(self, dense: Tensor, recent: list[int], ready: list[int], left: list[int]) -> Tensor:
        """The recent tokens of each row but those packed, aligned to the right again."""
        capacity, longest = dense.shape[-2], max(left)
        out = dense.new_zeros(*dense.shape[:2], longest, dense.shape[-1])
        for row, count in enumerate(ready):
            kept, sinks = dense[row, :, capacity - recent[row] :], int(self.sink_count[row])
            kept = torch.cat([kept[:, :sinks], kept[:, sinks + count :]], 1) if count else kept
            if left[row]:
                out[row, :, longest - left[row] :] = kept
        return out

    # --- reading -------------------------------------------------------------------------------------------------

    def packed_rows(self) -> tuple[PackedRows, PackedRows]:
        """The packed keys and the packed values."""
        return self._rows("key"), self._rows("value")

    def _rows(self, side: str) -> PackedRows:
        parts = {part: getattr(self, f"{side}_{part}") for part in PARTS}
        return PackedRows(**parts, midrise=self.config.method == "allocated")

    def _dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B, H, stored, D]`` rebuilt, each row aligned to the right."""
        rebuilt = []
        for dense, rows in zip((self.keys, self.values), self.packed_rows(), strict=True):
            out = dense.new_zeros(*dense.shape[:2], self._longest, dense.shape[-1], dtype=dtype)
            for row, count in enumerate(self.real_count.tolist()):
                out[row, :, self._longest - count :] = self.row_tokens(row, dense, rows)
            rebuilt.append(out)
        return rebuilt[0], rebuilt[1]

    def row_tokens(self, row: int, dense: Tensor, rows: PackedRows) -> Tensor:
        """One row's keys or values ``[H, real, D]`` in order of time."""
        packed = int(self.packed_count[row])
        recent = dense[row, :, dense.shape[-2] - int(self.recent_count[row]) :]
        if packed == 0:
            return recent
        sinks = int(self.sink_count[row])
        middle = rows.rebuild(row, packed, torch.promote_types(dense.dtype, torch.float32)).to(dense.dtype)
        if dense is self.keys:
            middle = self._turned(middle, self._places_of_packed(row, sinks, packed), 1)
        return torch.cat([recent[:, :sinks], middle, recent[:, sinks:]], 1)

    def _turned(self, keys: Tensor, places: Tensor, direction: int) -> Tensor:
        """Keys ``[H, n, D]`` of tokens at ``places [n]``, rotated to (1) or from (-1) there."""
        if self._frequencies is None:
            return keys
        return move_keys(keys[None], direction * places[None].to(keys.device), self._frequencies)[0]

    def _places_of_recent(self, row: int, slot: int, count: int) -> Tensor:
        """Places ``[count]`` of the unpacked tokens from ``slot`` on, which come next after a row's packed ones."""
        if self._keeps_places:
            return self.places[row, 0, slot : slot + count, 0]
        begin = int(self.sink_count[row] + self.packed_count[row])
        return torch.arange(begin, begin + count)

    def _places_of_packed(self, row: int, sinks: int, count: int) -> Tensor:
        """Places ``[count]`` of a row's packed tokens, which come after ``sinks`` others."""
        return self.packed_places[row, 0, :count] if self._keeps_places else torch.arange(sinks, sinks + count)

    # --- dropping ------------------------------------------------------------------------------------------------

    def keep(self, slots: Tensor) -> None:
        """Store only ``slots`` ``[B, K]`` of the stored tokens, ascending; codes are moved, never decoded.

        Slots count from the first stored token of the longest row; those before a row's own first token stand for
        nothing.
        """
        first = self._longest - self.real_count
        self._select([row[row >= 0] for row in (slots.to(first.device) - first[:, None]).unbind(0)])
        self._uneven = bool((self.real_count != self._longest).any())

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, packed or not.

        Raises:
            ValueError: fewer than ``count`` tokens are stored.
        """
        self.check_unbroken(count)
        if count > self.stored:
            raise ValueError(f"cannot take back {count} tokens: this layer stores only {self.stored}.")
        if count == 0:
            return
        left = (self.real_count - count).clamp(min=0)
        tail = self.recent_count if self.packed_count is None else self.recent_count - self.sink_count
        if bool((self.real_count - left <= tail).all()):
            end = max(self.keys.shape[-2] - count, 0)
            self._change_aligned(lambda dense: dense[..., :end, :])
            self.real_count = left
            self._longest = int(left.max())
        else:
            self._select([torch.arange(int(n), device=left.device) for n in left])
        self.seen -= count

    def _select(self, own: list[Tensor]) -> None:
        """Keep in each row the tokens with these ordinals (0 is the row's first in time)."""
        recent_count, recent_index, packed_index, sinks = self.recent_count.tolist(), [], [], []
        for row, ordinals in enumerate(own):
            packed = 0 if self.packed_count is None else int(self.packed_count[row])
            sink = int(self.sink_count[row]) if packed else 0
            is_packed = (ordinals >= sink) & (ordinals < sink + packed)
            packed_index.append(ordinals[is_packed] - sink)
            rest = ordinals[~is_packed]
            sinks.append(int((rest < sink).sum()) if packed else self.config.sink_size)
            recent_index.append(torch.where(rest < sink, rest, rest - packed))
        self.real_count = torch.tensor([len(row) for row in own], device=self.real_count.device)
        self._longest = int(self.real_count.max())
        offset = [self.keys.shape[-2] - count for count in recent_count]
        moved = [index + begin for index, begin in zip(recent_index, offset, strict=True)]
        self._change_aligned(lambda dense: _gather_right(dense, moved))
        if self.packed_count is not None:
            self.packed_count = torch.tensor([len(index) for index in packed_index], device=self.real_count.device)
            self.sink_count = torch.tensor(sinks, device=self.real_count.device)
            places = ["packed_places"] if self._keeps_places else []
            for name in ("key_codes", "key_scales", "value_codes", "value_scales", *places):
                setattr(self, name, _gather_left(getattr(self, name), packed_index))

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """As `RowState.map_rows`, and also for recent tokens of which there are none at the moment."""
        super().map_rows(function)
        for name in self._aligned:
            dense = getattr(self, name)
            if dense is not None and dense.dim() == 4 and dense.numel() == 0:
                setattr(self, name, function(dense))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._clear()

    def write_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `read_state` gave."""
        super().write_state(tensors, values)
        self._longest = 0 if self.real_count is None else int(self.real_count.max())
        self._all_formatted = self.real_count is not None and all(self._formatted())
        self._uneven = self.real_count is not None and bool((self.real_count != self._longest).any())


def _gather_right(dense: Tensor, index: list[Tensor]) -> Tensor:
    """Slots ``index[b]`` of ``[B, H, F, D]`` in each row, aligned to the right."""
    longest = max(len(slots) for slots in index)
    out = dense.new_zeros(*dense.shape[:2], longest, dense.shape[-1])
    for row, slots in enumerate(index):
        out[row, :, longest - len(slots) :] = dense[row, :, slots]
    return out


def _gather_left(rows: Tensor, index: list[Tensor]) -> Tensor:
    """Slots ``index[b]`` of ``[B, H, N, ...]`` in each row, aligned to the left."""
    out = rows.new_zeros(*rows.shape[:2], max(len(slots) for slots in index), *rows.shape[3:])
    for row, slots in enumerate(index):
        out[row, :, : len(slots)] = rows[row, :, slots]
    return out
