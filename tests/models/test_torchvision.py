"""Real architectures: compiled exactly, lifted and recovered.  All of them: ``bench/zoo.py``."""

import pytest
import torch
from torch import nn

import fxfib

torchvision = pytest.importorskip("torchvision")

# One of each kind: residual, depthwise with gates, shuffle, concatenation, branches, transformer.
CLASSIFIERS = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "densenet121",
)


def randomized(model: nn.Module, seed: int = 1) -> nn.Module:
    """Batch norm as after training; nothing in it is one or zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_lifted_network_comes_back_to_its_size(name):
    torch.manual_seed(0)
    model = randomized(torchvision.models.get_model(name, weights=None)).double()
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    lifted = fxfib.lift(model, 1.5, inputs)
    small = fxfib.compile(lifted, 0.0, inputs)
    size = sum(p.numel() for p in model.parameters())
    assert small.fibration.parameters_before > 1.3 * size
    assert small.fibration.parameters_after <= size
    assert small.fibration.exact_error <= 1e-9
    other = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
    assert not [r for r in small.fibration.refusals if "does not fit" in r.reason]
    assert set(small.state_dict()) == set(model.state_dict())


def test_vision_transformer_with_an_uneven_residual_stream():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24
    )
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    inputs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    size = sum(p.numel() for p in model.parameters())
    wide = fxfib.lift(model, 2.0, inputs)
    small = fxfib.compile(wide, 0.0, inputs)
    assert sum(p.numel() for p in wide.parameters()) > 2 * size
    assert small.fibration.parameters_after == size
    assert small.fibration.exact_error <= 1e-9


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large"])
def test_segmentation(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    model = randomized(model)
    inputs = torch.randn(2, 3, 64, 64)
    lifted = fxfib.lift(model, 1.5, inputs)
    small = fxfib.compile(lifted, 0.0, inputs)
    assert small.fibration.parameters_after <= sum(p.numel() for p in model.parameters())
    expected, found = model(inputs), small(inputs)
    assert list(found) == list(expected) == ["out"]
    torch.testing.assert_close(found["out"], expected["out"], rtol=1e-3, atol=1e-4)
