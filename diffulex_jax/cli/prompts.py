"""Where prompts come from: arguments, ``--prompt``, ``--prompt-file``, ``--prompt-ids`` or standard input."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence


STANDARD_INPUT = "-"


def collect(arguments: Sequence[str], *, texts: Sequence[str], files: Sequence[pathlib.Path], ids: Sequence[str]) -> list[str | list[int]]:
    """Returns all prompts: arguments, then texts, then files, or else token ids; standard input where nothing is given.

    Args:
      arguments: texts; ``-`` is standard input.
      texts: more texts.
      files: UTF-8 files of one prompt each; ``-`` is standard input.
      ids: prompts as ``1,2,3``.

    Raises:
      ValueError: where there is no prompt, one is empty, no UTF-8, or not ids, or text and ids come together.
      OSError: for a file that cannot be read.
    """
    if ids and (arguments or texts or files):
        raise ValueError("give prompts as text or as --prompt-ids, not both")
    if ids:
        return [_ids(text) for text in ids]
    if not (arguments or texts or files):
        text = "" if sys.stdin is None or sys.stdin.isatty() else _standard_input()[1]
        if not text:
            raise ValueError("no prompt: give it as an argument, by --prompt, --prompt-file or --prompt-ids, or on standard input")
        return [text]
    named = [("the prompt", text) if text != STANDARD_INPUT else _standard_input() for text in arguments]
    named += [("--prompt", text) for text in texts]
    named += [_standard_input() if str(file) == STANDARD_INPUT else (str(file), _text(str(file), file.read_bytes())) for file in files]
    for name, text in named:
        if not text:
            raise ValueError(f"{name} is empty")
    return [text for _, text in named]


def _standard_input() -> tuple[str, str]:
    name = "standard input"
    return name, _text(name, b"" if sys.stdin is None else sys.stdin.buffer.read())


def _text(name: str, content: bytes) -> str:
    """The text of a file, without its byte order mark and the line end that closes it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--prompt-ids must be integers separated by commas, got {text!r}") from None
