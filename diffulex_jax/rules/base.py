"""What a decoding rule is, and how rules compose: optax's idea, and its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffulex_jax.state import FORWARDS_PER_TOKEN, DecodeState, Dims, Prediction
from pallas_kernels.token_merge import MergeSpec


class Rule(NamedTuple):
    """A pair of pure functions that says what to do with a prediction.

    Attributes:
      init: ``init(dims) -> rule_state``: a pytree of arrays whose first axis is ``dims.slots``. Arrays with a second axis
        of size ``dims.window`` belong to blocks: they move with the window and start over for every new block.
      update: ``update(prediction, state, rule_state) -> (state, rule_state)``. It may write editable positions (through
        ``state.fill``), mask them again, set ``hold`` to keep a filled block open, and set merge descriptors.
      merge: how soft tokens are mixed, where the rule writes merge descriptors; None otherwise.
      candidates: how many of the most probable tokens of each position it reads (``Prediction.top_ids``).
      entropy: whether it reads ``Prediction.entropy``, which costs one more sum over the vocabulary.
      margin: whether it reads ``Prediction.margin``, likewise.
      moves: whether it moves tokens within a block, all of whose positions must then be the block's own.
      one_block: whether all generated positions of a request must be one block (``Dims.one_block``), as where it shares them out over the
        steps to come. Behind a cache, whose blocks begin with a forward over all there is, it shares out those of each block.
      noise: whether it reads ``Settings.step_shares``.
    """

    init: Callable[[Dims], Any]
    update: Callable[[Prediction, DecodeState, Any], tuple[DecodeState, Any]]
    merge: MergeSpec | None = None
    candidates: int = 0
    entropy: bool = False
    margin: bool = False
    moves: bool = False
    one_block: bool = False
    noise: bool = False


def dims_for(
    rule: Rule,
    *,
    slots: int,
    window: int,
    block: int,
    page: int,
    pages_per_slot: int,
    mask_id: int,
    commit_alone: bool = False,
    sub_block_cache: int = 0,
    whole_canvas: bool = False,
    cached_canvas: bool = False,
    prompt_apart: bool = False,
    carried: int = 0,
) -> Dims:
    """The sizes of a state that ``rule`` decodes; ``cached_canvas``: blocks of a whole canvas begin with a forward over all of it."""
    merge_top_k = rule.merge.top_k if rule.merge is not None else 0
    return Dims(
        slots=slots,
        window=window,
        block=block,
        page=page,
        pages_per_slot=pages_per_slot,
        mask_id=mask_id,
        merge_top_k=merge_top_k,
        candidates=max(merge_top_k, rule.candidates),
        commit_alone=commit_alone,
        sub_block_cache=sub_block_cache,
        whole_canvas=whole_canvas,
        prompt_apart=prompt_apart,
        carried=carried,
        one_block=rule.one_block and not cached_canvas,
        noise_steps=FORWARDS_PER_TOKEN * block if rule.noise else 0,
    )


def stateless(update: Callable[[Prediction, DecodeState], DecodeState], *, merge: MergeSpec | None = None, entropy: bool = False) -> Rule:
    """A rule that keeps nothing between steps."""
    return Rule(
        lambda dims: (),
        lambda prediction, state, rule_state: (update(prediction, state), rule_state),
        merge=merge,
        entropy=entropy,
    )


def chain(*rules: Rule) -> Rule:
    """Applies rules one after the other; each sees what the ones before it wrote.

    Raises:
      TypeError: when an argument is not a Rule.
      ValueError: when more than one rule writes merge descriptors.
    """
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"chain takes rules, got {rule!r}")
    merges = [rule.merge for rule in rules if rule.merge is not None]
    if len(merges) > 1:
        raise ValueError(f"only one rule of a chain may merge tokens, got {len(merges)}")

    def init(dims: Dims) -> tuple[Any, ...]:
        return tuple(rule.init(dims) for rule in rules)

    def update(prediction: Prediction, state: DecodeState, rule_states: tuple[Any, ...]) -> tuple[DecodeState, tuple[Any, ...]]:
        new = []
        for rule, rule_state in zip(rules, rule_states, strict=True):
            state, rule_state = rule.update(prediction, state, rule_state)
            new.append(rule_state)
        return state, tuple(new)

    return Rule(
        init,
        update,
        merge=merges[0] if merges else None,
        candidates=max((rule.candidates for rule in rules), default=0),
        entropy=any(rule.entropy for rule in rules),
        margin=any(rule.margin for rule in rules),
        moves=any(rule.moves for rule in rules),
        one_block=any(rule.one_block for rule in rules),
        noise=any(rule.noise for rule in rules),
    )
