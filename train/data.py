"""Supervised fine-tuning data as LLaMA-Factory users have it, and the order in which it is trained.

    dataset_dir/dataset_info.json   {"NAME": {"file_name", "formatting", "columns", "tags", ...}}
    dataset_dir/FILE                an array of rows, or one row a line (told apart by content)
    dataset_dir/FOLDER/             such files, in the order of their names

    names -> Source -> rows -> turns -> Example (ids, loss_mask) -> batch [B, T]

Every row is read, checked and tokenized before training begins, so that bad data is found in the
first minute and not hours into a run. As in LLaMA-Factory, optional columns (query, system,
history, tools) that a "columns" entry leaves out are not read; the summary names what was not read.
Unlike there, a misspelt key and a broken conversation are errors, not silence or a skipped row, and
a local file is preferred when an entry also names a hub.

Knows nothing of the model, of devices or of the loss; the template is qwen_jax.chatml's.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qwen_jax.chatml import DEFAULT_SYSTEM, Turn, encode_training
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import read_json_object
from qwen_jax.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class Example:
    """One tokenized row. `loss_mask[t]` says that `ids[t]` is a token to be predicted."""

    ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one or several datasets, in file order, and what became of their rows."""

    examples: list[Example]
    rows: int  # rows read; rows == len(examples) + sum(dropped.values())
    dropped: dict[str, int]  # reason -> rows
    truncated: int  # examples cut at cutoff_len
    unread_columns: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the log: rows, tokens, and whatever was dropped, cut or not read."""
        tokens = sum(len(e.ids) for e in self.examples)
        trained = sum(int(e.loss_mask.sum()) for e in self.examples)
        parts = [
            f"{len(self.examples)} of {self.rows} rows",
            f"{tokens} tokens ({trained} trained), "
            f"longest row {max((len(e.ids) for e in self.examples), default=0)}",
        ]
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        parts += [f"dropped {count} ({reason})" for reason, count in self.dropped.items()]
        if self.unread_columns:
            parts.append(f"columns not read: {', '.join(self.unread_columns)}")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checked entry of dataset_info.json."""

    name: str
    files: tuple[Path, ...]
    conversations: bool  # sharegpt or openai; otherwise alpaca
    columns: dict[str, str]  # LLaMA-Factory's name of a column -> its name in the rows
    tags: dict[str, str]
    num_samples: int | None


def load_dataset(
    names: str,
    dataset_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    max_samples: int | None = None,
    system: str | None = None,
) -> Dataset:
    """Reads and tokenizes the datasets `names` (comma-separated), one after the other.

    Rows longer than `cutoff_len` tokens are cut at their end, as Qwen's finetune.py does; a row
    that has no token to train on within `cutoff_len`, or an empty or missing answer in any of its
    turns, is dropped and counted. `max_samples` keeps the first rows of each dataset; `system` is
    for rows without a system text of their own (default: Qwen's).

    Raises InputError for anything wrong in dataset_info.json or in a row, naming file and row.
    """
    for flag, value in (("cutoff_len", cutoff_len), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise InputError(f"--{flag} is {value}; expected 1 or more")
    folder = Path(dataset_dir)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(f"--dataset is {names!r}; expected names from {folder}/dataset_info.json")
    if not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"no dataset_info.json in {folder}; --dataset_dir names the folder with it"
        )
    info = read_json_object(folder / "dataset_info.json")
    # All entries are checked before the first file is read: a misspelt last name costs no wait.
    sources = [_source(info, name, folder) for name in wanted]
    system = DEFAULT_SYSTEM if system is None else system
    parts = [_load_source(s, tokenizer, cutoff_len, max_samples, system) for s in sources]
    return Dataset(
        examples=[example for part in parts for example in part.examples],
        rows=sum(part.rows for part in parts),
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
        truncated=sum(part.truncated for part in parts),
        unread_columns=tuple(sorted({c for part in parts for c in part.unread_columns})),
    )


def _load_source(
    source: Source, tokenizer: Tokenizer, cutoff_len: int, max_samples: int | None, system: str
) -> Dataset:
    rows = [row for path in source.files for row in _read_rows(path)]
    if source.num_samples is not None:
        rows = [rows[i] for i in _sample(len(rows), source.num_samples)]
    rows = rows[:max_samples]
    read = _conversation_turns if source.conversations else _alpaca_turns
    examples, dropped, truncated, keys = [], Counter(), 0, set()
    for where, row in tqdm(rows, desc=f"tokenizing {source.name}", unit=" rows", disable=None):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with columns, got {_kind(row)}")
        keys |= row.keys()
        if _column(row, "tools", where, source) not in ("", "[]", []):
            raise InputError(f"{where}: offers tools; only text is trained: remove such rows")
        row_system, turns = read(row, where, source)
        # An empty answer anywhere would train <|im_end|> as the first token of an answer.
        if len(turns) % 2 or not all(t.content.strip() for t in turns[1::2]) or not turns:
            dropped["empty or missing answer"] += 1
            continue
        ids, loss_mask = encode_training(tokenizer, turns, row_system or system)
        if not loss_mask[:cutoff_len].any():
            dropped[f"no answer within {cutoff_len} tokens"] += 1
            continue
        truncated += len(ids) > cutoff_len
        # copied, so that a cut row does not keep its whole text in memory
        examples.append(Example(ids[:cutoff_len].copy(), loss_mask[:cutoff_len].copy()))
    if not examples:
        reasons = ", ".join(f"{count} dropped ({reason})" for reason, count in dropped.items())
        raise InputError(
            f"dataset {source.name!r} has nothing to train on: {len(rows)} rows read"
            f"{', ' + reasons if reasons else ''}; give every row an answer that --cutoff_len keeps"
        )
    unread = tuple(sorted(keys - set(source.columns.values())))
    return Dataset(
        examples=examples,
        rows=len(rows),
        dropped=dict(dropped),
        truncated=truncated,
        unread_columns=unread,
    )


def _sample(rows: int, wanted: int) -> list[int]:
    """num_samples: that many random rows, in file order; beyond `rows`, rows are repeated."""
    whole, rest = divmod(wanted, rows) if rows else (0, 0)
    return sorted(list(range(rows)) * whole + epoch_order(rows, 0, 0)[:rest].tolist())


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
        beside = [p.name for p in folder.iterdir()]
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


def _read_rows(path: Path) -> list[tuple[str, object]]:
    """The rows of a file, each with where it stands: `FILE, row N` or `FILE, line N`, from 1."""
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


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A shuffled order of `num_examples` indices, int64 [num_examples], read-only.

    Sorts raw PCG64 words: NumPy keeps those the same from version to version, which it does not
    promise for `Generator.permutation` (NEP 19), and a run may resume under a newer NumPy.
    """
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_examples), kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchPlan:
    """Which examples each optimizer step trains: arithmetic on the step, no state to save.

    Every epoch is a new shuffle and sees each example exactly once; its last batch may be short
    (`collate` fills it with empty rows), so that no example moves over into the next epoch.
    """

    num_examples: int
    global_batch: int  # rows of one optimizer step: devices x per-device batch x accumulation
    seed: int = 0

    def __post_init__(self):
        if self.num_examples < 1 or self.global_batch < 1 or self.seed < 0:
            raise InputError(
                f"{self}: expected at least one example, a batch of at least 1 and a seed from 0"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch)

    def batch_at(self, step: int) -> np.ndarray:
        """Indices of the examples of optimizer step `step` (from 0), int64 [<= global_batch]."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch
        order = epoch_order(self.num_examples, self.seed, epoch)
        return order[start : start + self.global_batch]


def bucket_length(
    n: int,  # longest row of a batch, 1 <= n <= cutoff_len
    cutoff_len: int,
) -> int:
    """The padded length for a batch: the next of 64, 128, 192, 256, 384, 512, 768, 1024, 1536, ...

    Powers of two and the values halfway between, up to cutoff_len rounded up to 64: few shapes to
    compile (8 for a cutoff_len of 1024, 10 for 2048, 14 for 8192), and past 128 at most a third of
    a row is padding.
    """
    if not 1 <= n <= cutoff_len:
        raise ValueError(f"length {n}; expected 1 to cutoff_len = {cutoff_len}")
    power = 64
    while power < n:
        power *= 2
    halfway = power * 3 // 4
    length = halfway if n <= halfway and halfway % 64 == 0 else power
    return min(length, -(-cutoff_len // 64) * 64)


def collate(
    examples: Sequence[Example], *, batch_size: int, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Pads examples on the right, and the batch with empty rows, to `[batch_size, length]`.

    Returns tokens int32 [B, T], loss_mask bool [B, T] (False on padding), lengths int32 [B].
    """
    longest = max((len(e.ids) for e in examples), default=0)
    if len(examples) > batch_size or longest > length:
        raise ValueError(
            f"{len(examples)} rows of up to {longest} tokens do not fit [{batch_size}, {length}]"
        )
    tokens = np.full((batch_size, length), pad_id, np.int32)
    loss_mask = np.zeros((batch_size, length), np.bool_)
    lengths = np.zeros(batch_size, np.int32)
    for row, example in enumerate(examples):
        n = lengths[row] = len(example.ids)
        tokens[row, :n], loss_mask[row, :n] = example.ids, example.loss_mask
    return {"tokens": tokens, "loss_mask": loss_mask, "lengths": lengths}


def batches(
    examples: Sequence[Example],
    plan: BatchPlan,
    *,
    start: int,
    stop: int,
    cutoff_len: int,
    pad_id: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (step, batch) for the optimizer steps start .. stop - 1; to resume, pass `start`."""
    for step in range(start, stop):
        chosen = [examples[i] for i in plan.batch_at(step)]
        length = bucket_length(max(len(e.ids) for e in chosen), cutoff_len)
        yield step, collate(chosen, batch_size=plan.global_batch, length=length, pad_id=pad_id)
