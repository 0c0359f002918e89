"""The run, top to bottom: set up, find a checkpoint, build, evaluate, loop, save, export."""

import math
import runpy
import time
from functools import partial
from pathlib import Path

import tomli_w
import torch
import torch.distributed as dist
from filelock import FileLock
from tqdm import trange

from lacuna.checkpoint import Checkpoints, export, find_checkpoint, in_order, match_eos, refuse_another
from lacuna.config import Config, ConfigError, Preempted, blame, log
from lacuna.data.batch import PackedBatch
from lacuna.data.conversations import make_encoder
from lacuna.data.loader import Loader, RowDataset
from lacuna.data.tokenize import count_bytes, load_tokenizer
from lacuna.metrics import Report, start_logging
from lacuna.model import Trainee, build_model
from lacuna.optim import AdamW, learning_rate, trained
from lacuna.parallel import Ranks, gradient_norm, start, sum_over_ranks
from lacuna.preemption import Preemption
from lacuna.weights import check_base, held, read_tensors


def run(config: Config, preemption: Preemption | None = None) -> Path:
    """Train as `config` says; returns the run folder, with `hf` in it. Preempted after a signal."""
    began = time.monotonic()
    preemption = preemption or Preemption()
    ranks = start(config.dist, config.train)
    folder = Path(config.out) / config.name
    with blame(f"out: {folder} (in use? Wait, or set another name)"):
        start_logging(folder.parent, ranks.rank)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        if ranks.rank == 0:
            lock.acquire(timeout=60)  # one that ends may still hold it
        checkpoint, state = find_checkpoint(config, folder, ranks.rank)
        changed = refuse_another(checkpoint, state, config)
    tokenizer = load_tokenizer(config.model)
    recipe = {"make_encoder": make_encoder, "make_objective": lambda *_: None}
    if config.task.endswith(".py"):
        with blame(f"the recipe {config.task}"):
            recipe |= runpy.run_path(config.task)
    with blame(f"data.chat_template {config.data.chat_template!s:.80} (None: the tokenizer's)"):
        encoder = recipe["make_encoder"](config, tokenizer)
        encoder.adapt(tokenizer)

    # Data comes before the model, so that it is read ahead while the model is built.
    with blame("data.sources, data.cache, or the place in them that state.json holds"):
        dataset, held_out = open_rows(config, encoder, ranks, state["data"])
        if state.get("inventory", dataset.inventory) != dataset.inventory and not config.checkpoint.resume_changed:
            change = f"the data of {checkpoint} was {state['inventory']}, now {dataset.inventory}"
            raise ConfigError(f"data.sources: {change}: bring it back, or checkpoint.resume_changed = true")
        fixed = {"inventory": dataset.inventory}  # a run that goes on must find the same
        steps = config.train.steps or state["step"] + math.ceil(dataset.count_rows() / config.train.global_batch_size)
        loader = Loader(config, dataset, ranks.device)
    if config.optim.warmup_steps >= steps:
        raise ConfigError(f"optim.warmup_steps must be below the {steps} steps")

    with blame(f"model.name {config.model.name}: config.json, model.overrides {config.model.overrides}"):
        if not config.model.from_scratch and (config.lora.rank or config.task.endswith(".py")):
            fixed["base_weights"] = check_base(config.model.name, state)
        trainee = build_model(config, ranks, tokenizer, checkpoint)
        with blame(f"the recipe {config.task}"):
            trainee.objective = recipe["make_objective"](config, ranks, tokenizer)
        model = trainee.model
        parameters = trained(model)
        optimizer = AdamW(model, trainee.layers, config.optim, trainee.compiled)
        match_eos(config, model, tokenizer)
    tensors = (parameters if config.lora.rank else held(model)) | optimizer.tensors(parameters)
    with blame(f"out: {folder}/metrics.jsonl, or the state.json of {checkpoint}"):
        if checkpoint:
            read_tensors(tensors if config.lora.rank else optimizer.tensors(parameters), checkpoint)
            log.info("Going on after step %d, from %s; changed: %s", state["step"], checkpoint, changed or "nothing")
        checkpoints = Checkpoints(config, ranks, folder, tensors, model, tokenizer)
        # The run begins. A start that fails leaves no folder, changes no run, and is told in log.txt beside them.
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        evaluating = held_out and is_due(state["step"], config.eval.every, steps)
        report = Report(config, ranks, folder, steps, model, state, evaluating)
        [_, early] = log.handlers
        early.target.baseFilename = str(folder.absolute() / "log.txt")
        early.target.stream = early.target._open()
        early.capacity = 1
        if ranks.rank == 0:
            kept = config.model_dump(exclude_none=True, exclude={"checkpoint": {"resume_changed"}})
            (folder / "config.toml").write_text(tomli_w.dumps(kept))
    count = f"{model.num_parameters(only_trainable=True):,} of {model.num_parameters():,}"
    log.info("model   %s: %s trains %s", config.model.name, config.task, count)
    log.info("device  %d x %s: %s, %s attention", ranks.world, report.device, trainee.dtype, trainee.backend)
    slots = config.train.global_batch_size * config.train.seq_len
    log.info("length  %d steps of %s tokens: %s", steps, f"{slots:,}", f"{steps * slots:,}")
    log.info("rate    %g, warmup %d, %s", config.optim.lr, config.optim.warmup_steps, config.optim.schedule)
    log.info("run     %s: from step %d, saved every %d", folder, state["step"] + 1, config.checkpoint.every)
    if evaluating:
        report.write({"step": state["step"], **evaluate(trainee, config, held_out, ranks, tokenizer)})
    failed = torch.zeros((), device=ranks.device, dtype=torch.bool)  # a loss or a norm was not finite
    live = {"initial": state["step"], "total": steps, "disable": ranks.rank > 0 or None}  # None: only on a terminal
    for step in trange(state["step"] + 1, steps + 1, ncols=72, **live):
        # seeds nothing but dropout, where a model has it: a run that goes on draws the same
        torch.manual_seed(config.seed + step * ranks.world + ranks.rank)

        # 1. All micro-batches of the step, and what they hold together over all ranks.
        begin = time.perf_counter()
        with blame("data.sources, or the place in them that state.json holds"):
            batches = loader.step()
        data_seconds = time.perf_counter() - begin
        sums = sum_over_ranks([batch.counts for batch in batches], ranks.device)

        # 2. Forward and backward; every unit, a trained token or a pair, of the global batch weighs the same.
        parts = accumulate_gradients(trainee, batches, sums["units"].clamp(min=1).float(), ranks)

        # 3. Clip and step, unless something is not finite: then the device updates nothing, now or later.
        norm = gradient_norm(list(parameters.values()), ranks.mesh)
        sums = sum_over_ranks([part | {"stop_asked": preemption.asked} for part in parts], ranks.device) | sums
        failed |= ~(norm + sums["loss"]).isfinite()
        lr = learning_rate(config.optim, step - 1, steps)
        optimizer.step(lr, (config.train.max_grad_norm / (norm + 1e-6)).clamp(max=1).float(), failed)
        trainee.zero_grad()

        # 4. Report the step, or on a GPU an earlier one, while this one runs. All ranks see the same.
        facts = {"step": step, "lr": lr, "epoch": max(batch.epoch for batch in batches), "data_seconds": data_seconds}
        facts["figures"] = [name for name in parts[0] if name != "loss"]
        evaluating = held_out and is_due(step, config.eval.every, steps)
        saving = is_due(step, config.checkpoint.every, steps)
        facts["ends_interval"] = evaluating or saving  # a run that goes on here has the same lines
        try:
            report.step(facts, sums | {"grad_norm": norm})
            if evaluating or saving or report.stop_asked:
                report.flush()  # what is saved is finite, and computed
        except FloatingPointError:
            checkpoints.written.result()  # the last good one may be half written
            raise
        if evaluating and not report.stop_asked:
            report.write({"step": step, **evaluate(trainee, config, held_out, ranks, tokenizer)})

        # 5. Save, when it is time or a signal asked to stop.
        if checkpoints.written.done():
            checkpoints.written.result()
        if saving or report.stop_asked:
            checkpoints.save(step, report.totals | fixed, loader.state)
        preemption.can_save = True
        if report.stop_asked:
            checkpoints.written.result()
            # all leave together: Slurm ends the others of one that has left
            sum_over_ranks([{"left": 1}], ranks.device)["left"].item()
            raise Preempted(f"stopped by a signal after step {step} of {steps}; the same command goes on")

    # The end: a plain Hugging Face folder. A signal ends it at once, since the checkpoint is whole.
    loader.close()
    checkpoints.written.result()
    preemption.can_save = False
    if ranks.rank == 0:
        newest = [checkpoint, *in_order(folder / "checkpoints")][-1]
        export(newest, folder / "hf")
        report.close(folder, began)
    if dist.is_initialized():
        dist.destroy_process_group()
    return folder


def open_rows(config: Config, encoder, ranks: Ranks, state) -> tuple[RowDataset, RowDataset | None]:
    """The rows to train on, from a Loader's state on, and those held out, if any."""
    fraction = config.eval.fraction or 0.0
    rows = partial(RowDataset, config, encoder=encoder, rank=ranks.rank, ranks=ranks.world)
    dataset = rows(config.data.sources, epochs=config.train.epochs, share=(fraction, 1.0), state=state)
    log.info("data    %s", ", ".join(dataset.inventory))
    sources = config.data.sources if fraction else config.eval.sources
    if not sources:
        return dataset, None
    held_out = rows(sources, epochs=1, share=(0.0, fraction or 1.0), limit=config.eval.rows)
    log.info("held out %s; eval.every: %s", *held_out.inventory, config.eval.every or "start, end")
    return dataset, held_out


def is_due(step: int, every: int | None, steps: int) -> bool:
    """At the start, at the end, and every so many steps between."""
    return step in (0, steps) or bool(every and step % every == 0)


def accumulate_gradients(trainee: Trainee, batches: list[PackedBatch], units, ranks: Ranks) -> list[dict]:
    """Forward and backward; of each micro-batch its part of the mean loss, and figures."""
    parts = []
    for i, batch in enumerate(batches):
        if ranks.mesh is not None:
            trainee.set_requires_all_reduce(i == len(batches) - 1)  # HSDP: replicas, once a step
        loss, figures = trainee(batch)
        # units of the whole global batch: so gradients add up to those of its mean
        loss = loss / units
        loss.backward()
        parts.append({**figures, "loss": loss.detach()})
    return parts


@torch.no_grad()
def evaluate(trainee: Trainee, config: Config, dataset: RowDataset, ranks: Ranks, tokenizer) -> dict:
    """Mean loss a token (nats) and bits a byte over held-out data, or a recipe's means."""
    loader = Loader(config, dataset, ranks.device, training=False)
    parts = []
    trainee.eval()
    rows = dataset.count_rows() if dataset.map_style else config.eval.rows
    # every rank takes as many rows, empty ones at the end: else the others would wait for ever
    batches = math.ceil(rows / (config.train.micro_batch_size * ranks.world))
    for _ in trange(batches, ncols=72, desc="evaluating", leave=False, disable=ranks.rank > 0 or None):
        [batch] = loader.step()
        size = count_bytes(tokenizer, batch.labels.view(-1, config.train.seq_len).cpu().numpy())
        loss, figures = trainee(batch)
        parts.append({**figures, **batch.counts, "bytes": size, "loss": loss.double()})
    trainee.train()
    loader.close()
    sums = {name: total.item() for name, total in sum_over_ranks(parts, ranks.device).items()}
    means = {f"eval_{name}": sums[name] / max(sums["units"], 1) for name in ("loss", *figures)}
    if trainee.objective:
        return means
    bits = sums["loss"] / math.log(2) / max(sums["bytes"], 1)
    return means | {"eval_bits_per_byte": bits, "eval_tokens": int(sums["units"])}
