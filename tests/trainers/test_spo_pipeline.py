"""SPOPipeline: all rounds with every dimension evaluated, interrupted and resumed."""

import json
import math

import pytest

pytest.importorskip("trl")
from peft import LoraConfig

from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_pipeline import REPORT_NAME, SPOPipeline, SPORound, plot_rounds

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def make(preference, output, rounds=2, **options):
    items = [
        SPORound(f"d{i}", preference.rows(16, i), preference.rows(8, 10 + i), {"beta": 0.1 * i})
        for i in range(1, rounds + 1)
    ]
    args = SPOConfig(**preference.options(output, max_steps=4))
    return SPOPipeline(preference.folder(0), items, args, processing_class=preference.tokenizer, **options)


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_every_dimension_is_evaluated_after_every_round(preference, tmp_path, kind):
    options = {"peft_config": LORA} if kind == "adapters" else {}
    records = make(preference, tmp_path, rounds=3, **options).run()
    assert [r["round"] for r in records] == [1, 2, 3]
    for number, record in enumerate(records, start=1):
        assert set(record["dimensions"]) == {"d1", "d2", "d3"}
        assert record["dimensions"][f"d{number}"]["kept"] == pytest.approx(1.0)
        assert (record["dimensions"]["d3"]["kept"] is None) == (number < 3)
        assert all(math.isfinite(d["margin"]) for d in record["dimensions"].values())
    manifest = json.loads((tmp_path / "round_3" / "spo_manifest.json").read_text())
    assert [r["beta"] for r in manifest["rounds"]] == pytest.approx([0.1, 0.2, 0.3])
    plot_rounds(records, str(tmp_path / "rounds.png"))
    assert (tmp_path / "rounds.png").stat().st_size > 1000


def test_finished_rounds_are_not_trained_again(preference, tmp_path, monkeypatch):
    whole = make(preference, tmp_path / "whole").run()
    interrupted = make(preference, tmp_path / "cut")
    train, trained = interrupted._trainer, []

    def stop_at_two(number):
        trained.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return train(number)

    monkeypatch.setattr(interrupted, "_trainer", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    again = make(preference, tmp_path / "cut")
    started, build = [], again._trainer
    monkeypatch.setattr(again, "_trainer", lambda number: started.append(number) or build(number))
    records = again.run()
    assert trained == [1, 2] and started == [2] and records == whole
    assert json.loads((tmp_path / "cut" / REPORT_NAME).read_text()) == whole


def test_bad_pipelines_are_refused(preference, tmp_path):
    args = SPOConfig(**preference.options(tmp_path))
    with pytest.raises(ValueError, match="at least one"):
        SPOPipeline("m", [], args)
    same = SPORound("a", None)
    with pytest.raises(ValueError, match="name of its own"):
        SPOPipeline("m", [same, same], args)
    with pytest.raises(ValueError, match="give a folder or hub name"):
        SPOPipeline(object(), [same], args)
    pipeline = SPOPipeline(preference.folder(0), [SPORound("a", preference.rows(4), options={"lamda": 1})], args)
    with pytest.raises(ValueError, match="'lamda'"):
        pipeline.run()
