import pytest

from hf_ext import CLAConfig, HfExtConfig


def test_default_is_the_papers_recommendation():
    assert CLAConfig().to_dict() == {
        "sharing_factor": 2,
        "pattern": "uniform",
        "remainder": "front",
        "kv_source_layers": None,
        "separate_kv_norm": False,
    }


@pytest.mark.parametrize("options", [{}, {"sharing_factor": 3, "pattern": "tail"}, {"kv_source_layers": [0, 0, 2]}])
def test_flag_round_trip(options):
    flags = HfExtConfig(cla=options)
    assert HfExtConfig.from_dict(flags.to_dict()) == flags


@pytest.mark.parametrize("factor", [0, -1, 1.5, True, "2"])
def test_factor_must_be_a_whole_number(factor):
    with pytest.raises(ValueError, match=r"sharing_factor must be a whole number of at least 1, got"):
        CLAConfig(sharing_factor=factor)


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([1, 1], r"kv_source_layers\[0\] must be a layer from 0 to 0, got 1"),
        ([0, -1], r"kv_source_layers\[1\] must be a layer from 0 to 1, got -1"),
        ([0, 0, 1], r"layer 1 reads those of layer 0 and has none of its own; name layer 0"),
        ([], r"one for every layer, got \[\]"),
        ([0, "0"], r"must be a list of layer numbers"),
        ("00", r"must be a list of layer numbers"),
        ([0, False], r"must be a list of layer numbers"),
    ],
)
def test_wrong_maps(sources, sentence):
    with pytest.raises(ValueError, match=sentence):
        CLAConfig(kv_source_layers=sources)


@pytest.mark.parametrize("other", [{"sharing_factor": 2}, {"pattern": "tail"}])
def test_map_excludes_pattern(other):
    with pytest.raises(ValueError, match="not both"):
        CLAConfig(kv_source_layers=(0, 0), **other)


@pytest.mark.parametrize(
    "wrong", [{"pattern": "sandwich"}, {"remainder": "middle"}, {"separate_kv_norm": 1}, {"factor": 2}]
)
def test_unknown_choices(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CLAConfig.from_dict(wrong)
