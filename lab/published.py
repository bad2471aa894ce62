"""
List published GPTs: their shapes, their training, and what it took.

    PUBLISHED['LLaMA 65B'].gpu_hours                    # 1022362
    costs.parameters(PUBLISHED['LLaMA 65B'].config)     # {'projections': ..., ...}

GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), table 2.
GPT-3: "Language Models are Few-Shot Learners" (Brown et al. 2020), tables 2.1 and D.1; its GPU
hours are 14.8 days of 10,000 V100s by "Carbon Emissions and Large Neural Network Training"
(Patterson et al. 2021), table 4.
Chinchilla: "Training Compute-Optimal Large Language Models" (Hoffmann et al. 2022), table 4.
LLaMA: "LLaMA" (Touvron et al. 2023), tables 2 and 15.
Llama 2: "Llama 2" (Touvron et al. 2023), tables 1 and 2.
Llama 3: "The Llama 3 Herd of Models" (2024), table 3; GPU hours of Llama 3.1's model card.
"""

from typing import NamedTuple

from lab import common
from model import GPTConfig

PF_DAY = 86400e15  # FLOPs of a day at 1e15 FLOP/s


class Published(NamedTuple):
    """Describe a model by its paper; None: not published."""

    config: GPTConfig
    parameters: str  # as printed
    batch: float  # tokens of a step, the most where it grows
    learning_rate: float | None = None  # the highest
    tokens: float | None = None  # trained on
    pf_days: float | None = None  # compute of the training
    gpu: str | None = None  # name in flatgpt.flops.GPUS
    gpu_hours: float | None = None


def gpt(layers, heads, channels, context):
    """Return the GPTConfig of a GPT-2 or GPT-3."""
    return GPTConfig(n_layer=layers, n_head=heads, n_embd=channels, block_size=context,
                     vocab_size=50257)


def llama(layers, heads, channels, n_inner, **changes):
    """Return the GPTConfig of a LLaMA."""
    return common.gpt_config('llama', **{
        'n_layer': layers, 'n_head': heads, 'n_embd': channels, 'n_inner': n_inner,
        'vocab_size': 32000, 'block_size': 2048, **changes})


CHINCHILLA = GPTConfig(n_layer=80, n_head=64, n_embd=8192, block_size=2048, vocab_size=32000,
                       norm='rmsnorm', pos='rope', bias=False)
LLAMA_3 = {'n_kv_head': 8, 'vocab_size': 128256, 'block_size': 8192}

PUBLISHED = {
    'GPT-2 124M': Published(gpt(12, 12, 768, 1024), '117M', 0.5e6),
    'GPT-2 355M': Published(gpt(24, 16, 1024, 1024), '345M', 0.5e6),
    'GPT-2 774M': Published(gpt(36, 20, 1280, 1024), '762M', 0.5e6),
    'GPT-2 1.5B': Published(gpt(48, 25, 1600, 1024), '1542M', 0.5e6),
    'GPT-3 125M': Published(gpt(12, 12, 768, 2048), '125M', 0.5e6, 6e-4, 300e9, 2.60),
    'GPT-3 350M': Published(gpt(24, 16, 1024, 2048), '356M', 0.5e6, 3e-4, 300e9, 7.42),
    'GPT-3 760M': Published(gpt(24, 16, 1536, 2048), '760M', 0.5e6, 2.5e-4, 300e9, 15.8),
    # table 2.1 prints 24 heads of 128, which are not 2048; 16 of them are
    'GPT-3 1.3B': Published(gpt(24, 16, 2048, 2048), '1.32B', 1e6, 2e-4, 300e9, 27.5),
    'GPT-3 2.7B': Published(gpt(32, 32, 2560, 2048), '2.65B', 1e6, 1.6e-4, 300e9, 55.2),
    'GPT-3 6.7B': Published(gpt(32, 32, 4096, 2048), '6.66B', 2e6, 1.2e-4, 300e9, 139),
    # table 2.1 prints 5140 channels; 40 heads of 128 are 5120
    'GPT-3 13B': Published(gpt(40, 40, 5120, 2048), '12.85B', 2e6, 1e-4, 300e9, 268),
    'GPT-3 175B': Published(gpt(96, 96, 12288, 2048), '174.6B', 3.2e6, 0.6e-4, 300e9, 3640,
                            'V100', 10_000 * 14.8 * 24),
    'Chinchilla': Published(CHINCHILLA, '70B', 3e6, 1e-4, 1.4e12, 5.76e23 / PF_DAY),
    'LLaMA 7B': Published(llama(32, 32, 4096, 11008), '6.7B', 4e6, 3e-4, 1e12, None,
                          'A100', 82_432),
    'LLaMA 13B': Published(llama(40, 40, 5120, 13824), '13.0B', 4e6, 3e-4, 1e12, None,
                           'A100', 135_168),
    'LLaMA 33B': Published(llama(60, 52, 6656, 17920), '32.5B', 4e6, 1.5e-4, 1.4e12, None,
                           'A100', 530_432),
    'LLaMA 65B': Published(llama(80, 64, 8192, 22016), '65.2B', 4e6, 1.5e-4, 1.4e12, None,
                           'A100', 1_022_362),
    'Llama 2 7B': Published(llama(32, 32, 4096, 11008, block_size=4096), '7B', 4e6, 3e-4, 2e12,
                            None, 'A100', 184_320),
    'Llama 2 13B': Published(llama(40, 40, 5120, 13824, block_size=4096), '13B', 4e6, 3e-4, 2e12,
                             None, 'A100', 368_640),
    'Llama 2 70B': Published(llama(80, 64, 8192, 28672, n_kv_head=8, block_size=4096), '70B', 4e6,
                             1.5e-4, 2e12, None, 'A100', 1_720_320),
    'Llama 3 405B': Published(llama(126, 128, 16384, 53248, **LLAMA_3), '405B', 16e6, 0.8e-4,
                              15.6e12, 3.8e25 / PF_DAY, 'H100', 30.84e6),
}
