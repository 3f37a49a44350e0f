"""The small files of a model directory: end tokens, ``config.json``, and one line about each value that will not do."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from folders import POINTER, refusal, small_checkpoint
from scripted import EOS, MODEL, RAW

from diffulex_jax.models import hf_config
from diffulex_jax.models.registry import model_of
from diffulex_jax.weights import checkpoint


@pytest.fixture
def tiny(tmp_path) -> pathlib.Path:
    """A small checkpoint of our own, to be broken."""
    return small_checkpoint(tmp_path / "tiny")


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
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size=None is not implemented: only blocks"),
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
