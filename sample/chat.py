"""A conversation in the terminal: `python -m sample.chat --checkpoint CKPT`.

Answers appear as they are made. Ctrl-C ends an answer, at the prompt it ends the program, as the
end of the input does. Lines may also come from a pipe: one question each. A conversation that
outgrows max_window_size loses its oldest turns, as in Qwen v1, and says so.
"""

import contextlib
import dataclasses
import itertools
import sys
from dataclasses import dataclass

from qwen_jax import api, chatml, runtime
from qwen_jax.cli import parse, run
from qwen_jax.engine import BLOCK
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.manifest import planned_manifest
from qwen_jax.sampling import SamplingParams
from sample.answer_text import AnswerText
from sample.generate import ModelFlags, check_flags, open_model, sampling_params
from sample.plan import print_plan

HELP = """/new             begin a new conversation (also /clear, /reset)
/system [TEXT]   show the system message, or change it and begin anew
/exit            leave (also /quit, Ctrl-D)
/help            this list"""
_NEW, _EXIT = ("/new", "/clear", "/reset"), ("/exit", "/quit")
_COMMANDS = (*_NEW, "/system", *_EXIT, "/help")


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
        turns = [*self.turns, chatml.Turn("user", question)]
        prompt = self._encode(turns)
        # Each turn its own seed: the same question asked twice is drawn anew.
        seed = (self.params.seed + len(self.turns) // 2) % 2**32
        params = dataclasses.replace(self.params, seed=seed)
        text, shown = AnswerText(self.model.tokenizer, chat=True), []
        interrupted = False

        def show(piece: str) -> None:
            shown.append(piece)
            print(piece, end="", flush=True)

        try:
            for token in self.model.engine.stream(prompt, params):
                show(text.push([token]))
        except KeyboardInterrupt:
            interrupted = True
        show(text.flush())
        print(" [interrupted]" if interrupted else "", flush=True)
        if text.tokens or not interrupted:
            self.turns = [*turns, chatml.Turn("assistant", "".join(shown))]

    def _encode(self, turns: list[chatml.Turn]) -> list[int]:
        """The prompt; turns that no longer fit are forgotten, with a word about it."""
        tokenizer, window = self.model.tokenizer, self.model.defaults.max_window_size
        prompt = chatml.encode_prompt(tokenizer, turns, self.system, window)
        whole = chatml.encode_prompt(tokenizer, turns, self.system, max_window_size=2**31)
        if len(prompt) < len(whole):
            print(
                f"(the oldest turns are out of the model's sight: {len(whole)} tokens, "
                f"and the window is {window}; /new begins anew)",
                file=sys.stderr,
            )
        return prompt


def _command(chat: Chat, line: str) -> bool:
    """Runs a /command; False if it ends the program."""
    name, _, rest = line.partition(" ")
    if name in _EXIT:
        return False
    if name in _NEW:
        chat.turns = []
        print("(new conversation)")
    elif name == "/system" and not rest.strip():
        print(chat.system)
    elif name == "/system":
        chat.system, chat.turns = rest.strip(), []
        print("(new conversation with this system message)")
    elif name == "/help":
        print(HELP)
    else:
        print(f"unknown command {name}{did_you_mean(name, _COMMANDS)} (/help lists them)")
    return True


def _is_command(line: str) -> bool:
    """A known command, or one word that looks like one; "/etc/hosts is a file" is a question."""
    name, _, rest = line.partition(" ")
    return name == "/system" or (line.startswith("/") and not rest and line.count("/") == 1)


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
        if _is_command(line):
            if not _command(chat, line):
                return
        elif line:
            try:
                chat.ask(line)
            except KeyboardInterrupt:  # before the first token
                print("[interrupted]")
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)


def _warm_up(model: api.Model, params: SamplingParams) -> None:
    """Compiles what a first short question needs, before it is asked; what is logged then stands
    before the conversation and not in it."""
    for _ in itertools.islice(model.engine.stream([0], params), BLOCK + 1):
        pass


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    check_flags(args)
    if args.plan:
        manifest = planned_manifest(args.checkpoint)
        print_plan(args, manifest, rows=1, adapter=args.adapter is not None)
        return
    if sys.stdin is None:
        raise InputError("standard input is closed; questions come from a terminal or a pipe")
    model = open_model(args)
    if model.defaults.chat_format == "raw":
        print("warning: a base model, not trained to chat; see sample.generate", file=sys.stderr)
    chat = Chat(model, sampling_params(args, model), args.system)
    _ = model.tokenizer  # a missing one shows now, not after the first question
    _warm_up(model, chat.params)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() line editing)
        print("Type a question; /help lists the commands.")
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    converse(chat)


if __name__ == "__main__":
    run(main)
