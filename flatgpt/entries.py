"""
Read files of torch, and check the entries of any file by rules.

    class Progress(TypedDict):
        step: Natural
        weights: dict[str, Tensor]

    progress = conform(read_torch(path), Progress)  # UserError('step=-1: expected 0 or more')

A rule is one of configurator's, Tensor, list[rule], tuple[rule, rule], dict[rule, rule], a
TypedDict, or a union of these. An entry that a TypedDict does not name is kept as it is.
"""

import math
import operator
import os
import pickle
import zipfile
from functools import reduce
from types import UnionType
from typing import (
    Annotated,
    Literal,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.serialization import get_unsafe_globals_in_checkpoint

from configurator import Count, Natural, Positive, Range, Share, UserError, fitted
from flatgpt.owners import local

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_torch(path):
    """Read a file of torch.save; its checksums and sizes come before its content.

    The tensors take the memory that they have in the file. Raises what zipfile, pickle and torch
    raise, and UserError for sizes that contradict the file.
    """
    if not zipfile.is_zipfile(path):
        raise pickle.UnpicklingError('not a file of torch.save')
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (any(entry.compress_type for entry in entries)
                or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
            raise UserError('its content is compressed, which torch.save does not do')
        # torch checks no checksums; under torchrun one process does, and its error ends all
        is_first = os.environ.get('WORLD_SIZE', '1') == '1' or os.environ.get('LOCAL_RANK') == '0'
        if is_first and (bad := archive.testzip()):
            raise UserError(f'the checksum of {bad} is wrong')
    # here torch.load would search its own long message, in a time that grows as the square
    if unsafe := get_unsafe_globals_in_checkpoint(path):
        raise pickle.UnpicklingError(f'it names {unsafe[0]:.80}')
    room = sum(entry.file_size for entry in entries if '/data/' in entry.filename)

    def in_memory(storage, location):
        """Copy a storage from the mapped file to memory of its own."""
        nonlocal room
        room -= storage.nbytes()
        return storage.clone() if room >= 0 else storage

    # mapped: torch reads storages beyond their bytes in the file otherwise
    content = torch.load(path, map_location=in_memory, weights_only=True, mmap=True)
    if room:
        raise UserError('its tensors have other sizes than their bytes in the file')
    return content


def glance(path):
    """Return a checkpoint's content, its tensors left on the disk. Raises UserError."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # what torch and pickle raise for damaged files
        raise UserError(f'{path} is damaged, or no checkpoint ({type(error).__name__}); restore a '
                        f'copy') from error
    return check_content(content, Checkpoint, path)


def conform(value, rule, name=''):
    """Return `value`, its containers copied, where it follows a rule.

    name: of the value, for errors; '' for the whole content. A float may be a tensor of one
    number. Raises UserError naming the first entry that is missing or outside its rule.
    """
    if rule is float and isinstance(value, Tensor) and dense(value, name).numel() == 1:
        value = value.item()
    parts = get_args(rule) if get_origin(rule) in (Union, UnionType) else (rule,)
    for part in parts:
        kind, of = get_origin(part) or part, get_args(part)
        if kind is Tensor and isinstance(value, Tensor):
            return dense(value, name)
        if kind is list and of and isinstance(value, list | tuple):
            return [conform(item, of[0], f'{name}[{i}]') for i, item in enumerate(value)]
        if kind is tuple and isinstance(value, list | tuple) and len(value) == len(of):
            return tuple(conform(item, rule, f'{name}[{i}]')
                         for i, (item, rule) in enumerate(zip(value, of, strict=True)))
        if kind is dict and of and isinstance(value, dict):
            return {conform(key, of[0], f'a key of {name}'):
                    conform(item, of[1], f'{name}[{key!r:.80}]') for key, item in value.items()}
        if is_typeddict(kind) and isinstance(value, dict):
            return conform_entries(value, kind, name)
    try:
        return fitted(value, reduce(operator.or_, map(plain, parts)))
    except UserError as error:
        is_short = isinstance(value, bool | int | float | str | None)
        shown = f'={value!r:.80}' if is_short else f' is a {type(value).__name__}'
        raise UserError(f'{name or "its content"}{shown}: {error}') from None


def conform_entries(values, rule, name):
    """Return a dict whose entries follow a TypedDict."""
    if missing := sorted(rule.__required_keys__ - values.keys()):
        raise UserError(f'{name or "it"} has no {", ".join(missing)}')
    rules = get_type_hints(rule, include_extras=True)
    return {**values, **{key: conform(values[key], rules[key], f'{name}.{key}'.lstrip('.'))
                         for key in rules if key in values}}


def check_content(content, rule, path):
    """Return a checkpoint's content if it follows a TypedDict. Raises UserError."""
    try:
        return conform(content, rule)
    except UserError as error:
        raise UserError(f'{path} is no checkpoint: {error}; expected a dict with the keys '
                        f'{", ".join(sorted(rule.__required_keys__))}') from None


def plain(rule):
    """Return the type of a container's rule, for errors; other rules as they are."""
    kind = dict if is_typeddict(rule) else get_origin(rule)
    return kind if kind in (list, tuple, dict) else rule


def dense(tensor, name):
    """Return a tensor of floats whose elements lie side by side in memory of its own.

    Kernels write past the end of others: sparse, expanded, or without memory (meta).
    """
    is_dense = (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
                and tensor.device.type == 'cpu' and tensor.dtype in FLOATS
                and tensor.is_contiguous())
    if not is_dense:
        raise UserError(f'{name} is a tensor of {tensor.dtype}, {tensor.layout}, on '
                        f'{tensor.device}, expected floats on the CPU, side by side')
    return tensor


class NoDraws(TorchFunctionMode):
    """Leave out the initialisation of parameters."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        # on the device 'meta' the first draw would import sympy, which takes 2 s
        is_draw = getattr(func, '__module__', None) == 'torch.nn.init'
        return None if is_draw else func(*args, **kwargs or {})


def without_memory(kind, config, n_tensors):
    """Build the GPT or Critic of a config, with shapes but neither memory nor weights.

    n_tensors: those in its file. Raises UserError for sizes beyond 64 bits, and for more layers, if
    they take long to build.
    """
    if config.n_layer > max(100, n_tensors):
        raise UserError(f'n_layer={config.n_layer:,}, but the file has {n_tensors:,} tensors')
    try:
        with torch.device('meta'), NoDraws():
            return kind(config)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'sizes beyond 64 bits: {str(error).splitlines()[0][:100]}') from error


# The entries of checkpoints that are read. See checkpoint.py for their meaning --------------------

class Tokenizer(TypedDict):
    """Describe a tokenizer, for tokenizer.from_dict()."""

    kind: str


class Settings(TypedDict, total=False):
    """Name the settings of a run that later commands read."""

    init_from: str
    dataset: str
    optimizer: str
    algorithm: str
    reward_model: str


class Sizes(TypedDict, total=False):
    """Name the fields of GPTConfig that are read beside it."""

    block_size: Count
    vocab_size: Count


class Group(TypedDict):
    """Name the parameters of an optimizer's group, by number."""

    params: list[int]


class Optimizer(TypedDict):
    """Hold the state_dict() of an optimizer: moments by a parameter's number."""

    state: dict[int, dict[str, Tensor | float]]
    param_groups: list[Group]


class Scaler(TypedDict):
    """Hold the state_dict() of a GradScaler. That of one that is off is empty."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Share
    growth_interval: Count
    _growth_tracker: Natural


class Scaled(TypedDict):
    """Name the entry of a run in float16."""

    scaler: Scaler


class Adapted(TypedDict):
    """Describe LoRA's adapters, see lora.start()."""

    init_from: str
    from_here: str | None
    digest: str
    rank: Count
    alpha: Positive
    targets: list[str]


class Adapters(Adapted, total=False):
    """Add the precision of the frozen weights."""

    bits: Literal[32, 8, 4]
    int8: bool  # before 2026-12 in place of bits


class Pairs(TypedDict):
    """Identify the pairs that a reward model or dpo learned from."""

    sha256: str
    val_fraction: float


def check_moments(state):
    """Raise UserError for moments that no update leaves: NaN, infinite, shared."""
    places = []
    for i, moments in state.items():
        for name, value in moments.items():
            value = local(value)
            if not value.numel():
                continue
            low, high = map(float, torch.aminmax(value))
            least = 0.0 if name in ('step', 'exp_avg_sq') else -math.inf
            if not least <= low <= high < math.inf or low == -math.inf:
                raise UserError(f'the optimizer state in the checkpoint has {name} of {low:g} to '
                                f'{high:g} for parameter {i}; expected finite numbers, a step and '
                                f'squares of at least 0; restore a copy')
            places.append(value.untyped_storage().data_ptr())
    if len(set(places)) < len(places):
        raise UserError('the optimizer state in the checkpoint has two moments in one place; '
                        'restore a copy')


def load_optimizer(optimizer, saved, may_be_empty=False):
    """Load a saved state_dict, its moments compared with the parameters.

    Kernels would write past the end of smaller ones. may_be_empty: whether no update may have been
    saved. Raises UserError if it is of other parameters.
    """
    groups = optimizer.state_dict()['param_groups']  # hyperparameters stay those of this run
    expected = {}
    for numbers, group in zip(groups, optimizer.param_groups, strict=True):
        names = ('momentum_buffer',) if 'momentum' in group else ('exp_avg', 'exp_avg_sq')
        expected |= {i: {'step': (torch.float32, ()), **dict.fromkeys(names, (p.dtype, p.shape))}
                     for i, p in zip(numbers['params'], group['params'], strict=True)}
    # nanoGPT's steps may be plain numbers
    state = {i: {name: torch.as_tensor(moment) for name, moment in moments.items()}
             for i, moments in saved['state'].items()}
    actual = {i: {name: (moment.dtype, moment.shape) for name, moment in moments.items()}
              for i, moments in state.items()}
    if ([g['params'] for g in groups] != [g['params'] for g in saved['param_groups']]
            or actual != expected and (actual or not may_be_empty)):
        i = next((i for i in (*expected, *actual) if actual.get(i) != expected.get(i)), None)
        raise UserError(f'the optimizer state in the checkpoint is of another set of parameters: '
                        f'for number {i} it has {actual.get(i)}, expected {expected.get(i)}; '
                        f'to train the weights with new moments: --init_from=ITS_FOLDER and '
                        f'another --out_dir')
    check_moments(state)
    optimizer.load_state_dict({'state': state, 'param_groups': groups})


class Mixed(TypedDict):
    """Hold the place of a run in its datasets, in sequences."""

    anneal_start: Natural
    drawn: dict[str, Natural]


class Shards(TypedDict):
    """Name the folder with the tensors of a sharded checkpoint, and its files' CRC-32."""

    folder: str
    checksums: dict[str, Natural]


class Required(TypedDict):
    """Name what nanoGPT's checkpoints have too."""

    model: dict[str, Tensor]
    model_args: Sizes
    iter_num: Annotated[int, Range(least=0, below=2**40)]
    best_val_loss: float


class Checkpoint(Required, total=False):
    """Name the entries of a checkpoint."""

    version: Natural
    optimizer: Optimizer
    config: Settings
    tokenizer: Tokenizer | None
    chat_template: str | None
    evals_since_best: Natural
    train_time: Annotated[float, Range(least=0, below=1e12)]  # seconds
    seen: Annotated[int, Range(least=0, below=2**62)] | None
    data: str
    wandb_id: str | None
    lora: Adapters
    shards: Shards
    mixture: Mixed
    reward_model: bool
    classes: list[str]
    labels: str
    report: dict[str, float]
    measure: str
    reference: str
    questions: str | None
    judge: str | None
    pairs: Pairs
    value_model: dict[str, Tensor]
    value_optimizer: Optimizer


class Origin(Settings):
    """Name the model that a run began with."""

    init_from: str


class Speaker(TypedDict):
    """Name what a reward model needs to score answers, beside the weights."""

    tokenizer: Tokenizer
    chat_template: str | None


class Labels(TypedDict):
    """Name what a classifier needs to label texts, beside the weights."""

    tokenizer: Tokenizer | None
    classes: list[str]


class Classification(Labels):
    """Name what a run of classify needs. labels: a hash of the labelled texts."""

    optimizer: Optimizer
    config: Origin
    labels: str
    report: dict[str, float]


class Posttraining(Speaker):
    """Name what a run of reward, rl or dpo needs to go on."""

    optimizer: Optimizer
    config: Origin


class PPO(Posttraining):
    """Name what rl needs with algorithm='ppo'."""

    value_model: dict[str, Tensor]
    value_optimizer: Optimizer
