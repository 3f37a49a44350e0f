"""Reading ``config.json``: strict about every key that might change the computation.

A key is read by its family, or fixed to the values that the family implements, or on the list of those that do not matter here. Any
other is an error, unless it asks for nothing (null, false, zero or empty).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


IGNORED = frozenset(
    """
    _name_or_path attention_dropout auto_map bos_token_id dtype embedding_dropout ep_size fuse_cross_entropy
    initializer_range max_window_layers output_dropout output_router_logits pad_token_id router_aux_loss_coef torch_dtype
    transformers_version use_cache
    """.split()
)
"""Keys that do not change what a forward computes: names and provenance, training, and how ``transformers`` runs it. ``pad_token_id`` and
``bos_token_id`` concern tokenizers, which have files of their own; ``max_window_layers`` matters with sliding windows only."""

Only = Mapping[str, tuple[Any, ...]]
"""Keys that change the computation, with the values that are implemented; the first is the one written back."""


def read(cls: type, raw: Mapping[str, Any], only: Only) -> dict[str, Any]:
    """The fields of the dataclass ``cls`` from a ``config.json`` mapping.

    Args:
      cls: its fields are named as the keys are.
      raw: the mapping; null means that a key is not there.
      only: see :data:`Only`.

    Raises:
      ValueError: naming a missing key, or a key whose value asks for something that is not implemented.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        if value is None and key in fields and fields[key].type == "float":
            raise ValueError(f"config: {key} is null; it must be a number")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key, value in _rope(raw.pop("rope_parameters", {})).items():
        raw.setdefault(key, value)
    if set(raw.get("layer_types", ())) <= {"full_attention"}:
        raw.pop("layer_types", None)
    for key, value in raw.items():
        if key in only and value not in only[key]:
            raise ValueError(f"config: {key}={_shown(value)} is not implemented; supported: {', '.join(map(_shown, only[key]))}")
        if key not in fields and key not in only and key not in IGNORED and value:
            raise ValueError(f"config: {key}={_shown(value)} is not implemented, and it may change what the model computes")
    found = {key: value for key, value in raw.items() if key in fields}
    found["eos_token_id"] = end_ids(raw.get("eos_token_id"))
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in found]
    if missing:
        raise ValueError(f"config: missing {', '.join(missing)}")
    return found


def written(config: Any, only: Only, *, dtype: str) -> dict[str, Any]:
    """The ``config.json`` mapping that :func:`read` reads back; ``dtype`` names the dtype of the stored weights."""
    fields = dataclasses.asdict(config)
    eos = fields["eos_token_id"]
    fields["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    fixed = {key: allowed[0] for key, allowed in only.items() if allowed[0] is not None}
    return fixed | fields | {"pad_token_id": eos[0] if eos else None, "torch_dtype": dtype}


def end_ids(value: Any) -> tuple[int, ...]:
    """The ids of an ``eos_token_id`` entry: none, one, or a list."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def positive(config: Any, *names: str) -> None:
    """Checks that fields are positive integers.

    Raises:
      ValueError: naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"config: {name}={_shown(value)} must be a positive integer")


def divides(config: Any, small: str, large: str) -> None:
    """Checks that one field divides another.

    Raises:
      ValueError: naming both.
    """
    if getattr(config, large) % getattr(config, small):
        raise ValueError(f"config: {small}={getattr(config, small)} must divide {large}={getattr(config, large)}")


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``rope_parameters`` (transformers 5) as they stood beside the others before."""
    flat = {key: value for key, value in parameters.items() if value is not None}
    if flat.pop("rope_type", "default") != "default":
        raise ValueError(f"config: rope_parameters.rope_type={parameters['rope_type']!r} is not implemented; only 'default' is")
    if unknown := flat.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"config: rope_parameters.{min(unknown)}={_shown(flat[min(unknown)])} is not implemented")
    return flat


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
