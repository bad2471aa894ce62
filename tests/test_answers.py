"""Find final answers in what models write: right, wrong, hedged and hostile ones."""

import random
import time

import pytest

from posttrain import answers
from posttrain.tasks import gsm8k, multiple_choice

NUMBERS = [  # text, the number that a reader takes from it
    ('The answer is 16.', '16'), ('16', '16'), ('$16', '16'), ('$16.00', '16'), ('16 dollars.', '16'),
    ('1,600', '1600'), ('\\boxed{16}', '16'), ('<answer>16</answer>', '16'), ('#### 16', '16'),
    ('**16**', '16'), ('**Answer:** 16', '16'), ('**Final Answer: 16 eggs**', '16'), ('Answer:\n16', '16'),
    ('The final answer is: $\\boxed{16}$.', '16'), ('<answer>\n\\boxed{16}\n</answer>', '16'),
    ('The answer is $16 per day.', '16'), ('So, the answer is **16 eggs**.', '16'),
    ('Janet makes 9 * 2 = $<<9*2=18>>18 every day.', '18'), ('16 - 3 - 4 = 9\n9 * 2 = 18', '18'),
    ('She sells 9 eggs.\nShe makes $18 every day at the market.', '18'),
    ('The total is 5 + 11 = 16 apples. I hope this helps!', '16'),
    ('\\[ 9 \\times 2 = 18 \\]\nTherefore, she makes \\(18\\) dollars.', '18'),
    ('Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\n\nThe answer is 14', '14'),
    ('\\boxed{16\\text{ dollars}}', '16'), ('\\boxed{\\$1{,}600}', '1600'), ('\\boxed{\\text{16}}', '16'),
    ('\\boxed{x = 16}', '16'), ('\\boxed{-16}', '-16'), ('\\boxed{16\\%}', '16'), ('\\boxed{90^\\circ}', '90'),
    ('The answer is 16.0', '16'), ('The answer is 16.50.', '16.5'), ('The answer is .5', '0.5'),
    ('The answer is -5 degrees.', '-5'), ('The answer is −5.', '-5'), ('It fell by -$5.', '-5'), ('-0.0', '0'),
    ('The answer is 3/4.', '0.75'), ('\\boxed{\\frac{3}{4}}', '0.75'), ('\\boxed{\\dfrac{10}{5}}', '2'),
    ('The answer is 1/3', '1/3'), ('The answer is 2/6', '1/3'), ('The answer is 20%.', '20'),
    ('The answer is not 16, it is 18', '18'), ("The answer isn't 16; it is 18.", '18'),
    ('The answer is 18, not 16.', '18'), ('The answer is 18 rather than 16 or 17.', '18'),
    ('The answer is 16. Wait, the answer is 18.', '18'), ('The answer is 16. No, it is 18.', '18'),
    ('The answer is not 16.', None), ('#### 16\n#### 18', '18'), ('\\boxed{16} and then \\boxed{18}', '18'),
    ('<think>The answer is 16.</think>The answer is 18.', '18'), ('<think>The answer is 16', None),
    ('The answer is 16 dollars for 2 days.', '16'), ('The answer is 16, since 20 - 4 = 16.', '16'),
    ('The answer is 16 or 18.', None), ('The answer is either 16 or 18.', None), ('16, 17, 18', None),
    ('The answer is 16 dollars or 18 dollars.', None), ('\\boxed{16, 18}', None), ('16-18', None),
    ('<answer>16 17 18</answer>', None), ('#### 16 or 18', None), ('between 16 and 18', None),
    ('The answer is 3 + 4', None), ('The answer is 3 1/2.', None), ('The answer is unknown.', None),
    ('I cannot solve this.', None), ('', None), ('It covers 16 m^2.', '16'), ('H2O', None), ('The 3rd', None),
    ('1e3', None), ('1/0', '1/0'), ('9' * 5000, '9' * 5000), ('10:30', None), ('The answer is 16kg', '16'),
    ('####18', '18'), ('#### 1,234,567', '1234567'), ('#### 7 apples', '7'), ('#### 012', '12'), ('#### -$1,234', '-1234'),
    ('#### $-5', '-5'), ('#### 5/6', '5/6'), ('#### 1e3', None), ('#### 1,080, in all', '1080'), ('#### 10,80.5', None),
    ('Answer: She sells 16 - 3 - 4 = 9 eggs. She makes 9 * 2 = 18 dollars.', '18')]

LETTERS = [
    ('B', 'B'), (' B\n', 'B'), ('B.', 'B'), ('B. iron', 'B'), ('B) iron', 'B'), ('(B)', 'B'), ('(b)', 'B'),
    ('**B**', 'B'), ('**B.**', 'B'), ('**B. iron**', 'B'), ('**(B) iron**', 'B'), ('[B]', 'B'), ('B: iron', 'B'),
    ('\\boxed{B}', 'B'), ('\\boxed{\\text{B}}', 'B'), ('$\\boxed{\\textbf{(B)}}$', 'B'), ('\\boxed{b}', 'B'),
    ('<answer>B</answer>', 'B'), ('<answer> (B) iron </answer>', 'B'), ('#### B', 'B'), ('Answer: B', 'B'),
    ('The answer is B', 'B'), ('The answer is (B).', 'B'), ('The correct answer is **B. iron**.', 'B'),
    ('The correct option is B because iron rusts.', 'B'), ('**Answer:** B', 'B'), ('The answer is A.', 'A'),
    ('The best choice is: (C) wood', 'C'), ('Iron is a metal. So the answer is B.', 'B'), ('B, because iron rusts', 'B'),
    ('Option B is correct.', 'B'), ('Iron rusts, so B is correct.', 'B'), ('Iron rusts. Therefore B.', 'B'),
    ('I think the answer is B.', 'B'), ('A is a gas, so the answer is B.', 'B'), ('The answer is B, since C is soft.', 'B'),
    ('The answer is not A, it is B.', 'B'), ("It isn't A. The answer is B", 'B'), ('The answer is B, not C.', 'B'),
    ('The answer is A. Wait, the answer is B.', 'B'), ('<think>The answer is A.</think>B', 'B'),
    ('A metal rusts. The answer is B.', 'B'), ('B. A metal', 'B'), ('B is it, C is not', 'B'), ('\\boxed{A} or rather \\boxed{B}', 'B'),
    ('A or B', None), ('A/B', None), ('A, B', None), ('A, B, C and D', None), ('Either A or B.', None),
    ('(A) or (B)', None), ('The answer is A or B.', None), ('The answer is (A) and (B).', None), ('A and B', None),
    ('A. air\nB. iron\nC. wood\nD. glass', None), ('A) air B) iron C) wood D) glass', None), ('ABCD', None),
    ('Answer: A. air\nB. iron\nC. wood\nD. glass', None), ('Answer: A. air B. iron', None), ('A\nB\nC\nD', None),
    ('Answer: A air B iron C wood D glass', None), ('(A) air (B) iron (C) wood', None), ('**A** **B** **C**', None),
    ('<answer>A, B, C, D</answer>', None), ('\\boxed{A B C D}', None), ('#### A B', None), ('A - air, B - iron', None),
    ('A B C D', None), ('All of the above', None), ('None of them', None), ('The answer is not B.', None),
    ('Bananas', None), ('b', None), ('Z', None), ('', None), ('A dog', None), ('I do not know.', None), ("I'm not sure", None),
    ('The answer is iron.', None), ('A, as in air; B, as in iron', None), ('B. Vitamin C.', 'B')]


@pytest.mark.parametrize('text, number', NUMBERS)
def test_numbers(text, number):
    assert answers.number_in(text) == number
    assert gsm8k.reward({'answer': '18'}, text) == float(number == '18')


@pytest.mark.parametrize('text, letter', LETTERS)
def test_letters(text, letter):
    assert answers.letter_in(text) == letter
    assert multiple_choice.reward({'answer': 'B'}, text) == float(letter == 'B')


def test_lists_of_all_choices_earn_nothing():
    """Whatever separates them, and whichever is right."""
    words = ['air', 'iron', 'wood', 'glass']
    for n in (2, 3, 4):
        for form in ('{0}', '{0}.', '({0})', '**{0}**', '{0}. {1}', '{0}) {1}', '({0}) {1}', '{0}: {1}', '{0} - {1}'):
            for between in ('\n', ', ', ' ', ' or ', ' and ', '; ', '/'):
                for whole in ('{}', 'The answer is {}.', 'Answer: {}', '<answer>{}</answer>', '\\boxed{{{}}}', '#### {}'):
                    if (whole, between) == ('#### {}', '\n'):
                        continue  # only the first line has the mark
                    text = whole.format(between.join(form.format(*each) for each in zip('ABCD'[:n], words, strict=False)))
                    assert answers.letter_in(text) is None, text


@pytest.mark.parametrize('text, forms', [
    ('So <answer>16</answer>', ['answer']), ('So $\\boxed{16}$.', ['boxed']), ('16', []), ('<answer>16', []),
    ('<answer>\\boxed{16}</answer>', ['answer', 'boxed']), ('\\boxed{16} \\boxed{18}', []),
    ('<answer>1</answer><answer>2</answer>', []), ('\\boxed{1} is what I get here', []), ('\\boxed{\\frac{1}{2}}', ['boxed'])])
def test_forms(text, forms):
    assert [form for form in answers.FORMS if answers.is_formatted(text, form)] == forms


def test_any_text_is_read_in_little_time():
    """Also the noise of a model that has learned nothing, and repetitions without an end."""
    rng = random.Random(0)
    pieces = ['<answer>', '</answer>', '\\boxed{', '{', '}', '####', 'The answer is ', 'not ', '16', ',', '.', '\n', ' ', 'A', '(B)',
              '=', '1/', '-', '$', '**', '<think>', 'or ', '\\frac{1}{', 'no, it is ', 'é', '٣', '²']
    texts = [''.join(rng.choices(pieces, k=60)) for _ in range(200)] + [piece * 1000 for piece in pieces]
    start = time.process_time()
    for text in texts:
        number, letter = answers.number_in(text), answers.letter_in(text)
        assert number is None or answers.number_in(number) == number, text
        assert letter is None or letter in answers.LETTERS
        assert answers.is_formatted(text, 'boxed') in (True, False)
    assert time.process_time() - start < 10
