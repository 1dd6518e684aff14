"""torch.compile with the fxfib backend: same outputs, smaller graphs, never stale."""

import copy
import gc
import logging

import pytest
import torch
from torch import Tensor, fx, nn

import fxfib
from fxfib.dynamo import MOST_MERGES


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two planted fibers: in the convolution, behind its batch norm, and in the linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 7)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(7, 3)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                tensor.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)
            for tensor in (*self.conv.parameters(), *self.norm.parameters(), *self.norm.buffers()):
                if tensor.ndim:
                    tensor[3] = tensor[1]
            for tensor in self.hidden.parameters():
                tensor[6] = tensor[2]
        self.eval()

    def forward(self, image: Tensor, scale: int = 2) -> Tensor:
        pooled = self.norm(self.conv(image)).relu().mean((2, 3))
        hidden = self.hidden(pooled.view(image.shape[0], -1)).tanh()
        return self.head(self.drop(hidden)) * scale


def image(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 7, 7, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def agrees(compiled: nn.Module, model: nn.Module, *arguments) -> None:
    close(compiled(*arguments), model(*arguments))


def sizes(backend: fxfib.dynamo.Backend) -> list[tuple[int, int]]:
    """Parameters before and after, of every graph that was merged."""
    merged = [graph.report for graph in backend.graphs if not graph.note]
    return [(report.parameters_before, report.parameters_after) for report in merged]


def kept(backend: fxfib.dynamo.Backend) -> list[str]:
    """Notes of the graphs that were left as they are."""
    return [graph.note for graph in backend.graphs if graph.note]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_merges_whole_graph(inner):
    model = Net()
    small = fxfib.compile(model, 0.0, (image(),))
    backend = fxfib.backend(inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    agrees(compiled, model, image())
    report = small.fibration
    assert sizes(backend) == [(report.parameters_before, report.parameters_after)]
    assert report.parameters_after < report.parameters_before
    assert [group.members for group in backend.graphs[0].report.merged_groups] == [
        ("conv",),
        ("hidden",),
    ]


def test_registered_by_name(caplog):
    assert "fxfib" in torch.compiler.list_backends()
    graphs = []
    model = Net()
    options = {"eps": 0.0, "inner": "eager", "on_graph": graphs.append}
    compiled = torch.compile(model, backend="fxfib", options=options)
    with caplog.at_level(logging.INFO, "fxfib"):
        agrees(compiled, model, image())
    assert [graph.note for graph in graphs] == [""]
    assert "parameters" in caplog.text


def test_unknown_options_are_refused():
    compiled = torch.compile(Net(), backend="fxfib", options={"epsilon": 0.0})
    with pytest.raises(Exception, match="options of the fxfib backend are eps, inner"):
        agrees(compiled, Net(), image())
    with pytest.raises(fxfib.InputError, match="eps must be"):
        fxfib.backend(-1.0)
    with pytest.raises(fxfib.InputError, match="one eps"):
        fxfib.backend({"conv": 0.1})
    with pytest.raises(fxfib.InputError, match="watch"):
        fxfib.backend(watch="sometimes")
    with pytest.raises(fxfib.InputError, match="not fxfib"):
        fxfib.backend(inner="fxfib")


def test_dynamic_batch_and_numbers():
    model = Net()
    backend = fxfib.backend(inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    for batch, scale in ((2, 2), (5, 2), (9, 2), (9, 3), (4, 7)):
        agrees(compiled, model, image(batch), scale)
    # One for the first sizes, one for any batch, one for any number.
    assert len(backend.graphs) == 3 == len(sizes(backend))


def test_dynamic_from_the_start_compiles_once():
    model = Net()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for batch in (4, 2, 11):
        agrees(compiled, model, image(batch))
    assert len(backend.graphs) == 1 == len(sizes(backend))
    model.norm.eps = 0.5  # an input of the graph, as all numbers are here
    agrees(compiled, model, image())
    assert len(backend.graphs) == 2 == len(sizes(backend))
    CHANGES["data ="](model)
    agrees(compiled, model, image())
    assert len(backend.graphs) == 3 == len(sizes(backend)), "numbers are still known as such"
    assert {group.members for g in backend.graphs for group in g.report.merged_groups} == {
        group.members for group in backend.graphs[0].report.merged_groups
    }, "under the user's names"


def test_second_call_does_not_recompile():
    model = Net()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    agrees(compiled, model, image())
    with torch._dynamo.config.patch(error_on_recompile=True):
        agrees(compiled, model, image(seed=2))
    assert len(backend.graphs) == 1


def test_graph_breaks_give_several_graphs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(0), Net(1)
            self.eval()

        def forward(self, value: Tensor) -> Tensor:
            one = self.first(value)
            torch._dynamo.graph_break()
            return one + self.second(value)

    model = Two()
    backend = fxfib.backend(inner="eager")
    agrees(torch.compile(model, backend=backend), model, image())
    assert len(sizes(backend)) == 2
    members = {m for graph in backend.graphs for g in graph.report.groups for m in g.members}
    assert {"first.conv", "second.conv"} <= members


def test_gradients_and_training_pass_through():
    model = Net()
    backend = fxfib.backend(inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    compiled(image()).sum().backward()
    assert model.hidden.weight.grad is not None
    assert not sizes(backend) and "torch.no_grad()" in kept(backend)[0]
    model.train()
    with torch.no_grad():
        compiled(image())
    assert not sizes(backend) and "training mode" in kept(backend)[1]
    model.eval()
    agrees(compiled, model, image())
    assert len(sizes(backend)) == 1
    # Without parameters that need gradients, gradients may stay on.
    frozen = Net().requires_grad_(False)
    backend = fxfib.backend(inner="eager")
    close(torch.compile(frozen, backend=backend)(image()), frozen(image()))
    assert len(sizes(backend)) == 1


def test_autocast_passes_through():
    model = Net()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(image()), model(image()))
    assert not sizes(backend) and "autocast" in kept(backend)[0]


def _optimizer_step(model: Net) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(image()).sum().backward()
        optimizer.step()


def _load(model: Net, *, assign: bool) -> None:
    model.load_state_dict(copy.deepcopy(Net(3).state_dict()), assign=assign)


CHANGES = {
    "mul_": lambda model: model.hidden.weight.mul_(2.0),
    "data =": lambda model: setattr(model.hidden.weight, "data", model.hidden.weight.data * 2.0),
    "new parameter": lambda model: setattr(
        model.hidden, "weight", nn.Parameter(model.hidden.weight * 2.0)
    ),
    "buffer": lambda model: model.norm.running_mean.add_(1.0),
    "load": lambda model: _load(model, assign=False),
    "load, assigned": lambda model: _load(model, assign=True),
    "optimizer": _optimizer_step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change):
    model = Net()
    compiled = torch.compile(model, backend=fxfib.backend(inner="eager"))
    agrees(compiled, model, image())
    with torch.no_grad():
        before = model(image())
        CHANGES[change](model)
        assert not torch.allclose(before, model(image()), atol=1e-3), "the change shows"
    agrees(compiled, model, image())
    agrees(compiled, model, image(seed=2))


def test_a_fiber_that_is_split_by_a_change_is_not_merged_any_more():
    model = Net()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    agrees(compiled, model, image())
    with torch.no_grad():
        model.hidden.weight[6, 0] += 1.0
    agrees(compiled, model, image())
    (_, first), (_, second) = sizes(backend)
    assert second > first


def test_writes_through_data_are_noticed_when_values_are_watched():
    model = Net()
    compiled = torch.compile(model, backend=fxfib.backend(inner="eager", watch="values"))
    agrees(compiled, model, image())
    model.hidden.weight.data.mul_(2.0)  # moves neither version nor address
    agrees(compiled, model, image())


def test_instances_of_one_class_have_merges_of_their_own():
    models = [Net(seed) for seed in range(4)]
    backend = fxfib.backend(inner="eager")
    run = torch.compile(lambda model, value: model(value), backend=backend)
    for _ in range(2):
        for model in models:
            with torch.no_grad():
                close(run(model, image()), model(image()))
    assert len(sizes(backend)) == len(models)


def test_weights_that_keep_changing_end_at_the_original_graph(caplog):
    model = Net()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING, "fxfib"):
        for _ in range(MOST_MERGES + 3):
            agrees(compiled, model, image())
            with torch.no_grad():
                model.head.weight.mul_(0.9)
    assert len(sizes(backend)) == MOST_MERGES
    assert caplog.text.count("weights changed") == 1


def test_a_compiled_graph_keeps_no_model_alive():
    import weakref

    model = Net()
    run = torch.compile(lambda m, value: m(value), backend=fxfib.backend(inner="eager"))
    with torch.no_grad():
        run(model, image())
    alive = weakref.ref(model.hidden.weight)
    del model
    gc.collect()
    assert alive() is None


def test_nan_weights_are_refused_and_noted():
    model = Net()
    with torch.no_grad():
        model.hidden.weight[0, 0] = torch.nan
    backend = fxfib.backend(inner="eager")
    with torch.no_grad():
        assert torch.compile(model, backend=backend)(image()).isnan().any()
    assert "hidden.weight holds NaN" in kept(backend)[0]


def test_inference_mode():
    model = Net()
    backend = fxfib.backend(inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        close(compiled(image()), model(image()))
        model.hidden.weight.mul_(2.0)
        close(compiled(image()), model(image()))
    assert len(sizes(backend)) == 2


def test_the_memory_of_outputs_is_as_before():
    """What comes after a graph break relies on what is a view of what, and on strides."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, value: Tensor) -> tuple[Tensor, ...]:
            out = self.net(value)
            copied, turned = value.clone(), value.transpose(1, 3).contiguous()
            torch._dynamo.graph_break()
            copied.add_(1.0)
            return out, copied, turned.view(-1)

    model = Memory().eval()
    backend = fxfib.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    given = image()
    with torch.no_grad():
        found, expected = compiled(given), model(image())
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    assert torch.equal(given, image()), "the input is as it was"
    assert len(sizes(backend)) == 1


def test_graphs_that_change_their_input_pass_through():
    model = Net()

    def run(value: Tensor) -> Tensor:
        value.add_(1.0)
        return model(value)

    backend = fxfib.backend(inner="aot_eager")
    given, expected = image(), image()
    with torch.no_grad():
        close(torch.compile(run, backend=backend)(given), run(expected))
    assert torch.equal(given, expected)
    assert not sizes(backend)


def test_nothing_of_the_user_or_of_torch_changes():
    model = Net()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = (torch.get_num_threads(), torch.is_grad_enabled(), logging.root.manager.disable)
    compiled = torch.compile(model, backend=fxfib.backend(inner="aot_eager"))
    agrees(compiled, model, image())
    assert torch.equal(torch.rand(3), expected)
    assert before == (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        logging.root.manager.disable,
    )
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_no_fibers_no_overhead():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    seen = []

    def inner(graph_module, example_inputs, **_):
        seen.append(len(example_inputs))
        return graph_module.forward

    backend = fxfib.backend(inner=inner)
    agrees(torch.compile(model, backend=backend), model, torch.randn(2, 4))
    assert kept(backend) == ["no fibers"] and seen == [5], "parameters are inputs still"


# Inductor of torch 2.11 warns about what torch itself does.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.slow
def test_inductor():
    model = Net()
    backend = fxfib.backend()
    compiled = torch.compile(
        model, backend=backend, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=True
    )
    for batch in (2, 5):
        agrees(compiled, model, image(batch))
    # Dynamo captures again where inductor turns numbers that are inputs into constants.
    before = len(sizes(backend))
    CHANGES["data ="](model)
    agrees(compiled, model, image())
    assert len(sizes(backend)) == before + 1 and not kept(backend)


def test_memory_that_was_given_back_is_not_taken_for_the_weights():
    """A new storage where the first one lay, as the allocator may give it for ``data = ...``."""
    model, inputs = Net().eval(), torch.randn(2, 3, 8, 8)
    run = torch.compile(model, backend=fxfib.backend(inner="eager"))
    weight = model.head.weight
    memory = weight.detach().numpy().copy()
    weight.data = torch.from_numpy(memory)
    with torch.no_grad():
        run(inputs)
        gc.collect()  # what still views the first storage keeps its memory from being given back
        address, version = weight.data_ptr(), weight._version
        memory *= 2.0
        weight.data = torch.from_numpy(memory)
        assert (weight.data_ptr(), weight._version) == (address, version)
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_weights_made_in_inference_mode_are_left_as_they_are():
    inputs = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        model = Net().eval()
        backend = fxfib.backend(inner="eager")
        run = torch.compile(model, backend=backend)
        torch.testing.assert_close(run(inputs), model(inputs))
    assert "inference mode" in kept(backend)[0]
    model, backend = Net().eval(), fxfib.backend(inner="eager")
    run = torch.compile(model, backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)
        model.head.weight = nn.Parameter(2.0 * model.head.weight, requires_grad=False)
        for _ in range(2):
            torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_inductor_may_freeze_weights_as_changes_are_seen():
    model, inputs = Net().eval(), torch.randn(2, 3, 8, 8)
    backend = fxfib.backend(inner_options={"freezing": True})
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)
        model.head.weight.mul_(2.0)
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)
        assert len(backend.graphs) == 2
        # Without autograd's counter: another tensor in the place of the first.
        model.head.weight.data = 3.0 * model.head.weight
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert len(backend.graphs) == 3 and not any(graph.note for graph in backend.graphs)


def test_mode_reaches_the_inner_backend():
    given = []

    def inner(graph_module, example_inputs, **options):
        given.append(options)
        return graph_module.forward

    backend = fxfib.backend(inner=inner, inner_options={"shape_padding": True})
    model = Net()
    agrees(torch.compile(model, backend=backend, mode="reduce-overhead"), model, image())
    assert given == [{"mode": "reduce-overhead", "options": {"shape_padding": True}}]


# -- the pass itself --------------------------------------------------------------------------


def test_pass_on_a_symbolic_trace():
    small = fxfib.passes.merge_fibers(fx.symbolic_trace(_Flat()), (image(),))
    assert isinstance(small, fx.GraphModule)
    with torch.no_grad():
        close(small(image(4)), _Flat()(image(4)))
    report = small.meta["fibration"]
    assert report.parameters_after < report.parameters_before


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, value: Tensor) -> Tensor:
        return self.net.head(self.net.hidden(self.net.conv(value).mean((2, 3))).tanh())


def test_pass_in_a_backend_of_ones_own():
    model, seen = Net(), []

    def own(graph_module, example_inputs):
        bound = fxfib.passes.bind(graph_module, example_inputs)
        small = fxfib.passes.merge_fibers(bound.graph_module, bound.inputs, skip="conv")
        seen.append(small.meta["fibration"])
        return lambda *arguments: small(*bound.rest(arguments))

    agrees(torch.compile(model, backend=own, dynamic=True), model, image())
    assert [group.members for group in seen[0].merged_groups] == [("hidden",)]


def test_pass_refuses_graphs_it_cannot_take():
    def own(graph_module, example_inputs):
        with pytest.raises(fxfib.InputError, match="bind"):
            fxfib.passes.merge_fibers(graph_module, example_inputs)
        return graph_module.forward

    agrees(torch.compile(Net(), backend=own), Net(), image())
    program = torch.export.export(Net(), (image(),))
    with pytest.raises(fxfib.InputError, match=r"fxfib\.compile"):
        fxfib.passes.merge_fibers(program.module(), (image(),))
    with pytest.raises(fxfib.InputError, match="1 inputs, and 2 examples"):
        fxfib.passes.merge_fibers(fx.symbolic_trace(_Flat()), (image(), image()))


def test_exported_programs_go_in_and_out():
    """The recipe for `torch.export`: a program in, a program out."""
    free = {"image": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Net(), (image(),), dynamic_shapes=free)
    small = fxfib.compile(program.module(), 0.0, (image(),))
    again = torch.export.export(small, (image(),))
    with torch.no_grad():
        close(again.module()(image()), Net()(image()))
    assert small.fibration.parameters_after < small.fibration.parameters_before
