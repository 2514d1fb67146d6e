"""DeepSpeed ZeRO-3, parameters and optimizer states on NVMe: full fine-tuning in float32.

Three settings stray from its defaults, because with them its losses are not those of training in
memory (0.19.8, CPU, gloo). It clips gradients to a norm of 1 where nothing is said (its pull request
8068), which the twin does not. Non-reentrant checkpointing has wrong gradients: in a group of one
process on a CPU a gathered parameter *is* the swap buffer (`partition_parameters.NoGatherHandle`), and
what checkpointing saves of it is another parameter by the time backward reads it. And
`stage3_max_reuse_distance` is 0. It trains LoRA with parameters on NVMe not at all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import (
    Base,
    Spec,
    cut,
    load_plain,
    make_batch,
    num_predicted,
    trained_elements,
)
from benchmarks.peers import make_local_process_group_environment


class DeepSpeedNvme(Base):
    """spec: `micro_rows`, `scratch` (a folder on the drive for parameters and states)."""

    trains = "full"

    def __init__(self, spec: Spec) -> None:
        make_local_process_group_environment()
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        self.batch = make_batch(spec["batch"])
        self.micro_batches = cut(self.batch, spec["micro_rows"])
        self.num_items = num_predicted(self.batch)
        torch.manual_seed(spec["seed"])
        model = load_plain({**spec, "use_reentrant": True}).train()
        self.elements = trained_elements(model)
        largest = max(p.numel() for p in model.parameters())
        config = zero3_config(spec, Path(spec["scratch"]), largest, len(self.micro_batches))
        # Made here and not by initialize(), which passes it float32 and gets bfloat16 on a CPU
        # without float16: `dtype or half if … else …` groups the other way (0.19.8).
        deepspeed.zero.Init(
            module=model, config_dict_or_path=config, remote_device="nvme", pin_memory=False
        )
        self.engine: Any = deepspeed.initialize(model=model, config=config)[0]
        self.config = config

    def step(self) -> float:
        total = torch.zeros(())
        for micro in self.micro_batches:
            loss = self.engine(**micro).loss  # equal rows: the mean of means is the batch's mean
            self.engine.backward(loss)
            self.engine.step()
            total = total + loss.detach() / len(self.micro_batches)
        return float(total)

    def about(self) -> dict[str, Any]:
        import deepspeed

        return {
            "version": deepspeed.__version__,
            "trained_elements": self.elements,
            "departs_from_defaults": "no gradient clipping, reentrant checkpointing, "
            "stage3_max_reuse_distance 0",
            "config": self.config,
        }


def zero3_config(spec: Spec, folder: Path, largest: int, num_micro: int) -> dict[str, Any]:
    """largest: elements of the largest parameter, which its buffers must hold."""
    nvme = {"device": "nvme", "nvme_path": str(folder), "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": spec["micro_rows"],
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": 0.0,  # none, as its twin; left out, it clips to a norm of 1
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": spec["learning_rate"], "weight_decay": 0.0},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                **nvme,
                "buffer_count": 8,
                "buffer_size": largest,  # in elements
                "max_in_cpu": 0,
            },
            "offload_optimizer": {**nvme, "buffer_count": 4},
            "stage3_max_reuse_distance": 0,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "overlap_events": True},
        "steps_per_print": 10**9,
    }
