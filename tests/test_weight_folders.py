"""Model directories as untrusted input: which files are taken, and one line about each that will not do."""

from __future__ import annotations

import builtins
import json
import os
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from folders import NORM, POINTER, WORDS, index, raw_file, refusal, rewrite, small_checkpoint, split, words_of
from safetensors.numpy import load_file, save_file
from scripted import MASK, RAW
from typer.testing import CliRunner

from diffulex_jax import cli
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint, folder


@pytest.fixture
def tiny(tmp_path) -> pathlib.Path:
    """A small checkpoint of our own, to be broken."""
    return small_checkpoint(tmp_path / "tiny")


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
