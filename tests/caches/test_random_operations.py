"""Random sequences of operations on every cache, against references too plain to be wrong.

Two references, for two promises. With options under which nothing is lost, a row is its tokens, run through the model
without any cache. With lossy options a row is its own history: whatever was reordered, repeated, selected, saved or
padded around it, the same pieces fed to a fresh cache of one row must give the same logits.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext import make_cache
from hf_ext.registry import CACHES
from hf_ext.testing import LOSSLESS, SMALL, assert_close, ragged_batch, tiny_model

LENGTHS = [30, 26, 11, 4]
ALL = pytest.mark.parametrize("kind", sorted(CACHES))
INNER = {"type": "decoquant", **SMALL["decoquant"], "first_block": 6, "pre_rope": True}
STACKS = {f"{kind} over decoquant": [{"type": kind, **SMALL[kind]}, INNER] for kind in ("snapkv", "pyramid_infer")}
WITH_STACKS = pytest.mark.parametrize("kind", [*sorted(CACHES), *STACKS])
MOVES = ["one", "some", "take back", "reorder", "repeat", "select", "save", "reset"]


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


def small(model, kind):
    return make_cache(model, STACKS[kind]) if kind in STACKS else make_cache(model, kind, **SMALL[kind])


def forward(model, cache, ids, mask):
    """Logits of ``ids``, the last tokens of rows whose whole mask, padding on the left, is ``mask``."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@dataclass
class Rows:
    """A cache with, for each of its rows, the mask and the pieces ``(tokens, how many were taken back)`` it got."""

    model: object
    make: object
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self):
        self.cache = self.make()
        self.reset()

    def reset(self):
        self.cache.reset()
        batch = ragged_batch(LENGTHS[:3])
        self.mask = batch["attention_mask"]
        self.history = [
            [(ids[mask.bool()], 0)] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        forward(self.model, self.cache, batch["input_ids"], self.mask)

    def append(self, count, taken_back=0):
        ids = torch.randint(3, 128, (len(self.history), count), generator=self.generator)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        if taken_back:
            self.cache.activate_past_recording()
        logits = forward(self.model, self.cache, ids, self.mask)
        if taken_back:
            self.cache.crop(-taken_back)
            self.cache.end_recording()
            self.mask = self.mask[:, :-taken_back]
        self.history = [[*pieces, (row, taken_back)] for pieces, row in zip(self.history, ids, strict=True)]
        return logits[:, -1]

    def move(self, indices):
        self.mask = self.mask[indices]
        self.history = [self.history[i] for i in indices]

    def do(self, name):
        rows = len(self.history)
        if name == "one":
            self.append(1)
        elif name == "some":
            self.append(5)
        elif name == "take back":
            self.append(3, taken_back=2)
        elif name == "reorder":
            beams = [(3 * i + 1) % rows for i in range(rows)]
            self.cache.reorder_cache(torch.tensor(beams))
            self.move(beams)
        elif name == "repeat" and rows <= 2:
            self.cache.batch_repeat_interleave(2)
            self.move([i // 2 for i in range(2 * rows)])
        elif name == "select" and rows > 1:
            self.cache.batch_select_indices(torch.tensor([rows - 1, 0]))
            self.move([rows - 1, 0])
        elif name == "save":
            self.cache = self.make().load_state_dict(self.cache.state_dict())
        elif name == "reset":
            self.reset()


def replayed(model, make, pieces):
    """The last logits of a fresh cache of one row that gets these pieces."""
    cache, seen = make(), 0
    for ids, taken_back in pieces:
        if taken_back:
            cache.activate_past_recording()
        logits = forward(model, cache, ids[None], torch.ones(1, seen + len(ids), dtype=torch.long))
        if taken_back:
            cache.crop(-taken_back)
            cache.end_recording()
        seen += len(ids) - taken_back
    return logits[0, -1]


def recomputed(model, pieces):
    """The last logits of one row's tokens, without a cache."""
    ids = torch.cat([ids[: len(ids) - taken_back] for ids, taken_back in pieces])
    with torch.no_grad():
        return model(ids[None]).logits[0, -1]


@WITH_STACKS
@settings(deadline=None, max_examples=6)
@given(operations=st.lists(st.sampled_from(MOVES), min_size=4, max_size=8))
def test_a_row_is_its_own_history(model, kind, operations):
    def make():
        return small(model, kind)

    rows = Rows(model, make)
    for name in operations:
        rows.do(name)
        assert rows.cache.get_seq_length() == rows.mask.shape[1]
    for row, logits in enumerate(rows.append(3)):
        assert_close(f"row {row}", replayed(model, make, rows.history[row]), logits, 1e-5)


@ALL
@settings(deadline=None, max_examples=6)
@given(operations=st.lists(st.sampled_from(MOVES), min_size=4, max_size=8))
def test_with_room_for_all_a_row_is_its_tokens(model, kind, operations):
    rows = Rows(model, lambda: make_cache(model, kind, **LOSSLESS[kind]))
    for name in operations:
        rows.do(name)
    for row, logits in enumerate(rows.append(3)):
        assert_close(f"row {row}", recomputed(model, rows.history[row]), logits, 1e-9)


@WITH_STACKS
@pytest.mark.parametrize("cuts", [[8, 16, 24, 30], [28, 29, 30]], ids=str)
def test_chunks_that_are_partly_padding_change_nothing(model, kind, cuts):
    batch, tail = ragged_batch(LENGTHS), torch.randint(3, 128, (len(LENGTHS), 3))
    ids = torch.cat([batch["input_ids"], tail], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tail)], 1)
    ends = [*cuts, 31, 33]
    together = small(model, kind)
    for begin, end in zip([0, *ends], ends, strict=False):
        got = forward(model, together, ids[:, begin:end], mask[:, :end])
    for row, length in enumerate(LENGTHS):
        own = [ids[row, max(begin, 30 - length) : end] for begin, end in zip([0, *ends], ends, strict=False)]
        pieces = [(piece, 0) for piece in own if len(piece)]
        expected = replayed(model, lambda: small(model, kind), pieces)
        assert_close(f"row {row}", expected, got[row, -1], 1e-5)
