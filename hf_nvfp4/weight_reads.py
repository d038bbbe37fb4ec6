"""How a module's code uses its layers: calls them, or reads their weights and multiplies by itself.

A converted layer quantizes in its forward; whoever reads `layer.weight` and multiplies goes past that. Knows source
code; knows nothing of recipes.
"""

import ast
import functools
import inspect
import textwrap

CALLED, READ, BOTH = "called", "read", "both"
# What is asked of a weight without multiplying by it.
_METADATA = {"data", "device", "dim", "dtype", "ndim", "numel", "requires_grad", "shape", "size"}


@functools.cache
def uses(cls: type) -> dict[str, str]:
    """Attribute -> CALLED, READ or BOTH, for what the methods of a class do with self.<attribute>.

    READ: of all that they do with it, something is done with its weight, and the rest is not more than reading its
    bias. Any other use counts as a call. Methods that build or initialize are not looked at; classes without source
    have no uses.
    """
    found: dict[str, set[str]] = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, method in vars(base).items():
            if inspect.isfunction(method) and base.__module__ != "torch.nn.modules.module" and "init" not in name:
                for attribute, use in _uses_of_method(method):
                    found.setdefault(attribute, set()).add(use)
    return {name: BOTH if len(ways) > 1 else ways.pop() for name, ways in found.items()}


@functools.cache
def _uses_of_method(method) -> frozenset[tuple[str, str]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError):
        return frozenset()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            parent = parents.get(node)
            if not isinstance(parent, ast.Attribute):
                found.add((node.attr, CALLED))
            elif parent.attr == "weight" and _multiplies(parent, parents):
                found.add((node.attr, READ))
    return frozenset(found)


def _multiplies(weight: ast.Attribute, parents: dict) -> bool:
    """Whether a weight is used for its values, as far as one can see, and not stored into or asked for its dtype."""
    parent = parents.get(weight)
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _METADATA
    is_test = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
    return isinstance(weight.ctx, ast.Load) and not is_test
