"""
Write and read a checkpoint's tensors in parts, each process its own.

    state = write(out_dir, state, group)  # all processes; -> the content of ckpt.pt
    state = read(path, state)                   # whole tensors, in one process
    load(path, folder, tensors)                 # all processes, each its parts

The tensors are in out_dir/shards-STEP, in the layout of torch.distributed.checkpoint, which any
number of processes can read. ckpt.pt holds everything else, names the folder, and is renamed last:
until then the checkpoint before is the valid one.
"""

import glob
import itertools
import os
import pathlib
import pickle
import re
import shutil
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.filesystem import _StorageInfo

from configurator import UserError
from flatgpt.entries import FLOATS
from flatgpt.files import sync_folder
from flatgpt.outdir import SHARDS, UNKNOWN, named_shards

FILE = re.compile(r'__\d{1,9}_\d{1,9}\.distcp|\.metadata')
TENSOR = re.compile(r'model\..+|optimizer\.\d{1,9}\.(exp_avg|exp_avg_sq|momentum_buffer)')
TIED = 'lm_head.weight', 'transformer.wte.weight'  # one tensor with tie_embeddings


class Unpickler(pickle.Unpickler):
    """Read .metadata, which may name classes of torch's checkpoints alone."""

    known = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in (
        kinds.Metadata, kinds.MetadataIndex, kinds.TensorStorageMetadata, kinds.TensorProperties,
        kinds.ChunkStorageMetadata, kinds.StorageMeta, kinds._MEM_FORMAT_ENCODING, _StorageInfo,
        torch.Size, torch.serialization._get_layout)} | {str(dtype): dtype for dtype in FLOATS}

    def find_class(self, module, name):
        if module.startswith('pathlib') and name in ('PosixPath', 'WindowsPath'):
            return pathlib.PurePath  # of the folder where it was written
        if f'{module}.{name}' not in self.known:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return self.known[f'{module}.{name}']


class Reader(dcp.FileSystemReader):
    """Read the parts of tensors from files whose checksums are right."""

    def read_metadata(self, *args, **kwargs):
        """Return the description of all tensors. Raises what pickle raises, and UserError."""
        with open(os.path.join(self.path, '.metadata'), 'rb') as file:
            described = Unpickler(file).load()
        room = sum(os.path.getsize(path) for path in glob.glob(os.path.join(self.path, '*')))
        for name, tensor in described.state_dict_metadata.items():
            if not (isinstance(tensor, kinds.TensorStorageMetadata) and TENSOR.fullmatch(name)):
                raise UserError(f'it names {name}, which is no tensor of a model or an optimizer')
            if tensor.properties.dtype not in FLOATS:
                raise UserError(f'{name} is of {tensor.properties.dtype}, expected floats')
            check_chunks(name, tensor)
            room -= tensor.size.numel() * tensor.properties.dtype.itemsize
        files = {place.relative_path for place in described.storage_data.values()}
        if room < 0 or not all(map(FILE.fullmatch, files)):
            raise UserError('it describes tensors that are not in its files')
        described.storage_meta = kinds.StorageMeta(load_id=self.load_id)
        return described


def check_chunks(name, tensor):
    """Raise UserError unless the chunks of a tensor make up the whole tensor."""
    n = 0
    for chunk in tensor.chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        is_inside = min((*tensor.size, *chunk.offsets, *chunk.sizes), default=0) >= 0 and all(
            end <= size for end, size in zip(ends, tensor.size, strict=True))
        n += chunk.sizes.numel() if is_inside else -1
    if n != tensor.size.numel():
        raise UserError(f'the chunks of {name} do not make up its {tuple(tensor.size)}')


def checksum(path):
    """Return the CRC-32 of a file; a second per gigabyte."""
    crc = 0
    with open(path, 'rb') as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def parts_of(state):
    """Split a checkpoint's content into ({name: sharded tensor}, the rest)."""
    rest = {**state, 'model': {}}
    tensors = {f'model.{name}': tensor for name, tensor in state['model'].items()}
    if state['model_args']['tie_embeddings']:
        del tensors[f'model.{TIED[0]}']
    optimizer = state['optimizer']
    rest['optimizer'] = {**optimizer, 'state': {
        i: {name: value for name, value in moments.items() if not hasattr(value, 'device_mesh')}
        for i, moments in optimizer['state'].items()}}
    tensors |= {f'optimizer.{i}.{name}': value for i, moments in optimizer['state'].items()
                for name, value in moments.items() if hasattr(value, 'device_mesh')}
    return tensors, rest


def write(out_dir, state, group, problem=None):
    """Write the tensors of a state, in all processes; -> the content of its ckpt.pt.

    group: of gloo, which no other thread uses. problem: an error of the main process, raised in
    all. Raises OSError in all processes if a disk is full; then the new folder is gone.
    """
    tensors, rest = parts_of(state)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name = [None if problem or rank else new_folder(out_dir, state['iter_num'])]
    dist.broadcast_object_list(name, 0, group)
    if name[0] is None:
        raise problem or OSError('the main process cannot write to its folder')
    folder = os.path.join(out_dir, name[0])
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
        cause = None
    except dcp.CheckpointException as error:  # equal in all processes
        cause = next(cause for cause, _ in error.failures.values())
        if not (isinstance(cause, OSError) or 'inline_container' in str(cause)):
            raise
    # this process's checksums, or its error
    sums = {}
    try:
        for file in [f'__{rank}_0.distcp'] + ['.metadata'] * (rank == 0):
            if not cause and os.path.exists(path := os.path.join(folder, file)):
                sums[file] = checksum(path)
        if not cause:
            sync_folder(folder)
    except OSError as error:
        cause = error
    results = [None] * size
    dist.all_gather_object(results, (sums, cause and str(cause).splitlines()[0]), group)
    if failed := [why for _, why in results if why]:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(failed[0])
    sums = {file: crc for process_sums, _ in results for file, crc in process_sums.items()}
    return {**rest, 'shards': {'folder': name[0], 'checksums': sums}}


def new_folder(out_dir, step):
    """Return the name of a folder that no checkpoint of out_dir names."""
    named = named_shards(out_dir)
    for name in itertools.chain([f'shards-{step}'], (f'shards-{step}-{i}' for i in range(2, 99))):
        path = os.path.join(out_dir, name)
        if not os.path.lexists(path):
            return name
        if not {name, UNKNOWN} & named and os.path.isdir(path):  # of a save that a crash ended
            shutil.rmtree(path, ignore_errors=True)
            return name
    return name


def named_folder(path, state):
    """Return the folder that a checkpoint names. Raises UserError for another name's."""
    folder, names = state['shards']['folder'], sorted(state['shards']['checksums'])
    if not SHARDS.fullmatch(folder) or not all(map(FILE.fullmatch, names)):
        raise UserError(f'{path} names the shards {folder}: {", ".join(names[:3])}; expected '
                        f'shards-STEP with .metadata and files such as __0_0.distcp')
    return os.path.join(os.path.dirname(path), folder)


def folder_of(path, state, rank=0, size=1):
    """Check the files of a checkpoint's shards; -> their folder.

    rank, size: of the processes that share the work. Raises UserError for a file that is missing
    or has changed.
    """
    folder, shards = named_folder(path, state), state['shards']
    for name in sorted(shards['checksums'])[rank::size]:
        file = os.path.join(folder, name)
        if not os.path.isfile(file) or checksum(file) != shards['checksums'][name]:
            fact = 'has another checksum' if os.path.exists(file) else 'is missing'
            raise UserError(f'{file} {fact}, so the checkpoint {path} is damaged; restore a copy, '
                            f'or use another one (--which=last, --which=best)')
    return folder


def described_in(path, folder):
    """Return {name: (size, dtype)} of a folder's tensors. Raises UserError."""
    try:
        described = Reader(folder).read_metadata().state_dict_metadata
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what pickle raises, and whatever a wrong content leads to
        raise UserError(f'{folder} is damaged, or holds more than tensors, which could run code: '
                        f'refused ({type(error).__name__}: {error}); restore a copy of '
                        f'{path} and its folder') from error
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in described.items()}


def read(path, state, part='all'):
    """Add the tensors of its shards to the content of ckpt.pt; -> the content.

    part: 'all'; 'model', without moments; 'shapes' of the weights, for sharded.restore(). Raises
    UserError.
    """
    has_memory = part != 'shapes'
    folder = folder_of(path, state) if has_memory else named_folder(path, state)
    tensors = {name: torch.empty(size, dtype=dtype, device='cpu' if has_memory else 'meta')
               for name, (size, dtype) in described_in(path, folder).items()
               if part == 'all' or name.startswith('model.')}
    if has_memory:
        load(path, folder, tensors, no_dist=True)
    for name, tensor in tensors.items():
        kind, _, name = name.partition('.')
        if kind == 'model':
            state['model'][name] = tensor
        else:
            i, moment = name.split('.')
            state['optimizer']['state'].setdefault(int(i), {})[moment] = tensor
    if state['model_args'].get('tie_embeddings', True) and TIED[1] in state['model']:
        state['model'][TIED[0]] = state['model'][TIED[1]]
    return state


def load(path, folder, tensors, no_dist=False):
    """Fill tensors, whole or sharded, from a folder. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # that it reads in one process
            dcp.load(tensors, storage_reader=Reader(folder), no_dist=no_dist)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise UserError(f'{folder}, the shards of {path}, cannot be loaded: {cause}; restore a '
                        f'copy') from error
