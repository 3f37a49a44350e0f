"""Tunix's rollout contract (``tunix.rl.rollout.base_rollout.BaseRollout`` of google-tunix 0.1.7) over an engine.

::

    cluster = ClusterConfig(rollout_engine=functools.partial(rollout_class(), engine=engine), ...)

Tunix's learners compute the losses of models that predict the next token. For a diffusion model bring a loss of your own;
``diffulex_jax.rollout.grpo`` has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.scoring import Estimator
from diffulex_jax.models.nnx import from_nnx
from diffulex_jax.sampling_params import SamplingParams, seeds


@dataclasses.dataclass
class RolloutOutput:
    """What :meth:`DiffusionRollout.generate` gives: the fields of Tunix's own record.

    Attributes:
      text: of each completion, without its end token.
      logits: empty: a diffusion model has none for each token.
      tokens: of each completion, int32, not padded; with the end token where it ended by itself.
      left_padded_prompt_tokens: ``[B, P]`` int32.
      logprobs: None: ask for ``get_per_token_logps``, which computes those of old and new parameters alike.
    """

    text: list[str]
    logits: list[jax.Array]
    tokens: list[np.ndarray]
    left_padded_prompt_tokens: np.ndarray
    logprobs: list[np.ndarray] | None


class DiffusionRollout:
    """A rollout worker; :func:`rollout_class` makes it a subclass of Tunix's."""

    def __init__(
        self,
        *,
        engine: Engine,
        estimator: Estimator | None = None,
        rollout_actor: Any = None,
        tokenizer: Any = None,
        mesh: Any = None,
        rollout_config: Any = None,
    ):
        """Makes one.

        Args:
          engine: what decodes and scores.
          estimator: of log probabilities; see ``Engine.score``.
          rollout_actor: what :meth:`model` gives. It, and what follows, Tunix passes.
          tokenizer: whose ``pad_id()`` is used; default: the end token pads.
          mesh, rollout_config: the engine has its own.
        """
        del mesh, rollout_config
        self.engine, self.estimator = engine, estimator
        self._actor, self._tokenizer = rollout_actor, tokenizer

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], rollout_config: Any, **kwargs: Any) -> Any:
        """Decodes prompts. Equal ones are samples of one group, and differ.

        Args:
          prompts: texts, or token ids.
          rollout_config: Tunix's ``RolloutConfig``: of it ``max_tokens_to_generate``, ``temperature``, ``top_p``, ``top_k``, ``seed``,
            ``max_prompt_length`` (prompts are padded to it) and ``eos_tokens`` (further end tokens) count.
          **kwargs: further settings of ``SamplingParams``.

        Raises:
          ValueError: as ``Engine.generate``.
        """
        config, end = rollout_config, self.eos_id()
        top_k = None if config.top_k in (None, -1) else config.top_k
        asked: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "top_k": top_k}
        stops = tuple(id_ for id_ in config.eos_tokens or () if id_ != end)
        params = SamplingParams(**asked | {"max_tokens": config.max_tokens_to_generate, "stop_token_ids": stops} | kwargs)
        drawn = seeds(dataclasses.replace(params, n=len(prompts), seed=_seed(config.seed)))
        outputs = self.engine.generate(prompts, [dataclasses.replace(params, seed=seed) for seed in drawn])
        length = max([config.max_prompt_length, *(len(output.prompt_token_ids) for output in outputs)])
        padded = np.full((len(outputs), length), self.pad_id(), np.int32)
        for row, output in zip(padded, outputs, strict=True):
            row[length - len(output.prompt_token_ids) :] = output.prompt_token_ids
        tokens = [np.array(o.token_ids + [end] * (o.finish_reason == "stop"), np.int32) for o in outputs]
        return _output_type()([output.text or "" for output in outputs], [], tokens, padded, None)

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any, completion_mask: Any = None) -> jax.Array:
        """Log probabilities ``[B, C]`` float32 of ``completion_tokens [B, C]``, padded on the right, behind ``prompt_tokens [B, P]``, which
        are padded on the left; 0 for padding. Completions end with their end token, or as ``completion_mask [B, C]`` says."""
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        pad, end = self.pad_id(), self.eos_id()
        lengths = [_length(row, pad, end) for row in completions] if completion_mask is None else np.asarray(completion_mask).sum(1)
        asked = [row[np.argmax(row != pad) :].tolist() for row in prompts]
        given = [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)]
        found = np.zeros(completions.shape, np.float32)
        for row, scores in zip(found, self.engine.score(asked, given, self.estimator), strict=True):
            row[: len(scores)] = scores
        return jnp.asarray(found)

    def update_params(self, params: Any, filter_types: Any = None) -> None:
        """Takes over the actor's parameters, an ``nnx.State`` of ``models.nnx.Network`` or a plain tree; see ``Engine.update_params``.

        ``filter_types``, which says what ``params`` holds, needs no answer: parameters that are missing are an error.
        """
        del filter_types
        self.engine.update_params(from_nnx(params))

    def pad_id(self) -> int:
        """The token that pads."""
        return self.eos_id() if self._tokenizer is None else self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """The token that ends a completion."""
        return self.engine.model.spec.eos_ids[0]

    def model(self) -> Any:
        """The actor that Tunix passed."""
        return self._actor


def rollout_class() -> type:
    """:class:`DiffusionRollout` as a subclass of Tunix's ``BaseRollout``, which ``ClusterConfig.rollout_engine`` asks for.

    Raises:
      ImportError: where google-tunix is not installed.
    """
    from tunix.rl.rollout.base_rollout import BaseRollout

    return type("TunixRollout", (DiffusionRollout, BaseRollout), {"__module__": __name__, "__doc__": DiffusionRollout.__doc__})


def _output_type() -> type:
    """Tunix's record where there is one."""
    try:
        from tunix.rl.rollout.base_rollout import RolloutOutput as theirs
    except ImportError:
        return RolloutOutput
    return theirs


def _seed(seed: Any) -> int | None:
    """A seed of ours from one of Tunix's: None, a number, or a JAX key."""
    if seed is None or isinstance(seed, int):
        return seed
    words = jax.random.key_data(seed) if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else seed
    return int.from_bytes(np.asarray(words, np.uint32).tobytes()[-8:])


def _length(row: np.ndarray, pad: int, end: int) -> int:
    """Tokens of a completion: up to its first end token, else up to the padding."""
    ends = np.flatnonzero(row == end)
    if len(ends):
        return int(ends[0]) + 1
    kept = np.flatnonzero(row != pad)
    return int(kept[-1]) + 1 if len(kept) else 0
