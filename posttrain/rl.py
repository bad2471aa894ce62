"""Make rewarded answers of a chat model likelier: reinforcement learning (RL).

    $ python -m posttrain.rl --init_from=out-sft --task=tiny_chat
    $ python -m posttrain.rl --init_from=out-sft --task=tiny_chat \\
        --algorithm=ppo --reward_model=out-reward --out_dir=out-ppo
    $ torchrun --standalone --nproc_per_node=8 -m posttrain.rl --task=tiny_chat

grpo: several answers to each prompt, each compared with the mean of its group.
reinforce: the same, compared with the mean of the others (RLOO), without a clip.
ppo: a value function predicts the reward at every token, and each token is
compared with its prediction.

A task has questions, checks and rewards, see posttrain/README.md. Its val
questions choose best.pt, so those of test stay unseen. With --reward_model the
reward is that model's score. kl_coef keeps the policy near the reference, the
model that the run began with.

Several processes share the answers of a step. Each then has all of them, so advantages
and means are over the whole step, and an update is that of one process.

Writes the same files to out_dir as train.py. Resume with --init_from=resume.
"""

import collections
import math
import os
import time
from dataclasses import replace
from typing import Literal

import torch

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Seed,
    UserError,
    fit,
    override,
)
from data.encode import names_of
from data.shuffle import train_items
from flatgpt import checkpoint, entries, lora, optim, output, parallel, shares
from flatgpt.generate import Sampling, uniforms
from flatgpt.pretrained import build
from posttrain import losses
from posttrain.answers import is_formatted
from posttrain.policy import check_out_dir, open_machine, open_policy, resume, stop_if_broken
from posttrain.preferences import ending_of
from posttrain.reward_model import Critic, open_reward_model, scores_of
from posttrain.rollout_server import RolloutServer
from posttrain.rollouts import lengths_of, micro_batches, to_rows
from posttrain.tasks import common as tasks

output.protect(drop=True)

# Settings -----------------------------------------------------------------------------------------
# the run
out_dir = 'out-rl'
init_from = 'out-sft'  # a chat model: an out_dir, a Hugging Face folder or hub id; 'resume'
algorithm: Literal['grpo', 'reinforce', 'ppo'] = 'grpo'
eval_interval: Count = 10  # steps between evaluations; each is followed by a checkpoint
log_interval: Count = 1  # steps between log lines
max_iters: Count = 100  # steps in all
# wandb; its offline mode (WANDB_MODE=offline) needs no network
wandb_log = False
wandb_project = 'posttrain'
wandb_run_name = 'rl'
# the task
task = ''  # tiny_chat, gsm8k, or a file tasks/NAME.py of your own
input = ''  # the file of questions, for a task that reads one
kinds = ''  # only questions of these kinds: addition,spelling; '': all
tools: bool | str = False  # that the model may call: calculator,python; True: the calculator
reward_model = ''  # out_dir of posttrain.reward: its score is the reward; '': the task's
answer_form: Literal['any', 'answer', 'boxed'] = 'any'  # <answer>16</answer> or \boxed{16}
form_reward: NonNegative = 0.1  # added for an answer in that form, right or not
train_examples: Count = 5_000  # questions that prompts are drawn from
eval_examples: Count = 200  # held-out questions, answered greedily in each evaluation
# a step: prompts_per_step * group_size answers, an update for each minibatch
prompts_per_step: Count = 32
group_size: Count = 8  # answers to each prompt; grpo and reinforce compare them
max_new_tokens: Count = 64  # tokens in an answer
temperature: Positive = 1.0  # divides the logits, both to draw answers and to learn from them
epochs: Count = 1  # passes over the answers of a step
minibatch_size: Count = 128  # answers per update
micro_batch_size: Count = 32  # answers at once, as many as fit; does not change the mathematics
rollout_batch_size: Natural = 0  # answers drawn at once; 0: all of a step
rollout_server = ''  # http://HOST:8000/v1 of vLLM, which draws the answers; '': this script
rollout_folder = ''  # the model that it serves, of flatgpt.export; gets the weights of each step
# losses
kl_coef: NonNegative = 0.02  # weight of the KL: grpo in the loss, the others in the rewards
clip: Fraction = 0.2  # limit of a step's change of a token's probability; reinforce: none
reduction: Literal['auto', 'sequence-mean', 'token-mean', 'constant'] = 'auto'  # see README
divide_by_std = True  # grpo: advantages by the rewards' deviation in a group; Dr. GRPO: False
skip_equal = False  # grpo: learn from no group of equal rewards (DAPO)
lam: Probability = 0.95  # ppo: GAE's lambda; lower trusts the value function more
value_clip: NonNegative = 0.0  # ppo: limit of a step's change of a value; 0: none
critic_warmup: Natural = 5  # ppo: first steps, in which only the value function learns
# optimizer
learning_rate: NonNegative = 1e-4  # the highest; for a large model 1e-6
critic_lr: NonNegative = 3e-4  # ppo: rate of the value function
warmup_iters: Natural = 5
final_share: Probability = 1.0  # share of the rates at max_iters, after half a cosine; 1: constant
weight_decay: NonNegative = 0.0
beta1: Fraction = 0.9
beta2: Fraction = 0.95
grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
# LoRA: adapters beside the frozen model, which is the reference too
lora_rank: Natural = 0  # 8 to 64; 0: train all weights
lora_alpha: Positive = 16.0  # scales the adapters by lora_alpha / lora_rank
lora_targets = 'c_attn,c_fc,c_proj'  # layers with adapters, such as 'c_attn,mlp.c_proj,lm_head'
lora_bits: Literal[32, 8, 4] = 32  # of the frozen weights of these layers
# machine
seed: Seed = 1337  # fixes prompts, answers and minibatches
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
if not task:
    raise UserError("task='': expected the name of a task, such as --task=tiny_chat")
if algorithm != 'ppo' and group_size < 2:
    raise UserError(f'group_size={group_size}: expected 2 or more for {algorithm}, which compares '
                    f'the answers to a prompt')
if algorithm != 'grpo' and (skip_equal or not divide_by_std):
    name = 'skip_equal' if skip_equal else 'divide_by_std'
    raise UserError(f'{name}={config[name]}: expected --algorithm=grpo')
if algorithm == 'reinforce' and epochs > 1:
    raise UserError(f'epochs={epochs}: expected 1 for reinforce, which has no clip against answers '
                    f'of an earlier policy; use --algorithm=grpo')
if rollout_server and (tools or not rollout_folder):
    raise UserError(f'rollout_server={rollout_server!r}: expected the folder that the '
                    f'server was started with, --rollout_folder=FOLDER, and no tools')
check_out_dir(out_dir, init_from)
lora.check_settings(config, init_from, out_dir)

# the machine, which may run this script in several processes
world, torch_device, precision, precision_reason, autocast = open_machine(device, dtype)

# the policy, which learns, and the reference, the model from before training
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = resume(ckpt_path, config) if init_from == 'resume' else {}
if state:
    init_from = state['config']['init_from']
    lora.check_resumes(state.get('lora'), config, ckpt_path)
if config['lora_rank'] and (algorithm == 'ppo' or rollout_server):
    raise UserError(f'lora_rank={config["lora_rank"]}: expected 0 with algorithm=ppo, whose value '
                    f'function is a whole model, and with rollout_server, which serves no adapters')
policy = open_policy({**config, 'init_from': init_from}, state, ckpt_path, torch_device, autocast)
opt = optim.adamw(policy.model, weight_decay, learning_rate, (beta1, beta2))

# the reward model, and the value function
judge = judge_digest = value_model = value_opt = None
if reward_model:
    judge, line = open_reward_model(reward_model, policy.tokenizer, policy.template)
    print(f'reward model: {line}')
    judge_digest, ending = lora.digest(judge), ending_of(policy.template, policy.tokenizer)
    judge.to(torch_device).requires_grad_(False)
if state and state.get('judge') != judge_digest:
    before = state['config'].get('reward_model')
    before = f'the reward model that was in {before}' if before else 'its task'
    raise UserError(f'{ckpt_path} was rewarded by {before}, not by reward_model={reward_model!r} '
                    f'with its present weights; resume with the former, or start a new run in '
                    f'another --out_dir')
if algorithm == 'ppo':
    values = {**state, 'model': state['value_model']} if state else {}
    value_model = (build(Critic, values, ckpt_path, 0.0).to(torch_device) if state else
                   Critic.from_gpt(policy.model))
    value_opt = optim.adamw(value_model, weight_decay, critic_lr, (beta1, beta2))
if state:
    # the policy waits for critic_warmup, and learns from no equal rewards
    entries.load_optimizer(opt, state['optimizer'], may_be_empty=algorithm == 'ppo' or skip_equal)
    if algorithm == 'ppo':
        entries.load_optimizer(value_opt, state['value_optimizer'])

# the mean that is the loss: by default as published, for each algorithm
if reduction == 'auto':
    reduction = {'grpo': 'sequence-mean', 'reinforce': 'constant', 'ppo': 'token-mean'}[algorithm]

# learning rates, as shares of the highest; the policy waits until the value function has learned
wait = critic_warmup if algorithm == 'ppo' else 0
policy_schedule = optim.Schedule(1.0, warmup_iters, max_iters - wait, final_share)
value_schedule = optim.Schedule(1.0, warmup_iters, max_iters, final_share)

# the prompts
questions = tasks.load(task)
context = policy.model.config.block_size
if judge:  # it scores an answer that was cut off at one more token
    context = min(context, judge.config.block_size - 1)
train_prompts, val_prompts = (
    policy.prompts_of(questions, tasks.Questions(split, n, seed, input, names_of(kinds)),
                      max_new_tokens, context, tools)
    for split, n in (('train', train_examples), ('val', eval_examples)))

# the server that draws the answers
if rollout_server:
    if os.path.realpath(rollout_folder) == os.path.realpath(init_from):
        raise UserError(f'rollout_folder={rollout_folder!r}: expected another folder than '
                        f'--init_from, since the weights in it are replaced')
    policy.server = RolloutServer.open(rollout_server, rollout_folder, policy)

# the processes must agree on what they begin with
n_answers = prompts_per_step * group_size
if n_answers < world.size:
    raise UserError(f'prompts_per_step={prompts_per_step}, group_size={group_size}: expected '
                    f'{world.size} answers or more in a step, one for each process')
world.check_alike({'step': state.get('iter_num'), 'weights': policy.digest, 'judge': judge_digest,
                   'questions': policy.questions, **config, 'dtype': precision})

# the folder of the run
draw_size = rollout_batch_size or -(-n_answers // world.size)
sampling = Sampling(max_new_tokens, temperature, n_ids=policy.tokenizer.vocab_size,
                    stop_ids=policy.stop_ids)
greedy = replace(sampling, temperature=0.0)
resolved = {**config, 'init_from': init_from, 'device': str(torch_device), 'dtype': precision,
            'reduction': reduction}
print(fit(f'device {torch_device}, dtype {precision} ({precision_reason}), '
          f'{policy.sizes()}; {max_iters} steps of {prompts_per_step} x {group_size} answers',
          indent='  '))
with shares.together(world):
    run = checkpoint.Run(out_dir, resolved, state or None, world)
at_once = {'micro_batch_size': micro_batch_size, 'rollout_batch_size': draw_size}
run.explain_out_of_memory({name: n // 2 for name, n in at_once.items() if n > 1},
                          'Not even one answer fits: lower --max_new_tokens')
state = None  # the loaded tensors are no longer needed


def values_of(idx):
    """Return the values of the states before all ids but the first, (B, T - 1)."""
    with autocast:
        return value_model(idx[:, :-1])


def rewards_of(examples, prompts, answers, texts):
    """Return the rewards of answers, (n,), of the reward model or of the task."""
    if not judge:
        return torch.tensor([float(questions.reward(example, text)) + bonus_of(text)
                             for example, text in zip(examples, texts, strict=True)],
                            device=torch_device)
    lengths = torch.tensor([len(prompt) + len(answer)
                            for prompt, answer in zip(prompts, answers, strict=True)])
    rewards = torch.zeros(len(prompts), device=torch_device)
    for part, _ in micro_batches(torch.arange(len(prompts)), lengths, micro_batch_size):
        rows = part.tolist()
        with autocast:
            rewards[rows] = scores_of(judge, [prompts[i] for i in rows], [answers[i] for i in rows],
                                      policy.stop_ids, ending)
    return rewards + torch.tensor([bonus_of(text) for text in texts], device=torch_device)


def bonus_of(text):
    """Return the reward of an answer's form."""
    return form_reward if answer_form != 'any' and is_formatted(text, answer_form) else 0.0


def update(optimizer, model, lr):
    """Take a step of an optimizer; -> the gradient's norm, which must be finite."""
    shares.add_gradients(model, world)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not math.isfinite(norm):
        run.stop_not_finite(f'the norm of the gradient is {norm}')
    optim.set_rates(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_of_run():
    """Return a checkpoint's content beside the numbers of the run."""
    state = policy.state(optimizer=opt.state_dict(), judge=judge_digest,
                         measure='share of wrong answers')
    if algorithm == 'ppo':
        state.update(value_model=value_model.state_dict(), value_optimizer=value_opt.state_dict())
    return state


# the loop -----------------------------------------------------------------------------------------
while True:
    # let the server read the weights of this step
    if rollout_server:
        with shares.together(world):
            if world.is_main:
                policy.server.load(policy.model)

    # evaluate and save
    if run.is_due(eval_interval, max_iters):
        with stop_if_broken(run):
            n_right = policy.count_right(questions, val_prompts[world.rank :: world.size], greedy,
                                         tools, draw_size)
        n_right, = world.sum([n_right])
        accuracy, (low, high) = n_right / len(val_prompts), tasks.wilson(n_right, len(val_prompts))
        print(f'step {run.step}: held out: accuracy {accuracy:.1%} ({low:.1%} to {high:.1%})')
        if world.is_main:
            run.log(step=run.step, val_loss=1 - accuracy, val_accuracy=accuracy)
        run.evaluated(1 - accuracy, state_of_run)
    if run.step >= max_iters or run.stop_reason:
        break

    # draw this process's answers and reward them; all randomness is a function of (seed, step)
    t0 = time.perf_counter()
    generator = torch.manual_seed(seed + 1_000_003 * (run.step + 1)).clone_state()
    lr = learning_rate * policy_schedule.cosine(max(0, run.step - wait))
    value_lr = critic_lr * value_schedule.cosine(run.step)
    first = run.drawn(prompts_per_step)
    numbers = train_items(first, prompts_per_step, len(train_prompts), seed)
    of_process = range(n_answers)[world.rank :: world.size]
    drawn = (train_prompts[numbers[i // group_size]] for i in of_process)
    examples, prompts = zip(*drawn, strict=True)
    u = torch.stack([uniforms(seed, first + i // group_size, i % group_size, max_new_tokens)
                     for i in of_process])
    with stop_if_broken(run):
        answers, masks, texts = policy.answer(prompts, sampling, u, tools, draw_size)
        rewards = rewards_of(examples, prompts, answers, texts)
        n_right = sum(bool(questions.evaluate(example, text))
                      for example, text in zip(examples, texts, strict=True))

    # gather the rollouts of all processes
    rollouts = shares.gather([
        (prompt + answer, [0] * len(prompt) + answer_mask, reward) for prompt, answer, answer_mask,
        reward in zip(prompts, answers, masks, rewards.tolist(), strict=True)], world)
    rewards = torch.tensor([reward for *_, reward in rollouts], device=torch_device)
    idx, mask = to_rows([(ids, ids_mask) for ids, ids_mask, _ in rollouts], torch_device)
    lengths, actions = lengths_of(mask), mask[:, 1:]  # mask: (N, T); actions: (N, T - 1)
    if not rewards.isfinite().all():
        if run.tried_step < run.step:  # the policy itself is sound
            run.save(state_of_run)
        source = f'the reward model in {reward_model}' if judge else f'reward() of tasks/{task}.py'
        bad, command = rewards[~rewards.isfinite()][0], run.command()
        remedy = f'; correct it, and continue:\n  {command}' if run.step else ''
        raise SystemExit(f'step {run.step}: {source} returned {bad} for an answer, expected a '
                         f'finite number{remedy}')

    # log-probabilities and values before the update
    rows = torch.arange(n_answers, device=torch_device)
    zeros = torch.zeros(4, *actions.shape, device=torch_device)
    old_logprobs, entropies, reference_logprobs, old_values = zeros
    with torch.no_grad():
        for part, T in micro_batches(rows, lengths, micro_batch_size, world):
            batch, where = (idx[part, :T], mask[part, :T], temperature), (part, slice(T - 1))
            old_logprobs[where], entropies[where] = policy.logprobs(policy.model, *batch)
            reference_logprobs[where] = policy.reference_logprobs(*batch)
            if algorithm == 'ppo':
                old_values[where] = values_of(idx[part, :T])
    shares.add_up([zeros], world)  # each process has filled its rows

    # advantages: against the other answers to the prompt, or against the value function
    k1, k3 = losses.kl_estimates(old_logprobs, reference_logprobs)
    if algorithm == 'grpo':
        advantages = losses.group_advantages(rewards, group_size, divide_by_std)[:, None]  # (N, 1)
        if skip_equal:
            rows = rows[advantages.view(-1, group_size).any(dim=1).repeat_interleave(group_size)]
    elif algorithm == 'reinforce':
        kept_near = rewards - kl_coef * k1.sum(dim=1)
        advantages = losses.leave_one_out_advantages(kept_near, group_size)[:, None]  # (N, 1)
    else:
        token_rewards = (-kl_coef * k1).scatter_add(1, lengths[:, None] - 2, rewards[:, None])
        advantages, returns = losses.gae(token_rewards, old_values, actions, gamma=1.0, lam=lam)
        advantages = losses.whiten(advantages, actions)  # (N, T - 1)
    record = {'reward': rewards.mean().item(), 'accuracy': world.sum([n_right])[0] / n_answers,
              'kl': losses.masked_mean(k3, actions).item(),
              'entropy': losses.masked_mean(entropies, actions).item(),
              'length': actions.sum().item() / n_answers}

    # learn from them in minibatches, whose gradients and metrics are summed over the processes
    updates = []
    summed = {'grpo': ('clipped', 'loss'), 'reinforce': ('loss',),
              'ppo': ('clipped', 'value_loss', 'loss')}[algorithm]
    for minibatch in (rows[part.to(torch_device)] for _ in range(epochs if len(rows) else 0)
                      for part in torch.randperm(len(rows), generator=generator).chunk(
                          -(-len(rows) // minibatch_size))):
        sums = collections.Counter()  # weighted sums of the micro-batches' metrics
        for part, T in micro_batches(minibatch, lengths, micro_batch_size, world):
            acts, old, advantage = (x[part, : T - 1] for x in (actions, old_logprobs, advantages))
            token_share = (acts.sum() / actions[minibatch].sum()).item()
            share = token_share if reduction == 'token-mean' else len(part) / len(minibatch)
            logprobs, _ = policy.logprobs(policy.model, idx[part, :T], mask[part, :T], temperature)
            metrics = {}
            if algorithm == 'reinforce':
                token_losses = -logprobs * advantage
            else:
                token_losses = losses.clipped_policy_loss(logprobs, old, advantage, acts, clip)
                is_clipped = losses.is_clipped(logprobs, old, advantage, clip)
                metrics['clipped'] = token_share, losses.masked_mean(is_clipped.float(), acts)
            loss = losses.reduce(token_losses, acts, reduction, max_new_tokens)
            if algorithm == 'grpo':
                _, kl = losses.kl_estimates(logprobs, reference_logprobs[part, : T - 1])
                loss = loss + kl_coef * losses.reduce(kl, acts, reduction, max_new_tokens)
            elif algorithm == 'ppo':
                value_loss = losses.clipped_value_loss(
                    values_of(idx[part, :T]), old_values[part, : T - 1], returns[part, : T - 1],
                    acts, value_clip or math.inf)
                (token_share * value_loss).backward()
                metrics['value_loss'] = token_share, value_loss
            if run.step >= wait:
                (share * loss).backward()
            metrics['loss'] = share, loss
            sums.update({name: weight * x.item() for name, (weight, x) in metrics.items()})
        sums = dict(zip(summed, world.sum([sums[name] for name in summed]), strict=True))
        if not math.isfinite(sums['loss']):
            run.stop_not_finite(f'loss is {sums["loss"]}')
        if algorithm == 'ppo':
            update(value_opt, value_model, value_lr)
        if run.step >= wait:
            sums['grad_norm'] = update(opt, policy.model, lr)
        updates.append(sums)
    for name in updates[0] if updates else ():
        record[name] = sum(metrics[name] for metrics in updates) / len(updates)
    dt = time.perf_counter() - t0
    run.advance(prompts_per_step, dt)
    shares.agree_to_stop(run)

    # report
    step = run.step - 1
    if step % log_interval == 0 or run.step == max_iters:
        names = 'reward', 'accuracy', 'kl', 'entropy'
        print(f'iter {step}:', *(f'{name} {record[name]:.3f},' for name in names),
              f'length {record["length"]:.1f}')
        if world.is_main:
            run.log(step=step, **record, lr=lr, ms=round(dt * 1e3, 3))

# the end ------------------------------------------------------------------------------------------
is_complete = run.finish(state_of_run)
parallel.disconnect()
if is_complete:
    print(f'{run.step} steps, {run.train_time:.1f} s of learning; talk to it:\n'
          f'  python -m posttrain.chat --out_dir={out_dir}')
run.close()
