"""The public functions: options, refusals, reports, and what they leave alone."""

import copy
import json

import pytest
import torch
from torch import nn

import fxfib
from fxfib import InputError, RefusedError, VerifyError
from fxfib.report import Report


def network(seed: int = 0) -> nn.Sequential:
    """7 - 11 - 5 - 3; hidden nodes 1 and 3 are parallel, 2 and 5 equal, 6 constant, 7 unread."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3)
    ).eval()
    with torch.no_grad():
        first, second = model[0], model[2]
        first.weight[3], first.bias[3] = 2.5 * first.weight[1], 2.5 * first.bias[1]
        first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
        first.weight[6] = 0.0
        first.bias[6] = 0.75
        second.weight[:, 7] = 0.0
    return model


INPUTS = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))


def test_equal_parallel_constant_and_unread_nodes():
    model = network()
    small = fxfib.compile(model, 0.0, INPUTS)
    (group, *rest) = small.fibration.groups
    assert group.members == ("0",)
    assert (group.nodes, group.fibers, group.merged, group.scaled) == (11, 7, 2, 1)
    assert (group.constant, group.unread) == (1, 1)
    assert [g.fibers for g in rest] == [5, 3]
    assert small.get_submodule("0").weight.shape == (7, 7)
    torch.testing.assert_close(small(INPUTS), model(INPUTS))


def test_model_is_left_as_it_was():
    model = network()
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    hooks = dict(model[1]._forward_hooks)
    small = fxfib.compile(model, 0.5, INPUTS)
    assert not model.training and model[1]._forward_hooks == hooks
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert not small.get_submodule("0").weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_larger_eps_is_never_larger():
    sizes = [
        fxfib.compile(network(), eps, INPUTS).fibration.parameters_after
        for eps in (0.0, 1e-6, 0.1, 0.4, 0.8)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf"), "0", True, None])
def test_bad_eps(eps):
    with pytest.raises(InputError, match="eps must be"):
        fxfib.compile(network(), eps, INPUTS)


def test_bad_options():
    with pytest.raises(InputError, match="unknown criterion 'best'; known: 'fibration'"):
        fxfib.compile(network(), 0.0, INPUTS, criterion="best")
    with pytest.raises(InputError, match="round_to"):
        fxfib.compile(network(), 0.0, INPUTS, round_to=0)
    with pytest.raises(InputError, match="calibration"):
        fxfib.compile(network(), 0.1, INPUTS, calibration=3)
    with pytest.raises(InputError, match=r"skip pattern 'layer9\.\*' matches no layer"):
        fxfib.compile(network(), 0.0, INPUTS, skip=("layer9.*",))
    with pytest.raises(InputError, match="unknown symmetry"):
        fxfib.color(network(), INPUTS, symmetry="mirror")
    with pytest.raises(InputError, match="factor"):
        fxfib.lift(network(), 0.5, INPUTS)
    with pytest.raises(InputError, match="example_inputs"):
        fxfib.lift(network(), 2.0)


@pytest.mark.parametrize("skip", [3, [3]])
def test_patterns_are_strings(skip):
    for call in (fxfib.compile, fxfib.lift):
        with pytest.raises(InputError, match="skip must be a pattern"):
            call(network(), 2, INPUTS, skip=skip)


@pytest.mark.parametrize(
    "options",
    [
        {"factor": "2"},
        {"seed": "a"},
        {"seed": -1},
        {"zero_sum": float("nan")},
        {"zero_sum": -1},
        {"zero_sum": 1e30},
    ],
)
def test_bad_options_of_a_lift(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        fxfib.lift(network(), example_inputs=INPUTS, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_prove_nothing_are_refused(bad):
    with pytest.raises(InputError, match="NaN or infinity"):
        fxfib.compile(network(), 0.0, INPUTS * bad)
    with pytest.raises(InputError, match="empty"):
        fxfib.compile(network(), 0.0, INPUTS[:0])


@pytest.mark.parametrize("example", ["plain", "inference"])
def test_what_inference_mode_makes_can_be_trained(example):
    model = network()
    with torch.inference_mode():
        inputs = INPUTS if example == "plain" else INPUTS.clone()
        made = [fxfib.compile(model, 0.0, inputs), fxfib.lift(model, 1.5, inputs)]
    for module in made:
        module(INPUTS).sum().backward()


class Masked(nn.Module):
    """Minus infinity in a buffer: on scores, or on the channels of a layer."""

    def __init__(self, scores):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 8) for _ in range(3 if scores else 1))
        self.last = nn.Linear(8, 2)
        mask = torch.full((5, 5), -torch.inf).triu(1) if scores else torch.zeros(8)
        mask[..., -1:] = mask[..., -1:] if scores else -torch.inf
        self.register_buffer("mask", mask)
        self.scores = scores

    def forward(self, x):
        if not self.scores:
            return self.last((self.layers[0](x) + self.mask).softmax(-1))
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.layers)
        mixed = (q @ k.transpose(2, 3) + self.mask).softmax(-1) @ v
        return self.last(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scores", [True, False])
def test_masks_of_minus_infinity(scores):
    torch.manual_seed(0)
    model = Masked(scores).eval()
    inputs = torch.randn(3, 5, 6)
    wide = fxfib.lift(model, 1.5, inputs)
    small = fxfib.compile(wide, 0.0, inputs)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, wide, small)]
    assert sizes[2] == sizes[0]
    assert (sizes[1] > sizes[0]) == scores  # nothing merges across infinity
    torch.testing.assert_close(small(inputs), model(inputs))


class Translate(nn.Module):
    """As encoder-decoders are written: everything by keyword, some of it left out."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, source=None, mask=None, target=None, scale=1.0):
        hidden = self.one(source) if mask is None else self.one(source * mask)
        return self.last((hidden + self.two(target)).relu()) * scale


def test_keywords_behind_an_optional_argument(tmp_path):
    model = Translate().eval()
    named = {"source": torch.randn(3, 6), "target": torch.randn(3, 5)}
    small = fxfib.compile(fxfib.lift(model, 1.5, named), 0.0, named)
    fxfib.save(small, tmp_path / "m.fxfib")
    for module in (small, fxfib.load(tmp_path / "m.fxfib"), copy.deepcopy(small)):
        torch.testing.assert_close(module(**named), model(**named))
        torch.testing.assert_close(module(named["source"], None, named["target"]), model(**named))
    with pytest.raises(InputError, match="was a tensor at capture, not NoneType"):
        small(source=named["source"])
    with pytest.raises(InputError, match="at capture; compile again"):
        small(**named, mask=torch.ones(3, 6))
    torch.export.export(small, (), named)
    fxfib.export_onnx(small, tmp_path / "m.onnx", named)


class Partly(nn.Module):
    """As rotary embeddings do: the first channels one way, the rest, which may be none, another."""

    def __init__(self, first):
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 2)
        self.first = first

    def forward(self, x):
        hidden = self.one(x)
        parts = hidden[..., : self.first].tanh(), hidden[..., self.first :]
        return self.other(torch.cat(parts, -1).relu())


@pytest.mark.parametrize("first", [0, 3, 8])
def test_empty_slices(first):
    torch.manual_seed(0)
    model = Partly(first).eval()
    with torch.no_grad():
        for parameter in model.one.parameters():
            parameter[1] = parameter[0]
    inputs = torch.randn(3, 6)
    small = fxfib.compile(model, 0.0, inputs)
    torch.testing.assert_close(small(inputs), model(inputs))
    if first == 3:
        assert small.get_submodule("one").out_features == 7


def test_nan_weights_are_named():
    model = network()
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    with pytest.raises(RefusedError, match=r"2\.weight"):
        fxfib.compile(model, 0.0, INPUTS)


def test_skip_and_round_to():
    model = network()
    assert fxfib.compile(model, 0.0, INPUTS, skip="0").fibration.groups[0].fibers == 11
    assert (
        "the user asked" in fxfib.compile(model, 0.0, INPUTS, skip="0").fibration.groups[0].reason
    )
    for multiple, width in ((4, 8), (5, 10), (8, 8), (16, 11)):
        small = fxfib.compile(model, 0.0, INPUTS, round_to=multiple)
        assert small.get_submodule("0").out_features == width
        torch.testing.assert_close(small(INPUTS), model(INPUTS))


def test_compiles_at_the_first_call():
    model = network()
    small = fxfib.compile(model)
    assert small.fibration is None
    torch.testing.assert_close(small(INPUTS), model(INPUTS))
    assert small.fibration.groups[0].fibers == 7
    assert sum(p.numel() for p in small.parameters()) == small.fibration.parameters_after
    with pytest.raises(InputError, match="first call"):
        fxfib.compile(model)()


def test_wrong_result_is_not_returned(monkeypatch):
    from fxfib.passes.layout import Total

    monkeypatch.setattr(
        Total, "apply", lambda self, tensor, axis: self.layout.first.apply(tensor, axis)
    )
    with pytest.raises(VerifyError, match="nothing was returned"):
        fxfib.compile(network(), 0.0, INPUTS)


def test_report_round_trip():
    report = fxfib.compile(network(), 0.1, INPUTS).fibration
    again = Report.from_dict(json.loads(report.to_json()))
    assert again == report and str(again) == str(report)
    assert "approximate" in str(report)
    exact = fxfib.compile(network(), 0.0, INPUTS).fibration
    assert "exact" in str(exact) and exact.exact_error <= exact.tolerance


def test_a_refusal_names_place_reason_and_remedy():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(7, 5)
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(torch.sort(self.first(x), dim=-1).values)

    torch.manual_seed(0)
    report = fxfib.compile(Sorts().eval(), 0.0, INPUTS).fibration
    (refusal,) = report.refusals
    assert "sort" in refusal.op and "no rule" in refusal.reason and refusal.remedy
    assert refusal.op in str(report)


def test_color_changes_nothing_and_tells_the_fibers():
    model = network()
    colors = fxfib.color(model, INPUTS)
    labels = colors.labels["0"]
    assert labels[1] == labels[3] and labels[2] == labels[5]
    assert len(labels.unique()) == 9
    assert len(colors.labels["2"].unique()) == 5
    assert json.loads(json.dumps(colors.to_dict()))["labels"]["0"] == labels.tolist()
    assert "fibers at eps 0" in str(colors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lift_is_deterministic_and_recovered(dtype):
    model = network().to(dtype)
    inputs = INPUTS.to(dtype)
    base = fxfib.compile(model, 0.0, inputs).fibration.parameters_after
    one, two = (fxfib.lift(model, 2.0, inputs, seed=5) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(p.numel() for p in one.parameters()) > sum(p.numel() for p in model.parameters())
    assert fxfib.compile(one, 0.0, inputs).fibration.parameters_after <= base


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_names_that_torch_fx_cannot_write_are_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 4))
    with pytest.raises(fxfib.RefusedError, match="rename that module"):
        fxfib.compile(model.eval(), 0.0, torch.randn(2, 3))
