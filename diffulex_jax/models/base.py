"""What the rest of the library may know of a network: its spec, its parameters, and three pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.names import Tensor
from diffulex_jax.models.ops import Ops


D2F_BLOCK = 32  # most of its authors' scripts; no checkpoint says

Params = dict[str, Any]
"""A tree of the structure of ``Model.schema``: of arrays, and of what ``weights.quantise`` makes of some of them."""


class Param(NamedTuple):
    """One leaf of a schema.

    Attributes:
      shape: of the whole array; leaves that belong to layers are stacked along a first axis named ``"layer"``.
      axes: the logical name of each dimension (None: unnamed), which ``parallel.mesh`` maps to a machine.
      init: ``"normal"``, ``"ones"`` or ``"zeros"``.
      dtype: where it is not the model's own.
      decay: whether weight decay applies to it in training.
      quantisable: 0, or an engine may hold it quantised: it consists of matrices of which products contract so many axes, those behind
        ``"layer"`` and ``"expert"``. Of these the first alone may be split over devices, and none where there are experts.
      adaptable: whether rows of a batch may add low-rank products of their own: it goes to ``Ops.linear`` and ``Ops.mlp`` alone.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    dtype: str | None = None
    decay: bool = True
    quantisable: int = 0
    adaptable: bool = False


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Layers whose keys and values have the same shape: how many, their query and key/value heads, a head's width, and how much of it
    rotates."""

    count: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that decoding, the engine and the trainer may know of a network.

    Attributes:
      vocab_size, hidden_size: V and D.
      max_positions: most positions it was made for.
      mask_id: the token that stands for a position still to be decoded.
      eos_ids: tokens that end an output, as its config names them.
      block_size: tokens of a block that it was trained with.
      block_stated: whether its checkpoint says so; otherwise ``block_size`` is what such models usually have.
      layers: its layers, all of one kind.
      strategy: the name of the strategy that its authors decode it with, in ``diffulex_jax.strategies``.
      predicts: what the output at position i speaks of: ``"same"``, the token at i, or ``"next"``, the token at i + 1.
      experts_per_token: routed experts of a token; 0 where no layer has any.
      attention: what positions see of each other, as it was trained.
      routing_block: tokens that choose their experts together, which must be the block that is decoded; 0 where each chooses alone.
    """

    vocab_size: int
    hidden_size: int
    max_positions: int
    mask_id: int
    eos_ids: tuple[int, ...]
    block_size: int
    block_stated: bool
    layers: LayerKind
    strategy: str
    predicts: Literal["same", "next"] = "same"
    experts_per_token: int = 0
    attention: AttentionPolicy = AttentionPolicy()
    routing_block: int = 0

    @property
    def commit_alone(self) -> bool:
        """Whether a block must be complete before the first token of the next can be decided: its last output speaks of that, and comes
        from the forward that writes its KV. In D2F's form that output is as good as any other, and blocks behind do not wait for it."""
        return self.predicts == "next" and self.attention.chunkable

    def in_blocks(self) -> ModelSpec:
        """The spec of the same network as D2F trains it further: its prompt sees all of itself, and blocks behind it none that follow
        (arXiv 2508.09192)."""
        return dataclasses.replace(self, attention=AttentionPolicy("whole"), block_size=D2F_BLOCK, strategy="d2f")

    def __post_init__(self) -> None:
        for name, ids in (("mask_token_id", (self.mask_id,)), ("eos_token_id", self.eos_ids)):
            for id_ in ids:
                if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < self.vocab_size:
                    raise ValueError(f"config: {name}={id_!r} is not an id of the vocabulary [0, {self.vocab_size})")
        if self.mask_id in self.eos_ids:
            raise ValueError(f"config: mask_token_id={self.mask_id} is an eos_token_id too")
        if self.block_size < 1:
            raise ValueError(f"config: block_size={self.block_size} must be positive")


@dataclasses.dataclass(frozen=True)
class Model:
    """A family of networks bound to one config, which alone it is compared by. ``models.registry`` makes it from a ``config.json``.

    Attributes:
      config: the family's own frozen record; ``config.to_hf(dtype=...)`` is the ``config.json`` mapping it was read from.
      spec: what others may know.
      schema: the parameter tree, with a :class:`Param` for each array. Its leaf ``"embed"`` ``[V, D]`` holds the input embeddings.
      tensors: where each tensor of a checkpoint lies in that tree.
      layers: ``layers(params, x [R, T, D], positions [R, T], ops) -> (hidden [R, T, D], fresh)``: all layers and the final norm.
        ``fresh`` is what ``ops.attend`` kept, stacked over layers; where there is an ``ops.pool``, the pool after the last layer.
      head: ``head(params)``: the output matrix ``[V, D]``; inside a program for several devices, this one's rows of it.
      unread: names of tensors that a checkpoint may hold and that nothing reads.
    """

    config: Any
    spec: ModelSpec = dataclasses.field(repr=False, compare=False)
    schema: dict[str, Any] = dataclasses.field(repr=False, compare=False)
    tensors: tuple[Tensor, ...] = dataclasses.field(repr=False, compare=False)
    layers: Callable[[Params, jax.Array, jax.Array, Ops], tuple[jax.Array, Any]] = dataclasses.field(repr=False, compare=False)
    head: Callable[[Params], jax.Array] = dataclasses.field(repr=False, compare=False)
    unread: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)


def is_param(node: Any) -> bool:
    """True for a leaf of a schema."""
    return isinstance(node, Param)


def leaves(tree: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The leaves of a schema, or of parameters, by their path, in the order of the tree. A quantised stack is one leaf."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def init(model: Model, key: jax.Array, dtype: Any = jnp.float32, *, scale: float = 0.02) -> Params:
    """Random parameters, as the schema says; ``"normal"`` has deviation ``scale``."""
    params, treedef = jax.tree.flatten(model.schema, is_leaf=is_param)

    def one(param: Param, key: jax.Array) -> jax.Array:
        kind = param.dtype or dtype
        if param.init == "normal":
            return (jax.random.normal(key, param.shape, jnp.float32) * scale).astype(kind)
        return jnp.full(param.shape, {"ones": 1, "zeros": 0}[param.init], kind)

    return jax.tree.unflatten(treedef, [one(p, k) for p, k in zip(params, jax.random.split(key, len(params)), strict=True)])


def logits(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """Vocabulary logits ``[..., V]`` in float32 of normalised hidden states ``[..., D]``."""
    with jax.named_scope("lm_head"):
        return jnp.einsum("...d,vd->...v", hidden, model.head(params), preferred_element_type=jnp.float32)
