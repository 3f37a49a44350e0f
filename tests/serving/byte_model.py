"""A golden checkpoint with a tokenizer: every id is bytes, most of them pieces of multi-byte characters."""

from __future__ import annotations

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
EOS, MASK = 1020, 1021
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def vocabulary() -> list[bytes]:
    """Bytes of ids 0 to 1019: single bytes, then whole characters and halves of them."""
    tokens = [bytes([b]) for b in range(256)]
    point = 0x4E00
    while len(tokens) < EOS:
        for character in (chr(point), chr(0x1F600 + point % 64), chr(0xE0 + point % 32)):
            encoded = character.encode()
            tokens += [t for t in (encoded, encoded[:2], encoded[2:], b"ab" + encoded[:1]) if t and t not in tokens]
        point += 1
    return tokens[:EOS]


def make_tokenizer() -> Tokenizer:
    stand_in = byte_characters()
    vocab = {"".join(stand_in[b] for b in token): id_ for id_, token in enumerate(vocabulary())}
    vocab |= {"<|endoftext|>": EOS, "<|mask|>": MASK}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|mask|>", special=True)])
    return tokenizer


def make_model(directory: pathlib.Path, checkpoint: str = "tiny-llada2-trained") -> pathlib.Path:
    """Fills ``directory`` with the checkpoint and the tokenizer."""
    for file in (GOLDEN / checkpoint).iterdir():
        (directory / file.name).symlink_to(file)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    return directory
