import pytest
import torch
from torch import nn

from hf_ext import ReALLMConfig
from hf_ext.quant.linear import ReALLMLinear, quantized_layers
from hf_ext.quant.quantize import quantize_model
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import solve
from hf_ext.quant.trainable import KINDS, norms, trainable_parts
from hf_ext.testing import tiny_model

IDS = torch.arange(24)[None] % 128


def quantised(family="llama", **options):
    model = tiny_model(family)
    config = ReALLMConfig(bits=2, rank=2, **options)
    quantize_model(model, config)
    return model


def changed(parts):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts.values():
            step = 0.1 * (part.size or part.parameter.square().mean().sqrt())
            part.parameter.add_(step * torch.randn(part.parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])  # (1 + weight) norms; biases
@pytest.mark.parametrize("kinds", [KINDS, ("scales",), ("norms",), ("low_rank",)])
def test_what_is_stored_computes_what_was_trained(family, kinds):
    model = quantised(family, low_rank_bits=32, scale_bits=32)
    before = model(IDS).logits
    with trainable_parts(model, quantized_layers(model), kinds) as parts, torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
        changed(parts)
        trained = model(IDS).logits
    assert not torch.allclose(trained, before, atol=1e-4)
    torch.testing.assert_close(model(IDS).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["trellis", "identity"])
def test_a_gain_scales_a_row_of_the_decoded_weight_alone(decoder):
    generator = torch.Generator().manual_seed(0)
    weight, gain = torch.randn(20, 12, generator=generator), 1 + torch.rand(20, generator=generator)
    shape = MatrixShape(2, 4, 3, decoder=decoder, low_rank_bits=32, scale_bits=32)
    solution = solve(weight, shape)
    layer = ReALLMLinear.from_parts(solution.parts, solution.shape, 12, torch.zeros(20))
    lr_a, lr_b = (factor.double() for factor in layer.low_rank())
    expected = (layer.weight.double() - lr_b @ lr_a) * gain.double()[:, None] + lr_b @ lr_a
    layer.scale_rows(gain)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_zero_points_are_scaled_too():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    shape = MatrixShape(1, 3, codebook="uniform", affine=True, group_size=4, scale_bits=32)
    solution = solve(weight, shape)
    layer = ReALLMLinear.from_parts(solution.parts, solution.shape, 8)
    expected = layer.weight * 1.5
    layer.scale_rows(torch.full((6,), 1.5))
    torch.testing.assert_close(layer.weight, expected)


def test_nothing_changes_where_nothing_was_trained():
    model = quantised(scale_bits=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = {name: layer.shape for name, layer in quantized_layers(model).items()}
    with trainable_parts(model, quantized_layers(model), ("scales", "norms")):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert shapes == {name: layer.shape for name, layer in quantized_layers(model).items()}


def test_norms_keep_their_type_and_take_steps_too_small_for_it():
    model = quantised().bfloat16()
    with trainable_parts(model, {}, ("norms",)) as parts:
        assert {part.parameter.dtype for part in parts.values()} == {torch.float32}
        for _ in range(8):
            with torch.no_grad():
                for part in parts.values():
                    part.parameter.mul_(1 + 2**-10)  # a bfloat16 of 1 would stay 1
        model(IDS)
    assert all(norm.weight.dtype == torch.bfloat16 and (norm.weight > 1).all() for norm in norms(model).values())
    assert all(isinstance(norm.weight, nn.Parameter) for norm in norms(model).values())


def test_gradients_reach_every_part():
    model = quantised()
    expected = 3 * len(quantized_layers(model)) + len(norms(model))
    with trainable_parts(model, quantized_layers(model), KINDS) as parts:
        model(IDS).logits.square().mean().backward()
        assert all(part.parameter.grad.abs().sum() > 0 for part in parts.values())
        assert len(parts) == expected
