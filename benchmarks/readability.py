"""How dense is the code? Measured for each folder that holds Python files, and all of them
together.

    python benchmarks/readability.py                    # this repository python
    benchmarks/readability.py FOLDER [FOLDER ...]    # others, as that of an installed package

Columns, over the lines that are not blank:

- `over 100`, `over 120`: share of the lines with more columns than that, in per cent.
- `compound`: statements that share a line with the statement they belong to or with their neighbour
  (`if a: b`, `a; b`), for 100 lines.
- `comprehensions`: list, set and dict comprehensions and generator expressions, for 100 lines.
- `functions`: their lines, docstrings and comments included; the median, the 9 of 10 that are no
  longer than that, and the longest.
"""

import ast
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
BODIES = 'body', 'orelse', 'finalbody', 'handlers', 'cases'


@dataclass
class Density:
    "What was counted in some files."

    n_lines: int = 0
    n_over_100: int = 0
    n_over_120: int = 0
    n_compound: int = 0
    n_comprehensions: int = 0
    functions: list = field(default_factory=list)  # their lengths, in lines

    def add(self, source: str):
        "Count one file."
        lines = [line for line in source.splitlines() if line.strip()]
        self.n_lines += len(lines)
        self.n_over_100 += sum(len(line) > 100 for line in lines)
        self.n_over_120 += sum(len(line) > 120 for line in lines)
        nodes = list(ast.walk(ast.parse(source)))
        self.n_compound += n_compound(nodes)
        self.n_comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in nodes)
        self.functions += [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, FUNCTIONS)]

    def cells(self) -> list:
        "The cells of the table."
        if not self.n_lines:
            return ['0']
        n = self.n_lines
        shares = [f'{100 * count / n:.1f}' for count in (self.n_over_100, self.n_over_120, self.n_compound)]
        lengths = sorted(self.functions) or [0]
        nine_of_ten = lengths[int(0.9 * (len(lengths) - 1))]
        comprehensions = f'{100 * self.n_comprehensions / n:.1f}'
        return [str(n), *shares, comprehensions, f'{median(lengths):g}, {nine_of_ten}, {lengths[-1]}']


def n_compound(nodes) -> int:
    "How many statements begin in a line in which another one has begun?"
    starts = Counter()
    for node in nodes:
        for name in BODIES:
            block = getattr(node, name, None)
            if isinstance(block, list):
                starts.update(statement.lineno for statement in block if isinstance(statement, ast.stmt))
    return sum(count - 1 for count in starts.values())


def table(root: Path) -> str:
    "The table of `root`, in Markdown: a line for each folder, and for all."
    total, folders = Density(), {}
    for path in sorted(root.rglob('*.py')):
        folder = path.parent.relative_to(root)
        if any(part.startswith('.') or part in ('build', 'dist') for part in folder.parts):
            continue
        for density in (folders.setdefault(str(folder), Density()), total):
            density.add(path.read_text())
    rows = [['folder', 'lines', 'over 100', 'over 120', 'compound', 'comprehensions', 'functions']]
    rows.append(['---', *['--:'] * 6])
    rows += [[name, *density.cells()] for name, density in folders.items()]
    rows.append(['**all**', *total.cells()])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


if __name__ == '__main__':
    for name in sys.argv[1:] or [Path(__file__).resolve().parents[1]]:
        print(f'{Path(name).name}\n\n{table(Path(name))}\n')
