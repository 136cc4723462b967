"""Every figure that a run logs, with its unit and its meaning: the keys of metrics.jsonl and of the log writers.

The documentation's list of metrics is made from this table, and a test compares it with the rows of a run.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """A figure of the log."""

    unit: str
    """unit, empty for a count or a pure number"""
    meaning: str
    """what it says, as a phrase"""


# Of the steps since the last row. Means over steps and ranks leave skipped steps out; None if all were skipped.
OF_STEPS = {
    "step": Metric("", "last of these steps, from 0"),
    "epoch": Metric("", "epoch of that step, from 0"),
    "loss": Metric("nats", "mean DINO loss"),
    "teacher_entropy": Metric("nats", "mean entropy of the teacher's targets"),
    "grad_norm": Metric("", "norm of all gradients together, before clipping"),
    "grad_norm_first_layer": Metric("", "norm of the gradient of the backbone's first weights"),
    "grad_norm_last_layer": Metric("", "norm of the gradient of the prototypes"),
    "grad_norm_head": Metric("", "norm of the gradient of the whole head"),
    "skipped": Metric("steps", "steps whose gradients were not finite, so that the student stayed as it was"),
    "skipped_total": Metric("steps", "skipped steps since this process started"),
    "skipped_in_a_row": Metric("steps", "skipped steps up to and with this one, 0 if it was not skipped"),
    "lr": Metric("", "learning rate of this step"),
    "weight_decay": Metric("", "weight decay of this step"),
    "ema_momentum": Metric("", "momentum of the EMA teacher in this step"),
    "teacher_temp": Metric("", "temperature of the teacher's softmax in this step"),
    "images_per_s": Metric("images/s", "images (not crops) of all ranks together"),
    "images_per_s_per_gpu": Metric("images/s", "images of one rank"),
    "step_ms": Metric("ms", "time of a step by the clock"),
    "data_ms": Metric("ms", "part of a step's time in which it waited for data"),
    "stall": Metric("0 to 1", "share of the time in which the step waited for data"),
    "mfu": Metric("0 to 1", "model FLOP/s as a share of the GPU's data sheet; None where that is not known"),
    "memory_mb": Metric("10⁶ bytes", "peak so far of a rank's tensors on the GPU, or of the process without a GPU"),
    "read_mb_per_s": Metric("10⁶ bytes/s", "compressed images that all ranks read"),
    "requests_ready": Metric("", "batches read ahead, when the decoder asked for the next one, on average"),
    "batches_ready": Metric("", "batches made ahead, when the step asked for the next one, on average"),
    "bad_samples": Metric("samples", "unreadable samples that all ranks replaced so far"),
    "seconds": Metric("s", "time of these steps by the first rank's clock, without pauses"),
    "paused_s": Metric("s", "time of the pauses, in which a checkpoint was copied or a score taken"),
    "time": Metric("s", "Unix time of the row"),
}
# A look at the teacher through at most 128 images, and at the step's parts, at each row.
OF_A_LOOK = {
    "forward_ms": Metric("ms", "forward passes of a step on the device; absent from recorded steps"),
    "backward_ms": Metric("ms", "backward pass of a step on the device; absent from recorded steps"),
    "update_ms": Metric("ms", "clipping, optimizer and EMA of a step on the device; absent from recorded steps"),
    "loss_scale": Metric("", "factor on the loss, in fp16 only"),
    "target_kl": Metric("nats", "divergence of the mean target from the uniform one; 0 if all prototypes are used"),
    "target_entropy": Metric("nats", "mean entropy of the targets"),
    "feature_rank": Metric("1 to 128", "RankMe of the backbone's features"),
    "feature_std": Metric("0 to 1", "spread of the features at length 1, times √D: 0 if all are the same"),
    "center_norm": Metric("", "length of the center"),
}
# Rows of their own, with `step` and `time`.
OF_A_SCORE = {
    "knn_top1": Metric("%", "k-NN top-1 of the teacher's backbone"),
    "knn_s": Metric("s", "time that the score took"),
}
METRICS = {**OF_STEPS, **OF_A_LOOK, **OF_A_SCORE}
