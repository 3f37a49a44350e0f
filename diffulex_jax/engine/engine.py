"""The engine: a thin host loop. The device decides every token; the host moves requests in and out of slots."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffulex_jax import decode, request_state
from diffulex_jax.cache.pages import PageAllocator
from diffulex_jax.config import ModelConfig
from diffulex_jax.engine.results import Output, TraceStep
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.models import checkpoint, llada2
from diffulex_jax.parallel.mesh import make_mesh, sharding
from diffulex_jax.rules.base import Rule
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import FINISH_REASONS, POOL_AXES, STATE_AXES, DecodeState, Dims, KVPool, StepReport, Trace
from diffulex_jax.strategies import resolve


_PREFILL_BLOCKS = (16, 4, 1)  # compiled prefill sizes, in blocks, largest first
_STEPS_PER_DISPATCH = 16

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Prompt = str | Sequence[int]


@dataclasses.dataclass
class _Running:
    """A request in a slot."""

    index: int
    prompt: np.ndarray
    params: SamplingParams
    pages: np.ndarray
    began: float
    trace: list[TraceStep] | None


class Engine:
    """Decodes requests on one mesh. Build it with :meth:`from_pretrained`."""

    _pool: KVPool
    _state: DecodeState

    def __init__(
        self,
        config: ModelConfig,
        params: llada2.Params,
        *,
        tokenizer: Tokenizer | None = None,
        strategy: str | Rule = "llada2",
        dtype: str = "float32",
        block_size: int = 32,
        buffer_size: int = 1,
        max_slots: int = 8,
        max_model_len: int = 2048,
        mesh: Mesh | None = None,
    ):
        """Args are those of :meth:`from_pretrained`, with the parameters already on the mesh."""
        for name, value in (("block_size", block_size), ("buffer_size", buffer_size), ("max_slots", max_slots), ("max_model_len", max_model_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if max_model_len > config.max_position_embeddings:
            raise ValueError(f"max_model_len={max_model_len} exceeds the model's max_position_embeddings={config.max_position_embeddings}")
        rule = resolve(strategy)
        pages_per_slot = -(-max_model_len // block_size)
        self.config, self.tokenizer = config, tokenizer
        self.max_model_len = max_model_len
        self.mesh = make_mesh() if mesh is None else mesh
        self._params = params
        self._dims = Dims(
            slots=max_slots,
            window=buffer_size,
            block=block_size,
            pages_per_slot=pages_per_slot,
            merge_top_k=rule.merge.top_k if rule.merge is not None else 0,
        )
        self._program = decode.Program(config, self._dims, rule, (config.eos_token_id,))
        self._pages = PageAllocator(max_slots * pages_per_slot)
        self._slots: list[_Running | None] = [None] * max_slots
        self._build(_dtype(dtype))

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        strategy: str | Rule = "llada2",
        dtype: str = "float32",
        block_size: int = 32,
        buffer_size: int = 1,
        max_slots: int = 8,
        max_model_len: int = 2048,
        mesh: Mesh | None = None,
    ) -> Engine:
        """Loads a model and compiles everything it will run.

        Args:
          model: a Hugging Face directory, ``"embedded"``, or a hub id.
          strategy: a name from ``diffulex_jax.strategies``, or a rule of your own.
          dtype: of parameters, activations and the KV pool: ``"float32"`` or ``"bfloat16"``.
          block_size: tokens in a block; what the model was trained with (32 for LLaDA2).
          buffer_size: blocks denoised together (multi-block diffusion); 1 finishes a block before it starts the next.
          max_slots: requests decoded together.
          max_model_len: most tokens of a prompt and its output.
          mesh: where to run; default: the first device.

        Raises:
          ValueError: for a model, checkpoint or setting that will not do, naming it.
        """
        path = checkpoint.resolve(str(model))
        mesh = make_mesh() if mesh is None else mesh
        config, params = checkpoint.load(path, mesh, dtype=_dtype(dtype))
        return cls(
            config,
            params,
            tokenizer=Tokenizer.load(path),
            strategy=strategy,
            dtype=dtype,
            block_size=block_size,
            buffer_size=buffer_size,
            max_slots=max_slots,
            max_model_len=max_model_len,
            mesh=mesh,
        )

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
          params: one for all, or one a prompt.
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

        outputs: dict[int, Output] = {}
        waiting = collections.deque(enumerate(zip(checked, params, strict=True)))
        with tqdm(total=len(prompts), disable=not progress, unit="request") as bar:
            try:
                while len(outputs) < len(prompts):
                    while waiting and None in self._slots:
                        index, (prompt, p) = waiting.popleft()
                        self._admit(index, prompt, p, trace)
                    for index, output in self._run(stop_on_finish=bool(waiting)):
                        outputs[index] = output
                        bar.update()
                        tokens, forwards = (sum(f(o) for o in outputs.values()) for f in (lambda o: len(o.token_ids), lambda o: o.nfe))
                        bar.set_postfix_str(f"{tokens / max(forwards, 1):.2f} tokens/forward")
            except BaseException:
                self._clear()
                raise
        return [outputs[i] for i in range(len(prompts))]

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
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if outside.size:
            raise ValueError(f"{name} holds token id {outside[0]}, outside the vocabulary [0, {self.config.vocab_size})")
        masks = np.flatnonzero(ids == self.config.mask_token_id)
        if masks.size:
            raise ValueError(f"{name} holds the mask token (id {self.config.mask_token_id}) at position {masks[0]}")
        if len(ids) + params.max_tokens > self.max_model_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens; with max_tokens={params.max_tokens} that exceeds max_model_len={self.max_model_len}"
            )
        return ids.astype(np.int32)

    def _admit(self, index: int, prompt: np.ndarray, params: SamplingParams, trace: bool) -> None:
        """Gives a request a slot and pages, writes its whole prompt blocks, and sets its row up."""
        dims = self._dims
        slot = self._slots.index(None)
        pages = self._pages.allocate(-(-(len(prompt) + params.max_tokens) // dims.block))
        self._slots[slot] = _Running(index, prompt, params, pages, time.perf_counter(), [] if trace else None)
        request = request_state.make_request(dims, no_page=self._pages.num_pages, prompt=prompt, params=params, pages=pages)
        blocks = prompt[: len(prompt) // dims.block * dims.block].reshape(-1, dims.block)
        done = 0
        while done < len(blocks):
            size = next((n for n in self._prefill_sizes if n <= len(blocks) - done), self._prefill_sizes[-1])
            chunk = np.zeros((size, dims.block), np.int32)
            count = min(size, len(blocks) - done)
            chunk[:count] = blocks[done : done + count]
            self._prefill_chunk(chunk, count, done * dims.block, request.page_table)
            done += count
        with jax.set_mesh(self.mesh):
            self._state = self._jit_admit(self._state, np.int32(slot), request)

    def _record(self, trace: Trace) -> None:
        """Appends the steps of a dispatch to the traces that were asked for."""
        for slot, run in enumerate(self._slots):
            if run is not None and run.trace is not None:
                for i in np.flatnonzero(trace.live[:, slot]):
                    arrays = {name: getattr(trace, name)[i, slot].reshape(-1) for name in TraceStep.__dataclass_fields__ if name != "start"}
                    run.trace.append(TraceStep(start=int(trace.start[i, slot]), **arrays))

    def _run(self, *, stop_on_finish: bool) -> list[tuple[int, Output]]:
        """One dispatch; returns what finished."""
        traced = any(run is not None and run.trace is not None for run in self._slots)
        report, trace = self._dispatch(_STEPS_PER_DISPATCH, stop_on_finish, self._jit_traced if traced else self._jit_denoise)
        if traced:
            self._record(jax.device_get(trace))
        finished = [s for s, r in enumerate(self._slots) if r is not None and report.status[s] in FINISH_REASONS]
        if not finished:
            return []
        sequence = np.asarray(self._state.sequence)
        return [self._take(slot, report, sequence[slot]) for slot in finished]

    def _take(self, slot: int, report: StepReport, sequence: np.ndarray) -> tuple[int, Output]:
        """The output of a finished slot, which becomes free."""
        run = self._slots[slot]
        assert run is not None
        ids = sequence[len(run.prompt) : report.length[slot]].tolist()
        self._pages.free(run.pages)
        self._slots[slot] = None
        return run.index, Output(
            text=None if self.tokenizer is None else self.tokenizer.decode(ids),
            token_ids=ids,
            finish_reason=FINISH_REASONS[int(report.status[slot])],
            nfe=int(report.nfe[slot]),
            revised_tokens=int(report.revised[slot]),
            remasked_tokens=int(report.remasked[slot]),
            prompt_token_ids=run.prompt.tolist(),
            seconds=time.perf_counter() - run.began,
            trace=run.trace,
        )

    def _clear(self) -> None:
        """Drops everything in flight, so that an interrupted call leaves the engine usable."""
        for slot, run in enumerate(self._slots):
            if run is not None:
                self._pages.free(run.pages)
                self._slots[slot] = None
                self._state = self._jit_release(self._state, np.int32(slot))

    # The device side: jitted functions, their buffers, and the shapes they are compiled for.

    def _build(self, dtype: Any) -> None:
        config, dims, program = self.config, self._dims, self._program
        num_pages = self._pages.num_pages
        pool_sharding = sharding(self.mesh, POOL_AXES)
        state_sharding = sharding(self.mesh, STATE_AXES)
        everywhere = sharding(self.mesh, ())
        self._prefill_sizes = [n for n in _PREFILL_BLOCKS if n <= dims.pages_per_slot]

        def empty() -> tuple[KVPool, DecodeState]:
            shape = (config.num_hidden_layers, num_pages, dims.block, config.num_key_value_heads, config.head_dim)
            pool = KVPool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            return pool, request_state.empty_state(dims, program.rule, mask_id=config.mask_token_id, no_page=num_pages)

        # The traced form is compiled when a trace is first asked for.
        self._jit_denoise, self._jit_traced = (
            jax.jit(
                functools.partial(decode.denoise, program, trace_steps=steps),
                donate_argnums=(1, 2),
                out_shardings=(pool_sharding, state_sharding, everywhere, everywhere),
            )
            for steps in (0, _STEPS_PER_DISPATCH)
        )
        self._jit_prefill = jax.jit(functools.partial(decode.prefill, program), donate_argnums=(1,), out_shardings=pool_sharding)
        self._jit_admit = jax.jit(
            functools.partial(request_state.admit, dims, program.rule, config.mask_token_id),
            donate_argnums=(0,),
            out_shardings=state_sharding,
        )
        self._jit_release = jax.jit(request_state.release, donate_argnums=(0,), out_shardings=state_sharding)
        with jax.set_mesh(self.mesh):
            self._pool, self._state = jax.jit(empty, out_shardings=(pool_sharding, state_sharding))()
        self._warm_up()

    def _warm_up(self) -> None:
        """Compiles every shape there will be, by running each once on nothing."""
        dims = self._dims
        table = np.full(dims.pages_per_slot, self._pages.num_pages, np.int32)
        for size in self._prefill_sizes:
            self._prefill_chunk(np.zeros((size, dims.block), np.int32), 0, 0, table)
        request = request_state.make_request(
            dims, no_page=self._pages.num_pages, prompt=np.zeros(1, np.int32), params=SamplingParams(), pages=table
        )
        with jax.set_mesh(self.mesh):
            self._state = self._jit_admit(self._state, np.int32(0), request)
            self._state = self._jit_release(self._state, np.int32(0))
        self._dispatch(1, False, self._jit_denoise)

    def _prefill_chunk(self, tokens: np.ndarray, count: int, start: int, table: np.ndarray) -> None:
        with jax.set_mesh(self.mesh):
            self._pool = self._jit_prefill(self._params, self._pool, tokens, np.int32(count), np.int32(start), table)

    def _dispatch(self, max_steps: int, stop_on_finish: bool, denoise: Callable[..., Any]) -> tuple[StepReport, Trace]:
        with jax.set_mesh(self.mesh):
            self._pool, self._state, report, trace = denoise(
                self._params, self._pool, self._state, max_steps=np.int32(max_steps), stop_on_finish=np.bool_(stop_on_finish)
            )
        return jax.device_get(report), trace


def _dtype(name: str) -> Any:
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
