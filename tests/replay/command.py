"""The command: compares every case of a file, and prints what it finds."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffulex_jax import Engine

from .case import Case, load
from .comparable import left_out, unknown_setting
from .comparison import difference, edits, forwards
from .decoding import decode, first_steps
from .reading import SDAR_STRATEGIES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.replay",
        description="Decodes recorded outputs of public implementations again, and compares them token for token.",
    )
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
