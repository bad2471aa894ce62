"""Train a chat model on pairs of answers: direct preference optimization (DPO).

    $ python -m posttrain.dpo --init_from=out-sft --pairs=pairs.jsonl
    $ python -m posttrain.dpo --init_from=out-sft --pairs=pairs.jsonl \\
        --task=tiny_chat --max_new_tokens=128
    $ python -m posttrain.dpo --init_from=resume --pairs=pairs.jsonl
    $ torchrun --standalone --nproc_per_node=8 \\
        -m posttrain.dpo --pairs=pairs.jsonl

No answers are drawn and no reward model is needed: the model makes the chosen
answer of a pair likelier and the rejected one less likely. Both are relative to
the reference, the model that the run began with. The pairs are those of
posttrain.reward. Expect a loss of ln 2 at first. A --task only measures: its val
questions are answered in each evaluation. Then accuracy chooses best.pt, not loss.

Writes the same files to out_dir as train.py.
"""

import collections
import math
import os
import time
from typing import Literal

import torch

from configurator import Count, Fraction, Natural, NonNegative, Share, UserError, fit, override
from data.shuffle import train_items
from flatgpt import checkpoint, entries, optim, output, parallel, shares
from flatgpt.generate import Sampling
from posttrain import losses
from posttrain.policy import check_out_dir, open_machine, open_policy, resume, stop_if_broken
from posttrain.preferences import check_pairs, pair_rows, read_pairs
from posttrain.rollouts import lengths_of, micro_batches
from posttrain.tasks import common as tasks

output.protect(drop=True)

# Settings -----------------------------------------------------------------------------------------
# the run
out_dir = 'out-dpo'
init_from = 'out-sft'  # a chat model: an out_dir, a Hugging Face folder or hub id; 'resume'
pairs = ''  # FILE.jsonl, see posttrain.reward
val_fraction: Share = 0.1  # share of the conversations held out
eval_interval: Count = 10  # steps between evaluations; each is followed by a checkpoint
log_interval: Count = 1  # steps between log lines
max_iters: Count = 100  # steps in all
# a step: an update for each minibatch of prompts_per_step pairs
prompts_per_step: Count = 32  # pairs
minibatch_size: Count = 128  # pairs per update
micro_batch_size: Count = 32  # pairs at once, as many as fit; does not change the mathematics
# the loss
beta: NonNegative = 0.1  # implicit rewards are beta * log(policy / reference)
label_smoothing: Fraction = 0.0  # assumed share of swapped pairs, below 0.5
# measuring
task = ''  # tiny_chat, gsm8k, or a file tasks/NAME.py of your own; '': the loss alone
input = ''  # the file of questions, for a task that reads one
eval_examples: Count = 200  # held-out questions, answered greedily in each evaluation
max_new_tokens: Count = 64  # tokens in an answer
# optimizer
learning_rate: NonNegative = 1e-4  # the highest; for a large model 1e-6
warmup_iters: Natural = 5
final_share: NonNegative = 1.0  # share of the rate at max_iters, after half a cosine; 1: constant
weight_decay: NonNegative = 0.0
beta1: Fraction = 0.9
beta2: Fraction = 0.95
grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
# machine
seed = 1337  # fixes pairs and minibatches
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
if not pairs:
    raise UserError("pairs='': expected a file of pairs: --pairs=FILE.jsonl")
if label_smoothing >= 0.5:
    raise UserError(f'label_smoothing={label_smoothing}: expected below 0.5')
check_out_dir(out_dir, init_from)
resolved = {**config, 'algorithm': 'dpo'}
METRICS = 'loss', 'margin', 'preferred', 'entropy'  # of an update

# the machine, which may run this script in several processes
world, torch_device, precision, precision_reason, autocast = open_machine(device, dtype)

# the policy, which learns, and the reference, its copy from before training
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = resume(ckpt_path, resolved) if init_from == 'resume' else {}
init_from = state['config']['init_from'] if state else init_from
policy = open_policy({**config, 'init_from': init_from}, state, ckpt_path, torch_device, autocast)
opt = optim.adamw(policy.model, weight_decay, learning_rate, (beta1, beta2))
if state:
    entries.load_optimizer(opt, state['optimizer'])
schedule = optim.Schedule(1.0, warmup_iters, max_iters, final_share)

# the pairs, and the questions
block_size = policy.model.config.block_size
splits = read_pairs(pairs, policy.template, policy.tokenizer, block_size, val_fraction)
pairs_id = check_pairs(pairs, val_fraction, state, ckpt_path)
questions = tasks.load(task) if task else None
val_prompts = policy.prompts_of(questions, tasks.Questions('val', eval_examples, seed, input),
                                max_new_tokens, block_size) if task else []
greedy = Sampling(max_new_tokens, 0.0, n_ids=policy.tokenizer.vocab_size, stop_ids=policy.stop_ids)

# the processes must agree on what they begin with
world.check_alike({'step': state.get('iter_num'), 'weights': policy.digest, 'pairs': pairs_id,
                   'questions': policy.questions, **config, 'dtype': precision})

# the folder of the run
resolved.update(init_from=init_from, device=str(torch_device), dtype=precision)
print(fit(f'device {torch_device}, dtype {precision} ({precision_reason}), '
          f'{policy.sizes()}; {max_iters} steps of {prompts_per_step} pairs', indent='  '))
with shares.together(world):
    run = checkpoint.Run(out_dir, resolved, state or None, world)
smaller = {'micro_batch_size': micro_batch_size // 2} if micro_batch_size > 1 else {}
run.explain_out_of_memory(smaller, 'Not even one pair fits: leave out long ones')
state = None  # the loaded tensors are no longer needed


def loss_of(idx, mask):
    """Return losses and margins of implicit rewards, (n,) each, and the mean entropy.

    idx, mask: the rows of n pairs, (2n, T), see pair_rows().
    """
    logprobs, entropies = policy.logprobs(policy.model, idx, mask)
    with torch.no_grad():
        reference_logprobs = policy.reference_logprobs(idx, mask)
    pair_losses, chosen, rejected = losses.dpo_loss(
        logprobs.sum(dim=1).chunk(2), reference_logprobs.sum(dim=1).chunk(2), beta, label_smoothing)
    return pair_losses, chosen - rejected, losses.masked_mean(entropies.detach(), mask[:, 1:])


@torch.no_grad()
def evaluate():
    """Measure held-out pairs and answers to held-out questions; -> (record, line).

    val_loss, which chooses the best checkpoint, is the share of wrong answers, or without a task
    the loss.
    """
    held_out = splits['val'][world.rank :: world.size]
    parts = [loss_of(*pair_rows(held_out[i : i + micro_batch_size], torch_device))[:2]
             for i in range(0, len(held_out), micro_batch_size)]
    measured = [pair for part in parts for pair in torch.stack(part, dim=1).tolist()]
    pair_losses, margins = torch.tensor(shares.gather(measured, world)).T
    val_loss, preferred = pair_losses.mean().item(), losses.preferred(margins).mean().item()
    record = {'val_loss': val_loss, 'val_dpo_loss': val_loss, 'val_preferred': preferred}
    line = f'dpo loss {val_loss:.4f}, preferred {preferred:.1%}'
    if task:
        with stop_if_broken(run):
            n_right = policy.count_right(questions, val_prompts[world.rank :: world.size], greedy,
                                         batch_size=256)
        n_right, = world.sum([n_right])
        accuracy, (low, high) = n_right / len(val_prompts), tasks.wilson(n_right, len(val_prompts))
        record.update(val_loss=1 - accuracy, val_accuracy=accuracy)
        line += f', accuracy {accuracy:.1%} ({low:.1%} to {high:.1%})'
    return record, line


def state_of_run():
    """Return a checkpoint's content beside the numbers of the run."""
    return policy.state(optimizer=opt.state_dict(), pairs=pairs_id,
                        measure='share of wrong answers' if task else 'dpo loss')


# the loop -----------------------------------------------------------------------------------------
while True:
    # evaluate and save
    if run.is_due(eval_interval, max_iters):
        record, line = evaluate()
        print(f'step {run.step}: held out: {line}')
        if world.is_main and math.isfinite(record['val_loss']):
            run.log(step=run.step, **record)
        run.evaluated(record['val_loss'], state_of_run)
    if run.step >= max_iters or run.stop_reason:
        break

    # draw the pairs of this step; all randomness is a function of (seed, step)
    t0 = time.perf_counter()
    torch.manual_seed(seed + 1_000_003 * (run.step + 1))
    lr = learning_rate * schedule.cosine(run.step)
    optim.set_rates(opt, lr)
    first = run.drawn(prompts_per_step)
    numbers = train_items(first, prompts_per_step, len(splits['train']), seed)
    idx, mask = pair_rows([splits['train'][i] for i in numbers], torch_device)  # (2n, T)
    lengths = lengths_of(mask).view(2, -1).amax(dim=0)  # length of each pair's longer answer
    actions = mask[:, 1:]

    # forward, backward and update for each minibatch, which the processes share
    updates = []
    for minibatch in torch.randperm(prompts_per_step).chunk(-(-prompts_per_step // minibatch_size)):
        minibatch = minibatch.to(torch_device)
        n_tokens = actions[torch.cat((minibatch, minibatch + prompts_per_step))].sum()
        sums = collections.Counter()  # weighted sums of the micro-batches' metrics
        for part, T in micro_batches(minibatch, lengths, micro_batch_size, world):
            rows = torch.cat((part, part + prompts_per_step))  # chosen, then rejected answers
            share = len(part) / len(minibatch)
            pair_losses, margins, entropy = loss_of(idx[rows, :T], mask[rows, :T])
            loss = pair_losses.mean()
            (share * loss).backward()
            sums.update(loss=share * loss.item(), margin=share * margins.mean().item(),
                        preferred=share * losses.preferred(margins).mean().item(),
                        entropy=(actions[rows].sum() / n_tokens).item() * entropy.item())
        shares.add_gradients(policy.model, world)
        sums = dict(zip(METRICS, world.sum([sums[name] for name in METRICS]), strict=True))
        params = policy.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
        if not (math.isfinite(sums['loss']) and math.isfinite(norm)):
            run.stop_not_finite(f'loss is {sums["loss"]}, norm of the gradient {norm}')
        opt.step()
        opt.zero_grad(set_to_none=True)
        updates.append({**sums, 'grad_norm': norm})
    record = {name: sum(metrics[name] for metrics in updates) / len(updates) for name in updates[0]}
    dt = time.perf_counter() - t0
    run.advance(prompts_per_step, dt)
    shares.agree_to_stop(run)

    # report
    step = run.step - 1
    if step % log_interval == 0 or run.step == max_iters:
        print(f'iter {step}: ' + ', '.join(f'{name} {record[name]:.3f}'
                                           for name in METRICS))
        if world.is_main:
            run.log(step=step, **record, lr=lr, ms=round(dt * 1e3, 3))

# the end ------------------------------------------------------------------------------------------
is_complete = run.finish(state_of_run)
parallel.disconnect()
if is_complete:
    print(f'{run.step} steps, {run.train_time:.1f} s of learning; talk to it:\n'
          f'  python -m posttrain.chat --out_dir={out_dir}')
run.close()
