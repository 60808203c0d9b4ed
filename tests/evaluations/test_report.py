"""Test evaluations.report by parsing the pages of small runs as a browser does."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluations import curves, nearest, report
from evaluations.metrics_files import compare_settings, select_identity
from evaluations.plots import make_training_panels, reduce_points, smooth
from evaluations.runs import read_run

VOID_TAGS = {"img", "meta"}
SAMPLING = {
    "checkpoint": "",
    "ema_sha256": "e" * 64,
    "model": "SiT-Ti/2",
    "step": 40,
    "images_seen": 320,
    "solver": "heun",
    "num_steps": 25,
    "cfg_scale": 1.5,
    "vae": "some/vae",
    "vae_fingerprint": "f" * 64,
}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        text: Source of the page.
        elements: Tag, attributes and text of each element, in the order of the end tags.
        open_elements: Elements whose end tag has not been parsed yet.
    """

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text()
        self.elements = []
        self.open_elements = []
        self.feed(self.text)
        assert not self.open_elements

    def handle_starttag(self, tag, attributes):
        self.open_elements.append((tag, dict(attributes), []))
        if tag in VOID_TAGS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        name, attributes, parts = self.open_elements.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(parts)))

    def handle_data(self, data):
        for _, _, parts in self.open_elements:
            parts.append(data)

    def find_all(self, tag, class_=None):
        """Return the attributes and the text of each element with this tag and class."""
        elements = [(attributes, text) for name, attributes, text in self.elements if name == tag]
        return [
            (attributes, text)
            for attributes, text in elements
            if class_ is None or class_ in (attributes.get("class") or "").split()
        ]

    def find_texts(self, tag, class_=None):
        return [text for _, text in self.find_all(tag, class_)]


def make_run(folder, steps=6, **changes):
    """Write a run in the format of train.py: log, args.json, config.json and previews."""
    folder.mkdir(parents=True)
    rows = [
        {
            "schema": 2,
            "step": 10 * k,
            "images": 80 * k,
            "denoising": 1.25 / k,
            "grad_norm": 0.5,
            "skipped": 0,
            "images_per_s": 100.0,
        }
        for k in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {
        "exp_name": folder.name,
        "model": "SiT-Ti/2",
        "align": ["none"],
        "align_depth": [],
        "batch_size": 8,
        "seed": 0,
        **changes,
    }
    (folder / "args.json").write_text(json.dumps(args))
    config = {
        "model_name": "SiT-Ti/2",
        "model": {"depth": 4},
        "data": {"class_names": ["shirt", "bag"], "count": 24},
    }
    (folder / "checkpoints/0000040").mkdir(parents=True)
    (folder / "checkpoints/0000040/config.json").write_text(json.dumps(config))
    (folder / "samples").mkdir()
    for step in range(10, 130, 10):
        Image.new("RGB", (60, 40), (step, 0, 0)).save(folder / f"samples/{step:07d}.png")
    return folder


def make_metrics(path, run, metrics, **changes):
    """Write a metrics.json for samples of a run, and return the content."""
    path.parent.mkdir(exist_ok=True)
    sampling = SAMPLING | {"checkpoint": str(run / "checkpoints/0000040")} | changes
    content = {
        "metrics": metrics,
        "samples": str(path).replace(".metrics.json", ".npz"),
        "samples_sha256": str(path),
        "count": 50,
        "features": {"fashion": "a" * 64},
        "reference": f"{run}.zip",
        "reference_sha256": "b" * 64,
        "sampling": sampling,
    }
    path.write_text(json.dumps(content))
    return content


def append_evaluations(run, settings):
    """Append an evaluation per setting to a run's log, in the format of --eval-every."""
    with (run / "metrics.jsonl").open("a") as file:
        for k, setting in enumerate(settings, 1):
            row = {"step": 10 * k, "images": 80 * k, "FD-fashion": 9.5 - k, "precision": None}
            row["evaluation"] = {"ema_decay": 0.9, "reference_sha256": "c" * 64, **setting}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def write_page(call, tmp_path, monkeypatch):
    """Return a function that writes a report with the given flags and returns the parsed page."""
    monkeypatch.chdir(tmp_path)

    def run(*flags) -> Page:
        code, out = call(report, *flags, "--out", tmp_path / "r.html")
        assert code == 0, out
        return Page(tmp_path / "r.html")

    return run


def test_page_is_complete_and_self_contained(write_page, tmp_path):
    a = make_run(tmp_path / "exps/a")
    b = make_run(tmp_path / "exps/b")
    append_evaluations(a, [{}, {}])
    make_metrics(tmp_path / "samples/s.metrics.json", a, {"FD-fashion": 3.0})
    Image.new("RGB", (2000, 100)).save(tmp_path / "samples/s.png")
    Image.new("RGB", (60, 40)).save(b / "samples/real.png")
    page = write_page(a, b)
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert attributes.get("src", "data:").startswith("data:image/") or "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("xlink:href", "#").startswith("#")
        assert not any(key.startswith("on") for key in attributes)
        assert tag != "img" or attributes["alt"]
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text
    assert page.find_all("html")[0][0]["lang"] == "en" and page.find_texts("title")[0].startswith(
        "a, b"
    )
    assert any(attributes.get("name") == "viewport" for attributes, _ in page.find_all("meta"))
    sections = {attributes["id"] for attributes, _ in page.find_all("section")}
    links = {attributes["href"][1:] for attributes, _ in page.find_all("a")}
    assert links == sections and len(sections) == 5
    captions = page.find_texts("figcaption")
    assert sum(caption.startswith("step ") for caption in captions) == 16  # 16 of 24 previews
    assert captions.count("step 10 · 80 images") == captions.count("step 120 · 960 images") == 2
    assert "a: s" in captions and captions.count("training images") == 1
    charts = [
        attributes["aria-label"].partition(" over ")[0]
        for attributes, _ in page.find_all("svg", "chart")
    ]
    assert charts == [
        "denoising loss",
        "gradient norm before clipping",
        "images per second",
        "FD-fashion",
    ]
    assert len(page.text) < 200_000


def test_charts_share_the_page_without_conflicts(write_page, tmp_path):
    """Ids are unique, colours follow light and dark mode, and text has the font of the page."""
    runs = [make_run(tmp_path / f"exps/{name}") for name in "ab"]
    page = write_page(*runs)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.find_all("style")) == 1
    svg = page.text[page.text.index('<svg class="chart"') :]
    svg = svg[: svg.index("</svg>")]
    assert "var(--c0)" in svg and "var(--c1)" in svg and "var(--soft)" in svg
    assert "#a0" not in svg and "font-family" not in svg


def test_page_shows_the_values_of_the_files(write_page, tmp_path):
    run = make_run(
        tmp_path / "exps/a",
        align=["sra2"],
        align_depth=[2],
        align_loss=["cosine"],
        align_weight=[0.5],
    )
    append_evaluations(run, [{}])
    metrics = {"FID": 8.314159265358979, "precision": 0.68125, "recall": None}
    content = make_metrics(run / "metrics.json", run, metrics, unknown_key="shown as well")
    content |= {
        "intervals": {"FID": [8.2, 8.4321]},
        "by_count": {"FID": {"10": 12.345678, "50": 8.314159265358979}},
    }
    (run / "metrics.json").write_text(
        json.dumps(content | {"warning": "FID of 50 samples is biased"})
    )
    page = write_page(run)
    values = {attributes["value"] for attributes, _ in page.find_all("data")}
    assert {
        repr(metrics["FID"]),
        "0.68125",
        "8.2",
        "8.4321",
        "12.345678",
        repr(1.25 / 6),
        "100.0",
        "8.5",
    } <= values
    assert page.find_texts("p", "warning") == ["a (metrics.json): FID of 50 samples is biased"]
    assert (
        "SiT-Ti/2 · sra2: block 2, cosine, weight 0.5 · 60 steps · 480 images seen"
        in page.find_texts("span", "soft")
    )
    assert "shown as well" in page.find_texts("span") and "first 10" in page.find_texts("th")


def test_old_and_new_columns_of_a_method_form_one_curve(write_page, tmp_path):
    run = make_run(tmp_path / "exps/a", align=["sra2", "repa"])
    old = {"step": 1, "images": 8, "align": 0.5, "align_repa": 0.75}
    new = {"schema": 2, "step": 2, "images": 16, "align/sra2": 0.25, "align/repa": 0.625}
    (run / "metrics.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")
    (panel,) = [
        panel for panel in make_training_panels([read_run("a", run)]) if panel.quantity == "align"
    ]
    assert [(series.label, [*series.y]) for series in panel.series] == [
        ("a, sra2", [0.5, 0.25]),
        ("a, repa", [0.75, 0.625]),
    ]
    assert [series.style_index for series in panel.series] == [0, 1]
    (label,) = [
        attributes["aria-label"] for attributes, _ in write_page(run).find_all("svg", "chart")
    ]
    assert label == "alignment loss over images seen: a, sra2 ends at 0.25; a, repa ends at 0.625"


def test_differing_fields_are_marked_and_prevent_ranking(write_page, tmp_path):
    a = make_run(tmp_path / "exps/a")
    b = make_run(tmp_path / "exps/b", seed=1)
    make_metrics(
        tmp_path / "samples/a.metrics.json", a, {"FID": 3.0, "recall": 0.5}, step=10, images_seen=80
    )
    make_metrics(tmp_path / "samples/b.metrics.json", b, {"FID": 2.0, "recall": 0.6}, num_steps=250)
    # The run of this file is not in the report.
    make_metrics(tmp_path / "samples/c.metrics.json", tmp_path / "exps/c", {"FID": 1.0})
    page = write_page(a, b)
    assert page.find_texts("p", "verdict") == ["Not comparable: num_steps 25 / 250."]
    assert page.find_texts("th", "differs") == ["num_steps"] and not page.find_all("td", "best")
    # The last two values are those of the flag --seed.
    assert page.find_texts("td", "differs") == ["25", "250", "0", "1"]
    make_metrics(tmp_path / "samples/b.metrics.json", b, {"FID": 2.0, "recall": 0.6})
    page = write_page(a, b, "--metrics", tmp_path / "samples/c.metrics.json")
    assert not page.find_all("p", "verdict") and page.find_texts("td", "best") == ["0.600", "1.000"]
    for name in "ab":
        path = tmp_path / f"samples/{name}.metrics.json"
        content = json.loads(path.read_text())
        # This interval contains the other FID.
        path.write_text(json.dumps(content | {"intervals": {"FID": [1.9, 3.1]}}))
        assert write_page(a, b).find_texts("td", "best") == ["0.600"]
        path.write_text(json.dumps(content))
    (tmp_path / "samples/b.metrics.json").write_text(json.dumps(content | {"sampling": {}}))
    page = write_page(a, b, "--metrics", tmp_path / "samples/b.metrics.json")
    assert "with unknown settings" in page.find_texts("p", "warning")[0]
    assert page.find_all("p", "verdict")


def test_identity_excludes_results_and_the_model():
    content = {
        "metrics": {"FID": 1},
        "warning": "w",
        "samples": "s",
        "samples_sha256": "1",
        "count": 5,
        "new": {"key": 1},
        "sampling": {"step": 1, "checkpoint": "c", "num_steps": 5},
        "reference": "r",
        "reference_sha256": "h",
    }
    assert select_identity(content) == {
        "count": 5,
        "new.key": 1,
        "sampling.num_steps": 5,
        "reference_sha256": "h",
    }
    assert select_identity({"reference": "r"}) == {
        "reference": "r"
    }  # without a hash, the path identifies the reference
    rounding = {
        "versions": {"torch": "2"},
        "feature_batch_size": 9,
        "sampling": {"machine": {"device": "cpu"}, "num_steps": 5},
    }
    assert select_identity(rounding) == {"sampling.num_steps": 5}


def test_unknown_sampling_neither_hides_nor_adds_a_difference(write_page, tmp_path):
    """Samples of other code do not affect the comparison of other files, in any order."""
    known_settings = [
        {"count": 5, "sampling.num_steps": 5, "sampling.atol": None},
        {"count": 5, "sampling.num_steps": 5},
    ]
    for rows in ([{"count": 5}, *known_settings], [*known_settings, {"count": 5}]):
        assert not compare_settings(rows).differing
    other = {"count": 5, "sampling.num_steps": 6}
    assert compare_settings([{"count": 5}, known_settings[0], other]).differing == {
        "sampling.num_steps": [5, 6]
    }
    assert compare_settings([{"a": 1, "b": None}, {"a": 1, "c": 2}]) == (
        {"c": [None, 2]},
        {"a": 1, "b": None},
    )
    assert compare_settings([{"a": 1}, {"a": "2"}]).differing == {"a": [1, "2"]}

    files = [
        {"metrics": {"FID": 1.0}, "count": 5},
        {"metrics": {"FID": 2.0}, "count": 5, "sampling": {"atol": None, "solver": "e"}},
    ]
    for order in (files, files[::-1]):
        paths = [tmp_path / f"{index}.metrics.json" for index in range(2)]
        for path, content in zip(paths, order):
            path.write_text(json.dumps(content))
        run = tmp_path / "exps/a"
        page = write_page(run if run.exists() else make_run(run), "--metrics", *paths)
        assert "atol" in page.find_texts("th")
        assert page.find_texts("p", "verdict")[0].startswith("Possibly not comparable")


def test_evaluations_of_different_settings_are_not_connected(write_page, tmp_path):
    run = make_run(tmp_path / "exps/a")
    settings = [{"num_steps": n} for n in (20, 20, 40)]
    # The same reference under another path is the same setting.
    append_evaluations(run, [*settings, {"num_steps": 20, "reference": "x"}])
    page = write_page(run)
    labels = [attributes["aria-label"] for attributes, _ in page.find_all("svg", "chart")]
    (label,) = [label for label in labels if label.startswith("FD-fashion")]
    assert "num_steps 20 ends at 5.5" in label and "num_steps 40 ends at 6.5" in label
    svg = page.text[page.text.index('aria-label="FD-fashion') :]
    svg = svg[: svg.index("</svg>")]
    paths = re.findall(r'<path d="([^"]*)" style="fill: none;[^"]*stroke: var\(--c0\)', svg)
    assert [(path.count("M"), path.count("L")) for path in paths] == [(1, 2), (1, 0)]
    assert len(re.findall(r'<use [^>]*"fill: var\(--c0\)', svg)) == 4
    settings_legend = page.find_texts("div", "legend")[1]
    assert settings_legend.split() == ["num_steps", "20", "num_steps", "40"]
    assert "ema_decay 0.9 · reference_sha256 cccccccccccc…" in page.find_texts("p", "soft")
    assert not any(label.startswith("precision") for label in labels)  # null everywhere


def test_hostile_names_remain_text(write_page, tmp_path):
    hostile_text = "<script>alert(1)<b onmouseover='x'>"
    run = make_run(tmp_path / "exps" / hostile_text, seed=hostile_text)
    (run / "checkpoints/0000040/config.json").write_text(
        json.dumps({"data": {"class_names": [hostile_text]}, hostile_text: 1})
    )
    append_evaluations(run, [{hostile_text: hostile_text}, {"x": f'"{hostile_text}'}])
    with (run / "metrics.jsonl").open("a") as file:
        row = {
            "step": 60,
            "images": 480,
            hostile_text: 3.0,
            "evaluation": {hostile_text: hostile_text},
        }
        file.write(json.dumps(row) + "\n")
    content = make_metrics(
        run / "metrics.json", run, {hostile_text: 1.0}, **{hostile_text: hostile_text}
    )
    (run / "metrics.json").write_text(
        json.dumps(content | {"warning": hostile_text, "by_count": {hostile_text: {"1": 1.0}}})
    )
    page = write_page(run)
    assert not page.find_all("script")
    assert (
        hostile_text in page.find_texts("title")[0]
        and hostile_text in page.find_texts("p", "warning")[0]
    )
    assert not any(key.startswith("on") for _, attributes, _ in page.elements for key in attributes)
    assert f'["{hostile_text}"]' in page.find_texts("span") and "<script" not in page.text


def test_empty_sections_name_the_command_that_fills_them(write_page, tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    rows = [
        {"step": k, "images": k, "denoising": value}
        for k, value in enumerate((None, 1.0, float("nan"), 2.0), 1)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5'
    )
    page = write_page(run)
    lines = " ".join(page.find_texts("p", "absent"))
    for word in (
        "--eval-every",
        "evaluations.evaluate",
        "--sampling-steps",
        "--nearest",
        "args.json",
        "checkpoint",
    ):
        assert word in lines
    (run / "samples").mkdir()
    (run / "samples/0000001.png").write_bytes(b"not an image")
    assert "0000001.png cannot be read" in " ".join(write_page(run).find_texts("p", "absent"))


def test_curves_of_long_runs_are_reduced_and_keep_spikes(write_page, tmp_path):
    run = make_run(tmp_path / "exps/long", steps=20_000)
    assert len(write_page(run).text) < 80_000
    y = np.sin(np.arange(100_000.0))
    y[777] = 100
    y[778:50_000] = np.nan
    x, reduced = reduce_points(np.arange(100_000.0), y)
    assert len(x) <= 240 and np.all(np.diff(x) > 0)
    assert np.nanmax(reduced) == 100 and np.isnan(reduced).any()


def test_running_median_ignores_spikes_and_keeps_gaps():
    x = np.arange(1000.0)
    y = 5 - x
    spiky_y = np.where(x == 400, 1e6, np.where(x == 700, np.nan, y))
    median = smooth(x, spiky_y, 1000)[1]
    assert np.isnan(median[700]) and median[0] == 5
    assert np.nanmax(np.abs(median - y)[:-10]) <= 1
    assert len(smooth(x, y)[0]) == 240


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_is_named(call, tmp_path, monkeypatch, package):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)
    code, out = call(report, run, "--out", tmp_path / "r.html")
    message = (
        f"error: evaluations.report requires {package}; install it with pip install {package}\n"
    )
    assert (code, out) == (2, message)
    code, out = call(curves, run)
    assert code == (2 if package == "matplotlib" else 0), out


def make_blurry_images(count, seed):
    """Return blurry images that differ from each other, (n, 32, 32, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = [
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR) for pixels in small
    ]
    return np.stack([np.asarray(image) for image in images])


def test_only_the_copied_training_image_is_close(write_page, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK_SIZE", 17)  # the copied image is in the second block
    run = make_run(tmp_path / "exps/a")
    make_metrics(tmp_path / "samples/s.metrics.json", run, {"FD-fashion": 3.0})
    train = make_blurry_images(50, 0)
    samples = make_blurry_images(20, 1) // 4 + 96
    samples[8] = train[31]
    np.savez(tmp_path / "samples/s.npz", arr_0=samples)
    np.savez_compressed(tmp_path / "train.npz", arr_0=train)
    for i, image in enumerate(train):
        (tmp_path / "tree/c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"tree/c/{i:02d}.png")
    for source in ("train.npz", "tree"):
        page = write_page(run, "--nearest", tmp_path / source)
        # The page shows 4 closest and 16 evenly spaced samples, each with five neighbours.
        alts = [attributes["alt"] for attributes, _ in page.find_all("img")[-120:]]
        assert alts[0] == "sample 8" and alts[1].startswith("training image 31, at distance ")
        assert "5.0% of 20 samples" in page.text.replace("<b>", "").replace("</b>", "")
        assert len(page.find_all("div", "match")) == 20
        # The copy is among the closest samples and among the evenly spaced samples.
        assert len(page.find_all("span", "close")) == 2


def test_nearest_neighbours_equal_those_of_the_full_distance_matrix():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 5)).astype(np.float32)
    queries = np.concatenate((rng.normal(size=(6, 5)).astype(np.float32), train[[3, 30]]))
    self_indices = np.array([-1] * 6 + [3, 30])
    blocks = np.split(train, [7, 20])
    distances, indices = nearest.find_nearest(blocks, queries, self_indices, 3)
    expected = np.linalg.norm(queries[:, None] - train[None], axis=-1)
    expected[[6, 7], [3, 30]] = np.inf  # the queries themselves
    assert np.array_equal(indices, expected.argsort(1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :3], rtol=1e-5)


def test_user_errors_are_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    damaged = make_run(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "images": 1}\n{"step"\n')
    make_metrics(tmp_path / "samples/s.metrics.json", run, {})
    np.savez(tmp_path / "samples/s.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((9, 32, 32, 3)))
    cases = [
        (["nowhere"], "nowhere is not a run"),
        (["empty"], "empty is not a run"),
        (["damaged"], "damaged/metrics.jsonl: line 2 is damaged"),
        ([run, "--out", "r.txt"], "--out r.txt must end in .html"),
        ([run, "--metrics", "none.json"], "--metrics none.json does not exist"),
        ([run, "--metrics", "list.json"], "list.json is damaged"),
        ([run, "--metrics", "other.json"], "other.json is not a metrics.json"),
        ([run, "--nearest", "none"], "--nearest none does not exist"),
        ([run, "--nearest", "large.npz"], "--nearest large.npz contains 9 images of 16x16"),
        ([run, "--nearest", "float.npz"], "must be uint8"),
    ]
    for flags, message in cases:
        code, out = call(report, *flags)
        assert code == 2 and message in out and out.count("\n") == 1, (flags, out)
    assert not (tmp_path / "report.html").exists()
