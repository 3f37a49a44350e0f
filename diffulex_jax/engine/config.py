"""The engine's static settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffulex_jax.errors import SettingError


_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "attention": (None, "block_causal", "prefix_full", "full"),
    "cache": (None, "none", "prefix", "dual"),
    "kernels": ("auto", "reference"),
    "weights": (None, "int8", "int4", "fp8"),
    "kv": (None, "bfloat16", "fp8", "int8"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine is built. ``Engine.from_pretrained`` takes these as keywords.

    Attributes:
      dtype: of parameters and activations, and of the KV pool but for ``kv``: ``"float32"`` or ``"bfloat16"``.
      weights: ``"int8"``, ``"int4"`` or ``"fp8"`` (e4m3) holds the experts of a mixture quantised, and of a model without experts the
        matrices of attention and MLPs: a half, or with int4 a quarter, of bfloat16's bytes. All else is of ``dtype``. Default: all of
        it is.
      adapter: directory of a LoRA adapter in PEFT's files, which is merged into the parameters while a model is loaded, in ``dtype``. It
        may adapt no matrix that is held quantised; ``adapters`` may, but for experts.
      adapters: directories of LoRA adapters in PEFT's files, by names of yours, which stay beside the parameters: a request has the one
        that its ``adapter_name`` says, or none, whatever others in the batch have. They adapt attention and dense or shared MLPs, not
        experts or routers. Each costs its bytes, and every forward the products of all of them.
      kv: of the KV pool: ``"bfloat16"``, or in 8 bits ``"fp8"`` (e4m3, clipped at 448) or ``"int8"`` (with a scale for each vector of a
        head, which is nearer to what was there). A block attends to itself and to the window as it is; what is written is rounded. Not for
        models that see their whole canvas. Default: ``dtype``.
      block_size: tokens in a block; where a model sees its whole canvas (LLaDA), the most that a request's ``block_length`` may be.
        Default: what the model was trained with, as its checkpoint says, or as such models usually have; 32 for Dream behind a ``cache``,
        and for LLaDA and Dream with ``attention="prefix_full"``.
      force_block_size: decode in blocks that the checkpoint was not trained for. The text gets worse.
      page_size: tokens in a page of the KV pool: a multiple of a block, or a whole fraction of one. Default: a block, or as many of less
        than 8 tokens as make 16.
      buffer_size: blocks denoised together (multi-block diffusion); 1 finishes a block before it starts the next. Default: what the
        strategy names, else 1.
      attention: what a prompt sees of itself: ``"block_causal"``, its blocks up to the position's own, or ``"prefix_full"``, all of it
        (D2F; such prompts share no prefixes and are prefilled in one piece). ``"full"``: everything sees the whole canvas, masks included,
        which is what models made so do (LLaDA, Dream); they take ``"prefix_full"`` too, for D2F's checkpoints of them, whose blocks begin
        at the prompt's end. Default: what the strategy names, else the model's.
      cache: for models that see their whole canvas. ``"none"``: every forward is over all of it, which is exact. ``"prefix"``: a block's
        first forward is, and the others take the keys and values of what lies before the block from it. ``"dual"``: they take those of all
        but the block. Both are approximations, in which ``cfg_scale`` is not to be had (Fast-dLLM, arXiv 2505.22618). Default: ``"none"``.
      sub_block_cache: (Fast-dLLM v2) most forwards of a block are over one sub-block of so many tokens, the request's ``sub_block``, beside
        old keys and values of the others; one over the whole block renews them where the sub-block's first position is a mask. An
        approximation, the authors' ``use_block_cache``. Default: every forward is over the whole block.
      max_slots: requests decoded together.
      max_model_len: most tokens of a prompt and its output. Where a model sees its whole canvas, every forward costs so many for each
        slot.
      num_pages: pages of the pool, or blocks where a block is several pages; default: what memory allows, up to a few times what all
        slots need together. With fewer than they need, requests that no longer fit are set aside and resumed.
      max_batched_tokens: tokens of prompts between two steps, at the most. It is fewer where requests wait for more of an answer: prompts
        take about a third of the time then. Where a mesh has ``data`` above 1, so many for each of its parts. Default: by the device, 2048
        or 4096.
      prefix_cache: reuse the KV of blocks that begin a prompt as an earlier request did.
      steps_per_dispatch: denoise steps the device runs before the host looks.
      warm_up: compile programs when the engine is built, so that no request waits for one. On a GPU of one host these are the two or so
        that do for any request; the others, which are faster for some, follow in the background. Otherwise each is compiled when it is
        first needed, and the first answers come sooner; see ``Engine.warm_up``.
      kernels: ``"auto"``, the fastest for the device (``diffulex-jax doctor`` names them), or ``"reference"``, plain XLA.
    """

    dtype: str = "float32"
    weights: str | None = None
    adapter: str | None = None
    adapters: Mapping[str, str] | None = None
    kv: str | None = None
    block_size: int | None = None
    force_block_size: bool = False
    page_size: int | None = None
    buffer_size: int | None = None
    attention: str | None = None
    cache: str | None = None
    sub_block_cache: int | None = None
    max_slots: int = 8
    max_model_len: int = 2048
    num_pages: int | None = None
    max_batched_tokens: int | None = None
    prefix_cache: bool = True
    steps_per_dispatch: int = 8
    warm_up: bool = True
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None"):
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    raise SettingError(field.name, f"{field.name}={value!r} must be a positive integer")
            elif field.type == "bool" and not isinstance(value, bool):
                raise SettingError(field.name, f"{field.name}={value!r} must be True or False")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise SettingError("adapter", f"adapter={self.adapter!r} must be the path of a directory, as text")
        if self.adapters is not None:
            object.__setattr__(self, "adapters", _folders(self.adapters))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingError(name, f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, choices))}")

    @property
    def jax_dtype(self) -> Any:
        import jax.numpy as jnp  # late: the command line reads the settings without JAX

        return jnp.dtype(self.dtype)


def _folders(adapters: Any) -> dict[str, str] | None:
    """``adapters`` checked; None where there are none."""
    if not isinstance(adapters, Mapping):
        raise SettingError("adapters", f"adapters={adapters!r} must map names to directories")
    for name, folder in adapters.items():
        if not (isinstance(name, str) and name and isinstance(folder, str)):
            raise SettingError("adapters", f"adapters: {name!r}: {folder!r} must be a name, and the path of a directory, as text")
    return dict(adapters) or None
