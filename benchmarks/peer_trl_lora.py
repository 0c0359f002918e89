"""TRL's SFTTrainer with PEFT LoRA as a peer: a random model, packed random documents, one GPU. After peer_trl.py.

usage: peer_trl_lora.py [shape=1.7b|8b|tiny|FOLDER] [r=32] [gc=0|1] [attn=flash_attention_4|sdpa|eager] [liger=0|1] [compile=0|1]
       [L=4096] [B=4] [unif=0] [steps=10] [docs=FILE] [tok=tokenizer.json] [json=FILE] [name=trl] [pure=0|1]
r: rank of LoRA over all linear layers but the head, alpha 2r, no dropout, base in bfloat16 (PEFT keeps adapters in float32,
TRL runs under bf16 autocast); r=0: full training, float32 weights (pure=1: bfloat16), as peer_trl.py. gc: gradient checkpointing (TRL's default is 1).
docs: lines of {"input_ids": [...]}, else unif=N: documents of N tokens, unif=0: log-normal, mean 600, cut at L.
It prints the median step time, peak memory (of the steps after 5 of warming up; and ever) and tokens/s counted two ways:
slots (rows x L) and real (document tokens, padding left out). json: the same as a line of FILE.
Needs LACUNA_ASSETS, for a tokenizer.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

opt = dict(
    shape="1.7b",
    r=32,
    gc=0,
    attn="flash_attention_4",
    liger=1,
    compile=0,
    L=4096,
    B=4,
    unif=0,
    steps=10,
    docs="",
    json="",
    name="trl",
    pure=0,
    tok=f"{os.environ['LACUNA_ASSETS']}/tokenizer/smollm2/tokenizer.json",
)
for a in sys.argv[1:]:
    k, v = a.split("=", 1)
    opt[k] = type(opt[k])(v)
cuda = torch.cuda.is_available()  # without: to see that arguments are accepted
llama = dict(
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    max_position_embeddings=8192,
    use_cache=False,
)
shapes = {
    "1.7b": lambda: Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    ),
    "8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        **llama,
    ),
    "tiny": lambda: Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    "tinyllama": lambda: LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=49152,
        tie_word_embeddings=False,
        **llama,
    ),
}
tok = PreTrainedTokenizerFast(tokenizer_file=opt["tok"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
torch.manual_seed(0)
with torch.device("cuda" if cuda else "cpu"):
    config = AutoConfig.from_pretrained(opt["shape"]) if "/" in opt["shape"] else shapes[opt["shape"]]()
    dtype = torch.bfloat16 if opt["r"] or opt["pure"] else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=opt["attn"], dtype=dtype)
rows, total, wanted = [], 0, opt["L"] * opt["B"] * (opt["steps"] + 8)
if opt["docs"]:
    for line in open(opt["docs"]):
        rows.append({"input_ids": json.loads(line)["input_ids"]})
        total += len(rows[-1]["input_ids"])
        if total >= wanted:
            break
while total < wanted and not opt["docs"]:
    n = opt["unif"] or int(torch.distributions.LogNormal(math.log(600) - 0.5, 1.0).sample().clamp(16, opt["L"]))
    rows.append({"input_ids": torch.randint(100, 40000, (n,)).tolist()})
    total += n
times, peaks = [], []
sync = torch.cuda.synchronize if cuda else lambda: None


class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sync()
        self.t = time.time()

    def on_step_end(self, *args, **kwargs):
        sync()
        times.append(time.time() - self.t)
        if cuda:
            peaks.append(torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()


args = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_length=opt["L"],
    packing=True,
    per_device_train_batch_size=opt["B"],
    gradient_checkpointing=bool(opt["gc"]),
    bf16=True,
    use_liger_kernel=bool(opt["liger"]),
    max_steps=opt["steps"] + 5,
    logging_steps=5,
    report_to="none",
    save_strategy="no",
    torch_compile=bool(opt["compile"]),
    optim="adamw_torch_fused",
    dataloader_drop_last=True,
    use_cpu=not cuda,
)
lora = (
    LoraConfig(
        r=opt["r"], lora_alpha=2 * opt["r"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    if opt["r"]
    else None
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=Dataset.from_list(rows),
    processing_class=tok,
    callbacks=[Clock()],
    peft_config=lora,
)
trained = [p for p in trainer.model.parameters() if p.requires_grad]
print(
    f"trained {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in trainer.model.parameters()):,} parameters, in "
    f"{sorted({str(p.dtype) for p in trained})}, base {trainer.model.get_input_embeddings().weight.dtype}",
    flush=True,
)
fill = sum(len(r["input_ids"]) for r in trainer.train_dataset) / (len(trainer.train_dataset) * opt["L"])
peaks.append(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0)
trainer.train()
median = statistics.median(times[5:])
slots = opt["L"] * opt["B"] / median
peak, ever = max(peaks[-opt["steps"] :]), max(peaks)
print(
    "TRL",
    opt,
    f"step {median * 1e3:.0f} ms, slots/s {slots:.0f}, real tokens/s {slots * fill:.0f}, fill {fill:.4f}, "
    f"peak {peak:.1f} GiB (ever {ever:.1f})",
)
if opt["json"]:
    with open(opt["json"], "a") as out:
        out.write(
            json.dumps(
                {
                    "run": opt["name"],
                    "real": slots * fill,
                    "slots": slots,
                    "ms": median * 1e3,
                    "fill": fill,
                    "gib": peak,
                    "ever": ever,
                    "steps": len(times) - 5,
                    "times": [round(t, 4) for t in times],
                }
            )
            + "\n"
        )
