"""The decoding state: one pytree for every strategy, all shapes fixed when the engine starts.

Letters in shapes: S slots, K blocks in the window, B tokens in a block, M merge candidates, C candidates, P pages of a slot,
T positions of a slot, as many as P pages hold, L layers, N pages of the pool.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


RUNNING, STOP, LENGTH, MAX_NFE, ERROR = range(5)
FORWARDS_PER_TOKEN = 4  # of a block: so many it may spend, whatever the rules say
FINISH_REASONS = {STOP: "stop", LENGTH: "length", MAX_NFE: "max_nfe", ERROR: "error"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dims:
    """Every static size of a state; ``rules.dims_for`` knows what a rule needs.

    Attributes:
      slots, window, block: S, K, B.
      page: tokens of a page of the pool; a multiple of a block, or a whole fraction of one.
      pages_per_slot: P.
      mask_id: the token that masked positions read as.
      whole_canvas: every forward sees all of a row's canvas ``[0, limit)``, and no position past it exists. Blocks are counted from the
        prompt's end, and a request says how long they are; the window holds one, and what follows it up to B tokens.
      prompt_apart: blocks are counted from the prompt's end, all of which is in the pool before the first step (D2F).
      carried: how much of the hidden state before the window a row keeps: D where that speaks of the window's first position, and a
        window may go on before it is decided; else 0.
      merge_top_k: M, candidates mixed into a soft token.
      candidates: most probable tokens that a prediction lists, at least M.
      commit_alone: a block's KV is written in a step that does nothing else for its row but decide the first token of the next block. On a
        whole canvas, such a step makes the keys and values of all of it anew.
      sub_block_cache: tokens of a sub-block that goes through the network by itself, beside old keys and values of its block; 0: none does.
      one_block: a request's generated positions are all in one block.
      noise_steps: most steps that a request's noise level may fall in; 0 where no rule asks how it falls.
    """

    slots: int
    window: int
    block: int
    page: int
    pages_per_slot: int
    mask_id: int
    whole_canvas: bool = False
    prompt_apart: bool = False
    carried: int = 0
    merge_top_k: int = 0
    candidates: int = 0
    commit_alone: bool = False
    sub_block_cache: int = 0
    one_block: bool = False
    noise_steps: int = 0

    @property
    def positions(self) -> int:
        return self.pages_per_slot * self.page

    @property
    def unit(self) -> int:
        """Tokens of what the host hands out at once: a page, or the pages of a block."""
        return max(self.block, self.page)

    @property
    def units_per_slot(self) -> int:
        return self.positions // self.unit


class Settings(struct.PyTreeNode):
    """Per-request settings, one row a slot, so that requests with different settings share a batch.

    Shapes ``[S]``; float32 thresholds, int32 counts. See ``SamplingParams`` for what each means.

    Attributes:
      stop_ids: ``[S, M]`` int32, tokens that end the request (EOS, stop tokens); -1 where unused.
      doubted_ids: ``[S, M]`` int32, tokens whose probability counts as 0; -1 where unused.
      block_length: ``[S]`` int32, tokens of a block; 0: B.
      step_shares: ``[S, N]`` float32, the share of a block's masks left that each step fills, as the noise level falls; N is
        ``Dims.noise_steps``.
      min_tokens: ``[S]`` int32, none of ``stop_ids`` is predicted in that many first generated positions.
    """

    accept_threshold: jax.Array
    edit_threshold: jax.Array
    remask_threshold: jax.Array
    settle_threshold: jax.Array
    penalty_lambda: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    num_to_transfer: jax.Array
    denoising_steps: jax.Array
    sub_block: jax.Array
    entropy_bound: jax.Array
    max_post_edit_steps: jax.Array
    max_nfe: jax.Array
    min_tokens_per_forward: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    doubted_ids: jax.Array
    block_length: jax.Array
    cfg_scale: jax.Array
    confidence_factor: jax.Array
    alg_temp: jax.Array
    step_shares: jax.Array
    add_block_threshold: jax.Array
    semi_complete_threshold: jax.Array
    token_stability_threshold: jax.Array


class Merge(struct.PyTreeNode):
    """Soft-token descriptors: position i enters the next forward as a mix of embeddings where ``soft`` is set.

    Attributes:
      ids: ``[..., B, M]`` int32 candidate tokens.
      probs: ``[..., B, M]`` float32 their probabilities; what they leave of 1 goes to the mask embedding.
      soft: ``[..., B]`` bool; False means the plain embedding of the token.
    """

    ids: jax.Array
    probs: jax.Array
    soft: jax.Array


class Pending(struct.PyTreeNode):
    """The block whose KV the next forward writes: complete, no longer in the window.

    Attributes:
      tokens: ``[S, B]`` int32, never the mask id where ``live``.
      merge: its descriptors (``soft`` is False everywhere unless the strategy commits soft inputs).
      live: ``[S]`` bool; False means there is nothing to write.
    """

    tokens: jax.Array
    merge: Merge
    live: jax.Array


class Canvas(struct.PyTreeNode):
    """What is known of positions: of a window (``[S, K, B]``) or of whole sequences (``[S, T]``).

    Attributes:
      tokens: int32; the mask id where nothing was decoded yet.
      confidence: float32, probability of the token when it was last written; 0 where masked or given.
      first_step: int32, the request's forward (from 1) that first filled the position; 0 if none did.
      last_step: int32, the forward that last wrote it.
    """

    tokens: jax.Array
    confidence: jax.Array
    first_step: jax.Array
    last_step: jax.Array


class DecodeState(struct.PyTreeNode):
    """One row per request slot.

    Attributes:
      tokens: ``[S, K, B]`` int32, the window; the mask id where ``masked``.
      masked: ``[S, K, B]`` bool, the only truth about what is still to be decoded (a token id never is).
      frozen: ``[S, K, B]`` bool, prompt and pinned positions: no rule may write them.
      confidence, first_step, last_step: ``[S, K, B]``, see :class:`Canvas`.
      active: ``[S, K]`` bool, blocks being denoised; the others are dummies.
      hold: ``[S, K]`` bool, set anew each step by rules: a filled token of this block may still change.
      stable: ``[S, K]`` bool, enough of the block's filled tokens kept their value in the last step.
      ready: ``[S]`` bool, the first block is settled and leaves the window before the next forward.
      steps: ``[S, K]`` int32, forwards spent on the block.
      merge: soft-token descriptors of the window, ``[S, K, B, M]``.
      pending: the finished block before the window.
      start: ``[S]`` int32, absolute position of the window's first token, a multiple of B unless ``Dims.whole_canvas`` or
        ``Dims.prompt_apart``.
      written_upto: ``[S]`` int32, positions below it have their KV in the pool. Only a step that wrote advances it.
      carried: ``[S, Dims.carried]`` float32, the hidden state of the last position that was written.
      sequence: ``[S, T]``, everything known by absolute position; the window's part is written back as it moves on.
      given: ``[S, T]`` bool, positions fixed by the caller (prompt, pinned).
      initial: ``[S, T]`` bool, positions the caller filled to start with; rules may change them.
      prompt_len, limit: ``[S]`` int32; generated positions are ``[prompt_len, limit)``.
      status: ``[S]`` int32, RUNNING or the reason the row ended.
      live: ``[S]`` bool, the slot holds a request that still runs.
      length: ``[S]`` int32, one past the last token to return, valid once ``status`` is set.
      nfe, revised, remasked: ``[S]`` int32 counters: forwards, filled tokens changed, filled tokens masked again.
      key: ``[S, 2]`` uint32 PRNG key data, one key a request.
      settings: per-request settings.
      rule: the strategy's own arrays (see ``rules.base.Rule``).
    """

    tokens: jax.Array
    masked: jax.Array
    frozen: jax.Array
    confidence: jax.Array
    first_step: jax.Array
    last_step: jax.Array
    active: jax.Array
    hold: jax.Array
    stable: jax.Array
    ready: jax.Array
    steps: jax.Array
    merge: Merge
    pending: Pending
    start: jax.Array
    written_upto: jax.Array
    carried: jax.Array
    sequence: Canvas
    given: jax.Array
    initial: jax.Array
    prompt_len: jax.Array
    limit: jax.Array
    status: jax.Array
    live: jax.Array
    length: jax.Array
    nfe: jax.Array
    revised: jax.Array
    remasked: jax.Array
    key: jax.Array
    settings: Settings
    rule: Any

    @property
    def window(self) -> Canvas:
        """The window's part of what ``sequence`` holds."""
        return Canvas(self.tokens, self.confidence, self.first_step, self.last_step)

    @property
    def inside(self) -> jax.Array:
        """``[S, 1, B]`` bool: positions of the block; what lies behind a shorter block is of later ones."""
        length = self.settings.block_length[:, None, None]
        return (length == 0) | (jnp.arange(self.tokens.shape[-1]) < length)

    @property
    def editable(self) -> jax.Array:
        """``[S, K, B]`` bool: positions a rule may write; none of a row that has ended."""
        return (self.live[:, None] & self.active)[..., None] & ~self.frozen & self.inside

    @property
    def positions(self) -> jax.Array:
        """``[S, K, B]`` int32 absolute positions of the window."""
        _, k, b = self.tokens.shape
        return self.start[:, None, None] + jnp.arange(k * b, dtype=jnp.int32).reshape(k, b)

    def fill(self, where: jax.Array, token: jax.Array, prob: jax.Array) -> DecodeState:
        """Writes ``token`` (confidence ``prob``) where ``where`` and editable; those positions are no longer masked."""
        where = where & self.editable
        return self.replace(
            tokens=jnp.where(where, token, self.tokens),
            confidence=jnp.where(where, prob, self.confidence),
            masked=self.masked & ~where,
        )


class Prediction(struct.PyTreeNode):
    """What one forward says about the window. Full-vocabulary probabilities are never kept.

    Attributes:
      token: ``[S, K, B]`` int32, the chosen token: the best one, or a sample where the temperature is above 0.
      prob: ``[S, K, B]`` float32, the model's probability of ``token`` (temperature 1, mask id excluded, unless the strategy's
        ``confidence`` says otherwise).
      current_prob: ``[S, K, B]`` float32, the model's probability of the token that stood there.
      top_ids, top_probs: ``[S, K, B, C]`` the C most probable tokens, best first, C as many as the rule asks for.
      masked: ``[S, K, B]`` bool, what was masked in this forward's input.
      entropy: ``[S, K, B]`` float32, of the distribution that ``prob`` is of, in nats; None unless the rule asks for it.
      margin: ``[S, K, B]`` float32, by how much that distribution's largest probability exceeds its second; None unless the rule asks
        for it.
    """

    token: jax.Array
    prob: jax.Array
    current_prob: jax.Array
    top_ids: jax.Array
    top_probs: jax.Array
    masked: jax.Array
    entropy: jax.Array | None = None
    margin: jax.Array | None = None


class StepReport(struct.PyTreeNode):
    """What the host reads after a dispatch; int32, ``[S]`` but for ``tokens``. Only ``written_upto`` may advance what is cached.

    Attributes:
      status: RUNNING or a finish reason.
      nfe, revised, remasked: counters since admission.
      written_upto: positions below it have their KV in the pool.
      start: absolute position of the window's first token.
      settled_upto: positions below it can no longer change.
      length: one past the last token to return, once ``status`` is set.
      tokens: ``[S, R]`` each row's tokens from where the host knows them, R as many as one dispatch can settle.
    """

    status: jax.Array
    nfe: jax.Array
    revised: jax.Array
    remasked: jax.Array
    written_upto: jax.Array
    start: jax.Array
    settled_upto: jax.Array
    length: jax.Array
    tokens: jax.Array


class Trace(struct.PyTreeNode):
    """What each step of a dispatch did to the window; n steps, the window as it was before it moved on.

    Attributes:
      start: ``[n, S]`` int32, absolute position of the window's first token.
      live: ``[n, S]`` bool, the slot took part.
      tokens: ``[n, S, K, B]`` int32.
      masked: ``[n, S, K, B]`` bool.
      confidence: ``[n, S, K, B]`` float32, see ``DecodeState``.
      revised: ``[n, S, K, B]`` bool, filled tokens that the step changed.
      remasked: ``[n, S, K, B]`` bool, filled tokens that the step masked again.
    """

    start: jax.Array
    live: jax.Array
    tokens: jax.Array
    masked: jax.Array
    confidence: jax.Array
    revised: jax.Array
    remasked: jax.Array


# Logical axes of the state's and the pool's leading dimensions; `parallel.mesh` maps them to the machine.
STATE_AXES = ("slot",)
POOL_AXES = ("layer", "page", "token", "kv_heads")


class KVPool(struct.PyTreeNode):
    """Paged keys and values.

    Attributes:
      k, v: ``[L, N, page, KV, H]`` in the engine's dtype, or as ``block_attention.Stored`` in another form.
    """

    k: Any
    v: Any
