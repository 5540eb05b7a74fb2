"""The chat with an engine that says what the test wants: commands, history, Ctrl-C."""

import builtins
from types import SimpleNamespace

import pytest

from demo.tiny_checkpoint import find_ranks_file
from qwen_jax import chatml
from qwen_jax.generation_config import GenerationDefaults
from qwen_jax.sampling import SamplingParams
from qwen_jax.tokenizer import Tokenizer
from sample import chat as program


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(find_ranks_file())


class Scripted:
    """Answers from a list; an exception in an answer is raised there."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.prompts, self.seeds = [], []

    def stream(self, prompt, params):
        self.prompts.append(self.tokenizer.decode(prompt))
        self.seeds.append(params.seed)
        for part in self.answers.pop(0):
            if isinstance(part, type):
                raise part
            yield from self.tokenizer.encode(part)


@pytest.fixture
def talk(tokenizer, monkeypatch):
    """Types lines into a chat; returns it and its engine."""

    def run(answers, *lines, **defaults):
        engine = Scripted(tokenizer, answers)
        settings = GenerationDefaults(**defaults)
        model = SimpleNamespace(tokenizer=tokenizer, engine=engine, defaults=settings)
        chat = program.Chat(model, SamplingParams(seed=7), "Be brief.")
        typed = iter(lines)

        def next_line(_prompt):
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(builtins, "input", next_line)
        program.converse(chat)
        return chat, engine

    return run


def test_a_conversation(talk, tokenizer, capsys):
    chat, engine = talk([[" Hello", " 你好 \n"], ["Yes."]], "Hi", "", "/etc/hosts is a file?")
    assert capsys.readouterr().out == "Hello 你好\nYes.\n"
    turns = [("user", "Hi"), ("assistant", "Hello 你好"), ("user", "/etc/hosts is a file?")]
    wanted = chatml.encode_prompt(tokenizer, [chatml.Turn(*turn) for turn in turns], "Be brief.")
    assert engine.prompts[1] == tokenizer.decode(wanted)
    assert engine.seeds == [7, 8] and chat.turns[-1] == chatml.Turn("assistant", "Yes.")


def test_ctrl_c_keeps_the_chat_and_what_was_said(talk, capsys):
    answers = [["It", " begins", KeyboardInterrupt], [KeyboardInterrupt], ["Fine."]]
    chat, _ = talk(answers, "one", "two", "three")
    assert capsys.readouterr().out == "It begins [interrupted]\n [interrupted]\nFine.\n"
    assert [turn.content for turn in chat.turns] == ["one", "It begins", "three", "Fine."]


def test_ctrl_c_before_the_answer_keeps_the_chat(talk, monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chatml, "encode_prompt", interrupted)
        chat, _ = talk([], "one")
    assert chat.turns == [] and capsys.readouterr().out == "[interrupted]\n"


def test_commands(talk, capsys):
    lines = ["/system", "q", "/system Be kind. ", "/sytem", "q", "/reset", "/help", "/exit", "lost"]
    chat, engine = talk([["a"], ["b"]], *lines)
    out = capsys.readouterr().out
    assert out.startswith("Be brief.\na\n(new conversation with this system message)\n")
    assert "unknown command /sytem; did you mean '/system'? (/help lists them)" in out
    assert out.endswith(program.HELP + "\n")
    assert chat.turns == [] and len(engine.prompts) == 2
    assert "Be kind." in engine.prompts[1] and "Be brief." not in engine.prompts[1]


def test_a_long_history_is_cut_and_says_so(talk, capsys):
    first = "word " * 60
    _, engine = talk([["a"], ["b"], ["c"]], first, "second", "third", max_window_size=60)
    assert first.strip() not in engine.prompts[1] and "third" in engine.prompts[2]
    err = capsys.readouterr().err
    assert err.count("the oldest turns are out of the model's sight") == 2
    assert "and the window is 60; /new begins anew" in err
