"""The base of all requests: strict JSON, bounded in depth, of Unicode text."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from mlx_hiermem.apps.server.refusal import ApiError

NULL, ABOUT = {"type": "null"}, ("title", "default", "description")
DEEPEST = 64  # lists and objects within one another; OpenAI takes schemas of ten levels, each of which is three


def _or_null(schema: dict[str, Any]) -> None:
    """Says in a JSON schema that what need not be given may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            forms = field.pop("anyOf", None) or [{key: field.pop(key) for key in [*field] if key not in ABOUT}]
            field["anyOf"] = [*forms, *[NULL] * (NULL not in forms)]


class StrictModel(BaseModel):
    """Base of all: JSON types are not converted, unknown fields are errors, null means not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_or_null)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if not all(_is_unicode(item) for row in data.items() for item in row):
            raise ValueError("half of a surrogate pair is no Unicode text")
        if any(_is_deep(value) for value in data.values()):
            raise ApiError(400, f"the request is more than {DEEPEST} lists or objects deep")
        return {key: value for key, value in data.items() if value is not None}


def _is_unicode(value: Any, left: int = DEEPEST) -> bool:
    """Whether a text, or each text of a list, can be encoded: JSON can write what is none."""
    if isinstance(value, list):
        return left == 0 or all(_is_unicode(item, left - 1) for item in value)
    try:
        return not isinstance(value, str) or bool(value.encode()) or not value
    except UnicodeEncodeError:
        return False


def _is_deep(value: Any, left: int = DEEPEST) -> bool:
    """Whether lists and objects are nested beyond `DEEPEST`; no field that there is needs so many."""
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_is_deep(item, left - 1) for item in inner)


def _with_unicode(value: dict[str, Any]) -> dict[str, Any]:
    """An object of any shape, all of whose texts can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no Unicode text") from None
    return value


AnyObject = Annotated[dict[str, Any], AfterValidator(_with_unicode)]


def _in_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# A list of texts, where one text may stand for a list of one. What a list may be comes after it in an Annotated.
IN_LIST = BeforeValidator(_in_list, json_schema_input_type=str | list[str])
