"""What is different between a recorded output and ours: tokens, forwards and edits."""

from __future__ import annotations

from .case import DREAM, FAST_DLLM, LLADA, Case
from .decoding import Decoded, to_block_end
from .reading import SDAR_STRATEGIES, reading, steps_of_a_block


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
    whole = None if case.peer == "batch_sample" else to_block_end(case)  # it pads what it decoded after a stop token
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
        idle = s["steps"] - steps_of_a_block(case) * (s["gen_length"] // s["block_length"]) if case.peer == "llada_generate" else 0
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
