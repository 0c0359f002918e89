"""Files: which ones a source is, and that their rows say what they say on disk."""

import csv
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import zstandard

from lacuna.config import ConfigError, Source, load_config
from lacuna.data import sources
from lacuna.data.batch import reveal
from lacuna.data.conversations import make_encoder

from .corpora import lacuna_log, write
from .test_conversations import QWEN3
from .test_sources import TEXTS, read_texts


class Recorder:
    """An encoder that keeps the rows that it is given, and their numbers."""

    def columns(self, columns, source):
        self.names = columns
        return columns

    def documents(self, rows, source, numbers):
        assert len(rows) == len(numbers)
        self.rows = rows
        self.numbers = list(numbers)


def encode(encoder, batch: dict, source: Source) -> list:
    """The documents of a batch as datasets gives it."""
    return encoder.documents(*sources.as_rows(batch, source, range(len(next(iter(batch.values()))))))


def read(path, recorder=None, **keys) -> list[dict]:
    """The rows of a source, as an encoder is given them."""
    recorder = recorder or Recorder()
    source = Source(path=str(path), **keys)
    rows = []
    for batch in sources.open_dataset(source, recorder).iter(1000):
        encode(recorder, batch, source)
        rows += recorder.rows
    return rows


# What can be read


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("names", "path", "keys"),
    [
        (["a.jsonl"], "a.jsonl", {}),
        (["a.parquet"], "a.parquet", {}),
        (["f/a.jsonl", "f/b.jsonl", "f/c.jsonl"], "f/*.jsonl", {}),
        (["f/a.parquet", "f/b.parquet"], "f/*.parquet", {}),
        (["f/a/b/c.jsonl", "f/d.jsonl"], "f/**/*.jsonl", {}),
        (["f/a.jsonl", "f/b.jsonl"], "f", {}),
        (["f/a.parquet", "f/b.parquet"], "f", {}),
        (["f/a.jsonl", "f/b.jsonl", "f/other.json"], "f", {"data_files": ["a.jsonl", "b.jsonl"]}),
        (["f/a.jsonl", "f/b.jsonl", "f/other.json"], "f", {"data_files": "?.jsonl"}),
        (["a.v1.jsonl"], "a.v1.jsonl", {"column": "body"}),
        (["a.parquet"], "a.parquet", {"column": "body"}),
    ],
)
def test_files_folders_and_globs_give_every_document_once(tmp_path, tokenizer, names, path, keys, streaming):
    wanted = [name for name in names if "other" not in name]
    for name in names:
        mine = ["other"] if "other" in name else TEXTS[wanted.index(name) :: len(wanted)]
        write(tmp_path / name, mine, keys.get("column", "text"))
    got = read_texts(tmp_path, tokenizer, path=tmp_path / path, streaming=streaming, **keys)
    assert sorted(got) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(("kind", "suffix"), [("parquet", ".parquet"), ("json", ".jsonl")])
def test_several_files_may_be_named_by_the_name_of_their_format(tmp_path, tokenizer, kind, suffix, streaming):
    files = []
    for i in range(2):
        files.append(str(write(tmp_path / f"{i}{suffix}", TEXTS[i::2])))
    got = read_texts(tmp_path, tokenizer, path=kind, data_files=files, streaming=streaming)
    assert sorted(got) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("path", ["f/*.txt", "f", "f/**/*.txt"])
def test_every_txt_file_is_one_document(tmp_path, tokenizer, path, streaming):
    for i, value in enumerate(TEXTS):
        write(tmp_path / "f" / f"{i}.txt", [value])
    got = read_texts(tmp_path, tokenizer, path=tmp_path / path, streaming=streaming)
    assert sorted(got) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_folder_of_data_may_hold_a_note(tmp_path, tokenizer, streaming):
    for i, value in enumerate(TEXTS):
        write(tmp_path / "f" / f"{i}.jsonl", [value])
    write(tmp_path / "f" / "LICENSE.txt", ["All rights given."])
    got = read_texts(tmp_path, tokenizer, path=tmp_path / "f", streaming=streaming)
    assert sorted(got) == sorted(TEXTS)


def test_a_split_can_be_a_slice_of_a_map_style_source(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", TEXTS)
    assert sorted(read_texts(tmp_path, tokenizer, path=path, split="train[:3]")) == TEXTS[:3]


NAMES = ["UPPER.JSONL", "lines.ndjson", "with [brackets] (v2).jsonl", "a*b.jsonl", "x.JSONL.GZ", "y.jsonl.zst"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whatever_its_name_looks_like(name, streaming, tmp_path):
    rows = b'{"text": "1 2"}\n{"text": "3"}\n'
    packers = {".gz": gzip.compress, ".zst": zstandard.compress}
    pack = packers.get(Path(name).suffix.lower(), bytes)
    (tmp_path / name).write_bytes(pack(rows))
    (tmp_path / "acb.jsonl").write_text('{"text": "another file, which a glob would find"}\n')
    assert [row["text"] for row in read(tmp_path / name, streaming=streaming)] == ["1 2", "3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_data_is_an_error_that_says_so(streaming, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match=r"empty\.jsonl, split train: .*no data"):
        read(tmp_path / "empty.jsonl", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_parquet_file_without_rows_among_others_does_not_matter(names, streaming, tmp_path):
    table = pa.table({"text": ["1 2", "3"]})
    for name, rows in zip(names, (0, 2), strict=True):
        pyarrow.parquet.write_table(table.slice(0, rows), tmp_path / f"{name}.parquet")
    assert [row["text"] for row in read(tmp_path, streaming=streaming)] == ["1 2", "3"]


# Columns under other names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_columns_are_read_under_the_names_that_a_source_gives_them(tmp_path, tokenizer, suffix, streaming):
    """GSM8K's rows as instruction and output, beside what the same rows give under lacuna's own names."""
    rows = {"question": ["1 + 1?", "2 + 2?"], "answer": ["2", "It is 4."], "topic": ["a", "b"]}
    own = dict(zip(("instruction", "output", "topic"), rows.values(), strict=True))
    documents = []
    for number, columns in enumerate((rows, own)):
        path = tmp_path / f"{number}{suffix}"
        table = pa.table(columns)
        if suffix == ".parquet":
            pa.parquet.write_table(table, path)
        elif suffix == ".csv":
            pa.csv.write_csv(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        fields = {"instruction": "question", "output": "answer"} if columns is rows else {}
        words = ["--data.sources", json.dumps([{"path": str(path), "streaming": streaming, "fields": fields}])]
        config = load_config(None, [*words, "--train.steps", "1", "--train.seq_len", "64"], "sft")
        [source] = config.data.sources
        encoder = make_encoder(config, tokenizer)
        [batch] = sources.open_dataset(source, encoder).iter(9)
        documents.append([ids.tolist() for ids, _ in encode(encoder, batch, source)])
    assert documents[0] == documents[1] and all(documents[0])


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("optional", [False, True])
def test_a_field_that_no_column_has_is_one_sentence(tmp_path, tokenizer, suffix, streaming, optional):
    """Though it is one that a row may lack: without it the run would train on something else."""
    rows = {"question": ["1 + 1?"], "context": ["Numbers."], "answer": ["2"]}
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pa.parquet.write_table(pa.table(rows), path)
    elif suffix == ".csv":
        pa.csv.write_csv(pa.table(rows), path)
    else:
        path.write_text(json.dumps({name: values[0] for name, values in rows.items()}))
    fields = {"instruction": "question", "output": "answer", "input": "context"}
    fields |= {"input": "contxt"} if optional else {"instruction": "quest"}
    source = {"path": str(path), "streaming": streaming, "fields": fields}
    config = load_config(None, ["--data.sources", json.dumps(source), "--train.steps", "1"], "sft")
    encoder = make_encoder(config, tokenizer)
    with pytest.raises(ConfigError, match=rf"a{re.escape(suffix)}.*(contxt|quest)") as caught:
        next(iter(sources.open_dataset(config.data.sources[0], encoder)))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_are_one_short_sentence(tmp_path, tokenizer):
    write(tmp_path / "f" / "a.jsonl", TEXTS)
    with pytest.raises(ConfigError, match=r"nope\.jsonl") as caught:
        read_texts(tmp_path, tokenizer, path=tmp_path / "f", data_files="nope.jsonl")
    assert len(str(caught.value)) < 500


# What rows say


ROWS = [
    {"day": "2026-05-01", "calls": {"city": "Köln", "days": None}, "id": 7, "text": "a\u2028b"},
    {"day": "2026-05-01T10:00:00Z", "calls": {}, "id": "seven", "extra": [1, "x", None]},
    {"day": None, "calls": None, "id": 1.5, "text": "\U0001f600"},
]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "form",
    [
        "lines.jsonl",
        "lines.ndjson",
        "lines.json",
        "list.json",
        "bom.jsonl",
        "lines.jsonl.gz",
        "bom.jsonl.gz",
        "bom.json",
    ],
)
def test_a_row_of_json_is_what_python_reads_there(tmp_path, form, streaming):
    """Nulls, dates, rows of different keys, a key of different types: Arrow keeps none of them."""
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    content = json.dumps(ROWS, indent=2) if form == "list.json" else lines
    if form.startswith("bom"):  # of two files of Windows, one after the other
        content = "\ufeff" + content.replace("\n\n", "\n\n\ufeff", 1)
    data = content.encode()
    (tmp_path / form).write_bytes(gzip.compress(data) if form.endswith(".gz") else data)
    assert read(tmp_path / form, streaming=streaming) == ROWS


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_files_of_a_folder_need_not_have_the_same_keys(tmp_path, streaming):
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    assert read(tmp_path, streaming=streaming) == ROWS


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_words_that_mean_missing_to_pandas_are_words(tmp_path, streaming):
    words = ["None", "NA", "null", "nan", "n/a", "hello"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(words) + "\n")
    assert read(tmp_path / "a.csv", streaming=streaming) == [{"text": word} for word in words]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_cells_of_csv_are_text_as_they_stand(tmp_path, streaming):
    """Python's csv is the reference; pandas guesses types by 10,000 rows, and an index where rows are long."""
    rows = [{"text": "word one", "n": "1"}] * 10_001
    rows += [{"text": text, "n": ""} for text in ("00501", "1.50", "True", 'two\nlines, "quoted"', "long " * 40_000)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "n"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "b.csv").write_text("text\n00501\n")
    assert read(tmp_path / "a.csv", streaming=streaming) == rows
    assert read(tmp_path / "b.csv", streaming=streaming) == [{"text": "00501"}]


@pytest.mark.parametrize("content", ["text\nHello, how are you\n", "prompt,completion\nQ1 ,A1,\n", 'text\n"open\n'])
def test_csv_whose_rows_do_not_fit_its_header_is_refused_with_the_file(tmp_path, tokenizer, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.csv.*(more cells than the header|unexpected end)"):
        read_texts(tmp_path, tokenizer, path=tmp_path / "a.csv")


def test_files_of_two_kinds_under_data_files_are_each_read_as_what_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text\n one \n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.json").write_text('[{"text": "four"}]')
    rows = read(tmp_path, data_files=["a.csv", "b.jsonl", "c.json"])
    assert sorted(row["text"] for row in rows) == [" one ", "four", "three", "two"]


def test_a_text_file_of_windows_has_no_bom_in_it(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("A text.", "utf-8-sig")
    assert read_texts(tmp_path, tokenizer, path=tmp_path / "a.txt") == ["A text."]


def test_a_file_of_another_kind_asks_no_hub_and_names_the_kinds(tmp_path, tokenizer):
    (tmp_path / "a.tsv").write_text("text\nA text.\n")
    with pytest.raises(ConfigError, match=r"a\.tsv is none of \.parquet.*\.jsonl"):
        read_texts(tmp_path, tokenizer, path=tmp_path / "a.tsv")


DAMAGES = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "foreign": lambda file: file.write_bytes(b"\0x" * 300),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_token_cache_is_made_anew(tmp_path, tokenizer, damage):
    (tmp_path / "a.txt").write_text("A text.")
    assert read_texts(tmp_path, tokenizer, path=tmp_path / "a.txt") == ["A text."]
    [cached] = (tmp_path / "cache").glob("*.arrow")
    whole = cached.read_bytes()
    DAMAGES[damage](cached)
    assert read_texts(tmp_path, tokenizer, path=tmp_path / "a.txt") == ["A text."]
    assert cached.read_bytes() == whole


def test_a_row_is_numbered_as_its_line_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    recorder = Recorder()
    read(tmp_path / "a.jsonl", recorder)
    assert recorder.numbers == [0, 2]


BROKEN = ['{"text": "a"', '{"text": "a"} {"text": "b"}', "hello", "3"]


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("place", [1, 500])
def test_a_line_that_is_no_row_is_named_by_file_and_number(tmp_path, tokenizer, line, place):
    lines = ['{"text": "a"}'] * 1000
    lines[place] = line
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"a\.jsonl, row {place}: no row of JSON") as caught:
        read_texts(tmp_path, tokenizer, path=tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_one_sentence(tmp_path, tokenizer):
    """As a text that was cut in the midst of an emoji; a whole one is a letter like others."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_texts(tmp_path, tokenizer, path=path) == ["\U0001f600"]
    path.write_text('{"text": "a"}\n{"text": "cut off \\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: row 1 of 'text' holds no text: UnicodeEncodeError: [^\n]+$"):
        read_texts(tmp_path, tokenizer, path=path)
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\uD83D"}\n')
    words = ["--data.sources", json.dumps({"path": str(path)}), "--train.steps", "1"]
    config = load_config(None, words, "sft")
    encoder = make_encoder(config, tokenizer)
    [source] = config.data.sources
    with pytest.raises(ConfigError, match=r"a\.jsonl, row 1, read as prompt and completion: [^\n]+$"):
        sources.tokenise(source, encoder, str(tmp_path / "cache"))


def test_bytes_that_are_no_utf_8_are_refused_with_the_file(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.jsonl.*utf-8"):
        read_texts(tmp_path, tokenizer, path=tmp_path / "a.jsonl")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_null_in_the_arguments_of_a_call_is_trained(tmp_path, tokenizer, streaming):
    call = {"type": "function", "function": {"name": "set", "arguments": {"key": "a", "value": None}}}
    messages = [{"role": "user", "content": "Unset it."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    words = ["--data.sources", json.dumps([{"path": str(path), "streaming": streaming}]), "--train.steps", "1"]
    config = load_config(None, words, "sft")
    [source] = config.data.sources
    tokenizer.chat_template = QWEN3
    encoder = make_encoder(config, tokenizer)
    [batch] = sources.open_dataset(source, encoder).iter(9)
    [document] = encode(encoder, batch, source)
    ids, trained = reveal(document.ids)
    assert '"arguments": {"key": "a", "value": null}' in tokenizer.decode(ids[trained])


def test_nulls_that_arrow_fills_in_are_no_keys_where_a_dataset_is_mapped():
    """There a batch is no dict, but reads its columns when they are asked for."""
    rows = [{"messages": [{"a": 1}]}, {"messages": [{"b": 2}]}]
    got = []

    def encode(batch):
        got.extend(sources.as_rows(batch, Source(path="some.parquet"), range(2))[0])

    datasets.Dataset.from_list(rows).map(encode, batched=True, new_fingerprint="any")
    assert got == rows


def test_a_column_that_the_format_does_not_have_changes_nothing(tmp_path, tokenizer):
    """A prompt and a completion beside messages, of the same words: the messages are what is rendered."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer.chat_template = QWEN3
    documents = []
    for name, more in (("a", {}), ("b", {"prompt": "Hi", "completion": "Hello"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"messages": turns} | more))
        config = load_config(None, ["--data.sources", json.dumps({"path": str(path)}), "--train.steps", "1"], "sft")
        [source] = config.data.sources
        encoder = make_encoder(config, tokenizer)
        [batch] = sources.open_dataset(source, encoder).iter(9)
        [document] = encode(encoder, batch, source)
        documents.append(document.ids.tolist())
    assert documents[0] == documents[1]


# Which files of a folder


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_no_word_in_a_name_leaves_a_file_out_but_that_of_another_split(tmp_path, tokenizer, suffix, streaming):
    names = ["train_x", "more", "sub/training notes", "UPPER", "with [brackets]"]
    for name, words in zip(names, TEXTS, strict=False):
        path = write(tmp_path / "f" / f"{name}{suffix}", [words])
        if name == "UPPER":
            path.rename(path.with_suffix(suffix.upper()))
    held_out = write(tmp_path / "f" / f"test-00000{suffix}", ["held out"])
    (tmp_path / "f" / ".ipynb_checkpoints").mkdir()
    write(tmp_path / "f" / ".ipynb_checkpoints" / f"more{suffix}", ["an old copy"])
    with lacuna_log() as messages:
        got = read_texts(tmp_path, tokenizer, path=tmp_path / "f", streaming=streaming)
    assert sorted(got) == sorted(TEXTS[: len(names)])
    assert any("not read for split train" in message and str(held_out) in message for message in messages)
    got = read_texts(tmp_path, tokenizer, path=tmp_path / "f", streaming=streaming, split="test")
    assert got == ["held out"]


def test_a_folder_of_another_split_alone_is_not_trained_on(tmp_path, tokenizer):
    write(tmp_path / "f" / "wiki_valid.txt", ["held out"])
    with pytest.raises(ConfigError, match=r"split train: .*'validation'"):
        read_texts(tmp_path, tokenizer, path=tmp_path / "f")
    assert read_texts(tmp_path, tokenizer, path=tmp_path / "f", split="validation") == ["held out"]


def test_what_a_readme_says_of_a_folder_counts(tmp_path, tokenizer):
    for name, words in zip(["a", "b"], TEXTS, strict=False):
        write(tmp_path / "f" / f"{name}.jsonl", [words])
    (tmp_path / "f" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    with lacuna_log() as messages:
        assert read_texts(tmp_path, tokenizer, path=tmp_path / "f") == TEXTS[:1]
    assert any("not read for split train" in message and "b.jsonl" in message for message in messages)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("path", ["link", "f/../f", "f/", "link/sub/.."])
def test_a_folder_by_another_path_is_read_once_and_without_its_test_split(tmp_path, tokenizer, path, streaming):
    for name, words in zip(["a", "sub/b", "train_c"], TEXTS, strict=False):
        write(tmp_path / "f" / f"{name}.jsonl", [words])
    write(tmp_path / "f" / "test-0.jsonl", ["held out"])
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "d.jsonl", [TEXTS[3]])
    (tmp_path / "f" / "d").symlink_to(tmp_path / "other")
    got = read_texts(tmp_path, tokenizer, path=f"{tmp_path}/{path}", streaming=streaming)
    assert sorted(got) == sorted(TEXTS[:4])


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("first", ["lines", "list"])
def test_lines_and_lists_of_json_in_one_folder_are_both_read(tmp_path, tokenizer, first, streaming):
    names = {"lines": ["a.jsonl", "b.json"], "list": ["b.jsonl", "a.json"]}[first]
    write(tmp_path / "f" / names[0], TEXTS[:3])
    (tmp_path / "f" / names[1]).write_text(json.dumps([{"text": words} for words in TEXTS[3:]], indent=2))
    assert sorted(read_texts(tmp_path, tokenizer, path=tmp_path / "f", streaming=streaming)) == sorted(TEXTS)


def test_files_of_another_kind_are_named_where_they_are_not_read(tmp_path, tokenizer):
    write(tmp_path / "f" / "a.jsonl", TEXTS[:1])
    write(tmp_path / "f" / "b.jsonl", TEXTS[1:2])
    other = write(tmp_path / "f" / "c.parquet", TEXTS[2:3])
    with lacuna_log() as messages:
        assert sorted(read_texts(tmp_path, tokenizer, path=tmp_path / "f")) == sorted(TEXTS[:2])
    assert any("not read for split train" in message and str(other) in message for message in messages)


def test_a_kind_that_datasets_alone_knows_is_left_to_it(tmp_path, tokenizer):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.tsv").write_text("text\tmore\nhello\t1\n")
    assert read_texts(tmp_path, tokenizer, path=tmp_path / "f") == ["hello"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_blank_lines_between_chats_are_no_chats(tmp_path, tokenizer, streaming):
    """More of them than a stream reads at a time."""
    chat = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "a.jsonl"
    path.write_text(f"{chat}\n" * 128 + "\n" * 300 + f"{chat}\n")
    words = ["--data.sources", json.dumps({"path": str(path), "streaming": streaming}), "--train.steps", "1"]
    config = load_config(None, words, "sft")
    encoder = make_encoder(config, tokenizer)
    [source] = config.data.sources
    counts = [len(encode(encoder, batch, source)) for batch in sources.open_dataset(source, encoder).iter(128)]
    assert sum(counts) == 129


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("content", ["", "[]", " \n"])
def test_a_json_file_without_rows_has_no_data(tmp_path, tokenizer, content, streaming):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json, split train: .*no data"):
        read_texts(tmp_path, tokenizer, path=tmp_path / "a.json", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_what_save_to_disk_wrote_is_read(tmp_path, tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": "a cache of datasets' own"})
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        got = read_texts(tmp_path, tokenizer, path=tmp_path / name, streaming=streaming)
        assert sorted(got) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_splits_that_save_to_disk_wrote_keep_their_names(tmp_path, tokenizer, streaming):
    """What is held out in a split of any name is not trained."""
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train_sft", "train", "holdout")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    for name in parts:
        got = read_texts(tmp_path, tokenizer, path=tmp_path / "d", streaming=streaming, split=name)
        assert got == [name]


@pytest.mark.parametrize("split", ["train[:50%]", "train[:1]", "train[:1]+train[2:]"])
@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_a_slice_of_a_file_that_is_read_whole_is_refused(tmp_path, tokenizer, name, split):
    """datasets would count files, and give all rows, or none."""
    content = {"a.csv": "text\na\nb\nc\n", "a.json": '[{"text": "a"}, {"text": "b"}, {"text": "c"}]'}
    (tmp_path / name).write_text(content[name])
    with pytest.raises(ConfigError, match=f"{name}: slices need .jsonl, or see eval.fraction"):
        read_texts(tmp_path, tokenizer, path=tmp_path / name, split=split)


@pytest.mark.parametrize("pattern", ["*", "*.json*", "a.*"])
def test_a_glob_without_an_ending_asks_no_hub_and_names_the_kinds(tmp_path, tokenizer, pattern):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(ConfigError, match=r"is none of \.parquet, "):
        read_texts(tmp_path, tokenizer, path=tmp_path / pattern)
