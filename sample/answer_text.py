"""Token ids of one answer, as they arrive, to the text that may already be shown.

Held back until it is certain: the beginning of a UTF-8 character, text that may turn out to be the
beginning of a stop string, and, in a chat, white space at either end (`chatml.decode_answer` strips
it). The pieces joined are what decoding the whole answer at once gives. Knows no HTTP.
"""

from collections.abc import Iterable, Sequence

from qwen_jax.tokenizer import Tokenizer


class AnswerText:
    """One answer; `stopped` once a stop string was met, which is not part of the text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, chat: bool):
        # What chatml.decode_answer and sample.generate --raw do with control tokens.
        self._decoder = tokenizer.stream(skip_special=not chat)
        self._stops = [stop for stop in stops if stop]
        self._strip = chat
        self._started = not chat  # False: white space at the beginning is still dropped
        self._held = ""
        self.tokens = 0
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make certain; ids after a stop string are not read."""
        shown = ""
        for token in ids:
            if self.stopped:
                break
            self.tokens += 1
            shown += self._take(self._decoder.push(token))
        return shown

    def flush(self) -> str:
        """What is still held back, once the answer is over."""
        if self.stopped:
            return ""
        shown = self._take(self._decoder.flush())
        if not self.stopped:
            shown += self._release(self._held, last=True)
            self._held = ""
        return shown

    def _take(self, text: str) -> str:
        self._held += text
        if found := [at for stop in self._stops if (at := self._held.find(stop)) >= 0]:
            self.stopped = True
            return self._release(self._held[: min(found)], last=True)
        certain = len(self._held) - max(
            (_overlap(self._held, stop) for stop in self._stops), default=0
        )
        if self._strip:
            certain = len(self._held[:certain].rstrip())
        shown, self._held = self._held[:certain], self._held[certain:]
        return self._release(shown, last=False)

    def _release(self, text: str, last: bool) -> str:
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        return text.rstrip() if last and self._strip else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
