"""Multi30k, German to English: sentences, a byte-pair vocabulary learned from them, BLEU."""

from __future__ import annotations

import gzip
import heapq
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PAD, BEGIN, END, UNKNOWN = range(4)
# A word takes the space before it along, so that joining the pieces gives back the sentence.
_WORDS = re.compile(r" ?\w+| ?[^\w\s]+")
# Punctuation and symbols stand alone for BLEU, but for dots and commas between digits.
_SYMBOLS = re.compile(r"([^\w\s.,])|((?<!\d)[.,])|([.,](?!\d))")


class Missing(Exception):
    """The data is not on this machine."""


def sentences(split: str) -> tuple[list[str], list[str]]:
    """German and English of ``train``, ``val`` or ``test_2016_flickr``.

    Raises:
        Missing: ``FXFIB_DATA`` is not set, or does not hold ``multi30k``.
    """
    root = os.environ.get("FXFIB_DATA")
    if not root:
        raise Missing("FXFIB_DATA is not set: it names the folder that holds multi30k/")
    found = []
    for language in ("de", "en"):
        path = Path(root, "multi30k", f"{split}.{language}.gz")
        if not path.exists():
            raise Missing(f"there is no {path}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found.append([" ".join(line.split()) for line in file])
    german, english = found
    assert len(german) == len(english)
    return german, english


@dataclass
class Vocabulary:
    """Byte-pair pieces: ``merges`` in the order in which they are made, ``pieces`` by number."""

    merges: list[tuple[str, str]]
    pieces: list[str]

    def __post_init__(self) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self.known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, sentence: str) -> list[int]:
        """Numbers of the pieces, with ``BEGIN`` and ``END`` around them."""
        found = [BEGIN]
        for word in _WORDS.findall(" " + sentence):
            if word not in self.known:
                pieces = self.split(word)
                self.known[word] = [self.numbers.get(piece, UNKNOWN) for piece in pieces]
            found += self.known[word]
        return [*found, END]

    def split(self, word: str) -> list[str]:
        """A word cut into pieces: the earliest merge first."""
        pieces = list(word)
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            pieces = _joined(pieces, best)
        return pieces

    def decode(self, numbers: Iterable[int]) -> str:
        """A sentence again; what comes after ``END`` is dropped."""
        text = []
        for number in numbers:
            if number == END:
                break
            if number > UNKNOWN:
                text.append(self.pieces[number])
        return "".join(text).strip()

    def save(self, path: Path) -> None:
        """As JSON."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"merges": self.merges, "pieces": self.pieces}))
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """What ``save`` wrote."""
        data = json.loads(path.read_text())
        return cls([tuple(pair) for pair in data["merges"]], data["pieces"])


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    place = 0
    while place < len(pieces):
        if tuple(pieces[place : place + 2]) == pair:
            found.append(pieces[place] + pieces[place + 1])
            place += 2
        else:
            found.append(pieces[place])
            place += 1
    return found


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """Joins the most frequent pair of pieces until there are ``size`` of them."""
    counts = Counter(word for text in texts for word in _WORDS.findall(" " + text))
    words = [(list(word), count) for word, count in sorted(counts.items())]
    pieces = ["<pad>", "<begin>", "<end>", "<unknown>"]
    pieces += sorted({letter for word, _ in words for letter in word})
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = {}
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += count
            places.setdefault(pair, set()).add(index)
    # Counts in the heap may be out of date: an entry holds only if its count still does.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while len(pieces) < size and heap:
        count, best = heapq.heappop(heap)
        if pairs[best] != -count:
            continue
        if count > -2:
            break
        merges.append(best)
        pieces.append("".join(best))
        changed = set()
        for index in places.pop(best):
            word, times = words[index]
            joined = _joined(word, best)
            words[index] = (joined, times)
            for pair in pairwise(word):
                pairs[pair] -= times
                changed.add(pair)
            for pair in pairwise(joined):
                pairs[pair] += times
                places.setdefault(pair, set()).add(index)
                changed.add(pair)
        changed.discard(best)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return Vocabulary(merges, pieces)


def tokens_of(sentence: str) -> list[str]:
    """Words and symbols, as BLEU counts them (case kept)."""
    return _SYMBOLS.sub(lambda found: f" {found[0]} ", sentence).split()


def bleu(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in percent: 4-grams, one reference, brevity penalty, no smoothing."""
    matches, totals = [0] * 4, [0] * 4
    ours = theirs = 0
    for candidate, reference in zip(candidates, references, strict=True):
        words, wanted = tokens_of(candidate), tokens_of(reference)
        ours += len(words)
        theirs += len(wanted)
        for n in range(4):
            found = Counter(zip(*[words[k:] for k in range(n + 1)], strict=False))
            known = Counter(zip(*[wanted[k:] for k in range(n + 1)], strict=False))
            matches[n] += (found & known).total()
            totals[n] += found.total()
    if min(matches) == 0:
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - theirs / ours))
