"""What a rank sets up before anything else."""

import os

import pytest
import torch

from lacuna.config import load_config
from lacuna.parallel import start, sum_over_ranks


@pytest.fixture
def torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)
    torch._inductor.config.deterministic = False
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("asked", ["true", "false"])
def test_deterministic_kernels_are_asked_of_torch_and_only_then(asked, torch_as_it_was):
    argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--train.deterministic", asked]
    config = load_config(None, argv)
    start(config.dist, config.train)
    wanted = asked == "true"
    assert torch.are_deterministic_algorithms_enabled() == torch._inductor.config.deterministic == wanted


def test_figures_are_added_by_name_exactly_and_tensors_with_numbers():
    checksums = [2**32 - 1, 2**32 - 3, 7]  # their sum needs more than the 24 bits of a float32
    parts = [{"checksum": c, "loss": torch.tensor(0.5), "bad": torch.tensor(True)} for c in checksums]
    sums = sum_over_ranks(parts, torch.device("cpu"))
    assert {name: figure.item() for name, figure in sums.items()} == {"checksum": sum(checksums), "loss": 1.5, "bad": 3}
    assert {figure.dtype for figure in sums.values()} == {torch.float64}


def test_a_figure_that_only_some_micro_batches_have_is_added_too():
    sums = sum_over_ranks([{"loss": 1, "reward": 2.0}, {"loss": 3}], torch.device("cpu"))
    assert {name: figure.item() for name, figure in sums.items()} == {"loss": 4, "reward": 2}
