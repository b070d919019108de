"""Reports: nothing is left out, and nothing is called what it is not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from arbscale.evaluation import reports, tables

MACHINE = {"device": "cpu", "threads": 2, "processor": "x86_64"}


def generated(features: str) -> dict:
    row = {"size": [64, 96], "method": "ours", "pictures": 1000, "distance": 12.345}
    row |= {"distance_pm": 0.123, "precision": 0.5, "precision_pm": 0.01}
    row |= {"recall": 0.25, "recall_pm": 0.02}
    matrix = [[1.0, 0.98765], [0.9, 1.0]]
    return {
        "task": "generate",
        "model": "m",
        "protocol": {
            "data": "cats",
            "split": "train",
            "pictures": 1000,
            "reference": 900,
            "real pictures": "antialiased bicubic",
            "features": features,
            "distance over": "network A",
            "precision and recall over": "network B, k = 3",
            "interval": "two standard errors",
            "sampling": {"sampler": "ddim", "steps": 20, "seed": 3},
        },
        "machine": MACHINE,
        "command": "python -m arbscale evaluate m",
        "results": {
            "rows": [row],
            "self_ssim": {
                "pictures": 100,
                "sizes": [[64, 96], [32, 48]],
                "ours": {"clean": matrix},
            },
            "patches": {"side": 64, "sizes": [64, 128], "patches": 1000, "distance": 1.5},
            "neighbours": {"pictures": 800, "levels": [0.05, 0.5], "ours": [1.25, 2.5]},
        },
    }


def test_a_table_of_generated_pictures():
    text = reports.table(generated("alexnet"))
    assert "FID |" not in text and "FID:" not in text
    assert "| 64 x 96 | ours | 1000 | 12.35 ± 0.12 | 0.500 ± 0.010 | 0.250 ± 0.020 |" in text
    assert "Fréchet distance, alexnet features" in text and "not an FID" in text
    assert "| ours | clean | 64 x 96 | 1.0000 | 0.9877 |" in text
    assert "nearest of 800 training images" in text and "| ours | 1.25 | 2.5 |" in text
    for fact in ("cats, train", "network A", "network B, k = 3", "900 real", "ddim, 20 steps"):
        assert fact in text
    same = generated("alexnet")
    same["protocol"]["distance over"] = "network B"
    assert "precision and recall over network B, k = 3; against" in reports.table(same)
    assert text.endswith("Measured by `python -m arbscale evaluate m`.")
    inception = reports.table(generated("inception"))
    assert "| FID |" in inception and "Patch FID: 1.5 over 1000" in inception


def test_a_table_of_steps():
    row = {"sampler": "ddim", "steps": 5, "seconds": 0.0512, "distance": 12.345, "distance_pm": 0.1}
    report = {**generated("alexnet"), "task": "steps", "results": {"rows": [row], "ceiling": row}}
    report["protocol"]["sizes"] = [[64, 64]]
    text = reports.table(report)
    assert "| ddim | 5 | 0.0512 | 12.35 ± 0.1 |" in text
    assert "(ceiling) | - | - | 12.35 ± 0.1 |" in text
    assert "Fréchet distance, alexnet features |" in text and "20 steps" not in text


def test_a_table_of_pairs_and_of_speeds():
    values = {"psnr": 27.125, "ssim": 0.81236, "lpips": 0.1}
    report = {
        "task": "upscale",
        "model": "m",
        "protocol": {"lpips": None, "name": "div2k", "space": "rgb", "shave": 6},
        "machine": MACHINE,
        "command": "c",
        "results": {"3.7": {"bicubic": values}},
    }
    text = reports.table(report)
    assert "| x3.7 | bicubic | 27.12 | 0.8124 |" in text and "LPIPS" not in text
    assert "protocol div2k (RGB, border scale + 6); cpu, threads: 2" in text
    report["protocol"] |= {"lpips": "v0.1", "shave": None}
    assert "| 0.1000 |" in reports.table(report) and "no border" in reports.table(report)
    row = {"size": [8, 8], "task": "decoding alone", "images_per_second": 4.0, "seconds": 0.5}
    row |= {"spread": 0.01, "repeats": 3, "peak_megabytes": None}
    speeds = {**report, "task": "bench", "results": [row, {**row, "peak_megabytes": 123.4}]}
    speeds["protocol"] = {"batch": 2, "precision": "float32"}
    text = reports.table(speeds)
    assert "| 8 x 8 | decoding alone | 4 | 500 | 10 | 3 | - |" in text and "| 123 |" in text
    row["repeats"] = 1  # has no spread
    assert "| 500 | - | 1 | - |" in reports.table({**speeds, "results": [row]})


def test_reports_are_written_whole_and_read_back(tmp_path):
    path = tmp_path / "results/a.json"
    reports.write(generated("encoder"), path)
    assert reports.read(path) == generated("encoder")
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(FileNotFoundError, match="b.json"):
        reports.read(tmp_path / "b.json")
    for text in ("{", json.dumps({"task": 1}), "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="a.json"):
            reports.read(path)


def test_rows_of_before_the_alignment_stand_in_the_same_table(tmp_path):
    report = {**generated("encoder"), "task": "upscale"}
    report["results"] = {"2": {"ours": {"psnr": 0.5}, "ceiling": {"psnr": 3.0}}}
    path = tmp_path / "a.json"
    reports.write(report, path)
    assert reports.read_with_unaligned(path) == report
    before = json.loads(json.dumps(report).replace("0.5", "0.75"))
    reports.write(before, tmp_path / "unaligned/a.json")
    found = reports.read_with_unaligned(path)["results"]
    assert list(found["2"]) == ["ours", "ceiling", "ours, before the alignment"]
    assert [row["psnr"] for row in found["2"].values()] == [0.5, 3.0, 0.75]
    reports.write({**before, "protocol": {"data": "others"}}, tmp_path / "unaligned/a.json")
    with pytest.raises(ValueError, match="unaligned/a.json"):
        reports.read_with_unaligned(path)


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = [p for p in sorted(ROOT.glob("data/*/*.json")) if p.name != "manifest.json"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_published_results_are_of_the_weights_that_ship(path):
    files = json.loads((path.parent / "manifest.json").read_text())["files"]
    assert json.loads(path.read_text())["weights"] == [file["sha256"] for file in files]


def test_the_published_tables_are_those_of_the_command():
    """Nothing between a measurement and the tables was typed by hand."""
    text = (ROOT / "data/RESULTS.md").read_text(encoding="utf-8")
    assert text == reports.document([ROOT / "data"]) + "\n"
    for path in [ROOT / "data/ablation.json", *PUBLISHED]:
        assert reports.table(reports.read_with_unaligned(path)) in text


def test_a_document_has_a_heading_per_model_and_each_table_under_its_own(tmp_path):
    paths = [ROOT / "data/ablation.json", *(tmp_path / f"{i}.json" for i in range(3))]
    for path, name in zip(paths[1:], ("b", "a", "b"), strict=True):
        reports.write({**generated("encoder"), "model": name}, path)
    lines = reports.document(paths).splitlines()
    assert lines[0] == "# Results"
    heads = [line for line in lines if line.startswith("## ")]
    assert heads == ["## b", "## a", f"## {reports.COMPARED}"]
    captions = [line[:3] for line in lines if line.startswith(("## ", "`"))]
    assert captions == ["## ", "`b`", "`b`", "## ", "`a`", "## ", "`sc"]


def test_a_folder_stands_for_its_reports_alone(tmp_path):
    """Beside them lie what a stopped evaluation and a stopped upscale keep."""
    reports.write(generated("alexnet"), tmp_path / "a/m.json")
    for name in ("a/n.partial/0123/facts.json", ".arbscale/note.json", "m/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    assert reports.document([tmp_path]) == reports.document([tmp_path / "a/m.json"])
    with pytest.raises(ValueError, match="m$"):
        reports.document([tmp_path / "m"])


def test_infinity_is_null_with_a_reason(tmp_path):
    report = {**generated("encoder"), "task": "reconstruct", "results": {}}
    report["protocol"] |= {"lpips": None}
    report["results"]["1"] = {"bicubic": {"psnr": math.inf, "ssim": 1.0}}
    report["results"]["2"] = {"bicubic": {"psnr": 30.0, "ssim": math.nan}}
    path = tmp_path / "a.json"
    reports.write(report, path)

    def refused(constant):
        pytest.fail(f"{constant} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refused)
    assert found["results"]["1"]["bicubic"] == {"psnr": None, "ssim": 1.0}
    assert found["results"]["2"]["bicubic"] == {"psnr": 30.0, "ssim": None}
    assert list(found["null"]) == ["1, bicubic, psnr", "2, bicubic, ssim"]
    assert "identical" in found["null"]["1, bicubic, psnr"]
    text = reports.table(reports.read(path))
    assert text == reports.table(report)
    assert "| x1 | bicubic | - | 1.0000 |" in text and "1, bicubic, psnr: infinite" in text


@pytest.mark.parametrize("value", [None, math.nan])
def test_tables_hold_numbers_that_are_none(value):
    report = generated("encoder")
    results = report["results"]
    results["rows"][0] |= {"distance": value, "distance_pm": value, "recall_pm": value}
    results["patches"]["distance"] = results["neighbours"]["ours"][0] = value
    results["self_ssim"]["ours"]["clean"] = [[1.0, value], [0.9, 1.0]]
    text = reports.table(report)
    assert "| 64 x 96 | ours | 1000 | - ± - | 0.500 ± 0.010 | 0.250 ± - |" in text
    assert "| ours | - | 2.5 |" in text and "| 1.0000 | - |" in text


def test_a_table_of_heads():
    report = {
        "task": "heads",
        "model": "m",
        "protocol": {"data": "cats", "split": "val", "pictures": 9, "steps": {"a head": 500}},
        "machine": MACHINE,
        "command": "python data/heads.py",
        "results": {
            "a head": {
                "parameters": 1234,
                "ms": {"256": 12.345, "512": 50.0},
                "scores": {"0.5": {"psnr": 24.123, "ssim": 0.5, "lpips": 0.12346}},
                "seam": {"ours": 1.02345, "ground truth": 1.0},
            }
        },
    }
    text = reports.table(report)
    assert "| steps | 256 px, ms | 512 px, ms | x0.5, dB and LPIPS | seam" in text
    assert "| a head | 1234 | 500 | 12.3 | 50 | 24.12, 0.1235 | 1.023 (1.000) |" in text
    assert "`python data/heads.py`" in text


def test_a_table_of_alignments():
    report = {
        "task": "alignment",
        "model": "m",
        "protocol": {"data": "cats", "split": "val", "pictures": 9, "steps": 50, "times": [20, 60]},
        "machine": MACHINE,
        "command": "python data/alignment.py",
        "results": {
            "before": {"noise": [0.5, 0.25], "image": [0.1, 0.2]},
            "control, seed 1": {"noise": [0.5, 0.25], "image": [0.09, 0.201]},
        },
    }
    text = reports.table(report)
    assert "| run | t = 20 | t = 60 |" in text and "50 steps" in text
    assert "| control, seed 1 | -10.00 | +0.50 |" in text and "before |" not in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.0554, 0.0546, 0.0550], "0.05500 ± 0.00040"),
        ([1.0, 2.0, 3.0], "2.0 ± 1.0"),
        ([100.0, 300.0], "200 ± 141"),
        ([0.5, 0.5], "0.5 ± 0"),
        ([0.25], "0.25"),
        ([0.25, None], "-"),
    ],
)
def test_mean_and_deviation_end_at_the_same_digit(values, text):
    assert tables.spread(values) == text
