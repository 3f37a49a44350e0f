"""How ours decodes what a peer's settings mean: the strategy and its settings, a family at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffulex_jax import SamplingParams

from .case import DREAM, FAST_DLLM, LLADA, Case


END_OF_TURN = 508  # <|eot_id|> of the tiny LLaDA checkpoints, which no config names

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


class Reading(NamedTuple):
    """How ours decodes what a case's settings mean."""

    strategy: str
    params: SamplingParams


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
    return Reading("llada", SamplingParams(cfg_scale=s.get("cfg_scale", 0.0), denoising_steps=steps_of_a_block(case), **params))


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


def steps_of_a_block(case: Case) -> int:
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
