"""Model directories as untrusted input: which files are taken, and one line about each that will not do."""

from __future__ import annotations

import builtins
import json
import os
import pathlib
import re
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scripted import EOS, MASK, MODEL, RAW
from typer.testing import CliRunner

from diffulex_jax import cli
from diffulex_jax.models import hf_config
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint, folder


WORDS, NORM = "model.word_embeddings.weight", "model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def tiny(tmp_path) -> pathlib.Path:
    """A small checkpoint of our own, to be broken."""
    checkpoint.save(tmp_path / "tiny", MODEL, init(MODEL, jax.random.key(0), scale=1.0), dtype="float32")
    return tmp_path / "tiny"


def words_of(path):
    return np.asarray(checkpoint.load(path, make_mesh())[1]["embed"])


def refusal(path) -> str:
    """What loading says, which is one line of a readable length that names the directory."""
    with pytest.raises(ValueError) as error:
        checkpoint.load(path, make_mesh())
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1500
    assert str(path) in message
    return message


def split(path: pathlib.Path, parts: int = 2) -> dict[str, str]:
    """Replaces the file of weights by several and an index; returns its map."""
    tensors, where = sorted(load_file(path / "model.safetensors").items()), {}
    (path / "model.safetensors").unlink()
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[i::parts]), path / file)
        where |= {name: file for name, _ in tensors[i::parts]}
    index(path, where)
    return where


def index(path: pathlib.Path, where) -> None:
    (path / folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def rewrite(path: pathlib.Path, **tensors) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def raw_file(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# Which file a weight comes from


def test_other_files_beside_the_weights_are_not_read(tiny):
    """Adapters, older copies and shards of another download lie there; their names are the same and their values are zeros."""
    want = words_of(tiny)
    zeros = {name: np.zeros_like(w) for name, w in load_file(tiny / "model.safetensors").items()}
    for name in ("zz_old.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
        save_file(zeros, tiny / name)
    (tiny / "broken.safetensors").write_text("no weights")
    np.testing.assert_array_equal(words_of(tiny), want)
    assert want.any()


def test_the_index_goes_before_all_files_that_it_does_not_name(tiny):
    want, zeros = words_of(tiny), {name: np.zeros_like(w) for name, w in load_file(tiny / "model.safetensors").items()}
    split(tiny)
    save_file(zeros, tiny / "model.safetensors")
    np.testing.assert_array_equal(words_of(tiny), want)


def test_a_name_in_two_files_is_an_error(tiny):
    """With an index too: other readers take the last of the two."""
    where = split(tiny)
    other = next(file for file in where.values() if file != where[WORDS])
    save_file(load_file(tiny / other) | {WORDS: np.zeros((16, 8), np.float32)}, tiny / other)
    both = f"{WORDS} is in both {min(where.values())} and {max(where.values())}; remove the file that does not belong"
    assert both in refusal(tiny)
    (tiny / folder.INDEX).unlink()
    assert both in refusal(tiny)


def test_links_into_a_store_of_files_are_followed(tiny, tmp_path):
    """As the hub's cache has it: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    split(tiny)
    want, blobs, snapshot = words_of(tiny), tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    for directory in (blobs, snapshot):
        directory.mkdir(parents=True)
    for i, file in enumerate(sorted(tiny.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(pathlib.Path("..") / ".." / "blobs" / str(i))
    np.testing.assert_array_equal(words_of(snapshot), want)
    with pytest.raises(ValueError, match=re.escape(f"it is a folder of the hub's cache, and the model is in {snapshot}")):
        checkpoint.resolve(str(tmp_path / "cache"))


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, by Python or as weights."""
    seen, opens, opens_weights = [], builtins.open, folder.safe_open

    def record(file, *args, **settings):
        seen.append(os.path.realpath(file) if not isinstance(file, int) else file)
        return opens(file, *args, **settings)

    def record_weights(file, *args, **settings):
        seen.append(os.path.realpath(file))
        return opens_weights(file, *args, **settings)

    monkeypatch.setattr(builtins, "open", record)
    monkeypatch.setattr("io.open", record)
    monkeypatch.setattr(folder, "safe_open", record_weights)
    return seen


@pytest.mark.parametrize(
    "place", ["../../secret.safetensors", "{root}/secret.safetensors", "inner/secret.safetensors", "../tiny/secret.safetensors"]
)
def test_nothing_outside_the_folder_is_opened(tiny, opened, place):
    """A file that would do lies at each of these places."""
    weights = load_file(tiny / "model.safetensors")
    (tiny / "inner").mkdir()
    for directory in (tiny.parent.parent, tiny.parent, tiny / "inner", tiny):
        save_file(weights, directory / "secret.safetensors")
    where = split(tiny)
    place = place.format(root=tiny.parent)
    index(tiny, where | {WORDS: place})
    opened.clear()
    assert f"{WORDS} is said to be in {place!r}, which is no safetensors file of this folder" in refusal(tiny)
    assert opened
    assert {os.path.dirname(file) for file in opened} == {os.path.realpath(tiny)}


def test_a_whole_load_opens_the_folders_files_alone(tiny, opened):
    split(tiny)
    (tiny / "extra.safetensors").write_bytes(b"")
    opened.clear()
    checkpoint.load(checkpoint.resolve(str(tiny)), make_mesh())
    checkpoint.load_end_ids(tiny)
    names = {os.path.basename(file) for file in opened}
    assert names == {"config.json", folder.INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {os.path.dirname(file) for file in opened} == {os.path.realpath(tiny)}


# Broken files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "weight_map is missing or empty; download the model anew"),
        ('{"weight_map": {}}', "weight_map is missing or empty"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map is missing or empty"),
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        (POINTER, "is a git-LFS pointer, not the file; run 'git lfs pull' in"),
        ('{"weight_map": {"a": 7}}', "a is said to be in 7, which is no safetensors file of this folder"),
        ('{"weight_map": {"a": null}}', "a is said to be in None"),
        ('{"weight_map": {"a": "config.json"}}', "a is said to be in 'config.json', which is no safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "a is said to be in x.safetensors, which is not there; download the model anew"),
        (r'{"weight_map": {"a": "x\u0000.safetensors"}}', r"a is said to be in 'x\x00.safetensors', which is no safetensors file"),
        (r'{"weight_map": {"a\nb\u001b[2J": "x.safetensors"}}', r"'a\nb\x1b[2J' is said to be in x.safetensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a is there twice"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_indices_that_will_not_do(tiny, text, message):
    (tiny / folder.INDEX).write_text(text)
    assert message in refusal(tiny)


def test_an_index_that_names_the_wrong_shard(tiny):
    where = split(tiny)
    other = next(file for file in where.values() if file != where[WORDS])
    index(tiny, where | {WORDS: other})
    assert f"says that {WORDS} is in {other}, which does not hold it; download the model anew" in refusal(tiny)


def test_a_shard_that_is_not_there(tiny):
    where = split(tiny, 3)
    (tiny / where[WORDS]).unlink()
    assert f"is said to be in {where[WORDS]}, which is not there; download the model anew" in refusal(tiny)
    (tiny / folder.INDEX).unlink()
    assert "holds 2 of the 3 files of weights that model-0000" in refusal(tiny)


HEADER = {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]}


def header(**entry) -> bytes:
    return json.dumps({WORDS: HEADER | entry}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"no weights at all, but a page of a proxy",
        raw_file(b"{}", length=2**62),
        raw_file(b"{}", length=2**40),
        raw_file(b"{}", length=99_999_999),
        raw_file(b"{" * 5000),
        raw_file(b"\xff\xfe"),
        raw_file(header()),
        raw_file(header(data_offsets=[0, 2**62], shape=[2**60])),
        raw_file(header(shape=[2**62, 2**62]), bytes(512)),
        raw_file(header(data_offsets=[512, 0]), bytes(512)),
        raw_file(header(data_offsets=[-8, 504]), bytes(512)),
        raw_file(header(dtype="F31"), bytes(512)),
        raw_file(header(shape=[16, 9]), bytes(512)),
    ],
)
def test_files_that_are_no_weights(tiny, content):
    """Neither a header that lies about sizes nor half a file ends the process."""
    (tiny / "model.safetensors").write_bytes(content)
    message = refusal(tiny)
    assert "model.safetensors is no whole safetensors file" in message
    assert message.endswith("; download the model anew")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_half_a_file(tiny, share):
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    assert "model.safetensors is no whole safetensors file" in refusal(tiny)


def test_pointers_of_git(tiny):
    (tiny / "model.safetensors").write_text(POINTER)
    assert f"model.safetensors is a git-LFS pointer, not the file; run 'git lfs pull' in {tiny}" in refusal(tiny)
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        (tiny / name).write_text(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a git-LFS pointer, not the file; run 'git lfs pull'"):
            checkpoint.resolve(str(tiny))
    assert "config.json is a git-LFS pointer" in refusal(tiny)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_other_formats_are_named(tiny, name):
    (tiny / "model.safetensors").rename(tiny / name)
    assert f"holds no safetensors file; {name} is of a format that is not read: convert it" in refusal(tiny)


def test_a_file_is_no_directory(tiny):
    with pytest.raises(ValueError, match="model.safetensors' is a file; give the directory that holds it"):
        checkpoint.resolve(str(tiny / "model.safetensors"))


# Names and types of weights


def test_buffers_that_are_computed_are_not_read(tiny):
    """As old checkpoints have them, in every layer; of whatever type and shape, and in two files."""
    want = words_of(tiny)
    rewrite(tiny, **{f"model.layers.{i}.attention.rotary_emb.inv_freq": np.zeros(2, np.int8) for i in range(2)})
    np.testing.assert_array_equal(words_of(tiny), want)
    where = split(tiny)
    for file in set(where.values()):
        save_file(load_file(tiny / file) | {"model.rotary_emb.inv_freq": np.zeros(2, np.float32)}, tiny / file)
    np.testing.assert_array_equal(words_of(tiny), want)
    (tiny / folder.INDEX).unlink()
    np.testing.assert_array_equal(words_of(tiny), want)


@pytest.mark.parametrize(("prefix", "remedy"), [("model.", "without 'model.'"), ("module.", "without 'module.'")])
def test_names_with_a_prefix_too_many(tiny, prefix, remedy):
    file = tiny / "model.safetensors"
    save_file({prefix + name: w for name, w in load_file(file).items()}, file)
    message = refusal(tiny)
    assert "missing lm_head.weight" in message
    assert message.endswith(f"the names differ by a prefix: save the weights {remedy} before these names")


def test_names_that_lack_a_prefix(tiny):
    file = tiny / "model.safetensors"
    save_file({name.removeprefix("model."): w for name, w in load_file(file).items()}, file)
    assert refusal(tiny).endswith("the names differ by a prefix: save the weights with 'model.' before these names")


def test_one_layer_too_many_and_one_too_few(tiny):
    raw = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    assert "unexpected model.layers.1.attention.dense.weight in model.safetensors" in refusal(tiny)
    (tiny / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 3}))
    assert "missing model.layers.2.attention.dense.weight" in refusal(tiny)


def test_names_that_would_write_on_a_terminal(tiny):
    rewrite(tiny, **{"a\x1b[2J\nb" + "c" * 500: np.zeros(1, np.float32)})
    assert r"unexpected 'a\x1b[2J\nbccc" in refusal(tiny)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("int8", "I8"), ("uint8", "U8"), ("int32", "I32"), ("bool", "BOOL")],
)
def test_types_that_are_not_read(tiny, dtype, name):
    """The type is said before the scales that come with such weights."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = load_file(tiny / "model.safetensors")
    tensors = {NORM: np.ones(8, np.float32).astype(kind), "model.norm.weight_scale_inv": np.ones(1, np.float32)}
    save_file(bits | tensors, tiny / "model.safetensors")
    said = f"{tiny}: {NORM} in model.safetensors is stored as {name}; only F64, F32, F16, BF16 are read; unexpected {NORM}_scale_inv"
    assert refusal(tiny).startswith(said)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_types_that_are_read(tiny, dtype):
    want = words_of(tiny).astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
    rewrite(tiny, **{name: w.astype(getattr(ml_dtypes, dtype, dtype)) for name, w in load_file(tiny / "model.safetensors").items()})
    np.testing.assert_array_equal(words_of(tiny), want)


# End tokens: those of the config, of generation_config.json and of the tokenizer, together


def ends(path, *, config=EOS, generation="absent", tokenizer=None) -> tuple[int, ...]:
    (path / "config.json").write_text(json.dumps(RAW | {"eos_token_id": config}))
    if generation != "absent":
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    for name, content in (tokenizer or {}).items():
        (path / name).write_text(json.dumps(content))
    return checkpoint.load_end_ids(path)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (14, "absent", (14,)),
        ([14, 3], "absent", (3, 14)),
        (None, [5, 3], (3, 5)),
        (None, "absent", ()),
        (None, None, ()),
        (14, None, (14,)),
        (14, 3, (3, 14)),
        ([14, 3], [3, 2], (2, 3, 14)),
        ([], [], ()),
        (0, 15 - 1, (0, 14)),
    ],
)
def test_end_tokens_are_those_of_both_configs(tiny, config, generation, want):
    assert ends(tiny, config=config, generation=generation) == want


ADDED = {"added_tokens": [{"id": 9, "content": "<end>"}, {"id": 8, "content": "<other>"}]}


@pytest.mark.parametrize(
    ("tokenizer", "want"),
    [
        ({"tokenizer_config.json": {"eos_token": "<end>"}, "tokenizer.json": ADDED}, (9, 14)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<end>"}}, "tokenizer.json": ADDED}, (9, 14)),
        ({"special_tokens_map.json": {"eos_token": "<end>"}, "tokenizer.json": ADDED}, (9, 14)),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<end>"}, "tokenizer.json": ADDED}, (9, 14)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "tokenizer.json": {"model": {"vocab": {"</s>": 2}}}}, (2, 14)),
        ({"tokenizer_config.json": {"eos_token": "<end>", "added_tokens_decoder": {"7": {"content": "<end>"}}}}, (7, 14)),
        ({"tokenizer_config.json": {"eos_token": "unknown"}, "tokenizer.json": ADDED}, (14,)),
        ({"tokenizer_config.json": {"eos_token": None}, "tokenizer.json": ADDED}, (14,)),
        ({"tokenizer_config.json": {"eos_token": ["<end>"]}, "tokenizer.json": {"added_tokens": 5, "model": []}}, (14,)),
        ({"tokenizer.json": ADDED}, (14,)),
    ],
)
def test_end_tokens_of_the_tokenizer_are_among_them(tiny, tokenizer, want):
    assert ends(tiny, tokenizer=tokenizer) == want


@pytest.mark.parametrize("entry", [16, -1, "14", 1.5, True, {"id": 3}, [3, None], [[3]], 2**70])
def test_end_tokens_that_are_no_ids(tiny, entry):
    with pytest.raises(ValueError, match=r"generation_config.json: the end-of-sequence token .* is not an id of \[0, 16\)"):
        ends(tiny, generation=entry)
    (tiny / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="eos_token_id=.* is not an id of the vocabulary"):
        ends(tiny, config=entry)


def test_a_tokenizers_end_token_outside_the_vocabulary(tiny):
    files = {"tokenizer_config.json": {"eos_token": "x"}, "tokenizer.json": {"added_tokens": [{"id": 99, "content": "x"}]}}
    with pytest.raises(ValueError, match=r"tokenizer.json: the end-of-sequence token 99 is not an id of \[0, 16\)"):
        ends(tiny, tokenizer=files)


@pytest.mark.parametrize("text", ["{", "[]", "", POINTER])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_broken_small_file_is_named(tiny, name, text):
    (tiny / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tiny / name))):
        checkpoint.load_end_ids(tiny)


# config.json


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be an integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be an integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be an integer"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers=[2] must be an integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 4096"),
        ({"num_experts": 10**9}, "num_experts=1000000000 in num_hidden_layers=2 layers must be at most 131072 together"),
        ({"vocab_size": 10**30}, f"vocab_size={10**30} must be an integer of at most 2147483647"),
        ({"hidden_size": "8", "head_dim": None}, "hidden_size='8' must be an integer"),
        ({"num_attention_heads": 0, "head_dim": None}, "missing head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a finite number"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6' must be a finite number"),
        ({"rope_theta": True}, "rope_theta=True must be a finite number"),
        ({"rope_theta": 10**400}, "must be a finite number"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is null; it must be a number"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor=nan must be a finite number"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob='true' must be true or false"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] must be an object"),
        ({"rope_parameters": {"rope_type": {"a": []}}}, 'rope_parameters.rope_type={"a": []} is not implemented'),
        ({"rope_parameters": {"mscale": 0.7}}, "rope_parameters.mscale=0.7 is not implemented"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta=10000.0 contradicts rope_parameters.rope_theta=1000000.0",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling="),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not implemented"),
        ({"layer_types": 5}, "layer_types=5 is not implemented"),
        ({"layer_types": [["full_attention"]]}, "layer_types="),
        ({"sliding_window": 64}, "sliding_window=64 is not implemented; supported: 4096"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is not implemented: quantised weights are not read; take a checkpoint in"),
        ({"architectures": "LLaDA2MoeModelLM"}, "architectures='LLaDA2MoeModelLM' is not implemented"),
        ({"architectures": ["Qwen3ForCausalLM"]}, 'architectures=["Qwen3ForCausalLM"] is not implemented'),
        ({"model_type": ["llada2_moe"]}, 'model_type=["llada2_moe"] is not implemented; supported:'),
        ({"model_type": "x" * 10_000}, "... is not implemented; supported:"),
        ({"model_type": None}, "model_type=None is not implemented"),
        ({"text_config": {"hidden_size": 8}}, 'text_config={"hidden_size": 8} is not implemented'),
        ({"eos_token_id": {"a": 1}}, "is not an id of the vocabulary"),
        ({"mask_token_id": "15"}, "mask_token_id='15' must be an integer"),
        ({"mask_token_id": None}, r"mask_token_id=156895 is not an id of the vocabulary [0, 16)"),
        ({"key\n\x1b[2J": 1}, r"'key\n\x1b[2J'=1 is not implemented"),
    ],
)
def test_configs_that_will_not_do(tiny, values, message):
    (tiny / "config.json").write_text(json.dumps(RAW | values))
    assert message in refusal(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'"llada2_moe"', "holds no JSON object"),
        (b"{'a': 1}", "cannot be read as JSON"),
        (json.dumps(RAW).encode("utf-16"), "is not UTF-8 text"),
        (b'{"vocab_size": 16, "vocab_size": 32}', "vocab_size is there twice"),
        (b'{"a": ' * 50_000, "is nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "cannot be read as JSON"),
    ],
)
def test_config_files_that_are_none(tiny, content, message):
    (tiny / "config.json").write_bytes(content)
    said = refusal(tiny)
    assert f"{tiny / 'config.json'} {message}" in said or f"{tiny / 'config.json'} cannot be read as JSON: {message}" in said


def test_a_byte_order_mark_is_nothing(tiny):
    (tiny / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(RAW).encode())
    assert checkpoint.load_model(tiny) == MODEL


def test_every_ignored_key_is_ignored(tiny):
    (tiny / "config.json").write_text(json.dumps(RAW | dict.fromkeys(hf_config.IGNORED, 7)))
    assert checkpoint.load_model(tiny) == MODEL


def test_public_configs_are_read():
    """LLaDA2.0's and 2.2's as their class writes them: sliding_window is a default that use_sliding_window=false switches off."""
    mini = {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_llada2_moe.C"},
        "num_hidden_layers": 20,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "llada2_moe",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "norm_head": False,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_key_value_heads": 4,
        "rope_theta": 600000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "transformers_version": "4.52.3",
        "use_rmsnorm": True,
        "rms_norm_eps": 1e-06,
        "head_dim": 128,
        "num_shared_experts": 1,
        "use_cache": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "norm_softmax": False,
        "output_dropout": 0.0,
        "vocab_size": 157184,
        "rotary_dim": 64,
        "using_split_qkv_in_self_attention": False,
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "pad_token_id": 156892,
        "score_function": "sigmoid",
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "output_router_logits": False,
        "partial_rotary_factor": 0.5,
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    spec = model_of(mini).spec
    assert (spec.mask_id, spec.eos_ids, spec.block_size, spec.block_stated, spec.routing_block) == (156895, (), 32, False, 0)
    newer = mini | {"block_size": 32, "expert_capacity": 48, "delete_token_id": 156930, "split_token_id": 156931, "use_qk_norm": True}
    spec = model_of(newer | {"rope_theta": 3000000, "max_position_embeddings": 131072, "transformers_version": "5.2.0"}).spec
    assert (spec.block_size, spec.block_stated, spec.routing_block, spec.max_positions) == (32, True, 32, 131072)


# On the command line: one line, and exit code 2


def spoil_weights(path):
    (path / "model.safetensors").write_text(POINTER)
    return "model.safetensors is a git-LFS pointer, not the file; run 'git lfs pull' in"


def spoil_index(path):
    index(path, dict.fromkeys(split(path), "../../../etc/passwd"))
    return "is said to be in '../../../etc/passwd', which is no safetensors file of this folder"


def spoil_config(path):
    (path / "config.json").write_text(json.dumps(RAW | {"sliding_window": 64}))
    return "config: sliding_window=64 is not implemented"


def spoil_tokenizer(path):
    (path / "tokenizer.json").write_text(POINTER)
    return "tokenizer.json is a git-LFS pointer, not the file"


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_index, spoil_config, spoil_tokenizer])
def test_the_command_line_says_it_in_one_line(tiny, spoil):
    message = spoil(tiny)
    ran = CliRunner().invoke(cli.app, ["generate", "--model", str(tiny), "--prompt-ids", f"1,2,{MASK - 2}"])
    assert ran.exit_code == 2
    assert ran.stdout == ""
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in ran.stderr
