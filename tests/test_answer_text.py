"""Text of a stream: whole characters, no stop strings, and joined what decoding at once gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.tiny_checkpoint import find_ranks_file
from qwen_jax import chatml
from qwen_jax.tokenizer import Tokenizer
from sample.answer_text import AnswerText


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(find_ranks_file())


def byte_ids(tokenizer, text):
    """One token a byte: the worst way to cut characters."""
    table = {tokenizer.decode_bytes([i]): i for i in range(256)}
    return [table[bytes([byte])] for byte in text.encode()]


def stream(tokenizer, ids, stops=(), chat=True, size=1):
    answer = AnswerText(tokenizer, stops, chat=chat)
    pieces = [answer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, answer.flush()], answer


def test_whole_characters_only(tokenizer):
    text = "你好🙂é"
    pieces, _ = stream(tokenizer, byte_ids(tokenizer, text))
    assert [piece for piece in pieces if piece] == list(text)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_pieces_are_the_whole_answer(tokenizer, data):
    ids = data.draw(st.lists(st.sampled_from([*range(300), 151645 - 208]), max_size=12))
    size = data.draw(st.integers(1, 4))
    chat = data.draw(st.booleans())
    pieces, answer = stream(tokenizer, ids, chat=chat, size=size)
    whole = chatml.decode_answer(tokenizer, ids) if chat else tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert answer.tokens == len(ids) and not answer.stopped


@given(
    text=st.text("ab \n你", max_size=14),
    stops=st.lists(st.text("ab 你", min_size=1, max_size=3), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_stops_are_found_across_tokens_and_never_shown(tokenizer, text, stops):
    pieces, answer = stream(tokenizer, byte_ids(tokenizer, text), stops, chat=False)
    # By hand: the first place at which any stop string is complete.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if not ends:
        assert ("".join(pieces), answer.stopped) == (text, False)
        return
    met = text[: ends[0]]
    shown = met[: min(met.find(s) for s in stops if s in met)]
    assert ("".join(pieces), answer.stopped) == (shown, True)
    assert answer.tokens == len(met.encode())


def test_white_space_at_the_ends_of_a_chat_is_dropped(tokenizer):
    ids = tokenizer.encode(" \n\n hello \n world \n\n")
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == "hello \n world"
    pieces, _ = stream(tokenizer, ids, stops=["world"])
    assert "".join(pieces) == "hello"


def test_a_broken_character_at_the_end_becomes_a_replacement(tokenizer):
    pieces, _ = stream(tokenizer, byte_ids(tokenizer, "a🙂")[:-1])
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"
