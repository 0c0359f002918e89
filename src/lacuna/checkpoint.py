"""Models out to disk. (Checkpoints to resume from are not here yet: a run that is cut off begins again.)"""

from contextlib import suppress
from pathlib import Path

import torch
from transformers import GenerationConfig

from lacuna.config import Config
from lacuna.model import Trainee
from lacuna.parallel import whole


@torch.no_grad()
def export(config: Config, trainee: Trainee, tokenizer, folder: Path, rank: int):
    """Write a Hugging Face folder in the computation's dtype; all ranks call it, rank 0 holds one copy on the host.

    Model, generation and tokenizer agree on EOS: what documents or turns ended with in training.
    """
    model, state = trainee.model, {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter).to(model.config.dtype)
        if rank == 0:
            state[name] = tensor.to("cpu")
    if rank == 0:
        model.config.architectures = [type(model).__name__]
        model.config.eos_token_id = eos = tokenizer.eos_token_id
        with suppress(OSError):  # where the model has none, it stays as made from its config
            model.generation_config = GenerationConfig.from_pretrained(config.model.name)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        others = [end for end in ends if end not in (eos, None)]
        model.generation_config.eos_token_id = [eos, *others] if others else eos
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
