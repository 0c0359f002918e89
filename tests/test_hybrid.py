"""examples/hybrid.py, where a part takes all documents of a row at once: equal to plain transformers, each alone."""

import importlib.util
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from conftest import EXAMPLES, REPO
from test_model import compile_by
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as one_document

spec = importlib.util.spec_from_file_location("models", REPO / "benchmarks" / "models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

PATCH = f"""
import importlib.util
import sys
spec = importlib.util.spec_from_file_location("hybrid", {str(EXAMPLES / "hybrid.py")!r})
hybrid = sys.modules["hybrid"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hybrid)
hybrid.has_kernels = lambda: True


def patch(model):
    hybrid.on_each_document(model)
    assert all(getattr(layer, "compiles", True) for layer in model.model.layers)
"""


def by_documents(q, k, v, g, beta, bounds) -> torch.Tensor:
    """What flash-linear-attention's kernels compute, by transformers' own loop."""
    parts = [[x[:, begin:end] for x in (q, k, v, g, beta)] for begin, end in pairwise(bounds.tolist())]
    return torch.cat([one_document(*part[:3], g=part[3], beta=part[4])[0] for part in parts], 1)


def forward(q, k, v, g, beta, scale, *, initial_state, output_final_state, cu_seqlens, chunk_indices):
    assert scale == k.shape[-1] ** -0.5 and initial_state is None and not output_final_state
    lengths = cu_seqlens.diff().tolist()
    want = [[i, place] for i, length in enumerate(lengths) for place in range(-(-length // 64))]
    assert chunk_indices.tolist() == want
    out = by_documents(q, k, v, g, beta, cu_seqlens)
    return g.clone(), out, k.new_zeros(*v.shape[:3], 64), None, None, None


def backward(q, k, v, g, beta, triangles, *, scale, initial_state, do, dht, cu_seqlens, chunk_indices):
    def differentiate():
        inputs = [x.detach().requires_grad_() for x in (q, k, v, beta, g)]
        q_, k_, v_, beta_, g_ = inputs
        return torch.autograd.grad(by_documents(q_, k_, v_, g_, beta_, cu_seqlens), inputs, do)

    # inside of a custom operator this thread records nothing for autograd
    with ThreadPoolExecutor(1) as thread:
        return (*thread.submit(differentiate).result(), None, None, None)


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for the package, whose kernels need a GPU: same names, arguments and results."""
    chunk = types.ModuleType("fla.ops.gated_delta_rule.chunk")
    chunk.chunk_gated_delta_rule_fwd = forward
    chunk.chunk_gated_delta_rule_bwd = backward
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, chunk.__name__, chunk)


@pytest.mark.parametrize("options", [[], ["--train.compile", "true"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2"])
def test_a_row_at_once_equals_each_document_alone(name, options, tmp_path, kernels, monkeypatch):
    if options:
        compile_by("aot_eager", monkeypatch)
    (tmp_path / "patch.py").write_text(PATCH)
    models.make_folder(name, tmp_path / "model")
    wanted = models.reference(tmp_path / "model")
    patch = ["--model.patch", f"{tmp_path}/patch.py:patch"]
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
