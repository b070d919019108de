"""What the tests of the command line share."""

import pytest
import torch

from arbscale import ArbitraryScaleModel, presets, store
from arbscale.__main__ import main


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Save an untrained generator and an untrained super-resolver under the shipped names."""
    root = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    for name, low_size in (("cats", None), ("scenes", None), ("photos", 8)):
        model = ArbitraryScaleModel(presets.tiny(low_size), manifest={"name": name})
        model.save(root / name)
    return root


@pytest.fixture
def run(models, monkeypatch, tmp_path, capsys):
    """Return a function that runs a command and gives its status and what it wrote of errors."""
    monkeypatch.setattr(store, "SHIPPED", (models,))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code
        return status, capsys.readouterr().err

    return call
