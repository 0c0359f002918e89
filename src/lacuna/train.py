"""The run, top to bottom: set up, build, evaluate, loop, export."""

import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from lacuna.checkpoint import export
from lacuna.config import Config, ConfigError, to_toml
from lacuna.data.conversations import ChatEncoder
from lacuna.data.loader import Loader, PackedBatch, RowDataset
from lacuna.data.tokenize import Encoder, load_tokenizer, token_bytes
from lacuna.metrics import Report, log, start_logging
from lacuna.model import Trainee, build_model
from lacuna.optim import build_optimizer, learning_rate
from lacuna.parallel import Ranks, clip_gradients, start, sum_over_ranks


def run(config: Config) -> Path:
    """Train as `config` says; returns the run folder, with the model in its `hf`."""
    # Set up: ranks, run folder, tokenizer.
    ranks = start(config.dist, config.train)
    folder = Path(config.out) / config.name
    start_logging(folder, ranks.rank)
    if ranks.rank == 0:
        (folder / "config.toml").write_text(to_toml(config))
    tokenizer = load_tokenizer(config.model)
    encoder = ChatEncoder(tokenizer, config) if config.task == "sft" else Encoder(tokenizer)

    # Data comes before the model, so that it is read ahead while the model is built.
    fraction = config.eval.fraction or 0.0
    where = (encoder, ranks.rank, ranks.world)
    dataset = RowDataset(config, config.data.sources, *where, config.train.epochs, share=(fraction, 1))
    steps = config.train.steps or math.ceil(dataset.count_rows() / config.train.global_batch_size)
    if config.optim.warmup_steps >= steps:
        raise ConfigError(f"optim.warmup_steps {config.optim.warmup_steps} must be below the run's {steps} steps")
    loader = Loader(config, dataset, ranks.device)
    held_out, sources = None, config.eval.sources or (config.data.sources if fraction else [])
    if sources:
        held_out = RowDataset(config, sources, *where, 1, config.eval.rows, share=(0, fraction or 1))

    # Model, optimizer, and where the run reports to.
    trainee = build_model(config, ranks, len(tokenizer))
    optimizer = build_optimizer(trainee, config.optim)
    parameters = list(trainee.parameters())
    report = Report(config, ranks, folder, steps, trainee)
    sizes = torch.from_numpy(token_bytes(tokenizer)).to(ranks.device)
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * ranks.world)
    failed = torch.zeros((), device=ranks.device)  # becomes 1 at the first loss or gradient that is not finite
    report.write({"step": 0, "documents": sum((source.notes for source in dataset.sources), Counter())})
    if held_out:
        report.evaluation(0, evaluate(trainee, config, held_out, ranks, sizes))

    report.start_clock()
    for step in range(1, steps + 1):
        # 1. All micro-batches of the step, and what they hold together over all ranks.
        begin = time.perf_counter()
        batches = [loader.next() for _ in range(accumulation)]
        data_seconds = time.perf_counter() - begin
        counts = torch.tensor([[b.trained_tokens, b.tokens, b.pairs, b.checksum, b.dropped] for b in batches]).sum(0)
        counts = sum_over_ranks(counts.to(ranks.device, non_blocking=True))

        # 2. Forward and backward; every trained token of the global batch weighs the same.
        loss = accumulate_gradients(trainee, batches, counts[0].clamp(min=1), ranks)

        # 3. Clip and step, unless something is not finite: then the device updates nothing, now or later.
        norm, squares = clip_gradients(parameters, config.train.max_grad_norm, ranks.mesh)
        losses = torch.zeros(1 + ranks.world, device=ranks.device, dtype=torch.float64)
        losses[0], losses[1 + ranks.rank] = loss, ~loss.isfinite()  # the mean, and a mark for each bad rank
        sum_over_ranks(losses)
        failed = torch.maximum(failed, (~(norm + losses[0]).isfinite()).float())
        lr = learning_rate(config.optim, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = failed
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. Report the step, or on a GPU the one before, while this one runs.
        facts = {"step": step, "lr": lr, "epoch": max(b.epoch for b in batches), "data_seconds": data_seconds}
        evaluating = bool(held_out) and (step == steps or (config.eval.every and step % config.eval.every == 0))
        report.step(facts, torch.cat([losses, norm[None], squares]), counts, wait=evaluating or step == steps)
        if evaluating:
            report.evaluation(step, evaluate(trainee, config, held_out, ranks, sizes))

    # The end: a plain Hugging Face folder.
    loader.close()
    if config.task == "sft":
        encoder.adapt(tokenizer)
    export(config, trainee, tokenizer, folder / "hf", ranks.rank)
    report.close()
    log.info("The model is in %s, a folder for transformers' from_pretrained. Next:", folder / "hf")
    if config.task == "sft":
        log.info("lacuna chat %s", folder)
    log.info("lacuna %s CONFIG.toml --name NEW --model.name %s --model.from_scratch false", config.task, folder / "hf")
    if dist.is_initialized():
        dist.destroy_process_group()
    return folder


def accumulate_gradients(trainee: Trainee, batches: list[PackedBatch], trained_tokens, ranks: Ranks) -> torch.Tensor:
    """Forward and backward of this rank's micro-batches; returns its part of the step's mean loss.

    trained_tokens counts the whole global batch, so gradients add up to the mean over all its trained tokens.
    """
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(batches):
        if ranks.mesh is not None:
            trainee.set_requires_all_reduce(i == len(batches) - 1)  # between replicas, once a step is enough
        loss = trainee(batch) / trained_tokens
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(trainee: Trainee, config: Config, dataset: RowDataset, ranks: Ranks, sizes: torch.Tensor) -> dict:
    """Mean loss a token (nats) and bits a byte over held-out data; sizes [V] are the bytes of each token.

    Every rank takes as many rows, and one that has no data left feeds rows that train nothing: so nobody hangs.
    """
    data = config.data.model_copy(update={"context_len": None, "context_warmup_steps": 0, "workers": 0})
    loader = Loader(config.model_copy(update={"data": data}), dataset, ranks.device)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)  # nats, tokens, bytes
    trainee.eval()
    for _ in range(math.ceil(config.eval.rows / (config.train.micro_batch_size * ranks.world))):
        batch = loader.next()
        trained = batch.labels >= 0
        if not sum_over_ranks(trained.sum()).item():
            continue  # and not the end: of several streams, one may end before the others
        size = (sizes[batch.labels.clamp(min=0)] * trained).sum()
        sums += torch.stack([trainee(batch).double(), trained.sum().double(), size.double()])
    nats, tokens, size = sum_over_ranks(sums).tolist()
    trainee.train()
    loader.close()
    if ranks.mesh is not None:
        trainee.reshard()  # the root stays gathered after a forward without a backward
    bits = nats / math.log(2) / max(size, 1)
    return {"eval_loss": nats / max(tokens, 1), "eval_bits_per_byte": bits, "eval_tokens": int(tokens)}
