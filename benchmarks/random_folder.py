"""Random weights of a shape in a folder as the Hub has it, and documents to train it on: RESULTS.md measured with them.

usage: random_folder.py SHAPE OUT, where SHAPE is a folder with config.json, such as benchmarks/qwen3_1.7b.
OUT gets bfloat16 weights, normal with a deviation of .02 (norms: 1), the tokenizer of examples/tiny, and docs.jsonl:
1,676 documents of random ids, log-normal in length (median 400, sigma 1), at most 4,096 long. For speed and memory
alone: no layer begins as its model's would.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARD_BYTES = 5e9
DOCUMENTS = 1676
LONGEST = 4096


def write_weights(shape: Path, out: Path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    places = {}
    shard = {}

    def write():
        file = f"model-{len(set(places.values())):05}.safetensors"
        save_file(shard, out / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        weight = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(std=0.02)
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        shard[name] = weight.cpu()
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            write()
    write()
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def write_documents(file: Path, vocabulary: int):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(400), 1.0, DOCUMENTS).clip(8, LONGEST).astype(int)
    with file.open("w") as lines:
        for length in lengths:
            ids = rng.integers(10, vocabulary, length).tolist()
            lines.write(json.dumps({"input_ids": ids}) + "\n")


def main():
    shape, out = map(Path, sys.argv[1:])
    tiny = Path(__file__).parents[1] / "examples" / "tiny"
    shutil.copytree(tiny, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "generation*"))
    shutil.copytree(shape, out, dirs_exist_ok=True)
    write_weights(shape, out)
    vocabulary = len(json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"])
    write_documents(out / "docs.jsonl", vocabulary)


if __name__ == "__main__":
    main()
