"""Weights on disk: what is written comes back, and what is wrong is named with its mend."""

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

import arbscale
from arbscale import presets, store
from arbscale.model import ArbitraryScaleModel

PRESET = {"preset": {"name": "any"}}


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.weight": torch.randn(5, 10, generator=generator) for i in range(4)}


@pytest.fixture
def folder(tmp_path, state):
    store.save(tmp_path / "model", state, PRESET)
    return tmp_path / "model"


def edit(folder, change):
    """Change the manifest in place."""
    path = folder / store.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip_is_exact(folder, state):
    back, manifest = store.load(folder)
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert manifest["preset"] == PRESET["preset"] and manifest["format"] == 1


def test_half_is_half_the_size_and_comes_back_as_float32(tmp_path, folder, state):
    store.save(tmp_path / "half", state, PRESET, half=True)
    back, _ = store.load(tmp_path / "half")
    assert all(t.dtype == torch.float32 for t in back.values())
    assert all(torch.equal(back[k], state[k].half().float()) for k in state)
    sizes = [(d / "weights-00000.safetensors").stat().st_size for d in (folder, tmp_path / "half")]
    assert 350 < sizes[0] - sizes[1] <= 400 + 8


def test_shards(tmp_path, state, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 450)  # two tensors of 200 bytes
    store.save(tmp_path, state, PRESET)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 2
    back, manifest = store.load(tmp_path)
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert [f["name"] for f in manifest["files"]] == [
        "weights-00000.safetensors", "weights-00001.safetensors",
    ]  # fmt: skip


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path, state, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    store.save(tmp_path, state, PRESET)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 4
    assert len(store.load(tmp_path)[0]) == 4


def test_saving_again_leaves_no_old_shard(tmp_path, state, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    store.save(tmp_path, state, PRESET)
    monkeypatch.undo()
    store.save(tmp_path, state, PRESET)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest.json", "weights-00000.safetensors",
    ]  # fmt: skip


def test_views_and_gradients_can_be_saved(tmp_path):
    base = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    store.save(tmp_path, {"a": base, "b": base.T}, PRESET)
    assert torch.equal(store.load(tmp_path)[0]["b"], base.detach().T)


# Errors -------------------------------------------------------------------------------------------


def test_an_altered_file(folder):
    path = folder / "weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights-00000.*SHA-256"):
        store.load(folder)


def test_a_truncated_file(folder):
    path = folder / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights-00000.* 100 bytes"):
        store.load(folder)


def test_a_missing_file(folder):
    (folder / "weights-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights-00000"):
        store.load(folder)


def test_an_unknown_name(tmp_path):
    for wrong in ("no-such-model", tmp_path):
        with pytest.raises(FileNotFoundError, match="python -m arbscale train"):
            store.find(wrong)
    with pytest.raises(FileNotFoundError, match="no-such-model.*photos, photos-tiny, scenes"):
        arbscale.load("no-such-model")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_manifest(folder, text):
    (folder / store.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


def test_a_manifest_that_is_no_text(folder):
    (folder / store.MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


@pytest.mark.parametrize("field", ["name", "sha256", "bytes"])
def test_a_manifest_whose_files_are_half_described(folder, field):
    edit(folder, lambda m: m["files"][0].pop(field))
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


# A whole model ------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    ArbitraryScaleModel(presets.tiny(), 1.7).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_preset_that_does_not_fit_its_weights(model_folder):
    other = dataclasses.replace(presets.tiny(), hidden=(48,)).to_dict()
    edit(model_folder, lambda m: m.update(preset=other))
    with pytest.raises(ValueError, match="tiny"):
        arbscale.load(model_folder)


def test_a_preset_of_another_version(model_folder):
    edit(model_folder, lambda m: m["preset"].pop("head"))  # as before there was a choice
    assert arbscale.load(model_folder).preset == presets.tiny()
    edit(model_folder, lambda m: m["preset"].update(depth=3))
    with pytest.raises(ValueError, match="depth"):
        arbscale.load(model_folder)


def test_a_manifest_without_a_scale_factor(model_folder):
    edit(model_folder, lambda m: m.pop("scale_factor"))
    with pytest.raises(ValueError, match="scale_factor"):
        arbscale.load(model_folder)


def test_a_path_may_be_text_and_relative(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    assert arbscale.load("tiny").scale_factor == 1.7
    assert arbscale.load(str(model_folder)).preset == presets.tiny()


@pytest.mark.parametrize("name", ["cats", "scenes", "photos", "photos-tiny"])
def test_what_ships_can_be_loaded(name):
    assert name in store.shipped()
    model = arbscale.load(name)
    assert model.preset.name == name and not model.training


def test_shards_fit_a_repository():
    for name in store.shipped():
        for file in store.read_manifest(store.find(name))["files"]:
            assert file["bytes"] < 16_000_000


# No code in weights -------------------------------------------------------------------------------

SOURCES = sorted(Path(arbscale.__file__).parent.glob("**/*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_is_unpickled(source):
    """No pickle at all, and `torch.load` with `weights_only=True` alone."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if [a.name for a in node.names] == ["UnpicklingError"]:
                continue
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), ast.dump(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = options.get("weights_only") == "True" or options.get("allow_pickle") == "False"
            assert safe, f"{source.name}:{node.lineno}"


# Writing --------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "scores.json"
    store.write_text(path, "old")
    with pytest.raises(RuntimeError), store.replacing(path) as draft:
        assert draft.suffix == ".json"
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    store.write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no file modes")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with store.replacing(tmp_path / "a") as draft:
            draft.touch(0o600)
        store.save(tmp_path, {"a": torch.zeros(1)}, PRESET)
    finally:
        os.umask(before)
    for name in ("a", store.MANIFEST, "weights-00000.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_content_key_depends_on_facts_and_weights():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    keys = {
        store.content_key(*facts, module=module)
        for facts in ([1, "a"], [1, "b"], [torch.zeros(4)], [torch.zeros(2, 2)], [torch.ones(4)])
        for module in (None, one, other)
    }
    assert len(keys) == 15
    assert store.content_key(torch.zeros(2, dtype=torch.bfloat16)) != store.content_key(2)
    assert store.content_key({"a": 1, "b": 2}) == store.content_key({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("package", "code", "deliberate"),
    [
        ("arbscale", "raise ValueError('no such name')", True),
        ("arbscale.data", "raise RuntimeError('stopped')", True),
        ("arbscale", "int('x')", False),
        ("arbscale", "{}['none']", False),
        ("numpy", "raise ValueError('shapes')", False),
    ],
)
def test_an_error_is_deliberate_where_the_package_raises_it(package, code, deliberate):
    with pytest.raises((ValueError, RuntimeError, KeyError)) as found:
        exec(code, {"__package__": package})
    assert store.deliberate(found.value) is deliberate


def test_reading_names_the_file_unless_the_reader_has_said_why():
    for code in ("1 / 0", "{}['a']", "[][0]", "None + 1", "10.0 ** 999", "int('x')", "None.x"):
        with pytest.raises(store.InputError, match=r"a\.json"), store.reading("a.json"):
            exec(code, {"__package__": "arbscale"})
    with pytest.raises(ValueError, match=r"^the reader's own$"), store.reading("a.json"):
        exec('raise ValueError("the reader\'s own")', {"__package__": "arbscale"})
    with pytest.raises(FileNotFoundError), store.reading("a.json"):
        open("/none/a.json")


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    store.check_writable(tmp_path / "new" / "folder" / "a.png")
    store.check_writable(tmp_path / "file")
    for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / "file" / "b" / "a.png"):
        with pytest.raises(OSError):
            store.check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
