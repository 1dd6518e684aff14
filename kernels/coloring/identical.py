"""Groups of bit-identical rows: hash, then confirm."""

import numpy as np
from numpy.typing import NDArray

from fxfib.kernels.coloring.rows import Ints, Rows, by_appearance
from fxfib.kernels.coloring.threads import in_order

Hashes = NDArray[np.uint64]

_SAMPLED_COLUMNS = 8
_BLOCK_WORDS = 2**20


def identical(rows: Rows, groups: Ints) -> tuple[Ints, Ints]:
    """Number the classes of rows with the same values (+0 = -0) and the same group.

    Almost always a few columns already tell different rows apart.  Where they do not, rows are
    hashed in full, and those of equal hashes are compared.

    Args:
        rows: n rows.
        groups: int64 [n]; rows of different groups are never identical.

    Returns:
        ids, int64 [n], in the order of first appearance, and the first row of every id.
    """
    columns: Ints | slice = slice(None)
    if rows.width > _SAMPLED_COLUMNS:
        columns = np.linspace(0, rows.width - 1, _SAMPLED_COLUMNS).astype(np.int64)
    everyone = np.arange(rows.count)
    keys = _hash(rows, everyone, columns, groups)
    order = np.argsort(keys)
    follows = np.zeros(rows.count, dtype=bool)
    follows[1:] = keys[order[1:]] == keys[order[:-1]]
    if not follows.any():
        return everyone, everyone
    # Mostly rows whose sampled columns agree are equal, and one comparison settles it.
    equal = _same(rows, order, follows, groups)
    runs = np.cumsum(~follows)
    mixed = np.zeros(int(runs[-1]) + 1, dtype=bool)
    mixed[runs[follows & ~equal]] = True
    ids = np.empty(rows.count, dtype=np.int64)
    ids[order] = np.cumsum(~equal)
    suspects = order[mixed[runs]]
    if len(suspects):
        ids[suspects] = rows.count + 1 + _confirmed(rows, suspects, groups)
    return by_appearance(ids)


def _same(rows: Rows, order: Ints, follows: NDArray[np.bool_], groups: Ints) -> NDArray[np.bool_]:
    """Whether the row at a place of `order` equals the one before, where it `follows` that one."""
    needed = follows.copy()
    needed[:-1] |= follows[1:]
    places = np.flatnonzero(needed)
    step = max(1, _BLOCK_WORDS // (4 * max(1, rows.width)))

    def compare(start: int) -> NDArray[np.bool_]:
        index = order[places[start : start + step + 1]]
        values = rows.values(index, slice(None))
        equal = (values[1:] == values[:-1]).all(axis=1)
        return equal & (groups[index[1:]] == groups[index[:-1]])

    parts = list(in_order(compare, range(0, len(places) - 1, step)))
    equal = np.zeros(len(order), dtype=bool)
    if parts:
        equal[places[1:]] = np.concatenate(parts)
    return equal & follows


def _hash(rows: Rows, index: Ints, columns: Ints | slice, groups: Ints) -> Hashes:
    """Multilinear hash of the 32-bit words of the rows, modulo 2^64; equal rows hash equally.

    Integer arithmetic: unlike a floating-point projection it does not depend on where in a block
    a row stands.
    """
    hashes = groups[index].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    if rows.width == 0:
        return hashes
    step = max(1, _BLOCK_WORDS // (2 * rows.width))
    generator = np.random.default_rng(20250101)
    multipliers = np.empty(0, dtype=np.uint64)
    for start in range(0, len(index), step):
        block = index[start : start + step]
        # Adding +0 turns -0 into +0, so that the two have the same bits.
        values = np.ascontiguousarray(rows.values(block, columns) + np.float32(0.0))
        words = values.view(np.uint32)
        if not len(multipliers):
            multipliers = generator.integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
        hashes[start : start + step] += words.astype(np.uint64) @ multipliers
    return hashes


def _confirmed(rows: Rows, suspects: Ints, groups: Ints) -> Ints:
    """Ids of the classes among `suspects`, by full hash and comparison."""
    hashes = _hash(rows, suspects, slice(None), groups)
    order = np.argsort(hashes)
    ordered = suspects[order]
    follows = np.zeros(len(order), dtype=bool)
    follows[1:] = hashes[order[1:]] == hashes[order[:-1]]
    equal = _same(rows, ordered, follows, groups)
    numbers: Ints = np.cumsum(~equal)
    if (follows & ~equal).any():
        numbers = _without_hashing(rows, ordered, groups)
    ids = np.empty(len(suspects), dtype=np.int64)
    ids[order] = numbers
    return ids


def _without_hashing(rows: Rows, index: Ints, groups: Ints) -> Ints:
    """The same classes by a dictionary of the rows' bytes, for the rare collision of hashes."""
    known: dict[tuple[int, bytes], int] = {}
    ids = np.empty(len(index), dtype=np.int64)
    for position, row in enumerate(index):
        values = rows.values(index[position : position + 1], slice(None)) + np.float32(0.0)
        ids[position] = known.setdefault((int(groups[row]), values.tobytes()), len(known))
    return ids
