"""`python -m arbscale train`: a preset through its four stages, with every number within reach."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file

from arbscale import compat, presets, store
from arbscale.autoencoder import TinyEncoder
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset
from arbscale.training import checkpoints, sources, stages
from arbscale.training.loop import Run, process_state
from arbscale.training.runlog import read_summary

PROG = "python -m arbscale train"
CONFIG = "config.json"
FOLDER = Path("runs/OUTPUT")  # the run folder, unless named, takes the name of the output
AFHQ = "CC BY-NC 4.0, as the pictures of AFHQ are: for non-commercial use alone"
LICENCES = {"scenes": "MIT; trained on procedural pictures of this package", "afhq_cats": AFHQ}


@dataclass(frozen=True)
class TrainOptions:
    """Train a preset through its four stages, and save it after each; 0 steps skip a stage."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # folder for the weights
    preset: Preset
    run: Annotated[Run, tyro.conf.arg(name="")]
    data: str = "scenes"  # 'scenes', 'photos', a folder, or a name
    steps: tuple[int, int, int, int] = (1000, 2500, 4000, 200)
    """of each stage: autoencoder, decoder, diffusion, alignment"""
    seed: int = 0  # decides everything
    joint: bool = False  # the decoder's stage trains the encoder along
    start: str | None = None  # go on from this model: a name or a folder
    teacher: Path | None = None
    """TAESD's encoder, a safetensors file: a tiny encoder takes its weights, or learns its latents
    in as many steps as the first stage has"""
    max_weight: float | None = None  # clamp of the alignment's image term
    pool: int | None = None  # pictures encoded for the diffusion; all whole ones, or 8192 crops
    parts: tuple[float, float, float] | None = None
    """split a folder in train, val and test: counts, or fractions"""
    subset: int | None = None  # take this many pictures of the training split
    whole: bool = False  # take square pictures of one size whole, not in crops
    larger: str | None = None
    """with --whole: a data set that holds some of the pictures larger, for larger targets"""
    profile: bool = False  # measure loading and training instead; OUTPUT gets profile.txt

    def __post_init__(self) -> None:
        """Refuse what cannot be trained; ValueError says what is wanted."""
        if min(self.steps) < 0:
            raise ValueError(f"steps are at least 0, got {self.steps}")
        if self.pool is not None and self.pool < 2:
            raise ValueError(f"a pool has at least 2 pictures, got {self.pool}")
        if self.larger and not self.whole:
            raise ValueError("larger pictures go with whole ones; add --whole")


def parse(words: list[str]) -> TrainOptions:
    """Read `NAME [options]`; ValueError in one line for what cannot be read."""
    if words[:1] in (["-h"], ["--help"]):
        words = ["tiny", *words]
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"name a preset first: {PROG} NAME; there are {', '.join(presets.PRESETS)}"
        )
    name, *options = words
    parsed = _read(options, presets.get(name))
    if parsed.start:  # its own numbers are what the options change
        manifest = store.read_manifest(store.find(parsed.start))
        parsed = _read(options, Preset.from_dict(manifest["preset"]))
    if parsed.run.folder in (None, FOLDER):
        run = replace(parsed.run, folder=FOLDER.with_name(parsed.output.name))
        return replace(parsed, run=run)
    return parsed


def _read(words: list[str], preset: Preset) -> TrainOptions:
    default = TrainOptions(output=tyro.MISSING, preset=preset, run=Run(folder=FOLDER))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                TrainOptions,
                args=words,
                default=default,
                prog=f"{PROG} NAME",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # after --help
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        end = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
        raise ValueError(f"{' '.join(lines[:end])}; see {PROG} NAME --help") from None


def profile(options: TrainOptions) -> None:
    """Print how fast each stage gets its data and learns; write one step's operations."""
    from arbscale.training.profiling import profile

    torch.manual_seed(options.seed)
    model = _model(options).to(process_state().device)
    lines, tables = [], []
    for name, rates, table in profile(model, _source(options, model.preset), options.run):
        tables.append(f"{name}, one step\n{table}")
        lines.append(
            f"{name:12} loading {rates['loading']:8.1f} /s   training {rates['training']:8.1f} /s"
            f"   waiting for data {rates['waiting']:6.1%} of a step"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "profile.txt"
    path.write_text("\n".join([*lines, "", *tables]) + "\n", encoding="utf-8")
    print("\n".join(lines) + f"\nprofile: {path}")


def train(options: TrainOptions) -> None:
    """Run the stages; the first process of several writes."""
    if options.profile:
        return profile(options)
    state = process_state()
    folder = options.run.folder
    with state.main_process_first():
        if state.is_main_process:
            _claim(folder, options)
            print(f"run folder {folder}; {json.dumps(asdict(options.preset))}")
    torch.manual_seed(options.seed)
    model = _model(options).to(state.device)
    before = dict(model.manifest)
    source = _source(options, model.preset)
    for stage, losses in _stages(model, source, options):
        if not state.is_main_process:
            continue
        recent = losses[-100:]
        seconds = sum(note["seconds"] for note in read_summary(folder).values())
        model.manifest |= {
            "name": model.preset.name,
            "data": options.data,
            "licence": LICENCES.get(options.data, "that of the data it was trained on"),
            "commands": [
                *before.get("commands", []),
                "python -m arbscale " + " ".join(sys.argv[1:]),
            ],
            "minutes": round(seconds / 60 + before.get("minutes", 0), 1),
            "machine": f"{model.device.type} x {state.num_processes}, "
            f"{torch.get_num_threads()} threads, {platform.machine()}",
            "torch": torch.__version__,
            "losses": {
                **model.manifest.get("losses", {}),
                stage: sum(recent) / max(1, len(recent)),
            },
        }
        model.save(options.output, half=True)
        print(f"{stage}: {options.output}, {model.manifest['minutes']} minutes")


def _stages(model: ArbitraryScaleModel, source: sources.Source, options: TrainOptions) -> Any:
    """Train stage by stage; yield each one's name and losses."""
    run, seed = options.run, options.seed
    autoencoder, decoder, diffusion, alignment = options.steps
    if autoencoder and options.teacher:
        encoder, teacher = model.first_stage.encoder, _teacher(options).to(model.device)
        preset = model.preset
        yield (
            "student",
            stages.distil_encoder(encoder, teacher, source, preset, autoencoder, seed, run),
        )
        autoencoder = 0
    if autoencoder or decoder:
        yield (
            "first stage",
            stages.train_first_stage(model, source, autoencoder, decoder, seed, options.joint, run),
        )
    if diffusion:
        losses = stages.train_diffusion(model, source, diffusion, seed, options.pool, run)
        yield "diffusion", losses
    if alignment:
        losses = stages.finetune_alignment(model, source, alignment, seed, options.max_weight, run)
        yield "alignment", losses


def _model(options: TrainOptions) -> ArbitraryScaleModel:
    """Build the model, with the weights that it starts from."""
    model = ArbitraryScaleModel(options.preset)
    encoder = model.first_stage.encoder
    fresh = encoder.state_dict() if options.teacher and options.steps[0] else {}
    if options.start:
        begun = ArbitraryScaleModel.load(options.start)
        model.scale_factor, model.manifest = begun.scale_factor, begun.manifest
        student = {f"first_stage.encoder.{name}": tensor for name, tensor in fresh.items()}
        _fit(model, {**begun.state_dict(), **student}, options.start)
    if options.teacher and not fresh:
        _fit(encoder, _teacher(options).state_dict(), options.teacher)
    return model


def _fit(module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise ValueError(
            f"the weights of {origin} do not fit the preset; change only numbers of the training, "
            "not of the network"
        ) from None


def _teacher(options: TrainOptions) -> TinyEncoder:
    if options.preset.encoder != "tiny":
        raise ValueError(f"only a tiny encoder has a teacher; {options.preset.name} has none")
    return compat.tiny_encoder(load_file(options.teacher))


def _source(options: TrainOptions, preset: Preset) -> sources.Source:
    if options.data == "scenes":
        return sources.scene_source(seed=options.seed)
    from arbscale.data import open_dataset

    more: dict[str, Any] = {}
    if options.parts:
        more["parts"] = tuple(int(p) if p >= 1 else p for p in options.parts)
    if options.subset:
        more["subset"] = options.subset
    images = open_dataset(options.data, "train", **more)
    if not options.whole:
        return sources.photo_source(images, preset)
    larger = open_dataset(options.larger, "train") if options.larger else None
    return sources.whole_source(images, larger)


def _claim(folder: Path, options: TrainOptions) -> None:
    """Write the configuration, or see that a resumed run has the one it was begun with."""
    path = folder / CONFIG
    now = json.loads(json.dumps(asdict(options), default=str))
    begun = any((folder / "checkpoints").glob("*/step-*"))
    if begun and not options.run.resume:
        raise ValueError(
            f"{folder} already holds a run; add --resume to go on with it, or name another by "
            "--folder"
        )
    if begun and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["options"]
        kept = (
            "data",
            "seed",
            "joint",
            "start",
            "teacher",
            "pool",
            "parts",
            "subset",
            "whole",
            "larger",
        )
        changed = [k for k in kept if before.get(k) != now[k]]
        if changed:
            listed = ", ".join(f"{k} was {before.get(k)} and is {now[k]}" for k in changed)
            raise ValueError(f"{folder} was begun with other options: {listed}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "command": "python -m arbscale " + " ".join(sys.argv[1:]),
        "options": now,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    checkpoints.write_text(path, json.dumps(config, indent=2) + "\n")
