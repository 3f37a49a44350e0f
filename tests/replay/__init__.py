"""Decodes recorded outputs of public implementations again, and compares them token for token.

    python -m tests.replay tests/golden/tiny-llada2.sglang_joint.json tests/golden/tiny-llada2 [--json]

A recorded file is a list of cases, or an object with ``cases`` and a header; golden/README.md describes it. Exit status: 0 if all
that was compared is equal, 1 if something differs or a case asks for a setting that is not known here, 2 if nothing could be compared.
"""

from .case import PEERS, Case, load
from .command import main, replay
from .comparable import left_out, unknown_setting
from .comparison import difference, edits, forwards
from .decoding import FIRST_STEPS, Decoded, EngineKey, decode, engine_key, first_steps


__all__ = [
    "FIRST_STEPS",
    "PEERS",
    "Case",
    "Decoded",
    "EngineKey",
    "decode",
    "difference",
    "edits",
    "engine_key",
    "first_steps",
    "forwards",
    "left_out",
    "load",
    "main",
    "replay",
    "unknown_setting",
]
