"""examples/hybrid.py, where a part takes all documents of a row at once: equal to plain transformers, each alone."""

import importlib.util

import pytest
import torch
from conftest import EXAMPLES, REPO
from test_model import compile_by

spec = importlib.util.spec_from_file_location("models", REPO / "benchmarks" / "models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.mark.parametrize("options", [[], ["--train.compile", "true"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe"])
def test_a_row_at_once_equals_each_document_alone(name, options, tmp_path, monkeypatch):
    if options and name == "lfm2_moe":
        pytest.skip("transformers' experts do not compile on a CPU")
    if options:
        compile_by("aot_eager", monkeypatch)
    models.make_folder(name, tmp_path / "model")
    wanted = models.reference(tmp_path / "model")
    patch = ["--model.patch", f"{EXAMPLES}/hybrid.py:on_each_document"]
    for checkpointing in ("none", "selective"):
        how = [*options, "--train.activation_checkpointing", checkpointing]
        result = models.compare(tmp_path / "model", wanted, patch + how)
        assert result["loss"] < 1e-5 and result["grad"] < 1e-4, result


def test_a_convolution_sees_nothing_of_the_document_before():
    spec = importlib.util.spec_from_file_location("hybrid", EXAMPLES / "hybrid.py")
    hybrid = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hybrid)
    torch.manual_seed(0)
    lengths = [1, 5, 2, 9]
    x = torch.randn(1, 3, sum(lengths))
    weight = torch.randn(3, 4)
    bias = torch.randn(3)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = []
    for part in x.split(lengths, 2):
        padded = torch.nn.functional.pad(part, (3, 0))
        alone.append(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3))
    want = torch.nn.functional.silu(torch.cat(alone, 2))
    assert torch.allclose(hybrid.convolve(x, weight, bias, "silu", seq_idx=document), want, atol=1e-6)
