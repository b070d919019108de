"""`python -m arbscale train`: a preset through its four stages, with every number within reach."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import load_file

from arbscale import compat, presets, store
from arbscale.autoencoder import TinyEncoder
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset
from arbscale.samplers import Sampling
from arbscale.training import checkpoints, denoiser, first_stage, sources
from arbscale.training.loop import Run
from arbscale.training.processes import process_state
from arbscale.training.runlog import read_summary

PROG = "python -m arbscale train"
CONFIG = "config.json"
FOLDER = Path("runs/OUTPUT")  # the run folder, unless named, takes the name of the output
AFHQ = "CC BY-NC 4.0, as the images of AFHQ are: for non-commercial use alone"
LICENCES = {
    "scenes": "MIT; trained on procedural images of this package",
    "afhq_cats": AFHQ,
    "afhq_cats256": AFHQ,
}
KEPT = "data seed joint start teacher pool parts subset whole larger".split()  # when resumed


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
    joint: bool = False  # the decoder's stage trains the encoder, too
    start: str | None = None  # start from this model's weights: a name or a folder
    teacher: Path | None = None
    """TAESD's encoder, a safetensors file: a tiny encoder takes its weights, or learns its latents
    in as many steps as the first stage has"""
    max_weight: float | None = None  # clamp of the alignment's image term
    pool: int | None = None  # images encoded for the diffusion; all whole ones, or 8192 crops
    parts: tuple[float, float, float] | None = None
    """split a folder in train, val and test: counts, or fractions"""
    subset: int | None = None  # take this many images of the training split
    whole: bool = False  # take square images of one size whole, not in crops
    larger: str | None = None
    """with --whole: a data set that holds some of the images larger, for larger targets"""
    profile: bool = False  # measure loading and training instead; OUTPUT gets profile.txt

    def __post_init__(self) -> None:
        """Refuse numbers out of range by ValueError."""
        Sampling(seed=self.seed)  # refuses a seed that no generator takes
        if min(self.steps) < 0:
            raise ValueError(f"steps are at least 0, got {self.steps}")
        if self.pool is not None and self.pool < 2:
            raise ValueError(f"a pool has at least 2 images, got {self.pool}")
        if self.larger and not self.whole:
            raise ValueError("--larger goes with whole images; add --whole")


def parse(words: list[str]) -> TrainOptions:
    """Read `PRESET [options]`; for what cannot be read, print why and exit with status 2.

    The preset, or the model to start from, gives the defaults. ValueError for unknown names.
    """
    if words[:1] in (["-h"], ["--help"]):
        words = ["tiny", *words]
    if not words or words[0].startswith("-"):
        raise ValueError(f"name a preset first: {', '.join(presets.PRESETS)}")
    name, *options = words
    parsed = _read(options, presets.get(name))
    if parsed.start:
        manifest = store.read_manifest(store.find(parsed.start))
        parsed = _read(options, Preset.from_dict(manifest["preset"]))
    if parsed.run.folder in (None, FOLDER):
        run = replace(parsed.run, folder=FOLDER.with_name(parsed.output.name))
        return replace(parsed, run=run)
    return parsed


def _read(words: list[str], preset: Preset) -> TrainOptions:
    default = TrainOptions(output=tyro.MISSING, preset=preset, run=Run(folder=FOLDER))
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(TrainOptions, args=words, default=default, prog=f"{PROG} PRESET", config=config)


def train(options: TrainOptions) -> None:
    """Run the stages; the first process of several writes."""
    if options.profile:
        return _profile(options)
    state, folder = process_state(), options.run.folder
    with state.main_process_first():
        if state.is_main_process:
            _claim(folder, options)
            print(f"run folder {folder}; {json.dumps(asdict(options.preset))}")
    torch.manual_seed(options.seed)
    model = _model(options).to(state.device)
    before, source = dict(model.manifest), _source(options)
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    for stage, losses in _stages(model, source, options):
        if not state.is_main_process:
            continue
        seconds = sum(note["seconds"] for note in read_summary(folder).values())
        loss = sum(losses[-100:]) / max(1, len(losses[-100:]))
        model.manifest |= {
            "name": model.preset.name,
            "data": options.data,
            "licence": LICENCES.get(options.data, "that of the data it was trained on"),
            "commands": [*before.get("commands", []), _command()],
            "minutes": round(seconds / 60 + before.get("minutes", 0), 1),
            "machine": f"{model.device.type} x {state.num_processes}, {threads}",
            "torch": torch.__version__,
            "losses": {**model.manifest.get("losses", {}), stage: loss},
        }
        model.save(options.output, half=True)
        print(f"{stage}: {options.output}, {model.manifest['minutes']} minutes")


def _stages(
    model: ArbitraryScaleModel, source: sources.Source, options: TrainOptions
) -> Iterator[tuple[str, list[float]]]:
    """Train stage by stage; yield each one's name and losses."""
    common = {"seed": options.seed, "run": options.run}
    autoencoder, decoder, diffusion, alignment = options.steps
    if autoencoder and options.teacher:
        encoder, teacher = model.first_stage.encoder, _teacher(options).to(model.device)
        pair = (encoder, teacher, source, model.preset)
        yield "student", first_stage.distil_encoder(*pair, autoencoder, **common)
        autoencoder = 0
    if autoencoder or decoder:
        steps, joint = (autoencoder, decoder), options.joint
        losses = first_stage.train_first_stage(model, source, *steps, joint=joint, **common)
        yield "first stage", losses
    if diffusion:
        losses = denoiser.train_diffusion(model, source, diffusion, pool=options.pool, **common)
        yield "diffusion", losses
    if alignment:
        clamp = options.max_weight
        losses = denoiser.finetune_alignment(model, source, alignment, max_weight=clamp, **common)
        yield "alignment", losses


def _model(options: TrainOptions) -> ArbitraryScaleModel:
    """Build the model, with the weights that it starts from."""
    model = ArbitraryScaleModel(options.preset)
    encoder = model.first_stage.encoder
    learns = options.teacher and options.steps[0]
    if options.start:
        begun = ArbitraryScaleModel.load(options.start)
        model.scale_factor, model.manifest = begun.scale_factor, begun.manifest
        student = encoder.state_dict(prefix="first_stage.encoder.") if learns else {}
        _fit(model, {**begun.state_dict(), **student}, options.start)
    if options.teacher and not learns:
        _fit(encoder, _teacher(options).state_dict(), options.teacher)
    return model


def _fit(module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise ValueError(
            f"the weights of {origin} do not fit the preset; change no number of the network"
        ) from None


def _teacher(options: TrainOptions) -> TinyEncoder:
    if options.preset.encoder != "tiny":
        raise ValueError(f"only a tiny encoder has a teacher; {options.preset.name} has none")
    with store.reading(options.teacher):
        return compat.tiny_encoder(load_file(options.teacher))


def _source(options: TrainOptions) -> sources.Source:
    if options.data == "scenes":
        return sources.scene_source(seed=options.seed)
    from arbscale.data import open_dataset

    more = {"subset": options.subset} if options.subset else {}
    if options.parts:
        more["parts"] = tuple(int(p) if p >= 1 else p for p in options.parts)
    images = open_dataset(options.data, "train", **more)
    if not options.whole:
        return sources.photo_source(images, options.preset)
    larger = open_dataset(options.larger, "train") if options.larger else None
    return sources.whole_source(images, larger)


def _claim(folder: Path, options: TrainOptions) -> None:
    """Write the configuration, or see that a resumed run has the one it was begun with."""
    path = folder / CONFIG
    now = json.loads(json.dumps(asdict(options), default=str))
    if any((folder / "checkpoints").glob("*/step-*")):
        if not options.run.resume:
            raise ValueError(
                f"{folder} already holds a run; add --resume, or name another --folder"
            )
        if path.is_file():
            with store.reading(path):
                before = json.loads(path.read_text(encoding="utf-8"))["options"]
                before, kept = ({k: x.get(k) for k in KEPT} for x in (before, now))
            checkpoints.compare(folder, before, kept)
    config = {"command": _command(), "options": now, "python": platform.python_version()}
    store.write_text(path, json.dumps({**config, "torch": torch.__version__}, indent=2) + "\n")


def _command() -> str:
    return "python -m arbscale " + " ".join(sys.argv[1:])


def _profile(options: TrainOptions) -> None:
    """Print how fast each stage gets its data and learns; write one step's operations."""
    from arbscale.training.profiling import profile

    torch.manual_seed(options.seed)
    model = _model(options).to(process_state().device)
    lines, tables = zip(*profile(model, _source(options), options.run), strict=True)
    path = options.output / "profile.txt"
    store.write_text(path, "\n".join([*lines, "", *tables]) + "\n")
    print("\n".join(lines) + f"\nprofile: {path}")
