"""The engine: requests in, outputs out. The device decides every token; the host moves requests in and out of slots."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffulex_jax import compile_cache
from diffulex_jax.engine import background, scoring
from diffulex_jax.engine.admission import AnyParams, Prompt, admit, check_adapter, paired, scored
from diffulex_jax.engine.build import Network, build, load
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.desk import Desk
from diffulex_jax.engine.fingerprint import difference
from diffulex_jax.engine.outputs import make_progress, with_progress
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.results import Output, Progress
from diffulex_jax.engine.scoring import BlockConditional, Estimator
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.errors import SettingError
from diffulex_jax.models.adapted import ADAPTERS
from diffulex_jax.models.base import Model, Params
from diffulex_jax.parallel import hosts
from diffulex_jax.parallel.mesh import mesh_of
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.strategies import AnyStrategy, for_model


class Engine:
    """Decodes requests on one mesh. Build it with :meth:`from_pretrained`.

    Any number of threads may call one engine: their requests are decoded together. Whichever of them works on the batch (``generate``,
    ``chat``, ``step``) works on the requests of all. Ctrl-C waits for the step under way and ends the call it hits, no other.

    Methods that take a request's id raise ``errors.UnknownRequest`` (a KeyError) where no such request is queued or running.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        strategy: AnyStrategy | None = None,
        tokenizer: Tokenizer | None = None,
        eos_ids: tuple[int, ...] | None = None,
        model_id: str = "",
        mesh: Mesh | str | None = None,
        memory_share: float = 1.0,
        **settings: Any,
    ):
        """Compiles what any request needs, unless ``warm_up=False``; see ``compile_cache`` for where that is kept.

        A GPU has further programs that do the same faster. They are compiled in the background, meanwhile requests are served;
        :meth:`warm_up` waits for them.

        Args:
          model: the network.
          params: its parameters, on the mesh.
          strategy: a name from ``diffulex_jax.strategies``, or a strategy of your own: see ``strategies.resolve``. Default: the one
            that the model's authors decode it with.
          tokenizer: for prompts and outputs as text.
          eos_ids: tokens that end an output; default: the config's.
          model_id: keeps cached prefixes and snapshots of different models apart.
          mesh: where to run: a mesh, or the sizes of its axes, as in ``"expert=2,tensor=2"``; default: the first device.
          memory_share: of the memory that is free now, how much the KV pool may take where ``num_pages`` is not given.
          **settings: see :class:`EngineConfig`.

        Raises:
          ValueError: for a setting that will not do, naming it.
        """
        compile_cache.enable()
        chosen, ends = for_model(model.spec, strategy), model.spec.eos_ids if eos_ids is None else eos_ids
        self.strategy, self._defaults = chosen.name, chosen.defaults
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh_of(mesh)
        network = Network(model, params, tokenizer, ends, model_id, self.mesh)
        if settings.get("adapter") is not None and not model_id:
            raise SettingError("adapter", "adapter is merged while a model is loaded: use Engine.from_pretrained, or merge it into params")
        if settings.get("adapters") and ADAPTERS not in params:
            raise SettingError("adapters", "adapters are read while a model is loaded: use Engine.from_pretrained")
        parts = build(network, chosen, EngineConfig(**settings), memory_share=memory_share)
        self.settings, self.dims, self._limits, self._device, self._scheduler, self._fingerprint, self._adapters = parts
        self._desk = Desk(self._scheduler, tokenizer)

    @classmethod
    def from_pretrained(cls, model: str, *, strategy: AnyStrategy | None = None, mesh: Mesh | str | None = None, **settings: Any) -> Engine:
        """Loads a model and compiles what any request needs, unless ``warm_up=False``.

        Args:
          model: a Hugging Face directory, ``"embedded"``, or a hub id.
          strategy, mesh, **settings: see :class:`Engine`.

        Raises:
          ValueError: for a model, checkpoint or setting that will not do, naming it.
        """
        (engine,) = cls.for_strategies(model, [strategy], mesh=mesh, **settings).values()
        return engine

    @classmethod
    def for_strategies(
        cls, model: str, strategies: Sequence[AnyStrategy | None], *, mesh: Mesh | str | None = None, **settings: Any
    ) -> dict[str, Engine]:
        """An engine for each strategy by its name, with slots and pages of its own, all over the same parameters.

        Args and errors are those of :meth:`from_pretrained`.
        """
        network, found = load(model, strategies, mesh, EngineConfig(**settings))
        shares = [1 / (len(found) - i) for i in range(len(found))]
        with background.held():
            return {
                chosen.name: cls(**network._asdict(), strategy=chosen, memory_share=share, **settings)
                for chosen, share in zip(found, shares, strict=True)
            }

    def warm_up(self, prompts: Sequence[Prompt] | str | None = None, params: AnyParams | None = None) -> None:
        """Compiles what these prompts need that is not compiled yet, so that decoding them does not wait for it; by default every program.

        For an engine built with ``warm_up=False``, before it is given requests. Without prompts, also for one that still compiles in the
        background: afterwards nothing is compiled any more, and every batch runs in the program that is fastest for it.

        Args:
          prompts, params: as for :meth:`generate`.

        Raises:
          ValueError: naming the prompt and what is wrong with it; for params without prompts.
          RuntimeError: while requests are queued or running.
        """
        if prompts is None and params is not None:
            raise ValueError("params are of prompts: give warm_up() the prompts, too")
        requests = None if prompts is None else self._requests(prompts, params, trace=False)
        with self._desk.at_rest():
            self._device.warm_up(requests)

    def generate(
        self, prompts: Sequence[Prompt] | str, params: AnyParams | None = None, *, progress: bool = False, trace: bool = False
    ) -> list[Output]:
        """Decodes prompts, several at a time, and returns their outputs in order.

        Args:
          prompts: texts or token id lists; a single text is one prompt.
          params: one for all, or one a prompt. With ``n`` above 1 a prompt's n outputs follow each other.
          progress: show a progress bar with tokens per forward.
          trace: record what every step made of the window, in ``Output.trace``.

        Raises:
          ValueError: naming the prompt and what is wrong with it, before anything is computed.
        """
        requests = self._requests(prompts, params, trace=trace)
        with contextlib.closing(self._desk.finish(requests)) as finished:
            outputs = dict(with_progress(finished, total=len(requests)) if progress else finished)
        return [outputs[request.id] for request in requests]

    def chat(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None, *, progress: bool = False, trace: bool = False
    ) -> Output:
        """Decodes the answer to a conversation through the model's chat template.

        Args:
          messages: ``{"role": ..., "content": ...}`` in order.
          params, progress, trace: see :meth:`generate`.

        Raises:
          ValueError: where the model has no chat template, or as in :meth:`generate`.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; pass token ids to generate()")
        return self.generate([self.tokenizer.apply_chat_template(messages)], params, progress=progress, trace=trace)[0]

    def add(self, prompt: Prompt, params: SamplingParams | None = None, *, trace: bool = False) -> list[int]:
        """Queues a request; :meth:`step` works on it. Returns its ids: one, or ``n``.

        Raises:
          ValueError: saying what is wrong with the prompt or the settings; nothing is queued then.
        """
        return self._desk.add(self._admit(prompt, params or SamplingParams(), name="prompt", trace=trace))

    def step(self) -> dict[int, Output]:
        """Takes in what the device did, sets it to work again, and returns what finished of the requests :meth:`add` queued, by id.

        One call admits, prefills, and launches up to ``steps_per_dispatch`` denoise steps; the next one collects them. Turning
        tokens into text and looking for stop texts happens in between, while the device is busy.
        """
        return self._desk.step()

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or running, or an output waits for :meth:`step` to return it."""
        return self._desk.has_work

    def progress(self, id_: int) -> Progress:
        """What is known of an unfinished request, without asking the device or waiting for it."""
        return make_progress(self._desk.find(id_))

    def abort(self, id_: int) -> Output:
        """Ends a request at once; its pages come back. The output holds the tokens that were final."""
        return self._desk.end(id_)

    def discard(self, id_: int) -> None:
        """Ends a request like :meth:`abort`, without making an output of it. One that has ended is no error: its output is dropped."""
        self._desk.discard(id_)

    def score(
        self,
        prompts: Sequence[Prompt] | str,
        completions: Sequence[Prompt] | str,
        estimator: Estimator | None = None,
        *,
        adapter_name: str | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Log probability of each token of each completion, behind its prompt: float32, ``[its tokens]`` each.

        They are the model's own, at temperature 1, over what a decoder may choose. What an output left out (the EOS that ended it) is
        scored where the completion holds it. Requests under way go on between the forwards of others.

        Args:
          prompts, completions: texts or token id lists, one completion a prompt; a text is encoded by itself.
          estimator: what is computed, see ``scoring``: ``BlockConditional()`` (the default), ``MonteCarlo(samples=..., seed=...)``, or
            ``StepMap(maps)``.
          adapter_name: one of the engine's ``adapters``, whose model is asked; default: the model as it is.
          progress: show a progress bar.

        Raises:
          ValueError: naming what will not do.
        """
        estimator = BlockConditional() if estimator is None else estimator
        asked = scored(self._limits, prompts, completions)
        check_adapter(self._limits, adapter_name, name="score()")
        scoring.check(estimator, [len(tokens) - begin for tokens, begin in asked])
        with self._desk.turn():
            return self._device.score(asked, estimator, adapter_name, progress=progress)

    def update_params(self, params: Params, *, donate: bool = False) -> None:
        """Goes on with other parameters, as between two steps of training: no program is compiled again, cached prefixes are forgotten.

        The engine keeps copies where it runs, each made once the leaf that it replaces is let go of, so that a trainer may go on to
        donate its own. Snapshots of other parameters are refused from then on. ``adapters`` stay as they are. Not for an engine of several
        hosts.

        Args:
          params: a tree of the model's schema, of the shapes and dtypes that the engine holds, on any device or host. Leaves that are
            held quantised are quantised anew where they are given plain.
          donate: share the arrays that lie right instead of copying them; the caller uses and donates them no more.

        Raises:
          ValueError: naming the leaf that will not do; nothing is changed then.
          RuntimeError: while requests are queued or running, whose tokens would be of two models: finish or abort them first. On several
            hosts.
        """
        if hosts.several():
            raise RuntimeError("update_params() is for an engine of one host")
        with self._desk.at_rest():
            self._device.update_params(params, donate=donate)
            self._scheduler.forget_prefixes()
            self._fingerprint = {**self._fingerprint, "update": os.urandom(8).hex()}

    def snapshot(self, id_: int) -> Snapshot:
        """All a request is, between two steps. It goes on here undisturbed; elsewhere :meth:`restore` continues it to the same output."""
        request = self._desk.find(id_)
        return self._desk.snapshot(id_, self._fingerprint_of(request.params))

    def restore(self, taken: Snapshot) -> int:
        """Queues a request from a snapshot, ahead of others; returns its id.

        Raises:
          ValueError: when the snapshot was taken with another model, strategy, dtype, or geometry; naming it.
        """
        if other := difference(taken.fingerprint, self._fingerprint_of(taken.params)):
            raise ValueError(f"the snapshot is of {other}")
        return self._desk.resume(taken.request(self._desk.new_id()))

    @property
    def params(self) -> Params:
        """The parameters as they are held, without ``adapters``. They are the engine's: look at them, and donate them to nothing."""
        return self._device.params

    @property
    def saved_structure(self) -> Any:
        """What ``Snapshot.load`` needs to know of this engine."""
        return self._device.saved_structure

    @property
    def stats(self) -> dict[str, int]:
        """Counters and gauges: requests, pages, prefix cache lookups in blocks, preemptions."""
        return self._scheduler.stats

    def _fingerprint_of(self, params: SamplingParams) -> dict[str, str]:
        """What must agree for a request to go on elsewhere: what is the engine's, and the adapter that it has."""
        adapter = self._adapters.get(params.adapter_name or "")
        return {**self._fingerprint, **({} if adapter is None else {"adapter": adapter})}

    def _requests(self, prompts: Sequence[Prompt] | str, params: AnyParams | None, *, trace: bool) -> list[Tracked]:
        """The requests of prompts, checked; not queued yet."""
        pairs = enumerate(paired(prompts, SamplingParams() if params is None else params))
        return [request for i, (prompt, p) in pairs for request in self._admit(prompt, p, name=f"prompt {i}", trace=trace)]

    def _admit(self, prompt: Prompt, params: SamplingParams, *, name: str, trace: bool) -> list[Tracked]:
        """The requests of a prompt, checked; not queued yet."""
        return admit(self._limits, prompt, params.resolve(self._defaults), name=name, trace=trace, new_id=self._desk.new_id)
