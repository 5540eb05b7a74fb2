"""ChatML as Qwen v1 writes it: turns of a conversation to token ids, for chat and for training.

    <|im_start|>system\\n{system}<|im_end|>
    \\n<|im_start|>user\\n{question}<|im_end|>
    \\n<|im_start|>assistant\\n{answer}<|im_end|>
    ...
    \\n<|im_start|>user\\n{question}<|im_end|>
    \\n<|im_start|>assistant\\n

(line breaks here only for reading). Role, newline and content are encoded one by one, and only
this file writes control tokens: what a user types never becomes one. Chat and training use the
same two functions for a message, so that their templates cannot differ. The source of all rules is
qwen_generation_utils.py of the published chat models. Knows no model and no file format; a raw
prompt needs none of this (`Tokenizer.encode`).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is one of ROLES."""

    role: str
    content: str


def encode_prompt(
    tok: Tokenizer,
    turns: Sequence[Turn],
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = 6144,
) -> list[int]:
    """Encodes a conversation that ends with a question, up to where the answer begins.

    `turns`: an optional system turn (which replaces `system`), then user and assistant in turn,
    the last one the user's. Raises InputError on any other order.

    `max_window_size` (tokens) is Qwen's rule: earlier question-answer pairs are added from the
    newest backwards while system and pairs together stay *below* it; the first that does not fit
    and all older ones are dropped whole. The current question is neither counted nor dropped, so
    the result can be longer than `max_window_size`.
    """
    system, turns = _check_turns(turns, system, last="user")
    newline = tok.encode("\n")
    head = _message(tok, "system", system)
    size = len(head)
    pairs: list[list[int]] = []  # newest first
    for i in range(len(turns) - 3, -1, -2):
        question, answer = turns[i], turns[i + 1]
        pair = newline + _message(tok, question.role, question.content)
        pair += newline + _message(tok, answer.role, answer.content)
        if size + len(pair) >= max_window_size:
            break
        pairs.append(pair)
        size += len(pair)
    ids = head + [i for pair in reversed(pairs) for i in pair]
    ids += newline + _message(tok, "user", turns[-1].content)
    return ids + newline + _header(tok, "assistant")


def encode_training(
    tok: Tokenizer, turns: Sequence[Turn], system: str = DEFAULT_SYSTEM
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a conversation that ends with an answer. Returns (ids int32 [T], loss_mask bool [T]).

    The order is that of `encode_prompt` with one more answer, and the ids before each answer are
    those `encode_prompt` gives for the turns before it. `loss_mask[t]` is True where token t itself
    is to be learned: the tokens of every answer and the <|im_end|> after it.
    """
    system, turns = _check_turns(turns, system, last="assistant")
    newline = tok.encode("\n")
    ids = _message(tok, "system", system)
    mask = [False] * len(ids)
    for turn in turns:
        ids += newline + _header(tok, turn.role)
        mask += [False] * (len(ids) - len(mask))
        ids += _body(tok, turn.content)
        mask += [turn.role == "assistant"] * (len(ids) - len(mask))
    return np.array(ids, np.int32), np.array(mask, np.bool_)


def stop_ids(tok: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: <|im_end|>, <|endoftext|> and, as in Qwen v1, <|im_start|>.

    A model that starts the next message has finished this one.
    """
    return frozenset((tok.im_end_id, tok.eod_id, tok.im_start_id))


def decode_answer(tok: Tokenizer, ids: Iterable[int]) -> str:
    """The text of generated `ids` up to the first stop id, stripped as Qwen v1 strips it."""
    stops = stop_ids(tok)
    answer = []
    for i in ids:
        if i in stops:
            break
        answer.append(i)
    return tok.decode(answer).strip()


def _header(tok: Tokenizer, role: str) -> list[int]:
    return [tok.im_start_id, *tok.encode(role), *tok.encode("\n")]


def _body(tok: Tokenizer, content: str) -> list[int]:
    return [*tok.encode(content), tok.im_end_id]


def _message(tok: Tokenizer, role: str, content: str) -> list[int]:
    return _header(tok, role) + _body(tok, content)


def _check_turns(turns: Sequence[Turn], system: str, last: str) -> tuple[str, list[Turn]]:
    """Returns the system text and the turns without a system turn, once their order is right."""
    turns = list(turns)
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ROLES:
            raise InputError(
                f"turn {number} has role {turn.role!r}, expected one of {', '.join(ROLES)}"
                f"{did_you_mean(str(turn.role), ROLES)}"
            )
        if not isinstance(turn.content, str):
            raise InputError(
                f"turn {number} ({turn.role}) has content of type {type(turn.content).__name__}, "
                "expected text"
            )
    skipped = bool(turns) and turns[0].role == "system"
    if skipped:
        system = turns.pop(0).content
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise InputError(
                f"turn {i + 1 + skipped} has role {turn.role!r}, expected {expected!r}: after at "
                "most one system turn, user and assistant alternate, the user first"
            )
    if not turns or turns[-1].role != last:
        got = f"the last turn has role {turns[-1].role!r}" if turns else "there is no user turn"
        use = "a prompt ends with a question" if last == "user" else "training needs an answer"
        raise InputError(f"{got}, expected {last!r} as the last one: {use}")
    return system, turns
