"""``generate --watch``: canvases that denoise on the terminal, a panel a request."""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from diffulex_jax.async_serving.protocol import Provisional
from diffulex_jax.engine.results import Output, TraceStep
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.sampling_params import SamplingParams


if TYPE_CHECKING:
    from diffulex_jax.engine.engine import Engine


FORWARDS_A_SECOND = 6  # slow enough to look at; a model that is faster is caught up with within a second
LEAST_LINES = 5  # of a panel, its frame included
MOST_TOKENS = 2000  # of a prompt, and of a canvas, that are laid out: more than a screen holds
STYLES = {
    "prompt": "dim",
    "special token": "dim italic",
    "masked": "grey50",
    "new": "bold black on green",
    "kept": "cyan",
    "edited": "bold black on dark_orange",
    "masked again": "bold red",
    "settled": "default",
}


def terminal() -> Console:
    """The terminal that standard output is.

    Raises:
      ValueError: where it is none.
    """
    if not sys.stdout.isatty():
        raise ValueError("--watch draws on a terminal, and standard output is none; leave it out, or write a replay: diffulex-jax trace")
    return Console()


def watched(engine: Engine, prompts: Sequence[str | list[int]], params: SamplingParams, *, console: Console) -> list[Output]:
    """Decodes prompts as ``engine.generate`` does, and draws what each forward makes of them.

    The engine works in a thread of its own: what is drawn may lag behind, and slows nothing down.
    """
    canvases: dict[int, Canvas] = {}
    for prompt in prompts:
        if isinstance(prompt, str):
            assert engine.tokenizer is not None  # or there would be no prompts as text
            prompt = engine.tokenizer.encode(prompt)
        for id_ in engine.add(prompt, params, trace=True):
            steps = engine.progress(id_).trace
            assert steps is not None
            canvases[id_] = Canvas(prompt, steps, most=params.max_tokens, tokenizer=engine.tokenizer, mask=_mask(console))
    with concurrent.futures.ThreadPoolExecutor(1) as pool, Live(console=console, auto_refresh=False, transient=True) as live:
        console.show_cursor()  # Ctrl-C ends the process at once, and nothing would bring it back
        work = pool.submit(_finish, engine)
        while not work.done() or any(canvas.behind for canvas in canvases.values()):
            pause = 1 / max(FORWARDS_A_SECOND, *(canvas.behind for canvas in canvases.values()))
            for canvas in canvases.values():
                canvas.advance()
            live.update(view(list(canvases.values()), console), refresh=True)
            time.sleep(pause)
        outputs = work.result()
    return [outputs[id_] for id_ in canvases]


class Canvas:
    """What a request's forwards made of it, up to one that is shown.

    Attributes:
      forwards: how many are shown.
      tokens: by offset from the prompt's end; None where masked.
      events: by offset, a key of :data:`STYLES`.
      edits: filled tokens that were changed so far.
    """

    def __init__(self, prompt: Sequence[int], steps: Sequence[TraceStep], *, most: int, tokenizer: Tokenizer | None, mask: str = "░"):
        """Begins before the first forward.

        Args:
          prompt: token ids.
          steps: the request's trace, which may grow.
          most: tokens that may be generated.
          tokenizer: None where the model has none: ids are shown then.
          mask: what a masked position looks like.
        """
        self.forwards, self.edits = 0, 0
        self.tokens: list[int | None] = []
        self.events: list[str] = []
        self._prompt, self._steps, self._most, self._tokenizer, self._mask = prompt, steps, most, tokenizer, mask

    @property
    def behind(self) -> int:
        """Forwards that have happened and are not shown."""
        return len(self._steps) - self.forwards

    def advance(self) -> None:
        """Shows one forward more, if there is one."""
        if not self.behind:
            return
        step = self._steps[self.forwards]
        self.forwards += 1
        patch = Provisional.of(step, id="", index=0, nfe=self.forwards, prompt_tokens=len(self._prompt), max_tokens=self._most)
        missing = patch.offset + len(patch.token_ids) - len(self.tokens)
        self.tokens += [None] * missing
        self.events = ["settled"] * patch.offset + self.events[patch.offset :] + ["masked"] * missing
        for offset, (token, confidence) in enumerate(zip(patch.token_ids, patch.confidence, strict=True), patch.offset):
            self.events[offset] = _event(patch, offset, token, confidence, was=self.tokens[offset])
            self.tokens[offset] = token
        self.edits += len(patch.revised)

    def text(self) -> Text:
        """The prompt and the canvas, coloured by what became of each position in the forward that is shown."""
        parts = self._spelled(self._prompt[-MOST_TOKENS:])
        if not parts or not parts[-1][0].endswith("\n"):
            parts.append(("\n", STYLES["prompt"]))
        for token, event in zip(self.tokens[-MOST_TOKENS:], self.events[-MOST_TOKENS:], strict=True):
            parts.append((f" {self._mask}" if token is None else self._piece(token), STYLES[event]))
        return Text.assemble(*parts)

    def figures(self) -> str:
        """How far it is."""
        tokens = sum(token is not None for token in self.tokens)
        rate = f"{tokens / max(1, self.forwards):.1f} a forward"
        return f"forward {self.forwards} · {tokens} tokens · {rate} · {self.edits} edited"

    def _spelled(self, ids: Sequence[int]) -> list[tuple[str, str]]:
        if self._tokenizer is None:
            return [("".join(map(self._piece, ids)), STYLES["prompt"])]
        parts = self._tokenizer.spelled(ids)
        return [(_printable(text), STYLES["special token" if special else "prompt"]) for text, special in parts]

    def _piece(self, token: int) -> str:
        return f" {token}" if self._tokenizer is None else _printable(self._tokenizer.piece(token))


def view(canvases: Sequence[Canvas], console: Console) -> Group:
    """Panels for as many canvases as there is room for, those that still change first, each with its last lines, and a legend."""
    room = console.height - 3  # the legend may take two lines, and the cursor stands below
    order = sorted(canvases, key=lambda canvas: not canvas.behind)
    shown = order[: max(1, room // LEAST_LINES)]
    lines = max(1, room // len(shown) - 2)
    panels = [Panel(_last_lines(c.text(), lines, console), title=c.figures(), title_align="left", border_style="dim") for c in shown]
    legend = Text("  ").join(Text(name, style) for name, style in STYLES.items())
    if len(shown) < len(canvases):
        legend.append(f"  and {len(canvases) - len(shown)} more", "dim")
    return Group(*panels, legend)


def _finish(engine: Engine) -> dict[int, Output]:
    """Works until nothing is left; returns the outputs by id."""
    outputs: dict[int, Output] = {}
    while engine.has_work:
        outputs |= engine.step()
    return outputs


def _event(patch: Provisional, offset: int, token: int | None, confidence: float, *, was: int | None) -> str:
    if token is None:
        return "masked again" if offset in patch.remasked else "masked"
    if offset in patch.revised:
        return "edited"
    if was is not None:
        return "kept"
    return "new" if confidence else "prompt"  # without a probability: given with the request


def _last_lines(text: Text, count: int, console: Console) -> Text:
    return Text("\n").join(text.wrap(console, max(1, console.width - 4))[-count:])


def _printable(text: str) -> str:
    """Text that moves no cursor and rings no bell."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text)


def _mask(console: Console) -> str:
    return "░" if console.encoding.startswith("utf") else "_"
