"""Reading ``config.json``: strict about every key that might change the computation.

A key is read by its family, or fixed to the values that the family implements, or on the list of those that do not matter here. Any
other is an error, unless it asks for nothing (null, false, zero or empty).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
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

LARGEST = 2**31 - 1
"""No number of a config is larger."""
MOST_LAYERS, MOST_EXPERTS = 2**12, 2**17
"""No network has more layers, or more experts in all its layers together. Their tensors are declared before any file is read."""

Only = Mapping[str, tuple[Any, ...]]
"""Keys that change the computation, with the values that are implemented; the first is the one written back."""


def read(cls: type, raw: Mapping[str, Any], only: Only) -> dict[str, Any]:
    """The fields of the dataclass ``cls`` from a ``config.json`` mapping.

    Args:
      cls: its fields are named as the keys are.
      raw: the mapping; null means that a key is not there, and is an error where a number with a fraction is read.
      only: see :data:`Only`.

    Raises:
      ValueError: naming a missing key, or a key whose value is of the wrong type or asks for something that is not implemented.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        if value is None and key in fields and fields[key].type == "float":
            raise ValueError(f"config: {key} is null; it must be a number")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key, value in _rope(raw.pop("rope_parameters", {})).items():
        if raw.setdefault(key, value) != value:
            raise ValueError(f"config: {key}={shown(raw[key])} contradicts rope_parameters.{key}={shown(value)}")
    if isinstance(kinds := raw.get("layer_types"), list) and all(kind == "full_attention" for kind in kinds):
        del raw["layer_types"]
    for key, value in raw.items():
        if key in only and value not in only[key]:
            known = ", ".join(shown(known) for known in only[key] if known is not None)
            raise ValueError(f"config: {key}={shown(value)} is not implemented; supported: {known}")
        if key not in fields and key not in only and key not in IGNORED and value:
            raise ValueError(f"config: {readable(key)}={shown(value)} is not implemented{_MAY_CHANGE}")
    found = {key: _typed(key, value, fields[key].type) for key, value in raw.items() if key in fields and key != "eos_token_id"}
    found["eos_token_id"] = end_ids(raw.get("eos_token_id"))
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in found]
    if missing:
        raise ValueError(f"config: missing {', '.join(missing)}")
    return found


def sizes(config: Any) -> dict[str, Any]:
    """What a ``ModelSpec`` takes from a config that has the usual names."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_positions": config.max_position_embeddings,
        "mask_id": config.mask_token_id,
        "eos_ids": config.eos_token_id,
    }


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
            raise ValueError(f"config: {name}={shown(value)} must be a positive integer")


def countable(config: Any, *, layers: str = "num_hidden_layers") -> None:
    """Checks that the field ``layers``, and ``num_experts`` if it has any, are of a size that networks have: their tensors get listed.

    Raises:
      ValueError: naming them.
    """
    count, experts = getattr(config, layers), getattr(config, "num_experts", 0)
    if count > MOST_LAYERS:
        raise ValueError(f"config: {layers}={count} must be at most {MOST_LAYERS}")
    if count * experts > MOST_EXPERTS:
        raise ValueError(f"config: num_experts={experts} in {layers}={count} layers must be at most {MOST_EXPERTS} together")


def divides(config: Any, small: str, large: str) -> None:
    """Checks that one field divides another.

    Raises:
      ValueError: naming both.
    """
    if getattr(config, large) % getattr(config, small):
        raise ValueError(f"config: {small}={getattr(config, small)} must divide {large}={getattr(config, large)}")


_MAY_CHANGE = ", and it may change what the model computes"


def _typed(key: str, value: Any, kind: Any) -> Any:
    """``value`` as a field of type ``kind``, as annotations are written, holds it."""
    holds, words = _KINDS[kind]
    if not holds(value):
        raise ValueError(f"config: {key}={shown(value)} must be {words}")
    return float(value) if kind == "float" else tuple(value) if isinstance(value, list) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, f"an integer of at most {LARGEST}"),
    "float": (lambda value: _is_int(value) or (isinstance(value, float) and math.isfinite(value)), "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "tuple[int, ...]": (lambda value: isinstance(value, list) and all(map(_is_int, value)), "a list of integers"),
}


def _rope(parameters: Any) -> dict[str, Any]:
    """The keys of ``rope_parameters`` (transformers 5) as they stood beside the others before."""
    if not isinstance(parameters, dict):
        raise ValueError(f"config: rope_parameters={shown(parameters)} must be an object")
    flat = {key: value for key, value in parameters.items() if value is not None}
    if flat.pop("rope_type", "default") != "default":
        raise ValueError(f"config: rope_parameters.rope_type={shown(parameters['rope_type'])} is not implemented; only 'default' is")
    if unknown := flat.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"config: rope_parameters.{readable(min(unknown))}={shown(flat[min(unknown)])} is not implemented")
    return flat


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, not too long."""
    text = json.dumps(value, default=repr) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def readable(name: str, most: int = 120) -> str:
    """A name from somebody else's file as a message shows it: in one line, not too long."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= most else text[: most - 3] + "..."
