"""
Draw a whole GPT: two tokens and a context of three make eight states.

    $ python -m lab.baby_gpt                                                # seconds
    $ python -m lab.baby_gpt --gif                                          # with a film
    $ python -m lab.baby_gpt --sequence=abcabcabc --context=2 --steps=200   # other tokens

A GPT reads its context and nothing else, so its context is a state. The next token enters at the
right and the oldest leaves at the left. From each of the vocab_size^context states, arrows go to
vocab_size others. A Transformer computes the probabilities on the arrows.

The default sequence is 111101111011110. In it 101 and 110 are always followed by 1; 111 is
followed by 1 and by 0 equally often. After 50 steps the default seed gives the lecture's figures:
101 -> 011 79%, 111 -> 111 45%, and 000 -> 001 73%, although the sequence has no 000. The seeds 1
to 40 give 78.5% +- 3.7 and 52.0% +- 7.7 for the first two. At this step 111 is still on its way
to 50%. It takes 6 s on a core of an AMD EPYC.

After Andrej Karpathy's notebook "GPT as a finite-state markov chain" (2023). Needs '.[lab]'.
"""

import math
import os
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench.common import table
from configurator import Count, Natural, NonNegative, Positive, Seed, UserError, override
from lab import common
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
sequence = '111101111011110'  # the text to learn; each character is a token
context: Count = 3  # tokens of context
vocab_size: Count | None = None  # number of tokens; None: those of the sequence
steps: Natural = 50  # of AdamW, each on all windows of the sequence
learning_rate: Positive = 1e-3
weight_decay: NonNegative = 0.1  # of all parameters, as in the lecture
n_layer: Count = 4
n_head: Count = 4
n_embd: Count = 16
gif = False  # True: also write a film of the training
seed: Seed = 1337
out = 'out-lab'  # folder of the pictures and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

MAX_ARROWS, MAX_LABELS = 64, 32  # arrows that fit into a picture, with and without their labels


def vocabulary(sequence, vocab_size):
    """Return the sequence's characters, and others up to vocab_size, in id order."""
    others = [c for c in '0123456789abcdefghijklmnopqrstuvwxyz' if c not in sequence]
    n_others = max(0, (vocab_size or 0) - len(set(sequence)))
    return sorted([*set(sequence), *others[:n_others]])


def check_settings():
    """Raise UserError for a sequence too short to learn, or a chain too large to draw."""
    n_tokens = len(vocabulary(sequence, vocab_size))
    if len(sequence) <= context:
        raise UserError(f'sequence={sequence!r}: expected more than context={context} tokens, as '
                        f'in --sequence=111101111011110')
    if not all(char.isalnum() and char < '\u2e80' for char in sequence):
        raise UserError(f'sequence={sequence!r}: expected letters and digits of a Western font')
    if vocab_size not in (None, n_tokens):
        raise UserError(f'vocab_size={vocab_size}: expected the {len(set(sequence))} tokens of the '
                        f'sequence, or up to 36')
    if n_tokens == 1:
        raise UserError(f'sequence={sequence!r}: expected two different tokens; --vocab_size=2 '
                        f'adds a second one that never occurs')
    if n_tokens ** min(context + 1, 7) > MAX_ARROWS:
        raise UserError(f'context={context}: expected {n_tokens}^(context + 1) to be at most '
                        f'{MAX_ARROWS} arrows; try a smaller --context or fewer tokens')


class BabyGPT(GPT):
    """The GPT of model.py, built as in the lecture.

    Its LayerNorms have biases and its linear layers have none. The weights are drawn in the
    lecture's order, so that the lecture's seed gives the lecture's figures.
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
    """Return the ids of all windows, (N, context), and of their successors, (N,)."""
    ids = torch.tensor([tokens.index(char) for char in sequence])
    return ids.unfold(0, context, 1)[:-1], ids[context:]


def train(seed, n_tokens, x, y):
    """Yield the model and its loss in nats, before the first step and after each."""
    torch.manual_seed(seed)
    model = BabyGPT(GPTConfig(vocab_size=n_tokens, block_size=x.size(1), n_layer=n_layer,
                              n_head=n_head, n_embd=n_embd, bias=False, mlp='gelu_erf'))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    targets = F.pad(y[:, None], (x.size(1) - 1, 0), value=-1)  # only after a full context
    for step in range(steps + 1):
        loss = model(x, targets)[1]
        yield model, loss.item()
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def next_tokens(model, n_tokens, context):
    """Return the probabilities of the next token in each of S = V^context states."""
    states = torch.tensor(list(product(range(n_tokens), repeat=context)))
    return model(states)[0][:, -1].double().softmax(dim=-1).numpy()


def arrows(n_states, n_tokens):
    """Yield (state, token, next state) of every arrow."""
    for state, token in product(range(n_states), range(n_tokens)):
        yield state, token, (state * n_tokens + token) % n_states


def chain(p):
    """Turn (S, V), probabilities of next tokens, into (S, S), of next states."""
    P = np.zeros((len(p), len(p)))
    for state, token, following in arrows(*p.shape):
        P[state, following] = p[state, token]
    return P


def stationary(P):
    """Return (S,), the share of time in each state in the long run.

    P: (S, S) transition probabilities. The chain starts in any state with equal probability. In
    half of the steps it stays where it is: this does not change the shares, and the powers of the
    matrix converge even where the chain runs in circles. The long run is 2^60 steps.
    """
    P = (P + np.eye(len(P))) / 2
    for _ in range(60):
        P = P @ P
        P /= P.sum(axis=1, keepdims=True)
    return P.mean(axis=0)


def entropy(p):
    """Return the entropy in nats of the distributions in the last axis."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def entropy_rate(p):
    """Return the entropy in nats per token of the text that the chain generates."""
    return float(stationary(chain(p)) @ entropy(p))


def in_percent(p, tokens):
    """Format a distribution; of more than four tokens only the likeliest."""
    if len(p) <= 4:
        return ' '.join(f'{100 * value:.0f}' for value in p)
    return f'{tokens[p.argmax()]}: {p.max():.0%}'


# Pictures -----------------------------------------------------------------------------------------


@dataclass
class Graph:
    """The states of a chain: names, places, and whether the data has them."""

    names: list[str]
    tokens: list[str]
    is_seen: np.ndarray  # (S,)
    places: np.ndarray | None = None  # (S,) complex


def dot(graph, p):
    """Return the chain as Graphviz text, for `dot -Tsvg`; unseen states are dashed."""
    names = graph.names
    lines = ['digraph baby_gpt {', '  rankdir=LR; node [shape=circle];']
    lines += [f'  "{name}"{"" if seen else " [style=dashed]"};'
              for name, seen in zip(names, graph.is_seen, strict=True)]
    lines += [f'  "{names[s]}" -> "{names[to]}" [label="{graph.tokens[t]} {p[s, t]:.0%}"];'
              for s, t, to in arrows(*p.shape)]
    return '\n'.join([*lines, '}', ''])


def layout(n_states, n_tokens):
    """Return (S,): places of the states on a circle, as complex numbers.

    Neighbours on the circle follow one another in a walk through all states, so many arrows are
    short. The walk is an Eulerian circuit of the graph whose edges are the states (de Bruijn 1946).
    """
    import networkx

    graph = networkx.MultiDiGraph()
    for s in range(n_states):  # from all but its last token to all but its first
        graph.add_edge(s // n_tokens, s % (n_states // n_tokens), key=s)
    walk = [s for *_, s in networkx.eulerian_circuit(graph, source=0, keys=True)]
    return -np.exp(-2j * np.pi * np.argsort(walk) / n_states)  # clockwise, the first at the left


def draw(ax, graph, p, title):
    """Draw the chain; an arrow's width is its probability, its colour the new token."""
    from matplotlib.patches import Circle, FancyArrowPatch

    places, is_small = graph.places, len(graph.names) <= 9
    size, font = (0.15, 9) if is_small else (0.09, 6)
    for s, t, to in arrows(*p.shape):
        color = common.COLORS[t % len(common.COLORS)]
        if to == s:  # a loop outside the circle
            start, end = (places[s] * (1 + size * (0.6 + side * 0.8j)) for side in (1, -1))
            bend, where = -1.6, 0.5
        else:
            ahead = size * (places[to] - places[s]) / abs(places[to] - places[s])
            start, end, where = places[s] + ahead, places[to] - ahead, 0.4
            bend = -0.12 if abs(end - start) > 0.8 else -0.35  # separates an arrow from its reverse
        label = start + where * (end - start) * (1 - 2j * (1 - where) * bend)  # on the curve
        ax.add_patch(FancyArrowPatch(
            (start.real, start.imag), (end.real, end.imag), arrowstyle='-|>', shrinkA=0, shrinkB=0,
            connectionstyle=f'arc3,rad={bend}', mutation_scale=11, color=color,
            lw=0.5 + 3 * p[s, t]))
        if p.size <= MAX_LABELS:
            ax.text(label.real, label.imag, f'{p[s, t]:.0%}', color=color, ha='center', va='center',
                    fontsize=font, zorder=5,
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5})
    for s, share in enumerate(stationary(chain(p))):
        x, y = places[s].real, places[s].imag
        face, line = ('#FFF3C4', '-') if graph.is_seen[s] else ('white', '--')
        ax.add_patch(Circle((x, y), size, facecolor=face, edgecolor='black', linestyle=line,
                            zorder=4))
        name = f'{graph.names[s]}\n{share:.0%}' if is_small else graph.names[s]
        ax.text(x, y, name, ha='center', va='center', fontsize=font, zorder=6)
    for t, token in enumerate(graph.tokens[: len(common.COLORS)]):
        ax.text(-1.4, 1.2 - 0.12 * t, f'{token} comes in', color=common.COLORS[t], fontsize=9)
    if not all(graph.is_seen):
        ax.text(-1.4, -1.28, 'dashed: not in the sequence', fontsize=9)
    if is_small:
        ax.text(1.4, -1.28, 'in the circle: share of time', fontsize=9, ha='right')
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.3, 1.35), aspect='equal')
    ax.set_title(title, fontsize=11)
    ax.axis('off')


def main():
    check_settings()
    common.start(out, threads=1)

    # count what follows each state in the sequence
    tokens = vocabulary(sequence, vocab_size)
    names = [''.join(state) for state in product(tokens, repeat=context)]
    n_states, n_tokens = len(names), len(tokens)
    x, y = windows(sequence, tokens, context)
    counts = np.zeros((n_states, n_tokens))
    for i, token in enumerate(y.tolist()):
        counts[names.index(sequence[i : i + context]), token] += 1
    n_windows = counts.sum(axis=1)
    in_data = counts / np.maximum(n_windows, 1)[:, None]

    # train
    losses, probabilities = [], []
    for model, loss in train(seed, n_tokens, x, y):
        if not math.isfinite(loss):
            raise UserError(f'step {len(losses)}: the loss is {loss}; try a lower --learning_rate '
                            f'or --weight_decay')
        losses.append(loss)
        probabilities.append(next_tokens(model, n_tokens, context))
    before, after = probabilities[0], probabilities[-1]
    share, rate = stationary(chain(after)), entropy_rate(after)
    lowest_loss = float(n_windows @ entropy(in_data) / n_windows.sum())
    n_params = model.get_num_params(non_embedding=False)

    # report
    print(f'{n_params:,} parameters; {n_tokens} tokens, context {context}: {n_states} states, '
          f'{np.count_nonzero(n_windows)} of them in the sequence\n')
    print(f'next token, % {" ".join(tokens)}' if n_tokens <= 4 else 'likeliest next token')
    rows = [('state', 'windows', 'in the data', 'step 0', f'step {steps}', 'share of time')]
    for s, name in enumerate(names):
        data = in_percent(in_data[s], tokens) if n_windows[s] else '-'
        rows.append((name, int(n_windows[s]), data, in_percent(before[s], tokens),
                     in_percent(after[s], tokens), f'{share[s]:.1%}'))
    print(table(rows), end='\n\n')
    if not all(n_windows):
        usual = int(counts.sum(axis=0).argmax())
        means = [f'{p[n_windows == 0, usual].mean():.0%}' for p in (before, after)]
        print(f'States with 0 windows were never trained, but they share their weights with\n'
              f'the others. In them the mean probability of {tokens[usual]!r}, which follows '
              f'{counts[:, usual].sum() / len(y):.0%} of\nthe windows, moved from {means[0]} to '
              f'{means[1]}.\n')
    print(f'loss          {losses[0]:.4f} nats per token at step 0, {losses[-1]:.4f} at step '
          f'{steps}\nlowest loss   {lowest_loss:.4f} that any model of these states can reach\n'
          f'entropy rate  {rate:.4f} of the generated text; of chance {math.log(n_tokens):.4f}\n'
          f'states        {n_tokens}^{context} = {n_states}; of GPT-2 50257^1024, '
          f'about 10^{1024 * math.log10(50257):.0f}\n')

    # write the numbers and the pictures
    common.record(out, 'baby_gpt', parameters=n_params, states=names, tokens=tokens,
                  windows=n_windows.tolist(), before=before.tolist(), after=after.tolist(),
                  stationary=share.tolist(), losses=losses, lowest_loss=lowest_loss,
                  entropy_rate=rate)
    plt = common.pyplot()
    graph = Graph(names, tokens, n_windows > 0, layout(n_states, n_tokens))
    frames = [(p, f'step {step}: loss {loss:.2f} nats')
              for step, (p, loss) in enumerate(zip(probabilities, losses, strict=True))]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5))
    for ax, frame, name in zip(axes, (frames[0], frames[-1]), ('before', 'after'), strict=True):
        draw(ax, graph, *frame)
        common.write(out, f'baby_gpt_{name}.dot', dot(graph, frame[0]).encode())
    common.save(figure, out, 'baby_gpt')
    if gif:
        from matplotlib.animation import FuncAnimation

        figure, ax = plt.subplots(figsize=(4.5, 4.5))
        shown = sorted({round(i * steps / 25) for i in range(26)}) + [steps] * 10  # hold the end
        film = FuncAnimation(figure, lambda i: (ax.clear(), draw(ax, graph, *frames[i])), shown)
        path = os.path.join(out, 'baby_gpt.gif')
        film.save(path, writer='pillow', fps=6)
        print(f'wrote {path}')


if __name__ == '__main__':
    main()
