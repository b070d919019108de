"""Settings of nbval that have no option on the command line."""

from pathlib import Path

HERE = Path(__file__).parent


def pytest_configure(config):
    """Let the sanitising file be found from any working directory."""
    config.option.nbval_sanitize_with = str(HERE / "sanitize.cfg")


def pytest_collection_modifyitems(items):
    """Compare everything but stderr: progress bars and warnings differ between machines."""
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare += ("stderr",)
