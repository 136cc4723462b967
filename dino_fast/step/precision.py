"""The number formats of a step, and how a GPU computes with them."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_math(precision: Precision, device: torch.device) -> None:
    """Choose the fastest arithmetic that a precision allows on a device.

    cuDNN tries its convolution algorithms once, since sizes never change. In bf16 and fp16 runs, what stays float32 is
    multiplied as TF32, which has the mantissa of float16. Sums of float16 products stay in float32 throughout: over
    65536 prototypes they are long.
    """
    torch.backends.cudnn.benchmark = True
    if precision == "fp32" or device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
