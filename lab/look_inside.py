"""
What a model does with a text: where its heads look, what each token costs it, what it would say after every layer.

    $ python train.py config/quickstart.py                       # minutes: a model to look at
    $ python -m lab.look_inside                                  # seconds
    $ python -m lab.look_inside --layer=0 --text='a (b (c) d) e'
    $ python -m lab.look_inside --out_dir=out --text=FILE:story.txt

Four pictures and a page. _heads: what each head looks at, rows looking at columns, and most of what it does by name;
_layer: the heads of one layer with the tokens; _loss and the .html: the text coloured by what each token costs (on the
page the mouse shows what was expected instead); _lens: the next token that the head would name after each layer.

On the quickstart model (val loss 1.18) and the default text: head 2.1 spends 48% on the previous token; head 3.2 looks
at the blank or bracket before the word that it is in; ending after the embedding the model would lose 4.08 nats a
token, after each layer 3.24, 2.62, 2.01 and 1.72. No head copies: the second `height` costs 11.0 nats, the first 9.5.
7 s on a core of an AMD EPYC.

Induction heads: "In-context Learning and Induction Heads" (Olsson et al. 2022); the logit lens: "interpreting GPT: the
logit lens" (nostalgebraist 2020). Needs '.[lab]'.
"""

import codecs
import html
import math
import os
import sys

import torch
from torch.nn import functional as F

from bench.common import table
from configurator import explain_errors, override
from flatgpt.pretrained import open_model
from lab import common
from ops import visible
from tokenizer.__main__ import visible as printable
from tokenizer.chat import bos_ids

# settings ------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': a checkpoint in out_dir; or a Hugging Face folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out-quickstart'  # where train.py wrote best.pt
text = 'def area(width, height):\n    return width * height\n'  # or FILE:path of a text file that holds it
layer: int | None = None  # whose heads are drawn larger, 0 the first; None: the last
out = 'out-lab'  # folder of the pictures, the page and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

WORST = 5.0  # nats from which a token is fully coloured; a probability of 0.7%
DRAWN, WITH_TICKS = 50, 64  # positions that a picture has room for; tokens that fit beside an attention map


def read_text():
    """The text of the settings. SystemExit if it can't be read."""
    if not text.startswith('FILE:'):
        return text
    try:
        with open(text[len('FILE:') :], encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f'text={text!r}: {error}; expected FILE:path of a text file in UTF-8') from None


@torch.no_grad()
def look(model, ids):
    """
    ids: 2 to block_size + 1 of a text, of which all but the last are read and all but the first predicted; T of each.
    -> weights: (n_layer, H, T, T), whose rows are queries; streams: (n_layer + 1, T, C), the residual stream before
    the first layer and after each; logits: (T, V), the model's own.
    """
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    weights, streams, blocks = [], [], model.transformer.h

    def recording(attention):
        """Its attend(), which gets q, k and v with all that the options do to them, and which keeps the weights."""
        def attend(q, k, v, mask=None):
            keys = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, H, T, D)
            positions = torch.arange(q.size(2), device=q.device)
            hidden = ~visible(positions[:, None], positions, attention.window)
            scores = (q @ keys.mT).float() * attention.head_size**-0.5
            weights.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1)[0])
            return type(attention).attend(attention, q, k, v, mask)

        return attend

    hooks = [module.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
             for module in (*blocks, model.transformer.ln_f)]
    for block in blocks:
        block.attn.attend = recording(block.attn)
    try:
        logits, _ = model(x, y)  # eager and without a cache: through attend()
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            del block.attn.attend  # the method of the class again
    return torch.stack(weights), torch.cat(streams), logits[0].float()


@torch.no_grad()
def logit_lens(model, streams, ids):
    """
    What the model would say if it ended after each layer: its last norm and its head on the residual stream.
    -> (n_layer + 1, T) each: the likeliest next token, its probability, and the loss of the token that does come.
    """
    rows, y = [], torch.tensor(ids[1:])
    for stream in streams:  # one at a time: all logits of GPT-2's vocabulary at once would take gigabytes
        log_p = model.logits(model.transformer.ln_f(stream)).float().log_softmax(dim=-1)
        p, best = log_p.exp().max(dim=-1)
        rows.append((best, p, F.nll_loss(log_p, y, reduction='none')))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def roles(weights, ids):
    """
    What share of its attention each head spends on what, on average over the positions where there is such a thing.
    weights: (n_layer, H, T, T). -> {role: (n_layer, H)}; 'induction': on what followed the same token earlier.
    """
    T = weights.size(-1)
    position = torch.arange(T)
    ids = torch.tensor(ids[:T])
    followed = F.pad(ids[:-1], (1, 0), value=-1)  # the token before each key
    looks = {'itself': position[:, None] == position, 'previous': position[:, None] - 1 == position,
             'first': (position == 0) & (position[:, None] > 1),
             'induction': (followed == ids[:, None]) & (position <= position[:, None])}
    return {role: (weights * mask).sum(-1)[..., mask.any(-1)].mean(-1) if mask.any() else weights.new_zeros(
        weights.shape[:2]) for role, mask in looks.items()}


def token_names(ids, tokenizer):
    """Tokens as a picture can show them: · for a space, \\n, \\xNN for half a character, \\uNNNN where fonts end."""
    names = [printable(tokenizer.decode_bytes([i])) if i < tokenizer.vocab_size else f'<{i}>' for i in ids]
    return [''.join(char if ord(char) < 0x2E80 else char.encode('unicode-escape').decode() for char in name)
            .replace(' ', '·') for name in names]


# the page -------------------------------------------------------------------------------------------------------------
STYLE = '''body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em }
pre { font: 16px/1.8 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { border-right: 1px solid white } pre span:hover { outline: 2px solid black }
i::before { content: attr(data-shown); color: #777 }'''


def mark(token):
    """HTML that shows what can't be seen, a line end or half a character, without being part of the text."""
    return f'<i data-shown="{html.escape(printable(token))}"></i>'


def page(title, summary, ids, tokenizer, logits, loss):
    """HTML of the text, each token coloured by its loss; what the model expected instead shows where the mouse is."""
    probabilities = logits.softmax(dim=-1)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    spans = []
    for n, i in enumerate(ids):
        token = tokenizer.decode_bytes([i])
        piece = decoder.decode(token, final=n == len(ids) - 1)  # a character comes with the last of its bytes
        part = '' if piece.encode() == token else mark(token)
        about, color = 'the first token: nothing to predict it from', '#eee'
        if n > 0:
            p, cost = probabilities[n - 1], loss[n - 1].item()
            best = p.topk(min(5, tokenizer.vocab_size))
            about = '\n'.join([f'{printable(token)!r}, id {i}', f'loss {cost:.2f} nats', f'probability {p[i]:.2%}',
                               f'rank {int((p > p[i]).sum()) + 1}', 'expected:',
                               *(f'{p:.1%} {name}' for p, name in zip(best.values, token_names(
                                   best.indices.tolist(), tokenizer), strict=True))])
            color = f'rgba(213, 94, 0, {min(1.0, cost / WORST):.2f})'
        spans.append(f'<span style="background: {color}" title="{html.escape(about)}">{part}'
                     f'{"".join(mark(char.encode()) * (not char.isprintable()) + html.escape(char) for char in piece)}'
                     f'</span>')
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f'<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>\n'
            f'<pre>{"".join(spans)}</pre></body></html>\n')


# pictures -------------------------------------------------------------------------------------------------------------
def draw_heads(plt, weights, names, titles, columns, figsize):
    """Attention maps, (heads, T, T), `columns` beside each other; with the tokens where there is room for them."""
    from matplotlib.colors import PowerNorm

    figure, axes = plt.subplots(-(-len(weights) // columns), columns, squeeze=False, figsize=figsize)
    T = weights.size(-1)
    has_ticks = columns <= 2 and T <= WITH_TICKS
    for ax in axes.flat[len(weights) :]:
        ax.axis('off')
    for ax, head, title in zip(axes.flat, weights, titles, strict=False):
        ax.imshow(head, cmap='Blues', norm=PowerNorm(0.5, vmin=0, vmax=1), aspect='auto',  # small weights show, too
                  interpolation='nearest')
        ax.set_title(title, fontsize=9 if columns <= 4 else 6)
        ax.grid(False)
        ax.set_xticks(range(T) if has_ticks else [], names if has_ticks else [], family='monospace', fontsize=6.5,
                      rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(range(T) if has_ticks else [], names if has_ticks else [], family='monospace', fontsize=6.5)
        ax.tick_params(length=0, pad=1)
    return figure


def draw_loss(plt, names, ids, loss):
    """The text in lines, each token coloured by its loss, which is written below it."""
    from matplotlib.patches import Rectangle

    rows, x = [[]], 0
    for name, cost in zip(names, [None, *loss.tolist()], strict=True):
        width = max(2, len(name))
        if x + width > 64:
            rows.append([])
            x = 0
        rows[-1].append((x, width, name, cost))
        x = 64 if name.endswith('\\n') else x + width  # a new line after a line end
    rows = rows[:12]  # of a longer text its beginning
    figure, ax = plt.subplots(figsize=(9, 0.6 + 0.55 * len(rows)))
    for y, row in enumerate(rows):
        for x, width, name, cost in row:
            ax.add_patch(Rectangle((x, y), width, 0.9, color=common.RED, linewidth=0,
                                   alpha=min(1, cost / WORST) if cost is not None else 0))
            ax.text(x + width / 2, y + 0.38, name, ha='center', va='center', family='monospace')
            if cost is not None:
                ax.text(x + width / 2, y + 0.76, f'{cost:.1f}', ha='center', va='center', fontsize=6)
    longest = max(sum(row[-1][:2]) for row in rows)
    ax.set(xlim=(0, max(40, longest)), ylim=(len(rows), 0),
           title=f'loss of each token in nats; mean {loss.mean():.2f}')
    ax.axis('off')
    return figure


def draw_lens(plt, best, p, ids, names, tokenizer):
    """The likeliest next token after each layer, at each position."""
    n_rows, T = p[:, :DRAWN].shape
    blocks = -(-T // 25)
    per_block = -(-T // blocks)
    figure, axes = plt.subplots(blocks, 1, squeeze=False, figsize=(10, 0.4 + blocks * (0.5 + 0.25 * n_rows)))
    for block, ax in enumerate(axes.flat):
        here = range(block * per_block, min(T, (block + 1) * per_block))
        ax.imshow(p[:, here.start : here.stop], cmap='Greens', vmin=0, vmax=2.2, aspect='auto', origin='lower')
        for x, t in enumerate(here):
            for row, name in enumerate(token_names(best[:, t].tolist(), tokenizer)):
                is_right = best[row, t] == ids[t + 1]
                ax.text(x, row, name[:7], ha='center', va='center', family='monospace', fontsize=8,
                        color='black' if is_right else '#707070', weight='bold' if is_right else 'normal')
        ax.set_xticks(range(len(here)), [names[t] for t in here], family='monospace')
        ax.set_yticks(range(n_rows), ['embedding', *(f'layer {n}' for n in range(n_rows - 1))])
        ax.set_xlim(-0.5, per_block - 0.5)
        ax.grid(False)
        ax.tick_params(length=0)
    axes[0, 0].set_title('the next token, as the head would say after each layer; black: right; green: how sure')
    axes[-1, 0].set_xlabel('token that was read last')
    return figure


def main():
    paths = [os.path.join(out_dir, name) for name in ('best.pt', 'ckpt.pt')]
    if init_from == 'resume' and not any(map(os.path.exists, paths)):
        raise SystemExit(f'no checkpoint in {out_dir}; train one in minutes: python train.py config/quickstart.py\n'
                         f'or name another: --out_dir=FOLDER or --init_from=gpt2')
    common.start(out)
    model, tokenizer, _, line = open_model(init_from, out_dir)
    c = model.config
    large = c.n_layer - 1 if layer is None else layer  # its heads
    if not 0 <= large < c.n_layer:
        raise SystemExit(f'layer={layer}: expected 0 to {c.n_layer - 1}, of the {c.n_layer} layers of this model')
    ids = [*bos_ids(tokenizer), *tokenizer.encode_array(read_text()).tolist()]  # as eval.py --input
    if len(ids) < 2:
        raise SystemExit(f'text={text!r}: {len(ids)} token(s); expected 2 or more, as the first is not predicted')
    print(line)
    if len(ids) > c.block_size + 1:
        print(f'of {len(ids):,} tokens the first {c.block_size + 1:,}: the context and the one after it')
        ids = ids[: c.block_size + 1]
    weights, streams, logits = look(model, ids)
    best, p, lens_loss = logit_lens(model, streams, ids)
    loss, y = lens_loss[-1], torch.tensor(ids[1:])
    names = token_names(ids, tokenizer)

    total = loss.sum().item()
    special = set(tokenizer.special_tokens.values())
    n_bytes = sum(len(tokenizer.decode_bytes([i])) for i in ids[1:] if i not in special)
    bits_per_byte = total / math.log(2) / n_bytes if n_bytes else None
    summary = (f'{len(loss)} tokens predicted: {total:.2f} nats, {total / len(loss):.4f} a token'
               + (f', {bits_per_byte:.4f} bits per byte' if n_bytes else ''))
    print(f'{summary}\n\n% of a head\'s attention that goes to ... (induction: to what followed the\n'
          f'same token earlier):\n')
    shares = roles(weights, ids)
    heads = [(n, h) for n in range(c.n_layer) for h in range(c.n_head)]
    print(table([('', *shares), *((f'layer {n} head {h}', *(f'{100 * share[n, h]:.0f}' for share in shares.values()))
                                  for n, h in heads)]))
    nats, right = lens_loss.mean(dim=1).tolist(), (best == y).float().mean(dim=1).tolist()
    print('\nThe head after ...\n')
    depths = ['embedding', *(f'layer {n}' for n in range(c.n_layer))]
    print(table([('', 'nats a token', 'right'), *((name, f'{a:.3f}', f'{b:.0%}') for name, a, b in
                                                  zip(depths, nats, right, strict=True))]), end='\n\n')

    common.write(out, 'look_inside.html', page(line, summary, ids, tokenizer, logits, loss).encode())
    common.record(out, 'look_inside', model=line, ids=ids, loss=loss.tolist(), nats=total, bits_per_byte=bits_per_byte,
                  lens_loss=nats, lens_right=right, heads={k: v.tolist() for k, v in shares.items()})
    plt = common.pyplot()
    plt.rcParams['text.parse_math'] = False  # a dollar is a token like others
    titles = []
    for n, h in heads:
        share, role = max((share[n, h].item(), role) for role, share in shares.items())
        titles.append(f'{n}.{h}: {role} {share:.0%}')
    read = names[:-1]
    common.save(draw_heads(plt, weights.flatten(0, 1), read, titles, c.n_head, (9, 6)), out, 'look_inside_heads')
    own = slice(large * c.n_head, (large + 1) * c.n_head)
    size = 4.8 * min(2, c.n_head), 4.8 * -(-c.n_head // 2)
    common.save(draw_heads(plt, weights[large], read, titles[own], min(2, c.n_head), size), out, 'look_inside_layer')
    common.save(draw_loss(plt, names, ids, loss), out, 'look_inside_loss')
    common.save(draw_lens(plt, best, p, ids, names, tokenizer), out, 'look_inside_lens')


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
