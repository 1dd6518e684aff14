"""Compile an LSTM: the result is an LSTM again, with a smaller hidden size.

python examples/recurrent_model.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fxfib


class Tagger(nn.Module):
    """A label for every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 12)
        self.lstm = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores for tokens [batch, steps]."""
        return self.head(self.lstm(self.table(tokens))[0])


def main(folder: Path) -> None:
    """Compile, train on, export."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 7))
    trained = Tagger().eval()
    model = fxfib.lift(trained, 1.5, (tokens,))
    small = fxfib.compile(model, 0.0, (tokens,))
    print(small.fibration)
    print(f"hidden size {model.lstm.hidden_size} -> {small.lstm.hidden_size}")
    assert small.lstm.hidden_size == trained.lstm.hidden_size
    torch.testing.assert_close(small(tokens), trained(tokens), rtol=1e-4, atol=1e-5)

    # It is an ordinary module: it trains.
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = loss = nn.functional.cross_entropy(small(tokens).flatten(0, 1), tokens.flatten() % 5)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(tokens).flatten(0, 1), tokens.flatten() % 5)
        loss.backward()
        optimizer.step()
    print(f"loss {before.item():.3f} -> {loss.item():.3f}")
    assert loss < before

    print(fxfib.export_onnx(small.eval(), folder / "tagger.onnx", (tokens,)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
