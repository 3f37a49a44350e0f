"""Small model directories to break, and what loading says of them."""

from __future__ import annotations

import json
import pathlib
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scripted import MODEL

from diffulex_jax.models.base import init
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint, folder


WORDS, NORM = "model.word_embeddings.weight", "model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def small_checkpoint(path: pathlib.Path) -> pathlib.Path:
    """Writes a checkpoint of our own."""
    checkpoint.save(path, MODEL, init(MODEL, jax.random.key(0), scale=1.0), dtype="float32")
    return path


def words_of(path):
    return np.asarray(checkpoint.load(path, make_mesh())[1]["embed"])


def refusal(path) -> str:
    """What loading says, which is one line of a readable length that names the directory."""
    with pytest.raises(ValueError) as error:
        checkpoint.load(path, make_mesh())
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1500
    assert str(path) in message
    return message


def split(path: pathlib.Path, parts: int = 2) -> dict[str, str]:
    """Replaces the file of weights by several and an index; returns its map."""
    tensors, where = sorted(load_file(path / "model.safetensors").items()), {}
    (path / "model.safetensors").unlink()
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[i::parts]), path / file)
        where |= {name: file for name, _ in tensors[i::parts]}
    index(path, where)
    return where


def index(path: pathlib.Path, where) -> None:
    (path / folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def rewrite(path: pathlib.Path, **tensors) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def raw_file(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data
