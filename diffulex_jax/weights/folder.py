"""The files of a model directory, which is untrusted input: what is read of it, and what is wrong with it in one line.

No file is opened but those of the directory itself. They may be links, as in the hub's cache.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from diffulex_jax.models.hf_config import readable


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
"""Files beside the weights; the tokenizer's library reads more."""
BUFFERS = (".rotary_emb.inv_freq",)
"""How tensors of old checkpoints end that are computed, not read, as in Hugging Face's own loader."""

_AGAIN = "download the model anew"
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.msgpack", "*.npz")


def read_json(file: pathlib.Path, *, strict: bool = True) -> dict[str, Any]:
    """The object in a JSON file, UTF-8 with or without a byte order mark.

    Args:
      file: the file.
      strict: refuse a key that is there twice.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    check_pointer(file)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{readable(max(keys, key=keys.count))} is there twice")
        return found

    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique if strict else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def check_pointer(file: pathlib.Path) -> None:
    """Refuses what git left where a large file belongs.

    Raises:
      ValueError: naming the file and what to do.
    """
    try:
        with open(file, "rb") as raw:
            pointer = raw.read(40).startswith(b"version https://git-lfs")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if pointer:
        raise ValueError(f"{file} is a git-LFS pointer, not the file; run 'git lfs pull' in {file.parent}")


def open_tensors(file: pathlib.Path) -> Any:
    """An open safetensors file.

    Raises:
      ValueError: where it is none, or only a part of one.
    """
    check_pointer(file)
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); {_AGAIN}") from error


def read_float8(file: pathlib.Path, name: str) -> np.ndarray:
    """A tensor in float8_e4m3fn, which NumPy's side of safetensors does not know.

    The file was found whole by :func:`open_tensors`: it begins with the length of a JSON object, which says where each tensor lies.
    """
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        entry = json.loads(raw.read(length))[name]
        first, end = entry["data_offsets"]
        raw.seek(8 + length + first)
        return np.frombuffer(raw.read(end - first), ml_dtypes.float8_e4m3fn).reshape(entry["shape"])


def tensors_in(path: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[pathlib.Path, Any]]:
    """Which tensor is in which file: the index says so, else ``model.safetensors`` alone, else all safetensors files.

    Returns:
      The file of each tensor by its name, and the open files.

    Raises:
      ValueError: where files are missing or broken, contradict the index, or hold a name twice.
    """
    where = _indexed(path / INDEX) if (path / INDEX).is_file() else None
    files = _unindexed(path) if where is None else sorted(set(where.values()))
    opened, found = {file: open_tensors(file) for file in files}, dict[str, pathlib.Path]()
    for file, tensors in opened.items():
        for name in tensors.keys():
            if name.endswith(BUFFERS):
                continue
            if name in found:
                both = f"{found[name].name} and {file.name}"
                raise ValueError(f"{path}: {readable(name)} is in both {both}; remove the file that does not belong")
            found[name] = file
    if where is not None:
        for name, file in where.items():
            if not name.endswith(BUFFERS) and found.get(name) != file:
                raise ValueError(f"{path / INDEX} says that {readable(name)} is in {file.name}, which does not hold it; {_AGAIN}")
    return found, opened


def tokenizer_end_ids(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, Any]]:
    """The ids of the ``eos_token`` that a tokenizer's files name, each with the file that gives it; none where no file knows the token.

    Raises:
      ValueError: for a file that is broken.
    """
    text = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if text is None and (path / name).is_file():
            token = read_json(path / name, strict=False).get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return
    if (path / "tokenizer.json").is_file():
        tokenizer = read_json(path / "tokenizer.json", strict=False)
        model = tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict) and text in vocabulary:
            yield path / "tokenizer.json", vocabulary[text]
        added = tokenizer.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict) and entry.get("content") == text:
                yield path / "tokenizer.json", entry.get("id")
    elif (path / "tokenizer_config.json").is_file():
        decoder = read_json(path / "tokenizer_config.json", strict=False).get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and entry.get("content") == text:
                yield path / "tokenizer_config.json", int(key) if key.isdecimal() else key


def _indexed(index: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file of the index's own folder each tensor is said to be in."""
    where: Mapping[str, Any] | Any = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map is missing or empty; {_AGAIN}")
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            place = readable(repr(file))
            raise ValueError(f"{index}: {readable(name)} is said to be in {place}, which is no safetensors file of this folder")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index}: {readable(name)} is said to be in {readable(file)}, which is not there; {_AGAIN}")
    return {name: index.parent / file for name, file in where.items()}


def _unindexed(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights of a folder that has no index."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        others = sorted(file.name for pattern in _OTHERS for file in path.glob(pattern))
        hint = f"; {readable(others[0])} is of a format that is not read: convert it" if others else ""
        raise ValueError(f"{path} holds no safetensors file{hint}")
    for file in files:
        if (part := re.search(r"-(\d{5})-of-(\d{5})\.safetensors$", file.name)) and int(part[2]) != len(files):
            raise ValueError(f"{path} holds {len(files)} of the {int(part[2])} files of weights that {file.name} belongs to; {_AGAIN}")
    return files
