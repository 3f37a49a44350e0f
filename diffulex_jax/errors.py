"""Errors that name what they are about, so that whoever reports them need not read their text."""

from __future__ import annotations

from typing import Any


class SettingError(ValueError):
    """A setting or a prompt that will not do.

    Attributes:
      field: dotted name of the setting: ``"top_p"``, ``"pinned"``, ``"max_model_len"``, ``"strategy"``, ``"prompt"``.
    """

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, str(self))


class UnknownRequest(KeyError):
    """A number under which no request is queued or running.

    Attributes:
      id: the number, or what was given for one.
    """

    def __init__(self, id_: Any, message: str):
        super().__init__(message)
        self.id = id_

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would print its repr

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.id, str(self))
