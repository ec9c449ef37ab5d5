"""The pages: their Python runs, their links lead somewhere, and all that is public is in the reference."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import fastai_swa
import fastai_swa.learner
from fastai_swa.landscape import Surface

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [page for page in sorted((ROOT / 'docs').glob('*.md')) if page.stem != 'contents']
PAGES = [ROOT / 'README.md', *GUIDES, ROOT / 'results' / 'README.md', ROOT / 'benchmarks' / 'README.md']


def python_of(page) -> list[str]:
    return re.findall(r'```python\n(.*?)```', page.read_text(), re.S)


@pytest.mark.parametrize('page', [page for page in GUIDES if python_of(page)], ids=lambda page: page.stem)
def test_the_python_of_each_guide_runs_from_a_fresh_start(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in python_of(page):
        exec(block, space)
    plt.close('all')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if target.startswith('http'):
            continue
        path, _, heading = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f'{page.name}: {target}'
        if heading:
            assert heading in headings(file), f'{page.name}: {target}'


def headings(page) -> set[str]:
    "As links name them."
    lines = re.findall(r'^#+ (.+)$', page.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', line.lower()).replace(' ', '-') for line in lines}


def test_each_guide_is_in_the_sites_contents_and_linked_from_the_readme():
    contents = (ROOT / 'docs' / 'contents.md').read_text()
    readme = (ROOT / 'README.md').read_text()
    for page in GUIDES:
        assert re.search(rf'^docs/{page.stem}$', contents, re.M), f'{page.stem} is not in the contents'
        assert page.stem in ('reference', 'development') or f'(docs/{page.name}' in readme, f'{page.stem} is not linked'


def test_each_public_name_is_in_the_reference():
    reference = (ROOT / 'docs' / 'reference.md').read_text()
    for name in fastai_swa.__all__:
        assert f':: fastai_swa.{name}\n' in reference, name
    methods = set(re.findall(r'Learner\.(\w+)', reference))
    source = Path(fastai_swa.learner.__file__).read_text()
    patched = set(re.findall(r'^@patch\n(?:@delegates\(\w+\)\n)?def (\w+)', source, re.M))
    assert methods == patched
    assert all(cls.__name__ in reference for cls in Surface.kinds.values())


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120
