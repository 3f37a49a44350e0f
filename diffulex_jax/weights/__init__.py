"""Checkpoints of any family: Hugging Face directories read and written without torch."""
