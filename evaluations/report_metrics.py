"""The table of metrics.json files: numbers, what identifies them, and which may be compared."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError
from evaluations.compare import RESULT_KEYS
from evaluations.report_page import Html, absent, el, number, shown, swatch, table, text
from evaluations.runs import Run, read_json

WHICH_MODEL = {
    "samples",
    "samples_sha256",
    "sampling.checkpoint",
    "sampling.ema_sha256",
    "sampling.step",
    "sampling.images_seen",
}
ROUNDING = (
    "versions.",
    "feature_batch_size",
    "sampling.machine.",
    "sampling.per_proc_batch_size",
    "sampling.compile",
)
SAID_BY = {  # what does not count where another field says it better
    "reference": "reference_sha256",
    "sampling.vae": "sampling.vae_fingerprint",
    "sampling.count": "count",
}
HIGHER = {"inception_score", "precision", "recall", "class_agreement"}
LOWER = ("FID", "sFID", "FD")
MOST_TOLD = 8  # differing fields named in the sentence above the table


class Measured(NamedTuple):
    """One metrics.json; colour is None for samples of none of the runs."""

    file: Path
    content: dict
    run: Run | None
    colour: int | None

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name if self.run else "other samples"

    @property
    def stem(self) -> str:
        """Of the file, without what all files have in common."""
        return self.file.name.removesuffix(".metrics.json")

    @property
    def samples(self) -> Path | None:
        """The .npz it was measured on: as it was called, or else beside the file."""
        name = self.content.get("samples")
        if not isinstance(name, str):
            return None
        return Path(name) if Path(name).exists() else self.file.parent / Path(name).name

    @property
    def images(self) -> int:
        """Images that the model had seen, 0 if unknown."""
        return self.content.get("sampling", {}).get("images_seen") or 0


def flat(content: dict, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def identity(content: dict) -> dict[str, Any]:
    """What must agree before two values may be compared."""
    fields = said_once(
        flat({key: value for key, value in content.items() if key not in RESULT_KEYS})
    )
    return {
        key: value
        for key, value in fields.items()
        if key not in WHICH_MODEL and not key.startswith(ROUNDING)
    }


def said_once(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the names of what is known by its hash, since the same file may lie elsewhere, and without repetitions."""
    return {key: value for key, value in fields.items() if not fields.get(SAID_BY.get(key, ""))}


def label(key: str) -> str:
    """A field for people: most are of sampling."""
    return key.removeprefix("sampling.")


def differing(identities: list[dict[str, Any]]) -> list[str]:
    """The fields that do not have one value everywhere, in their order of appearance. Of sampling, among those that tell."""
    keys = list(dict.fromkeys(key for fields in identities for key in fields))
    return [key for key in keys if len(_values(identities, key)) > 1]


def collect(runs: list[Run], more: list[Path], sample_dir: Path) -> list[Measured]:
    """Every metrics.json of the runs: inside them, in sample_dir if their samples come from a checkpoint of one, and `more`.
    Raises UserError.
    """

    def owner(content: dict) -> int | None:
        place = content.get("sampling", {}).get("checkpoint")
        of = [
            k
            for k, run in enumerate(runs)
            if place and Path(place).resolve().is_relative_to(run.folder.resolve())
        ]
        return of[0] if of else None

    found: dict[Path, Measured] = {}

    def add(path: Path, k: int | None, needs_owner: bool = False) -> None:
        try:
            content = read_json(path)
        except UserError:
            if needs_owner:  # a folder of samples is everybody's: what is no metrics.json of these runs is none of ours
                return
            raise
        if needs_owner and not isinstance(content.get("sampling"), dict):
            return
        if not isinstance(content.get("metrics"), dict) or not isinstance(
            content.get("sampling", {}), dict
        ):
            raise UserError(f"{path} is no metrics.json: evaluations.evaluate writes them")
        k = owner(content) if k is None else k
        if path.resolve() not in found and not (needs_owner and k is None):
            found[path.resolve()] = Measured(path, content, None if k is None else runs[k], k)

    for k, run in enumerate(runs):
        for path in sorted({*run.folder.glob("metrics.json"), *run.folder.glob("*.metrics.json")}):
            add(path, k)
    for path in more:
        if not path.exists():
            raise UserError(f"--metrics {path} does not exist: evaluations.evaluate writes it")
        add(path, None)
    for path in sorted(sample_dir.glob("*.metrics.json")):
        add(path, None, needs_owner=True)
    order = {True: len(runs), False: 0}
    return sorted(
        found.values(),
        key=lambda row: (order[row.colour is None] + (row.colour or 0), row.images, str(row.file)),
    )


def _best(rows: list[Measured], name: str) -> set[int]:
    """Which rows lead by one metric among those that agree in all that identifies them, none where intervals overlap."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        value = row.content["metrics"].get(name)
        if value is not None and math.isfinite(value):
            groups.setdefault(json.dumps(identity(row.content), sort_keys=True), []).append(i)
    sign = 1 if name in HIGHER else -1 if name.startswith(LOWER) else 0
    best = set()
    for group in groups.values():
        ranked = sorted(group, key=lambda i: sign * rows[i].content["metrics"][name])
        ends = [[sign * end for end in _interval(rows[i], name)] for i in ranked]
        if sign and len(ranked) > 1 and min(ends[-1]) > max(max(other) for other in ends[:-1]):
            best.add(ranked[-1])
    return best


def _interval(row: Measured, name: str) -> list[float]:
    return (row.content.get("intervals") or {}).get(name) or [row.content["metrics"][name]]


def _row_head(row: Measured) -> Html:
    small = el("small", row.stem, title=str(row.file), class_="file")
    return el("th", swatch(row.colour), " ", row.name, small, scope="row")


def _value(row: Measured, name: str, best: bool) -> Html:
    value = row.content["metrics"].get(name)
    if not isinstance(value, (int, float)):
        return el("td", "—", class_="num")
    ends = (row.content.get("intervals") or {}).get(name)
    spread = el("small", number(ends[0]), " – ", number(ends[1])) if ends else None
    return el("td", number(value), spread, class_="num best" if best else "num")


def verdict(identities: list[dict[str, Any]]) -> Html:
    """The sentence that says whether the rows may be compared."""
    if len(identities) < 2:
        return el("p", "One file: there is nothing to compare it with.", class_="soft")
    fields = differing(identities)
    if not fields and any(map(_foreign, identities)):
        return el(
            "p",
            "Perhaps not comparable: how some of the samples were drawn is not known.",
            class_="verdict",
        )
    if not fields:
        return el(
            "p",
            "All rows agree in everything that identifies them: their values may be compared.",
            class_="soft",
        )
    told = [
        Html(f"{el('b', label(key))} ")
        + Html(" / ").join(shown(value) for value in _values(identities, key))
        for key in fields[:MOST_TOLD]
    ]
    rest = f"; and {len(fields) - MOST_TOLD} more" if len(fields) > MOST_TOLD else ""
    return el("p", "Not comparable: ", Html("; ".join(told)), rest, ".", class_="verdict")


def _values(identities: list[dict[str, Any]], key: str) -> list[Any]:
    """The different values of a field, in their order of appearance."""
    tell = [
        fields for fields in identities if not key.startswith("sampling.") or not _foreign(fields)
    ]
    return list({text(fields.get(key)): fields.get(key) for fields in tell}.values())


def _foreign(fields: dict[str, Any]) -> bool:
    """Whether nothing is known of how the samples were drawn."""
    return not any(key.startswith("sampling.") for key in fields)


def section(rows: list[Measured]) -> Html:
    """The sentence, the table with differing fields marked, the fields that agree, FID by count, warnings."""
    if not rows:
        return absent(
            "No metrics.json of these runs: sample_ddp.py --ckpt RUN, then python -m evaluations.evaluate, make one."
        )
    identities = [identity(row.content) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row.content["metrics"]))
    fields = differing(identities)
    best = {name: _best(rows, name) for name in names}
    head = [
        "run",
        *(el("th", name.replace("_", " "), scope="col", class_="num") for name in names),
        "images seen",
    ]
    head += [el("th", label(key), scope="col", class_="differs") for key in fields]
    body = []
    for i, (row, own) in enumerate(zip(rows, identities)):
        cells = [_value(row, name, i in best[name]) for name in names]
        cells.append(el("td", f"{row.images:,}" if row.images else "—", class_="num"))
        cells += [el("td", shown(own.get(key)), class_="differs") for key in fields]
        body.append([_row_head(row), *cells])
    note = (
        "Bold leads among the rows that agree in every marked column. "
        if any(best.values())
        else ""
    )
    note += "Small: 95% interval." if any(row.content.get("intervals") for row in rows) else ""
    agreeing = [
        key for key in dict.fromkeys(key for own in identities for key in own) if key not in fields
    ]
    listed = [
        [el("th", label(key), scope="row"), el("td", shown(_values(identities, key)[0]))]
        for key in agreeing
    ]
    what = "What identifies it" if len(rows) == 1 else "The same in every row"
    parts = [
        verdict(identities),
        table(head, body),
        el("p", note.strip(), class_="soft") if note else None,
    ]
    warnings: dict[str, list[str]] = {}
    for row in rows:
        if not row.content.get("sampling"):
            warnings.setdefault(
                "samples of other code, how they were drawn is not known", []
            ).append(f"{row.name} ({row.stem})")
        if row.content.get("warning"):
            warnings.setdefault(text(row.content["warning"]), []).append(f"{row.name} ({row.stem})")
    parts += [
        el("p", f"{', '.join(names)}: {warning}", class_="warning")
        for warning, names in warnings.items()
    ]
    parts.append(_by_count(rows))
    if listed:
        summary = el("summary", f"{what}: {len(listed)} fields")
        parts.append(el("details", summary, table(["field", "value"], listed, "settings")))
    return el("div", *parts)


def _by_count(rows: list[Measured]) -> Html | None:
    """Distances of the first n samples, for each n that a file has."""
    entries = [
        (row, name, values)
        for row in rows
        for name, values in (row.content.get("by_count") or {}).items()
    ]
    counts = sorted({count for _, _, values in entries for count in values}, key=int)
    if not entries:
        return None
    body = [
        [_row_head(row), el("td", name)]
        + [
            el("td", number(values[n]) if values.get(n) is not None else "—", class_="num")
            for n in counts
        ]
        for row, name, values in entries
    ]
    head = [
        "run",
        "distance",
        *(el("th", f"first {int(count):,}", scope="col", class_="num") for count in counts),
    ]
    return el("div", el("h3", "By number of samples"), table(head, body))
