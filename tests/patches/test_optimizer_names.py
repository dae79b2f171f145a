import pickle

import pytest
from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_ext
from hf_ext import FAdam
from hf_ext.patches.optimizer_names import add_name
from hf_ext.patches.patch import Patch


def test_name_is_a_member_like_the_others(tmp_path):
    args = TrainingArguments(str(tmp_path), optim="fadam", use_cpu=True, report_to=[])
    assert args.optim is OptimizerNames.FADAM is OptimizerNames("fadam") is OptimizerNames["FADAM"]
    assert args.optim == "fadam"
    assert repr(args.optim) == "<OptimizerNames.FADAM: 'fadam'>"
    assert list(OptimizerNames)[-1] is args.optim
    assert pickle.loads(pickle.dumps(args.optim)) is args.optim
    assert args.to_dict()["optim"] == "fadam"


def test_uninstall_leaves_no_trace_and_install_brings_it_back(tmp_path):
    saved = pickle.dumps(OptimizerNames("fadam"))
    names = [*OptimizerNames.__members__]
    hf_ext.uninstall()
    try:
        assert [*OptimizerNames.__members__] == names[:-1]
        assert "fadam" not in OptimizerNames._value2member_map_
        assert "FADAM" not in vars(OptimizerNames)
        assert "fadam" not in _OPTIMIZER_HANDLERS
        with pytest.raises(ValueError, match="fadam is not a valid OptimizerNames"):
            TrainingArguments(str(tmp_path), optim="fadam", use_cpu=True)
        with pytest.raises(ValueError, match="fadam is not a valid OptimizerNames"):
            pickle.loads(saved)
    finally:
        hf_ext.install()
    assert [*OptimizerNames.__members__] == names


def test_name_that_exists_already_is_not_taken_over():
    """Contract with transformers 5.23: a string enum without the name."""
    from transformers import training_args

    with pytest.raises(RuntimeError, match="not the enum this patch was written for"):
        add_name(training_args, Patch("again"))


def test_trainer_builds_it_with_optim_args(tmp_path):
    from transformers import Trainer

    args = TrainingArguments(
        str(tmp_path), optim="fadam", optim_args="clip=0.5", learning_rate=0.125, use_cpu=True, report_to=[]
    )
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is FAdam
    assert options == {"lr": 0.125, "betas": (0.9, 0.999), "eps": 1e-8, "clip": 0.5}
