"""The process and the machine that experiments run on: what is set for the whole process, its time,
its versions and its hardware."""

import os
import platform
from contextlib import contextmanager
from importlib.metadata import version
from time import gmtime, strftime

import torch

from ..checks import counted
from ..version import __version__

__all__ = ['TimeIsUp', 'process_settings', 'now', 'installed_versions', 'versions_text', 'hardware', 'hardware_text']

_CUBLAS = 'CUBLAS_WORKSPACE_CONFIG'  # the environment's word to cuBLAS, without which it refuses to be deterministic


class TimeIsUp(Exception):
    "There is no time for another epoch, or point; the same call goes on."


@contextmanager
def process_settings(settings, threads: int | None = None):
    """Within this context the whole process computes as `settings` say; at its end, however that
    comes, all is set as it was before.

    Set are torch's and cuDNN's determinism, cuDNN's choice of kernels by trying them, the
    environment of cuBLAS, and on a CPU the number of `threads` (`None`: as many as there are).
    """
    cudnn = torch.backends.cudnn
    benchmark = cudnn.benchmark
    cudnn_is_deterministic = cudnn.deterministic
    torch_is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cublas = os.environ.get(_CUBLAS)
    n_threads = torch.get_num_threads()
    try:
        cudnn.benchmark = not settings.deterministic
        cudnn.deterministic = settings.deterministic
        torch.use_deterministic_algorithms(settings.deterministic)
        if settings.deterministic:
            os.environ.setdefault(_CUBLAS, ':4096:8')
        if threads is not None and settings.device == 'cpu':
            torch.set_num_threads(threads)
        yield
    finally:
        cudnn.benchmark = benchmark
        cudnn.deterministic = cudnn_is_deterministic
        torch.use_deterministic_algorithms(torch_is_deterministic, warn_only=warns_only)
        if cublas is None:
            os.environ.pop(_CUBLAS, None)
        torch.set_num_threads(n_threads)


def now() -> str:
    "The time, in UTC."
    return strftime('%Y-%m-%dT%H:%M:%SZ', gmtime())


def installed_versions() -> dict:
    "Name -> version, of Python and of what results depend on."
    res = {'python': platform.python_version()}
    for name in ('torch', 'torchvision', 'fastai'):
        res[name] = version(name)
    return res | {'fastai_swa': __version__}


def versions_text(found: dict) -> str:
    return ', '.join(f'{name} {version}' for name, version in found.items())


def hardware(device: str) -> dict:
    "What a seed runs on, for its record."
    res = {}
    if device.startswith('cuda'):
        res['gpu'] = torch.cuda.get_device_name(device)
        res['cuda'] = torch.version.cuda
    return res | {'machine': platform.machine(), 'cores': os.cpu_count()}


def hardware_text(found: dict, threads: int) -> str:
    if 'gpu' in found:
        return found['gpu']
    return f'CPU, {found["machine"]}, {counted(threads, "thread")}'
