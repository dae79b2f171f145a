import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext import CLAConfig
from hf_ext.cla.plan import consumers, kv_bytes_per_token, plan

FULL = "full_attention"


def sources(layers, **options):
    return list(plan(CLAConfig(**options), [FULL] * layers))


def test_figure_2_of_the_paper():
    """10 layers with CLA3: producers 0, 1, 4, 7."""
    assert sources(10, sharing_factor=3) == [0, 1, 1, 1, 4, 4, 4, 7, 7, 7]
    assert sources(10, sharing_factor=3, remainder="back") == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("uniform", [layer - layer % 2 for layer in range(20)]),
        ("keep_ends", [0, *(layer - (layer - 1) % 2 for layer in range(1, 19)), 19]),
        ("dense_front", [*range(10), *[9] * 9, 19]),
        ("dense_back", [0, 1, *[1] * 9, *range(11, 20)]),
        ("tail", [*range(10), *[9] * 10]),
    ],
)
def test_the_papers_patterns_over_20_layers(pattern, expected):
    assert sources(20, pattern=pattern) == expected


@pytest.mark.parametrize(("factor", "kv_layers"), [(1, 20), (2, 10), (3, 7), (4, 5)])
def test_bytes_of_table_1(factor, kv_layers):
    """H128-MQA of 20 layers, 16-bit: 10240 bytes a token dense, 5120 with CLA2, 3584 with CLA3, 2560 with CLA4."""
    found = sources(20, sharing_factor=factor)
    assert kv_bytes_per_token(found, [128] * 20, 2) == 2 * kv_layers * 128 * 2


PATTERNS = st.sampled_from(["uniform", "keep_ends", "dense_front", "dense_back", "tail"])


@settings(deadline=None)
@given(st.lists(st.sampled_from(["full", "sliding"]), min_size=1, max_size=40), st.integers(1, 9), PATTERNS)
def test_every_plan_is_a_valid_map_within_kinds(kinds, factor, pattern):
    factor = min(factor, len(kinds))
    found = plan(CLAConfig(sharing_factor=factor, pattern=pattern), kinds)
    assert all(found[source] == source and source <= layer for layer, source in enumerate(found))
    assert all(kinds[source] == kinds[layer] for layer, source in enumerate(found))
    if factor == 1:
        assert consumers(found) == []


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.sampled_from(["front", "back"]))
def test_uniform_keeps_exactly_ceil_of_the_layers(layers, factor, remainder):
    factor = min(factor, layers)
    assert len(set(sources(layers, sharing_factor=factor, remainder=remainder))) == -(-layers // factor)


def test_alternating_types_share_within_each_type():
    kinds = ["sliding", "full"] * 4
    assert plan(CLAConfig(), kinds) == (0, 1, 0, 1, 4, 5, 4, 5)


def test_wrong_for_this_model():
    with pytest.raises(ValueError, match="at most the number of layers, 4, got 5"):
        sources(4, sharing_factor=5)
    with pytest.raises(ValueError, match="each of the model's 4 layers, got 2"):
        sources(4, kv_source_layers=[0, 0])
    with pytest.raises(ValueError, match=r"kv_source_layers\[1\] is 0, but layer 1 \(full\) cannot read the keys"):
        plan(CLAConfig(kv_source_layers=[0, 0]), ["sliding", "full"])
