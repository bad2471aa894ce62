"""data/pages.py: the main text of HTML pages, and their encodings. Run: pytest tests/test_pages.py"""

import collections
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from html_pages import ENCODINGS, make_page, words_of

from data import clean, pages
from data.documents import read_documents

pytest.importorskip('resiliparse')


def shares(found, expected):
    """The recall and the precision of the words of a text."""
    found, expected = (collections.Counter(words_of(text)) for text in (found, expected))
    common = sum((found & expected).values())
    return common / sum(expected.values()), common / max(1, sum(found.values()))


def test_words_of_the_main_text_are_found_and_few_others():
    made = [make_page(seed) for seed in range(200)]
    got = [shares(pages.main_text(pages.decode_page(page)), text) for page, text in made]
    recall, precision = (sum(column) / len(made) for column in zip(*got, strict=True))
    assert recall > 0.98 and precision > 0.97
    assert min(recall for recall, _ in got) > 0.9
    # the bars mean something: with all its text, a page loses precision
    whole = [shares(pages.load_resiliparse()[1](pages.decode_page(page)), text)
             for page, text in made]
    assert sum(precision for _, precision in whole) / len(made) < 0.9


@pytest.mark.parametrize('content, text', [
    ('<meta charset=iso-8859-1><p>caf\xe9'.encode('latin-1'), 'caf\xe9'),
    ('<meta charset=iso-8859-1><p>caf\xe9'.encode(), 'caf\xe9'),  # its declaration is wrong
    ('<p>caf\xe9'.encode('utf-16'), 'caf\xe9'),
    ('\ufeff<p>caf\xe9'.encode(), 'caf\xe9'),
    ('<meta charset=koi8-r><p>\u0440\u0435\u043a\u0430'.encode('koi8-r'), '\u0440\u0435\u043a\u0430'),
    (b'<meta charset=no-such-thing><p>caf\xe9', 'caf\xe9'),
    ('<meta charset=iso-2022-jp><p>\u6a4b\u306e\u4e0a\u306b'.encode('iso-2022-jp'), '\u6a4b'),
    (b'<meta charset=utf-8><p>caf\xff\xfe', 'caf'),
])
def test_encodings(content, text, tmp_path):
    (tmp_path / 'a.html').write_bytes(content)
    page = pages.read_page(tmp_path / 'a.html')
    assert pages.is_page(page) and pages.main_text(page).startswith(text)


@pytest.mark.parametrize('text, expected', [
    ('<!DOCTYPE html><p>', True), ('\n <HTML lang=en>', True), ('<!-- x -->\n<html>', True),
    ('<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">', True),
    ('<p>a part</p>', False), ('a < b and <html> is a tag', False), ('', False), ('<svg>', False)])
def test_pages_are_known_by_their_beginning(text, expected):
    assert pages.is_page(text) == expected


def test_lists_of_text_stay_and_menus_go():
    item = 'a line of this list that has some words of its own'
    for outer in ('{}', '<div>{}</div>', '<main>{}</main>', '<div><div><div>{}</div></div></div>'):
        page = ('<html><body><ul>' + '<li><a href=/>Home page</a>' * 5 + '</ul>' + outer.format(
            f'<p>{item}<p>{item}<ul>' + f'<li>{item}</li>' * 4 + '</ul>'))
        text = pages.main_text(page)
        assert text.count(item) == 6 and 'Home' not in text


@pytest.mark.parametrize('page', [
    '<div>' * 200_000 + 'deep', '<ul><li>' * 50_000, '<b><i><p>' * 20_000, '<' * 10**6, '&' * 10**6,
    '<p ' + 'a=b ' * 100_000, '<!--' * 100_000, '<ul>' * 50_000 + 'text', '\0' * 1000,
    '<ul><a>' * 20_000], ids=range(10))
def test_hostile_pages_take_no_time(page):
    began = time.process_time()
    pages.main_text('<!DOCTYPE html>' + page)
    assert time.process_time() - began < 5


def test_a_folder_of_pages_and_texts_to_clean_documents(tmp_path):
    made = [make_page(seed) for seed in range(len(ENCODINGS))]
    (tmp_path / 'in').mkdir()
    for number, (page, _) in enumerate(made):
        (tmp_path / 'in' / f'{number}.html').write_bytes(page)
    (tmp_path / 'in' / 'empty.html').write_text('<html><nav>Home</nav>')
    (tmp_path / 'in' / 'part.htm').write_text('<p>A part of a page &amp; more')
    (tmp_path / 'in' / 'text.txt').write_text('A text with a <b> in it')
    rows = [{'text': '<!doctype html><nav>Home</nav><p>Of a &lt; table'}, {'text': '<i>text</i>'}]
    (tmp_path / 'in' / 'u.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    report = clean.clean_to(tmp_path / 'out.jsonl', tmp_path / 'in', clean.Steps(html=True))
    texts = [json.loads(line)['text'] for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert texts[len(made):] == ['A part of a page & more', 'A text with a <b> in it',
                                 'Of a < table', '<i>text</i>']
    for text, (_, expected) in zip(texts, made, strict=False):
        assert min(shares(text, expected)) > 0.9
    assert report['documents'] == {'read': 15, 'kept': 14, 'changed by html': 12,
                                   'changed by normalize': 0}
    assert report['removed']['html: blank']['examples'][0]['why'] == 'no main text'


def test_a_page_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, 'PAGE_BYTES', 100)
    (tmp_path / 'a.html').write_text('<html>' + 'a' * 100)
    with pytest.raises(ValueError, match='more than 100 bytes'):
        list(read_documents(tmp_path, html=True))
    assert pages.main_text('<html><p>' + 'some words ' * 30) == ''  # of a table


@pytest.mark.parametrize('name, content, said', [
    ('in/a.html', '<html><p>some text of a page', '1 of the 2 files are HTML pages'),
    ('in/a.jsonl', '{"text": "<html><p>some text of a page"}', '1 of the 2 first documents are'),
    ('in/a.jsonl', '{"text": "some text, <b>bold</b>"}', None)])
def test_prepare_names_the_step(name, content, said, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'b.txt').write_text('words of a text that is no page ' * 9)
    (tmp_path / name).write_text(content)
    done = subprocess.run([sys.executable, ROOT / 'data' / 'text' / 'prepare.py', '--input=in',
                           '--out_dir=out', '--num_proc=1'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ('HTML' in done.stderr) == (said is not None)
    if said:
        assert said in done.stderr
        assert 'python -m data.clean --html --input=in --out=clean.jsonl' in done.stderr
