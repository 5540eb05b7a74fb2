"""Datasets as LLaMA-Factory describes them: dataset_info.json and its files, down to turns.

    dataset_dir/dataset_info.json   {"NAME": {"file_name", "formatting", "columns", "tags", ...}}
    dataset_dir/FILE                an array of rows, or one row a line (told apart by content)
    dataset_dir/FOLDER/             such files, in the order of their names

    names -> Source -> rows -> (system text, turns)

As in LLaMA-Factory, optional columns (query, system, history, tools) that a "columns" entry leaves
out are not read. Unlike there, a misspelt key and a broken conversation are errors, not silence or
a skipped row, and a local file is preferred when an entry also names a hub. Every error names the
file and its row. Knows no tokenizer and no template.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_jax.chatml import Turn
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import read_json_object

# Keys and defaults of dataset_info.json: data/README.md of LLaMA-Factory.
_REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_UNREAD_KEYS = ("subset", "folder", "revision", "file_sha1")  # without meaning for a local file
_READ_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "ranking", "split")
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_REQUIRED_COLUMNS = {"prompt": "instruction", "response": "output", "messages": "conversations"}
_DEFAULT_COLUMNS = {**_REQUIRED_COLUMNS, "query": "input"}
_DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checked entry of dataset_info.json."""

    name: str
    files: tuple[Path, ...]
    conversations: bool  # sharegpt or openai; otherwise alpaca
    columns: dict[str, str]  # LLaMA-Factory's name of a column -> its name in the rows
    tags: dict[str, str]
    num_samples: int | None


def find_sources(names: str, dataset_dir: str | Path) -> list[Source]:
    """The entries `names` (comma-separated) of dataset_info.json, all checked.

    Before the first file is read: a misspelt last name costs no wait.
    """
    folder = Path(dataset_dir)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(f"--dataset is {names!r}; expected names from {folder}/dataset_info.json")
    if not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"no dataset_info.json in {folder}; --dataset_dir names the folder with it"
        )
    info = read_json_object(folder / "dataset_info.json")
    return [_source(info, name, folder) for name in wanted]


def read_rows(source: Source) -> list[tuple[str, object]]:
    """All rows, each with where it stands: `FILE, row N` or `FILE, line N`, from 1."""
    return [row for path in source.files for row in _read_file(path)]


def read_turns(row: object, where: str, source: Source) -> tuple[str, list[Turn]]:
    """The row's own system text (or "") and its turns, user and assistant one after the other."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with columns, got {_kind(row)}")
    if _column(row, "tools", where, source) not in ("", "[]", []):
        raise InputError(f"{where}: offers tools; only text is trained: remove such rows")
    read = _conversation_turns if source.conversations else _alpaca_turns
    return read(row, where, source)


def _source(info: dict, name: str, folder: Path) -> Source:
    """Checks the entry `name` of dataset_info.json and finds its files."""
    if name not in info:
        have = ", ".join(info) or "none"
        raise InputError(
            f"no dataset {name!r} in {folder}/dataset_info.json; it has: {have}"
            f"{did_you_mean(name, info)}"
        )
    entry, where = info[name], f"{folder}/dataset_info.json, dataset {name!r}"
    _check_keys(entry, where, _READ_KEYS + _REMOTE_KEYS + _UNREAD_KEYS)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise InputError(f"{where}: formatting is {formatting!r}; expected alpaca or sharegpt")
    if entry.get("ranking"):
        raise InputError(f"{where}: a ranking dataset holds preferences; fine-tuning needs answers")
    if entry.get("split", "train") != "train":
        raise InputError(f"{where}: split is {entry['split']!r}; a local file has only train")
    num_samples = entry.get("num_samples")
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise InputError(f"{where}: num_samples is {num_samples!r}; expected a whole number from 1")
    return Source(
        name=name,
        files=_files(entry, where, folder),
        conversations=formatting != "alpaca",
        columns=_names(entry, "columns", where, _COLUMNS, _DEFAULT_COLUMNS, _REQUIRED_COLUMNS),
        tags=_names(entry, "tags", where, tuple(_DEFAULT_TAGS), _DEFAULT_TAGS, _DEFAULT_TAGS),
        num_samples=num_samples,
    )


def _check_keys(value: object, where: str, known: Sequence[str]) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {_kind(value)}")
    for key in value:
        if key not in known:
            raise InputError(
                f"{where}: unknown key {key!r}; fine-tuning reads {', '.join(known)}"
                f"{did_you_mean(key, known)}"
            )


def _names(
    entry: dict, key: str, where: str, known: Sequence[str], unset: dict, required: dict
) -> dict[str, str]:
    """The columns or tags of an entry: `unset` if it has none, else its own over `required`."""
    given = entry.get(key)
    if given is None:
        return unset
    _check_keys(given, f"{where}, {key}", known)
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}, {key}: {name} is {value!r}; expected a string")
    return required | {name: value for name, value in given.items() if value}


def _files(entry: dict, where: str, folder: Path) -> tuple[Path, ...]:
    """The data files of an entry, all of them inside `folder` once links are resolved."""
    name = entry.get("file_name")
    remote = [key for key in _REMOTE_KEYS if key in entry]
    if name is None and remote:
        raise InputError(
            f"{where}: {remote[0]} {entry[remote[0]]!r} is not downloaded here; save the data as "
            f"json or jsonl in {folder} and name it with file_name"
        )
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{where}: file_name is {name!r}; expected a file or folder in {folder}")
    path = folder / name
    _check_inside(folder, path, where)
    if path.is_file():
        return (path,)
    if not path.is_dir():
        beside = [p.name for p in folder.iterdir() if p.exists()]
        raise InputError(f"{where}: no file {name!r} in {folder}{did_you_mean(name, beside)}")
    files = tuple(sorted(p for p in path.iterdir() if not p.name.startswith(".")))
    if not files:
        raise InputError(f"{where}: the folder {path} is empty; expected .json or .jsonl files")
    for file in files:
        _check_inside(folder, file, where)
        if file.suffix not in (".json", ".jsonl"):
            raise InputError(f"{where}: {file} is not a .json or .jsonl file; move it elsewhere")
    return files


def _check_inside(folder: Path, path: Path, where: str) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{where}: {path} leads out of {folder}; put the file into it")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, say with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path, line: int, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{path}, line {line}: not JSON ({error.msg}); mend that line") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting too long for Python
        raise InputError(f"{path}, line {line}: not JSON ({error}); mend that line") from None


def _read_file(path: Path) -> list[tuple[str, object]]:
    """The rows of one file."""
    text = _read_text(path)
    if next((c for c in text if not c.isspace()), "") == "[":
        return [(f"{path}, row {i}", row) for i, row in enumerate(_parse(path, 1, text), 1)]
    # str.splitlines would also break at U+2028 and others, which JSON strings may hold.
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}, line {i}", _parse(path, i, line)) for i, line in lines if line.strip()]


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {_kind(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {name!r} holds half a surrogate pair; mend its text") from None
    return value


def _column(row: dict, name: str, where: str, source: Source) -> object:
    """The value of a column; null or an optional column that is not there counts as empty."""
    column = source.columns.get(name)
    if column in row:
        return "" if row[column] is None else row[column]
    if name in _REQUIRED_COLUMNS:
        raise InputError(
            f"{where}: no column {column!r}; it has {', '.join(row) or 'none'}; name the right one "
            f'in dataset_info.json: "columns": {{"{name}": ...}}'
        )
    return ""


def _alpaca_turns(row: dict, where: str, source: Source) -> tuple[str, list[Turn]]:
    def text(name: str) -> str:
        return _text(_column(row, name, where, source), source.columns.get(name, ""), where)

    turns = []
    history = _column(row, "history", where, source) or []
    for i, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{where}: history {i} is {_kind(pair)}; expected [question, answer]")
        question, answer = (_text(value, f"history {i}", where) for value in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    question = "\n".join(part for part in (text("prompt"), text("query")) if part)
    turns += [Turn("user", question), Turn("assistant", text("response"))]
    return text("system"), turns


def _conversation_turns(row: dict, where: str, source: Source) -> tuple[str, list[Turn]]:
    tags = source.tags
    messages = _column(row, "messages", where, source) or []
    if not isinstance(messages, list):
        raise InputError(f"{where}: the conversation is {_kind(messages)}; expected an array")
    system = _text(_column(row, "system", where, source), source.columns.get("system", ""), where)
    turns: list[Turn] = []
    for i, message in enumerate(messages, 1):
        role, content = _message(message, f"{where}, message {i}", tags)
        if i == 1 and role == tags["system_tag"]:
            system = content
            continue
        expected = ("user", "assistant")[len(turns) % 2]
        if role != tags[f"{expected}_tag"]:
            raise InputError(
                f"{where}, message {i}: role is {role!r}; expected {tags[f'{expected}_tag']!r} "
                "(user and assistant take turns, a system message may only come first)"
            )
        turns.append(Turn(expected, content))
    return system, turns


def _message(message: object, where: str, tags: dict[str, str]) -> tuple[str, str]:
    """Role tag and content of one message of a conversation."""
    role, content = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict) or role not in message or content not in message:
        have = ", ".join(message) if isinstance(message, dict) else _kind(message)
        raise InputError(
            f"{where}: expected {role!r} and {content!r}, got {have}; "
            'name the right ones in dataset_info.json: "tags"'
        )
    tag = _text(message[role], role, where)
    if tag in (tags["observation_tag"], tags["function_tag"]) or message.get("tool_calls"):
        raise InputError(f"{where}: {tag!r} calls a tool; only text is trained: remove such rows")
    return tag, _text(message[content], content, where)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
