"""The run, top to bottom: set up, find a checkpoint, build, evaluate, loop, save, export."""

import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from lacuna.checkpoint import Checkpoints, export, find_checkpoint, in_order, optimizer_tensors, read_state
from lacuna.config import Config, ConfigError, NonFinite, Preempted, to_toml
from lacuna.data.conversations import ChatEncoder
from lacuna.data.loader import Loader, PackedBatch, RowDataset
from lacuna.data.tokenize import Encoder, load_tokenizer, token_bytes
from lacuna.metrics import Report, log, start_logging
from lacuna.model import Trainee, build_model, read_tensors
from lacuna.optim import AdamW, learning_rate
from lacuna.parallel import Ranks, gradient_norm, start, sum_over_ranks
from lacuna.preemption import Preemption
from lacuna.profile import Profile


def run(config: Config) -> Path:
    """Train as `config` says; returns the run folder, with the model in its `hf`. Raises Preempted after a signal."""
    # Set up: ranks, run folder, what to go on from, tokenizer.
    preemption = Preemption()
    ranks = start(config.dist, config.train)
    folder = Path(config.out) / config.name
    start_logging(folder, ranks.rank)
    lock = FileLock(folder / ".lock")  # released when this process ends, however it ends
    if ranks.rank == 0:
        try:
            lock.acquire(timeout=60)  # the ranks of a run that is just being ended may still be there
        except Timeout:
            raise ConfigError(f"{folder} is in use by another run: wait for it, or set another name") from None
    checkpoint = find_checkpoint(config, folder, ranks.rank)
    state = read_state(checkpoint, config)
    if ranks.rank == 0:
        (folder / "config.toml").write_text(to_toml(config))
    tokenizer = load_tokenizer(config.model)
    encoder = ChatEncoder(tokenizer, config) if config.task == "sft" else Encoder(tokenizer)

    # Data comes before the model, so that it is read ahead while the model is built.
    fraction = config.eval.fraction or 0.0
    where = (encoder, ranks.rank, ranks.world)
    dataset = RowDataset(config, config.data.sources, *where, config.train.epochs, share=(fraction, 1))
    inventory = [source.inventory for source in dataset.sources]
    if state.get("inventory", inventory) != inventory and not config.checkpoint.resume_changed:
        cure = "bring it back, set another name, or checkpoint.resume_changed = true"
        raise ConfigError(f"data.sources: the data of {checkpoint} was {state['inventory']}, now {inventory}: {cure}")
    steps = config.train.steps or math.ceil(dataset.count_rows() / config.train.global_batch_size)
    if config.optim.warmup_steps >= steps:
        raise ConfigError(f"optim.warmup_steps {config.optim.warmup_steps} must be below the run's {steps} steps")
    loader = Loader(config, dataset, ranks.device, state["data"])
    held_out, sources = None, config.eval.sources or (config.data.sources if fraction else [])
    if sources:
        held_out = RowDataset(config, sources, *where, 1, config.eval.rows, share=(0, fraction or 1))

    # Model, optimizer, and where the run reports to.
    trainee = build_model(config, ranks, len(tokenizer), checkpoint)
    layers, compiled = trainee.model.get_decoder().layers, trainee.head_options["compiled"]
    optimizer = AdamW(trainee, layers, config.optim, compiled)
    if checkpoint:
        read_tensors(optimizer_tensors(trainee, optimizer), checkpoint)
        log.info("Going on after step %d, from %s", state["step"], checkpoint)
    if config.task == "sft":
        encoder.adapt(tokenizer)
    checkpoints = Checkpoints(config, ranks, folder, trainee, optimizer, tokenizer)
    parameters = list(trainee.parameters())
    report = Report(config, ranks, folder, steps, trainee, state)
    sizes = torch.from_numpy(token_bytes(tokenizer)).to(ranks.device)
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * ranks.world)
    failed = torch.zeros((), device=ranks.device, dtype=torch.bool)  # a loss or gradient is not finite
    if checkpoint is None:
        report.write({"step": 0, "documents": sum((source.notes for source in dataset.sources), Counter())})
    if held_out and is_due(state["step"], config.eval.every, steps):
        report.evaluation(state["step"], evaluate(trainee, config, held_out, ranks, sizes, preemption))

    profile = Profile(config.log.profile, ranks, folder, state["step"], steps)
    report.start_clock()
    for step in range(state["step"] + 1, steps + 1):
        profile.begin(step)
        # of nothing but dropout, in models that have it: so it is the same after a resume
        torch.manual_seed(config.seed + step * ranks.world + ranks.rank)

        # 1. All micro-batches of the step, and what they hold together over all ranks.
        begin = time.perf_counter()
        batches = [loader.next() for _ in range(accumulation)]
        data_seconds = time.perf_counter() - begin
        counts = torch.tensor([[b.trained_tokens, b.tokens, b.pairs, b.checksum, b.dropped] for b in batches]).sum(0)
        counts = sum_over_ranks(counts.to(ranks.device, non_blocking=True))

        # 2. Forward and backward; every trained token of the global batch weighs the same.
        loss = accumulate_gradients(trainee, batches, counts[0].clamp(min=1), ranks)

        # 3. Clip and step, unless something is not finite: then the device updates nothing, now or later.
        norm, squares = gradient_norm(parameters, ranks.mesh)
        losses = torch.zeros(2 + ranks.world, device=ranks.device, dtype=torch.float64)
        losses[0], losses[2 + ranks.rank] = loss, ~loss.isfinite()  # the mean, and a mark for each bad rank
        losses[1].fill_(preemption.asked)  # `losses[1] = ` would wait for the GPU: it copies a tensor of the host
        sum_over_ranks(losses)
        failed |= ~(norm + losses[0]).isfinite()
        lr = learning_rate(config.optim, step - 1, steps)
        checkpoints.wait_for_copy()
        optimizer.step(lr, (config.train.max_grad_norm / (norm + 1e-6)).clamp(max=1).float(), failed)
        trainee.zero_grad()

        # 4. Report the step, or on a GPU an earlier one, while this one runs. All ranks see the same.
        facts = {"step": step, "lr": lr, "epoch": max(b.epoch for b in batches), "data_seconds": data_seconds}
        evaluating = held_out and is_due(step, config.eval.every, steps)
        saving = is_due(step, config.checkpoint.every, steps)
        try:
            report.step(facts, torch.cat([losses, norm[None], squares]), counts)
            if evaluating or saving or report.stop_asked:
                report.flush()
        except NonFinite:
            checkpoints.finish()  # the last good one may be half written
            raise
        if evaluating and not report.stop_asked:
            report.evaluation(step, evaluate(trainee, config, held_out, ranks, sizes, preemption))

        # 5. Save.
        if step == state["step"] + 1:
            checkpoints.prepare()
        checkpoints.check()
        if saving or report.stop_asked:
            checkpoints.save(step, report.totals | {"inventory": inventory}, loader.state)
        preemption.can_save = True
        if report.stop_asked:
            checkpoints.finish()
            report.close()
            sum_over_ranks(counts).tolist()  # all leave together: Slurm ends the others of one that has left
            raise Preempted(f"stopped by a signal after step {step} of {steps}; the same command goes on from there")

    profile.begin(steps + 1)

    # The end: a plain Hugging Face folder. A signal ends it at once, since the checkpoint is whole.
    loader.close()
    checkpoints.finish()
    preemption.can_save = False
    if ranks.rank == 0:
        export([checkpoint, *in_order(folder / "checkpoints")][-1], folder / "hf")
    report.close()
    log.info("The model is in %s, a folder for transformers' from_pretrained. Next:", folder / "hf")
    if config.task == "sft":
        log.info("lacuna chat %s", folder)
    log.info("lacuna %s CONFIG.toml --name NEW --model.name %s --model.from_scratch false", config.task, folder / "hf")
    if dist.is_initialized():
        dist.destroy_process_group()
    return folder


def is_due(step: int, every: int | None, steps: int) -> bool:
    """At the start, at the end, and every so many steps between."""
    return step in (0, steps) or bool(every and step % every == 0)


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
def evaluate(trainee: Trainee, config: Config, dataset: RowDataset, ranks: Ranks, sizes, preemption) -> dict | None:
    """Mean loss a token (nats) and bits a byte over held-out data; sizes [V] are the bytes of each token.

    None where a signal came: then there is no time to finish.
    Every rank takes as many rows, and one that has no data left feeds rows that train nothing: so nobody hangs.
    """
    data = config.data.model_copy(update={"context_len": None, "context_warmup_steps": 0, "workers": 0})
    loader = Loader(config.model_copy(update={"data": data}), dataset, ranks.device)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)  # nats, tokens, bytes
    trainee.eval()
    for _ in range(math.ceil(config.eval.rows / (config.train.micro_batch_size * ranks.world))):
        batch = loader.next()
        trained = batch.labels >= 0
        marks = torch.stack([trained.sum(), torch.full_like(trained.sum(), preemption.asked)])
        count, stop = sum_over_ranks(marks).tolist()
        if stop:
            break
        if not count:
            continue  # and not the end: of several streams, one may end before the others
        size = (sizes[batch.labels.clamp(min=0)] * trained).sum()
        sums += torch.stack([trainee(batch).double(), trained.sum().double(), size.double()])
    nats, tokens, size = sum_over_ranks(sums).tolist()
    trainee.train()
    loader.close()
    if stop:
        return None
    bits = nats / math.log(2) / max(size, 1)
    return {"eval_loss": nats / max(tokens, 1), "eval_bits_per_byte": bits, "eval_tokens": int(tokens)}
