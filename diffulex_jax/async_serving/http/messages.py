"""A conversation as OpenAI's clients send it, their own earlier answers included."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from diffulex_jax.async_serving.http.fields import Lacking, Strict, kind_of, unsupported
from diffulex_jax.engine.messages import normalize


_PARTS = {
    "image_url": "images",
    "image": "images",
    "input_image": "images",
    "input_audio": "sounds",
    "audio_url": "sounds",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
}


class Part(Strict):
    """A piece of a message: text, or the refusal of an earlier answer, which is text too."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise unsupported(f"{_PARTS.get(kind, f'parts of type {kind[:50]!r}')} are not supported; send text")
        return part

    @model_validator(mode="after")
    def _says_something(self) -> Part:
        if getattr(self, self.type) is None:
            raise PydanticCustomError("missing", "the field {name} is missing", {"name": self.type})
        return self


def _kind_of_content(value: Any) -> str:
    return "as-list" if kind_of(value) == "as-ids" else kind_of(value)


Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1)]
Content = Annotated[Annotated[str, Tag("as-text")] | Annotated[Parts, Tag("as-list")], Discriminator(_kind_of_content)]


class Message(Strict):
    """One turn. What an answer of this server, or of another that speaks the protocol, holds may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: str | None = None
    type: Literal["text", "message"] = "text"
    tool_calls: Annotated[Any, Lacking("tool calls are not supported", ([],))] = None
    function_call: Annotated[Any, Lacking("function calls are not supported")] = None
    audio: Annotated[Any, Lacking("audio is not supported")] = None
    annotations: Annotated[Any, Lacking("annotations are not supported", ([],))] = None
    reasoning: Annotated[Any, Lacking("reasoning is not supported", ("",))] = None
    reasoning_content: Annotated[Any, Lacking("reasoning is not supported", ("",))] = None
    provider_specific_fields: Annotated[Any, Lacking("fields of other providers are not supported", ({}, {"refusal": None}))] = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_tools(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise unsupported(f"messages of role {role!r} are not supported: there are no tool calls")
        return role

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "a message of role {role} needs content", {"role": repr(self.role)})
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it. The name of who speaks goes along; most templates do not look at it."""
        said = self.model_dump(include={"role", "content", "refusal", "name"}, exclude_none=True)
        return normalize([{"content": None} | said])[0]

    @property
    def characters(self) -> int:
        """Length of its text."""
        return len(self.plain()["content"])


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]
