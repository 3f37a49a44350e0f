"""One recorded output of a public implementation, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any


# What a header's `peer` says, where the file's name does not say it; the first that fits.
PEERS = {
    "llada21_generate_smode": "low thresholds",
    "llada21_generate": "LLaDA2.1",
    "sglang_joint": "SGLang",
    "dmax_soft_parallel": "DMax",
    "dinfer_threshold": "dInfer",
    "diffusers_pipeline": "diffusers",
    "opencompass_bd3": "huggingface_bd3.py",
    "generate_py": "generate.py",
    "jetengine": "JetEngine",
    "batch_sample": "batch_sample",
    "generate": "modeling.py generate()",
    "llada_generate": "LLaDA@",
    "fastdllm_dream": "Fast-dLLM v1 dream",
    "fastdllm": "Fast-dLLM v1",
    "dinfer_fastdllm": "dInfer",
    "dream_generate": "diffusion_generate",
    "d2f": "D2F-eval",
}
FAST_DLLM = ("generate", "batch_sample")  # of Fast-dLLM v2
LLADA = ("llada_generate", "fastdllm", "dinfer_fastdllm")
DREAM = ("dream_generate", "fastdllm_dream")
WHOLE_CANVAS = (*LLADA, *DREAM, "d2f")  # peers of models that were trained on one
DROPS_EOS = ("dinfer_threshold", "dmax_soft_parallel")


def load(path: pathlib.Path, checkpoint: pathlib.Path) -> list[Case]:
    """The cases of a recorded file.

    Raises:
      ValueError: when it is of no known peer.
    """
    data = json.loads(path.read_text())
    header, cases = (data, data["cases"]) if isinstance(data, dict) else ({}, data)
    peer = next((part for part in path.name.split(".") if part in PEERS), None)
    if peer is None:
        peer = next((name for name, said in PEERS.items() if said in header.get("peer", "")), None)
    if peer is None:
        raise ValueError(f"{path.name}: peer {header.get('peer', 'unnamed')!r} is unknown; known are {', '.join(PEERS)}")
    config = json.loads((checkpoint / "config.json").read_text())
    if peer == "fastdllm" and config["model_type"] == "Dream":
        peer = "fastdllm_dream"
    eos = header.get("eos_ids", header.get("eos_id", config["eos_token_id"]))
    mask_id = header.get("mask_id", config["mask_token_id"])
    return [Case(checkpoint.name, peer, tuple(eos if isinstance(eos, list) else [eos]), mask_id, case) for case in cases]


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded output.

    Attributes:
      checkpoint: name of the checkpoint's folder.
      peer: who decoded it, a key of :data:`PEERS`.
      eos_ids, mask_id: the checkpoint's.
      recorded: the case as it stands in the file.
    """

    checkpoint: str
    peer: str
    eos_ids: tuple[int, ...]
    mask_id: int
    recorded: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def id(self) -> str:
        return self.recorded["id"]

    @property
    def prompt(self) -> list[int]:
        return self.recorded["prompt_ids"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.recorded["settings"]

    @property
    def block(self) -> int:
        if self.peer in DREAM and not self.cached:
            return self.max_tokens
        return self.settings["block_size" if self.peer in (*FAST_DLLM, "d2f") else "block_length"]

    @property
    def cached(self) -> bool:
        """Whether a whole canvas was decoded behind a cache."""
        return self.settings.get("cache", "none") != "none"

    @property
    def max_tokens(self) -> int:
        """Fast-dLLM v2 decodes whole blocks, and then a token more; D2F begins no block once it has written an EOS."""
        if self.peer in DREAM:
            return self.settings["max_new_tokens"]
        return len(self.recorded["output"]) if self.peer in (*FAST_DLLM, "d2f") else self.settings["gen_length"]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end the output, none where the peer goes on after EOS."""
        if self.peer in WHOLE_CANVAS:
            return ()
        if self.peer == "diffusers_pipeline" and not self.settings["eos_early_stop"]:
            return ()
        if self.peer in FAST_DLLM:
            return (self.settings["stop_token"],)
        return tuple(self.settings.get("stop_ids", self.eos_ids))

    @property
    def decoded(self) -> list[int]:
        """What the peer decoded after the prompt, to the end of its last block: dInfer and DMax drop EOS ids from what they return."""
        steps = self.recorded.get("trajectory", [])
        if self.peer not in DROPS_EOS or not all("after" in step for step in steps) or not steps:
            return self.recorded["output"]
        last = {step["start"] + i: token for step in steps for i, token in enumerate(step["after"])}
        return [last[i] for i in range(len(self.prompt), max(last) + 1)]

    @property
    def wanted(self) -> tuple[list[int], str]:
        """The tokens that ours must give, and its reason to end."""
        tokens = self.decoded[: self.max_tokens]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        return (tokens, "length") if stop is None else (tokens[:stop], "stop")
