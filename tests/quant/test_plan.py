import itertools

import pytest
import torch

from hf_ext.quant.plan import LATTICE, RANKS, MatrixProfile, candidates, distortion, make_plan
from hf_ext.quant.shape import MatrixShape


def profile(out=64, columns=96, energy=1.0, outliers=3):
    weights = torch.ones(columns)
    weights[:outliers] = 50.0
    return MatrixProfile(out, columns, energy, weights, outliers)


PROFILES = {"a": profile(), "b": profile(192, 96, 8.0), "c": profile(64, 200, 0.1, 0)}


def total_bits(plan):
    used = sum(PROFILES[name].nbytes(shape) for name, shape in plan.items())
    return 8 * used / sum(p.out_features * p.in_features for p in PROFILES.values())


def test_distortion_is_that_of_optimal_scalar_quantisers():
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):  # Max (1960), table I
        assert distortion(1, bits) == pytest.approx(known, rel=0.06)
    assert distortion(4, 8) < distortion(2, 4) < distortion(1, 2)  # longer vectors fill space better


@pytest.mark.parametrize("budget", [3.0, 4.0, 6.0])
def test_the_budget_is_kept_and_used(budget):
    plan = make_plan(PROFILES, MatrixShape(permute=True), budget)
    assert plan.keys() == PROFILES.keys()
    assert total_bits(plan) <= budget
    assert total_bits(plan) > 0.75 * budget or all(shape.code_bits == 8 for shape in plan.values())


def test_a_larger_budget_never_loses_more():
    losses = []
    for budget in (3.0, 3.5, 4.0, 5.0, 6.0):
        plan = make_plan(PROFILES, MatrixShape(permute=True), budget)
        losses.append(sum(PROFILES[name].loss(shape) for name, shape in plan.items()))
    assert losses == sorted(losses, reverse=True)


def test_greedy_is_near_the_best_of_all_plans():
    base = MatrixShape(permute=True)
    hulls = {name: candidates(base, found) for name, found in PROFILES.items()}
    for budget in (3.5, 4.5):
        plan = make_plan(PROFILES, base, budget)
        ours = sum(PROFILES[name].loss(shape) for name, shape in plan.items())
        every = (dict(zip(hulls, shapes, strict=True)) for shapes in itertools.product(*hulls.values()))
        best = min(
            sum(PROFILES[name].loss(shape) for name, shape in one.items())
            for one in every
            if total_bits(one) <= budget
        )
        assert best <= ours <= 1.6 * best  # three matrices only: one step is coarse


def test_candidates_lie_on_a_convex_hull():
    found = profile()
    shapes = candidates(MatrixShape(), found)
    points = [(found.nbytes(shape), found.loss(shape)) for shape in shapes]
    gains = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert all((s.vector_size, s.code_bits) in LATTICE and s.rank in RANKS for s in shapes)


def test_bytes_go_where_errors_cost_most():
    plan = make_plan({"cheap": profile(energy=0.01), "dear": profile(energy=100.0)}, MatrixShape(), 3.6)
    assert plan["dear"].bits > plan["cheap"].bits


def test_outlier_columns_earn_a_low_rank_term():
    few = candidates(MatrixShape(), MatrixProfile(512, 512, 1.0, torch.cat([torch.full((4,), 1e4), torch.ones(508)])))
    none = candidates(MatrixShape(), MatrixProfile(512, 512, 1.0, torch.ones(512)))
    assert min(shape.bits for shape in few if shape.rank >= 4) < min([9] + [s.bits for s in none if s.rank >= 4])


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match=r"A budget of 1\.5 bits per weight is too small; these layers take at least"):
        make_plan(PROFILES, MatrixShape(), 1.5)
