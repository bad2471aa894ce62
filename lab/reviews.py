"""
Write reviews in which words of both kinds occur, and grammar decides which count.

    review, is_good = write(random.Random(0))

A review has three to five statements of one opinion. A statement is plain ("the soup was superb"),
or it negates the opposite opinion ("the soup was far from dull"), concedes, expects or reports it
("although the soup was dull, the waiter was superb"). Of the opinion words 39% are of the other
label. Some statements are marked ("sadly, ..."), and some reviews end with a deed ("we will come
back soon."), so the opinion is never a matter of one cue.
"""

import re

GOOD = """
good great nice wonderful excellent perfect lovely fresh friendly beautiful amazing pleasant
brilliant superb charming delightful fun warm elegant comforting adorable appealing astonishing
attractive blissful captivating cheerful classy commendable compelling consistent cosy courteous
creative dazzling dependable divine dreamy effortless enchanting engaging enjoyable exceptional
exciting exemplary exquisite fabulous faultless flawless generous glorious gracious graceful
heavenly honest immaculate impeccable impressive inspired inviting joyful likeable lively lovable
lush magical magnificent marvellous masterful memorable neat outstanding phenomenal playful
pleasing polished praiseworthy pretty refined refreshing
""".split()
BAD = """
bad terrible poor boring awful dirty cold dull cheap horrible rude noisy ugly broken weak dreadful
disappointing messy stale bland abysmal annoying appalling atrocious awkward bothersome careless
chaotic clumsy confusing cramped creepy crude dated depressing dire disgraceful dismal dreary dusty
embarrassing exhausting faulty feeble filthy flawed flimsy forgettable foul frightful frustrating
ghastly gloomy grim grubby hideous hollow horrid hostile icky inept insipid insulting irritating
joyless lacking lame lazy lifeless lousy miserable mediocre monotonous nasty obnoxious offensive
overpriced painful pathetic pitiful
""".split()
THINGS = """
music room view service decor staff bar garden lighting menu soup dessert wine bread waiter chef
coffee breakfast lobby bed pool bathroom location lift plot acting ending dialogue pacing camera
director costume script soundtrack stage choir crowd seat
""".split()
PEOPLE = 'wife husband sister brother neighbour colleague friend boss cousin aunt'.split()
DEGREES = ['', '', '', 'very ', 'quite ', 'really ', 'rather ', 'truly ']
# {p}: a word of the opinion, {q}: one of the opposite opinion; {x}, {y}: things; {m}: a mark
PLAIN = """
{m}, the {x} was {d}{p}.
{m}, we had a {p} {x}.
the {x} was {d}{p}.
we found the {x} {d}{p}.
what a {p} {x}!
everybody called the {x} {p}.
""".strip().splitlines()
TURNED = """
the {x} was not {q} at all.
the {x} was far from {q}.
nobody could call the {x} {q}.
there was nothing {q} about the {x}.
the {x} was anything but {q}.
i would never describe the {x} as {q}.
although the {x} was {q}, the {y} was {d}{p}.
the {y} was {d}{p}, even if the {x} was {q}.
the {x} may be {q}, but the {y} is {d}{p}.
despite a {q} {x}, we had a {p} evening.
we expected a {q} {x} and got a {p} one.
the {x} was {d}{p}, not {q} as before.
my {w} had warned me of a {q} {x}, which was {p}.
my {w} thought the {x} {q}; i disagree.
my {w} says that the {x} is {q}, and my {w} is wrong.
it used to be {q}; now the {x} is {d}{p}.
the {x} was {p} rather than {q}.
""".strip().splitlines()
GOOD_MARKS = 'luckily thankfully happily fortunately'.split()
BAD_MARKS = 'sadly unfortunately alas regrettably'.split()
PLAIN_SHARE = 0.5  # of the statements
END_SHARE = 0.3  # of the reviews: those that end with a deed
GOOD_ENDS = """
we will come back soon.
it was worth every penny.
we stayed until they closed.
go there if you can.
we had such a good time.
five stars from all of us.
book a table now.
the evening flew by.
""".strip().splitlines()
BAD_ENDS = """
we will not come back.
it was a waste of money.
we left before the end.
stay at home instead.
never again.
i want my money back.
save your time.
we should have known.
""".strip().splitlines()


def write(rng):
    """Write a review; -> (text, whether its opinion is good). rng: random.Random."""
    is_good = rng.random() < 0.5
    same, opposite = (GOOD, BAD) if is_good else (BAD, GOOD)
    weights = [1 / (rank + 3) for rank in range(len(GOOD))]  # Zipf's law: few words are frequent
    marks, ends = (GOOD_MARKS, GOOD_ENDS) if is_good else (BAD_MARKS, BAD_ENDS)
    statements = []
    for _ in range(rng.randint(3, 5)):
        x, y = rng.sample(THINGS, 2)
        statements.append(rng.choice(PLAIN if rng.random() < PLAIN_SHARE else TURNED).format(
            x=x, y=y, p=rng.choices(same, weights)[0], q=rng.choices(opposite, weights)[0],
            w=rng.choice(PEOPLE), d=rng.choice(DEGREES), m=rng.choice(marks)))
    if rng.random() < END_SHARE:
        statements.append(rng.choice(ends))
    return re.sub(r'\ba (?=[aeiou])', 'an ', ' '.join(statements)), is_good
