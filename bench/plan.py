"""
Compare the memory that --plan predicts with that of training steps on this CPU.

    $ python -m bench.plan

Each step runs in a process of its own, with one thread. torch's profiler counts the
bytes of all its tensors, those inside of operators too. The memory of the process is
larger: Python, torch, the compiler, and the gaps between freed tensors.
bench/lowering.py compares with the code that is generated for a GPU.

Prints a table and, as its last line, a JSON object.
"""

from dataclasses import fields

from bench import bare, common
from configurator import override
from flatgpt import costs, plan
from model import GPTConfig

# Settings -----------------------------------------------------------------------------------------
case = ''  # a name of CASES; '': all
config = override(globals())
# --------------------------------------------------------------------------------------------------

SHAPE = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'block_size': 256, 'batch_size': 8,
         'vocab_size': 1024}
CASES = {
    'activations': ('gpt2', SHAPE),
    'activations, modern': ('modern', SHAPE),
    'recompute': ('llama', {**SHAPE, 'recompute': True}),
    'dropout': ('gpt2', {**SHAPE, 'dropout': 0.2}),
    'micro-batches': ('gpt2', {**SHAPE, 'batch_size': 2, 'total_batch_size': 1024}),
    'long context': ('modern', {**SHAPE, 'n_embd': 128, 'block_size': 1024, 'batch_size': 2}),
    'large vocabulary': ('gpt2', {**SHAPE, 'n_embd': 128, 'n_layer': 2, 'vocab_size': 50304}),
    'weights': ('modern', {**SHAPE, 'n_embd': 512, 'block_size': 64, 'batch_size': 2}),
    "nanoGPT's 10.65M": ('gpt2', {**SHAPE, 'n_layer': 6, 'n_head': 6, 'n_embd': 384,
                                  'vocab_size': 65, 'batch_size': 16}),
}


def settings_of(name, dtype, compile):
    """Return bare.settings() of a case on the CPU."""
    preset, shape = CASES[name]
    return bare.settings(preset, device='cpu', dtype=dtype, compile=compile, **shape)


def predict(s):
    """Return {part: bytes} of the plan for the same step."""
    architecture = {field.name: s[field.name] for field in fields(GPTConfig) if field.name in s}
    how = costs.How(4 if s['dtype'] == 'float32' else 2, s['compile'], on_gpu=False)
    micro_steps = max(1, s.get('total_batch_size', 0) // (s['batch_size'] * s['block_size']))
    setup = plan.Setup(GPTConfig(**architecture), s['batch_size'], micro_steps, how=how,
                       optimizer=s['optimizer'], recompute=s.get('recompute', False))
    return plan.need(setup)


def main():
    rows, results = [['', 'predicted MB', 'measured MB', 'ratio', 'process MB']], {}
    for name in [case] if case else CASES:
        for dtype in ('float32', 'bfloat16'):
            for compile in (False, True):
                s = settings_of(name, dtype, compile)
                predicted = sum(predict(s).values())
                memory = bare.in_own_process(s, only_memory=True)
                measured, process = memory['tensors'], memory['process']
                label = f'{name}, {dtype}' + ', compiled' * compile
                rows.append([label, *(f'{n / 1e6:,.0f}' for n in (predicted, measured)),
                             f'{predicted / measured:.3f}', f'{process / 1e6:,.0f}'])
                results[label] = {'predicted': predicted, 'measured': measured, 'process': process}
    print(common.heading('plan'))
    print(common.table(rows))
    ratios = [r['predicted'] / r['measured'] for r in results.values()]
    print(f'predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}')
    common.finish('plan', 1, settings=dict(config), results=results)


if __name__ == '__main__':
    main()
