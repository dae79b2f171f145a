import pytest
import torch
from transformers import TrainingArguments

from hf_ext import FAdam, fadam_optimizer


def arguments(tmp_path, **options):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


def test_reads_the_hosts_arguments(tmp_path):
    args = arguments(tmp_path, learning_rate=0.25, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    assert fadam_optimizer(args) == (FAdam, {"lr": 0.25, "betas": (0.8, 0.95), "eps": 1e-6})


def test_overrides_win_over_optim_args(tmp_path):
    args = arguments(
        tmp_path, optim_args="clip=0.5, eps_mode=rms_min, optim_bits=8,fused=False,decay_cap=none,lr=1e-2"
    )
    _, options = fadam_optimizer(args, clip=2.0)
    assert options == {
        "lr": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "clip": 2.0,
        "eps_mode": "rms_min",
        "optim_bits": 8,
        "fused": False,
        "decay_cap": None,
    }


@pytest.mark.parametrize(
    ("optim_args", "overrides", "words"),
    [
        ("rank=4", {}, "FAdam has no option 'rank'; allowed: lr, betas, eps, weight_decay, eps2, clip"),
        (None, {"params": []}, "no option 'params'"),
        ("weight_decay=0.1", {}, "must not set weight_decay: the host's own weight_decay does"),
        ("betas=0.9", {}, "must not set betas: the host's own adam_beta1 and adam_beta2"),
        ("clip", {}, "must read 'option=value,option=value', got 'clip'"),
    ],
)
def test_unknown_options(tmp_path, optim_args, overrides, words):
    with pytest.raises(ValueError, match=words):
        fadam_optimizer(arguments(tmp_path, optim_args=optim_args), **overrides)


@pytest.mark.parametrize(
    ("optim_args", "words"),
    [
        ("lr=abc", "lr must be a number of at least 0, got 'abc'"),
        ("clip=x", "clip must be above 0 or None, got 'x'"),
        ("p=none", "p must be above 0, got None"),
        ("maximize=no", "maximize must be one of False, True, got 'no'"),
        ("fused=maybe", "fused must be one of False, True, None, got 'maybe'"),
    ],
)
def test_values_that_an_option_cannot_have(tmp_path, optim_args, words):
    cls, options = fadam_optimizer(arguments(tmp_path, optim_args=optim_args))
    with pytest.raises(ValueError, match=words):
        cls([torch.nn.Parameter(torch.zeros(2))], **options)
