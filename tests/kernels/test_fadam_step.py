import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.kernels.fadam_step import EPS_MODES, FAdamOptions, corrected_beta2, fadam_step, stabiliser
from hf_ext.kernels.fadam_step_cpu import _library, why_not_fused
from hf_ext.kernels.native import load_native

SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 4), (70, 130)]
PATHS = ("loop", "foreach", "fused")


@pytest.fixture(autouse=True)
def _needs_compiler(request):
    if "fused" in request.node.name and not load_native("fadam_step_cpu"):
        pytest.skip("no compiler for the fused step here")


def oracle(x, g, m, f, t, o):
    """The update written from the algorithm with NumPy in float64; returns new x, m, f."""
    g = -g if o.maximize else g
    rate = o.beta2 * (1 - o.beta2 ** (t - 1)) / (1 - o.beta2**t)
    f = rate * f + (1 - rate) * g**2

    def rms(a):
        return np.sqrt(np.mean(a**2))

    def clipped(a):
        return a / max(1, rms(a) / o.clip)

    r = rms(g)
    eps = {
        "fixed": o.eps,
        "min_eps2": min(o.eps, o.eps2 * r) if r > 0 else o.eps,
        "rms_min": o.eps * min(1, r) if r > 0 else o.eps,
        "rms_max": o.eps * max(1, r),
    }[o.eps_mode]
    scale = f**o.p + max(eps ** (2 * o.p), 1e-30)
    m = o.beta1 * m + (1 - o.beta1) * clipped(g / scale)
    decay = clipped(x / scale) if f.any() else np.zeros_like(x)
    decay = np.clip(decay, -o.decay_cap, o.decay_cap)
    return x - o.lr * (m + o.weight_decay * decay), m, f


def tensors(shapes, dtype=torch.float64, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    params = [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]
    state = torch.promote_types(dtype, torch.float32)
    return params, *([torch.zeros_like(p, dtype=state) for p in params] for _ in range(2))


def gradients(shapes, t, dtype=torch.float64, scale=1e-3):
    generator = torch.Generator().manual_seed(1000 + t)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]


def run(path, options, steps=5, dtype=torch.float64, shapes=SHAPES, scale=1e-3):
    """All tensors after some steps: parameters, momenta, Fishers."""
    params, momenta, fishers = tensors(shapes, dtype)
    for t in range(1, steps + 1):
        grads = gradients(shapes, t, dtype, scale)
        fadam_step(params, grads, momenta, fishers, [t] * len(shapes), options, path=path)
    return [*params, *momenta, *fishers]


def relative_error(expected, actual):
    scale = expected.double().abs().max().clamp(min=1e-300)
    return ((expected.double() - actual.double()).abs().max() / scale).item()


@settings(deadline=None, max_examples=60)
@given(
    path=st.sampled_from(PATHS),
    lr=st.floats(1e-5, 1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    clip=st.sampled_from([0.5, 1.0, 2.0, math.inf]),
    p=st.sampled_from([0.5, 1.0, 0.75]),
    weight_decay=st.floats(0, 0.1),
    mode=st.sampled_from(EPS_MODES),
    decay_cap=st.sampled_from([math.inf, 0.5]),
    maximize=st.booleans(),
    scale=st.sampled_from([1e-9, 1e-3, 10.0]),
)
def test_equals_numpy_at_every_step(path, lr, beta1, beta2, clip, p, weight_decay, mode, decay_cap, maximize, scale):
    if path == "fused" and not load_native("fadam_step_cpu"):
        return
    options = FAdamOptions(lr, beta1, beta2, 1e-8, 0.01, clip, p, weight_decay, mode, decay_cap, maximize)
    shapes = SHAPES[:5]
    params, momenta, fishers = tensors(shapes)
    expected = [(p.numpy().copy(), np.zeros(p.shape), np.zeros(p.shape)) for p in params]
    for t in range(1, 13):
        grads = gradients(shapes, t, scale=scale)
        fadam_step(params, grads, momenta, fishers, [t] * len(shapes), options, path=path)
        for k, grad in enumerate(grads):
            expected[k] = oracle(expected[k][0], grad.numpy(), *expected[k][1:], t, options)
            for wanted, got in zip(expected[k], (params[k], momenta[k], fishers[k]), strict=True):
                tolerance = 1e-12 * max(np.abs(wanted).max(), lr)  # a sum of steps of the size of lr may cancel
                np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=tolerance)


@pytest.mark.parametrize("path", ["foreach", "fused"])
@pytest.mark.parametrize("mode", EPS_MODES)
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1e-8])
def test_paths_equal_the_loop_in_float64(path, mode, p, scale):
    options = FAdamOptions(eps_mode=mode, p=p, weight_decay=0.01)
    for expected, actual in zip(run("loop", options, scale=scale), run(path, options, scale=scale), strict=True):
        assert relative_error(expected, actual) < 1e-14


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", EPS_MODES)
def test_float32_is_close_to_float64(path, mode):
    options = FAdamOptions(eps_mode=mode, weight_decay=0.01)
    for expected, actual in zip(run("loop", options), run(path, options, dtype=torch.float32), strict=True):
        assert relative_error(expected, actual) < 2e-6


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_keeps_float32_states_and_rounds_the_parameter_once(path):
    options = FAdamOptions(lr=0.1)
    shapes = [(64, 64)]
    params, momenta, fishers = tensors(shapes, torch.bfloat16)
    before = params[0].float()
    grads = gradients(shapes, 1, torch.bfloat16)
    fadam_step(params, grads, momenta, fishers, [1], options, path=path)
    exact, m, f = oracle(
        before.double().numpy(), grads[0].double().numpy(), 0 * before.numpy(), 0 * before.numpy(), 1, options
    )
    assert momenta[0].dtype == fishers[0].dtype == torch.float32
    assert relative_error(torch.from_numpy(m), momenta[0]) < 2e-6
    assert relative_error(torch.from_numpy(f), fishers[0]) < 2e-6
    assert (params[0] == torch.from_numpy(exact).bfloat16()).float().mean() > 0.99  # the rest: ties of two roundings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-5, 1e-7])
def test_squares_of_small_half_precision_gradients_survive(dtype, scale):
    *_, fishers = (params := tensors([(50,)], dtype))
    grads = gradients([(50,)], 1, dtype, scale)
    fadam_step(*params[:1], grads, *params[1:], [1], FAdamOptions())
    assert (fishers[0] > 0).sum() == grads[0].count_nonzero() > 0


def test_fisher_is_adams_second_moment_corrected():
    param = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    adam = torch.optim.Adam([param], betas=(0.9, 0.99))
    params, momenta, fishers = tensors([(40,)])
    for t in range(1, 60):
        param.grad = gradients([(40,)], t)[0]
        adam.step()
        fadam_step(params, [param.grad], momenta, fishers, [t], FAdamOptions(beta2=0.99))
        assert relative_error(adam.state[param]["exp_avg_sq"] / (1 - 0.99**t), fishers[0]) < 1e-12


def test_first_rate_is_zero_so_the_initial_fisher_is_forgotten():
    assert corrected_beta2(0.999, 1) == 0
    assert corrected_beta2(0.999, 10**6) == pytest.approx(0.999)


@pytest.mark.parametrize("path", PATHS)
def test_first_step_is_the_sign_of_the_gradient(path):
    params, momenta, fishers = tensors([(30,)])
    before, grads = params[0].clone(), gradients([(30,)], 1)
    fadam_step(params, grads, momenta, fishers, [1], FAdamOptions(lr=0.5, eps=0, weight_decay=0), path=path)
    assert torch.allclose(params[0] - before, -0.5 * 0.1 * grads[0].sign(), atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(
    path=st.sampled_from(PATHS),
    exponents=st.lists(st.one_of(st.none(), st.integers(-30, 30)), min_size=3, max_size=3),
    mode=st.sampled_from(EPS_MODES),
    eps=st.sampled_from([0.0, 1e-8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_updates_are_finite_and_bounded_for_any_gradients(path, exponents, mode, eps, dtype):
    if path == "fused" and not load_native("fadam_step_cpu"):
        return
    o = FAdamOptions(lr=0.1, weight_decay=0.01, eps_mode=mode, eps=eps, clip=0.7)
    params, momenta, fishers = tensors([(9, 5)], dtype)
    for t, exponent in enumerate(exponents, 1):
        grads = gradients([(9, 5)], t, dtype, 0.0 if exponent is None else 10.0**exponent)
        grads[0][0] = 0  # a row without gradient
        before = params[0].clone()
        fadam_step(params, grads, momenta, fishers, [t], o, path=path)
        moved = (params[0] - before).double().square().mean().sqrt().item()
        bound = o.lr * o.clip * (1 - o.beta1**t) + o.lr * o.weight_decay * o.clip
        assert moved <= bound * 1.001
        assert params[0].isfinite().all()
        assert momenta[0].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", EPS_MODES)
def test_tensor_that_never_had_a_gradient_stays(path, mode):
    params, momenta, fishers = tensors([(6, 4), (3,)])
    before = params[0].clone()
    o = FAdamOptions(lr=0.1, weight_decay=0.1, eps_mode=mode)
    for t in (1, 2, 3):
        fadam_step(
            params, [torch.zeros(6, 4).double(), torch.ones(3).double()], momenta, fishers, [t] * 2, o, path=path
        )
    assert torch.equal(params[0], before)
    fadam_step(params, [torch.ones(6, 4).double(), torch.ones(3).double()], momenta, fishers, [4] * 2, o, path=path)
    after_first = params[0].clone()
    assert not torch.equal(after_first, before)
    fadam_step(params[:1], [torch.zeros(6, 4).double()], momenta[:1], fishers[:1], [5], o, path=path)
    assert not torch.equal(params[0], after_first)  # once touched, momentum and decay go on


@pytest.mark.parametrize("path", PATHS)
def test_scaling_all_gradients_changes_nothing_where_the_stabiliser_scales_too(path):
    o = FAdamOptions(eps=1.0, eps2=0.01, weight_decay=0)  # the bound of eps is never reached
    small, large = run(path, o, scale=1e-6), run(path, o, scale=1e-2)
    for a, b in zip(small[: len(SHAPES)], large[: len(SHAPES)], strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_decay_of_rare_rows_is_large_and_the_cap_bounds_it(path):
    moved = {}
    for cap in (math.inf, 10.0):
        params, momenta, fishers = tensors([(1000, 16)])
        before = params[0].clone()
        grads = gradients([(1000, 16)], 1)
        grads[0][7] = 0
        o = FAdamOptions(lr=1e-3, weight_decay=0.1, decay_cap=cap)
        fadam_step(params, grads, momenta, fishers, [1], o, path=path)
        moved[cap] = (params[0] - before)[7].abs().max().item() / (o.lr * o.weight_decay)
    assert moved[math.inf] > 20
    assert moved[10.0] == pytest.approx(10)


@pytest.mark.parametrize("path", PATHS)
def test_capturable_and_numbers_are_the_same(path):
    o = FAdamOptions(weight_decay=0.01)
    if path == "fused":
        with pytest.raises(RuntimeError, match="captured or compiled"):
            run(path, FAdamOptions(capturable=True))
        return
    expected = run(path, o)
    params, momenta, fishers = tensors(SHAPES)
    captured = FAdamOptions(lr=torch.tensor(1e-3, dtype=torch.float64), weight_decay=0.01, capturable=True)
    for t in range(1, 6):
        steps = [torch.tensor(float(t))] * len(SHAPES)
        fadam_step(params, gradients(SHAPES, t), momenta, fishers, steps, captured, path=path)
    for a, b in zip(expected, [*params, *momenta, *fishers], strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("mode", EPS_MODES)
def test_fused_result_does_not_depend_on_threads(mode):
    shapes, threads = [(300, 301), (40, 3)], torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run("fused", FAdamOptions(eps_mode=mode), dtype=torch.float32, shapes=shapes))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", EPS_MODES)
@pytest.mark.parametrize("scale", [1e-3, 1e-9])
def test_shards_with_summed_numbers_equal_the_whole(path, mode, scale):
    """Two halves stepped in lock step by two threads that add up their sums; one tensor is shorter than a shard."""
    import threading

    o = FAdamOptions(eps_mode=mode, weight_decay=0.01, decay_cap=3.0)
    shapes, halves = [(11, 4), (1, 4)], (slice(0, 6), slice(6, None))
    params, momenta, fishers = tensors(shapes)
    parts = [[[x[half].clone() for x in column] for column in (params, momenta, fishers)] for half in halves]
    barrier, box, errors = threading.Barrier(2), [None, None], []

    def reduce(rank, sums):
        box[rank] = sums.clone()
        barrier.wait()
        total = box[0] + box[1]
        barrier.wait()
        return total

    def work(rank, grads, t):
        try:
            x, m, f = parts[rank]
            local = [g[halves[rank]].clone() for g in grads]
            fadam_step(x, local, m, f, [t] * 2, o, path=path, totals=[44, 4], reduce=lambda sums: reduce(rank, sums))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    for t in (1, 2, 3):
        grads = gradients(shapes, t, scale=scale)
        if t == 2:
            grads[1].zero_()
        threads = [threading.Thread(target=work, args=(rank, grads, t)) for rank in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors
        fadam_step(params, grads, momenta, fishers, [t] * 2, o, path="loop")
    for k, column in enumerate((params, momenta, fishers)):
        for i, whole in enumerate(column):
            assert relative_error(whole, torch.cat([parts[0][k][i], parts[1][k][i]])) < 1e-12


def test_layouts_and_dtypes_that_the_fused_kernel_leaves_to_the_loop():
    o = FAdamOptions()
    half = tensors([(4, 4)], torch.float16)
    assert "float16" in why_not_fused(*half, o)
    turned = [[x[0].t()] for x in tensors([(4, 5)])]
    assert "contiguous" in why_not_fused(*turned, o)
    with pytest.raises(RuntimeError, match="fused FAdam step is not possible here: it takes contiguous"):
        fadam_step(turned[0], gradients([(5, 4)], 1), *turned[1:], [1], o, path="fused")
    fadam_step(turned[0], gradients([(5, 4)], 1), *turned[1:], [1], o)  # picks the loop
    assert turned[2][0].count_nonzero() == 20


def test_fused_takes_a_gradient_of_another_layout():
    grads = [gradients([(5, 4)], 1)[0].t()]
    results = []
    for path in ("loop", "fused"):
        params, momenta, fishers = tensors([(4, 5)])
        fadam_step(params, grads, momenta, fishers, [1], FAdamOptions(), path=path)
        results.append(params[0])
    assert relative_error(*results) < 1e-14


def test_fused_refuses_a_state_of_another_size():
    params, momenta, fishers = tensors([(4, 5)])
    with pytest.raises(ValueError, match="as many elements as its parameter"):
        fadam_step(params, gradients([(4, 5)], 1), momenta, [fishers[0][:3]], [1], FAdamOptions(), path="fused")


def test_unknown_path_and_no_tensors():
    fadam_step([], [], [], [], [], FAdamOptions())
    with pytest.raises(ValueError, match="'fused', 'foreach', 'loop' or None, got 'quick'"):
        run("quick", FAdamOptions())


@pytest.mark.parametrize("path", PATHS)
def test_empty_tensor(path):
    parameters = run(path, FAdamOptions(), shapes=[(0, 3), (2,)])[:2]
    assert parameters[0].shape == (0, 3)
    assert parameters[1].isfinite().all() and not torch.equal(parameters[1], tensors([(0, 3), (2,)])[0][1])


def test_not_a_number_stays_with_its_element():
    results = []
    for path in PATHS if load_native("fadam_step_cpu") else PATHS[:2]:
        params, momenta, fishers = tensors([(8,)])
        grads = gradients([(8,)], 1)
        grads[0][3] = math.nan
        fadam_step(params, grads, momenta, fishers, [1], FAdamOptions(weight_decay=0.1), path=path)
        assert params[0].isnan().tolist() == [k == 3 for k in range(8)]
        results.append(params[0].nan_to_num())
    for result in results[1:]:
        assert relative_error(results[0], result) < 1e-14


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e-3, 5.0])
@pytest.mark.parametrize("mode", EPS_MODES)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_stabiliser_of_numbers_and_of_vectors_is_the_same(mode, p, value):
    o = FAdamOptions(eps_mode=mode, p=p)
    vector = torch.as_tensor(stabiliser(o, torch.tensor([value], dtype=torch.float64)))
    assert vector.item() == pytest.approx(stabiliser(o, value), rel=1e-12)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """Nothing is built yet, and the tool chain can be spoilt."""
    for cached in (load_native, _library):
        cached.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path / "hf_ext"
    for cached in (load_native, _library):
        cached.cache_clear()


def test_without_a_compiler_the_loop_is_used_and_said_so(fresh_build, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    expected = run("loop", FAdamOptions())
    assert all(torch.equal(a, b) for a, b in zip(expected, run(None, FAdamOptions()), strict=True))
    assert "fadam_step_cpu.cpp could not be compiled" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match="its kernel could not be compiled"):
        run("fused", FAdamOptions())
    assert not list(fresh_build.iterdir())


RACE = """
import sys
from hf_ext.kernels.native import load_native
print("ready", flush=True)
sys.stdin.readline()
assert load_native("fadam_step_cpu") is not None
"""


@pytest.mark.slow
def test_fused_library_built_by_two_processes_at_once(tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    options = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", RACE], **options) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=120)
        assert process.returncode == 0
    assert len(list(Path(tmp_path, "hf_ext").iterdir())) == 1


FORK = """
import os, signal, sys, torch
from hf_ext.kernels.fadam_step import FAdamOptions, fadam_step
torch.set_num_threads(2)
def columns():
    return [[x] for x in (torch.linspace(-1, 1, 200_000), torch.linspace(1, 2, 200_000), *torch.zeros(2, 200_000))]
mine, childs = columns(), columns()
fadam_step(*mine, [1], FAdamOptions(), path="fused")  # OpenMP's threads exist now in this process
child = os.fork()
if not child:
    signal.alarm(30)
    fadam_step(*childs, [1], FAdamOptions(), path="fused")
    same = childs[0][0].numpy().tobytes() == mine[0][0].numpy().tobytes()
    os._exit(0 if same else 1)
sys.exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fused_step_in_a_forked_process():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0
