"""tokenizer/page.py: the page's encoder under node against Python, its size, and what it refuses.

Run: pytest tests/test_page.py
"""

import html.parser
import itertools
import json
import random
import re
import shutil
import subprocess

import pytest
import tokenizer_cases
from conftest import ROOT, load_or_skip
from sentencepiece_cases import TRAINING, many_texts, trained_here
from tokenizer_cases import HARD, make_trained, readable

import tokenizer
from configurator import UserError
from tokenizer import BPETokenizer, CharTokenizer, SentencePieceTokenizer, WordTokenizer, page
from tokenizer.patterns import PATTERNS

NODE = shutil.which('node')
needs_node = pytest.mark.skipif(NODE is None, reason='node is not installed')
RUN = """
const encoders = content.vocabularies.map(values => makeEncoder(values, content))
const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'))
const idsOf = encode => text => {
  const nodes = encode(text).flatMap(word => word.nodes)
  for (const node of nodes) check(node)
  return nodes.map(node => node.id)
}
function check(node) {  // the bytes of a node are those of its parts
  if (!node.left) return
  const parts = [...node.left.bytes, ...node.right.bytes]
  if (String(parts) !== String(Array.from(node.bytes))) throw new Error('other bytes')
  check(node.left)
  check(node.right)
}
console.log(JSON.stringify(encoders.map(encode => texts.map(idsOf(encode)))))
"""


def parts_of(path):
    """(the content, the encoder's script) of a page."""
    source = path.read_text(encoding='utf-8')
    scripts = re.findall(r'<script[^>]*>(.*?)</script>', source, re.S)
    assert len(scripts) == 3
    return scripts[0], scripts[1]


def ids_in_node(named, texts, tmp_path):
    """The ids of each text by each tokenizer in a page."""
    page.write_page(named, tmp_path / 'tokens.html')
    content, script = parts_of(tmp_path / 'tokens.html')
    (tmp_path / 'run.js').write_text(f'const content = {content}\n{script}\n{RUN}', encoding='utf-8')
    done = subprocess.run([NODE, str(tmp_path / 'run.js')], input=json.dumps(texts), capture_output=True,
                          text=True, encoding='utf-8', timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def same_ids(named, texts, tmp_path):
    for first in range(0, len(named), page.MOST):
        group = dict(list(named.items())[first:first + page.MOST])
        for (name, tok), by_text in zip(group.items(), ids_in_node(group, texts, tmp_path), strict=True):
            for text, ids in zip(texts, by_text, strict=True):
                assert ids == tok.encode(text, 'all'), (name, text)


TEXTS = [*map(readable, HARD), *many_texts()[len(HARD):1000 - 3], '<|endoftext|>a<|user says|> b', '</script><b>&amp;',
         '<!--<script>']


@pytest.mark.slow
@needs_node
def test_published_vocabularies(tmp_path):
    """1,000 texts: emoji, Hangul, code, controls, many scripts."""
    assert len(TEXTS) == 1000
    same_ids({name: load_or_skip(name) for name in ('gpt2', 'cl100k_base')} | {'byte': tokenizer.load('byte')},
             TEXTS, tmp_path)


@needs_node
def test_every_kind(tmp_path):
    trained = {str(name): tok for name, tok in make_trained().items() if name != 'own pattern'}
    trained |= {name: tokenizer_cases.train(name, 400) for name in ('qwen2', 'smollm2')}
    trained['nfc'] = tokenizer.from_dict({**trained['gpt4'].to_dict(), 'normalizer': 'NFC'})
    trained['word'] = WordTokenizer.train(TRAINING, 300, 1)
    trained['char'] = CharTokenizer.from_text(TEXTS)
    trained['sentencepiece'] = trained_here()
    pieces = trained_here().to_dict()
    trained['no prefix'] = SentencePieceTokenizer(
        [*pieces['pieces'], 'o▁t'], pieces['special_tokens'], ranks=[i // 3 for i in range(901)],
        add_dummy_prefix=False, user_defined_symbols=['oken', '▁▁', 'er'])
    trained['spaces removed'] = SentencePieceTokenizer(
        pieces['pieces'], pieces['special_tokens'], remove_extra_whitespaces=True)
    same_ids(trained, TEXTS[::3] + TEXTS[-3:], tmp_path)


@needs_node
@pytest.mark.slow
def test_every_character_is_cut_alike(tmp_path):
    """The characters of all scripts in random order, and contractions of any case."""
    chars = ''.join(map(chr, [*range(0x3500), *range(0xa000, 0xac00), *range(0xf900, 0x20100), 0xe0100]))
    chars = re.sub('[\ud800-\udfff]', '', chars)
    shuffled = ''.join(random.Random(0).sample(chars, len(chars)))
    texts = [shuffled, *(f"I'{a}{b}" for a, b in itertools.product('sſSlLKkTvd日', repeat=2))]
    # merges of any neighbours, also over characters, show where pieces end
    merges = BPETokenizer.train(texts, 1200, None, workers=1).merges
    words = WordTokenizer.train([chars, 'a b'], 5000, 1)
    same_ids({**{name: BPETokenizer(merges, name) for name in PATTERNS}, 'words': words}, texts, tmp_path)


@needs_node
def test_long_pieces_take_little_time(tmp_path):
    """300,000 letters, which quadratic joining would not end with."""
    tok = tokenizer_cases.train('gpt4', 400)
    same_ids({'gpt4': tok}, ['a' * 300_000, 'ab' * 100_000], tmp_path)


def test_a_page_of_200_000_ids_is_small(tmp_path):
    """Three such vocabularies, as o200k_base is one: under 10 MB."""
    pairs = [(bytes([a]), bytes([b])) for a in range(256) for b in range(256)]
    triples = [(bytes([a, b]), bytes([c])) for a in range(256) for b in range(256) for c in range(3)]
    tok = BPETokenizer((pairs + triples)[:200_000 - 257], 'o200k', {'<|endoftext|>': 199_999})
    assert tok.vocab_size == 200_000
    for named in ({'one': tok}, {'one': tok, 'two': tok, 'three': tok}):
        page.write_page(named, tmp_path / 'tokens.html')
        assert (tmp_path / 'tokens.html').stat().st_size < 10_000_000 * len(named) / 3
    content, _ = parts_of(tmp_path / 'tokens.html')
    assert [values['size'] for values in json.loads(content)['vocabularies']] == [200_000] * 3


def test_nothing_leaves_the_page_and_text_is_no_markup(tmp_path):
    name = '</script><img src=x onerror=alert(1)>'
    page.write_page({name: WordTokenizer(['<', '/', 'script', '>'])}, tmp_path / 'tokens.html')
    source = (tmp_path / 'tokens.html').read_text(encoding='utf-8')
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(source)
    assert 'img' not in {tag for tag, _ in tags}
    assert not any(key in attributes for _, attributes in tags for key in ('src', 'href', 'onclick'))
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|https?://|fetch\(|import\b', source)
    assert "default-src 'none'" in source
    assert json.loads(parts_of(tmp_path / 'tokens.html')[0])['vocabularies'][0]['name'] == name


@pytest.mark.parametrize('named, message', [
    ({}, 'shows 1 to 3 tokenizers, got 0: none'),
    (dict.fromkeys('abcd', tokenizer.ByteTokenizer()), 'got 4: a, b, c, d'),
    ({'mine.json': BPETokenizer([], r'\w+')}, 'mine.json has a split pattern of its own.*expected another'),
    ({'neox': BPETokenizer([], 'gpt2', added_tokens={'  ': 256})}, 'neox has added tokens'),
])
def test_what_a_page_cannot_show(named, message, tmp_path):
    with pytest.raises(UserError, match=message):
        page.write_page(named, tmp_path / 'tokens.html')
    assert not (tmp_path / 'tokens.html').exists()


def test_the_package_ships_the_page():
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    shipped = re.search(r'^\[tool\.setuptools\.package-data\]\n(?:\w.*\n)*?tokenizer = \["([^"]+)"\]', project, re.M)
    assert page.TEMPLATE.name == shipped[1] and page.TEMPLATE.is_file()
    assert page.TEMPLATE.read_text(encoding='utf-8').count(page.MARK) == 1
