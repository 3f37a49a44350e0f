"""How good a model's answers are, and how many forwards they take: generated suites, files of known formats, and lm-evaluation-harness."""
