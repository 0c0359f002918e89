"""The loss curve of a plain training loop, to lay beside that of `lacuna pt` with the same config.

usage: python benchmarks/curves.py CONFIG.toml OUT.jsonl [--section.key VALUE ...]

What is compared is everything after the rows: transformers' own model with its own attention (sdpa under a mask that is
made from position_ids), bfloat16 autocast on a GPU, torch's cross-entropy over full logits, torch's clipping and AdamW.
The rows are lacuna's, and model.name must be a folder with weights, so that both begin with the same.
"""

import json
import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lacuna.config import load_config
from lacuna.data.loader import Loader, RowDataset
from lacuna.data.tokenize import TextEncoder, load_tokenizer
from lacuna.optim import learning_rate


def main():
    path, out, *argv = sys.argv[1:]
    config = load_config(path, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = RowDataset(config, config.data.sources, TextEncoder(load_tokenizer(config.model)), rank=0, ranks=1)
    loader = Loader(config, dataset, device)
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).to(device)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decay = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    rest = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.optim.betas), eps=config.optim.eps)
    rows, size = config.train.micro_batch_size, config.train.seq_len
    assert config.train.global_batch_size == rows, "one micro-batch a step"
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    with open(out, "w") as file:
        for step in range(1, config.train.steps + 1):
            [batch] = loader.step()
            ids, labels, positions = (
                getattr(batch, key).view(rows, size) for key in ("input_ids", "labels", "position_ids")
            )
            document = (positions == 0).cumsum(1)
            mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step - 1, config.train.steps)
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps({"step": step, "loss": loss.item(), "grad_norm": norm.item()}) + "\n")
    loader.close()


if __name__ == "__main__":
    main()
