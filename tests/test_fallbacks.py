"""What ``doctor --model`` says of a TPU and a Hopper GPU, neither of which is here: a step is traced for them, and not run."""

from __future__ import annotations

import pathlib

import jax
import pytest

from diffulex_jax import SettingError
from diffulex_jax.bench import fallbacks
from diffulex_jax.engine.config import EngineConfig
from pallas_kernels import choose_for
from pallas_kernels.target import Target


GOLDEN = pathlib.Path(__file__).parent / "golden"
TPU, TPU7X, HOPPER = Target("tpu"), Target("tpu", kind="TPU7x"), Target("gpu", 9.0)
LLADA2, SDAR, DREAM = "tiny-llada2", "families/tiny-sdar", "families/tiny-dream"
needs_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels are for JAX 0.11 or newer")


def facts(checkpoint: str, target: Target, **settings):
    return fallbacks.describe(str(GOLDEN / checkpoint), None, EngineConfig(max_model_len=256, **settings), choose_for(target))


@pytest.mark.parametrize(
    ("checkpoint", "target", "settings", "kernels", "plain"),
    [
        (SDAR, TPU, {}, "block_attention prediction remask", "linear norm rotary"),
        (SDAR, TPU, {"kernels": "reference"}, "", "block_attention linear norm prediction remask rotary"),
        (DREAM, TPU, {}, "", "block_attention linear norm prediction rotary"),  # a whole canvas, and confidences that no kernel knows
        # Pages of half a tile.
        (LLADA2, TPU7X, {}, "block_attention grouped_matmul prediction remask", "expert_choice linear norm rotary"),
        (LLADA2, TPU, {"page_size": 4}, "prediction remask", "block_attention expert_choice grouped_matmul linear norm rotary"),
        # Heads of 16 and 32; few tokens choose their experts in XLA.
        pytest.param(SDAR, HOPPER, {"dtype": "bfloat16"}, "linear prediction", "block_attention norm remask rotary", marks=needs_11),
        (LLADA2, TPU, {"kv": "int8"}, "prediction remask", "block_attention expert_choice grouped_matmul linear norm rotary"),
        (LLADA2, TPU, {"weights": "int8"}, "block_attention prediction remask", "expert_choice grouped_matmul linear norm rotary"),
        (SDAR, TPU, {"weights": "int4"}, "block_attention prediction remask", "linear norm rotary"),
        pytest.param(  # of its matrices one consists of whole tiles
            SDAR,
            HOPPER,
            {"dtype": "bfloat16", "weights": "int8"},
            "linear prediction",
            "block_attention norm remask rotary",
            marks=needs_11,
        ),
        pytest.param(
            LLADA2,
            HOPPER,
            {"dtype": "bfloat16", "weights": "fp8"},
            "linear prediction",
            "block_attention expert_choice grouped_matmul norm remask rotary",  # matrices that are no whole tiles
            marks=needs_11,
        ),
        pytest.param(
            LLADA2,
            HOPPER,
            {"dtype": "bfloat16"},
            "grouped_matmul linear prediction",
            "block_attention expert_choice norm remask rotary",
            marks=needs_11,
        ),
    ],
)
def test_what_a_kernel_does_not_take_falls_back(checkpoint, target, settings, kernels, plain):
    found = facts(checkpoint, target, **settings)["kernels"]
    assert " ".join(name for name, entry in found.items() if entry["runs"] == "kernel") == kernels
    assert " ".join(name for name, entry in found.items() if entry["runs"] == "plain XLA") == plain


def test_it_is_said_in_a_line_each():
    lines = fallbacks.text(facts(DREAM, TPU)).splitlines()
    assert lines[0].split(": ")[1] == "dream, float32, blocks of 512"
    assert {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in map(str.strip, lines[1:])} == {
        "block_attention": "plain XLA: 'tpu' does not take this model with these settings",
        "expert_choice": "not used",
        "grouped_matmul": "not used",
        "linear": "sliced",
        "norm": "reference",
        "prediction": "plain XLA: 'tpu' does not take this model with these settings",
        "remask": "not used",
        "rotary": "reference",
        "token_merge": "not used",
    }


def test_a_setting_that_will_not_do_is_refused():
    with pytest.raises(SettingError, match="attention='full' is not for this model"):
        facts(SDAR, TPU, attention="full")
