"""A conversation in the terminal: `python -m sample.chat --checkpoint CKPT`.

Answers appear as they are made. Ctrl-C ends an answer, at the prompt it ends the program, as the
end of the input does. Lines may also come from a pipe: one question each.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass

from qwen_jax import api, chatml
from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.sampling import SamplingParams
from sample.generate import ModelFlags, check_flags, open_model, sampling_params

HELP = """/new, /clear   begin a new conversation
/exit, /quit   leave (also Ctrl-D)
/help          this list"""
_COMMANDS = ("/new", "/clear", "/exit", "/quit", "/help")


@dataclass(kw_only=True)
class Args(ModelFlags):
    """Chat with a model."""


class Chat:
    """The conversation so far and how it goes on."""

    def __init__(self, model: api.Model, params: SamplingParams, system: str):
        self.model, self.params, self.system = model, params, system
        self.turns: list[chatml.Turn] = []

    def ask(self, question: str) -> None:
        """Prints the answer as it arrives and remembers it; Ctrl-C keeps what there is."""
        tokenizer = self.model.tokenizer
        turns = [*self.turns, chatml.Turn("user", question)]
        window = self.model.defaults.max_window_size
        prompt = chatml.encode_prompt(tokenizer, turns, self.system, window)
        # Each turn its own seed: the same question asked twice is drawn anew.
        seed = (self.params.seed + len(self.turns) // 2) % 2**32
        params = dataclasses.replace(self.params, seed=seed)
        ids: list[int] = []
        text = tokenizer.stream(skip_special=True)
        interrupted = False
        try:
            for token in self.model.engine.stream(prompt, params):
                ids.append(token)
                print(text.push(token), end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        mark = (" " if ids else "") + "[interrupted]" if interrupted else ""
        print(text.flush() + mark, flush=True)
        if ids or not interrupted:
            answer = chatml.decode_answer(tokenizer, ids)
            self.turns = [*turns, chatml.Turn("assistant", answer)]


def _command(chat: Chat, line: str) -> bool:
    """Runs a /command; False if it ends the program."""
    if line in ("/exit", "/quit"):
        return False
    if line in ("/new", "/clear"):
        chat.turns = []
        print("(new conversation)")
    elif line == "/help":
        print(HELP)
    else:
        print(f"unknown command {line}{did_you_mean(line, _COMMANDS)} (/help lists them)")
    return True


def converse(chat: Chat) -> None:
    """Reads lines until the input ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        if line.startswith("/") and " " not in line and line.count("/") == 1:
            if not _command(chat, line):
                return
        elif line:
            try:
                chat.ask(line)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # before the answer began
                print("[interrupted]")


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    check_flags(args)
    if sys.stdin is None:
        raise InputError("standard input is closed; questions come from a terminal or a pipe")
    model = open_model(args)
    if model.defaults.chat_format == "raw":
        print("warning: a base model, not trained to chat; see sample.generate", file=sys.stderr)
    chat = Chat(model, sampling_params(args, model), args.system)
    _ = model.engine  # a missing tokenizer shows now, not after the first question
    _ = model.tokenizer
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        print("Type a question; /help lists the commands.")
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    converse(chat)


if __name__ == "__main__":
    run(main)
