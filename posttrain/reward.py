"""
Train a reward model: which of two answers to a conversation is the better?

    $ python -m posttrain.reward --init_from=out-sft --data=data/tiny_chat/pairs.jsonl
    $ python -m posttrain.reward --init_from=resume --data=data/tiny_chat/pairs.jsonl
    $ python -m posttrain.rl --init_from=out-sft --algorithm=ppo --task=tiny_chat \\
        --reward_model=out-reward

Each line of the data is a pair, {"messages": [{"role": "user", "content":
"2+2?"}], "chosen": "4", "rejected": "5"}; those that have the same "group", such
as a question in other words, are held out together. The model is a finetuned one
with a scalar head in place of its own (critic.py): the score of an answer is what
it says at the token that ends it, and -log sigmoid(score of the chosen - score of
the rejected) is minimised (Bradley-Terry). Half of the pairs are right at first.

Writes to out_dir: ckpt.pt (the last state, to resume from), best.pt (lowest
loss on held-out pairs), log.jsonl, config.json. Ctrl-C or SIGTERM finishes the
step, saves and says how to go on.
"""

import math
import os
import sys
import textwrap
import time
from dataclasses import asdict

import torch

from configurator import check, explain_errors, override
from data.tokens import train_windows
from flatgpt import checkpoint, optim, parallel, runtime
from flatgpt.pretrained import tokenizer_of
from posttrain.losses import bradley_terry_loss, preferred
from posttrain.pairs import check_pairs, ending_of, open_chat_model, read_pairs
from posttrain.reward_model import Critic, critic_of
from posttrain.rollouts import lengths_of, pair_rows
from posttrain.tasks.common import wilson

sys.stdout.reconfigure(errors='replace', line_buffering=True)

# settings ------------------------------------------------------------------------------------------------------------
out_dir = 'out-reward'
init_from = 'out-sft'  # a run's out_dir, best one finetuned to chat, or a Hugging Face folder or hub id; 'resume'
data = ''  # pairs, see above: FILE.jsonl
val_fraction = 0.1  # share of the conversations that are held out
eval_interval = 50  # steps between evaluations on all held-out pairs; each is followed by a checkpoint
log_interval = 10  # steps between log lines
max_iters = 500  # steps in all
batch_size = 32  # pairs a step
micro_batch_size = 0  # pairs of similar lengths at once; 0: all; does not change the mathematics
optimizer = 'adamw'  # or 'muon', for a model that was pretrained with it; see train.py
learning_rate = 3e-4  # the highest; for a large model 1e-5. muon: of what is neither a matrix of a block nor a table
muon_lr = 5e-3  # muon: of the matrices of the blocks
embedding_lr = 5e-3  # muon: of embeddings
warmup_iters = 20
min_lr = 3e-5  # at max_iters, after half a cosine; the other rates fall alike
weight_decay = 0.1  # adamw: of matrices and embeddings; muon: of the matrices of the blocks alone
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
dropout = 0.0
seed = 1337  # of batches and dropout
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'auto'  # 'float32', or 'bfloat16' where the hardware multiplies it
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, (
    ('data', bool, 'a file of pairs: --data=FILE.jsonl'),
    ('max_iters eval_interval log_interval batch_size', lambda value: value >= 1, '1 or more'),
    ('optimizer', lambda value: value in ('adamw', 'muon'), "'adamw' or 'muon'"),
    ('learning_rate', lambda value: optimizer == 'adamw' or value > 0, "above 0 with optimizer='muon'"),
    ('micro_batch_size warmup_iters weight_decay grad_clip min_lr learning_rate muon_lr embedding_lr',
     lambda value: 0 <= value < math.inf, '0 or more'),
    ('min_lr', lambda value: value <= learning_rate,
     f'at most learning_rate={learning_rate}, as the rate would rise to it; usually a tenth of that'),
    ('micro_batch_size', lambda value: value == 0 or batch_size % value == 0,
     f'0, or a divisor of batch_size={batch_size}'),
    ('beta1 beta2 dropout', lambda value: 0 <= value < 1, 'at least 0 and below 1'),
    ('seed', lambda value: 0 <= value < 2**63, '0 or more'),
    ('dtype', lambda value: value in ('auto', 'float32', 'bfloat16'), "'auto', 'float32' or 'bfloat16'"),
    ('out_dir', lambda value: os.path.abspath(value) != os.path.abspath(init_from),
     'another folder than that of the model which init_from names'),
))

# the model: a language model with another head, or the reward model of an earlier run
device = runtime.choose_device(device)
runtime.use_cores()
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = checkpoint.load(ckpt_path) if init_from == 'resume' else None
if state:
    model, tokenizer = critic_of(state, ckpt_path, dropout), tokenizer_of(state)
    template, init_from = state['chat_template'], state['config']['init_from']
else:
    base, tokenizer, template, line = open_chat_model(init_from)
    print(line)
    model = Critic.from_gpt(base, dropout)
ending_of(template, tokenizer)  # where answers are judged: ValueError if there is none
block_size = model.config.block_size
model.to(device)
model.value_head.bias.requires_grad_(False)  # only differences of scores matter, and its gradient is but rounding
dtype, dtype_reason = runtime.choose_dtype(dtype, device, has_scaler=False)
if optimizer == 'muon':
    opt = optim.muon(model, weight_decay, learning_rate, muon_lr, embedding_lr, (beta1, beta2), momentum=0.95,
                     dtype=runtime.DTYPES[dtype], world=parallel.World(0, 0, 1))
else:
    opt = optim.adamw(model, weight_decay, learning_rate, (beta1, beta2))
if state:
    optim.check_same(optimizer, state['config'], ckpt_path)
    optim.load_optimizer(opt, state['optimizer'])
iter_num, best_val_loss, train_time, version = checkpoint.progress_of(state)
start_iter = saved_iter = iter_num

# the pairs, the machine, the folder
pairs, n_too_long = read_pairs(data, template, tokenizer, block_size, val_fraction)
pairs_seen = check_pairs(data, val_fraction, state, ckpt_path)
print(f'{len(pairs["train"]):,} pairs to learn from, {len(pairs["val"]):,} held out'
      + (f'; {n_too_long:,} are longer than {block_size} tokens, left out' if n_too_long else ''))
autocast = runtime.autocast(dtype, device)
if device.type == 'cpu':
    runtime.keep_freed_memory()
print(textwrap.fill(f'device {device}, dtype {dtype} ({dtype_reason}), {model.get_num_params() / 1e6:.2f}M parameters; '
                    f'{max_iters} steps of {batch_size} pairs, {max_iters * batch_size / len(pairs["train"]):.2f} '
                    f'epochs', 80, subsequent_indent='  '))
resolved = {**config, 'init_from': init_from, 'device': str(device), 'dtype': dtype}
checkpoint.open_folder(out_dir, resolved, start_iter, version)
state = None  # the loaded tensors are no longer needed


def explain_out_of_memory(kind, error, trace):
    """For sys.excepthook: where memory ran out, say which command takes the same steps with less of it."""
    if not runtime.out_of_memory(error):
        return explain_errors(kind, error, trace)
    smaller = max((n for n in range(1, micro_batch_size or batch_size) if batch_size % n == 0), default=0)
    changes = {'micro_batch_size': smaller} if smaller else {}
    checkpoint.say_out_of_memory(error, iter_num, saved_iter, changes, 'Not even one pair fits: leave out long ones')


sys.excepthook = explain_out_of_memory


def longest(pair):
    return max(len(ids) for ids, _ in pair)


def score(pairs):
    """Scores of the chosen and of the rejected answers, (n,) both."""
    idx, mask = pair_rows(pairs, device)
    with autocast:
        return model.scores(idx, lengths_of(mask)).chunk(2)  # at the last token of each answer


@torch.no_grad()
def evaluate():
    """-> of all held-out pairs the mean loss, and how many are right; a tie is half right."""
    model.eval()
    total, n_right = 0.0, 0.0
    held_out = sorted(pairs['val'], key=longest)
    for i in range(0, len(held_out), micro_batch_size):
        chosen, rejected = score(held_out[i : i + micro_batch_size])
        total += bradley_terry_loss(chosen, rejected).sum().item()
        n_right += preferred(chosen - rejected).sum().item()
    model.train()
    return total / len(pairs['val']), n_right


def save_checkpoint(is_best):
    global saved_iter
    state = {'model': model.state_dict(), 'reward_model': True, 'optimizer': opt.state_dict(),
             'model_args': asdict(model.config), 'iter_num': iter_num, 'best_val_loss': best_val_loss,
             'config': resolved, 'pairs': pairs_seen, 'tokenizer': tokenizer.to_dict(), 'chat_template': template,
             'train_time': train_time}
    is_saved = checkpoint.try_save(out_dir, state, is_best)
    saved_iter = iter_num if is_saved else saved_iter
    return is_saved


# the loop ------------------------------------------------------------------------------------------------------------
interrupt = checkpoint.Interrupt()
micro_batch_size = micro_batch_size or batch_size
model.train()
while True:
    # evaluate and save
    if (iter_num % eval_interval == 0 or iter_num >= max_iters) and (iter_num > start_iter or iter_num == 0):
        val_loss, n_right = evaluate()
        n = len(pairs['val'])
        low, high = wilson(n_right, n)
        print(f'step {iter_num}: val loss {val_loss:.4f}, accuracy {n_right / n:.1%} ({low:.1%} to {high:.1%})')
        if not math.isfinite(val_loss):  # the last update ruined the weights: they must not be saved
            raise SystemExit(f'step {iter_num}: val loss is {val_loss}. Stopped without saving; try a lower '
                             f'--learning_rate, or --dtype=float32')
        checkpoint.log(out_dir, step=iter_num, val_loss=val_loss, val_accuracy=n_right / n, train_time=round(train_time, 3))
        is_best, former_best = val_loss < best_val_loss, best_val_loss
        best_val_loss = min(best_val_loss, val_loss)
        if iter_num == 0 or not save_checkpoint(is_best):
            best_val_loss = former_best  # the best is the best that is on disk
    if iter_num >= max_iters or interrupt.reason:
        break

    # one step: which pairs, and the dropout, depend on (seed, step) alone
    t0 = time.perf_counter()
    torch.manual_seed(seed + 1_000_003 * (iter_num + 1))
    lr = optim.cosine(iter_num, learning_rate, warmup_iters, max_iters, min_lr)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_scale']
    indices = train_windows(iter_num, batch_size, len(pairs['train']), 1, seed, row=1)
    loss, n_right = 0.0, 0.0
    batch = sorted((pairs['train'][i] for i in indices), key=longest)  # so that little of a micro-batch is padding
    for i in range(0, batch_size, micro_batch_size):
        chosen, rejected = score(batch[i : i + micro_batch_size])
        micro_loss = bradley_terry_loss(chosen, rejected).sum() / batch_size
        micro_loss.backward()
        loss, n_right = loss + micro_loss.item(), n_right + preferred(chosen - rejected).sum().item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise SystemExit(f'step {iter_num}: loss is {loss}, norm of the gradient {norm}. Stopped without saving; try a '
                         f'lower --learning_rate, or --dtype=float32')
    opt.step()
    opt.zero_grad(set_to_none=True)
    iter_num += 1
    dt = time.perf_counter() - t0
    train_time += dt
    if (iter_num - 1) % log_interval == 0 or iter_num == max_iters:
        print(f'iter {iter_num - 1}: loss {loss:.4f}, accuracy {n_right / batch_size:.1%}, norm {norm:.2f}, '
              f'time {dt * 1e3:.0f}ms')
        checkpoint.log(out_dir, step=iter_num - 1, loss=loss, accuracy=n_right / batch_size, grad_norm=norm, lr=lr,
                 ms=round(dt * 1e3, 3))

# the end: save what was not saved, say what can be done with it ------------------------------------------------------
if saved_iter < iter_num:
    save_checkpoint(is_best=False)
if interrupt.reason:
    print(f'{interrupt.reason} after step {iter_num}. To go on:\n  {checkpoint.command(init_from="resume")}')
else:
    print(f'{iter_num} steps, {train_time:.1f} s of training; best val loss {best_val_loss:.4f}\nlearn from it:\n'
          f'  python -m posttrain.rl --init_from={init_from} --algorithm=ppo --task=NAME --reward_model={out_dir}')
if saved_iter < iter_num:
    raise SystemExit(f'the state of step {iter_num} could not be saved; {ckpt_path} is older')
