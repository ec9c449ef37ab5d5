"""What `reproduce` does with a name, as a job: `check()` what is known before the first seed,
`run(seed, show)`, with a function that is told where it stands, and `finish()` when all seeds are
complete."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import check_positive
from .choose_averages import evaluate_seed
from .compare_ensembles import evaluate, is_compared
from .machine import process_settings
from .measure_surfaces import check_solutions, measure_seed
from .measure_transfers import fine_tune_seed
from .plan import runs
from .recipe_learner import recipe_data, recipe_learner
from .recipes import LANDSCAPES, RECIPES, scaled
from .record import Settings, check_record, read_records, what_is_run
from .train import run_seed
from .transfer_record import check_transfer, read_transfers, what_is_fine_tuned
from .transfers import TRANSFERS

__all__ = ['TrainingJob', 'SurfaceJob', 'TransferJob']


# plain data: processes of their own get a copy
@dataclass(frozen=True)
class _Job:
    "The arguments of `reproduce`."

    name: str
    seeds: range
    out: Path
    settings: Settings
    source: str | Path | None
    threads: int  # of the CPU, for each seed
    until: float  # the `time.time()` by which it ends
    jobs: int  # seeds side by side
    solutions: str | Path | None  # the folder with the weights that a surface is measured around

    def check(self):
        "Raise `ValueError` for what cannot be run, before anything is written."
        check_positive('scale', self.settings.scale)
        try:
            torch.empty(1, device=self.settings.device)
        except (RuntimeError, AssertionError) as e:
            said = str(e).splitlines()[0]
            raise ValueError(f'device {self.settings.device!r} cannot be used: {said}') from None

    def finish(self):
        "What is left to do when all seeds are complete."


class TrainingJob(_Job):
    "Trains the seeds of a recipe."

    @property
    def recipe(self):
        return RECIPES[self.name]

    def check(self):
        "As `_Job.check`, and `ValueError` where the folder's seeds were run with others."
        super().check()
        if self.solutions is not None:
            raise ValueError(f'solutions are of width-, plane- and curve- only, and {self.name} trains its own')
        recipe = scaled(self.recipe, self.settings.scale)
        runs(recipe)  # raises where the scale leaves too little
        _, images = recipe_data(recipe, self.source, self.settings)
        in_common = what_is_run(recipe, self.settings, images)
        for data in read_records(self.out).values():
            check_record(data, self.out, in_common)

    def run(self, seed: int, show):
        """Train a seed, or what an earlier call has left of it, and choose its averages, where the recipe has some.
        Raises as `run_seed` and `evaluate_seed` do.
        """
        record = run_seed(
            self.recipe, seed, self.out, self.settings, self.source, self.threads, self.until, show=show, jobs=self.jobs
        )
        if self.recipe.averages:
            recipe = scaled(self.recipe, self.settings.scale)
            threads = record['threads']
            evaluate_seed(recipe, seed, self.out, self.settings, self.source, threads, self.until, show)

    def finish(self):
        "Compare the ensembles, where the recipe has some and these seeds have not been compared."
        if not self.recipe.ensembles or is_compared(self.out, self.seeds):
            return
        recipe = scaled(self.recipe, self.settings.scale)
        data, _ = recipe_data(recipe, self.source, self.settings)
        with process_settings(self.settings, self.threads):
            evaluate(self.out, self.seeds, recipe_learner(recipe, 0, self.settings, data))


class SurfaceJob(_Job):
    "Measures the loss surface around what the seeds of another recipe have left."

    @property
    def recipe(self):
        return LANDSCAPES[self.name]

    @property
    def folder_of_solutions(self) -> Path:
        return Path(self.solutions or self.out.parent / self.recipe.base)

    def check(self):
        "As `_Job.check`, and `ValueError` where a seed's solutions are missing or not complete."
        super().check()
        for seed in self.seeds:
            check_solutions(self.recipe, seed, self.folder_of_solutions)

    def run(self, seed: int, show):
        "Measure around a seed's solutions, or go on with it. Raises as `measure_seed` does."
        measure_seed(
            self.recipe,
            seed,
            self.out,
            self.settings,
            self.source,
            self.threads,
            self.until,
            show=show,
            solutions=self.folder_of_solutions,
        )


class TransferJob(_Job):
    "Fine-tunes the seeds of a recipe of transfer learning, and makes of that what can be made."

    @property
    def recipe(self):
        return TRANSFERS[self.name].scaled(self.settings.scale)

    def check(self):
        "As `_Job.check`, and `ValueError` for what is not used here, or seeds in the folder that were run with others."
        super().check()
        if self.solutions is not None:
            raise ValueError(f'solutions are of width-, plane- and curve- only, and {self.name} trains its own')
        if self.settings.compile is not None:
            raise ValueError(f'compile={self.settings.compile!r} cannot be used with {self.name}: leave it out')
        recipe = self.recipe
        _, images = recipe.task.load(self.source, self.settings.images, self.settings.test_images)
        in_common = what_is_fine_tuned(recipe, self.settings, images)
        for data in read_transfers(self.out).values():
            check_transfer(data, self.out, in_common)

    def run(self, seed: int, show):
        "Run a seed, or go on with it. Raises as `fine_tune_seed` does."
        fine_tune_seed(
            self.recipe,
            seed,
            self.out,
            self.settings,
            self.source,
            self.threads,
            self.until,
            show=show,
            jobs=self.jobs,
        )
