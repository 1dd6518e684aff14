"""Every form of attention: lifted, recovered, and wide where it may be."""

import attention_forms
import pytest
import torch
from attention_forms import FORMS

import fxfib


def layers(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and parameter.ndim > 1
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_lifted_form_is_recovered(name: str) -> None:
    make, widened = FORMS[name]
    torch.manual_seed(3)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    inputs = attention_forms.inputs_of(name)
    lifted = fxfib.lift(model, 1.5, inputs, seed=2)
    small = fxfib.compile(lifted, 0.0, inputs)
    assert small.fibration.exact_error < 1e-6
    assert layers(small) == layers(model)
    wider = {key for key, shape in layers(lifted).items() if shape[0] > layers(model)[key][0]}
    expected = set(widened) if "qkv" not in layers(model) else {"qkv"} & {widened[:3]}
    assert {key for key in wider if key in ("q", "k", "v", "r", "c", "qkv")} == expected
    other = tuple(torch.cat([tensor, tensor[:1].flip(-1)]) for tensor in inputs)
    torch.testing.assert_close(small(*other), model(*other), rtol=1e-4, atol=1e-5)
