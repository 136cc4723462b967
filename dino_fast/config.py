"""The recipe of a run: typed dataclasses, read from YAML and dotted command-line overrides, checked before anything
starts.

jsonargparse reads, converts and documents (`--help`, `--print_config`); the sections are declared beside the code that
they steer. This file puts them together and adds what jsonargparse leaves out: the allowed ranges, the checks between
settings, and the nearest name to a misspelt key.
"""

import dataclasses
import difflib
import itertools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from jsonargparse import (  # type: ignore[attr-defined]  # it exports by a list that mypy does not follow
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from dino_fast.durations import Duration, parse
from dino_fast.evaluate.online import KnnRecipe
from dino_fast.model.head import HeadRecipe
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe
from pipelines.photometric import PhotometricRecipe
from shards.errors import UserError


class UsageError(UserError):
    """A wrong call: an unknown setting, or a value out of range."""


@dataclass(frozen=True)
class CheckpointRecipe:
    """When checkpoints are written and which are kept."""

    every: Duration = 1
    """how often one is written"""
    keep: Annotated[int, Ge(1)] = 2
    """how many of the newest are kept"""
    keep_every: Duration = 0
    """how often one is kept for good; 0: none"""


@dataclass(frozen=True)
class HealthRecipe:
    """What is done about a run whose figures are no numbers any more."""

    max_skipped: Annotated[int, Ge(1)] = 50
    """steps in a row that may be skipped, their gradients not being finite, before the run goes back to its last
    checkpoint"""
    rollbacks: Annotated[int, Ge(0)] = 3
    """how often it may go back, each time on with half the learning rate; then it stops"""


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made of."""

    output: str = "runs/default"
    """folder for checkpoints, metrics and TensorBoard; the same command again resumes there"""
    seed: Annotated[int, Ge(0), Le(2**48)] = 0
    """of the first weights, the order, the crops and the colours"""
    epochs: Duration = 100
    """length of the run and its schedules. Here as in the other settings of time a number counts epochs, and lengths
    such as "5000 steps" or "2M images" are understood, too"""
    max_steps: Annotated[int, Ge(0)] = 0
    """stop after this step although the schedules go on; 0: run to their end"""
    batch_size: Annotated[int, Ge(1)] = 512
    """images a step over all ranks together"""
    accumulate: Annotated[int, Ge(1)] = 1
    """parts that each rank's share of a batch goes through the networks in, one after another: for a small GPU. Batch
    norms see a part at a time; loss, centre and gradients are those of the whole batch"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """of the forward and backward passes; weights and updates are fp32. fp16, with loss scaling, is the published one;
    bf16 needs none, and its gradients are three times as far from fp32's. On a CPU fp16 is emulated: take fp32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """network that is trained, from torchvision"""
    compile: Literal["auto", "always", "never"] = "auto"
    """whether torch.compile makes the backbones faster, which takes minutes at the start; auto: on GPUs where steps are
    not recorded. Where they are, batch norms are kernels of our own, which are faster and need no compiler"""
    graph: Literal["auto", "always", "never"] = "auto"
    """whether the step is recorded as a CUDA graph and replayed, which takes one GPU and no other ranks; auto: there"""
    log_every: Annotated[int, Ge(1)] = 50
    """steps between entries in the metrics"""
    init_from: str = ""
    """weights that a new run begins with: another run's folder or checkpoint, or a published .pth file"""
    dump_crops: bool = False
    """write the first batch's crops, as the networks see them, to crops.png in the output folder"""
    wandb: str = ""
    """project at Weights & Biases to log to, which takes the package wandb; empty: none"""
    timeout: Annotated[int, Ge(1)] = 600
    """seconds that ranks wait for each other before they give up"""
    accept_changes: bool = False
    """resume although the recipe or the data differ from the checkpoint's"""
    data: DataRecipe = field(default_factory=DataRecipe)
    crops: CropRecipe = field(default_factory=CropRecipe)
    augment: PhotometricRecipe = field(default_factory=PhotometricRecipe)
    head: HeadRecipe = field(default_factory=HeadRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    health: HealthRecipe = field(default_factory=HealthRecipe)
    knn: KnnRecipe = field(default_factory=KnnRecipe)


SEARCH = 25  # steps in a row that fp16 may skip before its loss scale, halved each time from 65536, fits the gradients
PARTS_OF_THE_RUN = ("optim.warmup_epochs", "loss.warmup_teacher_temp_epochs", "optim.freeze_last_layer_epochs")

# Settings that may differ between the sittings of one run: they change where and how it runs, not what comes out.
FREE_TO_CHANGE = (
    "output", "max_steps", "device", "compile", "graph", "log_every", "init_from", "dump_crops", "wandb", "timeout",
    "accept_changes", "checkpoint", "health", "knn",
    "data.train", "data.threads", "data.prefetch", "data.max_bad_samples", "data.timeout", "data.hw_decoder_load",
    "data.size_hint", "data.cache", "data.cache_bytes",
)  # fmt: skip


def read_recipe(arguments: Sequence[str], prog: str = "dino-fast train", also: Sequence[str] = ()) -> Recipe:
    """The recipe of a command line such as `--config FILE --crops.locals 6`. UsageError names what is wrong; `also` are
    the names of flags that the command has besides, which may be meant."""
    parser = build_parser(prog)
    try:
        settings = vars(parser.instantiate(parser.parse_args(spelled_out(arguments))))
    except (ArgumentError, ImportError) as error:
        raise UsageError(explain(str(error), settings_of(Recipe), also)) from error
    recipe = Recipe(**{name: value for name, value in settings.items() if name != "config"})
    check(recipe)
    return recipe


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Flags as jsonargparse knows them: `--print-config=x-y` is `--print_config=x-y`, a bare `--dump_crops` is true."""
    switches = {f"--{name}" for name, hint in settings_of(Recipe).items() if hint is bool}
    written = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = name[:2] + name[2:].replace("-", "_") + equals + value
        written.append(argument)
        if argument in switches and following.startswith("--"):
            written.append("true")
    return written


def build_parser(prog: str) -> ArgumentParser:
    """The command line of a recipe: `--config FILE` and one flag a setting, later ones winning."""
    # Recipes are data: a name of a class in one (class_path: …) must not have it imported.
    set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["*"])
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, allow_abbrev=False, description="Train a backbone with DINO on shards."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe in YAML; flags override what it says")
    parser.add_class_arguments(Recipe)
    return parser


def settings_of(section: type, prefix: str = "") -> dict[str, Any]:
    """Every setting below a section by its dotted name, with its annotated type."""
    hints = typing.get_type_hints(section, include_extras=True)
    settings: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            settings |= settings_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            settings[prefix + name] = hint
    return settings


def explain(message: str, settings: dict[str, Any], also: Sequence[str] = ()) -> str:
    """jsonargparse's message as one line, with the nearest name or the allowed values."""
    unknown = (
        re.search(r"unrecognized arguments: --([\w.]+)", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '([\w.]+)' is not accepted", message)
    )
    if unknown:
        name = ".".join(unknown.groups())
        # By their last parts, too: --lr is optim.lr to many.
        meant = {full.rpartition(".")[2]: full for full in reversed(settings)} | {full: full for full in settings}
        meant |= {flag: flag for flag in also}
        near = difflib.get_close_matches(name, meant, n=1, cutoff=0.4)
        hint = f"did you mean {meant[near[0]]}?" if near else "`--help` lists them all"
        return f"unknown setting {name}: {hint}"
    if message.startswith("Problems parsing config"):
        return f"the file given with --config is not valid YAML: {' '.join(message.split()[3:])}"
    missing = re.search(r'Parser key "config":.*File does not exist: \'?([^\']*)', message, re.DOTALL)
    if missing:
        return f"--config {missing[1].strip()}: no such file"
    # Where pydantic is installed, jsonargparse lets it check ranges, and speaks in its words.
    wrong = re.search(r'Parser key "([\w.]+)":\s+(?:Expected|\d+ validation).*Got value: (.*)', message, re.DOTALL)
    if wrong and wrong[1] in settings:
        return f"{wrong[1]} = {wrong[2]}: expected {allowed(settings[wrong[1]])}"
    return " ".join(message.split())


def allowed(hint: Any) -> str:
    """What a setting may be, in words: "a whole number, at least 1"."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint == Duration:
        return 'epochs, such as 100, or a length such as "5000 steps" or "2M images"'
    base, *bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = [words.get(base, "two numbers in brackets, such as [0.1, 1]")]
    for bound in bounds:
        parts += [f"at least {bound.ge}"] if isinstance(bound, Ge) else []
        parts += [f"above {bound.gt}"] if isinstance(bound, Gt) else []
        parts += [f"at most {bound.le}"] if isinstance(bound, Le) else []
    return ", ".join(parts)


def check(recipe: Recipe) -> None:
    """Raise UsageError for a setting out of its range, or settings that cannot go together."""
    for name, hint in settings_of(Recipe).items():
        value = look_up(recipe, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} = {value}: expected {allowed(hint)}")
        if typing.get_origin(hint) is Annotated and not all(_within(value, bound) for bound in hint.__metadata__):
            raise UsageError(f"{name} = {value}: expected {allowed(hint)}")
        if hint == Duration:
            _check_duration(name, value)
    for broken in contradictions(recipe):
        raise UsageError(broken)


def _check_duration(name: str, value: Duration) -> None:
    try:
        parse(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def _within(value: float, bound: Ge | Gt | Le) -> bool:
    if isinstance(bound, Ge):
        return value >= bound.ge  # type: ignore[operator]
    return value > bound.gt if isinstance(bound, Gt) else value <= bound.le  # type: ignore[operator]


def look_up(recipe: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """One line for each thing that cannot be, with the mend."""
    for name in ("crops.global_scale", "crops.local_scale"):
        low, high = look_up(recipe, name)
        if not 0 < low <= high <= 1:
            yield f"{name} = [{low}, {high}]: expected two shares of the area, 0 < least <= most <= 1"
    low, high = recipe.augment.blur_sigma
    if not 0 < low <= high <= 2.3:
        yield f"augment.blur_sigma = [{low}, {high}]: expected pixels, 0 < least <= most <= 2.3 (15 taps)"
    for name in ("teacher_temp", "warmup_teacher_temp"):
        if getattr(recipe.loss, name) >= recipe.loss.student_temp:
            yield (
                f"loss.{name} = {getattr(recipe.loss, name)} is not below loss.student_temp = "
                f"{recipe.loss.student_temp}: the teacher must be the sharper one; the published value is 0.04"
            )
    if recipe.data.decode == "torch" and recipe.data.decode_device == "gpu":
        yield "data.decode_device = gpu goes with data.decode = dali only (or auto): torch decodes on the CPU"
    whole = parse(recipe.epochs)
    if not whole.number:
        yield f"epochs = {recipe.epochs}: a run of no length; give it one"
    for name in PARTS_OF_THE_RUN:
        part = parse(look_up(recipe, name))  # in another unit only the data tell: see Schedules
        if part.unit == whole.unit and part.number > whole.number:
            yield f"{name} = {look_up(recipe, name)} is more than epochs = {recipe.epochs}: lower it"

    if recipe.precision == "fp16" and recipe.health.max_skipped < SEARCH:
        yield (
            f"health.max_skipped = {recipe.health.max_skipped}: fp16 may skip up to {SEARCH} steps in a row while it "
            f"looks for its loss scale; give {SEARCH} or more"
        )
    if not recipe.output:
        yield "output is empty: name a folder for checkpoints and metrics, such as runs/mine"
    if recipe.crops.locals and recipe.crops.local_size > recipe.crops.global_size:
        yield (
            f"crops.local_size = {recipe.crops.local_size} is larger than crops.global_size = "
            f"{recipe.crops.global_size}: local views are the small ones; swap the two, or lower it"
        )
    if -1 < recipe.data.hw_decoder_load < 0:
        yield f"data.hw_decoder_load = {recipe.data.hw_decoder_load}: expected a share from 0 to 1, or -1 for automatic"
    if recipe.head.batch_norm and recipe.head.layers == 1:
        yield "head.batch_norm = True does nothing with head.layers = 1: it follows hidden layers; give it 2 or more"
    loss, optim = recipe.loss, recipe.optim
    # A lower temperature alone, the remedy for a collapse, must stay one flag: only one that rises is held to this.
    if loss.warmup_teacher_temp < loss.teacher_temp and not parse(loss.warmup_teacher_temp_epochs).number:
        yield (
            f"loss.warmup_teacher_temp = {loss.warmup_teacher_temp} is never used: give "
            f"loss.warmup_teacher_temp_epochs, or set it to loss.teacher_temp = {loss.teacher_temp}"
        )
    peak = optim.lr * recipe.batch_size / 256
    if optim.lr and optim.min_lr > peak:
        yield (
            f"optim.min_lr = {optim.min_lr} is above the peak learning rate of {peak:.4g} (optim.lr * batch_size / "
            "256): lower it"
        )
    if optim.ema_momentum == 1:
        yield "optim.ema_momentum = 1.0: the teacher would stay as it began; the published value is 0.996"


def with_defaults(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain data, with the settings that did not exist yet when it was written."""
    return {
        name: with_defaults(old[name], value) if isinstance(value, dict) and name in old else old.get(name, value)
        for name, value in (old | defaults).items()
    }


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`name: old -> new` for the settings that differ between two recipes (as `dataclasses.asdict`) and that a resumed
    run must not change."""
    for name in sorted(old.keys() | new.keys()):
        if prefix + name in FREE_TO_CHANGE:
            continue
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}: {was} -> {now}"
