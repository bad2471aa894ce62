"""flatgpt.export and --init_from=FOLDER, checked by transformers and lm-evaluation-harness.

Run: pytest tests/test_export_e2e.py
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CHARS, make_text, same_state

import tokenizer
from flatgpt import huggingface, pretrained
from tokenizer import formats
from tokenizer.patterns import PATTERNS

transformers = pytest.importorskip('transformers')
safetensors_torch = pytest.importorskip('safetensors.torch')

TEXT = make_text(9000)


def bpe_tokenizer():
    return tokenizer.BPETokenizer.train(TEXT, 290, 'qwen2',
                                        ['<|endoftext|>', '<|im_start|>', '<|im_end|>'])


def write_dataset_of(folder, text_tokenizer, name='words'):
    """Write TEXT as the dataset data/name, with this tokenizer."""
    ids = text_tokenizer.encode_array(TEXT)
    splits = {'train': ids[:-1100], 'val': ids[-1100:]}
    (folder.path / 'data' / name).mkdir(parents=True)
    for split, part in splits.items():
        part.tofile(folder.path / 'data' / name / f'{split}.bin')
    (folder.path / 'data' / name / 'meta.json').write_text(json.dumps({
        'dtype': ids.dtype.name, 'vocab_size': text_tokenizer.vocab_size,
        'tokenizer': text_tokenizer.to_dict(),
        'tokens': {split: len(part) for split, part in splits.items()}}))


def export(folder, **settings):
    return folder.start('flatgpt.export', **{'out_dir': 'out', 'out': 'hf', **settings}).wait()


def test_a_trained_model_leaves(folder):
    folder.train(preset='llama', n_kv_head=1).ok()
    said = export(folder).ok().out
    for text in ('wrote hf: LlamaForCausalLM', 'vllm serve hf', 'convert_hf_to_gguf.py hf'):
        assert text in said
    assert not [line for line in said.splitlines() if len(line) > 80]
    # whoever can read one file can read all
    assert len({path.stat().st_mode for path in (folder.path / 'hf').iterdir()}) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder.path / 'hf').eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder.path / 'hf')
    ours, text_tokenizer, _, _ = pretrained.open_model('resume', str(folder.path / 'out'))
    ids = text_tokenizer.encode('the cat sat on')
    assert fast('the cat sat on')['input_ids'] == ids and fast.decode(ids) == 'the cat sat on'
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
    # and is at home in the exported folder, too
    greedy = {'start': 'the ', 'temperature': 0, 'num_samples': 1, 'max_new_tokens': 10}
    one, other = (folder.sample(**greedy, **source).ok().out
                  for source in ({}, {'init_from': 'hf'}))
    assert one.split('\nthe ')[1] == other.split('\nthe ')[1]
    export(folder).refused('hf exists and is not empty', '--out')
    export(folder, out='half', dtype='bfloat16', which='last', init_from='hf').ok()
    tensors = safetensors_torch.load_file(folder.path / 'half' / 'model.safetensors')
    exact = theirs.state_dict()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in tensors.items())


def test_what_export_refuses(folder):
    export(folder).refused('no checkpoint at', 'python train.py CONFIG --out_dir=out')
    folder.train(preset='modern', max_iters=1).ok()
    export(folder).refused('logit_softcap=15.0', 'cannot be exported', '--logit_softcap=0')
    export(folder, out='').refused("out='': expected the folder to write")
    export(folder, dtype='int4').refused("expected 'float32'")
    export(folder, which='first').refused("expected 'best', 'last' or int")
    export(folder, init_from='nowhere').refused("'nowhere' is neither a folder nor one of gpt2")
    assert not (folder.path / 'hf').exists()


def test_finetune_resume_sample_and_export_a_qwen(folder):
    """The padded vocabulary, a changed dropout and the chat template stay, there and back."""
    words = bpe_tokenizer()
    words = tokenizer.from_dict({**words.to_dict(), 'normalizer': 'NFC',
                                 'visible_tokens': ['<|im_start|>']})
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=256,
    )).save_pretrained(folder.path / 'qwen')
    formats.write_hf_folder(words.to_dict(), str(folder.path / 'qwen'),
                            {'chat_template': '{{ messages }}'})
    folder.train(init_from='qwen').refused('data/tiny was prepared for a vocabulary of', '(char)',
                                           'qwen has another', '--tokenizer=qwen')
    write_dataset_of(folder, tokenizer.load(str(folder.path / 'qwen')))
    settings = {'init_from': 'qwen', 'dataset': 'words', 'block_size': None, 'dropout': 0.1,
                'batch_size': 2, 'total_batch_size': 2 * 1024, 'max_iters': 6, 'eval_interval': 3}
    said = folder.train(**settings).ok().out
    # the default, not the longest that RoPE allows
    assert 'changes from 4096 to 1024 tokens' in said
    whole = folder.checkpoint()
    assert whole['model_args']['dropout'] == 0.1 and whole['model_args']['qk_norm_weight']
    assert whole['tokenizer'] == words.to_dict() and whole['chat_template'] == '{{ messages }}'
    folder.train(**{**settings, 'out_dir': 'half', 'max_iters': 3}).ok()
    sizes = {'n_layer': None, 'n_head': None, 'n_embd': None}  # the checkpoint's
    folder.train(**{**settings, **sizes, 'out_dir': 'half', 'init_from': 'resume'}).ok()
    same_state(folder.checkpoint('half'), whole)
    assert folder.checkpoint('half')['chat_template'] == '{{ messages }}'
    assert 'the' in folder.sample(start='the ', num_samples=1, max_new_tokens=20).ok().out
    export(folder).ok()
    tensors = safetensors_torch.load_file(folder.path / 'hf' / 'model.safetensors')
    best = folder.checkpoint(name='best.pt')['model']
    assert torch.equal(tensors['model.layers.0.self_attn.q_norm.weight'],
                       best['transformer.h.0.attn.q_norm.weight'])
    assert tensors['lm_head.weight'].shape == (320, 16)
    assert huggingface.load_tokenizer(folder.path / 'hf') == words.to_dict()
    assert huggingface.load_chat_template(folder.path / 'hf') == '{{ messages }}'


def test_training_where_the_tokenizer_cannot_be_read(folder):
    """SentencePiece is not read; a dataset that names no tokenizer is taken to have the model's."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(CHARS), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16)).save_pretrained(folder.path / 'llama')
    (folder.path / 'llama' / 'tokenizer.model').write_bytes(b'\n\x0e')
    folder.train(init_from='llama').refused('SentencePiece', 'the model can be read')
    (folder.path / 'data' / 'tiny' / 'meta.json').unlink()  # as nanoGPT's prepare.py leaves it
    folder.train(init_from='llama', max_iters=2).ok()
    assert folder.checkpoint()['tokenizer'] is None
    folder.sample(init_from='llama').refused('SentencePiece', 'its text cannot')


def score(model, text_tokenizer, text, n_given):
    """Sum the log-probabilities of a text's ids after its first n_given characters."""
    ids = text_tokenizer.encode(text, 'all')
    given = len(text_tokenizer.encode(text[:n_given], 'all'))
    idx = torch.tensor([ids])
    with torch.no_grad():
        log_p = model(idx, idx)[0].log_softmax(-1)[0, :-1]
    return log_p.gather(1, idx[0, 1:, None])[given - 1 :].sum().item()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('lm_eval') is None,
                    reason="needs pip install -e '.[lmeval]'")
def test_lm_evaluation_harness_gets_our_numbers(folder):
    """Run the harness offline, on a multiple-choice task and on plain text."""
    text_tokenizer = bpe_tokenizer()
    write_dataset_of(folder, text_tokenizer)
    folder.train(preset='llama', dataset='words', n_embd=32, block_size=128, max_iters=60,
                 lr_decay_iters=60).ok()
    export(folder).ok()
    rng = np.random.default_rng(0)
    texts = [make_text(60, seed=seed).strip() for seed in range(2, 42)]
    choices = [[f' {make_text(9, seed=100 * i + j).split()[0]}?' for j in range(3)]
               for i in range(len(texts))]
    questions = [{'question': text, 'choices': some, 'answer': int(rng.integers(3))}
                 for text, some in zip(texts, choices, strict=True)]
    tasks = folder.path / 'tasks'
    tasks.mkdir()
    for name, rows in (('choices', questions), ('plain', [{'text': text} for text in texts])):
        (tasks / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name, lines in (
        ('choices', ['output_type: multiple_choice', 'doc_to_text: question',
                     'doc_to_choice: choices', 'doc_to_target: answer', 'target_delimiter: ""',
                     'metric_list: [{metric: acc}]']),
        ('plain', ['output_type: loglikelihood_rolling', 'doc_to_text: ""', 'doc_to_target: text',
                   'metric_list: [{metric: bits_per_byte}]']),
    ):
        (tasks / f'{name}.yaml').write_text('\n'.join([
            f'task: our_{name}', 'dataset_path: json', 'test_split: test',
            f'dataset_kwargs: {{data_files: {{test: {tasks / name}.jsonl}}}}', *lines]))
    offline = {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1',
               'HF_HOME': str(folder.path / 'home')}
    done = subprocess.run(
        [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args',
         'pretrained=hf,dtype=float32', '--device', 'cpu', '--batch_size', '4', '--include_path',
         str(tasks), '--tasks', 'our_choices,our_plain', '--output_path', 'results'],
        cwd=folder.path, env={**os.environ, **offline}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    path = next((folder.path / 'results').rglob('results_*.json'))
    results = json.loads(path.read_text())['results']

    model, text_tokenizer, _, _ = pretrained.open_model('resume', str(folder.path / 'out'))
    right = []
    for q in questions:
        scores = [score(model, text_tokenizer, q['question'] + choice, len(q['question']))
                  for choice in q['choices']]
        right.append(scores.index(max(scores)) == q['answer'])
    assert 0 < sum(right) < len(right)
    assert results['our_choices']['acc,none'] == pytest.approx(np.mean(right))
    nats = -sum(score(model, text_tokenizer, '<|endoftext|>' + text, len('<|endoftext|>'))
                for text in texts)
    bits_per_byte = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results['our_plain']['bits_per_byte,none'] == pytest.approx(bits_per_byte, rel=1e-5)
    assert text_tokenizer.pattern == PATTERNS['qwen2'] and bits_per_byte < 5
