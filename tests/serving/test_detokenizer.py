"""Text from tokens in pieces: equal to the text of all of them, never taken back, stop texts never begun."""

from __future__ import annotations

import random

import byte_model
import pytest

from diffulex_jax.async_serving.detokenizer import Detokenizer, flush, longest_beginning, push


@pytest.fixture(scope="module")
def decode():
    tokenizer = byte_model.make_tokenizer()
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def in_pieces(tokens, rng):
    while tokens:
        n = rng.randint(0, 9)
        yield tokens[:n]
        tokens = tokens[n:]


def some_tokens(rng):
    """Text, halves of characters, garbage and special tokens."""
    tokens = []
    while len(tokens) < 80:
        match rng.randrange(4):
            case 0:
                tokens += list(rng.choice(["naïve ", "你好", "😀👍🏽", "a�b", "plain"]).encode())
            case 1:
                tokens += [rng.randrange(byte_model.EOS) for _ in range(rng.randint(1, 6))]
            case 2:
                tokens += [byte_model.EOS]
            case 3:
                tokens += list("é".encode()[:1]) * rng.randint(1, 4)
    return tokens


@pytest.mark.parametrize("seed", range(200))
def test_pieces_join_to_the_text_of_all_tokens(decode, seed):
    rng = random.Random(seed)
    tokens, state, given = some_tokens(rng), Detokenizer(decode), ""
    for piece in in_pieces(tokens, rng):
        given += push(state, piece)
        assert decode(tokens).startswith(given)
    assert given + flush(state) == decode(tokens)
    assert state.given == decode(tokens)


def test_only_new_tokens_are_decoded_again(decode):
    longest = 0

    def counting(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    state = Detokenizer(counting)
    for _ in range(500):
        push(state, list(b"word "))
    assert state.given == "word " * 500
    assert longest < 30


def test_half_a_character_waits(decode):
    state = Detokenizer(decode)
    assert push(state, list("ab你".encode()[:-1])) == "ab"
    assert push(state, list("你".encode()[-1:])) == "你"


def test_the_beginning_of_a_stop_text_waits(decode):
    state = Detokenizer(decode, ("STOP", "TOAD"))
    assert push(state, list(b"go S")) == "go "
    assert push(state, list(b"TO")) == ""
    assert push(state, list(b"x")) == "STOx"
    assert push(state, list(b" TOA")) == " "
    assert flush(state) == "TOA"


@pytest.mark.parametrize(
    ("text", "stops", "length"), [("aab", ("ab",), 0), ("aa", ("ab",), 1), ("xaba", ("abab", "b"), 3), ("", ("a",), 0), ("a", (), 0)]
)
def test_longest_beginning(text, stops, length):
    assert longest_beginning(text, stops) == length
