"""The HTML page of an audit."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from glsim.data.duplicates import PAIRS
from glsim.data.images import BadImage, read_image
from glsim.data.limits import cores
from glsim.files import printable
from glsim.training.memory import SLACK, as_gib

SHOWN, NAMED = 24, 1000  # findings of a check that the page shows with pictures, and by name


def as_html(r: dict[str, Any], checks: Mapping[str, tuple[str, str, str]]) -> str:
    """The report as one page that needs no other file: what was found, with small pictures.

    `r` is what `doctor.run` returns; `checks` gives the severity, title and advice of each check, found or not.
    """
    shown = {i["path"] for f in r["findings"] for item in f["items"][:SHOWN] for i in item["images"][:4]}
    pictures = thumbnails(sorted(shown))
    root = Path(r["data"]) if Path(r["data"]).is_dir() else Path(r["data"]).parent
    sections = "".join(_section(f, pictures, root) for f in r["findings"])
    counts = {f["check"]: f["count"] for f in r["findings"]}
    rows = "".join(
        f'<tr class="{severity if counts.get(name) else "none"}"><td>'
        + (f'<a href="#{name}">{title}</a>' if counts.get(name) else title)
        + f"</td><td>{severity}</td><td>{counts.get(name, 0):,}</td></tr>"
        for name, (severity, title, _) in checks.items()
    )
    problems = sum(f["severity"] == "problem" for f in r["findings"])
    warnings = len(r["findings"]) - problems
    said = [f"{problems} found problems"] * bool(problems) + [f"{warnings} warn"] * bool(warnings)
    verdict = f"Of {len(checks)} checks {' and '.join(said)}" if said else "Nothing found"
    colour = "problem" if problems else "warning" if warnings else "good"
    stopped = f"<p>The search for near duplicates stopped at {PAIRS:,} pairs.</p>" * r["near_search_stopped"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>glsim doctor: {_text(r["data"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1e }}
table {{ border-collapse: collapse; margin: 1rem 0 }} a {{ color: inherit }}
td, th {{ padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
.number td + td, .number th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem }} .none {{ color: #888 }}
.verdict {{ padding: .6rem 1rem; border-radius: .4rem; font-weight: 600 }}
.verdict.problem {{ background: #fde3e1 }} .verdict.warning {{ background: #fdf1d3 }}
.verdict.good {{ background: #e0f3e4 }} tr.problem td {{ font-weight: 600; color: #a8201a }}
.items {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }}
.item {{ border: 1px solid #ddd; border-radius: .4rem; padding: .6rem }}
.images {{ display: grid; grid-template-columns: 1fr 1fr; gap: .6rem }} figure {{ margin: 0 }}
figure img {{ display: block; width: 100%; height: 8rem; object-fit: contain; background: #f4f4f5 }}
figcaption, .note {{ font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }} .note, .path {{ color: #666 }}
.note {{ margin: .4rem 0 0 }} li {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{_text(Path(r["data"]).name)}</h1>
<p class="path">{_text(r["data"])}</p>
<p class="verdict {colour}">{verdict}</p>
<h2>Checks</h2>
<table><tr><th>check</th><th>kind</th><th>found</th></tr>{rows}</table>
{stopped}{_about_data(r, root)}
{_about_memory(r["memory"])}
{sections}
</body></html>
"""


def _text(value: Any) -> str:
    return html.escape(printable(value))


def _breakable(name: Any) -> str:
    """A path or a class, which may go over two lines at its own joints."""
    return re.sub("([_/])", r"\1<wbr>", _text(name))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def thumbnails(paths: Iterable[str], side: int = 192) -> dict[str, str]:
    """Small JPEGs as data addresses; a file that cannot be shown has none."""

    def small(image: Image.Image) -> str:
        image.thumbnail((side, side), reducing_gap=2.0)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=70)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    def draw(path: str) -> str:
        try:
            return read_image(path, small)
        except BadImage:
            return ""

    paths = list(paths)
    with ThreadPoolExecutor(cores()) as pool:
        return {path: picture for path, picture in zip(paths, pool.map(draw, paths), strict=True) if picture}


def _section(f: dict[str, Any], pictures: dict[str, str], root: Path) -> str:
    """A heading, what to do, the first findings with pictures, the others by name."""
    items = f["items"]
    drawn = [item for item in items[:SHOWN] if any(i["path"] in pictures for i in item["images"])]
    named = [item for item in items[:NAMED] if item not in drawn]
    cards = "".join(_card(item, pictures, root) for item in drawn)
    lines = "".join(f"<li>{_line(item, root)}</li>" for item in named)
    if lines:
        lines = f"<ul>{lines}</ul>"
    if lines and drawn:
        lines = f"<details><summary>{len(named):,} more</summary>{lines}</details>"
    if len(items) > NAMED:
        lines += f"<p>.. and {len(items) - NAMED:,} more: glsim doctor --json lists all.</p>"
    return (
        f'<h2 id="{f["check"]}">{_text(f["title"])}: {f["count"]:,}</h2>\n<p>{_text(f["advice"])}</p>\n'
        f'<div class="items">{cards}</div>{lines}\n'
    )


def _relative(path: str, root: Path) -> str:
    return _breakable(Path(path).relative_to(root) if Path(path).is_relative_to(root) else path)


def _card(item: dict[str, Any], pictures: dict[str, str], root: Path) -> str:
    figures = "".join(
        f'<figure><img src="{pictures.get(i["path"], "")}" alt=""><figcaption><b>{_breakable(i["label"])}</b>, '
        f'{_text(i["split"])}<br><span class="path">{_relative(i["path"], root)}</span></figcaption></figure>'
        for i in item["images"][:4]
    )
    hidden = "".join(f"<br>{_relative(i['path'], root)}" for i in item["images"][4:NAMED])
    note = f'<p class="note">{_text(item["note"])}{hidden}</p>' if item["note"] or hidden else ""
    return f'<div class="item"><div class="images">{figures}</div>{note}</div>'


def _line(item: dict[str, Any], root: Path) -> str:
    paths = " = ".join(_relative(i["path"], root) for i in item["images"][:NAMED])
    return ": ".join(part for part in (paths, _text(item["note"])) if part)


def _about_data(r: dict[str, Any], root: Path) -> str:
    """Images a class and split, and their sizes."""
    c, z = r["classes"], r["sizes"]
    text = f"<h2>Images</h2>\n<p>{c['count']:,} class{'es' * (c['count'] != 1)}."
    text += " The data has no splits of its own: these were drawn as train draws them." * r["split_drawn"]
    if c.get("imbalance", 1) not in (None, 1):
        smallest, largest = c["train"]["smallest"], c["train"]["largest"]
        text += (
            f" For training, {_text(largest[0])} has {c['imbalance']:g} times the images of {_text(smallest[0])}, the "
            "smallest class."
        )
    text += '</p>\n<table class="number"><tr><th></th><th>images</th>'
    text += "".join(f"<th>{which}</th>" for which in ("smallest class", "median class", "largest class")) + "</tr>"
    for split, count in r["counts"].items():
        numbers = c[split]["smallest"][1], c[split]["median"], c[split]["largest"][1]
        text += f"<tr><td>{split}</td><td>{count:,}</td>" + "".join(f"<td>{n:,g}</td>" for n in numbers) + "</tr>"
    text += "</table>\n"
    if not z:
        return text
    text += '<table class="number"><tr><th>pixels</th>' + "".join(f"<th>{name}</th>" for name in z["width"]) + "</tr>"
    for key, what in (("width", "width"), ("height", "height"), ("aspect", "width / height")):
        text += f"<tr><td>{what}</td>" + "".join(f"<td>{value:g}</td>" for value in z[key].values()) + "</tr>"
    height, width = r["memory"]["image_size"]
    remarks = [
        f"Smaller than the {width} x {height} pixels that the network sees: {z['smaller_than_image_size']:,}",
        f"More than twice as long as wide, or as high (squeezed for the network): {z['elongated']:,}",
        "Formats: " + ", ".join(f"{n:,} {name}" for name, n in z["formats"].items()),
        "Colours: " + ", ".join(f"{n:,} {name}" for name, n in z["modes"].items()),
    ]
    items = [_text(remark) for remark in remarks]
    for end in ("smallest", "largest"):
        items.append(f"{end.title()}: {' x '.join(map(str, z[end]['size']))}, {_relative(z[end]['path'], root)}")
    return text + "</table>\n<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>\n"


def _about_memory(m: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{what}</td><td>{as_gib(m[key])}</td></tr>"
        for key, what in (
            ("weights", f"weights ({m['parameters'] / 1e6:.1f} million)"),
            ("gradients", "gradients"),
            ("optimizer", "optimiser"),
            ("activations", f"activations of {_count(m['batch_size'], 'image')}"),
            ("total", f"together, and {SLACK - 1:.0%} for what comes and goes"),
            ("free", f"free on {m['device']}"),
        )
    )
    height, width = m["image_size"]
    verdict = (
        f"It fits; so would batches of {m['largest_batch_size']:,}." if m["fits"] else "It will not fit. What helps:"
    )
    advice = "".join(f"<li>{_text(line)}</li>" for line in m["advice"])
    advice = f"<ul>{advice}</ul>" if advice else ""
    return (
        f"<h2>Memory</h2>\n<p>{_text(m['method'])} on {_text(m['backbone'])}, {width} x {height} pixels, batches of "
        f"{m['batch_size']}, precision {m['precision']}.</p>\n"
        f'<table class="number">{rows}</table>\n<p>{verdict}</p>{advice}\n'
    )
