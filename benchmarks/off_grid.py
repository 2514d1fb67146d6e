"""SmolLM2 with weights that lie on no grid: channels rescaled, then all weights trained, in memory, in float32.

    python benchmarks/off_grid.py [--steps 300]

The only real weights at hand come out of a 4-bit file, and quantizing them again proves nothing. What a norm puts out,
what a value head and what the gated product carry may be scaled channel by channel, if the matrices before and after
take the factors in: the model computes the same, and no group of weights lies on one grid any more. Then the whole
model is trained on the text of the quickstart, so that its weights are nobody's old ones. Written to the cache, once;
prints how far 4-bit codes in groups of 32 are from the weights before and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ssdtune.assets import built_beside, prepare_model, prepare_text  # noqa: E402
from ssdtune.cache import cache_folder  # noqa: E402
from ssdtune.kernels.affine import Affine  # noqa: E402
from ssdtune.kernels.quantize import decoded  # noqa: E402
from ssdtune.kernels.quantize_affine import quantize_affine  # noqa: E402

NAME = "smollm2-135m-off-grid"
LENGTH = 128  # tokens a step
SPREAD = 0.3  # of the channels' factors, standard deviation of their logarithm
LEARNING_RATE, WARM_UP = 1e-4, 20
GRID_IS_GONE = 5e-3  # relative squared error of affine 4-bit codes in groups of 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    folder = off_grid_model(options.steps)
    off = grid_error(tensors_of(folder))
    print(f"{folder}: 4-bit codes in groups of 32 are off by {off:.2e}")
    if off < GRID_IS_GONE:
        raise SystemExit(
            f"less than {GRID_IS_GONE:.0e}: the grid is still there; take more --steps"
        )


def off_grid_model(num_steps: int = 300) -> Path:
    """The model's folder, trained now where it is not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = cache_folder() / NAME
    if (target / "config.json").is_file():
        return target
    source, _ = prepare_model(cache_folder(), say=print), prepare_text(cache_folder())
    print(
        f"{source}: 4-bit codes in groups of 32 are off by {grid_error(tensors_of(source)):.2e}",
        flush=True,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    rescale_channels(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    for step, batch in enumerate(batches(tokenizer, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            off = grid_error(model.state_dict().items(), every=20)
            print(
                f"step {step} of {num_steps}: loss {loss.item():.3f}, off by {off:.2e}", flush=True
            )
    with built_beside(target) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return target


def learning_rate(step: int, num_steps: int) -> float:
    """Up in WARM_UP steps, then down to zero in a straight line."""
    return LEARNING_RATE * min((step + 1) / WARM_UP, (num_steps - step) / (num_steps - WARM_UP))


@torch.no_grad()
def rescale_channels(model: Any) -> None:
    """Other weights of the same function, but for rounding. model: a Llama."""
    draw = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads

    def factors(count: int) -> torch.Tensor:
        return torch.empty(count).log_normal_(0, SPREAD, generator=draw)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, readers in normed:
            columns = factors(len(norm.weight))
            norm.weight /= columns
            for reader in readers:
                reader.weight *= columns
        columns = factors(mlp.down_proj.in_features)
        mlp.up_proj.weight /= columns[:, None]
        mlp.down_proj.weight *= columns
        columns = factors(attention.v_proj.out_features)
        attention.v_proj.weight /= columns[:, None]
        heads = columns.view(num_kv_heads, -1).repeat_interleave(num_heads // num_kv_heads, dim=0)
        attention.o_proj.weight *= heads.reshape(-1)


def batches(tokenizer: Any, count: int) -> Iterator[torch.Tensor]:
    """int64 [1, LENGTH] each, windows of the training text in an order of their own."""
    ids = text_ids(tokenizer, cache_folder() / "python-topics.jsonl")
    order = random.Random(0)
    for _ in range(count):
        start = order.randrange(len(ids) - LENGTH)
        yield torch.tensor([ids[start : start + LENGTH]])


def text_ids(tokenizer: Any, file: Path) -> list[int]:
    """All answers of a file of chats, one after the other."""
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids += tokenizer(row["messages"][-1]["content"] + "\n")["input_ids"]
    return ids


def grid_error(tensors: Iterable[tuple[str, torch.Tensor]], every: int = 1) -> float:
    """Relative squared error of the layers' matrices, or of one in `every`, as affine 4-bit codes in groups of 32."""
    wrong = right = 0.0
    format = Affine(4, (4,), 32)
    matrices = (one for name, one in tensors if ".layers." in name and name.endswith("proj.weight"))
    for matrix in itertools.islice(matrices, 0, None, every):
        weight = matrix.float()
        parts = quantize_affine(weight, format.order, format.group)
        found = decoded(format, parts, tuple(weight.shape))
        wrong += float((found - weight).square().sum())
        right += float(weight.square().sum())
    return wrong / right


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All of a folder's files, one after the other."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


if __name__ == "__main__":
    main()
