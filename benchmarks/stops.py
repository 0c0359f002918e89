"""Whether a fine-tuned model ends its turns: greedy answers to held-out prompts, in plain transformers.

usage: uv run python benchmarks/stops.py RUN_FOLDER [PROMPTS=20] [MAX_NEW_TOKENS=400]
The prompts are the first turns of the conversations that eval.fraction kept out of training.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna.config import load_config
from lacuna.data.conversations import ChatEncoder
from lacuna.data.loader import RowDataset
from lacuna.data.tokenize import load_tokenizer

folder = Path(sys.argv[1])
prompts, limit = (int(word) for word in [*sys.argv[2:], "20", "400"][:2])
config = load_config(str(folder / "config.toml"), [], "sft")
encoder = ChatEncoder(load_tokenizer(config.model), config)
held_out = RowDataset(config, config.data.sources, encoder, 0, 1, 1, share=(0, config.eval.fraction)).sources[0]
tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
model = AutoModelForCausalLM.from_pretrained(folder / "hf")
stopped = 0
for document in sorted(held_out.documents.tolist())[:prompts]:
    tokens = held_out.load(document)
    first_trained = int((tokens >= 0).argmax())
    prompt = tokenizer.decode(~tokens[:first_trained])
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].shape[1] :]
    stopped += int(out[-1] == tokenizer.eos_token_id)
    print(f"{len(out):4} tokens, ends with {tokenizer.decode(out[-1:])!r}: {tokenizer.decode(out)[:70]!r}", flush=True)
print(f"{stopped} of {prompts} greedy answers end with {tokenizer.eos_token}")
