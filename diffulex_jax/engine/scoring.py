"""How probable a model finds given completions, token by token: three estimators, each a plan of forwards over canvases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

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


Estimator = MonteCarlo | BlockConditional | StepMap


class Asked(NamedTuple):
    """One sequence: ``tokens`` ``[n]`` int32, the first ``begin`` of which are the prompt."""

    tokens: np.ndarray
    begin: int


class Row(NamedTuple):
    """One canvas.

    Attributes:
      asked: the number of the sequence.
      hidden: ``[n]`` bool, which of its tokens are masked.
      weight: ``[n]`` float32, how much of the log probabilities found counts.
    """

    asked: int
    hidden: np.ndarray
    weight: np.ndarray


def score(
    asked: Sequence[Asked],
    estimator: Estimator,
    *,
    dims: Dims,
    policy: AttentionPolicy,
    most: int,
    rows: Callable[[int], int],
    run: Callable[[Canvases], np.ndarray],
) -> list[np.ndarray]:
    """Log probability of each token behind the prompts, ``[n - begin]`` float32 each.

    Args:
      asked: the sequences.
      estimator: which.
      dims, policy: of the decoder.
      most: positions that a sequence may have.
      rows: how many canvases of so many positions go through the network together.
      run: ``likelihood.log_probs``, compiled for each shape: lengths are blocks times powers of 2.
    """
    whole = policy.canvas == "whole"
    paired = not whole and not isinstance(estimator, StepMap)
    found = [np.zeros(len(tokens), np.float32) for tokens, _ in asked]
    planned: dict[int, list[Row]] = {}
    for i, one in enumerate(asked):
        if len(one.tokens) > one.begin:
            planned.setdefault(_length(one, dims, whole=whole, most=most), []).extend(_rows(i, one, estimator, dims, whole=whole))
    for length, canvases in planned.items():
        together = rows(2 * length if paired else length)
        for at in range(0, len(canvases), together):
            batch = canvases[at : at + together]
            log_probs = run(_packed(asked, batch, (together, length), mask_id=dims.mask_id, paired=paired))
            for row, given in zip(batch, log_probs, strict=False):
                counts = row.weight != 0
                found[row.asked][counts] += (row.weight * given[: len(row.weight)])[counts]
    return [log_probs[begin:] for log_probs, (_, begin) in zip(found, asked, strict=True)]


def _length(one: Asked, dims: Dims, *, whole: bool, most: int) -> int:
    """Positions of the canvas, which holds all of the last block."""
    first = one.begin if dims.prompt_apart else 0
    needed = len(one.tokens) if whole else first + -(-(len(one.tokens) - first) // dims.block) * dims.block
    length = dims.block
    while length < needed:
        length *= 2
    return min(length, max(most, needed))


def _rows(i: int, one: Asked, estimator: Estimator, dims: Dims, *, whole: bool) -> Iterable[Row]:
    at = np.arange(len(one.tokens))
    open_ = at >= one.begin
    number = (at - (one.begin if whole or dims.prompt_apart else 0)) // dims.block
    match estimator:
        case MonteCarlo():
            return _sampled(i, open_, np.zeros_like(number) if whole else number, estimator)
        case BlockConditional():
            return _blocks(i, open_, number) if whole else [Row(i, open_, open_.astype(np.float32))]
        case StepMap():
            return _steps(i, open_, np.array([last for _, last in estimator.maps[i]], np.int64))


def _sampled(i: int, open_: np.ndarray, group: np.ndarray, estimator: MonteCarlo) -> Iterator[Row]:
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
        yield Row(i, hidden, weight)


def _blocks(i: int, open_: np.ndarray, number: np.ndarray) -> Iterator[Row]:
    for n in np.unique(number[open_]):
        yield Row(i, open_ & (number >= n), (open_ & (number == n)).astype(np.float32))


def _steps(i: int, open_: np.ndarray, last: np.ndarray) -> Iterator[Row]:
    written = np.zeros(len(open_), np.int64)
    written[open_] = last
    for step in np.unique(last[last > 0]):
        yield Row(i, open_ & (written >= step), (open_ & (written == step)).astype(np.float32))


def _packed(asked: Sequence[Asked], batch: Sequence[Row], shape: tuple[int, int], *, mask_id: int, paired: bool) -> Canvases:
    clean, noisy = np.full(shape, mask_id, np.int32), np.full(shape, mask_id, np.int32)
    begin, length = np.zeros(shape[0], np.int32), np.zeros(shape[0], np.int32)
    for row, (i, hidden, _) in enumerate(batch):
        tokens, begin[row] = asked[i]
        length[row] = len(tokens)
        clean[row, : len(tokens)] = tokens
        noisy[row, : len(tokens)] = np.where(hidden, mask_id, tokens)
    return Canvases(noisy, clean if paired else None, clean, begin, length)


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
