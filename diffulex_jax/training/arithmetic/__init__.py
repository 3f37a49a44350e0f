"""Grade-school arithmetic: generated problems, their tokenizer, and the evaluation of a model that was trained on them."""
