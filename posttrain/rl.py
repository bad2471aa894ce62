"""
Reinforcement learning: a chat model answers, what is rewarded becomes likelier.

    $ python -m posttrain.rl --init_from=out-sft --task=tiny_chat --out_dir=out-grpo
    $ python -m posttrain.rl --init_from=out-sft --task=tiny_chat --algorithm=ppo \\
        --reward_model=out-reward --out_dir=out-ppo
    $ python -m posttrain.rl --init_from=out-sft --task=tiny_chat --algorithm=dpo \\
        --pairs=data/tiny_chat/pairs.jsonl --out_dir=out-dpo

grpo: several answers to each prompt, each judged against the others.
ppo: a value function (critic.py) predicts the reward, token by token; judged is
by how much an answer does better than that.
dpo: no answers are drawn; it learns from pairs of a better and a worse one, as
reward.py does, and --task only measures.

A task is a file of tasks/, which asks, checks and rewards, see tasks/common.py;
best.pt is chosen by its val questions, so that those of test stay unseen. With
--reward_model the reward is that model's score instead. All three keep near the
model they began with, the reference, as much as kl_coef (dpo: beta) says.

Writes to out_dir: ckpt.pt (the last state, to resume from with --init_from=
resume), best.pt (most held-out answers right), log.jsonl, config.json. Ctrl-C or
SIGTERM finishes the step, saves and says how to go on.
"""

import collections
import copy
import math
import os
import sys
import textwrap
import time
from dataclasses import asdict

import torch

from configurator import UserError, check, explain_errors, override
from data.tokens import train_windows
from flatgpt import checkpoint, lora, optim, runtime
from flatgpt.generate import NotNumbers, uniforms
from flatgpt.pretrained import model_of
from posttrain import losses
from posttrain.pairs import check_pairs, ending_of, open_chat_model, read_pairs
from posttrain.reward_model import Critic, open_reward_model
from posttrain.rollouts import draw_answers, lengths_of, logprobs_of, pair_rows, scores_of, to_rows
from posttrain.tasks import common as tasks
from posttrain.tools import generate_with_tools
from tokenizer import chat

sys.stdout.reconfigure(errors='replace', line_buffering=True)

# settings ------------------------------------------------------------------------------------------------------------
out_dir = 'out-rl'
init_from = 'out-sft'  # a chat model: a run's out_dir, a Hugging Face folder or hub id; 'resume'
algorithm = 'grpo'  # 'grpo', 'ppo', 'dpo'
task = ''  # tiny_chat, gsm8k, or a file tasks/NAME.py of your own: where prompts, rewards and right answers are from
input = ''  # the file of questions, for tasks that read one
kinds = ''  # only questions of these kinds: addition,spelling; '': all
tools = False  # True: the model may call the calculator, see calculator.py
reward_model = ''  # out_dir of reward.py: its score is the reward; '': the task's
pairs = ''  # dpo: FILE.jsonl, see reward.py
val_fraction = 0.1  # dpo: share of the conversations in it that are held out
train_examples = 5_000  # of the task, that prompts are from
eval_examples = 200  # of the task, held out, answered greedily in each evaluation
eval_interval = 10  # steps between evaluations; each is followed by a checkpoint
log_interval = 1  # steps between log lines
max_iters = 100  # steps in all
# a step: prompts_per_step * group_size answers, learnt from in minibatches
prompts_per_step = 32  # dpo: pairs
group_size = 8  # answers to each prompt; grpo compares them
max_new_tokens = 64  # of an answer
temperature = 1.0  # at which answers are drawn, and of the probabilities that are learnt
epochs = 1  # how often a step learns from its answers
minibatch_size = 128  # answers (dpo: pairs) in an update
micro_batch_size = 32  # of them at once, as many as fit in memory; does not change the mathematics
rollout_batch_size = 0  # answers drawn at once; 0: all of a step; does not change the mathematics
# what is learnt
kl_coef = 0.02  # how dear it is to move away from the reference: grpo in the loss, ppo in the reward of each token
clip = 0.2  # grpo, ppo: how far, as a factor, a step can move the probability of a token
clip_high: float | None = None  # upwards, if that is another: 0.28 keeps more variety (DAPO)
normalize_std = True  # grpo: divide by the standard deviation of a group; False: don't, as in Dr. GRPO
skip_equal = False  # grpo: learn from no group whose answers are all as good, which kl_coef alone would move (DAPO)
gamma = 1.0  # ppo: what the next token's reward is worth now
lam = 0.95  # ppo: 1: the value function is only what to compare with; lower: it is believed more, with less noise
value_clip = 0.0  # ppo: how far a step can move a value; 0: as far as it likes
critic_warmup = 5  # ppo: first steps, in which only the value function learns: its errors would be taken for merit
beta = 0.1  # dpo: rewards are beta log(policy / reference)
label_smoothing = 0.0  # dpo: share of the pairs that are the wrong way round
# optimizer
learning_rate = 1e-4  # the highest; for a large model 1e-6
critic_lr = 3e-4  # ppo: of the value function
warmup_iters = 5
final_share = 1.0  # what is left of the rates at max_iters, after half a cosine; 1: constant
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
seed = 1337  # of prompts, answers and minibatches
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'auto'  # 'float32', or 'bfloat16' where the hardware multiplies it
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, (
    ('algorithm', lambda value: value in ('grpo', 'ppo', 'dpo'), "'grpo', 'ppo' or 'dpo'"),
    ('task', lambda value: value or algorithm == 'dpo', 'NAME of a tasks/NAME.py, where the prompts are'),
    ('pairs', lambda value: bool(value) == (algorithm == 'dpo'), 'FILE.jsonl with --algorithm=dpo, and only there'),
    ('reward_model', lambda value: not value or algorithm != 'dpo', "'' with --algorithm=dpo, which needs none"),
    ('skip_equal', lambda value: not value or algorithm == 'grpo', 'False, but with --algorithm=grpo'),
    ('group_size', lambda value: value >= (2 if algorithm == 'grpo' else 1),
     '1 or more, and for grpo, which compares the answers to a prompt, 2'),
    ('max_iters eval_interval log_interval train_examples eval_examples prompts_per_step max_new_tokens epochs '
     'minibatch_size micro_batch_size', lambda value: value >= 1, '1 or more'),
    ('warmup_iters rollout_batch_size kl_coef weight_decay grad_clip learning_rate critic_lr value_clip critic_warmup',
     lambda value: 0 <= value < math.inf, '0 or more'),
    ('temperature clip beta', lambda value: 0 < value < math.inf, 'more than 0'),
    ('clip_high', lambda value: value is None or value > 0, 'more than 0, or None'),
    ('clip', lambda value: value < 1, 'less than 1'),
    ('gamma lam final_share', lambda value: 0 <= value <= 1, '0 to 1'),
    ('label_smoothing', lambda value: 0 <= value < 0.5, 'at least 0 and below 0.5'),
    ('beta1 beta2', lambda value: 0 <= value < 1, 'at least 0 and below 1'),
    ('seed', lambda value: 0 <= value < 2**63, '0 or more'),
    ('dtype', lambda value: value in ('auto', 'float32', 'bfloat16'), "'auto', 'float32' or 'bfloat16'"),
    ('out_dir', lambda value: os.path.abspath(value) != os.path.abspath(init_from),
     'another folder than that of the model which init_from names'),
))

# the policy, which learns, and the reference, which it began as
device = runtime.choose_device(device)
runtime.use_cores()
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
state = checkpoint.load(ckpt_path) if init_from == 'resume' else None
if state:
    if 'reference' not in state:
        what = 'a reward model' if state.get('reward_model') else 'a language model that train.py has trained'
        raise UserError(f'{ckpt_path} is {what}, no run of rl.py, which could be resumed; to begin with a language '
                         f'model: --init_from=ITS_FOLDER and another --out_dir')
    if state['config'].get('algorithm') != algorithm:
        raise UserError(f'algorithm={algorithm!r}, but {ckpt_path} is a run of {state["config"].get("algorithm")!r}; '
                         f'resume with that, or begin anew in another --out_dir')
    # what best_val_loss is a measure of; the seed chooses the questions
    for name in ('task', 'input', 'kinds', 'eval_examples', 'tools', 'max_new_tokens', 'seed') if task else ('task',):
        before = state['config'].get(name, config[name])
        if before != config[name]:
            raise UserError(f'{name}={config[name]!r}, but the best of {ckpt_path} was chosen with {name}={before!r}; '
                             f'resume with that, or begin anew in another --out_dir')
    init_from = state['config']['init_from']
reference, tokenizer, template, line = open_chat_model(init_from)
print(f'reference: {line}')
digest = lora.digest(reference)
if state and state['reference'] != digest:
    raise UserError(f'{ckpt_path} began with the model that was in {init_from}; the one that is there now has other '
                     f'weights. Put that back, or begin anew in another --out_dir')
stop_ids, _ = chat.find_endings(template, tokenizer)
if not stop_ids:
    raise UserError(f'the chat template of {init_from} ends an answer with no special token, so that a model could '
                     f'not be taught when to stop')
policy = copy.deepcopy(reference) if state is None else model_of(state, ckpt_path, dropout=0.0).eval()
reference.to(device).requires_grad_(False)
policy.to(device)
opt = optim.adamw(policy, weight_decay, learning_rate, (beta1, beta2))
block_size = policy.config.block_size

# what rewards, and what predicts rewards
judge = judged_by = value_model = value_opt = None
if reward_model:
    judge, line = open_reward_model(reward_model, tokenizer, template)
    print(f'reward model: {line}')
    judged_by = lora.digest(judge)
    judge.to(device).requires_grad_(False)
    ending = ending_of(template, tokenizer)
if state and state.get('judge', judged_by) != judged_by:
    before = state['config']['reward_model']
    before = f'the reward model that was in {before}' if before else 'its task'
    raise UserError(f'{ckpt_path} was rewarded by {before}, not by reward_model={reward_model!r} with the weights '
                     f'that it has now; resume with what it had, or begin anew in another --out_dir')
if algorithm == 'ppo':
    value_model = Critic.from_gpt(policy)
    value_opt = optim.adamw(value_model.to(device), weight_decay, critic_lr, (beta1, beta2))

# where the run stands
if state:
    optim.load_optimizer(opt, state['optimizer'])
    if algorithm == 'ppo':
        value_model.load_state_dict(state['value_model'])
        optim.load_optimizer(value_opt, state['value_optimizer'])
iter_num, best_val_loss, train_time, version = checkpoint.progress_of(state)
start_iter = saved_iter = iter_num


# the prompts, or pairs
def prompts_of(split, n):
    """-> [(example of the task, ids of its prompt), ...], without those that leave too little room for an answer."""
    examples = tasks.examples_of(questions, split, n, seed, input, tasks.kinds_of(kinds),
                                 functions=('examples', 'evaluate', 'reward'), keys=('messages',))
    if not examples:
        raise UserError(f'task={task}: there is no {split} question' + (f' in {input}' if input else '')
                         + (f' of kinds={kinds!r}' if kinds else '') + '; of a file about a tenth are in val, so it '
                         'may need more of them')
    prompts = [(example, tasks.chat_prompt(example, template, tokenizer, math.inf, tools)) for example in examples]
    # the reward model sees an answer that was cut off with one more token
    room = min(block_size, judge.config.block_size - 1 if judge else block_size) - max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt[1]) <= room]
    if len(fitting) < len(prompts):
        print(f'{len(prompts) - len(fitting):,} of {len(prompts):,} {split} prompts are longer than the {room} tokens '
              f'that an answer leaves them, left out')
    if not fitting:
        raise UserError(f'task={task}: no {split} prompt has room in a context of {room + max_new_tokens} tokens '
                         f'with max_new_tokens={max_new_tokens}; lower that, or take a model with a longer context')
    return fitting


train_prompts, val_prompts, train_pairs, val_pairs, pairs_seen = [], [], [], [], None
questions = tasks.load(task) if task else None
if task:
    val_prompts = prompts_of('val', eval_examples)
if algorithm == 'dpo':
    found, n_too_long = read_pairs(pairs, template, tokenizer, block_size, val_fraction)
    pairs_seen = check_pairs(pairs, val_fraction, state, ckpt_path)
    train_pairs, val_pairs = found['train'], found['val']
    print(f'{len(train_pairs):,} pairs to learn from, {len(val_pairs):,} held out'
          + (f'; {n_too_long:,} are longer than {block_size} tokens, left out' if n_too_long else ''))
else:
    train_prompts = prompts_of('train', train_examples)
state = None  # the loaded tensors are no longer needed

# the machine, the folder
dtype, dtype_reason = runtime.choose_dtype(dtype, device, has_scaler=False)
autocast = runtime.autocast(dtype, device)
if device.type == 'cpu':
    runtime.keep_freed_memory()
what = f'{prompts_per_step} pairs' if algorithm == 'dpo' else f'{prompts_per_step} x {group_size} answers'
print(textwrap.fill(f'device {device}, dtype {dtype} ({dtype_reason}), {policy.get_num_params() / 1e6:.2f}M '
                    f'parameters; {max_iters} steps of {what}', 80, subsequent_indent='  '))
resolved = {**config, 'init_from': init_from, 'device': str(device), 'dtype': dtype}
checkpoint.open_folder(out_dir, resolved, start_iter, version)


def explain_out_of_memory(kind, error, trace):
    """For sys.excepthook: where memory ran out, say which command takes the same steps with less of it."""
    if not runtime.out_of_memory(error):
        return explain_errors(kind, error, trace)
    at_once = {'micro_batch_size': micro_batch_size,
               'rollout_batch_size': rollout_batch_size or prompts_per_step * group_size}
    changes = {name: n // 2 for name, n in at_once.items() if n > 1}
    checkpoint.say_out_of_memory(error, iter_num, saved_iter, changes, 'Not even one answer fits: lower --max_new_tokens')


sys.excepthook = explain_out_of_memory


def answers_to(prompts, temperature, u):
    """
    What the policy answers to prompts, lists of ids. -> (lists of ids; of each a list of 1 for what the policy chose
    itself, 0 for what the calculator told it; the texts, without the token that ends them)
    """
    answers, chosen, at_once = [], [], rollout_batch_size or len(prompts)
    try:
        for i in range(0, len(prompts), at_once):
            part, part_u = prompts[i : i + at_once], u[i : i + at_once]
            with autocast:
                if tools:
                    drawn, own = generate_with_tools(policy, tokenizer, part, max_new_tokens, stop_ids, part_u,
                                                     temperature=temperature)
                else:
                    drawn = draw_answers(policy, part, max_new_tokens, stop_ids, tokenizer.vocab_size, temperature,
                                         part_u)
                    own = [[1] * len(answer) for answer in drawn]
            answers, chosen = answers + drawn, chosen + own
    except NotNumbers:
        if iter_num == start_iter:  # not for what was learnt
            raise
        stop_not_finite('the logits of the policy are not numbers any more')
    return answers, chosen, [tokenizer.decode([i for i in answer if i not in stop_ids]) for answer in answers]


def say(model, idx, mask):
    """-> log-probabilities that a model gives to what the mask has of the ids (B, T), and entropies, (B, T - 1) both"""
    with autocast:
        return logprobs_of(model, idx, mask, tokenizer.vocab_size, temperature)


def values_of(idx):
    """ids (B, T) -> the values of the states before all but the first, (B, T - 1)"""
    with autocast:
        return value_model(idx[:, :-1])


def learn_from_pairs(idx, mask):
    """Rows of n pairs -> dpo's losses (n,), the margins between its implicit rewards (n,), the policy's entropy."""
    logprobs, entropies = say(policy, idx, mask)
    with torch.no_grad():
        reference_logprobs, _ = say(reference, idx, mask)
    loss, chosen, rejected = losses.dpo_loss(*logprobs.sum(dim=1).chunk(2), *reference_logprobs.sum(dim=1).chunk(2),
                                             beta, label_smoothing)
    return loss, chosen - rejected, losses.masked_mean(entropies.detach(), mask[:, 1:])


def is_right(example, text):
    return bool(questions.evaluate(example, text))


def score(prompts, answers):
    """What the reward model says to answers, (n,)."""
    sizes = torch.tensor([len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)])
    scores = torch.zeros(len(prompts), device=device)
    for part, _ in micro_batches(torch.arange(len(prompts)), sizes):
        rows = part.tolist()
        with autocast:
            scores[rows] = scores_of(judge, [prompts[i] for i in rows], [answers[i] for i in rows], stop_ids, ending)
    return scores


@torch.no_grad()
def evaluate():
    """
    Greedy answers to held-out prompts, and dpo's loss on held-out pairs. -> (numbers for the log, the line to print).
    val_loss decides which checkpoint is the best: the share of wrong answers, or where there is no task dpo's loss.
    """
    record, shown = {}, []
    if val_pairs:
        parts = [learn_from_pairs(*pair_rows(val_pairs[i : i + micro_batch_size], device))
                 for i in range(0, len(val_pairs), micro_batch_size)]
        pair_losses, margins = (torch.cat([part[k] for part in parts]) for k in range(2))
        record = {'val_loss': pair_losses.mean().item(), 'val_dpo_loss': pair_losses.mean().item(),
                  'val_preferred': losses.preferred(margins).mean().item()}
        shown = [f'dpo loss {record["val_dpo_loss"]:.4f}, preferred {record["val_preferred"]:.1%}']
    if val_prompts:
        n, n_right, at_once = len(val_prompts), 0, prompts_per_step * group_size
        for i in range(0, n, at_once):
            examples, prompts = zip(*val_prompts[i : i + at_once], strict=True)
            _, _, texts = answers_to(prompts, 0.0, torch.zeros(len(prompts), max_new_tokens))
            n_right += sum(map(is_right, examples, texts))
        record.update(val_loss=1 - n_right / n, val_accuracy=n_right / n)
        low, high = tasks.wilson(n_right, n)
        shown.append(f'accuracy {n_right / n:.1%} ({low:.1%} to {high:.1%})')
    return record, ', '.join(shown)


def save_checkpoint(is_best):
    global saved_iter
    state = {'model': policy.state_dict(), 'optimizer': opt.state_dict(), 'model_args': asdict(policy.config),
             'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': resolved, 'reference': digest,
             'judge': judged_by, 'pairs': pairs_seen, 'measure': 'share of wrong answers' if task else 'dpo loss',
             'tokenizer': tokenizer.to_dict(), 'chat_template': template, 'train_time': train_time}
    if algorithm == 'ppo':
        state.update(value_model=value_model.state_dict(), value_optimizer=value_opt.state_dict())
    is_saved = checkpoint.try_save(out_dir, state, is_best)
    saved_iter = iter_num if is_saved else saved_iter
    return is_saved


def stop_not_finite(what):
    """End the run, with the last good checkpoint as it is."""
    where = f'{ckpt_path} is of step {saved_iter}' if saved_iter else 'there is no checkpoint yet'
    raise SystemExit(f'step {iter_num}: {what}. Stopped without saving; {where}. Try a lower --learning_rate, or '
                     f'--dtype=float32')


def micro_batches(rows, lengths):
    """
    [(numbers of rows, their longest length), ...]: the rows in parts of similar lengths. Answers differ much in length,
    so that of all at once most would be padding.
    """
    parts = rows[lengths[rows].argsort()].split(micro_batch_size)
    return [(part, int(lengths[part].max())) for part in parts]


def answers_of(rows):
    """Numbers of items -> of the rows with their answers; of dpo's pairs the rejected ones are behind the chosen."""
    return torch.cat((rows, rows + n_items)) if algorithm == 'dpo' else rows


def update(optimizer, model):
    """One step of an optimizer; -> the norm of the gradient."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not math.isfinite(norm):
        stop_not_finite(f'the norm of the gradient is {norm}')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# the loop ------------------------------------------------------------------------------------------------------------
interrupt = checkpoint.Interrupt()
while True:
    # evaluate and save
    if (iter_num % eval_interval == 0 or iter_num >= max_iters) and (iter_num > start_iter or iter_num == 0):
        record, shown = evaluate()
        print(f'step {iter_num}: held out: {shown}')
        if not math.isfinite(record['val_loss']):  # the last update ruined the weights: they must not be saved
            stop_not_finite(f'val loss is {record["val_loss"]}')
        checkpoint.log(out_dir, step=iter_num, **record, train_time=round(train_time, 3))
        is_best, former_best = record['val_loss'] < best_val_loss, best_val_loss
        best_val_loss = min(best_val_loss, record['val_loss'])
        if iter_num == 0 or not save_checkpoint(is_best):
            best_val_loss = former_best  # the best is the best that is on disk
    if iter_num >= max_iters or interrupt.reason:
        break

    # all that is random in a step depends on (seed, step) alone
    t0 = time.perf_counter()
    torch.manual_seed(seed + 1_000_003 * (iter_num + 1))
    wait = critic_warmup if algorithm == 'ppo' else 0  # steps before the policy learns, too
    lr = learning_rate * optim.cosine(max(0, iter_num - wait), 1.0, warmup_iters, max_iters - wait, final_share)
    value_lr = critic_lr * optim.cosine(iter_num, 1.0, warmup_iters, max_iters, final_share)
    for optimizer, rate in ((opt, lr), (value_opt, value_lr)):
        for group in optimizer.param_groups if optimizer else ():
            group['lr'] = rate * group['lr_scale']
    indices = train_windows(iter_num, prompts_per_step, len(train_pairs or train_prompts), 1, seed, row=1)

    # experience: rows of ids, and a mask of what the policy is to be judged by
    if algorithm == 'dpo':
        idx, mask = pair_rows([train_pairs[i] for i in indices], device)
        acts, lengths = mask[:, 1:], lengths_of(mask).view(2, -1).amax(dim=0)  # of the longer of two answers
        n_items, record = prompts_per_step, {}
    else:
        examples, prompts = zip(*(train_prompts[i] for i in indices for _ in range(group_size)), strict=True)
        u = torch.stack([uniforms(seed, iter_num * prompts_per_step + prompt, sample, max_new_tokens)
                         for prompt in range(prompts_per_step) for sample in range(group_size)])
        answers, chosen, texts = answers_to(prompts, temperature, u)
        idx, mask = to_rows([(prompt + answer, [0] * len(prompt) + own)
                             for prompt, answer, own in zip(prompts, answers, chosen, strict=True)], device)
        n_items, lengths = len(idx), lengths_of(mask)
        acts = mask[:, 1:]  # which of what follows a state the policy chose, (N, T - 1)

        # the rewards, and what the policy that drew them, the reference and the value function say to these answers
        rewards = score(prompts, answers) if judge else torch.tensor(
            [float(questions.reward(example, text)) for example, text in zip(examples, texts, strict=True)],
            device=device)
        if not rewards.isfinite().all():
            if saved_iter < iter_num:  # what was learnt so far is sound
                save_checkpoint(is_best=False)
            who = f'the reward model in {reward_model}' if judge else f'reward() of tasks/{task}.py'
            how = f'; mend it, and go on:\n  {checkpoint.command(init_from="resume")}' if iter_num else ''
            raise SystemExit(f'step {iter_num}: {who} gave {rewards[~rewards.isfinite()][0]} to an answer, expected a '
                             f'number{how}')
        old_logprobs, entropies, reference_logprobs, old_values = torch.zeros(4, *acts.shape, device=device)
        with torch.no_grad():
            for part, T in micro_batches(torch.arange(n_items, device=device), lengths):
                old_logprobs[part, : T - 1], entropies[part, : T - 1] = say(policy, idx[part, :T], mask[part, :T])
                reference_logprobs[part, : T - 1], _ = say(reference, idx[part, :T], mask[part, :T])
                if algorithm == 'ppo':
                    old_values[part, : T - 1] = values_of(idx[part, :T])
        k1, _, k3 = losses.kl_estimates(old_logprobs, reference_logprobs)
        if algorithm == 'grpo':
            advantages = losses.group_advantages(rewards, group_size, normalize_std)[:, None]
        else:
            token_rewards = (-kl_coef * k1).scatter_add(1, lengths[:, None] - 2, rewards[:, None])
            advantages, returns = losses.gae(token_rewards, old_values, acts, gamma, lam)
            advantages = losses.whiten(advantages, acts)
        record = {'reward': rewards.mean().item(), 'accuracy': sum(map(is_right, examples, texts)) / n_items,
                  'kl': losses.masked_mean(k3, acts).item(), 'entropy': losses.masked_mean(entropies, acts).item(),
                  'length': acts.sum().item() / n_items}

    # learn from it
    learns = iter_num >= wait
    items, updates = torch.arange(n_items, device=device), []
    if algorithm == 'grpo' and skip_equal:
        items = items[advantages.view(-1, group_size).any(dim=1).repeat_interleave(group_size)]
    for rows in (items[part.to(device)] for _ in range(epochs if len(items) else 0)
                 for part in torch.randperm(len(items)).chunk(-(-len(items) // minibatch_size))):
        sums = collections.Counter()
        for part, T in micro_batches(rows, lengths):
            weight = len(part) / len(rows)
            token_weight = (acts[answers_of(part)].sum() / acts[answers_of(rows)].sum()).item()
            if algorithm == 'dpo':
                both = answers_of(part)
                pair_losses, margins, mean_entropy = learn_from_pairs(idx[both, :T], mask[both, :T])
                loss = pair_losses.mean()
                found = {'margin': margins.mean(), 'preferred': losses.preferred(margins).mean(),
                         'entropy': mean_entropy}
            else:
                own, reduction = acts[part, : T - 1], 'sequence-mean'
                if algorithm == 'ppo':
                    weight, reduction = token_weight, 'token-mean'
                logprobs, _ = say(policy, idx[part, :T], mask[part, :T])
                old = old_logprobs[part, : T - 1]
                loss = losses.clipped_policy_loss(logprobs, old, advantages[part, : T - 1], own, clip, clip_high,
                                                  reduction)
                clipped = losses.is_clipped(logprobs, old, advantages[part, : T - 1], clip, clip_high)
                found = {'clipped': losses.masked_mean(clipped.float(), own)}
            if algorithm == 'grpo':
                _, _, kl = losses.kl_estimates(logprobs, reference_logprobs[part, : T - 1])
                loss = loss + kl_coef * losses.reduced(kl, own, reduction)
            if algorithm == 'ppo':
                value_loss = losses.clipped_value_loss(values_of(idx[part, :T]), old_values[part, : T - 1],
                                                       returns[part, : T - 1], own, value_clip or math.inf)
                (weight * value_loss).backward()
                found['value_loss'] = value_loss
            if learns:
                (weight * loss).backward()
            found['loss'] = loss
            sums.update({key: (token_weight if key in ('clipped', 'entropy') else weight) * value.item()
                         for key, value in found.items()})
        if not math.isfinite(sums['loss']):
            stop_not_finite(f'loss is {sums["loss"]}')
        if algorithm == 'ppo':
            update(value_opt, value_model)
        if learns:
            sums['grad_norm'] = update(opt, policy)
        updates.append(sums)
    record.update({key: sum(one[key] for one in updates) / len(updates) for key in (updates or [{}])[0]})
    iter_num += 1
    dt = time.perf_counter() - t0
    train_time += dt

    # report
    if (iter_num - 1) % log_interval == 0 or iter_num == max_iters:
        names = ('loss', 'margin', 'preferred', 'entropy') if algorithm == 'dpo' else (
            'reward', 'accuracy', 'kl', 'entropy', 'length')
        print(f'iter {iter_num - 1}: ' + ', '.join(f'{key} {record[key]:.{1 if key == "length" else 3}f}'
                                                   for key in names))
        checkpoint.log(out_dir, step=iter_num - 1, **record, lr=lr, ms=round(dt * 1e3, 3))

# the end: save what was not saved, say what can be done with it ------------------------------------------------------
if saved_iter < iter_num:
    save_checkpoint(is_best=False)
if interrupt.reason:
    print(f'{interrupt.reason} after step {iter_num}. To go on:\n  {checkpoint.command(init_from="resume")}')
else:
    print(f'{iter_num} steps, {train_time:.1f} s of learning; talk to it:\n  python sample.py --chat '
          f'--out_dir={out_dir}')
if saved_iter < iter_num:
    raise SystemExit(f'the state of step {iter_num} could not be saved; {ckpt_path} is older')
