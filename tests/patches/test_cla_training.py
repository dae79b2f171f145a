import copy
import os
import warnings

import pytest
import torch
from torch import nn

from hf_ext.cla.shared import shared_layers
from hf_ext.testing import FAMILIES, assert_close, ragged_batch, tiny_model

ALL = pytest.mark.parametrize("family", FAMILIES)
CLA2 = {"cla": {"sharing_factor": 2}}


def gradients(model, **options):
    model.zero_grad()
    batch = ragged_batch([9, 7])
    loss = model(**batch, labels=batch["input_ids"], **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(expected, actual, tolerance=1e-5):
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert_close(name, gradient, actual[name], tolerance)


@ALL
@pytest.mark.parametrize("factor", [2, 3])
def test_checkpointing_is_exact(family, factor):
    model = tiny_model(family, num_hidden_layers=6, hf_ext={"cla": {"sharing_factor": factor}}).train()
    loss, expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    again, actual = gradients(model)
    assert torch.equal(loss, again)
    assert_same_gradients(expected, actual, 1e-6)


@ALL
def test_cache_does_not_change_the_loss(family):
    model = tiny_model(family, hf_ext=CLA2).train()
    with_cache, expected = gradients(model, use_cache=True)
    without, actual = gradients(model, use_cache=False)
    assert torch.equal(with_cache, without)
    assert_same_gradients(expected, actual, 1e-6)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {}])
def test_reentrant_checkpointing_is_refused(kwargs):
    model = tiny_model("llama", hf_ext=CLA2)
    with pytest.raises(ValueError, match="use_reentrant=False, got use_reentrant="):
        model.activation_checkpointing_enable(kwargs)
    tiny_model("llama").activation_checkpointing_enable(kwargs)  # a stock model keeps the host's rules


@pytest.mark.parametrize("blocked", [{1}, {2}, {1, 2}])
def test_every_consumer_reaches_its_producer(blocked):
    from hf_ext.patches import cla_sharing

    model = tiny_model("llama", num_hidden_layers=3, hf_ext={"cla": {"sharing_factor": 3}})
    _, expected = gradients(model)
    update = cla_sharing.SharedKeysAndValues.update

    def cut(self, keys, values, layer_idx, *args, **kwargs):
        keys, values = update(self, keys, values, layer_idx, *args, **kwargs)
        return (keys.detach(), values.detach()) if layer_idx in blocked else (keys, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cla_sharing.SharedKeysAndValues, "update", cut)
        _, actual = gradients(model)
    for name in ("k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        assert (expected[name] - actual[name]).norm() / expected[name].norm() > 0.05


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))


@ALL
def test_lora_on_producers_and_consumers(family):
    pytest.importorskip("peft")
    model, batch = tiny_model(family, hf_ext=CLA2), ragged_batch([9, 5])
    adapted = lora(model, target_modules="all-linear")
    loss = adapted(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(adapted.get_parameter(name).grad.abs().sum() > 0 for name in trained)
    keys = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(family, "k_proj")
    adapted_layers = {name.split("layers.")[1][0] for name in trained if f".{keys}." in name}
    producers = {str(layer) for layer in range(4) if layer not in shared_layers(model)}
    assert adapted_layers == (set("0123") if family in ("phi3", "gpt_neox") else producers)
    with torch.no_grad():
        before = adapted(**batch).logits
        assert_close("merged", before, adapted.merge_and_unload()(**batch).logits, 1e-4)


def test_lora_by_name_takes_producers_only_where_there_are_keys():
    pytest.importorskip("peft")
    adapted = lora(tiny_model("llama", hf_ext=CLA2), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert len([name for name in names if "k_proj" in name]) == 2 and len([n for n in names if "q_proj" in n]) == 4


def test_a_target_that_consumers_lack_is_explained():
    pytest.importorskip("peft")
    with pytest.raises(ValueError) as caught:
        lora(tiny_model("llama", hf_ext=CLA2), target_modules=["k_proj"], layers_to_transform=[1, 3])
    assert "Layers [1, 3] of this model make no keys and values" in caught.value.__notes__[0]


def test_an_adapter_trained_on_the_dense_model_is_reported(tmp_path):
    peft = pytest.importorskip("peft")
    lora(tiny_model("llama"), target_modules=["q_proj", "k_proj"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"4 adapter weights were dropped.*layers \[1, 3\] read those of another"):
        peft.PeftModel.from_pretrained(tiny_model("llama", hf_ext=CLA2), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama", "eager"), ("llama", "aot_eager"), ("phi3", "eager"), ("gpt_neox", "eager")],
)
def test_compiles_as_one_graph(family, backend):
    torch._dynamo.reset()
    model, ids = tiny_model(family, hf_ext=CLA2), ragged_batch([9])["input_ids"]
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_close("no grad", expected, compiled(ids, use_cache=False).logits, 1e-5)
    assert_close("grad", expected, compiled(ids, use_cache=False).logits.detach(), 1e-5)


def test_decodes_compiled_with_a_static_cache():
    from transformers import StaticCache

    torch._dynamo.reset()
    model, ids = tiny_model("llama", hf_ext=CLA2), ragged_batch([9])["input_ids"]
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    kept = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=kept)
        step = compiled(ids[:, -1:], past_key_values=kept, position_ids=torch.tensor([[8]])).logits
        assert_close("step", model(ids).logits[:, -1:], step, 1e-5)


def test_exports():
    model, ids = tiny_model("llama", hf_ext=CLA2), ragged_batch([9])["input_ids"]

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,), strict=False)
        assert_close("export", model(ids).logits, program.module()(ids), 1e-5)


def test_dispatch_over_devices_with_hooks(tmp_path):
    """Layers on disk and in memory, every module with accelerate's hooks."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = tiny_model("llama", hf_ext=CLA2), ragged_batch([9, 5])
    spread = copy.deepcopy(model)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    spread = accelerate.dispatch_model(
        spread,
        where,
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
        skip_keys=list(model._skip_keys_device_placement),
    )
    greedy = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, spread(**batch).logits)
    assert torch.equal(model.generate(**batch, **greedy), spread.generate(**batch, **greedy))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp_no_cast"])
def test_processes_train_as_one(way, processes, tmp_path):
    """The gradients that processes agree on, each with its part of a batch, are those of the whole batch here."""
    torch.multiprocessing.spawn(_train_step, (way, processes, str(tmp_path)), nprocs=processes)
    model = tiny_model("llama", hf_ext=CLA2).train()
    ids = rows_of(processes)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for rank in range(processes):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["shared"] == shared_layers(model) != {}
        assert found["sharded"] == (way != "ddp")
        assert_same_gradients(expected, found["gradients"], 1e-4)


def rows_of(processes):
    return ragged_batch([9] * (2 * processes))["input_ids"]


def _train_step(rank, way, processes, folder):
    """One process: the gradient of its two rows, written down for the parent to compare."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    import hf_ext.patches.install  # noqa: F401  (opens the seams in this process)

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        model = tiny_model("llama", hf_ext=CLA2).train()
        if way == "ddp":
            trained = nn.parallel.DistributedDataParallel(model)
        else:
            policy = MixedPrecisionPolicy(cast_forward_inputs=way == "fsdp")
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (processes,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            trained = fully_shard(model, mesh=mesh, mp_policy=policy)
        mine = rows_of(processes)[2 * rank : 2 * rank + 2]
        trained(mine, labels=mine).loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        sharded = {name for name, gradient in gradients.items() if isinstance(gradient, DTensor)}
        found = {
            "shared": shared_layers(model),
            "sharded": sharded == gradients.keys(),
            "gradients": {n: g.full_tensor() if n in sharded else g for n, g in gradients.items()},
        }
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
