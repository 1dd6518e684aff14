"""Capture: the graph computes what the model computes, and the model is what it was."""

import copy
import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import torchvision
from model_zoo import CASES, Case, Reused, Tied, captured_case, mlp, randomize
from torch import Tensor, fx, nn

from fxfib.capture import Captured, capture
from fxfib.errors import CaptureError, InputError, RefusedError
from fxfib.graph_tools import user_line

aten = torch.ops.aten


def run(captured: Captured, *args: Any, **kwargs: Any) -> list[Any]:
    with torch.no_grad():
        return list(captured.graph_module(*pytree.tree_leaves((args, kwargs))))


def assert_same(found: list[Any], expected: Any) -> None:
    leaves = pytree.tree_leaves(expected)
    assert len(found) == len(leaves)
    for ours, theirs in zip(found, leaves, strict=True):
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        else:
            assert ours == theirs


class Lambda(nn.Module):
    """A function behind one layer, for cases that need no more."""

    def __init__(self, function: Callable[..., Any], width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self.layer(args[0]), *args[1:])


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_model_computes(name: str) -> None:
    case: Case = CASES[name]
    model, captured = captured_case(name)
    assert captured.dynamic_batch
    assert captured.source is model
    for batch in (2, 1, 5):
        args, kwargs = case.args(batch), case.kwargs(batch)
        with torch.no_grad():
            expected = model(*copy.deepcopy(args), **kwargs)
        assert_same(run(captured, *args, **kwargs), expected)
    outputs = pytree.tree_unflatten(run(captured, *args, **kwargs), captured.out_spec)
    assert type(outputs) is type(expected)


@pytest.mark.parametrize("name", CASES)
def test_graph_obeys_the_contract(name: str) -> None:
    case: Case = CASES[name]
    args, kwargs = case.args(2), case.kwargs(2)
    model, captured = captured_case(name)
    nodes = list(captured.graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    assert len(inputs) == len(pytree.tree_leaves((args, kwargs)))
    assert {node.op for node in nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    names = {node.target for node in nodes if node.op == "get_attr"}
    own = dict([*model.named_parameters(), *model.named_buffers()])
    constants = {name for name in names if name not in own}
    assert not constants & set(captured.graph_module.state_dict())
    for name in names - constants:
        tensor = (
            captured.graph_module.get_parameter(name)
            if isinstance(own[name], nn.Parameter)
            else captured.graph_module.get_buffer(name)
        )
        assert tensor.data_ptr() == own[name].data_ptr()
        assert tensor.requires_grad == own[name].requires_grad
    targets = [node.target for node in nodes if node.op == "call_function"]
    for target in targets:
        if isinstance(target, torch._ops.OpOverload):
            assert not target._schema.is_mutable
            assert target not in (aten.view.default, aten.contiguous.default, aten.clone.default)
            assert "assert" not in str(target)
    for node in nodes:
        assert node.op == "output" or "val" in node.meta
    assert type(captured.graph_module.get_submodule("")) is not type(model)
    for child in captured.graph_module.children():
        assert type(child) is nn.Module


def slice_then_read_base(y: Tensor) -> Any:
    y[:, 1:4] = 2.0
    return y * 3


def stale_sibling(y: Tensor) -> Any:
    left, right = y[:, :4], y[:, 2:]
    left.add_(10)
    return right * 2, left, y


def chunks(y: Tensor) -> Any:
    one, two = y.chunk(2, dim=1)
    two.relu_()
    return y - 1, one, two


def unbound(y: Tensor) -> Any:
    parts = y.unbind(1)
    parts[2].mul_(5)
    return y, parts[2], parts[3]


def transposed_fill(y: Tensor) -> Any:
    y.t()[1].fill_(3.0)
    y.permute(1, 0)[2:4, :].zero_()
    return y + 1


def two_levels(y: Tensor) -> Any:
    y.view(-1, 2, 3)[:, 1, ::2].sub_(4)
    return y


def squeezed(y: Tensor) -> Any:
    y.unsqueeze_(1)
    z = y + 1
    y.squeeze_(1)
    return z, y.add_(1), y.shape[1]


def cast_copy(y: Tensor) -> Any:
    whole = torch.zeros(6, dtype=torch.int64)
    whole.copy_(torch.arange(6, dtype=torch.float64) * 1.5)
    y[:, :3].copy_(torch.ones(3, dtype=torch.float64) * 0.1)
    return y + whole


def in_place_promotion(y: Tensor) -> Any:
    z = y.half()
    z.add_(y * 0.37)
    return z, z.dtype == torch.float16


def through_dropout(y: Tensor) -> Any:
    z = nn.functional.dropout(y, 0.5, training=False)
    z.mul_(2)  # in eval mode this is y itself
    return y + 1


def through_casts(y: Tensor) -> Any:
    z = y.to(torch.float32).contiguous().float().expand_as(y).view_as(y).type_as(y)
    z.mul_(2)
    return y + 1, z


def through_dropout_views(y: Tensor) -> Any:
    z = nn.functional.dropout(y.view(-1, 3), 0.5, training=False)[:, :2]
    z.mul_(2)
    return y + 1


def indexed(y: Tensor) -> Any:
    y[:, [0, 2]] = 7.0
    y[y > 6.5] = -1.0
    y.masked_fill_(y < -5, 0.0)
    return y


def overwritten_source(y: Tensor) -> Any:
    z = torch.zeros_like(y)
    z[:, 0] = y[:, 1]
    y.add_(100)
    return z, y


def flattened_alias(y: Tensor) -> Any:
    z = y.flatten()
    y.neg_()
    return z.sum(), z[2:5]


def not_an_alias(y: Tensor) -> Any:
    z = y.t().reshape(-1)  # copies, so it keeps the old values
    y.neg_()
    return z, y


@pytest.mark.parametrize(
    "function",
    [
        *(slice_then_read_base, stale_sibling, chunks, unbound, transposed_fill, two_levels),
        *(squeezed, cast_copy, in_place_promotion, through_dropout, indexed, overwritten_source),
        *(through_casts, through_dropout_views),
        *(flattened_alias, not_an_alias),
    ],
)
def test_in_place_operations(function: Callable[[Tensor], Any]) -> None:
    model = Lambda(function).eval()
    captured = capture(model, torch.randn(4, 6))
    targets = {node.target for node in captured.graph_module.graph.nodes}
    assert not any(
        isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        for target in targets
    )
    for batch in (4, 3):
        x = torch.randn(batch, 6)
        with torch.no_grad():
            assert_same(run(captured, x), model(x))


def test_pieces_that_are_empty_or_whole_go() -> None:
    def joined(y: Tensor) -> Any:
        whole = torch.cat([y[:, :6].sin(), y[:, 6:]], -1)
        some = torch.cat([y[:, 6:], y, y.new_zeros(0), y[:, 2:]], 1)
        wider = torch.cat([y.half(), y[:, 6:]], 1)  # the empty piece decides the dtype
        return whole, some, wider, torch.cat([y[:, 6:], y[:, 6:]], 1)

    model = Lambda(joined).eval()
    captured = capture(model, torch.randn(4, 6))
    nodes = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.aten.cat.default]
    assert sorted(len(node.args[0]) for node in nodes) == [2, 2, 2]
    x = torch.randn(3, 6)
    assert_same(run(captured, x), model(x))


def test_input_changed_in_place() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.layer(x) + x

    x = torch.randn(2, 3)
    before = x.clone()
    model = Changes().eval()
    captured = capture(model, x)
    assert torch.equal(x, before)
    assert any("input in place" in note for note in captured.notes)
    assert_same(run(captured, x), model(before.clone()))
    assert torch.equal(x, before)


def test_buffer_changed_in_place_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.layer(x) + self.calls

    model = Counts().eval()
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+.*the model's own tensor calls"):
        capture(model, torch.randn(2, 3))
    assert torch.equal(model.calls, torch.zeros(3))


def test_the_model_is_left_as_it_was() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3)
            self.calls = 0
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(1)
            self.last = x
            return self.norm(self.layer(x))

    model = randomize(Caches())
    model.layer.weight.requires_grad_(False)
    model.layer.register_forward_hook(lambda module, args, output: output * 2)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    state, python_state = torch.get_rng_state(), random.getstate()
    x = torch.randn(2, 3)
    torch.set_rng_state(state)
    captured = capture(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert model.calls == 0
    assert model.seen == []
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == pointers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not model.training
    assert len(model.layer._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.layer.weight.requires_grad
    with torch.no_grad():
        assert_same(run(captured, x), model(x))


def test_batch_of_one_stays_free() -> None:
    captured = capture(mlp().eval(), torch.randn(1, 7))
    assert captured.dynamic_batch
    assert run(captured, torch.randn(4, 7))[0].shape == (4, 3)


def test_fixed_batch_is_noted() -> None:
    model = Lambda(lambda y: torch.stack([y[i] * i for i in range(y.shape[0])])).eval()
    captured = capture(model, torch.randn(3, 6))
    assert not captured.dynamic_batch
    assert "batch size is fixed" in captured.notes[0]
    captured = capture(model, torch.randn(1, 6))
    assert captured.graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0] == 1
    x = torch.randn(1, 6)
    assert_same(run(captured, x), model(x))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "condition",
    [
        *(lambda n: n == 1, lambda n: n > 3, lambda n: n >= 3, lambda n: n % 2 == 0),
        *(lambda n: n != 7, lambda n: n < 100),
    ],
)
def test_batch_size_that_decides_a_branch(condition: Callable[[int], bool], size: int) -> None:
    model = Lambda(lambda y: y * 5 if condition(y.shape[0]) else y * 2).eval()
    x = torch.randn(size, 6)
    captured = capture(model, x)
    assert not captured.dynamic_batch
    assert "batch size is fixed" in captured.notes[0]
    assert_same(run(captured, x), model(x))


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        (lambda x: x, None),
        (lambda x: (x,), None),
        (lambda x: [x], None),
        (lambda x: {"input": x}, None),
        (lambda x: (), lambda x: {"input": x}),
    ],
)
def test_ways_to_write_inputs(inputs: Any, kwargs: Any) -> None:
    x = torch.randn(2, 7)
    model = mlp().eval()
    captured = capture(model, inputs(x), kwargs and kwargs(x))
    assert_same(run(captured, x), model(x))


def test_dict_as_one_argument() -> None:
    class TakesDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["x"]) * batch["y"]

    model = TakesDict().eval()
    batch = {"x": torch.randn(2, 3), "y": torch.randn(2, 3)}
    assert_same(run(capture(model, batch), batch), model(batch))


def test_useless_inputs() -> None:
    with pytest.raises(InputError, match="no tensor"):
        capture(mlp().eval(), ())
    with pytest.raises(InputError, match="input is given twice"):
        capture(mlp().eval(), {"input": torch.randn(2, 7)}, {"input": torch.randn(2, 7)})


def test_graph_module_from_symbolic_trace() -> None:
    model = randomize(CASES["convolutions"].make())
    traced = fx.symbolic_trace(model)
    x = torch.randn(2, 3, 16, 16)
    captured = capture(traced, x)
    names = {n.target for n in captured.graph_module.graph.nodes if n.op == "get_attr"}
    assert "3.weight" in names
    assert_same(run(captured, x), model(x))


def test_exported_module() -> None:
    model = randomize(mlp())
    x = torch.randn(2, 7)
    captured = capture(torch.export.export(model, (x,)).module(), x)
    assert_same(run(captured, x), model(x))


def test_tied_parameters_are_one() -> None:
    captured = capture(Tied().eval(), torch.randint(13, (2, 4)))
    names = {n.target for n in captured.graph_module.graph.nodes if n.op == "get_attr"}
    assert names == {"embedding.weight", "hidden.weight", "hidden.bias", "twin.bias"}


def test_views_of_one_storage_are_not_tied() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage = torch.randn(5, 5)
            self.one = nn.Parameter(storage)
            self.two = nn.Parameter(storage.t())
            self.three = nn.Parameter(storage[:1])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.one @ self.two + self.three

    model = Shares().eval()
    x = torch.randn(2, 5)
    captured = capture(model, x)
    names = {n.target for n in captured.graph_module.graph.nodes if n.op == "get_attr"}
    assert names == {"one", "two", "three"}
    assert_same(run(captured, x), model(x))


def test_constants_are_folded() -> None:
    def masked(y: Tensor) -> Tensor:
        mask = y.new_zeros((6, 6))
        mask[2:, :3] = 1
        mask = (mask.unsqueeze(0) - mask.unsqueeze(1)).sum(0)
        return y @ mask

    model = Lambda(masked).eval()
    captured = capture(model, torch.randn(2, 6))
    calls = [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    assert calls == [aten.linear.default, aten.matmul.default]
    assert set(captured.graph_module.state_dict()) == {"layer.weight", "layer.bias"}
    x = torch.randn(3, 6)
    assert_same(run(captured, x), model(x))


def test_random_numbers_are_not_folded() -> None:
    model = Lambda(lambda y: y + torch.rand(6)).eval()
    captured = capture(model, torch.randn(2, 6))
    x = torch.randn(2, 6)
    assert not torch.equal(run(captured, x)[0], run(captured, x)[0])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_taken_off(wrap: Any) -> None:
    model = mlp().eval()
    assert capture(wrap(model), torch.randn(2, 7)).source is model


# ------------------------------------------------------------------------------- refusals


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(7, 3))


def quantized() -> nn.Module:
    import torch.ao.nn.quantized.dynamic as dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(7, 7), dynamic.Linear(7, 3))


def poisoned(value: float, buffer: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).eval()
    tensor = model[1].running_var if buffer else model[0].weight.data
    tensor.view(-1)[3] = value
    return model


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(7, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.filter).real


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(7).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, x.t())


class NoOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5)


class RecurrentDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 3, num_layers=2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (RecurrentDropout, r"dropout of lstm .*model\.eval"),
        (lambda: nn.Linear(7, 3, device="meta"), "parameter weight is on the meta device"),
        (lambda: poisoned(float("nan"), False), "parameter 0.weight holds NaN or Inf"),
        (lambda: poisoned(float("inf"), True), "buffer 1.running_var holds NaN or Inf"),
        (lambda: nn.LazyLinear(3), "not initialised"),
        (quantized, "1 is a quantized Linear"),
        (scripted, "TorchScript"),
        (Complex, "parameter filter is complex"),
        (Sparse, "parameter weight is sparse"),
        (nn.Sequential, "empty module"),
        (NoOperation, "empty module"),
        (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), r"batch norm 1 .*model\.eval"),
        (lambda: nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5)), r"dropout 1 .*model\.eval"),
        (FunctionalDropout, r"dropout .*test_capture\.py:\d+.*model\.eval"),
        (lambda: torch.relu, "expected an nn.Module"),
        (lambda: nn.Sequential(OrderedDict({"in": nn.Linear(7, 5)})), "the name in .*Python"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(RefusedError, match=message) as caught:
        capture(model, torch.randn(4, 7))
    assert "\n" not in str(caught.value)


def test_training_batch_norm_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RefusedError):
        capture(model, torch.randn(4, 7))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_data_dependent_control_flow_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    def branches(y: Tensor) -> Tensor:
        if y.sum() > 0:
            return y
        return -y

    line = branches.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"data-dependent.*test_capture\.py:{line}:") as caught:
        capture(Lambda(branches).eval(), torch.randn(2, 6))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_line_in_a_package_whose_name_begins_like_torch() -> None:
    inside = torch.__file__
    beside = inside.replace("/torch/", "/torchvision/")
    trace = f'File "{beside}", line 7, in forward\n  File "{inside}", line 9, in call'
    assert user_line(trace) == f"{beside}:7"
    assert user_line(f'File "{inside}", line 9, in call') is None


def test_model_prepared_for_quantization() -> None:
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_same(run(capture(model, x), x), model(x))


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 8), torch.randint(3, (2, 7)), (torch.randn(2, 7),) * 2]
)
def test_wrong_inputs(inputs: Any) -> None:
    with pytest.raises(CaptureError, match="Sequential does not run on the example inputs: ") as e:
        capture(mlp().eval(), inputs)
    assert "\n" not in str(e.value)


def test_control_flow_operator_is_refused() -> None:
    def branches(y: Tensor) -> Tensor:
        return torch.cond(y.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (y,))

    with pytest.raises(CaptureError, match="graph of its own"):
        capture(Lambda(branches).eval(), torch.randn(2, 6))


def test_prints() -> None:
    text = str(capture(Reused().eval(), torch.randn(2, 5)))
    assert re.match(r"Reused captured in [\d.]+ s: \d+ operations, any batch size$", text)
