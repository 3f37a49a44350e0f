"""What every setting does, and what an output holds: text, counts, the trace."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import MODEL as SCRIPTED
from small import EOS, MASK, MODEL, SIZES, VOCAB, full, prompt, tiny_engine
from sweep import sweep

from diffulex_jax import Engine, SamplingParams, stateless
from diffulex_jax.sampling_params import READ_BY_FEW


GOLDEN = pathlib.Path(__file__).parent / "golden"
PROMPTS = [prompt(n) for n in (3, 9, 20, 30)]
TINY_PROMPTS = [[1, 2], [3, 4, 5, 6], [7]]


@pytest.fixture(scope="module")
def engine(engine_of):
    def of(strategy: str = "llada2") -> Engine:
        return engine_of(MODEL, strategy=strategy, **SIZES)

    return of


@pytest.fixture(scope="module")
def look_ahead() -> Engine:
    return tiny_engine(strategy="dmax", buffer_size=2)


# What every setting does


LIVE = {
    "max_tokens": ("llada2", {}, 20),
    "temperature": ("llada2", {"seed": 0}, 1.0),
    "top_p": ("llada2", {"temperature": 1.0, "seed": 0}, 0.1),
    "top_k": ("llada2", {"temperature": 1.0, "seed": 0}, 2),
    "seed": ("llada2", {"temperature": 1.0, "seed": 0}, 1),
    "ignore_eos": ("llada2", {"accept_threshold": 0.3}, True),
    "max_nfe": ("llada2", {}, 3),
    "min_tokens_per_forward": ("llada2", {"accept_threshold": 1.0}, 1.5),
    "accept_threshold": ("llada2", {}, 0.3),
    "num_to_transfer": ("llada2", {"accept_threshold": 1.0}, 3),
    "denoising_steps": ("llada2", {"accept_threshold": 1.0}, 2),
    "sub_block": ("fast_dllm_v2", {"accept_threshold": 1.0}, 2),
    "entropy_bound": ("sdar_entropy", {}, 3.0),
    "edit_threshold": ("llada2_edit", {"accept_threshold": 0.1, "edit_threshold": 0.9}, 0.0),
    "max_post_edit_steps": ("llada2_edit", {"accept_threshold": 0.1, "edit_threshold": 0.0}, 0),
    "remask_threshold": ("llada2", {"accept_threshold": 0.1}, 0.5),
    "settle_threshold": ("dmax", {"accept_threshold": 0.0}, 0.0),
    "penalty_lambda": ("llada2", {}, 20.0),
    "add_block_threshold": ("look-ahead", {"accept_threshold": 0.2}, 0.9),
    "semi_complete_threshold": ("look-ahead", {"accept_threshold": 0.2}, 0.2),
    "token_stability_threshold": ("look-ahead", {"accept_threshold": 0.2}, 1.0),
    "min_tokens": ("llada2", {"accept_threshold": 0.3}, 40),
    "stop_token_ids": ("llada2", {}, tuple(range(0, 200, 40))),
    "max_repetition_run": ("llada2", {"accept_threshold": 0.1}, 1),
    "pinned": ("llada2", {}, {0: 7, 9: 8}),
    "init_tokens": ("llada2_edit", {}, {1: 7}),
    "logprobs": ("llada2", {}, True),
    "return_step_map": ("llada2", {}, True),
    "n": ("llada2", {}, 2),
}


def test_every_setting_is_listed():
    """``stop`` needs a tokenizer, and ``cache_salt`` changes no answer: see ``test_requests``. What few read is in ``test_llada``
    and ``test_dream``, adapters in ``test_adapters``."""
    listed = set(LIVE) | {"stop", "cache_salt", "adapter_name"} | set(READ_BY_FEW)
    assert listed == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", sweep(LIVE, but=[name for name in LIVE if name not in ("sub_block", "entropy_bound")]))
def test_every_setting_changes_something(engine, look_ahead, name):
    strategy, base, value = LIVE[name]
    # Look-ahead is about tokens that do not settle: the model with random weights has those.
    one, prompts, length = (look_ahead, TINY_PROMPTS, 12) if strategy == "look-ahead" else (engine(strategy), PROMPTS, 40)

    def run(**settings) -> list:
        params = SamplingParams(**({"max_tokens": length, "ignore_eos": name not in ("ignore_eos", "min_tokens")} | base | settings))
        return [(o.token_ids, o.nfe, o.logprobs, o.step_map) for o in one.generate(prompts, params)]

    assert run() != run(**{name: value})


# What comes with the tokens


def test_the_trace_tells_how_the_output_came_about(look_ahead):
    params = [full(12, accept_threshold=0.2), full(9, accept_threshold=0.2, remask_threshold=0.3), SamplingParams(max_tokens=9)]
    plain = look_ahead.generate(TINY_PROMPTS, params)
    traced = look_ahead.generate(TINY_PROMPTS, params, trace=True)
    assert sum(output.revised_tokens for output in traced) > 0
    assert sum(output.remasked_tokens for output in traced) > 0
    for quiet, output in zip(plain, traced, strict=True):
        assert quiet.trace is None
        assert (output.token_ids, output.nfe, output.revised_tokens) == (quiet.token_ids, quiet.nfe, quiet.revised_tokens)
        assert len(output.trace) == output.nfe
        assert sum(int(step.revised.sum()) for step in output.trace) == output.revised_tokens
        assert sum(int(step.remasked.sum()) for step in output.trace) == output.remasked_tokens
        canvas = {}
        for step in output.trace:
            assert len(step.tokens) == 8
            assert np.array_equal(step.tokens == SCRIPTED.spec.mask_id, step.masked)
            assert not step.confidence[step.masked].any()
            canvas |= dict(zip(range(step.start, step.start + 8), step.tokens.tolist(), strict=True))
        n = len(output.prompt_token_ids)
        assert [canvas[p] for p in range(n, n + len(output.token_ids))] == output.token_ids
        assert all(canvas[p] == output.prompt_token_ids[p] for p in canvas if p < n)


def test_outputs_count(engine):
    output = engine().generate([prompt(3)], full(10, accept_threshold=0.2))[0]
    assert output.tokens_per_forward == 10 / output.nfe > 1
    assert output.seconds > 0
    assert output.text is None


def test_progress_is_shown_only_where_asked_for(engine, capfd):
    engine().generate([prompt(3)] * 2, full(4))
    assert capfd.readouterr().err == ""
    engine().generate([prompt(3)] * 2, full(4), progress=True)
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "tokens/forward" in shown


# Rules of one's own, and text


def one_by_one(prediction, state):
    """Fills the leftmost mask of each block, whatever its probability."""
    open_ = state.masked & state.editable
    return state.fill(open_ & (jnp.cumsum(open_, -1) == 1), prediction.token, prediction.prob)


def test_a_rule_of_ones_own():
    """A token a forward; and so, from left to right, n tokens after n forwards."""
    engine = tiny_engine(strategy=stateless(one_by_one))
    outputs = engine.generate(TINY_PROMPTS, [full(12), full(7), full(9)])
    assert [(len(o.token_ids), o.nfe) for o in outputs] == [(12, 12), (7, 7), (9, 9)]
    for n in (1, 4, 6):
        cut = engine.generate(TINY_PROMPTS, full(9, max_nfe=n))
        assert [o.token_ids for o in cut] == [o.token_ids[:n] for o in outputs]


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The tiny model with a tokenizer whose words are w0, w1, ... and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(GOLDEN / MODEL, path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", mask_token=f"w{MASK}")
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
    tokenizer.save_pretrained(path)
    return Engine.from_pretrained(str(path), **SIZES, warm_up=False)


def test_text(talking, engine):
    ids = engine().generate([[5, 6, 7]], full(8))[0].token_ids
    text, same = talking.generate(["w5 w6 w7", [5, 6, 7]], full(8))
    assert text.prompt_token_ids == [5, 6, 7]
    assert text.token_ids == same.token_ids == ids
    assert text.text == same.text == " ".join(f"w{i}" for i in ids if i != EOS)
    assert talking.generate("w5 w6 w7", full(8))[0].token_ids == ids


def test_chat(talking, engine):
    answer = talking.chat([{"role": "user", "content": "w5 w6"}], full(8))
    assert answer.prompt_token_ids == [1, 5, 6, 2]
    assert answer.token_ids == talking.generate([[1, 5, 6, 2]], full(8))[0].token_ids
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        engine().chat([{"role": "user", "content": "w5"}])


@pytest.mark.parametrize("strategy", ["llada2", "dmax"])
def test_the_mask_in_a_prompt_is_a_token_like_any_other(engine, strategy):
    """What is still to be decoded is told by position: nothing in a prompt is filled in, whatever it holds."""
    prompts = [[216, MASK, 72], [MASK], [5] * 8 + [MASK] * 3, [7, 8, 9, *[MASK] * 5, 3]]
    one = engine(strategy=strategy)
    together = one.generate(prompts, full(20))
    for given, output in zip(prompts, together, strict=True):
        assert output.prompt_token_ids == given
        assert len(output.token_ids) == 20 and MASK not in output.token_ids
        (alone,) = one.generate([given], full(20))
        assert (alone.token_ids, alone.nfe) == (output.token_ids, output.nfe)
    other = one.generate([[216, 5, 72]], full(20))[0]
    assert other.token_ids != together[0].token_ids


def test_bfloat16():
    """Everything that is cached is half as long, and rows are still their own."""
    half = tiny_engine(dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(half._device.pool)} == {jnp.dtype("bfloat16")}
    outputs = half.generate(TINY_PROMPTS, full(9))
    assert [len(o.token_ids) for o in outputs] == [9, 9, 9]
    assert [half.generate([p], full(9))[0].token_ids for p in TINY_PROMPTS] == [o.token_ids for o in outputs]
