"""
Show an ability that seems to emerge with scale, and its smooth cause.

    $ python -m lab.emergence              # 100 seconds on one core
    $ python -m lab.emergence --length=4   # shorter answers move the jump
    $ python -m lab.emergence --seeds=1 --widths=3,4,5,6,7,8,9,10,11,12

Models of 274 to 16,008 parameters, all trained alike, sort strings of 16 random letters. Measured
on an AMD EPYC, from the smallest to the largest:
  - whole answers right: 0%, 0%, 0%, 10%, 51%, 94%, 94%, 99%;
  - log-likelihood: -2.08, -1.53, -1.20, -0.59, -0.25, -0.03, -0.02, -0.00 nats per letter.
A whole answer needs 16 right letters in a row. The share of right letters to the power of 16 is
within 3.3 points of the share of whole answers at every size: the metric makes the jump.

The likelihood is smooth, but not linear. At 1,410 parameters it has made 72% of its rise, the
whole answers 10%. Between two neighbouring sizes, about a factor of two, the likelihood makes up
to 30% of its rise and the whole answers up to 43%.

Source: "Are Emergent Abilities of Large Language Models a Mirage?" (Schaeffer et al. 2023). Needs
'.[lab]'.
"""

import torch

from configurator import Count, Seed, UserError, override
from lab import common
from model import GPT

# Settings -----------------------------------------------------------------------------------------
widths = '2,3,4,6,8,12,16,24'  # n_embd of the models
length: Count = 16  # letters of a string
n_letters: Count = 26  # of the alphabet
n_layer: Count = 2
steps: Count = 400  # for every model
batch_size: Count = 128  # strings
seeds: Count = 2  # runs of each model; their figures are averaged
n_test: Count = 2000  # test strings; of 16 letters none is likely to occur in training
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------


def strings(n, generator):
    """Return x and y, (n, 2 length): random letters, '=', and the same letters sorted."""
    question = torch.randint(n_letters, (n, length), generator=generator)
    equals = torch.full((n, 1), n_letters)  # the id of '='
    text = torch.cat((question, equals, question.sort(dim=1).values), dim=1)
    x, y = text[:, :-1], text[:, 1:].clone()
    y[:, :length] = -1  # no model can predict random letters
    return x, y


def train_one(width, run_seed):
    """Train a model of this width and return it."""
    torch.manual_seed(run_seed)
    # absolute positions, since sorting is about places; SwiGLU's usual width has a floor of 64
    model = GPT(common.gpt_config(pos='learned', n_layer=n_layer, n_head=1, n_embd=width,
                                  n_inner=max(4, 8 * width // 3), vocab_size=n_letters + 1,
                                  block_size=2 * length))
    generator = torch.Generator().manual_seed(run_seed)
    for _ in common.train(model, lambda step: strings(batch_size, generator), steps):
        pass
    return model


@torch.no_grad()
def measure(model, x, y):
    """Return nats per letter, and the shares of right letters and right answers.

    A letter is right if it is the likeliest after the right letters before it. An answer of right
    letters alone is what greedy decoding gets right.
    """
    model.eval()
    logits, loss = model(x, y)
    right = logits[:, length:].argmax(dim=-1) == y[:, length:]
    return {'log_likelihood': -loss.item(), 'letters': right.float().mean().item(),
            'exact': right.all(dim=1).float().mean().item()}


def risen(values):
    """Return the share of the whole rise that each size has made."""
    rise = values[-1] - values[0]
    return [(value - values[0]) / rise if rise else 0.0 for value in values]


def largest_step(values):
    """Return the largest rise between neighbouring sizes, as a share of the whole."""
    rises = risen(values)
    return max(after - before for before, after in zip(rises, rises[1:], strict=False))


def widest_gap(measured):
    """Return the index of the size where log-likelihood is farthest ahead of answers."""
    gaps = [a - b for a, b in zip(risen(measured['log_likelihood']), risen(measured['exact']),
                                  strict=True)]
    return gaps.index(max(gaps))


def draw(sizes, measured):
    """Draw each of measure()'s figures against the number of parameters."""
    plt, gap = common.pyplot(), widest_gap(measured)
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.5))
    panels = (('exact', 'whole answers right', common.RED),
              ('letters', 'letters right', common.GREEN),
              ('log_likelihood', 'log-likelihood, nats a letter', common.BLUE))
    for ax, (name, title, color) in zip(axes, panels, strict=True):
        ax.axvspan(sizes[0] / 1.2, sizes[gap] * 1.1, color='0.93', zorder=0)
        ax.plot(sizes, measured[name], color=color, marker='o')
        ax.set(title=title, xscale='log', xlabel='parameters',
               xlim=(sizes[0] / 1.2, sizes[-1] * 1.2))
        ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        ax.xaxis.set_minor_formatter('')
        if name != 'log_likelihood':
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    axes[0].plot(sizes, [p**length for p in measured['letters']], color=common.BLACK,
                 linestyle='--', marker='')
    axes[0].text(0.05, 0.75, f'- -  (letters right)$^{{{length}}}$', transform=axes[0].transAxes)
    for ax, name, text in ((axes[0], 'exact', 'of its rise ...'),
                           (axes[2], 'log_likelihood', 'of its rise')):
        ax.annotate(f'{risen(measured[name])[gap]:.0%} {text}', (sizes[gap], measured[name][gap]),
                    (10, -4), textcoords='offset points', va='top')
    return figure


def main():
    parts = widths.split(',')
    ordered = sorted({int(part) for part in parts if part.strip().isdecimal()})
    if len(ordered) < max(2, len(parts)) or 0 in ordered:
        raise UserError(f'widths={widths!r}: expected two or more different numbers of channels, '
                        f'such as 4,8,16')
    common.start(out, threads=1)

    # train and test a model of each size
    x, y = strings(n_test, torch.Generator().manual_seed(seed - 1))
    sizes, measured = [], {'log_likelihood': [], 'letters': [], 'exact': []}
    header = ('width', 'parameters', 'log-likelihood', 'letters right', f'power {length}',
              'answers right')
    print('  '.join(header))
    for width in ordered:
        runs = []
        for run_seed in range(seed, seed + seeds):
            model = train_one(width, run_seed)
            runs.append(measure(model, x, y))
        sizes.append(sum(p.numel() for p in model.parameters()))
        for name, values in measured.items():
            values.append(sum(run[name] for run in runs) / seeds)
        likelihood, letters, exact = (values[-1] for values in measured.values())
        cells = (width, f'{sizes[-1]:,}', f'{likelihood:.3f}', f'{letters:.1%}',
                 f'{letters ** length:.1%}', f'{exact:.1%}')
        row = (str(cell).rjust(len(name)) for cell, name in zip(cells, header, strict=True))
        print('  '.join(row), flush=True)

    # report
    steps_up = {name: largest_step(values) for name, values in measured.items()}
    gap = widest_gap(measured)
    ahead, behind = risen(measured['log_likelihood'])[gap], risen(measured['exact'])[gap]
    print(f'\nLargest rise between two neighbouring sizes, as a share of the whole rise:\n'
          f'whole answers {steps_up["exact"]:.0%}, letters {steps_up["letters"]:.0%}, '
          f'log-likelihood {steps_up["log_likelihood"]:.0%}.')
    if ahead > behind:
        print(f'At {sizes[gap]:,} parameters the log-likelihood has made {ahead:.0%} of its rise,\n'
              f'the whole answers {behind:.0%} of theirs.')
    else:
        print('At none of these sizes is the log-likelihood ahead of the whole answers.')
    common.save(draw(sizes, measured), out, 'emergence')
    common.record(out, 'emergence', parameters=sizes, **measured, largest_step=steps_up,
                  ahead=ahead, behind=behind)


if __name__ == '__main__':
    main()
