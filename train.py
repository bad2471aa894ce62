"""
Train a GPT: from scratch, from a checkpoint, or from a pretrained model.

    $ python train.py config/quickstart.py     # a laptop, minutes, no network
    $ python train.py config/quickstart.py --init_from=resume     # continue
    $ python train.py config/train_shakespeare_char.py --batch_size=32
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Writes to out_dir: ckpt.pt (the last state, to resume from), best.pt (lowest
validation loss), log.jsonl, config.json. Ctrl-C or SIGTERM finishes the step,
saves and prints the command that continues. A missing dataset is prepared first.
"""

import gc
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

from config import presets
from configurator import Count, Fraction, Natural, NonNegative, Positive, Share, override
from data import datasets, mixture
from data.tokens import Batches
from flatgpt import checkpoint, fit, flops, lora, optim, output, parallel, pretrained, runtime
from flatgpt.cut import cut_step
from flatgpt.plan import explain_plan
from flatgpt.samples import Samples, command_to_try, print_sample
from flatgpt.sharded import deferred, place, should_shard
from model import GPT, GPTConfig, padded_vocab_size
from posttrain.evaluation import TaskEvaluation

# a full disk or a closed terminal must not end the run: lines that cannot be printed are dropped
output.protect(drop=True)

# Settings. The defaults are GPT-2 (124M) on OpenWebText -------------------------------------------
# the run
out_dir = 'out'
eval_interval: Count = 2000  # steps between evaluations; each is followed by a checkpoint
log_interval: Count = 1  # steps between log lines
eval_iters: Count = 200  # batches of train in an evaluation
eval_tokens: Natural = 0  # tokens of val in an evaluation, evenly spaced, the same ones; 0: all
eval_tasks = ''  # accuracies in an evaluation, 'tiny_chat:4': task:shots (posttrain/evaluation.py)
eval_examples: Count = 200  # questions of each task
eval_only = False  # True: evaluate once and exit
eval_first = True  # evaluate before the first step too
always_save_checkpoint = True  # False: after an evaluation save only if val improved
init_from = 'scratch'  # 'resume', 'auto' (resume or scratch), an out_dir, a HF folder or hub id
patience: Natural = 0  # stop after this many evaluations without a lower val loss; 0: never
keep_every: Natural = 0  # steps between checkpoints that stay, ckpt-STEP.pt; 0: none
sample_every: Natural = 0  # steps between samples in samples.jsonl; 0: only print one at the end
sample_tokens: Natural = 0  # tokens of a sample; 0: none, or with sample_every 200
sample_prompt = '\n'  # the text that the sample continues; on conversations a user's message
wandb_log = False  # its offline mode (WANDB_MODE=offline) needs no network
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder under data/ or a path; several: 'web:0.7,code:0.3', by share
anneal_dataset = ''  # the datasets of the last steps, as the learning rate falls
anneal_fraction: Share = 0.2  # part of lr_decay_iters with anneal_dataset
documents: Literal['flat', 'shuffle', 'bos', 'mask'] = 'flat'  # their order and mask: data/README
total_batch_size: Natural = 0  # tokens per step, all processes; 0: see gradient_accumulation_steps
gradient_accumulation_steps: Count = 5 * 8  # micro-batches per step, over all processes
batch_stages: Count = 1  # n: parts of lr_decay_iters; a step of the k-th has k/n of that batch
batch_size: Count | Literal['auto'] = 12  # sequences per micro-batch; auto: as many as fit
block_size: Count = 1024  # context length, tokens
extend_context: Natural = 0  # a longer one for the model of init_from, by YaRN; needs pos='rope'
# model; GPTConfig describes each field
preset: Literal['gpt2', 'llama', 'modern'] = 'gpt2'  # config/presets.py; modern learns fastest
n_layer: Count = 12
n_head: Count = 12
n_embd: Count = 768
dropout: Fraction | Literal['auto'] = 0.0  # auto: 0 to 0.3 by the passes over the text
bias = False  # biases in linear layers and LayerNorms
mlp: Literal['gelu', 'gelu_erf', 'swiglu', 'relu2'] = 'gelu'
n_kv_head: Count | None = None  # heads of keys and values, a divisor of n_head; None: n_head
norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'
pos: Literal['learned', 'rope'] = 'learned'
rope_base: Positive = 10000.0
qk_norm = False
tie_embeddings = True
window: Natural = 0  # positions that the S layers of window_pattern see; 0: all
window_pattern = 'S'
logit_softcap: NonNegative = 0.0
zero_init = False
residual_lambdas = False
value_embeddings = False
head_gates = False
value_gates = False
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: matrices of blocks; AdamW for the rest
learning_rate: NonNegative = 6e-4  # the highest
muon_lr: NonNegative = 0.02  # muon: rate of the matrices
embedding_lr: NonNegative = 0.02  # muon: rate of embeddings, except one tied to the head
momentum: Fraction = 0.95  # muon: reached after 300 steps
max_iters: Natural = 600000  # steps in all
weight_decay: NonNegative = 1e-1  # adamw: matrices and embeddings; muon: the matrices alone
cautious_decay = False  # muon: only of weights that a step shrinks, and falling with the rate
beta1: Fraction = 0.9
beta2: Fraction = 0.95
grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: no clipping
# LoRA: small matrices beside the frozen model of init_from (flatgpt/lora.py)
lora_rank: Natural = 0  # 8 to 64; 0: train all weights
lora_alpha: Positive = 16.0  # scales the adapters by lora_alpha / lora_rank
lora_targets = 'c_attn,c_fc,c_proj'  # layers with adapters, such as 'c_attn,mlp.c_proj,lm_head'
lora_bits: Literal[32, 8, 4] = 32  # of the frozen weights of these layers
# learning rate over time
decay_lr = True  # False: constant
lr_schedule: Literal['cosine', 'wsd'] = 'cosine'  # wsd: warmup, stable, linear decay
warmup_iters: Natural = 2000
lr_decay_iters: Natural | None = 600000  # where min_lr is reached; None: at max_iters
min_lr: NonNegative = 6e-5  # usually learning_rate / 10
decay_fraction: Share = 0.2  # wsd: part of lr_decay_iters in which the rate falls
muon_decay_fraction: Share | None = None  # that part for the matrices; None: decay_fraction
# machine
seed = 1337  # fixes weights, batches and dropout
deterministic = False  # the same bits in each run on a GPU, slower; on a CPU they always are
backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # nccl between GPUs, gloo between CPUs
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # float16 with a gradient scaler
compile: bool | Literal['auto'] = 'auto'  # torch.compile the training step
recompute: Literal['none', 'block'] = 'none'  # block: less memory, a third more computation
shard: Literal['none', 'full', 'hybrid'] = 'none'  # the model over processes; hybrid: of a machine
plan: bool | str = False  # predict memory and time here, or on '8xH200', '2x8xH100'; then exit
config = override(globals())
# --------------------------------------------------------------------------------------------------

# the preset sets the settings that nobody set
from_preset = presets.fill(config)
globals().update(from_preset)

# rules between settings
rates_at = optim.schedule(config)  # step -> learning rate, that of Muon's matrices
lora.check_settings(config, init_from, out_dir)

# this process, its device, its data
world, data = parallel.from_environment(), mixture.Data(config)
if plan:
    world.print(explain_plan(config, datasets.sizes_of(data.path), world))
    raise SystemExit
is_sharded = should_shard(config, world)
if from_preset:
    world.print(f'preset {preset}: ' + ', '.join(f'{k}={v!r}' for k, v in from_preset.items()))
torch_device = runtime.choose_device(device, world.local_rank)
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
architecture = {name: config[name] for name in GPTConfig.__dataclass_fields__ if name in config}
if init_from == 'scratch':
    GPTConfig(**{**architecture, 'dropout': 0.0})  # refuses impossible sizes before preparing data
else:
    pretrained.check_source(init_from, ckpt_path)
parallel.connect(world, torch_device, backend)
runtime.use_machine(torch_device, deterministic)
meta = data.prepare(is_first=world.local_rank == 0)
config['dropout'] = architecture['dropout'] = data.choose_dropout(config, world)
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'


def start():
    """Return the model that the run begins with, on the CPU, and its checkpoint.

    A model to be sharded may have no memory yet. Without a checkpoint the second has the tokenizer
    and chat template of a loaded model. A setting that contradicts loaded weights is refused.
    """
    torch.manual_seed(seed)
    if init_from == 'scratch':
        n_ids = meta['vocab_size'] or 50257  # GPT-2's, if the dataset records none
        with deferred(is_sharded):
            model = GPT(GPTConfig(**architecture, vocab_size=padded_vocab_size(n_ids)))
        return model, {'tokenizer': pretrained.GPT2_TOKENIZER}
    if init_from == 'resume':
        return pretrained.resume(ckpt_path, config, meta, data.path)
    return pretrained.finetune(init_from, config, meta, data.path)


model, state = start()
text_tokenizer = meta['tokenizer'] or state.get('tokenizer')
chat_template = meta['chat_template'] or state.get('chat_template')
if lora_rank and init_from != 'resume':
    state['lora'] = lora.start(model, config, out_dir)
adapters = state.get('lora')  # describes them for the checkpoint; None: all weights are trained
block_size = pretrained.context_of(model, config, init_from, meta)
cut = cut_step(config, block_size, world.size)

# device, precision, optimizer
precision, precision_reason = runtime.choose_dtype(dtype, torch_device)
world.check_alike({**config, 'data': meta['digest'], 'step': state.get('iter_num'),
                   'seen': state.get('seen'), 'dtype': precision})
place(model, config['shard'], world, precision, torch_device)
model.recompute = recompute == 'block'
model.masks_documents = documents == 'mask'
autocast = runtime.autocast(precision, torch_device)
scaler = torch.amp.GradScaler(torch_device.type, enabled=precision == 'float16')
opt = optim.create(model, config, precision, world)
if 'optimizer' in state:
    pretrained.restore(model, opt, scaler, ckpt_path, state)
if not (meta['row'] and block_size < model.config.block_size):  # a context has room for short rows
    pretrained.change_context(model, opt, block_size)
work = model.flops_per_token() * cut.tokens_of(0, 0 if eval_only else max_iters) / world.size
use_compile, compile_reason = runtime.choose_compile(compile, torch_device, work)

# data: micro-batches of this process, as a function of the step
train_tokens = data.open(cut, torch_device, model.config.vocab_size, state)
batches = Batches(train_tokens, cut, seed, data.n_ids, torch_device, world)

# one dict of resolved settings, for the screen, config.json and the checkpoint
resolved = {**config, 'init_from': init_from, 'total_batch_size': cut.tokens,
            'batch_size': cut.batch_size, 'block_size': block_size, 'device': str(torch_device),
            'dtype': precision, 'compile': use_compile, 'flops_per_token': model.flops_per_token()}
is_auto = batch_size == 'auto'
if is_auto:
    world.print(fit.choose_batch(cut, resolved, model, world))
world.print(runtime.explain_choices(torch_device, (precision, precision_reason),
                                    (use_compile, compile_reason)))
trained = [p for p in model.parameters() if p.requires_grad]
share = f', {sum(p.numel() for p in trained):,} of them are trained' if adapters else ''
world.print(f'{model.get_num_params() / 1e6:.2f}M parameters{share}')
if not eval_only:
    world.print(*data.describe(cut, max_iters, eval_tokens, world.size))


def state_of_run():
    """Return a checkpoint's content beside the numbers of the run."""
    state = {'model': lora.adapters(model) if adapters else model.state_dict(),
             'optimizer': opt.state_dict(), 'model_args': asdict(model.config),
             'tokenizer': text_tokenizer, 'chat_template': chat_template,
             'scaler': scaler.state_dict(), 'data': meta['digest'],
             **data.state(cut, run.drawn(cut.tokens))}
    return {**state, 'lora': adapters} if adapters else state


# what shows its progress beside the loss: tasks and samples, in a run on conversations answers
tasks = TaskEvaluation(resolved, text_tokenizer, chat_template, model, world)
of_samples = resolved, text_tokenizer, meta['row'] and chat_template
samples = Samples(*of_samples) if sample_every and not eval_only else None

# the folder of the run: an earlier run's files are moved, not overwritten
run = checkpoint.Run(out_dir, resolved, state if init_from == 'resume' else None, world,
                     folder=not eval_only)
fit.explain(cut, run)
state = None  # the loaded tensors are no longer needed

# the training step, compiled if that works here; auto: two micro-batches, whose gradients add up
def try_step():
    for x, y, _ in batches(run.drawn(cut.tokens), cut.stages.end)[0][: 1 + is_auto]:
        with autocast:
            model(x, y, return_logits=False)[1].backward()


if use_compile and not eval_only:
    world.print('compiling the training step (--compile=False starts at once)')
    try_step = partial(runtime.compile_training, model, try_step)
if (use_compile or is_auto) and not eval_only:
    fit.begin(cut, try_step, run, opt, is_auto)
step_model = parallel.average_gradients(model, world, torch_device)


def accumulate(micro_batches):
    """Sum up the gradient of the step's mean loss in .grad; -> the loss."""
    torch.manual_seed(seed + 1_000_003 * (run.step + 1) + world.rank)  # dropout: (seed, step) alone
    loss_sum = torch.zeros((), device=torch_device)
    for micro_step, (x, y, share) in enumerate(micro_batches):
        # DDP, not a plain model, reads this: it averages gradients with the last micro-batch alone
        step_model.require_backward_grad_sync = micro_step == len(micro_batches) - 1
        with autocast:
            loss = step_model(x, y, return_logits=False)[1] * share
        loss_sum += loss.detach()
        scaler.scale(loss).backward()
    return loss_sum


# the loop -----------------------------------------------------------------------------------------
bar = tqdm(total=max_iters, initial=run.step, unit='step', dynamic_ncols=True, smoothing=0.05,
           leave=False, disable=not (world.is_main and sys.stderr.isatty()))
run.say = bar.write
prefetch = ThreadPoolExecutor(max_workers=1)  # reads the next batch while the current one computes
next_batch = prefetch.submit(batches, run.drawn(cut.tokens), run.step)
unread = []  # (step, tokens, rate, numbers) of the steps whose numbers are still on the GPU
# the garbage collector would pause a step to visit torch's objects: it runs at evaluations instead
if use_compile:
    gc.collect()
gc.freeze()
gc.disable()
logged_step, logged_time, t0 = run.step, run.train_time, time.perf_counter()
pauses = [n for n in (eval_interval, sample_every, keep_every) if n]
while True:
    # sample, evaluate and save
    pause = time.perf_counter()
    if samples and world.is_main and run.is_due(sample_every, max_iters):
        bar.write(samples.add(model, run))  # other processes wait at their next exchange
    if run.is_due(eval_interval, max_iters, eval_first) or eval_only:
        bar.set_description('evaluating')
        gc.collect()
        if shorter := datasets.find_rewritten(data.stamps, world.print):
            run.stop_reason = shorter  # the next read could end the process
            break
        windows = data.windows(eval_iters, cut, eval_tokens)
        losses = data.evaluate(model, windows, cut, autocast, world)
        train_loss, val_loss = (data.mean(losses[split]) for split in ('train', 'val'))
        accuracies = tasks.measure(model)
        bar.set_description()
        if world.is_main:
            bar.write(f'step {run.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}'
                      + data.line(losses['val']) + tasks.line(accuracies))
        if eval_only:
            break
        if world.is_main and math.isfinite(val_loss):
            run.log(step=run.step, train_loss=train_loss, val_loss=val_loss, **accuracies,
                    **data.record(losses['val'], cut, run.drawn(cut.tokens)))
        run.evaluated(val_loss, state_of_run, always_save_checkpoint)
        if patience and run.evals_since_best >= patience:
            run.stop_reason = f'val loss has not improved for {patience} evaluations'
    run.keep(state_of_run)
    if run.step >= max_iters or run.stop_reason:
        break
    t0 += time.perf_counter() - pause  # that was no training time

    # forward and backward over the micro-batches
    lr, matrix_lr = rates_at(run.step)
    optim.set_rates(opt, lr, matrix_lr)
    micro_batches, n_targets = next_batch.result()
    tokens_seen = run.seen + cut.tokens_of(run.step, run.step + 1)
    next_batch = prefetch.submit(batches, tokens_seen, run.step + 1)
    while (loss_sum := fit.attempt(cut, world.size == 1, accumulate, micro_batches)) is None:
        next_batch.result()  # it reads the cut, which changes now
        bar.write(fit.halve(cut, run))
        opt.zero_grad(set_to_none=True)
        micro_batches, _ = batches(run.seen, run.step)
        next_batch = prefetch.submit(batches, tokens_seen, run.step + 1)
    scaler.unscale_(opt)
    norm = parallel.clip(trained, grad_clip)

    # read loss and norm before the update, which could ruin the weights; agree on when to stop.
    # On a GPU they are those of the step before, so that it does not idle
    stop = torch.full_like(norm, run.requested is not None)
    numbers = runtime.read_later(world.mean(torch.stack((loss_sum, norm, stop))))
    unread.append((run.step, tokens_seen, lr, numbers))
    records, keeps_one = [], torch_device.type == 'cuda' and not run.stop_reason
    keeps_one = keeps_one and run.step + 1 < max_iters and all((run.step + 1) % n for n in pauses)
    while len(unread) > bool(keeps_one):
        step, tokens, step_lr, numbers = unread.pop(0)
        loss, norm, stop = numbers()
        if not math.isfinite(loss) or (not math.isfinite(norm) and not scaler.is_enabled()):
            run.stop_not_finite(
                f'loss is {loss}, norm of the gradient {norm} (learning rate {step_lr:.3g})',
                'Try a lower --learning_rate or --muon_lr, a longer warmup, or --dtype=float32')
        if stop:
            run.stop_reason = run.requested or 'stopped by SIGTERM'  # another process's
        records.append({'step': step, 'loss': loss, 'lr': step_lr, 'grad_norm': norm,
                        'tokens': tokens})
    if n_targets:  # a batch of conversations can have none, and weight decay alone is no step
        scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    bar.update()

    # report
    if torch_device.type == 'cuda' and not keeps_one:
        torch.cuda.synchronize()  # the update is training time, and evaluating waits for it anyway
    began, t0 = t0, time.perf_counter()
    run.advance(tokens_seen - run.seen, t0 - began)
    shown = [r for r in records if r['step'] % log_interval == 0 or r['step'] == max_iters - 1]
    if world.is_main and shown:
        done, seconds = records[-1]['step'] + 1, run.train_time - logged_time  # since the last line
        dt = seconds / (done - logged_step)
        tokens_per_s = cut.tokens_of(logged_step, done) / seconds
        logged_step, logged_time = done, run.train_time
        mfu = flops.mfu_of(model, tokens_per_s / world.size)
        shown_mfu = 'n/a' if mfu is None else f'{mfu:.1%}'
        left = tqdm.format_interval(cut.tokens_of(done, max_iters) / tokens_per_s)
        bar.set_postfix_str(f'loss {shown[-1]["loss"]:.3f}', refresh=False)
        for record in shown:
            bar.write(f'iter {record["step"]}: loss {record["loss"]:.4f}, time {dt * 1e3:.2f}ms, '
                      f'mfu {shown_mfu}, norm {record["grad_norm"]:.2f}, '
                      f'{tokens_per_s / 1e3:.1f}k tok/s' + f', {left} left' * bar.disable)
            run.log(**record, ms=round(dt * 1e3, 3), mfu=mfu, tokens_per_s=round(tokens_per_s))

# the end ------------------------------------------------------------------------------------------
bar.close()
run.say = print
prefetch.shutdown(wait=False, cancel_futures=True)
is_complete = not eval_only and run.finish(state_of_run)
parallel.disconnect()
if world.is_main and is_complete:
    best = f'; best val loss {run.best_val_loss:.4f}' if math.isfinite(run.best_val_loss) else ''
    print(f'{run.step} steps, {run.train_time:.1f} s of training{best}')
    if sample_tokens and text_tokenizer and run.saved_step == run.step and not sample_every:
        print_sample(model, *of_samples)
    if run.saved_step:
        print('try it:\n  ' + command_to_try(out_dir, sample_prompt, is_chat=bool(meta['row'])))
run.close()
