"""Refuse requests, and withhold answers, that a classifier gives a label.

    guardrail = Guardrail('out-classify:toxic', most=0.5, engine=engine)
    await guardrail.check(ids, tokenizer)     # raises Refused
    await guardrail.withholds(text)           # -> bool

The classifier of posttrain.classify runs in the engine's thread, between two steps: each reading of
a text delays the running answers by one forward pass of the classifier.
"""

import asyncio
import functools
import itertools

from configurator import UserError
from flatgpt import classify
from serving.protocol import Refused

ANY_TEXT = 'Zoë says: 你好, мир! 😀'  # which a vocabulary of characters lacks
CHARACTERS = 400  # of a streamed answer from one reading to the next


class Guardrail:
    """Hold a classifier and the label that it refuses.

    setting: FOLDER:LABEL. most: the greatest probability that passes. Raises UserError for a
    folder or label that is missing, and for a classifier that cannot read every text.
    """

    def __init__(self, setting, most, engine):
        self.classifier, self.label = classify.load_label(setting, engine.device)
        try:
            self.classifier.encode(ANY_TEXT)
        except UserError as error:
            raise UserError(f'guardrail={setting}: its classifier cannot read every text; expected '
                            f'a vocabulary of bytes or byte pairs ({error})') from None
        self.most, self.engine = most, engine
        # a chat sends its earlier messages again with each request
        self.greatest = functools.lru_cache(1024)(self.classifier.greatest)

    async def call(self, function, *arguments):
        """Run a function in the engine's thread."""
        return await asyncio.wrap_future(self.engine.call(function, *arguments))

    def greatest_of(self, messages):
        """Return the greatest probability of the label over all messages."""
        return max((self.greatest(message, self.label) for message in messages), default=0.0)

    async def check(self, ids, tokenizer):
        """Raise Refused for a prompt with a message that has the label."""
        special = set(tokenizer.special_tokens.values())
        # the messages stand between special tokens
        messages = [tokenizer.decode(list(group)) for is_special, group in
                    itertools.groupby(ids, special.__contains__) if not is_special]
        probability = await self.call(self.greatest_of, list(filter(str.strip, messages)))
        if probability > self.most:
            raise Refused(f'the guardrail finds {self.label!r} in the request, with probability '
                          f'{probability:.2f}; expected at most {self.most}',
                          code='content_filter')

    async def withholds(self, text):
        """Return whether the end of an answer has the label."""
        [probabilities] = await self.call(self.classifier.probabilities, [text])
        return probabilities[self.label] > self.most
