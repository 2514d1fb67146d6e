"""`ssdtune pack`: its arguments, and what they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.errors import SSDTuneError

if TYPE_CHECKING:
    from ssdtune.packing.wanted import Wanted


def pack(words: list[str]) -> object:
    """Runs `ssdtune pack WORDS…`. Raises SSDTuneError."""
    arguments = _parser().parse_args(words)
    if not arguments.check and (arguments.check_text or arguments.check_bits):
        raise SSDTuneError("--check_text and --check_bits are for --check.\nAdd it.")
    if arguments.text and arguments.target_bpw is None:
        raise SSDTuneError("--text is for --target_bpw, whose choice it weighs.\nAdd it.")
    from ssdtune.pack import Request, run_pack

    return run_pack(
        Request(
            model=arguments.model,
            out=arguments.out.expanduser(),
            wanted=_wanted(arguments),
            target_bpw=arguments.target_bpw,
            text=arguments.text,
            keep=tuple(arguments.keep),
            checks=arguments.check,
            check_text=arguments.check_text,
            check_bits=arguments.check_bits,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssdtune pack",
        description="Write a model's weights in a few bits each to a new folder, which trains as any model does. "
        "The model's own files stay as they are. Interrupted, the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder to write, a new one; with --check also one that is packed already",
    )
    _add_format(parser)
    _add_widths_by_tensor(parser)
    _add_check(parser)
    return parser


def _add_format(parser: argparse.ArgumentParser) -> None:
    """One format for all weights, and which are left as they are."""
    parser.add_argument(
        "--format",
        choices=("affine", "nf4", "mxfp4", "nvfp4", "fp4-ue5m3", "fp8", "lossless"),
        help="affine (the default): 1-8 bits; lossless: the same bfloat16 bits in three quarters of the bytes",
    )
    parser.add_argument(
        "--bits",
        type=int,
        help="of affine codes, 1-8, 4 by default; of a lossless dictionary, 4 or 3",
    )
    parser.add_argument(
        "--order", help="of slices, e.g. 4,1,1,2 with --bits 8: to be read at 4, 5, 6 or 8 bits"
    )
    parser.add_argument(
        "--group",
        type=int,
        help="weights that share a scale, of affine codes and nf4; 64 by default",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="rotate each group of affine codes first (Hadamard): for weights with outliers",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave tensors of such names as they are: '*.o_proj.weight'; may be given several times. Routers always are",
    )


def _add_widths_by_tensor(parser: argparse.ArgumentParser) -> None:
    """Instead: a width for each."""
    parser.add_argument(
        "--target_bpw",
        "--target-bpw",
        type=float,
        help="instead of --bits: bits a weight over the whole model, scales and all; widths by tensor",
    )
    parser.add_argument(
        "--text",
        help="data file for --target_bpw, as `dataset` takes it: a tensor's error counts by its gradients there",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    """What it costs."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what packing costs: errors by block, the loss on a text; pack_check.json keeps it",
    )
    parser.add_argument(
        "--check_text",
        "--check-text",
        help="data file for --check, as `dataset` takes it; default: the quickstart's held-out text",
    )
    parser.add_argument(
        "--check_bits",
        "--check-bits",
        help="bits of nested codes that --check reads: 4, 4.5/8, 5,28x4,6/8 (as `quantization` takes them)",
    )


def _wanted(arguments: Any) -> "Wanted | None":
    """The format that `ssdtune pack` was asked for; None where nothing was said. Raises SSDTuneError."""
    from ssdtune.packing.wanted import Wanted

    fixed = arguments.bits or arguments.order or arguments.rotate
    if arguments.target_bpw is not None and fixed:
        raise SSDTuneError(
            "--target_bpw chooses widths itself, of plain groups.\n"
            "Leave out --bits, --order and --rotate, or --target_bpw."
        )
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("format", "bits", "group")
        if getattr(arguments, name) is not None
    }
    if arguments.rotate:
        given["is_rotated"] = True
    if arguments.order is not None:
        try:
            given["order"] = tuple(int(width) for width in arguments.order.split(","))
        except ValueError:
            raise SSDTuneError(
                f"--order {arguments.order}: whole numbers with commas between.\nWrite for instance --order 4,1,1,2."
            ) from None
    return Wanted(**given) if given else None
