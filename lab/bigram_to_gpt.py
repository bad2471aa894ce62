"""
Build a GPT from a bigram table, and measure what each part is worth.

    $ python -m lab.bigram_to_gpt                          # two minutes on two cores
    $ python -m lab.bigram_to_gpt --steps=200 --scale=1    # a first look

The rungs are those of Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled
out" (2023). All train on the same batches of Shakespeare's characters for the same number of AdamW
steps. The script first asserts two claims: heads as a batch dimension are separate heads, and the
last rung, built by hand, equals model.GPT.

Val loss of the whole split on an AMD EPYC, nats per character: bigram 2.494, one head 2.398,
multi-head 2.218, feed-forward 2.058, deeper 2.314, residual 1.930, norm 1.966, dropout 2.068,
scaled up 1.868. Two blocks in a row learn less than one; residual connections make depth useful.
The norm pays in deeper networks ("On Layer Normalization in the Transformer Architecture", Xiong
et al. 2020). Dropout pays over many epochs and costs where no text is read twice. Needs '.[lab]'.
"""

import time
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

import tokenizer
from bench.common import table
from configurator import Count, Fraction, Seed, override
from data import datasets
from data import tokens as data
from flatgpt import optim
from flatgpt.generate import Sampling, sample_next, uniforms
from lab import common
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
dataset = 'shakespeare_char'
steps: Count = 700  # of every rung
batch_size: Count = 16  # sequences per step
block_size: Count = 64  # characters of context
n_layer: Count = 2  # blocks, from the rung 'deeper' on
n_head: Count = 4
n_embd: Count = 64  # channels
dropout: Fraction = 0.1  # of the rung 'dropout' alone
scale: Count = 2  # multiplies the blocks, heads and channels of the last rung
sample_chars: Count = 60
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

RUNGS = {  # each adds one part to the one before: its effect, and AdamW's highest learning rate
    'bigram': ('this character -> the next', 0.3),
    'one head': ('looks back at what was', 1e-2),
    'multi-head': (f'{n_head} looks at once', 1e-2),
    'feed-forward': ('thinks about what it saw', 1e-2),
    'deeper': (f'{n_layer} such blocks in a row', 1e-2),
    'residual': ('blocks add to what comes in', 1e-2),
    'norm': ('blocks read it at one scale', 1e-2),
    'dropout': (f'{dropout:.0%} zeroed in training', 1e-2),
    'scaled up': (f'{scale}x as deep and wide', 5e-3)}


def attend(q, k, v, drop):
    """Average the values up to each position, weighted by how well queries match keys.

    q, k, v: (..., T, D) -> (..., T, D). All dimensions before T and D are batch dimensions.
    """
    T, D = q.shape[-2:]
    scores = q @ k.mT / D**0.5  # (..., T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return drop(scores.masked_fill(future, -torch.inf).softmax(-1)) @ v


class MultiHead(nn.Module):
    """H heads of D = C / H channels as a batch dimension, mixed by a projection."""

    def __init__(self, n_head, n_embd, p):
        super().__init__()
        self.n_head, self.drop = n_head, nn.Dropout(p)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)  # q, k, v of all heads
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def heads(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        return attend(q, k, v, self.drop).transpose(1, 2).reshape(B, T, C)

    def heads_one_by_one(self, x):
        """Compute the same one head at a time, and concatenate the results."""
        outputs, C = [], x.size(-1)
        for i in range(0, C, C // self.n_head):
            q, k, v = (x @ weight[i : i + C // self.n_head].T
                       for weight in self.c_attn.weight.split(C))  # (B, T, D)
            outputs.append(attend(q, k, v, self.drop))
        return torch.cat(outputs, dim=-1)

    def forward(self, x):
        return self.c_proj(self.heads(x))


class Block(nn.Module):
    """Communicate, then compute, with the parts named in the set `has`."""

    def __init__(self, has, n_head, n_embd):
        super().__init__()
        p = dropout if 'dropout' in has else 0.0
        self.attn = MultiHead(n_head if 'multi-head' in has else 1, n_embd, p)
        self.mlp = nn.Sequential(OrderedDict(  # each position by itself, four times as wide inside
            c_fc=nn.Linear(n_embd, 4 * n_embd, bias=False), gelu=nn.GELU(approximate='tanh'),
            c_proj=nn.Linear(4 * n_embd, n_embd, bias=False))) if 'feed-forward' in has else None
        self.ln_1, self.ln_2 = (norm_of(has, n_embd) for _ in range(2))
        self.drop, self.has_residual = nn.Dropout(p), 'residual' in has

    def forward(self, x):
        for norm, part in ((self.ln_1, self.attn), (self.ln_2, self.mlp)):
            if part is not None:
                update = self.drop(part(norm(x)))
                x = x + update if self.has_residual else update
        return x


def norm_of(has, n_embd):
    return nn.LayerNorm(n_embd, bias=False) if 'norm' in has else nn.Identity()


class LanguageModel(nn.Module):
    """A model with the parts in the set `has`: (x, y) -> (logits, loss).

    The parts have model.GPT's names. The bigram model is a table of logits and nothing else.
    """

    def __init__(self, vocab_size, has, n_layer, n_head, n_embd):
        super().__init__()
        self.is_bigram = has == {'bigram'}
        wte = nn.Embedding(vocab_size, vocab_size if self.is_bigram else n_embd)
        self.transformer = nn.ModuleDict({'wte': wte})
        if not self.is_bigram:
            self.transformer.update({
                'wpe': nn.Embedding(block_size, n_embd),
                'drop': nn.Dropout(dropout if 'dropout' in has else 0.0),
                'h': nn.Sequential(*[Block(has, n_head, n_embd) for _ in range(n_layer)]),
                'ln_f': norm_of(has, n_embd)})
            self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # keeps the variance

    def forward(self, x, y=None):
        t = self.transformer
        logits = t.wte(x)  # (B, T, V); in all other models the token embeddings, (B, T, C)
        if not self.is_bigram:
            stream = t.drop(logits + t.wpe.weight[:x.size(1)])
            logits = self.lm_head(t.ln_f(t.h(stream)))
        if y is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def build(rung, vocab_size):
    """Return the model of a rung."""
    has, times = set(list(RUNGS)[:list(RUNGS).index(rung) + 1]), 1
    if rung == 'scaled up':
        has, times = has - {'dropout'}, scale
    depth = n_layer * times if 'deeper' in has else 1
    return LanguageModel(vocab_size, has, depth, n_head * times, n_embd * times)


def check(vocab_size):
    """Assert two claims of the lecture, and print their errors in float32."""
    multi, x = MultiHead(n_head, n_embd, 0.0), torch.randn(2, block_size, n_embd)
    off = (multi.heads(x) - multi.heads_one_by_one(x)).abs().max().item()
    assert off < 1e-4, f'heads as a dimension of the batch are off by {off} from separate heads'
    print(f'{n_head} heads as a dimension of the batch = {n_head} separate heads: off by {off:.1g}')
    by_hand = build('scaled up', vocab_size)
    real = GPT(GPTConfig(block_size, vocab_size, n_layer * scale, n_head * scale, n_embd * scale,
                         bias=False, tie_embeddings=False))
    real.load_state_dict(by_hand.state_dict())  # raises if a name or a shape differs
    x = torch.randint(vocab_size, (2, block_size))
    off = (by_hand(x)[0] - real(x, x)[0]).abs().max().item()
    assert off < 1e-3, f'the logits of the last rung are off by {off} from those of model.GPT'
    print(f'the last rung = model.GPT with the same weights: logits off by {off:.1g}')


@torch.no_grad()
def sample(model, letters):
    """Sample sample_chars characters after a line end; line ends are returned as \\n."""
    ids = torch.tensor([letters.encode('\n')])
    for u in uniforms(seed, 0, 0, sample_chars):
        next_id = sample_next(model(ids[:, -block_size:])[0][:, -1], Sampling(), u[None])
        ids = torch.cat([ids, next_id], dim=1)
    return letters.decode(ids[0, 1:].tolist()).replace('\n', '\\n')


def draw(losses):
    """Draw the val loss of each rung; red bars are worse than the rung before."""
    figure, ax = common.pyplot().subplots(figsize=(9, 5))
    values = list(losses.values())
    worse = [i > 0 and loss > values[i - 1] for i, loss in enumerate(values)]
    bars = ax.barh(list(losses), values, color=[common.RED if w else common.BLUE for w in worse])
    ax.bar_label(bars, fmt='%.2f', padding=4, weight='bold')
    for i, rung in enumerate(losses):
        ax.text(0.04, i, RUNGS[rung][0], color='white', va='center')
    ax.invert_yaxis()
    ax.margins(x=0.08)
    ax.grid(visible=False)
    ax.set(xlabel='loss on the validation text, nats a character',
           title=f'What each part is worth: {steps:,} steps of {batch_size} x {block_size} '
                 f'characters for each rung')
    return figure


def main():
    # read the data, check the two claims
    GPTConfig(block_size, 1, n_layer, n_head, n_embd, dropout)  # raises for impossible sizes
    common.start(out)
    folder = datasets.folder_of(dataset)
    datasets.prepare_if_missing(folder, is_first=True)
    meta = datasets.load_meta(folder)
    V, letters = meta['vocab_size'], tokenizer.from_dict(meta['tokenizer'])
    train, val = (data.open_tokens(folder, split, meta, block_size) for split in ('train', 'val'))
    torch.manual_seed(seed)
    check(V)
    all_of_val = data.gather(val, data.whole_windows(len(val), block_size), block_size, V)

    def get_batch(step):
        starts = data.train_windows(step * batch_size, batch_size, len(train), block_size, seed)
        return data.gather(train, starts, block_size, V)

    # train each rung
    epochs = steps * batch_size * block_size / len(train)
    print(f'\neach rung reads {epochs:.2f} times the training text')
    rungs, rows = {}, [['rung', 'what it adds', 'val loss', 'parameters', 'seconds', 'rate']]
    for rung, (part, rate) in RUNGS.items():
        print(f'{rung:12} train loss', end='', flush=True)
        torch.manual_seed(seed)
        model, started = build(rung, V), time.perf_counter()
        optimizer = optim.adamw(model, 0.1, rate, (0.9, 0.99))
        for step, loss in common.train(model, get_batch, steps, optimizer):
            if (step + 1) % -(-steps // 5) == 0:
                print(f' {loss:.2f}', end='', flush=True)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            val_loss = model.eval()(*all_of_val)[1].item()
        n_params = sum(p.numel() for p in model.parameters())
        rungs[rung] = {'val_loss': val_loss, 'parameters': n_params, 'seconds': seconds,
                       'rate': rate, 'sample': sample(model, letters)}
        print(f', val loss {val_loss:.3f}')
        rows.append([rung, part, f'{val_loss:.3f}', f'{n_params:,}', f'{seconds:.0f}', f'{rate:g}'])

    # report
    print('\n' + table(rows) + '\n')
    for rung, figures in rungs.items():
        print(f'{rung:12}  {figures["sample"]}')
    losses = {rung: figures['val_loss'] for rung, figures in rungs.items()}
    common.save(draw(losses), out, 'bigram_to_gpt')
    common.record(out, 'bigram_to_gpt', steps=steps, batch_size=batch_size, block_size=block_size,
                  rungs=rungs)


if __name__ == '__main__':
    main()
