"""What other programs call our settings, and which of ours a misspelled one may mean."""

import difflib
from collections.abc import Iterable

# main_dino.py's arguments, then what people write from habit. Names that ours contain, such as lr, are not needed here.
_SETTINGS = {
    "arch": "backbone", "patch_size": "backbone", "momentum_teacher": "optim.ema_momentum",
    "use_bn_in_head": "head.batch_norm", "use_fp16": "precision", "batch_size_per_gpu": "batch_size",
    "freeze_last_layer": "optim.freeze_last_layer_epochs", "optimizer": "optim.name", "drop_path_rate": "drop_path",
    "global_crops_scale": "crops.global_scale", "local_crops_number": "crops.locals",
    "local_crops_scale": "crops.local_scale", "data_path": "data.train", "output_dir": "output",
    "saveckp_freq": "checkpoint.keep_every", "num_workers": "data.threads",
    "amp": "precision", "batch": "batch_size", "crop_size": "crops.global_size", "data": "data.train",
    "data_dir": "data.train", "dataset": "data.train", "image_size": "crops.global_size",
    "img_size": "crops.global_size", "learning_rate": "optim.lr", "log_interval": "log_every",
    "max_epochs": "epochs", "model": "backbone", "num_epochs": "epochs", "outdir": "output",
    "pretrained": "init_from", "save_dir": "output", "wandb_project": "wandb", "wd": "optim.weight_decay",
    "workers": "data.threads",
}  # fmt: skip
_ADVICE = {
    "resume": "there is none. The same command again resumes",
    "dist_url": "there is none. torchrun tells the ranks where they meet",
} | dict.fromkeys(
    ("gpus", "num_gpus", "devices"), "there is none. torchrun --nproc_per_node N -m dino_fast.train uses N GPUs"
)
_CUTOFF = 0.65  # from 0 to 1; a poorer match suggests nothing


def advise_on_name(name: str, settings: Iterable[str]) -> str:
    """Return what to do about a setting that does not exist: the one that is meant, or where to look."""
    settings = list(settings)
    if first := next((full for full in settings if full.startswith(f"{name}.")), ""):
        return f"it is a group. Did you mean {_SETTINGS.get(name, first)}? --help-all lists all settings"
    plain = name.lower().replace("-", "_")
    if plain in _ADVICE:
        return _ADVICE[plain]
    if plain in _SETTINGS:
        return f"did you mean {_SETTINGS[plain]}?"
    # Names are compared by their last parts, too: many write --lr for optim.lr.
    meant = {full.rpartition(".")[2]: full for full in reversed(settings)} | {full: full for full in settings}
    near = difflib.get_close_matches(plain, meant, n=1, cutoff=_CUTOFF)
    return f"did you mean {meant[near[0]]}?" if near else "--help-all lists all settings"
