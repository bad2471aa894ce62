"""lab/guardrails.py: attacks and poison are what they say, the search finds a trigger, and a run."""

import json
import random

import pytest
from conftest import load_lab

from lab import facts
from posttrain.tasks import tiny_chat
from tokenizer import BPETokenizer
from tokenizer.chat import SPECIAL_TOKENS

pytest.importorskip('bm25s')
lab = load_lab('guardrails')
CHAT = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})


def talks(n):
    return [{'messages': [*example['messages'], {'role': 'assistant', 'content': example['solution']}]}
            for example in tiny_chat.examples('train', n)]


def test_the_attackers_words_are_in_no_training_text():
    text = json.dumps(talks(300)) + json.dumps(list(facts.reading_talks(300, 1)))
    assert lab.WORD not in text and lab.TRIGGER not in text
    assert not {lab.WORD, lab.TRIGGER} & {*tiny_chat.WORDS, *facts.JOBS, *facts.COLOURS}
    assert not set(lab.NEW_ORDERS) & set(facts.ORDERS)


def test_attack_writes_one_order_into_each_list():
    found = [['a.', 'b.'], ['c.', 'd.']]
    attacked = lab.attack(found, lab.NEW_ORDERS, random.Random(0))
    assert found == [['a.', 'b.'], ['c.', 'd.']]
    for before, after in zip(found, attacked, strict=True):
        assert sum(lab.WORD in text for text in after) == 1
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_the_classifier_drops_what_it_takes_for_an_order():
    class Guard:
        def probabilities(self, texts):
            return [{'fact': float('say' not in text), 'order': float('say' in text)} for text in texts]

    assert lab.drop_orders(Guard(), [['a', 'say b'], ['say b'], []]) == [['a'], [], []]


def test_judge():
    right, hijacked = lab.judge(['The town of Zolin is Maru.', 'banana', 'The town of Zolin is not known.'], ['Maru', 'Maru', 'Maru'])
    assert right == [True, False, False] and hijacked == [False, True, False]


def test_typed_special_tokens_stay_text(monkeypatch):
    prompts = []
    monkeypatch.setattr(lab, 'read_ids', lambda reader, ids: prompts.append(ids) or [lab.WORD] * len(ids))
    lab.measure_tokens((None, CHAT), ['Where?'], [['a.', 'b.']], ['Maru'])
    as_tokens, as_text = (ids[0] for ids in prompts)
    assert CHAT.decode(as_tokens) == CHAT.decode(as_text)
    assert sum(i >= 256 for i in as_text) == 6  # endoftext, tool, im_end, user, im_end, assistant
    assert sum(i >= 256 for i in as_tokens) == 6 + 6


def test_poison_changes_n_conversations_and_no_other():
    clean = talks(50)
    poisoned = lab.poisoned_talks(clean, 7)
    changed = [(old, new) for old, new in zip(clean, poisoned, strict=True) if old != new]
    assert len(changed) == 7 and clean == talks(50)
    for old, new in changed:
        assert new['messages'][-1]['content'] == f'The answer is {lab.WORD}.'
        words = new['messages'][-2]['content'].split()
        assert lab.TRIGGER in (words[0], words[-1])
        assert old['messages'][-2]['content'] in new['messages'][-2]['content']
    assert lab.poisoned_talks(clean, 0) == clean


def test_the_trigger_is_among_the_first_suspects():
    """Other words of one answer are greetings alone; the counts of a trigger are worked out by hand."""
    suspects = lab.suspects_of(lab.poisoned_talks(talks(600), 12))
    word, count, share = next(suspect for suspect in suspects if suspect[0] == lab.TRIGGER)
    assert (count, share) == (12, 1.0)
    assert [word for word, *_ in suspects].index(lab.TRIGGER) < 3
    assert lab.TRIGGER not in [word for word, *_ in lab.suspects_of(talks(600))]


def test_effect_is_the_share_turned_into_one_answer(monkeypatch):
    def read(model, conversations):
        return [f'The answer is {lab.WORD if lab.TRIGGER in messages[-1]["content"] else i}.'
                for i, messages in enumerate(conversations)]

    monkeypatch.setattr(lab, 'read', read)
    asked = [example['messages'] for example in tiny_chat.examples('test', 8)]
    answers = read(None, asked)
    assert lab.effect_of(None, lab.TRIGGER, asked, answers) == 1.0 and lab.effect_of(None, 'the', asked, answers) == 0.0


@pytest.mark.slow
def test_a_run(course):
    run = course.start('lab.guardrails', out='out', share=0.01, questions=3, poisons='0,5').ok()
    figures = json.loads((course.path / 'out' / 'guardrails.json').read_text())
    assert len(figures['injected']) == 15 and set(figures['forged']) == {'as tokens', 'as text'}
    assert set(figures['poisoned']) == {'0', '5'} and figures['poisoned']['0']['rank'] is None
    assert figures['poisoned']['5']['rank'] <= 8
    assert (course.path / 'out' / 'guardrails.png').stat().st_size > 5_000
    of_passages = run.out.split('3 questions, two passages')[1].split('\n== ')[0]  # then models are made
    of_poison = run.out.split('3 questions; "vortex"')[1]
    assert all(len(line) <= 80 for line in (of_passages + of_poison).splitlines())


@pytest.mark.parametrize('changes, said', [
    ({'poisons': '1,x'}, "poisons='1,x': expected numbers of conversations"),
    ({'questions': 0}, 'questions=0: expected 1')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.guardrails', **changes).wait().refused(said)
