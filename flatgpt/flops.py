"""Compute the share of a GPU's peak FLOP/s that a run uses."""

import re

import torch

# dense bf16 or fp16 FLOP/s of the vendors' datasheets; the first name in the device's name wins
PEAK_FLOPS = {
    'GB300': 2500e12, 'GB200': 2500e12, 'GH200': 989e12, 'B300': 2250e12, 'B200': 2250e12,
    'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
    'H800': 989e12, 'H20': 148e12, 'A100': 312e12, 'A800': 312e12, 'A40': 150e12, 'A10G': 70e12,
    'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'RTX 6000 Ada': 364e12,
    'RTX A6000': 155e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 4080': 97e12,
    'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12, 'MI300X': 1307e12, 'MI250X': 383e12,
}


def peak_flops(device):
    """Return the peak FLOP/s of a torch.device in bf16 or fp16; None if unknown."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    if 'Laptop' in name:  # the names of the desktop cards, less power
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)


def mfu_of(model, sequences, seconds):
    """Return the model FLOPs utilisation, a share of the device's peak.

    sequences: of block_size tokens, trained on in `seconds`. None if the peak is not known.
    """
    peak = peak_flops(model.lm_head.weight.device)
    flops = model.flops_per_token() * model.config.block_size * sequences
    return None if peak is None else flops / seconds / peak
