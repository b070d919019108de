"""Manifests, presets, records and configurations that were edited by hand: refused by name."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from arbscale import ArbitraryScaleModel, compat, presets, store
from arbscale.training import checkpoints, command, latents, runlog
from arbscale.training.loop import RECORD

GONE = object()
ODD = (GONE, None, "", "x", [], {}, -1, 0, 0.5, 1e308, float("nan"), 10**400, [[]], {"a": 1})


def edited(value, place=()):
    """Yield the value with one part of it after the other replaced by each of `ODD`, or removed."""
    part = value
    for key in place:
        part = part[key]
    for odd in ODD:
        if place:
            whole = copy.deepcopy(value)
            inside = whole
            for key in place[:-1]:
                inside = inside[key]
            if odd is GONE:
                del inside[place[-1]]
            else:
                inside[place[-1]] = odd
            yield whole
        elif odd is not GONE:
            yield odd
    inner = {dict: lambda: list(part), list: lambda: range(len(part))}.get(type(part), list)()
    for key in inner:
        yield from edited(value, (*place, key))


def read_preset(folder):
    """Return a preset, and what reads one."""
    preset = replace(presets.tiny(8), encoder_attention_levels=(1,))
    return preset.to_dict(), presets.Preset.from_dict


def read_manifest(folder):
    """Return a manifest, and what trains on and measures from it."""
    known = {"name": "m", "data": "scenes", "licence": "MIT", "commands": [], "minutes": 1.5}
    ArbitraryScaleModel(presets.tiny(), 1.0, known | {"losses": {"decoder": 0.1}}).save(folder)
    manifest = json.loads((folder / store.MANIFEST).read_text())
    preset = manifest.pop("preset")

    def read(value):
        value = {**value, "preset": preset} if isinstance(value, dict) else value
        (folder / store.MANIFEST).write_text(json.dumps(value))
        manifest = store.read_manifest(folder)
        command.licence(manifest.get("data", "scenes"), manifest.get("licence", ""))
        dict([*manifest.get("losses", {}).items()], commands=[*manifest.get("commands", ())])
        round(manifest.get("minutes", 0.0) + 1.0, 1)

    return manifest, read


def read_record(folder):
    """Return a checkpoint's record, and what resumes from it; a damaged one is passed over."""
    settings = {"steps": 3, "images": {"a.png": 1}}
    record = {"finished": False, "seconds": 1.0, "settings": settings}
    path = checkpoints.save(folder, 3, {"losses": torch.zeros(3)}, record, 1) / checkpoints.RECORD

    def read(value):
        path.write_text(json.dumps(value))
        if found := checkpoints.load_newest(folder, RECORD):
            checkpoints.compare(folder, found[1]["settings"], settings)

    return json.loads(path.read_text()), read


def read_run(folder):
    """Return a line of a run's log and a summary, and what continues them."""

    def read(value):
        value = value if isinstance(value, dict) else {"line": value, "summary": value}
        (folder / runlog.LOG).write_text(json.dumps(value.get("line")) + "\n")
        (folder / runlog.SUMMARY).write_text(json.dumps(value.get("summary")))
        runlog.RunLog(folder, "decoder", 3, main=True).close()
        sum(note["seconds"] for note in runlog.read_summary(folder).values())

    return {"line": {"stage": "decoder", "step": 2}, "summary": {"decoder": {"seconds": 1.0}}}, read


def read_latents(folder):
    """Return the record of cached latents, and what opens them; others are encoded anew."""
    np.save(folder / "0.npy", np.zeros((4, 1, 2, 2), "float32"))
    (folder / "empty.npy").touch()

    def read(value):
        (folder / latents.RECORD).write_text(json.dumps(value))
        latents.cached(folder, "key", 1, lambda: iter([(torch.zeros(1, 1, 2, 2),)]))

    return {"key": "key", "files": ["0.npy", "empty.npy"]}, read


def read_config(folder):
    """Return a run's configuration, and what resumes the run."""
    words = ("-o", folder / "out", "--folder", folder / "run", "--resume")
    options = command.parse(["tiny", *map(str, words)])
    (folder / "run/checkpoints/decoder/step-00000001").mkdir(parents=True)

    def read(value):
        (folder / "run" / command.CONFIG).write_text(json.dumps(value))
        command._claim(folder / "run", options)

    return {"begun": {"start": None, "teacher": None}}, read


def read_published(folder):
    """Return a config of the released code, and what converts a checkpoint by it."""
    first = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3}
    first |= {"resolution": 32, "attn_resolutions": [16]}
    params = {"ddconfig": first, "liifconfig": {"hidden_list": [32]}, "scale_factor": 1.0}
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")

    def read(value):
        (folder / "a.yaml").write_text(yaml.safe_dump(value))
        compat.convert(folder / "a.safetensors", folder / "a.yaml", folder / "out")

    return {"model": {"params": params}}, read


READERS = [read_preset, read_manifest, read_record, read_run, read_latents, read_config]
READERS.append(pytest.param(read_published, marks=pytest.mark.slow))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS, ids=lambda f: f.__name__)
def test_what_a_file_should_not_hold_is_refused(reader, tmp_path):
    value, read = reader(tmp_path)
    refused = 0
    for odd in edited(value):
        try:
            read(odd)
        except (store.InputError, OSError):
            refused += 1
    assert refused or reader in (read_record, read_latents)
