"""Supervised fine-tuning data: rows of the datasets to tokenized examples.

    names -> Source -> rows -> turns -> Example (ids, loss_mask)

Every row is read, checked and tokenized before training begins, so that bad data is found in the
first minute and not hours into a run. The summary names what was dropped, cut or not read.

Knows nothing of the model, of devices or of the loss; the files are read by train.dataset_info,
the template is qwen_jax.chatml's.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qwen_jax.chatml import DEFAULT_SYSTEM, encode_training
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from train.batches import Example, epoch_order
from train.dataset_info import Source, find_sources, read_rows, read_turns


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
    sources = find_sources(names, dataset_dir)
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
    rows = read_rows(source)
    if source.num_samples is not None:
        rows = [rows[i] for i in _sample(len(rows), source.num_samples)]
    rows = rows[:max_samples]
    examples, dropped, truncated, keys = [], Counter(), 0, set()
    for where, row in tqdm(rows, desc=f"tokenizing {source.name}", unit=" rows", disable=None):
        row_system, turns = read_turns(row, where, source)
        keys |= row.keys()
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
