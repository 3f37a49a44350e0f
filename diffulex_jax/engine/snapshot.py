"""Snapshots: a request between two steps as plain arrays, to a file and back."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from diffulex_jax.engine.request import Tracked
from diffulex_jax.request_state import Saved
from diffulex_jax.sampling_params import SamplingParams


VERSION = 2


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What ``Engine.restore`` needs to continue a request to the identical output.

    Attributes:
      fingerprint: what must agree with the engine that continues it: model, strategy, dtype and geometry.
      prompt: ``[n]`` int32.
      params: the request's settings.
      tokens: generated tokens that were final.
      start: absolute position of its window.
      saved: its row and KV; None where it had not begun to decode.
    """

    fingerprint: Mapping[str, str]
    prompt: np.ndarray
    params: SamplingParams
    tokens: list[int]
    start: int
    saved: Saved | None

    def request(self, id_: int) -> Tracked:
        """The request, for the scheduler that is to continue it under the number ``id_``."""
        request = Tracked(id=id_, prompt=self.prompt, params=self.params, tokens=list(self.tokens), start=self.start)
        if self.saved is not None:
            row = self.saved.row
            request.saved, request.written = self.saved, int(row.written_upto) // row.tokens.shape[-1]
            request.nfe, request.revised, request.remasked = int(row.nfe), int(row.revised), int(row.remasked)
        return request

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; everything that is not an array is JSON in its metadata."""
        params = dataclasses.asdict(dataclasses.replace(self.params, pinned=None, init_tokens=None))
        for name in ("pinned", "init_tokens"):
            chosen = getattr(self.params, name)
            params[name] = None if chosen is None else sorted(chosen.items())
        meta = {
            "version": VERSION,
            "fingerprint": dict(self.fingerprint),
            "params": params,
            "tokens": self.tokens,
            "start": self.start,
            "decoding": self.saved is not None,
        }
        leaves = {} if self.saved is None else {f"saved.{i}": _writable(a) for i, a in enumerate(jax.tree.leaves(self.saved))}
        save_file({"prompt": self.prompt} | leaves, path, metadata={"snapshot": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: Any) -> Snapshot:
        """Reads what :meth:`save` wrote.

        Args:
          path: the file.
          like: a ``Saved`` of the engine that will continue it (``Engine.saved_structure``), for its tree structure.

        Raises:
          ValueError: when the file is no snapshot, of another version, or of another structure.
        """
        with safe_open(path, framework="numpy") as file:
            raw = (file.metadata() or {}).get("snapshot")
            if raw is None:
                raise ValueError(f"{path} is not a snapshot")
            meta = json.loads(raw)
            if meta["version"] != VERSION:
                raise ValueError(f"{path} is a snapshot of version {meta['version']}; this is version {VERSION}")
            count = sum(name.startswith("saved.") for name in file.keys())
            leaves = [file.get_tensor(f"saved.{i}") for i in range(count)]
            prompt = file.get_tensor("prompt")
        saved = None
        if meta["decoding"]:
            expected, treedef = jax.tree.flatten(like)
            if len(expected) != count:
                raise ValueError(f"{path} holds {count} arrays; this engine's strategy and kv keep {len(expected)}")
            bytes_ = {i: leaf.dtype for i, leaf in enumerate(expected) if leaf.dtype == _FP8}
            saved = jax.tree.unflatten(treedef, [leaf.view(bytes_.get(i, leaf.dtype)) for i, leaf in enumerate(leaves)])
        for name in ("pinned", "init_tokens"):
            if meta["params"][name] is not None:
                meta["params"][name] = dict(meta["params"][name])
        return cls(meta["fingerprint"], prompt, SamplingParams(**meta["params"]), meta["tokens"], meta["start"], saved)


_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def _writable(leaf: Any) -> np.ndarray:
    """A leaf as safetensors writes it from NumPy, which knows no float8."""
    array = np.asarray(leaf)
    return array.view(np.uint8) if array.dtype == _FP8 else array
