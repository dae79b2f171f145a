import pytest
import torch

from hf_ext.quant.calibration import (
    Moments,
    calibration_windows,
    capture_block_inputs,
    find_blocks,
    in_turn,
    output_gradients,
    sampled_windows,
)
from hf_ext.testing import tiny_model


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text, **kwargs):
        return type("Batch", (), {"input_ids": torch.tensor([list(text.encode())])})


def test_text_becomes_windows_spread_over_the_whole(tmp_path):
    text = "".join(chr(65 + number // 10) for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    windows = calibration_windows(tmp_path / "a.txt", Bytes(), 4, 20)
    assert windows.shape == (4, 20)
    assert [int(window[0]) - 65 for window in windows] == [0, 5, 10, 15]
    assert torch.equal(calibration_windows(tmp_path, Bytes(), 4, 20), windows)
    assert torch.equal(calibration_windows([text], Bytes(), 4, 20), windows)
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"text": [text]})
    assert torch.equal(calibration_windows(dataset, Bytes(), 4, 20), windows)
    assert torch.equal(calibration_windows(windows, None, 2, 10), windows[:2, :10])


def test_what_is_no_calibration_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too short: 4 windows of 20 tokens need 80 tokens, got 5"):
        calibration_windows(["hello"], Bytes(), 4, 20)
    with pytest.raises(ValueError, match=r"at least \[4, 20\], got \[2, 30\]"):
        calibration_windows(torch.zeros(2, 30), None, 4, 20)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_windows(["hello"], None, 4, 20)
    with pytest.raises(ValueError, match="got int"):
        calibration_windows(3, Bytes(), 4, 20)
    with pytest.raises(ValueError, match=r"no \*\.txt file"):
        calibration_windows(tmp_path, Bytes(), 4, 20)
    with pytest.raises(OSError):
        calibration_windows(tmp_path / "none.txt", Bytes(), 4, 20)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "phi3"])
def test_blocks_run_one_by_one_give_the_whole_model(family):
    model = tiny_model(family)
    windows = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    path, blocks = find_blocks(model)
    assert len(blocks) == 4 and model.get_submodule(path) is blocks
    stream = capture_block_inputs(model, blocks, windows)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            stream.run(block, index, keep=True)
        seen = []
        hook = blocks[-1].register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
        model(input_ids=windows, use_cache=False)
        hook.remove()
    torch.testing.assert_close(torch.cat(stream.hidden), seen[0], atol=1e-5, rtol=1e-5)


def test_moments_are_those_of_the_inputs():
    model = tiny_model()
    windows = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    attention = model.model.layers[1].self_attn
    layers = {name: attention.get_submodule(name) for name in ("q_proj", "k_proj", "o_proj")}
    seen = []
    hook = attention.k_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moments = Moments()
    with torch.no_grad(), moments.watching(layers):
        model(windows[:1])
        model(windows[1:])
    hook.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()
    torch.testing.assert_close(moments.hessian("k_proj").double(), x.T @ x / 24, atol=1e-4, rtol=1e-4)
    assert torch.equal(moments.hessian("q_proj"), moments.hessian("k_proj"))
    assert moments.hessian("v_proj") is None


def test_an_input_shared_once_need_not_be_shared_later():
    x, y, moments = torch.randn(5, 3), torch.randn(4, 3), Moments()
    for name, seen in (("a", x), ("b", x), ("a", x.clone()), ("b", y)):
        moments.add(name, seen)
    torch.testing.assert_close(moments.hessian("a"), x.T @ x / 5)
    torch.testing.assert_close(moments.hessian("b"), (x.T @ x + y.T @ y) / 9)


def test_output_gradients_are_those_of_the_loss_and_leave_the_model_alone():
    model = tiny_model()
    windows = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    layers = {"up": model.model.layers[2].mlp.up_proj}
    found = output_gradients(model, layers, windows)["up"]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    total = torch.zeros(96, dtype=torch.float64)
    for window in windows:
        kept = []
        hook = layers["up"].register_forward_hook(lambda m, i, output, kept=kept: kept.append(output))
        logits = model(window[None]).logits[0, :-1]
        hook.remove()
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        total += torch.autograd.grad(loss, kept[0])[0][0].double().square().sum(0)
    torch.testing.assert_close(found.double(), total / 20, rtol=1e-4, atol=1e-8)


def test_sampled_windows_follow_the_models_own_distribution():
    model = tiny_model()
    windows = sampled_windows(model, 6000, 2, start=5, seed=1)
    assert windows.shape == (6000, 2) and (windows[:, 0] == 5).all()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)
    found = torch.bincount(windows[:, 1], minlength=len(expected)) / 6000
    assert (found - expected).abs().sum() / 2 < 0.1  # 128 tokens: about 0.055 by chance
    assert torch.equal(windows[:8], sampled_windows(model, 6000, 2, start=5, seed=1)[:8])
    assert sampled_windows(model, 3, 20).shape == (3, 20)  # no token ends a window


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        find_blocks(torch.nn.Linear(2, 2))


def test_two_kinds_of_windows_take_turns_and_the_rest_comes_last():
    first, second = torch.arange(3)[:, None].expand(3, 2), 10 + torch.arange(5)[:, None].expand(5, 2)
    assert in_turn(first, second)[:, 0].tolist() == [0, 10, 1, 11, 2, 12, 13, 14]
    assert in_turn(second, first)[:, 0].tolist() == [10, 0, 11, 1, 12, 2, 13, 14]
