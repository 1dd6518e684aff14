"""What the translation bench is made of: pieces of words, BLEU, pad masks, loss, greedy search."""

import math
import random
from types import ModuleType

import pytest
import torch

SENTENCES = [
    "Ein Hund rennt, und ein Hund schläft.",
    "Der Hund rennt!",
    "3.5 Hunde rennen und rennen.",
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, repository) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    import multi30k
    import translator

    return multi30k, translator


def test_pieces_give_back_the_sentence(bench) -> None:
    multi30k, _ = bench
    vocabulary = multi30k.learn(SENTENCES, 60)
    assert len(vocabulary) == len(set(vocabulary.pieces)) <= 60
    assert any(piece == " Hund" for piece in vocabulary.pieces)
    for sentence in SENTENCES:
        numbers = vocabulary.encode(sentence)
        assert numbers[0] == multi30k.BEGIN and numbers[-1] == multi30k.END
        assert vocabulary.decode(numbers[1:]) == sentence
    assert multi30k.UNKNOWN in vocabulary.encode("xyz")
    # Joining is what shortens it: letters alone are more.
    assert len(vocabulary.encode(SENTENCES[0])) < len(SENTENCES[0]) - 8


def test_the_most_frequent_pair_is_joined_first(bench) -> None:
    multi30k, _ = bench
    assert multi30k.learn(["abab ab cd"], 12).merges[0] == ("a", "b")


def test_bleu(bench) -> None:
    bleu = bench[0].bleu
    reference = "the cat is on the mat ."
    assert bleu([reference], [reference]) == pytest.approx(100)
    assert bleu(["a b c d"], ["e f g h"]) == 0
    # 7 of 8 words, 5 of 7, 3 of 6 and 2 of 5 longer groups; nothing is too short.
    found = bleu(["the cat is sitting on the mat ."], ["the cat is on the mat . yes"])
    by_hand = math.exp(sum(map(math.log, (7 / 8, 5 / 7, 3 / 6, 1 / 5))) / 4)
    assert found == pytest.approx(100 * by_hand)
    # Six of eight words, all right: the brevity penalty alone.
    short = bleu(["the cat is on the mat"], ["the cat is on the mat , today"])
    assert short == pytest.approx(100 * math.exp(1 - 8 / 6))
    assert bench[0].tokens_of('He said: "3.5, no".') == [
        "He", "said", ":", '"', "3.5", ",", "no", '"', "."
    ]  # fmt: skip


def test_what_stands_in_the_pad_changes_nothing(bench) -> None:
    _, translator = bench
    torch.manual_seed(0)
    model = translator.Translator(23, width=12, heads=3, layers=1, hidden=20).eval()
    short, long = [1, 5, 7, 2], [1, 9, 8, 7, 6, 5, 2]
    together = model(translator.padded([short, long]), translator.padded([short, long]))
    for row, sentence in zip(together, (short, long), strict=True):
        alone = model(torch.tensor([sentence]), torch.tensor([sentence]))[0]
        torch.testing.assert_close(row[: len(sentence)], alone, rtol=1e-4, atol=1e-4)
    pairs = [(short, long), (long, short)]
    each = [translator.loss_of(model, [pair]) for pair in pairs]
    expected = (each[0] * (len(long) - 1) + each[1] * (len(short) - 1)) / (len(long + short) - 2)
    assert translator.loss_of(model, pairs) == pytest.approx(expected, rel=1e-4)


def test_batches_hold_every_pair_once(bench) -> None:
    _, translator = bench
    draw = random.Random(0)
    pairs = [([1] * draw.randint(2, 9), [1] * draw.randint(2, 9)) for _ in range(50)]
    for shuffle in (None, random.Random(1)):
        found = list(translator.batches(pairs, 40, shuffle))
        assert sorted(i for some in found for i in some) == list(range(50))
        assert all(
            len(some) * max(len(side) for i in some for side in pairs[i]) <= 40 for some in found
        )


def test_greedy_search_ends_where_the_sentence_does(bench) -> None:
    multi30k, translator = bench

    class Counts(torch.nn.Module):
        """Says 10, 11, ... and stops after as many as the source is long."""

        def forward(self, source, target):
            length = (source != multi30k.PAD).sum(1)
            done = target.shape[1] > length
            following = torch.where(done, multi30k.END, 9 + target.shape[1])
            return torch.nn.functional.one_hot(following, 60)[:, None].float()

    found = translator.translate(Counts(), [[5, 5, 5], [5, 5, 5, 5, 5]])
    cut = [row[: row.index(multi30k.END)] for row in found]
    assert cut == [[10, 11, 12], [10, 11, 12, 13, 14]]


def test_training_goes_on_where_it_was_interrupted(bench, tmp_path) -> None:
    _, translator = bench
    pairs = [([1, 4 + i % 7, 2], [1, 4 + i % 7, 5, 2]) for i in range(30)]
    schedule = translator.Schedule(epochs=2, pieces=40, warmup=3)
    weights = []
    for name, seconds in (("whole", 1e9), ("parts", 0.0)):
        path = tmp_path / f"{name}.pt"
        for _ in range(3):
            torch.manual_seed(0)
            model = translator.Translator(13, width=12, heads=3, layers=1, hidden=20)
            if translator.train(model, pairs, path, schedule, seconds):
                break
        assert not model.training
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=0)
