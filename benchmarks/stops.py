"""Whether a fine-tuned model ends its turns: greedy answers to held-out prompts, in plain transformers.

usage: uv run python benchmarks/stops.py RUN_FOLDER [PROMPTS=20] [MAX_NEW_TOKENS=1024]
The prompts are the first turns of the conversations that eval.fraction kept out of training.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna.config import load_config
from lacuna.data.conversations import make_encoder
from lacuna.data.loader import RowDataset
from lacuna.data.tokenize import load_tokenizer

folder = Path(sys.argv[1])
prompts, limit = (int(word) for word in [*sys.argv[2:], "20", "1024"][:2])
config = load_config(str(folder / "config.toml"), [], "sft")
encoder = make_encoder(config, load_tokenizer(config.model))
share = (0, config.eval.fraction)
held_out = RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, share=share).sources[0]
tokenizer = AutoTokenizer.from_pretrained(folder / "hf", padding_side="left")
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).to(device)
texts = []
for document in sorted(held_out.documents.tolist())[:prompts]:
    tokens = held_out.load(document)
    texts.append(tokenizer.decode(~tokens[: int((tokens >= 0).argmax())]))
inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
answers = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[:, inputs["input_ids"].shape[1] :].tolist()
stopped = 0
for answer in answers:
    ends = tokenizer.eos_token_id in answer
    stopped += ends
    text = tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)] if ends else answer)
    print(f"{'stops' if ends else 'goes on'} after {len(tokenizer(text)['input_ids'])} tokens: {text[:70]!r}")
print(f"{stopped} of {prompts} greedy answers end with {tokenizer.eos_token}")
