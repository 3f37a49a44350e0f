"""Token merge: input embeddings with soft tokens."""

from pallas_kernels.token_merge.reference import MergeSpec, merge


__all__ = ["MergeSpec", "merge"]
