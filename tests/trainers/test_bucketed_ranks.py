"""Two gloo processes: ranks aligned, no batch lost, doubled or shared out twice; resuming, streams, FSDP, FAdam."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ext.testing import tiny_model
from hf_ext.trainers.bucketed_config import BucketedTrainingArguments
from hf_ext.trainers.bucketed_trainer import BucketedTrainer

SCRIPT = Path(__file__).with_name("bucketed_ranks.py")
RANKS = 2


def rows_of(documents_of_step):
    return sorted(tuple(row) for batch in documents_of_step for row in batch)


@pytest.fixture(scope="module")
def documents():
    """Those of the script."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from bucketed_ranks import documents
    finally:
        sys.path.pop(0)
    return documents()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_all_ranks_are_at_the_same_length_with_different_rows(ranks):
    for kind, steps in (("straight", None), ("streamed", 6), ("sharded", None)):
        first, second = (rank[kind] for rank in ranks[1])
        steps = steps or 2 * first["steps"]
        assert first["global_step"] == second["global_step"] == steps
        assert len(first["seen"]) == len(second["seen"]) == 2 * steps  # two accumulation steps each
        for step in range(steps):
            batches = [rank["seen"][2 * step + part] for rank in (first, second) for part in range(2)]
            assert len({len(row) for batch in batches for row in batch}) == 1
            assert all(sum(map(len, batch)) == 32 for batch in batches)
        for epoch in range(2 if kind != "streamed" else 0):
            used = [rows_of(rank["seen"][epoch * steps : (epoch + 1) * steps]) for rank in (first, second)]
            assert len(set(used[0] + used[1])) == len(used[0]) + len(used[1])  # random rows: each used once
        assert first["tokens"] == steps * 4 * 32


def test_resuming_in_a_later_epoch_goes_on_with_the_right_batches(ranks):
    for rank in ranks[1]:
        assert rank["resumed"]["seen"] == rank["straight"]["seen"][2 * rank["save"] :]
        assert rank["same"]


def one_process(data, folder, **options):
    """A trainer after the same steps with four accumulation steps, and its weights."""
    args = BucketedTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", bucket_min_length=8,
        bucket_max_length=32, bucket_cycles=2, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        learning_rate=1e-3, num_train_epochs=2, logging_steps=4, **options,
    )  # fmt: skip
    trainer = BucketedTrainer(tiny_model(), args, train_dataset=data)
    trainer.train()
    named = dict(trainer.model.named_parameters())
    return trainer, torch.cat([named[name].detach().flatten() for name in sorted(named)])


def test_two_ranks_equal_one_process(ranks, documents, tmp_path):
    """Order, counts and weights agree."""
    trainer, alone = one_process(documents, tmp_path)
    assert (torch.load(ranks[0] / "weights.pt")["adamw"] - alone).abs().max() < 1e-5
    logs = [log for log in trainer.state.log_history if "sequence_length" in log]
    for mine, theirs in zip(logs, ranks[1][0]["straight"]["logs"], strict=True):
        for name in ("sequence_length", "attention_flops"):
            assert mine[name] == pytest.approx(theirs[name])
        assert {name for name in mine if name.startswith("loss_")} == {n for n in theirs if n.startswith("loss_")}
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [("sharded", "FSDPModule"), ("fsdp1", "FullyShardedDataParallel"), ("fsdp2", "FSDPModule")],
    ids=["FSDP2 at load time", "FSDP1 of accelerate", "FSDP2 of accelerate"],
)
def test_sharded_parameters_train_alike(ranks, kind, wrapper):
    for rank in ranks[1]:
        assert wrapper in rank[kind]["wrappers"]
        assert rank[kind]["error"] < 1e-5
        assert rank[kind]["seen"] == rank["straight"]["seen"]


def test_fadam_under_fsdp2_equals_ddp_and_one_process(ranks, documents, tmp_path):
    for rank in ranks[1]:
        assert rank["fadam"]["wrappers"] == ["DistributedDataParallel"]
        assert rank["fsdp2_fadam"]["wrappers"] == ["FSDPModule"]
        assert rank["fsdp2_fadam"]["error"] < 1e-5
    _, alone = one_process(documents, tmp_path, optim="fadam")
    saved = torch.load(ranks[0] / "weights.pt")
    assert (saved["fadam"] - alone).abs().max() < 1e-5
    assert (saved["fadam"] - saved["adamw"]).abs().max() > 1e-4


def test_fadam_refuses_fsdp1_by_name(ranks):
    for rank in ranks[1]:
        assert "FSDP1's flattened shards" in rank["fsdp1_fadam"]
