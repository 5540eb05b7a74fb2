"""Text to token ids and back, with the ranks in `qwen.tiktoken` and Qwen's splitting pattern.

    ids 0 .. n-1          the n ranks of the file (151,643 in the published one), each some bytes
    ids n .. n+207        control tokens: <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0..204|>
    ids from n+208        rows by which a model pads its vocabulary: no text, decode to nothing

`encode` reads everything as ordinary text: a control token that somebody types becomes the plain
characters of its name, so only chatml.py puts control tokens into a prompt. Knows no chat format,
no model and no network; it writes nothing to disk.
"""

import base64
import binascii
import codecs
import functools
import operator
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import tiktoken

from qwen_jax.errors import InputError

RANKS_FILE = "qwen.tiktoken"

# PAT_STR of tokenization_qwen.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

# `\s+(?!\S)` backtracks over every blank, and tiktoken panics at 1,000,000 of them in a row
# (0.14). Stretches from this length on are cut out by _pieces and never meet the pattern.
LONG_BLANKS = 100_000

# What Rust's `\s` matches (White_Space), without \r and \n. Python's own `\s` also has \x1c-\x1f.
_BLANK = "\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9][0-9]{0,8})")


class Tokenizer:
    """Qwen v1's byte pair encoding.

    n_vocab         ranks + control tokens; a model's vocabulary is this, padded
    special_tokens  name -> id of the 208 control tokens
    eod_id, im_start_id, im_end_id  three of those ids
    """

    def __init__(self, ranks: dict[bytes, int]):
        """`ranks` as `read_ranks` returns them: 0..n-1, every single byte among the tokens."""
        self._ranks = ranks
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = len(ranks) + len(SPECIAL_TOKENS)
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]
        self._encoding = tiktoken.Encoding(
            "Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a ranks file; InputError with file and line if it is missing or corrupt."""
        return cls(read_ranks(pathlib.Path(path)))

    @classmethod
    def from_dir(cls, folder: str | pathlib.Path, vocab_size: int | None = None) -> "Tokenizer":
        """Reads `qwen.tiktoken` in a model folder.

        `vocab_size`: rows of the model's embedding; InputError if the file has more tokens.
        """
        path = pathlib.Path(folder) / RANKS_FILE
        tokenizer = cls.from_file(path)
        if vocab_size is not None and tokenizer.n_vocab > vocab_size:
            raise InputError(
                f"{path} has {tokenizer.n_vocab} tokens, the model only {vocab_size} rows for "
                "them; it belongs to another model"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Encodes `text` after Unicode normalization (NFC), as tokenization_qwen.py does.

        Any length is accepted: a million equal characters in a row take about half a second (with
        tiktoken before 0.13, whose merging is quadratic, 100,000 of them take four).
        Lone surrogates, which are no text, become U+FFFD.
        """
        ids: list[int] = []
        for piece, whole in _pieces(unicodedata.normalize("NFC", text)):
            encoding = self._unsplit_encoding if whole else self._encoding
            ids += encoding.encode_ordinary(piece)
        return ids

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace"
    ) -> str:
        """Decodes ids; bytes that are no UTF-8 become U+FFFD (`errors` as in bytes.decode).

        `skip_special=True` leaves control tokens out; otherwise they appear by name. Ids from
        n_vocab on have no text and decode to nothing; a negative id is an InputError.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Like `decode`, before UTF-8 decoding: ids may end in the middle of a character."""
        end = self.eod_id if skip_special else self.n_vocab
        numbers = [operator.index(i) for i in ids]
        if min(numbers, default=0) < 0:
            raise InputError(
                f"token id {min(numbers)}, expected 0 or more; a negative filler such as -100 "
                "must be removed before decoding"
            )
        return self._encoding.decode_bytes([i for i in numbers if i < end])

    def stream(self, *, skip_special: bool = False) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; its options are those of `decode`."""
        return StreamDecoder(self, skip_special=skip_special)

    @functools.cached_property
    def _unsplit_encoding(self) -> tiktoken.Encoding:
        """The same merges without splitting. Rarely needed, so made on first use (0.2 s)."""
        return tiktoken.Encoding(
            "Qwen-unsplit", pat_str=r"[\s\S]+", mergeable_ranks=self._ranks, special_tokens={}
        )


class StreamDecoder:
    """Turns ids into text as they arrive, whole characters only.

    The pieces that `push` returns and what `flush` returns, joined, are what `decode` gives.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; the beginning of a character is held back."""
        return self._utf8.decode(
            self._tokenizer.decode_bytes([token_id], skip_special=self._skip_special)
        )

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the decoder may then be used for another text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts long stretches of blanks out of `text`, only where the pattern would cut as well.

    Yields (piece, whole); a whole piece is one match of `\\s+(?!\\S)` and must not be split again.
    Such a match ends before the last blank if a character follows, which that blank then joins.
    A stretch that runs into a line break belongs to `\\s*[\\r\\n]+`, which does not backtrack.
    """
    start = 0
    if len(text) >= LONG_BLANKS:
        # The lookbehind and the possessive `}+` keep this linear in the length of the text.
        for match in re.finditer(f"(?<![{_BLANK}])[{_BLANK}]{{{LONG_BLANKS},}}+", text):
            end = match.end()
            if text[end : end + 1] in ("\r", "\n"):
                continue
            if end < len(text):
                end -= 1
            yield text[start : match.start()], False
            yield text[match.start() : end], True
            start = end
    yield text[start:], False


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Reads lines of `base64(token) rank`; returns token -> rank.

    Raises InputError with file and line unless the ranks are 0..n-1, each once, the tokens differ,
    and every single byte has a token (without one, some texts could not be encoded at all).
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected the ranks file {RANKS_FILE} "
            "that is published with every Qwen model"
        ) from error
    if not lines[-1]:
        lines.pop()
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        token, rank = _parse_line(line, f"{path}: line {number}")
        if rank in line_of_rank or token in ranks:
            what, first = (
                (f"rank {rank}", line_of_rank[rank])
                if rank in line_of_rank
                else (f"token {token!r}", line_of_rank[ranks[token]])
            )
            raise _corrupt(f"{path}: line {number}", f"{what} again, first on line {first}")
        if rank >= len(lines):
            raise _corrupt(
                f"{path}: line {number}", f"rank {rank}, but {len(lines)} lines hold 0..n-1"
            )
        ranks[token] = rank
        line_of_rank[rank] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _corrupt(
            f"{path}: line {len(lines)} (the last)",
            f"no token for byte 0x{missing[0]:02x} and {len(missing) - 1} more of the 256",
        )
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    match = _LINE.fullmatch(line)
    try:
        token = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        token = b""
    if not token:
        shown = line[:60] + b"..." if len(line) > 60 else line
        raise _corrupt(where, f"{shown!r}, expected a base64 token, one space and a rank")
    return token, int(match[2])


def _corrupt(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}; the file is corrupt, fetch {RANKS_FILE} again")
