"""The site: its pages are the Markdown files and notebooks of the repository, where they lie.

README.md is the first, contents.md what stands at the side; the reference is made of docstrings.

    sphinx-build -c docs . build/site
"""

import inspect
import sys
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fastai_swa  # noqa: E402

project = 'fastai_swa'
author = 'the fastai_swa developers'
version = release = fastai_swa.__version__
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.intersphinx', 'sphinx_copybutton']

# sources: the repository itself, so that links between its pages hold here and there
root_doc = 'README'
include_patterns = [
    'README.md',
    'docs/*.md',
    'notebooks/*.ipynb',
    'results/**.md',
    'benchmarks/README.md',
    'CHANGELOG.md',
]
exclude_patterns = ['.venv*', 'build', '**/.ipynb_checkpoints', 'docs/contents.md']

nb_execution_mode = 'off'  # the notebooks' stored outputs are shown
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3

# docstrings put code into single backticks, as Markdown has it
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # they stand in the signatures
intersphinx_mapping = {}

html_theme = 'furo'
html_title = f'fastai_swa {version}'
html_copy_source = False
html_static_path = []
templates_path = []


def add_arguments(app, what, name, obj, options, lines):
    "Below a docstring what the comments beside the arguments say of them."
    function = obj.__init__ if inspect.isclass(obj) else obj
    if not inspect.isroutine(function):
        return
    try:
        arguments = docments(function, full=True, returns=False)
    except Exception:  # it has no source
        return
    said = [(n, a.docment) for n, a in arguments.items() if n not in ('self', 'return') and a.docment]
    if said:
        lines.append('')
    for argument, comment in said:
        lines.append(f':param {argument}: {" ".join(comment.split())}')


def add_contents(app, docname, source):
    if docname == root_doc:
        source[0] += '\n' + (ROOT / 'docs' / 'contents.md').read_text()


def write_entrance(app, exception):
    "index.html, which leads to the first page."
    if exception is None:
        entrance = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html"><title>fastai_swa</title>'
        Path(app.outdir, 'index.html').write_text(entrance)


def setup(app):
    app.connect('autodoc-process-docstring', add_arguments)
    app.connect('source-read', add_contents)
    app.connect('build-finished', write_entrance)
