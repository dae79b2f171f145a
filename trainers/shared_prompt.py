"""All responses to one prompt in one row: the prompt is computed once, and each response sees it and itself.

DPO reads every response behind a prompt of its own, so the prompt is computed two times, in ADPO three, and as often
again in every frozen policy. Here the responses of an example stand one after the other behind one trunk:

    trunk             response 1               response 2               ...
    p_0 .. p_(n-2)    p_(n-1) c_0 c_1 ..       p_(n-1) r_0 r_1 ..

A mask keeps a response from seeing the others, and position ids restart with each, so every log-probability is that of
the row on its own, up to the order of sums. Each response keeps at least the last token of its prompt, from whose
state its first token is predicted. A prompt that leaves the trunk early (ADPO's, with the control token in it) shares
what comes before and brings the rest along.
"""

import dataclasses
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

OWN_ARGUMENTS = {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}
LAYER_TYPES = {"full_attention", "sliding_attention"}


class SharedPrompt:
    """A model whose scoring call reads rows ``[R, T]`` and computes each example's prompt once.

    Answers TRL's call ``model(input_ids=, attention_mask=, labels=, fused_lm_head=True)`` with the fields and shapes
    of the model's own answer. A batch that it cannot take, or that would gain nothing (long responses to short
    prompts, whose attention grows with the square of the joint row), goes to the model as it is; so does any other
    call.

    Args:
        model: a causal language model with TRL's fused head, for which `can_share_prompt` holds; may be wrapped.
        examples: the example of each row, ``[R]``; the first B rows are of examples 0 to B-1.
    """

    def __init__(self, model: Any, examples: Tensor) -> None:
        self.model, self.examples = model, examples
        self.config = _language_model(model).config.get_text_config()

    def __call__(self, **inputs: Any) -> Any:
        """The model's answer for these rows."""
        if not inputs.get("fused_lm_head") or set(inputs) - OWN_ARGUMENTS:
            return self.model(**inputs)
        ids, labels = inputs["input_ids"], inputs["labels"]
        layout = make_layout(ids, inputs["attention_mask"], labels, self.examples)
        if layout is None or not self._pays(ids, layout):
            return self.model(**inputs)
        mask = layout.attention_mask()
        if self.config._attn_implementation == "eager":  # adds the mask instead of selecting by it
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        outputs = self.model(
            input_ids=layout.pack(ids, 0),
            attention_mask=mask,
            position_ids=layout.positions,
            labels=layout.pack(labels.masked_fill(~layout.own, -100), -100),
            use_cache=False,
            fused_lm_head=True,
        )
        fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
        return type(outputs)(
            **{
                name: layout.unpack(value) if isinstance(value, Tensor) and value.dim() >= 2 else value
                for name, value in fields.items()
            }
        )

    def _pays(self, ids: Tensor, layout: "Layout") -> bool:
        """Whether the joint rows fit a sliding window and cost less; a plain row needs half of its attention only."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and ids.size(1) > window:
            return False
        joint = layout.positions.numel() * token_cost(self.config, layout.width)
        return joint < ids.numel() * token_cost(self.config, ids.size(1) / 2)


def token_cost(config: Any, seen: float) -> float:
    """Multiplications of a common decoder layer for a token, a third of forward and backward.

    Args:
        config: of the language model.
        seen: how many positions the token's attention is computed with.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    cached = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    projections = hidden * (2 * (heads + cached) * head_dim + 3 * inner)
    return projections + 2 * 3.5 / 3 * seen * heads * head_dim  # backward recomputes the attention's scores


@dataclass(frozen=True)
class Layout:
    """Where the tokens of R rows stand in B joint rows of ``width`` tokens.

    Attributes:
        examples: the joint row of each row, ``[R]``.
        index: the column there of each token, ``[R, T]``; padding points at ``width``.
        own: tokens that are predicted: of the response, behind a token of the same branch, ``[R, T]``.
        branches: number of the response that a token of the joint row belongs to, 0 in the trunk, -1 in padding,
            ``[B, width]``.
        trunks: how many tokens of the trunk a token may see at most, ``[B, width]``.
        positions: of a token in its own row, ``[B, width]``.
    """

    examples: Tensor
    index: Tensor
    own: Tensor
    branches: Tensor
    trunks: Tensor
    positions: Tensor

    @property
    def width(self) -> int:
        """Tokens of a joint row."""
        return self.positions.size(1)

    def pack(self, rows: Tensor, padding: int) -> Tensor:
        """Rows ``[R, T]`` as joint rows ``[B, width]``."""
        return _scatter(rows, self.examples, self.index, self.positions.shape, padding)

    def unpack(self, joint: Tensor) -> Tensor:
        """What stands at the predicted tokens, ``[B, width - 1]`` of next tokens, as rows ``[R, T - 1]``; else 0."""
        before = (self.index[:, 1:] - 1).clamp(0, self.width - 2)
        return joint[self.examples[:, None], before].masked_fill(~self.own[:, 1:], 0)

    def attention_mask(self) -> Tensor:
        """Whether a query (dim 2) may see a key (dim 3), ``[B, 1, width, width]``."""
        column = torch.arange(self.width, device=self.positions.device)
        causal = column[:, None] >= column
        same_branch = self.branches[:, :, None] == self.branches[:, None]
        trunk = (self.branches[:, None] == 0) & (column < self.trunks[:, :, None])
        return (causal & (same_branch | trunk))[:, None]


def make_layout(ids: Tensor, attention_mask: Tensor, labels: Tensor, examples: Tensor) -> Layout | None:
    """Lay out right-padded rows of the same examples behind common trunks; None if they are padded on the left.

    Args:
        ids: ``[R, T]``; the first B rows are of examples 0 to B-1, and their prompts are the trunks.
        attention_mask: ``[R, T]``.
        labels: ``[R, T]``, -100 outside the response.
        examples: the example of each row, ``[R]``.
    """
    rows, longest = ids.shape
    real, target = attention_mask.bool(), labels != -100
    column = torch.arange(longest, device=ids.device)
    length = real.sum(1)
    prompt = torch.where(target.any(1), target.int().argmax(1), length)
    last = torch.minimum(prompt, prompt[examples]) - 1  # the last token of a prompt stays with its response
    same = (ids == ids[examples]) & (column < last[:, None])
    shared = same.int().cumprod(1).sum(1)
    branch, start = _place_branches(length - shared, shared, examples)
    index = torch.where(column < shared[:, None], column, start[:, None] + column - shared[:, None])
    sizes = torch.stack([examples.max() + 1, (start + length - shared).max(), real[:, 0].all()])
    joint_rows, width, unpadded_left = sizes.tolist()
    if not unpadded_left:
        return None
    shape = torch.Size((joint_rows, width))
    index = index.masked_fill(~real, width)
    in_branch = column >= shared[:, None]
    return Layout(
        examples,
        index,
        target & (column > shared[:, None]),
        _scatter(torch.where(in_branch, branch[:, None], 0), examples, index, shape, -1),
        _scatter(torch.where(in_branch, shared[:, None], 0), examples, index, shape, 0),
        _scatter(column.expand(rows, longest), examples, index, shape, 0),
    )


def can_share_prompt(model: Any) -> bool:
    """Whether a joint row means the same to this model: attention by a mask, positions by ids, no other state.

    Args:
        model: may be wrapped and carry adapters.
    """
    inner = _language_model(model)
    config = inner.config.get_text_config()
    return (
        config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(type(inner).forward).parameters
        and set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES
        and not inner._is_stateful
        and config is inner.config  # a model of images too may number its positions otherwise
        and not getattr(config, "alibi", False)
        and not _learns_prompts(model)
    )


def _language_model(model: Any) -> Any:
    """The model of transformers inside adapters and the wrappers of parallel training."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _learns_prompts(model: Any) -> bool:
    """Whether an adapter puts virtual tokens in front of every row."""
    outside = itertools.takewhile(lambda module: not isinstance(module, PreTrainedModel), model.modules())
    wrappers = (module for module in outside if isinstance(module, PeftModel))
    return any(adapter.is_prompt_learning for wrapper in wrappers for adapter in wrapper.peft_config.values())


def _place_branches(own: Tensor, shared: Tensor, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each row among its example's, from 1, and the column at which its own tokens begin, ``[R]`` each."""
    same = examples[:, None] == examples
    earlier = same & torch.ones_like(same).tril(-1)
    return earlier.sum(1) + 1, shared[examples] + (earlier * own).sum(1)


def _scatter(rows: Tensor, examples: Tensor, index: Tensor, shape: torch.Size, padding: int) -> Tensor:
    """Write ``[R, T]`` into ``[B, width]`` at ``index``; a row of the trunk writes what the others write there."""
    joint = rows.new_full((shape[0], shape[1] + 1), padding)  # the last column takes the padding
    return joint.index_put((examples[:, None].expand_as(index), index), rows)[:, : shape[1]]
