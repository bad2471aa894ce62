"""
Questions for a model of a million parameters: sums, letters, words and small tables. It makes them itself, as many as
one likes, and can tell whether an answer is right; see common.py for what a task is.

    for example in examples('test', 7, seed=0):
        print(example['messages'][0]['content'], '->', example['solution'])

An answer ends with 'The answer is 632.', whatever precedes it. An example also has

    steps       what leads there, one step at a time; None where there is nothing to write down
    call        the same as an expression for the calculator; None where it can't help
    mistakes    wrong answers that are easily given: a carry forgotten, two letters swapped
    mistaken    steps with one mistake and the wrong answer that they lead to, (steps, answer); None without steps
    facts       what the question is about in plain sentences, for a text that has no questions

A question's split is decided by its numbers or words, not by how it is put: what is asked in 'test' is asked in no way
in 'train', a + b not as b + a, numbers to be sorted in no other order. In 'val' and 'test' no question is asked twice.
"""

import random

from configurator import UserError
from posttrain.tasks.common import check_kinds, check_split, split_of

# common English words of three to eight letters
WORDS = """
able air apple arm army art ask aunt baby back bad ball band bank base bath bean bear beat bed bee bell belt bench best
big bird bite black blood blue board boat body bone book boot born bottle bottom bowl box boy brain branch bread break
bridge bring brother brown brush build bus butter button buy cake call camp can cap car card care carpet carry case cat
chair chalk cheese chest chicken child church circle city class clean clock cloud coal coat coffee cold colour comb
come cook copper cord corn cotton cough country cover cow crab cream cross crowd cry cup curtain cut dance dark
daughter day deep desk dinner dirty dish doctor dog door dress drink drive drop dry duck dust ear early earth east egg
eight end engine eye face fall family farm fast father feather field fight finger fire first fish flag flat floor
flower fly food foot forest fork friend frog fruit full garden gate girl give glass glove goat gold good grain grape
grass green grey ground hair hammer hand happy hat head heart hill hole home honey hook horse hotel hour house ice iron
island jam jewel judge jump keep kettle key kick king kitchen knee knife knot lake lamp land leaf leg lemon letter light
line lion lip lock long map market match meat metal milk mirror monkey moon morning mother mountain mouse mouth narrow
neck needle nest new night noise north nose nut office oil old onion open orange oven paint paper parcel park pen pencil
pepper picture pig pin pipe plane plate plough pocket pot potato queen rain red rice ring river road roof room root rose
sail salt sand school sea seed sheep shelf ship shirt shoe shop silver sister skirt sky sleep snake snow soap sock song
spoon spring square stamp star station stem stone store story street sugar summer sun table tail tall ten thread ticket
tooth town train tree trouser umbrella village voice wagon wall warm watch water wave west wheel white window wine
winter wood wool worm yellow young
""".split()
NAMES = 'Ann Ben Cleo Dan Eve Finn Gus Hana Ida Jon Kim Leo Mia Ned Ola Pia Ron Sue Tom Zoe'.split()
GOODS = 'apple bean book bread cake cheese cup egg fork hat lamp milk pen pot ring rice rope sock soap wool'.split()
COLOURS = 'black blue brown green grey orange red white yellow'.split()
FORM = 'The answer is'

# Each kind of question, as questions(rng) -> a dict, see make() -------------------------------------------------------


def addition(rng):
    a, b = number(rng), number(rng)

    def work(wrong=None):
        """-> steps and the sum, one too many or too few in the column `wrong`"""
        steps, carry, total = [], 0, 0
        for i, (x, y) in enumerate(columns(a, b)):
            here = x + y + carry
            here = max(0, here + rng.choice((-1, 1))) if i == wrong else here
            steps.append(f'{x}+{y}{"+1" * carry}={here}')
            total, carry = total + here % 10 * 10**i, here // 10
        return ', '.join(steps), total + carry * 10 ** len(steps)

    steps, _ = work()
    forgotten = sum((x + y) % 10 * 10**i for i, (x, y) in enumerate(columns(a, b)))  # every column alone
    return {
        'content': f'{min(a, b)}+{max(a, b)}', 'answer': a + b, 'steps': steps, 'call': f'{a}+{b}',
        'mistaken': work(rng.randrange(len(columns(a, b)))),
        'ways': [f'What is {a} + {b}?', f'What is {a} plus {b}?', f'Add {a} and {b}.', f'{a} + {b} = ?',
                 f'Can you add {b} to {a}?', f'What is the sum of {a} and {b}?'],
        'mistakes': [forgotten, *near(a + b)],
        'facts': [f'{a} + {b} = {a + b}', f'{a} plus {b} is {a + b}', f'the sum of {a} and {b} is {a + b}',
                  f'{a} + {b}: {steps}, so it is {a + b}']}


def subtraction(rng):
    a, b = sorted((number(rng), number(rng)), reverse=True)

    def work(wrong=None):
        """
        -> steps and the difference; in the column `wrong` it is borrowed when it is not needed, or the other way round,
        or one is missing or too many
        """
        steps, borrow, total = [], 0, 0
        for i, (x, y) in enumerate(columns(a, b)):
            x_here = x if x >= y + borrow else x + 10
            here = x_here - y - borrow
            if i == wrong and x_here > x and rng.random() < 0.5:
                x_here, here = x, 0
            elif i == wrong:
                slip = rng.choice((-1, 1))
                if x_here == x and slip > 0:
                    x_here, here = x + 10, 9
                else:
                    here = max(0, here + slip)
            steps.append(f'{x_here}-{y}{"-1" * borrow}={here}')
            total, borrow = total + here * 10**i, int(x_here > x)
        return ', '.join(steps), total

    steps, _ = work()
    forgotten = sum(abs(x - y) * 10**i for i, (x, y) in enumerate(columns(a, b)))  # the smaller from the larger
    return {
        'content': f'{a}-{b}', 'answer': a - b, 'steps': steps, 'call': f'{a}-{b}',
        'mistaken': work(rng.randrange(len(columns(a, b)))),
        'ways': [f'What is {a} - {b}?', f'What is {a} minus {b}?', f'Subtract {b} from {a}.', f'{a} - {b} = ?',
                 f'Take {b} away from {a}.', f'What is left of {a} without {b}?'],
        'mistakes': [forgotten, *near(a - b)],
        'facts': [f'{a} - {b} = {a - b}', f'{a} minus {b} is {a - b}', f'{b} from {a} leaves {a - b}',
                  f'{a} - {b}: {steps}, so it is {a - b}']}


def counting(rng):
    letter, count, wanted = '', None, rng.randrange(4)  # as often 3 as 1, which is what most letters of words are
    while count != wanted:
        text = word(rng)
        letter = rng.choice(text) if wanted else rng.choice('aeioubdlmnrst')
        count = text.count(letter)

    def work(wrong=None):
        """-> steps and the count, which at the place `wrong` misses a letter or counts another one"""
        seen, steps = 0, []
        for i, char in enumerate(text):
            counts = (char == letter) != (i == wrong)
            seen += counts
            steps.append(f'{char}{seen}' if counts else char)
        return ' '.join(steps), seen

    steps, _ = work()
    return {
        'content': f'{text} {letter}', 'answer': count, 'steps': steps, 'call': None,
        'mistaken': work(rng.randrange(len(text))),
        'ways': [f'How many times is the letter {letter} in {text}?', f'How often does {letter} occur in {text}?',
                 f'Count the letter {letter} in {text}.', f'How many {letter} are in the word {text}?'],
        'mistakes': [count + 1, *([count - 1, 0] if count else [2]), len(text)],
        'facts': [f'{text} has {count} {letter}', f'the letter {letter} is {count} times in {text}',
                  f'{letter} in {text}: {steps}, so it is {count}']}


def reversing(rng):
    text = word(rng)
    places = [f'{i}{char}' for i, char in enumerate(text, 1)]
    steps, wrong = f'{" ".join(places)}, {" ".join(reversed(places))}', places[::-1]
    i = rng.randrange(len(text) - 1)
    wrong[i : i + 2] = rng.choice(([wrong[i]], [wrong[i + 1], wrong[i]]))  # one left out, or two exchanged
    return {
        'content': text, 'answer': text[::-1], 'steps': steps, 'call': None,
        'mistaken': (f'{" ".join(places)}, {" ".join(wrong)}', ''.join(place[-1] for place in wrong)),
        'ways': [f'Reverse the word {text}.', f'What is {text} backwards?', f'Write {text} from back to front.',
                 f'How does {text} read backwards?'],
        'mistakes': [text, swapped(text[::-1], rng), dropped(text[::-1], rng)],
        'facts': [f'{text} backwards is {text[::-1]}', f'{text} reads {text[::-1]} from back to front',
                  f'{text} backwards: {steps}, so it is {text[::-1]}']}


def spelling(rng):
    text = word(rng)
    return {
        'content': text, 'answer': '-'.join(text), 'steps': None, 'call': None, 'mistaken': None,
        'ways': [f'Spell the word {text}.', f'How do you spell {text}?', f'Spell {text} for me.',
                 f'What are the letters of {text}?'],
        'mistakes': ['-'.join(swapped(text, rng)), '-'.join(dropped(text, rng)), text],
        'facts': [f'{text} is spelt {"-".join(text)}', f'{text}: {"-".join(text)}']}


def sorting(rng):
    count = rng.randint(3, 5)
    if rng.random() < 0.5:
        items = [str(i) for i in rng.sample(range(1, 100), count)]
        in_order = sorted(items, key=int)
        ways = ['Sort {}.', 'Sort these numbers: {}.', 'Put {} in order.', 'Order from small to large: {}.']
    else:
        letters = rng.sample(sorted({word[0] for word in WORDS}), count)  # the first ones decide
        items = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
        in_order = sorted(items)
        ways = ['Sort {}.', 'Sort these words: {}.', 'Put {} in order.', 'Order by the alphabet: {}.']

    def work(order):
        """-> what decides of each, first as they are given: two digits or a letter"""
        return ', '.join(' '.join(item.zfill(2) if item.isdigit() else item[0] for item in some)
                         for some in (items, order))

    i = rng.randrange(count - 1)
    given, answer, steps = ', '.join(items), ', '.join(in_order), work(in_order)
    more = str(rng.randrange(1, 100)) if items[0].isdigit() else rng.choice(WORDS)
    before, one, other, after = in_order[:i], in_order[i], in_order[i + 1], in_order[i + 2 :]
    wrong = [[*before, other, one, *after], [*before, one, one, *after], [*before, other, *after],
             [*before, one, more, other, *after], [*in_order, in_order[-1]]]
    mistaken = rng.choice(wrong)
    return {
        'content': answer, 'answer': answer, 'steps': steps, 'call': None,
        'mistaken': (work(mistaken), ', '.join(mistaken)),
        'ways': [way.format(given) for way in ways],
        'mistakes': [', '.join(order) for order in (*wrong, in_order[::-1], items)],
        'facts': [f'{given} in order: {answer}', f'{given} sorted is {answer}',
                  f'{given} in order: {steps}, so it is {answer}']}


def table(rng):
    count = rng.randint(3, 5)
    numbers = rng.sample(range(2, 100), count)
    about = rng.choice(('age', 'price', 'colour'))
    keys = rng.sample(GOODS if about == 'price' else NAMES, count)
    values = rng.sample(COLOURS, count) if about == 'colour' else [str(value) for value in numbers]
    asked = rng.randrange(count)
    key, value = keys[asked], values[asked]
    other_key, other_value = rng.choice([pair for pair in zip(keys, values, strict=True) if pair[0] != key])
    sentence = {'age': '{} is {} years old', 'price': 'the {} costs {}', 'colour': '{} likes {}'}[about]
    ask = {'age': [f'How old is {key}?', f"What is {key}'s age?"],
           'price': [f'What does the {key} cost?', f'How much is the {key}?'],
           'colour': [f'What colour does {key} like?', f'Which colour is for {key}?']}[about]
    rows = list(zip(keys, values, strict=True))
    said = '\n'.join(sentence.format(*row) for row in rng.sample(rows, count))
    row, between, end = rng.choice([('{} {}', ', ', '.'), ('| {} | {} |', '\n', ''), ('{}: {}', '\n', '')])
    shown = between.join(row.format(*pair) for pair in rows) + end
    other_row = rng.choice([form for form in ('| {} | {} |', '{}: {}') if form != row])
    shown_again = '\n'.join(other_row.format(*pair) for pair in rng.sample(rows, count))
    return {
        'content': f'{sorted(rows)} {key}', 'answer': value, 'steps': row.format(key, value), 'call': None,
        'mistaken': (row.format(*rng.choice(((other_key, other_value), (key, other_value)))), other_value),
        'ways': [f'{shown}\n{question}' for question in ask], 'mistakes': [v for v in values if v != value],
        'facts': [f'{shown}\n{shown_again}\n{said}']}


KINDS = {'addition': addition, 'subtraction': subtraction, 'counting': counting, 'reversing': reversing,
         'spelling': spelling, 'sorting': sorting, 'table': table}


def number(rng):
    """Of two or three digits, as often these as those."""
    return rng.randrange(10, 100) if rng.random() < 0.5 else rng.randrange(100, 1000)


def columns(a, b):
    """The digits of a and b that stand below each other, from the units on; a has as many as b or more, or gets 0."""
    width = max(len(str(a)), len(str(b)))
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(width)]


def near(value):
    """Numbers that a slip makes of this one."""
    return [wrong for wrong in (value + 1, value - 1, value + 10, value - 10, value + 100) if wrong >= 0]


def word(rng):
    """One of WORDS, or as often a made-up one, of which there are too many to learn each by heart."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    syllables = [rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(rng.randint(2, 3))]
    return ''.join(syllables) + rng.choice(['', '', 'n', 'r', 's', 't'])


def swapped(text, rng):
    """Two neighbouring letters exchanged, different ones if there are any."""
    i = rng.choice([i for i in range(len(text) - 1) if text[i] != text[i + 1]] or [0])
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def dropped(text, rng):
    i = rng.randrange(len(text))
    return text[:i] + text[i + 1 :]


# The task -------------------------------------------------------------------------------------------------------------


def examples(split, n, seed=0, input='', kinds=()):
    """n examples, of all kinds (or of `kinds`) in turn; a pure function of split, n, seed and kinds."""
    if input:
        raise UserError(f'input={input!r}: tiny_chat makes its own questions; leave it out')
    check_split(split)
    check_kinds(kinds, KINDS)
    rng, chosen, found, seen, tries = random.Random(f'{split} {seed}'), list(kinds or KINDS), [], set(), 0
    while len(found) < n:
        kind = chosen[len(found) % len(chosen)]
        example = make(kind, rng)
        tries += 1
        if tries > 10_000:
            raise UserError(f'n={n}: {split} has not so many different questions of kind {kind}; ask for fewer')
        if split_of(example['content']) == split and (split == 'train' or example['content'] not in seen):
            seen.add(example['content'])
            found.append(example)
            tries = 0
    return found


def make(kind, rng):
    """An example of a kind of question, whatever its split."""
    made = KINDS[kind](rng)
    question, answer = rng.choice(made['ways']), str(made['answer'])
    return {'messages': [{'role': 'user', 'content': question}], 'context': f'Q: {question}\nA:',
            'solution': f'{FORM} {answer}.', 'answer': answer, 'kind': kind, 'content': f'{kind} {made["content"]}',
            'steps': made['steps'], 'call': made['call'], 'facts': made['facts'], 'mistaken': made['mistaken'],
            'mistakes': [wrong for wrong in dict.fromkeys(map(str, made['mistakes'])) if wrong != answer]}


def extract(text):
    """What stands in the last 'The answer is ....', if the text ends with it; otherwise None."""
    before, form, answer = text.strip().rpartition(f'{FORM} ')
    return answer[:-1] if form and answer.endswith('.') and answer != '.' else None


def evaluate(example, text):
    """Whether the text ends with the right answer, in the form in which all answers end."""
    return extract(text) == example['answer']


def reward(example, text):
    """
    1 for the right answer, 0.1 for another one in the form in which answers end, 0 for none. A wrong answer's share is
    the same for all, so that nothing but a right one improves on it; there is none for steps, length or words.
    """
    answer = extract(text)
    return 1.0 if answer == example['answer'] else 0.1 if answer is not None else 0.0
