"""As much of JSON Schema as our own schema files use; an unknown keyword is an error."""

from __future__ import annotations

from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
ANNOTATIONS = {"$schema", "$defs", "title", "description"}


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """What is wrong with `value`, one line each; empty if it is valid."""
    found: list[str] = []
    for keyword, wanted in schema.items():
        if keyword == "$ref":
            found += violations(value, resolve(wanted, root), root, at)
        elif keyword == "oneOf":
            fitting = [option for option in wanted if not violations(value, option, root, at)]
            found += [] if len(fitting) == 1 else [f"{at}: fits {len(fitting)} of {len(wanted)} forms"]
        elif keyword == "type":
            names = [wanted] if isinstance(wanted, str) else wanted
            found += [] if any(is_type(value, name) for name in names) else [f"{at}: {value!r} is no {wanted}"]
        elif keyword == "const":
            found += [] if value == wanted else [f"{at}: {value!r} is not {wanted!r}"]
        elif keyword in ("minimum", "maximum"):
            out = is_type(value, "number") and (value < wanted if keyword == "minimum" else value > wanted)
            found += [f"{at}: {value!r} against {keyword} {wanted}"] if out else []
        elif keyword == "required":
            found += [f"{at}: {name} is missing" for name in wanted if isinstance(value, dict) and name not in value]
        elif keyword == "properties":
            for name, sub in wanted.items():
                if isinstance(value, dict) and name in value:
                    found += violations(value[name], sub, root, f"{at}.{name}")
        elif keyword == "additionalProperties":
            others = (
                [name for name in value if name not in schema.get("properties", {})] if isinstance(value, dict) else []
            )
            for name in others:
                found += (
                    [f"{at}: {name} is unknown"]
                    if wanted is False
                    else violations(value[name], wanted, root, f"{at}.{name}")
                )
        elif keyword == "items":
            for i, item in enumerate(value if isinstance(value, list) else ()):
                found += violations(item, wanted, root, f"{at}[{i}]")
        elif keyword not in ANNOTATIONS:
            raise AssertionError(f"keyword {keyword!r} is not implemented here")
    return found


def resolve(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    """`#/$defs/name`."""
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def is_type(value: Any, name: str) -> bool:
    if name in ("number", "integer"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])
