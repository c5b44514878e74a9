"""Sections of settings: strict, frozen, and written as TOML that explains itself."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def commented_toml(settings: Section, title: str, unset: str = "…") -> str:
    """The settings as TOML with their docstrings as comments; reads back as equal settings.

    A key without a value is a comment, in which `unset` stands where its value would.
    """
    lines = [*_comment(title), *_entries(settings, unset)]
    for name, section in settings:
        if isinstance(section, Section):
            lines += ["", "", *_comment(type(section).__doc__), f"[{name}]"]
            lines += _entries(section, unset)
    return "\n".join(lines) + "\n"


def _entries(section: Section, unset: str) -> Iterator[str]:
    """Lines for every key that is no section of its own."""
    for key, value in section.model_dump(mode="json").items():
        if not isinstance(value, dict):
            yield from _comment(type(section).model_fields[key].description)
            yield f"# {key} = {unset}" if value is None else f"{key} = {_toml(value)}"


def _comment(text: str | None) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text or "", width=92)]


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    # A JSON string is a TOML string, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
