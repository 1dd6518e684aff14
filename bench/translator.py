"""A small translation network and how it is trained and asked; ``bench/translation.py`` runs it."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from multi30k import BEGIN, END, PAD, Vocabulary, learn, sentences
from torch import Tensor, nn
from tqdm import tqdm

LONGEST = 96
Pair = tuple[list[int], list[int]]


class Translator(nn.Module):
    """Pre-norm encoder and decoder; one table for both languages and for the output.

    ``forward`` takes piece numbers int64 ``[batch, source]`` and ``[batch, target]`` (``PAD`` after
    the last) and gives logits ``[batch, target, vocabulary]``.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        hidden: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.positions = nn.Parameter(torch.randn(LONGEST, width) * 0.1)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"dropout": dropout, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, hidden, **options),
            layers, nn.LayerNorm(width), enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, hidden, **options), layers, nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def look_up(self, numbers: Tensor) -> Tensor:
        """Rows of the table and of the positions."""
        scale = math.sqrt(self.embed.embedding_dim)
        return self.dropout(self.embed(numbers) * scale + self.positions[: numbers.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the next piece, at every place of the target."""
        pad = source == PAD
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        memory = self.encoder(self.look_up(source), src_key_padding_mask=pad)
        found = self.decoder(
            self.look_up(target), memory,
            tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=pad,
        )  # fmt: skip
        return self.head(found)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """One row a sentence, filled up with ``PAD``."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def batches(pairs: Sequence[Pair], size: int, shuffle: random.Random | None) -> Iterator[list[int]]:
    """Numbers of pairs of about one length, about ``size`` pieces a side together."""
    order = list(range(len(pairs)))
    if shuffle is not None:
        shuffle.shuffle(order)
    order.sort(key=lambda i: (len(pairs[i][1]) // 2, len(pairs[i][0]) // 2))
    found, some, longest = [], [], 0
    for i in order:
        longest = max(longest, *map(len, pairs[i]))
        if some and longest * (len(some) + 1) > size:
            found.append(some)
            some, longest = [], max(map(len, pairs[i]))
        some.append(i)
    found.append(some)
    if shuffle is not None:
        shuffle.shuffle(found)
    yield from found


def cache_folder() -> Path:
    """Where what was trained is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "fxfib", "translation")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def vocabulary_of(folder: Path, size: int) -> Vocabulary:
    """Learned from both sides of the training text alone, once."""
    path = folder / f"pieces{size}.json"
    if not path.exists():
        german, english = sentences("train")
        learn([*german, *english], size).save(path)
    return Vocabulary.load(path)


def pairs_of(vocabulary: Vocabulary, split: str) -> list[Pair]:
    german, english = sentences(split)
    coded = zip(map(vocabulary.encode, german), map(vocabulary.encode, english), strict=True)
    return [pair for pair in coded if split != "train" or max(map(len, pair)) <= LONGEST]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam, linear warm-up, then down along a cosine."""

    epochs: int = 8
    pieces: int = 2000
    rate: float = 2e-3
    warmup: int = 600
    smoothing: float = 0.1

    def factor(self, step: int, total: int) -> float:
        """Of the rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(total - self.warmup, 1)))


def train(
    model: Translator, pairs: Sequence[Pair], path: Path, schedule: Schedule, seconds: float
) -> bool:
    """Train until done, or for about ``seconds``; goes on from ``path``.  True: it is done."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    epoch = step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step = state["epoch"], state["step"]
    total = schedule.epochs * len(list(batches(pairs, schedule.pieces, random.Random(0))))
    bar = tqdm(total=total, initial=step, desc="train", disable=None)
    start = time.monotonic()
    model.train()
    while epoch < schedule.epochs:
        # Every epoch starts from its own number, so an interrupted run goes on as if it had not.
        torch.manual_seed(epoch)
        losses = []
        for some in batches(pairs, schedule.pieces, random.Random(epoch)):
            source = padded([pairs[i][0] for i in some])
            target = padded([pairs[i][1] for i in some])
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * schedule.factor(step, total)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(source, target[:, :-1])
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), target[:, 1:].flatten(),
                ignore_index=PAD, label_smoothing=schedule.smoothing,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
            bar.update()
            bar.set_postfix_str(f"epoch {epoch}, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
        epoch += 1
        part = path.with_suffix(".part")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "epoch": epoch, "step": step},
            part,
        )  # fmt: skip
        part.replace(path)
        tqdm.write(f"epoch {epoch}: training loss {sum(losses) / len(losses):.3f}")
        if time.monotonic() - start > seconds:
            break
    bar.close()
    model.eval()
    return epoch >= schedule.epochs


@torch.no_grad()
def loss_of(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """Mean cross entropy of a piece (nats), every target piece counted once."""
    total, count = 0.0, 0
    for some in batches(pairs, 4000, None):
        source, target = (padded([pairs[i][side] for i in some]) for side in (0, 1))
        logits = model(source, target[:, :-1])
        wanted = target[:, 1:]
        total += float(
            F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum"
            )
        )
        count += int((wanted != PAD).sum())
    return total / count


@torch.no_grad()
def translate(model: nn.Module, sources: Sequence[list[int]]) -> list[list[int]]:
    """The most likely next piece, again and again, until every sentence of a batch has ended."""
    found: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    parts = [order[k : k + 100] for k in range(0, len(order), 100)]
    for some in tqdm(parts, desc="translate", disable=None, leave=False):
        source = padded([sources[i] for i in some])
        target = torch.full((len(some), 1), BEGIN)
        open_ones = torch.arange(len(some))  # sentences that go on
        while len(open_ones) and target.shape[1] <= min(source.shape[1] * 2, LONGEST - 1):
            best = model(source[open_ones], target[open_ones])[:, -1].argmax(-1)
            column = torch.full((len(some),), PAD)
            column[open_ones] = best
            target = torch.cat([target, column[:, None]], 1)
            open_ones = open_ones[best != END]
        for i, row in zip(some, target[:, 1:].tolist(), strict=True):
            found[i] = row
    return found
