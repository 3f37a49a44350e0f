"""The Qwen2 network: biases, heads whose width the config leaves out, and an output matrix that is the embeddings'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import attend_to, logits_of, sees

from diffulex_jax.models import qwen2
from diffulex_jax.models.base import init, leaves
from diffulex_jax.models.names import take


RAW = {
    "model_type": "Fast_dLLM_Qwen",
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 30,
    "mask_token_id": 31,
    "conplemenrary_mask": True,
    "layer_types": ["full_attention"] * 2,
    "rope_scaling": None,
    "sliding_window": None,
}


def model_of(**changes):
    return qwen2.fast_dllm_v2(RAW | changes, "")


def rotated(x, position, theta=1e6):
    half = x.shape[-1] // 2
    angle = position / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def by_hand(w, ids, *, head):
    """Logits of ``ids``, every position seeing all, in float64 by the names of a checkpoint."""
    w = {name: np.asarray(array, np.float64) for name, array in w.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        of = {name.removeprefix(f"model.layers.{i}."): array for name, array in w.items()}
        h = norm(x, of["input_layernorm.weight"])
        q, k, v = (h @ of[f"self_attn.{n}_proj.weight"].T + of[f"self_attn.{n}_proj.bias"] for n in "qkv")
        q, k, v = (a.reshape(len(ids), -1, 4) for a in (q, k, v))
        q, k = (np.stack([rotated(row, p) for p, row in enumerate(a)]) for a in (q, k))
        score = np.einsum("qhd,khd->hqk", q, k.repeat(2, 1)) / 2
        p = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v.repeat(2, 1)).reshape(len(ids), -1) @ of["self_attn.o_proj.weight"].T
        h = norm(x, of["post_attention_layernorm.weight"])
        gate, up = (h @ of[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w[head].T


def named(model, params):
    """The parameters by the names of a checkpoint."""
    found = leaves(params)
    made = {}
    for tensor in model.tensors:
        made[tensor.name] = np.zeros(tensor.shape, np.float32)
        for part in tensor.parts:
            take(np.asarray(found[part.leaf]), part, made[tensor.name])
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_equations(tied):
    model = model_of(tie_word_embeddings=tied)
    params = init(model, jax.random.key(0), scale=0.5)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)  # biases and scales too
    ids = np.arange(6) * 5
    got, _ = logits_of(model, params, ids, attend_to(sees(6, 32)))
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    np.testing.assert_allclose(got, by_hand(named(model, params), ids, head=head), rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_no_parameter():
    tied, own = model_of(tie_word_embeddings=True), model_of()
    assert {path[-1] for path in leaves(own.schema)} - {path[-1] for path in leaves(tied.schema)} == {"lm_head"}
    assert {t.name for t in own.tensors} - {t.name for t in tied.tensors} == {"lm_head.weight"}
    # transformers takes the embeddings too, whatever the file holds under this name.
    assert (tied.unread, own.unread) == (("lm_head.weight",), ())
    params = {"embed": jnp.ones((32, 16))}
    assert tied.head(params) is params["embed"]


def test_a_config_of_the_hub_leaves_out_mask_block_and_head_width():
    raw = {key: value for key, value in RAW.items() if key != "mask_token_id"} | {"vocab_size": 152_064, "eos_token_id": 151_645}
    spec = qwen2.fast_dllm_v2(raw, "").spec
    assert (spec.mask_id, spec.block_size, spec.layers.head_dim, spec.predicts) == (151_665, 32, 4, "next")
    assert model_of(bd_size=16).spec.block_size == 16
    assert model_of(head_dim=8).spec.layers.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "num_attention_heads=3 must divide hidden_size=16"),
        ({"head_dim": 3}, "head_dim=3 must be positive and even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"rope_scaling": {"type": "yarn"}}, 'rope_scaling={"type": "yarn"} is not implemented'),
        ({"bd_size": 0}, "block_size=0 must be positive"),
    ],
)
def test_what_a_config_may_not_say(changes, message):
    with pytest.raises(ValueError) as error:
        model_of(**changes)
    assert message in str(error.value)


def test_a_config_is_written_as_it_was_read():
    config = model_of(tie_word_embeddings=True, bd_size=8).config
    assert qwen2.FastDLLMConfig.from_hf(config.to_hf()) == config
