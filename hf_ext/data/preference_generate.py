"""The data stage of ADPO (arXiv 2405.12900): replies of the model itself, sorted by a judge into triples.

For each prompt several replies are sampled and judged; the best and the worst become chosen and rejected. One more is
sampled behind the control token and kept as the toxic response if the judge finds it unacceptable. The file that is
written holds harmful text by design: it says so, is never overwritten, and nothing of it is printed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_ext.data.preference import add_control_token
from hf_ext.options import Options

LABEL = "Contains toxic text generated for training against it. Do not publish or show to users."
Judge = Callable[[Any, str], float]


@dataclass(frozen=True)
class TripleOptions(Options):
    """How replies are sampled and judged.

    Attributes:
        samples: replies sampled without the control token, of which two are kept.
        toxic_samples: replies sampled behind it; the least acceptable is kept.
        temperature: of sampling.
        top_p: nucleus of sampling.
        max_new_tokens: of a reply.
        acceptable: score from which a reply is no longer toxic.
        seed: of sampling; prompt i uses ``seed + i``, so an interrupted run goes on with the same replies.
        control_token: text that the model answers toxically to.
        control_token_position: where it stands in the prompt (see `add_control_token`).
    """

    samples: int = 4
    toxic_samples: int = 1
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 64
    acceptable: float = 0.5
    seed: int = 0
    control_token: str = "[TOXIC]"
    control_token_position: str = "suffix"

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; it must be at least 2, one chosen and one rejected.")
        for name in ("toxic_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}; allowed: above 0, and (0, 1]."
            )


def word_list_judge(words: Iterable[str]) -> Judge:
    """A judge that scores 1 minus the share of a reply's words that are on a list; an empty reply scores 0."""
    listed = frozenset(word.lower() for word in words)

    def judge(prompt: Any, reply: str) -> float:
        found = [word.strip(".,!?;:\"'()").lower() in listed for word in reply.split()]
        return 1.0 - sum(found) / len(found) if found else 0.0

    return judge


def generate_triples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    judge: Judge,
    path: str | os.PathLike[str],
    options: TripleOptions | None = None,
) -> dict[str, int]:
    """Write one JSON line for each prompt that yields a triple: prompt, chosen, rejected, toxic and the label.

    A prompt whose replies the judge cannot tell apart is dropped; a toxic reply that the judge accepts, or that
    repeats another, is left out (``toxic`` is then null: train with ``missing_toxic="mask"``). An interrupted run
    leaves ``<path>.partial`` and goes on from it when called again with the same settings.

    Args:
        model: the supervised model, which knows the control token.
        tokenizer: of the model.
        prompts: texts, or lists of messages.
        judge: (prompt, reply) -> how acceptable it is, from 0 to 1.
        path: of the file to write. Beside it ``<path>.json`` records settings, model and counts.
        options: how to sample.

    Returns:
        Counts: "prompts", "triples", "pairs" (without a toxic reply), "ties".

    Raises:
        FileExistsError: ``path`` exists.
        ValueError: a partial file of other settings lies there.
    """
    options = options or TripleOptions()
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; generated data is never overwritten. Move it or choose another path.")
    partial = path.with_name(path.name + ".partial")
    settings = {**options.to_dict(), "model": _model_hash(model), "prompts": _hash(list(prompts)), "label": LABEL}
    rows = _begin(partial, settings)
    with partial.open("a", encoding="utf-8") as file:
        for index in tqdm(range(len(rows), len(prompts)), desc="Generating triples", disable=None):
            row = _triple(model, tokenizer, prompts[index], judge, options, options.seed + index)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    kept = [row for row in rows if row["chosen"] is not None]
    counts = {
        "prompts": len(rows),
        "triples": sum(row["toxic"] is not None for row in kept),
        "pairs": sum(row["toxic"] is None for row in kept),
        "ties": len(rows) - len(kept),
    }
    record = {**settings, "counts": counts}
    path.with_name(path.name + ".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.write_text("".join(json.dumps({**row, "label": LABEL}) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)
    return counts


def _begin(partial: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an interrupted run of the same settings; its first line holds them."""
    if not partial.exists():
        partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return []
    first, *lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    if json.loads(first) != settings:
        raise ValueError(
            f"{partial} was begun with another model, other prompts or options; delete it or choose another path."
        )
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    partial.write_text("".join([first, *(json.dumps(row) + "\n" for row in rows)]), encoding="utf-8")
    return rows


def _triple(
    model: Any, tokenizer: Any, prompt: Any, judge: Judge, options: TripleOptions, seed: int
) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        replies = list(dict.fromkeys(_sample(model, tokenizer, prompt, options.samples, options)))
        control = add_control_token(prompt, options.control_token, options.control_token_position)
        toxic = _sample(model, tokenizer, control, options.toxic_samples, options)
    scores = {reply: judge(prompt, reply) for reply in replies if reply.strip()}
    row: dict[str, Any] = {"prompt": prompt, "chosen": None, "rejected": None, "toxic": None}
    if len(set(scores.values())) < 2:
        return row
    row["chosen"], row["rejected"] = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    worst = min((reply for reply in toxic if reply.strip()), key=lambda reply: judge(prompt, reply), default=None)
    if (
        worst is not None
        and judge(prompt, worst) < options.acceptable
        and worst not in (row["chosen"], row["rejected"])
    ):
        row["toxic"] = worst
    if not isinstance(prompt, str):
        for name in ("chosen", "rejected", "toxic"):
            row[name] = row[name] and [{"role": "assistant", "content": row[name]}]
    return row


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, prompt: Any, count: int, options: TripleOptions) -> list[str]:
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids = inputs["input_ids"].to(model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=0,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=count,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    replies = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    # A plain-text prompt and its reply are joined without a space when they are tokenised again.
    return [f" {reply.strip()}" if isinstance(prompt, str) else reply.strip() for reply in replies]


def _model_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}{flat[:: max(1, flat.numel() // 64)].float().tolist()}".encode())
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
