"""Models out to disk. (Checkpoints to resume from are not here yet: a run that is cut off begins again.)"""

from pathlib import Path

import torch

from lacuna.model import Trainee
from lacuna.parallel import whole


@torch.no_grad()
def export(trainee: Trainee, tokenizer, folder: Path, rank: int):
    """Write a Hugging Face folder in the computation's dtype; all ranks call it, rank 0 holds one copy on the host."""
    model, state = trainee.model, {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter).to(model.config.dtype)
        if rank == 0:
            state[name] = tensor.to("cpu")
    if rank == 0:
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
