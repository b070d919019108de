"""The command line: `python -m arbscale COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

from arbscale import presets, training
from arbscale.model import ArbitraryScaleModel, pick_device

LICENCES = {"scenes": "MIT; trained on procedural pictures of this package"}


def train(args: argparse.Namespace) -> None:
    """Train a preset through all four stages; the model is saved after each one that completes it."""
    from arbscale.data import open_dataset

    started = time.perf_counter()
    preset = presets.get(args.preset)
    if args.data == "scenes":
        source = training.scene_source(seed=args.seed)
    else:
        source = training.photo_source(open_dataset(args.data, "train"), preset)
    torch.manual_seed(args.seed)
    model = ArbitraryScaleModel(preset).to(pick_device())
    autoencoder, decoder, diffusion, alignment = args.steps
    losses = {"decoder": training.train_first_stage(model, source, autoencoder, decoder, args.seed)}
    losses["diffusion"] = training.train_diffusion(model, source, diffusion, args.seed)

    def save(out: Path) -> None:
        minutes = (time.perf_counter() - started) / 60
        model.manifest = {
            "name": preset.name,
            "data": args.data,
            "licence": LICENCES.get(args.data, "that of the data it was trained on"),
            "command": "python -m arbscale " + " ".join(sys.argv[1:]),
            "seed": args.seed,
            "steps": dict(zip(("autoencoder", "decoder", "diffusion", "alignment"), args.steps)),
            "minutes": round(minutes, 1),
            "machine": f"{model.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "torch": torch.__version__,
            "final_losses": {k: sum(v[-100:]) / len(v[-100:]) for k, v in losses.items() if v},
        }
        model.save(out, half=True)
        print(f"{out}: {minutes:.1f} minutes, losses {model.manifest['final_losses']}")

    if alignment:
        save(args.output.with_name(args.output.name + "-before-alignment"))
        losses["alignment"] = training.finetune_alignment(
            model, source, alignment, args.seed, args.max_weight
        )
    save(args.output)


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    main = argparse.ArgumentParser(prog="python -m arbscale", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(function, text):
        sub = commands.add_parser(function.__name__, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command(train, "train a preset: autoencoder, decoder, diffusion, alignment")
    sub.add_argument("preset", help=", ".join(presets.PRESETS))
    sub.add_argument("--data", default="scenes", help="'scenes', 'photos', a folder, or a name")
    sub.add_argument("--steps", type=int, nargs=4, default=[1000, 2000, 3000, 200], metavar="N")
    sub.add_argument("--max-weight", type=float, help="clamp of the alignment's image term")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder for the weights")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command; an expected error is one line and exit status 2."""
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"arbscale: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
