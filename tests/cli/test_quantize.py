import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_ext.quant.quantize as module
from hf_ext.cli import main
from hf_ext.quant.linear import quantized_layers


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    return path


def arguments(folder, tmp_path, text, *more):
    calibration = ["--calibration", str(text), "--windows", "4", "--window-length", "64"]
    return ["quantize", str(folder), "--out", str(tmp_path / "out"), *calibration, *more]


def test_it_quantises_and_reports(folder, tmp_path, text, capsys):
    assert main(arguments(folder, tmp_path, text, "--budget", "6.5", "--text", str(text), "--text-windows", "1")) == 0
    assert "bits a weight in the linear layers" in capsys.readouterr().out
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    report = json.loads((out / "report.json").read_text())
    assert len(quantized_layers(model)) == len(report["layers"]) == 28
    assert report["bits"]["linear"] <= 6.5
    assert report["perplexity_before"] > 1 and report["perplexity_after"] > 1
    page = (out / "report.md").read_text()
    assert f"{report['bits']['linear']:.3f} bits a weight" in page and "| model.layers.3.mlp.down_proj |" in page
    assert "interrupted" not in page and not (tmp_path / "out.unfinished").exists()


def test_an_interrupted_run_goes_on(folder, tmp_path, text, monkeypatch):
    solved, solve = [], module.solve

    def counted(*args, **kwargs):
        if len(solved) >= 10:
            raise KeyboardInterrupt
        solved.append(1)
        return solve(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, "solve", counted)
        assert main(arguments(folder, tmp_path, text)) == 130
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.unfinished" / "layers").iterdir())) == 10
    assert main(arguments(folder, tmp_path, text, "--bits", "2")) == 1  # not the run that was begun
    solved.clear()
    monkeypatch.setattr(module, "solve", lambda *args, **kwargs: (solved.append(1), solve(*args, **kwargs))[1])
    assert main(arguments(folder, tmp_path, text)) == 0
    assert len(solved) == 18
    assert "10 of 28 layers are from a run interrupted before" in (tmp_path / "out" / "report.md").read_text()
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    assert main(arguments(folder, other, text)) == 0
    whole = AutoModelForCausalLM.from_pretrained(other / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_the_model_can_write_its_calibration_text_itself_and_does_so_once(folder, tmp_path, monkeypatch):
    own = ["--own-windows", "3", "--own-start", "7", "--window-length", "24", "--budget", "6.5"]
    command = ["quantize", str(folder), "--out", str(tmp_path / "out"), *own]
    seen, capture = [], module.capture_block_inputs

    def interrupted(model, blocks, windows):
        seen.append(windows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "capture_block_inputs", interrupted)
        assert main(command) == 130
    monkeypatch.setattr(module, "sampled_windows", None)  # the text is kept
    watched = lambda model, blocks, windows: (seen.append(windows), capture(model, blocks, windows))[1]  # noqa: E731
    monkeypatch.setattr(module, "capture_block_inputs", watched)
    assert main(command) == 0
    assert seen[0].shape == (3, 24) and (seen[0][:, 0] == 7).all()
    assert all(torch.equal(windows, seen[0]) for windows in seen[1:])
    assert "interrupted" not in (tmp_path / "out" / "report.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_text_and_the_models_own_take_turns(folder, tmp_path, text, monkeypatch):
    seen = []

    def stop(model, blocks, windows):
        seen.append(windows)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "capture_block_inputs", stop)
    main(arguments(folder, tmp_path, text, "--own-windows", "2", "--own-start", "9"))
    assert seen[0].shape == (6, 64)
    assert (seen[0][:, 0] == 9).tolist() == [False, True, False, True, False, False]


def test_mistakes_end_in_a_sentence(folder, tmp_path, text, capsys):
    (tmp_path / "out").mkdir()
    assert main(arguments(folder, tmp_path, text)) == 1
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    assert main(arguments(folder, tmp_path, text, "--bits", "11")) == 1
    assert "bits must be a number from 1 to 8, got 11" in capsys.readouterr().err
    assert main(arguments(folder, tmp_path, text, "--windows", "4000")) == 1
    assert "calibration text is too short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("room", [1_000, 60_000])  # not enough for a layer; for all layers, but not for the model
def test_a_full_disk_leaves_no_model_behind_and_loses_nothing(folder, tmp_path, text, capsys, room):
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # the system itself refuses to write more to a file
    try:
        assert main(arguments(folder, tmp_path, text)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "out.unfinished could not be written (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments(folder, tmp_path, text)) == 0
    assert len(quantized_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 28
