"""Writes the page of measurements, with its charts, from what the benchmarks found.

    python -m t.benchmarks.report build/results.json build/chords.json docs
"""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from .measure import Spread, ratio

#: Colours of the charts' series, which can be told apart on light and on dark pages.
COLOURS = ('#0f7ac0', '#d9822b', '#7c8894')

INTRODUCTION = """\
Measurements
============

.. This page is written by "make bench".

Released Celery's backend and this one were measured in turn, in one process, on the same Azurite: near, over
loopback, and far, through a proxy that adds {round_trip:.0f} ms to each round trip. The machine has two cores, which
Azurite, proxy and client share, and other work to do, so that only ratios mean something: how many times as much
released Celery took, round by round, as a median with its quartiles. Azure itself was not measured.

{date};
{versions}.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield from ('.. list-table::', '   :header-rows: 1', '   :widths: auto', '')
    for row in (header, *rows):
        for position, cell in enumerate(row):
            yield f'   {"  -" if position else "* -"} {cell}'
    yield ''


def milliseconds(values: Sequence[float]) -> str:
    """Return the median of seconds, in milliseconds."""
    return f'{statistics.median(values) * 1000:.1f}'


def times(spread: Spread) -> str:
    """Return a ratio with its spread."""
    return f'{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})'


def section(title: str) -> Iterator[str]:
    """Yield the lines of a heading."""
    yield from (title, '-' * len(title), '')


def operations(measured: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of one place."""
    rows = []
    for title, contenders in measured.items():
        if title == 'lag':
            continue
        ours, released = contenders['ours'], contenders['released']
        floor = contenders.get('bare SDK')
        rows.append((
            title, f'{ours["requests"]} / {released["requests"]}',
            f'{milliseconds(ours["wall"])} / {milliseconds(released["wall"])}',
            times(ratio(ours['wall'], released['wall'])),
            f'{milliseconds(ours["cpu"])} / {milliseconds(released["cpu"])}',
            times(ratio(ours['cpu'], released['cpu'])),
            times(ratio(floor['cpu'], ours['cpu'])) if floor else '–'))
    yield from table((
        'Operation', 'Requests, ours / released', 'Wall time, ms, ours / released', 'released : ours',
        'CPU, ms, ours / released', 'released : ours', 'CPU, ours : bare SDK'), rows)


def bars(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return a chart of horizontal bars as SVG.

    Arguments:
        title: What it shows.
        unit: What the numbers count.
        rows: By label, and by the name of the series, the numbers.
    """
    names = list(next(iter(rows.values())))
    longest = max(value for row in rows.values() for value in row.values())
    lines, y = [], 50
    for index, name in enumerate(names):
        lines.append(f'<rect x="{10 + 160 * index}" y="26" width="10" height="10" fill="{COLOURS[index]}"/>'
                     f'<text x="{26 + 160 * index}" y="35">{escape(name)}</text>')
    for label, row in rows.items():
        lines.append(f'<text x="205" y="{y + 8 * len(names) + 4}" text-anchor="end">{escape(label)}</text>')
        for index, name in enumerate(names):
            width = max(1, round(330 * row[name] / longest))
            lines.append(f'<rect x="215" y="{y}" width="{width}" height="13" fill="{COLOURS[index]}"/>'
                         f'<text x="{220 + width}" y="{y + 11}">{row[name]:.3g}</text>')
            y += 16
        y += 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 {y}" font-family="sans-serif" font-size="12" '
            f'fill="#7c8894"><text x="10" y="16" font-size="14">{escape(title)}, {escape(unit)}</text>'
            f'{"".join(lines)}</svg>\n')


def wall_times(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the median wall times of a place, in milliseconds."""
    return {title: {name: statistics.median(contenders[name]['wall']) * 1000 for name in ('ours', 'released')}
            for title, contenders in measured.items() if title not in ('lag', '200 results by get_many')}


def page(results: Mapping[str, Any], chords: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    versions = ', '.join(f'{name} {version}' for name, version in results['versions'].items())
    yield INTRODUCTION.format(
        round_trip=results['round_trip'] * 1000, date=results['date'], versions=versions)
    for place, title in (('far', 'Far'), ('near', 'Near')):
        yield from section(title)
        yield from operations(results[place])
        yield from (f'.. image:: _static/measurements-{place}.svg', '   :alt: Wall time of each operation', '')
    yield from section('A waiting client')
    yield 'From the moment a task of 20 to 400 ms has stored its result to the moment a waiting client has it.'
    yield ''
    yield from table(('Place', 'Ours, ms (quartiles)', 'Released, ms (quartiles)'), [
        (place, *(lag(results[place]['lag'][name]) for name in ('ours', 'released'))) for place in ('far', 'near')])
    yield from section('Expiry')
    cleanup = results['cleanup']
    yield '1,000 expired results, near. Released Celery deletes nothing; it was made to forget each.'
    yield (f'Ours took {statistics.median(cleanup["ours"]["wall"]):.2f} seconds, released Celery '
           f'{times(ratio(cleanup["ours"]["wall"], cleanup["released"]["wall"]))} times as long.')
    yield ''
    yield from section('Growth')
    yield 'Ours, near: milliseconds for each result that ``get_many`` returns, and then for each store. By then'
    yield 'Azurite holds 11,000 blobs, which slows each write.'
    yield ''
    growth = results['growth']
    yield from table(('Results', 'ms each'), [(size, f'{seconds * 1000:.2f}')
                                             for size, seconds in growth['get_many'].items()])
    yield from table(('Threads', 'ms each'), [(count, f'{seconds * 1000:.2f}')
                                             for count, seconds in growth['store'].items()])
    yield from section('Chords')
    yield from chord_lines(chords)


def chord_lines(chords: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section's text and table."""
    yield 'Seconds from the start of a chord of empty parts until its body runs, on one prefork worker of 2, with'
    yield 'Redis as broker; behind the colon, how many times as long as ours. Measured on {date}.'.format_map(chords)
    yield ''
    rows = []
    for size, seconds in chords['seconds'].items():
        ours = seconds['ours']
        rows.append((size, f'{statistics.median(ours):.2f}', *(
            f'{statistics.median(seconds[name]):.2f}: {times(ratio(ours, seconds[name]))}'
            for name in ('released', 'redis'))))
    yield from table(('Parts', 'Ours, s', 'Released, s', 'Redis, s'), rows)


def lag(values: list[float]) -> str:
    """Return lags in milliseconds."""
    spread = Spread.of(values)
    return f'{spread.median * 1000:.0f} ({spread.low * 1000:.0f}–{spread.high * 1000:.0f})'


def main(results_file: str, chords_file: str, docs: str) -> None:
    """Write the page and its charts."""
    results = json.loads(Path(results_file).read_text())
    chords = json.loads(Path(chords_file).read_text())
    static = Path(docs, '_static')
    static.mkdir(exist_ok=True)
    for place, description in (('far', 'through a slow network'), ('near', 'over loopback')):
        chart = bars(f'Wall time {description}', 'ms', wall_times(results[place]))
        (static / f'measurements-{place}.svg').write_text(chart)
    Path(docs, 'measurements.rst').write_text('\n'.join(page(results, chords)))


if __name__ == '__main__':
    main(*sys.argv[1:])
