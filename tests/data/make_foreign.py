"""Makes tests/data/foreign/*.safetensors: weights that other libraries quantized, and what they themselves decode.

Run by hand, on a CPU, wherever the libraries can be imported; what can't be is left as it is:

    pip install --no-deps --no-build-isolation --target LIBS bitsandbytes compressed-tensors loguru autoawq auto-gptq \\
        gptqmodel pypcre logbar tokenicer device-smi threadpoolctl defuser torchao
    PYTHONPATH=LIBS python tests/data/make_foreign.py

Nothing of ssdtune's takes part: tensors are written by the libraries' quantizers under the names that they save them by
(a layer's name is left away), "expected" is what their decoders on a CPU make of them. Each file's metadata say by which
version, and for each case what config.json says.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "foreign"
Tensors = dict[str, torch.Tensor]
# Name; what config.json says; tensors, "expected" among them.
Case = tuple[str, Mapping[str, Any], Tensors]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def below(top: int, *shape: int, least: int = 0, seed: int = 0) -> torch.Tensor:
    """Random integers, `least` or more."""
    return torch.randint(least, top, shape, generator=seeded(seed))


def scales_of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape, generator=seeded(3)) * 0.1 + 1e-3).to(dtype)


# ------------------------------------------------------------------------------- bitsandbytes


def of_bitsandbytes() -> Iterator[Case]:
    """4 bits. Where scales are nested, those of 256 blocks share one: the last shape has 257."""
    functional = importlib.import_module("bitsandbytes.functional")
    shapes = {
        "odd": ((37, 71), 64),
        "even": ((34, 70), 64),
        "long blocks": ((34, 70), 1024),
        "blocks of blocks": ((257, 32), 32),
    }
    for kind, nested, shape, dtype in (
        ("nf4", False, "odd", torch.bfloat16),
        ("nf4", False, "even", torch.float16),
        ("nf4", False, "long blocks", torch.float32),
        ("nf4", True, "odd", torch.float16),
        ("nf4", True, "blocks of blocks", torch.bfloat16),
        ("fp4", False, "odd", torch.bfloat16),
        ("fp4", False, "long blocks", torch.float32),
        ("fp4", True, "even", torch.float32),
        ("fp4", True, "blocks of blocks", torch.float16),
    ):
        size, block = shapes[shape]
        weight = torch.randn(size, generator=seeded()).to(dtype)
        codes, state = functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        made = {f".weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        expected = functional.dequantize_4bit(codes, state)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        name = f"{kind} {'nested' if nested else 'plain'}, {shape}"
        yield name, config, {".weight": codes, **made, "expected": expected}


# ------------------------------------------------------------------------- compressed-tensors

INTEGERS = [
    {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    for bits in (4, 8, 3)
    for symmetric in (True, False)
    for strategy, group in (("group", 32), ("channel", None))
]
BYTES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [  # the last: shape of the scales
    ("float-quantized", {"type": "float", "strategy": "tensor"}, (1,)),
    ("float-quantized", {"type": "float", "strategy": "channel"}, (24, 1)),
    ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [16, 32]}, (2, 3)),
    ("int-quantized", {"type": "int", "strategy": "tensor"}, (1,)),
    ("int-quantized", {"type": "int", "strategy": "channel"}, (24, 1)),
    ("int-quantized", {"type": "int", "strategy": "channel", "symmetric": False}, (24, 1)),
    ("int-quantized", {"type": "int", "strategy": "group", "group_size": 32, "symmetric": False}, (24, 3)),
]  # fmt: skip
FLOATS_4 = {"num_bits": 4, "type": "float"}


def of_compressed_tensors() -> Iterator[Case]:
    for i, weights in enumerate(INTEGERS):
        shape = (24, 3 if weights["group_size"] else 1)
        width = 96 if weights["group_size"] else 91  # whose last word is not full
        name = f"{weights['num_bits']} bits {weights['strategy']} {'sym' if weights['symmetric'] else 'asym'}"
        parameters = _parameters(shape, weights, DTYPES[i % 2])
        yield _compressed(name, "pack-quantized", width, parameters, weights)
    for i, (layout, described, shape) in enumerate(BYTES):
        weights = {"num_bits": 8, "symmetric": True, **described}
        name = f"{weights['type']}8 {weights['strategy']}{'' if weights['symmetric'] else ' asym'}"
        parameters = _parameters(shape, weights, DTYPES[i % 3])
        yield _compressed(name, layout, 96, parameters, weights)
    parameters = {
        "weight_scale": torch.rand(24, 6, generator=seeded()) * 400 + 1,
        "weight_global_scale": torch.tensor([317.3]),
    }
    weights = FLOATS_4 | {"strategy": "tensor_group", "group_size": 16}
    yield _compressed("nvfp4", "nvfp4-pack-quantized", 96, parameters, weights)
    parameters = {"weight_scale": (below(40, 24, 3).float() - 20).exp2()}
    weights = FLOATS_4 | {"strategy": "group", "group_size": 32}
    yield _compressed("mxfp4", "mxfp4-pack-quantized", 96, parameters, weights)


def _parameters(shape: tuple[int, ...], weights: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    """Scales, and zeros that are not 0 for a scheme that has them."""
    top = 2 ** (weights["num_bits"] - 1)
    zeros = torch.zeros(shape) if weights["symmetric"] else below(2 * top, *shape) - top
    return {
        "weight_scale": scales_of(*shape, dtype=dtype),
        "weight_zero_point": zeros.to(torch.int8),
    }


def _compressed(
    name: str, layout: str, width: int, parameters: Tensors, weights: Mapping[str, Any]
) -> Case:
    compressors = importlib.import_module("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights), format=layout
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    weight = torch.randn(24, width, generator=seeded())
    if "weight_zero_point" in parameters:
        weight = weight.to(parameters["weight_scale"].dtype)
    made = compressor.compress({"weight": weight, **parameters}, scheme)
    expected = compressor.decompress(dict(made), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
    }
    return name, config, {"expected": expected, **{f".{n}": t for n, t in made.items()}}


# --------------------------------------------------------------------------------- AWQ, GPTQ


def _grid(
    bits: int, order: torch.Tensor, rows: int, *, least: int = 0
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer whose weights lie on a grid, the grid's scales and zeros [groups, rows]. order: each column's group."""
    groups = int(order.max()) + 1
    zeros = below(2**bits, groups, rows, least=least, seed=1)
    scales = scales_of(groups, rows, dtype=torch.float16)
    codes = below(2**bits, rows, len(order))
    layer = torch.nn.Linear(len(order), rows, bias=False, dtype=torch.float16)
    exact = (codes - zeros.t()[:, order]) * scales.t()[:, order].float()
    layer.weight.data = exact.half()
    return layer, scales, zeros


def of_autoawq() -> Iterator[Case]:
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    for rows, width, group in ((32, 96, 32), (64, 48, 48)):
        layer, scales, zeros = _grid(4, torch.arange(width) // group, rows)
        made = gemm.WQLinear_GEMM.from_linear(layer, 4, group, scales=scales, zeros=zeros)
        tensors = {f".{name}": t for name, t in made.state_dict().items()}
        expected = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group).t()
        stated = -1 if group == width else group
        config = {
            "quant_method": "awq", "bits": 4, "group_size": stated, "version": "gemm", "zero_point": True,
        }  # fmt: skip
        yield f"groups of {stated}", config, {"expected": expected, **tensors}


def _gptq_cases() -> Iterator[tuple[int, int, bool, torch.Tensor]]:
    """Bits, group, whether columns are in an order of their own, each column's group."""
    for bits, group, is_ordered in (
        (2, 32, False), (3, 32, False), (4, 32, False), (8, 32, False),
        (2, 32, True), (3, 32, True), (4, 32, True), (8, 32, True),
        (4, 64, False),
    ):  # fmt: skip
        order = torch.arange(64) // group
        if is_ordered:
            order = order[torch.randperm(64, generator=seeded())]
        yield bits, group, is_ordered, order


def _gptq_name(bits: int, group: int, is_ordered: bool) -> str:
    return f"{bits} bits, groups of {group}{', in an order of their own' if is_ordered else ''}"


def _gptq_config(bits: int, group: int, is_ordered: bool, layout: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": -1 if group == 64 else group,
        "desc_act": is_ordered, "checkpoint_format": layout,
    }  # fmt: skip


def of_gptqmodel() -> Iterator[Case]:
    """Both versions of the layout, zeros of 0 among them, by its layer of torch's operators."""
    layers = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    model = importlib.import_module("gptqmodel.utils.model")
    quantization = importlib.import_module("gptqmodel.quantization")
    for bits, group, is_ordered, order in _gptq_cases():
        for layout in ("gptq", "gptq_v2"):
            layer, scales, zeros = _grid(bits, order, 32)
            made = layers.TorchLinear(bits, group, False, is_ordered, 64, 32, register_buffers=True)
            made.pack(layer, scales.t(), zeros.t(), order.to(torch.int32))
            if layout == "gptq":
                config = quantization.QuantizeConfig(bits=bits, group_size=group)
                model.convert_gptq_v2_to_v1_format_module(made, config)
            tensors = {f".{name}": t.clone() for name, t in made.state_dict().items()}
            if layout == "gptq":
                model.convert_gptq_v1_to_v2_format_module(made, bits, torch.int32)
            made.post_init()
            expected = made.dequantize_weight().t()
            config = _gptq_config(bits, group, is_ordered, layout)
            name = f"{_gptq_name(bits, group, is_ordered)}, {layout}"
            yield name, config, {"expected": expected, **tensors}


def of_auto_gptq() -> Iterator[Case]:
    """Version 1, zeros from 1 on: its writer spoils the neighbours of a zero of 0. Decoded by a product with unit
    vectors, whose sums have one term that is not 0. The package can't be imported beside the transformers of today, the
    file of the layer can."""
    package = importlib.util.find_spec("auto_gptq")
    if package is None or package.origin is None:
        raise ImportError("no auto_gptq")
    path = Path(package.origin).parent / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    layers: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    for bits, group, is_ordered, order in _gptq_cases():
        layer, scales, zeros = _grid(bits, order, 32, least=1)
        made = layers.QuantLinear(bits, group, 64, 32, bias=False)
        made.pack(layer, scales.t(), zeros.t().float(), order.to(torch.int32))
        expected = made(torch.eye(64, dtype=torch.float16)).t()
        tensors = {f".{name}": t for name, t in made.state_dict().items()}
        config = _gptq_config(bits, group, is_ordered, "gptq")
        yield _gptq_name(bits, group, is_ordered), config, {"expected": expected, **tensors}


MADE_BY: dict[
    str, Callable[[], Iterator[Case]]
] = {  # by the names of distributions, which are the files'
    "bitsandbytes": of_bitsandbytes,
    "compressed-tensors": of_compressed_tensors,
    "autoawq": of_autoawq,
    "auto-gptq": of_auto_gptq,
    "gptqmodel": of_gptqmodel,
}


def main() -> int:
    """Makes the files, or those that the command line names."""
    OUT.mkdir(exist_ok=True)
    for library in sys.argv[1:] or MADE_BY:
        try:
            cases = list(MADE_BY[library]())
        except ImportError as error:
            print(f"{library}: left as it is: {error}")
            continue
        made_by = f"{library} {importlib.metadata.version(library)}"
        tensors: Tensors = {}
        for name, _, made in cases:
            tensors |= {f"{name}|{key}": t.detach().contiguous() for key, t in made.items()}
        configs = json.dumps({name: config for name, config, _ in cases})
        path = OUT / f"{library}.safetensors"
        save_file(tensors, path, {"made_by": made_by, "configs": configs})
        path.chmod(0o644)
        print(f"{made_by}: {len(cases)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
