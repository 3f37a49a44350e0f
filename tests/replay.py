"""Decodes recorded outputs of public implementations again, and compares them token for token.

    python -m tests.replay tests/golden/tiny-llada2.sglang_joint.json tests/golden/tiny-llada2 [--json]

A recorded file is a list of cases, or an object with ``cases`` and a header; golden/README.md describes it. Exit status: 0 if all
that was compared is equal, 1 if something differs or a case asks for a setting that is not known here, 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.results import Output


LEAST_MARGIN = 1e-6  # between what was chosen and what was not: what float32 tells apart
END_OF_TURN = 508  # <|eot_id|> of the tiny LLaDA checkpoints, which no config names
FIRST_STEPS = 5  # of a case that float64 decodes differently: so far rounding has not changed a token yet

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

_EVERY = {"gen_length", "block_length", "threshold"}
_LLADA = {"gen_length", "block_length", "steps"}
_DREAM = {"max_new_tokens", "steps", "alg", "eps", "top_p", "top_k", "left_pad", "seed"}
_SDAR = _EVERY | {"strategy", "denoising_steps", "stop_ids"}
_LLADA21 = _EVERY | {"editing_threshold", "max_post_steps", "num_to_transfer", "eos_early_stop"}
_DINFER = _EVERY | {"early_stop", "cache", "vectorized_decoding"}
SETTINGS = {
    "llada21_generate_smode": _LLADA21,
    "llada21_generate": _LLADA21,
    "sglang_joint": _EVERY | {"algo", "edit_threshold", "max_post_edit_steps", "penalty_lambda"},
    "dmax_soft_parallel": _DINFER,
    "dinfer_threshold": _DINFER,
    "diffusers_pipeline": _LLADA21 | {"num_inference_steps", "mask"},
    "opencompass_bd3": _SDAR,
    "generate_py": _SDAR,
    "jetengine": _SDAR | {"eb_threshold", "unify"},
    **dict.fromkeys(FAST_DLLM, {"threshold", "max_new_tokens", "block_size", "small_block_size", "stop_token", "use_block_cache"}),
    "llada_generate": _LLADA | {"cfg_scale", "left_pad", "remasking", "seed", "logits_eos_inf", "confidence_eos_eot_inf"},
    "fastdllm": _LLADA | {"cache", "threshold", "factor"},
    "dinfer_fastdllm": _LLADA | {"cache", "threshold", "factor", "early_stop", "eos_id"},
    "dream_generate": _DREAM,
    "fastdllm_dream": _DREAM | {"cache", "threshold", "block_length"},
    "d2f": {"max_new_tokens", "block_size", "block_add_threshold", "decoded_token_threshold", "skip_threshold"},
}
DREAM_STRATEGIES = {
    "entropy": "dream",
    "maskgit_plus": "dream_maskgit_plus",
    "topk_margin": "dream_topk_margin",
    "origin": "dream_origin",
    "confidence_threshold": "dream_threshold",
}

# Ours for each of a peer's strategies; None where it says nothing about ours: see `left_out`.
SDAR_STRATEGIES: dict[str, dict[str, str | None]] = {
    "opencompass_bd3": {"low_confidence_dynamic": "sdar", "low_confidence_static": "sdar"},
    "generate_py": {"sequential": "sdar_sequential", "low_confidence_dynamic": None, "low_confidence_static": None},
    "jetengine": {
        "low_confidence_dynamic": "sdar_leftmost",
        "low_confidence_static": "sdar",
        "sequential": "sdar_sequential",
        "entropy_bounded": "sdar_entropy",
    },
}


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


class Reading(NamedTuple):
    """How ours decodes what a case's settings mean."""

    strategy: str
    params: SamplingParams


class Decoded(NamedTuple):
    """Ours: the output, and, where forwards are counted there, the output up to the end of the peer's last block."""

    output: Output
    to_block_end: Output | None


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


def unknown_setting(case: Case) -> str | None:
    """What a case asks for that is not known here."""
    for name in case.settings:
        if name not in SETTINGS[case.peer]:
            return f"setting {name!r} of {case.peer} is unknown; known are {', '.join(sorted(SETTINGS[case.peer]))}"
    if case.peer in DREAM and (alg := case.settings["alg"]) not in DREAM_STRATEGIES:
        return f"alg {alg!r} of {case.peer} is unknown; known are {', '.join(DREAM_STRATEGIES)}"
    if case.peer in SDAR_STRATEGIES and (strategy := case.settings.get("strategy")) not in SDAR_STRATEGIES[case.peer]:
        return f"strategy {strategy!r} of {case.peer} is unknown; known are {', '.join(SDAR_STRATEGIES[case.peer])}"
    return None


def left_out(case: Case) -> str | None:
    """The reason why a case says nothing about ours; None where it is compared. It depends on what was recorded alone."""
    s = case.settings
    if case.peer in WHOLE_CANVAS and case.recorded["fp64_same"]:
        return _canvas_left_out(case)
    if case.recorded.get("quirk"):
        return case.recorded["quirk"]
    if not case.recorded["fp64_same"]:
        return f"unstable: float64 gives other tokens after {case.recorded.get('fp64_agree_steps', ['some'])[0]} steps"
    if s.get("vectorized_decoding"):
        return "vectorized decoding is another algorithm"
    if case.peer == "diffusers_pipeline":
        if "causal" in s["mask"] and "block-causal" not in s["mask"]:
            return "run with the pipeline's own 2-D mask: plainly causal, not block-causal"
        if s["eos_early_stop"] and s["editing_threshold"] and case.wanted[1] == "stop":
            return "an EOS ends it although tokens before it would still be edited"
    if case.peer in FAST_DLLM:
        if len(case.prompt) == case.block:
            return "a prompt of exactly one block is not read at all by the peer"
        if not case.recorded["output"]:
            return "max_new_tokens is less than a block, for which the peer decodes nothing"
    if case.peer in SDAR_STRATEGIES or case.peer in FAST_DLLM:
        if case.peer in SDAR_STRATEGIES and SDAR_STRATEGIES[case.peer][s["strategy"]] is None:
            return "generate.py measures confidence after top-k: decoding greedily every position has 1"
        if not case.recorded.get("mask_excluded_same", True):
            return "the peer predicts the mask id; ours never does"
        if case.mask_id in case.wanted[0]:
            return "the peer gives masks out as tokens"
    return None


def _canvas_left_out(case: Case) -> str | None:
    """A quirk that is noted says nothing against a case, unless the peer gave masks out."""
    margins = [case.recorded.get(name) for name in ("min_select_gap", "min_threshold_margin")]
    if case.mask_id in case.recorded["output"]:
        return "the peer gives masks out as tokens"
    if case.settings.get("remasking") == "random" or case.settings.get("alg") == "origin":
        return "the peer draws the order by a generator of its own"
    if case.settings.get("early_stop") and case.settings["eos_id"] in case.recorded["output"]:
        return "early_stop: the peer puts EOS behind the first one before all in front of it is filled"
    if case.peer in LLADA and case.settings.get("cache") == "dual" and case.recorded.get("quirk"):
        return case.recorded["quirk"]  # it gives up on a block after its steps
    if any(margin is not None and margin < LEAST_MARGIN for margin in margins):
        return f"its choices hang on less than {LEAST_MARGIN:g}"
    return None


def reading(case: Case) -> Reading:
    """The strategy and settings that mean what the peer's settings mean."""
    families = {**dict.fromkeys(SDAR_STRATEGIES, _sdar), **dict.fromkeys(FAST_DLLM, _fast_dllm)}
    families |= {**dict.fromkeys(LLADA, _llada), **dict.fromkeys(DREAM, _dream), "d2f": _d2f}
    return families.get(case.peer, _llada2)(case)


def _fast_dllm(case: Case) -> Reading:
    s = case.settings
    params = SamplingParams(
        max_tokens=case.max_tokens,
        accept_threshold=s["threshold"],
        sub_block=s["small_block_size"],
        ignore_eos=True,
        stop_token_ids=case.stop_ids,
    )
    return Reading("fast_dllm_v2", params)


def _llada(case: Case) -> Reading:
    """The peer's ``steps`` are those of all blocks; those that find no mask are no forwards of ours."""
    s = case.settings
    params: dict[str, Any] = {"max_tokens": s["gen_length"], "block_length": s["block_length"], "ignore_eos": True}
    if "factor" in s:
        return Reading("llada_factor", SamplingParams(confidence_factor=s["factor"], **params))
    if s.get("threshold") is not None:
        return Reading("llada_threshold", SamplingParams(accept_threshold=s["threshold"], **params))
    if s.get("logits_eos_inf"):
        params |= {"ignore_eos": False, "min_tokens": s["gen_length"]}
    if s.get("confidence_eos_eot_inf"):
        params["doubted_token_ids"] = (*case.eos_ids, END_OF_TURN)
    return Reading("llada", SamplingParams(cfg_scale=s.get("cfg_scale", 0.0), denoising_steps=_steps_of_a_block(case), **params))


def _dream(case: Case) -> Reading:
    """Behind a cache the peer rations nothing, and ranks by entropy whatever ``alg`` says."""
    s, sure = case.settings, case.settings["alg"] == "confidence_threshold"
    params: dict[str, Any] = {"top_p": s["top_p"] or 1.0, "top_k": s["top_k"] or 0, "ignore_eos": True}
    if sure:
        params["accept_threshold"] = s["threshold"]
    elif "eps" in s:
        params["eps"] = s["eps"]
    params |= {"block_length": case.block, "num_to_transfer": case.block} if case.cached else {}
    if not (sure and case.cached):
        params["denoising_steps"] = s["steps"] // (case.max_tokens // case.block)
    strategy = DREAM_STRATEGIES[s["alg"] if sure or not case.cached else "entropy"]
    return Reading(strategy, SamplingParams(max_tokens=case.max_tokens, **params))


def _d2f(case: Case) -> Reading:
    s = case.settings
    params = SamplingParams(
        max_tokens=case.max_tokens,
        accept_threshold=s["skip_threshold"],
        add_block_threshold=s["block_add_threshold"],
        semi_complete_threshold=s["decoded_token_threshold"],
        ignore_eos=True,
    )
    return Reading("d2f", params)


def _steps_of_a_block(case: Case) -> int:
    s = case.settings
    return min(s["steps"] // (s["gen_length"] // s["block_length"]), s["block_length"])


def _sdar(case: Case) -> Reading:
    s = case.settings
    static = s["strategy"] == "low_confidence_static"
    params = SamplingParams(
        max_tokens=s["gen_length"],
        denoising_steps=min(s["denoising_steps"], case.block),  # more steps than positions: one each, the rest have none left
        accept_threshold=1.0 if static else s.get("threshold", 1.0),
        entropy_bound=s.get("eb_threshold", 0.0),
        ignore_eos=True,
        stop_token_ids=case.stop_ids,
    )
    strategy = SDAR_STRATEGIES[case.peer][s["strategy"]]
    assert strategy is not None, f"{case.id} is left out"
    return Reading(strategy, params)


def _llada2(case: Case) -> Reading:
    s = case.settings
    params: dict[str, Any] = {"max_tokens": s["gen_length"], "accept_threshold": s["threshold"], "ignore_eos": not case.stop_ids}
    if case.peer == "dmax_soft_parallel":
        return Reading("dmax", SamplingParams(**params))
    for theirs in ("num_to_transfer", "penalty_lambda"):
        if theirs in s:
            params[theirs] = s[theirs]
    if "num_inference_steps" in s:  # diffusers: with a threshold above 1, each step fills its quota
        params["denoising_steps"] = s["num_inference_steps"]
    edit_threshold = s.get("editing_threshold", s.get("edit_threshold"))
    if edit_threshold is None or (case.peer == "diffusers_pipeline" and edit_threshold == 0):
        return Reading("llada2", SamplingParams(**params))
    post = s.get("max_post_steps", s.get("max_post_edit_steps", 16))
    # diffusers counts its post steps after the forward, the others before: it runs one more.
    post += case.peer == "diffusers_pipeline"
    return Reading("llada2_edit", SamplingParams(edit_threshold=edit_threshold, max_post_edit_steps=post, **params))


def decode(cases: Sequence[Case], engine_for: Callable[..., Engine]) -> dict[tuple[str, str], Decoded]:
    """Ours for every case, by ``(peer, id)``; all cases of a strategy and block size go through one engine, several in a batch.

    ``engine_for(strategy=..., block_size=..., ...)`` builds an engine.
    """
    groups: dict[EngineKey, list[Case]] = {}
    for case in cases:
        groups.setdefault(engine_key(case), []).append(case)
    decoded = {}
    for group in groups.values():
        engine = engine_of(group, engine_for)
        jobs = list(_jobs(group))
        outputs = engine.generate([case.prompt for case, _, _ in jobs], [params for *_, params in jobs])
        by_job = {(case.peer, case.id, whole): output for (case, whole, _), output in zip(jobs, outputs, strict=True)}
        for case in group:
            at = (case.peer, case.id)
            decoded[at] = Decoded(by_job[*at, False], by_job.get((*at, True)))
    return decoded


class EngineKey(NamedTuple):
    """What cases must have in common to go through one engine.

    Attributes:
      strategy, block: its name, and the block size. On a whole canvas one engine takes blocks of many lengths.
      more: other settings of the engine, each with its value.
    """

    strategy: str
    block: int
    more: tuple[tuple[str, Any], ...] = ()


def engine_key(case: Case) -> EngineKey:
    """The engine for a case."""
    strategy, s = reading(case).strategy, case.settings
    if case.peer in LLADA + DREAM:
        return EngineKey(strategy, -(-case.block // 64) * 64, (("cache", s.get("cache", "none")),))
    if case.peer == "d2f":  # as many blocks at once as there are
        return EngineKey(strategy, case.block, (("buffer_size", max(4, -(-case.max_tokens // case.block))),))
    if case.peer in FAST_DLLM and s["use_block_cache"]:
        return EngineKey(strategy, case.block, (("sub_block_cache", s["small_block_size"]),))
    return EngineKey(strategy, case.block)


def engine_of(cases: Sequence[Case], engine_for: Callable[..., Engine]) -> Engine:
    """The engine for cases of one :func:`engine_key`."""
    key = engine_key(cases[0])
    longest = max(len(case.prompt) + case.max_tokens for case in cases) + (key.block if cases[0].peer not in LLADA + DREAM else 0)
    room = max(64, key.block)
    length = max(256, -(-longest // room) * room)
    sizes = {"block_size": key.block, "force_block_size": True, "max_slots": 4, "max_model_len": length}
    return engine_for(strategy=key.strategy, **sizes, **dict(key.more))


def _jobs(cases: Sequence[Case]) -> Iterator[tuple[Case, bool, SamplingParams]]:
    for case in cases:
        params = reading(case).params
        yield case, False, params
        if (tokens := _to_block_end(case)) is not None:
            yield case, True, dataclasses.replace(params, max_tokens=len(tokens), stop_token_ids=())


def _to_block_end(case: Case) -> list[int] | None:
    """All that a peer decoded, where it goes on after a stop token: up to there both spend the same forwards."""
    if case.peer == "batch_sample":
        return case.decoded
    if case.peer not in SDAR_STRATEGIES:
        return None
    output = [*case.decoded, case.mask_id]
    output = output[: output.index(case.mask_id)]
    return output if output and (len(case.prompt) + len(output)) % case.block == 0 else None


def difference(case: Case, ours: Decoded) -> str | None:
    """What is different, in one line."""
    (tokens, reason), got, end = case.wanted, ours.output.token_ids, ours.output.finish_reason
    if case.peer == "diffusers_pipeline":
        # It hides the positions past prompt + gen_length in the last block, so that a block cut short decodes differently.
        whole = (len(case.prompt) + case.settings["gen_length"]) // case.block * case.block - len(case.prompt)
        if len(tokens) > whole:
            tokens, got, end = tokens[:whole], got[:whole], reason
    return _unlike(tokens, got) or (None if end == reason else f"ends with {end!r}, wanted {reason!r}") or _unlike_to_block_end(case, ours)


def _unlike_to_block_end(case: Case, ours: Decoded) -> str | None:
    whole = None if case.peer == "batch_sample" else _to_block_end(case)  # it pads what it decoded after a stop token
    return None if whole is None or ours.to_block_end is None else _unlike(whole, ours.to_block_end.token_ids)


def _unlike(wanted: list[int], got: list[int]) -> str | None:
    if got == wanted:
        return None
    at = next((i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), min(len(wanted), len(got)))
    return f"token {at} on: {got[at : at + 8]} ({len(got)} tokens), wanted {wanted[at : at + 8]} ({len(wanted)} tokens)"


def forwards(case: Case, ours: Decoded) -> tuple[int, int] | None:
    """Our forwards and the peer's, where it spends them as ours does; None otherwise.

    A finished block's KV costs ours no forward of its own. LLaDA's own loop goes on when all is filled, and Dream's goes through steps
    that fill nothing. A LLaDA2 peer must go to the end of the last block, and not past an EOS.
    """
    if case.peer in SDAR_STRATEGIES:
        return None if ours.to_block_end is None else (ours.to_block_end.nfe, case.recorded["nfe_denoise"])
    if case.peer in FAST_DLLM:
        # Ours counts no prefill; where the prompt ends with a block, the peer's decides a token, for which ours spends a forward.
        decides = len(case.prompt) % case.block == 0
        theirs = case.recorded["nfe"] - (len(case.prompt) > case.block and not decides)
        return (ours.to_block_end or ours.output).nfe, theirs
    if case.peer in LLADA:
        s = case.settings
        idle = s["steps"] - _steps_of_a_block(case) * (s["gen_length"] // s["block_length"]) if case.peer == "llada_generate" else 0
        return ours.output.nfe, case.recorded["nfe"] - idle
    if case.peer == "d2f":
        return ours.output.nfe, case.recorded["nfe"]
    if case.peer in DREAM:
        return ours.output.nfe, sum(bool(step["written"]) for step in case.recorded["trajectory"])
    if any(eos in case.decoded[: case.settings["gen_length"]] for eos in case.eos_ids):
        return None
    if case.peer == "dmax_soft_parallel":
        return ours.output.nfe, case.recorded["nfe"] - 1  # it counts its prefill as one
    # SGLang runs the forward after the last post step, and drops what it says; only the chaotic checkpoint gets there.
    spends_more = case.peer == "sglang_joint" and not case.checkpoint.endswith("-trained")
    if reading(case).strategy != "llada2_edit" or case.peer == "diffusers_pipeline" or spends_more:
        return None
    return ours.output.nfe, case.recorded["nfe"]


def edits(case: Case, ours: Decoded) -> tuple[int, int] | None:
    """Our revised tokens and the peer's, where it counts them as ours does; None otherwise."""
    return (ours.output.revised_tokens, case.recorded["edits"]) if case.peer in ("sglang_joint", "dmax_soft_parallel") else None


def first_steps(case: Case, engine_for: Callable[..., Engine]) -> list[tuple[list[int], list[int]]]:
    """Ours and the peer's tokens up to the first mask after each of the first steps of the first block.

    Where the peer itself gives other tokens in float64, these still count.
    """
    trajectory = [(step["start"], step["after"]) for step in case.recorded.get("trajectory", []) if "after" in step]
    steps = case.recorded.get("steps", trajectory)[: min(FIRST_STEPS, case.recorded.get("fp64_agree_steps", [FIRST_STEPS])[0])]
    steps = [(start, tokens) for start, tokens in steps if start <= len(case.prompt)]
    params, engine = reading(case).params, engine_of([case], engine_for)
    budgets = [dataclasses.replace(params, ignore_eos=True, max_nfe=n + 1) for n in range(len(steps))]
    outputs = engine.generate([case.prompt] * len(steps), budgets)
    pairs = []
    for output, (start, tokens) in zip(outputs, steps, strict=True):
        tokens = [*tokens[len(case.prompt) - start :], case.mask_id]
        pairs.append((output.token_ids, tokens[: tokens.index(case.mask_id)]))
    return pairs


def replay(cases: Sequence[Case], engine_for: Callable[..., Engine]) -> dict[str, Any]:
    """Compares every case; the object that ``--json`` prints, but for its ``file``."""
    unknown = {case.id: said for case in cases if (said := unknown_setting(case))}
    out = {case.id: said for case in cases if case.id not in unknown and (said := left_out(case))}
    compared = [case for case in cases if case.id not in unknown | out]
    ours = decode(compared, engine_for)
    differing: dict[str, str] = {}
    counts: dict[str, list[bool]] = {"forwards": [], "edits": []}
    for case in compared:
        decoded = ours[case.peer, case.id]
        if said := difference(case, decoded):
            differing[case.id] = said
            continue
        for name, count in (("forwards", forwards), ("edits", edits)):
            if (pair := count(case, decoded)) is not None:
                counts[name].append(pair[0] == pair[1])
                if pair[0] != pair[1]:
                    differing[case.id] = f"the same tokens, with {pair[0]} {name}, wanted {pair[1]}"
    for case in cases:
        if case.id in out and case.peer not in SDAR_STRATEGIES and not case.recorded["fp64_same"]:
            pairs = first_steps(case, engine_for)
            if any(got != wanted for got, wanted in pairs):
                differing[case.id] = f"one of its first {len(pairs)} steps, before float64 differs"
            elif pairs:
                out[case.id] += f"; its first {len(pairs)} steps are identical"
    unlike = sum(not said.startswith("the same tokens") for id_, said in differing.items() if id_ not in out)
    return {
        "checkpoint": cases[0].checkpoint if cases else None,
        "peer": cases[0].peer if cases else None,
        "identical": len(compared) - unlike,
        "compared": len(compared),
        "left_out": [{"id": id_, "reason": said} for id_, said in out.items()],
        "unknown": [{"id": id_, "reason": said} for id_, said in unknown.items()],
        "differing": [{"id": id_, "difference": said} for id_, said in differing.items()],
        "forwards": {"equal": sum(counts["forwards"]), "compared": len(counts["forwards"])},
        "edits": {"equal": sum(counts["edits"]), "compared": len(counts["edits"])},
        "nfe": {case.id: ours[case.peer, case.id].output.nfe for case in compared},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="recorded cases, JSON")
    parser.add_argument("checkpoint", type=pathlib.Path, help="folder of the checkpoint they were recorded on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    try:
        cases = load(options.file, options.checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else error, file=sys.stderr)
        return 2
    result = replay(cases, functools.cache(functools.partial(Engine.from_pretrained, str(options.checkpoint))))
    if options.json:
        print(json.dumps({"file": str(options.file)} | result))
    else:
        for name, word in (("differing", "differs"), ("unknown", "not compared"), ("left_out", "left out")):
            for entry in result[name]:
                print(f"{entry['id']}: {word}: {entry.get('reason') or entry.get('difference')}")
        for name in ("forwards", "edits"):
            if result[name]["compared"]:
                print(f"{result[name]['equal']}/{result[name]['compared']} with equal {name}")
        print(f"{len(result['left_out']) + len(result['unknown'])} left out")
        print(f"{result['identical']}/{result['compared']} token-identical")
    return 1 if result["differing"] or result["unknown"] else 0


if __name__ == "__main__":
    sys.exit(main())
