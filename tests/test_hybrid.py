"""examples/hybrid.py, where a part takes all documents of a row at once: equal to plain transformers, each alone."""

import importlib.util
import sys

import pytest
import torch
from conftest import EXAMPLES, REPO
from test_model import compile_by, needs_compiler

spec = importlib.util.spec_from_file_location("models", REPO / "benchmarks" / "models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.mark.parametrize("options", [[], ["--train.compile", "true"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe"])
def test_a_row_at_once_equals_each_document_alone(name, options, tmp_path, monkeypatch):
    experts = None
    if options:
        compile_by("aot_eager", monkeypatch)
        experts = "batched_mm"  # transformers' stand-in for grouped products in float32 does not compile
    models.make_folder(name, tmp_path / "model")
    wanted = models.reference(tmp_path / "model")
    patch = ["--model.patch", f"{EXAMPLES}/hybrid.py:on_each_document"]
    for checkpointing in ("none", "selective"):
        how = [*options, "--train.activation_checkpointing", checkpointing]
        trained = models.train_once(tmp_path / "model", *patch, *how, experts=experts)
        result = models.compare(wanted, trained)
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


@needs_compiler
@pytest.mark.slow
def test_compiled_in_bf16_its_gradients_are_right():
    """Inductor made others, by half of their size, where a padded value was cast before it was padded."""
    spec = importlib.util.spec_from_file_location("hybrid", EXAMPLES / "hybrid.py")
    hybrid = sys.modules["hybrid"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hybrid)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 64, 64), torch.randn(192, 64) / 8, torch.randn(64, 3)]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 30, 2, 31]))[None]

    def block(x, joined, weight):
        gates = torch.nn.functional.linear(x, joined).transpose(1, 2)
        before, after, inner = gates.chunk(3, 1)
        return after * hybrid.convolve(before * inner, weight, seq_idx=document)

    outcomes = []
    for function, dtype in ((block, torch.float32), (torch.compile(block, fullgraph=True), torch.bfloat16)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.float().square().sum().backward()
        outcomes.append([out, *(x.grad for x in leaves)])
    for want, got in zip(*outcomes, strict=True):
        assert (got.float() - want).norm() < 0.03 * want.norm()
