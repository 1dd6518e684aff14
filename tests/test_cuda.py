"""What is different on a GPU; skipped without one."""

import pytest
import torch
from torch import nn

import fxfib

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_convolutions_that_round_their_operands_are_no_difference() -> None:
    """torch's default: TF32 in cuDNN.  It stays as the user has it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = model.eval().cuda()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    before = torch.backends.cudnn.allow_tf32
    assert before, "torch's default has changed"
    wide = fxfib.lift(model, 1.5, (images,))
    small = fxfib.compile(wide, 0.0, (images,))
    assert torch.backends.cudnn.allow_tf32 == before
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == count
    assert all(p.is_cuda for p in small.parameters())
    backend = fxfib.backend(inner="eager")
    with torch.no_grad():
        found = torch.compile(wide, backend=backend)(images)
        torch.testing.assert_close(found, model(images), rtol=1e-2, atol=1e-2)
    assert [graph.note for graph in backend.graphs] == [""]
