"""The same 32 pairs through TRL's DPOTrainer and examples/dpo.py, float32 on a CPU: the losses of the first steps.

usage: uv run --with trl==1.16.0 python benchmarks/dpo_beside_trl.py

All pairs are one step's batch, so that nobody's order of data matters: TRL pads them, lacuna packs them into rows.
AdamW's epsilon is 1 on both sides, which makes of it gradient descent with momentum: with a small one, parameters whose
gradient is rounding noise would walk as far as the others, each trainer's its own way. Exits with 1 over a difference
of 1e-4. Text is plain, and ends with the tokenizer's EOS: in ChatML, TRL scores the newline after the stop token, too.
"""

import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from lacuna.config import Config, load_config
from lacuna.data.loader import RowDataset
from lacuna.data.tokenize import load_tokenizer
from lacuna.train import run

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = str(EXAMPLES / "dpo.py")
PAIRS, STEPS, BAR = 32, 8, 1e-4
RATES = {"dpo": 5e-3, "ipo": 2e-3}  # so that a loss changes by a tenth or more
IN_TRL = {"dpo": "sigmoid", "ipo": "ipo"}
BETAS = (0.9, 0.95)


def make_pairs() -> list[dict]:
    """A book's next words, or others, of very uneven lengths."""
    text = json.loads((EXAMPLES / "moby_dick" / "train.jsonl").read_text().splitlines()[0])["text"]
    words = text.split()
    pairs = []
    for number in range(PAIRS):
        begin = 120 * number % (len(words) - 250)
        asked = begin + 2 + 5 * number % 19
        said = asked + 2 + 13 * number % 71
        other = words[begin + 100 : begin + 102 + 29 * number % 97]
        row = {"prompt": " ".join(words[begin:asked]), "chosen": " " + " ".join(words[asked:said])}
        pairs.append(row | {"rejected": " " + " ".join(reversed(other))})
    return pairs


def losses_of_lacuna(loss: str, model: Path, pairs: Path, folder: Path) -> list[dict]:
    words = ["--model.name", str(model), "--model.dtype", "float32", "--train.seq_len", "512"]
    words += ["--data.sources", json.dumps([{"path": str(pairs)}]), "--data.cache", str(folder / "cache")]
    words += ["--train.steps", str(STEPS), "--train.micro_batch_size", "1", "--train.max_grad_norm", "1e9"]
    words += ["--recipe", json.dumps({"loss": loss, "beta": 0.1}), "--optim.lr", str(RATES[loss]), "--optim.eps", "1.0"]
    words += ["--optim.betas", json.dumps(BETAS), "--optim.weight_decay", "0", "--optim.schedule", "constant"]
    words += ["--log.every", "1", "--out", str(folder), "--name", loss]
    rows = count_rows(load_config(None, [*words, "--train.global_batch_size", "1"], RECIPE))
    path = run(load_config(None, [*words, "--train.global_batch_size", str(rows)], RECIPE))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def count_rows(config: Config) -> int:
    encoder = runpy.run_path(RECIPE)["make_encoder"](config, load_tokenizer(config.model))
    return RowDataset(config, config.data.sources, encoder, rank=0, ranks=1, epochs=1).count_rows()


def losses_of_trl(loss: str, model: Path, pairs: list[dict], folder: Path) -> list[dict]:
    settings = DPOConfig(
        output_dir=str(folder / f"trl_{loss}"),
        loss_type=[IN_TRL[loss]],
        beta=0.1,
        max_length=None,
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=RATES[loss],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=1.0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32", attn_implementation="eager"),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def main():
    transformers.utils.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp())
    model = folder / "model"
    shutil.copytree(EXAMPLES / "tiny", model)
    (model / "chat_template.jinja").unlink()
    pairs = make_pairs()
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    worst = 0.0
    for loss in RATES:
        mine = losses_of_lacuna(loss, model, file, folder)
        theirs = losses_of_trl(loss, model, pairs, folder)
        print(f"\n{loss}\nstep     lacuna        TRL  difference      margins        gradient norms")
        for a, b in zip(mine, theirs, strict=True):
            difference = abs(a["loss"] - b["loss"])
            worst = max(worst, difference)
            margins = f"{a['reward_margin']:9.6f} {b['rewards/margins']:9.6f}"
            norms = f"{a['grad_norm']:9.6f} {b['grad_norm']:9.6f}"
            print(f"{a['step']:4} {a['loss']:10.7f} {b['loss']:10.7f}     {difference:.1e}  {margins}  {norms}")
    shutil.rmtree(folder)
    print(f"\nworst difference {worst:.1e}, bar {BAR:.0e}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
