"""
Train a GPT: from scratch, from a checkpoint, or from GPT-2.

    $ python train.py config/quickstart.py     # a laptop, minutes, no network
    $ python train.py config/quickstart.py --init_from=resume         # to go on
    $ python train.py config/train_shakespeare_char.py --batch_size=32
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

On two machines of 8 GPUs, with --node_rank=1 on the second (and in front, if
plain Ethernet connects them, NCCL_IB_DISABLE=1):

    $ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 \\
        --master_addr=10.0.0.1 --master_port=1234 train.py config/train_gpt2.py

Writes to out_dir: ckpt.pt (the last state, to resume from), best.pt (lowest
validation loss), log.jsonl, config.json. Ctrl-C or SIGTERM finishes the step,
saves and says how to go on. A dataset that is missing is prepared first.
"""

import copy
import gc
import math
import os
import shlex
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import tokenizer
from config.presets import PRESETS
from configurator import check, explain_errors, override
from data.tokens import (
    DeviceTokens,
    count_targets,
    even_windows,
    fits_on,
    folder_of,
    gather,
    load_meta,
    open_tokens,
    prepare_command,
    prepare_if_missing,
    row_of,
    to_device,
    train_windows,
    whole_windows,
)
from flatgpt import checkpoint, huggingface, lora, optim, parallel, runtime
from flatgpt.generate import generate_texts
from flatgpt.pretrained import base_model, model_of
from model import GPT, GPTConfig, padded_vocab_size

# each line as it comes, also into a file or a pipe, and whatever the terminal can't show as '?'
sys.stdout.reconfigure(errors='replace', line_buffering=True)

# settings: the defaults are GPT-2 (124M) on OpenWebText -------------------------------------------------------------
# where, and how often
out_dir = 'out'
eval_interval = 2000  # steps between evaluations; each is followed by a checkpoint
log_interval = 1  # steps between log lines
eval_iters = 200  # batches of the training split in an evaluation; the val split is always evaluated whole
eval_only = False  # True: evaluate once and exit
eval_first = True  # evaluate before the first step too, when nothing is learnt yet; False: start at once
always_save_checkpoint = True  # False: after an evaluation save only if val improved; the end and signals always save
init_from = 'scratch'  # 'resume', 'auto' (resume or scratch), another run's out_dir, a Hugging Face folder or hub id
patience = 0  # stop after this many evaluations in a row without a lower val loss; 0: never
sample_tokens = 0  # tokens of a sample to print at the end; 0: none
sample_prompt = '\n'  # what the sample continues
# wandb; its offline mode (WANDB_MODE=offline) needs no network
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder under data/, or the path of one elsewhere
total_batch_size = 0  # tokens a step, over all processes; 0: gradient_accumulation_steps * batch_size * block_size
gradient_accumulation_steps = 5 * 8  # micro-batches a step, over all processes, if total_batch_size is 0
batch_size = 12  # sequences in a micro-batch: as many as fit in memory; does not change the mathematics
block_size = 1024  # context length, tokens
# model
preset = 'gpt2'  # or 'llama', or 'modern', which learns fastest: settings of model.PRESETS, optim.PRESETS, if not given
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # helps where the same text is seen many times: 0.1 to 0.3
bias = False  # biases in linear layers and LayerNorms
mlp = 'gelu'  # 'gelu' (GPT-2's, with tanh), 'gelu_erf' (nanoGPT's), 'swiglu', 'relu2'
n_kv_head: int | None = None  # heads of keys and values, a divisor of n_head: smaller caches; None: n_head
norm = 'layernorm'  # or 'rmsnorm'
pos = 'learned'  # embedded positions, or 'rope': rotated queries and keys
rope_base = 10000.0  # higher for long contexts
qk_norm = False  # normalise queries and keys
tie_embeddings = True  # one matrix for the embedding and the head
window = 0  # positions that the S layers of window_pattern see; 0: all
window_pattern = 'S'  # such as 'SSSL', repeated over the layers; the last layer always sees all
logit_softcap = 0.0  # bound of the logits, 15 to 30; 0: none
zero_init = False  # projections into the residual stream, and an untied head, start at 0
residual_lambdas = False  # each block reads a learnt mixture of the stream and the embeddings
value_embeddings = False  # every other layer adds an embedding of the token to its values
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices of the blocks, AdamW for all else
learning_rate = 6e-4  # the highest
muon_lr = 0.02  # muon: of those matrices
embedding_lr = 0.02  # muon: of embeddings, except one tied to the head
momentum = 0.95  # muon: reached after 300 steps
max_iters = 600000  # steps in all
weight_decay = 1e-1  # adamw: of matrices and embeddings; muon: of those matrices alone
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
average_decay = 0.0  # evaluate and keep a moving average of the weights, over 1 / (1 - average_decay) steps; 0: none
# LoRA: small matrices beside the frozen ones of the model in init_from; lora.py
lora_rank = 0  # 8 to 64; 0: train all weights
lora_alpha = 16.0  # what they add is scaled by lora_alpha / lora_rank
lora_targets = 'c_attn,c_fc,c_proj'  # the layers that get them, such as 'c_attn,mlp.c_proj,lm_head'
lora_int8 = False  # the frozen weights of these layers in 8 bits, a quarter of the memory
# learning rate over time
decay_lr = True  # False: constant
lr_schedule = 'cosine'  # 'cosine', or 'wsd': warmup, stable, linear decay
warmup_iters = 2000
lr_decay_iters: int | None = 600000  # where min_lr is reached; None: at max_iters
min_lr = 6e-5  # usually learning_rate / 10
decay_fraction = 0.2  # wsd: the last share of lr_decay_iters, in which the rate falls
# machine
seed = 1337  # of weights, batches and dropout
backend = 'auto'  # between processes: 'nccl' for GPUs, 'gloo' for CPUs
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'auto'  # 'float32', 'bfloat16', or 'float16' with a gradient scaler
compile: bool | str = 'auto'  # torch.compile the training step
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, [('preset', lambda value: value in PRESETS, ' or '.join(map(repr, PRESETS)))])
from_preset = {key: value for key, value in {**PRESETS[preset], **optim.PRESETS[preset]}.items()
               if key not in config.given}
config.update(from_preset)
globals().update(from_preset)
if from_preset and os.environ.get('RANK', '0') == '0':
    print(textwrap.fill(f'preset {preset}: ' + ', '.join(f'{key}={value!r}' for key, value in from_preset.items()), 80,
                        subsequent_indent='  ', break_on_hyphens=False))
sources = ('scratch', 'resume', 'auto', *huggingface.GPT2_NAMES)
check(config, (
    ('eval_interval log_interval eval_iters batch_size block_size gradient_accumulation_steps',
     lambda value: value >= 1, '1 or more'),
    ('total_batch_size max_iters warmup_iters patience sample_tokens learning_rate min_lr weight_decay grad_clip '
     'muon_lr embedding_lr lora_rank', lambda value: 0 <= value < math.inf, '0 or more'),
    ('optimizer', lambda value: value in ('adamw', 'muon'), "'adamw' or 'muon'"),
    ('learning_rate', lambda value: optimizer == 'adamw' or value > 0, "above 0 with optimizer='muon'"),
    ('min_lr', lambda value: not decay_lr or value <= learning_rate,
     f'at most learning_rate={learning_rate}, as the rate would rise to it; usually a tenth of that'),
    ('beta1 beta2 momentum average_decay', lambda value: 0 <= value < 1, 'at least 0 and below 1'),
    ('decay_fraction', lambda value: 0 < value <= 1, 'above 0 and at most 1'),
    ('lr_schedule', lambda value: value in ('cosine', 'wsd'), "'cosine' or 'wsd'"),
    ('backend', lambda value: value in ('auto', 'nccl', 'gloo'), "'auto', 'nccl' or 'gloo'"),
    ('lr_decay_iters', lambda value: not decay_lr or value is None or value >= warmup_iters,
     f'at least warmup_iters={warmup_iters}, or the rate would fall before it has risen'),
    ('warmup_iters', lambda value: value <= max_iters or lr_decay_iters is not None or 'warmup_iters' not in
     config.given, f'at most max_iters={max_iters}, or the rate would never reach its highest'),
    ('lora_alpha', lambda value: 0 < value < math.inf, 'more than 0'),
    ('lora_rank', lambda value: value == 0 or init_from not in ('scratch', 'auto'),
     f'0 with init_from={init_from!r}, since adapters need a model; name it, --init_from=FOLDER'),
    ('lora_alpha lora_targets lora_int8', lambda value: lora_rank > 0 or init_from == 'resume' or
     not {'lora_alpha', 'lora_targets', 'lora_int8'} & config.given, 'a --lora_rank beside it, such as 8'),
    ('init_from', lambda value: lora_rank == 0 or os.path.realpath(value) != os.path.realpath(out_dir),
     'another folder than out_dir, as the adapters in it need the model that is there; name another --out_dir'),
    ('optimizer', lambda value: lora_rank == 0 or value == 'adamw', "'adamw' with LoRA (--optimizer=adamw), as its "
     'matrices are no maps from channels to channels, whose singular values Muon evens out'),
    ('init_from', lambda value: value in sources or os.path.isdir(value) or '/' in value,
     f"another run's out_dir, a folder in Hugging Face layout, one of {', '.join(sources)}, or the id of a model on "
     f'the hub, owner/name'),
))

# as checkpoints have it
lora_targets = config['lora_targets'] = ','.join(target.strip() for target in lora_targets.split(','))

# this process, its device, its data
world = parallel.from_environment()
device = runtime.choose_device(device, world.local_rank)
data_dir = folder_of(dataset)
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
architecture = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
if init_from == 'scratch':
    GPTConfig(**architecture)  # refuses impossible sizes before any data is prepared
state = checkpoint.load(ckpt_path) if init_from == 'resume' else None
prepare_if_missing(data_dir, is_first=world.local_rank == 0)
meta = load_meta(data_dir)
parallel.connect(world, device, backend)
runtime.use_cores()
if device.type == 'cuda':
    torch.set_float32_matmul_precision('high')  # where products are fp32, TF32's ten bits are enough, and much faster
if init_from == 'auto':
    n_found = int(world.sum([os.path.exists(ckpt_path)])[0])
    if n_found not in (0, world.size):
        raise ValueError(f'{n_found} of {world.size} processes find {ckpt_path}; out_dir must be on a disk they share')
    init_from = 'resume' if n_found else 'scratch'
    state = checkpoint.load(ckpt_path) if n_found else None

# the model; a checkpoint decides over its architecture, and a setting that contradicts it is an error
text_tokenizer, chat_template = meta['tokenizer'], None
torch.manual_seed(seed)


def refuse_another(names, source):
    """ValueError if a setting of the architecture that was given, or is the preset's, contradicts the loaded model."""
    for name in names:
        value = getattr(model.config, name)
        remedy = None
        if name in config.given:
            remedy = 'Leave it out'
        elif name in PRESETS[preset]:
            remedy = (f"It is preset {preset!r}'s: go on with the config file it was trained with, such as "
                      f'config/shakespeare_char_classic.py or config/gpt2_classic.py, or with --preset=gpt2')
        if remedy and config[name] != value:
            raise ValueError(f'{name}={config[name]}, but {source} has {name}={value}, and its weights fix that. '
                             f'{remedy}; or start anew (--init_from=scratch) in another --out_dir')


options = [field.name for field in fields(GPTConfig) if field.name not in ('block_size', 'vocab_size', 'dropout')]
if init_from == 'scratch':
    ids = meta['vocab_size'] or 50257  # GPT-2's, if the dataset doesn't say
    model = GPT(GPTConfig(**architecture, vocab_size=padded_vocab_size(ids)))
elif init_from == 'resume':
    if 'reference' in state:
        raise ValueError(f'{ckpt_path} is a run of rl.py, which goes on: python -m posttrain.rl --init_from=resume '
                         f'--out_dir={out_dir}; to finetune what it has learnt, --init_from={out_dir} and another '
                         f'--out_dir')
    model = model_of(state, ckpt_path, dropout)
    refuse_another(options, ckpt_path)
    if 'optimizer' in state:
        optim.check_same(optimizer, state.get('config', {}), ckpt_path)
    saved_tokenizer = state.get('tokenizer')
    if saved_tokenizer and text_tokenizer and saved_tokenizer != text_tokenizer:
        raise ValueError(f'{ckpt_path} was trained with another tokenizer ({saved_tokenizer["kind"]}, vocab_size '
                         f'{model.config.vocab_size}) than {data_dir} was prepared with ({text_tokenizer["kind"]}, '
                         f'{meta["vocab_size"]}); resume on its own dataset (--dataset={state["config"]["dataset"]})')
    text_tokenizer, chat_template = text_tokenizer or saved_tokenizer, state.get('chat_template')
    # nanoGPT's checkpoints have no tokenizer that could be compared
    if not saved_tokenizer and meta['vocab_size'] and model.config.vocab_size not in (meta['vocab_size'],
                                                              padded_vocab_size(meta['vocab_size'])):
        raise ValueError(f'{ckpt_path} has a vocabulary of {model.config.vocab_size}, {data_dir} one of '
                         f'{meta["vocab_size"]}; resume on the dataset it was trained with (--dataset)')
else:
    model, start = base_model(init_from, dropout)
    if start is not None:
        own, chat_template, start = start.get('tokenizer'), start.get('chat_template'), None
    else:
        model_folder = huggingface.find(init_from)
        own = None
        # one of SentencePiece, for example, can't be read, and data that does not say what its ids are needs none
        with suppress(ValueError) if text_tokenizer is None else nullcontext():
            own = huggingface.load_tokenizer(model_folder)
        chat_template = huggingface.load_chat_template(model_folder, own)
    # the sizes and biases that a nanoGPT user's settings may hold for training from scratch are passed over, as there
    refuse_another([name for name in options if name not in ('n_layer', 'n_head', 'n_embd', 'bias')], init_from)
    if text_tokenizer is None:  # a dataset that does not say is taken to have the model's ids
        text_tokenizer = own
    else:
        is_own = huggingface.same_tokenizer(text_tokenizer, own) if own else (
            meta['vocab_size'] == model.config.vocab_size)
        if not is_own:
            name = own.get('name', init_from) if own else 'FILE'
            raise ValueError(f'{data_dir} was prepared for a vocabulary of {meta["vocab_size"]} '
                             f'({text_tokenizer["kind"]}), {init_from} has another, of {model.config.vocab_size}; '
                             f'prepare the text with its tokenizer: {prepare_command(data_dir)} '
                             f'--tokenizer={name}')
chat_template = meta['chat_template'] or chat_template
adapted = state.get('lora') if state else None  # with which adapters, as a checkpoint has it
if state is not None:
    used = {'lora_rank': adapted['rank'], 'lora_alpha': adapted['alpha'], 'lora_targets': ','.join(adapted['targets']),
            'lora_int8': adapted['int8']} if adapted else {'lora_rank': 0}
    for name, value in used.items():
        if name in config.given and config[name] != value:
            raise ValueError(f'{name}={config[name]}, but {ckpt_path} was trained with {name}={value}; resume with '
                             f'that, or begin with its model in another run: --init_from={out_dir} and another '
                             f'--out_dir')
    config.update(used)
elif lora_rank:
    from_here = os.path.relpath(init_from, out_dir) if os.path.isdir(init_from) else None
    adapted = {'init_from': init_from, 'from_here': from_here, 'digest': lora.digest(model), 'rank': lora_rank,
               'alpha': lora_alpha, 'targets': lora_targets.split(','), 'int8': lora_int8}
    lora.add(model, lora_rank, lora_alpha, adapted['targets'], lora_int8)
if text_tokenizer is None and init_from in ('scratch', 'resume') and model.config.vocab_size >= 50257:
    text_tokenizer = {'kind': 'tiktoken', 'name': 'gpt2'}  # as nanoGPT takes a dataset without meta.pkl
if init_from != 'scratch' and 'block_size' not in config.given:
    # of a model of others with RoPE, whose context can be 100,000 tokens, no more than the setting says
    is_long = init_from != 'resume' and model.config.pos == 'rope'
    block_size = min(block_size, model.config.block_size) if is_long else model.config.block_size
if meta['row'] and 'block_size' not in config.given:
    block_size = meta['row'] - 1  # what the conversations are packed for
if block_size > model.config.block_size and model.config.pos == 'learned':
    raise ValueError(f'block_size={block_size} is above the {model.config.block_size} positions of the model in '
                     f'{ckpt_path if init_from == "resume" else init_from}; use --block_size={model.config.block_size} '
                     f'or less')
n_ids = min(meta['vocab_size'] or math.inf, model.config.vocab_size)  # ids of the data are below
model.to(device)
final_model = copy.deepcopy(model) if average_decay else model  # what is evaluated, kept and sampled from
if state is not None and 'unaveraged' in state:  # beside 'model', which is the average then
    model.load_state_dict(state['unaveraged'], strict=not adapted)
dtype, dtype_reason = runtime.choose_dtype(dtype, device)
if optimizer == 'muon':
    ns_dtype = torch.bfloat16 if dtype == 'bfloat16' else torch.float32
    opt = optim.muon(model, weight_decay, learning_rate, muon_lr, embedding_lr, (beta1, beta2), momentum, ns_dtype,
                     world)
else:
    opt = optim.adamw(model, weight_decay, learning_rate, (beta1, beta2))
if state is not None and 'optimizer' in state:
    optim.load_optimizer(opt, state['optimizer'])
is_short = meta['row'] and block_size < model.config.block_size  # rows that the context has room for, and more
if block_size != model.config.block_size and not is_short:
    world.print(f'the context is changed from {model.config.block_size} to {block_size} tokens')
    for cropped in {model, final_model}:
        cropped.crop_block_size(block_size)
    if model.config.pos == 'learned':  # crop what the optimizer remembers of the position embeddings, too
        moments = opt.state.get(model.transformer.wpe.weight, {})  # none of what LoRA leaves frozen
        moments.update({name: m[:block_size].clone() for name, m in moments.items() if m.dim() == 2})

# how the tokens of a step are cut: sequences -> processes -> micro-batches
total_batch_size = total_batch_size or gradient_accumulation_steps * batch_size * block_size
if total_batch_size % (block_size * world.size):
    whole = max(1, total_batch_size // (block_size * world.size)) * block_size * world.size
    raise ValueError(f'a step of {total_batch_size:,} tokens is not a whole number of sequences of {block_size} tokens '
                     f'for each of {world.size} processes; try --total_batch_size={whole}')
n_sequences = total_batch_size // block_size  # a step, over all processes
per_process = n_sequences // world.size
batch_size = min(batch_size, per_process)
smaller_batch = max((b for b in range(1, batch_size) if per_process % b == 0), default=0)  # the next that fits, or 0
if per_process % batch_size:
    raise ValueError(f'{per_process} sequences a step and process are not a whole number of micro-batches of '
                     f'batch_size={batch_size}; try --batch_size={smaller_batch}, which keeps the mathematics')
micro_steps = per_process // batch_size
tokens = {split: open_tokens(data_dir, split, meta, block_size) for split in ('train', 'val')}
if fits_on(device, tokens.values()):
    tokens = {split: DeviceTokens(ids, device, n_ids) for split, ids in tokens.items()}
    world.print(f'the {sum(map(len, tokens.values())):,} tokens of {data_dir} are on {device}')

# precision, compilation
flops = model.flops_per_token() * total_batch_size * (0 if eval_only else max_iters)
compile, compile_reason = runtime.choose_compile(compile, device, flops / world.size)
if device.type == 'cpu':
    runtime.keep_freed_memory()
autocast = runtime.autocast(dtype, device)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
if state is not None and state.get('scaler'):
    scaler.load_state_dict(state['scaler'])

# where the run stands: all that a checkpoint has to remember beside the tensors
iter_num = state['iter_num'] if state else 0  # updates done
same_data = state is not None and state.get('config', {}).get('dataset', dataset) == dataset
best_val_loss = float(state['best_val_loss']) if same_data else math.inf
evals_since_best = state.get('evals_since_best', 0) if state else 0
train_time = state.get('train_time', 0.0) if state else 0.0  # seconds, without evaluations
layout_version = state.get('version', 0) if state else None  # of the file resumed from; 0: nanoGPT wrote it
start_iter, state = iter_num, None  # the loaded tensors are no longer needed

threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
world.print(textwrap.fill(f'device {device}{threads}, dtype {dtype} ({dtype_reason}), compile {compile} '
                          f'({compile_reason})', 80, subsequent_indent='  '))
epochs = max_iters * total_batch_size / len(tokens['train'])
trained = [p for p in model.parameters() if p.requires_grad]
n_trained, n_params = sum(p.numel() for p in trained), model.get_num_params(non_embedding=False)
world.print(f'{model.get_num_params() / 1e6:.2f}M parameters'
            + (f', of which {n_trained:,} ({n_trained / n_params:.2%}) are trained' if adapted else '')
            + ('' if eval_only else f'; {max_iters} steps, {epochs:.2f} epochs'))
if not eval_only:
    world.print(f'a step of {total_batch_size:,} tokens = {world.size} process(es) x {micro_steps} micro-batch(es) x '
                f'{batch_size} x {block_size}')


row = row_of(tokens['train'])  # tokens of a row of conversations, or None


def get_batch(step):
    """
    -> (the micro-batches of this process at a step, on the device, number of targets in all of the step).

    A micro-batch is (x, y, share), x and y (batch_size, block_size), share that of the step's targets which are in it;
    times the number of processes, since DDP averages over them. So the loss of a step is the mean over its targets,
    however they fall on micro-batches and processes.
    """
    starts = train_windows(step, n_sequences, len(tokens['train']), block_size, seed, row)
    n_targets = count_targets(tokens['train'], starts, block_size)
    mine = starts[world.rank * per_process : (world.rank + 1) * per_process]
    micro_batches = []
    for chunk in mine.reshape(micro_steps, batch_size):
        x, y = to_device(gather(tokens['train'], chunk, block_size, n_ids), device)
        here = count_targets(tokens['train'], chunk, block_size)
        micro_batches.append((x, y, world.size * here / max(1, n_targets)))
    return micro_batches, n_targets


def evaluate():
    """
    Mean loss in nats a token: {'train': over eval_iters batches of fixed windows, or as many as val has if that is
    less, 'val': over the whole split}. The processes share the work, uncompiled, and dropout is off.
    """
    final_model.eval()
    # more windows at once than in training, for speed, as long as their logits stay below 16 MB
    n_windows = max(batch_size, 2**22 // (block_size * model.config.vocab_size))
    val = whole_windows(len(tokens['val']), block_size, row)
    n_train = min(eval_iters * batch_size, max(len(val), batch_size))
    windows = {'train': even_windows(n_train, len(tokens['train']), block_size, row), 'val': val}
    losses = {}
    for split, starts in windows.items():
        total, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
        mine = starts[world.rank :: world.size]
        for i in range(0, len(mine), n_windows):
            batch = gather(tokens[split], mine[i : i + n_windows], block_size, n_ids)
            x, y = to_device(batch, device)
            n_targets = (y >= 0).sum()
            with torch.no_grad(), autocast, torch.compiler.set_stance('force_eager'):
                total += final_model(x, y, return_logits=False)[1] * n_targets
            count += n_targets
        total, count = world.sum([total.item(), count.item()])
        if split == 'val' and not count:
            raise ValueError(f'{data_dir}: no token in val carries loss; prepare it anew, with more in val')
        losses[split] = total / max(1, count)
    final_model.train()
    return losses


def is_due(step):
    """Whether to evaluate before this step, or at the end."""
    return (step % eval_interval == 0 or step >= max_iters) and (step > start_iter or (step == 0 and eval_first))


def learning_rate_at(step):
    if not decay_lr:
        return learning_rate
    end = max_iters if lr_decay_iters is None else lr_decay_iters
    if lr_schedule == 'wsd':
        return optim.wsd(step, learning_rate, warmup_iters, end, min_lr, decay_fraction)
    return optim.cosine(step, learning_rate, warmup_iters, end, min_lr)


def explain_out_of_memory(kind, error, trace):
    """For sys.excepthook: where memory ran out, say which command takes the same steps with less of it."""
    if not runtime.out_of_memory(error):
        return explain_errors(kind, error, trace)
    changes = {'batch_size': smaller_batch, 'total_batch_size': total_batch_size} if smaller_batch else {}
    checkpoint.say_out_of_memory(error, iter_num, saved_iter, changes,
                           'Not even one sequence fits: lower --block_size, --n_layer or --n_embd')


saved_iter = tried_iter = start_iter  # the step of ckpt.pt, and of the last attempt to save one
sys.excepthook = explain_out_of_memory


def weights_of(model):
    """What a checkpoint has of a model; with LoRA the adapters alone."""
    return lora.adapters(model) if adapted else model.state_dict()


def save_checkpoint(is_best):
    """Write ckpt.pt, and best.pt if the last evaluation was the best. -> whether it could be written."""
    global saved_iter, tried_iter
    tried_iter = iter_num
    if not world.is_main:
        saved_iter = iter_num
        return True
    state = {'model': weights_of(final_model), 'optimizer': opt.state_dict(), 'model_args': asdict(model.config),
             'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': dict(config), 'tokenizer': text_tokenizer,
             'chat_template': chat_template, 'scaler': scaler.state_dict(), 'evals_since_best': evals_since_best,
             'train_time': train_time}
    if final_model is not model:
        state['unaveraged'] = weights_of(model)
    if adapted:
        state['lora'] = adapted
    is_saved = checkpoint.try_save(out_dir, state, is_best, bar.write)
    saved_iter = iter_num if is_saved else saved_iter
    return is_saved


def stop_not_finite(step, what):
    """End the run, with the last good checkpoint as it is."""
    where = f'{ckpt_path} is of step {saved_iter}' if saved_iter else 'there is no checkpoint yet'
    lr = learning_rate_at(step)
    rates = '--muon_lr and --learning_rate' if optimizer == 'muon' else '--learning_rate'
    raise SystemExit(f'step {step}: {what} (learning rate {lr:.3g}). Stopped without saving; {where}. Try a '
                     f'lower {rates}, a longer warmup, or --dtype=float32')


def log(**record):
    """Append a line to out_dir/log.jsonl, and send it to wandb."""
    checkpoint.log(out_dir, bar.write, **record)
    if wandb_log:
        wandb.log(record, step=record['step'])


# the folder of the run: what an earlier run left there is moved, not overwritten
wandb_log = wandb_log and world.is_main
if world.is_main and not eval_only:
    resolved = {**{key: globals()[key] if key != 'device' else str(device) for key in config},
                **{key: value for key, value in config.items() if key.startswith('lora_')}}
    checkpoint.open_folder(out_dir, resolved, start_iter, layout_version)
if wandb_log:
    import wandb

    wandb.init(project=wandb_project, name=wandb_run_name, config=dict(config))

interrupt = checkpoint.Interrupt(world.is_main)  # from here on a signal only asks to stop

# the training step, compiled if that works here
step_model = model
if compile:
    world.print('compiling the training step (--compile=False starts at once)')
    if device.type == 'cpu':  # the blocks share one compilation, five times as quick as that of the whole
        for block in model.transformer.h:
            block.compile(dynamic=False, options={'fallback_random': True})  # see model.Dropout: keys drawn once a call
    else:
        step_model = torch.compile(model, dynamic=False, fullgraph=True)
    try:
        x, y, _ = get_batch(iter_num)[0][0]
        with autocast:
            loss = step_model(x, y, return_logits=False)[1]
        loss.backward()
    except Exception as error:  # whatever is wrong with a compiler, training goes on without it
        if runtime.out_of_memory(error):
            raise
        why = f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
        print(f'WARNING: torch.compile failed ({why}); going on without it, slower. --compile=False silences this',
              file=sys.stderr)
        torch.compiler.set_stance('force_eager')
        step_model = model
    opt.zero_grad(set_to_none=True)
if world.size > 1:
    step_model = DDP(step_model, device_ids=[device.index] if device.type == 'cuda' else None)

# the loop ------------------------------------------------------------------------------------------------------------
bar = tqdm(total=max_iters, initial=start_iter, unit='step', disable=not (world.is_main and sys.stderr.isatty()),
           dynamic_ncols=True, smoothing=0.05, leave=False)
prefetch = ThreadPoolExecutor(max_workers=1)  # reads the next batch while the current one computes
next_batch = prefetch.submit(get_batch, iter_num)
unread = []  # (step, rate, loss and norm) of the steps whose numbers are still on the GPU
stop_reason = None
# Python's garbage collector would hold up a step now and then to look through all objects there are, most of them
# torch's: from now on it looks only when the run evaluates, and at what came after this
if compile:
    gc.collect()  # what compiling left behind
gc.freeze()
gc.disable()
logged_iter, logged_time = iter_num, train_time
t0 = time.perf_counter()
while True:
    # evaluate and save
    if is_due(iter_num) or eval_only:
        bar.set_description('evaluating')
        gc.collect()
        losses = evaluate()
        bar.set_description()
        is_best, former_best = losses['val'] < best_val_loss, best_val_loss
        best_val_loss, evals_since_best = min(best_val_loss, losses['val']), 0 if is_best else evals_since_best + 1
        if world.is_main:
            bar.write(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        if eval_only:
            break
        if not math.isfinite(losses['val']):  # the last update ruined the weights: they must not be saved
            stop_not_finite(iter_num, f'val loss is {losses["val"]}')
        if world.is_main:
            log(step=iter_num, train_loss=losses['train'], val_loss=losses['val'], train_time=round(train_time, 3))
        if iter_num == 0 or ((is_best or always_save_checkpoint) and not save_checkpoint(is_best)):
            best_val_loss = former_best  # the best is the best that is on disk
        if patience and evals_since_best >= patience:
            stop_reason = f'val loss has not improved for {patience} evaluations'
        t0 = time.perf_counter()  # evaluating and saving is not training time
    if iter_num >= max_iters or stop_reason:
        break

    # one step: forward and backward over the micro-batches, the gradient of the mean loss adding up in .grad
    torch.manual_seed(seed + 1_000_003 * (iter_num + 1) + world.rank)  # dropout too depends on (seed, step) alone
    lr = learning_rate_at(iter_num)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_scale']
    (micro_batches, n_targets), next_batch = next_batch.result(), prefetch.submit(get_batch, iter_num + 1)
    loss_sum = torch.zeros((), device=device)
    for micro_step, (x, y, share) in enumerate(micro_batches):
        if world.size > 1:  # average gradients over the processes once, with the last micro-batch
            step_model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            loss = step_model(x, y, return_logits=False)[1] * share
        loss_sum += loss.detach()
        scaler.scale(loss).backward()
    scaler.unscale_(opt)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if grad_clip and (device.type == 'cuda' or norm > grad_clip):  # to ask a GPU would be to wait for it
        torch.nn.utils.clip_grads_with_norm_(trained, grad_clip, norm)

    # read loss and norm, to stop before an update that would ruin the weights; and all processes together when one is
    # asked to stop. A GPU would idle meanwhile: there it is those of the step before, while this one computes, but
    # nothing is evaluated or saved before all are read
    unread.append((iter_num, lr, runtime.read_later(torch.stack((loss_sum, norm)))))
    records = []
    while len(unread) > (device.type == 'cuda' and not is_due(iter_num + 1) and not stop_reason):
        step, step_lr, numbers = unread.pop(0)
        loss, norm = numbers()
        loss, stop_requests = world.sum([loss / world.size, interrupt.reason is not None])
        if not math.isfinite(loss) or (not math.isfinite(norm) and not scaler.is_enabled()):
            stop_not_finite(step, f'loss is {loss}, norm of the gradient {norm}')
        if stop_requests:
            stop_reason = interrupt.reason or 'stopped by SIGTERM'  # which another process was sent
        records.append({'step': step, 'loss': loss, 'lr': step_lr, 'grad_norm': norm})
    if n_targets:  # of conversations a batch could have none, and weight decay alone is no step
        scaler.step(opt)
    scaler.update()
    if final_model is not model:
        optim.average_into(final_model, model, average_decay, iter_num)
    opt.zero_grad(set_to_none=True)
    iter_num += 1
    bar.update()

    # report
    if device.type == 'cuda' and is_due(iter_num):
        torch.cuda.synchronize()  # the update is training time, too, and evaluating waits for it anyway
    t1 = time.perf_counter()
    train_time, t0 = train_time + t1 - t0, t1
    shown = [record for record in records if record['step'] % log_interval == 0 or record['step'] == max_iters - 1]
    if world.is_main and shown:
        done = records[-1]['step'] + 1
        dt = (train_time - logged_time) / (done - logged_iter)  # seconds a step since the last line
        logged_iter, logged_time = done, train_time
        tokens_per_s = total_batch_size / dt
        contexts = n_sequences / world.size * block_size / model.config.block_size  # rows can be shorter than one
        mfu = runtime.mfu_of(model, contexts, dt)
        shown_mfu = 'n/a' if mfu is None else f'{mfu:.1%}'
        left = f', {tqdm.format_interval((max_iters - done) * dt)} left' if bar.disable else ''  # the bar says it
        bar.set_postfix_str(f'loss {shown[-1]["loss"]:.3f}, {tokens_per_s:,.0f} tok/s', refresh=False)
        for record in shown:
            bar.write(f'iter {record["step"]}: loss {record["loss"]:.4f}, time {dt * 1e3:.2f}ms, mfu {shown_mfu}, '
                      f'norm {record["grad_norm"]:.2f}, {tokens_per_s / 1e3:.1f}k tok/s{left}')
            log(**record, ms=round(dt * 1e3, 3), mfu=mfu, tokens_per_s=round(tokens_per_s),
                tokens=(record['step'] + 1) * total_batch_size, train_time=round(train_time, 3))

# the end: save what was not saved, say what can be done with it ------------------------------------------------------
bar.close()
prefetch.shutdown(wait=False, cancel_futures=True)
if not eval_only and tried_iter < iter_num:
    save_checkpoint(is_best=False)
parallel.disconnect()
if world.is_main and not eval_only:
    if stop_reason:
        print(f'{stop_reason} after step {iter_num}. To go on:\n  {checkpoint.command(init_from="resume")}')
    else:
        best = f'; best val loss {best_val_loss:.4f}' if math.isfinite(best_val_loss) else ''
        print(f'{iter_num} steps, {train_time:.1f} s of training{best}')
        if sample_tokens and text_tokenizer:
            final_model.eval()
            torch.compiler.set_stance('force_eager')
            try:
                *_, samples = generate_texts(final_model, tokenizer.from_dict(text_tokenizer), [sample_prompt],
                                             sample_tokens, crop_prompt=True, temperature=0.8, top_k=200)
                print(f'---------------\n{sample_prompt}{samples[0].text}\n---------------')
            except ValueError as error:  # the run is done and saved; a prompt that can't be encoded must not fail it
                print(f'no sample: {error}')
        start = [f'--start={sample_prompt}'] if sample_prompt.strip() else []
        if saved_iter:
            print('sample from it:\n  ' + shlex.join(['python', 'sample.py', f'--out_dir={out_dir}', *start]))
    if wandb_log:
        wandb.finish()
if saved_iter < iter_num:
    raise SystemExit(f'the state of step {iter_num} could not be saved; {ckpt_path} is older')
