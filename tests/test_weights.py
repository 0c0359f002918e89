"""A model folder is read as transformers reads it, and nothing is read that is not there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, EXAMPLES, SMALL, model_config, pack
from processes import tensors
from safetensors.torch import load_file, save_file
from test_model import build
from test_train import options, texts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lacuna.checkpoint import export, match_eos
from lacuna.config import ConfigError, load_config
from lacuna.train import run
from lacuna.weights import fingerprint, read_tensors, seal, weight_folder

assert texts  # a fixture

TINY = load_file(EXAMPLES / "tiny" / "model.safetensors")
NAMES = sorted(TINY)


def shards(folder: Path, weights: dict):
    """Weights in two files, as an export of a large model has them, without their index."""
    for i in range(2):
        save_file({name: weights[name] for name in NAMES[i::2]}, folder / f"model-{i + 1:05}-of-00002.safetensors")


def index(folder: Path):
    names = {name: f"model-{i + 1:05}-of-00002.safetensors" for i in range(2) for name in NAMES[i::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def zeros() -> dict:
    return {name: torch.zeros_like(tensor) for name, tensor in TINY.items()}


@pytest.fixture
def tiny(tmp_path) -> Path:
    return shutil.copytree(EXAMPLES / "tiny", tmp_path / "tiny")


def save(folder: Path, name: str, weights: dict):
    save_file(weights, folder / name)


def spoil(folder: Path, change):
    """A fault of model.safetensors, from its bytes to others."""
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


WHOLE, FIRST, SECOND = "model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FOLDERS = {
    "one file": lambda f: None,
    "shards": lambda f: [shards(f, TINY), index(f), (f / WHOLE).unlink()],
    "an index, and an older export beside": lambda f: [shards(f, TINY), index(f), save(f, WHOLE, zeros())],
    "no index, and older shards beside": lambda f: shards(f, zeros()),
    "Mistral's own file": lambda f: save(f, "consolidated.safetensors", {"tok_embeddings.weight": torch.zeros(4)}),
    "an adapter": lambda f: save(f, "adapter_model.safetensors", {"base_model.lora_A.weight": torch.zeros(4)}),
    "a copy": lambda f: shutil.copy(f / WHOLE, f / "copy.safetensors"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_is_its_index_or_else_model_safetensors_and_other_files_are_ignored(what, tiny):
    FOLDERS[what](tiny)
    got = dict(build(tiny).model.named_parameters())
    assert got.keys() == TINY.keys()
    assert all(torch.equal(got[name], TINY[name].float()) for name in TINY)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5050000\n"
INDEX = "model.safetensors.index.json"
BROKEN = {
    "cut": (lambda f: spoil(f, lambda content: content[:-1]), "model.safetensors is no whole safetensors file"),
    "longer": (lambda f: spoil(f, lambda content: content + b"x"), "model.safetensors is no whole safetensors file"),
    "a pointer": (lambda f: spoil(f, lambda content: POINTER), r"no whole safetensors file.*git lfs pull"),
    "a shard is missing": (lambda f: [shards(f, TINY), index(f), (f / SECOND).unlink()], SECOND),
    "a broken index": (lambda f: (f / INDEX).write_text("{"), "index.json cannot be read"),
    "a name twice": (lambda f: [shards(f, TINY), index(f), save(f, SECOND, TINY)], "lost or doubled"),
    "shards without index": (lambda f: [shards(f, TINY), (f / WHOLE).unlink()], "neither model.safetensors nor"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_named(what, tiny):
    change, message = BROKEN[what]
    change(tiny)
    with pytest.raises(ConfigError, match=message):
        build(tiny)


def test_weights_that_do_not_fit_are_refused_by_name(model_folder):
    folder = model_folder("llama")
    whole = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in whole.items() if "layers.1.mlp.up_proj" not in k}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing.*layers.1.mlp.up_proj"):
        build(folder)
    save_file(whole | {"model.layers.0.extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unknown.*layers.0.extra"):
        build(folder)
    save_file(whole | {"model.norm.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.norm.weight is \[3\]"):
        build(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="convert to safetensors"):
        build(folder)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "complex64", "float8_e4m3fn"])
def test_weights_that_are_no_plain_floats_are_refused(dtype, model_folder):
    """Copied as they are, codes of 8 bits would be trained as if they were the weights."""
    folder = model_folder("smollm2")
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(whole | {name: whole[name].to(getattr(torch, dtype))}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"{name} is torch.{dtype}: lacuna reads no quantized weights"):
        build(folder)


# ---- parts of several ranks


def write_ranks(folder: Path, rows: list[torch.Tensor], begins: list[int]):
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    for rank, (part, begin) in enumerate(zip(rows, begins, strict=True)):
        places = json.dumps({"w": {"saved_offsets": [begin, 0]}})
        save_file({"w": part}, folder / f"rank_{rank:05}.safetensors", {"DCP_SHARDING_INFO": places})


def test_parts_of_several_ranks_are_put_together(tmp_path):
    whole = torch.randn(7, 3)
    write_ranks(tmp_path / "c", list(whole.split(3)), [0, 3, 6])
    got = torch.empty(7, 3)
    read_tensors({"w": got}, tmp_path / "c")
    assert torch.equal(got, whole) and torch.equal(tensors(tmp_path / "c")["w"], whole)


COVERS = {
    "the first is missing": ([1, 2], [3, 6]),
    "one between is missing": ([0, 2], [0, 6]),
    "the last is missing": ([0, 1], [0, 3]),
    "one is lost or doubled, and another is missing": ([0, 1, 1], [0, 3, 3]),
    "two overlap": ([0, 1, 2], [0, 2, 6]),
    "offsets far away": ([0], [10**12]),
}


@pytest.mark.parametrize("what", COVERS)
def test_parts_that_do_not_cover_a_tensor_exactly_once_are_refused_and_nothing_of_it_is_read(what, tmp_path):
    ranks, begins = COVERS[what]
    parts = torch.randn(7, 3).split(3)
    write_ranks(tmp_path / "c", [parts[rank] for rank in ranks], begins)
    got = torch.full((7, 3), 5.0)
    with pytest.raises(ConfigError, match=r"w (begins at|is)"):
        read_tensors({"w": got}, tmp_path / "c")
    assert (got == 5).all()


# ---- what the files and the config say against each other


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def test_a_head_that_differs_from_the_embedding_that_it_is_tied_to_is_refused_with_the_cure(tiny):
    """transformers unties the two without a word, and would train another model than the config says."""
    ids = torch.arange(20)[None]
    embedding = TINY["model.embed_tokens.weight"]
    save(tiny, WHOLE, TINY | {"lm_head.weight": embedding.flip(0)})
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from .*tie_word_embeddings"):
        build(tiny)
    trainee = build(tiny, "--model.overrides", '{"tie_word_embeddings": false}')
    own = trainee.model
    with torch.no_grad():
        hidden = trainee.hidden(pack([[ids[0].tolist()]], 20))
        assert torch.allclose(own.lm_head(hidden), logits(tiny, ids)[0], atol=1e-5)
    save(tiny, WHOLE, TINY | {"lm_head.weight": embedding.clone()})
    twice = build(tiny).model
    assert twice.config.tie_word_embeddings and twice.lm_head.weight is twice.get_input_embeddings().weight
    only_head = {name: tensor for name, tensor in TINY.items() if "embed" not in name} | {"lm_head.weight": embedding}
    save(tiny, WHOLE, only_head)
    assert torch.equal(build(tiny).model.get_input_embeddings().weight, embedding.float())


def test_all_special_ids_are_those_of_another_tokenizer_and_the_old_ones_are_words(tiny):
    """Of nn.Embedding's padding_idx the row has no gradient: the old one's must not be it."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tiny.with_name("tokenizer"))
    old = AutoTokenizer.from_pretrained(EXAMPLES / "tiny")
    assert old.pad_token_id != tokenizer.pad_token_id and len(tokenizer) == len(old)
    options = ["--model.tokenizer", str(tiny.with_name("tokenizer"))]
    GenerationConfig(bos_token_id=0, eos_token_id=[0, 3], pad_token_id=3).save_pretrained(tiny)
    trainee = build(tiny, *options, tokenizer=tokenizer)
    model = trainee.model
    words = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", str(tiny), *options]
    match_eos(load_config(None, words), model, tokenizer)
    for kind in ("bos", "eos", "pad"):
        ids = [getattr(c, f"{kind}_token_id") for c in (tokenizer, model.config, model.generation_config)]
        ids[2] = np.ravel(ids[2]).tolist()  # several may end a generation
        assert ids == [ids[0], ids[0], [ids[0]]] and ids[0] is not None, kind
    row = [[old.pad_token_id, 5, old.pad_token_id, 7]]
    trainee(pack([row], 4))[0].backward()
    assert model.get_input_embeddings().weight.grad[old.pad_token_id].norm() > 0


def test_what_ends_a_turn_learns_though_the_model_pads_with_it(tmp_path, tokenizer):
    """As SmolLM2 does. In torch an embedding gives the row of its padding_idx no gradient; here nothing is padded."""
    config = model_config("llama")
    config.pad_token_id = config.eos_token_id = 0
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    trainee = build(tmp_path, "--model.from_scratch", "true", tokenizer=tokenizer)
    embedding = trainee.model.get_input_embeddings().weight
    ids = [5, 0, 6, 7]
    trainee(pack([[ids]], 4))[0].backward()
    plain = AutoModelForCausalLM.from_config(trainee.model.config, attn_implementation="eager")
    plain.load_state_dict(trainee.model.state_dict())
    inputs = embedding[ids][None].detach().requires_grad_()  # [1, 4, H]: looked up by hand
    logits = plain(inputs_embeds=inputs, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").backward()
    torch.testing.assert_close(embedding.grad[0], inputs.grad[0, 1], rtol=1e-4, atol=1e-6)


def test_from_scratch_the_row_that_a_model_pads_with_is_drawn_as_others_are(tmp_path, tokenizer):
    """It may begin documents: zeros would go through every norm, with a gradient thousands of times the others'."""
    config = model_config("llama")
    config.pad_token_id = config.bos_token_id = 1
    config.save_pretrained(tmp_path)
    trainee = build(tmp_path, "--model.from_scratch", "true", tokenizer=tokenizer)
    norms = trainee.model.get_input_embeddings().weight.norm(dim=1)
    assert 0.5 < norms[1] / norms.mean() < 2


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_overrides_are_as_if_they_stood_in_the_config_that_a_model_is_made_with(name, tmp_path):
    config = model_config(name)
    config.save_pretrained(tmp_path)
    fields = {"num_hidden_layers": 4, "sliding_window": 16}
    if name != "mistral":
        fields |= {"use_sliding_window": True, "max_window_layers": 2}
    got = build(tmp_path, "--model.from_scratch", "true", "--model.overrides", json.dumps(fields)).model.config
    want = AutoConfig.for_model(name, **SMALL | ARCHITECTURES[name] | fields)
    for key in ("layer_types", "num_hidden_layers", "sliding_window", "head_dim"):
        assert getattr(got, key, None) == getattr(want, key, None), key


def test_an_override_leaves_layers_alone_that_follow_from_no_other_field(tmp_path):
    """As AutoConfig.from_pretrained(folder, sliding_window=16) does."""
    config = model_config("qwen3", num_hidden_layers=4)
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    config.save_pretrained(tmp_path)
    fields = {"sliding_window": 16, "use_sliding_window": True}
    got = build(tmp_path, "--model.from_scratch", "true", "--model.overrides", json.dumps(fields)).model.config
    assert got.layer_types == config.layer_types and got.sliding_window == 16


def test_an_override_of_rope_parameters_wins_over_their_older_name(tmp_path):
    model_config("llama").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    old = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old["original_max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_scaling": old, "rope_theta": 500000.0}))
    build_it = lambda *words: build(tmp_path, "--model.from_scratch", "true", *words).model.config  # noqa: E731
    assert build_it().rope_parameters["rope_type"] == "llama3"
    wanted = {"rope_type": "default", "rope_theta": 10000.0}
    got = build_it("--model.overrides", json.dumps({"rope_parameters": wanted}))
    assert got.rope_parameters == wanted


def test_overrides_of_the_wrong_type_or_against_each_other_are_a_sentence(tmp_path, tokenizer, texts):
    model_config("qwen3").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    argv = options(tmp_path, texts, tmp_path, "--model.from_scratch", "true", "--train.steps", "1")
    for fields in ({"hidden_size": "x"}, {"layer_types": ["full_attention"]}):
        with pytest.raises(ConfigError, match=r"model.overrides \{'" + next(iter(fields))):
            run(load_config(None, [*argv, "--model.overrides", json.dumps(fields)]))


@pytest.mark.parametrize("gone", [0, 1])
def test_a_checkpoint_without_one_of_its_files_is_refused_everywhere(gone, tmp_path):
    """Rows of the last rank would simply not be there: an export would be a smaller model."""
    shutil.copy(EXAMPLES / "tiny" / "config.json", tmp_path)
    files = [tmp_path / f"rank_{rank:05}.safetensors" for rank in range(2)]
    for rank, file in enumerate(files):
        places = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2 * rank, 0]}})}
        save_file({"w": torch.ones(2, 3)}, file, places)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "seals.json").write_text(json.dumps(seal(files)))
    read_tensors({"w": torch.zeros(4, 3)}, tmp_path)
    (tmp_path / f"rank_{gone:05}.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"rank_{gone:05}.safetensors is missing"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"rank_{gone:05}.safetensors is missing"):
        weight_folder(str(tmp_path))


@pytest.mark.parametrize("size", range(1, 9))
def test_weights_of_bfloat16_held_in_float32_are_told_apart(size, tmp_path):
    """Half of the bytes of such a file are 0: a sample must not consist of these."""
    for name in ("one", "two"):
        save_file({"w": torch.randn(size * 2**16).bfloat16().float()}, tmp_path / f"{name}.safetensors")
    assert fingerprint([tmp_path / "one.safetensors"]) != fingerprint([tmp_path / "two.safetensors"])


def test_a_model_of_more_layers_than_can_be_made_is_refused(tiny):
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        build(tiny, "--model.from_scratch", "true", "--model.overrides", '{"num_hidden_layers": 10000000}')
