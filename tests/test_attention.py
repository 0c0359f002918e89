"""Packed equals alone, on every backend, compiled and not (invariant 1 of the design)."""

import pytest
import torch
from torch.nn.attention import varlen

from lacuna.attention import boundaries, choose_backend, packed_attention
from lacuna.config import ConfigError
from lacuna.data.batch import PackedBatch

SEQ_LEN = 64
STARTS = [0, 1, 17, 40, 64, 100, 127]  # two rows; documents of 1 to 36 tokens, a row that begins inside no document


def packed(device="cpu", slots=2 * SEQ_LEN) -> PackedBatch:
    """Two rows of documents; only what attention looks at is filled in."""
    cu_seqlens = torch.tensor([*STARTS, slots], dtype=torch.int32, device=device)
    ids = torch.zeros(slots, dtype=torch.int64, device=device)
    return PackedBatch(ids, ids, ids, cu_seqlens, SEQ_LEN, 0.0, {})


def reference(q, k, v, window: int | None, scale: float) -> torch.Tensor:
    """Softmax attention in float64, one document and one query at a time; [T, heads, D]."""
    q, k, v = (x[0].transpose(0, 1).double() for x in (q, k, v))
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for start, end in zip(STARTS, [*STARTS[1:], len(q)], strict=True):
        for t in range(start, end):
            first = start if window is None else max(start, t - window + 1)
            for head in range(q.shape[1]):
                scores = k[first : t + 1, head // group] @ q[t, head] * scale
                out[t, head] = scores.softmax(0) @ v[first : t + 1, head // group]
    return out


GPU = [pytest.param(name, torch.bfloat16, "cuda", marks=pytest.mark.gpu) for name in ("varlen", "fa4", "sdpa")]
BACKENDS = [("sdpa", torch.float32, "cpu"), *GPU, pytest.param("sdpa", torch.float32, "cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("backend", "dtype", "device"), BACKENDS)
def test_every_document_attends_to_itself_alone(backend, dtype, device, window, compiled):
    choose_or_skip(backend, device, dtype)
    torch.manual_seed(0)
    batch = packed(device)
    shapes = [(1, 4, 2 * SEQ_LEN, 64), (1, 2, 2 * SEQ_LEN, 64), (1, 2, 2 * SEQ_LEN, 64)]
    q, k, v = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)

    def attend(q, k, v, limits):
        return packed_attention(None, q, k, v, None, scaling=0.11, sliding_window=window, **limits)[0]

    function = (
        torch.compile(attend, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        if compiled
        else attend
    )
    out = function(q, k, v, boundaries(batch, backend))[0]
    weights = torch.randn(out.shape, device=device, dtype=dtype)
    (out * weights).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]

    expected_inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*expected_inputs, window, 0.11)
    (expected * weights.cpu().double()).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip([out, *grads], [expected, *(x.grad for x in expected_inputs)], strict=True):
        error = (got.detach().cpu().double() - want).norm() / want.norm()
        assert error < tolerance, f"relative error {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [48, 80, 96, 104, 128, 192, 256])
def test_gradients_are_right_for_heads_of_any_size(size):
    """FlashAttention-4's were wrong, with a right output, where the size is no multiple of 32: FA2 sees to those."""
    choose_or_skip("fa4", "cuda", torch.bfloat16)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 2 * SEQ_LEN, size, device="cuda") for heads in (4, 2, 2)]
    weights = torch.randn(2 * SEQ_LEN, 4, size, device="cuda")
    grads = {}
    for backend, dtype in (("fa4", torch.bfloat16), ("sdpa", torch.float32)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = packed_attention(None, q, k, v, None, **boundaries(packed("cuda"), backend))[0][0]
        (out * weights).sum().backward()
        grads[backend] = [x.grad.float() for x in (q, k, v)]
    for got, want in zip(grads["fa4"], grads["sdpa"], strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(("backend", "dtype", "device"), BACKENDS)
def test_changing_one_document_changes_nothing_in_the_others(backend, dtype, device):
    choose_or_skip(backend, device, dtype)
    torch.manual_seed(0)
    limits = boundaries(packed(device), backend)
    q, k, v = (torch.randn(1, 2, 2 * SEQ_LEN, 64, device=device, dtype=dtype) for _ in range(3))
    before = packed_attention(None, q, k, v, None, **limits)[0]
    inside = slice(STARTS[2], STARTS[3])
    for x in (q, k, v):
        x[:, :, inside] = torch.randn_like(x[:, :, inside]) * 3
    changed = (packed_attention(None, q, k, v, None, **limits)[0] != before).flatten(2).any(-1)[0]
    assert changed[inside].all()
    changed[inside] = False
    assert not changed.any()


@pytest.mark.parametrize(("backend", "dtype", "device"), GPU)
def test_another_number_of_documents_is_the_same_graph(backend, dtype, device):
    from torch._dynamo.utils import counters

    choose_or_skip(backend, device, dtype)

    def attend(q, k, v, limits):
        return packed_attention(None, q, k, v, None, scaling=0.11, **limits)[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    batch, graphs = packed(device), []
    for documents in ([0, 64, 128], [0, 30, 64, 128], list(range(129)), [0, 1, 64, 100, 128]):
        cu_seqlens = torch.tensor(documents, dtype=torch.int32, device=device)
        q, k, v = (torch.randn(1, 2, 2 * SEQ_LEN, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        limits = boundaries(batch._replace(cu_seqlens=cu_seqlens), backend)
        out = compiled(q, k, v, limits)
        torch.testing.assert_close(out, attend(q, k, v, limits), rtol=2e-2, atol=2e-2)
        out.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def use_torchs_own():
    """A test before may have had FlashAttention-4, which takes the place of torch's kernels."""
    for operator in (varlen._varlen_attn, varlen._varlen_attn_backward):
        operator.register_kernel("cuda", operator._init_fn)


def choose_or_skip(backend, device, dtype):
    use_torchs_own()
    try:
        choose_backend(backend, torch.device(device), dtype)
    except ConfigError as error:
        pytest.skip(str(error))


def test_a_backend_that_this_machine_lacks_is_refused_with_those_it_has():
    with pytest.raises(ConfigError, match="does not run here, but sdpa"):
        choose_backend("varlen", torch.device("cpu"), torch.bfloat16)
    assert choose_backend(None, torch.device("cpu"), torch.float32) == "sdpa"


@pytest.mark.parametrize("foreign", ["softcap", "s_aux", "position_bias", "attention_mask", "dropout"])
def test_attention_that_lacuna_does_not_compute_is_refused(foreign):
    q = torch.zeros(1, 2, 2 * SEQ_LEN, 8)
    value = 0.1 if foreign == "dropout" else torch.ones(2)
    with pytest.raises(ConfigError, match="soft-capped"):
        packed_attention(None, q, q, q, **{foreign: value}, **boundaries(packed(), "sdpa"))


def test_layers_that_keep_the_ends_of_documents_to_themselves_are_refused():
    q = torch.zeros(1, 2, 2 * SEQ_LEN, 8)
    with pytest.raises(ConfigError, match="where documents end"):
        packed_attention(None, q, q, q, None)
