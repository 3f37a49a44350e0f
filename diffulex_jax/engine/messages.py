"""The messages of a conversation, in whatever form people send them, as a chat template takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def normalize(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages whose content is text. The one reading of messages, offline and over HTTP.

    Content may be text, None (no text: an assistant's turn that only called tools, or refused), or a list of text parts, which are
    joined: ``"..."``, ``{"type": "text", "text": "..."}`` or ``{"type": "refusal", "refusal": "..."}``. Other keys that hold None are
    absent. Roles are the template's to judge.

    Raises:
      ValueError: naming the message and what is wrong with it.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f'messages must be a list of {{"role": ..., "content": ...}}, got {messages!r:.100}')
    if not messages:
        raise ValueError("messages is empty; give at least one")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{name} must be {{"role": ..., "content": ...}}, got {message!r:.100}')
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{name} has role {role!r:.100}; it must be text, such as 'user'")
    if "content" not in message:
        raise ValueError(f"{name} has no content")
    content = _content(f"{name}.content", message["content"]) or _content(f"{name}.refusal", message.get("refusal"))
    others = {key: value for key, value in message.items() if key not in ("role", "content", "refusal") and value is not None}
    return {"role": role, "content": content} | others


def _content(name: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        check_text(name, content)
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{name} must be text or a list of text parts, got {content!r:.100}")
    return "".join(_part(f"{name}[{i}]", part) for i, part in enumerate(content))


def _part(name: str, part: Any) -> str:
    if isinstance(part, Mapping):
        if (kind := part.get("type", "text")) not in ("text", "refusal"):
            raise ValueError(f"{name} is of type {kind!r:.100}; only text is supported")
        part = part.get(kind)
    if not isinstance(part, str):
        raise ValueError(f'{name} must be {{"type": "text", "text": "..."}}, got text {part!r:.100}')
    check_text(name, part)
    return part


def check_text(name: str, text: str) -> None:
    """Refuses text that holds bytes which are no UTF-8; Python keeps them as halves of surrogate pairs.

    Raises:
      ValueError: naming the first such byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        what = f"byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else "half a surrogate pair"
        raise ValueError(f"{name} is not UTF-8: {what} at character {error.start}") from None
