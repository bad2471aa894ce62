"""
Set up sample.py, flatgpt.batch and posttrain.chat: machine and constraints.

    model, tokenizer, template, line = open_model(config)
    dtype = prepare(model, config, rows=10, n_tokens=500)
    constraint = constraint_of(config, tokenizer)
    warm_up(model, generate_texts(model, tokenizer, prompts, sampling))
"""

import itertools
import json
import math
import sys
import textwrap
from contextlib import contextmanager

import torch

from configurator import UserError, printable
from flatgpt import parallel, pretrained, products, runtime
from flatgpt.constrain import Constraint
from flatgpt.files import read_text
from flatgpt.quantize import for_decoding, has_bf16_products


def open_model(config):
    """Open the model of the settings; see pretrained.open_model. Checks slide."""
    opened = pretrained.open_model(config['init_from'], config['out_dir'], config['which'])
    block_size = opened[0].config.block_size
    if config['slide'] > block_size:
        raise UserError(f'slide={config["slide"]}: expected 1 to {block_size}, the context of the '
                        f'model')
    return opened


def prepare(model, config, rows=1, n_tokens=math.inf, local_rank=None):
    """Choose device, precision and compilation, and convert the model; -> the dtype.

    config: the settings device, dtype, quantize and compile. rows: samples at once; None: a
    changing number, as of a server. n_tokens: of each. local_rank: of a script for several
    processes. Prints the choices to stderr. Raises UserError for a setting that cannot be met.
    """
    device, dtype = runtime.choose_device(config['device'], local_rank), config['dtype']
    runtime.use_cores()
    if device.type == 'cpu':
        runtime.keep_freed_memory()
    # a token costs reading the weights, unless they are few and stay in the CPU's cache
    is_large = model.get_num_params() > 30e6
    if config['quantize'] and dtype != 'auto':
        raise UserError(f'dtype={dtype!r}: expected \'auto\' with --quantize={config["quantize"]}, '
                        f'which is a precision')
    # a second of compilation pays; a batch is faster by instructions for bf16
    pays = (device.type == 'cuda' or config['quantize'] or is_large
            and (rows in (1, None) or not has_bf16_products())
            and (rows or math.inf) * n_tokens >= 100)
    compile, compile_reason = runtime.choose_compile(
        config['compile'], device, math.inf if pays else 0)
    if compile and device.type == 'cpu' and products.load() is None:
        compile, compile_reason = False, 'that needs Linux and g++ here'
    if config['quantize']:
        dtype, dtype_reason = config['quantize'], 'as set'
    elif dtype == 'auto' and device.type == 'cpu':
        dtype, dtype_reason = (('bfloat16', 'half as much to read') if is_large and
                               (has_bf16_products() or compile)
                               else ('float32', 'small, or no bf16 here'))
    else:
        dtype, dtype_reason = runtime.choose_dtype(dtype, device)
    choices = runtime.explain_choices(device, (dtype, dtype_reason), (compile, compile_reason))
    if parallel.from_environment().is_main:
        print(textwrap.fill(choices, 80, subsequent_indent='  '), file=sys.stderr, flush=True)
    torch_dtype = torch.int8 if dtype == 'int8' else runtime.DTYPES[dtype]
    for_decoding(model.to(device), torch_dtype, compile, any_rows=rows is None)
    return dtype


def warm_up(model, steps):
    """Compile the step of one token, if prepare() chose that, by three steps."""
    if model.has_compiled_step:
        if parallel.from_environment().is_main:
            print('compiling the step of one token (--compile=False starts at once)',
                  file=sys.stderr, flush=True)
        model.has_compiled_step = runtime.compile_or_eager(lambda: list(itertools.islice(steps, 3)))


@contextmanager
def explain_out_of_memory(remedy):
    """Exit with a remedy, and without a traceback, where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        raise SystemExit(f'out of memory; {remedy}') from None


def constraint_of(config, tokenizer):
    """Build the Constraint of the settings choices, regex and json_schema, or None.

    Raises UserError for more than one of them, and for a stop text beside one. Raises it too if the
    shortest match takes more than max_new_tokens.
    """
    given = [name for name in ('choices', 'regex', 'json_schema') if config[name]]
    if not given:
        return None
    name, value = given[0], config[given[0]]
    if len(given) > 1 or config['stop']:
        given += ['stop'] * bool(config['stop'])
        raise UserError(f'{" and ".join(given)} are set: expected only one of choices, regex and '
                        f'json_schema, which end the text themselves, and no stop')
    if name == 'choices':
        value = split_texts(name, value, separator=',')
    elif name == 'json_schema' and not value.lstrip().startswith(('{', '[')):
        value = read_text(value)
    constraint = Constraint(tokenizer, **{name: value})
    constraint.check_length(config['max_new_tokens'])
    return constraint


def split_texts(name, value, separator=None):
    """Split a setting, a JSON list of texts or texts between separators; '' -> []."""
    if not value.startswith('['):
        if separator is None:
            return [value] if value else []
        return [text.strip() for text in value.split(separator)]
    try:
        texts = json.loads(value)
    except ValueError:
        texts = []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f'{name}={value!r} begins like a JSON list: expected texts, ["a", "b"]')
    return texts


def for_terminal(text):
    """Escape control characters at a terminal; in a pipe nothing."""
    return printable(text) if sys.stdout.isatty() else text
