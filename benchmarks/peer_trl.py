"""TRL's SFTTrainer as a peer: a randomly initialised Qwen3-1.7B on packed random documents, one GPU.

usage: peer_trl.py [attn=flash_attention_4|sdpa] [liger=0|1] [compile=0|1] [L=4096] [B=4] [unif=0] [steps=10]
unif=N: every document has N tokens; unif=0: log-normal lengths, mean 600, cut at L.
Needs LACUNA_ASSETS, for a tokenizer, trl, datasets (and flash-attn-4[cu13] for flash_attention_4). It prints the median step time, peak memory and
tokens/s counted two ways: slots (rows x L) and real (document tokens, padding left out).
"""

import math
import os
import pathlib
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, TrainerCallback
from trl import SFTConfig, SFTTrainer

opt = dict(attn="flash_attention_4", liger=1, compile=0, L=4096, B=4, unif=0, steps=10)
for a in sys.argv[1:]:
    k, v = a.split("=")
    opt[k] = type(opt[k])(v)
cfg = Qwen3Config(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
    max_position_embeddings=40960,
)
tok = PreTrainedTokenizerFast(
    tokenizer_file=str(pathlib.Path(os.environ["LACUNA_ASSETS"]) / "tokenizer/smollm2/tokenizer.json"),
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
)
torch.manual_seed(0)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation=opt["attn"], dtype=torch.float32)
rows, total = [], 0
while total < opt["L"] * opt["B"] * (opt["steps"] + 8):
    n = opt["unif"] or int(torch.distributions.LogNormal(math.log(600) - 0.5, 1.0).sample().clamp(16, opt["L"]))
    rows.append({"input_ids": torch.randint(100, 40000, (n,)).tolist()})
    total += n
times = []


class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.t = time.time()

    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        times.append(time.time() - self.t)


args = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_length=opt["L"],
    packing=True,
    per_device_train_batch_size=opt["B"],
    gradient_checkpointing=False,
    bf16=True,
    use_liger_kernel=bool(opt["liger"]),
    max_steps=opt["steps"] + 5,
    logging_steps=5,
    report_to="none",
    save_strategy="no",
    torch_compile=bool(opt["compile"]),
    optim="adamw_torch_fused",
    dataloader_drop_last=True,
)
trainer = SFTTrainer(
    model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tok, callbacks=[Clock()]
)
fill = sum(len(r["input_ids"]) for r in trainer.train_dataset) / (len(trainer.train_dataset) * opt["L"])
trainer.train()
median = statistics.median(times[5:])
slots = opt["L"] * opt["B"] / median
print(
    "TRL",
    opt,
    f"step {median * 1e3:.0f} ms, slots/s {slots:.0f}, real tokens/s {slots * fill:.0f}, fill {fill:.4f}, "
    f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
)
