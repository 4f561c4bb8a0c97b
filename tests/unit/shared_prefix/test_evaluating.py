"""Evaluation mode, and the mode each module was in afterwards."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from prefopt_trl.shared_prefix.support import evaluating


def test_each_module_is_in_the_mode_it_was_in():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)), nn.Linear(2, 2))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert sorted(set(before)) == [False, True]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model[0](torch.ones(9)), torch.ones(9))
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("trained_before", [False, True])  # a model is loaded in evaluation mode
def test_a_gradient_passes_through_4_bit_layers_afterwards(trained_before):
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(inputs).sum().backward()
    expected, inputs.grad = inputs.grad, None
    model = nn.Sequential(nn.Dropout(), layer).train(trained_before)
    with evaluating(model), torch.no_grad():
        layer(inputs.detach())
    assert layer.training == trained_before
    model.train()
    layer(inputs).sum().backward()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(inputs.grad, expected)
