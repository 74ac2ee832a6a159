"""The report: one page that holds everything, says what was measured, and reads well in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from matplotlib.image import imread

from pyrovae import plots
from pyrovae.cli.runs import RunFolder
from pyrovae.data import load
from pyrovae.evaluation import ALSO, full_evaluation

SMALL = {
    "collapse": {"num_samples": 2},
    "kl_decomposition": {"num_samples": 2},
    "inference_gaps": {"num_samples": 30, "num_steps": 8, "num_particles": 2},
    "annealed_evidence": {"num_temperatures": 5, "num_chains": 3, "num_leapfrog": 2},
    "bidirectional_evidence": {"num_data": 4, "num_temperatures": 5, "num_chains": 3, "num_leapfrog": 2},
    "simulation_based_calibration": {"num_simulations": 20, "num_draws": 9},
    "posterior_predictive_check": {"num_replicates": 10},
}
FEW = ["--num-data", "30", "--num-samples", "40"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Replace the measurements by the same functions with few samples and steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in SMALL.items():
            function, most = ALSO[name]
            patch.setitem(full_evaluation.ALSO, name, (partial(function, **settings), most))
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on images, with dead units."""
    run = tmp_path_factory.mktemp("report") / "digits"
    options = ["--set", "latent_dim=8", "--set", "hidden_dims=10", "--epochs", "3", "--num-samples", "20"]
    assert call("fit", "vae", *options, "-o", run) == 0
    return run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "comparison"
    assert call("compare", "gmm", "--data", "faithful", "--epochs", "2", "-o", folder) == 0
    return folder


@pytest.fixture(scope="module")
def both(digits, comparison):
    """A page about a run and a comparison, with everything in it."""
    page = digits.parent / "both.html"
    assert call("report", digits, "--compare", comparison, "--all", *FEW, "-o", page) == 0
    return page


@pytest.fixture
def mine(digits):
    """A copy of the run that may be changed."""
    return Path(shutil.copytree(digits, "mine"))


@pytest.fixture
def table():
    """A user's data, in a file whose name must be escaped in HTML."""
    file = Path("a<b>&'x'.csv")
    rows = np.random.default_rng(0).normal(size=(40, 2)) * [1, 10] + [5, 50]
    np.savetxt(file, rows, delimiter=",", header="<i>height,$weight$", comments="")
    return file


class Page(HTMLParser):
    """What is on a page: tags with their attributes, text by tag, headings in order."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.texts, self.headings, self._open = [], [], [], []
        self.source = Path(file).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []  # every tag is closed, in order

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self._open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.texts.append((self._open[-1] if self._open else "", data))
        if self._open and re.fullmatch(r"h\d", self._open[-1]):
            level, text = self.headings.pop()
            self.headings.append((level, text + data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(text for _, text in self.texts).split())

    @property
    def sections(self):
        return [text for level, text in self.headings if level == 2]


def read(run, *options):
    """The page of a run."""
    out = Path("page.html")
    assert call("report", run, *FEW, "--also", "collapse", "--overwrite", "-o", out, *options) == 0
    return Page(out)


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """The page of the run, with its collapse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        return read(digits)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take the most time."""
    for name in ("pyrovae.cli.report", "pyrovae.plots.run_pictures"):
        monkeypatch.setattr(f"{name}.pictures_of_run", lambda *_: {})
        monkeypatch.setattr(f"{name}.pictures_of_scores", lambda *_: {})


# Properties of every page


@pytest.fixture(scope="module")
def page(both):
    return Page(both)


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'"data:[^"]*"', "", page.source))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "a", "form", "base"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name in attributes), tag
        assert tag == "img" or "src" not in attributes
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert len(page.all("main")) == len(page.all("title")) == 1


def test_pictures_are_whole_and_have_words(page):
    images = page.all("img")
    assert len(images) >= 9
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        pixels = imread(io.BytesIO(base64.b64decode(data, validate=True)), format="png")
        assert pixels.shape[:2] == (int(image["height"]), int(image["width"]))
        assert pixels.std() > 0.02  # not blank
        assert len(image["alt"]) > 30
        assert image["alt"].endswith(".")
    assert len({image["alt"] for image in images}) == len(images)


def test_headings_and_tables(page):
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    assert len(page.sections) == len(set(page.sections))
    for table in re.findall(r"<table>.*?</table>", page.source, re.S):
        rows = re.findall(r"<tr>(.*?)</tr>", table)
        assert all(row.startswith('<th scope="') for row in rows)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1
    for table in page.source.split("<thead>")[1:]:
        header = table[: table.index("</thead>")]
        assert re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", header)
        assert "></th>" not in header


def test_scores_are_those_of_the_run(digits, page):
    folder = RunFolder(digits)
    config, pair, data = folder.load()
    generator = torch.Generator().manual_seed(config.seed)
    rows = data.test[torch.randperm(len(data.test), generator=generator)[:30]]
    scores = full_evaluation.evaluate(
        pair, rows, num_samples=40, also="all", binarize=True, device="cpu", seed=config.seed
    )
    cells = [text for tag, text in page.texts if tag in ("th", "td")]
    for name, value, remark in scores.rows():
        at = cells.index(name.strip())
        assert cells[at + 1] == value
        assert not remark or cells[at + 2] == remark
    assert f"Log evidence {scores.log_evidence:.3f} nats per datum, on test rows." in page.text
    assert "30 of 360 test rows, drawn at random; 40 importance samples each" in page.text
    for result in scores.also.values():
        for line in repr(result).splitlines()[:-1]:
            assert line.replace("NOTE: ", "Note: ").strip() in html.unescape(page.source), line
    assert "Does not apply to this pair: Mixture scores." in page.text


def test_the_facts_of_the_run(digits, page):
    facts = dict(re.findall(r'<th scope="row">([^<]+)</th><td>([^<]+)</td>', page.source))
    assert facts["pair"] == "VAE"
    assert html.unescape(facts["options"]) == "latent_dim = 8, hidden_dims = [10]"
    parameters = sum(p.numel() for p in RunFolder(digits).load()[1].parameters())
    assert facts["parameters"] == f"{parameters:,}"
    assert "1,437 train and 360 test rows" in facts["data"]
    assert facts["convention"].endswith("Pixels drawn as 0 or 1 anew at every use.")
    assert facts["loss"] == "TraceMeanField_ELBO"
    assert facts["training"].startswith("3 of 3 epochs, batches of 128, Adam from learning rate 0.003")
    assert facts["seed"] == "0"
    assert re.fullmatch(r"\d+\.\d s", facts["time"])


def test_a_comparison_has_its_table_and_pictures(comparison, page):
    text = page.text
    for line in (comparison / "comparison.md").read_text().splitlines():
        if line.startswith("| ") and "---" not in line:
            for cell in line.strip("| ").split(" | "):
                assert cell.strip() in text
    pictures = {file.name for file in comparison.glob("*.png")}
    for name in pictures:
        assert base64.b64encode((comparison / name).read_bytes()).decode() in page.source
    assert {"comparison.png", "responsibilities.png"} <= pictures


# One page about a run, a comparison or both


def test_a_comparison_alone(comparison):
    assert call("report", "--compare", comparison, "-o", "page.html") == 0
    page = Page("page.html")
    assert page.headings == [(1, "gmm on faithful"), (2, "Methods"), (2, "Pictures")]
    assert page.text.count("gmm on faithful:") == 0  # said once


def test_a_run_alone(alone):
    assert alone.headings[0] == (1, "VAE on digits")
    expected = ["What was fitted", "Scores", "Training", "The model and its latents"]
    assert alone.sections == [*expected, "The guide and the latents, measured"]
    assert [text for level, text in alone.headings if level == 3] == ["Collapse"]


def test_the_run_comes_before_the_comparison(page):
    assert page.headings[0] == (1, "VAE on digits")
    at = page.sections.index("gmm on faithful")
    assert page.sections[at:] == ["gmm on faithful", "Methods", "Pictures"]
    assert at == 5


def test_by_default_the_page_lies_in_the_run_and_leaves_out_annealing(capsys, no_pictures, mine):
    assert call("report", "mine", *FEW) == 0
    assert capsys.readouterr().out == f"Wrote {Path('mine/report.html')}\n"
    page = Page("mine/report.html")
    titles = {text for level, text in page.headings if level == 3}
    assert titles == {
        "Collapse",
        "KL decomposition",
        "Inference gaps",
        "Simulation based calibration",
        "Posterior predictive check",
    }
    assert list(mine.glob("*.tmp")) == []


def test_the_same_run_gives_the_same_page(digits, alone):
    assert read(digits).source == alone.source


# Odd runs


def test_history_is_read_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_history() == []
    history = [{"epoch": 1, "train_bound": -3.25}, {"epoch": 2, "train_bound": -1e-9, "validation_bound": -2.0}]
    folder.write_history(history)
    assert folder.read_history() == history


def test_test_rows_are_scored_or_training_rows():
    digits, faithful = load("digits"), load("faithful")
    which, rows, labels = digits.scored
    assert which == "test"
    assert rows is digits.test
    assert labels is digits.labels_test
    assert faithful.scored == ("train", faithful.train, faithful.labels_train)


def test_a_run_without_history_or_scores(no_pictures, mine):
    (mine / "history.csv").unlink()
    (mine / "scores.json").unlink()
    page = read(mine)
    assert "Training" not in page.sections
    assert "up to 3 epochs" in page.text
    assert "time" not in [text for tag, text in page.texts if tag == "th"]


def test_a_run_that_was_stopped(no_pictures, mine):
    (mine / "weights.safetensors").unlink()  # the checkpoint has them
    (mine / "history.csv").unlink()
    assert read(mine).headings[0] == (1, "VAE on digits")


def test_a_checkpoint_that_is_damaged_or_gone_is_no_obstacle(no_pictures, mine):
    for content in (b"damaged", None):
        file = mine / "checkpoint.safetensors"
        file.unlink() if content is None else file.write_bytes(content)
        assert "was stopped" not in read(mine).text


def test_rows_without_a_test_split_labels_and_sampling(table):
    assert call("fit", "gmm", "--data", table, "--epochs", 2, "--num-samples", 10, "-o", "run") == 0
    page = read("run", "--also", "mixture_scores", "--also", "inference_gaps")
    assert "30 of 40 train rows, drawn at random; exact: nothing is sampled" in page.text
    assert re.search(r"Does not apply to this pair: [A-Z]", page.text)
    alts = " ".join(image["alt"] for image in page.all("img"))
    assert "contours of the fitted density" in alts
    assert "Pareto" not in alts
    # What a user wrote is escaped.
    assert page.headings[0] == (1, f"GMM on {table.name}")
    assert "<b>" not in page.source
    assert "a&lt;b&gt;&amp;" in page.source
    assert not {tag for tag, _ in page.tags} & {"b", "i"}


def test_labels_reach_the_mixture(no_pictures):
    assert call("fit", "gmm", "--data", "iris", "--epochs", 2, "--num-samples", 10, "-o", "run") == 0
    assert "adjusted Rand index" in read("run", "--also", "mixture_scores").text


def test_a_pair_of_ones_own(no_pictures):
    assert call("new", "mypair.py") == 0
    text = Path("mypair.py").read_text()
    odd = text.replace("A small variational autoencoder over", "<script>alert(1)</script> & pixels,")
    assert odd != text
    Path("mypair.py").write_text(odd)
    assert call("fit", "mypair.py:MyPair", "--data", "digits", "--epochs", 1, "--num-samples", 10, "-o", "run") == 0
    page = read("run", "--also", "mixture_scores")
    assert page.headings[0] == (1, "MyPair on digits")
    assert "<script>alert(1)</script> & pixels," in page.text
    assert "<script" not in page.source
    assert "Does not apply to this pair: " in page.text


GLOBAL = """
import pyro, torch
import pyro.distributions as dist
from pyrovae import Pair

class Shared(Pair):
    def __init__(self, data_dim):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(data_dim))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(self.loc), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, 0.3).to_event(1))
"""


def test_a_run_with_a_global_latent_has_a_page(digits):
    Path("own.py").write_text(GLOBAL)
    assert call("fit", "own.py:Shared", "--data", "digits", "--epochs", 1, "--num-samples", 30, "-o", "run") == 0
    assert call("report", "run", *FEW, "-o", "page.html") == 0
    page = Page("page.html")
    assert "Not drawn" not in page.text
    assert "a global latent: one weight for all the data" in page.text
    alts = " ".join(image["alt"] for image in page.all("img"))
    assert "each row changes" not in alts  # no datum has a value of it
    assert "Pareto" not in alts  # one k̂ makes no histogram
    assert "Does not apply to this pair: Collapse, KL decomposition, Inference gaps, " in page.text


# When something fails


def test_a_picture_that_fails_is_a_notice(monkeypatch, digits, alone):
    def fail(*args, **options):
        raise RuntimeError("no <ink>")

    monkeypatch.setattr(plots, "plot_samples", fail)
    monkeypatch.setattr(plots, "plot_kl", fail)
    page = read(digits)
    notices = re.findall(r'<p class="notice">(Not drawn[^<]*)</p>', page.source)
    assert len(notices) == 2
    assert all(notice.endswith("RuntimeError: no &lt;ink&gt;") for notice in notices)
    assert len(page.all("img")) == len(alone.all("img")) - 2


@pytest.mark.parametrize("when", ["writing", "replacing", "measuring"])
def test_a_failure_leaves_the_old_page_whole(capsys, monkeypatch, no_pictures, mine, when):
    old = mine / "report.html"
    old.write_text("the old one")

    def fail(*args, **options):
        raise OSError("no space left on device")

    if when == "measuring":
        monkeypatch.setattr("pyrovae.cli.report.evaluate", fail)
    elif when == "replacing":
        monkeypatch.setattr(os, "replace", fail)
    else:
        write = Path.write_bytes

        def half(self, content):
            write(self, content[: len(content) // 2])
            fail()

        monkeypatch.setattr(Path, "write_bytes", half)
    files = sorted(mine.iterdir())
    assert call("report", mine, *FEW, "--also", "collapse", "--overwrite") == 2
    assert "no space left on device" in capsys.readouterr().err
    assert sorted(mine.iterdir()) == files
    assert old.read_bytes() == b"the old one"


def test_a_page_is_not_replaced_unasked(capsys, monkeypatch, no_pictures, mine):
    (mine / "report.html").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("pyrovae.cli.report.evaluate", lambda *_, **__: pytest.fail("measured before the check"))
        assert call("report", mine) == 2
    assert re.search(r"--out: .*report.html exists. Pass --overwrite", capsys.readouterr().err)
    assert (mine / "report.html").read_text() == "mine"
    assert call("report", mine, *FEW, "--also", "collapse", "--overwrite") == 0
    assert (mine / "report.html").read_text().startswith("<!DOCTYPE html>")


def damaged(folder):
    record = json.loads((folder / "comparison.json").read_text())
    record["cells"][0]["colour"] = "red"
    (folder / "comparison.json").write_text(json.dumps(record))


def unfinished(folder):
    record = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(record | {"finished": False}))


def emptied(folder):
    (folder / "comparison.json").write_text("{}")


BAD_COMPARISONS = {
    damaged: r"--compare: copy/comparison.json is damaged \(.*colour",
    unfinished: r"--compare: the comparison in copy is not finished. Go on with: pyrovae compare --resume copy",
    emptied: r"--compare: copy/comparison.json is damaged or no comparison",
}


@pytest.mark.parametrize("spoil", BAD_COMPARISONS)
def test_a_folder_that_holds_no_comparison_is_refused(capsys, comparison, spoil):
    spoil(Path(shutil.copytree(comparison, "copy")))
    assert call("report", "--compare", "copy") == 2
    assert re.search(BAD_COMPARISONS[spoil], capsys.readouterr().err)
    assert not Path("copy/report.html").exists()


# In a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
WIDTHS = (390, 1200)  # a phone, a desk


def chrome(profile, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=4000", *map(str, arguments)], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


LOOK = """
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth;
  const inside = e => { const r = e.getBoundingClientRect(); return r.left >= 0 && r.right <= width + 0.5; };
  const scrolls = e => e.closest(".wide, pre") !== null;
  const images = [...page.images];
  const written = [...page.body.querySelectorAll("*")].filter(e => [...e.childNodes].some(
    n => n.nodeType === 3 && n.textContent.trim()));
  return {
    width, scrollWidth: root.scrollWidth,
    images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    inside: images.filter(inside).length,
    undistorted: images.filter(i => { const r = i.getBoundingClientRect();
      return Math.abs(r.width / r.height - i.naturalWidth / i.naturalHeight) < 0.02; }).length,
    outside: written.filter(e => !inside(e) && !scrolls(e)).map(e => e.textContent.slice(0, 40)),
    headings: page.querySelectorAll("h1, h2, h3").length,
    smallest: Math.min(...written.map(e => parseFloat(getComputedStyle(e).fontSize))),
    longest: Math.max(...[...page.querySelectorAll("p")].map(e => e.getBoundingClientRect().width)),
    reachable: [...page.querySelectorAll(".wide, pre")].every(e => e.tabIndex === 0),
  };
}
addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
});
"""


@pytest.fixture(scope="module")
def looked(both, tmp_path_factory):
    """Measure the page as a browser shows it, by width."""
    folder = tmp_path_factory.mktemp("browser")
    source = html.escape(both.read_text(encoding="utf-8"))
    frames = "".join(f'<iframe width="{w}" height="900" style="border:0" srcdoc="{source}"></iframe>' for w in WIDTHS)
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frames}<script>{LOOK}</script>', encoding="utf-8"
    )
    dump = chrome(folder / "profile", "--dump-dom", outer.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dump, re.S)
    assert found, dump[:500]
    return dict(zip(WIDTHS, json.loads(html.unescape(found[1])), strict=True))


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_screen(looked, page, width):
    seen = looked[width]
    assert seen["width"] == width
    assert seen["scrollWidth"] <= seen["width"]
    assert seen["outside"] == []
    assert seen["images"] == seen["loaded"] == seen["inside"] == seen["undistorted"] == len(page.all("img"))
    assert seen["headings"] == len(page.headings)
    assert seen["smallest"] >= 12
    assert seen["longest"] <= 1000  # lines that can be read
    assert seen["reachable"]  # what scrolls sideways does so from the keyboard


@browser
def test_a_browser_draws_the_page(both, folder):
    chrome("profile", "--window-size=1200,1600", "--screenshot=page.png", both.as_uri())
    pixels = imread("page.png")[..., :3]
    assert pixels.shape[:2] == (1600, 1200)
    ink = (pixels.mean(-1) < 0.9).mean(1)  # of each line of pixels
    assert 0.02 < ink.mean() < 0.6
    assert (ink[:800] > 0).mean() > 0.3  # lines of writing from the top
    assert (ink[800:] > 0).mean() > 0.3
    assert pixels[:, :4].min() > 0.9  # the margin


@browser
def test_a_browser_prints_the_page(both, folder):
    chrome("profile", "--no-pdf-header-footer", "--print-to-pdf=page.pdf", both.as_uri())
    data = Path("page.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert 4 < len(re.findall(rb"/Type\s*/Page\b(?!s)", data)) < 20
