"""What an experiment sets for the whole process, and that it is set back."""

import os

import pytest
import torch

from fastai_swa.experiments import RECIPES, Settings
from fastai_swa.experiments.machine import process_settings
from fastai_swa.experiments.recipe_learner import recipe_data, recipe_learner

CUBLAS = 'CUBLAS_WORKSPACE_CONFIG'


def now_set():
    "All that is set for the whole process."
    cudnn = torch.backends.cudnn
    return {
        'benchmark': cudnn.benchmark,
        'cudnn': cudnn.deterministic,
        'torch': torch.are_deterministic_algorithms_enabled(),
        'warns only': torch.is_deterministic_algorithms_warn_only_enabled(),
        'cublas': os.environ.get(CUBLAS),
        'threads': torch.get_num_threads(),
    }


@pytest.fixture(params=[None, ':16:8'])
def before(request, monkeypatch):
    "What is set before, nothing of which is what `process_settings` sets, nor what torch begins with."
    if request.param is None:
        monkeypatch.delenv(CUBLAS, raising=False)
    else:
        monkeypatch.setenv(CUBLAS, request.param)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield now_set()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_process_that_is_to_be_fast_lets_cudnn_choose(before):
    with process_settings(Settings(), threads=2):
        assert now_set() == before | {
            'benchmark': True,
            'cudnn': False,
            'torch': False,
            'warns only': False,
            'threads': 2,
        }
    assert now_set() == before


def test_a_process_that_is_to_be_deterministic_says_so_to_all_libraries(before):
    with process_settings(Settings(deterministic=True), threads=2):
        assert now_set() == {
            'benchmark': False,
            'cudnn': True,
            'torch': True,
            'warns only': False,
            'cublas': before['cublas'] or ':4096:8',
            'threads': 2,
        }
    assert now_set() == before


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_set_as_before(before, error):
    with pytest.raises(error), process_settings(Settings(deterministic=True), threads=2):
        raise error
    assert now_set() == before


def test_the_threads_of_a_gpus_process_and_those_that_nobody_asked_for_stay(before):
    with process_settings(Settings(device='cuda'), threads=2):
        assert torch.get_num_threads() == 3
    with process_settings(Settings()):
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize('deterministic', [True, False])
def test_making_a_learner_sets_nothing_for_the_process(before, deterministic):
    recipe = RECIPES['ensembles-digits']
    settings = Settings(deterministic=deterministic)
    recipe_learner(recipe, 0, settings, recipe_data(recipe, None, settings)[0])
    assert now_set() == before
