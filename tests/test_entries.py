"""entries.py and all that compares a file's content with what it is used for, before it is used. Run: pytest
tests/test_entries.py"""

import json
import math
import os
import time
import zipfile
from typing import Literal, TypedDict

import numpy as np
import pytest
import torch
from conftest import write_dataset

from bench import fuzz_kinds
from configurator import Natural, UserError
from data import datasets
from flatgpt import checkpoint, entries, huggingface
from model import GPT, GPTConfig

WEIGHT = 'transformer.h.0.attn.c_attn.weight'


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    """Valid files of every kind of checkpoint."""
    return fuzz_kinds.make_kinds(tmp_path_factory.mktemp('kinds'))


@pytest.fixture
def unpack(kinds, tmp_path, monkeypatch):
    """Write the files of a kind here, with changes to the content of out/ckpt.pt."""
    monkeypatch.chdir(tmp_path)

    def write(name, change=None):
        for path, content in kinds[name].files.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            (tmp_path / path).write_bytes(content)
        if change is not None:
            state = torch.load('out/ckpt.pt', weights_only=True)
            torch.save(change(state) or state, 'out/ckpt.pt')
        return kinds[name].run

    return write


# rules ----------------------------------------------------------------------------------------------------------------

class Inner(TypedDict):
    n: Natural


class Outer(Inner, total=False):
    names: list[str]
    pairs: list[tuple[str, Natural]]
    by_number: dict[int, Inner]
    kind: Literal['a', 'b'] | None
    loss: float


VALID = {'n': 1, 'names': ['x'], 'pairs': [['a', 1]], 'by_number': {3: {'n': 2}}, 'kind': None, 'loss': 2, 'more': object}


def test_conform():
    assert entries.conform(VALID, Outer) == {**VALID, 'pairs': [('a', 1)], 'loss': 2.0}
    assert entries.conform({'n': 0}, Outer) == {'n': 0}
    loss = entries.conform({'n': 0, 'loss': torch.tensor(1.5)}, Outer)['loss']  # nanoGPT's best_val_loss
    assert loss == 1.5 and type(loss) is float


@pytest.mark.parametrize('change, said', [
    ({'n': -1}, 'n=-1: expected 0 or more'), ({'n': True}, 'n=True: expected int'), ({'n': 1.0}, 'n=1.0: expected int'),
    ({'names': 'x'}, "names='x': expected list"), ({'names': [1]}, r'names\[0\]=1: expected str'),
    ({'pairs': [['a']]}, r'pairs\[0\] is a list: expected tuple'), ({'pairs': [['a', -1]]}, r'pairs\[0\]\[1\]=-1'),
    ({'by_number': {'3': {'n': 2}}}, "a key of by_number='3': expected int"),
    ({'kind': 'c'}, "kind='c': expected 'a', 'b' or"),
    ({'by_number': {3: {}}}, r'by_number\[3\] has no n'), ({'loss': 10**400}, 'loss=1000'),
    ({'loss': '2'}, "loss='2': expected float"),
    ({'loss': torch.zeros(2)}, 'loss is a Tensor: expected float'), ({'kind': []}, 'kind is a list: expected')])
def test_conform_refuses(change, said):
    with pytest.raises(UserError, match=said):
        entries.conform({**VALID, **change}, Outer)


def test_content_that_contains_itself():
    """Pickle can write such values; a rule is followed no deeper than it goes."""
    values = {**VALID}
    values['by_number'] = {3: values}
    assert entries.conform(values, Outer)['n'] == 1
    values['names'].append(values['names'])
    with pytest.raises(UserError, match='names.1. is a list: expected str'):
        entries.conform(values, Outer)


# tensors --------------------------------------------------------------------------------------------------------------

STRANGE = {
    'sparse': lambda t: t.to_sparse(), 'meta': lambda t: torch.empty(t.shape, device='meta'),
    'one element for all': lambda t: t.reshape(-1)[:1].expand(t.shape), 'transposed': lambda t: t.T.contiguous().T,
    'overlapping': lambda t: t.reshape(-1).as_strided(t.shape, (1, 1)), 'whole numbers': lambda t: t.int(),
    'complex': lambda t: t.to(torch.complex64), 'bool': lambda t: t > 0, 'no tensor': lambda t: t.tolist(),
    'quantized': lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', STRANGE)
def test_tensors_that_kernels_would_misread(how, unpack):
    """In weights and in moments, of which fused AdamW takes as many elements as the parameter has."""
    def moment(state):
        moments = state['optimizer']['state'][0]
        moments['exp_avg'] = STRANGE[how](moments['exp_avg'])

    for change in (lambda state: state['model'].update({WEIGHT: STRANGE[how](state['model'][WEIGHT])}), moment):
        with pytest.raises(UserError, match='out/ckpt.pt is'):
            unpack('ckpt', change)()


MOMENTS = {
    'shape': lambda m: {**m, 'exp_avg': torch.zeros(1)}, 'larger': lambda m: {**m, 'exp_avg': torch.zeros(500, 8)},
    'dtype': lambda m: {**m, 'exp_avg_sq': m['exp_avg_sq'].bfloat16()}, 'more': lambda m: {**m, 'max_exp_avg_sq': m['exp_avg']},
    'fewer': lambda m: {'step': m['step'], 'exp_avg': m['exp_avg']}, 'none': lambda m: {},
    'steps': lambda m: {**m, 'step': torch.zeros(3)}, 'nan': lambda m: {**m, 'step': torch.tensor(math.nan)},
    'NaN': lambda m: {**m, 'exp_avg': m['exp_avg'] * math.nan}, 'infinite': lambda m: {**m, 'exp_avg_sq': m['exp_avg_sq'] + math.inf},
    'negative': lambda m: {**m, 'exp_avg_sq': m['exp_avg_sq'] - 1}, 'shared': lambda m: {**m, 'exp_avg_sq': m['exp_avg'].zero_()}}


@pytest.mark.parametrize('kind, how', [*(('ckpt', how) for how in MOMENTS), *(
    (kind, 'shape') for kind in ('nanogpt', 'lora', 'reward', 'classify', 'rl'))])
def test_moments_are_compared_with_their_parameters(kind, how, unpack):
    def change(state):
        moments = state['optimizer']['state']
        moments[0] = MOMENTS[how](moments[0])

    run = unpack(kind, change)
    with pytest.raises(UserError, match='the optimizer state in the checkpoint'):
        run()


def test_muons_moments(unpack):
    def change(state):
        moments = state['optimizer']['state']
        number = next(i for i in moments if 'momentum_buffer' in moments[i])
        moments[number] = {**moments[number], 'momentum_buffer': torch.zeros(1)}

    with pytest.raises(UserError, match="'momentum_buffer': .torch.float32, torch.Size..1...., expected"):
        unpack('muon', change)()


@pytest.mark.parametrize('kind', ['ckpt', 'muon', 'nanogpt', 'lora', 'reward', 'classify'])
def test_no_moments_are_not_silently_new_ones(kind, unpack):
    """Nor are those of some parameters. A checkpoint without optimizer trains on, with new moments, as ever."""
    def empty(state):
        state['optimizer']['state'] = {}

    for change in (empty, lambda state: state['optimizer']['state'].pop(0) and None):
        with pytest.raises(UserError, match='another set of parameters: for number 0 it has None'):
            unpack(kind, change)()
    if kind not in ('reward', 'classify'):
        unpack(kind, lambda state: state.pop('optimizer') and None)()
    else:
        with pytest.raises(UserError, match='it has no optimizer'):
            unpack(kind, lambda state: state.pop('optimizer') and None)()


def test_no_moments_where_no_step_was_taken(unpack):
    """Under a gradient scaler all steps so far may have overflowed; ppo's policy waits for its value function."""
    scaler = torch.amp.GradScaler('cpu').state_dict()

    def change(state):
        state['optimizer']['state'] = {}
        state['scaler'] = scaler

    unpack('ckpt', change)()
    unpack('rl', change)()
    for wrong in ({**scaler, 'scale': 'x'}, {'scale': 1.0}, {**scaler, '_growth_tracker': -1}):
        with pytest.raises(UserError, match='scaler'):
            unpack('ckpt', lambda state, wrong=wrong: state.update(scaler=wrong))()


# sizes ----------------------------------------------------------------------------------------------------------------

def repack(path, change, compression=zipfile.ZIP_STORED):
    """Write a zip archive again, with right checksums, `change` applied to (name, content) of each entry."""
    with zipfile.ZipFile(path) as old:
        contents = [change(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, 'w', compression) as new:
        for name, content in contents:
            new.writestr(name, content)


def test_compressed_archive(unpack):
    """torch reads entries that inflate to a thousand times their size."""
    run = unpack('ckpt', lambda state: state['model'].update(extra=torch.zeros(10**7)))
    repack('out/ckpt.pt', lambda name, content: (name, content), zipfile.ZIP_DEFLATED)
    assert os.path.getsize('out/ckpt.pt') < 1e6
    with pytest.raises(UserError, match='out/ckpt.pt is damaged or truncated .*compressed'):
        run()


def test_long_name_of_a_class(unpack):
    """torch.load searches its message by patterns that take minutes for such a name."""
    run, started = unpack('ckpt'), time.perf_counter()
    repack('out/ckpt.pt', lambda name, content: (name, content.replace(b'_rebuild_tensor_v2', b'[' * 100_000, 1)))
    with pytest.raises(UserError, match='out/ckpt.pt is damaged or truncated, or holds more than tensors'):
        run()
    assert time.perf_counter() - started < 5


class Huge:
    """Unpickled, it asks for more memory than any machine has."""

    def __reduce__(self):
        return bytearray, (2**60,)


def test_memory_that_is_refused(unpack):
    with pytest.raises(UserError, match='out/ckpt.pt needs more memory than there is, or is damaged'):
        unpack('ckpt', lambda state: state.update(more=Huge()))()


@pytest.mark.parametrize('size', [0, 4, 100_000])
def test_storage_of_another_size_than_its_bytes(unpack, size):
    """torch.load alone reads what lies behind the bytes in memory."""
    run = unpack('ckpt')
    repack('out/ckpt.pt', lambda name, content: (name, bytes(size) if name.endswith('data/0') else content))
    with pytest.raises(UserError, match='out/ckpt.pt is damaged or truncated'):
        run()


def test_weights_that_share_their_bytes(tmp_path):
    """A small file of large models: every tensor is the same one."""
    shared = torch.zeros(1000)
    state = {'model': {f'layer{i}': shared for i in range(1000)}, 'model_args': {}, 'iter_num': 1, 'best_val_loss': 1.0}
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='weights larger than the file'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('field, value', [
    ('n_layer', 10**5), ('n_layer', 10**12), ('vocab_size', 10**9), ('block_size', 10**9), ('n_embd', 2**20),
    ('n_inner', 10**10), ('n_kv_head', 1), ('head_dim', 10**9), ('n_embd', 2**62), ('n_embd', 2**64),
    ('n_layer', -1), ('n_head', 2.0)])
def test_sizes_of_models_are_compared_before_memory_is_taken(field, value, unpack):
    for kind in ('ckpt', 'reward', 'classify'):
        run, started = unpack(kind, lambda state: state['model_args'].update({field: value})), time.perf_counter()
        with pytest.raises(UserError, match=f'out/ckpt.pt holds no model|{field}={value}: expected'):
            run()
        assert time.perf_counter() - started < 5


def test_shapes_alone_take_no_memory_and_no_random_numbers():
    before = torch.get_rng_state()
    model = entries.without_memory(GPT, GPTConfig(vocab_size=10**7, n_embd=8192, n_layer=2, n_head=2), 0)
    assert model.lm_head.weight.shape == (10**7, 8192) and {p.device.type for p in model.parameters()} == {'meta'}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('kind, key, value', [
    ('hf_gpt2', 'n_layer', 10**5), ('hf_gpt2', 'n_embd', 2**40), ('hf_gpt2', 'n_embd', 2**62),
    ('hf_gpt2', 'vocab_size', 10**9),
    ('hf_llama', 'num_hidden_layers', 10**5), ('hf_llama', 'num_hidden_layers', 10**400),
    ('hf_llama', 'hidden_size', 2**40),
    ('hf_llama', 'vocab_size', 10**9), ('hf_llama', 'rope_theta', 10**400),
    ('hf_llama', 'max_position_embeddings', None),
    ('hf_gpt2', 'layer_types', 5), ('hf_llama', 'rope_scaling', {'rope_type': []}),
    ('hf_llama', 'layer_types', [[]]), ('hf_llama', 'rope_scaling', {'rope_type': 'linear', 'factor': 10**400})])
def test_sizes_of_hugging_faces_models(kind, key, value, unpack):
    run, started = unpack(kind), time.perf_counter()
    with open('model/config.json') as file:
        config = json.load(file)
    with open('model/config.json', 'w') as file:
        json.dump({**config, key: value}, file)
    with pytest.raises(UserError, match='config.json'):
        run()
    assert time.perf_counter() - started < 5


# names ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch):
    """Names that were looked for at the hub, and whether in its cache alone."""
    names = []

    def snapshot_download(name, local_files_only=False, **_):
        names.append((name, local_files_only))
        raise OSError('no network')

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    return names


def test_a_name_in_a_file_never_reaches_the_hub(unpack, asked):
    run = unpack('lora', lambda state: state['lora'].update(init_from='evil/model', from_here=None))
    with pytest.raises(UserError, match="'evil/model' is neither a folder here nor .*hf download evil/model"):
        run()
    run = unpack('rl', lambda state: state['config'].update(init_from='evil/model'))
    with pytest.raises(UserError, match='hf download evil/model'):
        run()
    assert asked == [('evil/model', True)] * 2  # the cache holds what a person has fetched
    with pytest.raises(UserError, match='could not be downloaded'):
        huggingface.find('good/model')
    assert asked[-1] == ('good/model', False)


def test_adapters_of_themselves(unpack):
    for name in ('out', './out', os.path.join('..', 'out')):
        run = unpack('lora', lambda state, name=name: state['lora'].update(init_from=name, from_here='.'))
        with pytest.raises(UserError, match='belong to themselves|neither a folder'):
            run()


@pytest.mark.parametrize('change, said', [
    ({'rank': 10**9}, 'rank=1000000000, but .* has another'), ({'rank': 0}, 'lora.rank=0'),
    ({'alpha': math.inf}, 'lora.alpha=inf'),
    ({'targets': 'c_attn'}, "lora.targets='c_attn': expected list"), ({'init_from': 5}, 'lora.init_from=5'),
    ({'targets': []}, 'the adapters are of another model'), ({'int8': 'yes'}, 'lora.int8'),
    ({'digest': None}, 'lora.digest=None')])
def test_descriptions_of_adapters(change, said, unpack):
    run = unpack('lora', lambda state: state['lora'].update(change))
    with pytest.raises(UserError, match=said):
        run()


# checkpoints of the other scripts -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, key', [
    ('reward', 'config'), ('reward', 'chat_template'), ('rl', 'config'), ('rl', 'value_model'),
    ('classify', 'config'), ('classify', 'labels'), ('classify', 'report'), ('classify', 'optimizer'),
    ('rl', 'value_optimizer'),
    ('rl', 'optimizer')])
def test_entries_that_are_missing(kind, key, unpack):
    run = unpack(kind, lambda state: {name: value for name, value in state.items() if name != key})
    with pytest.raises(UserError, match=f'out/ckpt.pt is no checkpoint: it has no {key}'):
        run()


@pytest.mark.parametrize('key, value', [
    ('iter_num', -1), ('iter_num', 2**40), ('best_val_loss', math.nan), ('best_val_loss', torch.zeros(3)),
    ('best_val_loss', -math.inf), ('seen', 10**30), ('train_time', 1e308),
    ('tokenizer', {}),
    ('tokenizer', 'gpt2'), ('chat_template', 7), ('config', {'dataset': 7}), ('config', [1]),
    ('optimizer', {'state': {}}),
    ('evals_since_best', 'x'), ('train_time', math.nan), ('version', 'x'), ('version', 99),
    ('model_args', {'block_size': '16'}),
    ('lora', {}), ('reward_model', 1), ('measure', None)])
def test_values_of_the_wrong_kind(key, value, unpack):
    run = unpack('ckpt', lambda state: state.update({key: value}))
    with pytest.raises(UserError, match=f'out/ckpt.pt (is no checkpoint: .*{key}|has (layout {key}|{key}))'):
        run()


# datasets -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['O', 'float16', 'int8', 'bool', 'complex64', 'int16', '<u2', 'uint8', 'uint64', 'V2', 2])
def test_types_of_token_files(tmp_path, dtype):
    """'O' would make pointers of the ids."""
    write_dataset(tmp_path, np.arange(100), np.arange(20))
    path = tmp_path / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'dtype': dtype}))
    with pytest.raises(UserError, match="meta.json is damaged .dtype=.*expected 'uint16' or 'uint32'"):
        datasets.load_meta(str(tmp_path))


@pytest.mark.parametrize('change, said', [
    ({'vocab_size': 10**9}, 'its tokenizer has .* ids'), ({'row': 1}, 'row=1'), ({'row': -5}, 'row=-5'),
    ({'row': 101}, 'no whole rows of 101'), ({'row': 25}, 'no whole rows of 25'),
    ({'tokens': {'train': -1, 'val': 20}}, 'tokens.train=-1'),
    ({'files': {'train': [['../train.bin', 100]], 'val': [['val.bin', 20]]}}, 'the files of train'),
    ({'files': {'train': [['/etc/passwd', 100]], 'val': [['val.bin', 20]]}}, 'the files of train'),
    ({'files': {'train': [['val.bin', 100]], 'val': [['val.bin', 20]]}}, 'the files of train'),
    ({'files': {'train': []}}, 'files has no val'), ({'tokenizer': {'kind': 'char', 'chars': 5}}, 'chars of a'),
    ({'chat_template': ['x']}, 'chat_template is a list')])
def test_entries_of_meta_json(tmp_path, change, said):
    write_dataset(tmp_path, np.arange(100), np.arange(20))
    path = tmp_path / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f'meta.json is damaged .*{said}'):
        datasets.load_meta(str(tmp_path))


def test_folder_of_peft(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{}')
    with pytest.raises(UserError, match='adapters of PEFT alone; merge them'):
        huggingface.load(str(tmp_path))
