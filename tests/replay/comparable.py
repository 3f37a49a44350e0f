"""Which recorded outputs say something about ours: what a case asks for must be known here, and float64 must give the same tokens."""

from __future__ import annotations

from .case import DREAM, FAST_DLLM, LLADA, WHOLE_CANVAS, Case
from .reading import DREAM_STRATEGIES, SDAR_STRATEGIES


LEAST_MARGIN = 1e-6  # between what was chosen and what was not: what float32 tells apart

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
