"""Make questions for a model of a million parameters: sums, letters, words, tables.

    for example in examples('test', 7, seed=0):
        print(example['messages'][0]['content'], '->', example['solution'])

Any number of questions is generated and checked. A right answer ends with 'The answer
is 632.'. posttrain/tasks/common.py describes tasks. An example also has

    steps       the solution, one step at a time; None where there is nothing to write down
    call        the same as an expression for the calculator; None where it cannot help
    mistakes    likely wrong answers: a carry forgotten, two letters swapped
    mistaken    (steps with one mistake, the wrong answer that follows); None without steps
    facts       the subject in plain sentences, for texts without questions

The numbers or words of a question decide its split, not its wording: a + b is in the same split as
b + a, and so are all orders of a list to sort. 'val' and 'test' have no question twice.
"""

import random

from configurator import UserError
from posttrain.tasks.common import check_kinds, check_split, split_of

# common English words of three to eight letters
WORDS = """
able air apple arm army art ask aunt baby back bad ball band bank base bath bean bear beat bed bee
bell belt bench best big bird bite black blood blue board boat body bone book boot born bottle
bottom bowl box boy brain branch bread break bridge bring brother brown brush build bus butter
button buy cake call camp can cap car card care carpet carry case cat chair chalk cheese chest
chicken child church circle city class clean clock cloud coal coat coffee cold colour comb come cook
copper cord corn cotton cough country cover cow crab cream cross crowd cry cup curtain cut dance
dark daughter day deep desk dinner dirty dish doctor dog door dress drink drive drop dry duck dust
ear early earth east egg eight end engine eye face fall family farm fast father feather field fight
finger fire first fish flag flat floor flower fly food foot forest fork friend frog fruit full
garden gate girl give glass glove goat gold good grain grape grass green grey ground hair hammer
hand happy hat head heart hill hole home honey hook horse hotel hour house ice iron island jam jewel
judge jump keep kettle key kick king kitchen knee knife knot lake lamp land leaf leg lemon letter
light line lion lip lock long map market match meat metal milk mirror monkey moon morning mother
mountain mouse mouth narrow neck needle nest new night noise north nose nut office oil old onion
open orange oven paint paper parcel park pen pencil pepper picture pig pin pipe plane plate plough
pocket pot potato queen rain red rice ring river road roof room root rose sail salt sand school sea
seed sheep shelf ship shirt shoe shop silver sister skirt sky sleep snake snow soap sock song spoon
spring square stamp star station stem stone store story street sugar summer sun table tail tall ten
thread ticket tooth town train tree trouser umbrella village voice wagon wall warm watch water wave
west wheel white window wine winter wood wool worm yellow young
""".split()
NAMES = 'Ann Ben Cleo Dan Eve Finn Gus Hana Ida Jon Kim Leo Mia Ned Ola Pia Ron Sue Tom Zoe'.split()
GOODS = ('apple bean book bread cake cheese cup egg fork hat lamp milk pen pot ring rice rope sock '
         'soap wool').split()
COLOURS = 'black blue brown green grey orange red white yellow'.split()
FORM = 'The answer is'

# Kinds of questions: functions of rng -> dict, see make() ---------------------------------------

def addition(rng):
    a, b = number(rng), number(rng)

    def work(wrong=None):
        """Return steps and sum. The column `wrong` is off by one."""
        steps, carry, total = [], 0, 0
        for i, (x, y) in enumerate(columns(a, b)):
            column = x + y + carry
            column = max(0, column + rng.choice((-1, 1))) if i == wrong else column
            steps.append(f'{x}+{y}{"+1" * carry}={column}')
            total, carry = total + column % 10 * 10**i, column // 10
        return ', '.join(steps), total + carry * 10 ** len(steps)

    steps, _ = work()
    no_carry = sum((x + y) % 10 * 10**i for i, (x, y) in enumerate(columns(a, b)))
    return {
        'content': f'{min(a, b)}+{max(a, b)}', 'answer': a + b, 'steps': steps, 'call': f'{a}+{b}',
        'mistaken': work(rng.randrange(len(columns(a, b)))),
        'ways': [f'What is {a} + {b}?', f'What is {a} plus {b}?', f'Add {a} and {b}.',
                 f'{a} + {b} = ?', f'Can you add {b} to {a}?', f'What is the sum of {a} and {b}?'],
        'mistakes': [no_carry, *near(a + b)],
        'facts': [f'{a} + {b} = {a + b}', f'{a} plus {b} is {a + b}',
                  f'the sum of {a} and {b} is {a + b}', f'{a} + {b}: {steps}, so it is {a + b}']}


def subtraction(rng):
    a, b = sorted((number(rng), number(rng)), reverse=True)

    def work(wrong=None):
        """Return steps and difference. The column `wrong` is off by one or misborrows."""
        steps, borrow, total = [], 0, 0
        for i, (x, y) in enumerate(columns(a, b)):
            minuend = x if x >= y + borrow else x + 10
            column = minuend - y - borrow
            if i == wrong and minuend > x and rng.random() < 0.5:
                minuend, column = x, 0
            elif i == wrong:
                slip = rng.choice((-1, 1))
                if minuend == x and slip > 0:
                    minuend, column = x + 10, 9
                else:
                    column = max(0, column + slip)
            steps.append(f'{minuend}-{y}{"-1" * borrow}={column}')
            total, borrow = total + column * 10**i, int(minuend > x)
        return ', '.join(steps), total

    steps, _ = work()
    no_borrow = sum(abs(x - y) * 10**i for i, (x, y) in enumerate(columns(a, b)))
    return {
        'content': f'{a}-{b}', 'answer': a - b, 'steps': steps, 'call': f'{a}-{b}',
        'mistaken': work(rng.randrange(len(columns(a, b)))),
        'ways': [f'What is {a} - {b}?', f'What is {a} minus {b}?', f'Subtract {b} from {a}.',
                 f'{a} - {b} = ?', f'Take {b} away from {a}.', f'What is left of {a} without {b}?'],
        'mistakes': [no_borrow, *near(a - b)],
        'facts': [f'{a} - {b} = {a - b}', f'{a} minus {b} is {a - b}',
                  f'{b} from {a} leaves {a - b}', f'{a} - {b}: {steps}, so it is {a - b}']}


def counting(rng):
    letter, count, target = '', None, rng.randrange(4)  # 3 as often as 1, the usual count
    while count != target:
        text = word(rng)
        letter = rng.choice(text) if target else rng.choice('aeioubdlmnrst')
        count = text.count(letter)

    def work(wrong=None):
        """Return steps and count. The letter at `wrong` is missed or wrongly counted."""
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
        'ways': [f'How many times is the letter {letter} in {text}?',
                 f'How often does {letter} occur in {text}?',
                 f'Count the letter {letter} in {text}.',
                 f'How many {letter} are in the word {text}?'],
        'mistakes': [count + 1, *([count - 1, 0] if count else [2]), len(text)],
        'facts': [f'{text} has {count} {letter}', f'the letter {letter} is {count} times in {text}',
                  f'{letter} in {text}: {steps}, so it is {count}']}


def reversing(rng):
    text = word(rng)
    backwards, places = text[::-1], [f'{i}{char}' for i, char in enumerate(text, 1)]
    in_place, wrong = ' '.join(places), places[::-1]
    steps = f'{in_place}, {" ".join(wrong)}'
    i = rng.randrange(len(text) - 1)
    wrong[i : i + 2] = rng.choice(([wrong[i]], [wrong[i + 1], wrong[i]]))  # one left out, or a swap
    return {
        'content': text, 'answer': backwards, 'steps': steps, 'call': None,
        'mistaken': (f'{in_place}, {" ".join(wrong)}', ''.join(place[-1] for place in wrong)),
        'ways': [f'Reverse the word {text}.', f'What is {text} backwards?',
                 f'Write {text} from back to front.', f'How does {text} read backwards?'],
        'mistakes': [text, swapped(backwards, rng), dropped(backwards, rng)],
        'facts': [f'{text} backwards is {backwards}',
                  f'{text} reads {backwards} from back to front',
                  f'{text} backwards: {steps}, so it is {backwards}']}


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
        in_order, things, rule = sorted(items, key=int), 'numbers', 'from small to large'
    else:
        letters = rng.sample(sorted({word[0] for word in WORDS}), count)  # first letters differ
        items = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
        in_order, things, rule = sorted(items), 'words', 'by the alphabet'

    def work(order):
        """Return the keys of the items as given and in order: two digits, or a letter."""
        return ', '.join(' '.join(item.zfill(2) if item.isdigit() else item[0] for item in some)
                         for some in (items, order))

    i = rng.randrange(count - 1)
    given, answer, steps = ', '.join(items), ', '.join(in_order), work(in_order)
    more = str(rng.randrange(1, 100)) if items[0].isdigit() else rng.choice(WORDS)
    before, first, second, after = in_order[:i], in_order[i], in_order[i + 1], in_order[i + 2 :]
    wrong = [[*before, second, first, *after], [*before, first, first, *after],
             [*before, second, *after], [*before, first, more, second, *after],
             [*in_order, in_order[-1]]]
    mistaken = rng.choice(wrong)
    return {
        'content': answer, 'answer': answer, 'steps': steps, 'call': None,
        'mistaken': (work(mistaken), ', '.join(mistaken)),
        'ways': [f'Sort {given}.', f'Sort these {things}: {given}.', f'Put {given} in order.',
                 f'Order {rule}: {given}.'],
        'mistakes': [', '.join(order) for order in (*wrong, in_order[::-1], items)],
        'facts': [f'{given} in order: {answer}', f'{given} sorted is {answer}',
                  f'{given} in order: {steps}, so it is {answer}']}


def table(rng):
    count = rng.randint(3, 5)
    numbers = rng.sample(range(2, 100), count)
    about = rng.choice(('age', 'price', 'colour'))
    keys = rng.sample(GOODS if about == 'price' else NAMES, count)
    values = rng.sample(COLOURS, count) if about == 'colour' else list(map(str, numbers))
    rows = list(zip(keys, values, strict=True))
    key, value = rows[rng.randrange(count)]
    other_key, other_value = rng.choice([row for row in rows if row[0] != key])
    sentence = {'age': '{} is {} years old', 'price': 'the {} costs {}',
                'colour': '{} likes {}'}[about]
    questions = {
        'age': [f'How old is {key}?', f"What is {key}'s age?"],
        'price': [f'What does the {key} cost?', f'How much is the {key}?'],
        'colour': [f'What colour does {key} like?', f'Which colour is for {key}?']}[about]
    sentences = '\n'.join(sentence.format(*row) for row in rng.sample(rows, count))
    form, between, end = rng.choice([('{} {}', ', ', '.'), ('| {} | {} |', '\n', ''),
                                     ('{}: {}', '\n', '')])
    shown = between.join(form.format(*row) for row in rows) + end
    other_form = rng.choice([other for other in ('| {} | {} |', '{}: {}') if other != form])
    shown_again = '\n'.join(other_form.format(*row) for row in rng.sample(rows, count))
    mistaken = rng.choice(((other_key, other_value), (key, other_value)))
    return {
        'content': f'{sorted(rows)} {key}', 'answer': value, 'steps': form.format(key, value),
        'call': None, 'mistaken': (form.format(*mistaken), other_value),
        'ways': [f'{shown}\n{question}' for question in questions],
        'mistakes': [v for v in values if v != value],
        'facts': [f'{shown}\n{shown_again}\n{sentences}']}


KINDS = {kind.__name__: kind for kind in
         (addition, subtraction, counting, reversing, spelling, sorting, table)}


def number(rng):
    """Return a number of two or of three digits, each as often."""
    return rng.randrange(10, 100) if rng.random() < 0.5 else rng.randrange(100, 1000)


def columns(a, b):
    """Return the digits of a and b in pairs, from the units on, with leading zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(width)]


def near(value):
    """Return numbers that a slip makes of this one."""
    return [value + slip for slip in (1, -1, 10, -10, 100) if value + slip >= 0]


def word(rng):
    """Return one of WORDS, or as often a made-up one: those are too many to memorize."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return invented(rng)


def invented(rng):
    """Return a made-up word of two or three syllables."""
    n = rng.randint(2, 3)
    syllables = [rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(n)]
    return ''.join(syllables) + rng.choice(['', '', 'n', 'r', 's', 't'])


def swapped(text, rng):
    """Swap two neighbouring letters, different ones if there are any."""
    i = rng.choice([i for i in range(len(text) - 1) if text[i] != text[i + 1]] or [0])
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def dropped(text, rng):
    """Drop a letter."""
    i = rng.randrange(len(text))
    return text[:i] + text[i + 1 :]


# The task -----------------------------------------------------------------------------------------

def examples(split, n, seed=0, input='', kinds=()):
    """Return n examples, their kinds in turn, as a pure function of the arguments."""
    if input:
        raise UserError(f'input={input!r}: tiny_chat generates its questions; leave it out')
    check_split(split)
    check_kinds(kinds, KINDS)
    rng, chosen = random.Random(f'{split} {seed}'), list(kinds or KINDS)
    made, seen, tries = [], set(), 0
    while len(made) < n:
        kind = chosen[len(made) % len(chosen)]
        example = make(kind, rng)
        content, tries = example['content'], tries + 1
        if tries > 10_000:
            raise UserError(f'n={n}: {split} has fewer questions of kind {kind}; lower n')
        if split_of(content) == split and (split == 'train' or content not in seen):
            seen.add(content)
            made.append(example)
            tries = 0
    return made


def make(kind, rng):
    """Make an example of a kind, in whatever split it falls."""
    made = KINDS[kind](rng)
    question, answer = rng.choice(made['ways']), str(made['answer'])
    mistakes = [wrong for wrong in dict.fromkeys(map(str, made['mistakes'])) if wrong != answer]
    return {'messages': [{'role': 'user', 'content': question}], 'context': f'Q: {question}\nA:',
            'solution': f'{FORM} {answer}.', 'answer': answer, 'kind': kind,
            'content': f'{kind} {made["content"]}', 'steps': made['steps'], 'call': made['call'],
            'facts': made['facts'], 'mistaken': made['mistaken'], 'mistakes': mistakes}


def extract(text):
    """Return the text of a final 'The answer is ....', or None."""
    before, form, answer = text.strip().rpartition(f'{FORM} ')
    return answer[:-1] if form and answer.endswith('.') and answer != '.' else None


def evaluate(example, text):
    """Return whether the text ends with the right answer in this form."""
    return extract(text) == example['answer']


def reward(example, text):
    """Return 1 for the right answer, 0.1 for another answer in this form, 0 for none."""
    answer = extract(text)
    return 1.0 if answer == example['answer'] else 0.1 if answer is not None else 0.0
