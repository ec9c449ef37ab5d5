"""The process and the machine that experiments run on: what is set for the whole process, its time,
its versions and its hardware."""

import os
import platform
from contextlib import contextmanager
from importlib.metadata import version
from time import gmtime, strftime

import torch

from ..version import __version__

__all__ = ['TimeIsUp', 'settings_restored', 'now', 'versions', 'hardware']


class TimeIsUp(Exception):
    "There is no time for another epoch, or point; the same call goes on."


@contextmanager
def settings_restored():
    "What a seed sets for the whole process."
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    kept = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = kept[:2]
        torch.use_deterministic_algorithms(kept[2])
        torch.set_num_threads(threads)


def now():
    return strftime('%Y-%m-%dT%H:%M:%SZ', gmtime())


def versions() -> dict:
    return (
        {'python': platform.python_version()}
        | {name: version(name) for name in ('torch', 'torchvision', 'fastai')}
        | {'fastai_swa': __version__}
    )


def hardware(device) -> dict:
    gpu = {'gpu': torch.cuda.get_device_name(device), 'cuda': torch.version.cuda} if device.startswith('cuda') else {}
    return gpu | {'machine': platform.machine(), 'cores': os.cpu_count()}
