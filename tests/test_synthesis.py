"""Inputs made from the statistics of batch norm: they have them, and serve better than noise."""

import copy

import pytest
import torch
from torch import nn

import fxfib
from fxfib import workshop as workshops
from fxfib.calibration import norms_known, remembered
from fxfib.capture import capture
from fxfib.synthesis import Observer, norms_that_know, together_for
from fxfib.workshop import Workshop


def data(count: int, seed: int) -> torch.Tensor:
    """Smooth images whose channels go together, far from white noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 3, 3, generator=generator)
    fine = nn.functional.interpolate(coarse, size=(11, 11), mode="bilinear")
    mix = torch.tensor([[1.0, 0.2], [0.9, -0.1], [0.3, 0.8]])
    return torch.einsum("oc,nchw->nohw", mix, fine) + torch.tensor([0.5, -0.3, 0.1])[:, None, None]


def network(*, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 19, 1), (19, 23, 2), (23, 17, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=not norm)]
        layers += [nn.BatchNorm2d(after, momentum=None)] if norm else []
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 5))
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
        for part in data(512, 0).split(128):
            model(part)
    return model.eval()


def gap(model: nn.Module, images: torch.Tensor) -> float:
    graph_module = capture(model, (images[:2],)).graph_module
    with torch.no_grad():
        return float(Observer(graph_module, norms_that_know(graph_module)).gap([images]))


def test_they_have_the_statistics_that_noise_has_not() -> None:
    model, images = network(), data(128, 1)
    workshop = Workshop(model, (images[:2],))
    (made,) = workshop.batches[0]
    assert made.shape[1:] == images.shape[1:]
    noise = torch.randn(made.shape) * images.square().mean().sqrt()
    assert gap(model, made) < 0.1 * gap(model, noise)
    assert gap(model, made) < 5 * gap(model, images)


def test_layers_are_fitted_better_than_on_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = network(), data(256, 1)

    def loss() -> float:
        small = fxfib.tune(model, example_inputs=(images[:2],), params=0.5, refine=0)
        with torch.no_grad():
            return float((small(images) - model(images)).square().mean())

    ours = loss()
    monkeypatch.setattr(workshops, "norms_known", lambda captured: False)
    assert ours < 0.5 * loss()


def test_a_whole_network_learns_nothing_from_them_unasked() -> None:
    images = data(2, 0)
    assert Workshop(network(), (images,), refine=None).refine == 0
    assert Workshop(network(), (images,), refine=None, calibration=images).refine > 0
    assert Workshop(network(), (images,), refine=3).refine == 3


def test_what_a_fresh_layer_knows_is_nothing() -> None:
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert not Workshop(model, (data(2, 0),)).like_data
    assert Workshop(network(), (data(2, 0),)).like_data
    assert not Workshop(network(norm=False), (data(2, 0),)).like_data


def test_twice_the_same_and_the_model_as_it_was() -> None:
    model, images = network(), data(2, 0)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        once = fxfib.compile(model, 0.3, (images,), criterion="energy")
    again = fxfib.compile(model, 0.3, (images,), criterion="energy")
    for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Conditioned(nn.Module):
    """A signal and a number of a table; batch norm behind layers without any axis of space."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = nn.Sequential(nn.Conv1d(3, 13, 5), nn.BatchNorm1d(13), nn.ReLU())
        self.table = nn.Embedding(7, 13)
        self.head = nn.Sequential(
            nn.Linear(13, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 3)
        )

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.signal(x).mean(2) + self.table(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signals_several_inputs_and_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = Conditioned().train()
    x, index = torch.randn(300, 3, 17).cumsum(2), torch.randint(7, (300,))
    with torch.no_grad():
        for _ in range(20):
            model(x, index)
    model = model.to(dtype).eval()
    x = x.to(dtype)
    workshop = Workshop(model, (x[:2], index[:2]))
    made = workshop.batches[0]
    assert made[0].dtype == dtype
    assert made[1].dtype == torch.int64
    assert bool(torch.isfinite(made[0]).all())
    observer = Observer(workshop.graph_module, norms_that_know(workshop.graph_module))
    with torch.no_grad():
        noise = [torch.randn(made[0].shape).to(dtype), made[1]]
        assert float(observer.gap(made)) < 0.3 * float(observer.gap(noise))
    small = fxfib.tune(model, example_inputs=(x[:2], index[:2]), params=0.7)
    assert small(x, index).isfinite().all()


def test_a_network_too_large_for_that_is_fitted_on_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = network(), data(4, 1)
    assert Workshop(model, (images,)).like_data
    # As if no work were allowed at all.
    monkeypatch.setattr("fxfib.synthesis.WORK", 1.0)
    large = Workshop(model, (images,))
    assert not large.like_data
    small = fxfib.compile(model, 0.3, (images,), criterion="energy")
    assert small.fibration.parameters_after < small.fibration.parameters_before


def test_memory_says_how_many_have_the_statistics_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept for the gradients is counted by what the graph computes from one example."""
    captured = capture(network(), (data(3, 1),))
    sizes = [19 * 121, 23 * 36, 17 * 36]
    # Every convolution with its norm and activation, the pool, its flat form, the scores.
    one = 3 * sum(sizes) + 2 * 17 + 5
    assert together_for(captured.graph_module, 3) == 128
    monkeypatch.setattr("fxfib.synthesis.MOST_KEPT", 40 * one)
    assert together_for(captured.graph_module, 3) == 40
    batches = remembered(captured, (data(3, 1),), None)
    assert [len(batch[0]) for batch in batches] == [40] * 6 + [16]
    monkeypatch.setattr("fxfib.synthesis.MOST_KEPT", 31 * one)
    assert not norms_known(captured)
