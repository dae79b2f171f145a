import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_ext import ReALLMConfig, ReALLMLinear
from hf_ext.quant.integrity import bits_on_disk
from hf_ext.quant.linear import quantized_layers, set_decode_mode
from hf_ext.testing import ragged_batch, tiny_model

IDS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(3))
CALIBRATED = {"calibration": IDS, "windows": 8, "window_length": 32}


@torch.no_grad()
def saved_model(path, family="llama", **overrides):
    """A tiny model each of whose matrices has a few weights far beyond the others."""
    model = tiny_model(family, **overrides)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            weight = module.weight.view(-1)
            places = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:3]
            weight[places] = weight.std() * torch.tensor([20.0, -15.0, 10.0])
    model.save_pretrained(path)
    return path


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("plain"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    load(plain, quantization_config=ReALLMConfig(bits=3, rank=2, **CALIBRATED)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "rank": 2},
        {"bits": 3, "rank": 2, "dtype": torch.bfloat16},
        {"bits": 3, "rank": 2, "dtype": torch.float16},
        {"bits": 2, "rank": 4, "low_rank_bits": 8, **CALIBRATED},
        {"bits": 2.5, "rank": 4, "decoder": "identity", **CALIBRATED},
        {"budget": 4.6, **CALIBRATED},
        {"bits": 4, "codebook": "nf4", "group_size": 16, "scale_bits": 32, "rank": 0},
        {"bits": 3, "codebook": "uniform", "affine": True, "group_size": 16, "rank": 0},
        {"bits": 3, "row_weights": True, "preset": "quality", "rounds": 2, **CALIBRATED},
    ],
)
def test_what_was_quantised_on_loading_is_what_is_loaded_again(plain, tmp_path, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    model, info = load(plain, quantization_config=ReALLMConfig(**options), dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert len(quantized_layers(model)) == 28
    fixed = options.get("codebook", "kmeans") != "kmeans"
    assert all((layer.shape.outliers == 0) == fixed for layer in quantized_layers(model).values())
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    batch = ragged_batch([9, 4])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = load(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(**batch).logits, expected)
    assert torch.equal(again.generate(**batch, max_new_tokens=8), model.generate(**batch, max_new_tokens=8))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "gpt_neox", "olmo2"])
def test_other_families(family, tmp_path):
    folder = saved_model(tmp_path / "plain", family)
    model = load(folder, quantization_config=ReALLMConfig(bits=4, rank=2, **CALIBRATED))
    reference = load(folder)
    batch = ragged_batch([9, 4])
    gap = (model(**batch).logits - reference(**batch).logits)[0].std() / reference(**batch).logits[0].std()
    assert quantized_layers(model) and gap < 0.35
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def stored_bytes(file):
    """Metadata and tensors of a file; their order in it is the library's affair."""
    with safe_open(file, framework="np") as stored:
        return stored.metadata(), {name: stored.get_tensor(name).tobytes() for name in stored.keys()}  # noqa: SIM118


def test_saving_again_gives_the_same_bytes_also_after_use(quantized, tmp_path):
    model = load(quantized)
    model(**ragged_batch([5]))
    model.to(torch.bfloat16).to(torch.float32)
    set_decode_mode(model, "once")
    model(**ragged_batch([5]))
    load(quantized).save_pretrained(tmp_path / "fresh")
    model.save_pretrained(tmp_path / "used")
    before, after = (stored_bytes(folder / "model.safetensors") for folder in (quantized, tmp_path / "fresh"))
    assert before == after
    for name, layer in quantized_layers(load(tmp_path / "used")).items():
        kept = quantized_layers(load(quantized))[name]
        assert all(torch.equal(layer.parts[part], tensor) for part, tensor in kept.parts.items())


def test_bits_are_counted_from_the_bytes_on_disk(quantized):
    bits = bits_on_disk(quantized)
    model = load(quantized)
    layers = quantized_layers(model).values()
    held = sum(part.numel() * part.element_size() for layer in layers for part in layer.parts.values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert bits["linear_bytes"] == held and bits["linear_weights"] == weights
    assert bits["linear"] == pytest.approx(
        sum(
            layer.shape.bits_per_weight(layer.out_features, layer.in_features) * layer.weight.numel()
            for layer in layers
        )
        / weights
    )
    assert bits["file_bytes"] == (quantized / "model.safetensors").stat().st_size
    assert bits["weights"] == sum(p.numel() for p in tiny_model(tie_word_embeddings=True).parameters())


def test_calibrating_lowers_the_error_of_the_outputs(plain):
    reference = load(plain)
    ids = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(9))

    def gap(**options):
        model = load(plain, quantization_config=ReALLMConfig(bits=2, rank=2, **options))
        return float((model(ids).logits - reference(ids).logits).square().mean())

    assert gap(**CALIBRATED) < 0.8 * gap()


def test_layers_can_be_left_alone(plain):
    model = load(plain, quantization_config=ReALLMConfig(modules_to_not_convert=["o_proj", "model.layers.1.mlp"]))
    kept = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert len([name for name in kept if name.endswith("o_proj")]) == 4
    assert "model.layers.1.mlp.up_proj" in kept and "lm_head" in kept
    with pytest.raises(ValueError, match="modules_to_not_convert names 'w_proj', which no module"):
        load(plain, quantization_config=ReALLMConfig(modules_to_not_convert=["w_proj"]))


def test_a_device_map_works_and_the_disk_is_refused(plain, quantized):
    expected = load(quantized)(**ragged_batch([5])).logits
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert torch.equal(load(quantized, device_map=device_map)(**ragged_batch([5])).logits, expected)
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(quantized, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_sharded_checkpoint_is_quantised_on_a_device_map(tmp_path, device_map, calibrated):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain", max_shard_size="40KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 2
    config = ReALLMConfig(bits=2, rank=2, **(CALIBRATED if calibrated else {}))
    model = load(tmp_path / "plain", quantization_config=config, device_map=device_map)
    assert model.dtype == torch.bfloat16 and len(quantized_layers(model)) == 28
    model.save_pretrained(tmp_path / "saved")
    batch = ragged_batch([9, 4])
    assert torch.equal(load(tmp_path / "saved", device_map=device_map)(**batch).logits, model(**batch).logits)


def test_dequantising_gives_a_plain_model(quantized, tmp_path):
    model = load(quantized)
    expected = model(**ragged_batch([5])).logits
    plain = model.dequantize()
    assert not quantized_layers(plain)
    torch.testing.assert_close(plain(**ragged_batch([5])).logits, expected, atol=1e-5, rtol=1e-4)
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.get("quantization_config") and not config.get("fusion_config")


def test_dequantising_in_another_type_takes_biases_along(tmp_path):
    model = load(saved_model(tmp_path, "qwen2"), quantization_config=ReALLMConfig(bits=4, rank=2))
    plain = model.dequantize(dtype=torch.bfloat16)
    layers = [module for name, module in plain.named_modules() if name.endswith("_proj")]
    assert any(layer.bias is not None for layer in layers)
    assert all(parameter.dtype == torch.bfloat16 for layer in layers for parameter in layer.parameters())


def in_a_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_a_fresh_process_gets_the_same_logits(quantized, tmp_path):
    expected = load(quantized)(IDS[:2]).logits
    torch.save({"ids": IDS[:2], "expected": expected}, tmp_path / "data.pt")
    code = f"""
import hf_ext, torch
from transformers import AutoModelForCausalLM
data = torch.load({str(tmp_path / "data.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(quantized)!r})
assert torch.equal(model(data["ids"]).logits, data["expected"])
print("equal")
"""
    result = in_a_new_process(code)
    assert "equal" in result.stdout, result.stderr


def test_a_process_without_hf_ext_refuses(quantized):
    code = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(quantized)!r})
"""
    result = in_a_new_process(code)
    assert result.returncode and "Unknown fusion type: hf_ext" in result.stderr


def copy_of(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9, 0.999])
def test_a_flipped_byte_is_noticed(quantized, tmp_path, where):
    file = copy_of(quantized, tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_truncated_file_is_noticed(quantized, tmp_path):
    file = copy_of(quantized, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.scales", "model.norm.weight"])
def test_a_missing_tensor_is_noticed(quantized, tmp_path, name):
    from safetensors.torch import load_file, save_file

    file = copy_of(quantized, tmp_path) / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=f"1 tensors are missing from the checkpoint, the first is {name}"):
        load(tmp_path)


def edited(folder, tmp_path, change):
    path = copy_of(folder, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda q: q.update(format_version=9),
            "saved in format 9 of ReALLM; this version of hf_ext reads formats 1 to 3",
        ),
        (lambda q: q.update(plan=None), "holds no plan"),
        (lambda q: q.update(shapes=[]), "does not fit the shapes"),
        (lambda q: q.update(new_option=1), "ReALLMConfig has no option 'new_option'"),
        (lambda q: q["shapes"][0].update(rates=[0, 64, 0, 0, 0, 0]), "mismatched"),
        (lambda q: q["shapes"][0].update(rates=[0, 0, 63, 0, 0, 0]), "rates of 63 columns for a matrix of 64"),
        (lambda q: q["shapes"][0].update(outliers=0), "asks for the parts .*; the checkpoint holds .*sparse_rows"),
        (lambda q: q["shapes"][0].update(outliers=9), "mismatched"),
        (lambda q: q["shapes"][0].update(rank=0), "asks for the parts .*; the checkpoint holds .*lr_a"),
    ],
)
def test_a_config_of_another_version_is_refused(quantized, tmp_path, change, sentence):
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        load(edited(quantized, tmp_path, change))


@pytest.mark.parametrize(
    "part, at, value, sentence",
    [
        ("sparse_rows", 0, 2**15 - 1, "has outliers outside it or twice in a place"),
        ("sparse_columns", 1, -1, "has outliers outside it or twice in a place"),
        ("perm", 5, 64, "is no permutation of 64 columns"),
        ("perm", slice(0, 2), 3, "is no permutation of 64 columns"),
    ],
)
def test_places_that_are_none_are_refused(quantized, tmp_path, part, at, value, sentence):
    model = load(quantized)  # saved anew with them, so every checksum is right
    model.model.layers[1].mlp.up_proj.get_buffer(part)[at] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj.*{sentence}"):
        load(tmp_path)


def test_two_outliers_in_one_place_are_refused(quantized, tmp_path):
    model = load(quantized)
    layer = model.model.layers[1].mlp.up_proj
    for part in ("sparse_rows", "sparse_columns"):
        layer.get_buffer(part)[:] = layer.get_buffer(part)[0]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="twice in a place"):
        load(tmp_path)


@pytest.fixture
def full_disk():
    """Files may not exceed so many bytes: the system itself refuses to write more."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_format_1_is_still_read(plain, tmp_path):
    """It had no trellis and no outliers: neither ``state_bits`` nor ``rates``."""
    model = load(plain, quantization_config=ReALLMConfig(bits=3, rank=2, decoder="identity", outliers=0))
    model.save_pretrained(tmp_path / "new")

    def age(saved):
        saved.update(format_version=1)
        for shape in (saved, *saved["shapes"]):
            shape.pop("state_bits")
            shape.pop("rates", None)
            shape.pop("outliers")

    (tmp_path / "old").mkdir()
    batch = ragged_batch([9, 4])
    old = load(edited(tmp_path / "new", tmp_path / "old", age))
    assert torch.equal(old(**batch).logits, model(**batch).logits)
    old.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["format_version"] == 3


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("over", [False, True])
def test_nothing_half_written_is_taken_for_whole(plain, quantized, tmp_path, full_disk, shard, over):
    if over:  # an older model lies in the folder
        config = ReALLMConfig(bits=2, rank=2)
        load(plain, quantization_config=config).save_pretrained(tmp_path, max_shard_size=shard)
    model = load(quantized)
    expected = model(IDS[:1]).logits
    full_disk(30_000)
    with pytest.raises((OSError, SafetensorError), match=r"os error 27|File too large"):
        model.save_pretrained(tmp_path, max_shard_size=shard)
    with pytest.raises((OSError, ValueError, RuntimeError)):  # no weights, a part of them, or those of the older model
        load(tmp_path)
    assert torch.equal(model(IDS[:1]).logits, expected)


def test_bad_models_and_weights_are_refused(plain, tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layer to quantise"):
        load(tmp_path / "gpt2", quantization_config=ReALLMConfig())
    broken = tiny_model()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds values that are not finite"):
        load(tmp_path / "broken", quantization_config=ReALLMConfig(**CALIBRATED))
    with pytest.raises(RuntimeError, match="conversion"):  # the host's own error, with ours in its report
        load(tmp_path / "broken", quantization_config=ReALLMConfig())
    with pytest.raises(ValueError, match="runs in float32, float16 or bfloat16"):
        load(plain, quantization_config=ReALLMConfig(), dtype=torch.float8_e4m3fn)


def test_a_config_can_be_used_again(plain):
    config = ReALLMConfig(modules_to_not_convert=["mlp"])
    first, second = (load(plain, quantization_config=config)(**ragged_batch([5])).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"bits": 0.5}, "bits must be a number from 1 to 8, got 0.5"),
        ({"bits": 2.1}, "bits must be a whole number of bits per 1 to 4 weights, got 2.1"),
        ({"bits": 3, "vector_size": 4}, "code_bits must be a whole number from 1 to 8, got 12"),
        ({"rank": -1}, "rank must be a whole number"),
        ({"budget": 3}, "budget chooses shapes by error and needs calibration"),
        ({"own_windows": -1}, "own_windows must be a whole number, at least 0, got -1"),
        ({"budget": 1, "calibration": IDS}, "budget must be from 1.5 to 16"),
        ({"preset": "slow"}, "preset must be one of fast, quality, got 'slow'"),
        ({"damping": 0}, "damping must be above 0"),
        ({"outliers": 1}, "outliers must be 0, at least 2 or None, got 1"),
        ({"outliers": "4"}, "outliers must be 0, at least 2 or None, got '4'"),
        ({"outliers": float("inf")}, "outliers must be 0, at least 2 or None, got inf"),
        ({"windows": 0}, "windows must be a whole number, at least 1"),
        ({"bit": 3}, "ReALLMConfig has no option 'bit'; allowed: bits"),
        ({"decoder": "cnn"}, "decoder must be one of"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ReALLMConfig(**options)


def test_short_calibration_leaves_the_error(plain):
    with pytest.raises(ValueError, match=r"at least \[9, 32\], got \[8, 32\]"):
        load(plain, quantization_config=ReALLMConfig(calibration=IDS, windows=9, window_length=32))


def test_loading_changes_nothing_without_the_flag(plain):
    assert not any(isinstance(module, ReALLMLinear) for module in load(plain).modules())
