"""The run, top to bottom: set up, build, evaluate, loop, export."""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lacuna.checkpoint import export
from lacuna.config import Config, to_toml
from lacuna.data.loader import Loader, PackedBatch, RowDataset
from lacuna.data.tokenize import Encoder, load_tokenizer, token_bytes
from lacuna.metrics import MFU_CONVENTION, Report, Work, log, start_logging
from lacuna.model import Trainee, build_model
from lacuna.optim import build_optimizer, learning_rate
from lacuna.parallel import Ranks, clip_gradients, start, sum_over_ranks


class NonFinite(Exception):
    """A loss or gradient is not a number; the parameters are those of the step before."""


def run(config: Config) -> Path:
    """Train as `config` says; returns the run folder, with the model in its `hf`."""
    # Set up: ranks, run folder, tokenizer.
    ranks = start(config.dist, config.train)
    folder = Path(config.out) / config.name
    start_logging(folder, ranks.rank)
    if ranks.rank == 0:
        (folder / "config.toml").write_text(to_toml(config))
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(tokenizer)

    # Data first: it is read ahead while the model is built.
    dataset = RowDataset(config, config.data.sources, encoder, ranks.rank, ranks.world, config.train.epochs)
    steps = config.train.steps or math.ceil(dataset.count_rows() / config.train.global_batch_size)
    held_out = None
    if config.eval.sources:
        held_out = RowDataset(
            config, config.eval.sources, encoder, ranks.rank, ranks.world, epochs=1, limit=config.eval.rows
        )
    loader = Loader(config, dataset, ranks.device)
    trainee = build_model(config, ranks, len(tokenizer))
    optimizer = build_optimizer(trainee, config.optim)
    names, parameters = zip(*trainee.model.named_parameters(), strict=True)
    work = Work(trainee.model, ranks.device)
    report = Report(config, ranks, folder, steps)
    log.info(
        "%s: %s parameters, %s attention, %s, %d rank(s), %d steps of %d rows x %d tokens",
        *(config.model.name, f"{sum(p.numel() for p in parameters):,}", trainee.backend, trainee.model.config.dtype),
        *(ranks.world, steps, config.train.global_batch_size, config.train.seq_len),
    )
    log.info(MFU_CONVENTION)
    sizes = torch.from_numpy(token_bytes(tokenizer)).to(ranks.device)

    def evaluate_at(step: int):
        if held_out is not None:
            result = evaluate(trainee, config, held_out, ranks, sizes)
            report.write({"step": step, **result})
            log.info(
                "step %d: eval loss %.4f, %.4f bits a byte", step, result["eval_loss"], result["eval_bits_per_byte"]
            )

    # The loop. The host is one step ahead of the device: it reads a step's outcome while the next one runs.
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * ranks.world)
    failed = torch.zeros((), device=ranks.device)
    totals = {"tokens": 0, "trained_tokens": 0}
    since = {"time": time.perf_counter(), "steps": 0, "tokens": 0, "slots": 0, "pairs": 0, "data_seconds": 0.0}
    pending = None
    evaluate_at(0)

    def finish(step: int, lr: float, epoch: float, data_seconds: float, outcome: "Later"):
        """Take in the outcome of a step that was started before."""
        (loss, norm, bad_ranks, squares), (trained, tokens, pairs, checksum, dropped) = read_outcome(outcome, ranks)
        if not math.isfinite(loss) or not math.isfinite(norm):
            where = f"the loss on rank {bad_ranks}" if bad_ranks else "a gradient"
            first = next((n for n, square in zip(names, squares, strict=True) if not math.isfinite(square)), "none")
            raise NonFinite(
                f"step {step}: {where} is not finite (loss {loss}, grad norm {norm}, first bad gradient: {first}); "
                f"no update was made from this step on. Lower optim.lr, or look at the data of this step"
            )
        slots = config.train.global_batch_size * config.train.seq_len
        totals["tokens"] += tokens
        totals["trained_tokens"] += trained
        for key, value in (
            ("steps", 1),
            ("tokens", tokens),
            ("slots", slots),
            ("pairs", pairs),
            ("data_seconds", data_seconds),
        ):
            since[key] += value
        if dropped:
            log.warning("step %d: %d documents without text were dropped", step, dropped)
        if step % config.log.every == 0 or step in (1, steps):
            seconds = time.perf_counter() - since["time"]
            speed = since["tokens"] / seconds
            metrics = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, **totals, "epoch": round(epoch, 4)}
            metrics["packing_efficiency"] = since["tokens"] / since["slots"]
            metrics |= {"tokens_per_second": speed, "tokens_per_second_per_device": speed / ranks.world}
            metrics["mfu"] = work.mfu(since["slots"], since["pairs"], seconds, ranks.world)
            metrics |= {
                "step_seconds": seconds / since["steps"],
                "data_seconds": since["data_seconds"] / since["steps"],
            }
            metrics |= {"peak_memory_gib": report.peak_memory(), "batch_checksum": f"{checksum % 2**64:016x}"}
            report.step(metrics)
            since.update(time=time.perf_counter(), steps=0, tokens=0, slots=0, pairs=0, data_seconds=0.0)

    for step in range(1, steps + 1):
        # 1. All micro-batches of the step, and what they hold together over all ranks.
        begin = time.perf_counter()
        batches = [loader.next() for _ in range(accumulation)]
        data_seconds = time.perf_counter() - begin
        counts = torch.tensor([[b.trained_tokens, b.tokens, b.pairs, b.checksum, b.dropped] for b in batches]).sum(0)
        counts = sum_over_ranks(counts.to(ranks.device, non_blocking=True))
        # 2. Forward and backward; every trained token of the global batch weighs the same.
        loss = accumulate_gradients(trainee, batches, counts[0].clamp(min=1), ranks)
        # 3. Clip and step, unless something is not finite: then nothing is updated, now or later.
        norm, squares = clip_gradients(parameters, config.train.max_grad_norm, ranks.mesh)
        losses = torch.zeros(
            1 + ranks.world, device=ranks.device
        )  # the sum, and a mark for each rank whose loss is bad
        losses[0], losses[1 + ranks.rank] = loss, ~loss.isfinite()
        sum_over_ranks(losses)
        failed = torch.maximum(failed, (~(norm + losses[0]).isfinite()).float())
        lr = learning_rate(config.optim, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = failed
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # 4. Report the step before, while this one runs.
        outcome = Later(torch.cat([losses, norm[None], squares]), counts)
        if pending:
            finish(*pending)
        pending = (step, lr, max(b.epoch for b in batches), data_seconds, outcome)
        evaluating = step == steps or (config.eval.every is not None and step % config.eval.every == 0)
        if evaluating or ranks.device.type == "cpu":
            finish(*pending)
            pending = None
        if evaluating:
            evaluate_at(step)
            since["time"] = time.perf_counter()

    # The end: a plain Hugging Face folder.
    loader.close()
    export(trainee, tokenizer, folder / "hf", ranks.rank)
    report.close()
    log.info(
        "the model is in %s; try it with transformers: AutoModelForCausalLM.from_pretrained(%r)",
        folder / "hf",
        str(folder / "hf"),
    )
    if dist.is_initialized():
        dist.destroy_process_group()
    return folder


def accumulate_gradients(
    trainee: Trainee, batches: list[PackedBatch], trained_tokens: torch.Tensor, ranks: Ranks
) -> torch.Tensor:
    """Forward and backward of this rank's micro-batches; returns its share of the step's mean loss.

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


class Later:
    """Tensors on their way to the host, without making the host wait for the device."""

    def __init__(self, *tensors: torch.Tensor):
        self.event = torch.cuda.Event() if tensors[0].is_cuda else None
        self.copies = [t.to("cpu", non_blocking=True) for t in tensors]
        if self.event:
            self.event.record()

    def read(self) -> list[list]:
        if self.event:
            self.event.synchronize()
        return [copy.tolist() for copy in self.copies]


def read_outcome(outcome: Later, ranks: Ranks) -> tuple[tuple, list[int]]:
    """((loss, gradient norm, ranks with a bad loss, squared norm of every gradient), counts) of a step."""
    values, counts = outcome.read()
    bad_ranks = ", ".join(str(rank) for rank in range(ranks.world) if values[1 + rank])
    return (values[0], values[1 + ranks.world], bad_ranks, values[2 + ranks.world :]), counts


@torch.no_grad()
def evaluate(trainee: Trainee, config: Config, dataset: RowDataset, ranks: Ranks, sizes: torch.Tensor) -> dict:
    """Mean loss a token (nats) and bits a byte over held-out data.

    Every rank goes on until none has data left: one that has none feeds rows that train nothing, so nobody hangs.
    """
    data = config.data.model_copy(update={"context_len": None, "context_warmup_steps": 0, "workers": 0})
    loader = Loader(config.model_copy(update={"data": data}), dataset, ranks.device)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)  # nats, tokens, bytes
    trainee.eval()
    while True:
        batch = loader.next()
        left = sum_over_ranks(torch.tensor(batch.trained_tokens, device=ranks.device))
        if not left.item():
            break
        size = (sizes[batch.labels.clamp(min=0)] * (batch.labels >= 0)).sum()
        sums += torch.stack([trainee(batch).double(), (batch.labels >= 0).sum().double(), size.double()])
    nats, tokens, size = sum_over_ranks(sums).tolist()
    trainee.train()
    loader.close()
    if ranks.mesh is not None:
        trainee.reshard()  # the root stays gathered after a forward without a backward
    return {
        "eval_loss": nats / max(tokens, 1),
        "eval_bits_per_byte": nats / math.log(2) / max(size, 1),
        "eval_tokens": int(tokens),
    }
