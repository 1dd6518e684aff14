"""The oracles see what is wrong: every deliberately wrong rule fails them, the right one passes."""

import functools

import pytest
import rule_checks
import wrong_rules
from wrong_rules import WRONG

from fxfib.capture import Captured, capture
from fxfib.errors import FxfibError
from fxfib.passes.rules import all_rules
from fxfib.passes.rules.examples import Example


@functools.cache
def cases_of(rule: str) -> dict[str, Example]:
    """Every case of a rule's examples as an example of its own; the first of each name."""
    if not rule:
        return wrong_rules.own_examples()
    found: dict[str, Example] = {}
    owner = next(r for r in all_rules().values() if type(r).__name__ == rule)
    for example in owner.examples():
        if not hasattr(example.module, "cases"):
            found.setdefault(example.name, example)
            continue
        for name, module in example.module.cases.items():
            path = f"cases.{name}."
            slots = {
                (parameter.removeprefix(path), axis): labels
                for (parameter, axis), labels in example.slots.items()
                if parameter.startswith(path)
            }
            found.setdefault(name, Example(name, module.eval(), example.inputs, slots))
    return found


@functools.cache
def captured(rule: str, case: str) -> Captured:
    example = cases_of(rule)[case]
    return capture(example.module, example.inputs)


def check(rule: str, case: str, *, slots: bool) -> None:
    """Colors, result and parameters of one case."""
    model = captured(rule, case)
    rule_checks.check_colors(model)
    small = rule_checks.check_result(model, cases_of(rule)[case], slots=slots)
    names = {name for name, _ in small.named_parameters()}
    known = {name for name, _ in model.source.named_parameters()}
    doubled = {name for name in names - known if not name.endswith("bias")}
    assert not doubled, f"new parameters: {sorted(doubled)}"


EVERY = [(name, case) for name, entry in WRONG.items() for case in entry.cases]


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_the_right_rule_passes_and_the_wrong_one_is_caught(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = WRONG[name]
    check(entry.rule, case, slots=True)
    entry.patch(monkeypatch)
    # By values alone: not because other merges were expected.
    with pytest.raises((AssertionError, FxfibError)):
        check(entry.rule, case, slots=False)
