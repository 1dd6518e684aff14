"""The ways to color rows that are compared; ours is ``fxfib``."""

from __future__ import annotations

import numpy as np
import torch
from registry import provider
from torch import Tensor

from fxfib.kernels import color
from fxfib.kernels.coloring import reference as slow

CHUNK_PAIRS = 2**26


@provider("fxfib", exact=True, devices=("cpu", "cuda"))
def ours(rows: Tensor, eps: float) -> Tensor:
    """On a CUDA tensor this is the Triton path."""
    return color(rows, eps).labels


# Its loops are Python: each merge looks at all pairs again.
@provider("reference", exact=True, bytes_per_pair=1e5)
def reference(rows: Tensor, eps: float) -> Tensor:
    return slow.color(rows, eps)


@provider("torch.cdist", gives="components", bytes_per_pair=0.0, devices=("cpu", "cuda"))
def cdist_and_threshold(rows: Tensor, eps: float) -> Tensor:
    """All distances, a threshold, components; in blocks of rows, as whole matrices do not fit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(rows)
    step = max(1, CHUNK_PAIRS // count)
    edges = []
    for start in range(0, count, step):
        close = torch.cdist(rows[start : start + step], rows, p=float("inf")) <= eps
        pairs = torch.nonzero(close)
        pairs[:, 0] += start
        edges.append(pairs[pairs[:, 0] < pairs[:, 1]].cpu())
    left, right = torch.cat(edges).T.numpy()
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), (count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))


@provider("scipy", bytes_per_pair=12.0)
def pdist_and_linkage(rows: Tensor, eps: float) -> Tensor:
    """scipy: all distances, complete linkage, a cut."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    tree = linkage(pdist(rows.double().numpy(), "chebyshev"), "complete")
    return torch.from_numpy(fcluster(tree, eps, criterion="distance").astype(np.int64))


@provider("scikit-learn", bytes_per_pair=28.0)
def agglomerative(rows: Tensor, eps: float) -> Tensor:
    """scikit-learn on a precomputed matrix: how the published code clusters."""
    from scipy.spatial.distance import pdist, squareform
    from sklearn.cluster import AgglomerativeClustering

    distances = squareform(pdist(rows.double().numpy(), "chebyshev"))
    # Its threshold is exclusive, ours is not.
    limit = float(np.nextafter(eps, np.inf))
    model = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=limit
    )
    return torch.from_numpy(model.fit_predict(distances).astype(np.int64))


@provider("torch.unique", exact=True, approximate=False, devices=("cpu", "cuda"))
def unique(rows: Tensor, eps: float) -> Tensor:
    """Sorted rows; exact only."""
    return torch.unique(rows, dim=0, return_inverse=True)[1]


@provider("torch.sum", exact=True, approximate=False, gives="nothing", devices=("cpu", "cuda"))
def reading_floor(rows: Tensor, eps: float) -> None:
    """The time to read the rows once."""
    float(rows.sum())
