"""Rows of six published data sets' own formats, and of malformed ones, as documents."""

import json

import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.tools import short_id
from nemoe_jax.text.data.formats import BadRow, Chat, Completion, to_document
from nemoe_jax.text.data.sources import find_all, find_dataset, find_rows, read_file


def find(*files, exclude=(), dataset=None, split="train"):
    return find_dataset(dataset, None, split) if dataset else find_rows([str(file) for file in files], exclude)


def chat(*texts: str) -> Chat:
    """The chat of texts that begin with s:, u: or a:."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Chat([{"role": roles[text[0]], "content": text[2:]} for text in texts])


def turns(*texts: str) -> list[dict]:
    """The same as ShareGPT writes it."""
    names = {"s": "system", "u": "human", "a": "gpt"}
    return [{"from": names[text[0]], "value": text[2:]} for text in texts]


def write_openhermes(path):
    """OpenHermes-2.5: one JSON list; ShareGPT with many more columns, mostly null."""
    extra = {"id": None, "title": None, "source": "airoboros2.2", "category": "orca", "views": 3, "system_prompt": None}
    plain, weighted = turns("u:Why?", "a:So."), turns("s:Be brief.", "u:1+1", "a:2", "u:2+2", "a:4")
    weighted = [{**turn, "weight": None} for turn in weighted]
    path.write_text(
        json.dumps([{**extra, "conversations": plain}, {**extra, "conversations": weighted, "system": " "}], indent=1)
    )
    return [chat("u:Why?", "a:So."), chat("s:Be brief.", "u:1+1", "a:2", "u:2+2", "a:4")]


def write_finetome(path):
    """FineTome-100k: Parquet with conversations, source and score."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    rows = [{"conversations": turns(f"u:q{i}", f"a:r{i}"), "source": "x", "score": 5.2 + i} for i in range(7)]
    parquet.write_table(Table.from_pylist(rows), path, row_group_size=3)
    return [chat(f"u:q{i}", f"a:r{i}") for i in range(7)]


def write_metamath(path):
    """MetaMathQA: a JSON list on one line, with the type and the original question."""
    rows = [
        {"query": f"q é {i}", "response": f"r [{i}], ", "type": "GSM_Rephrased", "original_question": "o"}
        for i in range(3)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return [chat(f"u:q é {i}", f"a:r [{i}], ") for i in range(3)]


def write_stheno(path):
    """Stheno's logs: ShareGPT as JSON Lines, the user's last message unanswered."""
    rows = [{"conversations": turns("s:You are X.", "u:Hi", "a:*waves*", "u:bye"), "id": "7"}]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return [chat("s:You are X.", "u:Hi", "a:*waves*")]


def write_platypus(path):
    """Open-Platypus: instruction, mostly without input."""
    rows = [
        {"input": "", "output": "O", "instruction": "I", "data_source": "MATH/PRM-800K"},
        {"input": "1 2", "output": "3", "instruction": "Add", "data_source": "x"},
        {"input": " \n", "output": "O", "instruction": "I"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [chat("u:I", "a:O"), chat("u:Add\n\n1 2", "a:3"), chat("u:I", "a:O")]


def write_magpie(path):
    """Magpie-Pro: conversations, and its first turns once more as instruction and response."""
    row = {"uuid": "1", "instruction": "q1", "response": "r1", "conversations": turns("u:q1", "a:r1", "u:q2", "a:r2")}
    path.write_text(json.dumps({**row, "difficulty": "easy", "output": "never", "text": "never"}) + "\n")
    return [chat("u:q1", "a:r1", "u:q2", "a:r2")]


@pytest.mark.parametrize(
    "write, name, form",
    [
        (write_openhermes, "openhermes2_5.json", "sharegpt"),
        (write_finetome, "train-00000-of-00001.parquet", "sharegpt"),
        (write_metamath, "MetaMathQA-395K.json", "metamath"),
        (write_stheno, "c2.jsonl", "sharegpt"),
        (write_platypus, "data.jsonl", "alpaca"),
        (write_magpie, "magpie.jsonl", "sharegpt"),
    ],
)
def test_published_formats(tmp_path, write, name, form):
    expected = write(tmp_path / name)
    for given in ("auto", form):
        assert [to_document(row, given) for _, row in find(tmp_path).read()] == expected


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_a_json_list_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    rows = [{"text": "a]é,[" * i, "n": [1.5, {"x": None}]} for i in range(5)] + [3, "x"]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
    monkeypatch.setattr("nemoe_jax.text.data.sources.CHUNK", chunk)
    assert list(read_file(tmp_path / "a.json")) == [
        (f"{tmp_path}/a.json: row {number}", row) for number, row in enumerate(rows, 1)
    ]


def test_files_of_all_kinds_in_order_and_without_the_excluded(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\nü".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "id": 3}\n')
    (tmp_path / "c.json").write_text('{"text": "four"}\n{"text": "five"}\n')  # JSON Lines under another name
    (tmp_path / "d.md").write_text("not a data file")
    rows = find(tmp_path)
    assert [to_document(row) for _, row in rows.read()] == ["one\r\nü", "two", "three", "four", "five"]
    assert [place.rpartition("/")[2] for place, _ in rows.read()] == [
        "a.txt",
        *("b.jsonl:1", "b.jsonl:3"),
        "c.json:1",
        "c.json:2",
    ]
    assert [row for _, row in find(tmp_path / "d.md").read()] == ["not a data file"]
    assert len(list(find(tmp_path, exclude=[tmp_path / "b.jsonl"]).read())) == 3
    before = rows.identity
    (tmp_path / "a.txt").write_text("longer")
    assert find(tmp_path).identity != before


def test_a_parquet_file_with_text_that_is_not_utf8(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    buffers = arrow.array([b"good", b"\xff\xfe"]).buffers()
    table = arrow.table({"text": arrow.Array.from_buffers(arrow.string(), 2, buffers)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*damaged \('utf-8' codec can't decode byte 0xff"):
        list(read_file(tmp_path / "a.parquet"))


def test_data_sets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"r{i}"}]}
        for i in range(5)
    ]
    rows[2]["messages"][1] = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1, 0])}).save_to_disk(tmp_path / "two")
    documents = lambda **keys: [to_document(row) for _, row in find(**keys).read()]  # noqa: E731
    expected = [chat(f"u:q{i}", f"a:r{i}") for i in range(5)]
    read = documents(dataset=str(tmp_path / "one"))
    assert [read[i] for i in (0, 1, 3, 4)] == [expected[i] for i in (0, 1, 3, 4)]
    assert read[2].messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert documents(dataset=str(tmp_path / "two"), split="test") == [expected[1], expected[0]]
    assert find(dataset=str(tmp_path / "two")).identity != find(dataset=str(tmp_path / "one")).identity
    with pytest.raises(UserError, match=r"two: split: expected one of train, test, got 'dev'"):
        documents(dataset=str(tmp_path / "two"), split="dev")


def test_a_stream_gives_the_rows_of_its_split_and_keeps_no_copy(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for file in range(2):
        rows = [{"text": f"text {5 * file + row}", "url": "-"} for row in range(5)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"train-{file}.parquet")
    name = str(tmp_path / "set")
    for split, numbers in (("train", range(10)), ("train[3:7]", range(3, 7)), ("train[8:]", range(8, 10))):
        rows = [row for _, row in find_dataset(name, None, split, streaming=True).read()]
        assert rows == [{"text": f"text {number}"} for number in numbers]
    identity = find_dataset(name, None, "train", streaming=True).identity
    assert identity == find_dataset(name, None, "train", streaming=True).identity
    datasets.Dataset.from_list([{"text": "more"}]).to_parquet(tmp_path / "set" / "train-2.parquet")
    assert identity != find_dataset(name, None, "train", streaming=True).identity
    with pytest.raises(UserError, match=r"cannot be loaded: Bad split: dev"):
        find_dataset(name, None, "dev", streaming=True)
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_a_data_set_that_is_missing_is_one_clear_line():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"dataset nobody/nothing-here: cannot be loaded: \S") as caught:
        find(dataset="nobody/nothing-here")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"expected the package datasets .*pip install 'nemoe-jax\[datasets\]'"):
        find(dataset="x/y")


CALL = {"id": "call_abcdefghijkl", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"name": "f", "description": "F.", "parameters": {"type": "object"}}


def messages(*items, **columns):
    return {"messages": [{"role": "user", "content": "x"}, *items], **columns}


def test_tool_calls_have_ids_of_nine_letters_and_digits_that_their_results_share():
    row = messages(
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "abcdefgh9"}]},
        {"role": "tool", "tool_call_id": "call_abcdefghijkl", "content": "1"},
        {"role": "tool", "tool_call_id": "abcdefgh9", "content": "2"},
        {"role": "assistant", "content": "3"},
        tools=json.dumps([TOOL, {"type": "function", "function": TOOL}]),
    )
    document = to_document(row)
    first, second = document.messages[1]["tool_calls"]
    assert first["id"] == short_id("call_abcdefghijkl") == document.messages[2]["tool_call_id"] != short_id("call_x")
    assert len(first["id"]) == 9 and first["id"].isalnum() and second["id"] == "abcdefgh9"
    assert document.tools == [{"type": "function", "function": TOOL}] * 2


def test_calls_without_ids_and_older_spellings():
    function = {"name": "f", "arguments": '{"a": 1}'}
    openai = messages(
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "2"},
    )
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "x"},
            {"from": "function_call", "value": json.dumps(function)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([TOOL]),
        "system": "Be brief.",
    }
    for row, first in ((openai, 0), (sharegpt, 1)):
        document = to_document(row)
        question, called, result, answer = document.messages[first:]
        assert called["tool_calls"][0]["function"] == function
        assert result["tool_call_id"] == called["tool_calls"][0]["id"] and len(result["tool_call_id"]) == 9
        assert (question["content"], result["role"], result["content"], answer["content"]) == ("x", "tool", "1", "2")
    assert document.messages[0] == {"role": "system", "content": "Be brief."} and document.tools[0]["function"] == TOOL


def test_answers_that_are_not_to_be_learned_keep_their_weight():
    row = {
        "conversations": [
            {**turn, "weight": weight}
            for turn, weight in zip(turns("u:a", "a:b", "u:c", "a:d"), (0, 0, 0, 1), strict=True)
        ]
    }
    assert [message.get("weight") for message in to_document(row).messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    "row, form, message",
    [
        ([1], "auto", r"expected an object, got \[1\]"),
        ({"body": "x", "id": 1}, "auto", "the keys body, id belong to no known format"),
        ({}, "auto", r"the keys \(none\)"),
        ({"conversations": None, "query": "x"}, "auto", "belong to no known format"),
        ({"text": 3}, "auto", "text: expected a text, got 3"),
        ({"text": " \n"}, "auto", "text: empty"),
        ({"body": 3}, "text", "text: expected a text, got None"),
        ("plain", "sharegpt", "expected a row of the format sharegpt, got a text"),
        ({"conversations": []}, "auto", "conversations: expected a list of messages"),
        ({"conversations": "x"}, "auto", "conversations: expected JSON, got 'x'"),
        ({"conversations": ["x"]}, "auto", r"conversations\[0\]: expected an object with role and content, got 'x'"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "auto",
            r"conversations\[0\]: from: .*got 'narrator'",
        ),
        ({"conversations": [{"value": "x"}]}, "auto", r"conversations\[0\]: from: .*got None"),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "auto",
            r"conversations\[0\]: value: expected a text, got 3",
        ),
        ({"conversations": turns("u:x")}, "auto", "no answer to learn from"),
        ({"conversations": [{**turn, "weight": 0} for turn in turns("u:x", "a:y")]}, "auto", "no answer to learn from"),
        ({"conversations": turns("u:x", "a: ")}, "auto", r"messages\[1\]: empty"),
        ({"conversations": turns("u:", "a:y")}, "auto", r"messages\[0\]: empty"),
        (
            {"conversations": turns("u:x", "a:y", "s:z", "a:y")},
            "auto",
            r"messages\[2\]\.role: system cannot follow assistant",
        ),
        ({"conversations": turns("a:y")}, "auto", "a chat starts with the role user or system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]},
            "auto",
            "content: expected a text or a list of text blocks",
        ),
        (messages({"role": "assistant", "content": "x"}, tools="{x"), "auto", "tools: expected JSON"),
        (messages({"role": "assistant", "content": "x"}, tools=[3]), "auto", r"tools\[0\]: expected an object"),
        (
            messages({"role": "assistant", "tool_calls": [{"function": 3}]}),
            "auto",
            r"messages\[1\]: tool_calls: expected",
        ),
        ({"instruction": "x", "output": ""}, "auto", "output: empty"),
        ({"instruction": "x", "input": 3, "output": "y"}, "auto", "input: expected a text, got 3"),
        ({"query": "x", "response": ["y"]}, "auto", "response: expected a text"),
    ],
)
def test_bad_rows(row, form, message):
    with pytest.raises(BadRow, match=message):
        to_document(row, form)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'[{"text": "x"}, {"text": ]', r"a\.json: row 2: not JSON, or cut short: '\{\"text\": \]'"),
        ("a.json", b'[{"text": "x"}', r"a\.json: row 2: not JSON, or cut short: ''"),
        ("a.json", b"3", r"a\.json: expected a list of rows, or one row a line, got '3'"),
        ("a.json", b'{\n "a": 1\n}\n', r"a\.json: expected a list of rows, or one row a line"),
        ("a.json", b'[{"text": "\xff"}]', r"a\.json: expected UTF-8, got byte 0xff"),
        ("a.parquet", b"PAR1nothing", r"a\.parquet: not a Parquet file, or damaged"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', r"expected a JSON object, got b'\{broken'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "expected a JSON object"),
        ("a.txt", b"ab\xff", "expected UTF-8 text, got byte 0xff at 2"),
    ],
)
def test_rows_that_cannot_be_read_come_as_bad_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    bad = [(place, row) for place, row in read_file(tmp_path / name) if isinstance(row, BadRow)]
    assert len(bad) == 1 and bad[0][0] == str(tmp_path / name) + ":2" * (name == "a.jsonl")
    with pytest.raises(BadRow, match=message):
        raise bad[0][1]


def test_command_line_words_name_files_and_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("one")
    data = datasets.Dataset.from_list([{"text": "two"}, {"text": "three"}])
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "saved")
    words = [str(tmp_path / "a.txt"), f"hf:{tmp_path / 'saved'}", f"hf:{tmp_path / 'saved'}:test"]
    assert [row for found in find_all(words) for _, row in found.read()] == [
        "one",
        *({"text": text} for text in ("two", "three", "three")),
    ]
    for wrong in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match=r"expected hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"):
            find_all([wrong])


ROWS = {
    "instruction": ({"instruction": "I", "context": "C", "response": "R"}, chat("u:I\n\nC", "a:R")),
    "question": ({"question": "Q", "answer": "A #### 3", "text": "never"}, chat("u:Q", "a:A #### 3")),
    "history": (
        {"instruction": "I", "input": "", "output": "O", "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]},
        chat("s:S", "u:q1", "a:a1", "u:q2", "a:a2", "u:I", "a:O"),
    ),
    "history as text": (
        {"instruction": "I", "output": "O", "history": '[["q1", "a1"]]'},
        chat("u:q1", "a:a1", "u:I", "a:O"),
    ),
    "messages as text": ({"messages": json.dumps(chat("u:x", "a:y").messages)}, chat("u:x", "a:y")),
    "conversations as text": ({"conversations": json.dumps(turns("u:x", "a:y"))}, chat("u:x", "a:y")),
    "capitals": ({"messages": [{"role": "Human", "content": "x"}, {"role": "AI", "content": "y"}]}, chat("u:x", "a:y")),
    "orca": ({"id": "t0.1", "system_prompt": "S", "question": "Q", "response": "R"}, chat("s:S", "u:Q", "a:R")),
    "no system prompt": ({"system_prompt": "", "question": "Q", "response": "R"}, chat("u:Q", "a:R")),
    "response": ({"prompt": "P", "response": "R"}, chat("u:P", "a:R")),
    "completion": ({"prompt": "x ", "completion": "y"}, Completion("x ", "y")),
    "wanted completion": ({"prompt": "x ", "completion": "y", "label": True}, Completion("x ", "y")),
    "completion of messages": (
        {"prompt": chat("u:x", "a:w", "u:v").messages, "completion": chat("a:y").messages},
        Chat([*chat("u:x").messages, {**chat("a:w").messages[0], "weight": 0}, *chat("u:v", "a:y").messages]),
    ),
    "completion behind messages": ({"prompt": chat("u:x").messages, "completion": "y"}, chat("u:x", "a:y")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_common_forms(name):
    row, document = ROWS[name]
    assert to_document(row) == document


def test_calls_and_results_under_their_own_roles():
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    rows = [
        [
            {"role": "user", "content": "x"},
            *({"role": "tool_call", "content": json.dumps(call)} for call in calls),
            *({"role": "ipython", "content": text} for text in "12"),
            {"role": "assistant", "content": "y"},
        ],
        [
            {"from": "Human", "value": "x"},
            {"from": "tool_call", "value": json.dumps(calls)},
            *({"from": "tool_response", "value": text} for text in "12"),
            {"from": "gpt", "value": "y"},
        ],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": json.dumps(calls)},
            *({"role": "tool", "content": text} for text in "12"),
            {"role": "assistant", "content": "y"},
        ],
    ]
    for row in rows:
        question, called, *results, answer = to_document({"messages": row}).messages
        assert [call["function"] for call in called["tool_calls"]] == calls
        names = [call["id"] for call in called["tool_calls"]]
        assert [result["tool_call_id"] for result in results] == names and len(set(names)) == 2
        assert (question["role"], answer["content"]) == ("user", "y")


LEFT_OUT = [
    *((key, value) for key in ("weight", "train", "training", "loss") for value in (0, 0.0, False, "false")),
    *((key, value) for key in ("weight", "train", "training", "loss") for value in (1, 0.5, True, "True", None)),
]


@pytest.mark.parametrize("key, value", LEFT_OUT)
def test_marks_of_answers_that_are_not_to_be_learned(key, value):
    marked = [{**turn, key: value} if turn["value"] == "b" else turn for turn in turns("u:a", "a:b", "u:c", "a:d")]
    openai = [{"role": {"human": "user", "gpt": "assistant"}[one.pop("from")], **one} for one in map(dict, marked)]
    for row in ({"conversations": marked}, {"messages": openai}):
        left_out = value in (0, "false") and value is not None
        learned = [
            message.get("weight") != 0 for message in to_document(row).messages if message["role"] == "assistant"
        ]
        assert learned == [not left_out, True]
        assert not any(key in message and message[key] != 0 for message in to_document(row).messages)


def test_rows_exported_from_arrow_lose_their_nulls_and_others_keep_them():
    arguments = {"city": "Graz", "unit": None}
    call = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "f", "arguments": arguments}}
    plain = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "a1B2c3D4e"},
        {"role": "assistant", "content": "y"},
    ]
    keys = {key for message in plain for key in message}
    padded = [dict.fromkeys(sorted(keys)) | message for message in plain]
    assert to_document({"messages": plain}).messages[1]["tool_calls"][0]["function"]["arguments"] == arguments
    exported = to_document({"messages": padded, "text": None}).messages
    assert exported[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Graz"}
    assert exported[0] == {"role": "user", "content": "x"}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": None}}}
    (read,) = to_document({"messages": chat("u:x", "a:y").messages, "tools": [tool]}).tools
    assert read["function"]["parameters"]["properties"] == {"a": {"type": "string"}}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"instruction": "x", "output": "y", "history": "x"}, "history: expected JSON"),
        ({"instruction": "x", "output": "y", "history": [["q"]]}, r"history\[0\]: expected a question and its answer"),
        ({"instruction": "x", "output": "y", "history": 3}, "history: expected a list"),
        ({"prompt": "x", "completion": " "}, "completion: empty"),
        ({"prompt": "x", "completion": "y", "label": False}, "label: false: a completion that is not wanted"),
        ({"prompt": "x", "completion": 3}, "completion: expected a list of messages, got 3"),
        ({"messages": "[1"}, "messages: expected JSON"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": "perhaps"}]},
            r"messages\[1\]: train: expected true or false, got 'perhaps'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y", "train_detail": [3]},
                ]
            },
            r"messages\[1\]: train_detail: expected objects with begin_offset",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool_call", "content": "{"}]},
            "a call: expected JSON",
        ),
    ],
)
def test_bad_rows_of_these_forms(row, message):
    with pytest.raises(BadRow, match=message):
        to_document(row)
