"""The transformer of bench/translation.py as a case of bench/accuracy.py; its accuracy is BLEU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from multi30k import Missing, bleu, sentences
from torch import Tensor, nn
from translation import PIECES, SHAPES, examples
from translator import Translator, cache_folder, pairs_of, translate, vocabulary_of

# Validation sentences that are translated: nothing is chosen by them.
MEASURED = 200
# Sentences of a batch of calibration, all of about one length.
BATCH = 32
# The example input: piece numbers at random, since an example says what noise is drawn from.
EXAMPLE = (16, 20)


class Sentences:
    """Sentences of Multi30k, with the members of ``accuracy_networks.Data``.

    ``calibration`` gives training sentences, ``right`` the BLEU of the first validation sentences,
    in percent.
    """

    dynamic_shapes: Any = SHAPES

    def __init__(self) -> None:
        try:
            self.vocabulary = vocabulary_of(cache_folder(), PIECES)
            self.train = pairs_of(self.vocabulary, "train")
            self.measured = [s for s, _ in pairs_of(self.vocabulary, "val")[:MEASURED]]
            self.wanted = sentences("val")[1][:MEASURED]
        except Missing as error:
            raise RuntimeError(str(error)) from error
        generator = torch.Generator().manual_seed(0)
        self.example: tuple[Tensor, ...] = tuple(
            torch.randint(4, len(self.vocabulary), EXAMPLE, generator=generator) for _ in range(2)
        )

    def calibration(self, seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of training sentences, sources and targets."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        some = [self.train[i] for i in order[:count].tolist()]
        some.sort(key=lambda pair: (len(pair[1]), len(pair[0])))
        return [examples(some, BATCH, first) for first in range(0, count, BATCH)]

    def answers(self, model: nn.Module) -> list[str]:
        """The translation of every sentence."""
        return [self.vocabulary.decode(row) for row in translate(model, self.measured)]

    def right(self, answers: list[str]) -> float:
        """BLEU of the answers of a model."""
        return bleu(answers, self.wanted)


def trained_translator(root: Path) -> nn.Module:
    """The network that ``bench/translation.py`` has trained.

    Raises:
        RuntimeError: it has not.
    """
    path = cache_folder() / "translator.pt"
    if not path.exists():
        raise RuntimeError("run bench/translation.py first: it trains the transformer")
    model = Translator(len(vocabulary_of(cache_folder(), PIECES)))
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()
