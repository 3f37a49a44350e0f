"""Directories that hold quantised matrices: written by ``diffulex-jax quantize``, and in the layouts of public tools."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from diffulex_jax.bench.shapes import SHAPES
from diffulex_jax.cli.commands import app
from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import is_param, leaves
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.planning.plan import plan
from diffulex_jax.weights import assembly, checkpoint, formats
from diffulex_jax.weights import compressed as files
from diffulex_jax.weights.quantise import form_of
from pallas_kernels import REFERENCE
from pallas_kernels.quantised import FORMS, Quantised
from pallas_kernels.quantised.matrices import is_quantised


TINY = pathlib.Path(__file__).parent / "golden" / "tiny-llada2"
SDAR = pathlib.Path(__file__).parent / "golden" / "families" / "tiny-sdar"
FP8 = ml_dtypes.float8_e4m3fn
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def written(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict | None, model: pathlib.Path = TINY) -> pathlib.Path:
    """A tiny checkpoint with other tensors, of which float8 is written as any tool does: bytes and the name of their type."""
    folder.mkdir(parents=True)
    raw = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw if config is None else raw | {"quantization_config": config}))
    header, body = {}, b""
    names = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "int32": "I32", "int64": "I64"}
    names |= {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": (len(body), len(body) + len(data))}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)
    return folder


def compressed(layout: str, bits: int, kind: str, strategy: str, **more) -> dict:
    """What compressed-tensors writes into a config."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "group_size": None, "actorder": None} | more
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }


def is_matrix(name: str) -> bool:
    return "_proj.weight" in name or "query_key_value" in name or name.endswith("attention.dense.weight")


def test_numbers_lie_in_words_lowest_first():
    """Byte for byte as the description says: element i at bits 4 i of its word, offset by 8."""
    row = np.array([[-8, -7, 0, 1, 7, 6, -1, 2, 3]], np.int8)
    words = formats.packed(row, 4)
    assert [hex(word) for word in words.view(np.uint32)[0]] == ["0xa7ef9810", "0x8888888b"]
    assert formats.packed(np.array([[-128, 127, 0, -1]], np.int8), 8).view(np.uint32)[0, 0] == 0x7F80FF00
    found = formats.matrix(
        "x.weight", (1, 9), {"weight_packed": words, "weight_scale": np.ones((1, 1), np.float32)}, formats.Scheme("int4", None, (), ())
    )
    np.testing.assert_array_equal(found.values, row)


@pytest.mark.sweep_but("int4")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_would_be_loaded(form, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FILE_BYTES", 40_000)  # several files
    told = CliRunner().invoke(app, ["quantize", "--model", str(TINY), "--weights", form, "--out", str(tmp_path / "out")])
    assert told.exit_code == 0 and f"experts in {form}" in told.stdout
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    _, want = checkpoint.load(TINY, make_mesh(), dtype=jnp.bfloat16, weights=form)
    _, got = checkpoint.load(tmp_path / "out", make_mesh(), dtype=jnp.bfloat16)
    assert form_of(got) == form
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # For the words of Hopper's tensor cores too, where whole tiles make up a matrix, or not.
    _, words = checkpoint.load(tmp_path / "out", make_mesh(), dtype=jnp.bfloat16, kernels=REFERENCE._replace(grouped_matmul="gpu"))
    assert form_of(words) == form
    assert plan(str(tmp_path / "out"), "h100:1", slots=1, max_len=64).quantised == form
    other = next(name for name in FORMS if name != form)
    with pytest.raises(SettingError, match=f"weights='{other}', but the experts of .* are quantised already, as '{form}'"):
        checkpoint.load(tmp_path / "out", make_mesh(), weights=other)
    again = CliRunner().invoke(app, ["quantize", "--model", str(tmp_path / "out"), "--weights", form, "--out", str(tmp_path / "two")])
    assert again.exit_code == 2 and "is quantised already" in again.stderr
    again = CliRunner().invoke(app, ["quantize", "--model", str(TINY), "--weights", form, "--out", str(tmp_path / "out")])
    assert again.exit_code == 2 and "is there already" in again.stderr
    none = CliRunner().invoke(app, ["quantize", "--model", str(TINY), "--weights", "int3", "--out", str(tmp_path / "two")])
    assert none.exit_code == 2 and "weights='int3' must be one of" in none.stderr and not (tmp_path / "two").exists()


def test_writing_holds_one_file_at_a_time(tmp_path, monkeypatch):
    model = model_of(SHAPES["tiny"] | {"num_hidden_layers": 5, "num_experts": 32, "vocab_size": 1024})
    params = jax.tree.map(lambda param: np.full(param.shape, 0.01, np.float32), model.schema, is_leaf=is_param)
    checkpoint.save(tmp_path / "plain", model, params, dtype="float32")
    whole = sum(leaf.nbytes for leaf in leaves(params).values())
    monkeypatch.setattr(files, "FILE_BYTES", whole // 50)
    monkeypatch.setattr(assembly, "HOST_BYTES", whole // 50)
    tracemalloc.start()
    files.write(tmp_path / "plain", tmp_path / "out", "int8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < whole / 4


def quantised_by(kind: str, w: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A matrix as a tool stores it, and what its format's description says that this means."""
    rows, columns = w.shape
    if kind in ("fp8-block", "ct-block"):
        scales = np.abs(w).reshape(rows // 8, 8, columns // 16, 16).max((1, 3)).astype(np.float32) / 448
        spread = np.kron(scales, np.ones((8, 16), np.float32))
        q = (w / spread).astype(FP8)
        return {"weight": q, "weight_scale_inv" if kind == "fp8-block" else "weight_scale": scales}, q.astype(np.float32) * spread
    if kind.startswith(("gptq", "awq")):
        bits = 8 if "8" in kind else 4
        lowest, highest = w.T.reshape(-1, 16, rows).min(1), w.T.reshape(-1, 16, rows).max(1)  # of a group of 16 rows of [K, N]
        if "sym" in kind:
            highest = np.maximum(-lowest, highest)
            lowest = -highest
        scale = np.maximum((highest - lowest) / (2**bits - 1), 1e-6).astype(ml_dtypes.bfloat16).astype(np.float16)
        zero = np.full(scale.shape, 2 ** (bits - 1)) if "sym" in kind else np.clip(np.round(-lowest / scale), 1, 2**bits - 1).astype(int)
        spread, zeros = (np.repeat(a, 16, 0) for a in (scale.astype(np.float32), zero))
        q = np.clip(np.round(w.T / spread) + zeros, 0, 2**bits - 1).astype(np.int64)
        count = 32 // bits
        place = [0, 4, 1, 5, 2, 6, 3, 7] if kind == "awq" else range(count)  # where in a word a column, or row, is

        def along_columns(numbers):
            words = np.zeros((len(numbers), numbers.shape[1] // count), np.int64)
            for n in range(numbers.shape[1]):
                words[:, n // count] |= numbers[:, n] << (bits * place[n % count])
            return words.astype(np.uint32).view(np.int32)

        stored = {"scales": scale, "qzeros": along_columns(zero - (kind in ("gptq", "gptq-sym", "gptq-sym-8")))}
        stored["qweight"] = along_columns(q) if kind == "awq" else np.ascontiguousarray(along_columns(q.T).T)
        if kind != "awq":
            stored["g_idx"] = (np.arange(columns) // 16).astype(np.int32)
        return stored, ((q - zeros) * spread).T.astype(np.float32)
    if kind in ("ct-fp8-channel", "ct-int8-channel", "ct-int8-tensor"):
        most = np.abs(w).max(None if kind == "ct-int8-tensor" else 1, keepdims=True)
        scale = (most / (448 if "fp8" in kind else 127)).astype(ml_dtypes.bfloat16).astype(np.float32)
        q = (w / scale).astype(FP8) if "fp8" in kind else np.clip(np.round(w / scale), -127, 127).astype(np.int8)
        return {"weight": q, "weight_scale": scale.reshape(-1) if kind == "ct-int8-tensor" else scale}, q.astype(np.float32) * scale
    scale = (np.abs(w).reshape(rows, columns // 16, 16).max(-1) / 8).astype(ml_dtypes.bfloat16)
    spread = np.repeat(scale.astype(np.float32), 16, 1)
    q = np.clip(np.round(w / spread), -8, 7).astype(np.int32)
    words = np.zeros((rows, columns // 8), np.uint32)
    for i in range(columns):
        words[:, i // 8] |= (q[:, i] + 8).astype(np.uint32) << np.uint32(4 * (i % 8))
    stored = {"weight_packed": words.view(np.int32), "weight_scale": scale, "weight_shape": np.array(w.shape, np.int64)}
    return stored, q.astype(np.float32) * spread


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False}
CONFIGS = {
    "fp8-block": {
        "quant_method": "fp8",
        "weight_block_size": [8, 16],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    },
    "ct-block": compressed("float-quantized", 8, "float", "block", block_structure=[8, 16]),
    "ct-fp8-channel": compressed("float-quantized", 8, "float", "channel"),
    "ct-int8-channel": compressed("int-quantized", 8, "int", "channel"),
    "ct-int8-tensor": compressed("naive-quantized", 8, "int", "tensor"),
    "ct-int4-group": compressed("pack-quantized", 4, "int", "group", group_size=16),
    "gptq-sym": GPTQ | {"sym": True},
    "gptq-sym-8": GPTQ | {"sym": True, "bits": 8},
    "gptq": GPTQ,
    "gptq-v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm", "modules_to_not_convert": None},
}


LAYERS = ("fp8-block", "ct-fp8-channel", "ct-int8-channel", "ct-int4-group", "gptq-sym", "gptq", "awq")
CASES = [(TINY, kind) for kind in CONFIGS] + [(SDAR, kind) for kind in LAYERS]


@pytest.mark.sweep_but(*(f"tiny-llada2-{kind}" for kind in CONFIGS), "tiny-sdar-gptq-sym")
@pytest.mark.parametrize(("model", "kind"), CASES, ids=[f"{model.name}-{kind}" for model, kind in CASES])
def test_a_public_layout_is_what_its_description_says(model, kind, tmp_path):
    """All matrices but the router, the embedding and lm_head are quantised. Experts, or where there are none the layers, stay so where
    there is a form for it."""
    stored, meant = {}, {}
    for name, array in tensors_of(model).items():
        stored[name] = meant[name] = array.astype(np.float32)
        if is_matrix(name):
            del stored[name]
            parts, meant[name] = quantised_by(kind, array.astype(np.float32))
            stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    assert len(stored) > len(meant)
    _, got = checkpoint.load(written(tmp_path / "stored", stored, CONFIGS[kind], model), make_mesh())
    _, want = checkpoint.load(written(tmp_path / "meant", meant, None, model), make_mesh())
    form = {"ct-int8-channel": "int8", "ct-int4-group": "int4", "ct-fp8-channel": "fp8", "gptq-sym": "int4"}.get(kind)
    assert form_of(got) == form
    for path, leaf in leaves(want).items():
        found = leaves(got)[path]
        if is_quantised(found):
            assert path[-1].startswith("experts_") == (model == TINY)
            found = found if isinstance(found, Quantised) else found.flat()
            found = found.values.astype(jnp.float32) * jnp.repeat(
                found.scales.astype(jnp.float32), found.shape[-2] // found.scales.shape[-2], -2
            )
        np.testing.assert_array_equal(found.reshape(leaf.shape), leaf, err_msg=str(path))
    if form is None:
        _, again = checkpoint.load(tmp_path / "stored", make_mesh(), weights="int8")
        assert form_of(again) == "int8"


@pytest.mark.parametrize(("said", "stored"), [("int8", "fp8"), ("fp8", "int8"), ("int4", "int8"), ("int8", "int4")])
def test_a_matrix_of_another_form_than_the_config_says_is_refused(said, stored, tmp_path):
    """It would be read as numbers that nobody meant."""
    kinds = {"int8": "ct-int8-channel", "fp8": "ct-fp8-channel", "int4": "ct-int4-group"}
    tensors = {}
    for name, array in tensors_of(TINY).items():
        if re.match(EXPERTS.removeprefix("re:"), name.removesuffix(".weight")):
            parts, _ = quantised_by(kinds[stored if "experts.1.up_proj" in name else said], array.astype(np.float32))
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = array.astype(np.float32)
    folder = written(tmp_path / "model", tensors, CONFIGS[kinds[said]])
    with pytest.raises(ValueError, match=f"experts.1.up_proj.weight is not stored as {said}, as the config says"):
        checkpoint.load(folder, make_mesh())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, "quantization_config.bits=3 is not implemented: only 4 and 8 are"),
        ({"quant_method": "awq", "bits": 8, "group_size": 64}, "quantization_config.bits=8 is not implemented: only 4 is"),
        (GPTQ | {"group_size": 0}, "group_size=0 is not implemented"),
        (GPTQ | {"desc_act": True}, "desc_act=True is not implemented"),
        (GPTQ | {"dynamic": {"-:.*gate": {}}}, "dynamic="),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not implemented: only gptq and gptq_v2 are"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "version='gemv' is not implemented: only gemm is"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes' is not implemented"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_block_size=None is not implemented: only blocks"),
        (
            compressed("nvfp4-pack-quantized", 4, "float", "tensor_group"),
            "format='nvfp4-pack-quantized' is not implemented: only",
        ),
        (compressed("pack-quantized", 4, "int", "group", symmetric=False), "symmetric=False is not implemented: only weights without zero"),
        (compressed("pack-quantized", 4, "int", "group", actorder="group"), "actorder='group' is not implemented"),
        (compressed("pack-quantized", 3, "int", "group"), "num_bits=3 is not implemented: type='int'; only int of 4 and 8 bits"),
        (compressed("int-quantized", 8, "int", "channel") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        (compressed("int-quantized", 8, "int", "channel") | {"ignore": ["re:("]}, "it is no regular expression"),
        ("int8", "quantization_config.quant_method=None is not implemented"),
        (compressed("int-quantized", 8, "int", "channel"), "_proj.weight is not stored as int8, as the config says, with as many scales"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, message, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        checkpoint.load(folder, make_mesh())


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = {name: array.astype(np.float32) for name, array in tensors_of(TINY).items()}
    name = next(name for name in tensors if "experts.1.up_proj" in name)
    parts, _ = quantised_by("ct-int8-channel", tensors.pop(name))
    module = name.removesuffix("weight")
    for number, (broken, message) in enumerate(
        [
            ({"weight": parts["weight"]}, f"{name} in model.safetensors is stored as I8; only F64, F32, F16, BF16 are read"),
            (parts | {"weight_scale": np.ones((3, 1), np.float32)}, f"{name}: scales of shape \\(3, 1\\) are not one a matrix"),
            (parts | {"weight": parts["weight"][:-1]}, f"{name} is stored as I8 \\(.*; F8_E4M3 or I8 \\("),
            (parts | {"weight_zero_point": np.zeros((2, 2), np.int32)}, f"unexpected {module}weight_zero_point"),
            ({"weight_scale": parts["weight_scale"]}, f"{name} is stored as weight_scale; a scale and either weight or weight_packed"),
            (parts | {"weight_scale": np.ones((len(parts["weight"]), 1), np.int32)}, f"the scale of {name} is stored as I32"),
        ]
    ):
        stored = tensors | {f"{module}{part}": value for part, value in broken.items()}
        config = compressed("int-quantized", 8, "int", "channel") | {"ignore": [EXPERTS]}
        with pytest.raises(ValueError, match=message):
            checkpoint.load(written(tmp_path / str(number), stored, config), make_mesh())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"qzeros": np.full((2, 4), 0x77777776, np.int32)}, "has zero points \\(qzeros\\), and the config says sym=true"),
        ({"g_idx": np.arange(32, dtype=np.int32)[::-1] // 16}, "are in the order of their activations \\(g_idx\\)"),
        ({"scales": np.ones((2, 31), np.float16)}, "scales of .* is stored as F16 \\(2, 31\\); F16 \\(2, 32\\) is expected"),
        ({"qzeros": None}, "is stored as g_idx, qweight, scales; qweight, qzeros, scales, g_idx are needed"),
        ({"weight_scale": np.ones((32, 1), np.float32)}, "is stored as .*weight_scale; qweight, qzeros, scales, g_idx are needed"),
    ],
)
def test_words_that_do_not_fit_are_named(broken, message):
    words = formats.scheme_of({"quantization_config": CONFIGS["gptq-sym"]})
    tensors, meant = quantised_by("gptq-sym", np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32))
    np.testing.assert_array_equal(formats.plain(formats.matrix("x.weight", (32, 32), tensors, words)), meant)
    tensors = {part: value for part, value in (tensors | broken).items() if value is not None}
    kinds = {part: ({"int32": "I32", "float16": "F16"}.get(value.dtype.name, "F32"), value.shape) for part, value in tensors.items()}
    if (found := formats.problem("x.weight", (32, 32), kinds, words)) is None:
        with pytest.raises(ValueError, match=message):
            formats.matrix("x.weight", (32, 32), tensors, words)
    else:
        assert re.search(message, found)
