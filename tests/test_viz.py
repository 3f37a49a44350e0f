"""Pictures of decoding: what stands in which cell, and that it gets drawn."""

from __future__ import annotations

import importlib
import io
import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from diffulex_jax import Output, SamplingParams, viz
from diffulex_jax.engine.results import TraceStep
from diffulex_jax.viz import denoising, steps
from diffulex_jax.viz.denoising import COMMITTED, FILLED, MASK, PROMPT, WAITING
from diffulex_jax.weights.checkpoint import EMBEDDED, load_model


def step(start: int, text: str, *, revised: str = "....", remasked: str = "....") -> TraceStep:
    """A step of a window of four: letters are tokens (of confidence 0.5), ``_`` masks, ``x`` in the others marks positions."""
    masked = np.array([c == "_" for c in text])
    return TraceStep(
        start=start,
        tokens=np.array([ord(c) for c in text]),
        masked=masked,
        confidence=np.where(masked, 0, 0.5),
        revised=np.array([c == "x" for c in revised]),
        remasked=np.array([c == "x" for c in remasked]),
    )


# Blocks of four from position 4 on; the prompt ends at 6. `b` is masked again, then becomes `c`; `d` is edited into `e`.
STEPS = [
    step(4, "PPa_"),
    step(4, "PPab"),
    step(4, "PPa_", remasked="...x"),
    step(4, "PPac"),
    step(8, "d___"),
    step(8, "ef$_", revised="x..."),
]


def output(steps=STEPS, *, tokens="acef$", finish_reason="length") -> Output:
    return Output(
        text=None,
        token_ids=[ord(c) for c in tokens],
        finish_reason=finish_reason,
        nfe=len(steps or ()),
        revised_tokens=1,
        remasked_tokens=1,
        prompt_token_ids=[1] * 6,
        seconds=1.0,
        queue_seconds=0.0,
        first_block_seconds=0.5,
        seed=0,
        trace=steps,
    )


def test_grid_lays_steps_out_by_position():
    grid = denoising.grid(output())
    letters = {WAITING: " ", PROMPT: "P", MASK: "_", FILLED: "f", COMMITTED: "c"}
    assert ["".join(letters[kind] for kind in row) for row in grid.kind] == [
        "PPf_   ",
        "PPff   ",
        "PPf_   ",
        "PPff   ",
        "PPccf__",
        "PPccfff",
    ]
    assert (grid.forward, grid.position, grid.boundaries) == (1, 4, [8])
    assert "".join(map(chr, grid.tokens[-1, 2:])) == "acef$"
    np.testing.assert_array_equal(grid.confidence[0], [0.5, 0.5, 0.5, 0, 0, 0, 0])
    assert np.argwhere(grid.revised).tolist() == [[5, 4]]
    assert np.argwhere(grid.remasked).tolist() == [[2, 3]]


def test_the_eos_that_ended_an_output_has_a_column():
    assert denoising.grid(output(tokens="acef", finish_reason="stop")).kind.shape == (6, 7)
    assert denoising.grid(output(tokens="acef", finish_reason="max_nfe")).kind.shape == (6, 6)


def test_blocks_cut_the_grid_where_and_while_a_block_was_open():
    first, second = denoising.grid(output()).blocks()
    assert (first.forward, first.position, first.kind.shape) == (1, 4, (4, 4))
    assert (second.forward, second.position, second.kind.shape) == (5, 8, (2, 3))
    np.testing.assert_array_equal(second.revised, [[False] * 3, [True, False, False]])


def test_a_canvas_without_anything_to_explain_has_no_legend():
    """A prompt that ends with a block, and an answer of one forward."""
    blocks = output([step(8, "abcd")], tokens="abcd")
    blocks.prompt_token_ids[:] = [1] * 8
    assert viz.canvas(output()).axes[0].get_legend() is not None
    assert viz.canvas(blocks).axes[0].get_legend() is None


def test_canvas_draws_a_panel_a_block_with_texts_edits_and_masks():
    figure = viz.canvas(output(), decode_token=chr)
    first, second = figure.axes[:2]
    assert [text.get_text() for text in first.texts] == ["a", "a", "b", "a", "a", "c"]
    assert [text.get_text() for text in second.texts] == ["d", "e", "f", "$"]  # a dollar sign is no formula
    frames = [patch for patch in second.patches if isinstance(patch, Rectangle)]
    assert [(int(frame.get_x()), int(frame.get_y())) for frame in frames] == [(0, 1)]
    masks, crosses = first.collections[1:3]
    assert masks.get_offsets().tolist() == [[3.5, 0.5]]
    assert crosses.get_offsets().tolist() == [[3.5, 2.5]]
    assert [tick.get_text() for tick in second.get_yticklabels()] == ["5", "6"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["mask", "prompt", "edited", "masked again"]
    assert first.get_title(loc="left") == "5 tokens in 6 forwards, 0.8 a forward, 1 edited"
    figure.savefig(file := io.BytesIO())
    assert file.tell() > 5000


def test_confidence_is_the_colour():
    sure, unsure = step(4, "PPab"), step(4, "PPab")
    sure.confidence[3], unsure.confidence[3] = 1.0, 0.1
    colours = viz.canvas(output([unsure, sure], tokens="ab")).axes[0].collections[0].get_array()
    luminance = colours[..., :3].mean(-1)
    assert luminance[0, 3] > luminance[0, 2] > luminance[1, 3]
    assert np.ptp(luminance[:, 2]) == 0


def test_canvas_draws_into_given_axes():
    figure, ax = plt.subplots()
    assert viz.canvas(output(), decode_token=chr, ax=ax) is figure
    assert ax.get_ylim() == (6, 0)
    assert ax.get_xlim() == (0, 7)
    assert len(ax.lines) == 1  # the boundary between the blocks
    plt.close(figure)


def test_texts_are_left_out_where_cells_are_too_narrow():
    figure, ax = plt.subplots(figsize=(1.8, 2))
    viz.canvas(output(), decode_token=chr, ax=ax)
    plt.close(figure)
    assert not ax.texts


@pytest.mark.parametrize(("text", "shown"), [(" a", "a"), (" ", "␣"), ("\n\n", "⏎⏎"), ("", "∅")])
def test_tokens_of_space_are_visible(text, shown):
    assert viz.canvas(output(), decode_token=lambda _: text).axes[0].texts[0].get_text() == shown


def test_token_texts_shrink_and_then_are_cut():
    texts = {"a": "1", "b": "a long one", "c": "incomprehensibilities without end"}
    sizes = {t.get_text(): t.get_fontsize() for t in viz.canvas(output(), decode_token=lambda t: texts.get(chr(t), "")).axes[0].texts}
    one, long, cut = sizes
    assert (one, long, cut[-1]) == ("1", "a long one", "…")
    assert texts["c"].startswith(cut[:-1])
    assert denoising.LARGEST_FONT == sizes[one] > sizes[cut] >= denoising.SMALLEST_FONT


def test_a_new_figure_is_shown_once():
    before = plt.get_fignums()
    viz.canvas(output())
    viz.compare({"a": output()})
    assert plt.get_fignums() == before


def test_canvas_needs_a_trace():
    with pytest.raises(ValueError, match="trace=True"):
        viz.canvas(output(steps=None))


def test_compare_labels_every_bar():
    left, right = viz.compare({"slow": output(), "fast": output(STEPS[3:])}).axes
    assert [text.get_text() for text in left.texts] == ["0.8", "1.7"]
    assert [text.get_text() for text in right.texts] == ["6", "3"]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["slow\n5 tokens, 1 edited", "fast\n5 tokens, 1 edited"]
    with pytest.raises(ValueError, match="nothing to compare"):
        viz.compare({})


def test_accepted_are_positions_that_a_forward_found_masked_and_filled():
    assert np.argwhere(steps.accepted(denoising.grid(output()))).tolist() == [[0, 2], [1, 3], [3, 3], [4, 4], [5, 5], [5, 6]]


def test_every_view_of_the_steps_is_one_call():
    confident = viz.confidence(output()).axes[0]
    (image,) = confident.images
    assert image.get_array().shape == (6, 7, 4) and confident.get_xlim() == (0, 7)
    assert len({tuple(pixel) for pixel in image.get_array()[0]}) == 4  # prompt, sure, masked, not begun
    named = viz.events(output()).axes[0]
    assert [text.get_text() for text in named.get_legend().get_texts()] == [
        *("masked", "kept", "accepted", "revised", "masked again", "committed", "prompt")
    ]
    pixels = named.images[0].get_array()
    assert tuple(pixels[5, 4]) == to_rgba(denoising.EDIT) and tuple(pixels[2, 3]) == to_rgba(denoising.REMASK)
    bars = viz.tokens_per_step(output()).axes[0]
    heights = [[bar.get_height() for bar in kind] for kind in bars.containers]
    assert heights == [[1, 1, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1], [0, 0, -1, 0, 0, 0]]
    assert bars.get_title(loc="left") == "0.8 tokens a forward (dashed)"
    figure, axes = plt.subplots(3)
    assert all(view(output(), ax=ax) is figure for view, ax in zip((viz.confidence, viz.events, viz.tokens_per_step), axes, strict=True))
    plt.close(figure)


def test_a_replay_needs_a_trace_and_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = viz.replay({"a": output(), "b": output(STEPS[:4], tokens="ac")})
    records = json.loads(page.split('id="records">')[1].split("</script>")[0])
    assert records["block_size"] == 4 and [lane["name"] for lane in records["lanes"]] == ["a", "b"]
    patches = records["lanes"][0]["records"]
    assert [patch["token_ids"] for patch in patches[:2]] == [[ord("a"), None], [ord("a"), ord("b")]]
    assert patches[4]["token_offset"] == 2 and patches[-1]["event"] == "final"
    assert len(patches[-2]["token_ids"]) == 3  # what max_tokens leaves of the last block
    with pytest.raises(ValueError, match="this output has no trace; pass trace=True"):
        viz.replay(output(steps=None))
    with pytest.raises(ValueError, match="nothing to replay"):
        viz.replay({})


def test_missing_matplotlib_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "diffulex_jax.viz"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"diffulex-jax\[viz\]"):
        _ = importlib.import_module("diffulex_jax.viz").canvas


@pytest.mark.sweep_but("2")
@pytest.mark.parametrize("buffer_size", [1, 2])
def test_the_last_row_of_a_real_trace_is_the_answer(engine_of, buffer_size):
    engine = engine_of("tiny-llada2-trained", block_size=8, buffer_size=buffer_size, max_model_len=64, max_slots=1)
    (answer,) = engine.generate([[216, 206, 72]], SamplingParams(max_tokens=20, ignore_eos=True), trace=True)
    grid = denoising.grid(answer)
    assert len(grid.kind) == answer.nfe
    assert grid.tokens[-1, 3:].tolist() == answer.token_ids
    assert [block.position for block in grid.blocks()] == [0, 8, 16]


def test_treescope_unfolds_records():
    """Field by field, arrays with their values."""
    treescope = pytest.importorskip("treescope")
    for record, fields in (
        (output(), ("finish_reason='length'", "TraceStep(start=4, tokens=np.array([80, 80, 97, 95])")),
        (load_model(EMBEDDED), ("LLaDA2Config(", "hidden_size=192")),
        (SamplingParams(max_tokens=9), ("max_tokens=9",)),
    ):
        text = treescope.render_to_text(record)
        assert all(field in text for field in fields)
