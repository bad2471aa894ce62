"""
An ability that seems to emerge with scale, and the smooth curve that it is made of.

    $ python -m lab.emergence              # 100 seconds on one core
    $ python -m lab.emergence --length=4   # shorter answers: where is the jump now?
    $ python -m lab.emergence --seeds=1 --widths=3,4,5,6,7,8,9,10,11,12

Models of 274 to 16,008 parameters, all trained alike, sort strings of 16 random letters. Counted in whole answers those
up to 732 parameters can't do it at all, and those from 4,548 on can: 0%, 0%, 0%, 10%, 51%, 94%, 94%, 99%. The
log-likelihood of a letter rises all the while: -2.08, -1.53, -1.20, -0.59, -0.25, -0.03, -0.02, -0.00 nats. A whole
answer takes 16 right letters in a row, and the share of right letters to the power of 16 is within 3.3 points of the
share of whole answers at every size: the jump is made by the way of counting. (Measured on an AMD EPYC.)

How smooth is smooth: at 1,410 parameters the likelihood has made 72% of its rise and the whole answers 10%; but from
one size to the next, about a factor of two, it too makes up to 30%, where the whole answers make 43%.

Source: "Are Emergent Abilities of Large Language Models a Mirage?" (Schaeffer et al. 2023). Needs '.[lab]'.
"""

import sys

import torch

from config.presets import PRESETS
from configurator import check, explain_errors, override
from lab import common
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
widths = '2,3,4,6,8,12,16,24'  # n_embd of the models, from small to large
length = 16  # letters of a string
n_letters = 26  # of the alphabet
n_layer = 2
steps = 400  # for every model
batch_size = 128  # strings
seeds = 2  # runs of each model, whose figures are averaged
n_test = 2000  # strings that all models are asked; of 16 letters none is likely to have been trained on
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


def strings(n, generator):
    """-> inputs x and targets y, (n, 2 length): a string of random letters, '=', and, to be predicted, it sorted."""
    question = torch.randint(n_letters, (n, length), generator=generator)
    text = torch.cat((question, torch.full((n, 1), n_letters), question.sort(dim=1).values), dim=1)  # n_letters: '='
    x, y = text[:, :-1], text[:, 1:].clone()
    y[:, :length] = -1  # random letters can't be predicted
    return x, y


def train_one(width, run_seed):
    """-> a model of that width, trained as all of them are."""
    torch.manual_seed(run_seed)
    # absolute positions, for the task is about places; SwiGLU's usual width has a floor of 64
    model = GPT(GPTConfig(**{**PRESETS['modern'], 'pos': 'learned', 'n_layer': n_layer, 'n_head': 1, 'n_embd': width,
                             'n_inner': max(4, 8 * width // 3), 'vocab_size': n_letters + 1,
                             'block_size': 2 * length}))
    generator = torch.Generator().manual_seed(run_seed)
    for _ in common.train(model, lambda step: strings(batch_size, generator), steps):
        pass
    return model


@torch.no_grad()
def measure(model, x, y):
    """
    -> the answers' log-likelihood, nats a letter; the share of letters that are the likeliest, given the right ones
    before; and of answers whose letters all are, which are just those that greedy decoding gets right.
    """
    model.eval()
    logits, loss = model(x, y)
    right = logits[:, length:].argmax(dim=-1) == y[:, length:]
    return {'log_likelihood': -loss.item(), 'letters': right.float().mean().item(),
            'exact': right.all(dim=1).float().mean().item()}


def risen(values):
    """How much of the rise from the first size to the last each size has made."""
    rise = values[-1] - values[0]
    return [(value - values[0]) / rise if rise else 0.0 for value in values]


def largest_step(values):
    """The largest rise from one size to the next, as a share of the whole."""
    return max(after - before for before, after in zip(risen(values), risen(values)[1:], strict=False))


def widest_gap(found):
    """-> index of the size at which the log-likelihood is farthest ahead of the whole answers."""
    gaps = [a - b for a, b in zip(risen(found['log_likelihood']), risen(found['exact']), strict=True)]
    return gaps.index(max(gaps))


def draw(sizes, found):
    """sizes: parameters. found: what each reached, by measure()'s names."""
    plt, gap = common.pyplot(), widest_gap(found)
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.5))
    panels = (('exact', 'whole answers right', common.RED), ('letters', 'letters right', common.GREEN),
              ('log_likelihood', 'log-likelihood, nats a letter', common.BLUE))
    for ax, (name, title, color) in zip(axes, panels, strict=True):
        ax.axvspan(sizes[0] / 1.2, sizes[gap] * 1.1, color='0.93', zorder=0)
        ax.plot(sizes, found[name], color=color, marker='o')
        ax.set(title=title, xscale='log', xlabel='parameters', xlim=(sizes[0] / 1.2, sizes[-1] * 1.2))
        ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        ax.xaxis.set_minor_formatter('')
        if name != 'log_likelihood':
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    axes[0].plot(sizes, [p**length for p in found['letters']], color=common.BLACK, linestyle='--', marker='')
    axes[0].text(0.05, 0.75, f'- -  (letters right)$^{{{length}}}$', transform=axes[0].transAxes)
    for ax, name, words in ((axes[0], 'exact', 'of its rise ...'), (axes[2], 'log_likelihood', 'of its rise')):
        ax.annotate(f'{risen(found[name])[gap]:.0%} {words}', (sizes[gap], found[name][gap]), (10, -4),
                    textcoords='offset points', va='top')
    return figure


def main():
    sizes_wanted = {int(width) for width in widths.split(',') if width.strip().isdecimal()}
    if len(sizes_wanted) < len(widths.split(',')) or len(sizes_wanted) < 2 or 0 in sizes_wanted:
        raise SystemExit(f'widths={widths!r}: expected two or more different numbers of channels, such as 4,8,16')
    check(config, [('length n_letters n_layer steps batch_size seeds n_test', lambda value: value >= 1, '1 or more')])
    common.start(out, seed, threads=1)
    x, y = strings(n_test, torch.Generator().manual_seed(seed - 1))
    sizes, found = [], {'log_likelihood': [], 'letters': [], 'exact': []}
    header = ('width', 'parameters', 'log-likelihood', 'letters right', f'power {length}', 'answers right')
    print('  '.join(header))
    for width in sorted(sizes_wanted):
        runs = []
        for run_seed in range(seed, seed + seeds):
            model = train_one(width, run_seed)
            runs.append(measure(model, x, y))
        sizes.append(sum(p.numel() for p in model.parameters()))
        for name, values in found.items():
            values.append(sum(run[name] for run in runs) / seeds)
        cells = (width, f'{sizes[-1]:,}', f'{found["log_likelihood"][-1]:.3f}', f'{found["letters"][-1]:.1%}',
                 f'{found["letters"][-1] ** length:.1%}', f'{found["exact"][-1]:.1%}')
        print('  '.join(str(cell).rjust(len(name)) for cell, name in zip(cells, header, strict=True)), flush=True)
    steps_up = {name: largest_step(values) for name, values in found.items()}
    gap = widest_gap(found)
    ahead, behind = risen(found['log_likelihood'])[gap], risen(found['exact'])[gap]
    print(f'\nLargest rise between two neighbouring sizes, of the whole rise:\nwhole answers {steps_up["exact"]:.0%}, '
          f'letters {steps_up["letters"]:.0%}, log-likelihood {steps_up["log_likelihood"]:.0%}.')
    if ahead > behind:
        print(f'At {sizes[gap]:,} parameters the log-likelihood has made {ahead:.0%} of its rise,\n'
              f'the whole answers {behind:.0%} of theirs.')
    else:
        print('At none of these sizes is the log-likelihood ahead of the whole answers.')
    common.save(draw(sizes, found), out, 'emergence')
    common.record(out, 'emergence', parameters=sizes, **found, largest_step=steps_up, ahead=ahead,
                  behind=behind)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
