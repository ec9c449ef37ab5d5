"""Puts the measured numbers of results/*/report.json into README, results and notebooks, between
markers.

    python results/publish.py           # write
    python results/publish.py --check   # exit with 1 if something would change

A marker is a comment of HTML, which no reader sees, in front of the text that it stands for, and
<!--/--> behind it.

Of a row: mean and standard deviation. Of a difference: mean, 95 % interval, number of seeds.

    <!--= small-cifar100 | SWA 1.5B | error -->
    <!--= small-cifar100 | SWA 1.5B - SGD 1B | error -->

How many seeds, a table of rows, and a table of differences, folder by folder.

    <!--= seeds | small-cifar100 -->
    <!--= rows | small-cifar100 | SGD 1B; SWA 1.5B -->
    <!--= differences | small-cifar100, small-cifar10 | SWA 1.5B - SGD 1B; SWA 1B - SGD 1B -->
"""

import json
import os
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(r'(<!--= (?P<what>(?:(?!-->).)*?) -->)(?P<text>(?:(?!<!--).)*)(?P<end><!--/-->)?', re.DOTALL)
_DIGITS = {'error': 2, 'loss': 4, 'distance': 2, 'relative': 3, 'greatest error': 2, 'length': 2}
_UNITS = {'error': ' points', 'loss': '', 'distance': '', 'relative': '', 'greatest error': ' points', 'length': ''}


def published(text: str, folder: Path | None = None) -> str:
    """`text`, of a file in `folder` (default: results), with the numbers between its markers as
    they are measured.

    Raises `ValueError` for a marker that means nothing, or that has no end.
    """

    def replaced(m):
        if m['end'] is None:
            raise ValueError(f'the marker {m["what"]!r} has no <!--/--> behind its text')
        return m[1] + _said([part.strip() for part in m['what'].split('|')], folder or ROOT / 'results') + m['end']

    return _MARKED.sub(replaced, text)


def files() -> list[Path]:
    return [
        ROOT / 'README.md',
        *sorted((ROOT / 'results').glob('*.md')),
        *sorted((ROOT / 'notebooks').glob('*.ipynb')),
        *sorted((ROOT / 'docs').rglob('*.md')),
    ]


def put_into(file: Path) -> str:
    """The content of `file` as it should be. In a notebook the text of its cells is looked through,
    its outputs are not.
    """
    content = file.read_text()
    if file.suffix != '.ipynb':
        return published(content, file.parent)
    notebook = json.loads(content)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = published(''.join(cell['source']), file.parent).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + '\n' if notebook != json.loads(content) else content


def _said(parts, place) -> str:
    try:
        if parts[0] == 'seeds':
            return str(len(_report(parts[1])['seeds']))
        if parts[0] == 'rows':
            return _table_of_rows(parts[1], _names(parts[2]))
        if parts[0] == 'differences':
            return _table_of_differences([p.strip() for p in parts[1].split(',')], _names(parts[2]), place)
        folder, name, quantity = parts
        report = _report(folder)
        if name in report['rows']:
            return _spread(report['rows'][name][quantity], _DIGITS[quantity]) + ' %' * (quantity == 'error')
        return _difference(report['differences'][name][quantity], quantity)
    except (LookupError, TypeError, ValueError, FileNotFoundError) as e:
        raise ValueError(f'the marker {" | ".join(parts)!r} means nothing ({type(e).__name__}: {e})') from None


def _names(text):
    return [name.strip() for name in text.split(';')]


@cache
def _report(folder) -> dict:
    return json.loads((ROOT / 'results' / folder / 'report.json').read_text())


def _spread(s, digits):
    return f'{s["mean"]:.{digits}f}' + ('' if s['std'] is None else f' ± {s["std"]:.{digits}f}')


def _interval(d, digits):
    return '' if d['low'] is None else f'{d["low"]:+.{digits}f} to {d["high"]:+.{digits}f}'


def _difference(d, quantity):
    digits = _DIGITS[quantity]
    interval = f'95 % interval {_interval(d, digits)}, ' if d['low'] is not None else ''
    return f'{d["mean"]:+.{digits}f}{_UNITS[quantity]} ({interval}n = {d["n"]})'


def _table_of_rows(folder, names):
    rows = _report(folder)['rows']
    columns = ['test error, %', 'test loss']
    cells = [[_spread(rows[n]['error'], 2), _spread(rows[n]['loss'], 4)] for n in names]
    if any('epochs' in rows[n] for n in names):
        columns.insert(0, 'epochs')
        for n, row in zip(names, cells):
            row.insert(0, str(rows[n].get('epochs', '')))
    lines = ['', '', f'| | {" | ".join(columns)} |', '|---' * (len(columns) + 1) + '|']
    lines += [f'| {n} | {" | ".join(row)} |' for n, row in zip(names, cells)]
    return '\n'.join(lines) + '\n\n'


def _cell(d, digits):
    return f'{d["mean"]:+.{digits}f}' + ('' if d['low'] is None else f' ({_interval(d, digits)})')


def _table_of_differences(folders, names, place):
    lines = ['', '', '| | | n | error, points (95 % interval) | test loss (95 % interval) |', '|---|---|---|---|---|']
    reports = {folder: _report(folder)['differences'] for folder in folders}
    for name in names:
        if not any(name in differences for differences in reports.values()):
            raise LookupError(name)
    for folder, differences in reports.items():
        link = os.path.relpath(ROOT / 'results' / folder / 'report.md', place)
        for name in names:
            if name in differences:
                error, loss = differences[name]['error'], differences[name]['loss']
                cells = f'{error["n"]} | {_cell(error, 2)} | {_cell(loss, 4)}'
                lines.append(f'| [`{folder}`]({link}) | {name} | {cells} |')
    return '\n'.join(lines) + '\n\n'


def main(argv):
    is_check = '--check' in argv
    changed = {file: content for file in files() if (content := put_into(file)) != file.read_text()}
    for file, content in changed.items():
        print(file.relative_to(ROOT))
        if not is_check:
            file.write_text(content)
    return int(is_check and bool(changed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
