"""The table of a recipe's keys, from the classes that validate it: ``python -m pairtile.engine.recipe_keys``.

It is printed, and stands between two marks in README.md beside this file; a test compares them. ``--write`` puts it there.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .recipe import Recipe

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- recipe keys: python -m pairtile.engine.recipe_keys --write -->\n", "<!-- end of recipe keys -->\n"
#: Limits of numbers, as annotated_types names them.
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def keys_table() -> str:
    """All keys in Markdown: dotted name, what it takes, its default, what it does."""
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {takes} | {default} | {what} |" for name, takes, default, what in _rows(Recipe, "", {})]
    return "\n".join(lines) + "\n"


def documented(text: str) -> str:
    """The table that a README holds.

    Raises:
        ValueError: the marks are missing.
    """
    _, begin, rest = text.partition(BEGIN)
    table, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no table of recipe keys: expected it between {BEGIN.strip()} and {END.strip()}")
    return table


def _rows(model: type[BaseModel], prefix: str, seen: dict[Any, str]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        inner, listed = _model_of(field.annotation)
        key = f"{prefix}{name}"
        what = (field.description or "").replace("|", "\\|")
        if inner is None:
            yield key, _takes(field), _default(field), what
            continue
        if inner in seen:
            yield key, f"the keys of `{seen[inner]}`", _default(field), what
            continue
        seen[inner] = key
        if _default(field) == "none":
            yield key, "its own keys, or null", "none", what
        yield from _rows(inner, f"{key}[]." if listed else f"{key}.", seen)


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The class of a group of keys, and whether the key takes a list of such groups."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for each in get_args(annotation):
        inner, _ = _model_of(each)
        if inner is not None:
            return inner, get_origin(annotation) is list
    return None, False


def _takes(field: FieldInfo) -> str:
    text, null, _ = _type_text(field.annotation).partition(" or null")
    limits = [
        f"{sign} {getattr(each, name):g}"
        for each in field.metadata
        for name, sign in _LIMITS.items()
        if getattr(each, name, None) is not None
    ]
    return " ".join([text, *limits]) + null


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else _type_text(each) for each in arguments)
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} of {_type_text(arguments[0])}"
    if origin is dict:
        return "mapping"
    words = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel) or (isinstance(value, list) and value and isinstance(value[0], BaseModel)):
        return "as below"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        text = README.read_text(encoding="utf-8")
        documented(text)  # the marks are there
        before, _, rest = text.partition(BEGIN)
        README.write_text(before + BEGIN + keys_table() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(keys_table(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
