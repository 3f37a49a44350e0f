"""A bare forward of LLaDA2's network in PyTorch, on the CPU, from the same parameters: what a step is measured against."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffulex_jax.models.base import Model, Params


try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    raise ImportError('measuring against torch needs it: pip install "diffulex-jax[torch]"') from error


def forward_of(model: Model, params: Params) -> Callable[[np.ndarray], np.ndarray]:
    """``f(tokens [R, T]) -> logits [R, T, V]`` float32 of sequences from position 0 on whose positions all see each other, as those of
    a block do. It runs on as many threads as there are processors for this process.

    Raises:
      ValueError: for a network that is not LLaDA2's, or has what is not written here.
    """
    check(model)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = _Network(model.config, jax.tree.map(_tensor, params)).eval()

    def forward(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(np.asarray(tokens, np.int64))).numpy()

    return forward


def check(model: Model) -> None:
    """Raises ValueError where :func:`forward_of` would, without the parameters; and where the step runs elsewhere."""
    raw = model.config.to_hf()
    if raw["model_type"] != "llada2_moe" or "expert_capacity" in raw:
        raise ValueError("against='torch' knows the network of LLaDA2 and LLaDA2.1, which this model has not")
    if (platform := jax.devices()[0].platform) != "cpu":
        raise ValueError(f"against='torch' is a forward on the CPU; the step would run on a {platform}")


class _Network(torch.nn.Module):
    def __init__(self, c: Any, params: dict[str, Any]):
        super().__init__()
        self.embed, self.norm, self.head, self.c = params["embed"], params["norm"], params["lm_head"], c
        stacks = [(kind, i) for kind in ("dense", "moe") if kind in params for i in range(len(params[kind]["qkv"]))]
        self.layers = torch.nn.ModuleList(_Layer(c, {name: a[i] for name, a in params[kind].items()}) for kind, i in stacks)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        c, x = self.c, F.embedding(tokens, self.embed)
        exponent = torch.arange(0, c.rotary_dim, 2, dtype=torch.float32) / max(1, c.rotary_dim)
        angle = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float32), c.rope_theta**-exponent).repeat(1, 2)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.linear(F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps), self.head).float()


class _Layer(torch.nn.Module):
    """Attention, then a SwiGLU or a mixture of them. Matrices lie as ``[out, in]``, torch's own way."""

    def __init__(self, c: Any, p: dict[str, torch.Tensor]):
        super().__init__()
        used = ("attn_norm", "q_norm", "k_norm", "mlp_norm", "router_bias")
        self.c, self.p = c, {str(name): p[name] for name in used if name in p}
        queries, key, value = p["qkv"][:, :, :-2], p["qkv"][:, :, -2], p["qkv"][:, :, -1]  # [D, KV, G, H], [D, KV, H]
        self.qkv = torch.cat([a.flatten(1) for a in (queries, key, value)], 1).T.contiguous()
        self.out = p["out"].flatten(0, 2).T.contiguous()
        self.experts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.plain: tuple[torch.Tensor, torch.Tensor] | None = None  # what every token goes through
        for name in ("mlp", "shared"):
            if f"{name}_down" in p:
                self.plain = p[f"{name}_gate_up"].flatten(1).T.contiguous(), p[f"{name}_down"].T.contiguous()
        if "router" in p:
            self.router = p["router"].float().T.contiguous()
            stacks = zip(p["experts_gate_up"], p["experts_down"], strict=True)
            self.experts = [(gate_up.T.contiguous(), down.T.contiguous()) for gate_up, down in stacks]

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        c, p = self.c, self.p
        heads = F.linear(F.rms_norm(x, (c.hidden_size,), p["attn_norm"], c.rms_norm_eps), self.qkv)
        q, k, v = heads.unflatten(-1, (-1, c.head_dim)).transpose(1, 2).split([c.num_attention_heads, *[c.num_key_value_heads] * 2], 1)
        q, k = (self.rotated(F.rms_norm(a, (c.head_dim,), p[n], c.rms_norm_eps), cos, sin) for a, n in ((q, "q_norm"), (k, "k_norm")))
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + F.linear(seen, self.out)
        h = F.rms_norm(x, (c.hidden_size,), p["mlp_norm"], c.rms_norm_eps)
        if self.plain is not None:
            x = x + swiglu(h, *self.plain)
        return x + self.mixture(h.flatten(0, 1)).view_as(h) if self.experts else x

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., : self.c.rotary_dim].float(), x[..., self.c.rotary_dim :]
        first, second = turned.chunk(2, -1)
        return torch.cat([(turned * cos + torch.cat([-second, first], -1) * sin).to(x.dtype), rest], -1)

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        """Each expert that some token chose, over its tokens."""
        c = self.c
        score = F.linear(x.float(), self.router).sigmoid()
        compared = score + self.p["router_bias"]
        if c.topk_group < c.n_group:
            grouped = compared.unflatten(-1, (c.n_group, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(c.topk_group, -1).indices
            left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            compared = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        chosen = compared.topk(c.num_experts_per_tok, -1).indices
        weights = score.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c.routed_scaling_factor
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            out = swiglu(x[tokens], *self.experts[expert])
            y.index_add_(0, tokens, (out * weights[tokens, place, None]).to(x.dtype))
        return y


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _tensor(array: jax.Array) -> torch.Tensor:
    """A copy; bfloat16 by its bits, which NumPy has no type of its own for."""
    if array.dtype == jax.numpy.bfloat16:
        return torch.from_numpy(np.asarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
