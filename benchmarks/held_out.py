"""What quantization without calibration costs in held-out loss: ours beside bitsandbytes, HQQ and torchao.

    python -m benchmarks.held_out [--model off-grid|minilm] [--bits 2 3 4 5 6 8] [--only NAME ...] [--peers FOLDER]
                                  [--json out.json]

Every matrix of the layers is encoded, decoded in float32 and put in the place of the original, embeddings and norms are
left; then the loss on text that the model has not been trained on. Groups of at most 64. Two models whose weights have
never been quantized:

off-grid  SmolLM2 as `off_grid.py` trained it: mean cross entropy of a token over the text kept out of that training.
minilm    all-MiniLM-L6-v2 as published: to find the right one of 128 passages for a title of the Python reference, mean
          cross entropy over cosine similarities x 20, as its authors trained it (its card on Hugging Face).

Peers are imported as in `quality.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, print_result
from benchmarks.off_grid import off_grid_model, text_ids
from benchmarks.quality import never_quantized
from benchmarks.quantizers import GROUP, Contestant, all_contestants
from ssdtune.assets import prepare_text
from ssdtune.cache import cache_folder

WINDOWS, LENGTH = 16, 256  # of the language model's text
PAIRS, PASSAGE_TOKENS, SHARPNESS = 128, 128, 20.0
Loss = Callable[[], float]


# ------------------------------------------------------------------------------------------ models


def language_model(folder: Path) -> tuple[torch.nn.Module, Loss]:
    """A causal language model, and its loss over windows of the held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, held_out = prepare_text(cache_folder())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = text_ids(tokenizer, held_out)
    windows = torch.tensor(ids[: WINDOWS * LENGTH]).view(-1, LENGTH)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def loss() -> float:
        rows = [model(input_ids=one[None], labels=one[None]).loss for one in windows]
        return float(torch.stack(rows).double().mean())

    return model, loss


def sentence_model(folder: Path) -> tuple[torch.nn.Module, Loss]:
    """A sentence encoder, and its loss at telling which passage belongs to which title."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    titles, passages = zip(*_titles_and_passages(), strict=True)

    def embedded(texts: Sequence[str]) -> torch.Tensor:
        fed = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=PASSAGE_TOKENS,
            return_tensors="pt",
        )
        hidden, mask = model(**fed).last_hidden_state, fed["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss() -> float:
        alike = SHARPNESS * embedded(titles) @ embedded(passages).T
        return float(torch.nn.functional.cross_entropy(alike, torch.arange(len(titles))))

    return model, loss


def _titles_and_passages() -> list[tuple[str, str]]:
    """Of PAIRS topics of the reference, the first part of each."""
    found: dict[str, str] = {}
    for file in reversed(prepare_text(cache_folder())):
        for line in file.read_text(encoding="utf-8").splitlines():
            asked, answer = (message["content"] for message in json.loads(line)["messages"])
            title = asked.split("language: ", 1)[1].split(" (part ")[0].removesuffix(".")
            found.setdefault(title, answer)
    return list(found.items())[:PAIRS]


MODELS = {
    "off-grid": (off_grid_model, language_model),
    "minilm": (never_quantized, sentence_model),
}


# --------------------------------------------------------------------------------------- measuring


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is quantized: matrices of the layers whose rows hold whole groups."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and parameter.shape[1] % GROUP == 0
    }


@torch.no_grad()
def losses_of(
    one: Contestant, bits: Sequence[int], model: torch.nn.Module, loss: Loss
) -> Iterator[dict[str, Any]]:
    """A row for each of its readings among `bits`. The model's weights are the same after as before."""
    wanted = [i for i, (width, _) in enumerate(one.readings) if width in bits]
    if not wanted:
        return
    found = matrices(model)
    before = {name: parameter.detach().clone() for name, parameter in found.items()}
    decoded = {name: one.decoded(weight) for name, weight in before.items()}
    for i in wanted:
        for name, parameter in found.items():
            parameter.copy_(decoded[name][i])
        width, bits_per_weight = one.readings[i]
        yield {
            "contestant": one.name,
            "bits": width,
            "bits_per_weight": bits_per_weight,
            "loss": loss(),
        }
    for name, parameter in found.items():
        parameter.copy_(before[name])


def main() -> None:
    """Prints rows as they come, then by width; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Held-out loss of quantized models.")
    parser.add_argument("--model", choices=list(MODELS), default="off-grid")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--only", nargs="+", help="contestants whose names begin so")
    parser.add_argument("--peers", type=Path, help="folder to import other libraries from")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    prepared, built = MODELS[asked.model]
    folder = prepared()
    model, loss = built(folder)
    contestants, missing = all_contestants(asked.peers)
    with torch.no_grad():
        whole = loss()
    print(f"{folder.name}: {whole:.4f} with all bits", flush=True)
    rows: list[dict[str, Any]] = []
    for one in contestants:
        if one.group > GROUP or not one.name.startswith(tuple(asked.only or ("",))):
            continue
        for row in losses_of(one, asked.bits, model, loss):
            rows.append(row)
            print(told(row, whole), flush=True)
    print("by width")
    for row in sorted(rows, key=lambda row: (row["bits"], row["loss"])):
        print(told(row, whole))
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason}")
    machine = describe(folder, num_threads=torch.get_num_threads())
    print_result({"model": folder.name, "loss": whole, "rows": rows, **machine}, asked.json)


def told(row: dict[str, Any], whole: float) -> str:
    """A row as printed: bits, bits a weight, loss, what it costs."""
    return (
        f"{row['bits']:4} {row['bits_per_weight']:8.3f} {row['loss']:8.4f} {row['loss'] / whole - 1:+9.2%}"
        f"  {row['contestant']}"
    )


if __name__ == "__main__":
    main()
