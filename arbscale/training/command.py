"""`python -m arbscale train`: a preset through its four stages, with every number within reach."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

from arbscale import compat, presets, store
from arbscale.autoencoder import TinyEncoder
from arbscale.data import find_folder, open_dataset
from arbscale.model import ArbitraryScaleModel, shapes
from arbscale.presets import Preset
from arbscale.samplers import Sampling
from arbscale.store import InputError, StateError
from arbscale.training import checkpoints, denoiser, first_stage, sources
from arbscale.training.loop import Run
from arbscale.training.processes import process_state
from arbscale.training.runlog import read_summary

PROG = "python -m arbscale train"
CONFIG = "config.json"
FOLDER = Path("runs/OUTPUT")  # the run folder, unless named, takes the name of the output
SCENES = "MIT; trained on procedural images of this package"
UNKNOWN = "that of the data it was trained on"
AFHQ = "CC BY-NC 4.0, as the images of AFHQ are: for non-commercial use alone"
LICENCES = {  # of weights trained on a set, or on a folder inside it
    **dict.fromkeys(("afhq", "afhq_cats", "afhq_cats256"), AFHQ),
    "celeba": "for non-commercial research only, as the images of CelebA are",
    "div2k": "for academic research only, as the images of DIV2K are",
}


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
    resampled: float = 0.0  # share of the decoder's steps on latents that the denoiser sampled
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
    profile: bool = False  # measure loading and training instead; OUTPUT gets profile.txt

    def __post_init__(self) -> None:
        """Refuse numbers out of range by ValueError."""
        Sampling(seed=self.seed)  # refuses a seed that no generator takes
        if min(self.steps) < 0:
            raise InputError(f"steps are at least 0, got {self.steps}")
        if not 0 <= self.resampled <= 1:
            raise InputError(f"resampled is a share from 0 to 1, got {self.resampled}")
        if self.resampled and (self.joint or not self.start):
            raise InputError("--resampled needs a trained denoiser: --start a model, not --joint")
        if self.max_weight is not None and not self.max_weight > 0:
            raise InputError(f"max_weight is positive, got {self.max_weight}")
        if self.pool is not None and self.pool < 2:
            raise InputError(f"a pool has at least 2 images, got {self.pool}")
        if self.data == "scenes" and (self.parts or self.whole or self.subset is not None):
            raise InputError("scenes are endless: --parts, --subset and --whole need other --data")
        if self.parts and not all(0 <= part < float("inf") for part in self.parts):
            raise InputError(f"parts are counts, or fractions up to 1, got {self.parts}")


def parse(words: list[str]) -> TrainOptions:
    """Read `PRESET [options]`; for what cannot be read, print why and exit with status 2.

    The preset, or the model to start from, gives the defaults. ValueError for unknown names.
    """
    if words[:1] in (["-h"], ["--help"]):
        words = ["tiny", *words]
    if not words or words[0].startswith("-"):
        raise InputError(f"name a preset first: {', '.join(presets.PRESETS)}")
    name, *options = words
    parsed = _read(options, presets.get(name))
    if parsed.start:
        manifest = store.read_manifest(store.find(parsed.start))
        parsed = _read(options, Preset.from_dict(manifest["preset"]))
    if parsed.run.folder in (None, FOLDER):
        if not (name := parsed.output.resolve().name):
            raise InputError(f"--output {parsed.output} has no name; name a folder in it")
        return replace(parsed, run=replace(parsed.run, folder=FOLDER.with_name(name)))
    return parsed


def _read(words: list[str], preset: Preset) -> TrainOptions:
    default = TrainOptions(output=tyro.MISSING, preset=preset, run=Run(folder=FOLDER))
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(TrainOptions, args=words, default=default, prog=f"{PROG} PRESET", config=config)


def train(options: TrainOptions) -> None:
    """Run the stages; the first process of several writes.

    RuntimeError if another run has the folder or the output, if training stops, or if the result
    cannot be written; ValueError for options that do not fit.
    """
    store.check_writable(options.output / store.MANIFEST)
    if options.profile:
        return _profile(options)
    outputs = (options.run.folder, options.output) if process_state().is_main_process else ()
    with contextlib.ExitStack() as locks:
        for path in outputs:
            locks.enter_context(store.locked(path))
        _train(options)


def _train(options: TrainOptions) -> None:
    state, folder = process_state(), options.run.folder
    before: dict = {}
    with state.main_process_first():
        if state.is_main_process:
            config, before = _claim(folder, options)
            print(f"run folder {folder}; {json.dumps(asdict(options.preset))}")
    torch.manual_seed(options.seed)
    model = _model(options).to(state.device)
    source = _source(options)
    begun = model.manifest.get("licence", UNKNOWN) if options.start else ""
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    for stage, losses in _stages(model, source, options):
        if not state.is_main_process:
            continue
        store.write_text(folder / CONFIG, config)
        seconds = sum(note["seconds"] for note in read_summary(folder).values())
        loss = sum(losses[-100:]) / len(losses[-100:])
        model.manifest |= {
            "name": model.preset.name,
            "data": options.data,
            "licence": licence(options.data, begun),
            "commands": [*before.get("commands", []), _command()],
            "minutes": round(seconds / 60 + before.get("minutes", 0), 1),
            "machine": f"{model.device.type} x {state.num_processes}, {threads}",
            "torch": torch.__version__,
            "losses": {**model.manifest.get("losses", {}), stage: loss},
        }
        try:
            model.save(options.output, half=True)
        except (OSError, SafetensorError) as error:
            again = _command() + ("" if options.run.resume else " --resume")
            raise StateError(
                f"{options.output} cannot be written ({error}); the weights are safe in {folder}: "
                f"make room, then `{again}`"
            ) from error
        print(f"{stage}: {options.output}, {model.manifest['minutes']} minutes")


def licence(data: str, begun: str = "") -> str:
    """Return the terms of weights that were trained on `data`, and before on terms `begun`.

    The stricter one wins: MIT gives way to all others; others hold together, joined by " AND ". A
    folder inside a known set has the terms of the set.
    """
    own = SCENES
    if data != "scenes":
        places = {*Path(data).parts}
        with contextlib.suppress(FileNotFoundError):
            places |= {*find_folder(data).resolve().parts}
        known = {place.lower() for place in places} & LICENCES.keys()
        own = LICENCES[min(known)] if known else UNKNOWN
    return _joined(begun, own)


def _joined(*licences: str) -> str:
    terms = [text for licence in licences if licence for text in licence.split(" AND ")]
    different = {re.split("[,;]", text)[0]: text for text in terms}  # by what they begin with
    if len(different) > 1:
        different.pop("MIT", None)
    return " AND ".join(different.values())


def blend(first: str, second: str, output: Path, share: float) -> None:
    """Write the model between two, one trained on from the other (Wang et al. 2018, ESRGAN).

    ValueError unless `share`, that of the second, is in [0, 1] and both are one kind of network.
    """
    store.check_writable(output / store.MANIFEST)
    if not 0 <= share <= 1:
        raise InputError(f"--share is from 0 to 1, got {share}")
    a, b = map(ArbitraryScaleModel.load, (first, second))
    old, new = a.state_dict(), b.state_dict()
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise InputError(f"{first} and {second} are different networks; blend two of one kind")
    if a.scale_factor != b.scale_factor:
        raise InputError(f"{first} and {second} scale latents differently; blend two of one run")
    b.load_state_dict({name: torch.lerp(old[name], new[name], share) for name in new})
    terms = (model.manifest.get("licence", UNKNOWN) for model in (a, b))
    commands = [*b.manifest.get("commands", []), _command()]
    b.manifest |= {"licence": _joined(*terms), "commands": commands}
    b.save(output, half=True)
    print(f"{output}: {1 - share:g} of {first}, {share:g} of {second}")


def guide(name: str, weaker: str, output: Path, weight: float) -> None:
    """Write a model that a weaker one's denoiser guides; see `diffusion.guided`.

    ValueError unless the weaker one's denoiser is a plain U-Net for the same latents.
    """
    store.check_writable(output / store.MANIFEST)
    a, b = map(ArbitraryScaleModel.load, (name, weaker))
    levels = b.preset.unet_multipliers
    preset = replace(a.preset, guide_multipliers=levels, guidance=weight)
    model = ArbitraryScaleModel(preset, a.scale_factor, a.manifest)
    parts = {"first_stage": a.first_stage, "denoiser": a.denoiser, "guide": b.denoiser}
    state = {f"{k}.{n}": v for k, part in parts.items() for n, v in part.state_dict().items()}
    same = b.preset.prediction == preset.prediction and b.schedule.betas.equal(a.schedule.betas)
    if not same or abs(b.scale_factor / a.scale_factor - 1) > 0.01:
        raise InputError(f"{weaker} has another schedule, prediction or scale of latents")
    _fit(model, state, weaker)
    terms = (part.manifest.get("licence", UNKNOWN) for part in (a, b))
    before = [part.manifest.get("commands", []) for part in (a, b)]
    minutes = sum(part.manifest.get("minutes", 0) for part in (a, b))
    model.manifest |= {"licence": _joined(*terms), "commands": [*sum(before, []), _command()]}
    model.manifest |= {"minutes": round(minutes, 1)}
    model.save(output, half=True)
    print(f"{output}: {name}, guided by the denoiser of {weaker}, weight {weight:g}")


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
        steps = autoencoder, decoder
        how = {"joint": options.joint, "resampled": options.resampled}
        losses = first_stage.train_first_stage(model, source, *steps, **how, **common)
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
    shapes(options.preset)  # refused before it takes memory
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
        text = f"the weights of {origin} do not fit the preset; change no number of the network"
        raise InputError(text) from None


def _teacher(options: TrainOptions) -> TinyEncoder:
    if options.preset.encoder != "tiny":
        raise InputError(f"only a tiny encoder has a teacher; {options.preset.name} has none")
    with store.reading(options.teacher):
        return compat.tiny_encoder(load_file(options.teacher))


def _source(options: TrainOptions) -> sources.Source:
    _say_which(options.data)
    if options.data == "scenes":
        return sources.scene_source(seed=options.seed)
    more = {"subset": options.subset}
    if parts := options.parts:
        counts = sum(parts) > 1 + 1e-9 and all(part.is_integer() for part in parts)
        more["parts"] = tuple(int(part) for part in parts) if counts else parts
    images = open_dataset(options.data, "train", **more)
    if not options.whole:
        return sources.photo_source(images, options.preset)
    return sources.whole_source(images)


def _say_which(data: str) -> None:
    """Say that the name of a set is not taken for the folder of that name."""
    with contextlib.suppress(FileNotFoundError):
        folder = find_folder(data)
        if data in ("scenes", "photos") and process_state().is_main_process:
            other = f"./{data}" if Path(data).is_dir() else folder
            print(f"data: the package's own {data}; for the folder, give --data {other}")


def _claim(folder: Path, options: TrainOptions) -> tuple[str, dict]:
    """Return the configuration, and the minutes and commands of the weights it was begun from.

    It is written at once, but for a resumed run, of which a stage may refuse it. That run must have
    the weights it was begun from; the rest is compared with each stage's checkpoint.
    """
    path, before = folder / CONFIG, {}
    if options.start:
        before = store.read_manifest(store.find(options.start))
        before = {key: before[key] for key in ("minutes", "commands") if key in before}
    now = json.loads(json.dumps(asdict(options), default=str))
    begun = {"start": None, "teacher": options.teacher and store.sha256(options.teacher)}
    if options.start and store.find(options.start).resolve() != options.output.resolve():
        files = store.read_manifest(store.find(options.start))["files"]
        begun["start"] = store.content_key([file["sha256"] for file in files])
    if kept := {path.parent.name for path in (folder / "checkpoints").glob("*/step-*")}:
        if not options.run.resume:
            raise InputError(f"{folder} holds a run; add --resume, or name another --folder")
        first = "student" if options.teacher else "autoencoder"
        names = (first, "decoder", "diffusion", "alignment")
        for i, name in enumerate(names):
            if options.steps[i] and name not in kept and (after := kept & {*names[i + 1 :]}):
                text = f"{folder} holds {after.pop()}, which comes after {name}"
                raise InputError(f"{text}; --start from its weights, in another --folder")
        if path.is_file():
            with store.reading(path):
                known = json.loads(path.read_text(encoding="utf-8"))
                same, before = dict(known.get("begun", {})), dict(known.get("before", before))
            checkpoints.compare(folder, same, begun, options.run.allow_changes)
    config = {"command": _command(), "options": now, "begun": begun, "before": before}
    config |= {"python": platform.python_version(), "torch": torch.__version__}
    text = json.dumps(config, indent=2) + "\n"
    if not (options.run.resume and path.is_file()):
        store.write_text(path, text)
    return text, before


def _command() -> str:
    return shlex.join(["python", "-m", "arbscale", *sys.argv[1:]])


def _profile(options: TrainOptions) -> None:
    """Print how fast each stage gets its data and learns; write one step's operations."""
    from arbscale.training.profiling import profile

    state = process_state()
    if state.num_processes > 1:
        raise InputError("--profile measures one process; start it without a launcher")
    torch.manual_seed(options.seed)
    model = _model(options).to(state.device)
    lines, tables = zip(*profile(model, _source(options), options.run), strict=True)
    path = options.output / "profile.txt"
    store.write_text(path, "\n".join([*lines, "", *tables]) + "\n")
    print("\n".join(lines) + f"\nprofile: {path}")
