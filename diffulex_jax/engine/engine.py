"""The engine: requests in, outputs out. The device decides every token; the host moves requests in and out of slots."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffulex_jax import compile_cache, decode
from diffulex_jax.cache.pages import PagePool, chain_digest
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.device import JaxDevice, default_num_pages
from diffulex_jax.engine.results import Output, Progress
from diffulex_jax.engine.scheduler import Scheduler, Tracked
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.engine.startup import announce
from diffulex_jax.engine.stops import Cut, find_cut
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.errors import SettingError
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import Model, Params
from diffulex_jax.parallel.mesh import MESH_AXES, make_mesh
from diffulex_jax.request_state import MAX_STOP_IDS
from diffulex_jax.rules.base import Rule, dims_for
from diffulex_jax.sampling_params import SamplingParams, seeds
from diffulex_jax.state import FINISH_REASONS, Canvas
from diffulex_jax.strategies import Strategy, resolve
from diffulex_jax.weights import checkpoint
from pallas_kernels import REFERENCE, choose


Prompt = str | Sequence[int]


class Engine:
    """Decodes requests on one mesh. Build it with :meth:`from_pretrained`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        strategy: str | Rule | Strategy = "llada2",
        tokenizer: Tokenizer | None = None,
        eos_ids: tuple[int, ...] | None = None,
        model_id: str = "",
        mesh: Mesh | None = None,
        memory_share: float = 1.0,
        **settings: Any,
    ):
        """Compiles everything it will run; see ``compile_cache`` for where that is kept.

        Args:
          model: the network.
          params: its parameters, on the mesh.
          strategy: a name from ``diffulex_jax.strategies``, or a strategy of your own: see ``strategies.resolve``.
          tokenizer: for prompts and outputs as text.
          eos_ids: tokens that end an output; default: the config's.
          model_id: keeps cached prefixes and snapshots of different models apart.
          mesh: where to run; default: the first device.
          memory_share: of the memory that is free now, how much the KV pool may take where ``num_pages`` is not given.
          **settings: see :class:`EngineConfig`.

        Raises:
          ValueError: for a setting that will not do, naming it.
        """
        compile_cache.enable()
        self.mesh = make_mesh() if mesh is None else mesh
        if self.mesh.axis_names != MESH_AXES or self.mesh.shape["data"] > 1:
            raise ValueError(f"an engine takes a mesh of axes {MESH_AXES} with data=1, one engine a data shard; got {self.mesh.shape}")
        chosen = resolve(strategy)
        self.strategy, self._defaults, rule = chosen.name, chosen.defaults, chosen.rule
        s = EngineConfig(**settings)
        window, attention = s.buffer_size or chosen.window, s.attention or chosen.attention or "block_causal"
        self.settings = s = dataclasses.replace(s, buffer_size=window, attention=attention)
        if s.max_model_len > model.spec.max_positions:
            raise ValueError(f"max_model_len={s.max_model_len} exceeds the model's max_position_embeddings={model.spec.max_positions}")
        self.model, self.tokenizer = model, tokenizer
        policy = AttentionPolicy("whole" if attention == "prefix_full" else "block_causal")
        layers = model.spec.layers
        self.dims = dims_for(
            rule,
            slots=s.max_slots,
            window=window,
            block=s.block_size,
            page=s.block_size,
            pages_per_slot=s.pages_per_slot,
            mask_id=model.spec.mask_id,
        )
        page_bytes = 2 * layers.count * s.block_size * layers.kv_heads * layers.head_dim * s.jax_dtype.itemsize
        num_pages = s.num_pages or default_num_pages(
            self.mesh.devices.flat[0], page_bytes, needed=s.max_slots * s.pages_per_slot, share=memory_share
        )
        # Soft inputs leave other KV than a prompt of the same tokens would, and where a prompt sees all of itself its KV depends on
        # what follows: such pages must not be found by their tokens.
        shareable = policy.shareable and (rule.merge is None or not rule.merge.commit_soft)
        self._pages = PagePool(num_pages, prefix_cache=s.prefix_cache and shareable)
        announce("compiling", self.strategy)
        kernels = choose(self.mesh.devices.flat[0]) if s.kernels == "auto" else REFERENCE
        self._device = JaxDevice(
            decode.Program(model, self.dims, rule, kernels, policy, draws=chosen.draws, confidence=chosen.confidence),
            params,
            mesh=self.mesh,
            dtype=s.jax_dtype,
            num_pages=num_pages,
            steps_per_dispatch=s.steps_per_dispatch,
            eos_ids=model.spec.eos_ids if eos_ids is None else eos_ids,
        )
        self._eos_ids = self._device.eos_ids
        # Everything that must agree for KV or a snapshot to be carried over.
        geometry = (s.dtype, s.block_size, window, attention, self.dims.positions, self.dims.merge_top_k)
        self._fingerprint = "|".join(map(str, (model_id, model.config, *geometry)))
        self._scheduler = Scheduler(
            self._device,
            self._pages,
            slots=s.max_slots,
            block=s.block_size,
            window=window,
            max_batched_tokens=s.max_batched_tokens,
            steps_per_dispatch=s.steps_per_dispatch,
            whole_prompts=not policy.chunkable,
            root=chain_digest(self._fingerprint.encode(), np.zeros(0, np.int32)),
        )
        self._requests: dict[int, Tracked] = {}
        self._ids = itertools.count()

    @classmethod
    def from_pretrained(
        cls, model: str, *, strategy: str | Rule | Strategy = "llada2", mesh: Mesh | None = None, **settings: Any
    ) -> Engine:
        """Loads a model and compiles everything it will run.

        Args:
          model: a Hugging Face directory, ``"embedded"``, or a hub id.
          strategy: a name from ``diffulex_jax.strategies``, or a strategy of your own: see ``strategies.resolve``.
          mesh: where to run; default: the first device.
          **settings: see :class:`EngineConfig`.

        Raises:
          ValueError: for a model, checkpoint or setting that will not do, naming it.
        """
        (engine,) = cls.for_strategies(model, [strategy], mesh=mesh, **settings).values()
        return engine

    @classmethod
    def for_strategies(
        cls, model: str, strategies: Sequence[str | Rule | Strategy], *, mesh: Mesh | None = None, **settings: Any
    ) -> dict[str, Engine]:
        """An engine for each strategy by its name, with slots and pages of its own, all over the same parameters.

        Args and errors are those of :meth:`from_pretrained`.
        """
        dtype = EngineConfig(**settings).jax_dtype
        found = [resolve(strategy) for strategy in strategies]  # an unknown one should not cost a load
        names = [strategy.name for strategy in found]
        if not names or len(set(names)) < len(names):
            hint = "; give a rule of your own one with Strategy(name=..., rule=...)" if "custom" in names else ""
            raise SettingError("strategy", f"strategies must be one or more, each with a name of its own; got {names}{hint}")
        announce("loading", str(model))
        path = checkpoint.resolve(str(model))
        mesh = make_mesh() if mesh is None else mesh
        network, params = checkpoint.load(path, mesh, dtype=dtype)
        tokenizer, eos_ids = Tokenizer.load(path), checkpoint.load_end_ids(path)
        return {
            name: cls(
                network,
                params,
                strategy=strategy,
                tokenizer=tokenizer,
                eos_ids=eos_ids,
                model_id=str(model),
                mesh=mesh,
                memory_share=1 / (len(names) - i),
                **settings,
            )
            for i, (name, strategy) in enumerate(zip(names, found, strict=True))
        }

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        trace: bool = False,
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
        if isinstance(prompts, str):
            prompts = [prompts]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} SamplingParams for {len(prompts)} prompts")
        checked = [self._check(f"prompt {i}", prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
        ids = [id_ for ids, p in zip(checked, params, strict=True) for id_ in self._enqueue(ids, p, trace)]
        outputs: dict[int, Output] = {}
        tokens = forwards = 0
        with tqdm(total=len(ids), disable=not progress, unit="request") as bar:
            try:
                while not outputs.keys() >= set(ids):
                    for id_, output in self.step().items():
                        outputs[id_] = output
                        tokens, forwards = tokens + len(output.token_ids), forwards + output.nfe
                        bar.update()
                        bar.set_postfix_str(f"{tokens / max(forwards, 1):.2f} tokens/forward")
            finally:  # an interrupted call leaves nothing behind
                for id_ in ids:
                    if id_ in self._requests:
                        self.abort(id_)
        return [outputs[id_] for id_ in ids]

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
        trace: bool = False,
    ) -> Output:
        """Decodes the answer to a conversation through the model's chat template.

        Args:
          messages: ``{"role": ..., "content": ...}`` in order.
          params: the request's settings.
          progress: see :meth:`generate`.
          trace: see :meth:`generate`.

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
        params = params or SamplingParams()
        return self._enqueue(self._check("prompt", prompt, params), params, trace)

    def step(self) -> dict[int, Output]:
        """Takes in what the device did, sets it to work again, and returns what finished, by id.

        One call admits, prefills, and launches up to ``steps_per_dispatch`` denoise steps; the next one collects them. Turning
        tokens into text and looking for stop texts happens in between, while the device is busy.
        """
        outputs = {}
        for ended in self._scheduler.step():
            request = ended.request
            cut = find_cut(request, self.tokenizer) or Cut(FINISH_REASONS[ended.status], len(request.tokens))
            outputs[request.id] = self._output(request, cut, ended.sequence)
        for request in list(self._scheduler.running.values()):
            if found := find_cut(request, self.tokenizer):
                outputs[request.id] = self._end_early(request, found)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._requests)

    def progress(self, id_: int) -> Progress:
        """What is known of an unfinished request, without asking the device.

        Raises:
          KeyError: when no such request is queued or running.
        """
        request = self._requests[id_]
        return Progress(request.tokens, request.nfe, request.revised, request.remasked, request.trace)

    def abort(self, id_: int) -> Output:
        """Ends a request at once; its pages come back. The output holds the tokens that were final.

        Raises:
          KeyError: when no such request is queued or running.
        """
        request = self._requests[id_]
        return self._end_early(request, Cut("abort", len(request.tokens)))

    def snapshot(self, id_: int) -> Snapshot:
        """All a request is, between two steps. It goes on here undisturbed; elsewhere :meth:`restore` continues it to the same output.

        Raises:
          KeyError: when no such request is queued or running any more.
        """
        self._scheduler.settle()
        request = self._requests[id_]
        if self._scheduler.has_ended(request):
            raise KeyError(f"request {id_} has finished; the next step() gives its output")
        saved = self._device.save(request) if request in self._scheduler.running.values() else request.saved
        return Snapshot(self._fingerprint, request.prompt, request.params, list(request.tokens), request.start, saved)

    def restore(self, taken: Snapshot) -> int:
        """Queues a request from a snapshot, ahead of others; returns its id.

        Raises:
          ValueError: when the snapshot was taken with another model, dtype, or geometry.
        """
        if taken.fingerprint != self._fingerprint:
            raise ValueError(f"the snapshot is of {taken.fingerprint!r}; this engine is {self._fingerprint!r}")
        request = Tracked(id=next(self._ids), prompt=taken.prompt, params=taken.params, tokens=list(taken.tokens), start=taken.start)
        if taken.saved is not None:
            row = taken.saved.row
            request.saved, request.written = taken.saved, taken.saved.k.shape[1]
            request.nfe, request.revised, request.remasked = int(row.nfe), int(row.revised), int(row.remasked)
        self._requests[request.id] = request
        self._scheduler.waiting.appendleft(request)
        return request.id

    @property
    def saved_structure(self) -> Any:
        """What ``Snapshot.load`` needs to know of this engine."""
        return self._device.saved_structure

    @property
    def stats(self) -> dict[str, int]:
        """Counters and gauges: requests, pages, prefix cache lookups in blocks, preemptions."""
        scheduler, pages = self._scheduler, self._pages
        return {
            "waiting": len(scheduler.waiting),
            "prefilling": len(scheduler.prefilling),
            "running": len(scheduler.running),
            "pages": pages.num_pages,
            "pages_held": pages.num_held,
            "prefix_cache_queries": pages.queries,
            "prefix_cache_hits": pages.hits,
            "preemptions": scheduler.preemptions,
        }

    def _enqueue(self, prompt: np.ndarray, params: SamplingParams, trace: bool) -> list[int]:
        ids, params = [], params.resolve(self._defaults)
        for seed in seeds(params):
            request = Tracked(
                id=next(self._ids),
                prompt=prompt,
                params=dataclasses.replace(params, n=1, seed=seed),
                trace=[] if trace else None,
            )
            self._requests[request.id] = request
            self._scheduler.add(request)
            ids.append(request.id)
        return ids

    def _end_early(self, request: Tracked, cut: Cut) -> Output:
        """Ends a request that the device would go on with."""
        sequence = None
        if request.wants_sequence:
            if request.saved is not None:
                sequence = request.saved.row.sequence
            elif request in self._scheduler.running.values():
                sequence = self._device.read(request)
        self._scheduler.drop(request)
        return self._output(request, cut, sequence)

    def _check(self, name: str, prompt: Prompt, params: SamplingParams) -> np.ndarray:
        """The prompt as int32 ids, or a ValueError that says what is wrong with it."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, and this model has no tokenizer; pass token ids")
            prompt = self.tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise ValueError(f"{name} is empty")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{name} must be text or a list of token ids, got {prompt!r}")
        outside = ids[(ids < 0) | (ids >= self.model.spec.vocab_size)]
        if outside.size:
            raise ValueError(f"{name} holds token id {outside[0]}, outside the vocabulary [0, {self.model.spec.vocab_size})")
        masks = np.flatnonzero(ids == self.model.spec.mask_id)
        if masks.size:
            raise ValueError(f"{name} holds the mask token (id {self.model.spec.mask_id}) at position {masks[0]}")
        longest = self.settings.max_model_len
        if len(ids) + params.max_tokens > longest:
            raise ValueError(f"{name} has {len(ids)} tokens; with max_tokens={params.max_tokens} that exceeds max_model_len={longest}")
        if self.settings.attention == "prefix_full" and len(ids) > self.settings.max_batched_tokens:
            limit = self.settings.max_batched_tokens
            raise ValueError(f"{name} has {len(ids)} tokens; with attention='prefix_full' at most max_batched_tokens={limit} go through")
        needed = -(-(len(ids) + params.max_tokens) // self.dims.block)
        if needed > self._pages.num_pages:
            raise ValueError(f"{name} needs {needed} pages with max_tokens={params.max_tokens}; the pool has {self._pages.num_pages}")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"{name}: stop={params.stop!r} needs a tokenizer, and this model has none")
        eos = 0 if params.ignore_eos else len(self._eos_ids)
        if eos + len(params.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(f"{name}: at most {MAX_STOP_IDS - eos} stop_token_ids beside {eos} EOS ids, got {len(params.stop_token_ids)}")
        for field in ("pinned", "init_tokens"):
            for offset, token in (getattr(params, field) or {}).items():
                if token >= self.model.spec.vocab_size or token == self.model.spec.mask_id:
                    raise ValueError(f"{name}: {field}[{offset}]={token} is not a token that can be given")
        return ids.astype(np.int32)

    def _output(self, request: Tracked, cut: Cut, sequence: Canvas | None) -> Output:
        del self._requests[request.id]
        ids, made = request.tokens[: cut.length], slice(len(request.prompt), len(request.prompt) + cut.length)
        text = cut.text
        if text is None and self.tokenizer is not None:
            text = self.tokenizer.decode(ids)
        logprobs = step_map = None
        if request.params.logprobs:
            logprobs = [] if sequence is None else [math.log(p) if p > 0 else -math.inf for p in sequence.confidence[made].tolist()]
        if request.params.return_step_map:
            steps = (sequence.first_step[made].tolist(), sequence.last_step[made].tolist()) if sequence is not None else ([], [])
            step_map = list(zip(*steps, strict=True))
        return Output(
            text=text,
            token_ids=ids,
            finish_reason=cut.reason,
            nfe=request.nfe,
            revised_tokens=request.revised,
            remasked_tokens=request.remasked,
            prompt_token_ids=request.prompt.tolist(),
            seconds=time.perf_counter() - request.began if request.began else 0.0,
            logprobs=logprobs,
            step_map=step_map,
            trace=request.trace,
        )
