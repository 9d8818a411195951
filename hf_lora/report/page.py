"""A report as one page of HTML, with everything in it: read without scripts, and without a net."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from hf_lora.planning.records import size
from hf_lora.report.facts import (
    AdapterFigures,
    LayerFigures,
    ReportFigures,
    dead,
    total_norm,
)
from hf_lora.report.style import SCRIPT, STYLE
from hf_lora.report.svg import Curve, curves
from hf_lora.text import by_number, grouped, printable
from hf_lora.version import __version__

_COLOURS = 6
_MOST_DEAD = 40
_FIELDS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "steps")


def page(figures: ReportFigures) -> str:
    """Return the page."""
    names = [each.name for each in figures.adapters]
    title = names[0] if len(names) == 1 else f"{len(names)} adapters"
    sections = [
        ("Overview", _overview(figures)),
        ("Where it changes the model", _heatmaps(figures)),
        ("Spectra and effective rank", _spectra(figures)),
        ("Training", _training(figures)),
        ("Similarity", _similarity(figures)),
        ("Dead layers", _dead(figures)),
        ("Size by cause", _sizes(figures)),
        ("Who can serve it", _clients(figures)),
    ]
    kept = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#s{n}">{escape(name)}</a>' for n, (name, _) in enumerate(kept))
    body = "".join(
        f'<section id="s{n}"><h2>{escape(name)}</h2>{text}</section>'
        for n, (name, text) in enumerate(kept)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}: LoRA report</title><style>{STYLE}</style></head><body>"
        f'<header><p class="eyebrow">LoRA report</p><h1>{_text(title)}</h1>'
        f"<nav>{links}</nav></header><main>{body}</main>"
        f"<footer>made by hf_lora {escape(__version__)}; norms are Frobenius norms, computed from "
        f"the factors in float64</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: object) -> str:
    """Return somebody's words as HTML shows them: nothing in them is obeyed."""
    return escape(printable(str(value)), quote=True)


def _key(number: int) -> str:
    return f'<i class="key c{number % _COLOURS}"></i>'


def _overview(figures: ReportFigures) -> str:
    cards = []
    for number, each in enumerate(figures.adapters):
        about = each.description
        ranks = sorted({layer.r for layer in about.layers})
        alphas = sorted({layer.alpha for layer in about.layers})
        gone = len(dead(each))
        facts = {
            "base": about.base or "not named",
            "rank": ", ".join(map(str, ranks)) or "-",
            "alpha": ", ".join(f"{alpha:g}" for alpha in alphas) or "-",
            "layers": f"{len(each.layers):,}" + (f", {gone} dead" if gone else ""),
            "parameters": f"{about.parameters:,}",
            "file": size(about.file_bytes),
            "norm of all updates": f"{total_norm(each):.4g}",
            "effective rank": _mean_rank(each),
        }
        relative = [layer.relative for layer in each.layers if layer.relative is not None]
        if relative:
            facts["change over weights"] = f"{sum(relative) / len(relative):.2%} on average"
        if about.config is not None:
            targets = about.config.targets
            facts["targets"] = targets if isinstance(targets, str) else ", ".join(targets)
        if about.trained_names:
            facts["trained in full"] = ", ".join(about.trained_names)
        rows = "".join(f"<div><dt>{k}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
        cards.append(
            f'<article class="card"><h3>{_key(number)}{_text(each.name)}</h3>'
            f"<dl>{rows}</dl></article>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _mean_rank(each: AdapterFigures) -> str:
    alive = [layer for layer in each.layers if layer.norm]
    if not alive:
        return "-"
    mean = sum(layer.effective_rank for layer in alive) / len(alive)
    rank = sum(layer.rank for layer in alive) / len(alive)
    return f"{mean:.1f} of {rank:g}"


def _heatmaps(figures: ReportFigures) -> str:
    relative = figures.base is not None
    value: Callable[[LayerFigures], float] = (
        (lambda layer: layer.relative or 0.0) if relative else (lambda layer: layer.norm)
    )
    everything = [value(layer) for each in figures.adapters for layer in each.layers]
    if not everything:
        return ""
    most = max(everything) or 1.0
    what = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    shown = (lambda v: f"{v:.2%}") if relative else (lambda v: f"{v:.4g}")
    parts = [
        f'<p class="lead">{what} of each layer: a row for each kind of layer, a column for each '
        "block. "
        + ("All adapters have one scale. " if len(figures.adapters) > 1 else "")
        + f'<span class="scale"><span>0</span><i></i><span>{shown(most)}</span></span></p>'
    ]
    for number, each in enumerate(figures.adapters):
        if len(figures.adapters) > 1:
            parts.append(f"<h3>{_key(number)}{_text(each.name)}</h3>")
        parts.append(_heatmap(each, value, shown, most, what))
    return "".join(parts)


def _heatmap(
    each: AdapterFigures,
    value: Callable[[LayerFigures], float],
    shown: Callable[[float], str],
    most: float,
    what: str,
) -> str:
    cells: dict[str, dict[int | None, list[LayerFigures]]] = {}
    for layer in each.layers:
        cells.setdefault(layer.kind, {}).setdefault(layer.number, []).append(layer)
    numbers = sorted({n for row in cells.values() for n in row if n is not None})
    alone = {kind: row[None] for kind, row in cells.items() if None in row}
    head = "".join(
        f'<th scope="col">{n if i % max(1, math.ceil(len(numbers) / 16)) == 0 else ""}</th>'
        for i, n in enumerate(numbers)
    )
    rows = []
    for kind in sorted((k for k in cells if k not in alone), key=by_number):
        line = [f'<th scope="row" title="{_text(kind)}">{_text(_short(kind, cells))}</th>']
        for n in numbers:
            members = cells[kind].get(n)
            if members is None:
                line.append("<td></td>")
                continue
            # several in one block, such as experts: their norms together
            found = math.sqrt(math.fsum(value(m) ** 2 for m in members) / len(members))
            text = f"{members[0].path}: {shown(found)}"
            mark = ' class="dead"' if found == 0 else ""
            line.append(
                f'<td{mark} style="--v:{min(found / most, 1):.3f}" title="{_text(text)}">'
                f"<span>{shown(found)}</span></td>"
            )
        rows.append(f"<tr>{''.join(line)}</tr>")
    table = (
        f'<div class="scroll"><table class="heat"><caption>{what} by layer and module</caption>'
        f'<thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        '</table></div><p class="readout" aria-live="polite"></p>'
        if rows
        else ""
    )
    others = "".join(
        f"<li><b>{_text(kind or 'the model itself')}</b> {shown(value(layer))}</li>"
        for kind, members in sorted(alone.items())
        for layer in members
    )
    return table + (f'<ul class="plain">{others}</ul>' if others else "")


def _short(kind: str, kinds: Iterable[str]) -> str:
    """Return the end of a kind that tells it from the others."""
    parts = kind.split(".")
    for count in range(1, len(parts) + 1):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith(f".{tail}") for other in kinds) == 1:
            return tail
    return kind


def _spectra(figures: ReportFigures) -> str:
    parts = [
        '<p class="lead">Singular values of the updates over the largest, in the middle of all '
        "layers of a kind. A curve that falls early has rank to spare; one that stays up uses it "
        "all. The effective rank is the exponential of the entropy of the singular values.</p>"
    ]
    kinds = sorted(
        {layer.kind for each in figures.adapters for layer in each.layers if layer.norm},
        key=by_number,
    )
    if not kinds:
        return ""
    panels = []
    for kind in kinds[:24]:
        found: list[Curve] = []
        words = []
        for number, each in enumerate(figures.adapters):
            layers = [layer for layer in each.layers if layer.kind == kind and layer.norm]
            if not layers:
                continue
            found.append((each.name, f"line c{number % _COLOURS}", _middle(layers)))
            mean = sum(layer.effective_rank for layer in layers) / len(layers)
            rank = max(layer.rank for layer in layers)
            words.append(
                f'<span>{_key(number)}{mean:.1f} of {rank}<span class="bar c{number % _COLOURS}">'
                f'<i style="width:{min(100 * mean / rank, 100):.0f}%"></i></span></span>'
            )
        short = _text(_short(kind, kinds))
        picture = curves(
            found,
            x="rank",
            y="singular value",
            title=f"spectrum of {kind}",
            bottom=0.0,
            top=1.0,
            whole=True,
        )
        panels.append(
            f'<figure class="panel"><figcaption title="{_text(kind)}"><b>{short}</b>'
            f"{''.join(words)}</figcaption>{picture}</figure>"
        )
    return "".join([*parts, f'<div class="panels">{"".join(panels)}</div>'])


def _middle(layers: Sequence[LayerFigures]) -> list[tuple[float, float]]:
    count = max(min(len(layer.values), layer.rank) for layer in layers)
    points = []
    for at in range(count):
        shares = sorted(
            layer.values[at] / layer.values[0] for layer in layers if at < len(layer.values)
        )
        points.append((at + 1.0, shares[len(shares) // 2]))
    return points


def _training(figures: ReportFigures) -> str:
    found: list[Curve] = []
    keys = []
    for number, each in enumerate(figures.adapters):
        colour = f"c{number % _COLOURS}"
        for name, style, words in (
            ("loss", f"line {colour}", "training"),
            ("eval_loss", f"line dots {colour}", "held out"),
        ):
            points = [
                (float(row["step"]), float(row[name]))
                for row in each.history
                if _is_number(row.get("step")) and _is_number(row.get(name))
            ]
            if points:
                found.append((f"{each.name}, {words}", style, points))
                mark = "ring" if "dots" in style else ""
                keys.append(
                    f'<li><i class="key {mark} {colour}"></i>{_text(each.name)}, {words}, '
                    f"{points[-1][1]:.4g} at last</li>"
                )
    facts = []
    for number, each in enumerate(figures.adapters):
        if each.training is None:
            continue
        said = {k: v for k, v in each.training.hyperparameters.items() if k in _FIELDS}
        said |= dict(each.training.metrics)
        text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in said.items())
        facts.append(f"<li>{_key(number)}<b>{_text(each.name)}</b>: {_text(text)}</li>")
    if not found and not facts:
        return ""
    picture = curves(found, x="step", y="loss", title="loss by step")
    legend = f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""
    told = f'<ul class="plain">{"".join(facts)}</ul>' if facts else ""
    return f"<figure>{picture}{legend}</figure>{told}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _similarity(figures: ReportFigures) -> str:
    if len(figures.adapters) < 2:
        return ""
    head = "".join(f'<th scope="col">{_key(n)}{n + 1}</th>' for n in range(len(figures.adapters)))
    rows = []
    for number, (each, line) in enumerate(zip(figures.adapters, figures.similarities, strict=True)):
        cells = "".join(
            '<td class="none">-</td>'
            if value is None
            else f'<td style="--v:{abs(value):.3f}" class="{"minus" if value < 0 else ""}">'
            f"<span>{value:+.2f}</span></td>"
            for value in line
        )
        rows.append(
            f'<tr><th scope="row">{_key(number)}{number + 1} {_text(each.name)}</th>{cells}</tr>'
        )
    return (
        '<p class="lead">The cosine of the angle between all updates of two adapters. Unrelated '
        "ones are near 0, trainings of the same well above, and what one undoes of the other is "
        'below.</p><div class="scroll"><table class="heat wide"><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _dead(figures: ReportFigures) -> str:
    parts = []
    for number, each in enumerate(figures.adapters):
        gone = dead(each)
        if gone:
            lines = grouped(f"{path}." for path in sorted(gone, key=by_number))
            items = "".join(f"<li>{_text(line.rstrip('.'))}</li>" for line in lines[:_MOST_DEAD])
            words = f"{len(gone)} of {len(each.layers)} layers change nothing"
            parts.append(
                f"<p>{_key(number)}<b>{_text(each.name)}</b>: {words}</p>"
                f'<ul class="mono">{items}</ul>'
            )
    if not parts:
        return '<p class="good">None: every layer changes something.</p>'
    return "".join(parts)


def _sizes(figures: ReportFigures) -> str:
    parts = []
    for number, each in enumerate(figures.adapters):
        about = each.description
        whole = max(about.file_bytes, 1)
        rows = "".join(
            f'<tr><th scope="row">{_text(cause)}</th><td>{size(count)}</td>'
            f'<td>{count / whole:.1%}</td><td class="stretch">'
            f'<span class="bar c{number % _COLOURS}"><i style="width:{100 * count / whole:.1f}%">'
            "</i></span></td></tr>"
            for cause, count in about.causes.items()
        )
        parts.append(
            f"<h3>{_key(number)}{_text(each.name)}, {size(about.file_bytes)}</h3>"
            f'<div class="scroll"><table class="sizes"><tbody>{rows}</tbody></table></div>'
        )
    return "".join(parts)


def _clients(figures: ReportFigures) -> str:
    names = dict.fromkeys(v.client for each in figures.adapters for v in each.clients)
    if not names:
        return ""
    head = "".join(
        f'<th scope="col">{_key(n)}{_text(each.name)}</th>'
        for n, each in enumerate(figures.adapters)
    )
    rows = []
    for client in names:
        cells = []
        for each in figures.adapters:
            verdict = next(v for v in each.clients if v.client == client)
            if verdict.works:
                cells.append(f'<td class="yes">✓ <span>{_text(verdict.way)}</span></td>')
            else:
                reasons = "".join(f"<li>{_text(reason)}</li>" for reason in verdict.reasons)
                cells.append(
                    f'<td class="no"><details><summary>✗ {len(verdict.reasons)} '
                    f"{'reason' if len(verdict.reasons) == 1 else 'reasons'}</summary>"
                    f"<ul>{reasons}</ul><p>{_text(verdict.way)}</p></details></td>"
                )
        rows.append(f'<tr><th scope="row">{_text(client)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="clients"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
