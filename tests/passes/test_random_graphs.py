"""Random networks with planted fibers and near misses; many more with ``bench/fuzz.py``."""

import numpy as np
import pytest
import torch
from planting_checks import check_seed, network, outputs

from fxfib.passes.verify import difference

SEEDS = range(32)


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_fibers_are_found_and_near_misses_kept(seed: int) -> None:
    outcome = check_seed(seed, thorough=False)
    assert not outcome.failures, "\n".join(outcome.failures)


def test_most_networks_claim_to_be_recovered() -> None:
    claimed = sum(not network(seed).unclaimed for seed in SEEDS)
    assert claimed >= len(SEEDS) // 3


@pytest.mark.parametrize("order", [0, 1])
def test_the_wider_network_computes_what_the_base_does(order: int) -> None:
    for seed in SEEDS:
        planted = network(seed, order=order)
        expected = outputs(planted.base, planted.inputs)
        found = outputs(planted.wide, planted.inputs)
        assert difference(expected, found).relative <= 1e-9, seed


def test_a_seed_gives_the_same_network_every_time() -> None:
    for seed in (3, 17):
        one, two = network(seed), network(seed)
        assert one.log == two.log
        for a, b in zip(one.wide.parameters(), two.wide.parameters(), strict=True):
            assert torch.equal(a, b)


def test_copies_are_no_plain_duplicates() -> None:
    duplicates = rows = 0
    for seed in SEEDS:
        for name, parameter in network(seed).wide.named_parameters():
            if "linear" in name and name.endswith("weight") and parameter.shape[1] > 5:
                rows += parameter.shape[0]
                duplicates += parameter.shape[0] - len(np.unique(parameter.detach(), axis=0))
    assert rows > 100
    assert duplicates < rows // 20
