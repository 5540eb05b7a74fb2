"""train.data, dataset_info and batches against rows, token ids and orders written out by hand."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from train import batches, data

IM_START, IM_END, EOD = 256, 257, 258
DEMO_DATA = Path(__file__).parent.parent / "demo" / "data"


class ByteTokenizer:
    """One token a byte: what a text becomes can be written down without a vocabulary."""

    im_start_id, im_end_id, eod_id, n_vocab = IM_START, IM_END, EOD, 259

    def encode(self, text):
        return list(text.encode())


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def write_info(folder, **entries):
    write(folder, "dataset_info.json", entries)


def load(folder, names="d", cutoff_len=10_000, **options):
    return data.load_dataset(names, folder, ByteTokenizer(), cutoff_len=cutoff_len, **options)


def load_rows(folder, rows, cutoff_len=10_000, **entry):
    """Loads one dataset made of `rows`, described by `entry`."""
    write(folder, "d.json", rows)
    write_info(folder, d={"file_name": "d.json", **entry})
    return load(folder, cutoff_len=cutoff_len)


def shown(example):
    """The text of an example, special tokens as < and >."""
    special = {IM_START: b"<", IM_END: b">"}
    return b"".join(special.get(i) or bytes([i]) for i in example.ids.tolist()).decode()


def trained(example):
    """What is trained of an example, in the notation of `shown`."""
    return shown(batches.Example(example.ids[example.loss_mask], None))


def chatml(*turns, system="You are a helpful assistant."):
    roles = ("user", "assistant")
    parts = [f"<system\n{system}>"] + [f"<{roles[i % 2]}\n{t}>" for i, t in enumerate(turns)]
    return "\n".join(parts)


def expect_error(folder, *fragments, names="d", **options):
    with pytest.raises(InputError) as caught:
        load(folder, names, **options)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def expect_row_error(folder, rows, *fragments, **entry):
    write(folder, "d.json", rows)
    write_info(folder, d={"file_name": "d.json", **entry})
    return expect_error(folder, *fragments)


SHAREGPT = {"formatting": "sharegpt"}
OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def said(*messages):
    return {"conversations": [{"from": role, "value": value} for role, value in messages]}


# --- formats ---------------------------------------------------------------------------------


def test_token_ids_and_mask_written_out(tmp_path):
    row = {"instruction": "a", "input": "", "output": "bc", "system": "s"}
    columns = {"prompt": "instruction", "response": "output", "system": "system"}
    (example,) = load_rows(tmp_path, [row], columns=columns).examples
    system = [256, 115, 121, 115, 116, 101, 109, 10, 115, 257, 10]
    user = [256, 117, 115, 101, 114, 10, 97, 257, 10]
    header = [256, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10]
    ids, mask = example.ids.tolist(), example.loss_mask.tolist()
    assert ids == [*system, *user, *header, 98, 99, 257]
    assert mask == [False] * 31 + [True] * 3
    assert example.ids.dtype == np.int32 and example.loss_mask.dtype == np.bool_


def test_alpaca_joins_instruction_and_input_by_a_newline(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"instruction": "Hi", "input": None, "output": "Hu"},
        {"instruction": "", "input": "only", "output": "x"},
        {"instruction": "你好", "output": "早"},
    ]
    texts = [shown(e) for e in load_rows(tmp_path, rows).examples]
    assert texts == [
        chatml("Add.\n1 2", "3"),
        chatml("Hi", "Ho"),
        chatml("Hi", "Hu"),
        chatml("only", "x"),
        chatml("你好", "早"),
    ]


def test_alpaca_history_and_system_are_trained_turns_in_order(tmp_path):
    row = {"q": "3?", "a": "c", "h": [["1?", "a"], ["2?", "b"]], "s": "Be terse."}
    columns = {"prompt": "q", "response": "a", "history": "h", "system": "s"}
    (example,) = load_rows(tmp_path, [row], columns=columns).examples
    expected = chatml("1?", "a", "2?", "b", "3?", "c", system="Be terse.")
    assert shown(example) == expected
    assert trained(example) == "a>b>c>"


def test_columns_left_out_are_not_read_and_reported(tmp_path):
    row = {"instruction": "q", "input": "unread", "output": "a", "system": "unread"}
    columns = {"prompt": "instruction", "response": "output"}
    dataset = load_rows(tmp_path, [row], columns=columns)
    assert shown(dataset.examples[0]) == chatml("q", "a")
    assert dataset.unread_columns == ("input", "system")
    assert "columns not read: input, system" in dataset.summary()


def test_sharegpt_two_turns_with_system_message(tmp_path):
    row = said(("system", "S"), ("human", "1"), ("gpt", "a"), ("human", "2"), ("gpt", "b"))
    (example,) = load_rows(tmp_path, [row], **SHAREGPT).examples
    assert shown(example) == chatml("1", "a", "2", "b", system="S")
    assert trained(example) == "a>b>"


def test_sharegpt_system_column_yields_to_a_system_message(tmp_path):
    rows = [
        said(("human", "1"), ("gpt", "a")) | {"sys": "column"},
        said(("system", "message"), ("human", "1"), ("gpt", "a")) | {"sys": "column"},
        said(("human", "1"), ("gpt", "a")) | {"sys": ""},
    ]
    columns = {"messages": "conversations", "system": "sys"}
    dataset = load_rows(tmp_path, rows, formatting="sharegpt", columns=columns)
    systems = [shown(e).split(">")[0] for e in dataset.examples]
    default = "<system\nYou are a helpful assistant."
    assert systems == ["<system\ncolumn", "<system\nmessage", default]


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_openai_tags(tmp_path, formatting):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    entry = {**OPENAI, "formatting": formatting}
    (example,) = load_rows(tmp_path, [{"messages": messages}], **entry).examples
    assert shown(example) == chatml("q", "a", system="S")


def test_system_argument_serves_rows_without_their_own(tmp_path):
    write(tmp_path, "d.json", [{"instruction": "q", "output": "a"}])
    write_info(tmp_path, d={"file_name": "d.json"})
    assert shown(load(tmp_path, system="X").examples[0]).startswith("<system\nX>")


# --- files -----------------------------------------------------------------------------------


def test_array_lines_and_folder_are_the_same_data(tmp_path):
    rows = [{"instruction": str(i), "output": "a\u2028b"} for i in range(3)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    write(tmp_path, "array.json", rows)
    write(tmp_path, "lines.jsonl", "\ufeff" + lines)
    write(tmp_path, "lines.json", lines)
    write(tmp_path, "shards/2.jsonl", json.dumps(rows[2]))
    write(tmp_path, "shards/1.json", rows[:2])
    write(tmp_path, "shards/.hidden", "x")
    names = ["array.json", "lines.jsonl", "lines.json", "shards"]
    write_info(tmp_path, **{name: {"file_name": name} for name in names})
    texts = [[shown(e) for e in load(tmp_path, name).examples] for name in names]
    assert [t for t in texts[0]] == [chatml(str(i), "a\u2028b") for i in range(3)]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_several_datasets_are_concatenated(tmp_path):
    write(tmp_path, "a.json", [{"instruction": f"a{i}", "output": "x"} for i in range(3)])
    write(tmp_path, "b.json", [said(("human", "b0"), ("gpt", "x")), said(("human", "b1"))])
    write_info(
        tmp_path,
        a={"file_name": "a.json"},
        b={"file_name": "b.json", "formatting": "sharegpt"},
    )
    dataset = load(tmp_path, "b, a", max_samples=2)
    questions = [shown(e).split(">")[1].removeprefix("\n<user\n") for e in dataset.examples]
    assert questions == ["b0", "a0", "a1"]  # max_samples counts for each dataset
    assert (dataset.rows, dataset.dropped) == (4, {"empty or missing answer": 1})


def test_num_samples_chooses_rows_and_repeats_them_when_more_are_wanted(tmp_path):
    rows = [{"instruction": str(i), "output": "x"} for i in range(5)]

    def questions(n):
        examples = load_rows(tmp_path, rows, num_samples=n).examples
        return [shown(e).split(">")[1].removeprefix("\n<user\n") for e in examples]

    some = questions(3)
    assert len(set(some)) == 3 and some == sorted(some) and some == questions(3)
    assert questions(5) == ["0", "1", "2", "3", "4"]
    repeated = questions(12)
    assert sorted(repeated.count(str(i)) for i in range(5)) == [2, 2, 2, 3, 3]


# --- rows that are dropped or cut ---------------------------------------------------------------


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path):
    rows = [
        {"instruction": "q", "output": ""},
        {"instruction": "q", "output": None},
        {"instruction": "q", "output": " \n"},
        {"instruction": "q", "output": "a"},
    ]
    dataset = load_rows(tmp_path, rows)
    assert len(dataset.examples) == 1
    assert dataset.dropped == {"empty or missing answer": 3}
    assert dataset.summary().startswith("1 of 4 rows; ")
    assert "dropped 3 (empty or missing answer)" in dataset.summary()


def test_conversations_without_a_last_or_middle_answer_are_dropped(tmp_path):
    rows = [
        said(),
        said(("system", "s")),
        said(("human", "q")),
        said(("human", "q"), ("gpt", "a"), ("human", "q")),
        said(("human", "q"), ("gpt", ""), ("human", "q"), ("gpt", "a")),
        said(("human", "q"), ("gpt", "a")),
    ]
    dataset = load_rows(tmp_path, rows, **SHAREGPT)
    assert len(dataset.examples) == 1
    assert dataset.dropped == {"empty or missing answer": 5}


def test_truncation_cuts_the_end_and_drops_rows_left_without_an_answer(tmp_path):
    short, long = "q", "q" * 50
    rows = [{"instruction": short, "output": "abc"}, {"instruction": long, "output": "abc"}]
    before_answer = len(chatml(short, "")) - 1
    kept = load_rows(tmp_path, rows, cutoff_len=before_answer + 2)
    (example,) = kept.examples
    assert shown(example) == chatml(short, "ab").removesuffix(">")
    assert example.loss_mask.tolist() == [False] * before_answer + [True] * 2
    assert kept.truncated == 1
    assert kept.dropped == {f"no answer within {before_answer + 2} tokens": 1}
    assert "1 truncated" in kept.summary()
    # exactly long enough: nothing is cut
    whole = load_rows(tmp_path, rows[:1], cutoff_len=before_answer + 4)
    assert trained(whole.examples[0]) == "abc>" and whole.truncated == 0


def test_summary_counts_tokens(tmp_path):
    n = len(chatml("q", "abc"))
    dataset = load_rows(tmp_path, [{"instruction": "q", "output": "abc"}])
    assert dataset.summary() == f"1 of 1 rows; {n} tokens (4 trained), longest row {n}"


def test_nothing_left_is_an_error_with_counts(tmp_path):
    rows = [{"instruction": "q", "output": ""}] * 2 + [{"instruction": "q", "output": "a"}]
    write(tmp_path, "d.json", rows)
    write_info(tmp_path, d={"file_name": "d.json"})
    expect_error(
        tmp_path,
        "dataset 'd' has nothing to train on: 3 rows read",
        "2 dropped (empty or missing answer)",
        "1 dropped (no answer within 8 tokens)",
        cutoff_len=8,
    )
    write(tmp_path, "d.json", [])
    expect_error(tmp_path, "0 rows read")


# --- errors ------------------------------------------------------------------------------------


def test_no_dataset_info(tmp_path):
    expect_error(tmp_path / "nowhere", "no dataset_info.json in ")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"d": {}', "dataset_info.json is not valid JSON"),
        ('{\n"d": {},\n}', "line 3 column 1"),
        ('["d"]', "holds a list; expected a JSON object"),
        ('{"d": "d.json"}', "dataset 'd': expected an object, got str"),
    ],
)
def test_broken_dataset_info(tmp_path, text, fragment):
    write(tmp_path, "dataset_info.json", text)
    expect_error(tmp_path, fragment)


def test_unknown_name_lists_the_known_ones(tmp_path):
    write_info(tmp_path, demo_chat={}, other={})
    fragments = "no dataset 'demo_chta'", "it has: demo_chat, other", "did you mean 'demo_chat'?"
    expect_error(tmp_path, *fragments, names="demo_chta")
    expect_error(tmp_path, "--dataset is ' ,'; expected names", names=" ,")


@pytest.mark.parametrize(
    ("entry", "fragments"),
    [
        ({}, ["file_name is None"]),
        ({"file_name": ""}, ["file_name is ''"]),
        ({"file_name": "d\0.json"}, ["file_name is 'd\\x00.json'"]),
        ({"file_name": ["d.json"]}, ["file_name is ['d.json']"]),
        ({"file_name": "c.json"}, ["no file 'c.json'", "did you mean 'd.json'?"]),
        (
            {"hf_hub_url": "some/repo"},
            ["hf_hub_url 'some/repo' is not downloaded here", "file_name"],
        ),
        ({"ms_hub_url": "some/repo"}, ["ms_hub_url 'some/repo'"]),
        ({"script_url": "scripts"}, ["script_url 'scripts'"]),
        ({"file_name": "d.json", "formating": "x"}, ["'formating'", "did you mean 'formatting'?"]),
        ({"file_name": "d.json", "formatting": "vicuna"}, ["formatting is 'vicuna'"]),
        ({"file_name": "d.json", "ranking": True}, ["preferences"]),
        ({"file_name": "d.json", "split": "train[:5]"}, ["split is 'train[:5]'"]),
        ({"file_name": "d.json", "num_samples": 0}, ["num_samples is 0"]),
        ({"file_name": "d.json", "num_samples": "9"}, ["num_samples is '9'"]),
        ({"file_name": "d.json", "columns": {"promt": "q"}}, ["did you mean 'prompt'?"]),
        ({"file_name": "d.json", "columns": {"images": "i"}}, ["unknown key 'images'"]),
        ({"file_name": "d.json", "columns": {"prompt": 1}}, ["columns: prompt is 1"]),
        ({"file_name": "d.json", "tags": ["role"]}, ["tags: expected an object, got list"]),
        ({"file_name": "../d.json"}, ["data/../d.json leads out of"]),
        ({"file_name": "sub/../../d.json"}, ["leads out of"]),
        ({"file_name": "/etc/hostname"}, ["leads out of"]),
        ({"file_name": "link.json"}, ["leads out of"]),
        ({"file_name": "empty"}, ["is empty"]),
        ({"file_name": "mixed"}, ["mixed/a.csv is not a .json or .jsonl file"]),
    ],
)
def test_broken_entry(tmp_path, entry, fragments):
    folder = tmp_path / "data"
    good = [{"instruction": "q", "output": "a"}]
    write(folder, "d.json", good)
    write(tmp_path, "d.json", good)  # what a path that leads out would find
    os.symlink(tmp_path / "d.json", folder / "link.json")
    (folder / "empty").mkdir()
    write(folder, "mixed/a.csv", "q,a")
    write_info(folder, d=entry)
    expect_error(folder, "dataset 'd'", *fragments)


def test_every_entry_is_checked_before_the_first_file_is_read(tmp_path):
    write(tmp_path, "d.json", "not json")
    write_info(tmp_path, d={"file_name": "d.json"}, e={"file_name": "missing.json"})
    expect_error(tmp_path, "no file 'missing.json'", names="d,e")


def test_hub_entry_with_a_local_file_reads_the_file(tmp_path):
    rows = [{"instruction": "q", "output": "a"}]
    assert len(load_rows(tmp_path, rows, hf_hub_url="some/repo").examples) == 1


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"question,answer\n", "d.json, line 1: not JSON"),
        (b'[{"instruction": "q"},\n {"output" "a"}]', "d.json, line 2: not JSON"),
        (b'{"instruction": "q", "output": "a"}\n\n{"instruction": ', "d.json, line 3: not JSON"),
        (b"[" * 100_000, "d.json, line 1: not JSON"),
        ('[{"instruction": "问"}]'.encode("gb18030"), "d.json: not UTF-8 at byte 18"),
        (b'["text"]', "d.json, row 1: expected an object with columns, got str"),
        (b'{"instruction": "q", "output": "a"}\n[1]', "d.json, line 2: expected an object"),
        (b'"text"', "d.json, line 1: expected an object with columns, got str"),
    ],
)
def test_broken_file(tmp_path, content, fragment):
    write_info(tmp_path, d={"file_name": "d.json"})
    (tmp_path / "d.json").write_bytes(content)
    expect_error(tmp_path, fragment)


GOOD_ALPACA = {"instruction": "q", "output": "a"}
ALL_COLUMNS = {"prompt": "instruction", "response": "output", "history": "h", "tools": "t"}


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"question": "q", "answer": "a"}, ["no column 'instruction'", "has question, answer"]),
        ({"instruction": "q"}, ["no column 'output'; it has instruction", '"response"']),
        ({}, ["no column 'instruction'; it has none"]),
        ({"instruction": ["q"], "output": "a"}, ["'instruction' is list; expected a string"]),
        ({"instruction": "q", "output": 3}, ["'output' is int; expected a string"]),
        ({"instruction": "q", "output": {"text": "a"}}, ["'output' is dict"]),
        ({"instruction": "q", "output": "\ud83d"}, ["'output' holds half a surrogate pair"]),
        (GOOD_ALPACA | {"h": "q"}, ["history 1 is str; expected [question, answer]"]),
        (GOOD_ALPACA | {"h": [["q", "a"], ["q"]]}, ["history 2 is list"]),
        (GOOD_ALPACA | {"h": [["q", None]]}, ["'history 1' is null"]),
        (GOOD_ALPACA | {"t": '[{"name": "search"}]'}, ["offers tools"]),
    ],
)
def test_broken_alpaca_row_is_named_by_its_number(tmp_path, row, fragments):
    rows = [GOOD_ALPACA, GOOD_ALPACA | {"h": [], "t": "[]"}]
    fallback = json.dumps([*rows, row])  # ASCII, so that half a surrogate pair can be written
    expect_row_error(tmp_path, fallback, "d.json, row 3: ", *fragments, columns=ALL_COLUMNS)


GOOD_CHAT = said(("human", "q"), ("gpt", "a"))


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"messages": []}, ["row 2: no column 'conversations'; it has messages"]),
        ({"conversations": "q"}, ["row 2: the conversation is str; expected an array"]),
        ({"conversations": ["q"]}, ["row 2, message 1: expected 'from' and 'value', got str"]),
        ({"conversations": [{"role": "user", "content": "q"}]}, ["got role, content", '"tags"']),
        (said(("human", None)), ["row 2, message 1: 'value' is null; expected a string"]),
        (said((["human"], "q")), ["row 2, message 1: 'from' is list"]),
        (said(("gpt", "a")), ["row 2, message 1: role is 'gpt'; expected 'human'"]),
        (said(("human", "q"), ("human", "q")), ["message 2: role is 'human'; expected 'gpt'"]),
        (said(("human", "q"), ("system", "s")), ["message 2: role is 'system'"]),
        (said(("user", "q"), ("gpt", "a")), ["message 1: role is 'user'; expected 'human'"]),
        (
            said(("human", "q"), ("function_call", "{}")),
            ["message 2: 'function_call' calls a tool"],
        ),
        (said(("observation", "o"), ("gpt", "a")), ["message 1: 'observation' calls a tool"]),
    ],
)
def test_broken_conversation_is_named_by_its_number(tmp_path, row, fragments):
    expect_row_error(tmp_path, [GOOD_CHAT, row], "d.json, row 2", *fragments, **SHAREGPT)


def test_openai_tool_calls_are_refused(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}
    row = {"messages": [{"role": "user", "content": "q"}, call]}
    expect_row_error(tmp_path, [row], "message 2: 'assistant' calls a tool", **OPENAI)


@pytest.mark.parametrize("options", [{"cutoff_len": 0}, {"max_samples": 0}, {"max_samples": -1}])
def test_limits_below_one_are_refused(tmp_path, options):
    expect_error(tmp_path, f"--{next(iter(options))} is ", **options)


# --- order and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (7, 3), (12, 4), (5, 8), (1000, 64)])
def test_each_epoch_sees_every_example_exactly_once(n, batch):
    plan = batches.BatchPlan(n, batch, seed=3)
    assert plan.steps_per_epoch == -(-n // batch)
    orders = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        order = [int(i) for step in steps for i in plan.batch_at(step)]
        assert sorted(order) == list(range(n))
        orders.append(order)
    if n > 5:
        assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(n))


def test_order_depends_on_seed_and_on_nothing_else():
    first = [batches.BatchPlan(100, 8, seed=1).batch_at(s).tolist() for s in range(40)]
    steps = list(range(40))
    random.Random(0).shuffle(steps)
    batches.epoch_order.cache_clear()
    asked_in_any_order = {s: batches.BatchPlan(100, 8, seed=1).batch_at(s).tolist() for s in steps}
    assert [asked_in_any_order[s] for s in range(40)] == first
    assert batches.BatchPlan(100, 8, seed=2).batch_at(0).tolist() != first[0]


def test_order_stays_what_it_was_so_that_old_runs_can_resume():
    # A pin, not a proof: these orders come from NumPy 2.4; a change would break every saved run.
    assert batches.epoch_order(6, 7, 0).tolist() == [3, 4, 0, 2, 5, 1]
    assert batches.epoch_order(6, 7, 1).tolist() == [1, 3, 2, 4, 5, 0]


def test_plan_refuses_what_cannot_be_a_plan():
    for arguments in ((0, 1), (1, 0), (1, 1, -1)):
        with pytest.raises(InputError, match="expected at least one example"):
            batches.BatchPlan(*arguments)


def examples_of_lengths(*lengths):
    return [batches.Example(np.full(n, n, np.int32), np.arange(n) >= n // 2) for n in lengths]


def test_resumed_batches_equal_the_ones_not_interrupted():
    examples = examples_of_lengths(3, 70, 5, 130, 8, 2, 9)
    plan = batches.BatchPlan(7, 3, seed=0)
    options = {"cutoff_len": 200, "pad_id": EOD}
    whole = list(batches.batches(examples, plan, 0, 8, **options))
    resumed = list(batches.batches(examples, plan, 5, 8, **options))
    assert [step for step, _ in resumed] == [5, 6, 7]
    for (step, batch), (_, again) in zip(whole[5:], resumed, strict=True):
        for key in ("tokens", "loss_mask", "lengths"):
            np.testing.assert_array_equal(batch[key], again[key], err_msg=f"{key} at {step}")
    # the last batch of the epoch has 7 - 2 * 3 = 1 example and two empty rows
    last = whole[2][1]
    assert last["tokens"].shape[0] == 3 and (last["lengths"] > 0).tolist() == [True, False, False]
    assert not last["loss_mask"][1:].any() and (last["tokens"][1:] == EOD).all()
    lengths = [n for _, batch in whole[:3] for n in batch["lengths"].tolist() if n]
    assert sorted(lengths) == [2, 3, 5, 8, 9, 70, 130]


def test_collate_pads_right_and_below():
    examples = [
        batches.Example(np.array([1, 2, 3], np.int32), np.array([False, True, True])),
        batches.Example(np.array([4], np.int32), np.array([True])),
    ]
    batch = batches.collate(examples, batch_size=3, length=4, pad_id=9)
    assert batch["tokens"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9], [9, 9, 9, 9]]
    assert batch["loss_mask"].tolist() == [
        [False, True, True, False],
        [True, False, False, False],
        [False, False, False, False],
    ]
    assert batch["lengths"].tolist() == [3, 1, 0]
    assert (batch["tokens"].dtype, batch["loss_mask"].dtype) == (np.int32, np.bool_)
    for size in ({"batch_size": 1, "length": 4}, {"batch_size": 2, "length": 2}):
        with pytest.raises(ValueError, match="do not fit"):
            batches.collate(examples, **size, pad_id=9)


@pytest.mark.parametrize(
    ("n", "cutoff_len", "length"),
    [
        (1, 1024, 64),
        (64, 1024, 64),
        (65, 1024, 128),
        (129, 1024, 192),
        (193, 1024, 256),
        (257, 1024, 384),
        (400, 1024, 512),
        (513, 1024, 768),
        (769, 1024, 1024),
        (1024, 1024, 1024),
        (1025, 2048, 1536),
        (16, 16, 64),
        (1100, 1100, 1152),
        (900, 1000, 1024),
    ],
)
def test_bucket_length(n, cutoff_len, length):
    assert batches.bucket_length(n, cutoff_len) == length


@pytest.mark.parametrize(("cutoff_len", "shapes"), [(1024, 8), (2048, 10), (8192, 14)])
def test_few_shapes_are_compiled(cutoff_len, shapes):
    lengths = [batches.bucket_length(n, cutoff_len) for n in range(1, cutoff_len + 1)]
    assert len(set(lengths)) == shapes
    for n, length in enumerate(lengths, 1):
        assert length % 64 == 0 and n <= length <= max(n * 1.5, 128)
    with pytest.raises(ValueError, match="expected 1 to cutoff_len"):
        batches.bucket_length(cutoff_len + 1, cutoff_len)


# --- the demo's own data -------------------------------------------------------------------------


def test_demo_data():
    dataset = load(DEMO_DATA, "demo_alpaca,demo_chat", cutoff_len=512)
    assert (len(dataset.examples), dataset.dropped, dataset.truncated) == (30, {}, 0)
    assert dataset.unread_columns == ()
    answers = [trained(e) for e in dataset.examples[:24]]
    assert len(set(answers)) == 24
    assert all(trained(e).count(">") == 2 for e in dataset.examples[24:])
