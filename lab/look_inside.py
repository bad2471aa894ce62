"""
Show what a model computes on a text: attention, token losses, logit lens.

    $ python train.py config/quickstart.py --dataset=python_stdlib    # a model of bytes
    $ python -m lab.look_inside                                  # seconds
    $ python -m lab.look_inside --layer=0 --text='a (b (c) d) e'
    $ python -m lab.look_inside --out_dir=out --text=FILE:story.txt

Writes four pictures and a page:
  - _heads: the attention map of each head (rows attend to columns) and its main role;
  - _layer: the heads of one layer, with the tokens;
  - _loss and the .html: the text, coloured by the loss of each token; on the page the mouse shows
    which tokens the model expected instead;
  - _lens: the next token that the head predicts after each layer.

On the quickstart model of bytes after 1,000 steps (val loss 1.18) and the default text, head 2.1
spends 48% of its attention on the previous token. Head 3.2 attends to the blank or bracket before
the current word. With the head applied after the embedding the loss is 4.08 nats per token; after
each layer 3.24, 2.62, 2.01 and 1.72. No head copies: the second `height` costs 11.0 nats, the first
9.5. It takes 7 s on a core of an AMD EPYC.

Induction heads: "In-context Learning and Induction Heads" (Olsson et al. 2022). The logit lens:
"interpreting GPT: the logit lens" (nostalgebraist 2020). Needs '.[lab]'.
"""

import codecs
import html
import math
import os
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

from bench.common import table
from configurator import Natural, UserError, override
from flatgpt import files
from flatgpt.pretrained import open_model
from lab import common
from model import rotate
from ops import visible
from tokenizer.__main__ import visible as printable
from tokenizer.base import Tokenizer
from tokenizer.chat import bos_ids

# Settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': the checkpoint in out_dir; or a HF folder, a hub id, 'gpt2', ...
out_dir = 'out-quickstart'  # where train.py wrote best.pt
text = 'def area(width, height):\n    return width * height\n'  # or FILE:path of a text file
layer: Natural | None = None  # the layer of _layer, 0 is the first; None: the last
out = 'out-lab'  # folder of the pictures, the page and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

WORST = 5.0  # nats from which a token is fully coloured: a probability of 0.7%
DRAWN, WITH_TICKS = 50, 64  # positions in _lens; most tokens that fit beside an attention map


@dataclass
class Text:
    """The ids of a text, and their names as a picture can show them."""

    ids: list[int]
    tokenizer: Tokenizer

    @cached_property
    def names(self):
        return self.names_of(self.ids)

    def names_of(self, ids):
        """Return token names: · for a space, \\n, \\xNN for a part of a character, \\uNNNN."""
        known = self.tokenizer.vocab_size
        names = [printable(self.tokenizer.decode_bytes([i])) if i < known else f'<{i}>'
                 for i in ids]
        return [''.join(char if ord(char) < 0x2E80 else char.encode('unicode-escape').decode()
                        for char in name).replace(' ', '·') for name in names]


def read_text():
    """Return the text of the settings. Raises UserError if its file cannot be read."""
    return files.read_text(text.removeprefix('FILE:')) if text.startswith('FILE:') else text


@torch.no_grad()
def attention_weights(attention, qkv, rotation=None):
    """Compute a layer's attention weights, (H, T, T), from its c_attn's output.

    rotation: RoPE's, or None. Rows are queries. Positions outside the window get weight 0.
    """
    H, G, D = attention.n_head, attention.n_kv_head, attention.head_size
    q, k, _ = qkv.unflatten(-1, (-1, D)).split((H, G, G), dim=2)  # (1, T, H, D), 2 x (1, T, G, D)
    if attention.q_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    elif attention.qk_norm:
        q, k = (F.rms_norm(part, (D,), eps=1e-6) for part in (q, k))
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1).repeat_interleave(H // G, dim=0)  # (H, T, D)
    positions = torch.arange(q.size(1), device=q.device)
    hidden = ~visible(positions[:, None], positions, attention.window)
    scores = (q @ k.mT).float() * D**-0.5
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1)


@torch.no_grad()
def look(model, ids):
    """Run the model on ids[:-1], T tokens, and record what it computes.

    Returns the attention weights (n_layer, H, T, T), rows are queries; the residual stream before
    the first layer and after each layer, (n_layer + 1, T, C); the logits (T, V).
    """
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    blocks, qkvs, streams = model.transformer.h, [], []
    hooks = [block.attn.c_attn.register_forward_hook(
        lambda module, inputs, output: qkvs.append(output)) for block in blocks]
    hooks += [module.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
              for module in (*blocks, model.transformer.ln_f)]
    try:
        logits, _ = model(x, y)
    finally:
        for hook in hooks:
            hook.remove()
    rotation = model.rotation(torch.arange(x.size(1))) if model.config.pos == 'rope' else None
    weights = [attention_weights(block.attn, qkv, rotation)
               for block, qkv in zip(blocks, qkvs, strict=True)]
    return torch.stack(weights), torch.cat(streams), logits[0].float()


@torch.no_grad()
def logit_lens(model, streams, ids):
    """Apply the last norm and the head to the residual stream after each layer.

    Returns three tensors, (n_layer + 1, T): the likeliest next token, its probability, and the loss
    of the token that follows.
    """
    rows, y = [], torch.tensor(ids[1:])
    for stream in streams:  # one at a time: all logits of GPT-2's vocabulary would take gigabytes
        log_p = model.logits(model.transformer.ln_f(stream)).float().log_softmax(dim=-1)
        p, best = log_p.exp().max(dim=-1)
        rows.append((best, p, F.nll_loss(log_p, y, reduction='none')))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def roles(weights, ids):
    """Measure how much attention each head pays to four kinds of positions.

    weights: (n_layer, H, T, T). Returns {role: (n_layer, H)}, means over the queries that have such
    a position. 'induction' is the token after an earlier occurrence of the same token.
    """
    T = weights.size(-1)
    position = torch.arange(T)
    ids = torch.tensor(ids[:T])
    before = F.pad(ids[:-1], (1, 0), value=-1)  # the token before each key
    masks = {'itself': position[:, None] == position, 'previous': position[:, None] - 1 == position,
             'first': (position == 0) & (position[:, None] > 1),
             'induction': (before == ids[:, None]) & (position <= position[:, None])}
    none = weights.new_zeros(weights.shape[:2])
    return {role: (weights * mask).sum(-1)[..., mask.any(-1)].mean(-1) if mask.any() else none
            for role, mask in masks.items()}


# The page -----------------------------------------------------------------------------------------
STYLE = '''body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em }
pre { font: 16px/1.8 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { border-right: 1px solid white } pre span:hover { outline: 2px solid black }
i::before { content: attr(data-shown); color: #777 }'''


def mark(token):
    """Return HTML that shows an invisible token without becoming part of the text."""
    return f'<i data-shown="{html.escape(printable(token))}"></i>'


def page(title, summary, text, logits, loss):
    """Return HTML of a Text, coloured by loss; titles show the expected tokens."""
    probabilities = logits.softmax(dim=-1)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    spans = []
    for n, i in enumerate(text.ids):
        token = text.tokenizer.decode_bytes([i])
        piece = decoder.decode(token, final=n == len(text.ids) - 1)  # a whole character, or ''
        part = '' if piece.encode() == token else mark(token)
        shown = ''.join(mark(char.encode()) * (not char.isprintable()) + html.escape(char)
                        for char in piece)
        about, color = 'the first token: nothing to predict it from', '#eee'
        if n > 0:
            p, cost = probabilities[n - 1], loss[n - 1].item()
            best = p.topk(min(5, text.tokenizer.vocab_size))
            names = text.names_of(best.indices.tolist())
            about = '\n'.join([f'{printable(token)!r}, id {i}', f'loss {cost:.2f} nats',
                               f'probability {p[i]:.2%}', f'rank {int((p > p[i]).sum()) + 1}',
                               'expected:', *(f'{p:.1%} {name}' for p, name in
                                              zip(best.values, names, strict=True))])
            color = f'rgba(213, 94, 0, {min(1.0, cost / WORST):.2f})'
        spans.append(f'<span style="background: {color}" title="{html.escape(about)}">'
                     f'{part}{shown}</span>')
    title = html.escape(title)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f'<style>{STYLE}</style></head>\n<body><h1>{title}</h1><p>{html.escape(summary)}</p>\n'
            f'<pre>{"".join(spans)}</pre></body></html>\n')


# Pictures -----------------------------------------------------------------------------------------


def draw_heads(weights, names, titles, columns, figsize):
    """Draw attention maps, (heads, T, T), with the tokens where they fit."""
    from matplotlib.colors import PowerNorm

    n_rows, T = -(-len(weights) // columns), weights.size(-1)
    figure, axes = common.pyplot().subplots(n_rows, columns, squeeze=False, figsize=figsize)
    has_ticks = columns <= 2 and T <= WITH_TICKS
    ticks, labels = (range(T), names) if has_ticks else ([], [])
    for ax in axes.flat[len(weights) :]:
        ax.axis('off')
    for ax, head, title in zip(axes.flat, weights, titles, strict=False):
        # the square root makes small weights visible
        ax.imshow(head, cmap='Blues', norm=PowerNorm(0.5, vmin=0, vmax=1), aspect='auto',
                  interpolation='nearest')
        ax.set_title(title, fontsize=9 if columns <= 4 else 6)
        ax.grid(False)
        ax.set_xticks(ticks, labels, family='monospace', fontsize=6.5,
                      rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(ticks, labels, family='monospace', fontsize=6.5)
        ax.tick_params(length=0, pad=1)
    return figure


def draw_loss(names, loss):
    """Draw the beginning of the text in lines, each token coloured by its loss."""
    from matplotlib.patches import Rectangle

    rows, x = [[]], 0
    for name, cost in zip(names, [None, *loss.tolist()], strict=True):
        width = max(2, len(name))
        if x + width > 64:
            rows.append([])
            x = 0
        rows[-1].append((x, width, name, cost))
        x = 64 if name.endswith('\\n') else x + width  # a new row after a line end
    rows = rows[:12]
    figure, ax = common.pyplot().subplots(figsize=(9, 0.6 + 0.55 * len(rows)))
    for y, row in enumerate(rows):
        for x, width, name, cost in row:
            alpha = min(1, cost / WORST) if cost is not None else 0
            ax.add_patch(Rectangle((x, y), width, 0.9, color=common.RED, linewidth=0, alpha=alpha))
            ax.text(x + width / 2, y + 0.38, name, ha='center', va='center', family='monospace')
            if cost is not None:
                ax.text(x + width / 2, y + 0.76, f'{cost:.1f}', ha='center', va='center',
                        fontsize=6)
    longest = max(sum(row[-1][:2]) for row in rows)
    ax.set(xlim=(0, max(40, longest)), ylim=(len(rows), 0),
           title=f'loss of each token in nats; mean {loss.mean():.2f}')
    ax.axis('off')
    return figure


def draw_lens(best, p, text):
    """Draw the likeliest next token after each layer; best, p: ids, probabilities."""
    n_rows, T = p[:, :DRAWN].shape
    n_parts = -(-T // 25)
    width = -(-T // n_parts)  # positions side by side
    figsize = (10, 0.4 + n_parts * (0.5 + 0.25 * n_rows))
    figure, axes = common.pyplot().subplots(n_parts, 1, squeeze=False, figsize=figsize)
    for n, ax in enumerate(axes.flat):
        start, end = n * width, min(T, (n + 1) * width)
        ax.imshow(p[:, start:end], cmap='Greens', vmin=0, vmax=2.2, aspect='auto', origin='lower')
        for t in range(start, end):
            for row, name in enumerate(text.names_of(best[:, t].tolist())):
                color, weight = (('black', 'bold') if best[row, t] == text.ids[t + 1]
                                 else ('#707070', 'normal'))
                ax.text(t - start, row, name[:7], ha='center', va='center', family='monospace',
                        fontsize=8, color=color, weight=weight)
        ax.set_xticks(range(end - start), text.names[start:end], family='monospace')
        ax.set_yticks(range(n_rows), ['embedding', *(f'layer {n}' for n in range(n_rows - 1))])
        ax.set_xlim(-0.5, width - 0.5)
        ax.grid(False)
        ax.tick_params(length=0)
    axes[0, 0].set_title('the next token by the head after each layer; black: right; green: '
                         'probability')
    axes[-1, 0].set_xlabel('token that was read last')
    return figure


def main():
    # read the model and the text
    paths = [os.path.join(out_dir, name) for name in ('best.pt', 'ckpt.pt')]
    if init_from == 'resume' and not any(map(os.path.exists, paths)):
        raise UserError(f'no checkpoint in {out_dir}; train one in minutes: python train.py '
                        f'config/quickstart.py\nor use another: --out_dir=FOLDER, --init_from=gpt2')
    common.start(out)
    model, tokenizer, _, line = open_model(init_from, out_dir)
    c = model.config
    large = c.n_layer - 1 if layer is None else layer
    if large >= c.n_layer:
        raise UserError(f'layer={layer}: expected 0 to {c.n_layer - 1}, of the {c.n_layer} layers '
                        f'of this model')
    ids = [*bos_ids(tokenizer), *tokenizer.encode_array(read_text()).tolist()]  # as eval.py --input
    if len(ids) < 2:
        raise UserError(f'text={text!r}: {len(ids)} token(s); expected 2 or more, as the first is '
                        f'not predicted')
    print(line)
    if len(ids) > c.block_size + 1:
        print(f'of {len(ids):,} tokens the first {c.block_size + 1:,}: the context and the one '
              f'after it')
        ids = ids[: c.block_size + 1]

    # run it
    tokens = Text(ids, tokenizer)
    weights, streams, logits = look(model, ids)
    best, p, lens_loss = logit_lens(model, streams, ids)
    loss, y = lens_loss[-1], torch.tensor(ids[1:])

    # report
    total = loss.sum().item()
    special = set(tokenizer.special_tokens.values())
    n_bytes = sum(len(tokenizer.decode_bytes([i])) for i in ids[1:] if i not in special)
    bits_per_byte = total / math.log(2) / n_bytes if n_bytes else None
    summary = f'{len(loss)} tokens predicted: {total:.2f} nats, {total / len(loss):.4f} a token'
    summary += f', {bits_per_byte:.4f} bits per byte' if n_bytes else ''
    shares = roles(weights, ids)
    heads = [(n, h) for n in range(c.n_layer) for h in range(c.n_head)]
    print(f'{summary}\n\n% of a head\'s attention to ... (induction: to the token after an '
          f'earlier\noccurrence of the same token):\n')
    print(table([('', *shares), *(
        (f'layer {n} head {h}', *(f'{100 * share[n, h]:.0f}' for share in shares.values()))
        for n, h in heads)]))
    nats, right = lens_loss.mean(dim=1).tolist(), (best == y).float().mean(dim=1).tolist()
    depths = ['embedding', *(f'layer {n}' for n in range(c.n_layer))]
    print('\nThe head after ...\n')
    print(table([('', 'nats a token', 'right'),
                 *((name, f'{a:.3f}', f'{b:.0%}') for name, a, b in
                   zip(depths, nats, right, strict=True))]), end='\n\n')

    # write the page, the numbers and the pictures
    common.write(out, 'look_inside.html', page(line, summary, tokens, logits, loss).encode())
    common.record(out, 'look_inside', model=line, ids=ids, loss=loss.tolist(), nats=total,
                  bits_per_byte=bits_per_byte, lens_loss=nats, lens_right=right,
                  heads={role: share.tolist() for role, share in shares.items()})
    common.pyplot().rcParams['text.parse_math'] = False  # a dollar is an ordinary token
    titles = []
    for n, h in heads:
        share, role = max((share[n, h].item(), role) for role, share in shares.items())
        titles.append(f'{n}.{h}: {role} {share:.0%}')
    names, columns = tokens.names[:-1], min(2, c.n_head)
    figures = {
        'heads': draw_heads(weights.flatten(0, 1), names, titles, c.n_head, (9, 6)),
        'layer': draw_heads(weights[large], names, titles[large * c.n_head :], columns,
                            (4.8 * columns, 4.8 * -(-c.n_head // 2))),
        'loss': draw_loss(tokens.names, loss), 'lens': draw_lens(best, p, tokens)}
    for name, figure in figures.items():
        common.save(figure, out, f'look_inside_{name}')


if __name__ == '__main__':
    main()
