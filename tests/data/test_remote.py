"""Parquet shards over http:// and s3://, as a run reads them: the same rows for all ranks, nothing fetched twice."""

import gzip
import json
import re
import socket
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import aiohttp
import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lacuna.config import ConfigError
from lacuna.data import sources
from lacuna.data.loader import Loader, RowDataset
from lacuna.data.tokenize import TextEncoder

from .corpora import EOS, FIRST, lacuna_log, make_config, make_source, number_tokenizer, text

SHARDS, SEQ_LEN, ROWS = 8, 64, 8
FOOTER = 65536  # bytes that Arrow reads first, at a file's end
DOCUMENTS = [list(range(FIRST + 20 * i, FIRST + 20 * i + 5 + i % 16)) for i in range(480)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Eight files of three row groups and some 300 kB each, most of them in a column that no one needs."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(SHARDS):
        texts = [text(document) for document in DOCUMENTS[i::SHARDS]]
        padding = [bytes((7 * j + i) % 256 for j in range(2000)).hex() + str(k) for k in range(len(texts))]
        table = pa.table({"text": texts, "padding": padding})
        pq.write_table(
            table, folder / f"shard-{i}.parquet", row_group_size=20, compression="none", use_dictionary=False
        )
        pairs = [{"text": t, "padding": p} for t, p in zip(texts, padding, strict=True)]
        (folder / f"shard-{i}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(number_tokenizer())


@pytest.fixture
def server(shards):
    """An http server with ranges; `server.log` has (who, method, file, first byte, bytes) of every request.

    `server.who` is whoever is asking just now; `server.fault(file)` says what goes wrong with a request.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.strip("/")
            body = (shards / name).read_bytes() if name else listing(shards)
            if name and not (shards / name).is_file():
                return self.send_error(404)
            fault = server.fault(name) if self.command == "GET" else None
            if fault == "busy":
                return self.send_error(503)
            if fault == "gone":
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault == "silent":
                return server.stopped.wait(60)
            begin, end = 0, len(body)
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked:
                begin = int(asked[1]) if asked[1] else len(body) - int(asked[2])
                end = min(end, int(asked[2]) + 1) if asked[1] and asked[2] else end
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Type", "application/octet-stream" if name else "text/html")
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            if self.command == "GET":
                server.log.append((server.who, name, begin, end - begin))
                self.wfile.write(body[begin:end] if fault is None else body[begin : (begin + end) // 2])
                if fault == "cut":
                    self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.log, server.who, server.fault = [], None, lambda name: None
    server.stopped = Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fsspec.filesystem("http").clear_instance_cache()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


def listing(folder: Path) -> bytes:
    return "".join(f'<a href="{file.name}">{file.name}</a>\n' for file in sorted(folder.iterdir())).encode()


@pytest.fixture
def s3(shards, monkeypatch):
    """A bucket of a local server, known through the environment alone; returns the address of the files."""
    boto3 = pytest.importorskip("boto3")
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    for file in shards.iterdir():
        client.upload_file(str(file), "corpus", f"web/{file.name}")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://corpus/web/*.parquet"
    s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


def open_loader(config, encoder, rank=0, ranks=1, **limits) -> Loader:
    dataset = RowDataset(config, config.data.sources, encoder, rank=rank, ranks=ranks, **limits)
    return Loader(config, dataset, torch.device("cpu"))


def read(config, encoder, ranks: int, steps: int, server=None, state=None, **limits) -> list[tuple]:
    """The rows of these steps in the order of the run, the ranks read one after the other."""
    rows = {}
    for rank in range(ranks):
        if server:
            server.who = (ranks, rank)
            fsspec.filesystem("http").clear_instance_cache()
        loader = open_loader(config, encoder, rank, ranks, state=state, **limits)
        for i, batch in enumerate(batch for _ in range(steps) for batch in loader.step()):
            for j in range(config.train.micro_batch_size):
                part = slice(j * SEQ_LEN, (j + 1) * SEQ_LEN)
                row = batch.input_ids[part].tolist(), batch.labels[part].tolist()
                rows[(i * config.train.micro_batch_size + j) * ranks + rank] = row
        loader.close()
    return [rows[p] for p in range(len(rows))]


def document_starts(rows) -> Counter:
    starts = {document[0] for document in DOCUMENTS}
    return Counter(token for ids, _ in rows for token in ids if token in starts)


ONCE = Counter(document[0] for document in DOCUMENTS)
EPOCH_STEPS = sum(len(document) + 1 for document in DOCUMENTS) // SEQ_LEN // ROWS + 12


def test_http_shards_are_read_in_the_same_order_by_1_2_and_4_ranks(tmp_path, encoder, server):
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True))
    with lacuna_log() as messages:
        of_ranks = {ranks: read(config, encoder, ranks, 6, server) for ranks in (1, 2, 4)}
    assert of_ranks[1] == of_ranks[2] == of_ranks[4]
    assert messages == []
    assert max(document_starts(of_ranks[1]).values()) == 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_http_document_is_read_once_over_the_ranks(tmp_path, encoder, server, ranks):
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True))
    rows = read(config, encoder, ranks, EPOCH_STEPS, server, epochs=1)
    assert document_starts(rows) == ONCE
    targets = Counter(label for _, labels in rows for label in labels if label >= 0)
    expected = Counter(token for document in DOCUMENTS for token in document[1:]) + Counter({EOS: len(DOCUMENTS)})
    assert targets == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_http_shard_is_fetched_by_the_one_rank_that_owns_it(tmp_path, encoder, server, ranks, shards):
    """A rank may look at the footer of the first shard, where the columns stand: no more of what it does not own."""
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True))
    read(config, encoder, ranks, 4, server)
    sizes = {file.name: file.stat().st_size for file in shards.glob("*.parquet")}
    fetched, footers = defaultdict(Counter), set()
    for (_, rank), name, begin, size in server.log:
        if name and begin >= sizes[name] - FOOTER:
            footers.add((rank, name))
        elif name:
            fetched[name][rank] += size
    assert set(fetched) == set(sizes)
    owners = {name: list(of_ranks) for name, of_ranks in fetched.items()}
    assert {len(ranks_of_file) for ranks_of_file in owners.values()} == {1}, owners
    assert Counter(rank for (rank,) in owners.values()) == Counter(dict.fromkeys(range(ranks), SHARDS // ranks))
    assert all(name == "shard-0.parquet" or owners[name] == [rank] for rank, name in footers), footers
    total = sum(size for (_, _), name, _, size in server.log if name)
    assert total <= sum(sizes.values()) + FOOTER * (SHARDS + ranks), "data is fetched more than once"


def test_http_shards_are_read_map_style_too(tmp_path, encoder, server):
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet"), steps=None, epochs=1)
    rows = read(config, encoder, 1, EPOCH_STEPS, epochs=1)
    assert document_starts(rows) == ONCE
    asked = len(server.log)
    assert read(config, encoder, 2, EPOCH_STEPS, epochs=1) == rows
    assert not any(size > FOOTER for _, _, _, size in server.log[asked:]), "downloaded again"


def test_a_run_over_http_resumes_exactly(tmp_path, encoder, server):
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True))
    whole = read(config, encoder, 1, 6)
    loader = open_loader(config, encoder)
    for _ in range(3):
        loader.step()
    state = loader.state
    loader.close()
    assert read(config, encoder, 2, 3, state=state) == whole[3 * ROWS :]


def test_csv_that_streams_from_a_server_is_refused_and_not_called_missing(tmp_path, encoder, server):
    for name in ("a.csv", "a.CSV.gz"):
        config = make_config(tmp_path, make_source(f"{server.url}/{name}", streaming=True))
        with pytest.raises(ConfigError, match="CSV needs streaming = false"):
            RowDataset(config, config.data.sources, encoder, rank=0, ranks=1)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_url_that_is_not_there_is_refused_by_name(tmp_path, encoder, server, streaming):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    for url in (f"{server.url}/nowhere.parquet", f"http://127.0.0.1:{port}/a.parquet"):
        config = make_config(tmp_path, make_source(url, streaming=streaming))
        with pytest.raises(ConfigError) as caught:
            RowDataset(config, config.data.sources, encoder, rank=0, ranks=1)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_s3_is_read_with_credentials_and_endpoint_of_the_environment(tmp_path, encoder, shards, s3, streaming):
    """As the local files are: the same rows for 1 and 2 ranks, every document once."""
    rows = {}
    for ranks, path in [(1, s3), (2, s3), (1, str(shards / "*.parquet"))]:
        config = make_config(tmp_path, make_source(path, streaming=streaming))
        rows[ranks, path] = read(config, encoder, ranks, EPOCH_STEPS, epochs=1)
        assert document_starts(rows[ranks, path]) == ONCE
    assert rows[1, s3] == rows[2, s3] == rows[1, str(shards / "*.parquet")]


def test_an_s3_bucket_that_is_not_there_is_refused_by_name(tmp_path, encoder, s3):
    config = make_config(tmp_path, make_source("s3://nowhere/a.parquet", streaming=True))
    with pytest.raises(ConfigError, match=r"s3://nowhere/a\.parquet"):
        RowDataset(config, config.data.sources, encoder, rank=0, ranks=1)


# ---- connections that break

AFTER = {".parquet": 4, ".jsonl": 2}  # requests for a file that are answered, before three are not


@pytest.fixture
def quick_retries(monkeypatch):
    for what in ("READ", "OPEN"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{what}_RETRY_INTERVAL", 0.1)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_connections_that_break_now_and_then_change_no_row(
    tmp_path, encoder, server, suffix, quick_retries, monkeypatch
):
    """Three requests in a row for every file; of Parquet, in its middle, when some of its documents are trained."""
    monkeypatch.setattr(sources, "READ_CHUNK", 7)
    if suffix == ".parquet":  # a file in many requests, and not 5 MB at once
        monkeypatch.setitem(sources.SILENCE, "block_size", 1024)
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*{suffix}", streaming=True))
    whole = read(config, encoder, 1, EPOCH_STEPS, epochs=1)
    broken, requests = Counter(), Counter()

    def fault(name: str) -> str | None:
        requests[name] += 1
        if name and requests[name] > AFTER[suffix] and broken[name] < 3:
            broken[name] += 1
            return "cut"

    server.fault = fault
    assert read(config, encoder, 1, EPOCH_STEPS, server, epochs=1) == whole
    assert document_starts(whole) == ONCE
    assert broken == dict.fromkeys((f"shard-{i}{suffix}" for i in range(SHARDS)), 3)


def test_a_server_that_is_busy_for_a_while_is_waited_for(tmp_path, encoder, server, quick_retries):
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True))
    whole = read(config, encoder, 1, EPOCH_STEPS, server, epochs=1)
    half, refused = len(server.log) * 3 // 2, []

    def fault(name: str) -> str | None:
        if len(server.log) < half:
            return None
        refused.append(time.monotonic())
        return "busy" if refused[-1] - refused[0] < 0.5 else None

    server.fault = fault
    assert read(config, encoder, 1, EPOCH_STEPS, server, epochs=1) == whole
    assert len(refused) > 3


@pytest.mark.parametrize("kind", ["gone", "silent"])
def test_a_server_that_is_gone_for_good_ends_the_run_in_one_sentence(
    tmp_path, encoder, server, quick_retries, monkeypatch, kind
):
    timeout = aiohttp.ClientTimeout(sock_read=0.2)  # it is 10 s outside of tests
    assert sources.SILENCE["client_kwargs"]["timeout"].sock_read == 10
    monkeypatch.setitem(sources.SILENCE, "client_kwargs", {"timeout": timeout})
    url = f"{server.url}/shard-*.parquet"
    config = make_config(tmp_path, make_source(url, streaming=True))
    read(config, encoder, 1, EPOCH_STEPS, server, epochs=1)
    half = len(server.log) * 3 // 2
    server.fault = lambda name: kind if len(server.log) > half else None
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read(config, encoder, 1, EPOCH_STEPS, server, epochs=1)
    assert time.monotonic() - begin < 30
    assert url in str(caught.value) and "\n" not in str(caught.value)
    assert "see to file or server; the same command goes on" in str(caught.value)


def test_what_is_waited_for_a_server_is_a_minute_at_most():
    for what in ("READ", "OPEN"):
        times, interval = (
            getattr(datasets.config, f"STREAMING_{what}_{name}") for name in ("MAX_RETRIES", "RETRY_INTERVAL")
        )
        assert 20 <= times * interval <= 60


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_that_is_cut_off_is_named_at_once(tmp_path, encoder, suffix, streaming):
    """30 MB, of which a stream of JSON reads the first 10 when it is opened: the end is met in the midst of a run."""
    pairs = [{"text": text(document), "padding": 60_000 * "x"} for document in DOCUMENTS]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    file = tmp_path / f"cut{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(pairs), file, row_group_size=20)
        data = file.read_bytes()
    else:
        data = gzip.compress(lines, 1) if suffix == ".jsonl.gz" else lines
    file.write_bytes(data[: len(data) * 9 // 10 - 3])
    config = make_config(tmp_path, make_source(file, streaming=streaming))
    if streaming and suffix != ".parquet":  # which has its index at the end
        assert len(document_starts(read(config, encoder, 1, 2))) > 20
    with pytest.raises(ConfigError) as caught, lacuna_log() as messages:
        read(config, encoder, 1, EPOCH_STEPS, epochs=1)
    assert not [message for message in messages if "data.sources" not in message], "it was tried again"
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert ("see to file" in str(caught.value)) == (streaming and suffix == ".jsonl.gz")
    assert ("no row of JSON" in str(caught.value)) == (suffix == ".jsonl")
