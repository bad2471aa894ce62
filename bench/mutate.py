"""
Damage files: their bytes, or the tree of values that they hold.

    mutate(content, 'json', random.Random(7))  # -> bytes, another file

A format has a reader of its tree and a writer. Bytes get flips, cuts, copies, insertions, runs of
zeros and large numbers. Trees lose, gain, rename, retype and repeat entries, and get values that
readers fear. Half of the mutations are of bytes, or all where a format has no tree.
"""

import contextlib
import functools
import io
import json
import math
import pickle
import re
import struct
import warnings
import zipfile

import torch

# what a value becomes
STRANGE = [None, True, False, 0, 1, -1, 2, 255, 65536, 100_000, 2**31, 2**63, 10**12, 10**30,
           10**400, -(10**12), 0.5, 1e308, 1e-308, math.nan, math.inf, -math.inf, '', ' ', 'x', '0',
           'O', 'float16', '../../x', '/etc/passwd', 'gpt2', 'some/name', '\0', '\ud800', '\ufeff',
           '\x1b[31m', 'a' * 100_000, [], {}, [[]], [None], {'': {}}, ['a'] * 1000, [0] * 1000]
DEEP = 400  # levels; json writes no more than about 900


# Bytes --------------------------------------------------------------------------------------------

def mutate_bytes(data, rng):
    """Change bytes in one to four places."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 2, 4, 16, 64, 1024)))
        data = rng.choice((flip, cut, end, repeat, insert, zero, number))(data, i, j, rng)
    return data


def flip(data, i, j, rng):
    """Flip a bit."""
    return data[:i] + bytes(b ^ 1 << rng.randrange(8) for b in data[i : i + 1]) + data[i + 1 :]


def cut(data, i, j, rng):
    """Remove a range."""
    return data[:i] + data[j:]


def end(data, i, j, rng):
    """End the file early."""
    return data[:i]


def repeat(data, i, j, rng):
    """Write a range again, a few or many times."""
    return data[:i] + data[i:j] * rng.choice((2, 3, 100)) + data[j:]


def insert(data, i, j, rng):
    """Insert random bytes, or those that mean something to a reader."""
    words = [b'\xff', b'\xfe\xff', b'\xef\xbb\xbf', b'\0', b'\n', b'\r', b'"', b"'", b',', b'{',
             b'[', b'[' * 50_000, b'{"a":' * 50_000, b'NaN', b'null', b'\\ud800', b'\x1b[2J',
             b'\t', rng.randbytes(8)]
    return data[:i] + rng.choice(words) + data[i:]


def zero(data, i, j, rng):
    """Fill a range with zeros."""
    return data[:i] + bytes(j - i) + data[j:]


def number(data, i, j, rng):
    """Replace a number written in digits by another."""
    numbers = list(re.finditer(rb'\d+', data[:100_000]))
    if not numbers:
        return flip(data, i, j, rng)
    match = rng.choice(numbers)
    new = rng.choice((b'0', b'-1', b'1', b'99999', b'4294967296', b'9' * 20, b'9' * 5000, b'1e999'))
    return data[: match.start()] + new + data[match.end() :]


# Trees --------------------------------------------------------------------------------------------

def copied(tree):
    """Copy the containers of a tree."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(item) for item in tree] if isinstance(tree, list | tuple) else tree


def places(tree):
    """Return [(container, key), ...] of a tree, upper levels first."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(min(len(tree), 50))
    inner = [place for key in keys for place in places(tree[key])]
    return [(tree, key) for key in keys] + inner


def mutate_tree(tree, rng):
    """Change a tree in one to three places; -> the new one."""
    root = [copied(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        all_places = places(root)
        # half of the time an upper level, which has few places; seldom the tree itself
        upper = all_places[1 : 1 + len(root[0])] if isinstance(root[0], dict | list) else []
        chosen = upper if upper and rng.random() < 0.5 else all_places[1:]
        if not chosen or rng.random() < 0.02:
            return rng.choice(STRANGE)
        rng.choice((drop, rename, retype, retype, vary, vary, nest, double))(
            *rng.choice(chosen), rng)
    return root[0]


def drop(container, key, rng):
    """Remove an entry."""
    del container[key]


def rename(container, key, rng):
    """Give an entry another name, or exchange two items."""
    if isinstance(container, dict):
        new = rng.choice((f'{key}s', '', 'x', 0, rng.choice(list(container))))
        container[new] = container.pop(key)
    else:
        other = rng.randrange(len(container))
        container[key], container[other] = container[other], container[key]


def retype(container, key, rng):
    """Put a strange value in the place of a value."""
    container[key] = rng.choice(STRANGE)


def vary(container, key, rng):
    """Change a value without changing its type."""
    value = container[key]
    if isinstance(value, torch.Tensor):
        container[key] = vary_tensor(value, rng)
    elif isinstance(value, bool) or value is None:
        container[key] = not value
    elif isinstance(value, int | float):
        third = value / 3 if abs(value) < 2**1000 else 0.5  # no float is larger
        container[key] = rng.choice((-value, value + 1, value - 1, 1000 * value, third, 0))
    elif isinstance(value, str):
        i = rng.randrange(len(value) + 1)
        container[key] = rng.choice((value[:i], value[i:], value * 2, value + 'x', value.upper(),
                                     value[:i] + '\ud800' + value[i:], value[:i] + '\0'))
    elif isinstance(value, list):
        container[key] = rng.choice((value[:1], value + value, value[::-1], dict(enumerate(value))))
    else:
        container[key] = rng.choice((list(value), list(value.values()), {}))


def nest(container, key, rng):
    """Wrap a value in few or many lists or objects."""
    for _ in range(rng.choice((1, 2, DEEP))):
        container[key] = [container[key]] if rng.random() < 0.5 else {'a': container[key]}


def double(container, key, rng):
    """Add an entry like another, or a value that does not belong there."""
    if isinstance(container, dict):
        container[f'{key}2'] = rng.choice((container[key], rng.choice(STRANGE)))
    else:
        container.insert(key, rng.choice((container[key], rng.choice(STRANGE))))


def vary_tensor(tensor, rng):
    """Return a tensor of another shape, type, layout, place or content."""
    t = tensor.detach()
    ways = [
        lambda: t.reshape(-1)[:1].clone(), lambda: torch.zeros(()), lambda: torch.zeros(0),
        lambda: torch.cat((t.reshape(-1), t.reshape(-1))), lambda: t[None], lambda: t.T.clone(),
        lambda: t.reshape(-1)[:1].expand(t.shape), lambda: t.T, lambda: t.flip(0),
        lambda: t.to(torch.bfloat16), lambda: t.double(), lambda: t.to(torch.int8),
        lambda: t.to(torch.complex64), lambda: t.bool(), lambda: t.to_sparse(),
        lambda: torch.empty(t.shape, device='meta'), lambda: torch.full_like(t, math.nan),
        lambda: torch.full_like(t, 1e38), lambda: torch.nn.Parameter(t.clone()), t.tolist,
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: torch.zeros(1, 1).expand(10**5, 10**5), lambda: torch.zeros(64)[8:].view(7, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return rng.choice(ways)()


# Formats: {name: (read a tree, write it, more mutations)} -----------------------------------------

def to_json(tree):
    return json.dumps(tree).encode()


def read_lines(data):
    return [json.loads(line) for line in data.splitlines()]


def write_lines(tree):
    return b''.join(to_json(item) + b'\n' for item in (tree if isinstance(tree, list) else [tree]))


@functools.cache  # slow, and asked for the same files again and again
def read_torch(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def write_torch(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def read_safetensors(data):
    """Return the header of a safetensors file, the other bytes as last entry."""
    n, = struct.unpack('<Q', data[:8])
    return {**json.loads(data[8 : 8 + n]), 'rest': data[8 + n :]}


def write_safetensors(tree):
    rest = tree.pop('rest', b'') if isinstance(tree, dict) else b''
    header = json.dumps(tree).encode()
    return struct.pack('<Q', len(header)) + header + (rest if isinstance(rest, bytes) else b'')


def repack(data, rng):
    """Change a file of a zip archive, with right checksums, or compress all."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, 'w') as new:
        names = old.namelist()
        chosen, how = rng.choice(names), rng.choice(('change', 'change', 'deflate', 'drop', 'grow'))
        if rng.random() < 0.5:
            chosen = next(name for name in names if name.endswith('data.pkl'))
        for name in names:
            content = old.read(name)
            if name == chosen and how == 'drop':
                continue
            if name == chosen and how == 'change':
                content = mutate_bytes(content, rng)
            if name == chosen and how == 'grow':
                content += bytes(10**7)
            # a ZipInfo has no time of day: a case is always the same
            new.writestr(zipfile.ZipInfo(name), content,
                         zipfile.ZIP_DEFLATED if how in ('deflate', 'grow') else 0)
    return file.getvalue()


FORMATS = {'bytes': None, 'json': (json.loads, to_json), 'jsonl': (read_lines, write_lines),
           'pickle': (pickle.loads, pickle.dumps), 'torch': (read_torch, write_torch),
           'safetensors': (read_safetensors, write_safetensors)}


def mutate(data, form, rng):
    """Damage a file; -> (its new content, whether its checksums still fit)."""
    if FORMATS[form] is None or rng.random() < 0.5:
        if form == 'torch' and rng.random() < 0.5:
            return repack(data, rng), True
        return mutate_bytes(data, rng), False
    read, write = FORMATS[form]
    while True:
        # a tensor that cannot change so, or a tree that the format cannot hold
        with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError,
                                 pickle.PicklingError):
            return write(mutate_tree(read(data), rng)), True
