"""TRL's DPOTrainer as a peer: pairs of plain text, one GPU, full training or PEFT LoRA. After peer_trl_lora.py.

usage: peer_trl_dpo.py model=FOLDER pairs=FILE [r=0|32] [gc=0|1] [attn=flash_attention_4|sdpa|eager] [liger=0|1] [compile=0|1]
       [ref=bfloat16|float32] [precompute=0|1] [group=0|1] [L=4096] [B=4] [steps=12] [tok=tokenizer.json] [json=FILE] [name=trl]
r=0: full training, float32 weights under bf16 autocast, the reference a copy in `ref`; r: LoRA of that rank over all linear layers but the
head, alpha 2r, base in bfloat16, the reference is the base without adapters. precompute: the reference's log-probabilities before training
(timed by itself). gc: gradient checkpointing. group: batches of like lengths (LengthGroupedSampler), so that less is padded. B: PAIRS a batch.
Real tokens: of prompt and answer, both sides, padding left out (the sum of the attention mask); rates are all tokens over all seconds of
the steps after 5 of warming up (group: as many as are timed), `median` the median step's.
Needs LACUNA_ASSETS, for a tokenizer.
"""

import json
import os
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOConfig, DPOTrainer

opt = dict(
    model="",
    pairs="",
    r=0,
    gc=0,
    attn="flash_attention_4",
    liger=1,
    compile=0,
    ref="bfloat16",
    precompute=0,
    group=0,
    L=4096,
    B=4,
    steps=12,
    json="",
    name="trl",
    lr=1e-6,
    beta=0.1,
    tok=f"{os.environ['LACUNA_ASSETS']}/tokenizer/smollm2/tokenizer.json",
)
for a in sys.argv[1:]:
    k, v = a.split("=", 1)
    opt[k] = type(opt[k])(v)
WARM = (
    opt["steps"] if opt["group"] else 5
)  # a LengthGroupedSampler's group is taken from its longest to its shortest: the second one is timed
cuda = torch.cuda.is_available()
sync = torch.cuda.synchronize if cuda else lambda: None
gib = (lambda: torch.cuda.max_memory_allocated() / 2**30) if cuda else (lambda: 0.0)
tok = PreTrainedTokenizerFast(tokenizer_file=opt["tok"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
device = "cuda" if cuda else "cpu"


def load(dtype):
    return AutoModelForCausalLM.from_pretrained(
        opt["model"], dtype=dtype, attn_implementation=opt["attn"], device_map=device
    )


model = load(torch.bfloat16 if opt["r"] else torch.float32)
wanted = opt["B"] * (opt["steps"] + WARM)
rows = []
for line in open(opt["pairs"]):
    rows.append(json.loads(line))
    if len(rows) >= (
        4 * opt["B"] * opt["steps"] if opt["group"] else wanted
    ):  # a group is a quarter of all, or 50 batches
        break
assert len(rows) >= wanted, f"{len(rows)} pairs, {wanted} wanted"
times, peaks, tokens, slots = [], [], [], []


class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sync()
        self.t = time.time()

    def on_step_end(self, *args, **kwargs):
        sync()
        times.append(time.time() - self.t)
        if cuda:
            peaks.append(gib())
            torch.cuda.reset_peak_memory_stats()


class Counting(DPOTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        tokens.append(inputs["attention_mask"].sum())
        slots.append(inputs["attention_mask"].numel())
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):  # transformers' own option wants a column that TRL removes
        if not opt["group"]:
            return super()._get_train_sampler(train_dataset)
        columns = [(train_dataset or self.train_dataset)[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        return LengthGroupedSampler(
            opt["B"], lengths=[len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
        )

    def _precompute_ref_logps(self, *args, **kwargs):
        sync()
        begin = time.time()
        out = super()._precompute_ref_logps(*args, **kwargs)
        sync()
        self.pre_seconds = time.time() - begin
        return out


args = DPOConfig(
    output_dir=tempfile.mkdtemp(),
    max_length=opt["L"],
    per_device_train_batch_size=opt["B"],
    beta=opt["beta"],
    learning_rate=opt["lr"],
    gradient_checkpointing=bool(opt["gc"]),
    bf16=True,
    use_liger_kernel=bool(opt["liger"]),
    max_steps=opt["steps"] + WARM,
    precompute_ref_log_probs=bool(opt["precompute"]),
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    torch_compile=bool(opt["compile"]),
    optim="adamw_torch_fused",
    dataloader_drop_last=True,
    use_cpu=not cuda,
)
lora = None
if opt["r"]:
    from peft import LoraConfig

    lora = LoraConfig(
        r=opt["r"], lora_alpha=2 * opt["r"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
reference = None if opt["r"] or opt["precompute"] else load(getattr(torch, opt["ref"]))
data = Dataset.from_list(rows)
trainer = Counting(
    model=model,
    ref_model=reference,
    args=args,
    train_dataset=data,
    processing_class=tok,
    callbacks=[Clock()],
    peft_config=lora,
)
trained = [p for p in trainer.model.parameters() if p.requires_grad]
print(
    f"trained {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in trainer.model.parameters()):,} parameters, in "
    f"{sorted({str(p.dtype) for p in trained})}, base {trainer.model.get_input_embeddings().weight.dtype}, reference "
    f"{trainer.ref_model and next(trainer.ref_model.parameters()).dtype}",
    flush=True,
)
peaks.append(gib())
trainer.train()
taken = [int(t) for t in tokens][WARM:]
seconds = times[WARM:]
real = sum(taken) / sum(seconds)
median = statistics.median(t / s for t, s in zip(taken, seconds, strict=True))
fill = sum(taken) / sum(slots[WARM:])
pairs_a_second = opt["B"] * len(seconds) / sum(seconds)
pre = getattr(trainer, "pre_seconds", 0.0)
every = trainer.train_dataset
all_tokens = sum(
    2 * len(p) + len(c) + len(r)
    for p, c, r in zip(every["prompt_ids"], every["chosen_ids"], every["rejected_ids"], strict=True)
)
pre_real = all_tokens / pre if pre else 0.0
both = 1 / (1 / real + 1 / pre_real) if pre else 0.0  # one epoch: each token is passed once before, once in training
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
peak, ever = max(peaks[-opt["steps"] :]), max(peaks)
print(
    "TRL",
    opt,
    f"real tokens/s {real:.0f} (median {median:.0f}), step {1e3 * statistics.mean(seconds):.0f} ms, fill {fill:.4f}, pairs/s "
    f"{pairs_a_second:.2f}, peak {peak:.1f} GiB (ever {ever:.1f}), losses {losses[0]:.4f} {losses[-1]:.4f}, precompute {pre:.1f} s",
)
if opt["json"]:
    with open(opt["json"], "a") as out:
        out.write(
            json.dumps(
                {
                    "run": opt["name"],
                    "r": opt["r"],
                    "real": real,
                    "median": median,
                    "ms": 1e3 * statistics.mean(seconds),
                    "fill": fill,
                    "gib": peak,
                    "ever": ever,
                    "pairs": pairs_a_second,
                    "steps": len(seconds),
                    "precompute": opt["precompute"],
                    "pre_seconds": pre,
                    "pre_real": pre_real,
                    "both": both,
                    "losses": losses,
                    "opt": opt,
                    "times": [round(t, 4) for t in times],
                }
            )
            + "\n"
        )
