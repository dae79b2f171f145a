import copy
import math
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from hf_ext import FAdam
from hf_ext.kernels.fadam_step import EPS_MODES
from hf_ext.kernels.native import load_native
from hf_ext.testing import assert_close, tiny_model

PATHS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(params=PATHS)
def path(request):
    if request.param == "fused" and not load_native("fadam_step_cpu"):
        pytest.skip("no compiler for the fused step here")
    return PATHS[request.param]


def make_params(dtype=torch.float32, shapes=((6, 5), (7,), ())):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]


def set_grads(params, t, scale=1e-2):
    generator = torch.Generator().manual_seed(100 + t)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        set_grads(params, t)
        optimizer.step()


def all_tensors(optimizer, params):
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


# Parameters after 3 steps by pytorch_optimizer 4.1.0, FAdam(lr=0.01, weight_decay=0.1, momentum_dtype=float64,
# fim_dtype=float64, clip, p), from linspace(-1, 1, 5), gradients sin(t * linspace(1, 2, 5)) * scale at t = 1, 2, 3.
GOLDEN = {
    (1.0, 0.5, 1.0): [
        -1.0011582851597405,
        -0.5015093275978795,
        -0.0018763209267663656,
        0.4974723942236589,
        0.9956939697475791,
    ],
    (2.0, 0.5, 1e-8): [
        -0.9963168958653826,
        -0.49910477986758245,
        -0.0018529231134674072,
        0.49513016875882726,
        0.9909404867225716,
    ],
    (0.5, 1.0, 1e-2): [
        -1.000760505557198,
        -0.5007953666395214,
        -0.0008672672035938622,
        0.499025508053496,
        0.9979181887597458,
    ],
}


@pytest.mark.parametrize("setting", GOLDEN)
def test_equals_the_newest_public_implementation(setting, path):
    clip, p, scale = setting
    param = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    with warnings.catch_warnings(action="ignore"):
        optimizer = FAdam([param], lr=0.01, weight_decay=0.1, clip=clip, p=p, **path)
    for t in (1, 2, 3):
        param.grad = torch.sin(t * torch.linspace(1, 2, 5, dtype=torch.float64)) * scale
        optimizer.step()
    assert torch.allclose(param, torch.tensor(GOLDEN[setting], dtype=torch.float64), rtol=0, atol=1e-14)


def test_states_take_two_tensors_and_are_made_for_what_has_a_gradient(path):
    params = make_params()
    optimizer = FAdam(params, **path)
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"step", "momentum", "fisher"}
    assert params[1] not in optimizer.state
    assert torch.equal(params[1], before)
    nbytes = sum(t.nbytes for t in optimizer.state[params[0]].values() if t.dim())
    assert nbytes == 2 * params[0].nbytes


def test_groups_with_options_of_their_own(path):
    params = make_params()
    optimizer = FAdam([{"params": params[:1], "lr": 0.0}, {"params": params[1:2], "clip": 0.5}], lr=0.1, **path)
    optimizer.add_param_group({"params": params[2:], "weight_decay": 0})
    alone = make_params()
    single = FAdam(alone[1:2], lr=0.1, clip=0.5, **path)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 3)
    for t in range(3):
        set_grads(alone, t)
        single.step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], alone[1])
    assert not torch.equal(params[2], before[2])


def test_named_parameters_and_empty_groups_and_no_gradients(path):
    model = nn.Linear(3, 2)
    optimizer = FAdam(model.named_parameters(), **path)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    FAdam([{"params": []}, {"params": model.parameters()}], **path).step()
    with pytest.raises(ValueError, match="empty parameter list"):
        FAdam([])


def test_steps_are_counted_for_each_parameter(path):
    params = make_params()
    optimizer = FAdam(params, **path)
    train(optimizer, params[:1], 2)
    train(optimizer, params, 2, start=2)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 2, 2]
    late = make_params()[1:]
    fresh = FAdam(late, **path)
    for t in (2, 3):
        set_grads([params[0].detach().clone().requires_grad_(), *late], t)
        fresh.step()
    assert torch.equal(params[1], late[0])


def test_learning_rate_as_tensor_zero_and_scheduled(path):
    tensors, numbers, still = make_params(), make_params(), make_params()
    a = FAdam(tensors, lr=torch.tensor(0.01), **path)
    b = FAdam(numbers, lr=0.01, **path)
    c = FAdam(still, lr=0, **path)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)) for o in (a, b)]
    for t in range(3):
        for params, optimizer in ((tensors, a), (numbers, b), (still, c)):
            set_grads(params, t)
            optimizer.step()
        [schedule.step() for schedule in schedules]
    for x, y, z, start in zip(tensors, numbers, still, make_params(), strict=True):
        assert_close("tensor lr", y.detach(), x.detach(), 1e-6)
        assert torch.equal(z, start)
        assert not torch.equal(y, start)


def test_changed_betas_are_read_at_every_step(path):
    params, fixed = make_params(), make_params()
    a, b = FAdam(params, betas=(0.9, 0.99), **path), FAdam(fixed, betas=(0.5, 0.99), **path)
    a.param_groups[0]["betas"] = (0.5, 0.99)
    train(a, params, 2)
    train(b, fixed, 2)
    assert all(torch.equal(x, y) for x, y in zip(params, fixed, strict=True))


def test_maximize_is_descent_of_the_negative_and_leaves_gradients_alone(path):
    up, down = make_params(), make_params()
    a, b = FAdam(up, maximize=True, **path), FAdam(down, **path)
    for t in range(3):
        set_grads(up, t)
        set_grads(down, t)
        kept = [p.grad.clone() for p in up]
        for p in down:
            p.grad.neg_()
        a.step()
        b.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(up, kept, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(up, down, strict=True))


def test_closure(path):
    param = nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = FAdam([param], lr=0.1, **path)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[0] == 13
    assert losses[-1] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("saved_by", PATHS)
@pytest.mark.parametrize("loaded_by", PATHS)
def test_resume_is_bit_identical_and_keeps_dtypes(dtype, saved_by, loaded_by, tmp_path):
    used = {saved_by, loaded_by}
    if "fused" in used and (dtype == torch.float16 or not load_native("fadam_step_cpu")):
        pytest.skip("the fused step takes no float16, or there is no compiler")
    params = make_params(dtype)
    optimizer = FAdam(params, lr=0.01, **PATHS[saved_by])
    train(optimizer, params, 5)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = FAdam(copies, lr=0.5, **PATHS[loaded_by])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    states = torch.float64 if dtype == torch.float64 else torch.float32
    for p in copies:
        assert resumed.state[p]["momentum"].dtype == resumed.state[p]["fisher"].dtype == states
    for group in resumed.param_groups:
        group.update(PATHS[saved_by])
    train(optimizer, params, 20, start=5)
    train(resumed, copies, 20, start=5)
    for x, y in zip(all_tensors(optimizer, params), all_tensors(resumed, copies), strict=True):
        assert torch.equal(x, y)


def test_load_hooks_are_honoured(path):
    params = make_params(torch.bfloat16)
    optimizer = FAdam(params, **path)
    train(optimizer, params, 2)
    other = FAdam(make_params(torch.bfloat16), **path)

    def double(_, state_dict):
        state = {k: {**v, "fisher": 2 * v["fisher"]} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(2 * optimizer.state[p]["fisher"], other.state[q]["fisher"])


def test_checkpoint_of_another_optimizer_is_refused_and_changes_nothing():
    params = make_params()
    adamw, fadam = torch.optim.AdamW(params), FAdam(params)
    train(adamw, params, 1)
    train(fadam, params, 1)
    before = copy.deepcopy(fadam.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg.*another optimizer's"):
        fadam.load_state_dict(adamw.state_dict())
    assert str(fadam.state_dict()) == str(before)


def test_checkpoint_of_another_shape_is_refused(path):
    saved, params = make_params(shapes=((3, 4),)), make_params(shapes=((4, 3),))
    optimizer = FAdam(saved, **path)
    train(optimizer, saved, 1)
    with pytest.raises(ValueError, match=r"saved momentum of parameter 0 has shape \[3, 4\], the parameter \[4, 3\]"):
        FAdam(params, **path).load_state_dict(optimizer.state_dict())


def test_autograd_notices_that_parameters_have_changed(path):
    param = nn.Parameter(torch.ones(3))
    optimizer = FAdam([param], **path)
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_options_missing_in_an_older_checkpoint_take_the_value_of_this_optimizer():
    params = make_params()
    optimizer = FAdam(params)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    for name in ("decay_cap", "optim_bits", "fused"):
        del saved["param_groups"][0][name]
    other = FAdam(params, decay_cap=3.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["decay_cap"] == 3.0
    assert other.param_groups[0]["optim_bits"] == 32


def test_pickle_and_deepcopy_go_on_alike(path):
    params = make_params()
    optimizer = FAdam(params, **path)
    train(optimizer, params, 2)
    twins = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    train(optimizer, params, 2, start=2)
    for twin in twins:
        own = twin.param_groups[0]["params"]
        train(twin, own, 2, start=2)
        assert all(torch.equal(x, y) for x, y in zip(params, own, strict=True))


@pytest.mark.parametrize("mode", EPS_MODES)
def test_lora_at_step_one_is_finite(mode, path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    optimizer = FAdam(params, lr=0.01, eps_mode=mode, **path)
    ids = torch.randint(0, 128, (2, 8))
    for step in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
        moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert all(moved) if step else any(moved)


def test_half_precision_scaler_skips_the_step_of_an_overflow(path):
    param = nn.Parameter(torch.ones(4))
    optimizer = FAdam([param], lr=0.1, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[param]["step"] == 2
    assert param.isfinite().all()
    plain = nn.Parameter(torch.ones(4))
    unscaled = FAdam([plain], lr=0.1, **path)
    for _ in range(2):
        plain.grad = torch.ones(4)
        unscaled.step()
    assert torch.equal(param, plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled_step_is_one_graph_and_equal(foreach):
    params, eager = make_params(), make_params()
    optimizer = FAdam(params, capturable=True, foreach=foreach, weight_decay=0.01)
    reference = FAdam(eager, foreach=foreach, weight_decay=0.01)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    for t in range(6):
        set_grads(params, t)
        set_grads(eager, t)
        step()
        reference.step()
    assert counter["stats"]["unique_graphs"] <= 2  # a second one once the states exist
    for x, y in zip(params, eager, strict=True):
        assert_close("compiled", y.detach(), x.detach(), 1e-5)


def test_capturable_keeps_the_count_on_the_device_and_refuses_the_fused_step():
    params = make_params()
    optimizer = FAdam(params, capturable=True)
    train(optimizer, params, 2)
    assert optimizer.state[params[0]]["step"].device == params[0].device
    with pytest.raises(ValueError, match="capturable=True forbids"):
        FAdam(params, capturable=True, fused=True)


def test_impossible_fused_step_changes_nothing():
    params = make_params(torch.float16)
    optimizer = FAdam(params, fused=True)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"fused FAdam step is not possible here: it takes float32, bfloat16"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": torch.ones(2)}, r"one element, got shape \[2\]"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two"),
        ({"betas": (0.9, torch.ones(2))}, "betas must be two"),
        ({"eps": -1e-8}, "eps must be"),
        ({"eps2": -0.1}, "eps2 must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"clip": 0.0}, "clip must be above 0 or None, got 0.0"),
        ({"clip": math.inf}, "clip must be above 0 or None, got inf"),
        ({"betas": 0.9}, "betas must be two"),
        ({"maximize": 1}, "maximize must be one of False, True, got 1"),
        ({"decay_cap": -1.0}, "decay_cap must be above 0 or None"),
        ({"clip": None}, "clip=None leaves the preconditioned decay without a bound"),
        ({"p": 0}, "p must be above 0, got 0"),
        ({"eps_mode": "v2"}, "eps_mode must be one of fixed, min_eps2, rms_min, rms_max, got 'v2'"),
        ({"optim_bits": 4}, "optim_bits must be 8 or 32, got 4"),
        ({"min_8bit_size": -1}, "min_8bit_size must be an integer of at least 0, got -1"),
        ({"foreach": True, "fused": True}, "cannot both be True"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        FAdam(make_params(), **options)
    optimizer = FAdam(make_params())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": make_params(), **options})
    assert len(optimizer.param_groups) == 1


def test_complex_and_integer_parameters_are_refused():
    for param in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="real floating-point parameters, got"):
            FAdam([param])


def test_rows_that_are_never_seen_stay_finite_without_a_clip(path):
    table = nn.Embedding(20, 8)
    optimizer = FAdam(table.parameters(), lr=0.01, clip=None, decay_cap=10.0, **path)
    before = table.weight[5:].detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        table(torch.arange(5)).square().sum().backward()
        optimizer.step()
    moved = (table.weight[5:] - before).abs().max()
    assert 0 < moved <= 50 * 0.01 * 1e-3 * 10 * 1.001


def test_sparse_gradients_are_refused_before_anything_changes(path):
    table = nn.Embedding(10, 4, sparse=True)
    dense = nn.Linear(4, 1)
    optimizer = FAdam([{"params": dense.parameters()}, {"params": table.parameters()}], **path)
    dense(table(torch.tensor([1, 2]))).sum().backward()
    before = dense.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)


def test_decay_meant_for_adamw_is_warned_of():
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 is strong for FAdam"):
        FAdam(make_params(), weight_decay=0.1)
    with warnings.catch_warnings(action="error"):
        FAdam(make_params(), weight_decay=0.01)


def test_parameters_replaced_by_deepspeed_are_refused(monkeypatch):
    params = make_params()
    optimizer = FAdam(params)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(RuntimeError, match="DeepSpeed has replaced the parameters"):
        optimizer.step()
    train(FAdam([flat]), [flat], 1)  # an optimizer built with that tensor is meant to have it


def test_mixed_dtypes_in_one_group(path):
    params = [*make_params(), *make_params(torch.bfloat16), *make_params(torch.float64)]
    optimizer = FAdam(params, **path)
    train(optimizer, params, 3)
    alone = make_params(torch.bfloat16)
    single = FAdam(alone, **path)
    generator_matched = params[3:6]
    for t in range(3):
        generator = torch.Generator().manual_seed(100 + t)
        grads = [(torch.randn(p.shape, generator=generator) * 1e-2).to(p.dtype) for p in params]
        for p, grad in zip(alone, grads[3:6], strict=True):
            p.grad = grad
        single.step()
    assert all(torch.equal(x, y) for x, y in zip(alone, generator_matched, strict=True))
