"""How probable a model finds given completions, token by token: three estimators, each a plan of forwards over canvases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffulex_jax.decode.likelihood import Canvases
from diffulex_jax.errors import SettingError
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.state import Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonteCarlo:
    """The evidence lower bound, drawn at random: the sum over a completion estimates a lower bound of its log probability without bias.

    Of the n tokens that are drawn together, those of a block where blocks are decoded one after the other (given the clean past), else
    the whole completion, a sample masks l, uniform in 1 .. n, in random places. A token's estimate is the mean over samples of n / l times
    its log probability where it is masked, and 0 where it is not (LLaDA, arXiv 2502.09992, appendix B; in blocks: arXiv 2503.09573). The
    l of the samples are spread evenly over 1 .. n. One forward for each sample.

    Attributes:
      samples: how many.
      seed: of their masks, which are the same whatever is scored beside.
    """

    samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(name, f"{name}={value!r} must be an integer of at least {least}")


@dataclasses.dataclass(frozen=True)
class BlockConditional:
    """Each block at once, all of its completion tokens masked, given the clean past: what a decoder that fills a block in one forward
    draws from, at temperature 1. No bound: tokens of a block are taken to be independent. One forward, or, where a model sees its whole
    canvas, one for each block of the engine's ``block_size`` from the prompt's end on."""


@dataclasses.dataclass(frozen=True)
class StepMap:
    """Along recorded step maps: each token in the forward that last wrote it, given what stood there before.

    That is what the decoder computed for strategies which fill masks and never revise them, without an approximate cache or a penalty, for
    outputs that end with a block. Where an output ends within one, or before ``max_tokens`` of a canvas that is seen whole, what stood
    behind it is not recorded, and masks are there. A revised token counts as masked until it was last written, and soft tokens as masks.
    Pinned tokens (steps ``(0, 0)``) were given: their log probability is 0. One forward for each step.

    Attributes:
      maps: ``Output.step_map`` of each completion.
    """

    maps: Sequence[Sequence[tuple[int, int]]]


_LONGEST = 2048  # tokens of a row, or twice the sequence

Estimator = MonteCarlo | BlockConditional | StepMap


class Asked(NamedTuple):
    """One sequence: ``tokens`` ``[n]`` int32, the first ``begin`` of which are the prompt."""

    tokens: np.ndarray
    begin: int


class Canvas(NamedTuple):
    """One sequence with masks.

    Attributes:
      hidden: ``[n]`` bool, which of its tokens are masked.
      weight: ``[n]`` float32, how much of the log probabilities found counts.
    """

    hidden: np.ndarray
    weight: np.ndarray


class Row(NamedTuple):
    """Canvases of one sequence that go through the network together.

    Attributes:
      asked: the number of the sequence.
      first: where canvases begin: behind blocks that have no masks.
      cells: of each canvas.
      canvases: one or more.
    """

    asked: int
    first: int
    cells: int
    canvases: Sequence[Canvas]


def score(
    asked: Sequence[Asked],
    estimator: Estimator,
    *,
    dims: Dims,
    policy: AttentionPolicy,
    most: int,
    rows: Callable[[int], int],
    run: Callable[[Canvases], np.ndarray],
    progress: bool = False,
) -> list[np.ndarray]:
    """Log probability of each token behind the prompts, ``[n - begin]`` float32 each.

    Args:
      asked: the sequences.
      estimator: which.
      dims, policy: of the decoder.
      most: positions that a sequence may have.
      rows: how many rows of so many tokens go through the network together.
      run: ``likelihood.log_probs``, compiled for each shape: lengths are blocks times powers of 2, see also :func:`_width`.
      progress: show a progress bar.
    """
    whole = policy.canvas == "whole"
    paired = not whole and not isinstance(estimator, StepMap)
    found = [np.zeros(len(tokens), np.float32) for tokens, _ in asked]
    planned: dict[tuple[int, int], list[Row]] = {}
    for i, one in enumerate(asked):
        if len(one.tokens) > one.begin:
            length = _length(one, dims, whole=whole, most=most)
            canvases = list(_canvases(i, one, estimator, dims, whole=whole))
            first, cells = _open_blocks(one, dims) if paired else (0, length)
            width = _width(length, cells, len(canvases), block=dims.block) if paired else length
            each = width // cells
            more = [Row(i, first, cells, canvases[at : at + each]) for at in range(0, len(canvases), each)]
            planned.setdefault((length, width), []).extend(more)
    total = sum(len(row.canvases) for some in planned.values() for row in some)
    with tqdm(total=total, unit="canvas", disable=not progress) as bar:
        for (length, width), some in planned.items():
            together = rows(length + width if paired else length)
            for at in range(0, len(some), together):
                batch = some[at : at + together]
                given = run(_packed(asked, batch, (together, width, length), mask_id=dims.mask_id, paired=paired))
                for row, log_probs in zip(batch, given, strict=False):
                    _add(found[row.asked][row.first :], row, log_probs)
                    bar.update(len(row.canvases))
    return [log_probs[begin:] for log_probs, (_, begin) in zip(found, asked, strict=True)]


def _add(found: np.ndarray, row: Row, log_probs: np.ndarray) -> None:
    """Adds what a row's canvases give, each by its weight, to what was found of the sequence from ``row.first`` on."""
    for i, canvas in enumerate(row.canvases):
        weight = canvas.weight[row.first :]
        counts = weight != 0
        found[counts] += (weight * log_probs[i * row.cells :][: len(weight)])[counts]


def _length(one: Asked, dims: Dims, *, whole: bool, most: int) -> int:
    """Positions of the canvas, which holds all of the last block."""
    first = one.begin if dims.prompt_apart else 0
    needed = len(one.tokens) if whole else first + -(-(len(one.tokens) - first) // dims.block) * dims.block
    length = dims.block
    while length < needed:
        length *= 2
    return min(length, max(most, needed))


def _open_blocks(one: Asked, dims: Dims) -> tuple[int, int]:
    """The first position, and the number of positions, of the blocks that hold a completion."""
    first = one.begin if dims.prompt_apart else one.begin // dims.block * dims.block
    return first, -(-(len(one.tokens) - first) // dims.block) * dims.block


def _width(length: int, cells: int, count: int, *, block: int) -> int:
    """Cells of a row beside the ``length`` of its sequence, so that ``count`` canvases of so many ``cells`` take the fewest tokens.

    A quarter of the length, the length, or four times it, so that few programs are compiled, in whole blocks.
    """
    widths = [width // block * block for width in (length // 4, length, 4 * length) if length + width <= max(2 * length, _LONGEST)]
    widths = [width for width in widths if width >= cells]
    return min(widths, key=lambda width: -(-count // (width // cells)) * (length + width))


def _canvases(i: int, one: Asked, estimator: Estimator, dims: Dims, *, whole: bool) -> Iterable[Canvas]:
    at = np.arange(len(one.tokens))
    open_ = at >= one.begin
    number = (at - (one.begin if whole or dims.prompt_apart else 0)) // dims.block
    match estimator:
        case MonteCarlo():
            return _sampled(open_, np.zeros_like(number) if whole else number, estimator)
        case BlockConditional():
            return _blocks(open_, number) if whole else [Canvas(open_, open_.astype(np.float32))]
        case StepMap():
            return _steps(open_, np.array([last for _, last in estimator.maps[i]], np.int64))


def _sampled(open_: np.ndarray, group: np.ndarray, estimator: MonteCarlo) -> Iterator[Canvas]:
    rng = np.random.default_rng(estimator.seed)
    groups = [np.flatnonzero(open_ & (group == n)) for n in np.unique(group[open_])]
    offsets = [rng.integers(len(members)) for members in groups]
    for sample in range(estimator.samples):
        hidden, weight = np.zeros_like(open_), np.zeros(len(open_), np.float32)
        for members, offset in zip(groups, offsets, strict=True):
            n = len(members)
            count = 1 + (offset + sample * n // estimator.samples) % n
            chosen = rng.choice(members, count, replace=False)
            hidden[chosen] = True
            weight[chosen] = n / count / estimator.samples
        yield Canvas(hidden, weight)


def _blocks(open_: np.ndarray, number: np.ndarray) -> Iterator[Canvas]:
    for n in np.unique(number[open_]):
        yield Canvas(open_ & (number >= n), (open_ & (number == n)).astype(np.float32))


def _steps(open_: np.ndarray, last: np.ndarray) -> Iterator[Canvas]:
    written = np.zeros(len(open_), np.int64)
    written[open_] = last
    for step in np.unique(last[last > 0]):
        yield Canvas(open_ & (written >= step), (open_ & (written == step)).astype(np.float32))


def _packed(asked: Sequence[Asked], batch: Sequence[Row], shape: tuple[int, int, int], *, mask_id: int, paired: bool) -> Canvases:
    rows, width, size = shape
    noisy, target, clean = (np.full((rows, n), mask_id, np.int32) for n in (width, width, size))
    number = np.full((rows, width), -1 if paired else 0, np.int32)
    at = np.zeros((rows, width), np.int32) if paired else np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    begin, length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for r, row in enumerate(batch):
        tokens, begin[r] = asked[row.asked]
        length[r] = len(tokens)
        clean[r, : len(tokens)] = tokens
        rest = tokens[row.first :]
        for i, canvas in enumerate(row.canvases):
            start = i * row.cells
            if paired:
                number[r, start : start + row.cells] = i
                at[r, start : start + row.cells] = np.arange(row.first, row.first + row.cells)
            target[r, start : start + len(rest)] = rest
            noisy[r, start : start + len(rest)] = np.where(canvas.hidden[row.first :], mask_id, rest)
    return Canvases(noisy, at, number, clean if paired else None, target, begin, length)


def check(estimator: Any, lengths: Sequence[int]) -> None:
    """Checks an estimator, for completions of so many tokens.

    Raises:
      SettingError: for what is no estimator, or step maps that are not of these completions.
    """
    if not isinstance(estimator, Estimator):
        raise SettingError("estimator", f"estimator={estimator!r} must be a MonteCarlo, a BlockConditional or a StepMap")
    if isinstance(estimator, StepMap):
        if len(estimator.maps) != len(lengths):
            raise SettingError("maps", f"{len(estimator.maps)} step maps for {len(lengths)} completions")
        for i, (steps, length) in enumerate(zip(estimator.maps, lengths, strict=True)):
            if steps is None or len(steps) != length:
                given = "none" if steps is None else len(steps)
                raise SettingError("maps", f"completion {i} has {length} tokens, and its step map {given}; ask for return_step_map")
