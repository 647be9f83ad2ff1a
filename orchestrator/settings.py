"""How a setting is declared, explained and read: a field of a frozen dataclass, a flag, a TOML key of the same name."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from orchestrator.errors import UserError


def setting(
    default: Any,
    *,
    result: bool = True,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        default: its value when nothing is given.
        result: whether another value gives another result.
        choices: the allowed words, where they are few.
        low, high: the allowed range of a number, both included.
        below: what it must be less than.
    """
    allowed = {"choices": tuple(choices), "low": low, "high": high, "below": below}
    return field(default=default, metadata={"result": result, **allowed})


def settings(config_type: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Field name -> dataclass field, in the order of declaration."""
    return {f.name: f for f in dataclasses.fields(config_type)}


def help_texts(config_type: type[Any]) -> dict[str, str]:
    """Field name -> the docstring under the field, joined to one line."""
    texts: dict[str, str] = {}
    for cls in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts


def flag(name: str) -> str:
    """A setting's name as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def parse_value(config_type: type[Any], name: str, raw: Any) -> Any:
    """The typed value of setting `name` from a flag's text or a TOML value; raises UserError with one line."""
    meta = settings(config_type)[name].metadata
    if isinstance(raw, dict | list):
        raise UserError(f"{flag(name)}: a table or list in TOML; give one value, as on the command line")
    hint = typing.get_type_hints(config_type)[name]
    kinds = [
        k for k in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if k is not type(None)
    ]
    try:
        value = _convert(kinds[0], raw)
    except ValueError as error:
        raise UserError(f"{flag(name)} {raw}: {error}") from None
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{flag(name)} {raw}: not known; choose from {', '.join(meta['choices'])}")
    low, high, below = meta["low"], meta["high"], meta["below"]
    if below is not None and not low <= value < below:
        raise UserError(f"{flag(name)} {raw}: out of range; give a number from {low:g}, less than {below:g}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"from {low:g}" + (f" to {high:g}" if high is not None else "")
        raise UserError(f"{flag(name)} {raw}: out of range; give a number {bounds}")
    return value


def _convert(kind: Any, raw: Any) -> Any:
    if hasattr(kind, "parse"):
        return raw if isinstance(raw, kind) else kind.parse(str(raw))
    if kind is bool:
        words = {"true": True, "false": False}
        if str(raw).lower() not in words:
            raise ValueError("write true or false")
        return words[str(raw).lower()]
    if kind is str:
        if not isinstance(raw, str):
            raise ValueError("write a text in quotes")
        return raw
    try:
        if isinstance(raw, bool) or (kind is int and isinstance(raw, float)):
            raise ValueError
        value = kind(raw)
    except (ValueError, TypeError, OverflowError):  # TOML has dates too, and whole numbers of any length
        raise ValueError("not a whole number" if kind is int else "not a number") from None
    if kind is float and not -float("inf") < value < float("inf"):
        raise ValueError("not a finite number")
    return value
