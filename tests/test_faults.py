"""The short form of `benchmarks/faults.py`: faults done to real processes."""
import importlib.util
from pathlib import Path


def test_no_fault_loses_a_run():
    spec = importlib.util.spec_from_file_location('faults', Path(__file__).parents[1]/'benchmarks'/'faults.py')
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    said = []
    rows = faults.measure(kills=4, times=1, seed=1, say=lambda *args: said.append(args))
    assert len(rows) == len(faults.FAULTS) and all(tried for _, tried, _, _ in rows)
    assert [lost for *_, lost in rows] == [0]*len(rows), said
