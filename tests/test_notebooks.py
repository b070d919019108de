"""What every notebook owes its reader, read from its JSON; `pytest --nbval notebooks` runs them."""

import json
import re
from pathlib import Path

import pytest

import arbscale

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = [
    "00_quickstart",
    "01_data",
    "02_autoencoder",
    "03_liif_decoder",
    "04_latent_diffusion",
    "05_alignment",
    "06_sampling_at_any_scale",
    "07_metrics",
    "08_lightweight_transformer",
    "09_train_your_own",
]
FOUND = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))
BOOTSTRAP = f"""# On Colab this installs the package; elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "arbscale @ git+https://github.com/{arbscale.REPOSITORY}@{arbscale.BRANCH}" "anywidget>=0.9.21"
"""  # noqa: E501
PLACES = r"(?<![\w./-])/(work|root|home|tmp|Users)(?![\w-])"


class Notebook:
    """One notebook's JSON, with the parts that the tests ask for."""

    def __init__(self, name: str):
        self.name = name
        self.path = FOLDER / f"{name}.ipynb"
        self.json = json.loads(self.path.read_text(encoding="utf-8"))
        self.cells = [(c["cell_type"], "".join(c["source"]), c) for c in self.json["cells"]]
        self.code = [(source, cell) for kind, source, cell in self.cells if kind == "code"]
        self.prose = [source for kind, source, _ in self.cells if kind == "markdown"]
        self.outputs = [output for _, cell in self.code for output in cell["outputs"]]

    def heading(self, text: str) -> int:
        """Index of the one cell that holds the heading `## text`."""
        line = re.compile(rf"^## {re.escape(text)}\s*$", re.M)
        places = [i for i, (k, s, _) in enumerate(self.cells) if k == "markdown" and line.search(s)]
        assert len(places) == 1, f"{len(places)} headings '## {text}'"
        return places[0]

    def section(self, text: str) -> str:
        """The prose from the heading `## text` to the next heading of its level."""
        rest = "\n".join(s for kind, s, _ in self.cells[self.heading(text) :] if kind == "markdown")
        return re.split(r"^## ", rest.split(f"## {text}", 1)[1], maxsplit=1, flags=re.M)[0]


@pytest.fixture(scope="module", params=FOUND)
def notebook(request):
    return Notebook(request.param)


def test_the_series_is_complete():
    assert FOUND == NAMES


# Anatomy ------------------------------------------------------------------------------------------


def test_title_and_promise(notebook):
    kind, source, _ = notebook.cells[0]
    title, *rest = source.strip().splitlines()
    assert kind == "markdown"
    assert re.fullmatch(rf"# {notebook.name[:2]} \S.*", title), title
    assert any(line.strip() for line in rest), "one sentence of promise below the title"


def test_table_and_badges(notebook):
    head = "\n".join(source for _, source, _ in notebook.cells[: notebook.heading("Setup")])
    for column in ("You will learn", "You need", "Time"):
        assert column.lower() in head.lower()
    assert re.search(r"^\|[\s:|-]+\|$", head, re.M), "a table"
    place = f"{arbscale.REPOSITORY}/blob/{arbscale.BRANCH}/notebooks/{notebook.name}.ipynb"
    assert f"(https://colab.research.google.com/github/{place})" in head
    place = f"{arbscale.REPOSITORY}/{arbscale.BRANCH}?labpath=notebooks%2F{notebook.name}.ipynb"
    assert f"(https://mybinder.org/v2/gh/{place})" in head


def test_setup(notebook):
    cells = notebook.cells[notebook.heading("Setup") + 1 :]
    code = [source for kind, source, _ in cells if kind == "code"]
    assert code[0].strip() == BOOTSTRAP.strip()
    settings = "\n".join(code[1:4])
    for line in ("import arbscale", "SEED = ", "pick_device()", "torch.manual_seed(SEED)"):
        assert line in settings
    sources = [source for source, _ in notebook.code]
    assert sources.count(code[0]) == 1


def test_a_notebook_that_trains_has_its_switch(notebook):
    trains = any(re.search(r"\btrain_\w+\(|\bfinetune_", source) for source, _ in notebook.code)
    whole = notebook.path.stem.startswith("09")  # what it trains is its subject
    if trains and not whole and "shipped" in "\n".join(notebook.prose):
        assert any(re.search(r"^TRAIN = False\b", s, re.M) for s, _ in notebook.code)


def test_order_of_the_parts(notebook):
    setup, recap, exercises = (notebook.heading(t) for t in ("Setup", "Recap", "Exercises"))
    assert 0 < setup < recap <= exercises


def test_recap_has_its_points(notebook):
    assert len(re.findall(r"^\s*[-*] \S", notebook.section("Recap"), re.M)) >= 3


def test_exercises_have_folded_solutions(notebook):
    text = notebook.section("Exercises")
    folds = text.count("<details>")
    assert 1 <= folds == text.count("</details>") == text.count("<summary>")
    asked = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert 2 <= max(folds, len(re.findall(r"^\W*\d\.", asked, re.M))) <= 4


def test_sections_end_in_questions(notebook):
    """Three questions, their answers folded, and nothing after them but the heading of a part."""
    for section in re.split(r"^## ", "\n".join(notebook.prose), flags=re.M)[1:]:
        title, text = section.split("\n", 1)
        if title in ("Setup", "Where next", "Recap", "Exercises"):
            continue
        assert text.count("**Check yourself.**\n") == 1, title
        asked, answered = text.split("**Check yourself.**\n")[1].split("<details>", 1)
        answers, after = answered.split("</details>", 1)
        for block in (asked, answers):
            assert re.findall(r"^(\d)\. \S", block, re.M) == ["1", "2", "3"], title
        assert not re.sub(r"^# .*", "", after, flags=re.M).strip(), title


def test_diagram_and_references(notebook):
    assert sum(source.startswith("pipeline(") for source, _ in notebook.code) == 1
    assert len(re.findall(r"^\* \[[^\]]+\]\(https://", notebook.prose[-1], re.M)) == 5


def test_the_last_cell_leads_on(notebook):
    kind, source, _ = notebook.cells[-1]
    links = dict(re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", source))
    links = {text.split(":")[0].strip(" *").lower(): target for text, target in links.items()}
    place = NAMES.index(notebook.name)
    assert kind == "markdown"
    assert links.get("index") == "../README.md#notebooks"
    if place > 0:
        assert links.get("previous") == f"{NAMES[place - 1]}.ipynb"
    if place < len(NAMES) - 1:
        assert links.get("next") == f"{NAMES[place + 1]}.ipynb"


def test_links_lead_somewhere(notebook):
    for text in notebook.prose:
        plain = re.sub(r"`[^`]*`|\$[^$]*\$", "", text)  # code and mathematics
        for target in re.findall(r"\]\(([^)\s]+)\)", plain):
            if target.startswith(("http://", "https://", "#", "attachment:", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            assert (FOLDER / path).is_file(), target
            if anchor and path.endswith(".md"):
                readme = (FOLDER / path).read_text(encoding="utf-8")
                headings = re.findall(r"^#+ (.+?)\s*$", readme, re.M)
                anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor in anchors, target


# Size ---------------------------------------------------------------------------------------------


def test_size(notebook):
    assert notebook.path.stat().st_size < 2_400_000
    assert 10 <= len(notebook.code) <= 40


def test_no_code_cell_is_longer_than_a_screen(notebook):
    assert max(len(source.splitlines()) for source, _ in notebook.code) <= 40


def test_no_code_cell_is_empty(notebook):
    assert all(source.strip() for source, _ in notebook.code)


def test_there_are_pictures_and_prose(notebook):
    assert any("image/png" in output.get("data", {}) for output in notebook.outputs)
    assert len(notebook.prose) >= len(notebook.code) / 3


# Outputs ------------------------------------------------------------------------------------------


def test_cells_ran_once_in_order(notebook):
    counts = [cell["execution_count"] for _, cell in notebook.code]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_failed(notebook):
    assert not [o for o in notebook.outputs if o["output_type"] == "error"]


def texts(output: dict) -> list[str]:
    """Every text of an output; pictures and the state of widgets are none."""
    found = ["".join(output.get("text", ""))]
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            found.append("".join(content))
    return found


def test_images_have_alternative_text(notebook):
    """What `viz` shows describes itself; a widget's still image stands beside its text."""
    for output in notebook.outputs:
        if "image/png" in output.get("data", {}) and output["output_type"] == "display_data":
            assert output["metadata"]["image/png"]["alt"].strip()


def test_no_path_of_the_machine_it_ran_on(notebook):
    sources = [source for _, source, _ in notebook.cells]
    written = [text for output in notebook.outputs for text in texts(output)]
    for text in sources + written:
        place = re.search(PLACES, text)
        assert not place, text[max(0, place.start() - 60) : place.end() + 60]


def test_outputs_can_be_compared(notebook):
    """What nbval cannot hold against the next run, or what it trips over."""
    for output in notebook.outputs:
        assert "image/svg+xml" not in output.get("data", {})
        assert output["output_type"] != "update_display_data"
    for source, cell in notebook.code:
        lines = [line.rstrip() for line in source.splitlines()]
        assert not any(line.endswith(";") for line in lines), "hides an output"
        assert not re.search(r"%%?time|\binteract(ive)?\(|\bclear_output\b|display_id", source)
        assert not re.match(r"(plt|\w*ax\w*)\.imshow\(", lines[-1]), "plt.show() is missing"
        assert not any("Traceback" in t for o in cell["outputs"] for t in texts(o))


def test_nothing_but_what_ships_is_needed(notebook):
    """Scenes and scikit-image's photographs alone: no folder of this machine, no download."""
    for source, _ in notebook.code:
        code = re.sub(r"#.*", "", source)
        assert not re.search(r"ARBSCALE_DATA|\bafhq\b|urlopen|requests\.|wget|download=True", code)
        assert not re.search(r"[\"'](\.\./)+(data|shared|runs)\b", code)
    assert not re.search(r"afhq", "".join(t for o in notebook.outputs for t in texts(o)), re.I)


def test_kernel(notebook):
    assert notebook.json["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook.json["nbformat"] == 4
    ids = [cell["id"] for _, _, cell in notebook.cells]
    assert len(set(ids)) == len(ids)
