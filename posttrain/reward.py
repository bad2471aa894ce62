"""Train a reward model to rank two answers to a conversation.

    $ python -m posttrain.reward --init_from=out-sft --data=pairs.jsonl
    $ python -m posttrain.reward --init_from=resume --data=pairs.jsonl
    $ torchrun --standalone --nproc_per_node=8 \\
        -m posttrain.reward --data=pairs.jsonl
    $ python -m posttrain.rl --init_from=out-sft --algorithm=ppo \\
        --task=tiny_chat --reward_model=out-reward

Each line of the data is a pair, {"messages": [{"role": "user", "content":
"2+2?"}], "chosen": "4", "rejected": "5"}. Pairs with the same "group" are held
out together. The model is a finetuned one with a scalar head in place of its
own. It scores an answer at the token that ends it. The loss is Bradley-Terry's,
-log sigmoid(score of the chosen - score of the rejected). Expect a loss
of ln 2 and half of the held-out pairs right at first.

Writes the same files as train.py; best.pt has the lowest loss on held-out
pairs.
"""

import math
import os
import time
from dataclasses import asdict
from typing import Literal

import torch

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Share,
    UserError,
    fit,
    override,
)
from data.shuffle import train_items
from flatgpt import checkpoint, entries, lora, optim, output, parallel, shares
from flatgpt.pretrained import check_same, tokenizer_of
from posttrain.losses import bradley_terry_loss, preferred
from posttrain.policy import check_out_dir, open_chat_model, open_machine
from posttrain.preferences import check_pairs, ending_of, pair_rows, read_pairs
from posttrain.reward_model import Critic, critic_of
from posttrain.rollouts import lengths_of
from posttrain.tasks.common import wilson

output.protect(drop=True)

# Settings -----------------------------------------------------------------------------------------
# the run
out_dir = 'out-reward'
init_from = 'out-sft'  # a finetuned model: an out_dir, a Hugging Face folder or hub id; 'resume'
data = ''  # the pairs: FILE.jsonl
val_fraction: Share = 0.1  # share of the conversations held out
eval_interval: Count = 50  # steps between evaluations; each is followed by a checkpoint
log_interval: Count = 10  # steps between log lines
max_iters: Count = 500  # steps in all
batch_size: Count = 32  # pairs per step
micro_batch_size: Natural = 0  # pairs at once; 0: all; does not change the mathematics
dropout: Fraction = 0.0
# wandb; its offline mode (WANDB_MODE=offline) needs no network
wandb_log = False
wandb_project = 'posttrain'
wandb_run_name = 'reward'
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon for a model that was pretrained with it
learning_rate: NonNegative = 3e-4  # the highest; for a large model 1e-5
muon_lr: NonNegative = 5e-3  # muon: rate of the matrices of the blocks
embedding_lr: NonNegative = 5e-3  # muon: rate of embeddings
warmup_iters: Natural = 20
min_lr: NonNegative = 3e-5  # at max_iters, after half a cosine; the other rates fall alike
weight_decay: NonNegative = 0.1  # adamw: matrices and embeddings; muon: the matrices alone
beta1: Fraction = 0.9
beta2: Fraction = 0.95
grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
# LoRA: adapters beside the frozen model of init_from; the head learns too
lora_rank: Natural = 0  # 8 to 64; 0: train all weights
lora_alpha: Positive = 16.0  # scales the adapters by lora_alpha / lora_rank
lora_targets = 'c_attn,c_fc,c_proj'  # layers with adapters, such as 'c_attn,mlp.c_proj'
lora_bits: Literal[32, 8, 4] = 32  # of the frozen weights of these layers
# machine
seed = 1337  # fixes batches and dropout
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
if not data:
    raise UserError("data='': expected a file of pairs: --data=FILE.jsonl")
if optimizer == 'muon' and learning_rate == 0:
    raise UserError('learning_rate=0: expected above 0 with optimizer=muon')
if min_lr > learning_rate:
    raise UserError(f'min_lr={min_lr}: expected at most learning_rate={learning_rate}, usually a '
                    f'tenth of it')
check_out_dir(out_dir, init_from)
lora.check_settings(config, init_from, out_dir)

# the machine, which may run this script in several processes
world, torch_device, precision, precision_reason, autocast = open_machine(device, dtype)

# the model: a language model with another head, or the reward model of the run that resumes
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = {}
if init_from == 'resume':
    state = checkpoint.load(ckpt_path)
    model = critic_of(state, ckpt_path, dropout, entries.Posttraining)
    tokenizer = tokenizer_of(state)
    template, init_from = state['chat_template'], state['config']['init_from']
    check_same(optimizer, state['config'], ckpt_path)
    adapters = state.get('lora')
    lora.check_resumes(adapters, config, ckpt_path)
else:
    base, tokenizer, template, line = open_chat_model(init_from)
    print(line)
    model, adapters = Critic.from_gpt(base, dropout), None
    if lora_rank:
        torch.manual_seed(seed)  # the adapters are the same in all processes
        adapters = lora.start(base, config, out_dir, model)
ending_of(template, tokenizer)  # raises UserError if answers do not end with a token to score at
model.to(torch_device)
model.value_head.weight.requires_grad_(True)
model.value_head.bias.requires_grad_(False)  # only differences of scores count
opt = optim.create(model, config, precision, world)
if state:
    entries.load_optimizer(opt, state['optimizer'])
schedule = optim.Schedule(learning_rate, warmup_iters, max_iters, min_lr)

# the pairs
block_size = model.config.block_size
pairs = read_pairs(data, template, tokenizer, block_size, val_fraction)
pairs_id = check_pairs(data, val_fraction, state, ckpt_path)

# the processes must agree on what they begin with
world.check_alike({'step': state.get('iter_num'), 'weights': lora.digest(model), 'pairs': pairs_id,
                   **config, 'dtype': precision})

# the folder of the run
resolved = {**config, 'init_from': init_from, 'device': str(torch_device), 'dtype': precision}
epochs = max_iters * batch_size / len(pairs['train'])
print(fit(f'device {torch_device}, dtype {precision} ({precision_reason}), '
          f'{model.get_num_params() / 1e6:.2f}M parameters; {max_iters} steps of {batch_size} '
          f'pairs, {epochs:.2f} epochs', indent='  '))
with shares.together(world):
    run = checkpoint.Run(out_dir, resolved, state or None, world)
at_once = micro_batch_size or -(-batch_size // world.size)
run.explain_out_of_memory({'micro_batch_size': at_once // 2} if at_once > 1 else {},
                          'Not even one pair fits: leave out long ones')
state = None  # the loaded tensors are no longer needed


def longest(pair):
    """Return the length of a pair's longer answer."""
    return max(len(ids) for ids, _ in pair)


def score(pairs):
    """Return the scores of the chosen and of the rejected answers, (n,) each."""
    idx, mask = pair_rows(pairs, torch_device)
    with autocast:
        return model.scores(idx, lengths_of(mask)).chunk(2)


@torch.no_grad()
def evaluate():
    """Return the held-out pairs' mean loss, and how many are right; a tie counts half."""
    model.eval()
    total, n_right = 0.0, 0.0
    held_out = sorted(pairs['val'], key=longest)[world.rank :: world.size]
    for i in range(0, len(held_out), at_once):
        chosen, rejected = score(held_out[i : i + at_once])
        total += bradley_terry_loss(chosen, rejected).sum().item()
        n_right += preferred(chosen - rejected).sum().item()
    model.train()
    total, n_right = world.sum([total, n_right])
    return total / len(pairs['val']), n_right


def state_of_run():
    """Return a checkpoint's content beside the numbers of the run."""
    weights = ({'model': lora.adapters(model), 'lora': adapters} if adapters else
               {'model': model.state_dict()})
    return {**weights, 'reward_model': True, 'optimizer': opt.state_dict(),
            'model_args': asdict(model.config), 'pairs': pairs_id, 'tokenizer': tokenizer.to_dict(),
            'chat_template': template}


# the loop -----------------------------------------------------------------------------------------
model.train()
while True:
    # evaluate and save
    if run.is_due(eval_interval, max_iters):
        val_loss, n_right = evaluate()
        accuracy, (low, high) = n_right / len(pairs['val']), wilson(n_right, len(pairs['val']))
        print(f'step {run.step}: val loss {val_loss:.4f}, accuracy {accuracy:.1%} ({low:.1%} to '
              f'{high:.1%})')
        if world.is_main and math.isfinite(val_loss):
            run.log(step=run.step, val_loss=val_loss, val_accuracy=accuracy)
        run.evaluated(val_loss, state_of_run)
    if run.step >= max_iters or run.stop_reason:
        break

    # draw this process's pairs; batches and dropout are functions of (seed, step) alone
    t0 = time.perf_counter()
    torch.manual_seed(seed + 1_000_003 * (run.step + 1) + world.rank)
    numbers = train_items(run.drawn(batch_size), batch_size, len(pairs['train']), seed)
    batch = sorted((pairs['train'][i] for i in numbers), key=longest)  # little padding
    batch = batch[world.rank :: world.size]

    # forward and backward over the micro-batches
    loss, n_right = 0.0, 0.0
    for i in range(0, len(batch), at_once):
        chosen, rejected = score(batch[i : i + at_once])
        micro_loss = bradley_terry_loss(chosen, rejected).sum() / batch_size
        micro_loss.backward()
        loss += micro_loss.item()
        n_right += preferred(chosen - rejected).sum().item()
    shares.add_gradients(model, world)
    loss, n_right = world.sum([loss, n_right])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.stop_not_finite(f'loss is {loss}, norm of the gradient {norm}')

    # update
    lr = schedule.cosine(run.step)
    optim.set_rates(opt, lr)
    opt.step()
    opt.zero_grad(set_to_none=True)
    dt = time.perf_counter() - t0
    run.advance(batch_size, dt)
    shares.agree_to_stop(run)

    # report
    step = run.step - 1
    if step % log_interval == 0 or run.step == max_iters:
        accuracy, ms = n_right / batch_size, round(dt * 1e3, 3)
        print(f'iter {step}: loss {loss:.4f}, accuracy {accuracy:.1%}, norm {norm:.2f}, '
              f'time {ms:.0f}ms')
        if world.is_main:
            run.log(step=step, loss=loss, accuracy=accuracy, grad_norm=norm, lr=lr, ms=ms)

# the end ------------------------------------------------------------------------------------------
is_complete = run.finish(state_of_run)
parallel.disconnect()
if is_complete:
    print(f'{run.step} steps, {run.train_time:.1f} s of training; best val loss '
          f'{run.best_val_loss:.4f}\nlearn from it:\n  python -m posttrain.rl '
          f'--init_from={init_from} --algorithm=ppo \\\n    --task=NAME --reward_model={out_dir}')
run.close()
