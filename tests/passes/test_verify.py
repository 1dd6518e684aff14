"""Outputs are compared whole."""

import torch

from fxfib.passes.verify import difference


def test_imaginary_parts_count() -> None:
    one = torch.complex(torch.ones(3), torch.ones(3))
    other = torch.complex(torch.ones(3), torch.tensor([1.0, 1.0, 4.0]))
    assert difference([one], [other]).absolute == 3.0
    assert difference([one], [one.clone()]).absolute == 0.0
