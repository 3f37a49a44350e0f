"""How forms are read. Null is absent. An unknown field is an error. A field for something that is not here takes only the values that ask
for nothing, and an error says what is missing. The first error of a list is the only one: a body may hold a million."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema


_MOST_FIELDS = 256  # of a form; each unknown one would be an error of its own
_MOST_OFFSETS = 65536

UNSUPPORTED = "unsupported"  # type of the errors that name what is missing


class Strict(BaseModel):
    """No unknown fields, no strings for numbers, no NaN, no text that cannot be encoded; a field that is null was not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, form: Any) -> Any:
        if not isinstance(form, dict):
            return form
        if len(form) > _MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "an object of {count} fields is no request", {"count": len(form)})
        return {name: value for name, value in form.items() if value is not None}

    @field_validator("*")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no character") from None
        return value


@dataclasses.dataclass(frozen=True)
class Lacking:
    """Marks a field (of type Any) for something that is not here.

    Attributes:
      says: what is missing, as a sentence.
      neutral: the values that ask for nothing, beside null.
    """

    says: str
    neutral: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": f"Only a value that asks for nothing: {self.says}."}

    def _check(self, value: Any) -> Any:
        if any(value == none and isinstance(value, bool) == isinstance(none, bool) for none in self.neutral):
            return value
        raise unsupported(self.says)


def unsupported(says: str) -> PydanticCustomError:
    """The error for what is not here; ``says`` is a sentence."""
    return PydanticCustomError(UNSUPPORTED, "{says}", {"says": says})


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_OFFSETS:
        raise PydanticCustomError("too_many_offsets", "at most {most} offsets can be given", {"most": _MOST_OFFSETS})
    return value


def kind_of(value: Any) -> str:
    """Which of the shapes of a prompt or a message's content a value can only be. The names are no identifiers, so that they
    are told apart from fields in an error's location."""
    if not isinstance(value, list):
        return "as-text"
    return "as-ids" if not value or isinstance(value[0], int) else "as-list"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Given = Annotated[dict[str, TokenId], BeforeValidator(_few), Field(description='token ids by offset: {"0": 17}')]


def _told_apart(says: str) -> Discriminator:
    return Discriminator(kind_of, custom_error_type="kind", custom_error_message=says)


Prompt = Annotated[
    Annotated[Text, Tag("as-text")] | Annotated[Ids, Tag("as-ids")], _told_apart("a prompt is a text or a list of token ids")
]
Prompts = Annotated[
    Annotated[Text, Tag("as-text")] | Annotated[Ids, Tag("as-ids")] | Annotated[list[Prompt], Field(fail_fast=True), Tag("as-list")],
    _told_apart("prompts are a text, a list of token ids, or a list of these"),
]
