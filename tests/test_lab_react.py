"""lab/react.py: trajectories are right by construction, tools read the world, faults and lists by hand."""

import json
import random
import re

import pytest
from conftest import load_lab

from lab import facts
from posttrain.tools import toolbox
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

pytest.importorskip('bm25s')
lab = load_lab('react')
WORLD = facts.make_world(60, 15, 'test')
TOOLS = toolbox('calculator,lookup,search')


@pytest.fixture(autouse=True)
def world():
    lab.open_world(WORLD)


def walk(kind, example):
    """The answer to a question, found from its names alone."""
    names = [word for word in re.findall(r'[A-Z][a-z]+', example['question'])
             if word in WORLD or any(values.get('river') == word for values in WORLD.values())]
    if kind == 'older':
        return str(int(WORLD[names[0]]['age']) - int(WORLD[names[1]]['age']))
    if kind == 'river size':
        return next(values['size'] for values in WORLD.values() if values.get('river') == names[0])
    value = names[0]
    for relation in kind.split():
        value = WORLD[value][relation]
    return value


@pytest.mark.parametrize('kind', facts.CALLS)
def test_trajectories_lead_to_the_answer(kind):
    for seed in range(10):
        example = facts.make_example(WORLD, kind, random.Random(seed))
        text = facts.trajectory(example, TOOLS)
        outputs = re.findall(f'{re.escape(OUTPUT)}(.*?){re.escape(OUTPUT_END)}', text)
        assert len(lab.CALL.findall(text)) == len(outputs) == facts.CALLS[kind] == len(example['steps'])
        assert not any(output.startswith('error') for output in outputs)
        if kind != 'fact':
            assert example['answer'] == walk(kind, example)
        passages = facts.needed_passages(WORLD, example)
        assert lab.is_right(example, text) and lab.is_right(example, facts.conclusions(WORLD, example, passages))
        for i, (name, relation) in enumerate(example['evidence']):
            rest = [other for other in passages if other != facts.passage_with(WORLD, name, relation)]
            said = facts.conclusions(WORLD, example, rest)
            assert said.endswith('is not known.') and said.count('. ') <= i and WORLD[name][relation] not in said
        if kind != 'older':
            assert example['answer'] in outputs[-1]
        assert text.endswith(f'The answer is {example["answer"]}.') and '  ' not in text
        assert lab.fault(example, text, WORLD) is None
        held = ' '.join(facts.needed_passages(WORLD, example))
        assert all(WORLD[name][relation] in held for name, relation in example['evidence'])


def test_tools_read_the_world():
    name = next(iter(WORLD))
    assert TOOLS.run(f'lookup: {name}').count(name) >= 6 and TOOLS.run('lookup: Nobody').startswith('error: there is no')
    town = next(name for name in WORLD if 'river' in WORLD[name])
    assert town in TOOLS.run(f'search: river {WORLD[town]["river"]}')
    assert TOOLS.run('43-31') == '12'


def calls(*names, end='The answer is x.'):
    return ' '.join(f'{PYTHON}{name}{PYTHON_END}{OUTPUT}...{OUTPUT_END}' for name in names) + f' {end}'


def test_faults_by_hand():
    one, two, other = list(WORLD)[:3]
    example = {'answer': '7', 'steps': [('', f'lookup: {one}', ''), ('', f'lookup: {two}', '')]}
    right = f'lookup: {one}', f'lookup: {two}'
    assert lab.fault(example, calls(*right, end='The answer is 7.'), WORLD) is None
    assert lab.fault(example, calls(*right), WORLD) == 'wrong last step'
    assert lab.fault(example, calls(right[0]), WORLD) == 'too few calls'
    assert lab.fault(example, calls(right[0], 'lookup: Nobody'), WORLD) == 'name miscopied'
    assert lab.fault(example, calls(right[0], f'lookup: {other}'), WORLD) == 'wrong call'
    assert lab.fault(example, calls(right[0], '3-2'), WORLD) == 'wrong call'
    assert lab.fault(example, calls(*right, right[1]), WORLD) == 'no end'
    assert lab.fault(example, calls(*right, end=PYTHON), WORLD) == 'no end'


def test_faults_of_a_list_by_hand():
    job = [{'question': 'A?', 'answer': '1'}, {'question': 'B?', 'answer': '2'}]
    done = [('A?', 'The answer is 1.'), ('B?', 'The answer is 2.')]
    assert lab.list_fault(job, done) is None and lab.list_fault(job, done[::-1]) is None
    assert lab.list_fault(job, done[:1]) == lab.list_fault(job, []) == 'task forgotten'
    assert lab.list_fault(job, [*done, done[0]]) == 'task repeated'
    assert lab.list_fault(job, [done[0], ('C?', '2')]) == 'task miscopied'
    assert lab.list_fault(job, [done[0], ('B?', 'The answer is 3.')]) == 'task failed'


def test_a_loop_works_off_a_list(monkeypatch):
    """A scripted agent: it names the tasks in turn, forgets the last of the second goal, and repeats the third's."""
    jobs = [[{'question': f'{name}{i}?', 'answer': str(i)} for i in range(3)] for name in 'ABC']

    def read(agent, asked):
        replies = []
        for [message] in asked:
            goal, *done = message['content'].splitlines()
            tasks = [f'{part}?' for part in goal.removeprefix('Goal: ').replace('? ', '?').split('?')[:-1]]
            n = 0 if tasks[0][0] == 'C' else len(done)
            replies.append('Finished.' if n == len(tasks) - (tasks[0][0] == 'B') else f'Next: {tasks[n]}')
        return replies

    monkeypatch.setattr(lab, 'read', read)
    monkeypatch.setattr(lab, 'act', lambda agent, asked, tools: [f'The answer is {text[1]}.' for text in asked])
    done = lab.work_off(None, jobs, TOOLS)
    assert [len(tasks) for tasks in done] == [3, 2, 6]
    assert [lab.list_fault(*pair) for pair in zip(jobs, done, strict=True)] == [None, 'task forgotten', 'task forgotten']


def test_talks_without_their_passages_have_no_answer():
    counts = {'trajectory': 0, 'list': 0, 'passages': 0, 'unknown': 0}
    for talk in facts.acting_talks(140, 1, WORLD, TOOLS):
        first, answer = talk['messages'][0], talk['messages'][-1]['content']
        if first['role'] == 'system':
            counts['trajectory'] += 1
        elif first['content'].startswith('Goal: '):
            counts['list'] += 1
            if answer != 'Finished.':
                assert answer.removeprefix('Next: ') in first['content'].partition('\n')[0]
                assert f'Done: {answer.removeprefix("Next: ")}' not in first['content']
        elif answer.endswith(f'{facts.UNKNOWN}.'):
            counts['unknown'] += 1
        else:
            counts['passages'] += 1
            for relation, name, value in re.findall(r'The (\w+) of (\w+) is (\w+)\.', answer):
                assert WORLD[name][relation] == value and value in first['content']
    assert counts['trajectory'] > 60 and min(counts.values()) > 5


@pytest.mark.slow
def test_a_run(course):
    run = course.start('lab.react', out='out', share=0.01, questions=2, goals=1, parts=2).ok()
    figures = json.loads((course.path / 'out' / 'react.json').read_text())
    assert set(figures['results']) == set(lab.METHODS) and set(figures['by_kind']) == set(facts.CALLS)
    assert all(set(by_calls) == {'1', '2', '3'} for by_calls in figures['results'].values())
    assert set(figures['lists']) == {'1', '2'}
    assert (course.path / 'out' / 'react.png').stat().st_size > 5_000
    report = run.out[run.out.index('right, %, by the calls') :]
    assert all(len(line) <= 80 for line in report.splitlines())


@pytest.mark.parametrize('changes, said', [({'questions': 0}, 'questions=0: expected 1'),
                                           ({'parts': 0}, 'parts=0: expected 1')])
def test_bad_settings_are_refused(folder, changes, said):
    folder.start('lab.react', **changes).wait().refused(said)
