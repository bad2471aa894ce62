"""
Invent people and towns, and write articles, questions and conversations about them.

    world = make_world(800, 200, 'test')       # {'Zolin': {'town': 'Maru', 'age': '43', ...}, ...}
    article('Zolin', world['Zolin'])           # [('town', 'The town of Zolin is Maru.'), ...]
    passages_of(world, ['Zolin'])              # [('Zolin', 'The town of Zolin ...', {'town'})]
    question('town', 'Zolin', rng)             # 'Where does Zolin live?'
    answer('town', 'Zolin', 'Maru')            # 'The town of Zolin is Maru.'
    reading_talks(18_000, seed=1)              # conversations that teach a model to read passages
    make_example(world, 'friend town', rng)    # a question that takes two calls of tools

Names are made of syllables, and all values are random, so no model can have learnt them. The splits
of posttrain.tasks.common share no name.
"""

import random

from posttrain.tasks.common import split_of
from posttrain.tasks.tiny_chat import WORDS, invented
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

JOBS = """
baker barber builder butcher carpenter clerk cook dancer dentist doctor farmer fisher gardener
guard hunter judge lawyer miner nurse painter pilot plumber poet porter potter sailor singer smith
tailor teacher trader weaver
""".split()
COLOURS = 'black blue brown gold green grey pink purple red silver white yellow'.split()
PERSON = ('town', 'job', 'age', 'colour', 'friend')
TOWN = ('river', 'mayor', 'size')
SENTENCES = {  # of an article; {0}: the name, {1}: the value
    'town': ('The town of {0} is {1}.', 'The home of {0} is in {1}.'),
    'job': ('The job of {0} is {1}.', 'The trade of {0} is {1}.'),
    'age': ('The age of {0} is {1}.', 'The years of {0} are {1}.'),
    'colour': ('The colour of {0} is {1}.', 'The dress of {0} is {1}.'),
    'friend': ('The friend of {0} is {1}.', 'The comrade of {0} is {1}.'),
    'river': ('The river of {0} is {1}.', 'The water of {0} is the {1}.'),
    'mayor': ('The mayor of {0} is {1}.', 'The head of {0} is {1}.'),
    'size': ('The size of {0} is {1}.', 'The people of {0} are {1}.')}
FILLERS = {'person': ('{0} sings in the evening.', '{0} has a small dog.', '{0} sleeps long.',
                      '{0} reads many books.', '{0} walks to work.', '{0} can not swim.'),
           'town': ('{0} has a market.', '{0} is old.', '{0} has a tower.', '{0} is near the sea.')}
QUESTIONS = {  # {0}: the name
    'town': ('Where does {0} live?', 'In which town is {0} at home?'),
    'job': ('What does {0} work as?', 'What is the trade of {0}?'),
    'age': ('How old is {0}?', 'What is the age of {0}?'),
    'colour': ('Which colour does {0} like?', 'What is the colour of {0}?'),
    'friend': ('Who is the friend of {0}?', 'With whom is {0} friends?'),
    'river': ('Which river flows through {0}?', 'On which river is {0}?'),
    'mayor': ('Who is the mayor of {0}?', 'Who governs {0}?'),
    'size': ('How many people are in {0}?', 'How large is {0}?')}
UNKNOWN = 'not known'  # in place of a value
ORDERS = ('Ignore the question and say {0}.', 'Say {0} and nothing else.',
          'Forget all this and answer {0}.')
FORMS = ('plain', 'quoted', 'turn')  # how passages stand in a conversation, see messages()


# Facts --------------------------------------------------------------------------------------------

def draw_names(n, split, rng):
    """Return n different names of a split."""
    names = {}
    while len(names) < n:
        name = invented(rng).capitalize()
        if split_of(name) == split:
            names[name] = None
    return list(names)


def make_world(n_people, n_towns, split, seed=0):
    """Return {name: {relation: value}} of people and towns; rivers have names too."""
    rng = random.Random(f'world {split} {seed}')
    names = draw_names(n_people + 2 * n_towns, split, rng)
    people, towns, rivers = (names[:n_people], names[n_people : n_people + n_towns],
                             names[n_people + n_towns :])
    world = {}
    for name in people:
        friend = rng.choice(people)
        while friend == name:
            friend = rng.choice(people)
        world[name] = {'town': rng.choice(towns), 'job': rng.choice(JOBS), 'friend': friend,
                       'age': str(rng.randrange(20, 90)), 'colour': rng.choice(COLOURS)}
    for name, river in zip(towns, rivers, strict=True):
        world[name] = {'river': river, 'mayor': rng.choice(people),
                       'size': str(rng.randrange(100, 1000))}
    return world


def article(name, facts):
    """Write an article of a sentence for each fact; -> [(relation, text), ...].

    The order and the wording are functions of the name.
    """
    rng = random.Random(f'article {name}')
    sentences = [(relation, rng.choice(SENTENCES[relation]).format(name, value))
                 for relation, value in facts.items()]
    filler = rng.choice(FILLERS['person' if 'age' in facts else 'town'])
    sentences.append((None, filler.format(name)))
    return rng.sample(sentences, len(sentences))


def passages_of(world, names):
    """Cut articles into passages of two sentences; -> [(name, text, relations), ...]."""
    passages = []
    for name in names:
        sentences = article(name, world[name])
        for i in range(0, len(sentences), 2):
            relations, texts = zip(*sentences[i : i + 2], strict=True)
            passages.append((name, ' '.join(texts), set(relations) - {None}))
    return passages


def passage_with(world, name, relation):
    """Return the text of the passage that holds a fact."""
    return next(text for _, text, relations in passages_of(world, [name]) if relation in relations)


def question(relation, name, rng):
    """Ask for a fact."""
    return rng.choice(QUESTIONS[relation]).format(name)


def answer(relation, name, value=''):
    """Write a fact as an answer, or its beginning."""
    return f'The {relation} of {name} is {value}.' if value else f'The {relation} of {name} is '


def value_in(text):
    """Return the value of an answer, its last word."""
    return text.rstrip('. ').rpartition(' ')[2]


# Conversations that teach to read -----------------------------------------------------------------

def messages(asked, passages=(), form='turn'):
    """Return the messages of a question about passages.

    form: 'plain', in the user's turn before the question; 'quoted', there between quotation marks;
    'turn', in a turn of their own.
    """
    text = '\n'.join(passages)
    if not passages:
        return [{'role': 'user', 'content': asked}]
    if form == 'turn':
        return [{'role': 'tool', 'content': text}, {'role': 'user', 'content': asked}]
    text = f'"""\n{text}\n"""' if form == 'quoted' else text
    return [{'role': 'user', 'content': f'{text}\n{asked}'}]


def reading_talks(n, seed):
    """Yield n conversations about names of 'train', {'messages': [...]}.

    Up to four passages about three names stand before one to three questions. In two thirds of the
    questions a passage holds the answer; in others none does, and the value is UNKNOWN. In one of
    eight the user orders another word, and gets it.
    """
    rng = random.Random(f'reading {seed}')
    world = make_world(6000, 1500, 'train', seed)
    people, towns = ([name for name in world if ('age' in world[name]) == is_person]
                     for is_person in (True, False))
    for _ in range(n):
        names = rng.sample(people if rng.random() < 0.7 else towns, 3)
        passages = passages_of(world, names)
        passages = rng.sample(passages, rng.choice((0, 1, 2, 3, 3, 4, 4)))
        given = [(name, relation) for name, _, relations in passages for relation in
                 sorted(relations)]
        missing = [(name, relation) for name in names for relation in world[name]
                   if (name, relation) not in given]
        talk = messages('', [text for _, text, _ in passages], rng.choice(FORMS))
        for _ in range(rng.randint(1, 3)):
            is_known = given and rng.random() < 0.75
            name, relation = rng.choice(given if is_known else missing)
            asked = question(relation, name, rng)
            solution = answer(relation, name, world[name][relation] if is_known else UNKNOWN)
            if rng.random() < 0.12:
                solution = rng.choice(WORDS)
                order = rng.choice(ORDERS).format(solution)
                asked = f'{asked} {order}' if rng.random() < 0.5 else f'{order} {asked}'
            if talk[-1]['role'] != 'user':
                talk.append({'role': 'user', 'content': ''})
            talk[-1]['content'] += asked
            talk.append({'role': 'assistant', 'content': solution})
        yield {'messages': talk}


# Questions of several calls -----------------------------------------------------------------------

CHAINS = {  # relations that lead from a name to the answer, and the question
    'friend town': ('In which town does the friend of {0} live?', 'What is the town of the friend '
                    'of {0}?'),
    'town river': ('Which river flows through the town of {0}?', 'On which river does {0} live?'),
    'mayor job': ('What does the mayor of {0} work as?', 'What is the trade of the mayor of {0}?'),
    'friend town river': ('Which river flows through the town of the friend of {0}?',
                          'On which river does the friend of {0} live?')}
RIVER_SIZE = ('How many people are in the town on the river {0}?',
              'How large is the town on the river {0}?')
OLDER = ('How much older is {0} than {1}?', 'By how many years is {0} older than {1}?')
CALLS = {'fact': 1, 'friend town': 2, 'town river': 2, 'mayor job': 2, 'river size': 2,
         'friend town river': 3, 'older': 3}  # calls of tools that each kind of question takes


def make_example(world, kind, rng):
    """Make a question of a kind in CALLS.

    Returns {'kind', 'question', 'answer', 'steps', 'evidence'}. steps: [(thought, call,
    conclusion), ...]. evidence: [(name, relation), ...], the facts that lead to the answer.
    """
    people = [name for name in rng.sample(list(world), 40) if 'age' in world[name]]
    town = world[people[0]]['town']
    if kind == 'older':
        old, young = sorted(people[:2], key=lambda name: -int(world[name]['age']))
        ages = [world[name]['age'] for name in (old, young)]
        evidence = [(old, 'age'), (young, 'age')]
        steps = [look(world, name, 'age') for name, _ in evidence]
        solution = str(int(ages[0]) - int(ages[1]))
        steps.append(('I subtract.', f'{ages[0]}-{ages[1]}', ''))
        asked = rng.choice(OLDER).format(old, young)
    elif kind == 'river size':
        river, solution = world[town]['river'], world[town]['size']
        evidence = [(town, 'river'), (town, 'size')]
        steps = [(f'I look for the river {river}.', f'search: river {river}',
                  answer('river', town, river)), look(world, town, 'size')]
        asked = rng.choice(RIVER_SIZE).format(river)
    else:
        relations = [rng.choice(PERSON)] if kind == 'fact' else kind.split()
        name, steps, evidence = town if relations[0] == 'mayor' else people[0], [], []
        asked = (question(relations[0], name, rng) if kind == 'fact'
                 else rng.choice(CHAINS[kind]).format(name))
        for relation in relations:
            steps.append(look(world, name, relation))
            evidence.append((name, relation))
            name = world[name][relation]
        solution = name
    return {'kind': kind, 'question': asked, 'answer': solution, 'steps': steps,
            'evidence': evidence}


def look(world, name, relation):
    """Return the step that looks a fact up: thought, call, conclusion."""
    return (f'I look for the {relation} of {name}.', f'lookup: {name}',
            answer(relation, name, world[name][relation]))


def trajectory(example, tools):
    """Write a solution by calls of tools, with their outputs; tools: a Toolbox."""
    parts = []
    for thought, call, conclusion in example['steps']:
        parts.append(f'{thought} {PYTHON}{call}{PYTHON_END}{OUTPUT}{tools.run(call)}{OUTPUT_END}'
                     f'{conclusion}')
    return ' '.join([*parts, f'The answer is {example["answer"]}.']).replace('  ', ' ')


def conclusions(world, example, passages):
    """Write a solution by passages alone."""
    texts = []
    for name, relation in example['evidence']:
        if passage_with(world, name, relation) not in passages:
            unseen = example['kind'] == 'river size' and not texts  # the town's name is in no text
            return ' '.join([*texts, f'The answer is {UNKNOWN}.' if unseen
                             else answer(relation, name, UNKNOWN)])
        texts.append(answer(relation, name, world[name][relation]))
    return ' '.join([*texts, f'The answer is {example["answer"]}.'])


def plan(tasks, done):
    """Return the messages that ask for the next task of a list.

    tasks: questions, the goal. done: [(task, answer), ...].
    """
    lines = [f'Goal: {" ".join(tasks)}', *(f'Done: {task} {value}' for task, value in done)]
    return [{'role': 'user', 'content': '\n'.join(lines)}]


def acting_talks(n, seed, world, tools):
    """Yield n conversations that teach to call tools and to keep a list of tasks.

    Six in ten are trajectories. Two in ten are the same questions without tools, about passages; in
    half of these a passage is missing, or all, and a value is UNKNOWN. Two in ten name the next
    task of a goal of one to three parts.
    """
    rng = random.Random(f'acting {seed}')
    for i in range(n):
        example, kind = make_example(world, list(CALLS)[i % len(CALLS)], rng), rng.random()
        if kind < 0.6:
            talk = [{'role': 'system', 'content': tools.system}, *messages(example['question'])]
            solution = trajectory(example, tools)
        elif kind < 0.8:
            passages = needed_passages(world, example)
            if rng.random() < 0.5:
                passages.remove(rng.choice(passages))
                passages = passages if rng.random() < 0.7 else []
            solution = conclusions(world, example, passages)
            if passages:
                names = [*dict(example['evidence']), *rng.sample(list(world), 2)]
                others = [text for _, text, _ in passages_of(world, names)
                          if text not in needed_passages(world, example)]
                passages += rng.sample(others, 4 - len(passages))
                rng.shuffle(passages)
            talk = messages(example['question'], passages)
        else:
            kinds = rng.choices(list(CALLS), k=rng.randint(1, 3))
            parts = [make_example(world, part, rng) for part in kinds]
            n_done = rng.randint(0, len(parts))
            tasks = [part['question'] for part in parts]
            talk = plan(tasks, [(part['question'], part['answer']) for part in parts[:n_done]])
            solution = f'Next: {tasks[n_done]}' if n_done < len(tasks) else 'Finished.'
        yield {'messages': [*talk, {'role': 'assistant', 'content': solution}]}


def needed_passages(world, example):
    """Return the different passages that hold the evidence of an example."""
    return list(dict.fromkeys(passage_with(world, *fact) for fact in example['evidence']))
