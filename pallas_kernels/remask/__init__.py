"""Prediction update: the best allowed token, its probability and the current token's, from vocabulary logits."""

from pallas_kernels.remask.reference import Best, Sampling, predict


__all__ = ["Best", "Sampling", "predict"]
