"""The head's loss in chunks: same bits where it must, bounded memory, and logits for whoever reads them."""

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import greenlet
import pytest
import tiny_models
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssdtune.visit.chunked_loss import chunk_bytes
from ssdtune.visit.head import find_head, install, refresh
from ssdtune.visit.lazy_logits import LazyLogits
from ssdtune.visit.loss import HeadLoss, LogitsError

SOFTCAP = 3.0
SPECIAL: dict[str, Callable[[], Any]] = {
    "gemma3 softcap": lambda: tiny_models.small(
        tf.Gemma3TextConfig, head_dim=16, final_logit_softcapping=SOFTCAP, **tiny_models.SLIDING
    ),
    "granite scaled": lambda: tiny_models.small(tf.GraniteConfig, logits_scaling=6.0),
    "cohere": lambda: tiny_models.small(tf.CohereConfig, logit_scale=0.3),
}
NAMES = (
    "llama",
    *SPECIAL,
    "gpt2",
    "opt",
    "bloom",
    "gpt_neox",
    "mamba2",
    "t5",
    "bart",
    "gemma3_vlm",
)
WHOLE, SMALL = 10_000, 8  # tokens in a chunk: more than a batch has, and less
DTYPES = (torch.float32, torch.bfloat16)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name not in SPECIAL:
        return tiny_models.build(name, dtype)
    torch.manual_seed(1)
    return tf.AutoModelForCausalLM.from_config(SPECIAL[name](), dtype=dtype)


def deferred(model: Any, chunk_tokens: int = WHOLE) -> tuple[Any, list[str]]:
    """A copy of `model` with its loss in chunks, and the list of calls to `ensure_present`."""
    ours, asked = copy.deepcopy(model), []
    head = find_head(ours)
    assert head is not None
    install(ours, HeadLoss(head, chunk_tokens, asked.append))
    return ours, asked


def masked_batch(name: str = "llama", rows: int = 2) -> dict[str, torch.Tensor]:
    made = tiny_models.batch(name if name in tiny_models.CONFIGS else "llama", rows=rows)
    made["labels"][0, :5] = -100
    return made


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: Any, plain: Any) -> None:
    expected = gradients(plain)
    for name, got in gradients(ours).items():
        wanted = expected[name]
        assert (got is None) == (wanted is None), name
        assert got is None or wanted is None or torch.equal(got, wanted), name


def owner_of(model: Any) -> HeadLoss:
    return model.get_output_embeddings().forward.owner


def with_lora(model: Any, **config: Any) -> Any:
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted.train()


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_chunk_has_the_bits_of_the_unmodified_model(name: str, dtype: torch.dtype) -> None:
    plain = build(name, dtype)
    ours, asked = deferred(plain)
    batch = masked_batch(name)
    expected, out = plain(**batch), ours(**batch)
    assert isinstance(out.logits, LazyLogits)
    assert not out.logits.is_computed()
    assert torch.equal(out.loss, expected.loss)
    expected.loss.backward()
    out.loss.backward()
    assert asked == ["F"]
    assert_same_gradients(ours, plain)
    assert torch.equal(out.logits, expected.logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3 softcap"])
def test_an_adapter_on_the_head_trains_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    targets = ["q_proj", "lm_head"]
    base = build(name, dtype)
    ours, _ = deferred(base)
    first = owner_of(ours)
    plain, ours = (with_lora(m, target_modules=targets) for m in (base, ours))
    owner = refresh(ours, first)
    assert owner.head is find_head(ours)
    assert owner.head is not first.head
    assert refresh(ours, owner) is owner
    batch = masked_batch()
    expected, out = plain(**batch), ours(**batch)
    assert torch.equal(out.loss, expected.loss)
    expected.loss.backward()
    out.loss.backward()
    assert not out.logits.is_computed()
    assert_same_gradients(ours, plain)


def test_an_adapter_that_was_not_followed_computes_whole_logits_and_is_right() -> None:
    base = build("llama")
    ours, _ = deferred(base, SMALL)
    plain, ours = (with_lora(m, target_modules=["q_proj", "lm_head"]) for m in (base, ours))
    batch = masked_batch()
    expected, out = plain(**batch), ours(**batch)
    assert torch.equal(out.loss, expected.loss)
    expected.loss.backward()
    out.loss.backward()
    for name, wanted in gradients(plain).items():
        if wanted is not None:
            torch.testing.assert_close(gradients(ours)[name], wanted, rtol=1e-5, atol=1e-7)


def test_a_copied_head_trains_instead_of_deferring_to_the_old_weights() -> None:
    base = build("llama")
    ours, _ = deferred(base)
    first = owner_of(ours)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    plain, ours = (with_lora(m, **options) for m in (base, ours))
    refresh(ours, first)
    batch = masked_batch()
    expected, out = plain(**batch), ours(**batch)
    expected.loss.backward()
    out.loss.backward()
    assert not out.logits.is_computed()
    assert_same_gradients(ours, plain)


def test_a_deep_copy_of_the_model_is_an_ordinary_model() -> None:
    plain = build("gpt2")
    ours, _ = deferred(plain)
    copied = copy.deepcopy(ours)
    out = copied(**masked_batch("gpt2"))
    assert type(out.logits) is torch.Tensor
    assert type(copied.loss_function) is type(plain.loss_function)
    assert copied.lm_head.forward.__self__ is copied.lm_head


@pytest.mark.parametrize("num_items", [7, torch.tensor(7), torch.tensor([7.0])], ids=str)
@pytest.mark.parametrize("grad", [1.0, 0.25, 1 / 3], ids=["1", "1/4", "1/3"])
def test_any_gradient_of_the_loss_gives_the_same_bits(grad: float, num_items: Any) -> None:
    plain = build("llama", torch.bfloat16)
    ours, asked = deferred(plain)
    batch = masked_batch()
    for model in (plain, ours):
        (model(**batch, num_items_in_batch=num_items).loss * grad).sum().backward()
    assert asked == (["F", "B"] if grad == 1 / 3 else ["F"]), "recomputed only where scaling rounds"
    assert_same_gradients(ours, plain)


def test_a_known_scale_of_the_loss_needs_no_recompute() -> None:
    plain = build("llama", torch.bfloat16)
    ours, asked = deferred(plain)
    owner_of(ours).grad_scale = 1 / 3
    for model in (plain, ours):
        (model(**masked_batch()).loss * (1 / 3)).backward()
    assert asked == ["F"]
    assert_same_gradients(ours, plain)


def test_fp16_gradients_are_made_with_the_loss_scale_inside() -> None:
    plain = build("llama", torch.float16)
    ours, asked = deferred(plain)
    for model in (plain, ours):
        (model(**masked_batch()).loss * 1024.0).backward()
    assert asked == ["F", "B"]
    assert_same_gradients(ours, plain)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_dropout_before_the_head_is_drawn_once(scale: float) -> None:
    base = build("llama")
    ours, _ = deferred(base)
    first = owner_of(ours)
    plain, ours = (with_lora(m, target_modules=["lm_head"], lora_dropout=0.5) for m in (base, ours))
    refresh(ours, first)
    after = []
    for model in (plain, ours):
        torch.manual_seed(5)
        (model(**masked_batch()).loss * scale).backward()
        after.append(torch.rand(1))
    assert_same_gradients(ours, plain)
    assert torch.equal(*after), "the recompute must leave the generator as it found it"


def test_autocast_gives_the_same_bits() -> None:
    plain = build("gemma3 softcap")
    ours, _ = deferred(plain)
    batch = masked_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = plain(**batch), ours(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert torch.equal(out.loss, expected.loss)
    (expected.loss * 3).backward()
    (out.loss * 3).backward()
    assert_same_gradients(ours, plain)
    assert torch.equal(out.logits, expected.logits), "computed later, under the autocast of forward"


# ---- several chunks ------------------------------------------------------------------------------


def reference(model: Any, hidden: torch.Tensor, labels: torch.Tensor, num_items: Any) -> Any:
    """The same chunks in plain memory: logits of a chunk, its loss, its backward; ascending."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    count = num_items if num_items is not None else (shifted != -100).sum()
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros(())
    for start in range(0, shifted.numel(), SMALL):
        rows = leaf.view(-1, leaf.shape[-1])[start : start + SMALL]
        logits = model.lm_head(rows[None])
        logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
        target = shifted[start : start + SMALL]
        loss = F.cross_entropy(logits.float()[0], target, reduction="sum")
        (loss / count).backward()
        total = total + (loss.detach() if num_items is not None else loss.detach() / count)
    return total if num_items is None else total / num_items, leaf.grad


def loss_of(model: Any, hidden: torch.Tensor, labels: torch.Tensor, num_items: Any) -> Any:
    """What a model with soft-capping does between its head and its loss."""
    leaf = hidden.detach().requires_grad_()
    logits = model.lm_head(leaf)
    logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
    vocab_size = model.config.vocab_size
    loss = model.loss_function(logits, labels, vocab_size, num_items_in_batch=num_items)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_chunks_equal_the_same_chunks_summed_in_memory(
    dtype: torch.dtype, num_items: int | None
) -> None:
    plain = build("gemma3 softcap", dtype)
    ours, asked = deferred(plain, SMALL)
    hidden = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = masked_batch()["labels"]
    loss, d_hidden = loss_of(ours, hidden, labels, num_items)
    expected_loss, expected_d_hidden = reference(plain, hidden, labels, num_items)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(d_hidden, expected_d_hidden)
    assert torch.equal(ours.lm_head.weight.grad, plain.lm_head.weight.grad)
    assert asked == ["F"]
    plain.zero_grad()
    whole_loss, whole_d_hidden = loss_of(plain, hidden, labels, num_items)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0.0)
    largest = whole_d_hidden.abs().max()
    torch.testing.assert_close(d_hidden / largest, whole_d_hidden / largest, rtol=0, atol=rounding)


def chunks_in_memory(
    head: nn.Module, hidden: torch.Tensor, target: torch.Tensor, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss and the gradient of `hidden` [1, tokens, width], a backward for each chunk."""
    leaf, total = hidden.clone().requires_grad_(), torch.zeros(())
    for start in range(0, target.numel(), chunk_tokens):
        logits = head(leaf[:, start : start + chunk_tokens]).float()[0]
        chunk = target[start : start + chunk_tokens]
        loss = F.cross_entropy(logits, chunk, reduction="sum") / target.numel()
        loss.backward()
        total = total + loss.detach()
    assert leaf.grad is not None
    return total, leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_chunks_equal_three_in_memory_and_agree_with_the_whole_at_smollm2_shape(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    tokens, chunk_tokens = (96, 32) if dtype == torch.float32 else (6, 2)  # bf16 is slow on CPUs
    head = nn.Linear(576, 49152, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(1, tokens, 576).to(dtype)
    target = torch.randint(0, 49152, (tokens,))
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    whole = F.cross_entropy(head(leaves[0]).float().view(tokens, -1), target)
    lazy = HeadLoss(head, chunk_tokens, lambda _: None).defer(leaves[1])
    chunked = F.cross_entropy(lazy.float().view(tokens, -1), target)
    whole.backward()
    chunked.backward()
    expected, d_hidden = chunks_in_memory(head, hidden, target, chunk_tokens)
    assert torch.equal(chunked, expected)
    assert torch.equal(leaves[1].grad, d_hidden)  # type: ignore[arg-type]
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    largest = leaves[0].grad.abs().max()  # type: ignore[union-attr]
    difference = (leaves[1].grad - leaves[0].grad).abs().max() / largest  # type: ignore[operator]
    assert difference < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("chunk_tokens", [WHOLE, SMALL])
def test_shifted_labels_masks_and_rows_cut_by_the_caller(chunk_tokens: int) -> None:
    """`logits[:, :-1]` and a slice of the vocabulary, per-token losses, and everything masked."""
    plain = build("llama")
    ours, _ = deferred(plain, chunk_tokens)
    ids = masked_batch()["input_ids"]
    grads = []
    for model in (plain, ours):
        logits = model(input_ids=ids).logits[..., :-1, :190].contiguous().view(-1, 190)
        per_token = F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")
        (per_token * torch.linspace(0, 1, per_token.numel())).sum().backward()
        grads.append(model.lm_head.weight.grad)
        smooth = F.cross_entropy(logits, ids[:, 1:].reshape(-1), label_smoothing=0.1)
        grads.append(smooth.detach())
        grads.append(model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.detach())
    for got, wanted in zip(grads[3:], grads[:3], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert math.isnan(grads[2]), "as the model itself says of a batch without labels"


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and result.device.type != "meta":
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("is_training", [True, False])
def test_no_tensor_is_larger_than_a_chunk_of_logits(is_training: bool) -> None:
    rows, tokens, vocab_size = 16, 64, 4001
    head = nn.Linear(8, vocab_size).requires_grad_(False)
    hidden = torch.randn(rows, tokens, 8, requires_grad=True)
    owner = HeadLoss(head, SMALL, lambda _: None)
    with LargestTensor() as seen, torch.set_grad_enabled(is_training):
        logits = torch.tanh(owner.defer(hidden) / 2).float().view(-1, vocab_size)
        loss = F.cross_entropy(logits, torch.zeros(rows * tokens, dtype=torch.int64))
        if is_training:
            loss.backward()
    assert 0 < seen.numel <= max(SMALL * vocab_size, head.weight.numel())


PEAK = """
import resource, sys, torch
from torch import nn
from torch.nn import functional as F
from ssdtune.visit.loss import HeadLoss
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
vocab, chunk = 49152, 64
head = nn.Linear(576, vocab, bias=False).requires_grad_(False)
owner = HeadLoss(head, chunk, lambda _: None)
def step(tokens):
    hidden = torch.randn(1, tokens, 576, requires_grad=True)
    lazy = owner.defer(hidden).float().view(-1, vocab)
    F.cross_entropy(lazy, torch.zeros(tokens, dtype=torch.int64)).backward()
    return peak()
before = step(4)  # libraries' own buffers are there from now on
print(before, step(chunk), step(3 * chunk), step(6 * chunk))
"""


def test_memory_does_not_depend_on_batch_times_vocabulary() -> None:
    import ssdtune

    path = str(next(iter(ssdtune.__path__)) + "/..")
    program = f"import sys; sys.path.insert(0, {path!r}); import torch; torch.set_num_threads(1)"
    # glibc keeps freed blocks below 32 MiB in its heap; mapped ones go back at once, as larger do.
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(PEAK)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    before, one, three, six = map(int, done.stdout.split())
    planned = chunk_bytes(64, 49152, dtype=torch.float32, softcapped=False)
    assert one - before < 1.25 * planned
    assert three - one < 0.25 * planned, "one more chunk would be 0.83 of it in logits alone"
    assert six - three < 0.25 * planned


def test_hidden_states_and_gradients_are_freed_by_backward_while_the_loss_lives() -> None:
    import weakref

    head = nn.Linear(8, 50)
    hidden = torch.randn(1, 6, 8, requires_grad=True) * 1.0
    loss = F.cross_entropy(
        HeadLoss(head, 4, lambda _: None).defer(hidden)[0], torch.zeros(6).long()
    )
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is not None
    loss.backward()
    assert alive() is None


# ---- logits for whoever reads them ---------------------------------------------------------------


def test_looking_at_logits_does_not_compute_them() -> None:
    ours, asked = deferred(build("llama", torch.bfloat16))
    logits = ours(input_ids=masked_batch()["input_ids"]).logits
    assert torch.is_tensor(logits)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.size(-1), logits.ndim, len(logits)) == ((2, 17, 199), 199, 3, 2)
    assert (logits.dtype, logits.device.type, logits.numel()) == (
        torch.bfloat16,
        "cpu",
        2 * 17 * 199,
    )
    assert logits.requires_grad
    assert not logits.is_leaf
    assert "not computed" in repr(logits)
    output = CausalLMOutputWithPast(logits=logits.detach())
    assert output.to_tuple()[0].float()[:, -1].dtype == torch.float32
    assert torch.cat([logits, logits]).shape == (4, 17, 199)
    assert asked == []


READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "log_softmax": lambda x: F.log_softmax(x.float(), dim=-1),
    "last token": lambda x: x[:, -1, :].to(copy=True, dtype=torch.float32).softmax(-1),
    "mask": lambda x: x[x[..., 0] > 0],
    "transposed": lambda x: x.mT.contiguous(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "number": lambda x: torch.tensor(x[0, 0, 0].item()),
    "iteration": lambda x: torch.stack(list(x)),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "joined": lambda x: torch.cat([x, x[:1]]).float().sum(0),
    "plus itself": lambda x: x + x,
    "reversed operands": lambda x: 1.0 - x / 2,
    "data": lambda x: x.data.clone(),
    "out argument": lambda x: torch.mul(x.detach(), 2, out=torch.empty(0)),
    "other dtype": lambda x: x.double().sum(),
    "scaled": lambda x: torch.mul(x, torch.tensor(2.0)) - torch.arange(199.0),
}


@pytest.mark.parametrize("how", READERS)
def test_reading_logits_gives_the_values_of_the_model(how: str) -> None:
    plain = build("gemma3 softcap")
    ours, asked = deferred(plain)
    batch = masked_batch()
    got, wanted = (READERS[how](m(**batch).logits) for m in (ours, plain))
    assert torch.equal(got, wanted)
    assert asked == ["F", "F"], "one visit for the loss, one for the values"


@pytest.mark.parametrize("how", ["log_softmax", "mask", "last token", "plus itself", "scaled"])
def test_a_gradient_through_read_logits_reaches_every_parameter(how: str) -> None:
    plain = build("gemma3 softcap")
    ours, asked = deferred(plain)
    ids = masked_batch()["input_ids"]
    for model in (plain, ours):
        READERS[how](model(input_ids=ids).logits).square().sum().backward()
    assert asked == ["F", "B"]
    assert_same_gradients(ours, plain)


def test_writing_into_logits_is_seen_by_their_views_and_not_by_earlier_results() -> None:
    plain = build("llama")
    ours, _ = deferred(plain)
    batch = masked_batch()
    results = []
    for model in (plain, ours):
        logits = model(input_ids=batch["input_ids"]).logits
        tripled, shifted = logits * 3, logits[..., :-1, :]
        logits[:, :, 5:9] = -100.0
        logits.mul_(0.5)
        loss = F.cross_entropy(logits.view(-1, 199), batch["input_ids"].view(-1))
        loss.backward()
        results.append((tripled.detach() * 1, shifted.detach() * 1, loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_same_gradients(ours, plain)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] * 2


@pytest.mark.parametrize(
    "between", [Doubled.apply, torch.detach, lambda x: x.detach().requires_grad_()]
)
def test_a_loss_in_chunks_skips_nobody_elses_backward(between: Callable[..., torch.Tensor]) -> None:
    plain = build("llama")
    ours, _ = deferred(plain)
    ids = masked_batch()["input_ids"]
    for model in (plain, ours):
        loss = F.cross_entropy(between(model(input_ids=ids).logits)[0], ids[0])
        if loss.requires_grad:
            loss.backward()
    assert_same_gradients(ours, plain)


def test_the_gradient_of_logits_is_kept_where_asked_in_time_and_refused_otherwise() -> None:
    plain = build("llama")
    ours, _ = deferred(plain)
    batch = masked_batch()
    kept = []
    for model in (plain, ours):
        logits = model(input_ids=batch["input_ids"]).logits
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, 199), batch["input_ids"].view(-1)).backward()
        kept.append(logits.grad)
    assert torch.equal(*kept)
    with pytest.raises(LogitsError, match="chunk by chunk"):
        ours(**batch).logits.retain_grad()


def test_logits_read_after_their_head_changed_are_refused() -> None:
    ours, _ = deferred(build("llama"))
    first = owner_of(ours)
    ours = with_lora(ours, target_modules=["lm_head"])
    refresh(ours, first)
    ids = masked_batch()["input_ids"]
    with ours.disable_adapter():
        logits = ours(input_ids=ids).logits
        computed = ours(input_ids=ids).logits.compute()
    with pytest.raises(LogitsError, match="the adapter in use changed"):
        logits.sum()
    assert not torch.equal(computed, ours(input_ids=ids).logits)
    logits = ours(input_ids=ids).logits
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    with pytest.raises(LogitsError, match="the head changed"):
        logits.sum()


def test_generate_gives_the_same_tokens() -> None:
    plain = build("gpt2").eval()
    ours, _ = deferred(plain)
    ids = masked_batch("gpt2")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_trainer_trains_and_evaluates_as_with_the_model_itself(
    tmp_path: Any, label_smoothing: float
) -> None:
    plain = build("llama")
    rows = [
        {k: v[0] for k, v in tiny_models.batch("llama", rows=1, seed=i).items()} for i in range(4)
    ]
    results = []
    for number, model in enumerate((plain, deferred(plain)[0])):
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path / str(number)),
            label_smoothing_factor=label_smoothing,
            per_device_train_batch_size=2,
            max_steps=2,
            use_cpu=True,
            bf16=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = tf.Trainer(
            model,
            arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            eval_dataset=rows,  # type: ignore[arg-type]
            compute_metrics=lambda p: {"mean": float(p.predictions.mean())},  # type: ignore[union-attr]
        )
        before = trainer.evaluate()
        trained = trainer.train()
        results.append((before["eval_loss"], before["eval_mean"], trained.training_loss))
    assert results[0] == results[1]


def test_evaluation_without_gradients_never_computes_all_logits() -> None:
    plain = build("gemma3 softcap")
    ours, _ = deferred(plain, SMALL)
    batch = masked_batch()
    with torch.no_grad():
        out, expected = ours(**batch), plain(**batch)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    assert not out.loss.requires_grad
    assert not out.logits.is_computed()
    with torch.inference_mode():
        assert torch.equal(ours(**batch).logits, expected.logits)


def test_micro_batches_may_take_turns_in_the_middle_of_their_losses() -> None:
    plain = build("llama")
    ours, _ = deferred(plain)
    hub = greenlet.getcurrent()
    owner = owner_of(ours)
    owner.ensure_present = lambda direction: hub.switch() if direction == "F" else None
    batches = [masked_batch(rows=rows) for rows in (1, 2, 3)]
    losses: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        losses[number] = ours(**batches[number], num_items_in_batch=9).loss

    lets = [greenlet.greenlet(run) for _ in batches]
    for number, let in reversed(list(enumerate(lets))):
        let.switch(number)
    for let in reversed(lets):
        let.switch()
    sum(losses[number] for number in range(3)).backward()  # type: ignore[union-attr]
    for batch in batches:
        plain(**batch, num_items_in_batch=9).loss.backward()
    assert_same_gradients(ours, plain)


def test_outputs_of_micro_batches_are_joined_without_computing_them() -> None:
    plain = build("llama")
    ours, asked = deferred(plain)
    batches = [masked_batch(rows=rows) for rows in (1, 2)]
    joined = torch.cat([ours(**batch).logits for batch in batches])
    assert asked == ["F", "F"]
    assert not joined.is_computed()  # type: ignore[attr-defined]
    expected = torch.cat([plain(**batch).logits for batch in batches])
    assert torch.equal(joined, expected)
    joined.square().sum().backward()
    expected.square().sum().backward()
    for name, wanted in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[name], wanted)


def test_bad_requests_are_refused() -> None:
    head = nn.Linear(4, 5)
    with pytest.raises(LogitsError, match="got 0"):
        HeadLoss(head, 0, lambda _: None)
    with pytest.raises(LogitsError, match="second input"):
        HeadLoss(head, 1, lambda _: None).defer(
            torch.zeros(1, 4), torch.zeros(1, requires_grad=True)
        )

    class Widening(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).double()

    with pytest.raises(LogitsError, match=r"promised torch\.float32"):
        HeadLoss(Widening(4, 5), 1, lambda _: None).defer(torch.zeros(1, 4)).sum()
    ours, _ = deferred(build("llama"))
    with pytest.raises(IndexError):
        ours(input_ids=torch.ones(1, 3, dtype=torch.int64), labels=torch.full((1, 3), 500))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_chunk_has_the_same_bits_on_a_gpu(dtype: torch.dtype) -> None:
    plain = build("gemma3 softcap", dtype).cuda()
    ours, asked = deferred(plain)
    batch = {key: value.cuda() for key, value in masked_batch().items()}
    for model in (plain, ours):
        model(**batch, num_items_in_batch=torch.tensor(7)).loss.backward()
    assert asked == ["F"]
    assert_same_gradients(ours, plain)
