"""A model of 100 billion weights in 4 bits on whatever this machine is: a LoRA step and a zeroth-order step.

    python benchmarks/big.py [--layers 184] [--tokens 16] [--ram 5.4GB] [--folder DIR] [--keep]

A Llama of that shape with random codes, written straight into packed blocks (55 GB in the cache, removed afterwards), is
trained by `ssdtune train` in a process of its own: its plan, seconds a step predicted and measured, and the peak memory
of the process. By hand; docs/big.md keeps an output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ssdtune.assets import prepare_model, prepare_text  # noqa: E402
from ssdtune.cache import cache_folder  # noqa: E402
from ssdtune.kernels.affine import Affine  # noqa: E402
from ssdtune.packing.convert import pack  # noqa: E402
from ssdtune.packing.encoding import Encoded  # noqa: E402
from ssdtune.packing.layout import file_parts, groups_of  # noqa: E402
from ssdtune.swap.storage import choose_storage  # noqa: E402
from ssdtune.visit.build import build_meta  # noqa: E402
from ssdtune.visit.outline import write_outline  # noqa: E402

WIDTH, INNER, HEADS, KEY_HEADS = 6144, 24576, 48, 8
DEVIATION = 0.01  # of the decoded weights
PEAK_BAR_GB = 8.0
CODE_DEVIATION = 4.6  # of uniform codes of 4 bits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=184)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--ram", default="5.4GB", help="budget of slots and buffers")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["lora", "zo"])
    parser.add_argument("--folder", type=Path, default=cache_folder() / "big-packed")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    options = parser.parse_args()
    try:
        if not (options.folder / "config.json").is_file():
            write_model(options.folder, options.layers)
        for method in options.methods:
            train(options, method)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)


def write_model(folder: Path, num_layers: int) -> None:
    """A packed folder of random codes, from an outline whose file is a hole."""
    tokenizer = prepare_model(cache_folder(), say=print)
    outline = folder.with_name(folder.name + "-outline")
    shutil.rmtree(outline, ignore_errors=True)
    outline.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_hidden_layers": num_layers,
        "vocab_size": json.loads((tokenizer / "config.json").read_text())["vocab_size"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (outline / "wanted.json").write_text(json.dumps(config))
    write_outline(outline / "wanted.json", outline)
    for path in [*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja")]:
        shutil.copyfile(path, outline / path.name)
    meta = build_meta(outline)
    fill_norms(meta.checkpoint)
    groups = groups_of(build_meta(outline), Affine(4, (4,)))
    num_weights = sum(p.numel() for p in meta.model.parameters())
    print(
        f"{num_weights / 1e9:.1f} B weights, writing {sum(g.num_bytes for g in groups) / 1e9:.1f} GB"
    )
    storage = choose_storage(outline).storage
    done = pack(build_meta(outline), groups, folder, storage=storage, encode=random_codes)
    print(f"written: {done.num_bytes / 1e9:.1f} GB, {done.bits_per_weight:.3f} bits a weight")
    shutil.rmtree(outline)


def fill_norms(checkpoint: Any) -> None:
    """Ones into the norms; everything else of the outline is a hole."""
    for entry in checkpoint.tensors.values():
        if len(entry.shape) == 1:
            with open(entry.path, "r+b") as file:
                file.seek(entry.start)
                ones = torch.ones(entry.shape, dtype=torch.bfloat16)
                file.write(ones.view(torch.uint8).numpy().tobytes())


def random_codes(name: str, values: torch.Tensor, format: Any) -> Encoded:
    """Uniform codes, centred, scaled to DEVIATION. A seed of the name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    parts: dict[str, torch.Tensor] = {}
    for part in file_parts(format, tuple(values.shape)):
        if part.suffix.startswith("scales"):
            scale = DEVIATION / CODE_DEVIATION
            parts[part.suffix] = torch.full(part.shape, scale, dtype=torch.bfloat16)
        elif part.suffix.startswith("zeros"):
            parts[part.suffix] = torch.full(part.shape, 127, dtype=torch.uint8)
        else:
            words = torch.empty(part.shape[0] // 8, dtype=torch.int64)
            parts[part.suffix] = words.random_(generator=generator).view(torch.uint8)
    return format, parts


def train(options: argparse.Namespace, method: str) -> None:
    """One run in a process of its own; prints what it says and the peak so far."""
    data, _ = prepare_text(cache_folder())
    run = options.folder.with_name(f"big-run-{method}")
    shutil.rmtree(run, ignore_errors=True)
    words = f"""
        --model_name_or_path {options.folder} --dataset {data} --output_dir {run} --method {method}
        --dtype float32 --max_length {options.tokens} --overlong truncate --train_on all --per_device_train_batch_size 1
        --gradient_accumulation_steps 1 --max_steps {options.steps} --save_strategy no --lora_r 8
        --lora_target_modules q_proj,v_proj --logging_steps 1 --offload.ram {options.ram}
        --offload.activations none --learning_rate 1e-4
    """.split()
    print(f"--- method: {method}", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "ssdtune", "train", *words], check=True, env=environment)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / 1e9
    print(f"peak of the processes so far {peak:.2f} GB (bar {PEAK_BAR_GB:g})", flush=True)
    shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    main()
