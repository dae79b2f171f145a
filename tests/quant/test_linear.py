import copy
import pickle

import pytest
import torch

from hf_ext.quant.linear import ReALLMLinear, set_decode_mode
from hf_ext.quant.shape import MatrixShape
from hf_ext.quant.solve import solve

SHAPES = [
    MatrixShape(4, 8, rank=2),
    MatrixShape(2, 6, rank=2, low_rank_bits=8),
    MatrixShape(1, 4, codebook="nf4", group_size=16),
    MatrixShape(1, 3, codebook="uniform", affine=True, group_size=16),
    MatrixShape(2, 6, decoder="pointwise"),
    MatrixShape(2, 6, rank=2, decoder="context"),
]


def layer_of(shape, out=300, columns=41, bias=True):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    solution = solve(weight, shape)
    return ReALLMLinear.from_parts(
        solution.parts, solution.shape, columns, torch.linspace(-1, 1, out) if bias else None
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_every_mode_gives_the_product_with_the_weight(shape, rows):
    layer = layer_of(shape)
    x = torch.randn(2, rows, 41, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    modes = ["once"] if shape.decoder == "context" else ["on_the_fly", "once", "low_memory"]
    for mode in modes:
        layer.decode_mode = mode
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_dict_is_exactly_the_parts(shape):
    layer = layer_of(shape)
    layer(torch.zeros(1, 41))
    assert set(layer.state_dict()) == {*layer.parts, "bias"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    empty = ReALLMLinear(41, 300, layer.shape, bias=True)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 41)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_stored_parts_alone(cast):
    layer = layer_of(SHAPES[0])
    before = {name: part.clone() for name, part in layer.parts.items()}
    layer.to(cast)
    assert layer.bias.dtype == cast and layer.weight.dtype == cast
    layer.float()
    assert all(
        torch.equal(part, before[name]) and part.dtype == before[name].dtype for name, part in layer.parts.items()
    )


def test_loading_other_parts_is_noticed():
    layer, other = layer_of(SHAPES[1]), copy.deepcopy(layer_of(SHAPES[1]))
    other.qweight.random_(0, 255)
    x = torch.randn(3, 41)
    for mode in ("on_the_fly", "once", "low_memory"):
        layer.decode_mode = mode
        kept = copy.deepcopy(layer)
        kept(x)
        kept.load_state_dict(other.state_dict())
        other.decode_mode = mode
        assert torch.equal(kept(x), other(x))


@pytest.mark.parametrize("mode", ["on_the_fly", "once", "low_memory"])
def test_a_layer_in_use_can_be_copied_and_pickled(mode):
    layer, x = layer_of(SHAPES[0]), torch.randn(1, 41)
    layer.decode_mode = mode
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected) and other.qweight is not layer.qweight


def test_the_low_rank_term_can_be_exchanged():
    layer = layer_of(SHAPES[1])
    x = torch.randn(3, 41)
    lr_a, lr_b = torch.randn(5, 41), torch.randn(300, 5)
    factors = layer.low_rank()
    without = layer(x) - x @ factors[0].T @ factors[1].T
    layer.set_low_rank(lr_a, lr_b)
    torch.testing.assert_close(layer(x), without + x @ lr_a.T @ lr_b.T, atol=1e-4, rtol=1e-4)
    assert layer.shape.rank == 5
    layer.set_low_rank(None, None)
    torch.testing.assert_close(layer(x), without, atol=1e-4, rtol=1e-4)
    assert layer.low_rank() is None and layer.shape.rank == 0


def test_the_gradient_reaches_the_input_only():
    layer = layer_of(SHAPES[0])
    x = torch.randn(3, 41, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 41), atol=1e-4, rtol=1e-4)


def test_wrong_modes_are_refused():
    layer = layer_of(SHAPES[0])
    with pytest.raises(ValueError, match="decode_mode must be one of on_the_fly, once, low_memory, got 'twice'"):
        layer.decode_mode = "twice"
    with pytest.raises(ValueError, match="only decodes once"):
        layer_of(SHAPES[5]).decode_mode = "on_the_fly"
    with pytest.raises(ValueError, match="Linear has no ReALLM layers"):
        set_decode_mode(torch.nn.Linear(2, 2), "once")
    set_decode_mode(torch.nn.ModuleList([layer, layer_of(SHAPES[5])]), "low_memory")
    assert layer.decode_mode == "low_memory"


def test_a_weight_decoded_in_inference_mode_trains_later():
    layer, x = layer_of(SHAPES[0]), torch.randn(3, 41)
    layer.decode_mode = "once"
    with torch.inference_mode():
        expected = layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer(x), expected) and x.grad is not None
