"""Training data: batches by the number of the step, so that a run which goes on takes the examples it would have taken."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffulex_jax.engine.tokenizer import Tokenizer


if TYPE_CHECKING:
    from diffulex_jax.training.recipe import About


class Examples(NamedTuple):
    """Training examples.

    tokens: ``[N, L]`` integers; prompt, answer, then end-of-sequence to the end of the canvas.
    start: ``[N]`` int32; position of the first answer token, also the length of the prompt.
    end: ``[N]`` int32; position of the first end-of-sequence token.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray


Batches = Callable[[int], Examples]
"""The batch of a step, from 0 on; the same whenever it is asked for."""


def shuffled(examples: Examples, *, rows: int, seed: int) -> Batches:
    """Batches of ``rows`` examples; every pass over them is a new permutation.

    Raises:
      ValueError: where there are no examples.
    """
    count = len(examples.start)
    if not count:
        raise ValueError("there are no examples to train on")
    rng = np.random.default_rng((seed, 2))
    passes: list[np.ndarray] = []

    def batch(step: int) -> Examples:
        number, at = np.divmod(np.arange(step * rows, (step + 1) * rows), count)
        while len(passes) <= number[-1]:
            passes.append(rng.permutation(count).astype(np.int32))
        index = np.array([passes[n][i] for n, i in zip(number, at, strict=True)])
        return Examples(*(column[index] for column in examples))

    return batch


def random_access(dataset: Sequence[Mapping[str, Any]]) -> Batches:
    """Batches of a dataset that is asked by index, as Grain's are: ``grain.MapDataset.source(examples).shuffle().repeat().batch(rows)``.

    Args:
      dataset: ``dataset[step]`` has the columns of :class:`Examples` by name, each with a leading axis of rows. Grain makes it of examples
        that are such mappings, without that axis.
    """

    def batch(step: int) -> Examples:
        columns = dataset[step]
        return Examples(*(np.asarray(columns[name]) for name in Examples._fields))

    return batch


def json_lines(about: About, *, path: str, length: int | None) -> Batches:
    """Examples of a JSON-lines file: ``{"prompt": ..., "completion": ...}``, or ``{"messages": [...]}`` that end with an assistant's.

    A prompt is text as it stands; messages go through the model's chat template. What is learnt is the completion, or the last message,
    and the end of sequence behind it. Examples that are longer than the canvas are left out.

    Args:
      about: what they are for; its model has a tokenizer.
      path: the file, in UTF-8.
      length: tokens of the canvas, whole blocks; None for as many as the longest example takes that the model has positions for.
        Memory grows with its square.

    Raises:
      ValueError: naming the line and what is wrong with it; or where no example fits, the model has no tokenizer, or ``length`` will
        not do.
    """
    block, most = about.model.spec.block_size, about.model.spec.max_positions
    if length is not None and (length < block or length % block):
        raise ValueError(f"length={length} must be a multiple of the model's block size {block}")
    tokenizer = None if about.folder is None else Tokenizer.load(about.folder)
    if tokenizer is None:
        raise ValueError("a JSON-lines file needs a model with a tokenizer; name one")
    pairs = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    pairs.append(_pair(json.loads(line), tokenizer))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    if length is None:
        needed = (len(prompt) + len(answer) + 1 for prompt, answer in pairs)
        longest = max((count for count in needed if count <= most), default=most)
        length = -(-longest // block) * block
    examples = canvases(pairs, length=length, end_id=about.model.spec.eos_ids[0])
    if not len(examples.start):
        raise ValueError(f"{path}: none of its {len(pairs)} examples fits a canvas of {length} tokens")
    return shuffled(examples, rows=about.rows, seed=about.seed)


def canvases(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, length: int, end_id: int) -> Examples:
    """Token ids of prompts and answers on canvases, with ``end_id`` behind; pairs that do not fit with one of it are left out."""
    fitting = [(prompt, answer) for prompt, answer in pairs if len(prompt) + len(answer) < length]
    tokens = np.full((len(fitting), length), end_id, np.int32)
    start, end = np.zeros(len(fitting), np.int32), np.zeros(len(fitting), np.int32)
    for i, (prompt, answer) in enumerate(fitting):
        start[i], end[i] = len(prompt), len(prompt) + len(answer)
        tokens[i, : end[i]] = [*prompt, *answer]
    return Examples(tokens, start, end)


def _pair(entry: Any, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer of a line."""
    if not isinstance(entry, dict) or entry.keys() not in ({"prompt", "completion"}, {"messages"}):
        raise ValueError('must be {"prompt": ..., "completion": ...} or {"messages": [...]}')
    if "messages" not in entry:
        prompt, answer = entry["prompt"], entry["completion"]
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError("prompt and completion must be texts")
        return tokenizer.encode(prompt), tokenizer.encode_more(answer)
    messages = entry["messages"]
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise ValueError("messages must end with one of role assistant, whose content is a text")
    return tokenizer.apply_chat_template(messages[:-1]), tokenizer.encode_more(last["content"])


def from_file(path: str | pathlib.Path, *, length: int | None = None) -> Callable[[About], Batches]:
    """:func:`json_lines` of a file, for a recipe."""
    return functools.partial(json_lines, path=str(path), length=length)
