"""README: short, its numbers those of the JSON files, and no link that leads nowhere."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "data").rglob("*.md")])
CEILING = "first stage of other real images (ceiling)"


def results(name: str):
    return json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))["results"]


def pairs(name: str, metric: str, digits: int, *methods: str, scale: str = "4") -> list[str]:
    """One metric of some methods at a scale."""
    return [f"{results(name)[scale][method][metric]:.{digits}f}" for method in methods]


def distances(name: str, side: int, *methods: str) -> list[str]:
    rows = {row["method"]: row for row in results(name)["rows"] if row["size"] == [side, side]}
    found = [rows[method] for method in methods]
    return [f"{row['distance']:.4g} ± {row['distance_pm']:.2g}" for row in found]


def milliseconds(name: str, side: int, *tasks: str) -> list[str]:
    rows = {row["task"]: row for row in results(name) if row["size"] == [side, side]}
    return [f"{1000 * rows[task]['seconds']:.0f}" for task in tasks]


def losses(name: str, *contestants: str) -> list[str]:
    """Mean and deviation over the seeds."""
    found = []
    for contestant in contestants:
        runs = [run for run in results(name)["runs"] if run["contestant"] == contestant]
        values = [run["loss"] for run in runs]
        found.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
    return found


def expected() -> list[tuple[str, str, list[str]]]:
    """Return each row's file and metric, and its numbers: ours, then the baselines."""
    denoisers = "cats/ablation"
    set5, b100, cats = "photos/set5", "photos/b100", "cats/reconstruction"
    both = ["ours (first stage)", "bicubic of own training-size output"]
    set5_psnr = pairs(set5, "psnr", 2, "ours", "bicubic", "bicubic, back-projected")
    cats_128 = distances("cats/generation", 128, "ours", CEILING)
    forms = ["render, interpolated, 3 x 96", "render, released form, 4 x 256"]
    return [
        (set5, "LPIPS", pairs(set5, "lpips", 4, "ours", "bicubic")),
        (set5, "PSNR (dB)", set5_psnr),
        (b100, "LPIPS", pairs(b100, "lpips", 4, "ours", "bicubic")),
        (cats, "LPIPS", pairs(cats, "lpips", 4, *both, scale="2")),
        (cats, "PSNR (dB)", pairs(cats, "psnr", 2, *both, scale="2")),
        ("cats/generation", "Fréchet distance, AlexNet", cats_128),
        ("cats/speed", "ms per image", milliseconds("cats/speed", 512, *forms)),
        (denoisers, "held-out loss", losses(denoisers, "unet_transformer", "unet")),
    ]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, row by row, without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_readme_is_short():
    assert len(README.encode()) <= 10_240
    assert len(table("Results")) <= 8


def test_the_headline_results_are_those_of_the_json_files():
    shown = []
    for _, metric, ours, baselines, link in table("Results"):
        file = re.search(r"\(data/(.+)\.json\)", link)[1]
        others = [baseline.split(",")[0] for baseline in baselines.split("; ")]
        shown.append((file, metric, [ours, *others]))
    assert shown == expected()


def test_every_notebook_is_in_the_table():
    files = [re.search(r"\((.+)\)", row[0])[1] for row in table("Notebooks")]
    assert files == sorted(f"notebooks/{path.name}" for path in ROOT.glob("notebooks/[0-9]*.ipynb"))


def anchors(path: Path) -> list[str]:
    headings = re.findall(r"^#+ (.+?)\s*$", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            to = path.parent / file if file else path
            assert to.is_file(), target
            assert not anchor or anchor in anchors(to), target
