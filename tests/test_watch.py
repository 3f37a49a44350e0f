"""``generate --watch``: what stands on the terminal after each forward."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from diffulex_jax import SamplingParams, cli
from diffulex_jax.cli import watch
from diffulex_jax.engine.results import TraceStep
from diffulex_jax.engine.tokenizer import Part


MODEL = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2-trained")


def step(start: int, text: str, *, revised: str = "....", remasked: str = "....") -> TraceStep:
    """A step of a window of four: letters are tokens, ``_`` masks, capitals given with the request; ``x`` marks positions."""
    masked = np.array([c == "_" for c in text])
    return TraceStep(
        start=start,
        tokens=np.array([ord(c) for c in text]),
        masked=masked,
        confidence=np.array([0.5 if c.islower() else 0 for c in text]),
        revised=np.array([c == "x" for c in revised]),
        remasked=np.array([c == "x" for c in remasked]),
    )


class Letters:
    """A tokenizer of characters."""

    decode = staticmethod(lambda ids: "".join(map(chr, ids)))
    piece = chr
    spelled = staticmethod(lambda ids: [Part(f"<{chr(id_)}>" if chr(id_) == "R" else chr(id_), chr(id_) == "R") for id_ in ids])


# Blocks of four from position 4 on; the prompt ends at 6, `N` is given.
STEPS = [step(4, "PPa_"), step(4, "PPbc", revised="..x."), step(4, "PPb_", remasked="...x"), step(4, "PPbd"), step(8, "eN__")]


def canvas(steps, **settings) -> watch.Canvas:
    return watch.Canvas([ord("P")] * 6, steps, **{"most": 20, "tokenizer": Letters(), "mask": "_"} | settings)


def screen(**settings) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", **{"width": 60, "height": 20} | settings)


def test_each_forward_colours_what_it_did():
    shown = canvas(STEPS)
    seen = []
    while shown.behind:
        shown.advance()
        seen.append((shown.text().plain, shown.events, shown.edits))
    assert seen == [
        ("PPPPPP\na _", ["new", "masked"], 0),
        ("PPPPPP\nbc", ["edited", "new"], 1),
        ("PPPPPP\nb _", ["kept", "masked again"], 1),
        ("PPPPPP\nbd", ["kept", "new"], 1),
        ("PPPPPP\nbdeN _ _", ["settled", "settled", "new", "prompt", "masked", "masked"], 1),
    ]
    colours = {shown.text().plain[span.start : span.end]: span.style for span in shown.text().spans}
    assert colours["P"] == colours["N"] == watch.STYLES["prompt"] and colours["e"] == watch.STYLES["new"]
    assert shown.figures() == "forward 5 · 4 tokens · 0.8 a forward · 1 edited"


def test_special_tokens_of_a_prompt_are_spelled():
    shown = watch.Canvas([ord(c) for c in "RPPR"], [], most=20, tokenizer=Letters())
    assert shown.text().plain == "<R>PP<R>\n"
    styles = [span.style for span in shown.text().spans]
    assert styles == [watch.STYLES[name] for name in ("special token", "prompt", "prompt", "special token", "prompt")]


def test_a_long_canvas_is_laid_out_at_its_end_alone(monkeypatch):
    monkeypatch.setattr(watch, "MOST_TOKENS", 3)
    shown = canvas(STEPS)
    while shown.behind:
        shown.advance()
    assert shown.text().plain == "PPP\nN _ _" and shown.figures().startswith("forward 5 · 4 tokens")
    assert watch._last_lines(shown.text(), 2, screen(width=3)).plain.count("\n") == 1


def test_positions_past_the_last_that_may_be_generated_are_not_shown():
    shown = canvas(STEPS[:1], most=1)
    shown.advance()
    assert shown.text().plain == "PPPPPP\na"


def test_a_model_without_a_tokenizer_shows_ids_and_no_text_moves_the_cursor():
    shown = canvas([step(4, "PPa_")], tokenizer=None)
    shown.advance()
    assert shown.text().plain == " 80" * 6 + f"\n {ord('a')} _"
    hostile = canvas([step(4, "PPa_")])
    hostile._tokenizer.spelled = lambda ids: [Part("\x1b[2J\tprompt\n", False)]
    assert hostile.text().plain == "\ufffd[2J prompt\n"


def test_what_does_not_fit_is_cut_at_the_top_and_counted():
    console = screen(height=13)
    many = [canvas(STEPS, tokenizer=None) for _ in range(4)]
    for one in many:
        one._prompt = list(range(200))
    with console.capture() as captured:
        console.print(watch.view(many, console))
    lines = captured.get().splitlines()
    assert len(lines) < 13 and "and 2 more" in lines[-1]
    assert "199" in captured.get() and " 20 " not in captured.get()


ENGINE = {"strategy": "dmax", "block_size": 8, "buffer_size": 2, "max_model_len": 64, "max_slots": 3}


def test_watched_outputs_are_those_of_generate(engine_of, monkeypatch):
    monkeypatch.setattr(watch, "FORWARDS_A_SECOND", 1000)
    engine = engine_of("tiny-llada2-trained", **ENGINE)
    prompts, params = [[216, 206, 72], [5, 6]], SamplingParams(max_tokens=20, ignore_eos=True, n=2, seed=3, temperature=1.0)
    console = screen()
    outputs = watch.watched(engine, prompts, params, console=console)
    expected = engine.generate(prompts, params)
    assert [(o.token_ids, o.nfe, o.prompt_token_ids) for o in outputs] == [(o.token_ids, o.nfe, o.prompt_token_ids) for o in expected]
    drawn = console.file.getvalue()
    assert f"forward {outputs[0].nfe} · " in drawn and " 216 206 72" in drawn
    assert "\x1b[1;30;42m" in drawn and drawn.count("\x1b[?25h") >= 1  # new tokens, and the cursor is back


def test_an_error_of_the_engine_is_the_commands(engine_of, monkeypatch):
    engine = engine_of("tiny-llada2-trained", **ENGINE)

    def fail():
        engine._desk.end(next(iter(engine._desk.requests)))
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        watch.watched(engine, [[5]], SamplingParams(max_tokens=4), console=screen())


def test_the_command_draws_and_then_answers(monkeypatch):
    monkeypatch.setattr(watch, "FORWARDS_A_SECOND", 1000)
    console = screen()
    monkeypatch.setattr(watch, "terminal", lambda: console)
    args = ["generate", "--model", MODEL, "--prompt-ids", "216,206,72", "--max-tokens", "12", "--block-size", "8", "--max-model-len", "64"]
    result = CliRunner().invoke(cli.app, [*args, "--watch"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].replace(",", "").isdigit() and "tokens per forward" in result.stdout
    assert "forward 1 · " in console.file.getvalue()


@pytest.mark.parametrize(
    ("more", "message"),
    [([], "standard output is none; leave it out, or write a replay"), (["--json"], "--json prints one object and nothing else")],
)
def test_where_it_cannot_draw_it_says_so(more, message, monkeypatch):
    monkeypatch.setattr("diffulex_jax.weights.checkpoint.load", lambda *args, **settings: pytest.fail("loads"))
    result = CliRunner().invoke(cli.app, ["generate", "--watch", "--prompt", "a", *more])
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("error: --watch draws on") and message in result.stderr
