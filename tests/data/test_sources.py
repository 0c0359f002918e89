"""Sources: what can be read, what is refused, when the token cache holds, and that a stream resumes anywhere."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from transformers import AutoTokenizer

from lacuna.config import ConfigError
from lacuna.data import sources
from lacuna.data.loader import RowDataset
from lacuna.data.sources import Cursor
from lacuna.data.tokenize import TextEncoder

from .corpora import FIRST, lacuna_log, make_config, make_source, number_tokenizer, text, write, write_shards

TEXTS = [f"Document {i}: naïve café 😀\nand a second line." for i in range(7)]

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["lacuna.data.loader"])


class CountingEncoder(TextEncoder):
    """Counts the texts that it encodes; `delay` seconds a call; raises at call `fail_at`."""

    def __init__(self, tokenizer, delay: float = 0.0, fail_at: int | None = None):
        super().__init__(tokenizer)
        self.texts, self.calls, self.delay, self.fail_at = 0, 0, delay, fail_at

    def encode(self, texts):
        self.calls += 1
        self.texts += len(texts)
        time.sleep(self.delay)
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return super().encode(texts)


def open_source(folder, encoder, *given: dict, **keys):
    """The MapSource or StreamSource of these sources, as a run makes it."""
    config = make_config(folder, *given, **keys)
    return RowDataset(config, config.data.sources, encoder, rank=0, ranks=1).sources[0]


class Reader:
    """What one virtual stream reads of a source, and always its next document, from the beginning or from a state."""

    def __init__(self, source, stream: int = 0, streams: int = 1, state: dict | None = None):
        self.source = source
        self.reader = source.read(stream, streams, Cursor(**(state or {})))
        self.ahead = next(self.reader)

    def next(self) -> tuple:
        document, self.ahead = self.ahead, next(self.reader)
        return document.length, document.key

    @property
    def epoch(self) -> int:
        return int(self.ahead.epoch)

    def state(self) -> dict:
        return self.ahead.cursor._asdict()


def drain(reader) -> list[list[int]]:
    """The documents of a reader up to the end of its epoch."""
    documents, epoch = [], reader.epoch
    while reader.epoch == epoch:
        length, document = reader.next()
        tokens = reader.source.load(document).tolist()
        assert len(tokens) == length
        documents.append(tokens)
    return documents


def read_texts(folder, tokenizer, **source) -> list[str]:
    """The texts of a source after one epoch, decoded from its tokens."""
    opened = open_source(folder, TextEncoder(tokenizer), make_source(**source))
    tokens = drain(Reader(opened))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokens)
    return [tokenizer.decode(ids[:-1]) for ids in tokens]


def test_several_map_style_sources_are_one_of_all_their_documents(tmp_path, tokenizer):
    paths = [write(tmp_path / "a.jsonl", TEXTS[:3]), write(tmp_path / "b.parquet", TEXTS[3:])]
    opened = open_source(tmp_path, TextEncoder(tokenizer), *(make_source(path) for path in paths))
    got = [tokenizer.decode(ids[:-1]) for ids in drain(Reader(opened))]
    assert sorted(got) == TEXTS


# What is refused, and how


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"path": "nowhere*.jsonl"}, ["nowhere*.jsonl"]),
        ({"path": "nowhere"}, ["nowhere"]),
        ({"path": "a.jsonl", "column": "body"}, ["a.jsonl", "no column 'body'", "text"]),
        ({"path": "a.parquet", "column": "body"}, ["a.parquet", "no column 'body'", "text"]),
        ({"path": "numbers.jsonl"}, ["numbers.jsonl", "'text'", "no text: TypeError: int"]),
        ({"path": "numbers.parquet"}, ["numbers.parquet", "'text'", "no text: TypeError: int"]),
        ({"path": "lists.jsonl"}, ["lists.jsonl", "'text'", "no text: TypeError: list"]),
        ({"path": "a.jsonl", "split": "test"}, ["a.jsonl", "test"]),
        ({"path": "nothing.jsonl"}, ["nothing.jsonl", "no"]),
        ({"path": "blank.jsonl"}, ["blank.jsonl", "no"]),
    ],
)
def test_bad_data_is_refused_in_one_sentence_that_names_it(tmp_path, tokenizer, keys, words, streaming):
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "a.parquet", TEXTS)
    write(tmp_path / "numbers.jsonl", [1, 2, 3])
    sources.datasets.Dataset.from_dict({"text": [1, 2, 3]}).to_parquet(tmp_path / "numbers.parquet")
    write(tmp_path / "lists.jsonl", [["a"], ["b"]])
    write(tmp_path / "nothing.jsonl", [])
    write(tmp_path / "blank.jsonl", ["", None, ""])
    with pytest.raises(ConfigError) as caught:
        read_texts(tmp_path, tokenizer, **keys | {"path": tmp_path / keys["path"], "streaming": streaming})
    message = str(caught.value)
    assert "data.sources" in message
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_null_and_empty_texts_are_dropped_and_counted(tmp_path, tokenizer):
    mixed = ["", TEXTS[0], None, TEXTS[1], "", TEXTS[2]]
    path = write(tmp_path / "a.jsonl", mixed)
    with lacuna_log() as messages:
        got = read_texts(tmp_path, tokenizer, path=path)
    assert sorted(got) == TEXTS[:3]
    assert any(str(path) in message and "3 of 6 documents" in message for message in messages), messages
    with lacuna_log() as messages:
        read_texts(tmp_path, tokenizer, path=path)
    assert any("3 of 6 documents" in message for message in messages), "not reported where the cache is reused"
    assert sorted(read_texts(tmp_path, tokenizer, path=path, streaming=True)) == TEXTS[:3]


# The token cache


def cached(folder, encoder, path, **keys) -> list[list[int]]:
    return drain(Reader(open_source(folder, encoder, make_source(path, **keys))))


def test_the_token_cache_is_used_again(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", TEXTS)
    first, second = CountingEncoder(tokenizer), CountingEncoder(AutoTokenizer.from_pretrained(tokenizer.name_or_path))
    assert cached(tmp_path, first, path) == cached(tmp_path, second, path)
    assert (first.texts, second.calls) == (len(TEXTS), 0)
    assert list((tmp_path / "cache").glob("*.arrow"))


def test_changed_data_is_tokenised_anew(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", TEXTS)
    cached(tmp_path, CountingEncoder(tokenizer), path)
    size, times = path.stat().st_size, path.stat()
    write(path, [value.replace("café", "café"[::-1]) for value in TEXTS])
    assert path.stat().st_size == size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    again = CountingEncoder(tokenizer)
    tokens = cached(tmp_path, again, path)
    assert again.texts == len(TEXTS)
    assert all("éfac" in tokenizer.decode(ids) for ids in tokens)


def test_a_changed_tokenizer_column_split_or_file_tokenises_anew(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": value, "body": value[::-1]}) + "\n" for value in TEXTS))
    other = write(tmp_path / "b.jsonl", [value.upper() for value in TEXTS])
    cached(tmp_path, CountingEncoder(tokenizer), path)
    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.add_tokens(["café"])
    another_eos = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="<|im_end|>")
    for encoder, given, keys in [
        (CountingEncoder(changed), path, {}),
        (CountingEncoder(another_eos), path, {}),
        (CountingEncoder(tokenizer), path, {"column": "body"}),
        (CountingEncoder(tokenizer), path, {"split": "train[:5]"}),
        (CountingEncoder(tokenizer), other, {}),
    ]:
        tokens = cached(tmp_path, encoder, given, **keys)
        assert encoder.texts == len(tokens) > 0, keys
    unchanged = CountingEncoder(tokenizer)
    cached(tmp_path, unchanged, path)
    assert unchanged.calls == 0


def test_a_tokenisation_that_was_cut_off_is_not_taken_for_whole(tmp_path, tokenizer):
    many = [f"Document {i}" for i in range(2500)]  # datasets maps batches of 1,000
    path = write(tmp_path / "a.jsonl", many)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, CountingEncoder(tokenizer, fail_at=2), path)
    encoder = CountingEncoder(tokenizer)
    assert len(cached(tmp_path, encoder, path)) == encoder.texts == len(many)


BARRIER = None  # set in each of the two processes


def set_barrier(barrier):
    global BARRIER
    BARRIER = barrier


def tokenise_in_a_process(folder, path, tokenizer) -> tuple[int, list]:
    """Texts that this process tokenised, and the tokens."""
    sources.datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    sources.datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    encoder = CountingEncoder(tokenizer, delay=0.2)
    BARRIER.wait(timeout=60)
    tokens = cached(folder, encoder, path)
    return encoder.texts, tokens


def test_two_processes_at_once_make_the_cache_once(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"Document {i}" for i in range(2500)])
    barrier = FORKSERVER.Barrier(2)
    with ProcessPoolExecutor(2, FORKSERVER, set_barrier, (barrier,)) as pool:
        futures = [pool.submit(tokenise_in_a_process, tmp_path, path, tokenizer) for _ in range(2)]
        (texts_of_one, one), (texts_of_two, two) = [future.result(timeout=90) for future in futures]
    assert sorted([texts_of_one, texts_of_two]) == [0, 2500]
    assert one == two
    assert len(one) == 2500
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


# Cursors


def numbered(shard_sizes: list[int]) -> list[list[list[int]]]:
    """For each shard its documents, of 1 to 3 tokens that are nowhere else."""
    token, shards = FIRST, []
    for size in shard_sizes:
        shards.append([])
        for _ in range(size):
            length = 1 + token % 3
            shards[-1].append(list(range(token, token + length)))
            token += length
    return shards


def write_numbered(folder, shards, suffix=".jsonl") -> str:
    for i, documents in enumerate(shards):
        write(folder / f"{i}{suffix}", [text(document) for document in documents])
    return str(folder / f"*{suffix}")


@pytest.fixture(scope="module")
def numbers():
    return TextEncoder(number_tokenizer(4000))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("chunk", "streams", "stream"),
    [(3, 1, 0), (4, 2, 1), (3, 4, 2), (128, 2, 0)],
    ids=["one stream", "two streams", "as many streams as shards", "chunks longer than shards"],
)
def test_a_stream_resumes_at_every_document(tmp_path, numbers, monkeypatch, suffix, chunk, streams, stream):
    """Across the ends of chunks, shards and epochs; with a state that was written as JSON."""
    monkeypatch.setattr(sources, "READ_CHUNK", chunk)
    path = write_numbered(tmp_path / "shards", numbered([6, 1, 5, 3]), suffix)
    source = open_source(tmp_path, numbers, make_source(path, streaming=True))
    reader = Reader(source, stream, streams)
    states, whole = [], []
    while reader.epoch < 3:
        states.append(json.dumps(reader.state()))
        whole.append((reader.next()[1].tolist(), reader.epoch))
    another = open_source(tmp_path, numbers, make_source(path, streaming=True))  # as after a restart
    for i, state in enumerate(states):
        resumed = Reader((source, another)[i % 2], stream, streams, json.loads(state))
        following = [(resumed.next()[1].tolist(), resumed.epoch) for _ in whole[i : i + 12]]
        assert following == whole[i : i + 12], f"resumed before document {i}"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("chunk", [3, 128])
def test_a_stream_resumes_from_the_state_of_a_resumed_stream(tmp_path, numbers, monkeypatch, suffix, chunk):
    """At every document, with no, one or two documents read in between."""
    monkeypatch.setattr(sources, "READ_CHUNK", chunk)
    path = write_numbered(tmp_path / "shards", numbered([6, 1, 5, 3]), suffix)
    source = open_source(tmp_path, numbers, make_source(path, streaming=True))
    reader, whole = Reader(source), []
    states = []
    for _ in range(40):
        states.append(reader.state())
        whole.append(reader.next()[1].tolist())
    for i, state in enumerate(states[:30]):
        second = Reader(source, state=state)
        assert [second.next()[1].tolist() for _ in range(i % 3)] == whole[i : i + i % 3]
        third = Reader(source, state=second.state())
        at = i + i % 3
        assert [third.next()[1].tolist() for _ in range(8)] == whole[at : at + 8], f"resumed at {i}, then at {at}"


def test_a_stream_resumes_in_the_middle_of_large_shards(tmp_path, numbers):
    """At the real chunk size, over documents without text, twice in a row."""
    shards = numbered([300, 500])
    texts = [[text(document) if i % 7 else "" for i, document in enumerate(shard)] for shard in shards]
    for i, values in enumerate(texts):
        write(tmp_path / "shards" / f"{i}.parquet", values)
    source = open_source(tmp_path, numbers, make_source(tmp_path / "shards" / "*.parquet", streaming=True))
    reader = Reader(source)
    whole = [reader.next()[1].tolist() for _ in range(1500)]
    for first, second in [(1, 1), (110, 3), (127, 130), (256, 300), (430, 400), (685, 1), (686, 700)]:
        one = Reader(source)
        assert [one.next()[1].tolist() for _ in range(first)] == whole[:first]
        two = Reader(source, state=one.state())
        assert [two.next()[1].tolist() for _ in range(second)] == whole[first : first + second]
        three = Reader(source, state=two.state())
        assert [three.next()[1].tolist() for _ in range(50)] == whole[first + second : first + second + 50]


@pytest.mark.parametrize("streams", [1, 2, 3, 5])
def test_every_document_is_read_exactly_once_an_epoch_over_all_streams(tmp_path, numbers, streams):
    shards = numbered([9, 4, 7, 6, 3])
    path = write_numbered(tmp_path / "shards", shards)
    source = open_source(tmp_path, numbers, make_source(path, streaming=True))
    assert source.num_shards == source.most_streams == len(shards)
    readers = [Reader(source, stream, streams) for stream in range(streams)]
    expected = sorted([*document, 0] for shard in shards for document in shard)
    for _ in range(3):
        assert sorted(document for reader in readers for document in drain(reader)) == expected


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_every_document_of_a_map_style_source_is_read_once_an_epoch_over_all_streams(tmp_path, numbers, streams):
    documents = [document for shard in numbered([30]) for document in shard]
    path = write_shards(tmp_path / "shards", documents, 2)
    source = open_source(tmp_path, numbers, make_source(path))
    readers = [Reader(source, stream, streams) for stream in range(streams)]
    epochs = []
    for _ in range(3):
        epochs.append([document for reader in readers for document in drain(reader)])
        assert sorted(epochs[-1]) == sorted([*document, 0] for document in documents)
    assert epochs[0] != epochs[1] != epochs[2], "every epoch has an order of its own"
    for reader in readers:
        reader.next()
        state = json.loads(json.dumps(reader.state()))
        resumed = Reader(source, readers.index(reader), streams, state)
        assert [resumed.next() for _ in range(40)] == [reader.next() for _ in range(40)]


def test_the_order_follows_the_seed_alone(tmp_path, numbers):
    path = write_numbered(tmp_path / "shards", numbered([5] * 6))
    for streaming in (False, True):
        orders = []
        for seed in (0, 0, 1):
            config = make_config(tmp_path, make_source(path, streaming=streaming)).model_copy(update={"seed": seed})
            source = RowDataset(config, config.data.sources, numbers, rank=0, ranks=1).sources[0]
            reader = Reader(source)
            orders.append([drain(reader), drain(reader)])
        assert orders[0] == orders[1] != orders[2]
        assert orders[0][0] != orders[0][1], "every epoch has an order of its own"


def test_there_are_no_more_streams_than_shards_or_documents_of_any_source(tmp_path, numbers):
    few = make_source(write_numbered(tmp_path / "few", numbered([3])), weight=1.0)
    shards = make_source(write_numbered(tmp_path / "shards", numbered([2] * 5)), weight=1.0, streaming=True)
    many = make_source(write_numbered(tmp_path / "many", numbered([1] * 70)), streaming=True)
    for given, streams in (([shards], 5), ([few, shards], 3), ([few], 1), ([many], 64)):
        config = make_config(tmp_path, *given)
        assert RowDataset(config, config.data.sources, numbers, rank=0, ranks=1).num_streams == streams
