"""The raise: ordinary modules under the user's names, that do all that a module does."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from model_zoo import (
    CASES,
    Block,
    Case,
    Nested,
    Recurrent,
    Result,
    Reused,
    Tied,
    captured_case,
    randomize,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.capture import capture
from fxfib.errors import InputError
from fxfib.modules import FibrationModule, raise_modules, unshare


def raised(model: nn.Module, args: Any, kwargs: Any = None) -> FibrationModule:
    captured = capture(model, args, kwargs)
    return raise_modules(captured.graph_module, captured)


def of_case(name: str) -> tuple[Case, nn.Module, FibrationModule]:
    model, captured = captured_case(name)
    return CASES[name], model, raise_modules(captured.graph_module, captured)


def assert_same(found: Any, expected: Any) -> None:
    ours, spec = pytree.tree_flatten(found)
    theirs, other_spec = pytree.tree_flatten(expected)
    assert spec == other_spec
    for one, two in zip(ours, theirs, strict=True):
        if isinstance(two, Tensor):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
        else:
            assert one == two


def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return module(*copy.deepcopy(args), **copy.deepcopy(kwargs))


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_names(name: str) -> None:
    case, model, small = of_case(name)
    for batch in (2, 1, 3):
        args, kwargs = case.args(batch), case.kwargs(batch)
        assert_same(call(small, args, kwargs), call(model, args, kwargs))
    kept = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    kept &= set(model.state_dict())
    assert set(small.state_dict()) == kept
    small.load_state_dict({name: model.state_dict()[name] for name in kept})
    assert not small.training
    assert all(not module.training for module in small.modules())


@pytest.mark.parametrize("name", [name for name in CASES if name != "mobilenet"])
def test_copies_and_pickles(name: str) -> None:
    case, _, small = of_case(name)
    small.fibration = {"eps": 0.0}
    args, kwargs = case.args(3), case.kwargs(3)
    expected = call(small, args, kwargs)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(small),
        "pickle": pickle.loads(pickle.dumps(small)),
        "torch.save": torch.load(file, weights_only=False),
        "copy": copy.copy(small),
    }
    for how, other in copies.items():
        assert_same(call(other, args, kwargs), expected)
        assert other.fibration == small.fibration
        assert list(other.state_dict()) == list(small.state_dict())
        assert str(other) == str(small)
        pointers = {tensor.data_ptr() for tensor in other.state_dict().values()}
        shared = any(t.data_ptr() in pointers for t in small.state_dict().values())
        assert shared == (how == "copy")
        assert len(list(other.parameters())) == len(list(small.parameters()))


@pytest.mark.parametrize("name", [name for name in CASES if name != "mobilenet"])
def test_trains(name: str) -> None:
    case, model, small = of_case(name)
    unshare(small, model)
    before = copy.deepcopy(model.state_dict())
    small.train()
    assert all(module.training for module in small.modules())
    statistics = {n: b.clone() for n, b in small.named_buffers() if "running" in n}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    outputs = small(*case.args(4), **case.kwargs(4))
    loss = sum(
        leaf.square().sum()
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in small.parameters())
    optimizer.step()
    for key, value in statistics.items():
        assert not torch.equal(small.get_buffer(key), value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())


# Of the exporter, about every recurrent layer.
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != "mobilenet"])
def test_exports_and_compiles_again(name: str) -> None:
    case, _, small = of_case(name)
    args, kwargs = case.args(3), case.kwargs(3)
    expected = call(small, args, kwargs)
    with torch.no_grad():
        program = torch.export.export(small, args, kwargs, strict=False)
    assert_same(call(program.module(), args, kwargs), expected)
    again = raised(small, args, kwargs)
    assert_same(call(again, args, kwargs), expected)
    assert set(again.state_dict()) == set(small.state_dict())
    assert inspect.signature(again.forward) == inspect.signature(small.forward)


@pytest.mark.parametrize("name", ["convolutions", "reused", "block", "nested"])
def test_torch_compile(name: str) -> None:
    case, _, small = of_case(name)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    for batch in (3, 4):
        args, kwargs = case.args(batch), case.kwargs(batch)
        found, expected = call(compiled, args, kwargs), call(small, args, kwargs)
        for one, two in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
            if isinstance(two, Tensor):
                torch.testing.assert_close(one, two)
    torch._dynamo.reset()


def kinds(module: nn.Module) -> dict[str, str]:
    return {
        name: type(child).__name__
        for name, child in module.named_modules()
        if name and type(child) is not nn.Module
    }


def test_module_tree_of_a_convolutional_network() -> None:
    _, model, small = of_case("convolutions")
    assert kinds(small) == kinds(model)
    other = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    for name, theirs in model.named_modules():
        # In-place activations become plain ones; pools know their sizes per axis.
        if name and not isinstance(theirs, other):
            assert repr(small.get_submodule(name)) == repr(theirs)
    assert "(4): BatchNorm2d(8, eps=1e-05, momentum=None" in str(small)
    assert small.get_submodule("3").groups == 4
    assert "call_function" not in {node.op for node in small.graph.nodes}


def test_module_trees() -> None:
    _, model, small = of_case("resnet18")
    containers = {"Sequential", "BasicBlock"}
    expected = {n: k for n, k in kinds(model).items() if k not in containers}
    found = kinds(small)
    # A residual block calls its one ReLU twice, which is one module called twice here too.
    assert found == expected
    assert str(small).startswith("ResNet(")
    assert "(conv1): Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2)" in str(small)
    _, _, small = of_case("block")
    assert kinds(small) == {
        "norm": "LayerNorm",
        "attention.out_proj": "Linear",
        "mlp.0": "Linear",
        "mlp.1": "SiLU",
        "mlp.2": "Linear",
        "dropout": "Dropout",
        "out": "RMSNorm",
    }
    _, _, small = of_case("recurrent")
    assert kinds(small) == {"lstm": "LSTM", "gru": "GRU", "projected": "LSTM"}


def test_parameters_in_the_order_of_the_model() -> None:
    for name in ("resnet18", "mobilenet", "block"):
        _, model, small = of_case(name)
        ours = [key for key in small.state_dict() if "num_batches" not in key]
        theirs = [key for key in model.state_dict() if "num_batches" not in key]
        assert ours == theirs


def test_reused_layer_is_one_module_called_twice() -> None:
    small = raised(Reused().eval(), torch.randn(2, 5))
    calls = [node.target for node in small.graph.nodes if node.op == "call_module"]
    assert calls == ["layer", "act", "layer", "act", "other"]
    # The use of the weight alone reads it from inside the module.
    attributes = [node.target for node in small.graph.nodes if node.op == "get_attr"]
    assert attributes == ["other.weight"]


def test_tied_parameters_stay_tied() -> None:
    small = raised(Tied().eval(), torch.randint(13, (2, 4)))
    names = ["embedding.weight", "hidden.weight", "hidden.bias", "twin.bias"]
    assert [name for name, _ in small.named_parameters()] == names
    assert type(small.get_submodule("embedding")) is nn.Embedding
    small(torch.randint(13, (2, 4))).sum().backward()
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.get_parameter("embedding.weight").zero_()
    assert not other(torch.randint(13, (2, 4))).any()


def test_same_path_other_arguments_stays_a_function() -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.conv(x)
                + F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)[..., 1:-1, 1:-1]
            )

    model = TwoWays().eval()
    x = torch.randn(2, 3, 6, 6)
    small = raised(model, x)
    assert [n.target for n in small.graph.nodes if n.op == "call_module"] == ["conv"]
    assert_same(call(small, (x,), {}), call(model, (x,), {}))


def test_batch_norm_trains_like_the_users() -> None:
    model = randomize(CASES["convolutions"].make())
    x = torch.randn(4, 3, 16, 16)
    small = raised(model, x)
    unshare(small, model)
    for module in (model, small):
        module.train()
        for child in module.modules():
            if isinstance(child, nn.Dropout2d):
                child.p = 0.0
    with torch.no_grad():
        assert torch.equal(small(x), model(x))
        assert torch.equal(small(x), model(x))
    for key, tensor in model.state_dict().items():
        assert torch.equal(small.state_dict()[key], tensor), key
    assert model.state_dict()["1.num_batches_tracked"] == 9


def test_dropout_switches() -> None:
    model = Block().eval()
    small = raised(model, torch.randn(2, 4, 12))
    x = torch.randn(2, 4, 12)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_modes_of_single_modules_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    model[1].eval()
    small = raised(model, torch.randn(2, 3))
    assert small.training
    assert small.get_submodule("2").training
    assert not small.get_submodule("1").training


def test_requires_grad_and_dtype_are_kept() -> None:
    model = randomize(CASES["mlp"].make()).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    small = raised(model, torch.randn(2, 7, dtype=torch.bfloat16))
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["0.bias"]
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_memory_is_shared_until_unshared() -> None:
    model = Tied().eval()
    small = raised(model, torch.randint(13, (2, 4)))
    weight = small.get_parameter("embedding.weight")
    assert weight.data_ptr() == model.embedding.weight.data_ptr()
    unshare(small, model)
    assert weight is small.get_parameter("embedding.weight")
    assert weight.data_ptr() != model.embedding.weight.data_ptr()
    assert len(list(small.parameters())) == 4


def test_smaller_parameters_give_smaller_modules() -> None:
    model = randomize(CASES["mlp"].make())
    captured = capture(model, torch.randn(2, 7))
    graph_module = copy.copy(captured.graph_module)
    first, second = graph_module.get_submodule("0"), graph_module.get_submodule("3")
    first.weight = nn.Parameter(first.weight[:4].clone())
    first.bias = nn.Parameter(first.bias[:4].clone())
    second.weight = nn.Parameter(second.weight[:, :4].clone())
    small = raise_modules(graph_module, captured)
    assert "(0): Linear(in_features=7, out_features=4, bias=True)" in str(small)
    assert "(3): Linear(in_features=4, out_features=5, bias=True)" in str(small)
    assert small(torch.randn(6, 7)).shape == (6, 3)
    assert model[0].weight.shape == (11, 7)


# ---------------------------------------------------------------------------------- calls


def nested_arguments(batch: int) -> tuple[dict[str, Any], Tensor]:
    return CASES["nested"].args(batch)[0], CASES["nested"].kwargs(batch)["gain"]


def test_signature_is_the_users() -> None:
    _, model, small = of_case("nested")
    ours, theirs = inspect.signature(small.forward), inspect.signature(model.forward)
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].kind == parameter.kind
        assert ours.parameters[name].default == parameter.default
    batch, gain = nested_arguments(3)
    with torch.no_grad():
        expected = model(batch=batch, gain=gain)
        for found in (
            small(batch, gain=gain),
            small(gain=gain, batch=batch),
            small(batch, power=2, mask=None, gain=gain),
        ):
            assert_same(found, expected)
            assert type(found["result"]) is Result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": 3}, "power was left at 2"),
        ({"mask": torch.ones(1)}, "mask was left at None"),
        ({"gain": torch.ones(3, 2)}, r"input 3 must have shape \[any, 1\] as captured, not \[3, 2"),
        ({"gain": 2.0}, "input 3 was a tensor at capture, not float"),
    ],
)
def test_calls_that_the_graph_does_not_cover(change: dict[str, Any], message: str) -> None:
    _, _, small = of_case("nested")
    batch, gain = nested_arguments(3)
    with pytest.raises(InputError, match=message):
        small(batch, **{"gain": gain, **change})


def test_constant_inputs() -> None:
    model = Nested().eval()
    batch, gain = nested_arguments(2)
    small = raised(model, (batch,), {"gain": gain, "power": 3})
    with torch.no_grad():
        assert_same(small(batch, gain=gain), model(batch, gain=gain, power=3))
    with pytest.raises(InputError, match="was fixed to 3"):
        small(batch, gain=gain, power=2)


def test_fixed_batch_is_checked() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return sum(self.layer(row) for row in x.unbind(0))

    small = raised(Fixed().eval(), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"\[2, 3\] as captured, not \[4, 3\]"):
        small(torch.randn(4, 3))


def test_variable_arguments() -> None:
    class Variable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            return self.layer(xs[0] * xs[1]) + named["a"] - named["b"]

    model = Variable().eval()
    x, y, a, b = torch.randn(4, 2, 3)
    small = raised(model, (x, y), {"a": a, "b": b})
    with torch.no_grad():
        assert torch.equal(small(x, y, b=b, a=a), model(x, y, a=a, b=b))


def test_keywords_in_any_order_for_a_graph_module() -> None:
    _, model, small = of_case("nested")
    batch, gain = nested_arguments(3)
    again = raised(small, {"gain": gain, "power": 2, "batch": batch})
    with torch.no_grad():
        assert_same(again(batch, gain=gain), model(batch, gain=gain))


def test_initial_states_are_passed() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)
            self.rnn = nn.RNN(4, 4, nonlinearity="relu")

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.rnn(self.lstm(x, (h, c))[0], h), c

    model = Stateful().eval()
    inputs = (torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    small = raised(model, inputs)
    assert kinds(small) == {"lstm": "LSTM", "rnn": "RNN"}
    assert_same(call(small, inputs, {}), call(model, inputs, {}))


def test_moves_the_constants_of_its_graph() -> None:
    class Factory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.zeros(x.shape[0], 3, device=x.device)

    small = raised(Factory().eval(), torch.randn(2, 3))
    moved = copy.deepcopy(small).to("meta")
    assert moved(torch.randn(2, 3, device="meta")).is_meta
    assert not small(torch.randn(2, 3)).is_meta


def test_recurrent_layers_start_from_zeros_themselves() -> None:
    small = raised(Recurrent().eval(), torch.randn(2, 4, 5))
    targets = {node.target for node in small.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.zeros.default not in targets
