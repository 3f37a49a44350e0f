"""A run of a recipe in a directory: what it writes, and how it goes on after it was ended.

checkpoints/     the last two states, by Orbax; removed when the run is done
recipe.json      what is trained, which a run that goes on must agree with
history.jsonl    a line for every 50 steps: the loss and accuracy of each objective
loss.png         the same as curves
...              the result: a Hugging Face directory, or PEFT's files of adapters
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from diffulex_jax.training.recipe import Recipe, Trained, described
from diffulex_jax.training.trainer import CHUNK, State, train
from diffulex_jax.weights import adapters, checkpoint, placed


SAVE_EVERY = 500  # steps
FACTS, HISTORY, CURVE, STATES = "recipe.json", "history.jsonl", "loss.png", "checkpoints"


def run(
    recipe: Recipe, out: str | pathlib.Path, *, mesh: Mesh | str | None = None, resume: bool = False, save_every: int = SAVE_EVERY
) -> Trained:
    """Trains, and writes the result to ``out``.

    Args:
      recipe: what to do.
      out: a directory; it holds no run yet, or with ``resume`` one of this recipe.
      mesh: see ``trainer.train``.
      resume: go on from the last state that the run kept, to the same parameters as if it had not been ended.
      save_every: steps between states that are kept, a multiple of 50; 0 keeps none, and needs no Orbax.

    Raises:
      ValueError: for a directory that holds another run, or settings that will not do.
      ImportError: where Orbax is not installed.
    """
    out = pathlib.Path(out).absolute()
    if save_every < 0 or save_every % CHUNK:
        raise ValueError(f"save_every={save_every} must be a multiple of {CHUNK}, or 0")
    _claim(out, recipe, resume)
    keeper = _Keeper(out, save_every) if save_every or resume else None

    def begin(state: State) -> tuple[State, list[dict[str, float]]]:
        state = keeper.last(state) if keeper is not None and resume else state
        return state, [entry for entry in _lines(out / HISTORY) if entry["step"] <= int(state.step)]

    def after_chunk(state: State, history: list[dict[str, float]]) -> None:
        (out / HISTORY).write_text("".join(json.dumps(entry) + "\n" for entry in history))
        if keeper is not None:
            keeper.keep(state)

    try:
        trained = train(recipe, mesh=mesh, begin=begin, after_chunk=after_chunk, chunk=CHUNK)
    finally:
        if keeper is not None:
            keeper.close()
    draw(out / CURVE, trained.history)
    write(out, trained)
    shutil.rmtree(out / STATES, ignore_errors=True)
    return trained


def write(out: str | pathlib.Path, trained: Trained) -> None:
    """Writes what a run gave, as its recipe says: a Hugging Face directory, or PEFT's files of adapters."""
    out = pathlib.Path(out)
    if trained.recipe.finish is not None:
        trained.recipe.finish(out, trained)
    elif trained.recipe.lora is not None:
        adapters.save(out, trained.model, trained.recipe.lora, trained.params, base=str(trained.recipe.model))
    else:
        checkpoint.save(out, trained.model, trained.params)
        if trained.folder is not None:
            placed.copy_beside(trained.folder, out)


def draw(path: str | pathlib.Path, history: Sequence[dict[str, float]]) -> bool:
    """Draws losses and accuracies over steps into a PNG file. Without matplotlib nothing is drawn, and the answer is False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in history]
    names = [name.removesuffix("_accuracy") for name in history[0] if name.endswith("_accuracy")]
    for ax, title, suffix in ((left, "loss (nats a token)", ""), (right, "accuracy", "_accuracy")):
        for name in names:
            ax.plot(steps, [entry[name + suffix] for entry in history], label=name, linewidth=1.2)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _claim(out: pathlib.Path, recipe: Recipe, resume: bool) -> None:
    """Makes the directory this run's."""
    facts = json.loads(json.dumps(described(recipe)))
    file = out / FACTS
    if not resume:
        taken = next((name for name in (FACTS, "config.json", adapters.CONFIG) if (out / name).exists()), None)
        if taken is not None:
            raise ValueError(f"{out} holds a run or a model already ({taken}); go on with it (resume), or choose another directory")
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=1) + "\n")
        return
    if not file.is_file():
        raise ValueError(f"{out} holds no run to go on with: there is no {FACTS}")
    if not (out / STATES).is_dir():
        raise ValueError(f"{out} holds no run to go on with: it is done, or kept no state")
    kept = json.loads(file.read_text())
    for name, value in facts.items():
        if kept.get(name) != value:
            raise ValueError(f"{out} holds a run with {name}={kept.get(name)!r}, not {value!r}")


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class _Keeper:
    """Keeps states in ``out``, by Orbax."""

    def __init__(self, out: pathlib.Path, every: int):
        self._orbax: Any = placed.orbax()
        self._every = every
        options = self._orbax.CheckpointManagerOptions(max_to_keep=2)
        self._manager = self._orbax.CheckpointManager(out / STATES, options=options)

    def keep(self, state: State) -> None:
        if self._every and int(state.step) % self._every == 0:
            self._manager.save(int(state.step), args=self._orbax.args.StandardSave(_by_number(state)))
            self._manager.wait_until_finished()  # before the next dispatch takes the buffers

    def last(self, fresh: State) -> State:
        """The last state that was kept, placed as ``fresh`` is; ``fresh`` itself where none was."""
        step = self._manager.latest_step()
        if step is None:
            return fresh
        found = self._manager.restore(step, args=self._orbax.args.StandardRestore(_by_number(fresh)))
        leaves, tree = jax.tree.flatten(fresh)
        return jax.tree.unflatten(tree, [found[str(i)] for i in range(len(leaves))])

    def close(self) -> None:
        self._manager.close()


def _by_number(state: State) -> dict[str, jax.Array]:
    """The arrays of a state, in the order of its tree."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
