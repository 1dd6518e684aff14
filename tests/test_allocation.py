"""How groups share a loss: streams that lose the same nodes, weights of groups, what is chosen."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfib
from fxfib.allocation import POWERS, Allocation, some
from fxfib.passes.curves import CountPolicy
from fxfib.passes.difference import Yardstick
from fxfib.passes.elimination import Place, eliminate
from fxfib.passes.sensitivity import sensitivities
from fxfib.workshop import Workshop, rewrite

X = torch.randn(96, 7, generator=torch.Generator().manual_seed(0))


class Stream(nn.Module):
    """Two blocks beside a stream of ten nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 10)
        self.first = nn.ModuleList([nn.Linear(10, 9) for _ in range(2)])
        self.second = nn.ModuleList([nn.Linear(9, 10) for _ in range(2)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(first(x.relu()).relu())
        return self.head(x.relu())


class Branches(nn.Module):
    """Two branches alike, one of which hardly counts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.loud, self.quiet = (
            nn.Sequential(nn.Linear(7, 24), nn.Tanh(), nn.Linear(24, 4)) for _ in range(2)
        )
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + self.factor * self.quiet(x)


def workshop_of(model: nn.Module, calibration: Tensor | None = X) -> Workshop:
    return Workshop(model.eval(), (X[:2],), criterion="energy", calibration=calibration)


def test_a_stream_loses_the_same_nodes_everywhere() -> None:
    torch.manual_seed(0)
    workshop = workshop_of(Stream())
    guide = workshop.guide
    stream = next(ref for ref in guide.activations if len(guide.places(ref)) > 1)
    places = guide.places(stream)
    assert len(places) == 3
    assert {tuple(guide.order(place)[0].tolist()) for place in places} == {
        tuple(guide.order(stream)[0].tolist())
    }
    for gone in (1, 4, 7):
        policy = CountPolicy(workshop.energy, {stream: gone})
        _, small = rewrite(workshop.graph_module, policy)
        assert small.get_parameter("stem.weight").shape == (10 - gone, 7)
        assert small.get_parameter("head.weight").shape == (3, 10 - gone)


class Padded(nn.Module):
    """A stream of six nodes that becomes one of ten: zeros before and behind, then a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 6)
        self.narrow = nn.Linear(6, 6)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.narrow(x.relu())).relu()
        x = nn.functional.pad(x, (1, 3)) + self.second(self.first(x).relu())
        return self.head(x.relu())


def test_channels_that_are_padded_are_the_same_channels() -> None:
    torch.manual_seed(3)
    workshop = workshop_of(Padded())
    guide = workshop.guide
    stream = [ref for ref in guide.activations if len(guide.places(ref)) > 1]
    sizes = [len(guide.activations[ref].covariance) for ref in stream]
    assert sorted(sizes) == [6, 6, 10]
    wide = stream[sizes.index(10)]
    narrow = stream[sizes.index(6)]
    assert guide.places(wide) == guide.places(narrow) == stream
    order = guide.order(wide)[0]
    assert np.array_equal(order, guide.order(narrow)[0]) and sorted(order) == list(range(10))
    # What stands first in the narrow part is the second node of the wide one.
    place = guide.nodes(wide)
    assert np.array_equal(guide.nodes(narrow), place[1:7])
    for gone in (1, 3, 6, 9):
        policy = CountPolicy(workshop.energy, {narrow: gone})
        _, small = rewrite(workshop.graph_module, policy)
        left = np.setdiff1d(place, order[:gone])
        inside = max(1, len(np.intersect1d(left, place[1:7])))
        assert small.get_parameter("stem.weight").shape == (inside, 7)
        assert small.get_parameter("head.weight").shape == (3, 10 - gone)


class Cropped(nn.Module):
    """Twelve nodes, read one by one, of which seven are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 12, 1)
        self.alone = nn.Conv1d(12, 12, 3, groups=12)
        self.then = nn.Conv1d(7, 7, 1, groups=7)
        self.last = nn.Conv1d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone(self.first(x).relu()).relu()[:, 2:9]
        return self.last(self.then(x).relu()).sum(2)


def test_nodes_that_nobody_reads_go_first() -> None:
    torch.manual_seed(9)
    x = torch.randn(60, 4, 6)
    workshop = Workshop(Cropped().eval(), (x[:2],), criterion="energy", calibration=x)
    guide = workshop.guide
    wide = next(ref for ref in guide.activations if len(guide.nodes(ref)) == 12)
    narrow = next(ref for ref in guide.activations if len(guide.nodes(ref)) == 7)
    assert len(guide.places(wide)) == 3 and narrow in guide.places(wide)
    order, lost = guide.order(wide)
    assert len(order) == 12
    assert set(order[:5]) == set(range(12)) - set(guide.nodes(narrow))
    assert lost[4] < 1e-9 < lost[5]
    _, small = rewrite(workshop.graph_module, CountPolicy(workshop.energy, {wide: 6}))
    assert small.get_parameter("first.weight").shape == (6, 4, 1)


def test_a_path_ends_small_where_one_layer_takes_all_others_along() -> None:
    class Halves(nn.Module):
        """Where one of six nodes is left, a product of halves is zero, and so is all behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(7, 6), nn.Linear(3, 3)
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.glu(self.first(x), 1)
            return self.last((x + self.second(x.relu())).relu())

    torch.manual_seed(10)
    workshop = workshop_of(Halves())
    allocation = Allocation(workshop, "params", 2)
    refs = [curve.ref for curve in allocation.even.curves]
    sizes = []
    for gone in (allocation.even.gone[0], allocation.even.gone[-1]):
        _, small = workshop.rewritten(workshop.eps_for(dict(zip(refs, gone, strict=True))))
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert sizes[1] < 0.5 * sizes[0]


def test_a_padded_stream_is_tuned() -> None:
    torch.manual_seed(4)
    model = Padded().eval()
    small = fxfib.tune(model, example_inputs=(X[:2],), params=0.4, calibration=X, progress=False)
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(
        p.numel() for p in model.parameters()
    )
    # Both parts of the stream give nodes up.
    assert small.stem.weight.shape[0] < 6 and small.head.weight.shape[1] < 10
    gap = (small(X) - model(X)).square().mean() / model(X).var()
    assert gap < 0.2


class Depthwise(nn.Module):
    """Nodes that pass a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 9, 1)
        self.alone = nn.Conv1d(9, 9, 3, groups=9)
        self.last = nn.Conv1d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.alone(self.first(x).relu()).relu()).sum(2)


def test_before_and_behind_a_depthwise_layer_the_same_nodes_go() -> None:
    torch.manual_seed(6)
    x = torch.randn(50, 4, 6)
    workshop = Workshop(Depthwise().eval(), (x[:2],), criterion="energy", calibration=x)
    guide = workshop.guide
    before, behind = [r for r in guide.activations if len(guide.order(r)[0]) == 9]
    assert guide.places(before) == [before, behind] and guide.telling(before) == [behind]
    alone = guide.activations[behind]
    order, _ = eliminate([Place(alone.covariance, alone.demand)])
    assert guide.order(before)[0].tolist() == guide.order(behind)[0].tolist() == order.tolist()
    for gone in (1, 5):
        policy = CountPolicy(workshop.energy, {before: gone})
        rewriter, small = rewrite(workshop.graph_module, policy)
        assert small.get_parameter("first.weight").shape == (9 - gone, 4, 1)
        assert small.get_parameter("alone.weight").shape == (9 - gone, 1, 3)
        # And no others go behind the layer, in place of those that are constant there.
        for node, axis in (before, behind):
            constant = rewriter.analysis.value(node).factor(axis).constant
            assert np.array_equal(np.flatnonzero(constant), np.sort(order[:gone]))


def test_where_only_followers_have_a_node_they_tell() -> None:
    class Gated(nn.Module):
        """A stream that gets two channels, all of which are read one by one, behind a gate."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.then = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 6, 1)
            self.alone, self.last = nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = nn.functional.pad(x, (0, 0, 1, 1)) + self.then(x.relu())
            x = nn.functional.glu(torch.cat([x, (-x).relu()], 1), 1)
            return self.last(self.alone(x).relu()).sum(2)

    torch.manual_seed(11)
    x = torch.randn(50, 3, 6)
    workshop = Workshop(Gated().eval(), (x[:2],), criterion="energy", calibration=x)
    guide = workshop.guide
    narrow, wide = [ref for ref in guide.activations if len(guide.places(ref)) == 2]
    assert workshop.outlook.follows(wide) and not workshop.outlook.follows(narrow)
    assert guide.telling(narrow) == [narrow, wide] and len(guide.order(narrow)[0]) == 6
    assert rewrite(workshop.graph_module, workshop.energy.at(0.5))[1](x)[0].shape == (50, 2)


def test_two_nodes_behind_each_of_a_grouped_layer_are_chosen_apart() -> None:
    torch.manual_seed(7)
    x = torch.randn(50, 4, 6)
    model = nn.Sequential(
        nn.Conv1d(4, 6, 1), nn.ReLU(), nn.Conv1d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv1d(12, 2, 1)
    )
    guide = Workshop(model.eval(), (x[:2],), criterion="energy", calibration=x).guide
    assert all(guide.places(ref) == [ref] for ref in guide.activations)


def test_the_movement_of_a_linear_reader_is_what_it_loses() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 3))
    workshop = workshop_of(model)
    (ref,) = [r for r in workshop.guide.activations if len(workshop.guide.order(r)[0]) == 12]
    judge = Yardstick(workshop.graph_module, [(X,)], scores=False)
    output = model(X).detach()
    readers = float((output - output.mean(0)).square().mean() / output.var())
    for gone in (2, 6, 11):
        share = workshop.guide.order(ref)[1][gone - 1]
        found = sensitivities(workshop.graph_module, workshop.guide, {ref: gone}, judge)
        assert found[ref] == pytest.approx(share * readers, rel=0.02, abs=1e-6)


def test_movement_is_not_asked_of_hidden_nodes() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(7, 6, batch_first=True)
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x)[0][:, -1])

    torch.manual_seed(2)
    steps = torch.randn(64, 3, 7)
    workshop = Workshop(Reader().eval(), (steps[:2],), criterion="energy", calibration=steps)
    (ref,) = [r for r in workshop.guide.activations if isinstance(r[1], str)]
    judge = Yardstick(workshop.graph_module, [(steps,)])
    assert sensitivities(workshop.graph_module, workshop.guide, {ref: 2}, judge) == {}


@pytest.mark.parametrize("factor", [0.05, 1.0])
def test_hidden_nodes_are_weighed_by_what_a_fitted_network_loses(factor: float) -> None:
    """Of two recurrent layers of one kind the one of which less is made counts less."""

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = (nn.GRU(7, 20, batch_first=True) for _ in range(2))
            self.first, self.second = nn.Linear(20, 4), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            loud, quiet = (layer(x)[0][:, -1] for layer in (self.loud, self.quiet))
            return self.first(loud) + factor * self.second(quiet)

    torch.manual_seed(2)
    model, steps = Readers().eval(), torch.randn(64, 4, 7)
    model.quiet.load_state_dict(model.loud.state_dict())
    workshop = Workshop(model, (steps[:2],), criterion="energy", calibration=steps)
    allocation = Allocation(workshop, "params", 2)
    weights = dict(
        zip((c.layers[0] for c in allocation.curves), allocation.weights(20), strict=True)
    )
    assert set(weights) == {"loud", "quiet"}
    if factor == 1.0:
        assert weights["loud"] == pytest.approx(weights["quiet"], rel=0.5)
    else:
        assert weights["loud"] > 5 * weights["quiet"]


@pytest.mark.parametrize("factor", [0.02, 1.0])
def test_what_hardly_counts_gives_up_more(factor: float) -> None:
    torch.manual_seed(3)
    small = fxfib.tune(
        Branches(factor).eval(), example_inputs=(X[:2],), params=0.5, calibration=X, refine=0,
        progress=False,
    )  # fmt: skip
    loud = small.get_submodule("loud.0").out_features
    quiet = small.get_submodule("quiet.0").out_features
    if factor == 1.0:
        assert abs(loud - quiet) <= 4
    else:
        assert loud >= 2 * quiet


def test_every_way_is_as_small_and_the_nearest_is_taken() -> None:
    torch.manual_seed(4)
    model = Branches(0.05).eval()
    workshop = workshop_of(model)
    allocation = Allocation(workshop, "params", 2)
    limit = 0.5 * sum(p.numel() for p in model.parameters())
    place = next(p for p, size in enumerate(allocation.even.parameters) if size <= limit)
    assert len(allocation.paths(place)) == len(POWERS)
    distances = []
    for path in allocation.paths(place):
        at = next(p for p, size in enumerate(path.parameters) if size <= limit)
        refs = [curve.ref for curve in path.curves]
        eps = workshop.eps_for(dict(zip(refs, path.gone[at], strict=True)))
        distances.append(allocation.distance(*workshop.rewritten(eps)))
    assert distances[0] > 2 * min(distances)
    small = fxfib.tune(
        model, example_inputs=(X[:2],), params=0.5, calibration=X, refine=0, progress=False
    )
    (chosen,) = (point for point in small.fibration.frontier if point.chosen)
    assert allocation.distance(*workshop.rewritten(chosen.eps)) == pytest.approx(
        min(distances), rel=0.1
    )


@pytest.mark.parametrize("norm", [False, True])
def test_inputs_that_were_made_do_not_judge(norm: bool) -> None:
    torch.manual_seed(5)
    # With batch norm inputs are made to be like data; good to fit on, but not to judge by.
    model = nn.Sequential(nn.BatchNorm1d(7) if norm else nn.Identity(), Branches(0.1))
    model(X + 1)
    workshop = workshop_of(model, None)
    assert workshop.like_data is norm
    allocation = Allocation(workshop, "params", 2)
    assert len(allocation.paths(len(allocation.even) // 2)) == 1


def test_some_of_all_examples() -> None:
    batches = [[torch.arange(5)], [torch.arange(5, 8)]]
    assert [batch[0].tolist() for batch in some(batches, 6)] == [[0, 1, 2, 3, 4], [5]]
    assert some(batches, 100)[1][0].tolist() == [5, 6, 7]
    assert len(some(batches, 5)) == 1


def test_what_may_not_go_is_not_measured() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            shown = self.second(self.first(x).tanh()).tanh()
            return shown, self.last(shown)

    torch.manual_seed(8)
    workshop = workshop_of(Both())
    assert [workshop.outlook.held(ref) for ref in workshop.outlook.asked] == [False, True]
    assert [len(a.mean) for a in workshop.guide.activations.values()] == [5]


class Said(nn.Module):
    """A perceptron that says only the best class, or masks the last one."""

    def __init__(self, *, best: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
        )
        self.best = best
        self.register_buffer("mask", torch.tensor([False, False, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layers(x)
        return scores.argmax(1) if self.best else scores.masked_fill(self.mask, -torch.inf)


def test_sizes_are_met_where_no_output_says_how_near_a_network_is() -> None:
    torch.manual_seed(0)
    model = Said(best=True).eval()
    small = fxfib.tune(model, example_inputs=(X[:2],), params=0.5, calibration=X)
    assert sum(p.numel() for p in small.parameters()) <= 448  # half of 896
    assert small.fibration.notes == ("nothing was refined: no output is a floating tensor",)


def test_masked_scores_do_not_hide_how_far_the_others_move() -> None:
    torch.manual_seed(0)
    workshop = workshop_of(Said(best=False))
    weights = Allocation(workshop, "params", 2).weights(0)
    assert len(weights) == 2
    assert weights[0] != pytest.approx(1.0)
    with torch.no_grad():
        graph = workshop.graph_module
        yardstick = Yardstick(graph, [[X]])
        whole = copy.deepcopy(graph)
        assert yardstick(whole) == 0.0
        for parameter in whole.parameters():
            parameter *= 1.1
        assert 0 < yardstick(whole) < torch.inf
