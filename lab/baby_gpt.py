"""
A GPT so small that all of it can be drawn: two tokens and a context of three make a Markov chain of eight states.

    $ python -m lab.baby_gpt                                                 # seconds
    $ python -m lab.baby_gpt --gif                                           # and watch it learn
    $ python -m lab.baby_gpt --sequence=abcabcabc --context=2 --steps=200    # any tokens, context, steps

What a GPT sees is its context, so its context is a state: the next token comes in at the right and the oldest drops
out at the left. From each of the vocab_size^context states an arrow goes to vocab_size others, and a Transformer is
a way to compute the probabilities on the arrows.

After 50 steps on 111101111011110, in which 101 and 110 always go on with 1 and 111 with 1 as often as with 0, the
default seed gives the lecture's figures: 101 -> 011 79%, 111 -> 111 45%, 000 -> 001 73%, though 000 was never seen.
Other seeds (1 to 40) give 78.5% +- 3.7 and 52.0% +- 7.7 for the first two: at this step 111 is still on its way to 50%,
and splits 44.5 : 55.5 on average, to one side or the other. 6 s on a core of an AMD EPYC.

After Andrej Karpathy's notebook "GPT as a finite-state markov chain" (2023). Needs '.[lab]'.
"""

import math
import os
import sys
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench.common import table
from configurator import check, explain_errors, override
from lab import common
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
sequence = '111101111011110'  # what it learns; every character is a token
context = 3  # tokens that it sees
vocab_size: int | None = None  # how many tokens there are; None: those of the sequence
steps = 50  # of AdamW, each on all windows of the sequence
learning_rate = 1e-3
weight_decay = 0.1  # of all parameters, as in the lecture
n_layer = 4
n_head = 4
n_embd = 16
gif = False  # True: also a film of the training
seed = 1337
out = 'out-lab'  # folder of the pictures and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

MAX_ARROWS, MAX_LABELS = 64, 32  # that a picture has room for; arrows that have room for their probability


def vocabulary(sequence, vocab_size):
    """The tokens in the order of their ids: the characters of the sequence, and others up to vocab_size."""
    others = [char for char in '0123456789abcdefghijklmnopqrstuvwxyz' if char not in sequence]
    return sorted([*set(sequence), *others[: max(0, (vocab_size or 0) - len(set(sequence)))]])


def check_settings():
    """ValueError for a sequence that has nothing to learn, or a chain too large to draw."""
    n_tokens = len(vocabulary(sequence, vocab_size))
    check(config, (
        ('context', lambda value: value >= 1, '1 token or more, such as --context=3'),
        ('sequence', lambda value: len(value) > context,
         f'more than context={context} tokens, as in --sequence=111101111011110'),
        ('sequence', lambda value: all(char.isalnum() and char < '\u2e80' for char in value),
         'letters and digits of a font'),
        ('vocab_size', lambda value: value in (None, n_tokens),
         f'the {len(set(sequence))} tokens of the sequence, or up to 36'),
        ('sequence', lambda value: n_tokens > 1,
         'two different tokens; or a second one that never comes, with --vocab_size=2'),
        ('context', lambda value: n_tokens ** min(value + 1, 7) <= MAX_ARROWS,
         f'{n_tokens}^(context + 1) to be at most {MAX_ARROWS} arrows; try a smaller --context or fewer tokens'),
        ('steps', lambda value: value >= 0, '0 or more'),
        ('learning_rate', lambda value: 0 < value < math.inf, 'more than 0, such as --learning_rate=1e-3'),
        ('weight_decay', lambda value: 0 <= value < math.inf, '0 or more'),
    ))


class BabyGPT(GPT):
    """
    model.py's GPT, as the lecture has it: LayerNorms with a bias where linear layers have none (one setting decides
    over both), and the weights drawn in the lecture's order, so that its seed gives its figures.
    """

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.bias = nn.Parameter(torch.zeros_like(module.weight))
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))


def windows(sequence, tokens, context):
    """-> x: (N, context) ids of every window that a token follows; that token's id, (N,)."""
    ids = torch.tensor([tokens.index(char) for char in sequence])
    return ids.unfold(0, context, 1)[:-1], ids[context:]


def train(seed, n_tokens, x, y):
    """Yield the model before the first step and after each, with its loss on the windows in nats."""
    torch.manual_seed(seed)
    model = BabyGPT(GPTConfig(vocab_size=n_tokens, block_size=x.size(1), n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                              bias=False, mlp='gelu_erf'))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    targets = F.pad(y[:, None], (x.size(1) - 1, 0), value=-1)  # the last position alone is asked for a full context
    for step in range(steps + 1):
        loss = model(x, targets)[1]
        yield model, loss.item()
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def next_tokens(model, n_tokens, context):
    """-> (S, V) probabilities of the next token in each of the S = V^context states, 00..0 first."""
    states = torch.tensor(list(product(range(n_tokens), repeat=context)))
    return model(states)[0][:, -1].double().softmax(dim=-1).numpy()


def arrows(n_states, n_tokens):
    """Yield (state, token, next state): the token comes in at the right, the oldest drops out at the left."""
    for state, token in product(range(n_states), range(n_tokens)):
        yield state, token, (state * n_tokens + token) % n_states


def chain(p):
    """(S, V) probabilities of next tokens -> (S, S) of next states."""
    P = np.zeros((len(p), len(p)))
    for state, token, following in arrows(*p.shape):
        P[state, following] = p[state, token]
    return P


def stationary(P):
    """
    (S, S) transition probabilities -> (S,) share of time that the chain spends in each state in the long run, from a
    start that is equally likely in all. To stay put every other time does not change it, and lets the powers of the
    matrix settle even where the chain goes in circles; the long run is 2^60 steps.
    """
    P = (P + np.eye(len(P))) / 2
    for _ in range(60):
        P = P @ P
        P /= P.sum(axis=1, keepdims=True)
    return P.mean(axis=0)


def entropy(p):
    """Of distributions in the last axis, in nats."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def entropy_rate(p):
    """Nats a token of what the chain writes: how open the next token is in each state, by the time spent there."""
    return float(stationary(chain(p)) @ entropy(p))


def in_percent(p, tokens):
    """A distribution over the tokens for a table; of more than four tokens the likeliest."""
    return ' '.join(f'{100 * value:.0f}' for value in p) if len(p) <= 4 else f'{tokens[p.argmax()]}: {p.max():.0%}'


def dot(names, tokens, p, seen):
    """The chain as Graphviz text, for `dot -Tsvg`; states that the sequence does not have are dashed."""
    lines = ['digraph baby_gpt {', '  rankdir=LR; node [shape=circle];']
    lines += [f'  "{name}"{"" if seen[s] else " [style=dashed]"};' for s, name in enumerate(names)]
    lines += [f'  "{names[s]}" -> "{names[to]}" [label="{tokens[t]} {p[s, t]:.0%}"];' for s, t, to in arrows(*p.shape)]
    return '\n'.join([*lines, '}', ''])


def layout(n_states, n_tokens):
    """
    -> (S,) places on a circle as complex numbers, in the order of a walk through all states, so that many arrows are
    short: the walk along the edges of the graph that has the states as edges (de Bruijn 1946).
    """
    import networkx

    graph = networkx.MultiDiGraph()
    for s in range(n_states):  # from all but its last token to all but its first
        graph.add_edge(s // n_tokens, s % (n_states // n_tokens), key=s)
    walk = [s for *_, s in networkx.eulerian_circuit(graph, source=0, keys=True)]
    return -np.exp(-2j * np.pi * np.argsort(walk) / n_states)  # the first at the left, on clockwise


def draw(ax, places, names, tokens, p, seen, title):
    """The chain into a matplotlib axes: an arrow's width is its probability, its colour the token that comes in."""
    from matplotlib.patches import Circle, FancyArrowPatch

    n_states, share = len(names), stationary(chain(p))
    size, font = (0.15, 9) if n_states <= 9 else (0.09, 6)
    for s, t, to in arrows(*p.shape):
        color = common.COLORS[t % len(common.COLORS)]
        if to == s:  # a loop outside of the circle
            start, end = (places[s] * (1 + size * (0.6 + side * 0.8j)) for side in (1, -1))
            bend, where = -1.6, 0.5
        else:
            ahead = size * (places[to] - places[s]) / abs(places[to] - places[s])
            start, end, where = places[s] + ahead, places[to] - ahead, 0.4
            bend = -0.12 if abs(end - start) > 0.8 else -0.35  # so that there and back stay apart
        label = start + where * (end - start) * (1 - 2j * (1 - where) * bend)  # on the curve
        ax.add_patch(FancyArrowPatch((start.real, start.imag), (end.real, end.imag), arrowstyle='-|>', shrinkA=0,
                                     shrinkB=0, connectionstyle=f'arc3,rad={bend}', mutation_scale=11, color=color,
                                     lw=0.5 + 3 * p[s, t]))
        if p.size <= MAX_LABELS:
            ax.text(label.real, label.imag, f'{p[s, t]:.0%}', color=color, ha='center', va='center', fontsize=font,
                    zorder=5, bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5})
    for place, name, spent, is_seen in zip(places, names, share, seen, strict=True):
        ax.add_patch(Circle((place.real, place.imag), size, facecolor='#FFF3C4' if is_seen else 'white',
                            edgecolor='black', linestyle='-' if is_seen else '--', zorder=4))
        ax.text(place.real, place.imag, f'{name}\n{spent:.0%}' if n_states <= 9 else name, ha='center', va='center',
                fontsize=font, zorder=6)
    for t, token in enumerate(tokens[: len(common.COLORS)]):
        ax.text(-1.4, 1.2 - 0.12 * t, f'{token} comes in', color=common.COLORS[t], fontsize=9)
    ax.text(-1.4, -1.28, '' if all(seen) else 'dashed: not in the sequence', fontsize=9)
    ax.text(1.4, -1.28, 'in the circle: share of time' if n_states <= 9 else '', fontsize=9, ha='right')
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.3, 1.35), aspect='equal')
    ax.set_title(title, fontsize=11)
    ax.axis('off')


def main():
    check_settings()
    common.start(out, seed, threads=1)
    tokens = vocabulary(sequence, vocab_size)
    names = [''.join(state) for state in product(tokens, repeat=context)]
    n_states, n_tokens = len(names), len(tokens)
    x, y = windows(sequence, tokens, context)
    counts = np.zeros((n_states, n_tokens))
    for i, token in enumerate(y.tolist()):
        counts[names.index(sequence[i : i + context]), token] += 1
    seen = counts.sum(axis=1)
    in_data = counts / np.maximum(seen, 1)[:, None]

    losses, probabilities = [], []
    for model, loss in train(seed, n_tokens, x, y):
        if not math.isfinite(loss):
            raise SystemExit(f'step {len(losses)}: the loss is {loss}; try a lower --learning_rate or --weight_decay')
        losses.append(loss)
        probabilities.append(next_tokens(model, n_tokens, context))
    before, after = probabilities[0], probabilities[-1]
    share, rate = stationary(chain(after)), entropy_rate(after)
    lowest_loss = float(seen @ entropy(in_data) / seen.sum())
    n_params = model.get_num_params(non_embedding=False)

    print(f'{n_params:,} parameters; {n_tokens} tokens, context {context}: {n_states} states, '
          f'{np.count_nonzero(seen)} of them in the sequence\n')
    print(f'next token, % {" ".join(tokens)}' if n_tokens <= 4 else 'likeliest next token')
    print(table([('state', 'windows', 'in the data', 'step 0', f'step {steps}', 'share of time'),
                 *((names[s], int(seen[s]), in_percent(in_data[s], tokens) if seen[s] else '-',
                    in_percent(before[s], tokens), in_percent(after[s], tokens), f'{share[s]:.1%}')
                   for s in range(n_states))]), end='\n\n')
    if not all(seen):
        usual = int(counts.sum(axis=0).argmax())
        moved = [f'{p[seen == 0, usual].mean():.0%}' for p in (before, after)]
        print(f'The states with 0 windows were never trained, but the same weights answer for\n'
              f'them: there the mean probability of {tokens[usual]!r}, with which '
              f'{counts[:, usual].sum() / len(y):.0%} of the windows\ngo on, went from {moved[0]} to {moved[1]}.\n')
    print(f'loss          {losses[0]:.4f} nats a token at step 0, {losses[-1]:.4f} at step {steps}\n'
          f'lowest loss   {lowest_loss:.4f} that any model of these states can reach on the sequence\n'
          f'entropy rate  {rate:.4f} of what the model itself writes; of chance {math.log(n_tokens):.4f}\n'
          f'states        {n_tokens}^{context} = {n_states}; of GPT-2 50257^1024, '
          f'about 10^{1024 * math.log10(50257):.0f}\n')

    common.record(out, 'baby_gpt', parameters=n_params, states=names, tokens=tokens, windows=seen.tolist(),
                  before=before.tolist(), after=after.tolist(), stationary=share.tolist(), losses=losses,
                  lowest_loss=lowest_loss, entropy_rate=rate)
    plt, places = common.pyplot(), layout(n_states, n_tokens)
    frames = [(places, names, tokens, p, seen, f'step {step}: loss {loss:.2f} nats')
              for step, (p, loss) in enumerate(zip(probabilities, losses, strict=True))]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5))
    for ax, frame, name in ((axes[0], frames[0], 'before'), (axes[1], frames[-1], 'after')):
        draw(ax, *frame)
        common.write(out, f'baby_gpt_{name}.dot', dot(names, tokens, frame[3], seen).encode())
    common.save(figure, out, 'baby_gpt')
    if gif:
        from matplotlib.animation import FuncAnimation

        figure, ax = plt.subplots(figsize=(4.5, 4.5))
        shown = sorted({round(i * steps / 25) for i in range(26)}) + [steps] * 10  # the end stays for a while
        film = FuncAnimation(figure, lambda step: (ax.clear(), draw(ax, *frames[step])), shown)
        film.save(os.path.join(out, 'baby_gpt.gif'), writer='pillow', fps=6)
        print(f'wrote {os.path.join(out, "baby_gpt.gif")}')


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
