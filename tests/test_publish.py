"""The numbers in README, results and notebooks are those of report.json."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'results'))

import publish  # noqa: E402


def test_every_published_number_is_the_measured_one():
    assert [str(f) for f in publish.files() if publish.put_into(f) != f.read_text()] == []


@pytest.fixture
def measured(tmp_path, monkeypatch):
    "A row with known numbers."
    (tmp_path / 'results' / 'row').mkdir(parents=True)
    difference = {'mean': -1.234, 'low': -2.345, 'high': -0.12, 'n': 7}
    content = {
        'seeds': list(range(7)),
        'rows': {
            'SWA 1B': {
                'epochs': 60,
                'error': {'mean': 22.345, 'std': 0.456, 'n': 7},
                'loss': {'mean': 0.71234, 'std': None, 'n': 1},
            }
        },
        'differences': {
            'SWA 1B - SGD 1B': {'error': difference, 'loss': {'mean': 0.05, 'low': None, 'high': None, 'n': 1}}
        },
    }
    (tmp_path / 'results' / 'row' / 'report.json').write_text(json.dumps(content))
    monkeypatch.setattr(publish, 'ROOT', tmp_path)
    publish._report.cache_clear()
    yield tmp_path
    publish._report.cache_clear()


@pytest.mark.parametrize(
    'marker, said',
    [
        ('row | SWA 1B | error', '22.34 ± 0.46 %'),
        ('row | SWA 1B | loss', '0.7123'),
        ('seeds | row', '7'),
        ('row | SWA 1B - SGD 1B | error', '-1.23 points (95 % interval -2.35 to -0.12, n = 7)'),
        ('row | SWA 1B - SGD 1B | loss', '+0.0500 (n = 1)'),
    ],
)
def test_a_marker_is_followed_by_its_number_and_nothing_else_changes(measured, marker, said):
    text = f'before <!--= {marker} -->an old\none<!--/--> and <!--= {marker} --><!--/--> behind'
    once = publish.published(text)
    assert (
        once == f'before <!--= {marker} -->{said}<!--/--> and <!--= {marker} -->{said}<!--/--> behind'
        and publish.published(once) == once
    )


def test_tables_are_of_rows_and_of_differences(measured):
    rows = publish.published('<!--= rows | row | SWA 1B --><!--/-->')
    assert (
        '\n\n| | epochs | test error, % | test loss |\n|---|---|---|---|\n'
        '| SWA 1B | 60 | 22.34 ± 0.46 | 0.7123 |\n\n<!--/-->' in rows
    )
    table = publish.published('<!--= differences | row | SWA 1B - SGD 1B --><!--/-->')
    assert '| [`row`](row/report.md) | SWA 1B - SGD 1B | 7 | -1.23 (-2.35 to -0.12) | +0.0500 |' in table


def test_the_text_of_a_notebook_is_looked_through_and_its_outputs_are_not(measured):
    marked = '<!--= seeds | row -->3<!--/-->'
    cells = [
        {'cell_type': 'markdown', 'source': [f'of {marked} seeds']},
        {'cell_type': 'code', 'source': [f'print("{marked}")'], 'outputs': []},
    ]
    file = measured / 'a.ipynb'
    file.write_text(json.dumps({'cells': cells}))
    content = json.loads(publish.put_into(file))['cells']
    assert content[0]['source'] == ['of <!--= seeds | row -->7<!--/--> seeds'] and content[1] == cells[1]


@pytest.mark.parametrize(
    'marker',
    [
        'row',
        'row | SWA 2B | error',
        'row | SWA 1B | width',
        'elsewhere | SWA 1B | error',
        'rows | row | SGD 1B',
        'differences | row | SWA 1B - sgd 1B',
    ],
)
def test_a_marker_that_means_nothing_is_named(measured, marker):
    with pytest.raises(ValueError, match='the marker .* means nothing'):
        publish.published(f'<!--= {marker} --><!--/-->')


def test_a_marker_without_an_end_takes_no_text_away(measured):
    text = '<!--= seeds | row -->7 seeds. Prose. <!--= row | SWA 1B | error -->2<!--/-->'
    with pytest.raises(ValueError, match="the marker 'seeds | row' has no <!--/--> behind its text"):
        publish.published(text)


def test_tables_link_to_the_reports_from_where_they_stand(measured):
    marker = '<!--= differences | row | SWA 1B - SGD 1B --><!--/-->'
    (measured / 'README.md').write_text(marker)
    (measured / 'results' / 'README.md').write_text(marker)
    assert '(results/row/report.md)' in publish.put_into(
        measured / 'README.md'
    ) and '(row/report.md)' in publish.put_into(measured / 'results' / 'README.md')


def test_the_check_says_which_file_differs_and_writes_nothing(measured, monkeypatch, capsys):
    (measured / 'README.md').write_text('<!--= seeds | row -->3<!--/-->')
    (measured / 'notebooks').mkdir()
    (measured / 'docs').mkdir()
    assert (
        publish.main(['--check']) == 1
        and capsys.readouterr().out == 'README.md\n'
        and '3' in (measured / 'README.md').read_text()
    )
    assert publish.main([]) == 0 and '>7<' in (measured / 'README.md').read_text() and publish.main(['--check']) == 0
