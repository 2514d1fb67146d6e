"""LoftQ over weights that are packed already: adapters begin at what packing took away.

An adapted layer computes with Q + s B A: Q what the packed file stands for, s = alpha / r, with rsLoRA alpha / √r. Of
the weight W that was packed,

    W - Q = U S V^T      B = U_r √(S_r / s)      A = √(S_r / s) V_r^T      so that Q + s B A is nearer to W than Q

(LoftQ, arXiv 2310.08659, Alg. 1 with T = 1; peft's `replace_lora_weights_loftq` keeps Q too, and has s = 1). Neither the
packed files nor the unpacked ones are written. One matrix is looked at after the other; memory is for one parameter in
both forms and a few matrices in float32.

What packing left as it was (norms, small matrices, all of a lossless packing) has no residual: its adapters stay as peft
begins them, since with A and B zero nothing could ever train. The adapter that comes of it belongs to this packing: on
the unpacked base it is off by what it makes up for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.peft.errors import AdapterError
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.placeholder import Placeholder
from ssdtune.visit.placement import place
from ssdtune.visit.whole import WholeReader

if TYPE_CHECKING:
    from peft import PeftModel

    from ssdtune.visit.build import MetaModel
    from ssdtune.visit.streamer import Streamer

LOFTQ = "loftq"  # peft's word for it
# The singular vectors by a randomised range finder (Halko, Martinsson, Tropp, arXiv 0909.4061, Alg. 4.4 and 5.1, as
# torch.svd_lowrank has it): at rank 16 a full decomposition of a matrix of 8192 x 28672 is some 100 times the work.
OVERSAMPLING = 16  # directions beyond the rank
POWER_ITERATIONS = 4
SEED = 0
# Cosine of W and Q: signs alone leave 0.8 of a normal distribution, other weights share nothing.
LEAST_AGREEMENT = 0.5
READ_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Residual:
    """What it came to. num_matrices: that begin nearer now; num_left: that packing had left alone; before, after:
    ||W - Q|| and ||W - Q - s B A|| over ||W||, Frobenius norms over all of the former."""

    num_matrices: int
    num_left: int
    before: float
    after: float

    def line(self) -> str:
        """For people."""
        return (
            f"loftq     {self.num_matrices} matrices: off by {self.before:.3%} of the unpacked ones as packed, by "
            f"{self.after:.3%} with their adapters"
        )


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
) -> Residual:
    """Sets A and B of every adapted matrix of a streamed, packed model; see the module's docstring.

    model_path: the model that was packed, a folder or hub id; None: where packing noted it. Takes the same values each
    time. Raises AdapterError where the model is not packed, or packed without loss, where its source is not to be had
    or is another model's, and for DoRA, whose magnitudes were taken before.
    """
    base: Any = peft_model.get_base_model()
    streamer: Streamer | None = getattr(base, "ssdtune", None)
    if streamer is None or not _is_packed(streamer):
        raise AdapterError(
            "init_lora_weights: loftq begins adapters at what packing took away, and this model is not packed.\n"
            "Set quantization: 4 (or nf4, …), or leave the key out."
        )
    meta = _source(streamer, model_path)
    squares = torch.zeros(3, dtype=torch.float64)
    counts = [0, 0]
    storage = choose_storage(max(meta.checkpoint.files, key=lambda f: f.stat().st_size)).storage
    with ReaderPool(storage) as pool:
        reader = WholeReader(
            meta,
            place(meta.model, meta.checkpoint.tensors),
            pool,
            alignment=storage.alignment,
            timeout_s=READ_TIMEOUT_S,
        )
        for name, layer in _layers(peft_model, adapter_name):
            weight = _unpacked(reader, name, meta)
            for matrix in _matrices(layer, adapter_name, name, weight):
                found = _begin(matrix)
                counts[found is None] += 1
                squares += 0 if found is None else found
    if not counts[0]:
        raise AdapterError(
            "init_lora_weights: loftq: packing took nothing away from the adapted layers: there is nothing to begin at.\n"
            "Leave the key out; or pack to fewer bits."
        )
    before, after = (squares[1:] / squares[0]).sqrt().tolist()
    return Residual(counts[0], counts[1], before, after)


# ------------------------------------------------------------------ where weights come from


def _is_packed(streamer: Streamer) -> bool:
    return any(isinstance(e, PackedEntry) for e in streamer.checkpoint.tensors.values())


def _source(streamer: Streamer, model_path: str | os.PathLike[str] | None) -> MetaModel:
    wanted = streamer.origin.source if model_path is None else os.fspath(model_path)
    is_gone = model_path is None and wanted is not None and _is_missing(wanted)
    if wanted is None or is_gone:
        where = "nobody has noted which" if wanted is None else f"{wanted} is not there any more"
        raise AdapterError(
            f"init_lora_weights: loftq needs the model that {streamer.checkpoint.folder} was packed from: {where}.\n"
            "Name its folder or hub id in loftq_source, or leave init_lora_weights out."
        )
    return streamer.origin.open(wanted)


def _is_missing(source: str) -> bool:
    """Whether it is a path, not a hub id, and nothing lies there."""
    return os.path.isabs(source) and not Path(source).exists()


def _unpacked(reader: WholeReader, name: str, meta: MetaModel) -> torch.Tensor:
    try:
        return reader.read(name)
    except KeyError as error:
        raise AdapterError(
            f"loftq_source: {meta.folder} has no {name}: it is not the model that was packed.\nName that one."
        ) from error


# ------------------------------------------------------------------ what is adapted


@dataclasses.dataclass(frozen=True, slots=True)
class _Matrix:
    """weight, stored: W and Q, [out, in] on one device. a [r, in], b [out, r]: views of the adapter's parameters.
    scale: s."""

    name: str
    weight: torch.Tensor
    stored: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def _layers(peft_model: PeftModel, adapter: str) -> Iterator[tuple[str, Any]]:
    """Each adapted layer, under the name that its weight has in the model without adapters."""
    from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper

    for path, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        if not isinstance(layer, Embedding | Linear | ParamWrapper):
            kind = type(layer.get_base_layer()).__name__
            raise AdapterError(
                f"init_lora_weights: loftq: {path} is a {kind}; linear layers, embeddings and stacked experts are "
                "supported.\nLeave it out of lora_target_modules."
            )
        if layer.use_dora.get(adapter, False):
            raise AdapterError(
                "init_lora_weights: loftq does not go with use_dora.\nSet one of them."
            )
        owner = path.removeprefix("base_model.model.").replace(".base_layer", "")
        yield f"{owner}.{_leaf(layer)}", layer


def _leaf(layer: Any) -> str:
    """The weight's name in the layer that is adapted."""
    return getattr(layer, "parameter_name", "weight")


def _matrices(layer: Any, adapter: str, name: str, weight: torch.Tensor) -> Iterator[_Matrix]:
    """Those that the layer's weight consists of. weight: W, as the layer has it."""
    held = getattr(layer.get_base_layer(), _leaf(layer))
    stored = held.source.read() if isinstance(held, Placeholder) else held.detach()
    if stored.shape != weight.shape:
        raise AdapterError(
            f"loftq_source: {name} has shape {list(weight.shape)} there and {list(stored.shape)} in the packed model.\n"
            "Name the model that was packed."
        )
    weight, scale = weight.to(stored.device), layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:  # an embedding's rows are inputs
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        yield _Matrix(name, weight.T, stored.T, a, b, scale)
        return
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if stored.dim() == 2:
        if getattr(layer, "fan_in_fan_out", False):
            weight, stored = weight.T, stored.T
        yield _Matrix(name, weight, stored, a, b, scale)
        return
    if not layer._did_swap_in_out_features:
        weight, stored = weight.mT, stored.mT
    # peft's ParamWrapper.get_delta_weight: A has an expert's rows beside each other, B an expert's columns E apart.
    num_experts = stored.shape[0]
    a, b = a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts)
    for i in range(num_experts):
        yield _Matrix(f"{name}[{i}]", weight[i], stored[i], a[i], b[:, :, i], scale)


# ------------------------------------------------------------------ one matrix


def _begin(matrix: _Matrix) -> torch.Tensor | None:
    """Sets A and B. Returns squares of the norms of W, W - Q and what is left of it, float64 [3]; None where packing
    took nothing away."""
    weight, stored = matrix.weight.float(), matrix.stored.float()
    residual = weight - stored
    if not residual.any():
        return None
    agreement = float((weight * stored).sum() / (weight.norm() * stored.norm()))
    if not agreement >= LEAST_AGREEMENT:
        raise AdapterError(
            f"loftq_source: {matrix.name} there has nothing in common with the packed one (cosine {agreement:.2f}).\n"
            "Name the model that was packed."
        )
    u, s, v = largest(residual, matrix.a.shape[0])
    roots = (s / matrix.scale).sqrt()
    # Beyond the residual's own rank A stays as peft began it, B zero: else neither would ever get a gradient.
    matrix.a[: len(s)] = (v * roots).T
    matrix.b[:, : len(s)] = u * roots
    matrix.b[:, len(s) :] = 0
    left = residual - matrix.scale * (matrix.b.float() @ matrix.a.float())
    return torch.stack([x.norm().double().cpu() ** 2 for x in (weight, residual, left)])


def largest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, k], S [k], V [n, k] of the largest singular values of a matrix [m, n], float32, not all zeros; k is `rank`,
    or less where the matrix's own is. The same ones each time, and random numbers elsewhere stay what they were."""
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        q = min(rank + OVERSAMPLING, *matrix.shape)
        u, s, v = torch.svd_lowrank(matrix, q=q, niter=POWER_ITERATIONS)
    least = s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps
    k = min(rank, int((s > least).sum()))
    return u[:, :k], s[:k], v[:, :k]
