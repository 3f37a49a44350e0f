"""The whole denoise loop of LLaDA2-mini, compiled for chips of 16 and 32 GB that are not there."""

from __future__ import annotations

import jax
import pytest
from checks import GIB, KERNELS, MINI, check
from typer.testing import CliRunner

from diffulex_jax.bench import aot
from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.cli import app
from diffulex_jax.models.registry import model_of


pytestmark = pytest.mark.usefixtures("least_effort")


def test_four_chips_share_a_model_that_fits_none_of_them():
    compiled = aot.compile_denoise("v5e:2x2", MINI)
    check(compiled)
    assert (compiled.devices, compiled.mesh, compiled.slots) == (4, {"data": 1, "expert": 1, "tensor": 4}, 8)
    assert 8.0 < compiled.arguments / GIB < 8.5  # a quarter of 32.5 GB of weights, a whole embedding table, a pool of one head
    assert compiled.pool == 2 * 20 * 8 * 2048 * 128 * 2  # keys and values, layers, slots, positions, one head, bfloat16


def test_a_pod_of_256_takes_no_more_of_a_chip():
    compiled = aot.compile_denoise("v5e:16x16", MINI)
    check(compiled)
    assert (compiled.devices, compiled.mesh, compiled.slots) == (256, {"data": 64, "expert": 1, "tensor": 4}, 512)
    assert compiled.arguments / GIB < 8.5  # each index of `data` has slots and pages of its own


def test_soft_tokens_and_experts_apart_from_heads():
    compiled = aot.compile_denoise("v6e:2x2", MINI, strategy="dmax", expert=2, tensor=2)
    check(compiled, kernels=KERNELS | {"token_merge": 2, "remask_decide": 0})
    assert compiled.pool == 2 * 20 * 8 * 2048 * 2 * 128 * 2  # two heads a chip


def test_a_model_that_is_too_large_for_a_chip():
    large = model_of(SHAPES["llada2-mini"] | {"num_hidden_layers": 1, "intermediate_size": 2_000_000})
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory on HBM.*exceeds available HBM"):
        aot.compile_denoise("v5e:2x2", large, tensor=1, data=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology", "v99:2x2"], "no TPU topology 'v99:2x2'"),
        (["--topology", "v5e:2x2", "--tensor", "8"], "1x1x8 mesh needs 8 devices; there are 4"),
        (["--topology", "v5e:2x2", "--tensor", "3"], "mlp_down: mlp=5120 cannot be split over 3 devices (mesh axes expert, tensor)"),
        (["--topology", "v5e:2x2", "--shape", "huge"], "unknown shape 'huge'"),
    ],
)
def test_the_command_says_what_will_not_do(options, message):
    result = CliRunner().invoke(app, ["aot", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_prints_what_it_found():
    result = CliRunner().invoke(app, ["aot", "--topology", "v5e:2x2", "--shape", "tiny", "--strategy", "llada2", "--context", "256"])
    assert result.exit_code == 0, result.stderr
    assert "4 devices as data 2 x expert 1 x tensor 2" in result.stdout
    assert "16 slots of 256 positions" in result.stdout
    assert ": fits" in result.stdout
