"""Random networks with planted fibers and near misses; many more with ``bench/fuzz.py``."""

import functools

import numpy as np
import pytest
import torch
from planting_checks import Outcome, check_seed, exact, network, outputs
from wrong_rules import WRONG

from fxfib.passes.verify import difference

SEEDS = range(32)
#: Wrong rules of recurrent layers, attention and norms, and a word for the networks they are in.
CAUGHT = {
    "last_gate_ignored": "= lstm(",
    "last_gate_of_a_cell_ignored": " cell(",
    "columns_of_the_recurrence_ignored": "= lstm(",
    "columns_of_the_recurrence_of_a_cell_ignored": " cell(",
    "order_of_query_heads_mixed_up": "attention",
    "order_of_value_heads_mixed_up": "attention",
    "scale_of_the_smaller_head": "fused attention",
    "layer_norm_uncounted": "LayerNorm",
    "mean_of_a_norm_uncounted": "LayerNorm",
    "rms_norm_uncounted": "RMSNorm",
    "rotary_pairs_split": "rotary, half, half alike",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_fibers_are_found_and_near_misses_kept(seed: int) -> None:
    outcome = check_seed(seed, thorough=False)
    assert not outcome.failures, "\n".join(outcome.failures)


@functools.cache
def logs() -> dict[int, str]:
    """What every network is made of, the short ones first."""
    found = {seed: "\n".join(network(seed).log) for seed in SEEDS}
    return dict(sorted(found.items(), key=lambda item: item[1].count("\n")))


@pytest.mark.parametrize("name", CAUGHT)
def test_a_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG[name].patch(monkeypatch)
    for seed, log in logs().items():
        if CAUGHT[name] in log:
            outcome = Outcome(seed)
            exact(network(seed), torch.float64, outcome)
            if any("VerifyError" in line for line in outcome.failures):
                return
    pytest.fail(f"no network of {len(SEEDS)} shows it")


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
