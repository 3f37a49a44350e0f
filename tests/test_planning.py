"""Plans by arithmetic alone, and what is read from a compiled program's text. ``tests/aot`` compiles."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.cli import app
from diffulex_jax.planning import chips
from diffulex_jax.planning import plan as planning
from diffulex_jax.planning.exchanges import Exchange, exchanges_of_step
from diffulex_jax.planning.plan import plan, text


GIB = 2**30


@pytest.fixture
def nothing_compiles(monkeypatch):
    """No compiler is installed."""
    none = {name: ("not_installed", extra, opens) for name, (_, extra, opens) in chips._COMPILERS.items()}
    monkeypatch.setattr(chips, "_COMPILERS", none)


# A step of 19 layers, each with a sum of 2 x 4 bfloat16, in a branch that does not write and in one that does; rows that sample exchange
# logits; the loop of steps asks all devices whether to go on. Before it something is exchanged once a dispatch.
STEP = """HloModule jit_traced
%add (x: s32[], y: s32[]) -> s32[] {
  ROOT %sum = s32[] add(%x, %y)
}
%layer (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %psum.1 = bf16[2,4]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
%layers (p: (s32[], bf16[2,4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(19)
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}
%alone (p: bf16[2,4]) -> bf16[2,4] {
  %while.1 = (s32[], bf16[2,4]) while(%t), condition=%layers, body=%layer
}
%both (p: bf16[4,4]) -> bf16[4,4] {
  %psum.2 = bf16[4,4]{1,0} all-reduce(%x), to_apply=%add
  %while.2 = (s32[], bf16[2,4]) while(%t), condition=%layers, body=%layer, backend_config={"known_trip_count":{"n":"40"}}
}
%greedy (p: s32[2]) -> s32[2] {
  ROOT %p = s32[2] parameter(0)
}
%sampled (p: s32[2]) -> s32[2] {
  %logits = (f32[2,50], f32[2,100]) all-gather-start(%x), dimensions={1}
}
%gathers (p: s32[4]) -> s32[8] {
  ROOT %all-gather.1 = s32[8]{0} all-gather(%p), dimensions={0}
}
%step (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %c.1 = bf16[2,4] conditional(%i, %a, %b), branch_computations={%alone, %both}
  %c.2 = s32[2] conditional(%i, %a, %b), branch_computations={%greedy, %sampled}
  %g = ((s32[4]), s32[8], u32[]) call-start(%x), to_apply=%gathers
}
%go_on (p: (s32[], bf16[2,4])) -> pred[] {
  %psum.3 = (s32[], s32[]) all-reduce(%x, %y), to_apply=%add
  ROOT %and = pred[] and(%a, %b)
}
ENTRY %main (p: s32[]) -> s32[] {
  %before = f32[1000]{0} all-gather(%x), dimensions={0}
  %while.3 = (s32[], bf16[2,4]) while(%t), condition=%go_on, body=%step
}
"""


def test_what_a_step_exchanges():
    assert exchanges_of_step(STEP) == {"all-reduce": Exchange(19 + 1, 19 * 16 + 8), "all-gather": Exchange(1, 32)}


def test_what_starts_an_exchange_is_counted_once():
    """A sum for GPUs has both what goes in and what comes out, one for TPUs only the latter."""
    one = "%psum.1 = bf16[2,4]{1,0:T(8,128)} all-reduce("
    for started in ("((bf16[2,4]{1,0}), bf16[2,4]{1,0})", "bf16[2,4]{1,0:T(8,128)}"):
        assert exchanges_of_step(STEP.replace(one, f"%psum.1 = {started} all-reduce-start(")) == exchanges_of_step(STEP)


def test_a_step_of_either_kind_where_the_host_drives_loops():
    """Two loops of unknown length in the body: steps that write, and those that do not. The latter count."""
    kinds = STEP.replace("%step (p", "%steps (p").replace("body=%step", "body=%kinds")
    writes = "%writes (p: s32[]) -> s32[] {\n  %psum.9 = bf16[999] all-reduce(%x), to_apply=%add\n}\n"
    loops = "".join(f"  %while.{i} = s32[] while(%t), condition=%going, body=%{body}\n" for i, body in enumerate(("steps", "writes")))
    going = "%going (p: s32[]) -> pred[] {\n  ROOT %and = pred[] and(%a, %b)\n}\n"
    kinds = kinds.replace("ENTRY", f"{writes}{going}%kinds (p: s32[]) -> s32[] {{\n{loops}}}\nENTRY")
    assert exchanges_of_step(kinds) == exchanges_of_step(STEP)


def test_nothing_that_is_exchanged_is_lost():
    with pytest.raises(ValueError, match="exchanges something in gathers, and what calls that"):
        exchanges_of_step(STEP.replace("call-start(", "new-way-to-call("))
    with pytest.raises(ValueError, match="no loop of denoise steps"):
        exchanges_of_step("ENTRY %main (p: s32[]) -> s32[] {\n  %g = f32[1000]{0} all-gather(%x), dimensions={0}\n}\n")


@pytest.mark.parametrize("slots, measured", [(1, 8.23), (8, 13.07), (32, 16.24)])
def test_predictions_are_near_what_an_h100_took(nothing_compiles, slots, measured):
    """pallas_kernels/README.md has the measurements, behind 128 cached tokens."""
    made = plan("llada2-mini", "h100:1", slots=slots, max_len=160)
    assert made.step_ms == pytest.approx(measured, rel=0.08)
    assert made.floor_ms < made.step_ms
    assert made.tokens_per_second == pytest.approx(slots / made.step_ms * 1e3)


def test_bytes_of_each_device(nothing_compiles):
    alone, shared = (
        plan("sdar-8b", topology, slots=8, max_len=1024, mesh=mesh) for topology, mesh in (("h100:1", None), ("h100:8", "tensor=4"))
    )
    # 36 layers of 8 heads of 128 each, keys and values, in bfloat16.
    assert alone.pool == 2 * 36 * 8 * 128 * 2 * 8 * 1024
    assert shared.pool == alone.pool // 8  # two shards of slots, four of heads
    assert shared.mesh == {"data": 2, "expert": 1, "tensor": 4}
    embedding = 151_936 * 4096 * 2
    assert (alone.weights - embedding) / 4 == pytest.approx(shared.weights - embedding, rel=1e-3)  # norms stand on every device
    assert shared.exchanges == {"all-reduce": Exchange(72, 72 * 4 * 4 * 4096 * 2)}  # two a layer: four slots with blocks of four tokens
    assert alone.exchanges == {}
    assert plan("sdar-8b", "h100:1", slots=8, max_len=1024, dtype="float32").weights == 2 * alone.weights


def test_quantised_experts_are_smaller(nothing_compiles):
    plain, whole, half = (plan("llada2-mini", "v6e:2x2", slots=4, weights=form) for form in (None, "int8", "int4"))
    assert (plain.mesh["tensor"], whole.mesh["tensor"]) == (2, 1)  # 16 GB fit a chip of 31 GiB
    on_one = plan("llada2-mini", "h100:1", slots=4)
    experts = 19 * 256 * 3 * 2048 * 512
    assert on_one.weights - whole.weights == pytest.approx(experts, rel=0.01)  # a byte of two
    assert whole.weights - half.weights == pytest.approx(experts / 2, rel=0.07)  # scales of 64 rows, not of a column
    assert half.read < whole.read
    assert (whole.quantised, whole.dtype) == ("int8", "bfloat16")


def test_what_a_small_chip_holds_of_a_model_of_16_billion_parameters(nothing_compiles):
    """LLaDA2-mini with experts in int4, and four requests of 4096 tokens: 10 GiB, where bfloat16 takes 31."""
    for topology in ("v5e:1x1", "t4:1", "l4:1"):
        made = plan("llada2-mini", topology, slots=4, weights="int4")
        assert made.missing == 0 and 9.8 < (made.weights + made.pool) / 2**30 < 10.1
        assert plan("llada2-mini", topology, slots=4).missing > 0
    assert plan("llada2-mini", "v5e:1x1", slots=4, weights="int8").missing > 0
    assert plan("llada2-mini", "l4:1", slots=4, weights="int8").missing == 0


def test_keys_and_values_in_eight_bits_are_smaller(nothing_compiles):
    plain, whole, fp8 = (plan("llada2-mini", "h100:1", slots=4, kv=kv) for kv in (None, "int8", "fp8"))
    vectors = 2 * 20 * 4 * 4 * 4096  # keys and values, layers, heads, slots, positions
    assert (plain.pool, whole.pool, fp8.pool) == (256 * vectors, 130 * vectors, 128 * vectors)
    assert plain.read - whole.read == 126 * vectors and plain.weights == whole.weights
    assert "llada2, bfloat16, KV in int8, 4 slots" in text(whole) and "KV in" not in text(plain)


def test_a_model_that_keeps_no_keys_has_no_pool(nothing_compiles):
    made = plan("llada-8b", "h100:1", slots=2, max_len=512)
    assert made.pool == 0
    assert made.operations == pytest.approx(2 * 2 * 512 * 7.5e9, rel=0.1)  # the whole canvas goes through all but the embedding
    blocks = plan("llada-8b", "h100:1", slots=2, max_len=512, strategy="d2f")
    assert blocks.pool == blocks.read - made.read == 2 * 512 * 2 * 32 * 4096 * 2  # in blocks its keys are kept, and read


def test_the_smallest_split_that_leaves_a_tenth_is_proposed(nothing_compiles):
    meshes = {topology: plan("llada2-mini", topology, slots=64).mesh for topology in ("v5e:4x4", "v6e:4x4", "v5p:4x4x4", "tpu7x:2x2x1")}
    assert meshes == {
        "v5e:4x4": {"data": 4, "expert": 1, "tensor": 4},  # 30.3 GiB: 15.4 for each of two leave too little of 15.75
        "v6e:4x4": {"data": 8, "expert": 1, "tensor": 2},
        "v5p:4x4x4": {"data": 64, "expert": 1, "tensor": 1},
        "tpu7x:2x2x1": {"data": 8, "expert": 1, "tensor": 1},
    }
    assert plan("llada2-mini", "v5e:4x4", slots=6).mesh == {"data": 2, "expert": 2, "tensor": 4}  # 6 slots are not for 4 shards
    assert plan("llada2-flash", "v5e:4x4", slots=8).mesh == {"data": 1, "expert": 4, "tensor": 4}


def test_what_does_not_fit_says_how_much_is_missing(nothing_compiles):
    made = plan("llada2-flash", "h100:1", slots=1)
    assert made.missing == made.weights + made.pool - made.memory > 100 * GIB
    assert made.head_room == -made.missing
    assert f"DOES NOT FIT: {made.missing} bytes are missing on each device" in text(made)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_plan(nothing_compiles, shape):
    made = plan(shape, "h200:4", slots=8, max_len=512)
    assert made.missing == 0 < made.step_ms
    assert made.not_compiled == "the compiler for h200:4 is not installed (diffulex-jax[cuda])"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology", "v99:2x2"], "topology 'v99:2x2' is not one of v4, v5e, v5p, v6e, tpu7x, h100, h200, a100, l4, t4, a colon"),
        (["--topology", "h100:0"], "topology 'h100:0' is not one of"),
        (["--topology", "v5e:3x5"], "topology 'v5e:3x5': "),
        (["--topology", "h100:4", "--mesh", "tensor=3"], "uses 3 of the 4 devices of h100:4; no data does with expert x tensor = 3"),
        (["--topology", "h100:8", "--mesh", "tensor=2,data=2"], "uses 4 of the 8 devices of h100:8; data=4 would"),
        (["--topology", "h100:8", "--mesh", "tensor=8"], "kv_heads=4 cannot be split over 8 devices (mesh axes tensor); it can over 4"),
        (["--topology", "h100:4", "--mesh", "data=4", "--slots", "6"], "slots: slot=6 cannot be split over 4 devices (mesh axes data)"),
        (["--topology", "h100:4", "--mesh", "tensors=4"], "'tensors=4' is not AXIS=DEVICES"),
        (["--topology", "h100:1", "--max-len", "40000"], "max_model_len=40000 exceeds"),
        (["--topology", "h100:1", "--dtype", "int8"], "dtype='int8' must be one of"),
        (["--topology", "h100:1", "--weights", "nf4"], "weights='nf4' must be one of"),
        (["--topology", "h100:1", "--kv", "int4"], "kv='int4' must be one of"),
        (["--topology", "h100:1", "--strategy", "dream"], "strategy 'dream' is not for this model"),
    ],
)
def test_the_command_says_what_will_not_do(options, message):
    result = CliRunner().invoke(app, ["plan", "--model", "llada2-mini", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_prints_a_plan(nothing_compiles):
    asked = ["plan", "--model", "llada2-mini", "--topology", "v6e:2x2", "--slots", "8"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.stderr
    assert "4 device(s) as data 2 x expert 1 x tensor 2" in result.stdout
    assert "no: the compiler for v6e:2x2 is not installed (diffulex-jax[tpu])" in result.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert found["mesh"] == {"data": 2, "expert": 1, "tensor": 2}
    assert found["head_room"] == found["memory"] - found["weights"] - found["pool"]


def test_the_command_fails_where_a_model_does_not_fit(nothing_compiles):
    result = CliRunner().invoke(app, ["plan", "--model", "llada2-flash", "--topology", "h100:1", "--slots", "1", "--json"])
    assert result.exit_code == 1
    missing = json.loads(result.stdout)["missing"]
    assert result.stderr == f"error: llada2-flash does not fit on h100:1: {missing} bytes are missing on each device\n"


def test_a_directory_is_planned_by_its_config(nothing_compiles, golden_model):
    assert plan(golden_model, "h100:1", slots=4, max_len=256).strategy == "llada2"
    assert planning.want(golden_model, "dmax", planning.EngineConfig(max_model_len=256)).strategy.name == "dmax"
