"""LoftQ's first values: adapters over a packed model begin at what packing took away."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support import Pair, assert_same_training, digests, trained
from test_packing import batches, packed, unpacked_twin

from ssdtune.packing.wanted import Wanted
from ssdtune.peft import AdapterError, attach, replace_lora_weights_loftq
from ssdtune.peft.loftq import largest

Stream = Callable[..., Any]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
DTYPE = torch.bfloat16


def sources(name: str, folder: Path, wanted: Wanted, dtype: torch.dtype = DTYPE) -> Path:
    """A tiny model, and the folder it is packed into."""
    tiny_models.save(tiny_models.build(name, dtype=dtype), folder / "source")
    return packed(folder / "source", folder / "packed", wanted)


def adapted(
    model: Any, targets: Sequence[str] = TARGETS, *, begins: Any = True, **more: Any
) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 8, "target_modules": list(targets), **more})
    config.init_lora_weights = begins  # given to the class, "loftq" would ask for scipy
    return attach(model, config)


def layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def copied(model: Any, other: Any) -> Any:
    """The model with the other's adapter."""
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(trained(model), trained(other), strict=True):
            mine.copy_(theirs)
    return model


@pytest.mark.parametrize(
    ("name", "targets", "more"),
    [
        ("llama", TARGETS, {}),
        ("llama", TARGETS, {"use_rslora": True, "lora_alpha": 3}),
        ("llama", ["embed_tokens", "lm_head"], {"lora_alpha": 40}),
        ("llama", TARGETS, {"r": 80}),  # more than the matrices have
        ("gpt2", ["c_attn", "c_fc"], {}),  # weights lie transposed
        ("mixtral", ["q_proj", "gate_up_proj", "down_proj"], {}),  # stacked experts, out by in
        ("gpt_oss", ["q_proj", "gate_up_proj", "down_proj"], {}),  # and in by out
    ],
)
def test_every_adapted_matrix_is_nearer_to_what_was_packed(
    name: str, targets: list[str], more: dict[str, Any], tmp_path: Path, stream: Stream
) -> None:
    there = sources(name, tmp_path, Wanted(bits=3))
    before = digests(tmp_path)
    model = adapted(stream(there), targets, **more)
    found = replace_lora_weights_loftq(model)
    kind = tiny_models.auto_class(name)
    plain = kind.from_pretrained(tmp_path / "source", dtype=DTYPE).requires_grad_(False)
    errors = torch.zeros(2)
    num_left = 0
    for name_in_peft, layer in layers(model).items():
        path = name_in_peft.removeprefix("base_model.model.").replace(".base_layer", "")
        leaf = getattr(layer, "parameter_name", "weight")
        weight = getattr(plain.get_submodule(path), leaf).float()
        packed_one = getattr(layer.get_base_layer(), leaf).clone().float()
        delta = layer.get_delta_weight("default").float()  # peft's own, alpha and rank in it
        one, other = (weight - packed_one).norm(), (weight - packed_one - delta).norm()
        if one == 0:  # too small to be packed: as peft begins it
            assert other == 0, path
            num_left += 1
        else:
            assert other < 0.97 * one, path
        errors += torch.tensor([float(one), float(other)]) ** 2
    assert found.num_left == num_left < len(layers(model)) <= found.num_matrices + num_left
    if "gate_up_proj" in targets:
        assert found.num_matrices >= 4 * 2 * 4, "each expert by itself"
    assert found.after / found.before == pytest.approx(
        float((errors[1] / errors[0]) ** 0.5), rel=0.02
    )
    assert digests(tmp_path) == before


def test_five_steps_equal_training_on_the_decoded_weights(tmp_path: Path, stream: Stream) -> None:
    there = sources("llama", tmp_path, Wanted(bits=2))
    twin = unpacked_twin(there, tmp_path / "twin", DTYPE)
    streamed = adapted(stream(there, micro_batch_size=2), begins="loftq")
    kind = tiny_models.auto_class("llama")
    plain = get_peft_model(
        kind.from_pretrained(twin, dtype=DTYPE), LoraConfig(r=8, target_modules=TARGETS)
    )
    pair = Pair("llama", there, copied(plain, streamed).train(), streamed.train())
    assert sum(bool(p.any()) for n, p in trained(streamed) if "lora_B" in n) == 12
    assert_same_training(pair, batches("llama"), num_micro=2)


def test_the_first_forward_is_nearer_to_the_unpacked_one(tmp_path: Path, stream: Stream) -> None:
    there = sources("llama", tmp_path, Wanted(bits=2))
    batch = tiny_models.batch("llama", 8, 33)
    with torch.no_grad():
        unpacked = tiny_models.auto_class("llama").from_pretrained(tmp_path / "source", dtype=DTYPE)
        wanted = unpacked(**batch).logits
        every = [*tiny_models.lora_targets(unpacked), "embed_tokens", "lm_head"]
        model = adapted(stream(there), every, r=32)
        as_packed = model(**batch).logits.compute()
        replace_lora_weights_loftq(model)
        begun = model(**batch).logits.compute()
    losses = [expected_loss(each, wanted) for each in (wanted, as_packed, begun)]
    assert losses[0] < losses[2] < losses[0] + 0.7 * (losses[1] - losses[0])


def expected_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross entropy over what the unpacked model would say."""
    return -(wanted.double().softmax(-1) * logits.double().log_softmax(-1)).sum(-1).mean()


def test_the_values_are_the_same_each_time_and_leave_random_numbers_alone(
    tmp_path: Path, stream: Stream
) -> None:
    there = sources("llama", tmp_path, Wanted(bits=3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = adapted(stream(there))
    torch.manual_seed(5)
    replace_lora_weights_loftq(one)
    assert torch.equal(torch.rand(3), expected)
    values = {n: p.detach().clone() for n, p in trained(one)}
    replace_lora_weights_loftq(one, tmp_path / "source")
    assert all(torch.equal(p, values[n]) for n, p in trained(one))


def test_singular_values_are_near_those_of_a_full_decomposition() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(200, 300)  # the worst case: no direction stands out
    u, s, v = largest(matrix, 8)
    exact = torch.linalg.svdvals(matrix)[:8]
    assert (s / exact).min() > 0.98
    assert torch.allclose(u.T @ matrix @ v, torch.diag(s), atol=1e-3)
    thin = torch.randn(200, 3) @ torch.randn(3, 300)
    u, s, v = largest(thin, 8)
    assert len(s) == 3
    assert torch.allclose(u * s @ v.T, thin, atol=1e-3)


# ------------------------------------------------------------------------------ refusals


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(AdapterError) as refused:
        call()
    return str(refused.value)


def test_a_source_that_is_not_known_or_gone_is_asked_for(tmp_path: Path, stream: Stream) -> None:
    there = sources("llama", tmp_path, Wanted(bits=3))
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    model = adapted(stream(there))
    begin = partial(replace_lora_weights_loftq, model)
    assert f"{tmp_path / 'source'} is not there any more" in message_of(begin)
    assert begin(tmp_path / "elsewhere").after > 0
    config = json.loads((there / "config.json").read_text())
    del config["quantization_config"]["source"]
    (there / "config.json").write_text(json.dumps(config))
    model = adapted(stream(there))
    message = message_of(partial(replace_lora_weights_loftq, model))
    assert "nobody has noted which" in message
    assert "loftq_source" in message


def test_another_model_is_no_source(tmp_path: Path, stream: Stream) -> None:
    model = adapted(stream(sources("llama", tmp_path, Wanted(bits=3))))
    tiny_models.save(tiny_models.build("llama", dtype=DTYPE, seed=9), tmp_path / "other")
    tiny_models.save(tiny_models.build("gpt2", dtype=DTYPE), tmp_path / "gpt2")
    begin = partial(replace_lora_weights_loftq, model)
    assert "nothing in common" in message_of(partial(begin, tmp_path / "other"))
    assert "is not the model that was packed" in message_of(partial(begin, tmp_path / "gpt2"))


def test_without_a_residual_there_is_nothing_to_begin_at(tmp_path: Path, stream: Stream) -> None:
    there = sources("llama", tmp_path, Wanted("lossless"))
    begin = partial(adapted, begins="loftq")
    assert "took nothing away" in message_of(partial(begin, stream(there)))
    assert "is not packed" in message_of(partial(begin, stream(tmp_path / "source")))
    dora = adapted(stream(packed(tmp_path / "source", tmp_path / "4", Wanted())), use_dora=True)
    assert "use_dora" in message_of(partial(replace_lora_weights_loftq, dora))
