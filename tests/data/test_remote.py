"""Parquet shards over http:// and s3://, as a run reads them: the same rows for all ranks, nothing fetched twice."""

import re
import socket
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lacuna.config import ConfigError
from lacuna.data.loader import Loader, RowDataset
from lacuna.data.tokenize import Encoder

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
    return folder


@pytest.fixture(scope="module")
def encoder():
    return Encoder(number_tokenizer())


@pytest.fixture
def server(shards):
    """An http server with ranges; `server.log` has (who, method, file, first byte, bytes) of every request.

    `server.who` is whoever is asking just now.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.strip("/")
            body = (shards / name).read_bytes() if name else listing(shards)
            if name and not (shards / name).is_file():
                return self.send_error(404)
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
                self.wfile.write(body[begin:end])

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.log, server.who = [], None
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fsspec.filesystem("http").clear_instance_cache()
    yield server
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


def read(config, encoder, ranks: int, steps: int, server=None, state=None, **limits) -> list[tuple]:
    """The rows of these steps in the order of the run, the ranks read one after the other."""
    config.data.workers = 0
    rows = {}
    for rank in range(ranks):
        if server:
            server.who = (ranks, rank)
            fsspec.filesystem("http").clear_instance_cache()
        dataset = RowDataset(config, config.data.sources, encoder, rank, ranks, **limits)
        loader = Loader(config, dataset, torch.device("cpu"), state)
        a_step = config.train.global_batch_size // config.train.micro_batch_size // ranks
        for i in range(steps * a_step):
            batch = loader.next()
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
    sizes = {file.name: file.stat().st_size for file in shards.iterdir()}
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
    config = make_config(tmp_path, make_source(f"{server.url}/shard-*.parquet", streaming=True), workers=0)
    whole = read(config, encoder, 1, 6)
    loader = Loader(config, RowDataset(config, config.data.sources, encoder, 0, 1), torch.device("cpu"))
    for _ in range(3 * ROWS // config.train.micro_batch_size):
        loader.next()
    state = loader.state
    loader.close()
    assert read(config, encoder, 2, 3, state=state) == whole[3 * ROWS :]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_url_that_is_not_there_is_refused_by_name(tmp_path, encoder, server, streaming):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    for url in (f"{server.url}/nowhere.parquet", f"http://127.0.0.1:{port}/a.parquet"):
        config = make_config(tmp_path, make_source(url, streaming=streaming))
        with pytest.raises(ConfigError) as caught:
            RowDataset(config, config.data.sources, encoder, 0, 1)
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
        RowDataset(config, config.data.sources, encoder, 0, 1)
