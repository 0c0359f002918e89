"""model.patch: a function of the user's gets the empty model before everything else; examples/kernelize.py is one."""

import json

import pytest
import torch
from conftest import EXAMPLES
from test_model import batch_and_documents, build
from transformers.utils import is_kernels_available

from lacuna.config import ConfigError
from lacuna.optim import trained

KERNEL = '''
import torch
from torch import nn


class MyNorm(nn.Module):
    """A stand-in that can be told apart: twice the right result."""

    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, x):
        return 2 * torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


class layers:
    MyNorm = MyNorm
'''
needs_kernels = pytest.mark.skipif(not is_kernels_available(), reason="transformers wants another version of kernels")


@pytest.fixture
def my_kernels(tmp_path, monkeypatch):
    """A kernel repository on disk, where examples/kernelize.py looks for it."""
    folder = tmp_path / "my_kernels" / "build" / "torch-universal"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(KERNEL)
    metadata = {"id": "_my_norm_1", "name": "my-norm", "version": 1, "license": "Apache-2.0", "python-depends": []}
    (folder / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    monkeypatch.chdir(tmp_path)
    return folder


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is one for CPUs")
def test_kernels_come_from_a_local_repository(my_kernels, model_folder):
    folder = model_folder("llama")
    batch, _ = batch_and_documents()
    trainee = build(folder, "--model.patch", f"{EXAMPLES / 'kernelize.py'}:kernelize")
    x = torch.randn(2, 64)
    norms = [build(folder).model.model.norm(x), trainee.model.model.norm(x)]
    assert torch.allclose(2 * norms[0], norms[1], atol=1e-5)
    trainee(batch)[0].backward()
    assert all(p.grad.isfinite().all() for p in trainee.parameters())


@needs_kernels
def test_a_layer_that_the_model_does_not_have_is_named(my_kernels, model_folder, tmp_path):
    text = (EXAMPLES / "kernelize.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace('"RMSNorm":', '"Norm":'))
    with pytest.raises(ConfigError, match=r"^model.patch .*LlamaForCausalLM marks no Norm, only \[.*'RMSNorm'"):
        build(model_folder("llama"), "--model.patch", "mine.py:kernelize")


def test_a_patch_gets_the_empty_model_and_what_it_does_is_trained(model_folder, tmp_path):
    (tmp_path / "half.py").write_text("""
def half(model):
    assert all(parameter.is_meta for parameter in model.parameters())
    for layer in model.model.layers:
        real = layer.mlp.forward
        layer.mlp.forward = lambda x, real=real: 0.5 * real(x)
""")
    folder = model_folder("llama")
    plain, patched = build(folder), build(folder, "--model.patch", f"{tmp_path / 'half.py'}:half")
    x = torch.randn(2, 64)
    assert torch.equal(patched.model.model.layers[0].mlp(x), 0.5 * plain.model.model.layers[0].mlp(x))
    assert [name for name, _ in patched.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("place", ["nowhere.py:half", "half.py:nothing", "half.py", "half"])
def test_a_patch_that_is_not_there_is_one_sentence(place, model_folder, tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text("def half(model): pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^model.patch {place} \(a file.py:function\): [^\n]+$"):
        build(model_folder("llama"), "--model.patch", place)


def test_a_layer_that_a_patch_puts_in_is_trained_as_the_others_are(model_folder, tmp_path):
    """Adapters, checkpointing and sharding look at the layers that there are after it."""
    patch = tmp_path / "own.py"
    patch.write_text(
        "import copy\n\n\ndef replace(model):\n    model.model.layers[0] = copy.deepcopy(model.model.layers[0])\n"
    )
    trainee = build(model_folder("llama"), "--model.patch", f"{patch}:replace", "--lora.rank", "4")
    assert trainee.layers == list(trainee.model.model.layers)
    assert {len(trained(layer)) for layer in trainee.layers} == {14}  # A and B of seven linear layers
