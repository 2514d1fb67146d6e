"""Which model, and the type and bits of its weights."""

from dataclasses import dataclass

from ssdtune.settings import Also, OneOf, Text, YesNo, key

_DTYPE_SYNONYMS = (("bf16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16"))

# Bits of the blocks of a nested file of 8: on average, or listed (packing/widths.py).
BITS_BY_BLOCK = r"([2-7]\.\d{1,2}|(?=.*[,x])(\d{1,4}x)?[2-8](,(\d{1,4}x)?[2-8])*)/8"


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class ModelKeys:
    """The model and its number format."""

    model_name_or_path: str = key(
        Text("a folder or a Hugging Face model id", is_path=True),
        "the model: a folder with safetensors, or a hub id",
        aliases=("base_model", "model_name", "model"),
        example="meta-llama/Llama-3.1-8B-Instruct",
    )
    model_revision: str = key(
        Text("a branch, tag or commit"), "which version of a hub model", default="main"
    )
    trust_remote_code: bool = key(
        YesNo(), "run Python code that comes with the model", default=False
    )
    attn_implementation: str = key(
        OneOf(
            ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
        ),
        "which attention kernel; auto: the model's own choice",
        default="auto",
    )
    dtype: str = key(
        OneOf(("auto", "bfloat16", "float32", "float16"), synonyms=_DTYPE_SYNONYMS),
        "type of the weights while they compute; auto: as they are stored",
        default="auto",
        aliases=("torch_dtype",),
    )
    quantization: str = key(
        Also(
            OneOf(
                (
                    "none",
                    *map(str, range(1, 9)),
                    *("6/8", "5/8", "4/8", "3/8", "2/8"),
                    *("nf4", "mxfp4", "nvfp4", "fp4-ue5m3", "fp8", "lossless", "auto"),
                ),
            ),
            Text(
                "bits on average such as 4.5/8, or of each block such as 5,28x4,6/8",
                pattern=BITS_BY_BLOCK,
            ),
        ),
        "bits of the base weights on the drive and in RAM: 1 to 8, or a format; packed once into offload.path where the "
        "files are not (`ssdtune pack`); 4/8: 4 bits read of a file of 8; 4.5/8: so many on average, each block in its own "
        "width, chosen by errors of its weights; 5,28x4,6/8: the widths of the blocks in their order; none: as they are "
        "stored; auto: the most whose reading is predicted to be hidden behind compute, else the fastest of 4 and more",
        default="none",
        example="4",
    )
    bf16: bool = key(YesNo(), "autocast to bfloat16, as Trainer does", default=False)
    fp16: bool = key(
        YesNo(),
        "autocast to float16 with loss scaling, as Trainer does; not with method: zo",
        default=False,
    )
