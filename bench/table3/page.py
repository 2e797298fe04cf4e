"""The table as text, and the figure: what a comparison found beside what the paper reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from retinar.bench.words import table
from retinar.engine.files import atomic_write
from retinar.engine.images import SHEET_COLUMNS, sheet
from retinar.engine.metrics.evaluation import ALL

PAPER = {
    "autoregressive": {"healthy": 40.14, "npdr": 41.21},
    "iddpm": {"healthy": 78.20, "npdr": 74.19},
}
"""FID per class in the paper's Table 3: GPT-XL and iDDPM at 256 px, OIA-DDR."""


def summary(content: Mapping[str, Any]) -> Iterator[str]:
    """Table 3 as Markdown: the paper's rows, ours, and what real photographs score."""
    labels = list(content["counts"])
    head = ["method", *(f"FID {label}" for label in labels), "KID x 1000", "precision / recall", "s / image"]
    head += ["images seen", "training"]
    rows = [
        [f"{name}, paper*", *(f"{PAPER[key].get(label, float('nan')):.2f}" for label in labels), "", "", "", "", ""]
        for key, name in (("autoregressive", "autoregressive (GPT-XL)"), ("iddpm", "iDDPM"))
        if set(labels) <= set(PAPER[key])
    ]
    for side in content["sides"]:
        by_label = {score["label"]: score for score in side["scores"]}
        trained = side["trained"][side["recipe"]]
        whole = by_label.get(ALL, by_label[labels[0]])
        kid, precision, recall = (whole["metrics"][name] for name in ("kid", "precision", "recall"))
        rows.append(
            [
                f"{side['title']}, here",
                *(_figure(by_label[label], "fid") for label in labels),
                f"{1000 * kid:.1f}",
                f"{precision:.2f} / {recall:.2f}",
                f"{side['seconds_per_image']:.2f}",
                f"{trained['images_seen']:,}" if trained["images_seen"] else "unknown",
                _time(trained),
            ]
        )
    first = {score["label"]: score for score in content["sides"][0]["scores"]}
    floors = [first[label]["floor"]["fid"] for label in labels]
    whole_floor = first.get(ALL, first[labels[0]])["floor"]
    rows.append(
        [
            "real photographs of the train split",
            *(
                f"{floor['mean']:.1f} ± {floor['sd']:.1f}" if floor["sd"] else f"{floor['mean']:.1f}"
                for floor in floors
            ),
            f"{1000 * whole_floor['kid']['mean']:.1f}",
            f"{whole_floor['precision']['mean']:.2f} / {whole_floor['recall']['mean']:.2f}",
            *("", "", ""),
        ]
    )
    yield from table(head, rows)


def document(content: Mapping[str, Any], figure: str) -> str:
    """README.md of the comparison's folder."""
    labels = list(content["counts"])
    counts = ", ".join(f"{label} {count}" for label, count in content["counts"].items())
    lines = [
        "# Both methods on the same photographs",
        "",
        f"{_budget(content)} {content['device']} ({content['cores']} cores, {content['threads']} threads), "
        f"{content['date'][:10]}, commit {str(content['commit'])[:12]}.",
        "",
        *summary(content),
        "",
        "\\* On OIA-DDR at 256 px, trained on GPUs: other photographs, sizes and times. Nothing here compares with it.",
        "",
        f"FID and KID are clean-fid's, against the test split, of {counts} generated images; in brackets the",
        "95 % interval by half-sampling the images. KID, precision and recall are over all classes together.",
        "The last row is what photographs of the train split score at the same counts: nothing can be expected",
        "to be better. At fewer than 2,048 images FID is biased upwards: the rows compare with each other alone.",
        "",
        f"![Figure 2: {', '.join(side['title'] for side in content['sides'])}; {' and '.join(labels)}]({figure})",
        "",
        "## How",
        "",
        f"    {content['command']}",
        "",
        *_sides(content),
        "## Notes",
        "",
        *(f"- {side['title']}: {warning}" for side in content["sides"] for warning in side["warnings"]),
        "",
    ]
    return "\n".join(lines)


def _sides(content: Mapping[str, Any]) -> Iterator[str]:
    """Recipes and settings of both, chosen on the valid split."""
    for side in content["sides"]:
        yield f"**{side['title']}**: recipe {side['recipe']}, {_words(side['setting'])}."
        for recipe, trained in side["trained"].items():
            if trained["steps"]:
                yield (
                    f"Recipe {recipe}: {trained['parameters'] / 1e6:.1f} M parameters, {trained['image_size']} px, "
                    f"{trained['steps']} in {_time(trained)}."
                )
        if side["tuning"]:
            yield ""
            yield f"Chosen on the valid split, {side['tuning'][0]['images']} images a class:"
            yield ""
            labels = list(side["tuning"][0]["fid"])
            rows = [
                [each["recipe"], _words(each["setting"]), *(f"{each['fid'][label]:.1f}" for label in labels)]
                for each in side["tuning"]
            ]
            yield from table(["recipe", "setting", *(f"FID {label}" for label in labels)], rows)
        yield ""


def figure(path: Path, groups: Sequence[tuple[str, int, Sequence[Path]]]) -> Path:
    """The paper's Figure 2: the first eight images of every method and class, as generated, none chosen."""
    shown = []
    for title, total, files in groups:
        images = []
        for file in files[:SHEET_COLUMNS]:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        shown.append((title, total, images))
    with atomic_write(path) as temporary:
        sheet(shown, "synthetic; the first of each, none chosen", columns=SHEET_COLUMNS).save(temporary, format="PNG")
    return path


def _budget(content: Mapping[str, Any]) -> str:
    given = [side["title"] for side in content["sides"] if side["recipe"] == "given"]
    if len(given) == len(content["sides"]):
        return "Two trained checkpoints, sampled and scored on"
    text = f"{content['budget_minutes']:g} minutes of training each"
    return text + (f" ({given[0]}: a given checkpoint), on" if given else ", on")


def _figure(score: Mapping[str, Any], name: str) -> str:
    text = f"{score['metrics'][name]:.1f}"
    interval = score.get("intervals", {}).get(name)
    return f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else text


def _time(trained: Mapping[str, Any]) -> str:
    if trained["minutes"] is None:
        return "unknown"
    return f"{trained['minutes']:.1f} min" + (f", without {trained['without']}" if trained.get("without") else "")


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "the defaults"
