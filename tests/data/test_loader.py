"""Rows to batches: the contract of `PackedBatch`, every token once, one order of data, exact state."""

import json
import re
import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lacuna.config import ConfigError
from lacuna.data import loader as loader_module
from lacuna.data import sources as sources_module
from lacuna.data.batch import PackedBatch
from lacuna.data.loader import Loader, RowDataset, merge_states
from lacuna.data.tokenize import TextEncoder

from .corpora import (
    BOS,
    EOS,
    lacuna_log,
    log_normal_documents,
    make_config,
    make_source,
    number_tokenizer,
    text,
    write,
    write_shards,
)

CPU = torch.device("cpu")
SEQ_LEN, ROWS = 64, 8  # of make_config: slots a row, rows a step


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(number_tokenizer())


# Reading, and taking batches apart again


def open_loader(config, encoder, rank=0, ranks=1, **limits) -> Loader:
    """As a run makes it."""
    limits = {"epochs": config.train.epochs} | limits
    dataset = RowDataset(config, config.data.sources, encoder, rank=rank, ranks=ranks, **limits)
    return Loader(config, dataset, CPU)


def take(loader, steps: int) -> list[PackedBatch]:
    """The micro-batches of the next steps."""
    return [batch for _ in range(steps) for batch in loader.step()]


def read(config, encoder, steps: int, ranks: int = 1, state=None, **limits):
    """The micro-batches [rank][i] of this many steps, and the state of all ranks after them, as a checkpoint has it."""
    loaders = [open_loader(config, encoder, rank, ranks, state=state, **limits) for rank in range(ranks)]
    batches = [take(loader, steps) for loader in loaders]
    after = merge_states([round_trip(loader.state) for loader in loaders])
    for loader in loaders:
        loader.close()
    return batches, round_trip(after)


def round_trip(state: dict) -> dict:
    """As it comes back from a checkpoint, which must be as it was."""
    back = json.loads(json.dumps(state))
    assert back == state
    return back


def rows_in_order(batches) -> list[tuple]:
    """(ids, labels, positions) of row 0, 1, 2, … of the run, from the micro-batches of all ranks."""
    rows = {}
    for rank, of_rank in enumerate(batches):
        for i, batch in enumerate(of_rank):
            parts = [t.reshape(-1, SEQ_LEN).tolist() for t in (batch.input_ids, batch.labels, batch.position_ids)]
            for j, row in enumerate(zip(*parts, strict=True)):
                rows[(i * len(parts[0]) + j) * len(batches) + rank] = row
    assert sorted(rows) == list(range(len(rows)))
    return [rows[p] for p in range(len(rows))]


def checksums(batches, config) -> list[int]:
    """Of every step: the sum over all ranks and micro-batches, as metrics.jsonl has it."""
    a_step = config.train.global_batch_size // (config.train.micro_batch_size * len(batches))
    of_batches = [sum(batch.counts["checksum"] for batch in together) for together in zip(*batches, strict=True)]
    return [sum(of_batches[i : i + a_step]) for i in range(0, len(of_batches), a_step)]


def segments(batch: PackedBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, labels, positions) of every document or filler, from the boundaries alone."""
    bounds = batch.cu_seqlens.tolist()
    ids, labels, positions = (t.tolist() for t in (batch.input_ids, batch.labels, batch.position_ids))
    return [(ids[a:b], labels[a:b], positions[a:b]) for a, b in pairwise(bounds) if b > a]


def only_eos(ids: list[int], labels: list[int]) -> bool:
    """Filler, or, where it is one slot only, perhaps the last piece of a document, which can be EOS alone."""
    return set(ids) == {EOS} and set(labels) == {-100}


class Corpus:
    """Documents of which every token is somewhere else nowhere, as files, and what is true of them."""

    def __init__(self, documents: list[list[int]], bos: bool = False):
        self.documents = documents
        self.successor = {}
        for document in documents:
            whole = [*([BOS] if bos else []), *document, EOS]
            self.successor |= {a: b for a, b in pairwise(whole) if a not in (BOS, EOS)}
        self.first = {document[0] for document in documents}
        self.last = {document[-1] for document in documents}
        self.words = Counter(token for document in documents for token in document)
        # Without BOS nothing comes before a document's first token. One EOS a document is a target.
        self.targets = self.words - Counter([] if bos else self.first) + Counter({EOS: len(documents)})

    def sources(self, folder, kind: str) -> list[dict]:
        """map: two map-style sources; stream: four shards; mixture: a third of the documents map-style, others not."""
        half, third = len(self.documents) // 2, len(self.documents) // 3
        if kind == "map":
            paths = [
                write_shards(folder / "a", self.documents[:half], 1),
                write_shards(folder / "b", self.documents[half:], 2),
            ]
            return [make_source(path) for path in paths]
        if kind == "stream":
            return [make_source(write_shards(folder / "s", self.documents, 4, ".parquet"), streaming=True)]
        return [
            make_source(write_shards(folder / "m", self.documents[:third], 1), weight=1.0),
            make_source(write_shards(folder / "s", self.documents[third:], 4), weight=3.0, streaming=True),
        ]


# Documents up to several rows long; of the last three, the pieces fill rows exactly, or leave EOS alone for the next.
LONG = Corpus([*log_normal_documents(57), *(list(range(9000 + n, 9000 + 2 * n)) for n in (63, 128, 320))])
MANY = Corpus(log_normal_documents(200, median=20, seed=1))
assert len({token for document in LONG.documents for token in document}) == sum(map(len, LONG.documents))
kinds = pytest.mark.parametrize("kind", ["map", "stream", "mixture"])


# The contract


@kinds
def test_a_packed_batch_has_the_shapes_and_types_of_its_contract_at_every_step(tmp_path, encoder, kind):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    batches = read(config, encoder, 6)[0][0]
    total = config.train.micro_batch_size * SEQ_LEN
    for batch in batches:
        assert [t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)] == [torch.int64] * 3
        assert batch.cu_seqlens.dtype == torch.int32
        assert {tuple(t.shape) for t in (batch.input_ids, batch.labels, batch.position_ids)} == {(total,)}
        assert all(t.is_contiguous() for t in (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens))
        assert type(batch.max_seqlen) is int
        assert batch.max_seqlen == batches[0].max_seqlen >= int(batch.cu_seqlens.diff().max())
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == total
        assert bounds == sorted(set(bounds)), "an empty document"
        assert set(range(0, total, SEQ_LEN)) <= set(bounds), "a document reaches over the end of a row"
        expected = np.concatenate([np.arange(b - a) for a, b in pairwise(bounds)])
        assert batch.position_ids.tolist() == expected.tolist()
        lengths = [b - a for a, b in pairwise(bounds)]
        assert batch.counts["pairs"] == sum(length**2 for length in lengths)
        assert batch.counts["trained_tokens"] == int((batch.labels != -100).sum())
        assert set(batch.labels[batch.labels < 0].tolist()) <= {-100}
        assert batch.to(CPU).input_ids is batch.input_ids


@kinds
@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_labels_are_the_next_token_of_the_same_document_and_filler_trains_nothing(tmp_path, kind, bos):
    corpus = Corpus(LONG.documents, bos)
    config = make_config(tmp_path, *corpus.sources(tmp_path, kind))
    fillers = 0
    for batch in read(config, TextEncoder(number_tokenizer(bos=bos)), 6)[0][0]:
        tokens = single = 0
        for ids, labels, positions in segments(batch):
            assert positions == list(range(len(ids)))
            if only_eos(ids, labels):
                fillers += len(ids) > 1
                single += len(ids) == 1
                continue
            tokens += len(ids)
            assert [corpus.successor.get(token) for token in ids[:-1] if token != BOS] == [
                b for a, b in pairwise(ids) if a != BOS
            ], "two documents, or a document and filler, are one"
            assert labels[:-1] == ids[1:]
            assert labels[-1] == corpus.successor.get(ids[-1], -100), "a cut document's last label is its next token"
            assert EOS not in ids[:-1], "EOS inside of a document"
            if bos:
                assert BOS not in ids[1:]
                assert (ids[0] == BOS) == (len(ids) > 1 and ids[1] in corpus.first)
        assert tokens <= batch.counts["tokens"] <= tokens + single, "filler counts as tokens"
    assert fillers > 0


def test_eos_stands_at_true_ends_of_documents_only(tmp_path, encoder):
    for corpus, folder in ((LONG, tmp_path / "a"), (MANY, tmp_path / "b")):
        config = make_config(folder, *corpus.sources(folder, "map"), steps=None, epochs=1)
        ends = Counter()
        for ids, labels, _ in rows_in_order(read(config, encoder, rows_of_run(config, encoder) // ROWS)[0]):
            for at, token in enumerate(ids):
                if token == EOS and at and ids[at - 1] in corpus.last:
                    ends[ids[at - 1]] += 1
                    assert labels[at - 1] == EOS
                elif token == EOS:
                    assert labels[at] == -100, "EOS that ends no document, and is no filler"
        alone = {document[-1] for document in corpus.documents if len(document) % SEQ_LEN == 0}
        assert set(ends) | alone == corpus.last
        assert set(ends.values()) == {1}


def rows_of_run(config, encoder) -> int:
    """Rows of all epochs, filled up to whole steps."""
    rows = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=config.train.epochs).count_rows()
    return -(-rows // ROWS) * ROWS


@pytest.mark.parametrize("corpus", [LONG, MANY], ids=["long", "many"])
@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_token_is_a_target_exactly_once_an_epoch(tmp_path, corpus, bos, epochs):
    corpus = Corpus(corpus.documents, bos)
    encoder = TextEncoder(number_tokenizer(bos=bos))
    config = make_config(tmp_path, *corpus.sources(tmp_path, "map"), steps=None, epochs=epochs)
    rows = rows_in_order(read(config, encoder, rows_of_run(config, encoder) // ROWS)[0])
    targets = Counter(label for _, labels, _ in rows for label in labels if label >= 0)
    inputs = Counter(token for ids, _, _ in rows for token in ids if token not in (EOS, BOS))
    assert targets == Counter({token: epochs * count for token, count in corpus.targets.items()})
    assert inputs == Counter({token: epochs * count for token, count in corpus.words.items()})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("streams", [64, 1, 3, 4])
def test_every_token_of_a_stream_is_a_target_exactly_once_an_epoch(tmp_path, encoder, streams, ranks, monkeypatch):
    monkeypatch.setattr(loader_module, "MOST_STREAMS", streams)
    config = make_config(tmp_path, *LONG.sources(tmp_path, "stream"))
    rows = rows_in_order(read_one_epoch(config, encoder, ranks))
    assert Counter(label for _, labels, _ in rows for label in labels if label >= 0) == LONG.targets
    assert Counter(token for ids, _, _ in rows for token in ids if token != EOS) == LONG.words


def read_one_epoch(config, encoder, ranks) -> list:
    """What evaluation reads of a stream, up to where all streams have ended."""
    loaders = [open_loader(config, encoder, rank, ranks, epochs=1) for rank in range(ranks)]
    batches = [take(loader, sum(LONG.targets.values()) // SEQ_LEN + 10) for loader in loaders]
    for loader in loaders:
        loader.close()
    assert not any(batch.counts["trained_tokens"] for of_rank in batches for batch in of_rank[-2:]), (
        "not read to the end"
    )
    return batches


def test_an_epoch_of_map_style_data_ends_in_filler_rows_and_shares_no_row_with_the_next(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"), steps=None, epochs=2)
    whole = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=2).count_rows()
    once = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=1).count_rows()
    rows = rows_in_order(read(config, encoder, whole // ROWS + 2)[0])
    trains = [any(label >= 0 for label in labels) for _, labels, _ in rows]
    assert trains[:whole] == [True] * whole
    assert trains[whole:] == [False] * (len(rows) - whole)
    assert all(set(ids) == {EOS} for ids, _, _ in rows[whole:])
    first = Counter(label for _, labels, _ in rows[:once] for label in labels if label >= 0)
    assert first == LONG.targets, "a row mixes two epochs"
    orders = [[tuple(ids) for ids, _, _ in part] for part in (rows[:once], rows[once:whole])]
    assert set(orders[0]) != set(orders[1]), "every epoch is packed anew"


def test_the_rows_of_a_limit_are_the_first_ones(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"), steps=None, epochs=1)
    whole = rows_in_order(read(config, encoder, 3)[0])
    for ranks in (1, 2):
        limited = rows_in_order(read(config, encoder, 3, ranks, limit=13)[0])
        assert limited[:13] == whole[:13]
        assert all(set(labels) == {-100} for _, labels, _ in limited[13:])


@kinds
def test_rows_of_tiny_documents_are_rows_like_any_other(tmp_path, encoder, kind):
    corpus = Corpus([[token] for token in range(10, 400)])
    config = make_config(tmp_path, *corpus.sources(tmp_path, kind))
    batches = read(config, encoder, 4)[0][0]
    assert max(len(batch.cu_seqlens) for batch in batches) > SEQ_LEN // 2
    config = make_config(tmp_path, *corpus.sources(tmp_path, "map"), steps=None, epochs=1)
    rows = rows_in_order(read(config, encoder, rows_of_run(config, encoder) // ROWS)[0])
    assert Counter(label for _, labels, _ in rows for label in labels if label >= 0) == Counter({EOS: 390})
    assert Counter(token for ids, _, _ in rows for token in ids if token != EOS) == corpus.words


def test_what_is_packed_is_nearly_full(tmp_path, encoder):
    config = make_config(tmp_path, *MANY.sources(tmp_path, "map"), steps=None, epochs=1)
    rows = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=1).count_rows()
    tokens = sum(len(document) + 1 for document in MANY.documents)
    assert rows <= tokens / SEQ_LEN * 1.02 + 1
    assert sum(batch.counts["tokens"] for batch in read(config, encoder, -(-rows // ROWS))[0][0]) == tokens


# Boundaries


@kinds
def test_without_the_mask_the_last_token_of_a_document_predicts_the_next_ones_first(tmp_path, encoder, kind):
    masked = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    open_ = make_config(tmp_path, *LONG.sources(tmp_path, kind), mask_boundary=False)
    ends = rests = 0
    pairs = zip(rows_in_order(read(masked, encoder, 5)[0]), rows_in_order(read(open_, encoder, 5)[0]), strict=True)
    for (ids, labels, positions), (ids_open, labels_open, positions_open) in pairs:
        assert (ids, positions) == (ids_open, positions_open)
        for at in range(SEQ_LEN):
            new = at + 1 < SEQ_LEN and positions[at + 1] == 0
            if new and set(ids[at + 1 :]) == {EOS} and at + 2 == SEQ_LEN:
                continue  # one slot of filler, or a document's EOS alone: they look alike
            filler = new and positions[at + 1 :] == list(range(SEQ_LEN - at - 1)) and set(ids[at + 1 :]) == {EOS}
            rest = new and ids[at + 1] not in LONG.first  # of a document that was cut: its first is a target already
            rests += rest and not filler
            if new and not filler and not rest:  # the last slot of a document before another document
                ends += 1
                assert labels[at] == -100
                assert labels_open[at] == ids[at + 1]
            else:
                assert labels_open[at] == labels[at]
    assert ends > 3 and rests > 1


# One order, whatever the hardware


@kinds
def test_rows_and_checksums_are_the_same_on_all_numbers_of_ranks(tmp_path, encoder, kind):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    reference = read(config, encoder, 8)[0]
    for ranks in (2, 4):
        batches, state = read(config, encoder, 8, ranks)
        assert rows_in_order(batches) == rows_in_order(reference), f"{ranks} ranks"
        assert checksums(batches, config) == checksums(reference, config), f"{ranks} ranks"
        assert state["rows"] == 8 * ROWS
        for name in ("trained_tokens", "tokens", "pairs"):
            totals = [sum(batch.counts[name] for of_rank in b for batch in of_rank) for b in (batches, reference)]
            assert totals[0] == totals[1], name


@kinds
def test_two_runs_give_the_same_rows_and_another_seed_others(tmp_path, encoder, kind):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    other = config.model_copy(update={"seed": 1})
    first, second, third = (rows_in_order(read(c, encoder, 4)[0]) for c in (config, config, other))
    assert first == second != third


def test_the_checksum_tells_of_every_token_label_and_place(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"))
    batches = read(config, encoder, 6)[0]
    assert len(set(checksums(batches, config))) == 6
    documents = [list(document) for document in LONG.documents]
    documents[5][2] = 19_999
    changed = Corpus(documents)
    other = make_config(tmp_path, *changed.sources(tmp_path / "changed", "map"))
    sums = [sum(checksums(read(c, encoder, 12)[0], c)) for c in (config, other)]
    assert sums[0] != sums[1]
    without_mask = make_config(tmp_path, *LONG.sources(tmp_path, "map"), mask_boundary=False)
    assert checksums(read(without_mask, encoder, 6)[0], config) != checksums(batches, config)


def test_the_checksum_changes_when_two_rows_of_a_step_are_exchanged(tmp_path, encoder, monkeypatch):
    plan_stream = RowDataset.plan_stream

    def exchanged(dataset, number, saved=None):
        rows = plan_stream(dataset, number, saved)
        first, second = next(rows), next(rows)
        yield first._replace(pieces=second.pieces)
        yield second._replace(pieces=first.pieces)
        yield from rows

    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"))
    before = read(config, encoder, 2)[0]
    monkeypatch.setattr(RowDataset, "plan_stream", exchanged)
    after = read(config, encoder, 2)[0]
    rows = rows_in_order(before)
    assert rows_in_order(after) == [rows[1], rows[0], *rows[2:]]
    first, second = zip(checksums(before, config), checksums(after, config), strict=True)
    assert first[0] != first[1]
    assert second[0] == second[1]


# Exact state


@pytest.fixture
def small_chunks(monkeypatch):
    """So that shards of few documents are read in several chunks."""
    monkeypatch.setattr(sources_module, "READ_CHUNK", 5)


@kinds
@pytest.mark.parametrize(
    ("corpus", "steps"), [(LONG, (1, 2, 5, 8, 9, 10, 16)), (MANY, (3, 4, 7))], ids=["many epochs", "large windows"]
)
def test_a_run_resumes_exactly_on_any_number_of_ranks(tmp_path, encoder, kind, corpus, steps, small_chunks):
    """Over the ends of windows, shards and epochs (LONG ends after about 70 rows)."""
    config = make_config(tmp_path, *corpus.sources(tmp_path, kind))
    further = 2
    reference = rows_in_order(read(config, encoder, max(steps) + further)[0])
    for step in steps:
        before, after = [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)][step % 5]
        state = read(config, encoder, step, before)[1]
        assert state["rows"] == step * ROWS
        rows = rows_in_order(read(config, encoder, further, after, state)[0])
        expected = reference[step * ROWS : (step + further) * ROWS]
        assert rows == expected, f"{before} ranks stopped after step {step}, {after} ranks went on"


@kinds
@pytest.mark.parametrize("parts", [(7, 6, 7), (5, 1, 1, 1, 4)])
def test_a_run_resumes_from_a_resumed_run(tmp_path, encoder, kind, parts, small_chunks):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    reference = rows_in_order(read(config, encoder, sum(parts))[0])
    rows, state = [], None
    for i, part in enumerate(parts):
        batches, state = read(config, encoder, part, (1, 2, 1, 4)[i % 4], state)
        rows += rows_in_order(batches)
        assert rows == reference[: len(rows)], f"part {i + 1} of {parts}"


def test_what_is_prefetched_does_not_count_as_consumed(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "stream"), global_batch_size=2)
    loader = open_loader(config, encoder)
    [first] = loader.step()
    loader.thread.submit(lambda: None).result(timeout=30)  # all that was to be prefetched now is
    state = round_trip(loader.state)
    [second] = loader.step()
    loader.close()
    assert state["rows"] == config.train.micro_batch_size
    resumed = open_loader(config, encoder, state=state)
    [batch] = resumed.step()
    resumed.close()
    assert (batch.input_ids == second.input_ids).all()
    assert (batch.input_ids != first.input_ids).any()


def test_a_step_is_the_micro_batches_of_a_global_batch(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"))
    small = make_config(tmp_path, *LONG.sources(tmp_path, "map"), global_batch_size=2)
    loader = open_loader(config, encoder)
    steps = [loader.step(), loader.step()]
    loader.close()
    assert [len(step) for step in steps] == [4, 4]
    alone = read(small, encoder, 8)[0][0]
    assert [batch.input_ids.tolist() for step in steps for batch in step] == [b.input_ids.tolist() for b in alone]
    assert loader.state["rows"] == 16


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_evaluation_has_one_micro_batch_a_step(tmp_path, encoder, kind):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    dataset = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1)
    for _ in range(2):  # each from the beginning
        loader = Loader(config, dataset, CPU, training=False)
        batches = [batch for _ in range(8) for [batch] in [loader.step()]]
        loader.close()
        for ours, expected in zip(batches, read(config, encoder, 2)[0][0], strict=True):
            assert [ours[i].tolist() for i in range(4)] == [expected[i].tolist() for i in range(4)]


def test_the_end_of_map_style_data_resumes_as_the_end(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"), steps=None, epochs=1)
    steps = rows_of_run(config, encoder) // ROWS
    for step in (steps - 1, steps, steps + 1):
        state = read(config, encoder, step)[1]
        rows = rows_in_order(read(config, encoder, 2, 2, state)[0])
        assert rows == rows_in_order(read(config, encoder, step + 2)[0])[-2 * ROWS :]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_more_epochs_after_the_last_one_begin_with_their_first_row(tmp_path, encoder, ranks):
    """The empty rows behind an epoch's end are none of the next one's."""
    config = make_config(tmp_path, *LONG.sources(tmp_path, "map"), steps=None, epochs=1)
    once = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=1).count_rows()
    twice = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=2).count_rows()
    assert once % ROWS, "there must be some"
    state = read(config, encoder, -(-once // ROWS), ranks)[1]
    assert state["rows"] == once
    left = twice - once
    rows = rows_in_order(read(config, encoder, -(-left // ROWS), ranks, state, epochs=2)[0])
    assert Counter(label for _, labels, _ in rows for label in labels if label >= 0) == LONG.targets


# Mixtures


@pytest.mark.parametrize("streaming", [(False, False, False), (True, True, True), (False, True, False)])
def test_shares_of_a_mixture_approach_the_weights_by_tokens(tmp_path, encoder, streaming):
    """Whatever the lengths of the documents: the heaviest source has the shortest ones."""
    medians, weights = (60, 8, 20), (1.0, 6.0, 3.0)
    given, owner, first = [], {}, 10
    for i, median in enumerate(medians):
        documents = log_normal_documents(80, median, i, first)
        owner |= {token: i for document in documents for token in document}
        first = documents[-1][-1] + 1
        path = write_shards(tmp_path / str(i), documents, 2)
        given.append(make_source(path, weight=weights[i], streaming=streaming[i]))
    config = make_config(tmp_path, *given)
    rows = rows_in_order(read(config, encoder, 60)[0])
    tokens = [0, 0, 0]
    for ids, _, positions in rows:
        source = None
        for token, position in zip(ids, positions, strict=True):
            source = owner.get(token, source if position else None)  # EOS belongs to the document before it
            if source is not None:
                tokens[source] += 1
    shares = np.asarray(tokens) / sum(tokens)
    assert np.abs(shares - np.asarray(weights) / sum(weights)).max() < 0.03, shares


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_mixture_reads_every_document_before_it_reads_one_many_times(tmp_path, encoder, streaming):
    """In the time of three epochs of two equal sources each document is seen about three times."""
    sizes = [len(document) + 1 for document in MANY.documents]
    half = next(i for i in range(len(sizes)) if sum(sizes[:i]) >= sum(sizes) / 2)
    given = [
        make_source(write_shards(tmp_path / str(i), part, 2), weight=1.0, streaming=streaming)
        for i, part in enumerate((MANY.documents[:half], MANY.documents[half:]))
    ]
    rows = rows_in_order(read(make_config(tmp_path, *given), encoder, 3 * sum(sizes) // SEQ_LEN // ROWS)[0])
    seen = Counter(token for ids, _, _ in rows for token in ids)
    times = [seen[document[0]] for document in MANY.documents]
    assert min(times) >= 1, f"{times.count(0)} of {len(times)} documents never seen"
    assert max(times) <= 6, f"one seen {max(times)} times"


# What is told


def without_text_in_between(folder, shards: int) -> dict:
    """A streaming source of LONG's documents; after each, one empty and one null."""
    for shard in range(shards):
        documents = LONG.documents[shard::shards]
        write(folder / f"{shard}.jsonl", [value for document in documents for value in (text(document), "", None)])
    return make_source(folder / "*.jsonl", streaming=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_without_text_are_counted_once_each(tmp_path, encoder, ranks):
    config = make_config(tmp_path, without_text_in_between(tmp_path / "s", 2))
    loaders = [open_loader(config, encoder, rank, ranks, epochs=1) for rank in range(ranks)]
    with lacuna_log() as messages:
        for loader in loaders:
            take(loader, 30)
            loader.close()
    said = [re.search(r"shard (\d+): (\d+) of \d+ documents dropped: no text", message) for message in messages]
    shards = {found[1]: int(found[2]) for found in said}  # whoever reads a shard says the same of it
    assert sum(shards.values()) == 2 * len(LONG.documents)


@pytest.mark.parametrize("ranks", [1, 2])
def test_documents_without_text_at_the_beginning_are_counted(tmp_path, encoder, ranks):
    """Whether one rank reads the stream or two read the same one."""
    write(tmp_path / "a.jsonl", [None, "", *(text(document) for document in LONG.documents), *["4 5 6"] * 500])
    config = make_config(tmp_path, make_source(tmp_path / "a.jsonl", streaming=True))
    with lacuna_log() as messages:
        read(config, encoder, 30, ranks)
    assert any("shard 0: 2 of " in message and "dropped: no text" in message for message in messages), messages


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_the_epoch_of_a_batch_grows_to_the_epochs_read(tmp_path, encoder, kind):
    config = make_config(tmp_path, *LONG.sources(tmp_path, kind))
    rows_an_epoch = sum(LONG.targets.values()) / SEQ_LEN
    epochs = [batch.epoch for batch in read(config, encoder, 30)[0][0]]
    assert 0 <= epochs[0] < 0.5
    assert abs(epochs[-1] - 30 * ROWS / rows_an_epoch) < 1.5
    if kind == "map":  # a stream's epochs end when they end, each at a time of its own
        assert epochs == sorted(epochs)


# What goes wrong in the background


class Failing(TextEncoder):
    """Fails at a text that holds the word 13."""

    error: type[BaseException] = ValueError

    def encode(self, texts):
        if any("13" in value.split() for value in texts):
            raise self.error("no such luck")
        return super().encode(texts)


def failing_config(folder):
    documents = [[100 + i] * 30 for i in range(300)]
    documents[200][7] = 13  # some chunks behind the first
    source = make_source(write(folder / "a.jsonl", [text(document) for document in documents]), streaming=True)
    return make_config(folder, source)


def step_until_error(loader) -> BaseException:
    """Ask for batches, but never wait for ever."""
    caught = []

    def ask():
        try:
            for _ in range(200):
                loader.step()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "step() waits for ever"
    assert caught, "no error"
    return caught[0]


class Panic(BaseException):
    """As pyo3's PanicException of a tokenizer: no Exception."""


@pytest.mark.parametrize("error", [ValueError, ConfigError, Panic])
def test_what_goes_wrong_in_the_background_reaches_step(tmp_path, error):
    config = failing_config(tmp_path)
    encoder = Failing(number_tokenizer())
    encoder.error = error
    loader = open_loader(config, encoder)
    raised = step_until_error(loader)
    assert isinstance(raised, error)
    assert "no such luck" in str(raised)
    assert isinstance(step_until_error(loader), BaseException), "asked again, it says so again"
    loader.close()


def test_bad_data_met_in_the_background_is_one_sentence(tmp_path, encoder):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": i}) + "\n" for i in range(5)))
    config = make_config(tmp_path, make_source(path, streaming=True))
    loader = open_loader(config, encoder)
    raised = step_until_error(loader)
    loader.close()
    assert isinstance(raised, ConfigError)
    assert "holds no text: TypeError: int" in str(raised)
    assert "\n" not in str(raised)


def test_a_closed_loader_leaves_no_thread_behind(tmp_path, encoder):
    config = make_config(tmp_path, *LONG.sources(tmp_path, "stream"))
    before = set(threading.enumerate())
    for _ in range(3):
        loader = open_loader(config, encoder)
        loader.step()
        loader.close()
    assert not [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
