"""Compile a transformer: heads shrink inside, feed-forward layers as a whole.

python examples/transformer.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fxfib


class Encoder(nn.Module):
    """Two pre-norm layers over a sequence of vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2)
        )
        self.first = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.second = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """Scores for sequences [batch, steps, width]."""
        for layer in range(2):
            given = self.first[layer](sequence)
            sequence = sequence + self.attention[layer](given, given, given, need_weights=False)[0]
            hidden = nn.functional.gelu(self.up[layer](self.second[layer](sequence)))
            sequence = sequence + self.down[layer](hidden)
        return self.head(sequence.mean(1))


def main(folder: Path) -> None:
    """Compile and export."""
    torch.manual_seed(0)
    sequence = torch.randn(2, 6, 16)
    trained = Encoder().eval()
    model = fxfib.lift(trained, 1.5, (sequence,))
    small = fxfib.compile(model, 0.0, (sequence,))
    print(small.fibration)
    torch.testing.assert_close(small(sequence), trained(sequence), rtol=1e-4, atol=1e-5)
    assert small.fibration.parameters_after < small.fibration.parameters_before
    print(fxfib.export_onnx(small, folder / "encoder.onnx", (sequence,)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
