"""lab/prompts.py: the prompts are those stated, graded answers are as wrong as their grade, and what a run writes."""

import json
import random

import pytest
from conftest import load_lab

from posttrain.tasks import tiny_chat
from posttrain.tasks.common import split_of

TINY = {'base_questions': 4, 'order_questions': 4, 'chat_questions': 6, 'talks': 60, 'max_iters': 100, 'share': 0.01,
        'out': 'out'}


@pytest.fixture(scope='module')
def lab():
    return load_lab('prompts')


def test_parts_join_to_a_line_of_the_texts(lab):
    for example in tiny_chat.examples('train', 200, kinds=lab.STATED):
        for form in lab.FORMS:
            begin, end = lab.parts(example, form)
            assert lab.final(end) == example['answer']
            assert not begin.endswith(' ') and end.startswith(' ')
            if form.startswith('as in its texts'):
                assert begin + end in example['facts']
                assert (example['steps'] in end) == form.endswith('steps')


def test_prompts_by_hand(lab):
    example = {'context': 'Q: What is 5 + 6?\nA:', 'solution': 'The answer is 11.', 'steps': '5+6=11', 'answer': '11',
               'facts': ['5 + 6 = 11', '5 plus 6 is 11', '5 + 6: 5+6=11, so it is 11']}
    expected = {'Q and A': 'Q: What is 5 + 6?\nA: The answer is 11.\n\nQ: What is 5 + 6?\nA:',
                'Q and A, steps': 'Q: What is 5 + 6?\nA: 5+6=11. The answer is 11.\n\nQ: What is 5 + 6?\nA:',
                'as in its texts': '5 plus 6 is 11\n5 plus 6 is', 'as in its texts, steps': '5 + 6: 5+6=11, so it is 11\n5 + 6:'}
    for form, prompt in expected.items():
        assert lab.solve_before(example, [example], form) == prompt


def test_orders_are_balanced(lab):
    orders = lab.orders()
    assert len({*map(tuple, orders)}) == 8
    for place in range(4):
        assert sorted(order[place] for order in orders) == sorted([0, 1, 2, 3] * 2)


def test_answers_are_as_wrong_as_their_grade(lab):
    """Lines and steps are independent; only the phrase brings steps."""
    answers = {line: [] for line in lab.SLIPS}
    talks = list(lab.graded_talks(3000))
    examples = tiny_chat.examples('train', 3000, f'grades {lab.seed}')
    for talk, example in zip(talks, examples, strict=True):
        question, reply = (message['content'] for message in talk['messages'])
        assert split_of(example['content']) == 'train' and question.startswith(example['messages'][0]['content'])
        has_phrase = lab.STEP_BY_STEP in question
        line = next((line for line in lab.SLIPS if line and question.endswith(line)), '')
        if example['steps']:
            assert (not reply.startswith(tiny_chat.FORM)) == has_phrase
        answers[line].append((tiny_chat.evaluate(example, reply), has_phrase))
    for line, rows in answers.items():
        n = len(rows)
        assert abs(sum(not right for right, _ in rows) / n - lab.SLIPS[line]) < 4 * (0.25 / n) ** 0.5
        assert abs(sum(phrase for _, phrase in rows) / n - 0.8) < 4 * (0.25 / n) ** 0.5


def test_a_slip_is_never_right(lab):
    rng = random.Random(0)
    for example in tiny_chat.examples('train', 700):
        for has_steps in (False, True):
            assert tiny_chat.evaluate(example, lab.write_answer(example, has_steps, False, rng))
            assert not tiny_chat.evaluate(example, lab.write_answer(example, has_steps, True, rng))


@pytest.mark.slow
def test_a_small_run(course):
    run = course.start('lab.prompts', **TINY).wait(timeout=900)
    assert run.code == 0, run.out
    figures = json.loads((course.path / 'out' / 'prompts.json').read_text())
    assert len(figures['base']) == 16 and len(figures['phrase']) == 5 and len(figures['grades']) == 22
    for *_, result in figures['base'] + figures['phrase'] + figures['grades']:
        low, high = result['interval']
        assert 0 <= low <= result['right'] <= high <= 1 and result['written'] >= 1
    *_, report = run.out.partition('\nbase model')
    assert max(map(len, report.splitlines())) <= 80
    assert (course.path / 'out' / 'prompts.png').stat().st_size > 10_000


@pytest.mark.parametrize('changes, said', [
    ({'base_questions': 3}, 'base_questions=3: expected 4 or more'),
    ({'temperature': -1.0}, '--temperature=-1.0: expected 0 or more')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.prompts', **{**TINY, **changes}).wait().refused(said)
