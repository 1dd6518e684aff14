"""The ways to color rows, and to sum and average by color, that are compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from registry import OURS, Problem, provider
from torch import Tensor

from fxfib.kernels import collapse, color, color_batch, merge
from fxfib.kernels.coloring import reference as slow

# Distances in memory at a time where a whole matrix of them would not fit.
CHUNK_PAIRS = 2**26
BOTH = ("cpu", "cuda")


@provider("color", OURS, "colors", devices=BOTH)
def ours(problem: Problem) -> Tensor:
    """On a CUDA tensor this is the Triton path."""
    return color(problem.rows, problem.eps).labels


@provider("color", "reference", "colors", growth=3.0, most=256)
def reference(problem: Problem) -> Tensor:
    """Loops in Python over all pairs: the slow, obvious version."""
    return slow.color(problem.rows, problem.eps)


@provider("color", "scipy", "colors", eps="positive", growth=2.0, pair_bytes=8.0)
def pdist_and_linkage(problem: Problem) -> Tensor:
    """All distances, complete linkage, a cut."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    tree = linkage(pdist(problem.rows.double().numpy(), "chebyshev"), "complete")
    return torch.from_numpy(fcluster(tree, problem.eps, criterion="distance").astype(np.int64))


@provider("color", "scikit-learn", "colors", eps="positive", growth=2.0, pair_bytes=24.0)
def agglomerative(problem: Problem) -> Tensor:
    """On a precomputed matrix: how the published code clusters."""
    from scipy.spatial.distance import pdist, squareform
    from sklearn.cluster import AgglomerativeClustering

    distances = squareform(pdist(problem.rows.double().numpy(), "chebyshev"))
    # Its threshold is exclusive, ours is not.
    limit = float(np.nextafter(problem.eps, np.inf))
    model = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=limit
    )
    return torch.from_numpy(model.fit_predict(distances).astype(np.int64))


@provider("color", "torch.cdist", "components", eps="positive", growth=2.0, devices=BOTH)
def cdist_and_components(problem: Problem) -> Tensor:
    """All distances, a threshold, components; in blocks of rows, as whole matrices do not fit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(problem.rows)
    edges = [torch.zeros(0, 2, dtype=torch.int64)]
    for start, close in _close_blocks(problem.rows, problem.eps):
        pairs = torch.nonzero(close)
        pairs[:, 0] += start
        edges.append(pairs[pairs[:, 0] < pairs[:, 1]].cpu())
    left, right = torch.cat(edges).T.numpy()
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), (count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))


# On a GPU the components, which the CPU finds, would be most of the time: this leaves them out.
@provider("color", "torch.cdist pairs", "pairs", eps="positive", growth=2.0, devices=("cuda",))
def cdist_and_threshold(problem: Problem) -> Tensor:
    """All distances and a threshold: how many pairs are close."""
    rows = problem.rows
    found = torch.zeros((), dtype=torch.int64, device=rows.device)
    for _, close in _close_blocks(rows, problem.eps):
        found += close.sum()
    return (found - len(rows)) // 2


def _close_blocks(rows: Tensor, eps: float) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows against all rows: which are close.  cdist takes no 16-bit numbers."""
    rows = rows if rows.element_size() >= 4 else rows.float()
    step = max(1, CHUNK_PAIRS // max(1, len(rows)))
    for start in range(0, len(rows), step):
        yield start, torch.cdist(rows[start : start + step], rows, p=float("inf")) <= eps


@provider("color", "torch.unique", "colors", eps="zero", devices=BOTH)
def unique(problem: Problem) -> Tensor:
    """Sorts whole rows; exact only."""
    return torch.unique(problem.rows, dim=0, return_inverse=True)[1]


@provider("color", "torch.sum", "nothing", eps="zero", devices=BOTH)
def reading_floor(problem: Problem) -> None:
    """The time to read the rows once."""
    problem.rows.sum()


@provider("color_batch", OURS, "colors", devices=BOTH)
def ours_in_one_call(problem: Problem) -> Tensor:
    """All matrices in one call."""
    found = color_batch(list(problem.rows.unbind()), problem.eps)
    return torch.stack([coloring.labels for coloring in found])


@provider("color_batch", "fxfib one by one", "colors", devices=BOTH)
def ours_one_by_one(problem: Problem) -> Tensor:
    """What the single call saves."""
    return torch.stack([color(rows, problem.eps).labels for rows in problem.rows.unbind()])


@provider("color_batch", "torch.cdist pairs", "pairs", eps="positive", growth=2.0, devices=BOTH)
def cdist_of_each(problem: Problem) -> Tensor:
    """All distances and a threshold, one matrix after the other."""
    parts = (Problem(problem.case, rows, problem.eps) for rows in problem.rows.unbind())
    return torch.stack([cdist_and_threshold(part) for part in parts])


@provider("color_batch", "torch.sum", "nothing", devices=BOTH)
def reading_floor_of_all(problem: Problem) -> None:
    """The time to read all matrices once."""
    problem.rows.sum()


@provider("collapse", OURS, "sums", devices=BOTH)
def our_sums(problem: Problem) -> Tensor:
    return collapse(problem.rows, problem.labels, problem.num_classes)


@provider("collapse", "torch.index_add", "sums", devices=BOTH)
def index_add(problem: Problem) -> Tensor:
    """In float64, as ours."""
    rows = problem.rows.double()
    sums = rows.new_zeros(len(rows), problem.num_classes)
    return sums.index_add_(1, problem.labels, rows)


@provider("collapse", "one-hot product", "sums", devices=BOTH)
def one_hot(problem: Problem) -> Tensor:
    """A product with the matrix of colors, in float64."""
    colors = torch.nn.functional.one_hot(problem.labels, problem.num_classes)
    return problem.rows.double() @ colors.double()


@provider("merge", OURS, "sums", devices=BOTH)
def our_means(problem: Problem) -> Tensor:
    return merge(problem.rows, problem.labels, problem.num_classes)


@provider("merge", "torch.index_add", "sums", devices=BOTH)
def index_add_means(problem: Problem) -> Tensor:
    """Sums in float64, divided by counts."""
    rows = problem.rows.double()
    sums = rows.new_zeros(problem.num_classes, rows.shape[1])
    sums.index_add_(0, problem.labels, rows)
    counts = torch.bincount(problem.labels, minlength=problem.num_classes)
    return (sums / counts[:, None]).to(problem.rows.dtype)
