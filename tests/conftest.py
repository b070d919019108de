"""What the tests share."""

import signal

import pytest

# PyTorch is imported where it is used: pytest-xdist's first process runs no test.


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives():
    """Let SIGINT act as in a terminal; a shell starts its background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Save an untrained generator and an untrained super-resolver under the shipped names."""
    import torch

    from arbscale import ArbitraryScaleModel, presets

    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    for name, low_size in (("cats", None), ("scenes", None), ("photos", 8)):
        model = ArbitraryScaleModel(presets.tiny(low_size), manifest={"name": name})
        model.save(root / name)
    return root


@pytest.fixture
def run(models, monkeypatch, tmp_path, capsys):
    """Return a function that runs a command and gives its status and what it wrote of errors."""
    from arbscale import store
    from arbscale.__main__ import main

    monkeypatch.setattr(store, "SHIPPED", (models,))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code
        return status, capsys.readouterr().err

    return call
