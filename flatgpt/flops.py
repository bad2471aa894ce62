"""Compute the share of a GPU's peak FLOP/s that a run uses; list what GPUs can do."""

import re
from typing import NamedTuple

import torch

from configurator import UserError, nearest


class GPU(NamedTuple):
    """Describe a GPU by its vendor's datasheet; bytes and bytes/s are decimal."""

    flops: float  # dense bf16 or fp16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s of that memory
    link: float = 32e9  # bytes/s to the other GPUs of a machine, one way; 32e9: PCIe 4
    network: float = 12.5e9  # bytes/s to other machines, for each GPU; 12.5e9: 100 Gbit/s


# the first name in the device's name wins
GPUS = {
    'GB300': GPU(2500e12, 288e9, 8e12, 900e9, 100e9),
    'GB200': GPU(2500e12, 186e9, 8e12, 900e9, 50e9),
    'GH200': GPU(989e12, 96e9, 4e12, 450e9, 50e9),
    'B300': GPU(2250e12, 288e9, 8e12, 900e9, 100e9),
    'B200': GPU(2250e12, 180e9, 8e12, 900e9, 50e9),
    'H200': GPU(989e12, 141e9, 4.8e12, 450e9, 50e9),
    'H100 PCIe': GPU(756e12, 80e9, 2e12, 64e9, 50e9),
    'H100 NVL': GPU(835e12, 94e9, 3.9e12, 300e9, 50e9),
    'H100': GPU(989e12, 80e9, 3.35e12, 450e9, 50e9),
    'H800': GPU(989e12, 80e9, 3.35e12, 200e9, 50e9),
    'H20': GPU(148e12, 96e9, 4e12, 450e9, 50e9),
    'A100-SXM4-40GB': GPU(312e12, 40e9, 1.56e12, 300e9, 25e9),
    'A100': GPU(312e12, 80e9, 2.04e12, 300e9, 25e9),
    'A800': GPU(312e12, 80e9, 2.04e12, 200e9, 25e9),
    'A40': GPU(150e12, 48e9, 0.7e12), 'A10G': GPU(70e12, 24e9, 0.6e12),
    'A10': GPU(125e12, 24e9, 0.6e12), 'L40S': GPU(362e12, 48e9, 0.86e12),
    'L40': GPU(181e12, 48e9, 0.86e12), 'L4': GPU(121e12, 24e9, 0.3e12),
    'RTX 6000 Ada': GPU(364e12, 48e9, 0.96e12), 'RTX A6000': GPU(155e12, 48e9, 0.77e12),
    'RTX 5090': GPU(210e12, 32e9, 1.79e12, 64e9), 'RTX 4090': GPU(165e12, 24e9, 1.01e12),
    'RTX 4080': GPU(97e12, 16e9, 0.72e12), 'RTX 3090': GPU(71e12, 24e9, 0.94e12),
    'V100': GPU(125e12, 16e9, 0.9e12, 150e9), 'T4': GPU(65e12, 16e9, 0.32e12, 16e9),
    'MI300X': GPU(1307e12, 192e9, 5.3e12, 448e9, 50e9),
    'MI250X': GPU(383e12, 128e9, 3.2e12, 100e9, 25e9),
}


def gpu_named(name):
    """Return the GPU of a device's name; None if unknown."""
    if 'Laptop' in name:  # the names of the desktop cards, less power
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf'\b{key}\b', name)), None)


class Machine(NamedTuple):
    """Describe machines of equal devices."""

    name: str
    gpu: GPU  # or a CPU by measured figures
    n_gpus: int = 1  # of each machine
    n_machines: int = 1

    @property
    def size(self):
        return self.n_gpus * self.n_machines


def machine_named(text):
    """Return the Machine of a text such as 'H100', '8xH200' or '2x8xH100'.

    Raises UserError for an unknown name.
    """
    *counts, name = re.split(r'(?<=\d)x', text)
    gpu = {key.lower(): gpu for key, gpu in GPUS.items()}.get(name.strip().lower())
    numbers = [int(count) if count.isdecimal() else 0 for count in counts]
    if gpu is None or len(counts) > 2 or not all(numbers):
        raise UserError(f"plan={text!r}: expected a GPU such as 'H100', several as '8xH200', or "
                        f"machines of several as '2x8xH100'{nearest(name, GPUS)}; known are "
                        f'{", ".join(GPUS)}')
    return Machine(text, gpu, *reversed(numbers))


def peak_flops(device):
    """Return the peak FLOP/s of a torch.device in bf16 or fp16; None if unknown."""
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
    return gpu and gpu.flops


def mfu_of(model, tokens_per_s):
    """Return the model FLOPs utilisation, a share of the device's peak.

    tokens_per_s: that the device trains on. None if the peak is not known.
    """
    peak = peak_flops(model.lm_head.weight.device)
    return None if peak is None else model.flops_per_token() * tokens_per_s / peak
