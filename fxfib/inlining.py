"""Regions of a model under a context that changes nothing, taken into the graph around them."""

from typing import Any

from torch import fx


def inline_idle_regions(graph_module: fx.GraphModule) -> None:
    """Inlines in place what the model runs under ``torch.autocast(..., enabled=False)``.

    Export makes a graph of its own of such a region.  No autocast is on around it: that would be
    another region, with one of its own inside, and stays (it is refused later, in words).
    """
    graph = graph_module.graph
    found = True
    while found:
        found = False
        for node in list(graph.nodes):
            if _is_idle_autocast(node):
                _inline(graph_module, node)
                found = True
    unread = [n for n in graph.nodes if n.op == "get_attr" and not n.users]
    for node in unread:
        graph.erase_node(node)


def _is_idle_autocast(node: fx.Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "wrap_with_autocast":
        return False
    _device, _dtype, enabled, _cache, inner = node.args[:5]
    return enabled is False and isinstance(inner, fx.Node) and inner.op == "get_attr"


def _inline(graph_module: fx.GraphModule, node: fx.Node) -> None:
    graph, inner = graph_module.graph, node.args[4]
    assert isinstance(inner, fx.Node)
    region = graph_module.get_submodule(str(inner.target))
    assert isinstance(region, fx.GraphModule)
    operands = iter(node.args[5:])
    copies: dict[fx.Node, Any] = {}
    result: Any = None
    with graph.inserting_before(node):
        for old in region.graph.nodes:
            if old.op == "placeholder":
                copies[old] = next(operands)
            elif old.op == "get_attr":
                name = f"{inner.target}_{str(old.target).replace('.', '_')}"
                value: Any = region
                for part in str(old.target).split("."):
                    value = getattr(value, part)
                setattr(graph_module, name, value)
                copies[old] = graph.get_attr(name)
                copies[old].meta = dict(old.meta)
            elif old.op == "output":
                result = fx.map_arg(old.args[0], copies.__getitem__)
            else:
                copies[old] = graph.node_copy(old, copies.__getitem__)
    if isinstance(result, (tuple, list)):
        for reader in list(node.users):
            # It gives several values, and each reader takes one.
            assert reader.op == "call_function" and isinstance(reader.args[1], int)
            reader.replace_all_uses_with(result[reader.args[1]])
            graph.erase_node(reader)
    else:
        node.replace_all_uses_with(result)
    graph.erase_node(node)


__all__ = ["inline_idle_regions"]
