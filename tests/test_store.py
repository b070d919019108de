"""Weights on disk: what is written comes back, and what is wrong is named with its mend."""

import ast
import dataclasses
import errno
import json
import os
import platform
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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
    others = ["README.md", "config.json"]  # a card; and a run's folder may be the model's
    for name in others:
        (tmp_path / name).write_text("kept")
    store.save(tmp_path, state, PRESET)
    (file,) = store.read_manifest(tmp_path)["files"]
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.json", file["name"], *others}
    assert all((tmp_path / name).read_text() == "kept" for name in others)


def test_views_and_gradients_can_be_saved(tmp_path):
    base = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    store.save(tmp_path, {"a": base, "b": base.T}, PRESET)
    assert torch.equal(store.load(tmp_path)[0]["b"], base.detach().T)


@pytest.mark.parametrize("call", ["save_file", "write_text", "sha256"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_a_model_survives_that_another_cannot_be_saved_over_it(
    tmp_path, state, monkeypatch, call, error
):
    monkeypatch.setattr(store, "SHARD_BYTES", 450)
    store.save(tmp_path, state, PRESET)
    before = sorted(tmp_path.iterdir())
    calls, original = [], getattr(store, call)

    def fails(*args):
        calls.append(args)
        if len(calls) == 2 or call == "write_text":
            raise error
        return original(*args)

    with monkeypatch.context() as context, pytest.raises(type(error)):
        context.setattr(store, call, fails)
        store.save(tmp_path, {k: t + 1 for k, t in state.items()}, PRESET)
    assert sorted(tmp_path.iterdir()) == before
    assert all(torch.equal(t, state[k]) for k, t in store.load(tmp_path)[0].items())
    store.save(tmp_path, {k: t + 1 for k, t in state.items()}, PRESET)
    assert all(torch.equal(t, state[k] + 1) for k, t in store.load(tmp_path)[0].items())


def test_a_model_is_whole_where_only_the_folder_cannot_be_synced(tmp_path, state, monkeypatch):
    """The new manifest is in place by then."""
    original = store.sync

    def fails(path):
        if path.is_dir() and (path / store.MANIFEST).exists():
            raise OSError(22, "Invalid argument")
        original(path)

    with monkeypatch.context() as context, pytest.raises(OSError):
        context.setattr(store, "sync", fails)
        store.save(tmp_path, state, PRESET)
    assert len(store.load(tmp_path)[0]) == len(state)


def test_a_full_disk_is_an_error_of_the_system(tmp_path, state, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match=tmp_path.name):
        store.save(tmp_path, state, PRESET)


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


NO_MANIFESTS = b"", b"{", b"[]", b"3", b"null", b'{"format": 2}', b'{"format": 1}', b"\xff\xfe\x00"


@pytest.mark.parametrize("content", [*NO_MANIFESTS, b"[" * 200_000], ids=lambda x: repr(x[:20]))
def test_a_damaged_manifest(folder, content):
    (folder / store.MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


@pytest.mark.parametrize("field", ["name", "sha256", "bytes"])
@pytest.mark.parametrize("value", [None, 1.5, True, [], {}], ids=repr)
def test_a_manifest_whose_files_are_described_by_other_types(folder, field, value):
    edit(folder, lambda m: m["files"][0].update({field: value}))
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


@pytest.mark.parametrize("preset", [[], "tiny", 3, ["name"]], ids=repr)
def test_a_manifest_whose_preset_is_none(folder, preset):
    edit(folder, lambda m: m.update(preset=preset))
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


def test_a_manifest_of_a_newer_format_says_so(folder):
    edit(folder, lambda m: m.update(format=2))
    with pytest.raises(ValueError, match="format 2.*update"):
        store.load(folder)


def test_a_manifest_is_small(folder):
    edit(folder, lambda m: m.update(notes="x" * 1_000_000))
    with pytest.raises(ValueError, match="1,000,000"):
        store.load(folder)


@pytest.mark.parametrize("name", ["../x/{}", "{}/../{}", "/tmp/{}", "sub/{}", "..\\{}", "C:{}"])
def test_a_manifest_names_files_of_its_folder_alone(folder, name):
    own = "weights-00000.safetensors"
    (folder / "sub").mkdir()
    for other in (folder / "sub", folder.parent / "x"):
        other.mkdir(exist_ok=True)
        (other / own).write_bytes((folder / own).read_bytes())
    edit(folder, lambda m: m["files"][0].update(name=name.format(own, own)))
    with pytest.raises(ValueError, match="manifest.json"):
        store.load(folder)


@pytest.mark.skipif(os.name == "nt", reason="links want rights")
def test_a_link_out_of_the_folder_is_refused(folder):
    path = folder / "weights-00000.safetensors"
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)
    with pytest.raises(ValueError, match=path.name):
        store.load(folder)
    linked = folder.parent / "linked"
    path.unlink()
    (folder.parent / path.name).rename(path)
    linked.symlink_to(folder)
    store.load(linked)  # the folder itself may be one


def put(folder, *shards):
    """Make shards the files of a model, with hashes that hold."""
    files = []
    for i, shard in enumerate(shards):
        path = folder / f"put-{i}.safetensors"
        save_file(shard, path)
        size = path.stat().st_size
        files.append({"name": path.name, "sha256": store.sha256(path), "bytes": size})
    edit(folder, lambda m: m.update(files=files))


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "int64", "uint8"])
def test_tensors_that_are_no_weights(folder, dtype):
    put(folder, {"a.weight": torch.zeros(3, dtype=getattr(torch, dtype))})
    with pytest.raises(ValueError, match=f"a.weight.*{dtype}"):
        store.load(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, dtype, value):
    good, bad = torch.zeros(3, dtype=getattr(torch, dtype)), torch.zeros(3).to(torch.float32)
    bad[1] = value
    put(folder, {"a.weight": good})
    assert store.load(folder)[0]["a.weight"].dtype == torch.float32
    put(folder, {"a.weight": good, "b.bias": bad.to(good.dtype)})
    with pytest.raises(ValueError, match="b.bias"):
        store.load(folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, state):
    """Nor those that half precision cannot hold."""
    large = {"a.weight": torch.tensor([1.0, 70_000.0])}
    store.save(tmp_path, large, PRESET)
    for half, wrong in ((True, large), (False, {"a.weight": torch.tensor([float("nan")])})):
        with pytest.raises(ValueError, match="a.weight"):
            store.save(tmp_path, wrong, PRESET, half=half)
    assert torch.equal(store.load(tmp_path)[0]["a.weight"], large["a.weight"])


def test_a_tensor_in_two_shards(folder):
    put(folder, {"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": torch.ones(1)})
    with pytest.raises(ValueError, match="put-1.*b"):
        store.load(folder)


def test_a_shard_that_is_no_safetensors_file(folder):
    path = folder / "weights-00000.safetensors"
    path.write_bytes(b"damaged")
    edit(folder, lambda m: m["files"][0].update(bytes=7, sha256=store.sha256(path)))
    with pytest.raises(ValueError, match=path.name):
        store.load(folder)


# A whole model ------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    ArbitraryScaleModel(presets.tiny(), 1.7).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_preset_that_does_not_fit_its_weights(model_folder, monkeypatch):
    monkeypatch.setattr(ArbitraryScaleModel, "__init__", lambda *_: pytest.fail("it was built"))
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 4096),
        ("channels", 10**9),
        ("channels", 10**400),
        ("multipliers", [1] * 10**5),
        ("multipliers", []),
        ("blocks", 10**6),
        ("transformer_blocks", 10**6),
        ("hidden", [10**6] * 30),
        ("diffusion_steps", 10**12),
        ("noise_level", float("nan")),
        ("noise_level", 0),
        ("noise_level", -1.0),
        ("noise_level", float("inf")),
        ("image_size", 0),
        ("low_size", -1),
        ("target_sizes", [0, 5]),
        ("target_sizes", [1, 2, 3]),
        ("target_sizes", 5),
        ("multipliers", [1, "a"]),
        ("multipliers", [[1]]),
        ("channels", 32.0),
        ("channels", True),
        ("channels", "32"),
        ("channels", None),
        ("channels", {}),
        ("posterior", 1),
        ("name", None),
        ("beta_start", "small"),
        ("beta_end", 2),
        ("head_channels", 48),  # 64 is no multiple of it
        ("head_channels", 0),
        ("groups", 7),
        ("padding", "stretch"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_preset_that_no_weights_fit_is_refused_at_once(model_folder, field, value):
    edit(model_folder, lambda m: m["preset"].update({field: value}))
    start = time.process_time()
    with pytest.raises(ValueError, match="tiny"):
        arbscale.load(model_folder)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1", None, 10**400])
def test_a_scale_factor_is_positive_and_finite(model_folder, value):
    edit(model_folder, lambda m: m.update(scale_factor=value))
    with pytest.raises(ValueError, match="scale_factor"):
        arbscale.load(model_folder)


def test_a_scale_factor_may_be_an_integer(tmp_path):
    for value in (1, 2.5):
        ArbitraryScaleModel(presets.tiny(), scale_factor=value).save(tmp_path / "m")
        assert arbscale.load(tmp_path / "m").scale_factor == value
    for value in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale_factor"):
            ArbitraryScaleModel(presets.tiny(), scale_factor=value)


def test_a_manifest_without_a_scale_factor(model_folder):
    edit(model_folder, lambda m: m.pop("scale_factor"))
    with pytest.raises(ValueError, match="scale_factor"):
        arbscale.load(model_folder)


@pytest.mark.slow
def test_loading_imports_no_compiler(model_folder):
    """As drawing normal numbers on the meta device and `torch.compiler` do, for seconds."""
    code = f"import arbscale.__main__, sys; arbscale.load({str(model_folder)!r}); "
    code += "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_path_may_be_text_and_relative(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    assert arbscale.load("tiny").scale_factor == 1.7
    assert arbscale.load(str(model_folder)).preset == presets.tiny()


@pytest.mark.slow
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
    with pytest.raises(OSError, match="No space left.*scores.json"), store.replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    store.write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "here").mkdir()
    link, target = tmp_path / "here" / "link.json", tmp_path / "there.json"
    link.symlink_to("../there.json")
    for text in ("new", "newer"):
        store.check_writable(link)
        store.write_text(link, text)
        assert link.is_symlink() and target.read_text() == link.read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "link.json", "there.json"]


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


def test_reading_names_the_file_unless_the_reader_has_said_why():
    for code in ("1 / 0", "{}['a']", "[][0]", "None + 1", "10.0 ** 999", "int('x')", "None.x"):
        with pytest.raises(store.InputError, match=r"a\.json"), store.reading("a.json"):
            exec(code)
    with pytest.raises(store.InputError, match=r"a\.json"), store.reading("a.json", EOFError):
        raise EOFError
    with pytest.raises(store.InputError, match="^the reader's own$"), store.reading("a.json"):
        raise store.InputError("the reader's own")
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


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_itself_is_no_output(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "a.png"):
        with pytest.raises(OSError, match="loop"):
            store.check_writable(path)
    with store.locked(tmp_path / "loop"):
        pass


# Two processes, and network shares ----------------------------------------------------------------

HOLDER = """
import sys, time
from arbscale import store
with store.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `out`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_the_second_process_learns_who_holds_the_lock(tmp_path, holder):
    with pytest.raises(RuntimeError) as refused, store.locked(tmp_path / "out"):
        pass
    text = str(refused.value)
    assert all(fact in text for fact in (str(holder.pid), platform.node(), str(tmp_path / "out")))
    with store.locked(tmp_path / "other"):
        pass


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert list(tmp_path.iterdir())
    with store.locked(tmp_path / "out"), store.locked(tmp_path / "out"):
        assert str(os.getpid()) in next(tmp_path.iterdir()).read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folders")
def test_a_share_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync = os.fsync

    def share(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", share)
    store.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    for number, file in ((errno.EINVAL, "a"), (errno.EIO, "")):  # a file, and a broken disk

        def broken(handle, number=number):
            raise OSError(number, "broken")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="broken"):
            store.sync(tmp_path / file)
