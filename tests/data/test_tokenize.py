"""Text to ids: every way in which tokenizers differ, on tokenizers made on the spot."""

import copy
import functools
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lacuna.config import ConfigError, ModelConfig
from lacuna.data.batch import IGNORE
from lacuna.data.tokenize import TextEncoder, count_bytes, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny"
TEXTS = [
    "Call me Ishmael. Some years ago",
    "naïve café — “quotes” … Ω≈ç√ 漢字 Привет",
    "emoji 😀👩‍👩‍👧‍👦 🇸🇪 and\ttabs\n\nnew lines\r\n  indented 1234567890",
    " leading and trailing ",
    "\n",
    "x",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {"none": None, "BOS": "<s> $A", "BOS and EOS": "<s> $A </s>", "EOS": "$A </s>"}


def byte_level(template: str | None = None, **special) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as characters, BPE."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return finish(core, template, special)


def sentencepiece(template: str | None = None, prefix: str = "", **special) -> PreTrainedTokenizerFast:
    """Llama 2's kind: ▁ for a space, <0x0A> for a byte without a token of its own, BPE."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzCIS."]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁"), ("a", "g"), ("ag", "o")]
    pieces += ["".join(merge) for merge in merges]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(prefix)] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(core, template, special | {"unk_token": "<unk>"})


def unigram(template: str | None = None, **special) -> PreTrainedTokenizerFast:
    """T5's and some Japanese models' kind: its vocabulary holds the special tokens as pieces with a score."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("wh", -2.5), ("ale", -2.5), ("▁wha", -2.0), ("le", -2.0)]
    core = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(core, template, special)


def finish(core: Tokenizer, template: str | None, special: dict) -> PreTrainedTokenizerFast:
    if template:
        ids = [("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


KINDS = {"byte-level": byte_level, "SentencePiece": sentencepiece, "unigram": unigram}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
assets = pytest.mark.parametrize("name", ["smollm2", "qwen3"])


@functools.cache
def asset(name: str):
    if "LACUNA_ASSETS" not in os.environ:
        pytest.skip("LACUNA_ASSETS is not set")
    return AutoTokenizer.from_pretrained(Path(os.environ["LACUNA_ASSETS"]) / "tokenizer" / name)


# BOS and EOS


@kinds
@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_once_where_the_tokenizer_adds_one_and_eos_once_at_the_end(make, template):
    tokenizer = make(TEMPLATES[template], **SPECIAL)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert bos != eos
    for text, ids in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.tolist() == ([bos] if "BOS" in template else []) + plain + [eos]
        assert ids.dtype == np.int32


@kinds
@pytest.mark.parametrize(("template", "bos"), [(None, 0), ("</s> $A", 1), ("</s> $A </s>", 1), ("$A </s>", 0)])
def test_bos_eos_and_pad_may_be_one_token(make, template, bos):
    tokenizer = make(template, bos_token="</s>", eos_token="</s>", pad_token="</s>")
    for text, ids in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.tolist() == [tokenizer.eos_token_id] * bos + plain + [tokenizer.eos_token_id]


@kinds
def test_a_tokenizer_without_bos_gets_none(make):
    tokenizer = make(eos_token="</s>")
    for text, ids in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        assert ids.tolist() == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@kinds
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_without_tokens_is_no_document(make, template):
    lengths = [len(ids) for ids in TextEncoder(make(TEMPLATES[template], **SPECIAL)).encode(["", "x", ""])]
    assert lengths[0] == lengths[2] == 0
    assert lengths[1] > 0


def test_a_tokenizer_without_eos_is_refused_in_one_sentence():
    with pytest.raises(ConfigError) as caught:
        TextEncoder(byte_level(bos_token="<s>"))
    assert "EOS" in str(caught.value)
    assert "model.tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


@assets
def test_real_tokenizers_add_eos_and_no_bos(name):
    tokenizer = asset(name)
    for text, ids in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_text_comes_back_from_its_ids(tokenizer):
    for text, ids in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        assert tokenizer.decode(ids[:-1]) == text


# Special tokens spelled out in a text


def check_specials_stay_text(tokenizer, encoder):
    names = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    texts = [*names, *(f"a {name} b{name}" for name in names), "".join(names)]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        inside = ids[len(encoder.bos) : -1].tolist()
        assert not set(inside) & {tokenizer.convert_tokens_to_ids(name) for name in names}, text
        assert tokenizer.decode(inside, clean_up_tokenization_spaces=False) == text
        assert ids[-1] == tokenizer.eos_token_id


# A Unigram model finds "</s>" among its own pieces: that is outside of what the tokenizers library can be told.
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_spelled_in_a_text_stay_text(make, template):
    tokenizer = make(TEMPLATES[template], **SPECIAL)
    check_specials_stay_text(tokenizer, TextEncoder(tokenizer))


def test_special_tokens_of_the_example_stay_text(tokenizer):
    check_specials_stay_text(tokenizer, TextEncoder(tokenizer))


@assets
def test_special_tokens_of_real_tokenizers_stay_text(name):
    check_specials_stay_text(asset(name), TextEncoder(asset(name)))


@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_an_encoder_encodes_alike_in_a_loader_worker(tokenizer, travel):
    encoder = TextEncoder(tokenizer)
    there = travel(encoder)
    texts = [*TEXTS, "a <|endoftext|> b", ""]
    assert [ids.tolist() for ids in there.encode(texts)] == [ids.tolist() for ids in encoder.encode(texts)]
    assert there.fingerprint() == encoder.fingerprint()
    check_specials_stay_text(tokenizer, there)


def test_the_tokenizer_given_is_left_as_it_was(tokenizer):
    before = tokenizer("a <|endoftext|> b", truncation=True, max_length=6)["input_ids"]
    TextEncoder(tokenizer).encode(["a <|endoftext|> b"])
    assert tokenizer("a <|endoftext|> b", truncation=True, max_length=6)["input_ids"] == before
    assert tokenizer.eos_token_id in tokenizer("a <|endoftext|> b")["input_ids"]


# Settings that must not get in


@kinds
def test_truncation_and_padding_of_a_tokenizer_file_cut_and_fill_nothing(make, tmp_path):
    tokenizer = make("<s> $A", **SPECIAL, pad_token="</s>")
    long = " ".join(TEXTS) * 20
    expected = [ids.tolist() for ids in TextEncoder(tokenizer).encode([long, "x"])]
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(tmp_path, model_max_length=8)
    assert len(loaded.backend_tokenizer.encode("x").ids) == 16, "this test no longer sets what it wants to see ignored"
    assert [ids.tolist() for ids in TextEncoder(loaded).encode([long, "x"])] == expected


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)
    assert "model.tokenizer" in str(caught.value)


# The fingerprint: part of the key of the token cache


def test_the_fingerprint_is_the_same_for_two_loads_and_after_use(tmp_path):
    byte_level("<s> $A", **SPECIAL, pad_token="</s>").save_pretrained(tmp_path)
    one, two = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    one(["some", "use"], truncation=True, max_length=4, padding=True)
    encoder = TextEncoder(one)
    before = encoder.fingerprint()
    encoder.encode(["some use"])
    assert encoder.fingerprint() == before == TextEncoder(two).fingerprint()


def test_the_fingerprint_changes_with_anything_that_changes_a_token(tmp_path):
    tokenizers = {
        "first": byte_level(**SPECIAL),
        "BOS by template": byte_level("<s> $A", **SPECIAL),
        "another EOS": byte_level(bos_token="<s>", eos_token="<s>"),
        "an added token": byte_level(**SPECIAL),
        "an added special token": byte_level(**SPECIAL),
        "another kind": sentencepiece(**SPECIAL),
        "a prefix": sentencepiece(prefix="▁", **SPECIAL),
    }
    tokenizers["an added token"].add_tokens(["<think>"])
    tokenizers["an added special token"].add_tokens(["<think>"], special_tokens=True)
    byte_level(**SPECIAL).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizers["two ids swapped"] = AutoTokenizer.from_pretrained(tmp_path)
    fingerprints = {name: TextEncoder(tokenizer).fingerprint() for name, tokenizer in tokenizers.items()}
    assert len(set(fingerprints.values())) == len(tokenizers), fingerprints


def test_the_fingerprint_changes_with_the_code(tokenizer, monkeypatch):
    before = TextEncoder(tokenizer).fingerprint()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"# changed")
    assert TextEncoder(tokenizer).fingerprint() != before


# Bytes of a text, from its tokens


def check_bytes(tokenizer, texts=TEXTS, more: int = 0):
    rows = TextEncoder(tokenizer).encode(texts)
    for text, ids in zip(texts, rows, strict=True):
        assert count_bytes(tokenizer, [ids]) == len(text.encode()) + more, text
    padded = np.full((len(rows), max(map(len, rows)) + 1), IGNORE)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    assert count_bytes(tokenizer, padded) == sum(len(text.encode()) + more for text in texts)


@kinds
def test_bytes_are_those_of_the_text_without_special_tokens(make):
    check_bytes(make("<s> $A </s>", **SPECIAL))


def test_bytes_of_the_examples_tokens_are_those_of_the_text(tokenizer):
    check_bytes(tokenizer, [*TEXTS, "a <|endoftext|> spelled out"])


@assets
def test_bytes_of_real_tokenizers_tokens_are_those_of_the_text(name):
    check_bytes(asset(name), [*TEXTS, "a <|endoftext|> <|im_end|> spelled out", "<think>thoughts</think>\n"])


def test_a_space_that_the_tokenizer_puts_before_a_text_counts_as_one_byte():
    check_bytes(sentencepiece(prefix="▁", **SPECIAL), more=1)


@kinds
def test_added_words_count_as_their_bytes(make):
    tokenizer = make(**SPECIAL)
    tokenizer.add_tokens(["<think>"])
    check_bytes(tokenizer, ["x <think> y"])


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "../nowhere", "examples/tinny", "examples/tiny/hf"])
def test_a_path_that_is_not_there_is_no_question_for_the_hub(name, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("the Hub was asked"))
    with pytest.raises(ConfigError, match=f"{re.escape(name)}: no such folder"):
        load_tokenizer(ModelConfig(name=name))
