"""Training by forward passes alone."""

from dataclasses import dataclass

from ssdtune.settings import Number, OneOf, Or, Whole, YesNo, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class ZerothOrderKeys:
    """What `method: zo` estimates, and what it does with it."""

    zo_trains: str = key(
        OneOf(("adapters", "all", "low_rank")),
        "what method: zo moves: an adapter of the lora_* keys; all weights, whose files stay as they are; or all weights by "
        "lozo, the steps of a window held as one matrix of low rank for each: one product for a block that is read however "
        "many steps it has missed, and nothing written before the window is over. Other weights than those of all, where "
        "each step is rounded by itself",
        default="adapters",
    )
    zo_estimator: str = key(
        OneOf(("mezo", "fzoo", "lozo")),
        "two-sided differences (arXiv 2305.17333); many one-sided ones scaled by their spread (arXiv 2506.09034), whose "
        "learning_rate is that of its authors' code times zo_eps: the paper divides by it; two-sided ones along matrices of "
        "low rank (arXiv 2410.07698), whose learning_rate is that of its authors' code times zo_rank",
        default="mezo",
    )
    zo_eps: float = key(
        Number(is_open=True),
        "how far the weights are moved along a direction; MeZO's authors take 1e-3 for all weights and 1e-2 for LoRA",
        default=1e-3,
    )
    zo_num_directions: int | None = key(
        Or("auto", Whole(1, 1024)),
        "random directions of a step, all in one fetch of a block; auto: 1 for mezo and lozo; for fzoo 8, or where reading is "
        "what a step waits for as many, 64 at most, as take 1.15 times its reading: with a profile (`ssdtune probe`), in one "
        "process, and kept when the run is resumed",
        default=None,
        example="8",
    )
    zo_rank: int = key(Whole(1, 1024), "rank of lozo's directions", default=2)
    zo_window: int = key(
        Whole(1, 2**24), "steps for which one factor of lozo's directions stays", default=50
    )
    zo_update: str = key(
        OneOf(("sgd", "sign", "momentum", "adam", "lozo_m")),
        "what is done with an estimate: followed; its sign; it and zo_horizon - 1 earlier ones, weighted (ZO-SGD-MMT without "
        "what is older, arXiv 2402.11592); their moments (AdaMeZO, arXiv 2605.00650). Earlier ones are made again from the "
        "log, so that momentum and adam draw zo_horizon times as many random numbers for a step. lozo_m: LOZO-M, lozo's "
        "momentum in its factor of low rank, with zo_trains: low_rank",
        default="sgd",
    )
    zo_momentum: float | None = key(
        Or("auto", Number(maximum=1, excludes_maximum=True)),
        "decay of the first moment of momentum, adam and lozo_m; auto: 0.9, 0.7 and 0.7",
        default=None,
        example="0.9",
    )
    zo_beta2: float = key(
        Number(maximum=1, excludes_maximum=True), "decay of adam's second moment", default=0.9
    )
    zo_horizon: int = key(
        Whole(1, 1000), "steps that the moments of momentum and adam reach back", default=10
    )
    zo_mask: str = key(
        OneOf(("none", "random", "magnitude")),
        "which weights move: all; the same random ones in all steps; of all weights (zo_trains: all) those of the smallest "
        "magnitude in each parameter (Sparse-MeZO, arXiv 2402.15751)",
        default="none",
    )
    zo_mask_ratio: float = key(
        Number(is_open=True, maximum=1),
        "share of each parameter that zo_mask lets move",
        default=0.25,
    )
    zo_clip: float | None = key(
        Or("none", Number(is_open=True)),
        "bound of a direction's gradient",
        default=None,
        example="100",
    )
    zo_fold_steps: int | None = key(
        Or("never", Whole(1, 2**24)),
        "with zo_trains: all, after so many steps a block is written back to a working copy in offload.path, since until "
        "then it takes all of them again each time it is read; the weights are the same either way. With low_rank, rounded "
        "up to whole windows",
        default=10,
    )
    zo_master: bool = key(
        YesNo(),
        "with zo_trains: all, keep weights of 16 bits in float32, in slots and working copy, which are twice as large then; "
        "compute reads them rounded to 16 bits. Without it each step is rounded to 16 bits at random",
        default=False,
    )
    zo_packed: str = key(
        OneOf(("decoded", "kept", "moved")),
        "what slots hold of a packed base: its decoded weights; its packed bytes, from which variants are made in one "
        "pass, with adapters or zo_fold_steps: never; or packed bytes that train themselves (zo_trains: all, affine codes), "
        "rounded at random to codes and written back packed",
        default="decoded",
        example="kept",
    )
