"""Files to parameters: everything that from_pretrained loads, from the same bytes, to the same bits."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers import core_model_loading as library

from ssdtune.swap.source import open_checkpoint
from ssdtune.visit.build import build_meta
from ssdtune.visit.moves import NotAMove, Traced, boxes
from ssdtune.visit.placement import (
    Piece,
    PlacementError,
    fill,
    is_identity,
    place,
)

transformers.logging.set_verbosity_error()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def filled(placement, tensors) -> torch.Tensor:
    """Starts from NaN, so that a place that no piece covers shows."""
    out = torch.empty(placement.shape, dtype=placement.dtype)
    if out.is_floating_point():
        out.fill_(float("nan"))
    fill(placement, tensors.__getitem__, out)
    return out


def one_file(folder: Path, change) -> Path:
    """Rewrites a saved model as one file, with its tensors changed by `change(dict)`."""
    tensors = read_all(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_and_buffer_equals_from_pretrained(name, dtype, tmp_path):
    folder = tiny_models.save(tiny_models.build(name, dtype), tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = tiny_models.auto_class(name).from_pretrained(folder)
    meta = build_meta(folder)
    placements = place(meta.model, meta.checkpoint.tensors)
    tensors, expected = read_all(folder), loaded.state_dict()

    own = meta.model.state_dict(keep_vars=True)
    assert own.keys() == expected.keys()
    assert {id(own[key]) for key in placements} == {id(tensor) for tensor in own.values()}
    assert len(placements) == len({id(tensor) for tensor in own.values()})
    for key, placement in placements.items():
        value = filled(placement, tensors)
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
    assert placements.unused == ()

    made = dict(meta.model.named_buffers())
    for key, buffer in loaded.named_buffers():
        if key not in placements:
            assert torch.equal(made[key], buffer), key
            assert made[key].dtype == buffer.dtype


def test_experts_are_put_together_and_the_rest_is_used_as_it_lies(tmp_path):
    meta = build_meta(tiny_models.save(tiny_models.build("mixtral"), tmp_path))
    entries = meta.checkpoint.tensors
    placements = place(meta.model, entries)
    gate_up = placements["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(gate_up.pieces) == 8  # gate and up of 4 experts
    places = sorted(piece.target_slices for piece in gate_up.pieces)
    assert places == [((e, e + 1), (at, at + 128), (0, 64)) for e in range(4) for at in (0, 128)]
    assert is_identity(placements["model.layers.1.self_attn.q_proj.weight"], entries)


def test_the_eleventh_expert_comes_after_the_second(tmp_path):
    config = tiny_models.CONFIGS["mixtral"]()
    config.num_local_experts, config.num_hidden_layers = 12, 1
    folder = tiny_models.save(transformers.MixtralForCausalLM(config), tmp_path)
    expected = transformers.MixtralForCausalLM.from_pretrained(folder).state_dict()
    meta = build_meta(folder)
    placements = place(meta.model, meta.checkpoint.tensors)
    tensors = read_all(folder)
    for key in placements:
        assert torch.equal(filled(placements[key], tensors), expected[key]), key


def test_placing_reads_no_file(tmp_path):
    meta = build_meta(tiny_models.save(tiny_models.build("qwen3_moe"), tmp_path))
    for path in meta.checkpoint.files:
        path.unlink()
    assert place(meta.model, meta.checkpoint.tensors)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "t5"])
def test_another_dtype_casts_as_from_pretrained_does(name, tmp_path):
    folder = tiny_models.save(tiny_models.build(name, torch.float32), tmp_path)
    loaded = tiny_models.auto_class(name).from_pretrained(folder, dtype=torch.bfloat16)
    meta = build_meta(folder, dtype="bfloat16")
    placements = place(meta.model, meta.checkpoint.tensors)
    tensors, expected = read_all(folder), loaded.state_dict()
    kept = [key for key in placements if expected[key].dtype == torch.float32]
    assert bool(kept) == (name == "deepseek_v3")  # its routers' bias stays in float32
    for key, placement in placements.items():
        value = filled(placement, tensors)
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key]), key
        assert key in kept or not is_identity(placement, meta.checkpoint.tensors)


def test_what_must_stay_in_float32_does(tmp_path):
    """T5's class keeps one layer of each block in float32 when the model is in float16."""
    folder = tiny_models.save(tiny_models.build("t5", torch.float16), tmp_path)
    expected = transformers.T5ForConditionalGeneration.from_pretrained(folder).state_dict()
    meta = build_meta(folder)
    placements = place(meta.model, meta.checkpoint.tensors)
    wide = [key for key, placement in placements.items() if placement.dtype == torch.float32]
    assert len(wide) == 8
    assert wide == [key for key in placements if expected[key].dtype == torch.float32]


def test_a_tied_weight_is_placed_once_whichever_name_the_file_has(tmp_path):
    model = tiny_models.build("gemma3")

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    folder = one_file(tiny_models.save(model, tmp_path), rename)
    meta = build_meta(folder)
    placements = place(meta.model, meta.checkpoint.tensors)
    assert "lm_head.weight" not in placements
    assert placements["model.embed_tokens.weight"].pieces == (Piece("lm_head.weight"),)


def test_missing_tensors_are_counted_and_the_first_five_named(tmp_path):
    gone = [f"model.layers.{i}.{n}" for i in range(4) for n in ("mlp.up_proj.weight",)]
    gone += [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)]

    def drop(tensors):
        for key in gone:
            del tensors[key]

    meta = build_meta(one_file(tiny_models.save(tiny_models.build("llama"), tmp_path), drop))
    with pytest.raises(PlacementError, match=r"7 tensors .* in no file") as error:
        place(meta.model, meta.checkpoint.tensors)
    assert sum(key in str(error.value) for key in gone) == 5
    assert "and 2 more" in str(error.value)


def test_a_missing_expert_is_no_smaller_model(tmp_path):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    folder = tiny_models.save(tiny_models.build("qwen3_moe"), tmp_path)
    meta = build_meta(one_file(folder, lambda tensors: tensors.pop(name)))
    with pytest.raises(PlacementError, match=r"model\.layers\.2\.mlp\.experts\.gate_up_proj"):
        place(meta.model, meta.checkpoint.tensors)


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path):
    def cut(tensors):
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key][:100].clone()

    meta = build_meta(one_file(tiny_models.save(tiny_models.build("llama"), tmp_path), cut))
    with pytest.raises(PlacementError, match=r"\[128, 64\].*\[100, 64\]") as error:
        place(meta.model, meta.checkpoint.tensors)
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value)


def test_extra_tensors_are_counted_except_those_known_to_be_harmless(tmp_path):
    def add(tensors):
        tensors["vision.weight"] = torch.ones(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    meta = build_meta(one_file(tiny_models.save(tiny_models.build("llama"), tmp_path), add))
    assert place(meta.model, meta.checkpoint.tensors).unused == ("vision.weight",)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.int8])
def test_values_that_need_a_scale_are_refused_by_name(dtype, tmp_path):
    key = "model.layers.1.mlp.down_proj.weight"
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path)
    one_file(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    meta = build_meta(folder)
    with pytest.raises(PlacementError, match=key):
        place(meta.model, meta.checkpoint.tensors)


class Doubled(library.ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **_):
        ((values,),) = input_dict.values()
        return {target_patterns[0]: values * 2}


def test_arithmetic_is_refused_with_the_tensor_named(tmp_path, monkeypatch):
    meta = build_meta(tiny_models.save(tiny_models.build("llama"), tmp_path))
    converter = library.WeightConverter("mlp.up_proj", "mlp.up_proj", [Doubled()])
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda model: [converter]
    )
    with pytest.raises(PlacementError, match=r"model\.layers\.0\.mlp\.up_proj\.weight") as error:
        place(meta.model, meta.checkpoint.tensors)
    assert "load it with transformers and save_pretrained it" in str(error.value)


def test_permuted_weights_are_filled_as_the_library_converts_them(tmp_path, monkeypatch):
    """No architecture in the table permutes, so two operations are put in front of Llama's."""
    meta = build_meta(tiny_models.save(tiny_models.build("llama"), tmp_path))
    rotary = library.PermuteForRope(permute_layer_names=["q_proj"])
    converters = [
        library.WeightConverter("q_proj.weight", "q_proj.weight", [rotary]),
        library.WeightConverter("o_proj.weight", "o_proj.weight", [library.Transpose(0, 1)]),
    ]
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda model: converters
    )
    placements = place(meta.model, meta.checkpoint.tensors)
    tensors = read_all(tmp_path)
    for key in ("self_attn.q_proj.weight", "self_attn.o_proj.weight"):
        name = f"model.layers.0.{key}"
        converter = next(c for c in converters if c.source_patterns[0] in key)
        (expected,) = (
            converter.operations[0]
            .convert({"q_proj": [tensors[name]]}, ["q_proj"], ["q_proj"], config=meta.config)
            .values()
        )
        assert torch.equal(filled(placements[name], tensors), expected)
        assert not is_identity(placements[name], meta.checkpoint.tensors)


def test_absent_buffers_that_the_class_can_do_without_keep_their_value(tmp_path):
    folder = tiny_models.save(tiny_models.build("bart"), tmp_path)
    one_file(folder, lambda tensors: tensors.pop("final_logits_bias"))
    meta = build_meta(folder)
    assert "final_logits_bias" not in place(meta.model, meta.checkpoint.tensors)
    loaded = transformers.BartForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(meta.model.final_logits_bias, loaded.final_logits_bias)


def test_a_model_saved_without_its_head_class_gets_its_prefix(tmp_path):
    """Some checkpoints hold the bare base model's names."""
    folder = tiny_models.save(tiny_models.build("gpt2"), tmp_path)

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    one_file(folder, strip)
    meta = build_meta(folder)
    placements = place(meta.model, meta.checkpoint.tensors)
    assert placements["transformer.h.0.ln_1.weight"].pieces == (Piece("h.0.ln_1.weight"),)


# Traced tensors: the same operators on values and on places


def values_of(traced: Traced, sources: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full(tuple(traced.shape), -1, dtype=torch.int64)
    filled_places = 0
    for box in boxes(traced):
        piece = sources[box.source][tuple(slice(a, b) for a, b in box.slices)]
        piece = piece if box.view is None else piece.reshape(box.view)
        piece = piece if box.order is None else piece.permute(box.order)
        region = out[tuple(slice(a, b) for a, b in box.region)]
        region.copy_(piece.reshape(region.shape))
        filled_places += region.numel()
    assert filled_places == out.numel()
    return out


def pair(name: str, shape: tuple[int, ...], first: int = 0):
    count = torch.Size(shape).numel()
    real = torch.arange(first, first + count).reshape(shape)
    return real, Traced.of(name, shape, torch.int64)


def random_step(random: random.Random, shape: tuple[int, ...]):
    """An operator that moves data, as a function of one tensor."""
    dims = len(shape)
    dim = random.randrange(dims)
    kind = random.choice(["transpose", "permute", "split", "flatten", "slice", "unsqueeze", "join"])
    if kind == "transpose":
        other = random.randrange(dims)
        return lambda x: x.transpose(dim, other)
    if kind == "permute":
        order = random.sample(range(dims), dims)
        return lambda x: x.permute(order).contiguous()
    if kind == "split" and shape[dim] > 1:
        factor = next(n for n in range(2, shape[dim] + 1) if shape[dim] % n == 0)
        return lambda x: x.unflatten(dim, (-1, factor))
    if kind == "flatten" and dim + 1 < dims:
        return lambda x: x.flatten(dim, dim + 1)
    if kind == "slice":
        start = random.randrange(shape[dim])
        stop = random.randrange(start, shape[dim]) + 1
        return lambda x: x.narrow(dim, start, stop - start)
    if kind == "join" and shape[dim] > 1:
        at = random.randrange(1, shape[dim])
        return lambda x: torch.cat(torch.split(x, [at, shape[dim] - at], dim)[::-1], dim)
    return lambda x: x.unsqueeze(dim).squeeze(dim)


@pytest.mark.parametrize("seed", range(40))
def test_random_chains_of_moves_are_followed(seed):
    rng = random.Random(seed)
    real, traced = pair("w", (4, 6, 10))
    steps = followed = 0
    while steps < 8 and real.numel() > 1:
        step = random_step(rng, tuple(real.shape))
        steps += 1
        try:
            new = step(traced)
            result = values_of(new, {"w": torch.arange(240).reshape(4, 6, 10)})
        except NotAMove:  # said, not silently wrong: joined tensors are not reshaped
            continue
        real, traced, followed = step(real), new, followed + 1
        assert torch.equal(result, real)
    assert followed >= 3


def test_arithmetic_on_a_traced_tensor_says_so():
    _, traced = pair("w", (4, 6))
    for compute in (lambda x: x + 1, lambda x: x.sum(), lambda x: x[:, [0, 2]], torch.sign):
        with pytest.raises(NotAMove):
            compute(traced)


OPERATIONS = {
    "transpose": ([library.Transpose(0, 1)], (6, 10)),
    "interleave": ([library.Interleave(dim=0)], (12, 5)),
    "deinterleave": ([library.Interleave(dim=1, inverse=True)], (3, 12, 5)),
    "interleave then chunk": ([library.Interleave(dim=0), library.Chunk(dim=0)], (12, 5)),
    "interleave experts then chunk": ([library.Interleave(dim=1), library.Chunk(dim=1)], (2, 8, 3)),
    "rotary halves": ([library.PermuteForRope(permute_layer_names=["w"])], (24, 5)),
    "rotary halves of a bias": ([library.PermuteForRope(permute_layer_names=["w"])], (24,)),
    "flatten a patch kernel": ([library.Conv3dToLinear(3, (2, 2, 2))], (4, 3, 2, 2, 2)),
    "back to a kernel": ([library.LinearToConv3d(3, (2, 2, 2))], (4, 24)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_librarys_operations_move_places_as_they_move_values(name):
    operations, shape = OPERATIONS[name]
    results = [converted(tensor, operations, "chunk" in name) for tensor in pair("w", shape)]
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(values_of(results[1][key], {"w": pair("w", shape)[0]}), value)


def converted(tensor, operations, is_chunked: bool) -> dict:
    """As transformers' converter does it: a chain keeps the source's name until its last step."""
    found = {"w": [tensor]}
    for operation in operations:
        is_last = operation is operations[-1]
        targets = ["w", "v"] if is_chunked and is_last else ["w"]
        config = transformers.LlamaConfig(num_attention_heads=2)
        found = operation.convert(
            found, source_patterns=["w"], target_patterns=targets, config=config
        )
    return found


EXPERTS = [(4, 3)] * 4
# The operations that OPERATIONS leaves out, by class: how one is made, the shapes of what it takes, its targets.
# Looked up by name, because releases of the library differ by some.
MOVES = {
    "_IdentityOp": (lambda cls: cls(), {"w": [(4, 3)]}, ["w"]),
    "Chunk": (lambda cls: cls(dim=1), {"w": [(3, 8)]}, ["a", "b"]),
    "Split": (lambda cls: cls(dim=0), {"w": [(6, 3)]}, ["two", "four"]),
    "Concatenate": (lambda cls: cls(dim=1), {"a": [(3, 2)], "b": [(3, 4)]}, ["w"]),
    "MergeModulelist": (lambda cls: cls(dim=0), {"w": EXPERTS}, ["w"]),
    "SplitModulelist": (lambda cls: cls(dim=0), {"w": [(4, 2, 3)]}, ["w.*"]),
    "VisionFuseAndPermuteForRope": (
        lambda cls: cls(permute_layer_names=["q", "k"]),
        {"q": [(8, 3)], "k": [(8, 3)], "v": [(8, 3)]},
        ["w"],
    ),
    "VisionUnfuseAndPermuteForRope": (
        lambda cls: cls(permute_layer_names=["q", "k"]),
        {"w": [(24, 3)]},
        ["q", "k", "v"],
    ),
    "ErnieFuseAndSplitTextVisionExperts": (
        lambda cls: cls(stack_dim=0, concat_dim=1),
        {"gate": EXPERTS, "up": EXPERTS},
        ["text", "vision"],
    ),
    "ErnieSplitAndDecoupleTextVisionExperts": (
        lambda cls: cls(stack_dim=0, concat_dim=1),
        {"text": [(2, 8, 3)], "vision": [(2, 8, 3)]},
        ["gate.*", "up.*"],
    ),
    "Inkling2LoopMergeMessageQueries": (lambda cls: cls(), {"a": [(6, 5)], "b": [(6, 5)]}, ["w"]),
    "Inkling2UnpadVocab": (lambda cls: cls(), {"w": [(8, 3)]}, ["w"]),
}
COMPUTES = {"Inkling2LoopDequantizeExperts"}  # docs/design.md says so


def is_operation(value) -> bool:
    return isinstance(value, type) and issubclass(value, library.ConversionOps)


def test_no_architecture_is_converted_by_an_operation_that_is_not_tried_here():
    """So no checkpoint but that of COMPUTES has to be converted once before it can be streamed."""
    tried = {type(operation).__name__ for chain, _ in OPERATIONS.values() for operation in chain}
    tried |= set(MOVES) | COMPUTES
    defined = {name for name, value in vars(library).items() if is_operation(value)}
    assert defined - {"ConversionOps"} <= tried
    mappings = conversion_mapping._build_checkpoint_conversion_mapping().values()
    converters = [c for each in mappings for c in each if isinstance(c, library.WeightConverter)]
    used = {type(operation) for converter in converters for operation in converter.operations}
    assert len(used) > 5
    assert {cls.__module__ for cls in used} == {library.__name__}  # the others are of quantizers


def moved(name, which: int) -> tuple[dict, dict]:
    """(what operation `name` makes of values (which: 0) or of places (1), the values it was given)."""
    make, shapes, targets = MOVES[name]
    given, values = {}, {}
    for key, each in shapes.items():
        first = len(values)
        made = [pair(f"{key}.{i}", n, 100 * (first + i)) for i, n in enumerate(each)]
        values |= {f"{key}.{i}": real for i, (real, _) in enumerate(made)}
        given[key] = [one[which] for one in made]
    rows = {"two": 2, "four": 4, "w": 8}
    found = make(getattr(library, name)).convert(
        given,
        source_patterns=list(shapes),
        target_patterns=targets,
        config=transformers.LlamaConfig(num_attention_heads=2, unpadded_vocab_size=5),
        model=SimpleNamespace(
            get_parameter=lambda key: torch.empty(rows[key], 3, dtype=torch.int64)
        ),
        full_layer_name=targets[0],
    )
    return {k: v[0] if isinstance(v, list) else v for k, v in found.items()}, values


@pytest.mark.parametrize("name", [name for name in MOVES if hasattr(library, name)])
def test_operations_on_several_tensors_move_places_as_they_move_values(name):
    expected, values = moved(name, 0)
    found, _ = moved(name, 1)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(values_of(found[key], values), value)


@pytest.mark.skipif(not hasattr(library, *COMPUTES), reason="not in this release of transformers")
def test_experts_that_the_library_dequantizes_are_no_move():
    shapes = {"weight": (2, 4, 32), "scale": (2, 4, 1)}
    given = {key: [pair(key, shape)[1]] for key, shape in shapes.items()}
    operation = library.Inkling2LoopDequantizeExperts()
    sources = ["weight", "scale", "amax", "denominator"]
    with pytest.raises(NotAMove):
        operation.convert(given, source_patterns=sources, target_patterns=["weight"])
    plain = {"weight": given["weight"]}
    (found,) = operation.convert(
        plain, source_patterns=sources, target_patterns=["weight"]
    ).values()
    assert found is given["weight"][0]


def test_rotary_halves_are_one_copy():
    operations, shape = OPERATIONS["rotary halves"]
    (box,) = boxes(converted(pair("w", shape)[1], operations, False)["w"])
    assert box.view == (2, 6, 2, 5)
    assert box.order == (0, 2, 1, 3)


def test_the_index_and_the_headers_agree_on_what_is_placed(tmp_path):
    """The same placements from a sharded folder and from one file with the same tensors."""
    folder = tiny_models.save(tiny_models.build("qwen3_next"), tmp_path / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = open_checkpoint(folder)
    assert set(index) == set(checkpoint.tensors)
    sharded = place(build_meta(folder).model, checkpoint.tensors)
    one_file(folder, lambda tensors: None)
    whole = build_meta(folder)
    assert place(whole.model, whole.checkpoint.tensors) == sharded
