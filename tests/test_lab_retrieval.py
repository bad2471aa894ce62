"""lab/retrieval.py, lab/facts.py, lab/store.py, lab/reader.py: fair facts, searches by hand, and a run."""

import json
import random
import re

import numpy as np
import pytest
import torch
from conftest import load_lab

import tokenizer
from lab import common, facts, reader, store
from model import GPT
from posttrain.tasks.common import split_of

WORLD = facts.make_world(30, 8, 'test')


def test_worlds_share_no_name_and_are_a_function_of_the_seed():
    train = facts.make_world(300, 60, 'train')
    assert not set(train) & set(WORLD) and all(split_of(name) == 'test' for name in WORLD)
    assert facts.make_world(30, 8, 'test') == WORLD != facts.make_world(30, 8, 'test', seed=1)
    for name, values in WORLD.items():
        assert set(values) == set(facts.PERSON if 'age' in values else facts.TOWN)
        if 'age' in values:
            assert values['friend'] != name and 'age' in WORLD[values['friend']] and 'river' in WORLD[values['town']]
        else:
            assert 'age' in WORLD[values['mayor']]


def test_passages_hold_every_fact_once_and_name_its_subject():
    held = []
    for name, text, relations in facts.passages_of(WORLD, WORLD):
        held += [(name, relation) for relation in relations]
        assert len(text) <= 110 and len(re.findall(r'[A-Z]\w+ .*?\.', text)) == 2
        assert all(WORLD[name][relation] in text and name in text for relation in relations)
    assert sorted(held) == sorted((name, relation) for name in WORLD for relation in WORLD[name])


def test_a_value_is_read_off_the_end_of_an_answer():
    assert facts.value_in(facts.answer('town', 'Zolin', 'Maru')) == 'Maru'
    assert facts.value_in('The answer is 12.') == '12' and facts.value_in(facts.answer('town', 'Zolin', facts.UNKNOWN)) == 'known'
    assert facts.answer('town', 'Zolin') + 'Maru.' == facts.answer('town', 'Zolin', 'Maru')


def last_questions(talk):
    """(text of the passages and questions so far, question, answer) of each turn."""
    messages = talk['messages']
    for i, message in enumerate(messages):
        if message['role'] == 'assistant':
            read = '\n'.join(other['content'] for other in messages[:i] if other['role'] != 'assistant')
            yield read, messages[i - 1]['content'].rpartition('\n')[2], message['content']


def test_talks_have_the_answer_in_a_passage_or_do_not_know():
    kinds = {'known': 0, 'unknown': 0, 'order': 0}
    for talk in facts.reading_talks(150, seed=3):
        for read, asked, given in last_questions(talk):
            if given.endswith(f'is {facts.UNKNOWN}.'):
                kinds['unknown'] += 1
                relation, name = re.fullmatch(r'The (\w+) of (\w+) is not known\.', given).groups()
                assert not any(text.format(name, '').rstrip('.') in read for text in facts.SENTENCES[relation])
            elif re.search(rf'(say|Say|answer) {given}\b', asked):
                kinds['order'] += 1
            else:
                kinds['known'] += 1
                relation, name, value = re.fullmatch(r'The (\w+) of (\w+) is (\w+)\.', given).groups()
                sentence = next(text.format(name, value) for text in facts.SENTENCES[relation]
                                if text.format(name, value) in read)
                assert sentence and name in asked
    assert kinds['known'] > kinds['unknown'] > kinds['order'] > 10


def test_messages_of_each_form():
    assert facts.messages('Q?') == [{'role': 'user', 'content': 'Q?'}]
    assert facts.messages('Q?', ['a', 'b'], 'plain') == [{'role': 'user', 'content': 'a\nb\nQ?'}]
    assert facts.messages('Q?', ['a'], 'quoted') == [{'role': 'user', 'content': '"""\na\n"""\nQ?'}]
    assert facts.messages('Q?', ['a']) == [{'role': 'tool', 'content': 'a'}, {'role': 'user', 'content': 'Q?'}]


def bm25(query, texts, k1=1.5, b=0.75):
    """Lucene's BM25 of each text, from its definition."""
    rows = [text.lower().replace('.', '').split() for text in texts]
    mean, scores = np.mean([len(row) for row in rows]), np.zeros(len(texts))
    for word in query:
        df = sum(word in row for row in rows)
        for i, row in enumerate(rows):
            tf = row.count(word)
            scores[i] += np.log(1 + (len(rows) - df + 0.5) / (df + 0.5)) * tf / (
                tf + k1 * (1 - b + b * len(row) / mean))
    return scores


def test_words_rank_as_the_formula_of_bm25():
    pytest.importorskip('bm25s')
    passages = store.Store(WORLD)
    name = next(name for name in WORLD if 'age' in WORLD[name])
    found = passages.by_words([f'{name} meets years'], 5)[0]
    scores = bm25([name.lower(), 'meets', 'years'], [re.sub(r'\b(a|is|in|of|the|are|has|often|not|can)\b', '', text)
                                                     for text in passages.texts])
    assert scores[found[0]] == pytest.approx(scores.max(), rel=0.2)
    assert passages.names[found[0]] == name
    for (owner, relation), i in passages.numbers.items():
        assert passages.names[i] == owner and WORLD[owner][relation] in passages.texts[i]


def test_nearest_and_fuse_by_hand():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]])
    assert store.nearest(vectors[:2], vectors, 2).tolist() == [[0, 2], [1, 2]]
    assert store.nearest(vectors[:1], vectors, 4).tolist() == [[0, 2, 1, 3]]
    # 1/61 + 1/63 against 2/62 against 1/63 + 1/61; alone: 1/64
    merged = store.fuse([np.array([[5, 6, 7]]), np.array([[7, 6, 5]])], 3)
    assert merged.tolist() == [[5, 7, 6]]
    assert store.fuse([np.array([[1, 2]]), np.array([[2, 3]])], 1).tolist() == [[2]]


def test_embeddings_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    words = tokenizer.ByteTokenizer()
    model = GPT(common.gpt_config(n_layer=1, n_head=2, n_embd=16, vocab_size=words.vocab_size, block_size=64)).eval()
    texts = ['Maru is old.', 'Zolin is a baker by trade. Zolin can not swim.', 'Kadu']
    vectors = store.embed(model, words, texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with torch.no_grad():
        means = np.stack([model.hidden(torch.tensor([words.encode(text)])).float().mean(1)[0].numpy()
                          for text in texts])
    means -= means.mean(0)
    assert np.allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-3)


def test_gain_is_paired():
    right = np.array([True] * 90 + [False] * 10)
    assert reader.gain(right, right) == [0, 0, 0]
    mean, low, high = reader.gain(right, ~right)
    assert mean == pytest.approx(80) and low < 80 < high and 20 < high - low < 30  # sd of a difference: 60


def test_the_most_frequent_value_by_hand():
    lab = load_lab('retrieval')
    world = {'A': {'job': 'cook', 'age': '3'}, 'B': {'job': 'cook', 'age': '4'}, 'C': {'job': 'poet', 'age': '4'}}
    asked = [('?', name, relation) for name in 'ABC' for relation in ('job', 'age')]
    assert lab.guess(world, asked).tolist() == [True, False, True, True, False, True]


def test_wrong_passages_lack_the_fact():
    lab = load_lab('retrieval')
    asked = lab.draw_questions(WORLD, 40)
    assert len({(name, relation) for _, name, relation in asked}) == 40
    for (_, name, relation), [same], [other] in zip(asked, *lab.wrong_passages(WORLD, asked, random.Random(0)),
                                                    strict=True):
        assert name in same and not any(text.format(name, WORLD[name][relation]) in same + other
                                        for text in facts.SENTENCES[relation])
        assert same != other


@pytest.mark.slow
def test_a_run(course):
    pytest.importorskip('bm25s')
    run = course.start('lab.retrieval', out='out', share=0.01, questions=10, people=20, towns=5).ok()
    figures = json.loads((course.path / 'out' / 'retrieval.json').read_text())
    assert set(figures['recalls']) == {'words (BM25)', 'embeddings', 'both'}
    for points in figures['recalls'].values():
        assert [mean for mean, *_ in points] == sorted(mean for mean, *_ in points)
        assert all(0 <= low <= mean <= high <= 100 for mean, low, high in points)
    assert all(known[0] + unknown[0] <= 100 for known, unknown in figures['answers'].values())
    assert len(figures['answers']) == 9 and set(figures['gains']) == {'closed book', 'most frequent value'}
    assert (course.path / 'out' / 'retrieval.png').stat().st_size > 5_000
    report = run.out[run.out.index('facts in') : run.out.index('for example:')]  # its answer may be long
    assert all(len(line) <= 80 for line in report.splitlines())


@pytest.mark.parametrize('changes, said', [({'questions': 0}, 'questions=0: expected 10'),
                                           ({'share': 0}, 'share=0: expected above 0')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.retrieval', **changes).wait().refused(said)
