"""Function calls in the text of an answer, and whether one is the call that was wanted.

The rules are those of the AST checker of the Berkeley Function-Calling Leaderboard for Python (package
bfcl_eval, eval_checker/ast_eval): names are exact; required parameters must be there and unknown
ones must not; every value must be among the accepted ones; an int is taken for a float and nothing else is
converted, a bool is no int; strings are compared without case, spaces and the marks , . / - _ * ^; "" among
the accepted values marks a parameter that may be left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
"""A function's full name and its arguments."""

_TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_FENCE = re.compile(r"```(?:\w+)?\s*\n?(.*?)```", re.DOTALL)
_IGNORED = re.compile(r"[ ,./\-_*^]")


def parse_calls(text: str) -> list[Call]:
    """The calls in a text: `f(a=1)`, `[f(a=1), g.h(b="x")]`, or either in a code fence.

    Raises ValueError when it is none of these, or an argument has no name.
    """
    fenced = _FENCE.search(text)
    source = (fenced.group(1) if fenced else text).strip()
    try:
        parsed = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a call: {error}") from None
    nodes = parsed.elts if isinstance(parsed, (ast.List, ast.Tuple)) else [parsed]
    try:
        return [_call(node) for node in nodes]
    except RecursionError:  # what parses may still be too deep to walk
        raise ValueError("not a call: it is nested too deeply") from None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)[:60]} is no call")
    if node.args:
        raise ValueError(f"{ast.unparse(node.func)} has an argument without a name")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{ast.unparse(node.func)} has a ** argument")
        arguments[keyword.arg] = _value(keyword.value)
    return ast.unparse(node.func), arguments


def _value(node: ast.expr) -> Any:
    """A literal; anything else (a variable, an inner call) as the text that it is."""
    if isinstance(node, ast.Constant):
        return "..." if node.value is Ellipsis else node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand)
        if type(inner) in (int, float):
            return -inner
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        keys = [_value(key) for key in node.keys if key is not None]
        if all(isinstance(key, (str, int, float)) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    return ast.unparse(node)


def mismatch(
    calls: Sequence[Call], functions: Sequence[Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Why the calls are not the one call that was wanted; None when they are.

    functions: the descriptions that were offered.  wanted: {name: {parameter: [accepted values]}}.
    """
    if len(calls) != 1:
        return f"{len(calls)} calls, expected 1"
    (expected_name, accepted), *_ = wanted.items()
    name, arguments = calls[0]
    if name != expected_name:
        return f"the function is {name}, expected {expected_name}"
    described = next((f for f in functions if f["name"] == expected_name), None)
    if described is None:
        return f"{expected_name} is not among the functions offered"
    parameters = described["parameters"]["properties"]
    for parameter in described["parameters"].get("required", ()):
        if parameter not in arguments:
            return f"{parameter} is missing"
    for parameter, value in arguments.items():
        if parameter not in parameters or parameter not in accepted:
            return f"{parameter} is unexpected"
        reason = _value_mismatch(value, parameters[parameter], accepted[parameter])
        if reason is not None:
            return f"{parameter}: {reason}"
    for parameter, values in accepted.items():
        if parameter not in arguments and "" not in values:
            return f"{parameter} is missing"
    return None


def _value_mismatch(value: Any, description: Mapping[str, Any], accepted: Sequence[Any]) -> str | None:
    kind = description["type"]
    expected = _TYPES.get(kind, str)
    inner = None
    if kind in ("array", "tuple"):
        inner = _TYPES.get(description.get("items", {}).get("type", "any"), str)
    if kind == "tuple" and type(value) is tuple:
        value = list(value)
    if kind == "float" and type(value) is int:
        value = float(value)
    stated = next((type(a) for a in accepted if a != ""), None)
    # Where the accepted values are of another type than described, they stand for a variable's name.
    is_variable = stated is not None and stated is not expected
    if type(value) is expected:
        if inner is not None and not _inner_types_fit(value, inner, accepted):
            return f"{value!r} has elements of another type than {inner.__name__}"
    elif stated is not None and type(value) is stated:
        is_variable = True
    else:
        return f"{value!r} is a {type(value).__name__}, expected a {kind}"
    if not is_variable:
        if expected is dict:
            return (
                None
                if any(_dict_fits(value, a) for a in accepted if a != "")
                else _not_among(value, accepted)
            )
        if expected is list and inner is dict:
            fits = any(
                len(a) == len(value) and all(_dict_fits(v, w) for v, w in zip(value, a, strict=True))
                for a in map(_elements, accepted)
            )
            return None if fits else _not_among(value, accepted)
        if expected is str:
            spelled = {_plain(a) for a in accepted if isinstance(a, str)}
            return None if _plain(value) in spelled else _not_among(value, accepted)
        if expected is list:
            plain = [_plain(v) for v in value]
            fits = any(plain == [_plain(v) for v in _elements(a)] for a in accepted)
            return None if fits else _not_among(value, accepted)
    return None if value in accepted else _not_among(value, accepted)


def _inner_types_fit(value: Any, inner: type, accepted: Sequence[Any]) -> bool:
    """Whether the elements have the type described, or that of the elements of some accepted list."""
    for candidate in accepted:
        if not isinstance(candidate, list):
            return True
        stated = next((type(c) for c in candidate if c != ""), None)
        if all(type(v) is inner or (stated is not None and type(v) is stated) for v in value):
            return True
    return False


def _elements(accepted: Any) -> Sequence[Any]:
    """Of an accepted list; "", which marks a parameter that may be left out, is the empty list, too."""
    return accepted if isinstance(accepted, list) else ()


def _dict_fits(value: Any, accepted: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(accepted, dict):
        return False
    for key, found in value.items():
        if key not in accepted or _plain(found) not in [_plain(a) for a in accepted[key]]:
            return False
    return all(key in value or "" in values for key, values in accepted.items())


def _plain(value: Any) -> Any:
    """A string as it is compared; anything else as it is."""
    if not isinstance(value, str):
        return value
    return _IGNORED.sub("", value).lower().replace("'", '"')


def _not_among(value: Any, accepted: Sequence[Any]) -> str:
    return f"{value!r} is not among {list(accepted)!r}"
