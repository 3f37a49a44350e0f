"""What a user types never becomes a control token.

A chat template writes control tokens around messages: the same characters typed into a message must stay text. So they are
marked before the template is rendered. After that, what stands unmarked is the template's own, and only that is encoded as
control tokens: by a copy of the tokenizer in which those have names that nobody can type.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer


# Nobody can guess these, so nobody can type them. Digits and private characters pass case changes and normalizers.
_SECRET = f"\ue000{secrets.randbits(96)}"
_BEGIN, _END = f"{_SECRET}\ue001", f"{_SECRET}\ue002"


class Shield:
    """Keeps control tokens of one tokenizer out of messages."""

    def __init__(self, tokenizer: Tokenizer, controls: Iterable[str]):
        """``controls``: the added tokens that steer the model."""
        longest_first = sorted(controls, key=len, reverse=True)
        self._original = tokenizer
        self._names = {text: f"{_SECRET}.{i}\ue003" for i, text in enumerate(longest_first)}
        any_control = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._typed = re.compile(any_control)
        self._rendered = re.compile(f"{_BEGIN}({any_control}){_END}|{_BEGIN}|{_END}|({any_control})")

    def finds_nothing(self, value: Any) -> bool:
        """Whether no text in ``value`` holds, or could complete, a control token, as it is or normalized."""
        if isinstance(value, str):
            normalizer = self._original.normalizer
            forms = {value} if normalizer is None else {value, normalizer.normalize_str(value)}
            return all(self.mark(form) == form for form in forms)
        if isinstance(value, Mapping):
            return all(self.finds_nothing(item) for item in value.values())
        return not isinstance(value, (list, tuple)) or all(self.finds_nothing(item) for item in value)

    def mark(self, value: Any) -> Any:
        """``value`` with the control tokens in all its texts marked, whole ones and parts that a neighbour might complete."""
        if isinstance(value, str):
            marked = self._typed.sub(rf"{_BEGIN}\g<0>{_END}", value)
            completes = any(value.startswith(control[n:]) for control in self._names for n in range(1, len(control)))
            begins = any(value.endswith(control[:n]) for control in self._names for n in range(1, len(control)))
            return f"{_BEGIN if completes else ''}{marked}{_END if begins else ''}"
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def encode(self, rendered: str) -> list[int]:
        """Token ids of what a template made of marked messages."""
        text = self._rendered.sub(lambda found: self._names[found[2]] if found[2] else found[1] or "", rendered)
        return self._renamed.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _renamed(self) -> Tokenizer:
        return _rename(self._original, self._names)


def _rename(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A copy of ``tokenizer`` whose tokens in ``names`` keep their ids under other names."""
    plan = json.loads(tokenizer.to_str())
    for token in plan["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = plan["model"]
    if isinstance(vocab := model.get("vocab"), dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    renamed = Tokenizer.from_str(json.dumps(plan))
    moved = [text for text, name in names.items() if renamed.token_to_id(name) != tokenizer.token_to_id(text)]
    if moved:
        raise ValueError(f"the tokenizer gives {moved[0]!r} another id when it is read again; its tokenizer.json is inconsistent")
    return renamed
