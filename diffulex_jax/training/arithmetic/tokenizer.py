"""The embedded model's tokenizer: whole words of the tasks, single digits, and bytes for everything else.

A byte-level BPE without merges: a pre-token found in the vocabulary is one token, any other becomes its UTF-8 bytes. So no
text is unknown and every text round-trips. Digits are split off first, one token each, which is what makes arithmetic
learnable; the space before a number is a token of its own.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from diffulex_jax.training.arithmetic import tasks


VOCAB_SIZE = 512
EOS, MASK = "<|endoftext|>", "<|mask|>"
ROLE, ROLE_CLOSE, ROLE_END = "<role>", "</role>", "<|role_end|>"
SPECIAL = (ROLE, ROLE_CLOSE, ROLE_END, EOS, MASK)  # the last ids of the vocabulary
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are good at math. Show your work.")
CHAT_TEMPLATE = (
    "{%- set roles = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in roles -%}"
    "{{ raise_exception(\"unknown role '\" ~ message['role'] ~ \"'; use one of \" ~ roles | join(', ')) }}"
    "{%- endif -%}"
    "<role>{{ roles[message['role']] }}</role>{{ message['content'] }}<|role_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<role>ASSISTANT</role>{%- endif -%}"
)


@functools.cache
def build() -> Tokenizer:
    """The tokenizer, from the words of the generated problems; deterministic.

    Raises:
      ValueError: when the words do not fit the vocabulary.
    """
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = set(pieces)
    words = sorted({word for text in _texts() for word, _ in splitter.pre_tokenize_str(text)} - known)
    spare = VOCAB_SIZE - len(pieces) - len(words) - len(SPECIAL)
    if spare < 0:
        raise ValueError(f"{len(words)} words leave {spare} ids of {VOCAB_SIZE}")
    pieces += words + [f"<|unused{i}|>" for i in range(spare)] + list(SPECIAL)
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def save(path: str | pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the files ``transformers.AutoTokenizer`` reads: tokenizer, its configuration and the chat template."""
    path = pathlib.Path(path)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": [ROLE, ROLE_CLOSE, ROLE_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def chat(question: str, *, system: str | None = None) -> str:
    """One user turn as :data:`CHAT_TEMPLATE` writes it, ready for the answer."""
    head = f"{ROLE}SYSTEM{ROLE_CLOSE}{system}{ROLE_END}" if system else ""
    return f"{head}{ROLE}HUMAN{ROLE_CLOSE}{question}{ROLE_END}{ROLE}ASSISTANT{ROLE_CLOSE}"


def _texts() -> Iterable[str]:
    """Texts that between them hold every word of the tasks."""
    for problem in tasks.generate("train", 5_000, seed=0):
        yield problem.question
        yield problem.answer
    yield from SYSTEM_PROMPTS
    yield from ("SYSTEM", "HUMAN", "ASSISTANT", "Question:", " Answer:", "Answer:", "\n", " ")
