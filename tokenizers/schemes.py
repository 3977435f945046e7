"""The action-tokenization schemes by name, and opening the folder that any of them saved."""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from vla.tokenizers.protocol import ActionTokenizer
from vla.types import problem

FILE = "scheme.json"
SCHEMES = {
    "uniform": "vla.tokenizers.uniform:UniformTokenizer",
    "quantile": "vla.tokenizers.quantile:QuantileTokenizer",
    "fast": "vla.tokenizers.fast:FastTokenizer",
    "vq": "vla.tokenizers.vq:VqTokenizer",
    "fsq": "vla.tokenizers.fsq:FsqTokenizer",
    "keyboard_mouse": "vla.tokenizers.keyboard_mouse:KeyboardMouseTokenizer",
    "integer_text": "vla.tokenizers.integer_text:IntegerTextTokenizer",
}
"""Scheme -> "module:class"; a module is imported when its scheme is used."""


def scheme_class(name: str) -> Any:
    """The class of a scheme. VlaError listing the known ones."""
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, SCHEMES, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise problem(f"action-token scheme {name!r}", f"one of {', '.join(SCHEMES)}", fix)
    module, _, attribute = SCHEMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def scheme_of(tokenizer: ActionTokenizer) -> str:
    """The name of a tokenizer's scheme. VlaError for a class that is not in `SCHEMES`."""
    mine = f"{type(tokenizer).__module__}:{type(tokenizer).__qualname__}"
    for name, where in SCHEMES.items():
        if where == mine:
            return name
    raise problem(f"action tokenizer {mine}", f"one of {', '.join(SCHEMES.values())}", "add it to SCHEMES")


def load_tokenizer(folder: Path) -> ActionTokenizer:
    """The tokenizer that `ActionTokenizer.save` wrote into `folder`.

    Raises:
        VlaError: no scheme.json, one that is not JSON, an unknown scheme, or whatever the scheme finds missing.
    """
    return scheme_class(read_scheme(folder)["scheme"]).load(folder)


def read_scheme(folder: Path) -> dict[str, Any]:
    """`folder/scheme.json`, with the field `scheme`. For `load_tokenizer` and for the schemes themselves."""
    path = folder / FILE
    if not path.is_file():
        raise problem(f"no {FILE} in {folder}", "the folder of an action tokenizer",
                      "check the path, or make one with `vla tokenizer fit`")  # fmt: skip
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file from a copy") from error
    if not isinstance(data, dict) or not isinstance(data.get("scheme"), str):
        raise problem(f"{path} without a scheme", '{"scheme": name, ...}', "restore the file from a copy")
    return data


def field_of(data: dict[str, Any], name: str, kind: type, folder: Path) -> Any:
    """`data[name]` of a scheme.json, checked to be a `kind` (an int passes for float). VlaError naming file and field."""
    value: Any = data.get(name)
    number = isinstance(value, int) and not isinstance(value, bool)
    if not (number if kind is int else isinstance(value, kind) or (kind is float and number)):
        raise problem(f"{folder / FILE}: {name} = {value!r}", f"a field {name!r} of type {kind.__name__}",
                      "restore the file from a copy")  # fmt: skip
    return kind(value)
