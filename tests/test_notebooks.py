"The notebooks run as they are, and what they show is what a run showed."

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == 'code' and cell.source.strip()]


def test_there_are_notebooks_to_run():
    assert {
        '01_toggle_swa.ipynb',
        '02_functional_tests.ipynb',
        '03_vgg16_cifar10.ipynb',
        '04_preresnet110_cifar10.ipynb',
        '05_ensembles.ipynb',
        '06_loss_surface.ipynb',
        '07_which_average.ipynb',
        '08_fine_tuning.ipynb',
    } <= {path.name for path in NOTEBOOKS}


@each_notebook
def test_notebook_runs_without_error_in_a_fresh_kernel(path, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
    monkeypatch.delenv('MPLBACKEND', raising=False)  # the kernel's own inline backend, as for a reader
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=180,
        kernel_name='python3',
        resources={'metadata': {'path': str(tmp_path)}},
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    assert not list(tmp_path.iterdir()), 'the notebook leaves files in its working directory'


@each_notebook
def test_stored_notebook_was_run_once_from_top_to_bottom_without_error(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o.evalue for cell in cells for o in cell.outputs if o.output_type == 'error']


@each_notebook
def test_stored_notebook_is_valid_and_holds_no_trace_of_the_machine_it_ran_on(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert dict(nb.metadata.kernelspec) == {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    printed = [
        str(o.get('text', '')) + str({k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')})
        for cell in code_cells(nb)
        for o in cell.outputs
    ]
    for text in printed:
        assert not any(trace in text for trace in (str(ROOT), str(Path.home()), 'site-packages', '/tmp/')), text[:500]
