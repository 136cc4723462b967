"""The recipe of a run: typed dataclasses, read from YAML and from flags, and checked before anything starts.

jsonargparse reads, converts and documents (`--help`, `--print_config`). The sections are declared beside the code that
they configure. This file puts them together and adds what jsonargparse does not do: allowed ranges, checks between
settings, and the nearest name to a misspelled key.
"""

import dataclasses
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

from dino_fast import config_checks
from dino_fast.durations import Duration, parse
from dino_fast.evaluate.online_knn import KnnRecipe
from dino_fast.model.backbones import BACKBONES, BackboneName
from dino_fast.model.head import HeadRecipe
from dino_fast.other_names import advise_on_name
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe
from pipelines.photometric import PerChannel, PhotometricRecipe
from shards.errors import UserError


class UsageError(UserError):
    """A wrong call: an unknown setting, or a value out of range."""


@dataclass(frozen=True)
class CheckpointRecipe:
    """When checkpoints are written, and which are kept."""

    every: Duration = 1
    """time between two checkpoints"""
    keep: Annotated[int, Ge(1)] = 2
    """number of newest checkpoints that are kept"""
    keep_every: Duration = 0
    """time between two checkpoints that are kept for good; 0: none"""


@dataclass(frozen=True)
class HealthRecipe:
    """What a run does when its gradients or weights are not finite any more."""

    max_skipped: Annotated[int, Ge(1)] = 50
    """steps in a row that may be skipped, because their gradients are not finite, before the run goes back to its last
    checkpoint"""
    rollbacks: Annotated[int, Ge(0)] = 3
    """number of times that the run may go back, each time with half the learning rate, before it stops"""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    output: str = "runs/default"
    """folder for checkpoints, metrics and TensorBoard; the same command again resumes there"""
    seed: Annotated[int, Ge(0), Le(2**48)] = 0
    """seed of the first weights, the order, the crops and the color jitter"""
    epochs: Duration = 100
    """length of the run and its schedules. In all settings of time a bare number counts epochs; lengths such as "5000
    steps" or "2M images" are possible, too"""
    max_steps: Annotated[int, Ge(0)] = 0
    """step after which the run stops, although the schedules go on; 0: at their end"""
    batch_size: Annotated[int, Ge(1)] = 512
    """images a step, over all ranks together"""
    accumulate: Annotated[int, Ge(1)] = 1
    """number of parts in which each rank's share of a batch goes through the networks, for small GPUs. Batch norms see
    a part at a time; loss, center and gradients are those of the whole batch"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """precision of the forward and backward passes; weights and updates are fp32. fp16, with loss scaling, is the
    published one. bf16 needs no scaling, but its gradients are three times as far from fp32's. CPUs emulate fp16: there
    fp32 is faster"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of the run; auto: the GPU where there is one"""
    backbone: BackboneName = "resnet50"
    """network that is trained: a ResNet from torchvision, a vision transformer as published, or timm/NAME: any model of
    timm that takes the sizes of the crops, without dropout and drop path"""
    drop_path: Annotated[float, Ge(0), Le(0.9)] = 0.1
    """probability with which the last block of a student's vision transformer leaves out a branch for a crop; it rises
    evenly from 0 in the first block. ResNets and timm's models are trained without drop path"""
    activation_checkpointing: bool = False
    """whether the backward pass computes each block of the student's vision transformer again, of which only the input
    is kept. That takes about a quarter more time and a fraction of the memory; `dino-fast plan` tells how much"""
    compile: Literal["auto", "always", "never"] = "auto"
    """whether torch.compile makes the backbones faster, which takes minutes at the start; auto: on GPUs where steps are
    not recorded. Where they are recorded, batch norms are our own kernels, which are faster and need no compiler"""
    graph: Literal["auto", "always", "never"] = "auto"
    """whether the step is recorded as a CUDA graph and replayed; auto: wherever it is possible, on one GPU without
    other ranks"""
    log_every: Annotated[int, Ge(1)] = 50
    """steps between two rows of the log"""
    init_from: str = ""
    """weights that a new run starts from: another run's folder or checkpoint, a published .pth file, or a ResNet or
    ViT that another program saved, also as .safetensors; empty: random ones"""
    dump_crops: bool = False
    """whether the first batch's crops, as the networks see them, are written to crops.png in the output folder"""
    wandb: str = ""
    """project at Weights & Biases to log to, which takes the package wandb; empty: none"""
    timeout: Annotated[int, Ge(1)] = 600
    """seconds that ranks wait for each other before they give up"""
    accept_changes: bool = False
    """whether a run is resumed although the recipe or the data differ from the checkpoint's"""
    data: DataRecipe = field(default_factory=DataRecipe)
    crops: CropRecipe = field(default_factory=CropRecipe)
    augment: PhotometricRecipe = field(default_factory=PhotometricRecipe)
    head: HeadRecipe = field(default_factory=HeadRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    health: HealthRecipe = field(default_factory=HealthRecipe)
    knn: KnnRecipe = field(default_factory=KnnRecipe)


SCALE_SEARCH = 25  # steps in a row that fp16 may skip until its loss scale, halved from 65536, fits the gradients
PHASES = ("optim.warmup_epochs", "loss.warmup_teacher_temp_epochs", "optim.freeze_last_layer_epochs")


def read_recipe(arguments: Sequence[str], prog: str = "dino-fast train", also: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a command line such as `--config FILE --crops.locals 6`.

    Flags override files, wherever they stand. Of several files, and of several flags of one name, later ones win.
    `also` are the names of further flags of the command, which a misspelled flag may mean. Raises UsageError with what
    is wrong.
    """
    parser = build_parser(prog)
    try:
        settings = vars(parser.instantiate(parser.parse_args(move_files_first(normalize_flags(arguments)))))
    except (ArgumentError, ImportError) as error:
        raise UsageError(explain_message(str(error), list_settings(Recipe), also)) from error
    recipe = Recipe(**{name: value for name, value in settings.items() if name != "config"})
    check(recipe)
    return recipe


def normalize_flags(arguments: Sequence[str]) -> list[str]:
    """Return flags as jsonargparse knows them: `--print-config` with an underscore, a bare `--dump_crops` with true."""
    switches = {f"--{name}" for name, hint in list_settings(Recipe).items() if hint is bool}
    written = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            argument = name[:2] + name[2:].replace("-", "_") + equals + value
        written.append(argument)
        if argument in switches and following.startswith("--"):
            written.append("true")
    return written


def move_files_first(flags: Sequence[str]) -> list[str]:
    """Return the flags with every `--config FILE` before the others, because jsonargparse lets the later ones win."""
    files: list[str] = []
    others: list[str] = []
    before = ""
    for word in flags:
        is_file = before == "--config" and not word.startswith("--")
        (files if is_file or word.partition("=")[0] == "--config" else others).append(word)
        before = word
    return files + others


def build_parser(prog: str) -> ArgumentParser:
    """Build the command line of a recipe: `--config FILE` and one flag a setting. Later ones win."""
    # Recipes are data: the name of a class in one (class_path: …) must not import it.
    set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["*"])
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, allow_abbrev=False, description="Train a backbone with DINO on shards."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe in YAML; flags override what it says")
    parser.add_class_arguments(Recipe)
    return parser


def list_settings(section: type, prefix: str = "") -> dict[str, Any]:
    """Return every setting below a section by its dotted name, with its annotated type."""
    hints = typing.get_type_hints(section, include_extras=True)
    settings: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            settings |= list_settings(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            settings[prefix + name] = hint
    return settings


def explain_message(message: str, settings: dict[str, Any], also: Sequence[str] = ()) -> str:
    """Return jsonargparse's message as one line, with the nearest name or the allowed values."""
    unknown = (
        re.search(r"unrecognized arguments: --([\w.]+)", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '([\w.]+)' is not accepted", message)
    )
    if unknown:
        name = ".".join(unknown.groups())
        return f"unknown setting {name}: {advise_on_name(name, [*settings, *also])}"
    if stray := re.search(r"unrecognized arguments: (\S+)", message):
        meant = f"--config {stray[1]}" if stray[1].endswith((".yaml", ".yml")) else f"--data.train {stray[1]}"
        return f"{stray[1]} stands alone, and settings are flags. Did you mean {meant}?"
    if message.startswith("Problems parsing config"):
        return f"the file given with --config is not valid YAML: {' '.join(message.split()[3:])}"
    if folder := re.search(r'Parser key "config":.*Path is not a file: \'?([^\']*)', message, re.DOTALL):
        return f"--config {folder[1].strip()}: this is a folder. Give a recipe in YAML, or --data.train for shards"
    if group := re.match(r'Parser key "(\w+)":\s+Unable to load config', message):
        return f"unknown setting {group[1]}: {advise_on_name(group[1], [*settings, *also])}"
    missing = re.search(r'Parser key "config":.*File does not exist: \'?([^\']*)', message, re.DOTALL)
    if missing:
        return f"--config {missing[1].strip()}: no such file"
    # Where pydantic is installed, jsonargparse lets it check ranges, and repeats its words.
    refusal = r'Parser key "([\w.]+)":\s+(?:Expected|Does not validate|\d+ validation).*(?:Got|Given) value: (.*)'
    wrong = re.search(refusal, message, re.DOTALL)
    if wrong and wrong[1] in settings:
        return f"{wrong[1]} = {wrong[2]}: expected {describe_type(settings[wrong[1]])}"
    return " ".join(message.split())


def describe_type(hint: Any) -> str:
    """Return in words what a setting may be: "a whole number, at least 1"."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint == BackboneName:
        return f"one of {', '.join(BACKBONES)}, or timm/NAME"
    if hint == Duration:
        return 'epochs, such as 100, or a length such as "5000 steps" or "2M images"'
    if hint == PerChannel:
        return "three numbers in brackets, such as [0.5, 0.5, 0.5]"
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
    for name, hint in list_settings(Recipe).items():
        value = look_up(recipe, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} = {value}: expected {describe_type(hint)}")
        if typing.get_origin(hint) is Annotated and not all(_within(value, bound) for bound in hint.__metadata__):
            raise UsageError(f"{name} = {value}: expected {describe_type(hint)}")
        if hint == Duration:
            _check_duration(name, value)
    for problem in find_contradictions(recipe):
        raise UsageError(problem)


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
    """Return the value of a dotted name."""
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


def find_contradictions(recipe: Recipe) -> Iterator[str]:
    """Yield one line for each contradiction between settings, with its fix."""
    if not recipe.output:
        yield "output is empty: name a folder for checkpoints and metrics, such as runs/mine"
    yield from config_checks.check_backbone(recipe.backbone)
    yield from config_checks.check_crops(recipe.crops)
    yield from config_checks.check_augmentation(recipe.augment)
    yield from config_checks.check_data(recipe.data)
    yield from config_checks.check_lengths(recipe.epochs, {name: look_up(recipe, name) for name in PHASES})
    yield from config_checks.check_head(recipe.head)
    yield from config_checks.check_temperatures(recipe.loss)
    yield from config_checks.check_rates(recipe.optim, recipe.batch_size)
    if recipe.precision == "fp16" and recipe.health.max_skipped < SCALE_SEARCH:
        yield (
            f"health.max_skipped = {recipe.health.max_skipped}: fp16 may skip up to {SCALE_SEARCH} steps in a row "
            f"while it looks for its loss scale. Give {SCALE_SEARCH} or more."
        )
