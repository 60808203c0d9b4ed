import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations import nearest, report
from evaluations.report_charts import linear_ticks, log_ticks, smoothed, thinned
from evaluations.report_metrics import Measured, differing, identity, section, verdict

VOID = {"img", "meta"}
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
    """Elements as (tag, attributes, text within), in order of their ends; fails on tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text()
        self.elements, self.open = [], []
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append((tag, dict(attributes), []))
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        name, attributes, words = self.open.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(words)))

    def handle_data(self, data):
        for _, _, words in self.open:
            words.append(data)

    def all(self, tag, class_=None):
        """Attributes and text of every such element."""
        found = [(attributes, words) for name, attributes, words in self.elements if name == tag]
        return [
            each
            for each in found
            if class_ is None or class_ in (each[0].get("class") or "").split()
        ]

    def words(self, tag, class_=None):
        return [words for _, words in self.all(tag, class_)]


def make_run(folder, steps=6, **changes):
    """A run as train.py leaves it, with previews and a checkpoint's config.json."""
    folder.mkdir(parents=True)
    rows = [
        {
            "step": 10 * k,
            "images": 80 * k,
            "denoising": 1.25 / k,
            "align": None,
            "cosine": None,
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


def evaluate_while_training(run, settings):
    with open(run / "metrics.jsonl", "a") as file:
        for k, more in enumerate(settings, 1):
            row = {"step": 10 * k, "images": 80 * k, "FD-fashion": 9.5 - k, "precision": None}
            file.write(
                json.dumps(
                    row | {"evaluation": {"ema_decay": 0.9, "reference_sha256": "c" * 64, **more}}
                )
                + "\n"
            )


@pytest.fixture
def make(call, tmp_path, monkeypatch):
    """make(*flags) -> the Page."""
    monkeypatch.chdir(tmp_path)

    def run(*flags) -> Page:
        code, out = call(report, *flags, "--out", tmp_path / "r.html")
        assert code == 0, out
        return Page(tmp_path / "r.html")

    return run


def test_the_page_is_whole_and_needs_nothing_else(make, tmp_path):
    a, b = make_run(tmp_path / "exps/a"), make_run(tmp_path / "exps/b")
    evaluate_while_training(a, [{}, {}])
    make_metrics(tmp_path / "samples/s.metrics.json", a, {"FD-fashion": 3.0})
    Image.new("RGB", (2000, 100)).save(tmp_path / "samples/s.png")
    page = make(a, b)
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert attributes.get("src", "data:").startswith("data:image/") or "src" not in attributes
        assert attributes.get("href", "#").startswith("#") and not any(
            key.startswith("on") for key in attributes
        )
        assert tag != "img" or attributes["alt"]
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text
    assert page.all("html")[0][0]["lang"] == "en" and page.words("title")[0].startswith("a, b")
    assert any(attributes.get("name") == "viewport" for attributes, _ in page.all("meta"))
    ids = {attributes["id"] for attributes, _ in page.all("section")}
    assert {attributes["href"][1:] for attributes, _ in page.all("a")} == ids and len(ids) == 5
    captions = page.words("figcaption")
    assert sum(words.startswith("step ") for words in captions) == 16  # of 2 x 12 previews
    assert (
        captions.count("step 10 · 80 images") == captions.count("step 120 · 960 images") == 2
        and "a: s" in captions
    )
    charts = [
        attributes["aria-label"].partition(" over ")[0]
        for attributes, _ in page.all("svg", "chart")
    ]
    assert charts == [
        "denoising loss",
        "gradient norm before clipping",
        "images a second",
        "FD-fashion",
    ]
    assert len(page.text) < 200_000


def test_values_are_those_of_the_files(make, tmp_path):
    run = make_run(
        tmp_path / "exps/a",
        align=["sra2"],
        align_depth=[2],
        align_loss=["cosine"],
        align_weight=[0.5],
    )
    metrics = {"FID": 8.314159265358979, "precision": 0.68125, "recall": None}
    content = make_metrics(run / "metrics.json", run, metrics, surprise="told too")
    content |= {
        "intervals": {"FID": [8.2, 8.4321]},
        "by_count": {"FID": {"10": 12.345678, "50": 8.314159265358979}},
    }
    (run / "metrics.json").write_text(
        json.dumps(content | {"warning": "FID of 50 samples is biased"})
    )
    page = make(run)
    values = {attributes["value"] for attributes, _ in page.all("data")}
    assert {
        repr(metrics["FID"]),
        "0.68125",
        "8.2",
        "8.4321",
        "12.345678",
        repr(1.25 / 6),
        "100.0",
    } <= values
    assert page.words("p", "warning") == ["a (metrics.json): FID of 50 samples is biased"]
    assert (
        "SiT-Ti/2 · sra2: block 2, cosine, weight 0.5 · 60 steps · 480 images seen"
        in page.words("span", "soft")
    )
    assert "told too" in page.words("span") and "first 10" in page.words("th")


def test_fields_that_differ_are_marked_and_no_best_is_crowned_among_them(make, tmp_path):
    a, b = make_run(tmp_path / "exps/a"), make_run(tmp_path / "exps/b", seed=1)
    make_metrics(
        tmp_path / "samples/a.metrics.json", a, {"FID": 3.0, "recall": 0.5}, step=10, images_seen=80
    )
    make_metrics(tmp_path / "samples/b.metrics.json", b, {"FID": 2.0, "recall": 0.6}, num_steps=250)
    make_metrics(
        tmp_path / "samples/c.metrics.json", tmp_path / "exps/c", {"FID": 1.0}
    )  # of no run that is compared
    page = make(a, b)
    assert page.words("p", "verdict") == ["Not comparable: num_steps 25 / 250."]
    assert page.words("th", "differs") == ["num_steps"] and not page.all("td", "best")
    assert page.words("td", "differs") == [
        "25",
        "250",
        "0",
        "1",
    ]  # of the metrics, and of the flag --seed
    make_metrics(tmp_path / "samples/b.metrics.json", b, {"FID": 2.0, "recall": 0.6})
    page = make(a, b, "--metrics", tmp_path / "samples/c.metrics.json")
    assert not page.all("p", "verdict") and page.words("td", "best") == ["0.600", "1.000"]
    for name in "ab":
        path = tmp_path / f"samples/{name}.metrics.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"intervals": {"FID": [1.9, 3.1]}}))
        assert make(a, b).words("td", "best") == [
            "0.600"
        ]  # one FID lies in the interval of the other
        path.write_text(json.dumps(content))
    (tmp_path / "samples/b.metrics.json").write_text(json.dumps(content | {"sampling": {}}))
    page = make(a, b, "--metrics", tmp_path / "samples/b.metrics.json")
    assert "how they were drawn is not known" in page.words("p", "warning")[0] and page.all(
        "p", "verdict"
    )


def test_identity_is_all_but_the_results_and_which_model_it_is():
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
    assert identity(content) == {
        "count": 5,
        "new.key": 1,
        "sampling.num_steps": 5,
        "reference_sha256": "h",
    }
    assert identity({"reference": "r"}) == {"reference": "r"}  # nothing says it better
    rounding = {
        "versions": {"torch": "2"},
        "feature_batch_size": 9,
        "sampling": {"machine": {"device": "cpu"}, "num_steps": 5},
    }
    assert identity(rounding) == {"sampling.num_steps": 5}


def test_samples_of_which_nothing_is_known_hide_no_difference_and_make_none():
    """One file of other code, first or last, among two that agree in a field that the other does not have."""
    ours = [
        {"count": 5, "sampling.num_steps": 5, "sampling.atol": None},
        {"count": 5, "sampling.num_steps": 5},
    ]
    for rows in ([{"count": 5}, *ours], [*ours, {"count": 5}]):
        assert differing(rows) == []
        assert "Perhaps not comparable" in verdict(rows)
    assert differing([{"count": 5}, ours[0], {"count": 5, "sampling.num_steps": 6}]) == [
        "sampling.num_steps"
    ]
    files = [
        {"metrics": {"FID": 1.0}, "count": 5},
        {"metrics": {"FID": 2.0}, "count": 5, "sampling": {"atol": None, "solver": "e"}},
    ]
    page = section(
        [
            Measured(Path(f"{i}.metrics.json"), content, None, None)
            for i, content in enumerate(files)
        ]
    )
    assert "atol" in page and "Perhaps not comparable" in page
    assert differing([{"a": 1, "b": None}, {"a": 1, "c": 2}]) == ["c"] and differing(
        [{"a": 1}, {"a": "2"}]
    ) == ["a"]


def test_evaluations_of_different_settings_are_not_joined(make, tmp_path):
    run = make_run(tmp_path / "exps/a")
    evaluate_while_training(
        run, [{"num_steps": n} for n in (20, 20, 40)] + [{"num_steps": 20, "reference": "x"}]
    )
    page = make(run)
    (svg,) = [a for a, _ in page.all("svg", "chart") if a["aria-label"].startswith("FD-fashion")]
    assert (
        "num_steps 20 ends at 5.5" in svg["aria-label"]
        and "num_steps 40 ends at 6.5" in svg["aria-label"]
    )
    dotted = page.text[page.text.index('aria-label="FD-fashion') :]
    dotted = dotted[: dotted.index("</svg>")]
    paths = [part.split('"')[0] for part in dotted.split('d="')[1:] if 'class="line c0"' in part]
    assert [(path.count("M"), path.count("L")) for path in paths] == [
        (1, 2),
        (1, 0),
    ]  # a path elsewhere is the same reference
    assert page.words("ul", "legend")[1] == "num_steps 20num_steps 40"
    assert "ema_decay 0.9 · reference_sha256 cccccccccccc…" in page.words(
        "p", "soft"
    )  # what they have in common
    assert not [
        a for a, _ in page.all("svg", "chart") if a["aria-label"].startswith("precision")
    ]  # null everywhere


def test_hostile_names_stay_text(make, tmp_path):
    evil = "<script>alert(1)<b onmouseover='x'>"
    run = make_run(tmp_path / "exps" / evil, seed=evil)
    (run / "checkpoints/0000040/config.json").write_text(
        json.dumps({"data": {"class_names": [evil]}, evil: 1})
    )
    evaluate_while_training(run, [{evil: evil}, {"x": f'"{evil}'}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 60, "images": 480, evil: 3.0, "evaluation": {evil: evil}}) + "\n"
        )
    content = make_metrics(run / "metrics.json", run, {evil: 1.0}, **{evil: evil})
    (run / "metrics.json").write_text(
        json.dumps(content | {"warning": evil, "by_count": {evil: {"1": 1.0}}})
    )
    page = make(run)
    assert (
        not page.all("script")
        and evil in page.words("title")[0]
        and evil in page.words("p", "warning")[0]
    )
    assert not any(key.startswith("on") for _, attributes, _ in page.elements for key in attributes)
    assert f'["{evil}"]' in page.words("span") and "<script" not in page.text


def test_missing_pieces_leave_a_line_that_says_what_fills_them(make, tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    rows = [
        {"step": k, "images": k, "denoising": value}
        for k, value in enumerate((None, 1.0, float("nan"), 2.0), 1)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5'
    )
    page = make(run)
    lines = " ".join(page.words("p", "absent"))
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
    (run / "samples/0000001.png").write_bytes(b"no picture")
    assert "0000001.png cannot be read" in " ".join(make(run).words("p", "absent"))


def test_long_runs_are_thinned_and_keep_their_spikes(make, tmp_path):
    run = make_run(tmp_path / "exps/long", steps=20_000)
    assert len(make(run).text) < 80_000
    y = np.sin(np.arange(100_000.0))
    y[777], y[778:50_000] = 100, np.nan
    x, kept = thinned(np.arange(100_000.0), y)
    assert (
        len(x) <= 240 and np.nanmax(kept) == 100 and np.isnan(kept).any() and np.all(np.diff(x) > 0)
    )
    x, y = np.arange(1000.0), 5 - np.arange(1000.0)
    spiked = np.where(x == 400, 1e6, np.where(x == 700, np.nan, y))
    soft = smoothed(x, spiked, 1000)[1]
    assert (
        np.isnan(soft[700])
        and np.nanmax(np.abs(soft - y)[:-10]) <= 1
        and soft[0] == 5
        and len(smoothed(x, y)[0]) == 240
    )


def test_ticks_lie_inside_and_are_round():
    for low, high in ((0.93, 1.17), (0, 25600), (-3, 7), (1e-5, 1.1e-5)):
        ticks = linear_ticks(low, high)
        assert 2 <= len(ticks) <= 6 and all(
            low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks
        )
    for low, high in ((0.9, 4.1), (0.02, 900), (1e-9, 1e9), (3.1, 3.9)):
        ticks = log_ticks(low, high)
        assert (
            2 <= len(ticks) <= 8
            and all(low <= tick <= high for tick in ticks)
            and ticks == sorted(ticks)
        )


def smooth_images(count, seed):
    """Blurry and unlike each other: (n, 32, 32, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BILINEAR))
            for each in small
        ]
    )


def test_a_copied_training_image_is_found_and_no_other(make, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 17)  # the copied one is in the second block
    run = make_run(tmp_path / "exps/a")
    make_metrics(tmp_path / "samples/s.metrics.json", run, {"FD-fashion": 3.0})
    train, samples = smooth_images(50, 0), smooth_images(20, 1) // 4 + 96
    samples[8] = train[31]
    np.savez(tmp_path / "samples/s.npz", arr_0=samples)
    np.savez_compressed(tmp_path / "train.npz", arr_0=train)
    for i, image in enumerate(train):
        (tmp_path / "tree/c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"tree/c/{i:02d}.png")
    for place in ("train.npz", "tree"):
        page = make(run, "--nearest", tmp_path / place)
        shown = page.all("img")[-120:]  # 4 closest and 16 evenly spread, each with five neighbours
        assert shown[0][0]["alt"] == "sample 8" and shown[1][0]["alt"].startswith(
            "training image 31, at distance "
        )
        assert "5.0% of 20 samples" in page.text.replace("<b>", "").replace("</b>", "")
        assert len(page.all("div", "match")) == 20
        assert (
            len(page.all("span", "close")) == 1 + 1
        )  # among the closest, and where it stands in the spread


def test_nearest_is_what_all_distances_say():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 5)).astype(np.float32)
    queries, own = (
        np.concatenate((rng.normal(size=(6, 5)).astype(np.float32), train[[3, 30]])),
        np.array([-1] * 6 + [3, 30]),
    )
    distances, numbers = nearest.find_nearest(np.split(train, [7, 20]), queries, own, 3)
    every = np.linalg.norm(queries[:, None] - train[None], axis=-1)
    every[[6, 7], [3, 30]] = np.inf  # itself
    assert np.array_equal(numbers, every.argsort(1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(every, 1)[:, :3], rtol=1e-5)


def test_mistakes_end_in_one_line(call, tmp_path, monkeypatch):
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
        (["nowhere"], "nowhere is no run"),
        (["empty"], "empty is no run"),
        (["damaged"], "damaged/metrics.jsonl: line 2 is damaged"),
        ([run, "--out", "r.txt"], "--out r.txt must end in .html"),
        ([run, "--metrics", "none.json"], "--metrics none.json does not exist"),
        ([run, "--metrics", "list.json"], "list.json is damaged"),
        ([run, "--metrics", "other.json"], "other.json is no metrics.json"),
        ([run, "--nearest", "none"], "--nearest none does not exist"),
        ([run, "--nearest", "large.npz"], "--nearest large.npz holds 9 images of 16x16"),
        ([run, "--nearest", "float.npz"], "must be uint8"),
    ]
    for flags, message in cases:
        code, out = call(report, *flags)
        assert code == 2 and message in out and out.count("\n") == 1, (flags, out)
    assert not (tmp_path / "report.html").exists()
